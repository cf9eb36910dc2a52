"""Checks every value of a config against the bounds that the schema states beside its field."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from prune_distill.config.hints import Hint, field_hints
from prune_distill.schema.fields import Bound, NotBlank, Range


def out_of_bounds(cfg: Any, unreadable: Collection[str]) -> Iterator[tuple[str, str]]:
    """The keys whose values are out of bounds, each with a sentence that says what is wrong and how to fix it.

    Args:
        cfg: a dataclass of the schema.
        unreadable: dotted keys that hold no usable value; they and what is below them are skipped.
    """
    yield from _check_group(cfg, "", unreadable)


def _check_group(group: Any, prefix: str, unreadable: Collection[str]) -> Iterator[tuple[str, str]]:
    for name, hint in field_hints(type(group)).items():
        yield from _check(hint, getattr(group, name), prefix + name, unreadable)


def _check(hint: Hint, value: Any, key: str, unreadable: Collection[str]) -> Iterator[tuple[str, str]]:
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
        broken = next((bound for bound in hint.bounds if not bound.accepts(value)), None)
        if broken is not None:
            yield key, _sentence(key, value, broken) + (", or to null" if hint.optional else "")


def _sentence(key: str, value: Any, bound: Bound) -> str:
    if isinstance(bound, NotBlank):
        return f"{key}={value!r} is empty; set {key} to a text"
    return f"{key}={value!r} {bound.problem or _problem(bound)}; set {key} to {_accepted(bound, type(value))}"


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
