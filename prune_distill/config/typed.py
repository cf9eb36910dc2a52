"""Plain YAML trees to the dataclasses of `prune_distill.schema` and back, finding every fault, not only the first."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import unicodedata
from collections.abc import Iterator
from enum import Enum
from typing import Any, TypeVar

from omegaconf import MISSING

from prune_distill.config.hints import Hint, field_hints, split_hint
from prune_distill.config.renamed_keys import describe_rename
from prune_distill.config.wording import describe_setting, override, resolve_change
from prune_distill.credentials import find_credential
from prune_distill.errors import Fault
from prune_distill.schema.fields import Range

# Stands in a tree for a value that could not be resolved, which has been reported.
UNRESOLVED = object()

T = TypeVar("T")
# What Megatron's data index and PyTorch count with.
LARGEST_COUNT = 2**63 - 1
# Control characters, surrogates (of undecodable file names), and separators of lines and paragraphs.
_CONTROL = {"Cc", "Cs", "Zl", "Zp"}
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "some text"}


class Reader:
    """Reads trees of plain values as dataclasses.

    Attributes:
        faults: everything that is wrong.
        unreadable: dotted keys without a usable value; what the objects contain there means nothing.
    """

    def __init__(self, root: type, refuse_credentials: bool = True, require_site: bool = True) -> None:
        """
        Args:
            refuse_credentials: report credentials in texts.
            require_site: report missing values that differ from site to site; otherwise they are null.
        """
        self.faults: list[Fault] = []
        self.unreadable: set[str] = set()
        self._refuse_credentials = refuse_credentials
        self._require_site = require_site
        self._known_keys = list(schema_keys(root))

    def group(self, cls: type[T], tree: Any, prefix: str = "") -> T:
        """An instance of the dataclass `cls` from a mapping; `prefix` is its dotted key with a dot at the end."""
        key = prefix.rstrip(".")
        if not isinstance(tree, dict):
            self._fault("value.type", key, f"must be a group, not a value; set its keys, as in {key}.KEY=VALUE", tree)
            tree = {}
        fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        for name in tree:
            if name not in fields:
                self._unknown(prefix, str(name), list(fields), tree[name])
        hints = field_hints(cls)
        return cls(**{name: self._field(field, hints[name], tree, prefix + name) for name, field in fields.items()})

    def _field(self, field: dataclasses.Field[Any], hint: Hint, tree: dict[Any, Any], key: str) -> Any:
        if field.name in tree:
            return self._value(hint, tree[field.name], key, field.metadata.get("wanted"))
        if hint.is_group and not hint.optional:
            return self.group(hint.kind, {}, f"{key}.")
        if field.default_factory is not dataclasses.MISSING:
            return field.default_factory()
        missing = field.default == MISSING
        return self._value(hint, MISSING, key, field.metadata.get("wanted")) if missing else field.default

    def _value(self, hint: Hint, raw: Any, key: str, wanted: str | None = None) -> Any:
        """`wanted`: what a missing value should be, where its type does not say enough."""
        if raw is UNRESOLVED:
            return self._unusable(key)
        if raw == MISSING and wanted is not None and hint.optional and not self._require_site:
            return None
        if raw == MISSING:
            wanted = wanted or _describe(hint.kind) + (" or null" if hint.optional else "")
            return self._fault("value.missing", key, f"not set; set {key} to {wanted}")
        if raw is None:
            fix = f"set {key} to {_describe(hint.kind)}"
            return None if hint.optional else self._fault("value.null", key, f"must not be null; {fix}", None)
        if hint.is_group:
            return self.group(hint.kind, raw, f"{key}.")
        if hint.origin is list:
            return self._list(hint.item, raw, key)
        if hint.origin is dict:
            return self._mapping(hint.item, raw, key)
        if issubclass(hint.kind, Enum):
            return self._member(hint.kind, raw, key)
        return self._scalar(hint, raw, key)

    def _list(self, item: Hint, raw: Any, key: str) -> Any:
        lists_inside = item.origin is list
        if not isinstance(raw, list):
            return self._fault("value.type", key, f"not a list; set {override(key, _as_list(item, raw))}", raw)
        if lists_inside and raw and all(type(value) is int for value in raw):
            spans = [raw] if len(raw) == 2 else [[value, value] for value in raw]
            return self._fault("value.type", key, f"not a list of lists; set {override(key, spans)}", raw)
        known = len(self.unreadable)
        values = [self._value(item, value, f"{key}[{index}]") for index, value in enumerate(raw)]
        return values if len(self.unreadable) == known else self._unusable(key)

    def _mapping(self, item: Hint, raw: Any, key: str) -> Any:
        """Groups or values by names that the user chooses."""
        if not isinstance(raw, dict):
            return self._fault("value.type", key, f"not groups by name; set {key}.NAME.KEY=VALUE", raw)
        for name in raw:
            self._text(str(name), f"{key}.NAME")
        return {str(name): self._value(item, value, f"{key}.{name}") for name, value in raw.items()}

    def _member(self, hint: type[Enum], raw: Any, key: str) -> Any:
        if isinstance(raw, str) and raw in hint.__members__:
            return hint[raw]
        guess = did_you_mean(str(raw), list(hint.__members__))
        return self._fault("value.choice", key, f"not a choice{guess}; set {key} to {_describe(hint)}", raw)

    def _scalar(self, hint: Hint, raw: Any, key: str) -> Any:
        kind, most = hint.kind, _largest(hint)
        if kind is str and type(raw) is str:
            return self._text(raw, key)
        # Before the bounds of the schema are checked, as these numbers are mostly floats such as 1e22.
        if kind is int and type(raw) in (int, float) and abs(raw) > most:
            return self._fault("value.bounds", key, f"too large; set {key} to at most {most}", raw)
        if type(raw) is kind and not (isinstance(raw, float) and not math.isfinite(raw)):
            return raw
        # A name or a revision may be made of digits only.
        if type(raw) is int and kind in (float, str):
            return kind(raw)
        fix = f"{int(raw)}" if type(raw) is float and raw.is_integer() and kind is int else _KINDS[kind]
        if kind is int and isinstance(raw, str):
            fix = resolve_change(raw) or fix
        return self._fault("value.type", key, f"not {_KINDS[kind]}; set {key} to {fix}", raw)

    def _text(self, raw: str, key: str) -> Any:
        """A text without anything that would end a line of a job script, or be a secret in every file of the run."""
        control = next((letter for letter in raw if unicodedata.category(letter) in _CONTROL), None)
        if control is not None:
            problem = f"contains the control character {control!r}"
            return self._fault("value.control_character", key, f"{problem}; remove it from {key}", raw)
        credential = find_credential(key, raw) if self._refuse_credentials else None
        if credential is not None:
            problem = f"contains {credential}, which the run's files would show"
            return self._fault("value.credential", key, f"{problem}; remove it from {key} and {_elsewhere(key)}")
        return raw

    def _unknown(self, prefix: str, name: str, siblings: list[str], value: Any) -> None:
        if renamed := describe_rename(prefix + name, value):
            self.faults.append(Fault("key.renamed", (prefix + name,), renamed))
            return
        close = did_you_mean(name, siblings, prefix)
        elsewhere = [key for key in self._known_keys if key.rpartition(".")[2] == name]
        if not close and elsewhere:
            close = f" (did you mean {' or '.join(elsewhere)}?)"
        known = close or f"; {prefix.rstrip('.') or 'the root'} has {', '.join(siblings)}"
        self.faults.append(Fault("key.unknown", (f"{prefix}{name}",), f"{prefix}{name}: not a known key{known}"))

    def _fault(self, rule: str, key: str, text: str, value: Any = UNRESOLVED) -> None:
        """Report a key; `value` is shown unless it is missing, or not to be shown."""
        setting = key if value is UNRESOLVED else describe_setting(key, value)
        self.faults.append(Fault(rule, (key,), f"{setting}: {text}"))
        self._unusable(key)

    def _unusable(self, key: str) -> None:
        self.unreadable.add(key)


def plain(value: Any) -> Any:
    """Dataclasses and enums as mappings and member names: what `Reader` reads back as the same object."""
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def schema_keys(cls: type, prefix: str = "") -> Iterator[str]:
    """All dotted keys of a dataclass, groups included."""
    for name, hint in field_hints(cls).items():
        yield prefix + name
        if hint.origin is dict and hint.item.is_group:
            yield from schema_keys(hint.item.kind, f"{prefix}{name}.NAME.")
        if hint.is_group:
            yield from schema_keys(hint.kind, f"{prefix}{name}.")


def did_you_mean(name: str, known: list[str], prefix: str = "") -> str:
    """A clause that guesses what was meant, or an empty string."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" (did you mean {prefix}{close[0]}?)" if close else ""


