"""Type hints of the schema's fields, taken apart."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from prune_distill.schema.fields import Bound, NotBlank, Range


@dataclasses.dataclass(frozen=True)
class Hint:
    """The type of a value: `Annotated[int, Range(above=0)] | None` is an optional int with one bound."""

    kind: Any
    optional: bool
    bounds: tuple[Bound, ...]

    @property
    def is_group(self) -> bool:
        return isinstance(self.kind, type) and dataclasses.is_dataclass(self.kind)

    @property
    def origin(self) -> Any:
        """`list` or `dict`; None for all other types."""
        return typing.get_origin(self.kind)

    @property
    def item(self) -> Hint:
        """The type of the items of a list, or of the values of a mapping."""
        return split_hint(typing.get_args(self.kind)[-1])


def split_hint(hint: Any) -> Hint:
    optional = False
    bounds: list[Bound] = []
    while True:
        origin = typing.get_origin(hint)
        if origin is typing.Annotated:
            hint, *marks = typing.get_args(hint)
            bounds += [mark for mark in marks if isinstance(mark, (Range, NotBlank))]
        elif origin in (typing.Union, types.UnionType):
            optional = True
            (hint,) = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        else:
            return Hint(hint, optional, tuple(bounds))


def field_hints(cls: type) -> dict[str, Hint]:
    """The types of a dataclass's fields by name, in their order."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: split_hint(hints[field.name]) for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
