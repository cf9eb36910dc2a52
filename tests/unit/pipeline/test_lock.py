"""Locks on folders: holders, waiting, and unexpected content of the lock file."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prune_distill.errors import InputError
from prune_distill.pipeline import lock

HERE = socket.gethostname()


def write(folder: Path, content: bytes) -> None:
    (folder / ".lock").write_bytes(content)


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught, lock.hold_lock(folder):
        raise AssertionError
    return str(caught.value)


def test_a_lock_names_its_holder(tmp_path: Path) -> None:
    with lock.hold_lock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text()) == {"pid": os.getpid(), "host": HERE}
        message = refusal(tmp_path)
        assert f"run_dir={tmp_path}: in use by process {os.getpid()} on {HERE}" in message
        assert "set another run_dir" in message
    with lock.hold_lock(tmp_path):
        pass


def test_a_lock_on_another_machine_is_not_waited_for(tmp_path: Path) -> None:
    with lock.hold_lock(tmp_path):
        write(tmp_path, b'{"pid": 1, "host": "elsewhere"}')
        started = time.monotonic()
        assert "in use by process 1 on elsewhere" in refusal(tmp_path)
        assert time.monotonic() - started < 0.5


def test_a_lost_nodes_lock_may_be_waited_for(tmp_path: Path) -> None:
    with lock.hold_lock(tmp_path):
        write(tmp_path, b'{"pid": 1, "host": "elsewhere"}')
        started = time.monotonic()
        with pytest.raises(InputError), lock.hold_lock(tmp_path, seconds_for_other_hosts=0.5):
            raise AssertionError
        assert time.monotonic() - started >= 0.5


def test_a_dead_holders_lock_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "SECONDS_TO_END", 0.5)
    dead = subprocess.Popen(["true"])
    dead.wait()
    with lock.hold_lock(tmp_path):
        write(tmp_path, json.dumps({"pid": dead.pid, "host": HERE}).encode())
        started = time.monotonic()
        assert "in use" in refusal(tmp_path)
        assert time.monotonic() - started >= 0.5


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[1, 2]",
        b"7",
        b"null",
        b"\xff\xfe\x00binary",
        b"[" * 100_000,
        b'{"pid": 1' + b" " * 100_000 + b', "host": "a"}',
        b'{"pid": "1", "host": "a"}',
        b'{"pid": true, "host": "a"}',
        b'{"pid": -1, "host": "a"}',
        b'{"pid": 1e99, "host": "a"}',
        b'{"pid": 99999999999999999999, "host": "a"}',
        b'{"pid": 1, "host": ["a"]}',
        b'{"pid": 1, "host": "a\\nb"}',
        b'{"pid": 1}',
    ],
)
def test_odd_content_names_no_holder(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "SECONDS_TO_END", 0.0)
    with lock.hold_lock(tmp_path):
        write(tmp_path, content)
        message = refusal(tmp_path)
    assert "an unknown process" in message
    assert "\n" not in message
    assert len(message) < 400
    with lock.hold_lock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text()) == {"pid": os.getpid(), "host": HERE}


def test_a_killed_holders_lock_is_free(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from prune_distill.pipeline import lock\n"
        "with lock.hold_lock(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        assert f"process {holder.pid} on {HERE}" in refusal(tmp_path)
        holder.kill()
    with lock.hold_lock(tmp_path):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_used_with_a_warning(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with lock.hold_lock(tmp_path), lock.hold_lock(tmp_path):
        assert (tmp_path / ".lock").exists()
    assert "has no locks" in caplog.text


def test_other_errors_of_a_file_system_are_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "broken disk")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OSError, match="broken disk"), lock.hold_lock(tmp_path):
        raise AssertionError
