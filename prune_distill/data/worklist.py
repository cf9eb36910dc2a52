"""Who does what, on a file system that several nodes share: claims are files, and nobody coordinates.

Item I is claimed by creating `I.0`, which only one can (O_EXCL). Whoever holds a claim touches it now and then. Where
one is not touched any more, its holder is dead, and the item is claimed again by creating `I.1`, which again only one
can. No clock is compared with another: a claim is dead once an observer has seen it unchanged for long enough by its
own clock, or, on the holder's own machine, as soon as the process is gone.
"""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# A claim is touched so often in the time after which its holder is taken for dead.
BEATS = 10
_CLAIM = re.compile(r"(.+)\.(\d+)")


class Worklist:
    """Claims in one folder, by one process.

    Attributes:
        stale_seconds: without a touch for so long, a claim's holder is taken for dead. Longer than a shared disk takes
            to show what another node wrote (NFS: up to a minute).
    """

    def __init__(self, folder: Path, stale_seconds: float) -> None:
        self.folder = folder
        self.stale_seconds = stale_seconds
        self.held: dict[str, Path] = {}
        self._seen: dict[Path, tuple[int, float]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def claim(self, items: Iterable[str]) -> str | None:
        """Claims the first of the items that is free; None where all are claimed by others that live."""
        newest = self._newest()
        for item in items:
            if item in self.held:
                continue
            generation = newest.get(item, -1)
            if generation >= 0 and not self._is_dead(self.folder / f"{item}.{generation}"):
                continue
            if self._create(item, generation + 1):
                return item
        return None

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Shows meanwhile that this process lives, and gives up in the end what it holds."""
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(self.stale_seconds / BEATS):
                self.beat()

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            for item in list(self.held):
                self.release(item)

    def beat(self) -> None:
        """Touches the claims that this process holds."""
        for path in list(self.held.values()):
            with suppress(FileNotFoundError):  # given up just now, or taken over
                os.utime(path)

    def release(self, item: str) -> None:
        """Gives up a claim: the item is done, or free for others."""
        self.held.pop(item).unlink(missing_ok=True)

    def _create(self, item: str, generation: int) -> bool:
        path = self.folder / f"{item}.{generation}"
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(handle, "w") as file:
            file.write(identity(os.getpid()))
        for older in range(generation):
            (self.folder / f"{item}.{older}").unlink(missing_ok=True)
        self.held[item] = path
        return True

    def _newest(self) -> dict[str, int]:
        newest: dict[str, int] = {}
        for name in os.listdir(self.folder):
            match = _CLAIM.fullmatch(name)
            if match:
                newest[match[1]] = max(newest.get(match[1], -1), int(match[2]))
        return newest

    def _is_dead(self, path: Path) -> bool:
        try:
            touched, holder = path.stat().st_mtime_ns, path.read_text()
        except FileNotFoundError:
            return False  # given up just now
        if _gone(holder):
            return True
        before, since = self._seen.get(path, (0, 0.0))
        if touched != before:
            self._seen[path] = (touched, time.monotonic())
            return False
        return time.monotonic() - since > self.stale_seconds


def identity(pid: int) -> str:
    """Names a process so that another one on the same machine can tell whether it lives."""
    return f"{_machine()} {pid} {_started(pid)}"


def _gone(holder: str) -> bool:
    """Whether the process of an `identity` is known to have ended: only on its own machine."""
    machine, _, rest = holder.rpartition(" ")[0].rpartition(" ")
    if machine != _machine() or not rest.isdecimal():
        return False
    return _started(int(rest)) != holder.rpartition(" ")[2]


def _machine() -> str:
    """This machine since its start, as seen from this container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        return f"{socket.gethostname()} ? ?{os.getpid()}"  # cannot be recognised: only time tells
    return f"{socket.gethostname()} {boot} {namespace}"


def _started(pid: int) -> str:
    """When a process started, in clock ticks since the machine did; "gone" where there is none any more."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "gone"
    fields = stat.rpartition(")")[2].split()
    return "gone" if fields[0] in "ZX" else fields[19]
