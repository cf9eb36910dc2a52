"""A work list on a shared file system, without a coordinator: claims are files.

A process claims item I by creating `I.0`, which succeeds only once (O_EXCL). The owner of a claim touches it regularly.
If a claim is no longer touched, its owner is dead, and another process claims the item by creating `I.1`. Clocks of
different machines are never compared: a claim is dead when an observer has seen it unchanged for long enough by its own
clock or, on the owner's machine, as soon as the process has ended.
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

# Number of touches within `stale_seconds`.
TOUCHES = 10
_CLAIM = re.compile(r"(.+)\.(\d+)")


class Worklist:
    """The claims of one process in a folder.

    Attributes:
        stale_seconds: time without a touch after which the owner of a claim is presumed dead. It must exceed the delay
            of a shared disk (NFS: up to a minute).
    """

    def __init__(self, folder: Path, stale_seconds: float) -> None:
        self.folder = folder
        self.stale_seconds = stale_seconds
        self.held: dict[str, Path] = {}
        self._seen: dict[Path, tuple[int, float]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def claim(self, items: Iterable[str]) -> str | None:
        """Claim the first free item; return None if live processes have claimed all items."""
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
    def heartbeat(self) -> Iterator[None]:
        """Touch the claims during the block, and release them at its end."""
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(self.stale_seconds / TOUCHES):
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
        """Touch the claims of this process."""
        for path in list(self.held.values()):
            with suppress(FileNotFoundError):  # released just now, or taken over
                os.utime(path)

    def release(self, item: str) -> None:
        """Release a claim: the item is done, or free for others."""
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
            return False  # released just now
        if _has_ended(holder):
            return True
        before, since = self._seen.get(path, (0, 0.0))
        if touched != before:
            self._seen[path] = (touched, time.monotonic())
            return False
        return time.monotonic() - since > self.stale_seconds


def identity(pid: int) -> str:
    """Return an identity by which another process on the same machine can tell whether a process is alive."""
    return f"{_machine()} {pid} {_start_time(pid)}"


def _has_ended(holder: str) -> bool:
    """Return whether the process of an `identity` has ended. Known only on its own machine."""
    machine, _, rest = holder.rpartition(" ")[0].rpartition(" ")
    if machine != _machine() or not rest.isdecimal():
        return False
    return _start_time(int(rest)) != holder.rpartition(" ")[2]


def _machine() -> str:
    """Return an identity of this machine since its boot, as seen from this container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        return f"{socket.gethostname()} ? ?{os.getpid()}"  # unknown: only the timeout decides
    return f"{socket.gethostname()} {boot} {namespace}"


def _start_time(pid: int) -> str:
    """Return the start time of a process in clock ticks since boot; "gone" if it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "gone"
    fields = stat.rpartition(")")[2].split()
    return "gone" if fields[0] in "ZX" else fields[19]
