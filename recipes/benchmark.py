"""python -m recipes benchmark --config RUN_DIR/resolved.yaml
python -m recipes.benchmark --models teacher=FOLDER student=FOLDER --out FOLDER [--batch-size 8 ...]

Benchmark the speed and memory of models: prefill, decoding and the time to the first token, with the same prompts and
interleaved on one machine, so that variations of its speed affect all models; with vLLM, also servers under load. The
first model is the baseline. No other program should run during a benchmark.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prune_distill.benchmarking.measurement import measure
from prune_distill.errors import ConfigError
from prune_distill.model.huggingface import local_folder
from prune_distill.pipeline.artifact import write_json
from prune_distill.pipeline.names import BENCHMARK
from prune_distill.pipeline.run_arguments import Metrics
from prune_distill.pipeline.stage_main import command_line
from prune_distill.schema import BenchmarkConfig, Engine, ExportDtype, RunConfig

# Command line options for fields of the config section.
NUMBERS = ("batch_size", "prompt_tokens", "new_tokens", "rounds", "requests", "threads")


@dataclass(frozen=True)
class Inputs:
    """Hugging Face folders, or a Hub id.

    Attributes:
        models: first the model that is pruned, as `teacher`, or as `original` if the teacher is another one; then
            quantized students.
    """

    student: Path
    models: dict[str, Path | str]


def run(cfg: RunConfig, inputs: Inputs, out: Path) -> Metrics:
    """Output: `benchmark.json`."""
    (base, original), *quantized = inputs.models.items()
    folders = {
        base: local_folder(original, cfg.model.revision, weights=True),
        "student": local_folder(inputs.student, None, weights=True),
        **{name: Path(folder) for name, folder in quantized},
    }
    run_dir = out.parent.resolve()
    paths = {name: _relative_path(folder.resolve(), run_dir) for name, folder in folders.items()}
    # The report computes costs, so a new price does not require another measurement.
    benchmark = dataclasses.replace(cfg.benchmark, cost_per_hour=None)
    command = f"cd RUN_DIR && {format_command(paths, 'benchmark-again', benchmark, cfg.seed)}"
    result = measure(folders, benchmark, cfg.seed, command)
    write_json(out / BENCHMARK, result)
    return {key: result[key] for key in ("engine", "device", "models", "ratios")}


def format_command(folders: Mapping[str, str], out: str, cfg: BenchmarkConfig, seed: int) -> str:
    """Format the command that repeats the measurement."""
    command = ["python", "-m", "recipes.benchmark", "--models", *(f"{name}={path}" for name, path in folders.items())]
    command += ["--out", out, "--engine", cfg.engine.value, "--dtype", cfg.dtype.value, "--seed", str(seed)]
    for name in (*NUMBERS, "cost_per_hour"):
        value = getattr(cfg, name)
        command += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    if cfg.engine is Engine.vllm and cfg.request_rates:
        command += ["--request-rates", *("inf" if rate is None else str(rate) for rate in cfg.request_rates)]
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
    parser.add_argument(
        "--request-rates", type=float, nargs="*", default=[], metavar="R", help="requests per second of servers, or inf"
    )
    parser.add_argument("--serve-python", help="Python of the environment that has vLLM")
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
    if any(not rate > 0 for rate in arguments.request_rates):
        faults.append(f"--request-rates={arguments.request_rates}: must be above 0")
    if faults:
        raise ConfigError(faults)
    rates = [None if math.isinf(rate) else rate for rate in arguments.request_rates]
    others = {"request_rates": rates, "serve_python": arguments.serve_python}
    engine, dtype = Engine(arguments.engine), ExportDtype(arguments.dtype)
    cfg = BenchmarkConfig(enabled=True, engine=engine, dtype=dtype, **values, **others)
    paths = dict(model.split("=", 1) for model in arguments.models)
    # vLLM also reads quantized models, which are not checked as models to convert.
    model = engine is not Engine.vllm
    folders = {name: local_folder(path, None, weights=True, model=model) for name, path in paths.items()}
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
