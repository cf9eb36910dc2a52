"""Speed and memory of the exported models."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Annotated

from prune_distill.schema.convert import ExportDtype
from prune_distill.schema.fields import PositiveFloat, PositiveInt, Range, hashed_elsewhere, hashed_if, placement


class Engine(Enum):
    """The library that runs a model to be measured; vllm runs in an environment of its own (`make serve-env`)."""

    transformers = "transformers"
    vllm = "vllm"


def _is_served(benchmark: BenchmarkConfig) -> bool:
    return benchmark.engine is Engine.vllm


@dataclass
class BenchmarkConfig:
    """Generation speed and memory of the teacher and the student, measured side by side; with engine=vllm also of the
    quantized students."""

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
    # With engine=vllm, rates at which a server of each model gets requests, per second, one after the other; null: all
    # requests at once; empty: no servers are started. The server batches the requests, each with prompt_tokens and
    # new_tokens, as they come (continuous batching).
    request_rates: list[PositiveFloat | None] = hashed_if(lambda: [None], _is_served)
    # Requests at each rate, in each round.
    requests: PositiveInt = hashed_if(64, _is_served)
    # Threads on a CPU; null: PyTorch's default.
    threads: PositiveInt | None = None
    # Python of the environment that has vLLM; null: that of `make serve-env`.
    serve_python: str | None = placement(None)
    # Price of the machine per hour, in any currency; null: the report shows no costs.
    cost_per_hour: PositiveFloat | None = hashed_elsewhere(None)
