"""Pruning: target sizes, a budget to search under, and a tournament among candidates."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from prune_distill.schema.fields import placement


class Depth(Enum):
    """Which layers go where only their number is known.

    `importance`: those that change the hidden states the least (Minitron). `block`: neighbours, namely the block
    without which the model's loss on calibration text is lowest.
    """

    importance = "importance"
    block = "block"


@dataclass
class Budget:
    """What the student may cost: the search finds its sizes. Limits hold together; null sets none.

    Each is a number, or (`_share`) a share of what the teacher costs.
    """

    params: float | None = None
    params_share: float | None = None
    # Weights, in convert.export_dtype, and KV cache of `batch_size` sequences of `seq_length` tokens; 10^9 bytes.
    memory_gb: float | None = None
    memory_share: float | None = None
    # Milliseconds of a forward pass over that batch, on the machine that searches: measured there.
    latency: float | None = None
    latency_share: float | None = None
    batch_size: int = 1
    # Null: prune.calibration_seq_length.
    seq_length: int | None = None
    # The most that may go of the layers, and of each width.
    max_depth_cut: float = 1 / 3
    max_width_cut: float = 0.4
    # Shapes that are scored at most; of more, as many are taken evenly.
    max_candidates: int = 64
    # Sets of layers that each shape is tried without: the one that `depth` names and, of those in which one layer gives
    # its place to a neighbour, the best by loss on `block_samples` sequences of calibration text.
    layer_sets: int = 2
    # Held-out sequences of `prune.calibration_seq_length` tokens that each is scored on.
    samples: int = 64


@dataclass
class TaskScore:
    """A task that has a say in who is left: after each round, a candidate whose score is clearly worse than the best
    one ranks below all that are not, whatever its loss."""

    # heldout_continuations, or one of evaluate.tasks; asked as the stage evaluate asks it.
    task: str = MISSING
    metric: str = "acc"
    # How many standard errors of their difference two scores are apart for one to be clearly worse.
    margin: float = 2.0


@dataclass
class Tournament:
    """Short distillations of the best candidates. After a round the worse half is dropped, and the next is as long as
    all before it."""

    candidates: int = 4
    # Tokens of the first round; rounded up to whole steps of the distillation.
    round_tokens: int = MISSING
    score: TaskScore | None = None


@dataclass
class TargetSizes:
    """The sizes after a round of pruning; null keeps the size before it."""

    num_layers: int | None = None
    hidden_size: int | None = None
    ffn_hidden_size: int | None = None
    num_attention_heads: int | None = None
    num_query_groups: int | None = None
    # Of a mixture: experts of each layer, and the FFN of each.
    num_moe_experts: int | None = None
    moe_ffn_hidden_size: int | None = None
    # Layers to drop, counted from 1; instead of num_layers, which chooses them by `depth`.
    drop_layers: list[int] | None = None


@dataclass
class PruneRound(TargetSizes):
    """A round before the last: what the model in between is pruned to, and for how many steps it is distilled before it
    is pruned in its turn. All else is said by `prune` and `distill`."""

    steps: int = MISSING


@dataclass
class PruneConfig(TargetSizes):
    """Target sizes of the student (Minitron), null keeping the teacher's; or a budget, for which they are searched."""

    # Rounds of pruning and distillation before the one that the sizes are of; the teacher stays the same.
    rounds: list[PruneRound] = field(default_factory=list)
    depth: Depth = Depth.importance
    budget: Budget | None = None
    tournament: Tournament | None = None
    calibration_samples: int = 1024
    calibration_seq_length: int = 4096
    # Sequences of calibration text by which a block of layers, or another set than the least important, is chosen.
    block_samples: int = 32
    # Of sequences whose loss is compared; importance is measured one sequence at a time.
    micro_batch_size: int = placement(1)
    # Uneven where it does not divide the layers: the last stage then has fewer of them, or more.
    pipeline_model_parallel_size: int = placement(1)
    # Above 1 only where the layers to drop are named, and nothing else is pruned.
    tensor_model_parallel_size: int = placement(1)
