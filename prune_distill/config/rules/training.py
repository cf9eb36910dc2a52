"""Rules for a training's schedule, phases, skipped steps and trackers, applied to each training of a run.

Each takes the training and the key that it stands under, and gives a sentence a fault.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Iterator

from prune_distill.schema import Phase, Schedule, Training
from prune_distill.schema.phases import training_phases


def phase_key(at: str, number: int) -> str:
    return f"{at}.phases[{number}]"


def schedule(training: Training, at: str) -> Iterator[str]:
    decay = training.decay_steps
    if (training.schedule is Schedule.wsd) == (decay is None):
        fix = f"{at}.schedule=wsd" if decay is not None else f"{at}.decay_steps to a tenth of {at}.max_steps"
        yield (
            f"{at}.schedule={training.schedule.value} does not go with {at}.decay_steps="
            f"{'null' if decay is None else decay}, which wsd alone has, and must; set {fix}"
        )
    for number, phase in enumerate(training_phases(training)):
        key = at if training.phases is None else phase_key(at, number)
        steps, falling = phase.steps, decay or 0
        if steps and phase.warmup_steps + falling > steps - (falling == 0):
            falls = f" and {at}.decay_steps={falling}" if falling else ""
            yield (
                f"{key}.warmup_steps={phase.warmup_steps}{falls} leaves nothing of "
                f"{at + '.max_steps' if key == at else key}={steps} steps; set {key}.warmup_steps to less, such as "
                f"{steps // 20}"
            )
        if phase.min_lr > phase.lr:
            yield f"{key}.min_lr={phase.min_lr} is above {key}.lr={phase.lr}; set {key}.min_lr to at most {phase.lr}"


def phases(training: Training, at: str) -> Iterator[str]:
    if training.phases is None:
        return
    if not training.phases:
        yield f"{at}.phases=[] names no phase; set {at}.phases=null"
        return
    unclear = [number for number, phase in enumerate(training.phases) if not _has_length(phase)]
    for number in unclear:
        key = phase_key(at, number)
        yield f"{key} must say how long it is, once; set either {key}.max_steps or {key}.tokens"
    steps = training_phases(training)[-1].end
    if not unclear and steps != training.max_steps:
        yield f"{at}.phases take {steps} steps, but {at}.max_steps={training.max_steps}; set {at}.max_steps={steps}"


def _has_length(phase: Phase) -> bool:
    return (phase.max_steps is None) != (phase.tokens is None)


def phase_weights(training: Training, at: str, sources: Collection[str]) -> Iterator[str]:
    for number, phase in enumerate(training.phases or ()):
        if phase.weights is None:
            continue
        key = f"{phase_key(at, number)}.weights"
        unknown = sorted(set(phase.weights) - set(sources))
        if unknown:
            yield f"{key} names {unknown}, but the data's sources are {sorted(sources)}; set weights of those"
        if any(weight < 0 for weight in phase.weights.values()) or not any(phase.weights.values()):
            yield f"{key}={phase.weights} must hold no negative weight, and one above 0; set it so"


def skip_steps(training: Training, at: str) -> Iterator[str]:
    for span in training.skip_steps:
        if len(span) != 2 or not 1 <= span[0] <= span[1] <= training.max_steps:
            yield (
                f"{at}.skip_steps holds {span}, which is no span [first, last] of steps 1 to {training.max_steps}; "
                f"set {at}.skip_steps=[[FIRST,LAST]]"
            )


def tracker_packages(training: Training, at: str) -> Iterator[str]:
    """Packages that the config asks for and this Python lacks."""
    for name in ("wandb", "mlflow"):
        if getattr(training, name) is not None and importlib.util.find_spec(name) is None:
            yield (
                f"{at}.{name} needs the package {name}, which is not installed; pip install {name}, or set "
                f"{at}.{name}=null"
            )
