"""Helpers of a stage exit with it, and rank variables of another job do not reach it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launch.environment import ROOT
from prune_distill.errors import InputError
from prune_distill.pipeline import processes
from prune_distill.pipeline.processes import (
    RANK_VARIABLES,
    remove_foreign_ranks,
    serving_environment,
    shorten_socket_paths,
)
from tests.helpers.launches import wait_for_exit

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's parent-death signal and /proc")

# Prints the pids of its helpers: each prints its own, and waits. `HOW` starts them.
PARENT = """
import multiprocessing, os, sys, threading, time
from prune_distill.pipeline import stage_main

def wait():
    os.write(1, f"{os.getpid()}\\n".encode())  # at once: helpers share the pipe
    time.sleep(100)

def fork_and_wait():
    multiprocessing.get_context("fork").Process(target=wait).start()
    wait()

def start(kind, target):
    multiprocessing.get_context(kind).Process(target=target).start()

if __name__ == "__main__":
    stage_main.exit_with_parent()
    HOW
    time.sleep(100)
"""


@contextmanager
def started(tmp_path: Path, how: str) -> Iterator[subprocess.Popen[str]]:
    script = tmp_path / "parent.py"
    script.write_text(PARENT.replace("HOW", how))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, script], env=environment, stdout=subprocess.PIPE, text=True) as parent:
        try:
            yield parent
        finally:
            parent.kill()


@pytest.mark.parametrize(
    ("how", "helpers"),
    [
        pytest.param('start("fork", wait)', 1, id="forked"),
        pytest.param('start("fork", fork_and_wait)', 2, id="forked by a forked one"),
        pytest.param('start("spawn", wait)', 1, id="spawned"),
        pytest.param('start("spawn", fork_and_wait)', 2, id="forked by a spawned one"),
        pytest.param('threading.Thread(target=start, args=("fork", wait)).start()', 1, id="forked by a thread"),
    ],
)
def test_helpers_end_with_a_killed_parent(tmp_path: Path, how: str, helpers: int) -> None:
    with started(tmp_path, how) as parent:
        assert parent.stdout is not None
        pids = [int(parent.stdout.readline()) for _ in range(helpers)]
        parent.kill()
    assert all(wait_for_exit(pid) for pid in pids)


def test_a_helper_outlives_the_thread_that_started_it(tmp_path: Path) -> None:
    """The kernel sends the signal when the thread ends, long before the parent."""
    how = 'thread = threading.Thread(target=start, args=("fork", wait)); thread.start(); thread.join()'
    with started(tmp_path, f'{how}; os.write(1, b"joined\\n")') as parent:
        assert parent.stdout is not None
        lines = {parent.stdout.readline().strip() for _ in range(2)}
        (pid,) = (int(line) for line in lines - {"joined"})
        assert not wait_for_exit(pid, seconds=1.5)
        parent.kill()
    assert wait_for_exit(pid)


# Like `python -m recipes`, with a stage that prints the pid of a helper that needs none of our modules, and waits.
RUNNER = """
import multiprocessing, runpy, sys, time
from prune_distill.pipeline import stage_main

def run_stage(name, config, load):
    stage_main.exit_with_parent()
    manager = multiprocessing.get_context("spawn").Manager()
    print(manager._process.pid, flush=True)
    time.sleep(100)

stage_main.stage_main = run_stage
sys.argv = ["recipes", "distill", "--config", "resolved.yaml"]
runpy.run_module("recipes", run_name="__main__", alter_sys=True)
"""


def test_a_helper_that_the_runners_stage_spawns_ends_with_it() -> None:
    """By default, multiprocessing does not import a package's `__main__.py` in a helper (multiprocessing/spawn.py)."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", RUNNER]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as runner:
        assert runner.stdout is not None
        try:
            pid = int(runner.stdout.readline())
        finally:
            runner.kill()
    assert wait_for_exit(pid)


def test_variables_of_several_ranks_without_launcher_are_rejected() -> None:
    environment = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "PATH": "/bin"}
    with pytest.raises(InputError, match=r"^WORLD_SIZE=2: .* `unset RANK WORLD_SIZE MASTER_ADDR`"):
        remove_foreign_ranks(environment)
    with pytest.raises(InputError, match="^WORLD_SIZE=two: "):
        remove_foreign_ranks({"WORLD_SIZE": "two"})


@pytest.mark.parametrize(
    "starter", [{"TORCHELASTIC_RUN_ID": "none"}, {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_STEP_ID": "0"}]
)
def test_ranks_of_torchrun_and_srun_keep_their_variables(starter: dict[str, str]) -> None:
    environment = {"RANK": "1", "WORLD_SIZE": "2", **starter}
    remove_foreign_ranks(environment)
    assert environment == {"RANK": "1", "WORLD_SIZE": "2", **starter}


def test_a_job_script_of_another_size_did_not_start_this_rank() -> None:
    """The shell of a Slurm allocation has its variables as well."""
    with pytest.raises(InputError, match="WORLD_SIZE=2"):
        remove_foreign_ranks({"RANK": "1", "WORLD_SIZE": "2", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"})


@pytest.mark.parametrize(
    ("visible", "expected"), [(None, "1"), ("4,5,6,7", "5"), ("GPU-a,GPU-b", "GPU-b"), ("3", "3"), ("", "")]
)
def test_a_rank_serves_with_its_own_gpu(monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: str) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", *RANK_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    alone = serving_environment()
    assert (alone.get("CUDA_VISIBLE_DEVICES"), "PYTHONPATH" in alone) == (visible, False)
    rank = {"TORCHELASTIC_RUN_ID": "x", "RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16"}
    for name, value in rank.items():
        monkeypatch.setenv(name, value)
    found = serving_environment()
    assert found.pop("CUDA_VISIBLE_DEVICES") == expected
    assert not rank.keys() & found.keys()


def test_rank_variables_of_a_single_process_are_removed() -> None:
    environment = {"RANK": "3", "WORLD_SIZE": "1", "MASTER_ADDR": "elsewhere", "PATH": "/bin"}
    remove_foreign_ranks(environment)
    assert environment == {"PATH": "/bin"}


@pytest.mark.parametrize("length", [70, 75, 76, 110])
def test_a_manager_starts_however_long_tmpdir_is(tmp_path: Path, length: int) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as short:  # pytest's own folders are longer
        folder = Path(short, "x" * (length - 1 - len(short)))
        folder.mkdir()
        check_manager(tmp_path, folder)


def check_manager(tmp_path: Path, folder: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing, tempfile\nfrom prune_distill.pipeline import stage_main\n"
        "if __name__ == '__main__':\n"
        "    stage_main.shorten_socket_paths()\n"
        "    queue = multiprocessing.get_context('spawn').Manager().Queue()\n"
        "    queue.put(7)\n    assert queue.get() == 7\n"
        "    print(tempfile.mkdtemp())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder)}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # Other files stay in the user's folder.
    assert Path(done.stdout.strip()).parent == folder


def test_a_long_tmpdir_without_a_short_folder_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes.tempfile, "tempdir", f"/{'x' * 75}")
    monkeypatch.setattr(processes, "SHORT_FOLDERS", ("/none",))
    with pytest.raises(InputError, match=r"^TMPDIR=/x+: .*set TMPDIR to a shorter path"):
        shorten_socket_paths()
