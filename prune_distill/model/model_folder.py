"""Check a Hugging Face model's folder before a run starts. No torch."""

from __future__ import annotations

from pathlib import Path

from prune_distill.errors import InputError
from prune_distill.model import hf_config, hf_tokenizer, hf_weights
from prune_distill.regular_files import folder_faults


def faults(folder: Path, *, complete: bool, allow_pickle: bool = False) -> list[str]:
    """Return the faults of a model's folder, one line each, with the file.

    Args:
        complete: whether weights and tokenizer are required, or only `config.json`.
        allow_pickle: whether `pytorch_model*.bin` is accepted if there are no safetensors.
    """
    if found := folder_faults(folder):
        return found
    config, found = hf_config.examine(folder / "config.json")
    if complete and config is not None:
        found += hf_weights.faults(folder, config, allow_pickle=allow_pickle)
    return found + (hf_tokenizer.faults(folder) if complete else [])


def check(folder: Path, *, complete: bool, allow_pickle: bool = False) -> None:
    """Check a folder. Raises: InputError, with all faults, one line each."""
    if found := faults(folder, complete=complete, allow_pickle=allow_pickle):
        raise InputError("\n".join(found))
