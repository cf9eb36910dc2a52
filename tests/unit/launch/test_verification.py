"""Runs with damaged folders, through the command lines of launcher and status, with fake stages."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import status
from launch.run import main
from prune_distill.pipeline.artifact import write_json
from prune_distill.pipeline.names import OUTPUTS
from prune_distill.pipeline.outputs import digests
from tests.helpers import corruption
from tests.helpers.fake_stage import TABLE

Launch = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two complete stages; `second` has a training checkpoint."""
    run_dir = tmp_path_factory.mktemp("finished_run") / "run"
    assert main(["experiment=demo", f"run_dir={run_dir}", "--until", "second"], TABLE) == 0
    (folder,) = run_dir.glob("second-*")
    checkpoint = folder / "checkpoints" / "step=7"
    for name in ("weights", "context"):
        (checkpoint / name).mkdir(parents=True)
    (checkpoint / "weights" / "__0_0.distcp").write_bytes(b"w" * 100)
    write_json(checkpoint / OUTPUTS, digests(checkpoint, ["weights/__0_0.distcp"]))
    return run_dir


@pytest.fixture
def run_dir(finished_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.fixture
def launch(run_dir: Path, capfd: pytest.CaptureFixture[str]) -> Launch:
    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(["experiment=demo", f"run_dir={run_dir}", *arguments], TABLE)
        return (code, *capfd.readouterr())

    return run


def test_an_intact_run_is_verified(launch: Launch, run_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = launch("--verify")
    assert (code, err) == (0, "")
    heading, first, second, aside, report = out.splitlines()
    assert heading == f"{run_dir}:"
    assert first.startswith("first ")
    assert "intact: 2 files, 0.0 MB" in first  # result.txt and pid-0
    assert "intact" in second
    assert aside.endswith("not complete")
    assert report.endswith("not complete")
    assert status.main([str(run_dir), "--verify"], TABLE) == 0
    assert capfd.readouterr().out == out


def test_all_damage_is_listed_with_the_command_that_repairs_it(
    launch: Launch, run_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (first,), (second,) = run_dir.glob("first-*"), run_dir.glob("second-*")
    corruption.flip(first / "result.txt")
    corruption.flip(second / "checkpoints/step=7/weights/__0_0.distcp")
    code, out, err = launch("--verify")
    assert code == 2
    assert f"  {first}/result.txt has other content than was written" in out
    assert f"  {second}/checkpoints/step=7/weights/__0_0.distcp has other content" in out
    assert err.startswith("error: ")
    assert f"rm -r {first} {second}/checkpoints/step=7 && python -m launch.run experiment=demo" in err
    assert status.main([str(run_dir), "--verify"], TABLE) == 2
    assert capfd.readouterr().out == out
    # Sizes are unchanged, and a launch does not read the files.
    assert launch("--until", "second")[0] == 0


def test_a_complete_folder_without_a_file_is_damaged_and_refused(launch: Launch, run_dir: Path) -> None:
    (first,) = run_dir.glob("first-*")
    (first / "result.txt").unlink()
    assert launch("--list")[1].splitlines()[0].split()[:2] == ["first", "damaged"]
    found = status.status(run_dir, TABLE)[0]
    assert (found.state, found.cause) == ("damaged", f"{first} is damaged: result.txt is missing")
    code, out, err = launch("--until", "second")
    assert code == 2
    assert out == ""
    assert err.startswith(f"error: {first} is damaged: result.txt is missing; ")
    assert f"rm -r {first} && python -m launch.run" in err
    assert not (run_dir / "calls.txt").read_text().split()[2:]
    shutil.rmtree(first)
    assert launch("--until", "first")[0] == 0
    assert launch("--list")[1].splitlines()[0].split()[:2] == ["first", "complete"]


def test_a_run_made_before_outputs_were_recorded_is_used_and_named(launch: Launch, run_dir: Path) -> None:
    for folder in (*run_dir.glob("first-*"), *run_dir.glob("second-*")):
        (folder / OUTPUTS).unlink()
        manifest = json.loads((folder / "manifest.json").read_text())
        write_json(folder / "manifest.json", {k: v for k, v in manifest.items() if k not in ("outputs", "crc32")})
    code, out, err = launch("--until", "second")
    assert (code, out.count("complete, skipped")) == (0, 2)
    assert err == "first, second: not checked, because made before outputs were recorded\n"
    code, out, _ = launch("--verify")
    assert code == 0
    assert out.count("not checked: made before outputs were recorded") == 2
