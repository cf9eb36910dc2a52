"""What can be known of a Hugging Face model's folder before anything is started. No torch."""

from __future__ import annotations

from pathlib import Path

from conf import hf_config
from conf.errors import InputError


def faults(folder: Path) -> list[str]:
    """The faults of a model's folder, one line each, naming the file."""
    _, found = hf_config.examine(folder / "config.json")
    return found


def check(folder: Path) -> None:
    """Raises: InputError, with all faults of the folder, one line each."""
    if found := faults(folder):
        raise InputError("\n".join(found))
