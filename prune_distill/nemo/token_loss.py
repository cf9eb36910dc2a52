"""Losses averaged over the learned tokens of a global batch, however it is divided into micro batches and ranks.

Megatron averages each micro batch over its own learned tokens, then over micro batches and ranks
(megatron/core/pipeline_parallel/schedules.py:238-247). With loss masks that weights a token by how many others of its
micro batch are learned, so that the result depends on the micro batch size and on the number of ranks. Megatron's own
`calculate_per_token_loss` divides the gradients by the learned tokens after the last micro batch. It would divide the
auxiliary loss of a mixture of experts by them as well, which covers all tokens, masked ones included
(megatron/core/transformer/moe/router.py:400-409). Here each micro batch is divided by the learned tokens of the global
batch at once, which `batches.StepSizes` counts before the step.

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
    """The mean of a loss over the learned tokens of a global batch.

    Attributes:
        learned: learned tokens of the global batch, over its micro batches on all ranks: what each micro batch's sum
            is divided by. Set before each training step; without effect on what is reported.
        total: sum of the losses and number of learned tokens of all steps since `reset`, over all data- and
            context-parallel ranks, `[2]` float64; zeros on all but the last pipeline stage.
    """

    def __init__(self) -> None:
        super().__init__()
        self.learned = 1.0
        self.total = torch.zeros(2, dtype=torch.float64)

    def forward(self, batch: dict[str, Tensor], forward_out: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss whose gradient Megatron takes, and the micro batch's sums: losses by part, and learned tokens."""
        mask = batch["loss_mask"]
        loss, sums = self.add_up(mask, forward_out)
        return loss / self.learned, {"sums": torch.stack([*sums, mask.sum()]).detach().double()}

    def add_up(self, mask: Tensor, forward_out: Any) -> tuple[Tensor, list[Tensor]]:
        """The sum over this rank's learned tokens, and what is reported: the whole loss's sum first, then its parts'.

        Args:
            mask: `[b, s]`, 1 where a token is learned and 0 elsewhere.
            forward_out: the loss of each token, `[b, s]`.
        """
        loss = masked_sum(forward_out, mask)
        return loss, [loss]

    def reduce(self, losses_reduced_per_micro_batch: Sequence[dict[str, Tensor]]) -> Tensor:
        """The mean over the learned tokens of all micro batches and ranks; 0 where none is learned."""
        sums = torch.stack([losses["sums"] for losses in losses_reduced_per_micro_batch]).sum(0)
        torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        self.total = self.total.to(sums.device) + sums[[0, -1]]
        return self.report(sums[:-1] / sums[-1].clamp(min=1))

    def report(self, means: Tensor) -> Tensor:
        """The whole loss of a step's means, as `add_up` orders them: a float32 scalar."""
        return means[0].float()

    def reset(self) -> None:
        """Starts a new `total`."""
        self.total = torch.zeros_like(self.total)

    def mean(self, where: str) -> float:
        """The mean loss over all learned tokens since `reset`, nats per token. All ranks call it.

        Args:
            where: which sequences these were, for the message.

        Raises:
            InputError: no token of them is learned.
        """
        total = self.total.to(backend.activate().device)
        torch.distributed.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())
        loss, tokens = total.tolist()
        if not tokens:
            raise InputError(
                f"data.mask_prompts=true: none of the tokens of {where} is learned, as they hold prompts alone; bring"
                " conversations whose answers fit into a sequence, use longer or more sequences, or set"
                " data.mask_prompts=false"
            )
        return float(loss / tokens)


def masked_sum(losses: Tensor, mask: Tensor) -> Tensor:
    """The sum of the losses `[b, s]` of learned tokens, float32."""
    return (losses.float() * mask).sum()


def average_over_tokens(model: Any) -> None:
    """Has a NeMo model average its losses over learned tokens. One with a training loss of its own keeps that."""
    model._training_loss_reduction, model._validation_loss_reduction = TokenLoss(), TokenLoss()
