"""Figures of servers under load, from their answers."""

from __future__ import annotations

import pytest

from prune_distill.benchmarking import load


def test_an_answer_is_summarized() -> None:
    times = [0.5, *[0.1] * 98, 0.9]
    answer = {"duration": 4.0, "output_tokens": 100, "first_token": times, "per_token": [0.2, 0.1, 0.3], "errors": []}
    found = load.summarize(answer, 100)
    assert found == load.Load(25.0, 0.1, 0.5, 0.2)
    with pytest.raises(RuntimeError, match="2 of 100 requests failed: too long"):
        load.summarize({**answer, "errors": ["too long", "full"]}, 100)


def test_ratios_are_computed_per_round() -> None:
    """A machine that slows down from round to round affects both models."""
    rounds = [
        [
            {
                "teacher": load.Load(8 / slow, slow, 3 * slow, slow),
                "student": load.Load(16 / slow, slow / 2, slow, slow),
            }
            for slow in (1, 2, 4)
        ]
    ]
    (teacher,) = load.figures(rounds, [2.5], "teacher")
    assert teacher["request_rate"] == 2.5
    assert teacher["output_tokens_per_second"] == {"median": 4, "min": 2, "max": 8}
    (ratios,) = load.figures(rounds, [None], "student", "teacher")
    assert ratios["request_rate"] is None
    assert ratios["output_tokens_per_second"] == {"median": 2, "min": 2, "max": 2}
    assert ratios["time_to_first_token_seconds"] == {"median": 0.5, "min": 0.5, "max": 0.5}
    assert ratios["slow_time_to_first_token_seconds"]["median"] == pytest.approx(1 / 3)
