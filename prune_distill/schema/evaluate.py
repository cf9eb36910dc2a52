"""Evaluation: held-out loss and tasks."""

from __future__ import annotations

from dataclasses import dataclass, field

from prune_distill.schema.fields import placement


@dataclass
class Continuations:
    """A multiple-choice task that is made of the run's own held-out documents, in the harness's format: which of four
    continuations follows a text? The wrong ones are taken from other documents."""

    questions: int = 150
    context_words: int = 20
    choice_words: int = 10


@dataclass
class EvaluateConfig:
    """What is measured of the Hugging Face models, and the checks of both conversions."""

    seq_length: int = 2048
    micro_batch_size: int = placement(1)
    # Sequences of held-out text at most; null: all.
    max_sequences: int | None = None
    # Held-out tokens on which NeMo's and Hugging Face's logits are compared; 0 skips the check. Part of the identity of
    # the stages verify_import and verify.
    verify_tokens: int = placement(512)
    # Tasks, groups or tags of EleutherAI's lm-evaluation-harness, such as mmlu or gsm8k.
    tasks: list[str] = field(default_factory=list)
    # Of all tasks that allow examples; null: each task's own number.
    num_fewshot: int | None = None
    # Questions of each task at most, for a first look; null: all.
    task_limit: int | None = None
    task_batch_size: int = placement(8)
    # A folder with task definitions (*.yaml; functions that they name are run) and with data sets as they are on the
    # Hub, OWNER/NAME; it is then not asked for any. Its content is an input of the stage.
    task_folder: str | None = placement(None)
    continuations: Continuations | None = None
    # Held-out documents whose beginnings all models continue, for people to read; 0: none.
    samples: int = 4
    sample_prompt_tokens: int = 32
    sample_new_tokens: int = 64
    # Also measures the checkpoints that distillation kept: the curve of its recovery.
    recovery: bool = False
