"""Rules of the groups `model` and `teacher`."""

from __future__ import annotations

import os.path
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from prune_distill.config.rule import Finding, Rule, rule
from prune_distill.config.values import get_value, require
from prune_distill.config.wording import any_of, divisors
from prune_distill.errors import InputError
from prune_distill.model import model_folder
from prune_distill.model.hf_shape import local_folder, may_be_hub_id
from prune_distill.model.model_size import EXPERT_SIZES
from prune_distill.model.tokenizer_check import find_difference
from prune_distill.schema import Family, Loss, LossImplementation, Packing, RunConfig

# The groups that name a model.
MODELS = ("model", "teacher")
IMPLEMENTATION = "distill.kd.implementation"
# What tells the teachers' shapes apart from that of the model that is pruned.
TEACHER = ("teacher.hf_path", "teacher.shape", "data.sources?")
OWN_LAYOUT = ("teacher.parallel?", "teacher.micro_batch_size")
# Those that `cache_logits` does not use (prune_distill/nemo/nemo_api.py:restore).
UNUSED_SIZES = ("context_parallel_size", "expert_model_parallel_size")

Check = Callable[..., Iterator[Finding]]


def model_rule(name: str, *reads: str, on_machine: bool = False) -> Callable[[Check], list[Rule]]:
    """Declare a function as a rule of each model, whose group it is given as `at`."""
    return lambda check: [
        Rule(f"{at}.{name}", tuple(read.format(at=at) for read in reads), partial(check, at=at), on_machine)
        for at in MODELS
    ]


@rule("model.source", "model.demo?", "model.hf_path", "model.shape?")
def source(cfg: RunConfig) -> Iterator[Finding]:
    demo, path = cfg.model.demo, cfg.model.hf_path
    if demo is None and path is None:
        yield Finding("model.hf_path", "no teacher is named; set model.hf_path to a Hugging Face folder or a Hub id")
    if demo is not None and path is not None:
        yield Finding(
            "model.hf_path",
            "model.demo is set too, but a run has one teacher; set model.hf_path=null or model.demo=null",
        )
    if demo is not None and cfg.model.shape is None:
        yield Finding("model.shape", "a teacher that the run trains needs a shape; set model.shape, as in model=demo")


@model_rule("heads", "{at}.shape.num_attention_heads", "{at}.shape.num_query_groups")
def heads(cfg: RunConfig, at: str) -> Iterator[Finding]:
    shape = get_value(cfg, f"{at}.shape")
    if shape.num_attention_heads % shape.num_query_groups:
        yield Finding(
            f"{at}.shape.num_attention_heads",
            f"not divisible by {at}.shape.num_query_groups={shape.num_query_groups}; "
            f"set {at}.shape.num_query_groups to {any_of(divisors(shape.num_attention_heads))}",
        )


@model_rule("experts", "{at}.family", *(f"{{at}}.shape.{name}" for name in EXPERT_SIZES))
def experts(cfg: RunConfig, at: str) -> Iterator[Finding]:
    """Require the sizes of experts where the family has experts, and only there."""
    model: Any = get_value(cfg, at)
    shape, family = model.shape, model.family
    if family is None:  # a teacher without a folder, which is a fault of its own
        return
    sizes = {f"{at}.shape.{name}": getattr(shape, name) for name in EXPERT_SIZES}
    given = [key for key, size in sizes.items() if size is not None]
    if family is not Family.qwen3_moe:
        if given:
            fix = " ".join(f"{key}=null" for key in given)
            yield Finding(given[0], f"{at}.family={family.value} has no experts; set {fix}")
    elif len(given) < len(sizes):
        missing = next(key for key in sizes if key not in given)
        yield Finding(missing, f"{at}.family={family.value} has experts; set all of {', '.join(sizes)}")
    elif require(shape.moe_router_topk) > require(shape.num_moe_experts):
        yield Finding(
            f"{at}.shape.moe_router_topk",
            f"more experts per token than {at}.shape.num_moe_experts={shape.num_moe_experts}; "
            f"set {at}.shape.moe_router_topk to at most {shape.num_moe_experts}",
        )


@model_rule("exists", "{at}.hf_path", "{at}.shape?", on_machine=True)
def exists(cfg: RunConfig, at: str) -> Iterator[Finding]:
    path = get_value(cfg, f"{at}.hf_path")
    # Where the shape has to be read from it, reading it has failed before.
    if path is None or get_value(cfg, f"{at}.shape") is None or may_be_hub_id(path):
        return
    if not os.path.exists(os.path.expanduser(path)):
        yield Finding(f"{at}.hf_path", f"does not exist; set {at}.hf_path to a Hugging Face folder or a Hub id")


