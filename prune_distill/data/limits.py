"""Resource limits for chat templates, which are programs that come with a model."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

GIB = 2**30


class LimitError(BaseException):
    """A limit was reached. Not an `Exception`, so that no code in between handles it."""


class Limits:
    """Interrupts a block of code that uses too much CPU time or memory: `with limits.applied():`

    The sandbox of transformers blocks files and attributes, but not endless loops and huge strings. The timer counts
    CPU time, so a busy machine has no effect. Its signal interrupts Python between two instructions; a single long
    instruction needs much memory, which the kernel refuses.

    Both limits apply to the process. Use them in its main thread, one block at a time.

    Args:
        cpu_seconds: CPU time per block.
        more_bytes: address space per block, in addition to what the process uses.
    """

    def __init__(self, cpu_seconds: float, more_bytes: int) -> None:
        self._seconds, self._bytes = cpu_seconds, more_bytes
        self._page = os.sysconf("SC_PAGE_SIZE")
        self._statm = open("/proc/self/statm", "rb", buffering=0)  # noqa: SIM115 - opening it for every block is slow
        signal.signal(signal.SIGPROF, self._stop)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Apply the limits to a block. Raises: LimitError, which names the limit."""
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
