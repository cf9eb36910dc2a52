"""launch.forecast on the folders of runs: what it reads, what it says, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launch.forecast import main
from launch.local import ROOT
from prune_distill.config.load import compose, save_resolved
from prune_distill.pipeline.artifact import locate
from prune_distill.pipeline.names import METRICS, RESOLVED, WINNER
from prune_distill.schema import RunConfig
from prune_distill.schema.schedules import learning_rate

STEPS, TOKENS_PER_STEP = 160, 1024
END = STEPS * TOKENS_PER_STEP


def loss(step: int) -> float:
    """A curve that tends to 3."""
    return 3 + (step + 10.0) ** -0.5


def lines(cfg: RunConfig, steps: int, **replaced: Any) -> list[dict[str, Any]]:
    """The lines of a training so far, a validation every other step."""
    found: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        rate = learning_rate(cfg.distill, step)
        found.append({"step": step, "tokens": step * TOKENS_PER_STEP, "loss": loss(step) - 1, "lr": rate, **replaced})
        found += [{"step": step, "val_loss": loss(step)}] if step % 2 == 0 else []
    return found


@dataclass
class Run:
    """A run's folder whose distillation has these lines of metrics."""

    path: Path
    cfg: RunConfig

    def folder(self, stage: str = "distill") -> Path:
        return locate(self.cfg)[stage].folder

    def write(self, content: list[dict[str, Any]], folder: Path | None = None) -> None:
        target = folder or self.folder()
        target.mkdir(parents=True, exist_ok=True)
        (target / METRICS).write_text("".join(json.dumps(line) + "\n" for line in content))


