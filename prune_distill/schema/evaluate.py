"""Evaluation: held-out loss and tasks."""

from __future__ import annotations

from dataclasses import dataclass, field

from prune_distill.schema.benchmark import Engine
from prune_distill.schema.fields import NonNegativeInt, PositiveInt, hashed_elsewhere, hashed_if, placement


@dataclass
class Continuations:
    """A multiple-choice task made of the run's own held-out documents, in the format of lm-evaluation-harness: which of
    four continuations follows a text? The wrong ones come from other documents."""

    # Number of questions.
    questions: PositiveInt = 150
    # Words of the text before the continuation.
    context_words: PositiveInt = 20
    # Words of each continuation.
    choice_words: PositiveInt = 10


def _is_served(evaluate: EvaluateConfig) -> bool:
    return evaluate.engine is Engine.vllm


@dataclass
class EvaluateConfig:
    """What is measured on the Hugging Face models, and the checks of both conversions."""

    # What computes the held-out loss of quantized students, and how often their most probable token is the teacher's:
    # transformers, with dequantized weights and rounded activations; or vllm, as it serves them (see
    # benchmark.serve_python), which does not compute their KL divergence from the teacher. Other models, tasks and
    # samples are always measured with transformers.
    engine: Engine = hashed_if(Engine.transformers, _is_served)

    # Tokens per sequence of held-out text.
    seq_length: PositiveInt = 2048
    # Sequences per forward pass.
    micro_batch_size: PositiveInt = placement(1)
    # Largest number of held-out sequences; null: all.
    max_sequences: PositiveInt | None = None
    # Held-out tokens on which the logits of NeMo and Hugging Face are compared; 0: no comparison. Part of the identity
    # of the stages verify_import and verify.
    verify_tokens: NonNegativeInt = hashed_elsewhere(512)
    # Tasks, groups or tags of EleutherAI's lm-evaluation-harness, such as mmlu or gsm8k.
    tasks: list[str] = field(default_factory=list)
    # Number of examples before each question, for all tasks that allow examples; null: each task's own number.
    num_fewshot: NonNegativeInt | None = None
    # Largest number of questions per task, for a quick look; null: all questions.
    task_limit: PositiveInt | None = None
    # Batch size of the tasks.
    task_batch_size: PositiveInt = placement(8)
    # Folder with task definitions (*.yaml; functions that they name are run) and data sets in the Hub's layout,
    # OWNER/NAME; no data set is downloaded then. Its content is an input of the stage. Null: only the harness's tasks,
    # with data sets from the Hub.
    task_folder: str | None = placement(None)
    # Adds the task heldout_continuations; {} uses its defaults; null: no such task.
    continuations: Continuations | None = None
    # Number of held-out documents whose beginnings all models continue, as samples for people to read; 0: none.
    samples: NonNegativeInt = 4
    # Tokens of each sample's beginning.
    sample_prompt_tokens: PositiveInt = 32
    # Tokens that are generated for each sample.
    sample_new_tokens: PositiveInt = 64
    # Also evaluates the checkpoints that distillation kept, for a curve of the recovery.
    recovery: bool = False
