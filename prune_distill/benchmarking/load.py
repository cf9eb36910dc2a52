"""Measure vLLM servers under load: continuous batching at several rates of requests.

Each model has its own server with an equal share of the GPU's memory, so a smaller model has more room for the KV cache
of concurrent requests, as in a deployment. One server works at a time.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from prune_distill.benchmarking import prompts, timing, vllm_engine
from prune_distill.benchmarking.timing import LoadFigures
from prune_distill.config.values import serve_python
from prune_distill.nemo import hf_models
from prune_distill.schema import BenchmarkConfig
from prune_distill.serving import server
from prune_distill.serving.worker import Worker

_CLIENT = Path(server.__file__).with_name("load_worker.py")
# Requests before a measurement, which do not count.
WARM_UP = 8
# Sequences that vLLM computes at the same time, at most.
MOST_SEQUENCES = 256


@dataclass(frozen=True)
class Load:
    """A server's answer to the requests of one round at one rate. Seconds are those of the median request; `slow` of
    the slowest percent."""

    output_tokens_per_second: float
    time_to_first_token_seconds: float
    slow_time_to_first_token_seconds: float
    seconds_per_output_token: float


FIGURES = tuple(Load.__dataclass_fields__)
# The rounds of each model at each rate, `[rate][round][model]`.
Rounds = list[list[dict[str, Load]]]


def measure(folders: Mapping[str, Path], cfg: BenchmarkConfig, seed: int, share: float) -> Rounds:
    """Measure all models, interleaved; every other round is in reverse order.

    Args:
        share: fraction of the GPU's memory for each model.

    Raises:
        InputError: vLLM cannot serve a model; its output says why.
        RuntimeError: requests failed.
    """
    ids = prompts.draw(folders, cfg, seed, cfg.requests)
    found: Rounds = [[] for _ in cfg.request_rates]
    with contextlib.ExitStack() as stack:
        urls = {name: stack.enter_context(_serve(folder, cfg, share)) for name, folder in folders.items()}
        client = stack.enter_context(Worker(_CLIENT, serve_python(cfg), {}))
        for number in range(cfg.rounds):
            names = list(urls) if number % 2 == 0 else list(urls)[::-1]
            for rate, rounds in zip(cfg.request_rates, found, strict=True):
                # All models get the requests at the same times.
                rounds.append({name: _take_turn(client, urls[name], ids, rate, cfg, seed + number) for name in names})
    return found


def _take_turn(
    client: Worker, url: str, ids: torch.Tensor, rate: float | None, cfg: BenchmarkConfig, seed: int
) -> Load:
    """Measure one server at one rate, once the others are idle and this one is not."""
    time.sleep(vllm_engine.SECONDS_TO_REST)
    _send(client, url, ids[:WARM_UP], None, cfg, seed)
    return _send(client, url, ids, rate, cfg, seed)


def _serve(folder: Path, cfg: BenchmarkConfig, share: float) -> contextlib.AbstractContextManager[str]:
    length = cfg.prompt_tokens + cfg.new_tokens
    tokens = min(cfg.requests, MOST_SEQUENCES) * length
    options = [
        *("--dtype", vllm_engine.TYPES[cfg.dtype], "--max-model-len", str(length)),
        *("--max-num-seqs", str(MOST_SEQUENCES), "--gpu-memory-utilization", str(share)),
        # Requests of a later round must not be free.
        "--no-enable-prefix-caching",
    ]
    return server.serve(
        folder, serve_python(cfg), options, hf_models.kv_cache_bytes(folder, tokens, cfg.dtype), variables={}
    )


def _send(client: Worker, url: str, ids: torch.Tensor, rate: float | None, cfg: BenchmarkConfig, seed: int) -> Load:
    request = {"url": url, "model": server.MODEL, "prompts": ids.tolist(), "new_tokens": cfg.new_tokens}
    found = client.ask({**request, "request_rate": rate, "seed": seed})
    return summarize(found, len(ids))


def summarize(found: Mapping[str, Any], requests: int) -> Load:
    """Summarize an answer of `load_worker`. Raises: RuntimeError, if requests failed."""
    if found["errors"]:
        raise RuntimeError(f"{len(found['errors'])} of {requests} requests failed: {found['errors'][0]}")
    first = sorted(found["first_token"])
    return Load(
        found["output_tokens"] / found["duration"],
        statistics.median(first),
        first[math.ceil(0.99 * len(first)) - 1],
        statistics.median(found["per_token"]),
    )


def figures(rounds: Rounds, rates: Sequence[float | None], model: str, base: str | None = None) -> list[LoadFigures]:
    """Summarize a model's rounds at each rate as an entry of `benchmark.json`.

    Args:
        base: another model, for the ratios to its figures, computed per round.
    """

    def value(one: dict[str, Load], key: str) -> float:
        own: float = getattr(one[model], key)
        return own if base is None else own / getattr(one[base], key)

    return [
        cast(
            LoadFigures,
            {
                "request_rate": rate,
                **{key: timing.spread([value(one, key) for one in at_rate]) for key in FIGURES},
            },
        )
        for rate, at_rate in zip(rates, rounds, strict=True)
    ]
