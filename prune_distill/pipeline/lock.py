"""Locks on folders: one launcher per run folder, one process (or one group of ranks) per stage folder. No torch.

The lock is `flock` on `.lock` in the folder, so the system releases it however its holder ends. Forked children keep
it: whoever starts again waits until none of them can write any more.
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

# How long the processes that a killed holder left may take to end; they keep its lock until then.
SECONDS_TO_END = 60.0
# What file systems without flock answer: Lustre mounted without -o flock, some FUSE and NFS mounts.
UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
# A lock file has under 400 bytes: a pid, and a host name of at most 255 characters.
MOST_BYTES = 4096


@contextmanager
def held(
    folder: Path, what: str = "run_dir", fix: str = "set another run_dir", seconds_for_other_hosts: float = 0.0
) -> Iterator[int]:
    """Holds a folder's lock; gives its file descriptor.

    Where the file system has no flock, a warning says so and nothing is locked.

    Args:
        folder: created if it does not exist.
        what: the name of the folder in messages: a config key, or a stage.
        fix: what else the user can do besides waiting.
        seconds_for_other_hosts: how long to wait for a holder on another host, of which nobody here can tell whether it
            still runs.

    Raises:
        InputError: another process holds it; names that process and its host.
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
            log.warning("%s: its file system has no locks (%s); make sure that nothing else uses it", what, error)
            return


@dataclass(frozen=True)
class _Holder:
    """What a lock file says of its holder; None where it says nothing that can be read."""

    pid: int | None = None
    host: str | None = None

    def __str__(self) -> str:
        if self.pid is None:
            return "a process that its lock file does not name"
        return f"process {self.pid} on {self.host}"


def _read_holder(folder: Path) -> _Holder:
    """Anyone may have written to the file, so any content is possible."""
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
    """The seconds for which a lock is worth waiting for.

    A dead holder's is held by processes that are about to end. One whose file says nothing was just taken: its holder
    writes it right after.
    """
    if holder.pid is None:
        return SECONDS_TO_END
    if holder.host != socket.gethostname():
        return seconds_for_other_hosts
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return SECONDS_TO_END
    except PermissionError:  # it runs, and is another user's
        pass
    return 0.0
