"""The phases of a training: steps, tokens, sizes, and faults."""

from __future__ import annotations

from typing import Any

import pytest

from launch.planning.automatic import compose
from launch.planning.memory import Models, training_memory
from prune_distill.errors import ConfigError
from prune_distill.model.flops import training_flops
from prune_distill.model.student import student_shape
from prune_distill.schema import Loss, Phase, Training
from prune_distill.schema.phases import (
    phase_number,
    samples_before,
    spare_batches,
    tokens_before,
    training_phases,
    training_tokens,
)

DEMO = ("experiment=demo", "run_dir=runs/x")


def training(**values: Any) -> Training:
    sizes: dict[str, Any] = {"max_steps": 10, "seq_length": 8, "global_batch_size": 4, "lr": 1.0, "min_lr": 0.1}
    return Training(**{**sizes, **values})


def test_a_training_without_phases_is_one() -> None:
    (phase,) = training_phases(training(warmup_steps=2))
    assert (phase.first_step, phase.steps, phase.end, phase.tokens_a_step) == (0, 10, 10, 32)
    assert phase.warmup_steps == 2
    assert training_tokens(training()) == 320


def test_tokens_across_a_change_of_phase() -> None:
    run = training(max_steps=5, warmup_steps=1, phases=[Phase(max_steps=3, lr=0.5), Phase(tokens=100, seq_length=16)])
    phases = training_phases(run)
    # 100 tokens are one step of 64 and a part of another, rounded up to two.
    assert [(phase.first_step, phase.steps, phase.tokens_a_step) for phase in phases] == [(0, 3, 32), (3, 2, 64)]
    assert [(phase.lr, phase.min_lr, phase.warmup_steps) for phase in phases] == [(0.5, 0.1, 1), (1.0, 0.1, 0)]
    assert [tokens_before(phases, step) for step in range(7)] == [0, 32, 64, 96, 160, 224, 224]
    assert [samples_before(phases, step) for step in (3, 5)] == [12, 20]
    assert [phase_number(phases, step) for step in range(6)] == [0, 0, 0, 1, 1, 1]
    assert training_tokens(run) == 96 + 128


def test_skipped_steps_use_spare_batches() -> None:
    run = training(max_steps=6, phases=[Phase(max_steps=4), Phase(max_steps=2)], skip_steps=[[2, 3], [5, 5]])
    assert spare_batches(run) == {1: (2, 0), 2: (2, 1), 4: (3, 0)}
    # A span that is added later does not affect others; a repeated step takes another batch.
    run.skip_steps += [[3, 3]]
    assert spare_batches(run) == {1: (2, 0), 2: (2, 2), 4: (3, 0)}
    assert spare_batches(training()) == {}


def test_the_plan_uses_the_tokens_of_all_phases_and_the_largest_memory() -> None:
    lengths = "distill.phases=[{max_steps:10,seq_length:128},{max_steps:10,seq_length:512}]"
    cfg = compose([*DEMO, "distill.max_steps=20", "distill.warmup_steps=5", lengths])
    alone = [
        compose([*DEMO, "distill.max_steps=10", "distill.warmup_steps=5", f"distill.seq_length={length}"])
        for length in (128, 512)
    ]
    assert training_tokens(cfg.distill) == sum(training_tokens(one.distill) for one in alone)

    def flops(one: Any) -> int:
        models = (one.model.family, student_shape(one), one.model.shape)
        return training_flops(one.distill, Loss.kd, *models).total * training_tokens(one.distill)

    assert flops(cfg) == pytest.approx(sum(map(flops, alone)), rel=1e-3)  # the mean length is a whole number
    models = Models(cfg.model.family, student_shape(cfg), cfg.model.shape)
    memory = [training_memory(one.distill, Loss.kd, models, 1) for one in (cfg, *alone)]
    assert memory[0] == memory[2] != memory[1]


