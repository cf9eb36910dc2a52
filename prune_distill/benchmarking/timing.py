"""What is timed, and how rounds become figures. No torch."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from prune_distill.schema import BenchmarkConfig

# Of a round's, by the names in benchmark.json.
KEYS = {
    "prefill": "prefill_tokens_per_second",
    "decode": "decode_tokens_per_second",
    "time_to_first_token": "time_to_first_token_seconds",
}


@dataclass(frozen=True)
class Timed:
    """One generation: seconds to the first new token, and from there to the last; joules of the machine meanwhile."""

    first_token: float
    others: float
    joules: float | None


@dataclass(frozen=True)
class Memory:
    """Bytes: of the weights, of keys and values at the end, and of all tensors at the fullest moment."""

    weights: int
    kv_cache: int
    peak: int


class Contestant(Protocol):
    """A model that an engine has loaded."""

    def warm_up(self) -> Memory:
        """One generation that is not timed."""

    def generate(self) -> Timed:
        """One generation."""


def race(models: Mapping[str, Contestant], rounds: int) -> tuple[dict[str, Memory], list[dict[str, Timed]]]:
    """Has each model generate once per round, interleaved; every other round is in the opposite order."""
    memory = {name: model.warm_up() for name, model in models.items()}
    names = list(models)
    timed = []
    for number in range(rounds):
        order = names if number % 2 == 0 else names[::-1]
        timed.append({name: models[name].generate() for name in order})
    return memory, timed


def figures(memory: Memory, timed: Sequence[Timed], cfg: BenchmarkConfig) -> dict[str, Any]:
    """A model's entry in `benchmark.json`."""
    new = cfg.batch_size * cfg.new_tokens
    seconds = statistics.median(one.first_token + one.others for one in timed)
    joules = [one.joules for one in timed if one.joules is not None]
    return {
        **{KEYS[name]: spread([_values(one, cfg)[name] for one in timed]) for name in KEYS},
        "peak_memory_bytes": memory.peak,
        "weights_bytes": memory.weights,
        "kv_cache_bytes": memory.kv_cache,
        "seconds_per_token": seconds / new,
        "joules_per_token": statistics.median(joules) / new if joules else None,
        "cost_per_million_tokens": cost_per_million(seconds / new, cfg.cost_per_hour),
    }


def cost_per_million(seconds_per_token: float, cost_per_hour: float | None) -> float | None:
    """What a million tokens cost on a machine of that price; None where it is not known."""
    return None if cost_per_hour is None else cost_per_hour / 3600 * seconds_per_token * 1e6


def ratios(model: str, base: str, memory: Mapping[str, Memory], timed: Sequence[Mapping[str, Timed]]) -> dict[str, Any]:
    """A model's figures over another's: of each round by itself, so that what slows both down does not show."""
    first = [one[model].first_token / one[base].first_token for one in timed]
    return {
        "prefill": spread([1 / ratio for ratio in first]),
        "decode": spread([one[base].others / one[model].others for one in timed]),
        "time_to_first_token": spread(first),
        "memory": memory[model].peak / memory[base].peak,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _values(timed: Timed, cfg: BenchmarkConfig) -> dict[str, float]:
    return {
        "prefill": cfg.batch_size * cfg.prompt_tokens / timed.first_token,
        "decode": cfg.batch_size * (cfg.new_tokens - 1) / timed.others,
        "time_to_first_token": timed.first_token,
    }
