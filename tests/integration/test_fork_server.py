"""The fork server: its children equal real starts, and end with their clients."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prune_distill.pipeline.stages import STAGES
from tests.helpers import tiny
from tests.helpers.fork_server import FREE, LOG, real_starts
from tests.helpers.fork_site.sitecustomize import FORK_SERVER, NEMO, libraries_of
from tests.helpers.launches import wait_for_exit

pytestmark = pytest.mark.skipif(FORK_SERVER not in os.environ, reason="there is none: on a GPU it cannot be")
PROBE = [sys.executable, "-W", "ignore", "-m", "tests.helpers.fork_probe"]


def probe(how: str, **more: Any) -> subprocess.CompletedProcess[str]:
    more = {"env": tiny.environment(), **more}
    return subprocess.run([*PROBE, how], capture_output=True, text=True, timeout=300, **more)


def log() -> str:
    return (Path(os.environ[FORK_SERVER]) / LOG).read_text()


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_stages_find_the_libraries_that_they_need_imported(stage: Any) -> None:
    found = libraries_of(["-u", "-m", "recipes", stage.name, "--config", "resolved.yaml"])
    assert (found == NEMO) == stage.needs_nemo


def test_a_child_equals_a_real_start(tmp_path: Path) -> None:
    def ignore_and_block() -> None:
        os.umask(0o27)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])

    def found() -> dict[str, Any]:
        with (tmp_path / "open").open("w") as kept:
            os.dup2(kept.fileno(), 77)
            asked = {"pass_fds": (77,), "cwd": tmp_path, "start_new_session": True, "stdin": subprocess.DEVNULL}
            done = probe("state", **asked, preexec_fn=ignore_and_block)
            os.close(77)
        assert done.returncode == 0, done.stderr
        state = json.loads(done.stdout)
        assert {name for name, file in state["files"].items() if not file.startswith("pipe:")} == {"0", "77"}
        state["files"] = sorted(state["files"])
        state["environment"] = {key: value for key, value in state["environment"].items() if not FREE.fullmatch(key)}
        return dict(state)

    served = found()
    assert "tests.helpers.fork_probe state" in log()
    with real_starts():
        real = found()
    site = str(Path(tiny.__file__).parent / "fork_site")
    assert served["path"].count(site) == 1
    served["path"].remove(site)
    served["environment"]["PYTHONPATH"] = served["environment"]["PYTHONPATH"].removesuffix(f":{site}")
    assert served == real


def test_exits_equal_those_of_a_real_start() -> None:
    exits, fails, killed = probe("exit"), probe("fail"), probe("signal")
    assert (exits.returncode, exits.stderr) == (1, "it ends\n")
    assert (fails.returncode, fails.stderr.splitlines()[-1]) == (1, "ValueError: it fails")
    assert killed.returncode == -signal.SIGUSR2


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 7), (signal.SIGUSR1, -signal.SIGUSR1)])
def test_signals_are_passed_on(signum: int, status: int) -> None:
    with subprocess.Popen([*PROBE, "wait"], env=tiny.environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        assert child != process.pid
        process.send_signal(signum)
        assert process.wait(60) == status
        assert wait_for_exit(child)


def test_a_child_dies_with_its_client() -> None:
    with subprocess.Popen([*PROBE, "wait"], env=tiny.environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        process.kill()
        assert process.wait(60) == -signal.SIGKILL
        assert wait_for_exit(child)


def test_a_variable_that_acts_on_imports_makes_a_real_start() -> None:
    done = probe("state", env={**tiny.environment(), "HF_HOME": "/nowhere"})
    assert json.loads(done.stdout)["environment"]["HF_HOME"] == "/nowhere"
    assert "not run, for HF_HOME: -W ignore -m tests.helpers.fork_probe state" in log()


def test_the_servers_have_no_threads_that_a_fork_would_lose() -> None:
    """Except for a thread of jemalloc, which handles forks itself."""
    probe("exit")
    ready = [line for line in log().splitlines() if ": ready; threads: " in line]
    assert len(ready) >= 3
    for line in ready:
        names = line.partition("threads: ")[2].partition(";")[0].split(", ")
        assert [name for name in names if not name.startswith("python")] in ([], ["jemalloc_bg_thd"])
