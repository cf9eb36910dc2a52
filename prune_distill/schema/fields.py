"""How fields are marked: what of a config is part of a stage's identity, and what a site has to set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from typing import Any

from omegaconf import MISSING


def placement(default: Any) -> Any:
    """A field that does not change a stage's result, only where, how fast or how visibly it is computed."""
    if callable(default):
        return field(default_factory=default, metadata={"identity": False})
    return field(default=default, metadata={"identity": False})


def recorded(default: Any) -> Any:
    """A field that changes what a stage writes, but not which stage it is, so that an unfinished stage continues with a
    new value. A complete stage keeps the value that it was made with: its manifest records it, and a launch with
    another one says that this has no effect."""
    if callable(default):
        return field(default_factory=default, metadata={"identity": False, "recorded": True})
    return field(default=default, metadata={"identity": False, "recorded": True})


def matters(default: Any, where: Callable[[Any], bool]) -> Any:
    """A field that changes a stage's result only where `where` is true of the object that holds the field."""
    if callable(default):
        return field(default_factory=default, metadata={"identity": where})
    return field(default=default, metadata={"identity": where})


def site_specific(wanted: str) -> Any:
    """A field without a default, as it differs from site to site; `wanted` says what to set it to."""
    return field(default=MISSING, metadata={"wanted": wanted})
