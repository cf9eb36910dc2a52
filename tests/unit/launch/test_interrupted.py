"""A launcher that is stopped, killed or started twice: its stages end, and the next one resumes."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.status import status
from tests.helpers.fake_stage import TABLE
from tests.helpers.launches import run_launcher, wait_for, wait_for_exit

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and Linux's parent-death signal")


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Children receive SIGINT, even if the tests run in a background shell that ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_stage_and_prints_how_to_resume(
    tmp_path: Path, signum: int, status: int, interruptible: None
) -> None:
    with run_launcher(tmp_path, {"first": "sleep"}) as launcher:
        pid = wait_for(tmp_path, "first")
        launcher.send_signal(signum)
        _, err = launcher.communicate(timeout=30)
    assert launcher.returncode == status
    assert "the same command continues" in err
    assert wait_for_exit(pid)
    assert _first(tmp_path) == ("interrupted", "the same command resumes it", None)


def _first(run_dir: Path) -> tuple[str, str, str | None]:
    found = status(run_dir, TABLE)[0]
    return found.state, found.detail, found.cause


def test_a_stage_that_a_signal_ends_was_interrupted(tmp_path: Path) -> None:
    with run_launcher(tmp_path, {"first": "train"}) as launcher:
        pid = wait_for(tmp_path, "first")
        os.kill(pid, signal.SIGTERM)
        _, err = launcher.communicate(timeout=30)
    assert launcher.returncode == 1
    assert err == "stage first was interrupted (killed by SIGTERM); run the same command to resume it\n"
    state, detail, _ = _first(tmp_path)
    assert (state, detail.rpartition("; ")[2]) == ("interrupted", "the same command resumes it")
    # A failure of the next attempt is one.
    with run_launcher(tmp_path, {"first": "fail"}) as launcher:
        launcher.communicate(timeout=60)
    assert _first(tmp_path)[0] == "failed"
    with run_launcher(tmp_path, {}) as launcher:
        launcher.communicate(timeout=60)
    assert _first(tmp_path)[0] == "complete"
    assert not list(tmp_path.glob("*/state.json"))


def test_nohup_is_respected(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with run_launcher(tmp_path, {"first": "train"}, "--until", "first") as launcher:
            wait_for(tmp_path, "first")
            launcher.send_signal(signal.SIGHUP)
            launcher.communicate(timeout=60)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert launcher.returncode == 0


def test_a_killed_launcher_kills_its_stage_and_the_next_one_resumes(tmp_path: Path) -> None:
    with run_launcher(tmp_path, {"second": "sleep"}) as launcher:
        pid = wait_for(tmp_path, "second")
        launcher.kill()
        launcher.communicate(timeout=30)
    # Immediately, although the dying stage holds the lock until it has ended.
    with run_launcher(tmp_path, {}) as following:
        out, err = following.communicate(timeout=60)
    assert (following.returncode, err) == (0, "")
    assert "first: complete, skipped" in out
    assert wait_for_exit(pid)
    assert (tmp_path / "calls.txt").read_text().split() == ["first", "second", "second", "aside", "report"]


def test_one_launcher_per_run_folder(tmp_path: Path) -> None:
    with run_launcher(tmp_path, {"first": "sleep"}) as launcher:
        wait_for(tmp_path, "first")
        with run_launcher(tmp_path, {}) as second:
            _, err = second.communicate(timeout=60)
    assert second.returncode == 2
    assert f"in use by process {launcher.pid} on " in err
    assert "set another run_dir" in err


def test_a_stage_whose_launcher_was_killed_was_interrupted(tmp_path: Path) -> None:
    with run_launcher(tmp_path, {"first": "sleep"}) as launcher:
        pid = wait_for(tmp_path, "first")
        launcher.kill()
        launcher.communicate(timeout=30)
    assert wait_for_exit(pid)
    assert _first(tmp_path)[0] == "interrupted"
