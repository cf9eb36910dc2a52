"""Faults of users: the rule that reports them, the key to change, and the value to set."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path

import pytest

from launch.planning.automatic import compose
from prune_distill.config.wording import override
from prune_distill.errors import ConfigError
from tests.helpers.faults import check_fault, find_faults

QWEN = ["experiment=qwen3_8b_to_6b_width", "layout=published"]
DEMO = ["experiment=demo", "prune.ffn_hidden_size=null"]
# A small mixture, its layers alone pruned.
MOE = [
    *(*DEMO, "model.family=qwen3_moe", "model.shape.num_moe_experts=4", "model.shape.moe_ffn_hidden_size=128"),
    "model.shape.moe_router_topk=2",
]
# With a teacher that no one checks on this machine.
TEACHER = (
    "{hf_path: owner/teacher, family: llama, shape: {num_layers: 8, hidden_size: 320, ffn_hidden_size: 960, "
    "num_attention_heads: 5, num_query_groups: 5, kv_channels: 64, vocab_size: 1088, max_position_embeddings: 2048}}"
)
TAUGHT = [*DEMO, f"teacher={TEACHER}"]
CODE = "data.sources.code.teacher"
BY_SOURCE = [
    *DEMO,
    "distill.teacher_logits=cached",
    f"data.sources={{web: {{files: [w.jsonl]}}, code: {{files: [c.jsonl], teacher: {TEACHER}}}}}",
]
TWO_STAGES = ("cluster.devices_per_node=2", "distill.parallel.pipeline_model_parallel_size=2")


def _named(number: int) -> str:
    return TEACHER.replace("/teacher", f"/teacher{number}")


BF16 = [*DEMO, "distill.precision=bf16"]
TWO_RANKS = ["cluster.devices_per_node=2", "distill.micro_batch_size=2"]
TP_OF_2 = [*TWO_RANKS, "distill.parallel.tensor_model_parallel_size=2"]
EP_OF_2 = [*TWO_RANKS, "distill.parallel.expert_model_parallel_size=2"]
MOE_TEACHER = [
    *("teacher.family=qwen3_moe", "teacher.shape.num_moe_experts=4", "teacher.shape.moe_ffn_hidden_size=128"),
    "teacher.shape.moe_router_topk=2",
]
CACHED = [*DEMO, "distill.teacher_logits=cached"]
FP8_TEACHER = ["distill.precision=bf16", "distill.teacher_fp8=true"]
LOCAL = ["model=local", "name=x", "cluster=one_node", "prune.num_layers=2", "data=jsonl", "data.train=[a.jsonl]"]
CORRECTION = [
    *("distill.teacher_correction.max_steps=9", "distill.teacher_correction.seq_length=64"),
    *("distill.teacher_correction.global_batch_size=4", "distill.teacher_correction.min_lr=1e-5"),
]

ON_POLICY = [*DEMO, "distill.on_policy={steps: 40, lr: 1e-4, prompts_per_round: 8}"]

# Overrides, and their one fault: its rule, its first key, and a part of the fix.
CASES: list[tuple[list[str], str, str, str]] = [
    # Unknown names.
    ([], "run.experiment", "experiment", "qwen3_8b_to_6b_depth"),
    (["experiment=dmo"], "group.choice", "experiment", ""),
    ([*DEMO, "model=qwen3"], "group.choice", "model", "qwen3_8b"),
    ([*DEMO, "cluster=7"], "group.choice", "cluster", "local, one_gpu_24gb, one_node"),
    ([*DEMO, "distill.lrr=1"], "key.unknown", "distill.lrr", ""),
    (
        [*DEMO, "lr=1"],
        "key.unknown",
        "lr",
        "",
    ),
    ([*DEMO, "distil.lr=1"], "key.unknown", "distil", ""),
    ([*DEMO, "distill.zzz=1"], "key.unknown", "distill.zzz", "distill has max_steps, seq_length"),
    ([*DEMO, "+distill.new=1"], "key.unknown", "distill.new", ""),
    # Values of the wrong type, and missing ones.
    ([*DEMO, "distill.lr=fast"], "value.type", "distill.lr", "set distill.lr to a number"),
    ([*DEMO, "distill.lr=nan"], "value.type", "distill.lr", ""),
    ([*DEMO, "distill.max_steps=10.0"], "value.type", "distill.max_steps", "set distill.max_steps to 10"),
    ([*DEMO, "distill.max_steps=1.5"], "value.type", "distill.max_steps", "to a whole number"),
    # Numbers that are too large, and informal changes and ranges.
    ([*DEMO, "seed=4294967296"], "value.bounds", "seed", "set seed to at most 4294967295"),
    ([*DEMO, "cluster.devices_per_node=1e6"], "value.bounds", "cluster.devices_per_node", "to at most 1024"),
    ([*DEMO, "distill.max_steps=1e22"], "value.bounds", "distill.max_steps", "to at most 2147483647"),
    ([*DEMO, "data.shard_bytes=1e22"], "value.bounds", "data.shard_bytes", "to at most 9223372036854775807"),
    ([*DEMO, "prune.num_layers=36->24"], "override.syntax", "prune.num_layers", "set prune.num_layers to 24"),
    ([*DEMO, "prune.num_layers=36→24"], "override.syntax", "prune.num_layers", "set prune.num_layers to 24"),
    (
        [*DEMO, "prune.num_layers=36-"],
        "value.type",
        "prune.num_layers",
        "set prune.num_layers to the new value alone (a shell reads '>'",
    ),
    (
        [*DEMO, "prune.num_layers=null", "prune.drop_layers=20-24"],
        "value.type",
        "prune.drop_layers",
        "set prune.drop_layers=[20,21,22,23,24]",
    ),
    (
        [*DEMO, "prune.num_layers=null", "prune.drop_layers=3"],
        "value.type",
        "prune.drop_layers",
        "set prune.drop_layers=[3]",
    ),
    ([*DEMO, "distill.skip_steps=5"], "value.type", "distill.skip_steps", "set distill.skip_steps=[[5,5]]"),
    ([*DEMO, "distill.skip_steps=[5,9]"], "value.type", "distill.skip_steps", "set distill.skip_steps=[[5,9]]"),
    ([*DEMO, "distill.skip_steps=5-9"], "value.type", "distill.skip_steps", "set distill.skip_steps=[[5,9]]"),
    ([*DEMO, "data.train=a b.jsonl"], "value.type", "data.train", "set 'data.train=[\"a b.jsonl\"]'"),
    ([*DEMO, f"name={'x' * 256}"], "run_dir", "run_dir", ""),
    ([*DEMO, "run_dir='-x'"], "run_dir", "run_dir", "set run_dir=./-x"),
    ([*DEMO, "seed=true"], "value.type", "seed", ""),
    ([*DEMO, "distill.overlap_grad_reduce=1"], "value.type", "distill.overlap_grad_reduce", ""),
    ([*DEMO, "distill.precision=fp16"], "value.choice", "distill.precision", "bf16 or fp32"),
    ([*DEMO, "distill.recompute=some"], "value.choice", "distill.recompute", "none or selective or full"),
    ([*DEMO, "data.train=a.jsonl"], "value.type", "data.train", "set data.train=[a.jsonl]"),
    ([*DEMO, "prune.drop_layers=[1,x]", "prune.num_layers=null"], "value.type", "prune.drop_layers[1]", ""),
    ([*DEMO, "distill.parallel=2"], "value.type", "distill.parallel", "distill.parallel.KEY=VALUE"),
    ([*DEMO, "distill.max_steps=null"], "value.null", "distill.max_steps", "set distill.max_steps to a whole number"),
    ([*DEMO, "distill.max_steps=???"], "value.missing", "distill.max_steps", "set distill.max_steps to a whole number"),
    ([*DEMO, "~distill.lr"], "value.missing", "distill.lr", "set distill.lr to a number"),
    ([*DEMO, "name=???"], "value.missing", "name", "set name to some text"),
    ([*DEMO, "run_dir=${oc.env:NO_SUCH_VARIABLE}"], "value.interpolation", "run_dir", "set run_dir to a plain value"),
    # Teachers of sources.
    ([*BY_SOURCE, f"{CODE}.hf_path=null"], "source_teacher.source", f"{CODE}.hf_path", f"or {CODE}=null"),
    (
        [*DEMO, "distill.teacher_logits=cached", "data.sources={code: {files: [c], teacher: {hf_path: /nowhere}}}"],
        f"{CODE}.config_json",
        f"{CODE}.hf_path",
        f"set {CODE}.hf_path",
    ),
    (
        [*BY_SOURCE, f"{CODE}.shape.num_query_groups=3"],
        "source_teacher.heads",
        f"{CODE}.shape.num_attention_heads",
        f"set {CODE}.shape.num_query_groups",
    ),
    (
        [*BY_SOURCE, f"{CODE}.shape.num_moe_experts=4"],
        "source_teacher.experts",
        f"{CODE}.shape.num_moe_experts",
        "=null",
    ),
    (
        [*BY_SOURCE, "distill.loss=ce", "distill.controls=[]", "distill.teacher_logits=live"],
        "source_teacher.supported",
        CODE,
        f"set {CODE}=null",
    ),
    (
        [*BY_SOURCE, "distill.teacher_logits=live"],
        "source_teacher.supported",
        "distill.teacher_logits",
        "set distill.teacher_logits=cached, or the teachers of the sources to null",
    ),
    (
        [*BY_SOURCE, "distill.on_policy={steps: 9, lr: 1e-4, prompts_per_round: 8}", "distill.seq_length=256"],
        "source_teacher.supported",
        "distill.on_policy",
        "set distill.on_policy=null",
    ),
    (
        [*BY_SOURCE, "prune.rounds=[{steps: 20, num_layers: 5}]", "prune.num_layers=4"],
        "source_teacher.supported",
        "prune.rounds",
        "set prune.rounds=[]",
    ),
    (
        [
            *BY_SOURCE,
            *("prune.num_layers=null", "prune.budget.params_fraction=0.8"),
            "prune.successive_halving.round_tokens=10000",
        ],
        "source_teacher.supported",
        "prune.successive_halving",
        "set prune.successive_halving=null",
    ),
    (
        [
            *TAUGHT,
            "teacher.hf_path=owner/run",
            *BY_SOURCE[2:],
            f"data.sources.web.teacher={TEACHER.replace('/teacher', '/other')}",
        ],
        "source_teacher.source",
        "teacher.hf_path",
        "set teacher.hf_path=null",
    ),
    (
        [*BY_SOURCE, f"data.sources.web.teacher={TEACHER}", *CORRECTION, "distill.teacher_correction.lr=1e-4"],
        "source_teacher.supported",
        "distill.teacher_correction",
        "set distill.teacher_correction=null",
    ),
    (
        [*BY_SOURCE, *(f"data.sources.s{n}={{files: [s.jsonl], teacher: {_named(n)}}}" for n in range(4))],
        "source_teacher.source",
        "data.sources",
        "give some sources the same one",
    ),
    (
        [*BY_SOURCE, f"{CODE}.shape.vocab_size=48", "distill.cached_logits_top_k=48"],
        "distill.cached_logits_top_k",
        "distill.cached_logits_top_k",
        "to at most 47",
    ),
    (
        [*BY_SOURCE, *TWO_STAGES, f"{CODE}.shape.num_layers=7"],
        "training.source_teacher_layers",
        "distill.parallel.pipeline_model_parallel_size",
        "set distill.parallel.pipeline_model_parallel_size to 1",
    ),
    (
        [*BY_SOURCE, *TWO_RANKS, f"{CODE}.parallel.pipeline_model_parallel_size=2", f"{CODE}.shape.num_layers=7"],
        "training.source_teacher_layers",
        f"{CODE}.parallel.pipeline_model_parallel_size",
        f"set {CODE}.parallel.pipeline_model_parallel_size to 1",
    ),
    (
        [*BY_SOURCE, *TWO_RANKS, f"{CODE}.parallel.context_parallel_size=2"],
        "source_teacher.parallel",
        f"{CODE}.parallel.context_parallel_size",
        f"set {CODE}.parallel.context_parallel_size=1",
    ),
    # A teacher of its own.
    ([*DEMO, "teacher.revision=main"], "teacher.source", "teacher.revision", "or teacher.revision=null"),
    ([*DEMO, "teacher.family=qwen9"], "value.choice", "teacher.family", "qwen3"),
    ([*DEMO, "teacher.hf_path=/nowhere"], "teacher.config_json", "teacher.hf_path", "set teacher.hf_path"),
    ([*TAUGHT, "distill.loss=ce", "distill.controls=[]"], "teacher.source", "teacher.hf_path", "teacher.hf_path=null"),
    (
        [*TAUGHT, "teacher.shape.num_query_groups=3"],
        "teacher.heads",
        "teacher.shape.num_attention_heads",
        "set teacher",
    ),
    ([*TAUGHT, "teacher.shape.num_moe_experts=4"], "teacher.experts", "teacher.shape.num_moe_experts", "=null"),
    (
        [*TAUGHT, "distill.kd.implementation=upstream"],
        "teacher.vocabulary",
        "teacher.shape.vocab_size",
        "set distill.kd.implementation=chunked",
    ),
    (
        [*TAUGHT, "teacher.shape.vocab_size=1000", "distill.kd.implementation=triton"],
        "teacher.vocabulary",
        "teacher.shape.vocab_size",
        "set distill.kd.implementation=chunked",
    ),
    ([*TAUGHT, "teacher.shape.vocab_size=1000", "distill.kd.top_k=1000"], "kd.top_k", "distill.kd.top_k", "null"),
    (
        [*TAUGHT, "teacher.shape.max_position_embeddings=128"],
        "training.max_length",
        "distill.seq_length",
        "set distill.seq_length to at most 128",
    ),
    (
        [*TAUGHT, "distill.kd.intermediate_pairs=[{student: 2, teacher: 9}]"],
        "kd.pairs",
        "distill.kd.intermediate_pairs",
        "set numbers from 1 to 8",
    ),
    (
        [*TAUGHT, *TP_OF_2],
        "training.tensor_parallel",
        "distill.parallel.tensor_model_parallel_size",
        "set distill.parallel.tensor_model_parallel_size to 1",
    ),
    (
        [*TAUGHT, *EP_OF_2, *MOE_TEACHER],
        "training.experts",
        "distill.parallel.expert_model_parallel_size",
        "set distill.parallel.expert_model_parallel_size=1",
    ),
    # FP8.
    ([*DEMO, "distill.fp8=e4m3"], "value.choice", "distill.fp8", "hybrid or blockwise"),
    ([*DEMO, "distill.fp8=hybrid"], "training.fp8_precision", "distill.fp8", "or distill.fp8=null"),
    ([*DEMO, "distill.teacher_fp8=true"], "training.fp8_precision", "distill.teacher_fp8", "distill.teacher_fp8=false"),
    (
        [*DEMO, "model.demo.training.fp8=hybrid"],
        "training.fp8_precision",
        "model.demo.training.fp8",
        "model.demo.training.fp8=null",
    ),
    (
        [*BF16, "distill.teacher_fp8=true", "distill.loss=ce", "distill.controls=[]"],
        "distill.teacher_fp8",
        "distill.teacher_fp8",
        "set distill.teacher_fp8=false",
    ),
    ([*BF16, "distill.fp8=hybrid", "cluster.gpu=a100_80"], "training.fp8_gpu", "distill.fp8", "another cluster.gpu"),
    (
        [*BF16, "distill.teacher_fp8=true", "cluster.gpu=a100_40"],
        "training.fp8_gpu",
        "distill.teacher_fp8",
        "distill.teacher_fp8=false",
    ),
    ([*BF16, "distill.fp8=blockwise", "cluster.gpu=l40s"], "training.fp8_gpu", "distill.fp8", "another cluster.gpu"),
    (
        [*BF16, "distill.fp8=hybrid", "model.shape.kv_channels=34"],
        "training.fp8_sizes",
        "distill.fp8",
        "prune to other sizes, or set distill.fp8=null",
    ),
    (
        [*BF16, *TP_OF_2, "distill.fp8=blockwise", "prune.ffn_hidden_size=640"],
        "training.fp8_sizes",
        "distill.fp8",
        "lower distill.parallel.tensor_model_parallel_size=2",
    ),
    (
        [*BF16, "distill.teacher_fp8=true", "model.shape.kv_channels=34"],
        "training.fp8_sizes",
        "distill.teacher_fp8",
        "set distill.teacher_fp8=false",
    ),
    (
        [*BF16, "distill.fp8=hybrid", "distill.seq_length=250", "distill.micro_batch_size=4"],
        "training.fp8_tokens",
        "distill.fp8",
        "set distill.seq_length to 248 or 252",
    ),
    (
        [*BF16, "distill.teacher_fp8=true", "distill.phases=[{max_steps: 80}, {max_steps: 80, seq_length: 255}]"],
        "training.fp8_tokens",
        "distill.teacher_fp8",
        "set distill.phases[1].seq_length to 252 or 256",
    ),
    # The layout of the teacher's cache.
    (
        [*DEMO, "teacher.parallel.tensor_model_parallel_size=1"],
        "teacher.layout",
        "teacher.parallel",
        "set distill.teacher_logits=cached, or teacher.parallel=null",
    ),
    (
        [*DEMO, "teacher.micro_batch_size=2", "distill.loss=ce", "distill.controls=[]"],
        "teacher.layout",
        "teacher.micro_batch_size",
        "set teacher.micro_batch_size=null",
    ),
    (
        [*CACHED, *TWO_RANKS, "teacher.parallel.pipeline_model_parallel_size=3"],
        "training.ranks",
        "teacher.parallel",
        "start 3 ranks, or lower teacher.parallel",
    ),
    (
        [*TAUGHT, *CACHED, *TWO_RANKS, "teacher.parallel.tensor_model_parallel_size=2"],
        "training.tensor_parallel",
        "teacher.parallel.tensor_model_parallel_size",
        "set teacher.parallel.tensor_model_parallel_size to 1",
    ),
    (
        [
            *CACHED,
            "cluster.devices_per_node=4",
            "distill.micro_batch_size=1",
            "teacher.parallel.pipeline_model_parallel_size=4",
        ],
        "training.layers",
        "teacher.parallel.pipeline_model_parallel_size",
        "set teacher.parallel.pipeline_model_parallel_size to 1 or 2",
    ),
    # Earlier rounds run the teacher beside the student.
    (
        [*TAUGHT, CACHED[-1], *TP_OF_2, "teacher.parallel={}", "prune.rounds=[{steps: 20, num_layers: 5}]"],
        "training.tensor_parallel",
        "distill.parallel.tensor_model_parallel_size",
        "set distill.parallel.tensor_model_parallel_size to 1",
    ),
    (
        [*CACHED, *TWO_RANKS, "teacher.parallel.context_parallel_size=2"],
        "teacher.parallel",
        "teacher.parallel.context_parallel_size",
        "set teacher.parallel.context_parallel_size=1",
    ),
    (
        [*CACHED, "teacher.micro_batch_size=2", "distill.packing=documents", "distill.micro_batch_size=1"],
        "teacher.packing",
        "teacher.micro_batch_size",
        "set teacher.micro_batch_size=1",
    ),
    (
        [
            *CACHED,
            *FP8_TEACHER,
            *TWO_RANKS,
            "teacher.parallel.tensor_model_parallel_size=2",
            "model.shape.kv_channels=34",
        ],
        "teacher.fp8_sizes",
        "distill.teacher_fp8",
        "lower teacher.parallel.tensor_model_parallel_size=2",
    ),
    (
        [*CACHED, *FP8_TEACHER, "teacher.parallel={}", "teacher.micro_batch_size=3", "distill.seq_length=250"],
        "teacher.fp8_tokens",
        "distill.teacher_fp8",
        "set teacher.micro_batch_size to 8",
    ),
    # The teacher's cached logits, and its correction.
    ([*DEMO, "distill.teacher_logits=both"], "value.choice", "distill.teacher_logits", "live or cached"),
    ([*DEMO, "distill.cached_logits_top_k=0"], "value.bounds", "distill.cached_logits_top_k", ""),
    (
        [*DEMO, "distill.teacher_logits=cached", "distill.cached_logits_top_k=1024"],
        "distill.cached_logits_top_k",
        "distill.cached_logits_top_k",
        "at most 1023",
    ),
    (
        [*DEMO, "distill.teacher_logits=cached", "distill.loss=ce", "distill.controls=[]"],
        "distill.teacher_logits",
        "distill.teacher_logits",
        "set distill.teacher_logits=live",
    ),
    (
        [*DEMO, "distill.teacher_logits=cached", "distill.kd.divergence=reverse_kl"],
        "distill.teacher_logits",
        "distill.kd.divergence",
        "set distill.kd.divergence=forward",
    ),
    (
        [*DEMO, "distill.teacher_logits=cached", "distill.phases=[{max_steps: 100}, {max_steps: 60}]"],
        "distill.teacher_logits",
        "distill.phases",
        "set distill.phases=null",
    ),
    (
        [*DEMO, "distill.teacher_logits=cached", "distill.skip_steps=[[3,4]]"],
        "distill.teacher_logits",
        "distill.skip_steps",
        "set distill.skip_steps=[], or distill.teacher_logits",
    ),
    (
        [*DEMO, "distill.teacher_logits=cached", "distill.kd.top_k=8"],
        "distill.teacher_logits",
        "distill.kd.top_k",
        "set distill.kd.top_k=null",
    ),
    (
        [*DEMO, "distill.teacher_logits=cached", "distill.kd.intermediate_pairs=[{student: 1, teacher: 1}]"],
        "distill.teacher_logits",
        "distill.kd.intermediate_pairs",
        "set distill.kd.intermediate_pairs=[], or distill.teacher_logits=live",
    ),
    (
        [*DEMO, "distill.teacher_logits=cached", "distill.kd.implementation=upstream"],
        "distill.teacher_logits",
        "distill.kd.implementation",
        "set distill.kd.implementation=chunked, or distill.teacher_logits=live",
    ),
    ([*DEMO, "distill.teacher_correction.lr=0", *CORRECTION], "value.bounds", "distill.teacher_correction.lr", ""),
    (
        [*DEMO, *CORRECTION, "distill.teacher_correction.lr=1e-4", "distill.teacher_correction.micro_batch_size=3"],
        "training.global_batch_size",
        "distill.teacher_correction.global_batch_size",
        "to 3 or 6",
    ),
    (
        [*DEMO, *CORRECTION, "distill.teacher_correction.lr=1e-4", "distill.loss=ce", "distill.controls=[]"],
        "distill.teacher_correction",
        "distill.teacher_correction",
        "distill.teacher_correction=null",
    ),
    (
        [*DEMO, "distill.swap_teacher_at_step=10"],
        "distill.swap_teacher",
        "distill.swap_teacher_at_step",
        "distill.swap_teacher_at_step=null",
    ),
    (
        [*DEMO, *CORRECTION, "distill.teacher_correction.lr=1e-4", "distill.swap_teacher_at_step=160"],
        "distill.swap_teacher",
        "distill.swap_teacher_at_step",
        "to at most 159",
    ),
    (
        [
            *(*DEMO, *CORRECTION, "distill.teacher_correction.lr=1e-4"),
            *("distill.swap_teacher_at_step=10", "distill.teacher_logits=cached"),
        ],
        "distill.swap_teacher",
        "distill.swap_teacher_at_step",
        "distill.teacher_logits=live",
    ),
    # Mixtures of experts.
    ([*DEMO, "model.family=qwen3_moe"], "model.experts", "model.shape.num_moe_experts", "model.shape.num_moe_experts"),
    (
        [*DEMO, "model.shape.num_moe_experts=4"],
        "model.experts",
        "model.shape.num_moe_experts",
        "model.shape.num_moe_experts=null",
    ),
    ([*MOE, "model.shape.moe_router_topk=5"], "model.experts", "model.shape.moe_router_topk", "to at most 4"),
    ([*DEMO, "prune.num_moe_experts=2"], "prune.experts", "prune.num_moe_experts", "prune.num_moe_experts=null"),
    ([*MOE, "prune.num_moe_experts=1"], "prune.experts", "prune.num_moe_experts", "to at least 2"),
    ([*MOE, "prune.num_moe_experts=5"], "prune.sizes", "prune.num_moe_experts", "to at most 4"),
    (
        [*MOE, "prune.moe_ffn_hidden_size=100"],
        "prune.sizes",
        "prune.moe_ffn_hidden_size",
        "set prune.moe_ffn_hidden_size to 64 or 128",
    ),
    ([*MOE, "prune.ffn_hidden_size=640"], "prune.experts", "prune.ffn_hidden_size", "prune.moe_ffn_hidden_size"),
    (
        [*MOE, "prune.num_layers=null", "prune.budget.params_fraction=0.8"],
        "prune.experts_support",
        "prune.budget",
        "set prune.budget=null",
    ),
    (
        [
            *(*MOE, "prune.num_layers=null", "prune.drop_layers=[2]", "prune.tensor_model_parallel_size=2"),
            *TWO_RANKS,
        ],
        "prune.experts_support",
        "prune.tensor_model_parallel_size",
        "prune.tensor_model_parallel_size=1",
    ),
    (
        [*DEMO, *EP_OF_2],
        "training.experts",
        "distill.parallel.expert_model_parallel_size",
        "distill.parallel.expert_model_parallel_size=1",
    ),
    (
        [*MOE, *EP_OF_2, "prune.num_moe_experts=3"],
        "training.experts",
        "distill.parallel.expert_model_parallel_size",
        "expert_model_parallel_size to 1",
    ),
    (
        [*MOE, "distill.parallel.expert_model_parallel_size=2"],
        "training.experts",
        "distill.parallel.expert_model_parallel_size",
        "to 1",
    ),
    (
        [
            *(*MOE, *EP_OF_2, "distill.parallel.tensor_model_parallel_size=2"),
            "distill.parallel.sequence_parallel=false",
        ],
        "training.sequence_parallel",
        "distill.parallel.sequence_parallel",
        "distill.parallel.sequence_parallel=true",
    ),
    # Errors of Hydra.
    ([*DEMO, "distill.lr=[1"], "override.syntax", "distill.lr", 'distill.lr=["TEXT"]\''),
    ([*DEMO, "distill.lr=1e-3,1e-4"], "override.sweep", "distill.lr", "add --multirun"),
    # Numbers out of range.
    ([*DEMO, "distill.max_steps=0"], "value.bounds", "distill.max_steps", "set distill.max_steps to 1 or more"),
    ([*DEMO, "distill.lr=-1e-3"], "value.bounds", "distill.lr", "set distill.lr to a number above 0"),
    ([*DEMO, "distill.min_lr=-1e-3"], "value.bounds", "distill.min_lr", ""),
    ([*DEMO, "model.demo.training.micro_batch_size=0"], "value.bounds", "model.demo.training.micro_batch_size", ""),
    (
        [*DEMO, "distill.parallel.tensor_model_parallel_size=0"],
        "value.bounds",
        "distill.parallel.tensor_model_parallel_size",
        "",
    ),
    ([*DEMO, "model.shape.num_layers=-6"], "value.bounds", "model.shape.num_layers", ""),
    ([*DEMO, "prune.hidden_size=0"], "value.bounds", "prune.hidden_size", ""),
    ([*DEMO, "cluster.nodes=0"], "value.bounds", "cluster.nodes", ""),
    ([*DEMO, "evaluate.verify_tokens=-1"], "value.bounds", "evaluate.verify_tokens", ""),
    ([*DEMO, "distill.adam_beta2=1.5"], "value.bounds", "distill.adam_beta2", ""),
    ([*DEMO, "data.holdout_every=1"], "value.bounds", "data.holdout_every", "2 or more"),
    ([*DEMO, "name=''"], "value.bounds", "name", ""),
    ([*DEMO, "run_dir=' '"], "value.bounds", "run_dir", "set run_dir"),
    # The model and its data.
    ([*DEMO, "model.hf_path=Qwen/Qwen3-8B"], "model.source", "model.hf_path", "model.hf_path=null"),
    ([*QWEN, "model.hf_path=null"], "model.source", "model.hf_path", "set model.hf_path"),
    ([*DEMO, "model.shape=null"], "model.source", "model.shape", "set model.shape"),
    ([*LOCAL, "model.hf_path=./nowhere"], "model.config_json", "model.hf_path", ""),
    ([*LOCAL, "model.hf_path=no-such-owner/no-such-model"], "model.config_json", "model.hf_path", ""),
    (["model=local", *LOCAL[1:]], "value.missing", "model.hf_path", "set model.hf_path"),
    ([*DEMO, "model.shape.num_query_groups=3"], "model.heads", "model.shape.num_attention_heads", "1 or 2 or 4"),
    ([*QWEN, "data.train=null"], "data.files", "data.train", "set data.train=[FILE.jsonl]"),
    ([*DEMO, "data.validation=[v.jsonl]"], "data.files", "data.validation", "data.train=[FILE.jsonl]"),
    ([*QWEN, "data.train=[]"], "data.files", "data.train", "data.train=[FILE.jsonl]"),
    ([*QWEN, "data.train=[a,b]", "data.validation=[b]"], "data.files", "data.validation", "data.validation=null"),
    # Pruning.
    ([*DEMO, "prune.num_layers=null"], "prune.nothing", "prune", "prune.drop_layers"),
    ([*DEMO, "prune.num_layers=6"], "prune.nothing", "prune", "prune.budget.params_fraction=0.67"),
    ([*DEMO, "prune.num_layers=7"], "prune.sizes", "prune.num_layers", "to at most 6"),
    ([*QWEN, "prune.hidden_size=8192"], "prune.sizes", "prune.hidden_size", "to at most 4096"),
    ([*DEMO, "prune.hidden_size=200"], "prune.sizes", "prune.hidden_size", "to 192 or 256"),
    ([*DEMO, "prune.ffn_hidden_size=500"], "prune.sizes", "prune.ffn_hidden_size", "to 448 or 512"),
    ([*DEMO, "prune.num_attention_heads=3"], "prune.heads", "prune.num_attention_heads", "2 or 4"),
    ([*DEMO, "prune.num_query_groups=1"], "prune.heads", "prune.num_attention_heads", "1 or 2"),
    ([*DEMO, "prune.drop_layers=[2]"], "prune.drop_layers", "prune.drop_layers", ""),
    (
        [*DEMO, "prune.num_layers=null", "prune.drop_layers=[0,7]"],
        "prune.drop_layers",
        "prune.drop_layers",
        "numbers from 1 to 6",
    ),
    (
        [*DEMO, "prune.num_layers=null", "prune.drop_layers=[2,2]"],
        "prune.drop_layers",
        "prune.drop_layers",
        "drop_layers=[2]",
    ),
    (
        [*DEMO, "prune.calibration_seq_length=4096"],
        "prune.calibration_seq_length",
        "prune.calibration_seq_length",
        "at most 2048",
    ),
    (
        [*DEMO, "prune.pipeline_model_parallel_size=7", "cluster.devices_per_node=7", "distill.global_batch_size=28"],
        "prune.pipeline",
        "prune.pipeline_model_parallel_size",
        "to at most 6",
    ),
    (
        [*DEMO, "prune.pipeline_model_parallel_size=2"],
        "prune.ranks",
        "prune.pipeline_model_parallel_size",
        "at most 1",
    ),
    # On-policy rounds.
    ([*ON_POLICY, "distill.loss=ce", "distill.controls=[]"], "on_policy.loss", "distill.loss", "distill.loss=kd"),
    ([*ON_POLICY, "distill.on_policy.mix=1.5"], "value.bounds", "distill.on_policy.mix", "above 0 and at most 1"),
    ([*ON_POLICY, "distill.on_policy.mix=0"], "value.bounds", "distill.on_policy.mix", ""),
    ([*ON_POLICY, "distill.on_policy.temperature=0"], "value.bounds", "distill.on_policy.temperature", "0.01 or more"),
    ([*ON_POLICY, "distill.on_policy.rounds=5"], "value.bounds", "distill.on_policy.rounds", "to at most 4"),
    (
        [*ON_POLICY, "distill.on_policy.max_new_tokens=192"],
        "on_policy.length",
        "distill.on_policy.max_new_tokens",
        "to at most 255 in sum",
    ),
    (
        [*ON_POLICY, "distill.on_policy.min_lr=1"],
        "on_policy.learning_rate",
        "distill.on_policy.min_lr",
        "at most 0.0001",
    ),
    (
        [*ON_POLICY, "distill.on_policy.warmup_steps=40"],
        "on_policy.learning_rate",
        "distill.on_policy.warmup_steps",
        "such as 2",
    ),
    (
        [*ON_POLICY, "distill.on_policy.engine=server"],
        "on_policy.server_url",
        "distill.on_policy.server_url",
        "server_url=http://HOST:PORT/v1",
    ),
    (
        [*ON_POLICY, "distill.on_policy.engine=server", "distill.on_policy.server_url=localhost:8000"],
        "on_policy.server_url",
        "distill.on_policy.server_url",
        "server_url=http://HOST:PORT/v1",
    ),
    (
        [*ON_POLICY, "distill.on_policy.server_url=http://localhost:8000/v1"],
        "on_policy.server_url",
        "distill.on_policy.server_url",
        "distill.on_policy.engine=server",
    ),
    ([*ON_POLICY, "distill.on_policy.prompts=[]"], "on_policy.prompts", "distill.on_policy.prompts", "prompts=null"),
    (
        [*ON_POLICY, "distill.on_policy.prompts=[hf://x]"],
        "on_policy.prompts",
        "distill.on_policy.prompts",
        "hf://datasets/OWNER",
    ),
    # Layout.
    (
        [*DEMO, "distill.parallel.tensor_model_parallel_size=2"],
        "training.ranks",
        "distill.parallel",
        "distill.parallel",
    ),
    (
        [*QWEN, "distill.parallel.tensor_model_parallel_size=16", "cluster.nodes=2"],
        "training.tensor_parallel",
        "distill.parallel.tensor_model_parallel_size",
        "to 1 or 2 or 4 or 8",
    ),
    (
        [*QWEN, "distill.parallel.tensor_model_parallel_size=1", "distill.parallel.pipeline_model_parallel_size=8"],
        "training.layers",
        "distill.parallel.pipeline_model_parallel_size",
        "to 1 or 2",
    ),
    (
        [
            "experiment=qwen3_8b_to_6b_depth",
            "layout=published",
            "distill.parallel={tensor_model_parallel_size:4,pipeline_model_parallel_size:2}",
            "prune.num_layers=25",
        ],
        "training.layers",
        "distill.parallel.pipeline_model_parallel_size",
        "to 1",
    ),
    (
        [*QWEN, "distill.parallel.tensor_model_parallel_size=2", "distill.global_batch_size=30"],
        "training.global_batch_size",
        "distill.global_batch_size",
        "to 24 or 32",
    ),
    ([*QWEN, "distill.global_batch_size=1"], "training.global_batch_size", "distill.global_batch_size", "to 2"),
    (
        [
            *QWEN,
            "distill.parallel={tensor_model_parallel_size:4,context_parallel_size:2,sequence_parallel:false}",
            "distill.seq_length=4090",
        ],
        "training.seq_length",
        "distill.seq_length",
        "to 4088 or 4092",
    ),
    ([*QWEN, "distill.seq_length=4095"], "training.seq_length", "distill.seq_length", "to 4088 or 4096"),
    ([*DEMO, "distill.seq_length=4096"], "training.max_length", "distill.seq_length", "to at most 2048"),
    ([*DEMO, "evaluate.seq_length=4096"], "evaluate.seq_length", "evaluate.seq_length", "at most 2048"),
    (
        [*DEMO, "evaluate.sample_prompt_tokens=2000"],
        "evaluate.samples",
        "evaluate.sample_prompt_tokens",
        "to at most 2048",
    ),
    ([*DEMO, "benchmark.prompt_tokens=2040"], "benchmark.length", "benchmark.prompt_tokens", "at most 2048"),
    ([*DEMO, "benchmark.new_tokens=1"], "value.bounds", "benchmark.new_tokens", "to 2 or more"),
    ([*DEMO, "benchmark.rounds=0"], "value.bounds", "benchmark.rounds", ""),
    ([*DEMO, "benchmark.request_rates=[1,0]"], "value.bounds", "benchmark.request_rates[1]", "or to null"),
    (
        [*DEMO, "quantize.formats=[fp8,fp8_tensor]", "benchmark.enabled=true", "benchmark.engine=vllm"],
        "quantize.served",
        "quantize.formats",
        "or set benchmark.engine=transformers",
    ),
    (
        [*DEMO, "quantize.formats=[fp8_tensor]", "evaluate.engine=vllm"],
        "quantize.served",
        "quantize.formats",
        "or set evaluate.engine=transformers",
    ),
    (
        [*MOE, "quantize.formats=[fp8,int8]", "evaluate.engine=vllm"],
        "quantize.served_experts",
        "quantize.formats",
        "remove fp8 and int8, or set evaluate.engine=transformers",
    ),
    (
        [*DEMO, "quantize.formats=[fp8,int8]", "benchmark.engine=vllm", "benchmark.dtype=fp32"],
        "quantize.served",
        "benchmark.dtype",
        "set benchmark.dtype=keep",
    ),
    ([*DEMO, "evaluate.continuations.questions=0"], "value.bounds", "evaluate.continuations.questions", ""),
    ([*DEMO, "evaluate.tasks=[mmlu,arc_easy,mmlu]"], "evaluate.tasks", "evaluate.tasks", "evaluate.tasks=[arc_easy"),
    (
        [*DEMO, "evaluate.tasks=[heldout_continuations]"],
        "evaluate.tasks",
        "evaluate.tasks",
        "evaluate.continuations={}",
    ),
    # The cluster.
    (
        [*DEMO, "cluster.time_limit=4h"],
        "cluster.time_limit",
        "cluster.time_limit",
        "cluster.time_limit='4:00:00'",
    ),
    ([*DEMO, "cluster.time_limit=14400"], "cluster.time_limit", "cluster.time_limit", "cluster.time_limit='4:00:00'"),
    ([*DEMO, "cluster.time_limit=0:00:00"], "cluster.time_limit", "cluster.time_limit", "cluster.time_limit='4:00:00'"),
    ([*DEMO, "cluster.gpu.memory_gib=80", "cluster.gpu.bf16_tflops=989"], "value.missing", "cluster.gpu.name", ""),
    (
        [*QWEN, "cluster.gpu.mfu=40"],
        "value.bounds",
        "cluster.gpu.mfu",
        "to a number above 0 and at most 1",
    ),
    ([*QWEN, "cluster.gpu.memory_gib=0"], "value.bounds", "cluster.gpu.memory_gib", ""),
    # Training.
    ([*DEMO, "distill.warmup_steps=160"], "training.warmup", "distill.warmup_steps", "such as 8"),
    ([*DEMO, "distill.min_lr=1"], "training.min_lr", "distill.min_lr", "to at most 0.001"),
    (
        [*DEMO, "model.demo.training.use_distributed_optimizer=false"],
        "training.overlap_param_gather",
        "model.demo.training.overlap_param_gather",
        "model.demo.training.overlap_param_gather=false",
    ),
    (
        [*DEMO, "distill.controls=[kd]"],
        "distill.controls",
        "distill.controls",
        "distill.controls=[ce",
    ),
    ([*DEMO, "distill.controls=[ce,ce]"], "distill.controls", "distill.controls", "distill.controls=[ce]"),
    (
        [*DEMO, "prune.rounds=[{steps: 20, num_layers: 4}]", "prune.num_layers=5", "prune.ffn_hidden_size=null"],
        "prune.sizes",
        "prune.num_layers",
        "to at most 4",
    ),
    (
        [*DEMO, "prune.rounds=[{steps: 20, drop_layers: [7]}]", "prune.num_layers=4"],
        "prune.drop_layers",
        "prune.rounds[0].drop_layers",
        "to 6",
    ),
    (
        [*DEMO, "prune.rounds=[{steps: 3, num_layers: 5}]", "prune.num_layers=4"],
        "prune.rounds",
        "prune.rounds[0].steps",
        "",
    ),
    (
        [
            *DEMO,
            "prune.num_layers=null",
            "prune.budget.params_fraction=0.5",
            "prune.rounds=[{steps: 20, num_layers: 5}]",
        ],
        "prune.budget_or_sizes",
        "prune.budget",
        "prune.budget=null",
    ),
    ([*DEMO, "distill.loss=ce"], "distill.controls", "distill.controls", "distill.controls=[]"),
    # Its loss.
    ([*DEMO, "distill.kd.temperature=0"], "value.bounds", "distill.kd.temperature", ""),
    ([*DEMO, "distill.kd.temperature=-2"], "value.bounds", "distill.kd.temperature", ""),
    ([*DEMO, "distill.kd.kd_weight=0"], "value.bounds", "distill.kd.kd_weight", ""),
    ([*DEMO, "distill.kd.lm_weight=-1"], "value.bounds", "distill.kd.lm_weight", ""),
    ([*DEMO, "distill.kd.chunk_tokens=0"], "value.bounds", "distill.kd.chunk_tokens", ""),
    (
        [*DEMO, "distill.kd.divergence=kl"],
        "value.choice",
        "distill.kd.divergence",
        "forward_kl or reverse_kl or jensen_shannon",
    ),
    ([*DEMO, "distill.kd.top_k=1024"], "kd.top_k", "distill.kd.top_k", ""),
    (
        [*DEMO, "distill.kd.top_k=9", "distill.kd.divergence=reverse_kl"],
        "kd.divergence",
        "distill.kd.top_k",
        "distill.kd.divergence=forward_kl",
    ),
    (
        [*DEMO, "distill.kd.implementation=upstream", "distill.kd.divergence=jensen_shannon"],
        "kd.implementation",
        "distill.kd.implementation",
        "set distill.kd.implementation=chunked",
    ),
    (
        [*DEMO, "distill.kd.implementation=upstream", "distill.kd.top_k=9"],
        "kd.implementation",
        "distill.kd.implementation",
        "distill.kd.implementation=chunked",
    ),
    (
        [*DEMO, "distill.kd.intermediate_pairs=[{student:5,teacher:6}]"],
        "kd.pairs",
        "distill.kd.intermediate_pairs",
        "to 4",
    ),
    (
        [*DEMO, "distill.kd.intermediate_pairs=[{student:0,teacher:6}]"],
        "value.bounds",
        "distill.kd.intermediate_pairs[0].student",
        "",
    ),
    (
        [*DEMO, "distill.kd.intermediate_pairs=[{student:2,teacher:3},{student:2,teacher:4}]"],
        "kd.pairs",
        "distill.kd.intermediate_pairs",
        "",
    ),
    (
        [*DEMO, "distill.kd.intermediate_pairs=[{student:2}]"],
        "value.missing",
        "distill.kd.intermediate_pairs[0].teacher",
        "",
    ),
    (
        [*DEMO, "distill.kd.intermediate_pairs=[{student:2,teacher:3}]", "distill.recompute=full"],
        "kd.pairs_recompute",
        "distill.kd.intermediate_pairs",
        "set distill.recompute=selective",
    ),
    (
        [
            *(*DEMO, "cluster.devices_per_node=2", "distill.parallel.pipeline_model_parallel_size=2"),
            "distill.kd.intermediate_pairs=[{student:2,teacher:4}]",
        ],
        "kd.pairs_pipeline",
        "distill.kd.intermediate_pairs",
        "distill.parallel.pipeline_model_parallel_size=1",
    ),
]


@pytest.mark.parametrize(("overrides", "rule", "key", "fix"), CASES, ids=[" ".join(case[0]) for case in CASES])
def test_a_fault_names_the_key_and_the_fix(overrides: list[str], rule: str, key: str, fix: str) -> None:
    check_fault(overrides, rule, key, fix)


def test_errors_of_hydra_are_one_fault() -> None:
    (fault,) = find_faults([*DEMO, "~no.such.key"])
    assert "no.such.key" in str(fault)


def test_all_faults_are_in_one_message() -> None:
    types = ["distill.lrr=1", "seed=x"]
    contradictions = ["distill.max_steps=0", "prune.num_layers=9", "cluster.devices_per_node=3"]
    with pytest.raises(ConfigError) as caught:
        compose(["experiment=demo", *types, *contradictions, "distill.warmup_steps=500"])
    assert [fault.keys[0] for fault in caught.value.faults] == [
        "seed",
        "distill.lrr",
        "distill.max_steps",
        "prune.num_layers",
        "distill.global_batch_size",
    ]
    assert str(caught.value).startswith("5 faults in the configuration:\n  - seed")


def test_the_students_layout_need_not_divide_a_teacher_that_is_cached_in_its_own() -> None:
    """The teacher's 5 heads on 2 ranks; a teacher with experts, which need sequence parallelism beside tensor's."""
    layout = [*TP_OF_2, "distill.teacher_logits=cached"]
    compose([*TAUGHT, *layout, "teacher.parallel={}"])
    experts = [*TAUGHT, *layout, *MOE_TEACHER, "distill.parallel.sequence_parallel=false"]
    compose([*experts, "teacher.parallel={}"])
    assert {fault.rule for fault in find_faults(experts)} == {"training.tensor_parallel", "training.sequence_parallel"}


@pytest.mark.parametrize(
    ("override", "rule", "part"),
    [
        ("model.hf_path=./nowhere", "model.exists", "set model.hf_path"),
        ("data.train=[a.jsonl,b.jsonl]", "data.exist", "a.jsonl and 1 more"),
        ("data.validation=[v.jsonl]", "data.exist", "v.jsonl not found"),
        ("evaluate.tasks=[mmlu,nonsuch]", "evaluate.known_tasks", "nonsuch"),
        ("evaluate.task_folder=./nowhere", "evaluate.task_folder", "=./nowhere: "),
    ],
)
def test_missing_files_are_reported_when_a_run_starts(tmp_path: Path, override: str, rule: str, part: str) -> None:
    documents = tmp_path / "docs.jsonl"
    documents.write_text("")
    overrides = [*QWEN, f"data.train=[{documents}]", override]
    compose(overrides)
    (fault,) = find_faults(overrides, check_files=True)
    assert (fault.rule, fault.keys[0]) == (rule, override.partition("=")[0])
    assert part in str(fault)


def test_user_tasks_are_known(tmp_path: Path) -> None:
    documents, tasks = tmp_path / "docs.jsonl", tmp_path / "tasks"
    documents.write_text("")
    (tasks / "deep").mkdir(parents=True)
    (tasks / "deep" / "one.yaml").write_text("tag:\n  - mine\ntask: my_one\nprocess_docs: !function utils.process\n")
    mine = [f"evaluate.task_folder={tasks}", "evaluate.tasks=[mine, my_one, arc_challenge]"]
    compose([*QWEN, f"data.train=[{documents}]", *mine], check_files=True)
    (fault,) = find_faults([*QWEN, f"data.train=[{documents}]", mine[0], "evaluate.tasks=[your_one]"], check_files=True)
    assert fault.rule == "evaluate.known_tasks"
    assert "your_one" in str(fault)
    assert str(tasks) in str(fault)


def test_a_missing_serving_environment_is_reported(tmp_path: Path) -> None:
    served = [*DEMO, "quantize.formats=[fp8]", "evaluate.engine=vllm", f"benchmark.serve_python={tmp_path}/python"]
    key = "benchmark.serve_python"
    check_fault(served, key, key, "or set evaluate.engine=transformers", check_files=True)
    both = "or set benchmark.engine=transformers evaluate.engine=transformers"
    check_fault([*served, "benchmark.engine=vllm"], key, key, both, check_files=True)
    # Nothing is served.
    compose([*served, "quantize.formats=[]"], check_files=True)


def test_a_missing_harness_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    from prune_distill.config.rules import evaluation as evaluation_rules

    monkeypatch.setattr(evaluation_rules.importlib.util, "find_spec", lambda name: None)
    check_fault(DEMO, "evaluate.lm_eval", "evaluate.continuations", "make setup", check_files=True)


@pytest.mark.parametrize("control", ["\n", "\r", "\x00", "\x1b", "\t", "\u2028", "\udcff"])
@pytest.mark.parametrize("key", ["run_dir", "name", "model.name", "data.text_key", "data.train", "evaluate.tasks"])
def test_a_control_character_is_rejected_everywhere(key: str, control: str) -> None:
    text = f'"a{control}#SBATCH --wrap=id"'
    value = f"[{text}]" if key in ("data.train", "evaluate.tasks") else text
    found = [fault for fault in find_faults([*DEMO, f"{key}={value}"]) if fault.rule == "value.control_character"]
    assert any(fault.keys[0].startswith(key) for fault in found)
    assert all(str(fault).isprintable() for fault in found)


@pytest.mark.parametrize(
    "value",
    [
        "a b",
        "it's",
        'say "hi"',
        "a,b",
        "a=b",
        "a(b",
        "{x}",
        "[x",
        "back\\slash\\",
        '\\"',
        "#1",
        "$HOME `id` Größe 汉字 \u0915\u200d\u0937",
    ],
)
def test_suggested_overrides_survive_bash_and_hydra(value: str) -> None:
    """Suggested overrides, copied into a shell."""
    command = f"printf %s {override('model.name', value)}"
    word = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout
    assert compose([*DEMO, word]).model.name == value


def test_a_value_that_hydra_cannot_read_is_offered_quoted() -> None:
    first, second = map(str, find_faults([*DEMO, "model.name=a(b", "run_dir=/x/a,b"]))
    assert first.endswith("""set 'model.name="a(b"'""")
    assert """set 'run_dir="/x/a,b"' for one text""" in second
    assert "--multirun" in second


def test_a_tracker_has_to_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    tracked = [*DEMO, "distill.wandb={project: x}"]
    find_spec, installed = importlib.util.find_spec, {"wandb": None}
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: installed[name] if name in installed else find_spec(name)
    )
    check_fault(tracked, "training.trackers", "distill.wandb", "pip install wandb, or set distill.wandb=null", True)
    installed["wandb"] = find_spec("json")
    assert compose(tracked, check_files=True).distill.wandb is not None


def test_what_on_policy_rounds_need_on_this_machine(tmp_path: Path) -> None:
    key, engine = "distill.on_policy.prompts", "distill.on_policy.engine"
    absent = [*ON_POLICY, f"{engine}=transformers", f"{key}=[{tmp_path}/absent.jsonl]"]
    check_fault(absent, "on_policy.readable", key, f"{key}=[FILE.jsonl]", True)
    (tmp_path / "empty").mkdir()
    check_fault([*absent, f"{key}=[{tmp_path}/empty]"], "on_policy.readable", key, f"{key}=[FILE.jsonl]", True)
    (tmp_path / "array.json").write_text("[]")
    (fault,) = find_faults([*absent, f"{key}=[{tmp_path}/array.json]"], True)
    assert (fault.rule, "convert it with: jq" in str(fault)) == ("on_policy.readable", True)
    vllm = [*ON_POLICY, f"benchmark.serve_python={tmp_path}/python"]
    check_fault(vllm, "on_policy.serve_python", engine, f"make serve-env, or set {engine}=transformers", True)
