"""The phases of a training: what each of its steps takes. From the config alone, so that a step says all; no torch.

Steps are counted from 0 here: a step's number is how many were done before it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from prune_distill.schema import Phase, Training


@dataclass(frozen=True)
class TrainingPhase:
    """A stretch of a training in which every step takes the same sizes.

    Attributes:
        first_step: the steps before it.
        steps: optimizer steps that it lasts.
        seq_length: tokens of a sequence.
        global_batch_size: sequences of a step; `micro_batch_size`: of a forward pass on one rank.
        lr: the learning rate after `warmup_steps`; `min_lr`: at the end.
        weights: of the data's sources by name; None: the data's own.
    """

    first_step: int
    steps: int
    seq_length: int
    global_batch_size: int
    micro_batch_size: int
    lr: float
    min_lr: float
    warmup_steps: int
    weights: dict[str, float] | None

    @property
    def end(self) -> int:
        return self.first_step + self.steps

    @property
    def tokens_a_step(self) -> int:
        return self.global_batch_size * self.seq_length


def training_phases(training: Training) -> list[TrainingPhase]:
    """The phases in order; a training without any is one phase of `max_steps`."""
    found: list[TrainingPhase] = []
    for phase in training.phases or [Phase(max_steps=training.max_steps)]:
        first_step = found[-1].end if found else 0
        sizes = phase_sizes(training, phase)
        warmup = phase.warmup_steps
        if warmup is None:
            warmup = 0 if found else training.warmup_steps
        steps = phase_steps(phase, sizes["global_batch_size"] * sizes["seq_length"])
        found.append(TrainingPhase(first_step, steps, warmup_steps=warmup, weights=phase.weights, **sizes))
    return found


def phase_sizes(training: Training, phase: Phase) -> dict[str, Any]:
    """What a phase says itself, and else takes from the training."""
    names = ("seq_length", "global_batch_size", "micro_batch_size", "lr", "min_lr")
    own = {name: getattr(phase, name) for name in names}
    return {name: getattr(training, name) if value is None else value for name, value in own.items()}


def phase_steps(phase: Phase, tokens_a_step: int) -> int:
    """Its steps, whole ones where it is stated in tokens."""
    if phase.max_steps is not None:
        return phase.max_steps
    return math.ceil((phase.tokens or 0) / tokens_a_step)


def phase_number(phases: list[TrainingPhase], step: int) -> int:
    """Which phase a step belongs to; the last one's for a step beyond the end."""
    return next((number for number, phase in enumerate(phases) if step < phase.end), len(phases) - 1)


def tokens_before(phases: list[TrainingPhase], step: int) -> int:
    """Tokens that the steps before `step` take, repeated ones included."""
    return sum(_steps_before(phase, step) * phase.tokens_a_step for phase in phases)


def samples_before(phases: list[TrainingPhase], step: int) -> int:
    """Sequences that the steps before `step` take."""
    return sum(_steps_before(phase, step) * phase.global_batch_size for phase in phases)


def _steps_before(phase: TrainingPhase, step: int) -> int:
    return min(max(step - phase.first_step, 0), phase.steps)


def training_tokens(training: Training) -> int:
    """Tokens of a whole training, repeated ones included."""
    return tokens_before(training_phases(training), training.max_steps)


def spare_batches(training: Training) -> dict[int, tuple[int, int]]:
    """Which batches the steps of `skip_steps` take instead of theirs.

    Returns:
        By step, from 0: the number of the dataset, of which each phase has a further one behind all phases' own, and
        the batch's number there. Of a step that is named twice, the later one.
    """
    phases = training_phases(training)
    spares: dict[int, tuple[int, int]] = {}
    taken = [0] * len(phases)
    for step in [step for first, last in training.skip_steps for step in range(first - 1, last)]:
        number = phase_number(phases, step)
        spares[step] = (len(phases) + number, taken[number])
        taken[number] += 1
    return spares
