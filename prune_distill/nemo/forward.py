"""Forward passes of Megatron models without gradients. They use Megatron's schedule, so every layout works."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_batch_on_this_cp_rank

from prune_distill.nemo import backend


def run_forward(
    model: Any,
    batches: Sequence[torch.Tensor],
    receive: Callable[[torch.Tensor], None],
    boundaries: Sequence[torch.Tensor] | None = None,
) -> None:
    """Run a model over micro batches of token ids. All ranks of a replica pass the same batches.

    Args:
        model: a Megatron model, or this rank's pipeline stage of it. Its training or evaluation mode is kept.
        batches: `[b, s]` each, all of the same shape. Under context parallelism each rank processes its part of `s`.
        receive: called on the last pipeline stage with the logits of each micro batch in order,
            `[b, s / context-parallel ranks, v / tensor-parallel ranks]`.
        boundaries: for each micro batch, of one sequence then, the first tokens of its packed documents and `s`,
            `[documents + 1]` int32; None: the sequences are not packed.
    """

    def step(source: Iterator[Any], stage: Any) -> Any:
        tokens, ends = next(source)
        tokens = tokens.to(backend.activate().device)
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        batch = get_batch_on_this_cp_rank({"tokens": tokens, "position_ids": positions})
        packed = {} if ends is None else {"packed_seq_params": _packed_seq_params(ends.to(tokens.device))}
        logits = stage(batch["tokens"], batch["position_ids"], None, **packed)
        return logits, lambda output, non_loss_data: receive(output)

    micro_batch_size, seq_length = batches[0].shape
    with torch.no_grad():
        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=zip(batches, boundaries or [None] * len(batches), strict=True),
            model=model,
            num_microbatches=len(batches),
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            forward_only=True,
            # Without it, the schedule expects a loss.
            collect_non_loss_data=True,
        )


def _packed_seq_params(ends: torch.Tensor) -> PackedSeqParams:
    longest = int(ends.diff().max())
    return PackedSeqParams("thd", ends, ends, max_seqlen_q=longest, max_seqlen_kv=longest)
