"""Every key of the configuration with its type, bounds, default and description, read from the schema and from conf/.

A field's description is the comment directly above it, followed by the docstring of its type where that is a group or a
choice.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import yaml  # type: ignore[import-untyped]
from omegaconf import MISSING, OmegaConf

from prune_distill.config.composition import CONFIG_DIR, compose_tree
from prune_distill.config.hints import Hint, field_hints
from prune_distill.config.typed import plain
from prune_distill.schema import RunConfig

# Longer lists are shown by their first item and their length.
LONGEST_LIST = 3
_WORDS = {bool: ("true or false",) * 2, int: ("integer", "integers"), float: ("number", "numbers")}
_WORDS[str] = ("text", "texts")
_SUFFIXES = {None: "", list: "[N]", dict: ".NAME"}


@dataclass(frozen=True)
class Setting:
    """A key of the configuration.

    Attributes:
        key: dotted; items of a list are `[N]`, and names that the user chooses are `.NAME`.
        kind: its type in words; `bounds`: what its value must be, or an empty string.
        default: the value in YAML, or "required".
        default_of: where conf/ sets the default, such as `distill=minitron`; empty where the schema does.
        group: the dataclass of a group, of a list of groups or of groups by name; None for a value.
        prefix: the dotted prefix of the group's keys, which differs from `key` for lists and groups by name.
        comment: what the schema says at the field; `type_doc`: what it says at the field's type.
    """

    key: str
    kind: str
    bounds: str
    default: str
    default_of: str
    group: type | None
    prefix: str
    comment: str
    type_doc: str

    @property
    def description(self) -> str:
        return " ".join(filter(None, (self.comment, self.type_doc)))


def list_settings() -> list[Setting]:
    """All keys, each group before its keys."""
    tree = OmegaConf.to_container(compose_tree([]), resolve=False)
    return list(_settings(RunConfig, "", tree, chosen_files()))


def chosen_files() -> dict[str, str]:
    """The file of each config group that a run starts from, by `conf/config.yaml`."""
    defaults = yaml.safe_load((CONFIG_DIR / "config.yaml").read_text())["defaults"]
    return {group: name for entry in defaults if isinstance(entry, dict) for group, name in entry.items() if name}


def _settings(cls: type, prefix: str, tree: Any, files: dict[str, str]) -> Iterator[Setting]:
    comments = field_comments(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name, hint in field_hints(cls).items():
        key = prefix + name
        default, default_of = _default(fields[name]), ""
        is_set = isinstance(tree, dict) and name in tree
        if is_set and not (isinstance(tree[name], dict) and hint.is_group) and tree[name] != default:
            default, group = tree[name], key.partition(".")[0]
            default_of = f"{group}={files[group]}" if "." in key else "conf/config.yaml"
        item = hint if hint.origin is None else hint.item
        setting = Setting(
            key=key,
            kind=_describe_type(hint),
            bounds=" and ".join(bound.describe() for bound in item.bounds),
            default=_show(default),
            default_of=default_of,
            group=item.kind if item.is_group else None,
            prefix=key + _SUFFIXES[hint.origin],
            comment=comments[name],
            type_doc=_type_doc(item),
        )
        yield setting
        if item.is_group:
            yield from _settings(item.kind, f"{setting.prefix}.", tree[name] if is_set else None, files)


def _default(field: dataclasses.Field[Any]) -> Any:
    """The schema's default in plain values; for a group, a mapping."""
    if field.default_factory is not dataclasses.MISSING:
        return plain(field.default_factory())
    return MISSING if field.default is dataclasses.MISSING else plain(field.default)


def _describe_type(hint: Hint) -> str:
    words = _singular(hint)
    if not hint.optional:
        return words
    return f"{words}, null" if words.startswith("one of") else f"{words} or null"


def _singular(hint: Hint) -> str:
    if hint.origin is list:
        return f"list of {_plural(hint.item)}"
    if hint.origin is dict:
        return f"{_plural(hint.item)} by name"
    if hint.is_group:
        return "group"
    return f"one of {', '.join(hint.kind.__members__)}" if issubclass(hint.kind, Enum) else _WORDS[hint.kind][0]


def _plural(hint: Hint) -> str:
    if hint.origin is list:
        return f"lists of {_plural(hint.item)}"
    if issubclass(hint.kind, Enum):
        return ", ".join(hint.kind.__members__)
    return "groups" if hint.is_group else _WORDS[hint.kind][1]


def _show(value: Any) -> str:
    if isinstance(value, str):
        return "required" if value == MISSING else value or "''"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list) and len(value) > LONGEST_LIST:
        return f"[{_show(value[0])}, ...] ({len(value)} items)"
    if isinstance(value, list):
        return f"[{', '.join(map(_show, value))}]"
    if isinstance(value, dict):
        return "{...}"
    return "null" if value is None else str(value)


def _type_doc(hint: Hint) -> str:
    documented = hint.is_group or (isinstance(hint.kind, type) and issubclass(hint.kind, Enum))
    return " ".join((inspect.getdoc(hint.kind) or "").split()) if documented else ""


def field_comments(cls: type) -> dict[str, str]:
    """The comment directly above each field of a dataclass, inherited fields included; empty where there is none."""
    found: dict[str, str] = {}
    for base in filter(dataclasses.is_dataclass, reversed(cls.__mro__)):
        lines, _ = inspect.getsourcelines(base)
        definition = ast.parse("".join(lines)).body[0]
        assert isinstance(definition, ast.ClassDef)
        for node in definition.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found[node.target.id] = _comment_above(lines, node.lineno - 1)
    return found


def _comment_above(lines: list[str], number: int) -> str:
    comment: list[str] = []
    while (line := lines[number - 1].strip()).startswith("#"):
        comment.insert(0, line.removeprefix("#").strip())
        number -= 1
    return " ".join(comment)
