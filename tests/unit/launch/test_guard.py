"""SIGTERM from Slurm only creates a file for a stage that runs under the guard."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.environment import ROOT

# Sets a handler like torchrun, starts a child with the default one like the data loader, and prints that it is ready.
COMMAND = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(9))
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1.5)"])
print(child.pid, flush=True)
assert child.wait() == 0
sys.exit(5)
"""


def guarded(stop: Path, *command: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "launch.guard", str(stop), *command]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_all_processes_creates_a_stop_file(tmp_path: Path, signum: int) -> None:
    with guarded(tmp_path / "stop", sys.executable, "-c", COMMAND) as guard:
        assert guard.stdout is not None
        child = int(guard.stdout.readline())
        command = int(Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[1])
        for pid in (child, command, guard.pid):
            subprocess.run(["kill", f"-{int(signum)}", str(pid)], check=True)
        time.sleep(0.3)
        assert (tmp_path / "stop").exists()
        guard.communicate(timeout=30)
    assert guard.returncode == 5


def test_exit_codes_are_passed_on_without_a_stop_file(tmp_path: Path) -> None:
    killed = "killed by SIGKILL (out of memory?)\n"
    for command, code, message in (("exit 0", 0, ""), ("exit 3", 3, "exit code 3\n"), ("kill -KILL $$", 137, killed)):
        guard = guarded(tmp_path / "stop", "bash", "-c", command)
        assert guard.communicate(timeout=30)[1] == message
        assert guard.returncode == code
    assert not (tmp_path / "stop").exists()


def test_a_failing_process_with_waiting_children_ends(tmp_path: Path) -> None:
    """Python would wait forever for daemonic children that cannot be terminated."""
    script = (
        "import multiprocessing, time\n"
        "from prune_distill.pipeline.stage_main import keep_signals_blocked\n"
        "keep_signals_blocked()\n"
        "multiprocessing.get_context('fork').Process(target=time.sleep, args=(100,), daemon=True).start()\n"
        "raise ValueError('x')\n"
    )
    with guarded(tmp_path / "stop", sys.executable, "-c", script) as guard:
        assert guard.wait(timeout=30) == 1


def test_signals_stay_blocked(tmp_path: Path) -> None:
    script = (
        "import multiprocessing, os, signal\n"
        "from prune_distill.pipeline.stage_main import keep_signals_blocked\n"
        "keep_signals_blocked()\n"
        "multiprocessing.get_context('spawn').Manager().shutdown()\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "raise SystemExit(7)\n"
    )
    with guarded(tmp_path / "stop", sys.executable, "-c", script) as guard:
        guard.communicate(timeout=60)
    assert guard.returncode == 7
