"""A plan as JSON, as the whole table that `launch.plan` prints, and as the few lines that `launch.run` starts with."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence

from launch.planning.layouts import Layout
from launch.planning.memory import Memory, fullest
from launch.planning.plan import CachedLogits, Model, Plan, SourceTeacher
from launch.planning.what_if import Variant, to_notes, to_rows
from prune_distill.schema import Gpu
from prune_distill.schema.run import LAYOUT
from prune_distill.units import GIB

COLUMNS = 100
# Paths and key=value may be copied from a line: they are not cut.
WRAP = textwrap.TextWrapper(COLUMNS, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
LAYOUTS_SHOWN = 6
RUNNERS_UP = 2
UNDIVIDED_SHOWN = 4
SIZES = {
    "layers": "num_layers",
    "hidden": "hidden_size",
    "ffn": "ffn_hidden_size",
    "heads": "num_attention_heads",
    "groups": "num_query_groups",
}
# Model-FLOPs utilization of published distillations on H100s; docs/planning.md has the sources.
PUBLISHED_DISTILLATIONS = {
    "Qwen3-8B to 6B": 0.23,
    "Nemotron-Nano-9B-v2 to 7B": 0.18,
    "Nemotron-3-Nano-30B-A3B to 22B": 0.08,
}
# Parameters of a teacher below which those say nothing.
SMALLEST_COMPARED = 1e9
# Of a mixture: its experts, the FFN of each, and how many a token goes through.
SIZES_OF_EXPERTS = {
    "experts": "num_moe_experts",
    "expert ffn": "moe_ffn_hidden_size",
    "top": "moe_router_topk",
}


def to_json(plan: Plan) -> dict[str, object]:
    """A plan as plain data: the object that `launch.plan --json` prints, whose keys programs read."""
    cluster, work = plan.cluster, plan.work
    on_gpu = cluster.gpu is not None
    memory = {stage: [_memory_to_json(rank, on_gpu) for rank in ranks] for stage, ranks in plan.memory.items()}
    return {
        "experiment": plan.experiment,
        "cluster": {
            "name": cluster.name,
            "nodes": cluster.nodes,
            "devices_per_node": cluster.devices_per_node,
            "gpu": None if cluster.gpu is None else _gpu_to_json(cluster.gpu, plan.mfu),
            "time_limit": cluster.time_limit,
            "ranks": plan.ranks,
        },
        "models": {
            "teacher": _model_to_json(plan.teacher),
            "original": None if plan.original is None else _model_to_json(plan.original),
            "student": _model_to_json(plan.student),
            "source_teachers": {
                name: {**vars(teacher), "model": _model_to_json(teacher.model)}
                for name, teacher in plan.source_teachers.items()
            },
            "candidates": None if plan.candidates is None else dataclasses.asdict(plan.candidates),
            "cut": plan.cut,
        },
        "training": {
            **dataclasses.asdict(work),
            "flops_a_token": {**dataclasses.asdict(work.flops_a_token), "total": work.flops_a_token.total},
        },
        "fp8": plan.fp8,
        "signal": None if plan.signal is None else dataclasses.asdict(plan.signal),
        "stages": [dataclasses.asdict(stage) for stage in plan.stages],
        "partial": [dataclasses.asdict(part) for part in plan.partial],
        "memory": {**memory, "prune": memory["prune"][0]},
        "automatic": plan.automatic,
        "layout": _layout_to_json(plan.layout),
        "loss_chunk": plan.loss_chunk,
        "step": None if plan.step is None else {**plan.step.parts, "total": plan.step.total},
        "layouts": [_layout_to_json(layout) for layout in plan.layouts],
        "undivided": plan.undivided,
        "kv_cache": None if plan.kv_cache is None else dataclasses.asdict(plan.kv_cache),
        "disk": plan.disk.sizes,
        "warnings": plan.warnings,
        "fits": plan.fits,
        "impossible": plan.impossible,
        "fix": plan.fix,
    }


def _gpu_to_json(gpu: Gpu, mfu: float | None) -> dict[str, object]:
    return {
        "name": gpu.name,
        "memory_bytes": round(gpu.memory_gib * GIB),
        "bf16_flops": gpu.bf16_tflops * 1e12,
        "utilisation": mfu,
    }


def _model_to_json(model: Model) -> dict[str, object]:
    counts = {"parameters": model.parameters, "active_parameters": model.active_parameters}
    return {**counts, **dataclasses.asdict(model.shape)}


def _memory_to_json(memory: Memory, on_gpu: bool) -> dict[str, int]:
    # The reserve is an assumption about CUDA.
    reserve = memory.reserve if on_gpu else 0
    return {**memory.parts, "reserve": reserve, "total": memory.tensors + reserve}


def _layout_to_json(layout: Layout) -> dict[str, object]:
    return {**dataclasses.asdict(layout), "recompute": layout.recompute.value}


def to_table(plan: Plan, variants: Sequence[Variant] = ()) -> str:
    """All of a plan, for a terminal of 100 columns; `variants` of `launch.planning.what_if`."""
    sections = [section(plan) for section in (_heading, _models, _time)]
    sections += [_variants(variants), *(section(plan) for section in (_memory, _layouts, _serving, _disk, _notes))]
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def _variants(variants: Sequence[Variant]) -> list[str]:
    """What other lengths and variants take, with the present layout."""
    rows = to_rows(variants)
    return [*(_columns(rows) if rows else []), *(line for note in to_notes(variants) for line in WRAP.wrap(note))]


def summarize(plan: Plan) -> list[str]:
    """A plan in a few lines; those on memory and time only where a GPU is stated."""
    most = "" if plan.candidates is None else "at most "
    pruned = plan.original or plan.teacher
    taught = f", taught by {_count(plan.teacher.parameters)}" if plan.original else ""
    if plan.source_teachers:
        own = [
            f"{_count(teacher.model.parameters)} ({', '.join(teacher.sources)})"
            for teacher in plan.source_teachers.values()
        ]
        taught += f"{' and' if taught else ', taught by'} {', '.join(own)}"
    lines = [
        f"plan: {_count(pruned.parameters)} -> {most}{_count(plan.student.parameters)} parameters"
        f" ({-plan.cut:.0%}){taught}, {plan.work.steps:,} steps, {_count(plan.work.tokens)} tokens"
    ]
    gpu = plan.cluster.gpu
    if gpu is not None:
        memory = f"{_gib(plan.peak)} of {_number(gpu.memory_gib)} GiB a GPU ({gpu.name})"
        lines.append(f"plan: {memory}, {_total_hours(plan, gpu)}")
    lines += [f"plan: {line}" for line in _choice(plan)]
    lines.append(f"plan: {_gib(plan.disk.total)} GiB on disk, {_gib(plan.disk.free)} GiB are free")
    if plan.fits is False:
        lines.append(f"warning: the plan does not fit: {plan.fix}")
    return lines + [f"warning: {warning}" for warning in plan.warnings]


def _choice(plan: Plan) -> list[str]:
    """The layout that was chosen, why, and those that come next; nothing where all of it was set."""
    if not any(key.removeprefix("distill.") in LAYOUT for key in plan.automatic):
        return []
    gpu, present = plan.cluster.gpu, plan.layout
    if gpu is None:
        return [f"chosen: {_describe(present)}; the least parallelism, as cluster.gpu is not stated"]
    if present.seconds is None:
        return [f"chosen: {_describe(present)}; the best that leaves 5 % of the memory free"]
    why = f"{_number(present.seconds)} s a step, the fastest estimate of those that leave 5 % of the memory free"
    others = [layout for layout in plan.layouts if layout != present and layout.seconds is not None]
    following = [
        f"{_describe(layout)}: {_number(layout.seconds)} s, {_gib(layout.peak)} GiB"
        for layout in others[:RUNNERS_UP]
        if layout.seconds is not None
    ]
    return [f"chosen: {_describe(present)}; {why}", *(f"  other layouts: {layout}" for layout in following)]


def _total_hours(plan: Plan, gpu: Gpu) -> str:
    hours = [stage.hours for stage in plan.stages if stage.hours is not None]
    if not hours:
        return "hours not estimated"
    gpu_hours = sum(stage.gpu_hours or 0 for stage in plan.stages)
    jobs = sum(stage.jobs or 0 for stage in plan.stages)
    how = f"at {gpu.mfu:.0%} of its peak (cluster.gpu.mfu)" if gpu.mfu else "estimated"
    if not gpu.mfu and plan.mfu is not None:
        how += f" ({plan.mfu:.0%} of its peak)"
    cost = f", cost {_money(gpu_hours * gpu.cost_per_hour)}" if gpu.cost_per_hour else ""
    return f"{_number(sum(hours))} hours, {_number(gpu_hours)} GPU-hours {how}{cost}" + (
        f", at least {jobs} jobs of {plan.cluster.time_limit}" if jobs else ""
    )


def _heading(plan: Plan) -> list[str]:
    cluster, gpu = plan.cluster, plan.cluster.gpu
    stated = "GPU not stated (cluster.gpu is null)"
    if gpu is not None:
        stated = f"{gpu.name}, {_number(gpu.memory_gib)} GiB, {gpu.bf16_tflops:.0f} TFLOP/s in bf16"
    limit = f", at most {cluster.time_limit} a job" if cluster.time_limit else ""
    return [
        f"{plan.experiment} on {cluster.name}: {cluster.nodes} x {cluster.devices_per_node} ranks{limit}",
        f"each rank: {stated}",
    ]


def _models(plan: Plan) -> list[str]:
    work, flops = plan.work, plan.work.flops_a_token
    own = {name: teacher.model for name, teacher in plan.source_teachers.items()}
    models = {"teacher": plan.teacher, **own, "original": plan.original, "student": plan.student}
    mixture = _has_experts(plan)
    sizes = SIZES | (SIZES_OF_EXPERTS if mixture else {})
    rows = [["model", "parameters", *(["active"] if mixture else []), *sizes]]
    for name, model in models.items():
        if model is None:
            continue
        counts = [model.parameters, *([model.active_parameters] if mixture else [])]
        shape = [str(getattr(model.shape, size)) for size in sizes.values()]
        rows.append([name, *(f"{count:,}" for count in counts), *shape])
    again = f" + {_giga(flops.recompute)} again (recompute)" if flops.recompute else ""
    searched = []
    if plan.candidates is not None:
        searched = [
            f"student: the largest of {plan.candidates.shapes} candidates, of which the run chooses; they have "
            f"{plan.candidates.least:,} to {plan.candidates.most:,} parameters"
        ]
    taught = [
        line
        for name, teacher in plan.source_teachers.items()
        for line in WRAP.wrap(
            f"{name}: {teacher.hf_path}, for the sequences of {', '.join(teacher.sources)} ({_caching(teacher)})"
        )
    ]
    return [
        *_columns(rows),
        *taught,
        *searched,
        f"pruning removes {plan.cut:.1%} of the parameters{' of the original' if plan.original else ''}",
        "",
        f"distillation: {work.steps:,} steps x {work.tokens_a_step:,} tokens = {_count(work.tokens)} tokens",
        f"GFLOP a token: {_giga(flops.student)} student + {_giga(flops.teacher)} teacher{again}"
        f" = {_giga(flops.total)}; in all {work.flops:.3g} FLOP",
        *_cached_logits(plan),
    ]


def _has_experts(plan: Plan) -> bool:
    models = (plan.teacher, plan.original, plan.student, *(teacher.model for teacher in plan.source_teachers.values()))
    return any(model.shape.num_moe_experts for model in models if model is not None)


def _cached_logits(plan: Plan) -> list[str]:
    signal = plan.signal
    if signal is None:
        return []
    who, students = f"the teacher runs once ({_caching(signal)})", " (a successive halving's candidates)"
    if plan.source_teachers:
        of_run = f" (that of the run with {_caching(signal)})" if "cache_logits" in plan.memory else ""
        who, students = f"each teacher runs once over its sources{of_run}", ""
    text = (
        f"{who}, {_giga(signal.flops_a_token)} GFLOP a token, and keeps its {signal.top_k} most "
        f"probable tokens, at most {_gib(signal.bytes)} GiB; every further student of this run"
        f"{students} saves {signal.spared_share:.0%} of the FLOP of a step with the teacher"
    )
    return WRAP.wrap(text)


def _caching(teacher: CachedLogits | SourceTeacher) -> str:
    return f"TP {teacher.tensor}, PP {teacher.pipeline}, micro batch {teacher.micro_batch_size}"


def _time(plan: Plan) -> list[str]:
    gpu, limit = plan.cluster.gpu, plan.cluster.time_limit
    priced = gpu is not None and gpu.cost_per_hour is not None
    rows = [["stage", "ranks", "hours", "GPU-hours", *(["cost"] if priced else [])]]
    rows[0] += [f"jobs of {limit}"] if limit else []
    for stage in plan.stages:
        if stage.hours is not None and stage.gpu_hours is not None:
            cost = [_money(stage.cost)] if stage.cost is not None else []
            jobs = [f"{stage.jobs:,}"] if limit else []
            rows.append([stage.stage, str(stage.ranks), _number(stage.hours), _number(stage.gpu_hours), *cost, *jobs])
    if gpu is None or len(rows) == 1:
        return [f"hours: not estimated ({_why_no_hours(gpu)})", *(_partial(plan) if plan.partial else [])]
    return [*_speed(plan, gpu), *_columns(rows), *_partial(plan)]


def _partial(plan: Plan) -> list[str]:
    """The stages of which a part is estimated, which no sum of hours contains, and what is not estimated."""
    parts = plan.partial
    rows = [["known in part", "ranks", ""]]
    rows += [[part.stage, str(part.ranks), f"{part.bound} {_duration(part.seconds)}"] for part in parts]
    lines = [
        f"{row}  {text}".rstrip()
        for row, text in zip(_columns(rows), ["", *(part.work for part in parts)], strict=True)
    ]
    known = {part.stage: f"{part.omitted} of {part.stage.partition('.')[0]}" for part in parts}
    missing = [known.get(stage.stage, stage.stage) for stage in plan.stages if stage.hours is None]
    return [*(lines if parts else []), *WRAP.wrap(f"not estimated: {', '.join(dict.fromkeys(missing))}")]


def _why_no_hours(gpu: Gpu | None) -> str:
    if gpu is None:
        return "cluster.gpu is null"
    if gpu.mfu is None and None in (gpu.memory_gbs, gpu.link_gbs):
        return "state cluster.gpu.memory_gbs and link_gbs, or cluster.gpu.mfu if it was measured"
    return "cluster.gpu states the speed of bf16 only"


def _speed(plan: Plan, gpu: Gpu) -> list[str]:
    """What the hours rest on."""
    if gpu.mfu is not None:
        return [f"time, at {gpu.mfu:.0%} of the GPU's peak (cluster.gpu.mfu)"]
    step, mfu = plan.step, plan.mfu
    if step is None or mfu is None:
        return ["time, computed from shapes and the GPU's figures"]
    parts = sorted(step.parts.items(), key=lambda part: -part[1])
    shares = ", ".join(f"{name.replace('_', ' ')} {value / step.total:.0%}" for name, value in parts if value)
    sentences = [
        f"time, computed from shapes, layout and the GPU's figures; not measured: a step of the distillation takes "
        f"{_number(step.total)} s, {mfu:.0%} of the peak (MFU): {shares}",
    ]
    if plan.fp8:
        models = " and ".join(f"the {model} ({scales})" for model, scales in plan.fp8.items())
        sentences.append(f"FP8 products in the layers of {models}; attention, output layers and loss in bf16")
    (hours,) = [stage.hours for stage in plan.stages if stage.stage == "distill"]
    if hours is not None and plan.teacher.parameters >= SMALLEST_COMPARED:
        known = ", ".join(
            f"{share:.0%} ({name}), at which it would take {_number(hours * mfu / share)} hours"
            for name, share in PUBLISHED_DISTILLATIONS.items()
        )
        sentences.append(f"published distillations on H100s, whose layouts are not known, reached {known}")
    if _has_experts(plan):
        sentences.append("mixtures of experts: one published pretraining on H100s took 2.2 times the estimate")
    return [line for text in sentences for line in WRAP.wrap(text)]


def _memory(plan: Plan) -> list[str]:
    on_gpu = plan.cluster.gpu is not None
    rows = [["GiB a rank", *Memory().parts, *(["reserve*", "total"] if on_gpu else ["sum"])]]

    def add(name: str, memory: Memory) -> None:
        sums = [memory.reserve, memory.total] if on_gpu else [memory.tensors]
        rows.append([name, *(_gib(size) for size in [*memory.parts.values(), *sums])])

    for stage, memory in plan.memory.items():
        if stage != "distill":
            add(stage, fullest(memory))
            continue
        for number, rank in enumerate(memory):
            # Stages between the first and the last are like one another, and need less than the first.
            if number in (0, 1, len(memory) - 1):
                add("distill" if len(memory) == 1 else f"distill, stage {number}", rank)
    return [
        f"memory at the fullest moment, with {_describe(plan.layout)}",
        *_columns(rows),
        f"loss: logits{_chunk(plan)} and the output weight's gradient",
        *(
            ["weights, teacher: with copies in FP8: 2 bytes a product's weight (student), 1 (teacher)"]
            if plan.fp8
            else []
        ),
        *(["* assumed: 2 GiB for CUDA, NCCL and workspaces, 5 % for fragmentation"] if on_gpu else []),
    ]


def _chunk(plan: Plan) -> str:
    if plan.loss_chunk is None:
        return ""
    chosen = " (chosen)" if "distill.kd.chunk_tokens" in plan.automatic else ""
    return f" of {plan.loss_chunk:,} tokens at a time{chosen}"


def _describe(layout: Layout) -> str:
    return (
        f"TP {layout.tensor}, PP {layout.pipeline}, CP {layout.context}, DP {layout.data}, "
        + (f"EP {layout.expert}, " if layout.expert > 1 else "")
        + f"micro batch {layout.micro_batch_size}, recompute {layout.recompute.value}"
    )


def _layouts(plan: Plan) -> list[str]:
    layouts, present = plan.layouts, plan.layout
    lines = []
    if plan.cluster.gpu is not None:
        experts = ["EP"] if _has_experts(plan) else []
        timed = present.seconds is not None
        rows = [["", "TP", "PP", "CP", "DP", *experts, "micro batch", "recompute", "GiB"]]
        rows[0] += ["s a step"] if timed else []
        shown = layouts[:LAYOUTS_SHOWN]
        for layout in shown if present in shown else [*shown, present]:
            sizes = [layout.tensor, layout.pipeline, layout.context, layout.data]
            sizes += [*([layout.expert] if experts else []), layout.micro_batch_size]
            mark = "present" if layout == present else ""
            seconds = [_number(layout.seconds)] if layout.seconds is not None else []
            rows.append([mark, *map(str, sizes), layout.recompute.value, _gib(layout.peak), *seconds])
        order = "fastest first" if timed else "best first: no recompute, least TP x PP x CP, TP before CP before PP"
        lines = [
            f"layouts that divide everything and fit: {len(layouts)}; {order}",
            *_columns(rows),
            *(line for text in _choice(plan)[:1] for line in WRAP.wrap(text)),
        ]
    if plan.undivided:
        more = len(plan.undivided) - UNDIVIDED_SHOWN
        lines += ["not possible:", *(f"  {reason}" for reason in plan.undivided[:UNDIVIDED_SHOWN])]
        lines += [f"  and {more} more (--json has all)"] if more > 0 else []
    return lines


def _serving(plan: Plan) -> list[str]:
    cache = plan.kv_cache
    if cache is None:
        return []
    positions = plan.student.shape.max_position_embeddings
    benchmark = "" if cache.benchmark is None else f", {_gib(cache.benchmark)} GiB for the benchmark's sequences"
    halved = ", half of that in the quantized formats" if cache.halved else ""
    text = (
        f"serving: the student's KV cache takes {cache.token / 1024:,.1f} KiB a token in 16 bits{halved}:"
        f" {_gib(cache.longest)} GiB for a sequence of {positions:,} tokens{benchmark}"
    )
    return WRAP.wrap(text)


def _disk(plan: Plan) -> list[str]:
    rows = [["GiB on disk", *plan.disk.sizes], ["", *map(_gib, plan.disk.sizes.values())]]
    return [*_columns(rows), "tokens: as many as distillation reads, each once (an assumption); teacher in bf16"]


def _notes(plan: Plan) -> list[str]:
    gpu = plan.cluster.gpu
    if gpu is None:
        verdict = "whether it fits is not known: choose a GPU, as in cluster.gpu=h200"
    elif plan.fits:
        verdict = f"fits the GPU: {_gib(plan.peak)} of {_number(gpu.memory_gib)} GiB"
    else:
        verdict = f"does not fit the GPU: {plan.fix}"
    sentences = [*(f"warning: {warning}" for warning in plan.warnings), verdict]
    return [line for text in sentences for line in WRAP.wrap(text)]


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


def _duration(seconds: float) -> str:
    """Seconds in the largest unit of which there are two or more."""
    sizes = ((3600, "h"), (60, "min"))
    size, unit = next(((size, unit) for size, unit in sizes if seconds >= 2 * size), (1, "s"))
    return f"{_number(seconds / size)} {unit}"


def _giga(flops: float) -> str:
    return f"{flops / 1e9:.3g}"


def _gib(size: float) -> str:
    """Bytes in GiB: two decimals where they matter."""
    return _number(size / GIB)


def _money(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:,.2f}"


def _number(value: float) -> str:
    return f"{value:,.1f}" if value >= 10 else f"{value:.2f}"
