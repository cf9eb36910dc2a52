"""Time generations, and summarize the rounds as the content of `benchmark.json`. No torch.

Keys are optional for readers, because another version may have written the file.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypedDict

from prune_distill.schema import BenchmarkConfig


class Spread(TypedDict, total=False):
    """Statistics of a measurement over the rounds."""

    median: float
    min: float
    max: float


class ModelFigures(TypedDict, total=False):
    """A model's entry in `benchmark.json`; None: not measured on this machine, or no price given."""

    prefill_tokens_per_second: Spread
    decode_tokens_per_second: Spread
    time_to_first_token_seconds: Spread
    peak_memory_bytes: int
    weights_bytes: int
    kv_cache_bytes: int
    seconds_per_token: float
    joules_per_token: float | None
    cost_per_million_tokens: float | None
    load: list[LoadFigures]


class LoadFigures(TypedDict, total=False):
    """A server's figures at one rate of requests (None: all at once), or their ratios to those of another model.

    Times are those of the median request, and of the slowest percent.
    """

    request_rate: float | None
    output_tokens_per_second: Spread
    time_to_first_token_seconds: Spread
    slow_time_to_first_token_seconds: Spread
    seconds_per_output_token: Spread


class Ratios(TypedDict, total=False):
    """Ratios of a model's figures to those of another model."""

    prefill: Spread
    decode: Spread
    time_to_first_token: Spread
    memory: float
    load: list[LoadFigures]


class Result(TypedDict, total=False):
    """The content of `benchmark.json`.

    Attributes:
        requests: at each rate of requests, in each round; only with servers.
        ratios: of each model but the first, relative to the first.
    """

    engine: str
    engine_version: str
    command: str
    device: str
    dtype: str
    threads: int
    batch_size: int
    prompt_tokens: int
    new_tokens: int
    rounds: int
    requests: int
    models: dict[str, ModelFigures]
    ratios: dict[str, Ratios]


@dataclass(frozen=True)
class Timed:
    """One generation: seconds to the first new token, seconds from there to the last, and energy in joules."""

    first_token: float
    others: float
    joules: float | None


@dataclass(frozen=True)
class Memory:
    """Bytes of the weights, of the KV cache at the end, and of all tensors at the peak."""

    weights: int
    kv_cache: int
    peak: int


class TimedModel(Protocol):
    """A model loaded by an engine."""

    def warm_up(self) -> Memory:
        """Run one generation without timing it."""

    def generate(self) -> Timed:
        """Time one generation."""


def run_rounds(models: Mapping[str, TimedModel], rounds: int) -> tuple[dict[str, Memory], list[dict[str, Timed]]]:
    """Let each model generate once per round, interleaved; every other round is in reverse order."""
    memory = {name: model.warm_up() for name, model in models.items()}
    names = list(models)
    timed = []
    for number in range(rounds):
        order = names if number % 2 == 0 else names[::-1]
        timed.append({name: models[name].generate() for name in order})
    return memory, timed


def figures(memory: Memory, timed: Sequence[Timed], cfg: BenchmarkConfig) -> ModelFigures:
    """Summarize a model's rounds as its entry in `benchmark.json`."""
    new = cfg.batch_size * cfg.new_tokens
    seconds = statistics.median(one.first_token + one.others for one in timed)
    joules = [one.joules for one in timed if one.joules is not None]
    return {
        "prefill_tokens_per_second": spread([cfg.batch_size * cfg.prompt_tokens / one.first_token for one in timed]),
        "decode_tokens_per_second": spread([cfg.batch_size * (cfg.new_tokens - 1) / one.others for one in timed]),
        "time_to_first_token_seconds": spread([one.first_token for one in timed]),
        "peak_memory_bytes": memory.peak,
        "weights_bytes": memory.weights,
        "kv_cache_bytes": memory.kv_cache,
        "seconds_per_token": seconds / new,
        "joules_per_token": statistics.median(joules) / new if joules else None,
        "cost_per_million_tokens": cost_per_million(seconds / new, cfg.cost_per_hour),
    }


def cost_per_million(seconds_per_token: float, cost_per_hour: float | None) -> float | None:
    """Return the cost of a million tokens at a price per hour; None without a price."""
    return None if cost_per_hour is None else cost_per_hour / 3600 * seconds_per_token * 1e6


def ratios(model: str, base: str, memory: Mapping[str, Memory], timed: Sequence[Mapping[str, Timed]]) -> Ratios:
    """Return the ratios of two models' figures, computed per round, which cancels variations of the machine's speed."""
    first = [one[model].first_token / one[base].first_token for one in timed]
    return {
        "prefill": spread([1 / ratio for ratio in first]),
        "decode": spread([one[base].others / one[model].others for one in timed]),
        "time_to_first_token": spread(first),
        "memory": memory[model].peak / memory[base].peak,
    }


def spread(values: Sequence[float]) -> Spread:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
