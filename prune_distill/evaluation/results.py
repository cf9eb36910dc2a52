"""The content of an evaluation's files: `evaluation.json`, `samples.json` and `recovery.json`.

No torch. Keys are optional for readers, because another version may have written the file.
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
        top1: fraction of tokens for which both have the same most probable token.
        kl: KL(teacher || model) in nats per token.
    """

    top1: float
    kl: float


class HeldOut(TypedDict, total=False):
    """Held-out loss in nats per token; `per_source` for several sources, `agreement` if compared with a teacher."""

    val_loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    per_source: dict[str, SourceLoss]
    agreement: Agreement


class Metric(TypedDict):
    """A metric of a task. `stderr`: the harness's standard error, if it computes one."""

    value: float
    stderr: float | None


# A task's metrics by name, and `samples`, the number of its questions.
TaskScores = dict[str, Metric | int]


class ModelEntry(ModelSizes, HeldOut, total=False):
    """A model's entry in `evaluation.json`.

    Attributes:
        engine: what computed the held-out loss, if it was not transformers.
        tasks_failed: reasons why tasks could not be measured, by name.
    """

    engine: str
    tasks: dict[str, TaskScores]
    tasks_failed: dict[str, str]


class SampleTexts(TypedDict):
    """An entry of `samples.json`: a prompt, its original continuation, and the continuation of each model."""

    prompt: str
    reference: str
    texts: dict[str, str]


class RecoveryPoint(TypedDict, total=False):
    """An entry of `recovery.json`: a checkpoint with its steps and tokens."""

    model: str
    step: int
    tokens: int
    val_loss: float
    agreement: Agreement
    tasks: dict[str, TaskScores]
