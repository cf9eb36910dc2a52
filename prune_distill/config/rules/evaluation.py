"""Rules of the sections `evaluate` and `benchmark`; `prune_distill.config.validate` applies them."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from prune_distill.config.wording import too_long
from prune_distill.schema import Engine, RunConfig

Rule = Callable[[RunConfig], Iterator[str]]

# The name of the task that a run makes of its own documents.
OWN_TASK = "heldout_continuations"
OWN_METRICS = ("acc", "acc_norm", "acc_mutual_info")
# Where a definition in YAML has its name; tags are lists as often as not.
_NAMES = re.compile(r"""^\s*(?:task:|group:|tag:|-)\s*['"]?([\w.:/-]+)['"]?\s*$""", re.MULTILINE)


def lengths(cfg: RunConfig) -> Iterator[str]:
    shape = cfg.model.shape
    if shape is None:
        return
    for key in ("seq_length", "verify_tokens"):
        if getattr(cfg.evaluate, key) > shape.max_position_embeddings:
            yield too_long(f"evaluate.{key}", getattr(cfg.evaluate, key), shape)
    for key, tokens in (
        ("evaluate.sample_prompt_tokens + sample_new_tokens", _sample_tokens(cfg)),
        ("benchmark.prompt_tokens + new_tokens", _benchmark_tokens(cfg)),
    ):
        if tokens > shape.max_position_embeddings:
            yield too_long(key, tokens, shape)


def _sample_tokens(cfg: RunConfig) -> int:
    return cfg.evaluate.sample_prompt_tokens + cfg.evaluate.sample_new_tokens if cfg.evaluate.samples else 0


def _benchmark_tokens(cfg: RunConfig) -> int:
    return cfg.benchmark.prompt_tokens + cfg.benchmark.new_tokens if cfg.benchmark.enabled else 0


def tasks(cfg: RunConfig) -> Iterator[str]:
    names = cfg.evaluate.tasks
    if len(set(names)) < len(names):
        yield f"evaluate.tasks={names} names one twice; set evaluate.tasks={sorted(set(names))}"
    if OWN_TASK in names:
        yield (
            f"evaluate.tasks={names} names {OWN_TASK}, which a run makes of its own documents; take it out and set "
            "evaluate.continuations={}"
        )


def installed(cfg: RunConfig) -> Iterator[str]:
    """Packages that the config asks for and this Python lacks; what a container has is not to be seen from here."""
    if _in_container(cfg):
        return
    if (cfg.evaluate.tasks or cfg.evaluate.continuations is not None) and importlib.util.find_spec("lm_eval") is None:
        yield (
            "evaluate.tasks and evaluate.continuations need lm_eval, which is not installed; run make setup, "
            "or set evaluate.tasks=[] evaluate.continuations=null"
        )
    if cfg.benchmark.enabled and cfg.benchmark.engine is Engine.vllm and importlib.util.find_spec("vllm") is None:
        yield "benchmark.engine=vllm, but vllm is not installed; install it, or set benchmark.engine=transformers"


def known_tasks(cfg: RunConfig) -> Iterator[str]:
    """Tasks that neither the user's folder nor the installed harness defines."""
    folder = cfg.evaluate.task_folder
    if folder is not None and not os.path.isdir(os.path.expanduser(folder)):
        yield (
            f"evaluate.task_folder={folder} is no folder; set it to one with task definitions (*.yaml) and data sets "
            "(OWNER/NAME), or to null"
        )
        return
    if not cfg.evaluate.tasks or _in_container(cfg):
        return
    places = [] if folder is None else [Path(os.path.expanduser(folder))]
    harness = importlib.util.find_spec("lm_eval")
    if harness is None or harness.origin is None:
        return
    places.append(Path(harness.origin).parent / "tasks")
    unknown = _undefined(set(cfg.evaluate.tasks), places)
    if unknown:
        yield (
            f"evaluate.tasks names {', '.join(unknown)}, which lm_eval does not know"
            + (f" and {folder} does not define" if folder is not None else "")
            + "; `lm_eval ls tasks` shows its tasks, and evaluate.task_folder brings your own"
        )


def _undefined(names: set[str], places: list[Path]) -> list[str]:
    """Those of the names that no definition in the folders has. All of the harness's take a second to read."""
    for place in places:
        for path in place.rglob("*.yaml"):
            names = names - set(_NAMES.findall(path.read_text(errors="replace")))
            if not names:
                return []
    return sorted(names)


def _in_container(cfg: RunConfig) -> bool:
    return cfg.cluster.slurm is not None and cfg.cluster.slurm.container_image is not None


RULES: tuple[Rule, ...] = (lengths, tasks)
RULES_OF_FILES: tuple[Rule, ...] = (installed, known_tasks)
