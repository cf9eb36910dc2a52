"""Serve a model with vLLM in the serving environment (`make serve-env`), in a process of its own.

vLLM needs other versions of transformers and numpy than NeMo, so the two are never in one process.
"""

from __future__ import annotations

import json
import math
import subprocess
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from prune_distill.model.huggingface import link_compatible_folder
from prune_distill.pipeline.processes import require_python, serving_environment
from prune_distill.units import GIB

_WORKER = Path(__file__).with_name("vllm_worker.py")


class VllmProcess:
    """A model in vLLM. Use it as a context manager, or call `close`.

    Args:
        folder: the model's Hugging Face folder.
        python: Python of the serving environment.
        kv_cache_bytes: memory of the KV cache on CPUs; GPUs use the share `gpu_memory_utilization` of their memory.
        settings: arguments of `vllm.LLM`.

    Raises:
        InputError: there is no such Python.
        RuntimeError: vLLM cannot load the model; its output says why.
    """

    def __init__(self, folder: Path, python: Path, kv_cache_bytes: int = 0, **settings: Any) -> None:
        require_python(python)
        environment = serving_environment()
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", str(max(1, math.ceil(kv_cache_bytes / GIB))))
        environment.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        self._stack = ExitStack()
        links = self._stack.enter_context(link_compatible_folder(folder))
        self._process = subprocess.Popen(
            [python, "-P", _WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        try:
            # Prompts and answers are ids, and a repeated prompt must not be free.
            arguments = {"model": str(links), "skip_tokenizer_init": True, "enable_prefix_caching": False, **settings}
            self.version: str = self._ask(arguments)["version"]
        except BaseException:
            self.close()
            raise

    def generate(self, prompts: list[list[int]], new_tokens: int, prompt_log_probs: bool = False) -> dict[str, Any]:
        """Generate greedily; see `vllm_worker._generate`."""
        return self._ask({"prompts": prompts, "new_tokens": new_tokens, "prompt_log_probs": prompt_log_probs})

    def sample(self, prompts: list[list[int]], seeds: list[int], sampling: dict[str, Any]) -> dict[str, Any]:
        """Sample completions; see `vllm_worker._sample`. `sampling`: arguments of `vllm.SamplingParams`."""
        return self._ask({"prompts": prompts, "seeds": seeds, "sampling": sampling})

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._stack.close()

    def __enter__(self) -> VllmProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, content: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(content) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"vLLM ended with status {self._process.wait()}; its messages are above")
        answer: dict[str, Any] = json.loads(line)
        return answer
