"""The results of an evaluation as its files contain them: `evaluation.json`, `samples.json` and `recovery.json`.

No torch. Keys are optional where a reader may find a file of another version.
"""

from __future__ import annotations

from typing import TypedDict

from prune_distill.model.model_size import ModelSizes


class SourceLoss(TypedDict, total=False):
    """Held-out loss on the documents of one source or cluster, in nats per token."""

    val_loss: float
    tokens: int


class Agreement(TypedDict, total=False):
    """How far a model agrees with its teacher.

    Attributes:
        top1: the share of tokens for which both have the same most probable token.
        kl: KL(teacher || model) in nats per token.
    """

    top1: float
    kl: float


class HeldOut(TypedDict, total=False):
    """Held-out loss in nats per token; `per_source` with several sources, `agreement` with a teacher."""

    val_loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    per_source: dict[str, SourceLoss]
    agreement: Agreement


class Metric(TypedDict):
    """A metric of a task. `stderr`: the harness's standard error, where it computes one."""

    value: float
    stderr: float | None


# A task's metrics by name, and `samples`, the number of its questions.
TaskScores = dict[str, Metric | int]


class ModelEntry(ModelSizes, HeldOut, total=False):
    """A model's entry in `evaluation.json`. `tasks_failed`: why tasks could not be measured, by name."""

    tasks: dict[str, TaskScores]
    tasks_failed: dict[str, str]


class SampleTexts(TypedDict):
    """An entry of `samples.json`: the beginning of a document, what follows there, and each model's continuation."""

    prompt: str
    reference: str
    texts: dict[str, str]


class RecoveryPoint(TypedDict, total=False):
    """An entry of `recovery.json`: a checkpoint, after so many steps and tokens."""

    model: str
    step: int
    tokens: int
    val_loss: float
    agreement: Agreement
    tasks: dict[str, TaskScores]
