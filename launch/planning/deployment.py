"""The GPU time of quantization, evaluation and benchmark, as far as a config determines it: of a part of each stage."""

from __future__ import annotations

import math
from dataclasses import dataclass

from launch.planning.disk import teacher_weight_bytes
from launch.planning.hours import ForwardWork, work_seconds
from launch.planning.machine import BF16_BYTES, describe_machine
from prune_distill.config.rules.quantize import NVFP4_BLOCK, Layer, is_kept, linear_layers
from prune_distill.config.values import require
from prune_distill.model.flops import forward_flops
from prune_distill.model.model_size import parameters
from prune_distill.model.student import student_shape
from prune_distill.pipeline.stage import Stage
from prune_distill.pipeline.stages import select_stages
from prune_distill.schema import Engine, ExportDtype, Family, QuantFormat, RunConfig, Shape, Training
from prune_distill.schema.quantize import AWQ_PASSES, AWQ_RANGES, AWQ_TOKENS
from prune_distill.units import GIB

# Sequences on which a written format is compared with its simulation, a forward pass each.
CHECKED_SEQUENCES = 2
# Output channels whose ranges AWQ's search compares at a time; for each such part it quantizes the whole weight
# (modelopt/torch/quantization/model_calib.py:906).
AWQ_ROWS = 1024
# Inputs of the stage evaluate that are no models.
OTHER_INPUTS = ("data", "task_folder", "checkpoints")


@dataclass(frozen=True)
class PartialTime:
    """The time of a part of a stage.

    Attributes:
        bound: "at least", or "about" where `work` says of how much at most.
        seconds: estimated, not measured.
        work: what takes them.
        omitted: what else the stage does, which is not estimated.
    """

    stage: str
    ranks: int
    bound: str
    seconds: float
    work: str
    omitted: str


def estimate_parts(cfg: RunConfig) -> list[PartialTime]:
    """The stages of which a part is known, in order."""
    estimates = {"recipes.quantize": _quantize, "recipes.evaluate": _evaluate, "recipes.benchmark": _benchmark}
    known = [stage for stage in select_stages(cfg) if stage.module in estimates]
    found = (estimates[stage.module](stage, stage.configure(cfg)) for stage in known)
    return [part for part in found if part is not None]


def _quantize(stage: Stage, cfg: RunConfig) -> PartialTime | None:
    """Forward passes over the calibration sequences and those of the check, and the least traffic of AWQ's search.

    Simulated rounding and the work of PyTorch between its kernels are left out.
    """
    (quant_format,), quantize, shape = cfg.quantize.formats, cfg.quantize, student_shape(cfg)
    sequences = calibration_sequences(cfg) + CHECKED_SEQUENCES
    length, micro = quantize.calibration_seq_length, quantize.micro_batch_size
    seconds = _forward_seconds(cfg, [(shape, cfg.model.family)], sequences, length, micro, ranks=1)
    if seconds is None:
        return None
    machine = describe_machine(cfg.cluster)
    searched = quant_format is QuantFormat.int4 and not _is_learned(cfg) and machine is not None
    if searched:
        seconds += require(machine).copy(awq_bytes(cfg))
    work = f"{sequences * length:,} tokens forward{', search of ranges' if searched else ''}"
    sizes = f"{BF16_BYTES * parameters(shape, cfg.model.family) / GIB:.1f} -> {quantized_bytes(cfg) / GIB:.1f} GiB"
    return PartialTime(stage.name, 1, "at least", seconds, f"{work}; {sizes}", "rounding and files")


def quantized_bytes(cfg: RunConfig) -> int:
    """Bytes of the student in the one format of a config, without the scales of channels and tensors."""
    (quant_format,), shape = cfg.quantize.formats, student_shape(cfg)
    blocks = {
        QuantFormat.int4: 1 / 2 + BF16_BYTES / cfg.quantize.int4_group_size,
        QuantFormat.nvfp4: 1 / 2 + 1 / NVFP4_BLOCK,
    }
    quantized = sum(layer.inputs * layer.outputs for layer in _quantized_layers(cfg))
    kept = parameters(shape, cfg.model.family) - quantized
    return round(BF16_BYTES * kept + blocks.get(quant_format, 1) * quantized)


def _quantized_layers(cfg: RunConfig) -> list[Layer]:
    layers = linear_layers(student_shape(cfg), cfg.model.family.traits.gated_mlp)
    return [layer for layer in layers if not is_kept(cfg, layer.name)]


def _is_learned(cfg: RunConfig) -> bool:
    """Whether the student was trained with the one format of a config."""
    return cfg.quantize.formats == [cfg.distill.quantize]


