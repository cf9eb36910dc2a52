"""Several nodes without Slurm: launchers that share a run folder, on a single machine."""

from __future__ import annotations

import json
import socket
import subprocess
from pathlib import Path

import pytest

from launch import nodes
from launch.filesystem import find_unshared
from launch.planning.automatic import compose
from prune_distill.errors import ConfigError
from tests.helpers.fake_stage import DISTRIBUTED, TABLE
from tests.helpers.launches import run_launcher, wait_for


def settings(rank: int, port: int) -> list[str]:
    return [
        *("cluster.nodes=2", f"cluster.node_rank={rank}", f"cluster.rdzv_endpoint=localhost:{port}"),
        *("cluster.run_dir_is_shared=true", "distill.global_batch_size=8"),
    ]


def wait_to_follow(other: subprocess.Popen[str]) -> None:
    """Wait until it looks for the first node, whose earlier messages it would ignore as those of an earlier run."""
    assert other.stdout is not None
    assert "waiting for the first node" in other.stdout.readline()


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_ranks_of_two_nodes_join(tmp_path: Path, port: int) -> None:
    plan = {"ranks": "join"}
    with (
        run_launcher(tmp_path, plan, *settings(1, port), mode="launch_ranks") as other,
        run_launcher(tmp_path, plan, *settings(0, port), mode="launch_ranks") as first,
    ):
        _, err = first.communicate(timeout=120)
        message, other_err = other.communicate(timeout=60)
    assert (first.returncode, other.returncode) == (0, 0), err + other_err
    assert "ranks: joined" in message
    joined = [json.loads(path.read_text()) for path in tmp_path.glob("*/joined-*.json")]
    assert [rank["world"] for rank in joined] == [2, 2]
    assert {rank["total"] for rank in joined} == {1}
    assert len(list(tmp_path.glob("ranks-*/manifest.json"))) == 1


def test_other_nodes_wait_for_single_rank_stages_and_end_with_the_first_node(tmp_path: Path, port: int) -> None:
    with run_launcher(tmp_path, {}, *settings(1, port), mode="launch_talkative") as other:
        wait_to_follow(other)
        with run_launcher(tmp_path, {"second": "fail"}, *settings(0, port)) as first:
            first.communicate(timeout=60)
        out, err = other.communicate(timeout=60)
    assert (first.returncode, other.returncode) == (1, 1)
    assert "first: complete" in out
    assert err.startswith("the first node: stage second failed (exit code 1)")
    # Each stage was started once.
    assert (tmp_path / "calls.txt").read_text().split() == ["first", "second"]


def test_a_stopped_first_node_stops_the_others(tmp_path: Path, port: int) -> None:
    with run_launcher(tmp_path, {"first": "sleep"}, *settings(1, port), mode="launch_talkative") as other:
        wait_to_follow(other)
        with run_launcher(tmp_path, {"first": "sleep"}, *settings(0, port)) as first:
            wait_for(tmp_path, "first")
            first.terminate()
            first.communicate(timeout=60)
        _, err = other.communicate(timeout=60)
    assert "the first node was stopped" in err


def test_waiting_for_a_silent_first_node_times_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The file of an earlier run does not count.
    (tmp_path / nodes.PULSE).write_text('{"stage": "ranks", "beat": 1.0}')
    monkeypatch.setattr(nodes, "SECONDS_WITHOUT_PULSE", 0.3)
    cfg = compose(["experiment=demo", f"run_dir={tmp_path}", *settings(1, 1234)])
    with pytest.raises(nodes.StageFailedError, match="no response from the first node for 0 s"):
        nodes.run(cfg, None, DISTRIBUTED)


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        (
            "cluster.rdzv_endpoint=node1",
            "cluster.rdzv_endpoint=node1: cluster.nodes=2 needs HOST:PORT",
        ),
        ("cluster.rdzv_endpoint=null", "cluster.rdzv_endpoint=null: cluster.nodes=2 needs HOST:PORT"),
        (
            "cluster.node_rank=2",
            "cluster.node_rank=2: must be below cluster.nodes=2; lower it to at most 1",
        ),
    ],
)
def test_faults(tmp_path: Path, changed: str, part: str) -> None:
    cfg = compose(["experiment=demo", f"run_dir={tmp_path}", *settings(0, 1234), changed])
    with pytest.raises(ConfigError) as caught:
        nodes.run(cfg, None, TABLE)
    (fault,) = map(str, caught.value.faults)
    assert part in fault


def test_a_local_disk_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.filesystem.local_type", lambda path: "xfs")
    cfg = compose(["experiment=demo", f"run_dir={tmp_path}", *settings(0, 1234)])
    cfg.cluster.run_dir_is_shared = False
    assert len(find_unshared(cfg)) == 1
    with pytest.raises(ConfigError, match="xfs appears to be a local disk of this machine"):
        nodes.run(cfg, None, TABLE)
