"""A plan for people: the whole table that `launch.plan` prints, and the few lines that `launch.run` starts with."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from prune_distill.units import GIB

PARTS = ("weights", "gradients", "optimizer", "teacher", "activations", "loss")
COLUMNS = 100
# Paths and key=value may be copied from a line: they are not cut.
WRAP = textwrap.TextWrapper(COLUMNS, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
LAYOUTS_SHOWN = 6
UNDIVIDED_SHOWN = 4
SIZES = {
    "layers": "num_layers",
    "hidden": "hidden_size",
    "ffn": "ffn_hidden_size",
    "heads": "num_attention_heads",
    "groups": "num_query_groups",
}
# Of a mixture: its experts, the FFN of each, and how many a token goes through.
SIZES_OF_EXPERTS = {
    "experts": "num_moe_experts",
    "expert ffn": "moe_ffn_hidden_size",
    "top": "moe_router_topk",
}


def table(plan: dict[str, Any]) -> str:
    """All of a plan, for a terminal of 100 columns."""
    sections = (_heading, _models, _time, _memory, _layouts, _disk, _notes)
    return "\n\n".join("\n".join(lines) for section in sections if (lines := section(plan)))


def short(plan: dict[str, Any]) -> list[str]:
    """The plan in a few lines: what can be said where no GPU is stated, and the rest where one is."""
    teacher, student, training = plan["models"]["teacher"], plan["models"]["student"], plan["training"]
    most = "" if plan["models"]["candidates"] is None else "at most "
    lines = [
        f"plan: {_count(teacher['parameters'])} -> {most}{_count(student['parameters'])} parameters"
        f" ({-plan['models']['cut']:.0%}), {training['steps']:,} steps, {_count(training['tokens'])} tokens"
    ]
    gpu, disk = plan["cluster"]["gpu"], plan["disk"]
    if gpu is not None:
        peak, limit = _peak(plan), gpu["memory_bytes"]
        lines.append(f"plan: {_gib(peak)} of {_gib(limit)} GiB a GPU ({gpu['name']}), {_hours_in_all(plan)}")
    lines.append(f"plan: {_gib(disk['total'])} GiB on disk, {_gib(disk['free'])} GiB are free")
    if plan["fits"] is False:
        lines.append(f"warning: the plan does not fit: {plan['fix']}")
    return lines + [f"warning: {warning}" for warning in plan["warnings"]]


def _heading(plan: dict[str, Any]) -> list[str]:
    cluster = plan["cluster"]
    gpu = cluster["gpu"]
    stated = "GPU not stated (cluster.gpu is null)"
    if gpu is not None:
        stated = f"{gpu['name']}, {_gib(gpu['memory_bytes'])} GiB, {gpu['bf16_flops'] / 1e12:.0f} TFLOP/s in bf16"
    limit = f", at most {cluster['time_limit']} a job" if cluster["time_limit"] else ""
    return [
        f"{plan['experiment']} on {cluster['name']}: {cluster['nodes']} x {cluster['devices_per_node']} ranks{limit}",
        f"each rank: {stated}",
    ]


def _models(plan: dict[str, Any]) -> list[str]:
    models, training = plan["models"], plan["training"]
    mixture = models["teacher"]["num_moe_experts"]
    counts = {"parameters": "parameters", **({"active": "active_parameters"} if mixture else {})}
    sizes = SIZES | (SIZES_OF_EXPERTS if mixture else {})
    rows = [["model", *counts, *sizes]]
    for name in ("teacher", "student"):
        model = models[name]
        counted = [f"{model[count]:,}" for count in counts.values()]
        rows.append([name, *counted, *(str(model[size]) for size in sizes.values())])
    flops = training["flops_a_token"]
    again = f" + {_giga(flops['recompute'])} again (recompute)" if flops["recompute"] else ""
    found = models["candidates"]
    searched = []
    if found is not None:
        searched = [
            f"student: the largest of {found['shapes']} candidates, of which the run chooses; they have "
            f"{found['least']:,} to {found['most']:,} parameters"
        ]
    return [
        *_columns(rows),
        *searched,
        f"pruning removes {models['cut']:.1%} of the parameters",
        "",
        f"distillation: {training['steps']:,} steps x {training['tokens_a_step']:,} tokens"
        f" = {_count(training['tokens'])} tokens",
        f"GFLOP a token: {_giga(flops['student'])} student + {_giga(flops['teacher'])} teacher{again}"
        f" = {_giga(flops['total'])}; in all {training['flops']:.3g} FLOP",
        *_signal(plan),
    ]


def _signal(plan: dict[str, Any]) -> list[str]:
    signal = plan["signal"]
    if signal is None:
        return []
    text = (
        f"the teacher runs once, {_giga(signal['flops_a_token'])} GFLOP a token, and keeps its {signal['top_k']} most "
        f"probable tokens, at most {_gib(signal['bytes'])} GiB; every further student of this run (a "
        f"tournament's candidates) saves {signal['spared_share']:.0%} of the FLOP of a step with the teacher"
    )
    return WRAP.wrap(text)


def _time(plan: dict[str, Any]) -> list[str]:
    gpu = plan["cluster"]["gpu"]
    known = [stage for stage in plan["stages"] if stage["hours"] is not None]
    others = ", ".join(stage["stage"] for stage in plan["stages"] if stage["hours"] is None)
    if not known:
        why = "cluster.gpu is null" if gpu is None else "cluster.gpu states the speed of bf16 only"
        return [f"hours: not estimated ({why})"]
    limit = plan["cluster"]["time_limit"]
    rows = [["stage", "ranks", "hours", "GPU-hours", *([f"jobs of {limit}"] if limit else [])]]
    for stage in known:
        jobs = [f"{stage['jobs']:,}"] if limit else []
        rows.append([stage["stage"], str(stage["ranks"]), _number(stage["hours"]), _number(stage["gpu_hours"]), *jobs])
    return [
        f"time, at {gpu['utilisation']:.0%} of the GPU's peak (an assumption: cluster.gpu.utilisation)",
        *_columns(rows),
        f"not estimated: {others}",
    ]


def _memory(plan: dict[str, Any]) -> list[str]:
    on_gpu = plan["cluster"]["gpu"] is not None
    rows = [["GiB a rank", *PARTS, *(["reserve*", "total"] if on_gpu else ["sum"])]]
    stages = plan["memory"]["distill"]
    for number, memory in enumerate(stages):
        # Stages between the first and the last are like one another, and need less than the first.
        if number in (0, 1, len(stages) - 1):
            rows.append(_memory_row("distill" if len(stages) == 1 else f"distill, stage {number}", memory, on_gpu))
    rows.append(_memory_row("prune", plan["memory"]["prune"], on_gpu))
    for stage, memories in _others(plan).items():
        rows.append(_memory_row(stage, _fullest(memories), on_gpu))
    return [
        f"memory at the fullest moment, with {_layout_words(plan['layout'])}",
        *_columns(rows),
        "loss: logits (of a chunk, or whole with implementation=upstream) and the output weight's gradient",
        *(["* assumed: 2 GiB for CUDA, NCCL and workspaces, 5 % for fragmentation"] if on_gpu else []),
    ]


def _memory_row(name: str, memory: dict[str, int], on_gpu: bool) -> list[str]:
    sums = [memory["reserve"], memory["total"]] if on_gpu else [memory["total"] - memory["reserve"]]
    return [name, *(_gib(size) for size in [*(memory[part] for part in PARTS), *sums])]


def _layout_words(layout: dict[str, Any]) -> str:
    return (
        f"TP {layout['tensor']}, PP {layout['pipeline']}, CP {layout['context']}, DP {layout['data']}, "
        + (f"EP {layout['expert']}, " if layout["expert"] > 1 else "")
        + f"micro batch {layout['micro_batch_size']}, recompute {layout['recompute']}"
    )


def _layouts(plan: dict[str, Any]) -> list[str]:
    layouts, present = plan["layouts"], plan["layout"]
    lines = []
    if plan["cluster"]["gpu"] is not None:
        experts = {"expert": "EP"} if plan["models"]["teacher"]["num_moe_experts"] else {}
        columns = {"tensor": "TP", "pipeline": "PP", "context": "CP", "data": "DP", **experts}
        columns |= {"micro_batch_size": "micro batch", "recompute": "recompute"}
        rows = [["", *columns.values(), "GiB"]]
        shown = layouts[:LAYOUTS_SHOWN]
        for layout in shown if present in shown else [*shown, present]:
            mark = "present" if layout == present else ""
            rows.append([mark, *(str(layout[key]) for key in columns), _gib(layout["peak"])])
        lines = [
            f"layouts that divide everything and fit: {len(layouts)}; best first: no recompute, least TP x PP x CP,",
            "TP before CP before PP, the largest micro batch",
            *_columns(rows),
        ]
    reasons = plan["undivided"]
    if reasons:
        more = len(reasons) - UNDIVIDED_SHOWN
        lines += ["not possible:", *(f"  {reason}" for reason in reasons[:UNDIVIDED_SHOWN])]
        lines += [f"  and {more} more (--json has all)"] if more > 0 else []
    return lines


def _disk(plan: dict[str, Any]) -> list[str]:
    disk = plan["disk"]
    rows = [["GiB on disk", *disk], ["", *(_gib(size) for size in disk.values())]]
    return [*_columns(rows), "tokens: as many as distillation reads, each once (an assumption); teacher in bf16"]


def _notes(plan: dict[str, Any]) -> list[str]:
    sentences = [*(f"warning: {warning}" for warning in plan["warnings"]), _verdict(plan)]
    return [line for text in sentences for line in WRAP.wrap(text)]


def _verdict(plan: dict[str, Any]) -> str:
    if plan["fits"] is None:
        return "whether it fits is not known: state cluster.gpu (name, memory_gib, bf16_tflops)"
    if plan["fits"]:
        return f"fits: {_gib(_peak(plan))} of {_gib(plan['cluster']['gpu']['memory_bytes'])} GiB"
    return f"does not fit: {plan['fix']}"


def _peak(plan: dict[str, Any]) -> int:
    other_memories = [memory for memories in _others(plan).values() for memory in memories]
    return max(memory["total"] for memory in [*plan["memory"]["distill"], plan["memory"]["prune"], *other_memories])


def _others(plan: dict[str, Any]) -> dict[str, list[dict[str, int]]]:
    """The memory of what trains or runs the teacher besides the last distillation, where a run has such stages."""
    return {stage: memory for stage, memory in plan["memory"].items() if stage not in ("distill", "prune")}


def _fullest(memory: list[dict[str, int]]) -> dict[str, int]:
    return max(memory, key=lambda rank: rank["total"])


def _hours_in_all(plan: dict[str, Any]) -> str:
    known = [stage for stage in plan["stages"] if stage["hours"] is not None]
    if not known:
        return "hours not estimated"
    hours, gpu_hours = (sum(stage[key] for stage in known) for key in ("hours", "gpu_hours"))
    jobs = sum(stage["jobs"] or 0 for stage in known)
    return (
        f"{_number(hours)} hours, {_number(gpu_hours)} GPU-hours"
        f" at an assumed {plan['cluster']['gpu']['utilisation']:.0%} of its peak"
        + (f", at least {jobs} jobs of {plan['cluster']['time_limit']}" if jobs else "")
    )


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines, the first column to the left and the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _count(number: float) -> str:
    """A count for people: `8.19 B`, `5.25 M`."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f} {letter}" if number < 100 * size else f"{number / size:.0f} {letter}"
    return f"{number:.0f}"


def _giga(flops: float) -> str:
    return f"{flops / 1e9:.3g}"


def _gib(size: float) -> str:
    """Bytes in GiB: two decimals where they matter."""
    return _number(size / GIB)


def _number(value: float) -> str:
    return f"{value:,.1f}" if value >= 10 else f"{value:.2f}"
