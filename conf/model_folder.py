"""What can be known of a Hugging Face model's folder before anything is started. No torch."""

from __future__ import annotations

from pathlib import Path

from conf import hf_config, hf_weights
from conf.errors import InputError
from conf.regular_files import folder_faults


def faults(folder: Path, *, weights: bool, allow_pickle: bool = False) -> list[str]:
    """The faults of a model's folder, one line each, naming the file.

    Args:
        weights: whether the weights are needed, or only what describes the model.
        allow_pickle: whether `pytorch_model*.bin` is accepted where there are no safetensors.
    """
    if found := folder_faults(folder):
        return found
    config, found = hf_config.examine(folder / "config.json")
    if weights and config is not None:
        found += hf_weights.faults(folder, config, allow_pickle=allow_pickle)
    return found


def check(folder: Path, *, weights: bool, allow_pickle: bool = False) -> None:
    """Raises: InputError, with all faults of the folder, one line each."""
    if found := faults(folder, weights=weights, allow_pickle=allow_pickle):
        raise InputError("\n".join(found))