Make = Callable[..., Run]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def make(steps: int = 60, name: str = "run", *overrides: str) -> Run:
        path = tmp_path / name
        cfg = compose(["experiment=demo", f"run_dir={path}", *overrides])
        save_resolved(cfg, path / RESOLVED)
        run = Run(path, cfg)
        if steps:
            run.write(lines(cfg, steps))
        return run

    return make


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command; returns its status and what it printed."""

    def say(*arguments: str | Path) -> tuple[int, str, str]:
        status = main([*map(str, arguments)])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return say


Say = Callable[..., tuple[int, str, str]]


def ask(say: Say, *arguments: str | Path) -> dict[str, Any]:
    status, out, err = say(*arguments, "--json")
    assert (status, err) == (0, "")
    (found,) = json.loads(out)
    return dict(found)


# Answers.


def test_the_end_of_a_training_that_runs(make: Make, say: Say) -> None:
    run = make()
    found = ask(say, run.path)
    assert (found["points"], found["step"], found["max_steps"], found["end"]) == (30, 60, STEPS, END)
    (end,) = found["losses"]
    assert (end["tokens"], end["steps"], end["stretched"], end["measured"]) == (END, STEPS, False, None)
    assert end["loss"]["low"] < end["loss"]["median"] < end["loss"]["high"]
    # At most where it is now, up to the fit's residual.
    assert end["loss"]["high"] < loss(60) + 1e-3
    status, out, _ = say(run.path)
    assert status == 0
    assert f"after {END:,} tokens (step {STEPS})" in out
    assert f"{end['loss']['median']:.4f}, {end['loss']['low']:.4f} to {end['loss']['high']:.4f} (90 %)" in out


def test_tokens_within_and_beyond_the_training(make: Make, say: Say) -> None:
    rows = ask(say, make().path, "--tokens", "100_000", "163840", "1e6")["losses"]
    assert [row["tokens"] for row in rows] == [100_000, END, 1_000_000]
    assert [row["steps"] for row in rows] == [98, STEPS, 977]
    assert [row["stretched"] for row in rows] == [False, False, True]
    medians = [row["loss"]["median"] for row in rows]
    assert medians == sorted(medians, reverse=True)


def test_hindsight_of_a_run_that_has_ended(make: Make, say: Say) -> None:
    run = make(STEPS)
    for part in (["--first", "0.5"], ["--until-step", "80"]):
        found = ask(say, run.path, *part)
        assert (found["points"], found["step"]) == (40, 80)
        assert found["losses"][0]["measured"] == pytest.approx(loss(STEPS))
    assert "; measured 3." in say(run.path, "--first", "0.5")[1]


def test_a_target_ahead(make: Make, say: Say) -> None:
    run = make()
    found = ask(say, run.path, "--target", "3.09")
    target = found["target"]
    assert target["reached"] is None
    assert 60 * TOKENS_PER_STEP < target["tokens"]["low"] <= target["tokens"]["median"]
    # The loss at the predicted tokens is the target: beyond the end, of a training of that length.
    tokens = round(target["tokens"]["median"])
    (row,) = ask(say, run.path, "--tokens", str(tokens))["losses"]
    assert row["loss"]["median"] == pytest.approx(3.09, abs=2e-3)
    assert "target 3.09: " in say(run.path, "--target", "3.09")[1]


def test_a_target_that_is_reached(make: Make, say: Say) -> None:
    run = make()
    assert ask(say, run.path, "--target", "3.2")["target"]["reached"] == 16 * TOKENS_PER_STEP
    assert "target 3.2: already reached, at 16,384 tokens" in say(run.path, "--target", "3.2")[1]


def test_a_target_below_what_the_curve_tends_to(make: Make, say: Say) -> None:
    run = make()
    target = ask(say, run.path, "--target", "1")["target"]
    assert (target["tokens"]["median"], target["tokens"]["high"]) == (None, None)
    assert target["chance"] < 0.01
    assert target["floor"]["median"] > 1
    out = say(run.path, "--target", "1")[1]
    assert f"target 1: not reached within {10 * END:,} tokens (chance under 1 %)" in out


def test_other_losses(make: Make, say: Say) -> None:
    found = ask(say, make().path, "--metric", "loss")
    assert (found["metric"], found["points"]) == ("loss", 60)
    assert found["losses"][0]["loss"]["median"] < loss(60) - 1


def test_several_runs_and_a_sweep(make: Make, say: Say, tmp_path: Path) -> None:
    first, second = make(60, "a"), make(80, "b")
    for arguments in ([first.path, second.path], [tmp_path]):
        status, out, _ = say(*arguments, "--json")
        assert status == 0
        assert [entry["step"] for entry in json.loads(out)] == [60, 80]


def test_candidates_of_successive_halving(make: Make, say: Say) -> None:
    halving = ["prune.num_layers=null", "prune.ffn_hidden_size=null", "prune.budget.params_fraction=0.7"]
    run = make(0, "run", *halving, "prune.successive_halving={candidates: 2, round_tokens: 20480}")
    folder = run.folder("successive_halving")
    for name in ("one", "two", WINNER):
        run.write(lines(run.cfg, 40), folder / name)
    status, out, _ = say(run.path, "--stage", "successive_halving", "--json")
    assert status == 0
    names = [entry["name"].split()[-1] for entry in json.loads(out)]
    assert names == ["one", "two"]


def test_phases_count_their_own_tokens(make: Make, say: Say) -> None:
    run = make(0, "run", "distill.phases=[{max_steps: 80}, {max_steps: 80, seq_length: 128}]")
    run.write([{"step": step, "val_loss": loss(step)} for step in range(2, 121, 2)])
    found = ask(say, run.path, "--tokens", "120000")
    assert found["tokens"] == 80 * 1024 + 40 * 512
    assert found["end"] == 80 * 1024 + 80 * 512
    assert found["losses"][0]["steps"] == 155


# Files that are damaged or of another time.


def test_damaged_lines_are_skipped(make: Make, say: Say) -> None:
    run = make()
    path = run.folder() / METRICS
    content = path.read_text()
    expected = ask(say, run.path)
    path.write_bytes(b'{"step": "x", "val_loss": 9}\n\xff\x00\n[]\n' + content.encode() + b'{"step": 62, "val_l')
    assert ask(say, run.path) == expected


def test_a_repeated_step_counts_once(make: Make, say: Say) -> None:
    run = make()
    expected = ask(say, run.path)
    run.write([{"step": 40, "val_loss": 9.0}, *lines(run.cfg, 60)])
    assert ask(say, run.path) == expected


def test_the_folder_of_another_hash(make: Make, say: Say) -> None:
    """Other versions of the libraries hash another way; a single folder cannot be confused."""
    run = make(0)
    other = run.path / "distill-01234567"
    run.write(lines(run.cfg, 60), other)
    assert ask(say, run.path)["step"] == 60
    run.write(lines(run.cfg, 60), run.path / "distill-89abcdef")
    status, _, err = say(run.path)
    assert status == 2
    assert "2 folders are of other settings" in err


# Refusals: exit status 2, a message that names the run, and no number.


def refused(say: Say, *arguments: str | Path) -> str:
    status, out, err = say(*arguments)
    assert (status, out) == (2, "")
    assert "Traceback" not in err
    return err


def test_no_run(say: Say, tmp_path: Path) -> None:
    assert f"RUN_DIR={tmp_path}/nothing: does not exist; " in refused(say, tmp_path / "nothing")


def test_no_distillation_yet(make: Make, say: Say) -> None:
    assert f"has no {METRICS} yet" in refused(say, make(0).path)
    run = make(
        0,
        "halving",
        "prune.num_layers=null",
        "prune.ffn_hidden_size=null",
        "prune.budget.params_fraction=0.7",
        "prune.successive_halving={candidates: 2, round_tokens: 20480}",
    )
    assert f"has no {METRICS} yet" in refused(say, run.path, "--stage", "successive_halving")


def test_a_stage_that_trains_nothing(make: Make, say: Say) -> None:
    assert "--stage=prune: " in refused(say, make().path, "--stage", "prune")


def test_a_loss_that_is_not_recorded(make: Make, say: Say) -> None:
    assert "--metric=lm_loss: " in refused(say, make().path, "--metric", "lm_loss")
    run = make(0, "empty")
    run.write([])
    assert "--metric=val_loss: " in refused(say, run.path)


def test_too_short(make: Make, say: Say) -> None:
    run = make(12)
    err = refused(say, run.path)
    assert str(run.path) in err
    assert "--metric=loss" in err
    assert "at least" in refused(say, run.path, "--first", "0.01")


def test_losses_that_are_not_finite(make: Make, say: Say) -> None:
    for bad in (None, float("nan"), float("inf")):
        run = make(0)
        run.write([*lines(run.cfg, 60), {"step": 61, "val_loss": bad}])
        assert "1 that are not finite" in refused(say, run.path)


def test_no_decrease(make: Make, say: Say) -> None:
    run = make(0)
    run.write([{"step": step, "val_loss": 3.5 + 0.01 * (step % 3)} for step in range(1, 61)])
    assert "do not decrease clearly" in refused(say, run.path)


def test_tokens_that_are_past(make: Make, say: Say) -> None:
    assert "--tokens=100: " in refused(say, make().path, "--tokens", "100", "1e6")


def test_a_run_that_has_ended(make: Make, say: Say) -> None:
    run = make(STEPS)
    assert "has ended" in refused(say, run.path)
    assert ask(say, run.path, "--tokens", "1e6")["losses"][0]["stretched"]
    assert ask(say, run.path, "--target", "3.05")["losses"] == []


def test_another_schedule_than_the_configs(make: Make, say: Say) -> None:
    run = make(0)
    run.write(lines(run.cfg, 60, lr=3e-4))
    assert "learning rate" in refused(say, run.path)
    run.write(lines(run.cfg, STEPS + 2))
    assert f"max_steps={STEPS}" in refused(say, run.path)


def test_a_run_that_cannot_be_continued_hides_no_other(make: Make, say: Say) -> None:
    short, long = make(10, "a"), make(60, "b")
    status, out, err = say(short.path, long.path)
    assert status == 2
    assert str(long.path) in out
    assert str(short.path) in err


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--tokens", bad] for bad in ("0", "-5", "1.5", "inf", "nan", "many")),
        *(["--target", bad] for bad in ("0", "-1", "nan", "low")),
        *(["--first", bad] for bad in ("0", "1.1", "nan", "-0.5", "x")),
        *(["--until-step", bad] for bad in ("0", "1.5")),
        ["--first", "0.5", "--until-step", "10"],
    ],
    ids=" ".join,
)
def test_arguments_at_fault(arguments: list[str], make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([str(make().path), *arguments])
    assert caught.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_the_command_imports_neither_torch_nor_scipy() -> None:
    """A login node has neither."""
    code = "import sys, launch.forecast; print(sorted({'torch', 'scipy', 'nemo'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
