"""Limits of partitions, and errors of sbatch. Tests with a real Slurm are in tests/slurm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch import partition, slurm
from prune_distill.schema import RunConfig

TOLD = """PartitionName=gpu MaxNodes=4 MaxTime=1-00:00:00 Nodes=n[1-8] State=UP TotalNodes=8
PartitionName=long MaxNodes=UNLIMITED MaxTime=UNLIMITED Nodes=n[1-2] State=UP TotalNodes=2
"""


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that replaces Slurm's command by a script."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def script(text: str) -> None:
        (tmp_path / "scontrol").write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "scontrol").chmod(0o755)

    script(f"cat <<'EOF'\n{TOLD}EOF")
    return script


@pytest.fixture
def run(demo: Callable[..., RunConfig]) -> Callable[..., RunConfig]:
    site = "cluster.slurm={partition:gpu,account:null,container_image:null}"

    def make(*overrides: str) -> RunConfig:
        return demo(site, "cluster.time_limit='4:00:00'", *overrides)

    return make


NODES = ("cluster.nodes=5", "distill.global_batch_size=20")


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ((), []),
        (("cluster.time_limit='1-00:00:00'",), []),
        (
            ("cluster.time_limit='24:00:01'",),
            ["cluster.time_limit=24:00:01: partition gpu allows at most 1-00:00:00"],
        ),
        (NODES, ["cluster.nodes=5: partition gpu allows at most 4 per job; set cluster.nodes=4"]),
        (("cluster.slurm.partition=long", "cluster.time_limit='90-00:00:00'"), []),
        (("cluster.slurm.partition='gpu,long'", "cluster.time_limit='90-00:00:00'"), []),
        (("cluster.slurm.partition='gpu,none'",), ["cluster.slurm.partition=none: does not exist; set"]),
        (("cluster.slurm.partition=null", *NODES), []),
    ],
)
def test_faults(overrides: tuple[str, ...], parts: list[str], scontrol: Any, run: Callable[..., RunConfig]) -> None:
    found = partition.faults(run(*overrides))
    assert len(found) == len(parts), found
    assert all(part in fault for part, fault in zip(parts, found, strict=True))


def test_a_controller_that_does_not_answer(scontrol: Callable[[str], None], run: Callable[..., RunConfig]) -> None:
    scontrol("echo 'Unable to contact slurm controller' >&2; exit 1")
    (fault,) = partition.faults(run())
    assert fault.startswith("Slurm does not answer (Unable to contact slurm controller); scontrol ping")


@pytest.mark.parametrize(
    ("message", "key"),
    [
        ("Batch job submission failed: Invalid account or account/partition combination specified", "slurm.account"),
        ("Batch job submission failed: Invalid qos specification", "cluster.slurm.qos"),
        ("invalid partition specified: gpuu", "cluster.slurm.partition"),
        ("Requested time limit is invalid (missing or exceeds some limit)", "cluster.time_limit"),
        ("Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)", "fewer jobs"),
        ("Requested node configuration is not available", "cluster.devices_per_node"),
        ("sbatch: unrecognized option '--nonsense=1'", "cluster.slurm.sbatch"),
        ("Unable to contact slurm controller (connect failure)", "run the same command again"),
        ("Something else", "#SBATCH lines"),
    ],
)
def test_errors_of_sbatch_have_a_fix(message: str, key: str) -> None:
    assert key in slurm._fix(message)
