"""The loss with both output layers, forward and backward: time, peak memory and error.

Next to it whole logits in fp32 with autograd, torch.compile of that, and the roofline: the matrix products alone at the
card's rate. Ways to compute the same loss take turns, so that a change of the clock meets all of them.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from prune_distill.nemo import devices
from prune_distill.schema import Divergence, KdConfig, LossImplementation
from prune_distill.units import GIB
from tests.benchmarks.gpu.figures import Figures
from tests.benchmarks.gpu.machine import data_sheet
from tests.helpers import plain_loss
from tests.helpers.plain_loss import Heads

Work = Callable[[], Any]


@dataclass(frozen=True)
class Sizes:
    tokens: int
    hidden: int
    vocabularies: tuple[int, int]
    chunks: tuple[int, ...]
    checked: int
    square: int
    rounds: int


REAL = Sizes(8192, 4096, (151_936, 128_256), (256, 512, 1024, 2048, 4096, 8192), 512, 8192, 7)
TOY = Sizes(64, 32, (509, 401), (16, 64), 32, 128, 2)
# Seconds that torch.compile may take before the first result.
COMPILE_SECONDS = 30.0


def cases(sizes: Sizes) -> dict[str, tuple[int, KdConfig]]:
    """Vocabulary and loss by name. The last has the sizes of Liger's published figures."""
    first, second = sizes.vocabularies
    half = {"kd_weight": 0.5, "lm_weight": 0.5}
    return {
        "forward_kl": (first, KdConfig()),
        "forward_kl_ce": (first, KdConfig(**half)),
        "jsd_ce": (second, KdConfig(Divergence.jensen_shannon, **half)),
    }


def measure(figures: Figures) -> None:
    sizes, device = TOY if figures.toy else REAL, devices.torch_device()
    rate = _product_rate(figures, sizes, device)
    for name, (vocabulary, config) in cases(sizes).items():
        given = plain_loss.random_heads(sizes.tokens, sizes.hidden, vocabulary, device, torch.bfloat16)
        floor = _roofline(figures, f"loss/{name}", sizes, vocabulary, rate)
        _compare(figures, f"loss/{name}", _ways(given, config, sizes), sizes.rounds, floor)
        _errors(figures, f"loss/{name}", given.first(sizes.checked), config)
        del given
        _empty_cache()
    # Last: the compiler takes its time, and may not work at all.
    for name, (vocabulary, config) in cases(sizes).items():
        if figures.left < COMPILE_SECONDS:
            figures.missing(f"loss/{name}/torch.compile/time", "ms", "no time left")
            continue
        given = plain_loss.random_heads(sizes.tokens, sizes.hidden, vocabulary, device, torch.bfloat16)
        # The compiler of kernels takes half a minute on a CPU.
        backend = "eager" if figures.toy else "inductor"
        compiled = torch.compile(plain_loss.plain_loss, dynamic=False, backend=backend)
        ways = {"torch.compile": _call(compiled, given, config)}
        floor = figures.value(f"loss/{name}/roofline")
        _compare(figures, f"loss/{name}", ways, sizes.rounds, floor)
        del given
        _empty_cache()


def _ways(given: Heads, config: KdConfig, sizes: Sizes) -> dict[str, Work]:
    ways = {
        f"{implementation.value}_{chunk}": _call(
            plain_loss.chunked_loss,
            given,
            dataclasses.replace(config, chunk_tokens=chunk, implementation=implementation),
        )
        for implementation in _implementations()
        for chunk in sizes.chunks
    }
    return {**ways, "plain": _call(plain_loss.plain_loss, given, config)}


def _implementations() -> list[LossImplementation]:
    """The library's ways to compute the loss that this device can run."""
    on_gpu = devices.torch_device() != "cpu"
    return [LossImplementation.chunked, *([LossImplementation.triton] if on_gpu else [])]


def _call(loss: Callable[[Heads, KdConfig], Any], given: Heads, config: KdConfig) -> Work:
    """Return a function that computes loss and gradients, which are released when it returns."""

    def work() -> None:
        loss(given.as_parameters(), config).backward()

    return work


