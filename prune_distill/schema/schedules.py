"""The learning rate of every step: warm-up, schedule and phases. No torch."""

from __future__ import annotations

import math

from prune_distill.schema import Schedule, Training
from prune_distill.schema.phases import TrainingPhase, phase_number, training_phases


def learning_rate(cfg: Training, step: int) -> float:
    """Return the learning rate of a step, counted from 0.

    Linear warm-up and cosine decay are those of NeMo's CosineAnnealing (nemo/core/optim/lr_scheduler.py:361, 387),
    which has no phases. `wsd` is "warm-up, stable, decay" (MiniCPM, arXiv 2404.06395) with linear decay.
    """
    phases = training_phases(cfg)
    phase = phases[phase_number(phases, step)]
    step -= phase.first_step
    if step < phase.warmup_steps:
        return phase.lr * (step + 1) / (phase.warmup_steps + 1)
    return phase.min_lr + (phase.lr - phase.min_lr) * _remaining(cfg, phase, step)


def _remaining(cfg: Training, phase: TrainingPhase, step: int) -> float:
    """Return the remaining fraction of the decay from `lr` to `min_lr`: 1 at its start, 0 at the end of the phase."""
    decay_steps = phase.steps - phase.warmup_steps if cfg.decay_steps is None else cfg.decay_steps
    done = max(0.0, 1 - (phase.steps - step) / decay_steps)
    return (1 + math.cos(math.pi * done)) / 2 if cfg.schedule is Schedule.cosine else 1 - done
