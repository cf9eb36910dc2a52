"""Rules of the group `model`."""

from __future__ import annotations

import os.path
from collections.abc import Iterator

from prune_distill.config.rule import Finding, rule
from prune_distill.config.values import require
from prune_distill.config.wording import any_of, divisors
from prune_distill.model import model_folder
from prune_distill.model.hf_shape import local_folder, may_be_hub_id
from prune_distill.model.model_size import EXPERT_SIZES
from prune_distill.schema import Family, RunConfig


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


@rule("model.heads", "model.shape.num_attention_heads", "model.shape.num_query_groups")
def heads(cfg: RunConfig) -> Iterator[Finding]:
    shape = require(cfg.model.shape)
    if shape.num_attention_heads % shape.num_query_groups:
        yield Finding(
            "model.shape.num_attention_heads",
            f"not divisible by model.shape.num_query_groups={shape.num_query_groups}; "
            f"set model.shape.num_query_groups to {any_of(divisors(shape.num_attention_heads))}",
        )


@rule("model.experts", "model.family", *(f"model.shape.{name}" for name in EXPERT_SIZES))
def experts(cfg: RunConfig) -> Iterator[Finding]:
    """Require the sizes of experts where the family has experts, and only there."""
    shape, family = require(cfg.model.shape), cfg.model.family
    sizes = {f"model.shape.{name}": getattr(shape, name) for name in EXPERT_SIZES}
    given = [key for key, size in sizes.items() if size is not None]
    if family is not Family.qwen3_moe:
        if given:
            fix = " ".join(f"{key}=null" for key in given)
            yield Finding(given[0], f"model.family={family.value} has no experts; set {fix}")
    elif len(given) < len(sizes):
        missing = next(key for key in sizes if key not in given)
        yield Finding(missing, f"model.family={family.value} has experts; set all of {', '.join(sizes)}")
    elif require(shape.moe_router_topk) > require(shape.num_moe_experts):
        yield Finding(
            "model.shape.moe_router_topk",
            f"more experts per token than model.shape.num_moe_experts={shape.num_moe_experts}; "
            f"set model.shape.moe_router_topk to at most {shape.num_moe_experts}",
        )


@rule("model.exists", "model.hf_path", "model.shape?", on_machine=True)
def exists(cfg: RunConfig) -> Iterator[Finding]:
    path = cfg.model.hf_path
    # Where the shape has to be read from it, reading it has failed before.
    if path is None or cfg.model.shape is None or may_be_hub_id(path):
        return
    if not os.path.exists(os.path.expanduser(path)):
        yield Finding("model.hf_path", "does not exist; set model.hf_path to a Hugging Face folder or a Hub id")


@rule("model.folder", "model.hf_path", "model.revision", "convert.allow_pickle", on_machine=True)
def folder(cfg: RunConfig) -> Iterator[Finding]:
    path = cfg.model.hf_path
    local = None if path is None else local_folder(path, cfg.model.revision)
    if path is None or local is None:
        return
    # The run may still download what a folder in the Hub's cache lacks.
    complete = os.path.exists(os.path.expanduser(path))
    for fault in model_folder.faults(local, complete=complete, allow_pickle=cfg.convert.allow_pickle):
        yield Finding("model.hf_path", fault, names_file=True)
