"""The section on speed and memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prune_distill.benchmarking.timing import LoadFigures
from prune_distill.reporting import figures, words
from prune_distill.reporting.blocks import Block, Cell, Code, Column, Note, Table
from prune_distill.reporting.cells import (
    Clean,
    benchmark_settings,
    benchmarked,
    compute_ratios,
    draw,
    load_by_rate,
    median,
    missing,
    number_cell,
    spread_cell,
)
from prune_distill.reporting.figures import format_label
from prune_distill.reporting.results import QUANTIZED, REFERENCES, Report
from prune_distill.reporting.run_folder import RunFolder
from prune_distill.reporting.words import finite


def speed(run: RunFolder, report: Report, clean: Clean) -> Iterator[Block]:
    benchmark, measured = report["benchmark"] or {}, benchmarked(report)
    if not measured:
        yield missing(run, "benchmark", "Speed and memory have not been measured")
        return
    columns = [
        Column("Model", text=True),
        Column("Prefill", "tokens/s"),
        Column("Generation", "tokens/s"),
        Column("First token", "after"),
        Column("Peak memory"),
        Column("Weights"),
        Column("KV cache"),
    ]
    optional = {
        "joules_per_token": Column("Energy", "J/token"),
        "cost_per_million_tokens": Column("Cost", "per M tokens"),
    }
    extra = [key for key in optional if any(finite(model.get(key)) is not None for model in measured.values())]
    rows = []
    for name, model in measured.items():
        ratios = compute_ratios(report, name)
        rows.append(
            [
                Cell(format_label(name)),
                spread_cell(model.get("prefill_tokens_per_second"), ratios.get("prefill"), words.significant),
                spread_cell(model.get("decode_tokens_per_second"), ratios.get("decode"), words.significant),
                spread_cell(
                    model.get("time_to_first_token_seconds"), ratios.get("time_to_first_token"), words.duration
                ),
                *(number_cell(model.get(f"{key}_bytes"), words.size) for key in ("peak_memory", "weights", "kv_cache")),
                *(number_cell(model.get(key), words.significant) for key in extra),
            ]
        )
    yield Table(
        f"Speed and memory: medians; below, relative to {REFERENCES[report['reference']]}, with the range over rounds",
        [*columns, *(optional[key] for key in extra)],
        rows,
    )
    load = {name: load_by_rate(model) for name, model in measured.items()}
    if any(load.values()):
        yield _load_table(report, load)
        yield Note(
            f"Each model's server got {benchmark.get('requests', '?')} requests at each rate, at the same random times."
            " Times are those of the median request."
        )
    facts = [
        *benchmark_settings(report),
        f"{benchmark.get('rounds', '?')} interleaved rounds",
        *([f"{benchmark['threads']} threads"] if benchmark.get("threads") else []),
    ]
    left_out = [name for name in report["models"] if name in QUANTIZED and name not in measured]
    why = " Quantized models are not measured: transformers would compute with dequantized weights."
    yield Note(", ".join(facts) + "." + (why if left_out and benchmark.get("engine") == "transformers" else ""))
    speeds = {name: median(model.get("decode_tokens_per_second")) for name, model in measured.items()}
    plots = (
        (
            figures.trade(report["models"], speeds, "tokens/s of generation"),
            "Quality against speed; lower right is better.",
        ),
        (figures.size_trade(report["models"]), "Quality against size; lower left is better."),
        (figures.load(load), "Servers under load, a point per rate of requests; lower right is better."),
    )
    yield from draw(plots, clean)
    if benchmark.get("command"):
        yield Code("Command of the benchmark", str(benchmark["command"]))


def _load_table(report: Report, load: Mapping[str, Mapping[str, LoadFigures]]) -> Table:
    columns = [
        Column("Model", text=True),
        Column("Requests", "per second"),
        Column("Generation", "tokens/s"),
        Column("First token", "after"),
        Column("First token", "slowest percent"),
        Column("Further tokens", "each"),
    ]
    shown: Mapping[str, Callable[[Any], str]] = {
        "output_tokens_per_second": words.significant,
        "time_to_first_token_seconds": words.duration,
        "slow_time_to_first_token_seconds": words.duration,
        "seconds_per_output_token": words.duration,
    }
    rows = []
    for rate in dict.fromkeys(rate for rates in load.values() for rate in rates):
        for name, rates in load.items():
            own, ratios = rates.get(rate, {}), load_by_rate(compute_ratios(report, name)).get(rate, {})
            cells = [spread_cell(own.get(key), ratios.get(key), shown[key]) for key in shown]
            rows.append([Cell(format_label(name)), Cell(rate), *cells])
    return Table(
        f"Continuous batching: medians; below, relative to {REFERENCES[report['reference']]}, with their range",
        columns,
        rows,
    )
