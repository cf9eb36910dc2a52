"""Directions in the report: signs of changes, and Pareto fronts."""

from __future__ import annotations

from typing import Any

import pytest

from prune_distill.reporting import figures, words
from prune_distill.reporting.plots import pareto_front
from prune_distill.reporting.run_page import _tiles


@pytest.mark.parametrize(("student", "message"), [(3.25, "+0.250"), (2.5, f"{words.MINUS}0.500"), (3.0, "0.000")])
def test_a_higher_loss_than_the_teachers_is_positive(student: float, message: str) -> None:
    models = {"teacher": {"val_loss": 3.0, "params": 200}, "student": {"val_loss": student, "params": 150}}
    report: Any = {"models": models, "reference": "teacher", "benchmark": None}
    tiles = {tile.label: tile for tile in _tiles(report)}
    assert tiles["Held-out loss"].detail == f"{message} relative to the teacher"
    assert tiles["Parameters"].detail == f"{words.MINUS}25 % from 200"


def test_signs_of_numbers() -> None:
    assert words.signed(0.125, 2) in ("+0.12", "+0.13")
    assert words.signed(-0.5, 1) == f"{words.MINUS}0.5"
    assert words.signed(-0.001, 2) == words.signed(0.001, 2) == "0.00"
    assert words.change(150, 200) == f"{words.MINUS}25 %"
    assert words.change(300, 200) == "+50 %"
    assert words.change(1, 0) == words.change(None, 1) == ""


def line_of(plot: Any) -> list[tuple[float, float]]:
    (line,) = plot.axes[0].get_lines()
    return list(zip(line.get_xdata(), line.get_ydata(), strict=True))


def test_the_fronts_of_costs_and_speeds() -> None:
    students = {name: {"val_loss": loss} for name, loss in (("a", 2.0), ("b", 3.0), ("c", 2.5), ("d", 3.5))}
    numbers = {"a": 30.0, "b": 10.0, "c": 20.0, "d": 15.0}
    cheaper = figures.trade(students, numbers, "x", 1)
    assert line_of(cheaper) == [(10, 3.0), (20, 2.5), (30, 2.0)]
    faster = figures.trade(students, numbers, "x", -1)
    assert line_of(faster) == [(30, 2.0)]
    assert pareto_front([(1, 3), (2, 2), (2, 4), (3, 2)]) == [(1, 3), (2, 2)]
