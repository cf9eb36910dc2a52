"""Checks every value of a config against the bounds that the schema states beside its field."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from prune_distill.config.hints import Hint, field_hints
from prune_distill.config.wording import describe_setting
from prune_distill.errors import Fault
from prune_distill.schema.fields import Bound, NotBlank, Range


def out_of_bounds(cfg: Any, unreadable: Collection[str]) -> Iterator[Fault]:
    """Yield a fault for each value that is out of bounds.

    Args:
        cfg: a dataclass of the schema.
        unreadable: dotted keys without a usable value; they and all keys below them are skipped.
    """
    yield from _check_group(cfg, "", unreadable)


def _check_group(group: Any, prefix: str, unreadable: Collection[str]) -> Iterator[Fault]:
    for name, hint in field_hints(type(group)).items():
        yield from _check(hint, getattr(group, name), prefix + name, unreadable)


def _check(hint: Hint, value: Any, key: str, unreadable: Collection[str]) -> Iterator[Fault]:
    if value is None or key in unreadable:
        return
    if hint.is_group:
        yield from _check_group(value, f"{key}.", unreadable)
    elif hint.origin is list:
        for number, item in enumerate(value):
            yield from _check(hint.item, item, f"{key}[{number}]", unreadable)
    elif hint.origin is dict:
        for name, item in value.items():
            yield from _check(hint.item, item, f"{key}.{name}", unreadable)
    else:
        violated = next((bound for bound in hint.bounds if not bound.accepts(value)), None)
        if violated is not None:
            problem, accepted = _explain(violated, type(value))
            or_null = ", or to null" if hint.optional else ""
            message = f"{describe_setting(key, value)}: {problem}; set {key} to {accepted}{or_null}"
            yield Fault("value.bounds", (key,), message)


def _explain(bound: Bound, kind: type) -> tuple[str, str]:
    """What is wrong with a value out of a bound, and what to set instead."""
    if isinstance(bound, NotBlank):
        return "empty", "some text"
    return bound.problem or _problem(bound), _accepted(bound, kind)


def _problem(bound: Range) -> str:
    lower = bound.at_least if bound.above is None else bound.above
    upper = bound.at_most if bound.below is None else bound.below
    if lower is not None and upper is not None:
        return f"must be between {lower} and {upper}"
    if lower is None:
        return "is too large"
    return "must not be negative" if bound.at_least == 0 else f"must be {bound.describe()}"


def _accepted(bound: Range, kind: type) -> str:
    if kind is int and bound.above is not None:
        return f"{bound.above + 1} or more"
    return bound.describe() if bound.above is None else f"a number {bound.describe()}"
