"""The GPU benchmark's own arithmetic: kernels by group, sizes by free memory, parts that end too late; and its loss."""

from __future__ import annotations

import json
import math
from pathlib import Path
from pydoc_data import topics
from typing import Any

import pytest
import torch
import transformers

from launch.environment import ROOT
from prune_distill.schema import KdConfig
from prune_distill.units import GIB
from tests.benchmarks import bench_gpu
from tests.benchmarks.gpu import kernels, loss, machine, models
from tests.benchmarks.gpu.figures import Figures
from tests.helpers.plain_loss import CONFIGS, assert_exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.divergence.value}-{c.temperature}-{c.lm_weight}")
def test_loss_and_gradients_match_float64(config: KdConfig, dtype: torch.dtype) -> None:
    """What tests/gpu/test_loss.py runs on CUDA."""
    assert_exact(config, "cpu", dtype)


def event(category: str, name: str, start: float, length: float, thread: int = 1, **args: Any) -> dict[str, Any]:
    return {"cat": category, "name": name, "ts": start, "dur": length, "pid": 1, "tid": thread, "args": args}


def test_kernels_belong_to_the_range_that_launched_them_or_to_their_name() -> None:
    events = [
        event("user_annotation", "loss", 100, 50),
        event("user_annotation", "ProfilerStep#1", 0, 1000),
        event("cuda_runtime", "cudaLaunchKernel", 10, 5, correlation=1),
        event("cuda_runtime", "cudaLaunchKernel", 120, 5, correlation=2),
        event("cuda_runtime", "cudaLaunchKernel", 120, 5, thread=2, correlation=3),  # backward's thread
        event("cuda_driver", "cuLaunchKernelEx", 160, 5, correlation=4),
        event("kernel", "nvjet_hsh_128x256", 1000, 10, thread=7, correlation=1),
        event("kernel", "nvjet_hsh_128x256", 1010, 20, thread=7, correlation=2),
        event("kernel", "vectorized_elementwise_kernel", 1030, 30, thread=7, correlation=3),
        event("kernel", "cudnn_generated_fort_native_sdpa_sm90_flash_fprop", 1050, 40, thread=8, correlation=4),
        event("gpu_memcpy", "Memcpy DtoH", 2000, 5, thread=7, correlation=99),
    ]
    groups, busy = kernels.seconds_by_group(events)
    expected = {"matrix products": 10, "loss": 20, "elementwise": 30, "attention": 40, "copies": 5}
    assert groups == pytest.approx({name: length * 1e-6 for name, length in expected.items()})
    # 1000 to 1090, where two streams overlap, and the copy.
    assert busy == pytest.approx(95e-6)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix products"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "communication"),
        ("flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel", "attention"),
        ("void transformer_engine::normalization::rmsnorm_fwd_general_kernel", "elementwise"),
        ("Memset (Device)", "copies"),
    ],
)
def test_kernel_names(name: str, group: str) -> None:
    assert kernels.group_of(name) == group


def test_sizes_follow_the_free_memory(tmp_path: Path) -> None:
    small = models.choose(models.SMALL, tmp_path, None, 40 * GIB)
    assert small is not None
    assert (small.layers, small.kept, small.micro_batches) == (28, 19, (4, 2, 1))
    tight = models.choose(models.SMALL, tmp_path, None, 22 * GIB)
    assert tight is not None
    assert max(tight.micro_batches) < 4 or tight.layers < 28
    for gib in (24, 40, 80, 140):
        for model in (models.SMALL, models.BIG):
            run = models.choose(model, tmp_path, None, gib * GIB)
            assert run is None or models.planned_bytes(run) <= gib * GIB
    assert models.choose(models.BIG, tmp_path, None, 16 * GIB) is None


@pytest.mark.parametrize("tied", [True, False])
def test_random_teachers_are_better_than_chance(tmp_path: Path, tied: bool) -> None:
    """And unlike their student: with a loss of 0, steps would multiply zeros."""
    texts = list(topics.topics.values())[:60]
    # Not the toy's hidden size of 64: the inputs of the layers' products then are far below 1.
    sizes = {**models.as_toy(models.SMALL).sizes, "hidden_size": 512, "ffn_hidden_size": 1024}
    models.write_model(tmp_path / "hf", {**sizes, "tie_word_embeddings": tied, "num_layers": 4}, texts)
    teacher = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").float()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = torch.tensor([tokenizer(texts[0])["input_ids"][:200]])
    with torch.no_grad():
        log_p = teacher(ids, use_cache=False).logits[0].log_softmax(-1)
        teacher.model.layers = teacher.model.layers[:3]
        log_q = teacher(ids, use_cache=False).logits[0].log_softmax(-1)
    mean = -log_p[:-1].gather(-1, ids[0, 1:, None]).mean().item()
    assert mean < math.log(1000) - 0.5
    assert (log_p.exp() * (log_p - log_q)).sum(-1).mean().item() > 1e-4


def test_every_gpu_of_the_configuration_is_recognized() -> None:
    names = {"NVIDIA H100 80GB HBM3": "h100_sxm", "NVIDIA H100 PCIe": "h100_pcie", "NVIDIA H200": "h200"}
    names |= {"NVIDIA A100-SXM4-80GB": "a100_80", "NVIDIA A100-SXM4-40GB": "a100_40", "NVIDIA L40S": "l40s"}
    names |= {"NVIDIA GeForce RTX 4090": "rtx_4090", "NVIDIA B200": "b200"}
    assert {name: machine.gpu_choice(name) for name in names} == names
    assert set(names.values()) == {path.stem for path in (ROOT / "conf" / "cluster" / "gpu").glob("*.yaml")}
    assert machine.gpu_choice("NVIDIA H100 NVL") is None
    sheet = machine.data_sheet("NVIDIA H200")
    assert sheet is not None
    assert {"bf16_tflops", "memory_gbs"} <= set(sheet)


def test_a_part_that_does_not_end_is_killed_and_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_gpu, "GRACE", 0.3)
    found = bench_gpu.run_part("loss", tmp_path, tmp_path / "work", 0.0, toy=True)
    assert found["fault"].startswith("killed")
    assert found["figures"] == []


def test_a_way_that_fails_is_reported_and_the_others_are_measured(tmp_path: Path) -> None:
    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 5 GiB")

    figures = Figures(tmp_path / "loss.json", tmp_path, 60.0, toy=True)
    loss._compare(figures, "loss", {"whole": fail, "chunked": lambda: torch.ones(1000).sum()}, 2, 1.0)
    written = json.loads((tmp_path / "loss.json").read_text())
    assert [item["name"] for item in written if item["value"] is None] == ["loss/whole/time"]
    assert "out of memory" in written[0]["why"]
    assert figures.value("loss/chunked/time") > 0
    assert figures.value("loss/chunked/peak_memory") == pytest.approx(4000 / GIB, rel=0.1)
