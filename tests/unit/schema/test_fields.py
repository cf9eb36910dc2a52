"""Markers of fields and their effect on hashes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from prune_distill.pipeline.identity import hashed_values, recorded_values
from prune_distill.schema import RunConfig
from prune_distill.schema.fields import Identity, hashed_elsewhere, hashed_if, identity_of, placement, recorded


@dataclass
class Inner:
    decides: int = 1
    places: int = placement(2)


@dataclass
class Outer:
    kind: str = "a"
    decides: Inner = field(default_factory=Inner)
    places: Inner = placement(Inner)
    is_recorded: list[int] = recorded(list)
    is_elsewhere: Inner | None = hashed_elsewhere(None)
    where_a: int = hashed_if(3, lambda outer: outer.kind == "a")


def test_a_marker_keeps_the_default() -> None:
    assert Outer() == Outer("a", Inner(1, 2), Inner(1, 2), [], None, 3)
    assert Outer().is_recorded is not Outer().is_recorded


def test_markers() -> None:
    found = {field.name: identity_of(field, Outer()) for field in dataclasses.fields(Outer)}
    assert found == {
        "kind": Identity.hashed,
        "decides": Identity.hashed,
        "places": Identity.placement,
        "is_recorded": Identity.recorded,
        "is_elsewhere": Identity.hashed_elsewhere,
        "where_a": Identity.hashed,
    }
    (conditional,) = [field for field in dataclasses.fields(Outer) if field.name == "where_a"]
    assert identity_of(conditional, Outer(kind="b")) is Identity.placement


def test_only_hashed_fields_are_in_a_hash() -> None:
    assert hashed_values(Outer()) == {"kind": "a", "decides": {"decides": 1}, "where_a": 3}
    assert hashed_values([Outer(kind="b")]) == [{"kind": "b", "decides": {"decides": 1}}]


def test_recorded_fields_are_found_below_the_keys_of_a_stage() -> None:
    cfg = RunConfig()
    values = dict(recorded_values(["distill", "data"], cfg))
    assert values["distill.val_every_n_steps"] == 100
    assert values["distill.skip_steps"] == []
    assert not {key for key in values if key.startswith(("data.", "distill.teacher_correction", "distill.lr"))}
    # A single field is in the hash, so it is not recorded.
    assert dict(recorded_values(["distill.cached_logits_top_k"], cfg)) == {}
