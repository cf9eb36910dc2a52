"""Limits on what a chat template may use: it is a program that comes with a model."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

GIB = 2**30


class LimitError(BaseException):
    """A limit was reached. Not an `Exception`, so that nothing in between handles it."""


class Limits:
    """Ends a block of code that uses too much processor time or memory: `with limits.applied():`

    transformers' sandbox keeps a template from files and attributes, but not from endless loops and huge strings. The
    timer counts processor time, so that a busy machine changes nothing. Its signal interrupts Python between two
    instructions; an instruction that alone takes long needs much memory, which the kernel refuses.

    Both are the process's: made and used in its main thread, once at a time.

    Args:
        cpu_seconds: what a block may take.
        more_bytes: address space that a block may take in addition to what the process has.
    """

    def __init__(self, cpu_seconds: float, more_bytes: int) -> None:
        self._seconds, self._bytes = cpu_seconds, more_bytes
        self._page = os.sysconf("SC_PAGE_SIZE")
        self._statm = open("/proc/self/statm", "rb", buffering=0)  # noqa: SIM115 - opening it for every block is slow
        signal.signal(signal.SIGPROF, self._stop)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Raises: LimitError, saying which limit."""
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        used = int(os.pread(self._statm.fileno(), 64, 0).split()[0]) * self._page
        limits = [limit for limit in (soft, used + self._bytes) if limit != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
        signal.setitimer(signal.ITIMER_PROF, self._seconds)
        try:
            yield
        except MemoryError as error:
            raise LimitError(f"takes more than {self._bytes / GIB:g} GiB of memory") from error
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))

    def _stop(self, number: int, frame: FrameType | None) -> None:
        raise LimitError(f"takes more than {self._seconds:g} s")
