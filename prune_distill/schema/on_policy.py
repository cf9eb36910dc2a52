"""On-policy rounds: further distillations, on what the student itself writes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Annotated

from omegaconf import MISSING

from prune_distill.schema.fields import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
    ShareAboveZero,
    Steps,
    hashed_elsewhere,
    placement,
)

MOST_ON_POLICY_ROUNDS = 4


class GenerationEngine(Enum):
    """What generates the student's completions. `vllm`: vLLM in an environment of its own (`make serve-env`).
    `server`: a running server with OpenAI's API, at `server_url`. `transformers`: transformers' `generate`, slower."""

    vllm = "vllm"
    server = "server"
    transformers = "transformers"


@dataclass
class OnPolicy:
    """Rounds after the distillation, in each of which the student completes prompts and learns the teacher's
    distributions on its own completions (GKD, arXiv 2306.13649), with the loss and the layout of the distillation. Each
    round is a training of its own, which starts with a new optimizer and the student of the round before."""

    # Number of rounds.
    rounds: Annotated[PositiveInt, Range(at_most=MOST_ON_POLICY_ROUNDS)] = placement(1)
    # Optimizer steps of a round, with the sequence length and the batch of the distillation.
    steps: Steps = hashed_elsewhere(MISSING)
    # Learning rate of a round after its warm-up. It falls along half a cosine wave.
    lr: PositiveFloat = hashed_elsewhere(MISSING)
    # Learning rate at the end of a round.
    min_lr: NonNegativeFloat = hashed_elsewhere(0.0)
    # Steps of warm-up in a round.
    warmup_steps: NonNegativeInt = hashed_elsewhere(0)
    # Share of a round's sequences that contain completions (lambda in GKD); the others are the distillation's data.
    mix: ShareAboveZero = hashed_elsewhere(0.5)
    # Files of prompts as JSON lines or parquet: files, folders, globs or hf://datasets/OWNER/NAME[@REVISION]/GLOB. A
    # record has `messages` or `conversations` (all before the assistant's last turn is the prompt), `prompt` (a text),
    # or `text` (a document, of which the first `prompt_tokens` are the prompt). Null: beginnings of the run's training
    # documents; with masks (`data.learn`) all before the last tokens that are learned.
    prompts: list[str] | None = None
    # Prompts of a round, drawn at random.
    prompts_per_round: PositiveInt = MISSING
    # Tokens of a prompt that is the beginning of a document.
    prompt_tokens: PositiveInt = 64
    # Completions of each prompt.
    samples_per_prompt: PositiveInt = 1
    # Most tokens of a completion.
    max_new_tokens: PositiveInt = 128
    # Divides the student's logits when it samples.
    temperature: Annotated[float, Range(at_least=0.01, problem="would be raised to 0.01 by vLLM")] = 1.0
    # Samples from the most probable tokens that have this probability in sum; 1: from all.
    top_p: ShareAboveZero = 1.0
    engine: GenerationEngine = GenerationEngine.vllm
    # Base URL of the server's API, such as http://localhost:8000/v1, for engine=server. Its API key comes from
    # OPENAI_API_KEY only.
    server_url: str | None = placement(None)
    # Sequences that a rank generates at the same time.
    batch_size: PositiveInt = placement(32)
    # Prompts per file of completions: the most that a rank loses when the stage is killed.
    shard_prompts: PositiveInt = 64
    # Nodes that share the generation under Slurm, each a task of a job array.
    array_tasks: PositiveInt = placement(1)