@pytest.mark.parametrize(
    ("phases", "parts"),
    [
        ("[]", ["distill.phases=[]: contains no phase"]),
        ("[{max_steps:100}]", ["distill.max_steps=160: ", "; set distill.max_steps=100"]),
        ("[{seq_length:8}]", ["distill.phases[0]: its length", "max_steps or distill.phases[0].tokens"]),
        ("[{max_steps:160,tokens:5}]", ["distill.phases[0]: its length must be given once"]),
        ("[{max_steps:0},{max_steps:160}]", ["distill.phases[0].max_steps=0: must be above 0"]),
        ("[{max_steps:160,lrr:1}]", ["distill.phases[0].lrr: not a known key", "did you mean"]),
        ("[{max_steps:160,seq_length:4096}]", ["distill.phases[0].seq_length=4096: longer", "2048"]),
        (
            "[{max_steps:80},{max_steps:80,global_batch_size:6}]",
            ["distill.phases[1].global_batch_size=6: not divisible by 4", "set distill.phases[1].global_batch_size"],
        ),
        ("[{max_steps:160,min_lr:1.0}]", ["distill.phases[0].min_lr=1.0: above distill.phases[0].lr=0.001"]),
        (
            "[{max_steps:155},{max_steps:5,warmup_steps:5}]",
            ["distill.phases[1].warmup_steps=5: too long for its 5 steps"],
        ),
        ("[{max_steps:160,weights:{web:1}}]", ["distill.phases[0].weights: ['web']", "['train']"]),
        ("[{max_steps:160,weights:{train:0}}]", ["distill.phases[0].weights: {'train': 0.0}", "one above 0"]),
    ],
)
def test_faults_of_phases(phases: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        compose([*DEMO, f"distill.phases={phases}"])
    for part in parts:
        assert part in str(raised.value)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("distill.schedule=wsd", ["distill.schedule=wsd: needs distill.decay_steps"]),
        ("distill.decay_steps=5", ["distill.schedule=cosine: does not use distill.decay_steps=5"]),
        ("distill.schedule=square", ["distill.schedule=square", "cosine or linear or wsd"]),
        ("distill.skip_steps=[[0,3]]", ["distill.skip_steps=[[0,3]]: [0, 3] is not a span", "1 to 160"]),
        ("distill.skip_steps=[[5]]", ["distill.skip_steps=[[5]]: "]),
        ("distill.skip_steps=[[7,161]]", ["distill.skip_steps=[[7,161]]: "]),
        ("distill.max_loss_ratio=1.0", ["distill.max_loss_ratio=1.0: would stop at a usual loss"]),
        ("distill.wandb={}", ["distill.wandb.project: not set"]),
    ],
)
def test_faults_of_a_training(override: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        compose([*DEMO, override])
    for part in parts:
        assert part in str(raised.value)


def test_warmup_and_decay_must_fit() -> None:
    with pytest.raises(
        ConfigError, match="distill.warmup_steps=10: too long for distill.max_steps=160 with distill.decay_steps=151"
    ):
        compose([*DEMO, "distill.schedule=wsd", "distill.decay_steps=151"])  # and 10 of warm-up
    assert compose([*DEMO, "distill.schedule=wsd", "distill.decay_steps=150"]).distill.decay_steps == 150
    with pytest.raises(ConfigError, match="distill.decay_steps=161: too long for .*, such as 16$"):
        compose([*DEMO, "distill.schedule=wsd", "distill.decay_steps=161"])


def test_the_offered_warmup_fits() -> None:
    with pytest.raises(ConfigError, match="set distill.warmup_steps to less, such as 0$"):
        compose([*DEMO, "distill.max_steps=8"])
    assert compose([*DEMO, "distill.max_steps=8", "distill.warmup_steps=0"]).distill.warmup_steps == 0


def test_a_tracker_whose_package_is_absent_is_rejected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from prune_distill.config.rules import training as training_rules

    monkeypatch.setattr(training_rules.importlib.util, "find_spec", lambda name: None)
    asked = "distill.mlflow={tracking_uri:'http://localhost:5000',experiment:x}"
    with pytest.raises(ConfigError, match="distill.mlflow: the package mlflow is not installed"):
        compose([*DEMO, asked], check_files=True)
    assert compose([*DEMO, asked]).distill.mlflow is not None
