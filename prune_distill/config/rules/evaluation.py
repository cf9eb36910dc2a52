"""Rules of the groups `evaluate` and `benchmark`."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path

from prune_distill.config.rule import Finding, rule
from prune_distill.config.values import OWN_TASK, get_value, require, serve_python
from prune_distill.config.wording import quote_for_hydra, too_long
from prune_distill.schema import Engine, ExportDtype, QuantFormat, RunConfig

# Names of tasks, groups and tags in a definition in YAML; tags are often lists.
_NAMES = re.compile(r"""^\s*(?:task:|group:|tag:|-)\s*['"]?([\w.:/-]+)['"]?\s*$""", re.MULTILINE)
_IMAGE = "cluster.slurm?.container_image"
LIMIT = "model.shape.max_position_embeddings"
SERVED = ("benchmark.enabled", "benchmark.engine", "evaluate.engine", "quantize.formats")


@rule("evaluate.seq_length", "evaluate.seq_length", "evaluate.verify_tokens", LIMIT)
def seq_length(cfg: RunConfig) -> Iterator[Finding]:
    limit = require(cfg.model.shape).max_position_embeddings
    for key, length in (
        ("evaluate.seq_length", cfg.evaluate.seq_length),
        ("evaluate.verify_tokens", cfg.evaluate.verify_tokens),
    ):
        if length > limit:
            yield Finding(key, too_long(key, limit))


@rule(
    "evaluate.samples", *(f"evaluate.{key}" for key in ("samples", "sample_prompt_tokens", "sample_new_tokens")), LIMIT
)
def samples(cfg: RunConfig) -> Iterator[Finding]:
    if cfg.evaluate.samples:
        yield from _generation(cfg, "evaluate.sample_prompt_tokens", "evaluate.sample_new_tokens")


@rule("benchmark.length", *(f"benchmark.{key}" for key in ("enabled", "prompt_tokens", "new_tokens")), LIMIT)
def benchmark_length(cfg: RunConfig) -> Iterator[Finding]:
    if cfg.benchmark.enabled:
        yield from _generation(cfg, "benchmark.prompt_tokens", "benchmark.new_tokens")


def _generation(cfg: RunConfig, prompt: str, new: str) -> Iterator[Finding]:
    limit = require(cfg.model.shape).max_position_embeddings
    prompt_tokens, new_tokens = get_value(cfg, prompt), get_value(cfg, new)
    if prompt_tokens + new_tokens > limit:
        yield Finding(
            prompt,
            f"with {new}={new_tokens}, sequences of {prompt_tokens + new_tokens} tokens are longer than the model's "
            f"max_position_embeddings {limit}; set the two to at most {limit} in sum",
        )


@rule("evaluate.tasks", "evaluate.tasks")
def tasks(cfg: RunConfig) -> Iterator[Finding]:
    names = cfg.evaluate.tasks
    if len(set(names)) < len(names):
        yield Finding(
            "evaluate.tasks", f"a task is named twice; set evaluate.tasks={quote_for_hydra(sorted(set(names)))}"
        )
    if OWN_TASK in names:
        yield Finding(
            "evaluate.tasks", f"the run makes {OWN_TASK} itself; remove it and set evaluate.continuations={{}}"
        )


@rule("evaluate.lm_eval", "evaluate.tasks", "evaluate.continuations?", _IMAGE, on_machine=True)
def lm_eval(cfg: RunConfig) -> Iterator[Finding]:
    wanted = bool(cfg.evaluate.tasks) or cfg.evaluate.continuations is not None
    if wanted and not runs_in_container(cfg) and importlib.util.find_spec("lm_eval") is None:
        yield Finding(
            "evaluate.tasks" if cfg.evaluate.tasks else "evaluate.continuations",
            "lm_eval is not installed; run make setup, or set evaluate.tasks=[] evaluate.continuations=null",
        )


@rule("benchmark.serve_python", *SERVED, "benchmark.serve_python", _IMAGE, on_machine=True)
def serve_environment(cfg: RunConfig) -> Iterator[Finding]:
    groups, python = _served(cfg), serve_python(cfg.benchmark)
    if groups and not runs_in_container(cfg) and not python.exists():
        yield Finding(
            "benchmark.serve_python",
            f"{_engines(groups, Engine.vllm)} needs the environment with vLLM, and {python} does not exist; run make"
            f" serve-env, or set {_engines(groups, Engine.transformers)}",
        )


