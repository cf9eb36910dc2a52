"""Errors that the user can fix. Each message states the value, what is wrong, and the fix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from prune_distill.credentials import redact


class ConfigError(ValueError):
    """One or more faults in what the user asked for, reported together.

    Attributes:
        faults: one sentence per fault, naming the value and what to set instead; credentials are removed.
    """

    def __init__(self, faults: Sequence[str] | str) -> None:
        self.faults = [redact(fault) for fault in ([faults] if isinstance(faults, str) else faults)]
        count = len(self.faults)
        heading = "1 fault" if count == 1 else f"{count} faults"
        super().__init__("\n".join([f"{heading} in the configuration:", *(f"  - {fault}" for fault in self.faults)]))


class InputError(ValueError):
    """A fault in the user's input (a model folder, documents, a checkpoint). The message states the fix."""


@contextmanager
def reading(path: Path, fix: str) -> Iterator[None]:
    """Convert any error that a library raises while it reads `path` to an InputError with a one-line message.

    Rust libraries raise bare `Exception`, and their panics are pyo3 exceptions that do not derive from `Exception`.

    Raises:
        InputError: states the file, the library's message, and `fix`.
    """
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
            raise
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{path} cannot be read ({type(error).__name__}: {reason}); {fix}") from error
