"""Engines that sample completions of prompts: vLLM, a server with OpenAI's API, or transformers.

Each completion has a seed of its own, so that it does not depend on when, or on which rank, it is sampled.
"""

from __future__ import annotations

import os
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from prune_distill.errors import InputError
from prune_distill.model import hf_config
from prune_distill.model.hf_tokenizer import read_object
from prune_distill.nemo import devices, hf_models
from prune_distill.schema import GenerationEngine, OnPolicy
from prune_distill.serving import server
from prune_distill.serving.vllm_process import VllmProcess

SECONDS_TO_ANSWER = 600


class Request(NamedTuple):
    """A prompt to complete, as token ids."""

    prompt: list[int]
    seed: int


class Completion(NamedTuple):
    """The new token ids, with the stop token if there is one.

    Attributes:
        ended: whether the model ended it, not the limit of tokens.
    """

    ids: list[int]
    ended: bool


class Engine(Protocol):
    """A model that completes prompts."""

    def complete(self, requests: Sequence[Request]) -> list[Completion]: ...

    def close(self) -> None: ...


def open_engine(student: Path, on_policy: OnPolicy, seq_length: int, eod_token: int, python: Path) -> Engine:
    """Load the student, or find it on the server.

    Args:
        student: a Hugging Face folder.
        seq_length: most tokens of a prompt and its completion.
        python: Python of the serving environment.

    Raises:
        InputError: no such Python; a server that cannot be reached, or that does not serve the student.
    """
    stop_ids = read_stop_ids(student, eod_token)
    if on_policy.engine is GenerationEngine.vllm:
        return VllmEngine(student, on_policy, seq_length, stop_ids, python)
    if on_policy.engine is GenerationEngine.server:
        return ServerEngine(student, on_policy, stop_ids)
    return TransformersEngine(student, on_policy, stop_ids)


def read_stop_ids(student: Path, eod_token: int) -> list[int]:
    """Return the tokens that end a completion: the end-of-document token, and those of the generation config."""
    path = student / "generation_config.json"
    found = read_object(path).get("eos_token_id") if path.exists() else None
    listed = found if isinstance(found, list) else [found]
    return sorted({eod_token, *(token for token in listed if type(token) is int)})


class TransformersEngine:
    """The student in this process, by `generate` of transformers."""

    def __init__(self, student: Path, on_policy: OnPolicy, stop_ids: list[int]) -> None:
        if devices.torch_device() == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        self.model = hf_models.load(student)
        self.batch_size, self.stop_ids = on_policy.batch_size, stop_ids
        # Not the model's own, whose penalties and filters would change the distribution.
        self.model.generation_config = GenerationConfig(
            max_new_tokens=on_policy.max_new_tokens, do_sample=False, eos_token_id=stop_ids, pad_token_id=stop_ids[0]
        )
        self.warpers = [TemperatureLogitsWarper(on_policy.temperature)]
        if on_policy.top_p < 1:
            self.warpers.append(TopPLogitsWarper(on_policy.top_p))

    def complete(self, requests: Sequence[Request]) -> list[Completion]:
        size = self.batch_size
        batches = [requests[start : start + size] for start in range(0, len(requests), size)]
        return [completion for batch in batches for completion in self._complete(batch)]

    def _complete(self, requests: Sequence[Request]) -> list[Completion]:
        longest = max(len(request.prompt) for request in requests)
        padding = [longest - len(request.prompt) for request in requests]
        rows = [[self.stop_ids[0]] * pad + request.prompt for pad, request in zip(padding, requests, strict=True)]
        ids = torch.tensor(rows, device=self.model.device)
        mask = torch.arange(longest) >= torch.tensor(padding)[:, None]
        sampling = SeededSampling([request.seed for request in requests], self.model.device)
        with torch.inference_mode():
            generated = self.model.generate(
                ids,
                attention_mask=mask.long().to(ids.device),
                logits_processor=LogitsProcessorList([*self.warpers, sampling]),
            )
        return [self._cut(row) for row in generated[:, longest:].tolist()]

    def _cut(self, ids: list[int]) -> Completion:
        """Remove what follows the first stop token of a row."""
        length = next((place + 1 for place, token in enumerate(ids) if token in self.stop_ids), None)
        return Completion(ids[:length], length is not None)

    def close(self) -> None:
        """Nothing outlives the object."""


