"""Rules of a config: each states the keys that it reads, and yields what is wrong with their values."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from typing import Any

from prune_distill.config.values import get_value
from prune_distill.config.wording import describe_setting
from prune_distill.errors import Fault
from prune_distill.schema import RunConfig

_GROUPS = "|".join(field.name for field in fields(RunConfig) if field.default_factory is not MISSING)
_KEY = re.compile(rf"(?<![\w./-])(?:{_GROUPS})(?:\.\w+(?:\[\d+\])?)+")
_IN_CONFIG = object()


@dataclass(frozen=True)
class Finding:
    """What a rule finds wrong.

    Attributes:
        key: the key to change; the runner of the rules prints its value.
        text: what is wrong, and how to fix it, separated by a semicolon. It names the other keys concerned.
        value: the effective value, where the key itself inherits it.
        names_file: the text starts with the name of a file, which is printed instead of the key and its value.
    """

    key: str
    text: str
    value: Any = _IN_CONFIG
    names_file: bool = False


Check = Callable[[RunConfig], Iterator[Finding]]


@dataclass(frozen=True)
class Rule:
    """A rule of a config, skipped where one of its keys is unreadable or in a group that is null.

    Attributes:
        id: the group and the name, such as `training.ranks`.
        reads: the dotted keys that `check` reads, with all that is below them. `GROUP?.KEY`: the group may be null.
            `GROUP?`: only whether the group is null.
        check: yields what is wrong.
        on_machine: whether `check` looks at files and packages of this machine too.
    """

    id: str
    reads: tuple[str, ...]
    check: Check
    on_machine: bool = False

    @cached_property
    def _parents(self) -> set[str]:
        return {read.rpartition(".")[0] for read in self.reads if "." in read and "?." not in read}

    def applies_to(self, cfg: RunConfig, unreadable: Collection[str] = ()) -> bool:
        needed = not any(_concerns(read, key) for read in self.reads for key in unreadable)
        return needed and all(get_value(cfg, group) is not None for group in self._parents)

    def faults(self, cfg: RunConfig, unreadable: Collection[str] = ()) -> list[Fault]:
        """All faults of a config against this rule; none where it does not apply."""
        findings = self.check(cfg) if self.applies_to(cfg, unreadable) else ()
        return [self._fault(cfg, finding) for finding in findings]

    def _fault(self, cfg: RunConfig, finding: Finding) -> Fault:
        keys = tuple(dict.fromkeys([finding.key, *_KEY.findall(finding.text)]))
        if finding.names_file:
            return Fault(self.id, keys, finding.text)
        value = get_value(cfg, finding.key) if finding.value is _IN_CONFIG else finding.value
        return Fault(self.id, keys, f"{describe_setting(finding.key, value)}: {finding.text}")


def _concerns(read: str, unreadable: str) -> bool:
    """Whether a key that a rule reads has no usable value."""
    key = read.replace("?", "")
    if key == unreadable or key.startswith(f"{unreadable}."):
        return True
    return not read.endswith("?") and unreadable.startswith((f"{key}.", f"{key}["))


def rule(name: str, *reads: str, on_machine: bool = False) -> Callable[[Check], Rule]:
    """Declare a function as the rule `name` that reads these keys."""
    return lambda check: Rule(name, reads, check, on_machine)
