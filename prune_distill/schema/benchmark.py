"""Speed and memory of the exported models."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Annotated

from prune_distill.schema.convert import ExportDtype
from prune_distill.schema.fields import PositiveFloat, PositiveInt, Range, hashed_elsewhere, placement


class Engine(Enum):
    """The library that generates text in a benchmark; vllm runs in an environment of its own (`make serve-env`)."""

    transformers = "transformers"
    vllm = "vllm"


@dataclass
class BenchmarkConfig:
    """Generation speed and memory of the teacher and the student, measured side by side."""

    # Whether the run has the stage benchmark.
    enabled: bool = placement(False)
    engine: Engine = Engine.transformers
    # Type in which the models compute.
    dtype: ExportDtype = ExportDtype.keep
    # Sequences that are generated at the same time.
    batch_size: PositiveInt = 1
    # Tokens of each prompt.
    prompt_tokens: PositiveInt = 512
    # Tokens that are generated after each prompt. Decoding is timed between the first one and the last.
    new_tokens: Annotated[int, Range(at_least=2, problem="leaves nothing to time")] = 128
    # Measured rounds. Every round runs each model once, interleaved; a warm-up round before them is not counted.
    rounds: PositiveInt = 5
    # Threads on a CPU; null: PyTorch's default.
    threads: PositiveInt | None = None
    # Python of the environment that has vLLM; null: that of `make serve-env`.
    serve_python: str | None = placement(None)
    # Price of the machine per hour, in any currency; null: the report shows no costs.
    cost_per_hour: PositiveFloat | None = hashed_elsewhere(None)
