"""The reference of configuration keys: complete, and described from the schema and conf/."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from prune_distill.config.reference import Setting, field_comments, list_settings
from prune_distill.config.typed import schema_keys
from prune_distill.schema import RunConfig

SETTINGS = {setting.key: setting for setting in list_settings()}


def test_every_key_is_listed() -> None:
    assert set(schema_keys(RunConfig)) <= set(SETTINGS)
    assert {"distill.phases[N].lr", "prune.rounds[N].steps", "data.sources.NAME.files"} <= set(SETTINGS)


def test_every_key_has_a_description() -> None:
    without = [key for key, setting in SETTINGS.items() if not setting.description]
    assert without == [], "write a comment directly above the field"


def test_descriptions_are_sentences() -> None:
    odd = [
        key
        for key, setting in SETTINGS.items()
        for text in filter(None, (setting.comment, setting.type_doc))
        if not text.endswith((".", "?")) or text[0].islower() or "noqa" in text
    ]
    assert odd == []


@pytest.mark.parametrize(
    ("key", "kind", "bounds", "default", "default_of"),
    [
        ("seed", "integer", "0 or more and at most 4294967295", "1234", ""),
        ("run_dir", "text", "not empty", "runs/${name}", "conf/config.yaml"),
        ("distill.lr", "number", "above 0", "0.0001", "distill=minitron"),
        ("distill.weight_decay", "number", "0 or more", "0.1", ""),
        ("distill.loss", "one of kd, ce", "", "kd", ""),
        ("distill.parallel.tensor_model_parallel_size", "integer", "above 0", "auto", "distill=minitron"),
        ("distill.skip_steps", "list of lists of integers", "", "[]", ""),
        ("distill.phases[N].weights", "numbers by name or null", "", "null", ""),
        ("prune.budget.params_fraction", "number or null", "above 0 and below 1", "null", ""),
        ("data.sources", "groups by name or null", "", "null", ""),
        ("data.shard_bytes", "integer", "above 0", "536870912", ""),
        ("cluster.numa_binding", "one of node, socket, exclusive, core_complex, null", "", "null", ""),
        ("cluster.slurm.partition", "text or null", "", "required", ""),
        ("model.demo.training", "group", "", "{...}", ""),
    ],
)
def test_the_reference_of_a_key(key: str, kind: str, bounds: str, default: str, default_of: str) -> None:
    found: Setting = SETTINGS[key]
    assert (found.kind, found.bounds, found.default, found.default_of) == (kind, bounds, default, default_of)


def test_long_lists_are_cut() -> None:
    assert SETTINGS["data.train"].default.endswith("part_0.jsonl, ...] (25 items)")


def test_descriptions_come_from_comments_and_types() -> None:
    assert SETTINGS["distill.lr"].description == "Learning rate after the warm-up."
    assert "`bf16`: NeMo's bf16-mixed" in SETTINGS["distill.precision"].description
    assert SETTINGS["distill.kd"].description.startswith("The loss of distillation")


@dataclass
class Base:
    # Above.
    first: int = 1
    # An explanation that is not a description.

    # In two
    # lines.
    second: int = 2

    third: int = 3  # next to it


@dataclass
class Derived(Base):
    # Another one.
    first: int = 4


def test_comments() -> None:
    assert field_comments(Base) == {"first": "Above.", "second": "In two lines.", "third": ""}
    assert field_comments(Derived)["first"] == "Another one."
