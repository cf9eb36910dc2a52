"""Generation with vLLM's offline API. Written from vLLM's documentation; not run by the tests of this repository.

All models are loaded at once, each with a share of the GPU. vLLM's timings of single tokens differ between versions, so
two generations are timed: one with a single new token, and one with all.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from prune_distill.benchmarking.energy import find_counter, joules
from prune_distill.benchmarking.timing import Memory, Timed
from prune_distill.nemo import devices, hf_models
from prune_distill.schema import BenchmarkConfig, ExportDtype

# Fraction of the GPU's memory for all models together.
SHARE = 0.9
TYPES = {
    ExportDtype.bf16: "bfloat16",
    ExportDtype.fp16: "float16",
    ExportDtype.fp32: "float32",
    ExportDtype.keep: "auto",
}


class Model:
    """A model in vLLM.

    Args:
        ids: the prompts, `[b, s]`.
    """

    def __init__(self, folder: Path, ids: Any, cfg: BenchmarkConfig, share: float) -> None:
        from vllm import LLM, SamplingParams  # optional

        self.folder, self.cfg, self.sampling = folder, cfg, SamplingParams
        self.prompts = [{"prompt_token_ids": row.tolist()} for row in ids]
        with hf_models.link_compatible_folder(folder) as loadable:
            self.llm = LLM(
                model=str(loadable),
                dtype=TYPES[cfg.dtype],
                max_model_len=cfg.prompt_tokens + cfg.new_tokens,
                max_num_seqs=cfg.batch_size,
                gpu_memory_utilization=share,
                # Otherwise repeated prompts would be free.
                enable_prefix_caching=False,
                # Inputs and outputs are ids.
                skip_tokenizer_init=True,
            )

    def warm_up(self) -> Memory:
        self._generate(self.cfg.new_tokens)
        tokens = self.cfg.batch_size * (self.cfg.prompt_tokens + self.cfg.new_tokens)
        weights = hf_models.weight_bytes(self.folder, self.cfg.dtype)
        kv_cache = hf_models.kv_cache_bytes(self.folder, tokens, self.cfg.dtype)
        # vLLM allocates its whole share for the cache, so the cache of the batch is estimated.
        return Memory(weights, kv_cache, weights + kv_cache)

    def generate(self) -> Timed:
        first = self._seconds(1)
        energy = find_counter()
        before = energy() if energy else None
        whole = self._seconds(self.cfg.new_tokens)
        used = joules(before, energy() if energy else None)
        return Timed(first, max(whole - first, 1e-9), used)

    def _seconds(self, new_tokens: int) -> float:
        started = time.perf_counter()
        self._generate(new_tokens)
        return time.perf_counter() - started

    def _generate(self, new_tokens: int) -> None:
        parameters = self.sampling(
            temperature=0.0, min_tokens=new_tokens, max_tokens=new_tokens, ignore_eos=True, detokenize=False
        )
        self.llm.generate(self.prompts, parameters, use_tqdm=False)
        devices.synchronize()