@rule("quantize.served", *SERVED, "benchmark.dtype", "cluster.gpu?")
def served_formats(cfg: RunConfig) -> Iterator[Finding]:
    """Report formats that vLLM cannot read where it has to."""
    groups, formats = _served(cfg), cfg.quantize.formats
    on_gpus = [found.value for found in formats if found in (QuantFormat.fp8_tensor, QuantFormat.nvfp4)]
    if groups and on_gpus and cfg.cluster.gpu is None:
        yield Finding(
            "quantize.formats",
            f"vLLM reads {' and '.join(on_gpus)} on GPUs only, and cluster.gpu=null states none; remove it, choose a"
            f" cluster with GPUs, or set {_engines(groups, Engine.transformers)}",
        )
    # vllm/model_executor/layers/quantization/modelopt.py accepts types of 16 bits; so do the kernels of INT4.
    halved = [found.value for found in formats if found is not QuantFormat.int8]
    if "benchmark" in groups and halved and cfg.benchmark.dtype is ExportDtype.fp32:
        yield Finding(
            "benchmark.dtype",
            f"vLLM computes {' and '.join(halved)} in types of 16 bits only; set benchmark.dtype=keep",
        )


@rule("quantize.served_experts", *SERVED, "model.family", "cluster.gpu?")
def served_experts(cfg: RunConfig) -> Iterator[Finding]:
    """Report mixtures that vLLM cannot read where it has to, as tests/serve/test_vllm.py shows."""
    groups = _served(cfg)
    on_cpus = (QuantFormat.int8, QuantFormat.int4) if cfg.cluster.gpu is None else ()
    refused = [found.value for found in cfg.quantize.formats if found in (QuantFormat.fp8, *on_cpus)]
    if groups and refused and cfg.model.family.traits.experts:
        yield Finding(
            "quantize.formats",
            "vLLM 0.32 does not read mixtures of experts in fp8 with a scale per channel, nor on CPUs in int8 or int4;"
            f" remove {' and '.join(refused)}, or set {_engines(groups, Engine.transformers)}",
        )


def _served(cfg: RunConfig) -> list[str]:
    """Return the groups whose engine is vLLM and has something to do."""
    benchmark = cfg.benchmark.enabled and cfg.benchmark.engine is Engine.vllm
    evaluate = bool(cfg.quantize.formats) and cfg.evaluate.engine is Engine.vllm
    return [*(["benchmark"] if benchmark else []), *(["evaluate"] if evaluate else [])]


def _engines(groups: list[str], engine: Engine) -> str:
    return " ".join(f"{group}.engine={engine.value}" for group in groups)


@rule("evaluate.task_folder", "evaluate.task_folder", on_machine=True)
def task_folder(cfg: RunConfig) -> Iterator[Finding]:
    folder = cfg.evaluate.task_folder
    if folder is not None and not os.path.isdir(os.path.expanduser(folder)):
        yield Finding(
            "evaluate.task_folder",
            "not a folder; set it to a folder with task definitions (*.yaml) and data sets (OWNER/NAME), or to null",
        )


@rule("evaluate.known_tasks", "evaluate.tasks", "evaluate.task_folder", _IMAGE, on_machine=True)
def known_tasks(cfg: RunConfig) -> Iterator[Finding]:
    """Report tasks that neither the user's folder nor the installed harness defines."""
    folder, harness = cfg.evaluate.task_folder, importlib.util.find_spec("lm_eval")
    places = [] if folder is None else [Path(os.path.expanduser(folder))]
    if not cfg.evaluate.tasks or runs_in_container(cfg) or not all(place.is_dir() for place in places):
        return
    if harness is None or harness.origin is None:
        return
    places.append(Path(harness.origin).parent / "tasks")
    unknown = _undefined(set(cfg.evaluate.tasks), places)
    if unknown:
        defined = "" if folder is None else f", and {folder} does not define"
        yield Finding(
            "evaluate.tasks",
            f"contains {', '.join(unknown)}, which lm_eval does not know{defined}; choose from `lm_eval ls tasks`, or "
            "set evaluate.task_folder to a folder that defines it",
        )


def _undefined(names: set[str], places: list[Path]) -> list[str]:
    """The names that no definition in the folders has. Reading all of the harness's takes a second."""
    for place in places:
        for path in place.rglob("*.yaml"):
            names = names - set(_NAMES.findall(path.read_text(errors="replace")))
            if not names:
                return []
    return sorted(names)


def runs_in_container(cfg: RunConfig) -> bool:
    """Whether stages run in a container, whose packages are not known here."""
    return cfg.cluster.slurm is not None and cfg.cluster.slurm.container_image is not None
