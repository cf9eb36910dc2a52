"""What a training refuses to start from: weights that were not loaded, a teacher that knows nothing, and another
model's checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.utils import get_batch_on_this_cp_rank

from prune_distill.errors import InputError
from prune_distill.nemo import backend, nemo_api

# What makes two models' checkpoints differ, in Megatron's terms.
SIZES = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
    *("num_moe_experts", "moe_ffn_hidden_size", "moe_router_topk", "vocab_size"),
)


class StartCheck(Callback):
    """Before the first step: every parameter of the student, and of the teacher, came from its checkpoint, and the
    teacher does better than chance on the first validation sequences.

    Args:
        start: the checkpoint that training started from; None: random weights.
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
        chance = math.log(pl_module._teacher_config.vocab_size)
        if not loss < chance:
            raise InputError(
                f"the teacher's loss on the first validation documents is {loss:.3f} nats a token, no better than"
                f" chance ({chance:.3f}): check the weights in {pl_module._teacher_ckpt_path}, and that the data were"
                " prepared with this model's tokenizer"
            )


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


def _teacher_loss(teacher: Any, batch: dict[str, torch.Tensor]) -> float:
    """The language-model loss of a Megatron model on a batch, nats per token, the same on all ranks.

    Through Megatron's own schedule, so that every layout is served: NeMo's distillation model hides the teacher's loss
    (nemo/collections/llm/modelopt/distill/utils.py:182).

    Args:
        batch: `tokens`, `labels`, `position_ids`, each `[b, s]`, the same on all ranks.
    """
    device = backend.activate().device
    size, seq_length = batch["tokens"].shape
    batch = get_batch_on_this_cp_rank({name: tensor.to(device) for name, tensor in batch.items()})
    total = torch.zeros(2, dtype=torch.float64, device=device)

    def forward(data: Any, model: Any) -> tuple[torch.Tensor, Any]:
        def add_up(logits: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
            labels = batch["labels"].transpose(0, 1).contiguous()
            losses = vocab_parallel_cross_entropy(logits.transpose(0, 1).contiguous().float(), labels)
            total[0] += losses.sum()
            total[1] += losses.numel()
            return losses.mean(), {}

        return model(batch["tokens"], batch["position_ids"], None), add_up

    teacher.eval()
    with torch.no_grad(), _own_output_layer(teacher):
        get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=None,
            model=teacher,
            num_microbatches=1,
            seq_length=seq_length,
            micro_batch_size=size,
            forward_only=True,
        )
    for module in teacher.modules():
        # What ModelOpt's hooks keep of a forward pass for the loss (modelopt/torch/distill/distillation_model.py).
        if getattr(module, "_intermediate_output", None) is not None:
            module._intermediate_output = None
    torch.distributed.all_reduce(total, group=parallel_state.get_context_parallel_group())
    torch.distributed.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())
    return float(total[0] / total[1])


@contextmanager
def _own_output_layer(model: Any) -> Iterator[None]:
    """Has the output layer give logits, where distillation has made it hand on hidden states (`FusedHead`)."""
    layer: Any = getattr(model, "output_layer", None)  # on the last pipeline stage
    replaced = None if layer is None else layer.__dict__.pop("forward", None)
    try:
        yield
    finally:
        if replaced is not None:
            layer.forward = replaced