@model_rule("folder", "{at}.hf_path", "{at}.revision", "convert.allow_pickle", on_machine=True)
def folder(cfg: RunConfig, at: str) -> Iterator[Finding]:
    model: Any = get_value(cfg, at)
    local = None if model.hf_path is None else local_folder(model.hf_path, model.revision)
    if local is None:
        return
    # The run may still download what a folder in the Hub's cache lacks.
    complete = os.path.exists(os.path.expanduser(model.hf_path))
    for fault in model_folder.faults(local, complete=complete, allow_pickle=cfg.convert.allow_pickle):
        yield Finding(f"{at}.hf_path", fault, names_file=True)


@rule("teacher.source", *(f"teacher.{name}" for name in ("hf_path", "revision", "family", "shape")), "distill.loss")
def own_teacher(cfg: RunConfig) -> Iterator[Finding]:
    teacher = cfg.teacher
    if teacher.hf_path is not None and cfg.distill.loss is Loss.ce:
        yield Finding("teacher.hf_path", "distill.loss=ce uses no teacher; set teacher.hf_path=null")
    for name in ("revision", "family", "shape"):
        if teacher.hf_path is None and getattr(teacher, name) is not None:
            fix = f"set teacher.hf_path to the teacher's folder or Hub id, or teacher.{name}=null"
            yield Finding(f"teacher.{name}", f"the model that is pruned is the teacher; {fix}")


@rule("teacher.layout", *OWN_LAYOUT, "distill.loss", "distill.teacher_logits")
def teacher_layout(cfg: RunConfig) -> Iterator[Finding]:
    """Refuse a layout of the teacher where no stage runs it alone; the stage correct_teacher has its own."""
    if cfg.distill.reads_cached_logits:
        return
    for name in ("parallel", "micro_batch_size"):
        key = f"teacher.{name}"
        if getattr(cfg.teacher, name) is None:
            continue
        if cfg.distill.loss is Loss.ce:
            yield Finding(key, f"distill.loss=ce uses no teacher; set {key}=null")
        else:
            problem = f"distill.teacher_logits=live runs the teacher in the student's layout, distill.{name}"
            yield Finding(key, f"{problem}; set distill.teacher_logits=cached, or {key}=null")


@rule("teacher.parallel", *(f"teacher.parallel.{name}" for name in UNUSED_SIZES))
def teacher_parallel(cfg: RunConfig) -> Iterator[Finding]:
    for key in (f"teacher.parallel.{name}" for name in UNUSED_SIZES):
        if get_value(cfg, key) > 1:
            yield Finding(key, f"cache_logits divides neither sequences nor experts over ranks; set {key}=1")


@rule("teacher.packing", "teacher.micro_batch_size", "distill.packing")
def teacher_packing(cfg: RunConfig) -> Iterator[Finding]:
    size, key = cfg.teacher.micro_batch_size, "teacher.micro_batch_size"
    if size is not None and size > 1 and cfg.distill.packing is Packing.documents:
        yield Finding(key, f"distill.packing=documents takes one sequence per forward pass; set {key}=1")


@rule("teacher.vocabulary", "teacher.shape.vocab_size", "model.shape.vocab_size", IMPLEMENTATION)
def vocabulary(cfg: RunConfig) -> Iterator[Finding]:
    """Refuse vocabularies of different size where the loss cannot compare them
    (prune_distill/distillation/kd_loss.py:check_vocabularies)."""
    own, other = require(cfg.teacher.shape).vocab_size, require(cfg.model.shape).vocab_size
    implementation = cfg.distill.kd.implementation
    unsupported = own < other if implementation is LossImplementation.triton else own != other
    if implementation is not LossImplementation.chunked and unsupported:
        yield Finding(
            "teacher.shape.vocab_size",
            f"{IMPLEMENTATION}={implementation.value} cannot compare it with model.shape.vocab_size={other}; "
            f"set {IMPLEMENTATION}=chunked",
        )


@rule("teacher.tokenizer", "teacher.hf_path", "teacher.revision", "model.hf_path", "model.revision", on_machine=True)
def tokenizer(cfg: RunConfig) -> Iterator[Finding]:
    """Compare the tokenizers, where both are on this machine. Stage hf_to_nemo.teacher compares them in any case."""
    student, teacher = (_tokenizer_folder(model.hf_path, model.revision) for model in (cfg.model, cfg.teacher))
    if student is None or teacher is None:
        return
    try:
        fault = find_difference(student, teacher)
    except InputError:  # a fault of the folder
        return
    if fault is not None:
        yield Finding("teacher.hf_path", fault)


def _tokenizer_folder(hf_path: str | None, revision: str | None) -> Path | None:
    folder = None if hf_path is None else local_folder(hf_path, revision)
    return folder if folder is not None and (folder / "tokenizer.json").is_file() else None
