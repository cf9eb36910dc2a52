"""One launcher a run folder."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from conf.errors import ConfigError
from recipes.artifact import LOCK

# How long a killed launcher's processes may take to end; they hold its lock until then.
SECONDS_TO_END = 60.0


@contextmanager
def held(run_dir: Path, seconds: float = SECONDS_TO_END) -> Iterator[int]:
    """Holds a run folder's lock and gives its file descriptor.

    Raises:
        ConfigError: another launcher holds it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / LOCK).open("a+") as file:
        _acquire(file.fileno(), run_dir, time.monotonic() + seconds)
        file.truncate(0)
        json.dump({"pid": os.getpid(), "host": socket.gethostname()}, file)
        file.flush()
        yield file.fileno()


def _acquire(handle: int, run_dir: Path, until: float) -> None:
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            holder = _holder(run_dir)
            if _is_running(holder) or time.monotonic() > until:
                raise ConfigError(
                    f"run_dir={run_dir} is in use by process {holder.get('pid')} on {holder.get('host')}; "
                    "wait until it has ended, or set another run_dir"
                ) from None
            time.sleep(0.2)


def _holder(run_dir: Path) -> dict[str, Any]:
    try:
        holder: dict[str, Any] = json.loads((run_dir / LOCK).read_text())
    except (OSError, json.JSONDecodeError):
        return {}
    return holder


def _is_running(holder: dict[str, Any]) -> bool:
    """Whether the launcher that wrote the lock still runs; a dead one's lock is held by processes about to end."""
    if holder.get("host") != socket.gethostname():
        return bool(holder)
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
