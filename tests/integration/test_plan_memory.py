"""The plan's memory against the tensors of real distillations, on two ranks too, in bf16.

What is compared runs the same code as on a GPU above the kernels: NeMo's model, the precision plugin, Megatron's
gradient buffers and distributed optimizer, NeMo's KD loss. Below, the stand-in for Transformer Engine keeps the same
for its backward passes (in bf16 attention goes through a kernel that stores no scores) with two differences: it keeps
the gathered inputs of sequence-parallel layers, which Transformer Engine gathers again, and no copy of k for the
QK-norm. What data-parallel ranks exchange is left out, which gloo copies and NCCL does not, and so is context
parallelism: the stand-in gathers all keys and values. Not measured either: CUDA context, NCCL, workspaces and
fragmentation, which the plan only assumes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.planning.automatic import compose
from launch.planning.memory import Memory, Models, training_memory
from prune_distill.config.load import save_resolved
from prune_distill.model.student import student_shape
from prune_distill.pipeline.artifact import locate
from prune_distill.schema import RunConfig
from tests.helpers import tiny
from tests.helpers.tolerance import GPU

pytestmark = pytest.mark.skipif(GPU, reason="the probe reads torch's CPU allocator")
STATIC = ("weights", "gradients", "optimizer", "teacher")
# What the plan promises. Seen: at most 10 %.
TOLERANCE = 0.15
# Buffers are padded (64 elements a shard, megatron/core/distributed/param_and_grad_buffer.py), here 0.02 %.
PADDING = 1e-3
# One micro batch of 1024 tokens, enough for activations, loss and weights to count alike.
SETTINGS = (
    *tiny.DEPTH,
    "distill.precision=bf16",
    "distill.max_steps=3",
    "distill.val_every_n_steps=3",
    "distill.micro_batch_size=8",
    "distill.global_batch_size=32",
)
UPSTREAM = "distill.kd.implementation=upstream"
PLAIN_OPTIMIZER = ("distill.use_distributed_optimizer=false", "distill.overlap_param_gather=false")


def measured(finished: Path, run_dir: Path, ranks: int, *more: str) -> tuple[RunConfig, list[dict[str, Any]]]:
    """Return a distillation's config and each rank's measurements, for the model that `finished` pruned."""
    tiny.copy_run(finished, run_dir)
    cfg = compose(tiny.overrides(run_dir, *SETTINGS, f"cluster.devices_per_node={ranks}", *more))
    save_resolved(cfg, run_dir / "resolved.yaml")
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "-m"] if ranks > 1 else []
    probe = ["tests.helpers.memory_probe", "distill", "--config", str(run_dir / "resolved.yaml")]
    command = [sys.executable, "-m", *launcher, *probe]
    done = subprocess.run(command, env=tiny.environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = locate(cfg)["distill"].folder
    return cfg, [json.loads((folder / f"memory-{rank}.json").read_text()) for rank in range(ranks)]


def planned(cfg: RunConfig, ranks: int) -> list[Memory]:
    """By rank."""
    models = Models(cfg.model.family, student_shape(cfg), cfg.model.shape)
    stages = training_memory(cfg.distill, cfg.distill.loss, models, ranks)
    return [stages[rank * len(stages) // ranks] for rank in range(ranks)]


@pytest.mark.parametrize(
    ("ranks", "more"),
    [
        (2, ()),
        (1, ("distill.recompute=full", *PLAIN_OPTIMIZER)),
        (2, ("distill.parallel.pipeline_model_parallel_size=2",)),
        (2, ("distill.kd.lm_weight=0.5",)),
        (2, (UPSTREAM,)),
        (1, ("distill.quantize=int8", "quantize.formats=[int8]", *PLAIN_OPTIMIZER)),
    ],
    ids=["dp2", "recompute", "pp2", "mix", "upstream", "fake_quantization"],
)
def test_the_memory_of_a_rank_matches_the_plan(
    finished: Path, tmp_path: Path, ranks: int, more: tuple[str, ...]
) -> None:
    cfg, found = measured(finished, tmp_path / "run", ranks, *more)
    for plan, real in zip(planned(cfg, ranks), found, strict=True):
        for part in STATIC:
            assert getattr(plan, part) == pytest.approx(real[part], rel=PADDING), part
        assert plan.activations + plan.loss == pytest.approx(real["step"], rel=TOLERANCE)
        assert plan.tensors == pytest.approx(sum(real[part] for part in (*STATIC, "other", "step")), rel=TOLERANCE)


def test_tensor_parallel_ranks_hold_their_share(finished: Path, tmp_path: Path) -> None:
    """The parts, the loss's tensors at the peak, and what autograd keeps: the whole step can't be summed up here."""
    tensor_parallel = ("distill.parallel.tensor_model_parallel_size=2", "distill.global_batch_size=8", UPSTREAM)
    cfg, found = measured(finished, tmp_path / "run", 2, *tensor_parallel)
    tokens = cfg.distill.micro_batch_size * cfg.distill.seq_length
    elements = tokens * tiny.SHAPE["vocab_size"] // 2
    # The stand-in's two norms a layer leave the gathered sequence, twice what a rank's share is.
    gathered = 2 * student_shape(cfg).num_layers * tokens * tiny.SHAPE["hidden_size"] // 2 * 2
    for plan, real in zip(planned(cfg, 2), found, strict=True):
        for part in STATIC:
            assert getattr(plan, part) == pytest.approx(real[part], rel=PADDING), part
        # Logits in bf16 and the loss's tensors in fp32 are the only blocks of these sizes; no rank exchanges them.
        assert plan.loss == sum(real["at_peak"][str(elements * size)] for size in (2, 4))
        # Two of the fp32 tensors are kept for the backward pass.
        kept = real["saved"] - 2 * elements * 4
        assert plan.activations + gathered == pytest.approx(kept, rel=TOLERANCE)
