"""Bounds of the schema's fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest

from launch.planning.automatic import compose
from prune_distill.config.bounds import out_of_bounds
from prune_distill.config.hints import field_hints, split_hint
from prune_distill.errors import ConfigError
from prune_distill.schema import RunConfig, Shape
from prune_distill.schema.fields import Bound, NotBlank, PositiveInt, Range, Steps

TRAININGS = ("distill", "distill.teacher_correction", "model.demo.training")


def keys_below(group: str, names: str) -> list[str]:
    return [f"{group}.{name}" for name in names.split()]


# Every key with a bound, by rejected values.
ABOVE_ZERO = [
    *keys_below("cluster", "nodes devices_per_node threads_per_rank slurm.warn_seconds slurm.cpus_per_gpu"),
    *keys_below(
        "cluster.gpu",
        "memory_gib bf16_tflops fp8_tflops compute_capability memory_gbs link_gbs network_gbs mfu cost_per_hour",
    ),
    *keys_below("data", "max_document_tokens shard_bytes num_workers array_tasks stale_seconds sample"),
    *keys_below("data.sources.NAME", "weight max_tokens sample"),
    *keys_below("prune", "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups"),
    *keys_below("prune", "num_moe_experts moe_ffn_hidden_size calibration_samples calibration_seq_length"),
    *keys_below("prune", "micro_batch_size pipeline_model_parallel_size tensor_model_parallel_size block_samples"),
    *keys_below("prune.rounds[N]", "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups"),
    *keys_below("prune.rounds[N]", "num_moe_experts moe_ffn_hidden_size steps"),
    *keys_below(
        "prune.budget", "params memory_gb latency_ms params_fraction memory_fraction latency_fraction batch_size"
    ),
    *keys_below("prune.budget", "seq_length max_candidates samples layer_sets"),
    "prune.successive_halving.round_tokens",
    *keys_below("distill.kd", "kd_weight temperature top_k chunk_tokens intermediate_weight"),
    *keys_below("distill.kd.intermediate_pairs[N]", "student teacher"),
    *keys_below("distill", "cached_logits_top_k cached_logits_shard_sequences swap_teacher_at_step"),
    *keys_below("distill.on_policy", "rounds steps lr mix prompts_per_round prompt_tokens samples_per_prompt"),
    *keys_below("distill.on_policy", "max_new_tokens temperature top_p batch_size shard_prompts array_tasks"),
    *keys_below("quantize", "calibration_samples calibration_seq_length micro_batch_size int4_group_size"),
    *keys_below("evaluate", "seq_length micro_batch_size max_sequences task_limit task_batch_size"),
    *keys_below("evaluate", "sample_prompt_tokens sample_new_tokens"),
    *keys_below("evaluate.continuations", "questions context_words choice_words"),
    *keys_below("benchmark", "batch_size prompt_tokens rounds requests threads cost_per_hour"),
    "benchmark.request_rates[N]",
    *(
        f"{group}.shape.{field.name}"
        for group in ("model", "teacher", "data.sources.NAME.teacher")
        for field in dataclasses.fields(Shape)
        if field.name != "tie_word_embeddings"
    ),
    *(
        key
        for teacher in ("teacher", "data.sources.NAME.teacher")
        for key in (
            f"{teacher}.micro_batch_size",
            *keys_below(f"{teacher}.parallel", "tensor_model_parallel_size pipeline_model_parallel_size"),
            *keys_below(f"{teacher}.parallel", "context_parallel_size expert_model_parallel_size"),
        )
    ),
    *(
        key
        for training in TRAININGS
        for key in (
            *keys_below(training, "max_steps seq_length global_batch_size micro_batch_size lr clip_grad"),
            *keys_below(training, "save_every_n_steps keep_checkpoints val_every_n_steps val_batches"),
            *keys_below(training, "log_every_n_steps decay_steps"),
            *keys_below(f"{training}.parallel", "tensor_model_parallel_size pipeline_model_parallel_size"),
            *keys_below(f"{training}.parallel", "context_parallel_size expert_model_parallel_size"),
            *keys_below(f"{training}.phases[N]", "max_steps tokens seq_length global_batch_size micro_batch_size lr"),
        )
    ),
]
FROM_ZERO = [
    *keys_below("evaluate", "verify_tokens samples num_fewshot"),
    *("seed", "cluster.node_rank", "cluster.slurm.max_restarts", "distill.kd.lm_weight"),
    *("prune.successive_halving.score.margin", "data.max_invalid_fraction", "prune.budget.max_depth_pruning"),
    *("prune.budget.max_width_pruning", "distill.on_policy.min_lr", "distill.on_policy.warmup_steps"),
    *(
        key
        for training in TRAININGS
        for key in (
            *keys_below(training, "min_lr warmup_steps weight_decay num_workers adam_beta1 adam_beta2"),
            *keys_below(f"{training}.phases[N]", "min_lr warmup_steps"),
        )
    ),
]
FROM_TWO = ["data.holdout_every", "benchmark.new_tokens", "prune.successive_halving.candidates"]
ABOVE_ONE = [f"{training}.max_loss_ratio" for training in TRAININGS]
BELOW_ONE = [
    *(f"{training}.{key}" for training in TRAININGS for key in ("adam_beta1", "adam_beta2")),
    *keys_below("prune.budget", "params_fraction memory_fraction latency_fraction max_depth_pruning max_width_pruning"),
    "data.max_invalid_fraction",
]
UP_TO_ONE = ["data.sample", "data.sources.NAME.sample", "cluster.gpu.mfu"]
UP_TO_ONE += ["distill.on_policy.mix", "distill.on_policy.top_p"]
MOST = {
    "seed": 2**32 - 1,
    "cluster.nodes": 2**20,
    "cluster.devices_per_node": 1024,
    "prune.rounds[N].steps": 2**31 - 1,
    "distill.on_policy.steps": 2**31 - 1,
    "distill.on_policy.rounds": 4,
    **{f"{training}.max_steps": 2**31 - 1 for training in TRAININGS},
    **{f"{training}.phases[N].max_steps": 2**31 - 1 for training in TRAININGS},
}
NOT_BLANK = ["name", "run_dir", "data.text_key"]


def list_bounds(cls: type, prefix: str = "") -> Iterator[tuple[str, tuple[Bound, ...]]]:
    for name, hint in field_hints(cls).items():
        key = prefix + name
        if hint.origin is not None:
            key += "[N]" if hint.origin is list else ".NAME"
            hint = hint.item
        if hint.is_group:
            yield from list_bounds(hint.kind, f"{key}.")
        elif hint.bounds:
            yield key, hint.bounds


BOUNDS = dict(list_bounds(RunConfig))


def accepts(key: str, value: Any) -> bool:
    return all(bound.accepts(value) for bound in BOUNDS[key])


@pytest.mark.parametrize(
    ("keys", "refused", "accepted"),
    [
        (ABOVE_ZERO, 0, 0.5),
        (FROM_ZERO, -1e-9, 0),
        (FROM_TWO, 1, 2),
        (ABOVE_ONE, 1.0, 1.1),
        (BELOW_ONE, 1.0, 0.9),
        (UP_TO_ONE, 1.1, 1.0),
        (NOT_BLANK, " ", "x"),
    ],
)
def test_bounds(keys: list[str], refused: Any, accepted: Any) -> None:
    assert [key for key in keys if accepts(key, refused)] == []
    assert [key for key in keys if not accepts(key, accepted)] == []


def test_largest_numbers() -> None:
    assert [key for key, most in MOST.items() if not accepts(key, most) or accepts(key, most + 1)] == []


def test_every_bound_is_in_this_file() -> None:
    listed = {*ABOVE_ZERO, *FROM_ZERO, *FROM_TWO, *ABOVE_ONE, *BELOW_ONE, *UP_TO_ONE, *MOST, *NOT_BLANK}
    assert set(BOUNDS) == listed


def test_defaults_are_within_bounds() -> None:
    for name in ("demo", "qwen3_8b_to_6b_depth"):
        assert list(out_of_bounds(compose([f"experiment={name}"]), ())) == []


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("prune.budget.max_depth_pruning=1", "prune.budget.max_depth_pruning"),
        ("prune.rounds=[{num_layers: 0, steps: 40}]", "prune.rounds[0].num_layers"),
        ("distill.phases=[{max_steps: 160, lr: 0}]", "distill.phases[0].lr"),
        ("+data.sources={web: {files: [a.jsonl], sample: 2}}", "data.sources.web.sample"),
    ],
)
def test_groups_in_groups_lists_and_mappings_are_checked(override: str, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(["experiment=demo", override])
    (fault,) = [fault for fault in caught.value.faults if fault.keys == (key,)]
    assert fault.rule == "value.bounds"
    assert f"set {key} to " in str(fault)


def refused(cfg: RunConfig, *unreadable: str) -> list[str]:
    return [key for fault in out_of_bounds(cfg, unreadable) for key in fault.keys]


def test_an_unreadable_value_is_skipped() -> None:
    cfg = compose(["experiment=demo"])
    cfg.seed, cfg.distill.lr, cfg.distill.parallel.context_parallel_size = -1, -1.0, 0
    keys = ["seed", "distill.lr", "distill.parallel.context_parallel_size"]
    assert refused(cfg) == keys
    assert refused(cfg, "distill") == ["seed"]
    assert refused(cfg, "seed", "distill.parallel") == ["distill.lr"]


def test_type_hints_are_parsed() -> None:
    assert split_hint(PositiveInt | None).optional
    assert split_hint(Steps).bounds == (Range(above=0), Range(at_most=2**31 - 1))
    assert split_hint(list[PositiveInt]).item.bounds == (Range(above=0),)


def test_descriptions() -> None:
    assert Range(above=0).describe() == "above 0"
    assert Range(at_least=0, below=1).describe() == "0 or more and below 1"
    assert Range(above=0, at_most=1).describe() == "above 0 and at most 1"
    assert NotBlank().describe() == "not empty"
