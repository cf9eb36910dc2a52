"""Compute the held-out loss, in total and by source, and the per-token agreement of a model with its teacher."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from prune_distill.data.folder import DataFolder
from prune_distill.errors import InputError
from prune_distill.evaluation.results import Agreement, HeldOut
from prune_distill.nemo import ranks
from prune_distill.pipeline.stage_main import rank, world_size
from prune_distill.schema import EvaluateConfig

log = logging.getLogger("recipes.evaluate")

# Maximum number of fp32 logits per chunk: 128 MiB per buffer.
CHUNK_LOGITS = 2**25
# Maximum bytes of host memory for cached logits.
KEPT_BYTES = 2**30

# Computes `_score_tokens` of a batch from its index and its tokens `[b, s + 1]`.
Score = Callable[[int, torch.Tensor], torch.Tensor]


class Logits:
    """A model's logits for the held-out sequences, batch by batch.

    Args:
        keep: whether to cache up to `KEPT_BYTES`, so that the model runs once for comparisons with several others.
    """

    def __init__(self, model: Any, *, keep: bool = False) -> None:
        self.model, self._room = model, KEPT_BYTES if keep else 0
        self._kept: dict[int, torch.Tensor] = {}

    def compute(self, batch: int, ids: torch.Tensor) -> torch.Tensor:
        """Compute logits `[b * s, V]`, in the model's type, for a batch `[b, s + 1]` of tokens without its last column.

        Args:
            batch: index of the batch, the same in each comparison.
        """
        if batch in self._kept:
            return self._kept[batch].to(ids.device)
        logits: torch.Tensor = self.model(ids[:, :-1], use_cache=False).logits.flatten(0, 1)
        if logits.nbytes <= self._room:
            self._room -= logits.nbytes
            self._kept[batch] = logits.cpu()
        return logits


@dataclass(frozen=True)
class Served:
    """What an engine computed for this rank's held-out sequences.

    Attributes:
        log_probs: the log-probability of each token but the first, `[n, s]`.
        top: the most probable token in the place of each, `[n, s]`.
    """

    log_probs: torch.Tensor
    top: torch.Tensor


def measure_heldout(model: Logits, teacher: Logits | None, data: DataFolder, cfg: EvaluateConfig) -> HeldOut:
    """Compute a model's held-out loss, and its agreement with `teacher`.

    The loss is the mean over all tokens of the validation documents, concatenated and cut into sequences of
    `cfg.seq_length`, including end-of-document tokens. Sequences are distributed over ranks.

    `bits_per_byte` refers to the documents' UTF-8 text.

    Raises:
        InputError: there are fewer held-out tokens than in a sequence.
    """

    def score(number: int, ids: torch.Tensor) -> torch.Tensor:
        ids = ids.to(model.model.device)
        logits = model.compute(number, ids)
        return _score_tokens(logits, None if teacher is None else teacher.compute(number, ids), ids[:, 1:].flatten())

    return _measure(score, data, cfg, () if teacher is None else ("top1", "kl"))


def measure_served(served: Served, teacher: Logits, vocab_size: int, data: DataFolder, cfg: EvaluateConfig) -> HeldOut:
    """Compute what `measure_heldout` does from an engine's results, which do not determine the KL divergence.

    `vocab_size`: of the served model.
    """
    parts = zip(served.log_probs.split(cfg.micro_batch_size), served.top.split(cfg.micro_batch_size), strict=True)

    def score(number: int, ids: torch.Tensor) -> torch.Tensor:
        log_probs, top = (part.flatten() for part in next(parts))
        values = torch.zeros(len(top), 4, dtype=torch.float64)
        values[:, 0], values[:, 1] = -log_probs.double(), 1
        logits = teacher.compute(number, ids.to(teacher.model.device))
        values[:, 2] = (logits[:, :vocab_size].argmax(-1).cpu() == top).double()
        return values

    return _measure(score, data, cfg, ("top1",))


def heldout_sequences(data: DataFolder, cfg: EvaluateConfig) -> torch.Tensor:
    """Return this rank's held-out sequences, `[n, s + 1]`."""
    return _sequences(data, cfg)[rank() :: world_size()]


