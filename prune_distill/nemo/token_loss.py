"""Losses averaged over the unmasked tokens of a global batch, independent of micro batches and ranks.

Megatron averages each micro batch over its own unmasked tokens, then over micro batches and ranks
(megatron/core/pipeline_parallel/schedules.py:238-247). With loss masks, the result then depends on the micro batch size
and on the number of ranks. Megatron's `calculate_per_token_loss` divides the gradients by the number of unmasked tokens
after the last micro batch. It also divides the auxiliary loss of a mixture of experts, which covers all tokens, masked
ones included (megatron/core/transformer/moe/router.py:400-409). Here each micro batch is divided by the unmasked tokens
of the global batch, which `batches.StepSizes` counts before the step.

Import this module after `backend.activate()`; the runner calls that before it imports a stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from nemo.lightning.megatron_parallel import MaskedTokenLossReduction
from torch import Tensor

from prune_distill.errors import InputError
from prune_distill.nemo import backend


class TokenLoss(MaskedTokenLossReduction):
    """Mean of a loss over the unmasked tokens of a global batch.

    Attributes:
        learned: divisor of each micro batch's sum: unmasked tokens of the global batch per micro batch and rank. Set
            before each training step; does not affect the reported values.
        total: `[2]` float64, sum of the losses and number of unmasked tokens of all steps since `reset`, over all data-
            and context-parallel ranks; zeros except on the last pipeline stage.
    """

    def __init__(self) -> None:
        super().__init__()
        self.learned = 1.0
        self.total = torch.zeros(2, dtype=torch.float64)

    def forward(self, batch: dict[str, Tensor], forward_out: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss for the gradient, and the sums of the micro batch: losses by part, and unmasked tokens."""
        mask = batch["loss_mask"]
        loss, sums = self.add_up(mask, forward_out)
        return loss / self.learned, {"sums": torch.stack([*sums, mask.sum()]).detach().double()}

    def add_up(self, mask: Tensor, forward_out: Any) -> tuple[Tensor, list[Tensor]]:
        """Return the sum over this rank's unmasked tokens, and the reported sums: the total loss, then its parts.

        Args:
            mask: `[b, s]`, 1 for unmasked tokens and 0 for others.
            forward_out: loss per token, `[b, s]`.
        """
        loss = masked_sum(forward_out, mask)
        return loss, [loss]

    def reduce(self, losses_reduced_per_micro_batch: Sequence[dict[str, Tensor]]) -> Tensor:
        """Return the mean over the unmasked tokens of all micro batches and ranks; 0 if all are masked."""
        sums = torch.stack([losses["sums"] for losses in losses_reduced_per_micro_batch]).sum(0)
        torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        self.total = self.total.to(sums.device) + sums[[0, -1]]
        return self.report(sums[:-1] / sums[-1].clamp(min=1))

    def report(self, means: Tensor) -> Tensor:
        """Return the total loss of a step as a float32 scalar, from means in the order of `add_up`."""
        return means[0].float()

    def reset(self) -> None:
        """Reset `total`."""
        self.total = torch.zeros_like(self.total)

    def mean(self, where: str) -> float:
        """Return the mean loss over all unmasked tokens since `reset`, in nats per token. All ranks call it.

        Args:
            where: which sequences these are, for the message.

        Raises:
            InputError: all tokens are masked.
        """
        total = self.total.to(backend.activate().device)
        torch.distributed.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())
        loss, tokens = total.tolist()
        if not tokens:
            raise InputError(
                f"data.learn: all tokens of {where} are prompts; add conversations whose answers fit into a sequence,"
                " use longer or more sequences, or set data.learn=all"
            )
        return float(loss / tokens)


def masked_sum(losses: Tensor, mask: Tensor) -> Tensor:
    """Return the sum of the losses `[b, s]` of unmasked tokens, float32."""
    return (losses.float() * mask).sum()


def average_over_tokens(model: Any) -> None:
    """Make a NeMo model average its losses over unmasked tokens. A model with its own training loss keeps it."""
    model._training_loss_reduction, model._validation_loss_reduction = TokenLoss(), TokenLoss()
