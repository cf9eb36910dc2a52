"""python -m tests.benchmarks.loss_cost ARM TOKENS: memory and time of one loss with both output layers, as JSON.

Forward and backward: both models' logits, the KL divergence, and the gradients of the student's hidden states and
output weight, in float32 at the vocabulary of Qwen3. ARM is `ours` or `upstream` (ModelOpt's LogitsKLLoss).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

VOCABULARY, HIDDEN, BATCH = 151_936, 1024, 2


def main() -> None:
    import torch

    arm, tokens = sys.argv[1], int(sys.argv[2])
    torch.manual_seed(0)
    states, teacher_states = (torch.randn(tokens // BATCH, BATCH, HIDDEN) for _ in range(2))
    weight, teacher_weight = (0.05 * torch.randn(VOCABULARY, HIDDEN) for _ in range(2))
    states.requires_grad_()
    weight.requires_grad_()
    loss = {"ours": _ours, "upstream": _upstream}[arm]()
    base = _resident_mb()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again (proc(5))
    started = time.perf_counter()
    total = loss((states, weight), (teacher_states, teacher_weight))
    total.backward()
    seconds = time.perf_counter() - started
    peak = _of_status("VmHWM") - base
    print(json.dumps({"seconds": seconds, "peak_mb": peak, "loss": total.item()}))


def _ours() -> Any:
    import torch

    from prune_distill.distillation.kd_loss import distillation_loss
    from prune_distill.distillation.loss_chunk import Head
    from prune_distill.schema import KdConfig

    def loss(student: Any, teacher: Any) -> Any:
        heads = [Head(states.flatten(0, 1), weight) for states, weight in (student, teacher)]
        tokens = heads[0].hidden.shape[0]
        total, _ = distillation_loss(*heads, None, torch.ones(tokens), KdConfig())
        return total / tokens

    return loss


def _upstream() -> Any:
    from prune_distill.nemo import backend

    backend.activate()
    import torch
    from modelopt.torch.distill.plugins.megatron import LogitsKLLoss

    config: Any = SimpleNamespace(tensor_model_parallel_size=1, sequence_parallel=False)
    criterion = LogitsKLLoss(config)

    def loss(student: Any, teacher: Any) -> Any:
        with torch.no_grad():
            teacher_states = torch.nn.functional.linear(*teacher)
        losses, *_ = criterion(torch.nn.functional.linear(*student), teacher_states)
        return losses.mean()

    return loss


def _resident_mb() -> float:
    return _of_status("VmRSS")


def _of_status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field))) / 1024


if __name__ == "__main__":
    main()
