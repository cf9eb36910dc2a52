"""The learning rate of every step, through the warm-up, the schedule and the phases of a training. No torch."""

from __future__ import annotations

import math

from prune_distill.schema import Schedule, Training
from prune_distill.schema.phases import TrainingPhase, phase_number, training_phases


def learning_rate(cfg: Training, step: int) -> float:
    """The learning rate of a step, steps counted from 0.

    The warm-up rises in a line, and the cosine falls, as in NeMo's CosineAnnealing (nemo/core/optim/lr_scheduler.py:
    361, 387), which knows no phases; `wsd` is "warm-up, stable, decay" (MiniCPM, arXiv 2404.06395), falling in a line.
    """
    phases = training_phases(cfg)
    phase = phases[phase_number(phases, step)]
    step -= phase.first_step
    if step < phase.warmup_steps:
        return phase.lr * (step + 1) / (phase.warmup_steps + 1)
    return phase.min_lr + (phase.lr - phase.min_lr) * _share(cfg, phase, step)


def _share(cfg: Training, phase: TrainingPhase, step: int) -> float:
    """How much is left of the way from `lr` down to `min_lr`: 1 before it begins, 0 at the phase's end."""
    falling = phase.steps - phase.warmup_steps if cfg.decay_steps is None else cfg.decay_steps
    done = max(0.0, 1 - (phase.steps - step) / falling)
    return (1 + math.cos(math.pi * done)) / 2 if cfg.schedule is Schedule.cosine else 1 - done
