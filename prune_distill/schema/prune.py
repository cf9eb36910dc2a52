"""Pruning: target sizes, a budget to search under, and successive halving among candidates."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated

from omegaconf import MISSING

from prune_distill.schema.fields import (
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ProperShare,
    Range,
    ShareBelowOne,
    Steps,
    placement,
)


class LayerSelection(Enum):
    """How the layers to drop are chosen where only their number is set.

    `importance`: the layers that change the hidden states the least (Minitron). `block`: the block of adjacent layers
    without which the model's loss on calibration text is lowest.
    """

    importance = "importance"
    block = "block"


@dataclass
class Budget:
    """Limits on the cost of the student; the search finds its sizes. All limits that are set hold together.

    Each limit is an absolute number, or (`_fraction`) a fraction of the teacher's cost.
    """

    # Largest number of parameters; null: no limit.
    params: PositiveFloat | None = None
    # Largest number of parameters, as a share of the teacher's; null: no limit.
    params_fraction: ProperShare | None = None
    # Largest memory in GB (10^9 bytes) of the weights, in convert.export_dtype, and the KV cache of `batch_size`
    # sequences of `seq_length` tokens; null: no limit.
    memory_gb: PositiveFloat | None = None
    # The same memory, as a share of the teacher's; null: no limit.
    memory_fraction: ProperShare | None = None
    # Longest time in milliseconds of a forward pass over `batch_size` sequences of `seq_length` tokens, measured on
    # the machine that searches; null: no limit.
    latency_ms: PositiveFloat | None = None
    # The same time, as a share of the teacher's; null: no limit.
    latency_fraction: ProperShare | None = None
    # Sequences for memory and latency.
    batch_size: PositiveInt = 1
    # Tokens per sequence for memory and latency; null: prune.calibration_seq_length.
    seq_length: PositiveInt | None = None
    # Largest share of the layers that may be dropped.
    max_depth_pruning: ShareBelowOne = 1 / 3
    # Largest share by which each width may be cut.
    max_width_pruning: ShareBelowOne = 0.4
    # Largest number of shapes that are scored. If more fit the budget, they are sampled evenly.
    max_candidates: PositiveInt = 64
    # Number of layer sets to drop that are tried with each shape: the one that `prune.layer_selection` chooses, and the
    # best of its variations that swap one dropped layer with a neighbor, by loss on `prune.block_samples` sequences.
    layer_sets: PositiveInt = 2
    # Held-out sequences of `prune.calibration_seq_length` tokens on which each candidate is scored.
    samples: PositiveInt = 64


@dataclass
class TaskScore:
    """The score on a task. After each round, candidates whose score is clearly worse than the best one rank below all
    others, whatever their loss."""

    # Name of the task: heldout_continuations, or one of evaluate.tasks, with the settings of the stage evaluate.
    task: str = MISSING
    # Metric of the task, under the name that lm-evaluation-harness gives it.
    metric: str = "acc"
    # A score is clearly worse if the difference exceeds so many of its standard errors.
    margin: NonNegativeFloat = 2.0


@dataclass
class SuccessiveHalving:
    """Short distillations of the best candidates. Each round drops the worse half, and is as long as all earlier rounds
    together."""

    # Number of candidates in the first round.
    candidates: Annotated[int, Range(at_least=2, problem="leaves nothing to choose")] = 4
    # Tokens of the first round, rounded up to whole steps of the distillation.
    round_tokens: PositiveInt = MISSING
    # A task that takes part in the ranking; null: the loss alone decides.
    score: TaskScore | None = None


@dataclass
class TargetSizes:
    """Sizes after a round of pruning; null keeps the current size."""

    # Number of layers, chosen by `layer_selection`; null: all layers, or those that `drop_layers` keeps.
    num_layers: PositiveInt | None = None
    # Width of the hidden states, in steps of 64; null: unchanged.
    hidden_size: PositiveInt | None = None
    # Width of the FFN of a dense layer, in steps of 64; null: unchanged.
    ffn_hidden_size: PositiveInt | None = None
    # Attention heads per layer; null: unchanged.
    num_attention_heads: PositiveInt | None = None
    # Key-value heads per layer; null: unchanged.
    num_query_groups: PositiveInt | None = None
    # Experts per layer of a mixture of experts; null: unchanged.
    num_moe_experts: PositiveInt | None = None
    # Width of the FFN of an expert, in steps of 64; null: unchanged.
    moe_ffn_hidden_size: PositiveInt | None = None
    # Numbers of the layers to drop, counted from 1, instead of num_layers; null: none are named.
    drop_layers: list[int] | None = None


@dataclass
class PruneRound(TargetSizes):
    """A round of pruning before the last one: the sizes of the intermediate model, which is distilled and then pruned
    again. All other settings are those of `prune` and `distill`."""

    # Optimizer steps for which the intermediate model is distilled; more than distill.warmup_steps.
    steps: Steps = MISSING


@dataclass
class PruneConfig(TargetSizes):
    """Target sizes of the student (Minitron), null keeping the teacher's; or a budget, for which sizes are searched."""

    # Rounds of pruning and distillation before the last one, whose sizes are those of `prune`. The teacher is the same
    # in all rounds.
    rounds: list[PruneRound] = field(default_factory=list)
    layer_selection: LayerSelection = LayerSelection.importance
    # Limits within which the search finds the sizes; null: the sizes are set by hand.
    budget: Budget | None = None
    # Distillations that choose among the best candidates; null: the best candidate of the search is the student.
    successive_halving: SuccessiveHalving | None = None
    # Sequences of calibration text by which importance is measured.
    calibration_samples: PositiveInt = 1024
    # Tokens per sequence of calibration text.
    calibration_seq_length: PositiveInt = 4096
    # Sequences of calibration text by which a block of layers, or a variation of the least important ones, is chosen.
    block_samples: PositiveInt = 32
    # Sequences per forward pass where losses are compared. Importance is measured one sequence at a time.
    micro_batch_size: PositiveInt = placement(1)
    # Pipeline stages. Where they do not divide the layers, the last stage has fewer or more layers than the others.
    pipeline_model_parallel_size: PositiveInt = placement(1)
    # Tensor-parallel ranks; above 1 only if the layers to drop are named and nothing else is pruned.
    tensor_model_parallel_size: PositiveInt = placement(1)
