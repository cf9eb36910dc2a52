"""Generation with plain transformers, timed token by token."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from prune_distill.benchmarking.energy import find_counter, joules
from prune_distill.benchmarking.timing import Memory, Timed
from prune_distill.nemo import devices, hf_models
from prune_distill.schema import BenchmarkConfig

FIX = "set benchmark.batch_size, benchmark.prompt_tokens (--batch-size, --prompt-tokens) lower, or benchmark.dtype=bf16"


class Model:
    """A model on this process's device.

    Args:
        ids: the prompts, `[b, s]`.
    """

    def __init__(self, folder: Path, ids: torch.Tensor, cfg: BenchmarkConfig) -> None:
        self.model = hf_models.load(folder, cfg.dtype)
        self.ids = ids.to(self.model.device)
        self.new_tokens = cfg.new_tokens

    def warm_up(self) -> Memory:
        made, peak = devices.measure_peak_memory(lambda: self._generate(None))
        weights = _bytes([*self.model.parameters(), *self.model.buffers()])
        kv_cache = _bytes(_tensors(made.past_key_values))
        return Memory(weights, kv_cache, weights + peak)

    def generate(self) -> Timed:
        clock, energy = _Clock(), find_counter()
        devices.synchronize()
        before = energy() if energy else None
        clock.start()
        self._generate(clock)
        used = joules(before, energy() if energy else None)
        _, first, *rest = clock.times
        assert len(rest) == self.new_tokens - 1, "every step adds one token to each sequence"
        return Timed(first - clock.started, rest[-1] - first, used)

    def _generate(self, clock: Any) -> Any:
        """Generate greedily with the KV cache; no sequence ends early."""
        with torch.inference_mode():
            return self.model.generate(
                self.ids,
                attention_mask=torch.ones_like(self.ids),
                min_new_tokens=self.new_tokens,
                max_new_tokens=self.new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                use_cache=True,
                pad_token_id=0,
                streamer=clock,
                return_dict_in_generate=True,
            )


class _Clock:
    """A streamer, which `generate` calls once a step's tokens are on the CPU (`_sample` in generation/utils.py)."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.started = 0.0

    def start(self) -> None:
        self.started = time.perf_counter()

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is buffered."""


def check(folders: Mapping[str, Path], cfg: BenchmarkConfig) -> None:
    """Check the memory. Raises: InputError, if the models do not fit together."""
    tokens = cfg.batch_size * (cfg.prompt_tokens + cfg.new_tokens)
    needs = [(name, hf_models.weight_bytes(folder, cfg.dtype)) for name, folder in folders.items()]
    # One of them generates at a time.
    needs.append(("KV cache", max(hf_models.kv_cache_bytes(folder, tokens, cfg.dtype) for folder in folders.values())))
    hf_models.check_fits(needs, FIX)


def _tensors(cache: Any) -> list[torch.Tensor]:
    """Return keys and values of all layers of a cache; a DynamicCache's legacy form has a pair per layer."""
    if hasattr(cache, "layers"):
        pairs = [(layer.keys, layer.values) for layer in cache.layers]
    else:  # transformers before 4.54
        pairs = list(zip(cache.key_cache, cache.value_cache, strict=True))
    return [tensor for pair in pairs for tensor in pair if tensor is not None]


def _bytes(tensors: list[torch.Tensor]) -> int:
    return sum({tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}.values())
