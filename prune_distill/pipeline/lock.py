"""Locks on folders: one launcher per run folder, one process (or one group of ranks) per stage folder. No torch.

The lock is `flock` on `.lock` in the folder, so the system releases it when the holder ends for any reason. Forked
children keep it, so a new process waits until none of them can write.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from prune_distill.errors import InputError
from prune_distill.pipeline.names import LOCK

log = logging.getLogger("prune_distill.pipeline.lock")

# Maximum time that the children of a killed holder take to end. They keep its lock until then.
SECONDS_TO_END = 60.0
# Errors of file systems without flock: Lustre mounted without -o flock, some FUSE and NFS mounts.
UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
# A lock file has less than 400 bytes: a pid, and a host name of at most 255 characters.
MOST_BYTES = 4096


@contextmanager
def hold_lock(
    folder: Path, what: str = "run_dir", fix: str = "set another run_dir", seconds_for_other_hosts: float = 0.0
) -> Iterator[int]:
    """Hold a folder's lock during the block. Yields its file descriptor.

    If the file system has no flock, this logs a warning and locks nothing.

    Args:
        folder: created if it does not exist.
        what: name of the folder in messages: a config key, or a stage.
        fix: what the user can do instead of waiting.
        seconds_for_other_hosts: how long to wait for a holder on another host, because it is unknown whether it is
            alive.

    Raises:
        InputError: another process holds it; with that process and its host.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+") as file:
        _acquire(file.fileno(), folder, f"{what}={folder}", fix, seconds_for_other_hosts)
        file.truncate(0)
        json.dump({"pid": os.getpid(), "host": socket.gethostname()}, file)
        file.flush()
        yield file.fileno()


def _acquire(handle: int, folder: Path, what: str, fix: str, seconds_for_other_hosts: float) -> None:
    started = time.monotonic()
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            holder = _read_holder(folder)
            if time.monotonic() - started >= _patience(holder, seconds_for_other_hosts):
                raise InputError(f"{what}: in use by {holder}; wait until it has ended, or {fix}") from None
            time.sleep(0.2)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            log.warning("%s: its file system has no locks (%s); make sure that no other process uses it", what, error)
            return


@dataclass(frozen=True)
class _Holder:
    """The holder of a lock, from the lock file; None if that is unreadable."""

    pid: int | None = None
    host: str | None = None

    def __str__(self) -> str:
        if self.pid is None:
            return "an unknown process"
        return f"process {self.pid} on {self.host}"


def _read_holder(folder: Path) -> _Holder:
    """Read the holder from a lock file, which may have any content."""
    try:
        with (folder / LOCK).open("rb") as file:
            content = json.loads(file.read(MOST_BYTES))
        pid, host = content["pid"], content["host"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return _Holder()
    # The largest process id on 64-bit Linux is 2^22 (include/linux/threads.h).
    valid = type(pid) is int and 0 < pid <= 1 << 22 and isinstance(host, str) and host.isprintable()
    return _Holder(pid, host[:255]) if valid else _Holder()


def _patience(holder: _Holder, seconds_for_other_hosts: float) -> float:
    """Return how many seconds to wait for a lock.

    The lock of a dead holder is held by processes that are about to end. If the lock file is empty, its holder has just
    acquired the lock and writes the file next.
    """
    if holder.pid is None:
        return SECONDS_TO_END
    if holder.host != socket.gethostname():
        return seconds_for_other_hosts
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return SECONDS_TO_END
    except PermissionError:  # a running process of another user
        pass
    return 0.0
