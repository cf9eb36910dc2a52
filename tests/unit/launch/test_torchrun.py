"""Ranks are bound to the cores near their GPUs, or a line names the reason why not."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from launch import torchrun
from prune_distill.schema import ClusterConfig, NumaBinding
from tests.helpers.numa import two_nodes


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two NUMA nodes with a GPU each, and a numactl that works."""
    two_nodes(tmp_path, monkeypatch)
    numactl(tmp_path, 'test "$*" = "--physcpubind=2 true"')
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path


def numactl(root: Path, script: str) -> None:
    (root / "bin").mkdir(exist_ok=True)
    (root / "bin/numactl").write_text(f"#!/bin/sh\n{script}\n")
    (root / "bin/numactl").chmod(0o755)


def test_ranks_can_be_bound(machine: Path) -> None:
    assert torchrun.numa_nodes(machine) == {0: {2, 3}, 1: {4, 5}}
    assert torchrun.explain_unneeded(machine) is None
    assert torchrun.explain_impossible(machine) is None


def test_nothing_to_bind(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert torchrun.explain_unneeded(machine / "elsewhere") == "no GPU is visible"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert torchrun.explain_unneeded(machine) == "no GPU is visible"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {2, 3})
    assert torchrun.explain_unneeded(machine) == "all available cores belong to one NUMA node"


def test_cores_that_are_too_far_from_a_gpu(machine: Path) -> None:
    (machine / "sys/bus/pci/devices/0000:dc:00.0/numa_node").write_text("3\n")
    reason = "GPU 0000:dc:00.0 is on NUMA node 3, which has no available cores"
    assert torchrun.explain_impossible(machine) == reason
    # The value of the kernel in a virtual machine.
    (machine / "sys/bus/pci/devices/0000:dc:00.0/numa_node").write_text("-1\n")
    assert torchrun.explain_impossible(machine) is None
    (machine / "sys/bus/pci/devices/0000:dc:00.0/numa_node").unlink()
    assert torchrun.explain_impossible(machine) == "the NUMA node of GPU 0000:dc:00.0 is unknown"


def test_missing_or_blocked_numactl(machine: Path) -> None:
    numactl(machine, "echo 'numactl: This system does not support NUMA policy' >&2; exit 1")
    forbidden = "numactl does not work on this machine (numactl: This system does not support NUMA policy)"
    assert torchrun.explain_impossible(machine) == forbidden
    (machine / "bin/numactl").unlink()
    assert torchrun.explain_impossible(machine) == "numactl not found"


@pytest.mark.parametrize("reason", [None, "numactl not found"])
def test_torchrun_is_started_with_or_without(
    reason: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torchrun, "explain_unneeded", lambda: None)
    monkeypatch.setattr(torchrun, "explain_impossible", lambda: reason)
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda path, words: started.append(words))
    torchrun.main(["--numa-binding=node", "--standalone", "-m", "recipes", "distill"])
    bound = ["--numa-binding=node"] if reason is None else []
    assert started == [
        [sys.executable, "-m", "torch.distributed.run", *bound, "--standalone", "-m", "recipes", "distill"]
    ]
    message = "" if reason is None else f"numa-binding=node is ignored: {reason}\n"
    assert capsys.readouterr().out == message


def test_the_modes_are_those_of_the_installed_torchrun() -> None:
    from torch.distributed.run import parse_args
    from torch.numa.binding import AffinityMode

    assert {mode.value for mode in NumaBinding} == {mode.value for mode in AffinityMode}
    for mode in NumaBinding:
        _, option = torchrun.module(ClusterConfig(numa_binding=mode))
        assert parse_args([option, "stage.py"]).numa_binding == mode.value