def _largest(hint: Hint) -> int:
    limits = [bound.at_most for bound in hint.bounds if isinstance(bound, Range) and bound.at_most is not None]
    return int(min([*limits, LARGEST_COUNT]))


def _as_list(item: Hint, raw: Any) -> Any:
    """The list that a lone value was probably meant to be: `20-24` is a range, or a span where lists are wanted."""
    span = re.fullmatch(r"(\d{1,6})-(\d{1,6})", raw) if isinstance(raw, str) else None
    first, last = map(int, span.groups()) if span else (raw, raw)
    if item.origin is list:
        return [[first, last]]
    return list(range(first, last + 1)) if span and item.kind is int and last - first < 1000 else [raw]


def _elsewhere(key: str) -> str:
    """Where a credential belongs that was found under a key."""
    if ".mlflow." in key:
        return "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, in the environment"
    if ".wandb." in key:
        return "set WANDB_API_KEY in the environment"
    if key.startswith("cluster.slurm."):
        return "set the variable in the environment, and its name in cluster.slurm.secrets"
    return "set HF_TOKEN in the environment, or the variable that the service reads"


def _describe(kind: Any) -> str:
    hint = split_hint(kind)
    if hint.origin is list:
        return "a list"
    if hint.origin is dict:
        return "groups by name"
    if issubclass(kind, Enum):
        return " or ".join(kind.__members__)
    return _KINDS.get(kind, "a group of settings")
