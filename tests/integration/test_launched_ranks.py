"""Stages with several ranks under torchrun, when a rank or the launcher dies."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.launches import find_parent, is_running, run_launcher, wait_for, wait_for_exit

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and Linux's parent-death signal")
TWO_RANKS = ("cluster.devices_per_node=2", "model.demo.training.global_batch_size=8", "distill.global_batch_size=8")


def test_two_ranks_complete(tmp_path: Path) -> None:
    with run_launcher(tmp_path, {}, *TWO_RANKS, mode="launch_ranks") as launcher:
        out, err = launcher.communicate(timeout=120)
    assert (launcher.returncode, err) == (0, "")
    assert "[1/1] ranks: done" in out
    assert (tmp_path / "calls.txt").read_text().split() == ["ranks", "ranks"]


def test_without_a_gpu_ranks_start_unbound_with_a_log_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun itself would raise."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with run_launcher(tmp_path, {}, *TWO_RANKS, "cluster.numa_binding=node", mode="launch_ranks") as launcher:
        _, err = launcher.communicate(timeout=120)
    assert (launcher.returncode, err) == (0, "")
    (log,) = tmp_path.glob("ranks-*/log.txt")
    assert "numa-binding=node is ignored: no GPU is visible\n" in log.read_text()


def test_a_killed_rank_stops_the_others_and_is_reported(tmp_path: Path) -> None:
    with run_launcher(tmp_path, {"ranks": "die_on_rank_1"}, *TWO_RANKS, mode="launch_ranks") as launcher:
        other = wait_for(tmp_path, "ranks")
        started = time.monotonic()
        _, err = launcher.communicate(timeout=120)
    assert launcher.returncode == 1
    # The other rank, which would sleep for two minutes, ends within one.
    assert time.monotonic() - started < 60
    assert wait_for_exit(other)
    assert "stage ranks failed (rank 1: killed by SIGKILL (out of memory?))" in err
    assert "torch/distributed" not in err


def test_a_fault_of_the_user_is_read_from_torchruns_log(tmp_path: Path) -> None:
    with run_launcher(tmp_path, {"ranks": "fault"}, *TWO_RANKS, mode="launch_ranks") as launcher:
        _, err = launcher.communicate(timeout=120)
    assert launcher.returncode == 2
    assert "stage ranks failed (rank " in err
    assert "1 fault in the configuration:\n  - distill.lr=9" in err


def test_a_killed_launcher_kills_all_ranks(tmp_path: Path) -> None:
    with run_launcher(tmp_path, {"ranks": "sleep"}, *TWO_RANKS, mode="launch_ranks") as launcher:
        ranks = [wait_for(tmp_path, "ranks", rank) for rank in (0, 1)]
        launcher.kill()
        launcher.communicate(timeout=30)
    assert all(wait_for_exit(rank, seconds=40.0) for rank in ranks)


def test_a_killed_torchrun_leaves_no_rank(tmp_path: Path) -> None:
    """Its ranks have their own sessions; a rank that has just started does not watch its parent yet."""
    with run_launcher(tmp_path, {"ranks": "sleep"}, *TWO_RANKS, mode="launch_ranks") as launcher:
        ranks = [wait_for(tmp_path, "ranks", rank) for rank in (0, 1)]
        os.kill(find_parent(ranks[0]), signal.SIGKILL)
        _, err = launcher.communicate(timeout=60)
        assert not any(is_running(rank) for rank in ranks)
    assert launcher.returncode == 1
    assert "killed by SIGKILL" in err


def test_rank_variables_of_another_job_do_not_reach_a_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "1"}
    for name, value in {**foreign, "PET_NNODES": "2", "TORCHELASTIC_RUN_ID": "another"}.items():
        monkeypatch.setenv(name, value)
    with run_launcher(tmp_path, {"ranks": "join"}, *TWO_RANKS, mode="launch_ranks") as launcher:
        _, err = launcher.communicate(timeout=120)
    assert (launcher.returncode, err) == (0, "")
    (folder,) = tmp_path.glob("ranks-*")
    joined = json.loads((folder / "joined-0.json").read_text())
    assert (joined["world"], joined["total"]) == (2, 1)
