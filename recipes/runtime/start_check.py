"""What a training refuses to start from: weights that were not loaded, and another model's checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback

from conf.errors import InputError
from recipes.runtime import nemo_api

# What makes two models' checkpoints differ, in Megatron's terms.
SIZES = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
    "vocab_size",
)


class StartCheck(Callback):
    """Before the first step: every parameter of the student, and of the teacher, came from its checkpoint."""

    def __init__(self, start: Path) -> None:
        self.start = start

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        nemo_api.check_parameters(trainer.strategy.megatron_parallel.sharded_state_dict(), self.start)
        teacher = getattr(nemo_api.core_model(pl_module), "teacher_model", None)
        if teacher is not None:
            nemo_api.check_parameters(teacher.sharded_state_dict(prefix="module."), Path(pl_module._teacher_ckpt_path))


def check_resumed(config: Any, checkpoint: Path) -> None:
    """Refuses to go on from another model's checkpoint.

    Args:
        config: the Megatron config of the model that is trained.

    Raises:
        InputError: names the sizes of both.
    """
    found = nemo_api.load_model(checkpoint).config
    sizes = {name: (getattr(found, name), getattr(config, name)) for name in SIZES}
    other = {name: pair for name, pair in sizes.items() if pair[0] != pair[1]}
    if other:
        theirs = ", ".join(f"{name} {pair[0]}" for name, pair in other.items())
        ours = ", ".join(f"{name} {pair[1]}" for name, pair in other.items())
        raise InputError(
            f"{checkpoint} holds another model ({theirs}) than the one that is trained ({ours}); take it out of"
            f" {checkpoint.parent}"
        )