def _sequences(data: DataFolder, cfg: EvaluateConfig) -> torch.Tensor:
    sequences = torch.from_numpy(data.validation_sequences(cfg.seq_length))[: cfg.max_sequences]
    if not len(sequences):
        raise InputError(
            f"evaluate.seq_length={cfg.seq_length}: the validation documents have only {data.validation_tokens} tokens;"
            " lower it, or add documents"
        )
    return sequences


def _measure(score: Score, data: DataFolder, cfg: EvaluateConfig, compared: Sequence[str]) -> HeldOut:
    """Sum the scores of all tokens over batches and ranks, and summarize them.

    Args:
        score: computes `_score_tokens` of a batch.
        compared: the measures of the agreement with the teacher that the scores contain.
    """
    sequences = _sequences(data, cfg)
    names, kinds = _kinds(data, sequences)
    # For each kind of document: loss, tokens, agreement with the teacher, KL divergence.
    sums = torch.zeros(len(names), 4, dtype=torch.float64)
    with torch.inference_mode():
        share = slice(rank(), None, world_size())
        batches = (part[share].split(cfg.micro_batch_size) for part in (sequences, kinds))
        for number, (ids, token_kinds) in enumerate(zip(*batches, strict=True)):
            sums.index_add_(0, token_kinds.flatten(), score(number, ids).cpu())
    return _summary(ranks.all_reduce(sums), names, data, compared)


def _score_tokens(logits: torch.Tensor, teacher_logits: torch.Tensor | None, targets: torch.Tensor) -> torch.Tensor:
    """Return `[b * s, 4]` fp64: cross-entropy, 1, same most probable token, KL(teacher || model).

    If the vocabularies differ in size, the teacher is renormalized over the ids that both have, so that it gives the
    model's other ids no probability, as in the loss of the distillation.
    """
    shared = logits.shape[-1] if teacher_logits is None else min(logits.shape[-1], teacher_logits.shape[-1])
    values = torch.zeros(len(targets), 4, dtype=torch.float64, device=logits.device)
    values[:, 1] = 1
    chunk = max(1, CHUNK_LOGITS // logits.shape[-1])
    for start in range(0, len(targets), chunk):
        part = slice(start, start + chunk)
        log_probs = torch.log_softmax(logits[part].float(), -1)
        values[part, 0] = -log_probs.gather(-1, targets[part, None]).squeeze(-1).double()
        if teacher_logits is not None:
            teacher = torch.log_softmax(teacher_logits[part, :shared].float(), -1)
            values[part, 2] = (teacher.argmax(-1) == log_probs.argmax(-1)).double()
            values[part, 3] = torch.nn.functional.kl_div(
                log_probs[:, :shared], teacher, reduction="none", log_target=True
            ).sum(-1).double()  # fmt: skip
    return values


def _kinds(data: DataFolder, sequences: torch.Tensor) -> tuple[list[str], torch.Tensor]:
    """Return the names of sources or clusters, and the index of each predicted token's name, `[sequences, s]`."""
    count, length = sequences.shape[0], sequences.shape[1] - 1
    groups = data.validation_groups()
    if groups is None:
        return ["all"], torch.zeros(count, length, dtype=torch.long)
    names, numbers = groups
    return names, torch.from_numpy(numbers[1 : count * length + 1].astype("int64")).view(count, length)


def _summary(sums: torch.Tensor, names: list[str], data: DataFolder, compared: Sequence[str]) -> HeldOut:
    total = sums.sum(0)
    tokens = int(total[1])
    loss = (total[0] / total[1]).item()
    result: HeldOut = {
        "val_loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "bits_per_byte": loss / math.log(2) * data.validation_tokens / data.validation_bytes,
        "tokens": tokens,
    }
    if not math.isfinite(loss):
        log.warning("the held-out loss is not finite; check the model's weights")
    if len(names) > 1:
        result["per_source"] = {
            name: {"val_loss": (row[0] / row[1]).item(), "tokens": int(row[1])}
            for name, row in zip(names, sums, strict=True)
            if row[1]
        }
    if compared:
        agreement: Agreement = {"top1": (total[2] / total[1]).item()}
        if "kl" in compared:
            agreement["kl"] = (total[3] / total[1]).item()
        result["agreement"] = agreement
    return result