def _compare(figures: Figures, name: str, ways: dict[str, Work], rounds: int, floor: float) -> None:
    """Add time and peak memory of each way; one that fails, such as for lack of memory, is left out."""
    peaks: dict[str, int] = {}
    for way, work in ways.items():
        if figures.left < 0:
            figures.missing(f"{name}/{way}/time", "ms", "no time left")
            continue
        try:
            work()
            _, peaks[way] = devices.measure_peak_memory(work)
        except Exception as fault:  # the other ways are still measured
            figures.missing(f"{name}/{way}/time", "ms", f"{type(fault).__name__}: {str(fault).splitlines()[0][:200]}")
            _empty_cache()
    times: dict[str, list[float]] = {way: [] for way in peaks}
    for _ in range(rounds if figures.left > 0 else 1):
        for way in times:
            times[way].append(timed(ways[way]))
    how = "forward and backward, bf16 inputs; median of interleaved rounds by CUDA events"
    for way, own in times.items():
        figures.add(f"{name}/{way}/time", median(own), "ms", how)
        figures.add(f"{name}/{way}/times_the_roofline", median(own) / floor, "x", "time / roofline")
        memory = "torch.cuda.max_memory_allocated above the inputs; the bf16 gradients are among it"
        figures.add(f"{name}/{way}/peak_memory", peaks[way] / GIB, "GiB", memory)


def timed(work: Work) -> float:
    """Return the milliseconds of a call: between two CUDA events, or on a CPU by the clock."""
    if devices.torch_device() == "cpu":
        started = time.perf_counter()
        work()
        return (time.perf_counter() - started) * 1e3
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end))


def _product_rate(figures: Figures, sizes: Sizes, device: str) -> float:
    """Add and return the FLOP/s of a large square product in bf16."""
    left, right = (torch.randn(sizes.square, sizes.square, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = [timed(lambda: left @ right) for _ in range(3 + sizes.rounds)][3:]
    rate = 2 * sizes.square**3 / (median(times) / 1e3)
    how = f"bf16 product of two matrices of {sizes.square} x {sizes.square}, median of {len(times)}"
    figures.add("loss/matrix_product", rate / 1e12, "TFLOP/s", how)
    return rate


def _roofline(figures: Figures, name: str, sizes: Sizes, vocabulary: int, rate: float) -> float:
    """Add and return the milliseconds that no implementation with these products can be below.

    Matrix products: 2 n h V for the logits of each model, and as much for each of the student's two gradients. Bytes:
    three reads of an output weight and one write of its gradient; the logits need not leave the chip.
    """
    n, h = sizes.tokens, sizes.hidden
    flop, moved = 8 * n * h * vocabulary, 2 * h * (4 * vocabulary + 4 * n)
    floor = flop / rate * 1e3
    how = f"{flop / 1e12:.2f} TFLOP of matrix products at the measured rate of the square product"
    figures.add(f"{name}/roofline", floor, "ms", how)
    sheet = data_sheet(devices.device_name())
    if sheet is not None:
        at_peak = max(flop / (sheet["bf16_tflops"] * 1e12), moved / (sheet["memory_gbs"] * 1e9)) * 1e3
        how = f"the same at the data sheet's {sheet['bf16_tflops']} TFLOP/s, or {moved / 1e9:.1f} GB at its bandwidth"
        figures.add(f"{name}/roofline_of_the_data_sheet", at_peak, "ms", how)
    return floor


def _errors(figures: Figures, name: str, given: Heads, config: KdConfig) -> None:
    """Add the errors of loss and gradients against float64, on some tokens and the whole vocabulary."""
    tokens = len(given.hidden)
    how = f"|found - float64| / |float64| on {tokens} tokens; float64 takes the bf16 inputs as they are stored"
    config = dataclasses.replace(config, chunk_tokens=max(1, tokens // 4))
    try:
        exact = plain_loss.exact_gradients(given, config)
        found = {
            way.value: plain_loss.chunked_gradients(given, dataclasses.replace(config, implementation=way)).errors(
                exact
            )
            for way in _implementations()
        }
        found["plain"] = plain_loss.plain_gradients(given, config).errors(exact)
        found["float64_rounded_to_bf16"] = exact.rounded(torch.bfloat16).errors(exact)
    except torch.OutOfMemoryError as fault:
        figures.missing(f"{name}/error", "", f"out of memory: {str(fault).splitlines()[0][:200]}")
        return
    loss = float(exact.loss) / tokens
    figures.add(f"{name}/loss", loss, "nats per token", "float64; the closer the models are, the larger are the errors")
    for way, errors in found.items():
        for part, error in errors.items():
            figures.add(f"{name}/{way}/error_of_{part}", error, "", how)


def _empty_cache() -> None:
    if devices.torch_device() == "cuda":
        torch.cuda.empty_cache()
