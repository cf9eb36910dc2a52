"""python -m recipes benchmark --config RUN_DIR/resolved.yaml
python -m recipes.benchmark --models teacher=FOLDER student=FOLDER --out FOLDER [--batch-size 8 ...]

Benchmark the speed and memory of models: prefill, decoding and the time to the first token, with the same prompts and
interleaved on one machine, so that variations of its speed affect all models. The first model is the baseline. No
other program should run during a benchmark.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prune_distill.benchmarking import prompts, timing, transformers_engine, vllm_engine
from prune_distill.errors import ConfigError
from prune_distill.model.huggingface import local_folder
from prune_distill.nemo import devices
from prune_distill.pipeline.artifact import write_json
from prune_distill.pipeline.names import BENCHMARK
from prune_distill.pipeline.run_arguments import Metrics
from prune_distill.pipeline.stage_main import command_line
from prune_distill.schema import BenchmarkConfig, Engine, ExportDtype, RunConfig

# Command line options for fields of the config section.
NUMBERS = ("batch_size", "prompt_tokens", "new_tokens", "rounds", "threads")


@dataclass(frozen=True)
class Inputs:
    """Hugging Face folders, or a Hub id.

    Attributes:
        models: the model that is pruned, as `teacher`, or as `original` if the teacher is another one.
    """

    student: Path
    models: dict[str, Path | str]


def run(cfg: RunConfig, inputs: Inputs, out: Path) -> Metrics:
    """Output: `benchmark.json`."""
    folders = {name: local_folder(path, cfg.model.revision, weights=True) for name, path in inputs.models.items()}
    folders["student"] = local_folder(inputs.student, None, weights=True)
    run_dir = out.parent.resolve()
    paths = {name: _relative_path(folder.resolve(), run_dir) for name, folder in folders.items()}
    # The report computes costs, so a new price does not require another measurement.
    benchmark = dataclasses.replace(cfg.benchmark, cost_per_hour=None)
    command = f"cd RUN_DIR && {format_command(paths, 'benchmark-again', benchmark, cfg.seed)}"
    result = measure(folders, benchmark, cfg.seed, command)
    write_json(out / BENCHMARK, result)
    return {key: result[key] for key in ("engine", "device", "models", "ratios")}


def measure(folders: Mapping[str, Path], cfg: BenchmarkConfig, seed: int, command: str) -> dict[str, Any]:
    """Measure models and return the content of `benchmark.json`. The first model is the baseline.

    Raises:
        InputError: the models do not fit together, or the prompt is too long for one of them.
    """
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    with contextlib.ExitStack() as stack:
        models, dtype = _load(folders, cfg, seed, stack)
        memory, timed = timing.run_rounds(models, cfg.rounds)
    base, *others = folders
    return {
        "engine": cfg.engine.value,
        "command": command,
        "device": devices.device_name(),
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "batch_size": cfg.batch_size,
        "prompt_tokens": cfg.prompt_tokens,
        "new_tokens": cfg.new_tokens,
        "rounds": cfg.rounds,
        "models": {name: timing.figures(memory[name], [one[name] for one in timed], cfg) for name in folders},
        "ratios": {name: timing.ratios(name, base, memory, timed) for name in others},
    }


def _load(
    folders: Mapping[str, Path], cfg: BenchmarkConfig, seed: int, stack: contextlib.ExitStack
) -> tuple[dict[str, Any], str]:
    """Load the models by name, and return the type in which they compute. `stack` ends the processes of vLLM."""
    prompts.check(folders, cfg)
    if cfg.engine is Engine.vllm:
        ids = prompts.draw(folders, cfg, seed)
        share = vllm_engine.SHARE / len(folders)
        engines = {
            name: stack.enter_context(contextlib.closing(vllm_engine.Model(folder, ids, cfg, share)))
            for name, folder in folders.items()
        }
        return engines, vllm_engine.TYPES[cfg.dtype]
    transformers_engine.check(folders, cfg)
    ids = prompts.draw(folders, cfg, seed)
    models = {name: transformers_engine.Model(folder, ids, cfg) for name, folder in folders.items()}
    types = {str(model.model.dtype).removeprefix("torch.") for model in models.values()}
    return models, " and ".join(sorted(types))


def format_command(folders: Mapping[str, str], out: str, cfg: BenchmarkConfig, seed: int) -> str:
    """Format the command that repeats the measurement."""
    command = ["python", "-m", "recipes.benchmark", "--models", *(f"{name}={path}" for name, path in folders.items())]
    command += ["--out", out, "--engine", cfg.engine.value, "--dtype", cfg.dtype.value, "--seed", str(seed)]
    for name in (*NUMBERS, "cost_per_hour"):
        value = getattr(cfg, name)
        command += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(command)


def _relative_path(folder: Path, run_dir: Path) -> str:
    return os.path.relpath(folder, run_dir) if folder.is_relative_to(run_dir) else str(folder)


def main() -> None:
    default = BenchmarkConfig()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", required=True, nargs="+", metavar="NAME=FOLDER", help="Hugging Face folders")
    parser.add_argument("--out", required=True, type=Path, help="a folder, for benchmark.json")
    parser.add_argument("--engine", default=default.engine.value, choices=[engine.value for engine in Engine])
    parser.add_argument("--dtype", default=default.dtype.value, choices=[dtype.value for dtype in ExportDtype])
    for name in NUMBERS:
        value = getattr(default, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, metavar="N", help=f"({value})")
    parser.add_argument("--cost-per-hour", type=float, help="price of the machine")
    parser.add_argument("--seed", type=int, default=1234, help="seed of the tokens (1234)")
    arguments = parser.parse_args()
    with command_line():
        print(_run_command(arguments))


def _run_command(arguments: argparse.Namespace) -> str:
    values = {name: getattr(arguments, name) for name in (*NUMBERS, "cost_per_hour")}
    faults = [f"--{name.replace('_', '-')}={value}: must be above 0" for name, value in values.items() if value == 0]
    faults += [f"--models={model}: not NAME=FOLDER" for model in arguments.models if not all(model.partition("="))]
    if arguments.new_tokens < 2:
        faults.append(f"--new-tokens={arguments.new_tokens}: leaves nothing to time; give 2 or more")
    if faults:
        raise ConfigError(faults)
    cfg = BenchmarkConfig(enabled=True, engine=Engine(arguments.engine), dtype=ExportDtype(arguments.dtype), **values)
    paths = dict(model.split("=", 1) for model in arguments.models)
    folders = {name: local_folder(path, None, weights=True) for name, path in paths.items()}
    command = format_command(paths, str(arguments.out), cfg, arguments.seed)
    result = measure(folders, cfg, arguments.seed, command)
    write_json(arguments.out / BENCHMARK, result)
    return table(result)


def table(result: dict[str, Any]) -> str:
    """Format the medians as a table for a terminal."""
    lines = [f"{'':<12} {'prefill tok/s':>14} {'decode tok/s':>14} {'first token s':>14} {'peak MB':>10}"]
    for name, model in result["models"].items():
        speeds = [
            model[key]["median"]
            for key in ("prefill_tokens_per_second", "decode_tokens_per_second", "time_to_first_token_seconds")
        ]
        lines.append(
            f"{name:<12} {speeds[0]:>14,.1f} {speeds[1]:>14,.1f} {speeds[2]:>14.4f}"
            f" {model['peak_memory_bytes'] / 1e6:>10,.1f}"
        )
    for name, ratio in result["ratios"].items():
        parts = [f"{ratio[key]['median']:>14.2f}" for key in ("prefill", "decode", "time_to_first_token")]
        lines.append(f"{name + ' ratio':<12} {' '.join(parts)} {ratio['memory']:>10.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
