"""Where the time of a training step goes: kernels of a torch.profiler trace by what they compute.

A trace is the JSON that `profile.export_chrome_trace` writes (Kineto): kernels have a `correlation` with the call that
launched them, and that call lies within ranges of `torch.profiler.record_function` on its thread. Ranges decide first:
what the loss and the optimizer launch is theirs, matrix products included. Names decide the rest.
"""

from __future__ import annotations

import bisect
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

# Names of ranges that the benchmark opens, which are groups themselves.
LOSS, OPTIMIZER = "loss", "optimizer"
# Groups by kernel name; the first that matches. cuBLAS names: nvjet_* (13), *gemm* and cutlass (12 and before). cuDNN's
# attention: *sdpa*, *fmha*, *flash*; Transformer Engine's unfused one: *softmax*.
GROUPS = (
    ("communication", re.compile("nccl|all_reduce|allreduce", re.I)),
    ("attention", re.compile("flash|fmha|sdpa|attention|softmax|attn", re.I)),
    ("matrix products", re.compile("gemm|gemv|cutlass|nvjet|cublas|xmma|matmul|splitk", re.I)),
    ("copies", re.compile("memcpy|memset", re.I)),
)
# All other kernels: norms, activations, rotations, casts, sums.
REST = "elementwise"
_KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")


def seconds_by_group(events: Iterable[dict[str, Any]]) -> tuple[dict[str, float], float]:
    """Return the seconds of the kernels of each group, and the seconds in which any kernel ran.

    Kernels of several streams may overlap, so that groups may add up to more than the latter.

    Args:
        events: `traceEvents` of the trace; times in microseconds.
    """
    kernels, launches, ranges = [], {}, []
    for event in events:
        category = event.get("cat")
        if category in _KERNELS:
            kernels.append(event)
        elif category in _LAUNCHES and "correlation" in event.get("args", {}):
            launches[event["args"]["correlation"]] = event
        elif category == "user_annotation" and event["name"] in (LOSS, OPTIMIZER):
            ranges.append(event)
    index = _Ranges(ranges)
    seconds: Counter[str] = Counter()
    for kernel in kernels:
        launch = launches.get(kernel.get("args", {}).get("correlation"))
        group = (index.find(launch) if launch else None) or group_of(kernel["name"])
        seconds[group] += kernel["dur"] / 1e6
    return dict(seconds), _union((event["ts"], event["ts"] + event["dur"]) for event in kernels) / 1e6


def group_of(name: str) -> str:
    """Return the group of a kernel by its name alone."""
    return next((group for group, pattern in GROUPS if pattern.search(name)), REST)


class _Ranges:
    """Finds the range in which a launch lies. Ranges of a thread do not overlap."""

    def __init__(self, ranges: list[dict[str, Any]]) -> None:
        self.by_thread: dict[tuple[Any, Any], list[tuple[float, float, str]]] = {}
        for event in ranges:
            span = (event["ts"], event["ts"] + event["dur"], event["name"])
            self.by_thread.setdefault((event["pid"], event["tid"]), []).append(span)
        for spans in self.by_thread.values():
            spans.sort()

    def find(self, launch: dict[str, Any]) -> str | None:
        spans = self.by_thread.get((launch["pid"], launch["tid"]), [])
        place = bisect.bisect_right(spans, launch["ts"], key=lambda span: span[0]) - 1
        return spans[place][2] if place >= 0 and launch["ts"] <= spans[place][1] else None


def _union(intervals: Iterable[tuple[float, float]]) -> float:
    """Return the length of what the intervals cover."""
    covered, until = 0.0, float("-inf")
    for start, end in sorted(intervals):
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return covered
