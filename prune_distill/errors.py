"""Errors that the user can fix. Each message states the value, what is wrong, and the fix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from prune_distill.credentials import redact


@dataclass(frozen=True)
class Fault:
    """Something that is wrong in what the user asked for.

    Attributes:
        rule: what was violated, such as `training.ranks`; empty where the fault is no rule's.
        keys: the dotted keys concerned, the one to change first.
        message: `KEY=VALUE: what is wrong; how to fix it`.
    """

    rule: str
    keys: tuple[str, ...]
    message: str

    def __str__(self) -> str:
        return self.message


class ConfigError(ValueError):
    """One or more faults in what the user asked for, reported together.

    Attributes:
        faults: credentials are removed from their messages.
    """

    def __init__(self, faults: Sequence[Fault | str] | str) -> None:
        found = [faults] if isinstance(faults, str) else faults
        self.faults = [_redacted(Fault("", (), fault) if isinstance(fault, str) else fault) for fault in found]
        count = len(self.faults)
        heading = "1 fault" if count == 1 else f"{count} faults"
        super().__init__("\n".join([f"{heading} in the configuration:", *(f"  - {fault}" for fault in self.faults)]))


def _redacted(fault: Fault) -> Fault:
    return replace(fault, message=redact(fault.message))


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
