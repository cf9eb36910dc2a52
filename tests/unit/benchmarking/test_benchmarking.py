"""Figures of a benchmark from timings, and energy counters."""

from __future__ import annotations

from pathlib import Path

import pytest

from prune_distill.benchmarking import energy, timing
from prune_distill.benchmarking.timing import Memory, Timed
from prune_distill.nemo import devices
from prune_distill.schema import BenchmarkConfig
from recipes.benchmark import format_command

CFG = BenchmarkConfig(batch_size=2, prompt_tokens=100, new_tokens=11, rounds=3, cost_per_hour=3.6)


class Clockwork:
    """A model with given timings on a machine that slows down from round to round."""

    def __init__(self, log: list[str], name: str, seconds: float) -> None:
        self.log, self.name, self.seconds, self.calls = log, name, seconds, 0

    def warm_up(self) -> Memory:
        self.log.append(f"warm up {self.name}")
        return Memory(weights=100, kv_cache=10, peak=int(200 * self.seconds))

    def generate(self) -> Timed:
        self.log.append(self.name)
        self.calls += 1
        return Timed(self.seconds * self.calls, 2 * self.seconds * self.calls, None)


def test_models_are_interleaved_and_compared_per_round() -> None:
    log: list[str] = []
    models = {"teacher": Clockwork(log, "teacher", 1.0), "student": Clockwork(log, "student", 0.5)}
    memory, timed = timing.run_rounds(models, CFG.rounds)
    order = ["teacher", "student", "student", "teacher", "teacher", "student"]
    assert log == ["warm up teacher", "warm up student", *order]
    ratios = timing.ratios("student", "teacher", memory, timed)
    # The slowdown of the machine cancels out.
    same = {"median": 2.0, "min": 2.0, "max": 2.0}
    half = {"median": 0.5, "min": 0.5, "max": 0.5}
    assert ratios == {"prefill": same, "decode": same, "time_to_first_token": half, "memory": 0.5}
    figures = timing.figures(memory["teacher"], [one["teacher"] for one in timed], CFG)
    assert figures["prefill_tokens_per_second"] == {"median": 100.0, "min": pytest.approx(200 / 3), "max": 200.0}
    assert figures["decode_tokens_per_second"]["median"] == pytest.approx(2 * 10 / 4)
    assert figures["time_to_first_token_seconds"]["median"] == 2.0
    assert (figures["weights_bytes"], figures["kv_cache_bytes"], figures["peak_memory_bytes"]) == (100, 10, 200)
    assert figures["joules_per_token"] is None
    # 22 new tokens in 6 s, at a thousandth a second.
    assert figures["cost_per_million_tokens"] == pytest.approx(6e-3 / 22 * 1e6)


def test_joules_are_read_from_the_packages_alone(tmp_path: Path) -> None:
    for name, joules in (("intel-rapl:0", 3), ("intel-rapl:1", 4), ("intel-rapl:0:0", 100)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{joules * 10**6}\n")
    meter = energy.rapl(tmp_path)
    assert meter is not None
    assert meter() == 7.0
    assert energy.rapl(tmp_path / "absent") is None
    assert energy.joules(5.0, 7.5) == 2.5
    assert energy.joules(7.0, 1.0) is None  # the counter wrapped around
    assert energy.joules(None, 1.0) is None


def test_the_command_contains_all_settings() -> None:
    message = format_command({"teacher": "a", "student": "b c"}, "out", CFG, seed=5)
    assert message == (
        "python -m recipes.benchmark --models teacher=a 'student=b c' --out out --engine transformers --dtype keep"
        " --seed 5 --batch-size 2 --prompt-tokens 100 --new-tokens 11 --rounds 3 --requests 64 --cost-per-hour 3.6"
    )


def test_peak_memory_of_work() -> None:
    import torch

    def work() -> torch.Tensor:
        first = torch.ones(1000, 1000)  # 4 MB
        second = first + 1
        del first
        return second.sum()

    result, peak = devices.measure_peak_memory(work)
    assert result == 2e6
    assert 8e6 <= peak < 8.1e6
    assert devices.free_memory_bytes() > 0
    assert devices.device_name()
