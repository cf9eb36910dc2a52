"""Checks before the first training step: all weights are loaded, the teacher is better than chance, and a checkpoint to
resume from belongs to the same model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from megatron.core import parallel_state
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.utils import get_batch_on_this_cp_rank

from prune_distill.errors import InputError
from prune_distill.nemo import backend, nemo_api
from prune_distill.nemo.chance import require_better_than_chance
from prune_distill.nemo.forward import run_forward

# Fields of Megatron's config that determine the shapes of a checkpoint's tensors.
SIZES = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
    *("num_moe_experts", "moe_ffn_hidden_size", "moe_router_topk", "vocab_size"),
)


class StartCheck(Callback):
    """Checks before the first step that all parameters of student and teacher were loaded, and that the teacher is
    better than chance on the first validation sequences.

    Args:
        start: the checkpoint with the initial weights; None: random weights.
    """

    def __init__(self, start: Path | None) -> None:
        self.start = start

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self.start is not None:
            nemo_api.check_parameters(trainer.strategy.megatron_parallel.sharded_state_dict(), self.start)
        teacher = getattr(nemo_api.core_model(pl_module), "teacher_model", None)
        if teacher is None:
            return
        nemo_api.check_parameters(teacher.sharded_state_dict(prefix="module."), Path(pl_module._teacher_ckpt_path))
        loss = _teacher_loss(teacher, trainer.datamodule.first_validation())
        require_better_than_chance(
            loss,
            pl_module._teacher_config.vocab_size,
            "the first validation documents",
            f"check the weights in {pl_module._teacher_ckpt_path}, and that the data were prepared with this model's"
            " tokenizer",
        )


def check_resumed(config: Any, checkpoint: Path) -> None:
    """Reject a checkpoint of another model.

    Args:
        config: the Megatron config of the model to train.

    Raises:
        InputError: the checkpoint contains another model; states the sizes of both.
    """
    found = nemo_api.load_model(checkpoint).config
    sizes = {name: (getattr(found, name), getattr(config, name)) for name in SIZES}
    other = {name: pair for name, pair in sizes.items() if pair[0] != pair[1]}
    if other:
        theirs = ", ".join(f"{name} {pair[0]}" for name, pair in other.items())
        ours = ", ".join(f"{name} {pair[1]}" for name, pair in other.items())
        raise InputError(
            f"{checkpoint} contains another model ({theirs}) than the one to train ({ours}); move it out of"
            f" {checkpoint.parent}"
        )


def _teacher_loss(teacher: Any, batch: dict[str, torch.Tensor]) -> float:
    """Return the language modeling loss of a Megatron model on a batch, in nats per token, on all ranks.

    NeMo's distillation model does not expose it (nemo/collections/llm/modelopt/distill/utils.py:182).

    Args:
        batch: `tokens` and `labels`, each `[b, s]`, the same on all ranks.
    """
    device = backend.activate().device
    labels = get_batch_on_this_cp_rank({"labels": batch["labels"].to(device)})["labels"].transpose(0, 1).contiguous()
    total = torch.zeros(2, dtype=torch.float64, device=device)

    def add_losses(logits: torch.Tensor) -> None:
        losses = vocab_parallel_cross_entropy(logits.transpose(0, 1).contiguous().float(), labels)
        total[0] += losses.sum()
        total[1] += losses.numel()

    teacher.eval()
    with _original_output_layer(teacher):
        run_forward(teacher, [batch["tokens"]], add_losses)
    for module in teacher.modules():
        # ModelOpt's hooks store outputs of the forward pass for the loss
        # (modelopt/torch/distill/distillation_model.py).
        if getattr(module, "_intermediate_output", None) is not None:
            module._intermediate_output = None
    torch.distributed.all_reduce(total, group=parallel_state.get_context_parallel_group())
    torch.distributed.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())
    return float(total[0] / total[1])


@contextmanager
def _original_output_layer(model: Any) -> Iterator[None]:
    """Restore the output layer, whose forward pass `FusedHead` may have replaced, for a block."""
    layer: Any = getattr(model, "output_layer", None)  # on the last pipeline stage
    replaced = None if layer is None else layer.__dict__.pop("forward", None)
    try:
        yield
    finally:
        if replaced is not None:
            layer.forward = replaced
