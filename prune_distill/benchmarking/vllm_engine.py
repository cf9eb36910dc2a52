"""Generation with vLLM, each model in a process of the serving environment (`vllm_process`).

All models are loaded at once, each with a share of the GPU. vLLM's timings of single tokens differ between versions, so
two generations are timed: one with a single new token, and one with all.

vLLM's processes poll for more work for a second after the last (SpinCondition in
vllm/distributed/device_communicators/shm_broadcast.py), which keeps cores busy. So a model's turn starts later.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from prune_distill.benchmarking.energy import find_counter, joules
from prune_distill.benchmarking.timing import Memory, Timed
from prune_distill.config.values import serve_python
from prune_distill.nemo import hf_models
from prune_distill.quantization import reader
from prune_distill.schema import BenchmarkConfig, ExportDtype
from prune_distill.serving.vllm_process import VllmProcess

# Fraction of the GPU's memory for all models together.
SHARE = 0.9
# Seconds after which the processes of another model are idle.
SECONDS_TO_REST = 1.5
# Times that a generation is repeated whose time is less than that of its first token, because of noise.
ATTEMPTS = 5
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
        share: fraction of the GPU's memory.
    """

    def __init__(self, folder: Path, ids: Any, cfg: BenchmarkConfig, share: float) -> None:
        self.folder, self.cfg, self.prompts = folder, cfg, ids.tolist()
        self.tokens = cfg.batch_size * (cfg.prompt_tokens + cfg.new_tokens)
        self.process = VllmProcess(
            folder,
            serve_python(cfg),
            hf_models.kv_cache_bytes(folder, self.tokens, cfg.dtype),
            dtype=TYPES[cfg.dtype],
            max_model_len=cfg.prompt_tokens + cfg.new_tokens,
            max_num_seqs=cfg.batch_size,
            gpu_memory_utilization=share,
        )

    def warm_up(self) -> Memory:
        self._seconds(self.cfg.new_tokens)
        self._seconds(1)
        # vLLM allocates its whole share for the cache, so the cache of the batch is computed.
        dtype = next(key for key, name in TYPES.items() if name == self.process.dtype)
        weights = hf_models.weight_bytes(self.folder, ExportDtype.keep if reader.is_quantized(self.folder) else dtype)
        kv_cache = hf_models.kv_cache_bytes(self.folder, self.tokens, dtype)
        return Memory(weights, kv_cache, weights + kv_cache)

    def generate(self) -> Timed:
        time.sleep(SECONDS_TO_REST)
        self._seconds(1)  # wakes this model's processes
        for _ in range(ATTEMPTS):
            first = self._seconds(1)
            energy = find_counter()
            before = energy() if energy else None
            whole = self._seconds(self.cfg.new_tokens)
            used = joules(before, energy() if energy else None)
            if whole > first:
                return Timed(first, whole - first, used)
        raise RuntimeError(
            f"{self.folder}: in {ATTEMPTS} attempts, {self.cfg.new_tokens} new tokens took no longer than one; run the"
            " benchmark on a machine that does nothing else, or raise benchmark.new_tokens"
        )

    def close(self) -> None:
        self.process.close()

    def _seconds(self, new_tokens: int) -> float:
        return float(self.process.generate(self.prompts, new_tokens)["seconds"])
