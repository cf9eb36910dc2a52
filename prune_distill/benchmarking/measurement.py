"""Measure the speed and memory of models, side by side: the content of `benchmark.json`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from prune_distill.benchmarking import load, prompts, timing, transformers_engine, vllm_engine
from prune_distill.nemo import devices
from prune_distill.schema import BenchmarkConfig, Engine


def measure(folders: Mapping[str, Path], cfg: BenchmarkConfig, seed: int, command: str) -> dict[str, Any]:
    """Measure models and return the content of `benchmark.json`. The first model is the baseline.

    Raises:
        InputError: the models do not fit together, or the prompt is too long for one of them.
    """
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    prompts.check(folders, cfg)
    served = cfg.engine is Engine.vllm
    share = vllm_engine.SHARE / len(folders)
    with contextlib.ExitStack() as stack:
        models, engine = _load_vllm(folders, cfg, seed, share, stack) if served else _load(folders, cfg, seed)
        memory, timed = timing.run_rounds(models, cfg.rounds)
    base, *others = folders
    result: dict[str, Any] = {
        "engine": cfg.engine.value,
        **engine,
        "command": command,
        "device": devices.device_name(),
        "threads": torch.get_num_threads(),
        "batch_size": cfg.batch_size,
        "prompt_tokens": cfg.prompt_tokens,
        "new_tokens": cfg.new_tokens,
        "rounds": cfg.rounds,
        "models": {name: timing.figures(memory[name], [one[name] for one in timed], cfg) for name in folders},
        "ratios": {name: timing.ratios(name, base, memory, timed) for name in others},
    }
    if served and cfg.request_rates:
        rounds, rates = load.measure(folders, cfg, seed, share), cfg.request_rates
        result["requests"] = cfg.requests
        for name in folders:
            result["models"][name]["load"] = load.figures(rounds, rates, name)
        for name in others:
            result["ratios"][name]["load"] = load.figures(rounds, rates, name, base)
    return result


def _load_vllm(
    folders: Mapping[str, Path], cfg: BenchmarkConfig, seed: int, share: float, stack: contextlib.ExitStack
) -> tuple[dict[str, Any], dict[str, str]]:
    """Load the models in vLLM by name, and return its version and the types. `stack` ends its processes."""
    ids = prompts.draw(folders, cfg, seed)
    models = {
        name: stack.enter_context(contextlib.closing(vllm_engine.Model(folder, ids, cfg, share)))
        for name, folder in folders.items()
    }
    processes = [model.process for model in models.values()]
    return models, {"engine_version": processes[0].version, "dtype": _join(process.dtype for process in processes)}


def _load(folders: Mapping[str, Path], cfg: BenchmarkConfig, seed: int) -> tuple[dict[str, Any], dict[str, str]]:
    """Load the models in transformers by name, and return its version and the types."""
    transformers_engine.check(folders, cfg)
    ids = prompts.draw(folders, cfg, seed)
    models = {name: transformers_engine.Model(folder, ids, cfg) for name, folder in folders.items()}
    types = _join(str(model.model.dtype).removeprefix("torch.") for model in models.values())
    return models, {"engine_version": transformers.__version__, "dtype": types}


def _join(types: Iterable[str]) -> str:
    return " and ".join(sorted(set(types)))
