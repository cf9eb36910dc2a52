"""Parsing of time limits."""

from __future__ import annotations

import pytest

from prune_distill.units import parse_time_limit


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0:00:01", 1),
        ("4:00:00", 14_400),
        ("04:30:15", 16_215),
        ("100:00:00", 360_000),
        ("1-00:00:00", 86_400),
        ("2-03:04:05", 183_845),
        ("7-0:00:00", 604_800),
    ],
)
def test_long_formats_of_slurm(text: str, seconds: int) -> None:
    assert parse_time_limit(text) == seconds


@pytest.mark.parametrize(
    "text",
    ["", "4", "4:00", "4h", "1-12", "1-12:00", "-1:00:00", "4:0:0", "4:60:00", "4:00:61", "1-24:00:00", "0:00:00"],
)
def test_other_formats_are_rejected(text: str) -> None:
    with pytest.raises(ValueError, match="time|more than|is zero"):
        parse_time_limit(text)
