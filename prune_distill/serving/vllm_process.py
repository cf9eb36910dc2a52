"""Generate with vLLM in the serving environment (`make serve-env`), in a process of its own.

vLLM needs other versions of transformers and numpy than NeMo, so the two are never in one process.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from prune_distill.errors import InputError
from prune_distill.model.huggingface import link_compatible_folder
from prune_distill.serving.server import default_variables
from prune_distill.serving.worker import Worker

_WORKER = Path(__file__).with_name("vllm_worker.py")


class VllmProcess:
    """A model in vLLM. Use it as a context manager, or call `close`.

    Args:
        folder: the model's Hugging Face folder.
        python: Python of the serving environment.
        kv_cache_bytes: memory of the KV cache on CPUs; GPUs use the share `gpu_memory_utilization` of their memory.
        settings: arguments of `vllm.LLM`.

    Attributes:
        version: vLLM's version.
        dtype: the type in which the model computes, such as `bfloat16`.

    Raises:
        InputError: there is no such Python, or vLLM cannot load the model; its output says why.
    """

    def __init__(self, folder: Path, python: Path, kv_cache_bytes: int = 0, **settings: Any) -> None:
        with ExitStack() as stack:
            links = stack.enter_context(link_compatible_folder(folder))
            self._worker = stack.enter_context(Worker(_WORKER, python, default_variables(kv_cache_bytes)))
            # Prompts and answers are ids, and a repeated prompt must not be free.
            arguments = {"model": str(links), "skip_tokenizer_init": True, "enable_prefix_caching": False, **settings}
            try:
                found = self._worker.ask(arguments)
            except RuntimeError as error:
                raise InputError(f"{folder}: {error}") from error
            self.version: str = found["version"]
            self.dtype: str = found["dtype"]
            self._stack = stack.pop_all()

    def generate(self, prompts: list[list[int]], new_tokens: int, prompt_log_probs: bool = False) -> dict[str, Any]:
        """Generate greedily; see `vllm_worker._generate`."""
        return self._worker.ask({"prompts": prompts, "new_tokens": new_tokens, "prompt_log_probs": prompt_log_probs})

    def sample(self, prompts: list[list[int]], seeds: list[int], sampling: dict[str, Any]) -> dict[str, Any]:
        """Sample completions; see `vllm_worker._sample`. `sampling`: arguments of `vllm.SamplingParams`."""
        return self._worker.ask({"prompts": prompts, "seeds": seeds, "sampling": sampling})

    def close(self) -> None:
        """End the process."""
        self._stack.close()

    def __enter__(self) -> VllmProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
