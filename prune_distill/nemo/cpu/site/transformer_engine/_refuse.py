"""Errors for features that the stand-in does not support."""

from __future__ import annotations

from typing import NoReturn


def refuse(feature: str, instead: str = "run it on a GPU") -> NoReturn:
    """Raise NotImplementedError that names `feature` and what to do `instead`."""
    raise NotImplementedError(f"the CPU stand-in for Transformer Engine has no {feature}; {instead}")


def refuse_options(owner: str, options: dict[str, object]) -> None:
    """Raise NotImplementedError if any option is enabled (neither None nor False)."""
    switched_on = [f"{name}={value!r}" for name, value in options.items() if value is not None and value is not False]
    if switched_on:
        refuse(f"{owner} with {', '.join(switched_on)}", "leave the option off")
