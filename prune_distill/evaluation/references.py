"""The models with which students are compared."""

from __future__ import annotations

from pathlib import Path

from prune_distill.model.huggingface import local_folder
from prune_distill.schema import RunConfig


def find_references(cfg: RunConfig, teacher: Path | str, original: Path | str | None) -> tuple[Path, Path]:
    """Return the local folders of the teacher and of the model that is pruned, which is the teacher unless `original`
    is given. Models from the Hub are downloaded."""
    if original is None:
        folder = local_folder(teacher, cfg.model.revision, weights=True)
        return folder, folder
    return (
        local_folder(teacher, cfg.teacher.revision, weights=True),
        local_folder(original, cfg.model.revision, weights=True),
    )