def calibration_sequences(cfg: RunConfig) -> int:
    """Sequences of the forward passes in which the one format of a config is calibrated."""
    (quant_format,), quantize, learned = cfg.quantize.formats, cfg.quantize, _is_learned(cfg)
    if not quant_format.needs_calibration(learned=learned, fp8_kv_cache=quantize.fp8_kv_cache):
        return 0
    if quant_format is not QuantFormat.int4 or learned:
        return quantize.calibration_samples
    return _awq_passes(cfg) * min(quantize.micro_batch_size, quantize.calibration_samples)


def _awq_passes(cfg: RunConfig) -> int:
    """Forward passes of AWQ's search, as prune_distill/quantization/modelopt.py chooses them."""
    batches = math.ceil(cfg.quantize.calibration_samples / cfg.quantize.micro_batch_size)
    return math.ceil(batches / math.ceil(batches / AWQ_PASSES))


def awq_bytes(cfg: RunConfig) -> int:
    """Bytes that AWQ's search of ranges reads and writes at least, in 16 bits.

    In each forward pass each weight is quantized with each range, once for each part of its output channels, and is
    multiplied by the inputs of some tokens, with each range and without rounding; the products are summed.
    """
    passes = _awq_passes(cfg)
    tokens = math.ceil(AWQ_TOKENS / passes)
    accesses = sum(
        layer.inputs * layer.outputs * (AWQ_RANGES * math.ceil(layer.outputs / AWQ_ROWS) + (AWQ_RANGES + 1) * tokens)
        for layer in _quantized_layers(cfg)
    )
    return passes * 2 * BF16_BYTES * accesses


def _evaluate(stage: Stage, cfg: RunConfig) -> PartialTime | None:
    """The held-out losses. Each model but the teacher is compared with the teacher, which runs again each time."""
    evaluate, ranks = cfg.evaluate, stage.ranks(cfg)
    if evaluate.max_sequences is None:
        return None
    student, teacher = (
        (student_shape(cfg), cfg.model.family),
        (require(cfg.teacher_shape), cfg.teacher_family),
    )
    named = {"original": (require(cfg.model.shape), cfg.model.family), "corrected_teacher": teacher}
    inputs = stage.inputs(cfg)
    names = [name for name in inputs if name not in OTHER_INPUTS]
    # Other stages than that of the student only compare with the teacher and the original.
    if "student" not in names:
        names = [name for name in names if name not in ("teacher", "original")]
    others = [named.get(name, student) for name in names if name != "teacher"]
    if "checkpoints" in inputs:
        others += [student] * (cfg.distill.keep_checkpoints + cfg.distill.keep_best)
    models = [*others, *[teacher] * (len(others) + ("teacher" in names))]
    seconds = _forward_seconds(
        cfg, models, evaluate.max_sequences, evaluate.seq_length, evaluate.micro_batch_size, ranks
    )
    if seconds is None:
        return None
    count = len(others) + ("teacher" in names)
    models_measured = "1 model" if count == 1 else f"{count} models"
    work = f"held-out loss of {models_measured}, at most {evaluate.max_sequences:,} sequences"
    return PartialTime(stage.name, ranks, "about", seconds, work, "tasks and samples")


def _forward_seconds(
    cfg: RunConfig, models: list[tuple[Shape, Family]], sequences: int, length: int, micro: int, ranks: int
) -> float | None:
    """Seconds of forward passes in 16 bits of each model over sequences that are shared out over ranks."""
    if teacher_weight_bytes(cfg) != BF16_BYTES or cfg.convert.export_dtype is ExportDtype.fp32:
        return None
    layout = Training(seq_length=length, micro_batch_size=micro)
    total = 0.0
    for shape, family in models:
        flops = sequences * length * forward_flops(shape, family, length)
        seconds = work_seconds(ForwardWork(shape, family, flops, layout, sequential=False), cfg, ranks)
        if seconds is None:
            return None
        total += seconds
    return total


def _benchmark(stage: Stage, cfg: RunConfig) -> PartialTime | None:
    """The time in which requests are sent: vLLM's benchmark sends `requests` over exactly `requests / rate` seconds
    (vllm/benchmarks/serve.py:495)."""
    benchmark = cfg.benchmark
    rates = [rate for rate in benchmark.request_rates if rate is not None]
    if benchmark.engine is not Engine.vllm or not rates:
        return None
    models = len(stage.inputs(cfg))
    seconds = models * benchmark.rounds * sum(benchmark.requests / rate for rate in rates)
    work = f"requests to servers of {models} models at the stated rates"
    return PartialTime(stage.name, 1, "at least", seconds, work, "generation")
