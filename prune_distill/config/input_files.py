"""The user's files that a run reads, and the settings of the Hub's libraries that jobs and containers need."""

from __future__ import annotations

import os
from collections.abc import Iterator

from prune_distill.config.data_files import find_existing, is_on_hub
from prune_distill.config.values import named_models
from prune_distill.model.hf_shape import may_be_hub_id
from prune_distill.schema import RunConfig

# Where huggingface_hub, datasets and transformers keep and look for files, and whether they ask the Hub. Jobs and
# containers inherit these from the shell that starts them.
HUB_FOLDERS = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_DATASETS_CACHE")
HUB_SETTINGS = ("HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
# Linux follows no more links than this in one path.
_MOST_LINKS = 40


def absolute(path: str) -> str:
    """A path of the user's that means the same in any working directory."""
    return os.path.abspath(os.path.expanduser(path))


def input_files(cfg: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield the user's files that a run reads: the key that names them, and an absolute path.

    Each folder occurs once, and so does each folder that their links lead to.
    """
    for key, path in _models(cfg).items():
        if not may_be_hub_id(path):
            yield key, absolute(path)
            found = sorted(_link_targets(absolute(path)), reverse=True)
            yield from ((key, target) for target in {os.path.dirname(target): target for target in found}.values())
    patterns = {f"data.{key}": getattr(cfg.data, key) or [] for key in ("train", "validation")}
    patterns |= {f"data.sources.{name}.files": source.files for name, source in (cfg.data.sources or {}).items()}
    if cfg.distill.on_policy is not None:
        patterns["distill.on_policy.prompts"] = cfg.distill.on_policy.prompts or []
    for key, names in patterns.items():
        files = [absolute(file) for name in names if not is_on_hub(name) for file in find_existing(name)]
        found = sorted({*files, *(target for file in files for target in _link_targets(file))})
        for path in {os.path.dirname(file): file for file in reversed(found)}.values():
            yield key, path
    # Its default is a Hub id; a folder is named outright.
    if os.path.exists(cfg.data.source_tokenizer):
        yield "data.source_tokenizer", absolute(cfg.data.source_tokenizer)


def hub_folders(cfg: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield the folders of the Hub's caches in which jobs look for models, with the variables that name them."""
    if not any(may_be_hub_id(path) and not os.path.exists(path) for path in _models(cfg).values()):
        return
    for name in HUB_FOLDERS:
        folder = absolute(os.environ.get(name) or os.devnull)
        if os.path.isdir(folder):
            yield name, os.path.join(folder, "")


def _models(cfg: RunConfig) -> dict[str, str]:
    """Return the folders or Hub ids of a run's models, by key."""
    paths = {f"{key}.hf_path": model.hf_path for key, model in named_models(cfg).items()}
    return {key: path for key, path in paths.items() if path is not None}


def _link_targets(path: str) -> Iterator[str]:
    """Yield what the links of a file, or those in a folder, lead to outside of it, link by link.

    In a snapshot of the Hub's cache every file is a link to a blob in another folder.
    """
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    files = [os.path.join(place, name) for place, _, names in os.walk(path) for name in names] or [path]
    for file in files:
        for _ in range(_MOST_LINKS):
            if not os.path.islink(file):
                break
            file = os.path.normpath(os.path.join(os.path.realpath(os.path.dirname(file)), os.readlink(file)))
            if os.path.lexists(file) and os.path.commonpath([folder, file]) != folder:
                yield file
