"""The reference of all configuration keys, as text for `launch.run --help-config` and as docs/configuration.md."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence

from prune_distill.config.reference import Setting, chosen_files, list_settings
from prune_distill.config.typed import did_you_mean
from prune_distill.errors import ConfigError
from prune_distill.schema import Training

WIDTH = 100
INDENT = "    "
# The training whose keys docs/configuration.md lists; other trainings refer to it.
TRAINING = "distill"


def to_text(prefix: str = "") -> str:
    """Format all keys, or those of a group such as `distill` or `distill.kd`, wrapped for a terminal.

    Raises:
        ConfigError: there is no such key or group.
    """
    return "\n".join(map(_entry, select(list_settings(), prefix)))


def select(settings: Sequence[Setting], prefix: str) -> list[Setting]:
    """Select the key `prefix` and all keys below it; all settings if it is empty.

    Raises:
        ConfigError: there is no such key or group.
    """
    group = re.sub(r"\[\d+\]", "[N]", prefix.rstrip("."))
    found = [setting for setting in settings if not group or is_within(setting.key, group)]
    if not found:
        guess = did_you_mean(group, [setting.key for setting in settings])
        groups = [setting.key for setting in settings if setting.group is not None and "." not in setting.key]
        raise ConfigError(f"--help-config={prefix}: unknown key or group{guess}; groups: {', '.join(groups)}")
    return found


def is_within(key: str, prefix: str) -> bool:
    return key == prefix or key.startswith((f"{prefix}.", f"{prefix}["))


def _entry(setting: Setting) -> str:
    facts = "; ".join(filter(None, (_type(setting), _default(setting))))
    lines = [setting.key, *(_wrap(text) for text in (facts, setting.description))]
    return "\n".join(lines) + "\n"


def _wrap(text: str) -> str:
    return textwrap.fill(text, WIDTH, initial_indent=INDENT, subsequent_indent=INDENT, break_on_hyphens=False)


def _type(setting: Setting) -> str:
    return ", ".join(filter(None, (setting.kind, setting.bounds)))


def _default(setting: Setting) -> str:
    if setting.kind == "group":
        return ""
    if setting.default == "required":
        return "required"
    return f"default {setting.default}" + (f" ({setting.default_of})" if setting.default_of else "")


def to_markdown() -> str:
    """Return the content of docs/configuration.md: a section per group, each with a table of its keys."""
    settings = list_settings()
    repeated = [setting for setting in settings if setting.group is Training]
    listed = [
        setting
        for setting in settings
        if not any(is_within(setting.key, other.key) for other in repeated if setting is not other)
    ]
    groups = [setting for setting in listed if setting.group is not None and setting not in repeated]
    chosen = ", ".join(f"`{group}={name}`" for group, name in chosen_files().items())
    parts = [
        "# Configuration",
        "```bash\npython -m launch.run --help-config\npython -m launch.run --help-config distill.kd\n```",
        "The first command prints every key of the configuration with its type, default and meaning; the second one "
        "prints those of a group. This page has the same contents. `make docs` writes it from `prune_distill/schema/` "
        "and `conf/`; do not edit it by hand.",
        "Set a key as `KEY=VALUE` on the command line, as in [Getting started](getting-started.md). The defaults are "
        f"those of a run that names no experiment: {chosen}. Where such a file sets a default, the file is in "
        "parentheses. Choosing another file or an experiment changes them: "
        "`python -m launch.run experiment=NAME --cfg job` prints the values of a run.",
        "Items of lists are written `[N]`, and names that you choose are written `NAME`. A key in a group that may be "
        "null has its default once the group is set.",
        "\n".join(f"- {_link(group)}" for group in groups if "." not in group.key),
        "## Run",
        _table([setting for setting in listed if setting.group is None and "." not in setting.key], repeated),
    ]
    for group in groups:
        own = [setting for setting in listed if setting.key.rpartition(".")[0] == group.prefix]
        heading = "##" if "." not in group.key else "###"
        parts += [f"{heading} {group.prefix}", _escape(group.type_doc), _table(own, repeated)]
    text = "\n\n".join(_fill(part) for part in parts)
    return f"{text}\n"


def _fill(part: str) -> str:
    return part if part.startswith(("#", "|", "-", "```")) else textwrap.fill(part, 120, break_on_hyphens=False)


def _table(settings: Sequence[Setting], repeated: Sequence[Setting]) -> str:
    rows = [(f"`{row.key}`", _escape(_type(row)), _cell(row), _meaning(row, repeated)) for row in settings]
    header = ("key", "type", "default", "meaning")
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ("---",) * len(header), *rows))


def _cell(setting: Setting) -> str:
    if setting.kind == "group":
        return ""
    if setting.default == "required":
        return "required"
    value, _, count = setting.default.partition(" (")
    shown = f"`{value}`" + (f" ({count}" if count else "")
    return f"{shown} (`{setting.default_of}`)" if setting.default_of else shown


def _meaning(setting: Setting, repeated: Sequence[Setting]) -> str:
    if setting in repeated:
        return f"{_escape(setting.description)} Its keys are those of [{TRAINING}](#{TRAINING}) up to `num_workers`."
    if setting.group is not None:
        return " ".join(filter(None, (_escape(setting.comment), f"See {_link(setting)}.")))
    return _escape(setting.description)


def _link(setting: Setting) -> str:
    anchor = re.sub(r"[^\w\- ]", "", setting.prefix.lower())
    return f"[{setting.prefix}](#{anchor})"


def _escape(text: str) -> str:
    """Escape text for Markdown, except for code in backticks."""
    parts = text.split("`")
    return "`".join(part if number % 2 else re.sub(r"([|*<])", r"\\\1", part) for number, part in enumerate(parts))
