"""Write folders atomically."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prune_distill.atomic_files import sync
from prune_distill.errors import InputError
from prune_distill.pipeline.artifact import remove_folder


@contextmanager
def replace_folder(folder: Path, *sources: Path) -> Iterator[Path]:
    """Yield an empty folder that replaces `folder` when the block ends, after everything is synced to disk.

    Leftovers of earlier attempts are removed. If the block raises, `folder` is unchanged.

    Args:
        sources: folders that the block reads.

    Raises:
        InputError: `folder` is not a model and must not be replaced, or cannot be written.
    """
    folder = folder.resolve()
    _refuse(folder, sources)
    partial = folder.with_name(f".partial.{folder.name}")
    for leftover in (partial, folder.with_name(f".removed.{folder.name}")):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(f"{folder} cannot be written ({error.strerror}); choose another folder") from error
    try:
        yield partial
        for path in [partial, *partial.rglob("*")]:
            sync(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if folder.exists():
        remove_folder(folder)
    partial.rename(folder)
    sync(folder.parent)


def _refuse(folder: Path, sources: tuple[Path, ...]) -> None:
    for source in map(Path.resolve, sources):
        if source.is_relative_to(folder) or folder.is_relative_to(source):
            raise InputError(f"{folder} and its source {source} must not contain each other; choose another folder")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; choose another folder")
    models = ("config.json", "context/io.json")
    if folder.exists() and any(folder.iterdir()) and not any((folder / name).exists() for name in models):
        raise InputError(f"{folder} would be replaced, but does not contain a model; choose another folder")
