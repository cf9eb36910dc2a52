"""Claims have one owner at a time, and items of dead owners are taken over."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest

from prune_distill.data.worklist import Worklist, identity

ITEMS = [f"{number:03d}" for number in range(200)]


def draw_all(folder: Path, target: Path, barrier: Any) -> None:
    """Claim all items, and write a line for each. Lives until the other processes have finished."""
    worklist = Worklist(folder, 60)
    barrier.wait(60)
    while (item := worklist.claim(ITEMS)) is not None:
        with target.open("a") as file:
            file.write(f"{item}\n")
    barrier.wait(60)


def claim_and_die(folder: Path) -> None:
    assert Worklist(folder, 60).claim(["a"]) == "a"
    os._exit(9)


def test_several_processes_claim_each_item_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    targets = [tmp_path / f"{number}.txt" for number in range(3)]
    barrier = context.Barrier(len(targets))
    processes = [context.Process(target=draw_all, args=(tmp_path / "claims", target, barrier)) for target in targets]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    drawn = [item for target in targets if target.exists() for item in target.read_text().split()]
    assert sorted(drawn) == ITEMS


def test_claimed_items_are_not_claimed_again(tmp_path: Path) -> None:
    one, two = Worklist(tmp_path, 60), Worklist(tmp_path, 60)
    assert one.claim(["a", "b"]) == "a"
    assert one.claim(["a", "b"]) == "b"
    assert two.claim(["a", "b"]) is None
    one.release("a")
    assert two.claim(["a", "b"]) == "a"
    assert one.claim(["a", "b"]) is None


def test_claims_of_dead_local_processes_are_free_at_once(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=claim_and_die, args=(tmp_path,))
    process.start()
    process.join(60)
    one, two = Worklist(tmp_path, 60), Worklist(tmp_path, 60)
    assert one.claim(["a"]) == "a"
    assert two.claim(["a"]) is None
    assert [path.name for path in tmp_path.iterdir()] == ["a.1"]


def elsewhere(claim: Path) -> None:
    """Change the owner of a claim to a process on another machine."""
    claim.write_text("another-node boot pid:[1] 1 1")


def test_remote_claims_expire_without_heartbeat(tmp_path: Path) -> None:
    one, two = Worklist(tmp_path, 0.3), Worklist(tmp_path, 0.3)
    assert one.claim(["a"]) == "a"
    elsewhere(tmp_path / "a.0")
    until = time.monotonic() + 1
    while time.monotonic() < until:  # a claim with heartbeats outlives the limit
        one.beat()
        assert two.claim(["a"]) is None
        time.sleep(0.05)
    assert two.claim(["a"]) is None
    time.sleep(0.4)
    assert two.claim(["a"]) == "a"
    one.beat()  # it was presumed dead: the claim of the other is not touched
    one.release("a")
    assert two.claim(["a"]) is None
    assert (tmp_path / "a.1").exists()


def test_one_of_several_observers_takes_over(tmp_path: Path) -> None:
    assert Worklist(tmp_path, 0.1).claim(["a"]) == "a"
    elsewhere(tmp_path / "a.0")
    observers = [Worklist(tmp_path, 0.1) for _ in range(5)]
    assert [observer.claim(["a"]) for observer in observers] == [None] * 5
    time.sleep(0.2)
    assert [observer.claim(["a"]) for observer in observers] == ["a", None, None, None, None]


@pytest.mark.parametrize("content", ["", "x", "another-node boot pid:[1] 1 1", None])
def test_a_claim_of_a_possibly_live_process_is_kept(tmp_path: Path, content: str | None) -> None:
    (tmp_path / "a.0").write_text(identity(os.getpid()) if content is None else content)
    assert Worklist(tmp_path, 60).claim(["a"]) is None


def test_a_reused_pid_is_another_process(tmp_path: Path) -> None:
    (tmp_path / "a.0").write_text(identity(os.getpid()).rpartition(" ")[0] + " 1")
    assert Worklist(tmp_path, 60).claim(["a"]) == "a"