class SeededSampling(LogitsProcessor):  # type: ignore[misc]
    """Makes the most probable token of each row a sample of the row's distribution, with random numbers of its own.

    The Gumbel-max trick: the argmax of logits plus independent Gumbel noise is a sample of their softmax. The negative
    logarithm of exponential noise is Gumbel noise.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise = torch.empty_like(scores)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores - noise.log()


class VllmEngine:
    """The student in vLLM, in a process of the serving environment."""

    def __init__(self, student: Path, on_policy: OnPolicy, seq_length: int, stop_ids: list[int], python: Path) -> None:
        self.sampling = _sampling(on_policy, stop_ids)
        self.process = VllmProcess(
            student,
            python,
            hf_models.kv_cache_bytes(student, on_policy.batch_size * seq_length),
            # vLLM would convert fp32 to fp16.
            dtype=hf_config.read_config(student / "config.json").get("torch_dtype", "auto"),
            max_model_len=seq_length,
            max_num_seqs=on_policy.batch_size,
            # On a CPU, compilation takes minutes and C++.
            enforce_eager=devices.torch_device() == "cpu",
        )

    def complete(self, requests: Sequence[Request]) -> list[Completion]:
        answer = self.process.sample([r.prompt for r in requests], [r.seed for r in requests], self.sampling)
        return [Completion(ids, ended) for ids, ended in zip(answer["tokens"], answer["ended"], strict=True)]

    def close(self) -> None:
        self.process.close()


class ServerEngine:
    """The student on a running server with OpenAI's API.

    The server must name the model as `served_name` returns it, so that no other model answers.
    """

    def __init__(self, student: Path, on_policy: OnPolicy, stop_ids: list[int]) -> None:
        self.url, self.workers = str(on_policy.server_url).rstrip("/"), on_policy.batch_size
        name = served_name(student)
        # Servers take other defaults from the model's generation config.
        neutral = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
        self.content = {"model": name, "return_token_ids": True, **neutral, **_sampling(on_policy, stop_ids)}
        models = [model.get("id") for model in self._ask("models").get("data", [])]
        if name not in models:
            raise InputError(
                f"distill.on_policy.server_url={self.url}: serves {', '.join(map(str, models))}, not the student of"
                f" this round; serve it with: vllm serve {student.absolute()} --served-model-name {name}, and run again"
            )

    def complete(self, requests: Sequence[Request]) -> list[Completion]:
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(self._complete, requests))

    def _complete(self, request: Request) -> Completion:
        answer = self._ask("completions", {**self.content, "prompt": request.prompt, "seed": request.seed})
        choice = answer["choices"][0]
        ids = choice.get("token_ids")
        if ids is None:
            raise InputError(
                f"distill.on_policy.server_url={self.url}: the server returns no token ids; use vLLM 0.10.2 or later"
            )
        return Completion(ids, choice["finish_reason"] == "stop")

    def _ask(self, path: str, content: dict[str, Any] | None = None) -> dict[str, Any]:
        key = os.environ.get("OPENAI_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        # It may be behind a proxy, unlike the servers that stages start.
        opener = urllib.request.build_opener()
        try:
            return server.ask(f"{self.url}/{path}", content, SECONDS_TO_ANSWER, headers=headers, opener=opener)
        except server.RequestError as error:
            raise InputError(
                f"distill.on_policy.server_url={self.url}: does not answer ({error}); start the server with the"
                " student of this round, and run again: finished completions are kept"
            ) from error

    def close(self) -> None:
        """The server goes on."""


def served_name(student: Path) -> str:
    """Return the name of a student on a server: that of its stage's folder, which has a hash of its origin."""
    return student.parent.name


def _sampling(on_policy: OnPolicy, stop_ids: list[int]) -> dict[str, Any]:
    """Return the settings of a sample by the names of vLLM and OpenAI's API."""
    return {
        "temperature": on_policy.temperature,
        "top_p": on_policy.top_p,
        "max_tokens": on_policy.max_new_tokens,
        "stop_token_ids": stop_ids,
    }
