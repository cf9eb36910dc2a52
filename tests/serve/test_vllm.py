"""vLLM serves what this repository exports, on this machine's CPU: `make test-serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

from prune_distill.config.values import SERVE_PYTHON
from prune_distill.errors import InputError
from prune_distill.nemo import hf_models
from prune_distill.schema import Family
from prune_distill.serving.vllm_process import VllmProcess
from tests.helpers.models import MODELS
from tests.helpers.quantized import quantize_student, write_student
from tests.helpers.served_run import SIZES

from prune_distill.quantization import reader  # isort: skip (after the backend is activated)

PROMPTS = torch.randint(3, 517, (20, 48), generator=torch.Generator().manual_seed(2))
NEW_TOKENS = 12
# In fp32, vLLM and transformers differ in the order of sums.
TOLERANCE = 1e-4
# Two tokens are a tie where transformers' log-probabilities of them are closer than both may be off.
TIE = 2 * TOLERANCE
# A model of each family, with every kind of scaled rope.
FAMILIES = ("qwen3_tied", "qwen2", "llama31_tied", "mistral_window", "nemotron", "qwen3_moe")


def serve(folder: Path, dtype: str) -> VllmProcess:
    # Compiling takes longer than all that these tests generate.
    return VllmProcess(folder, SERVE_PYTHON, dtype=dtype, max_model_len=128, max_num_seqs=4, enforce_eager=True)


def log_probs(model: Any) -> torch.Tensor:
    """The log-probabilities of each prompt's tokens but the first, `[b, s - 1]`."""
    with torch.inference_mode():
        values = torch.log_softmax(model(PROMPTS).logits.float(), -1)
    return values[:, :-1].gather(-1, PROMPTS[:, 1:, None]).squeeze(-1)


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start vLLM in a single process, because each takes seconds to import it."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def test_the_families_are_all_of_the_projects() -> None:
    found = {getattr(transformers, f"{MODELS[name][0]}Config").model_type for name in FAMILIES}
    assert found == {family.value for family in Family}


@pytest.mark.parametrize("name", FAMILIES)
def test_an_export_in_fp32_continues_prompts_as_transformers_does(name: str, tmp_path: Path) -> None:
    folder = write_student(tmp_path / "student", name, **SIZES, rope_scaling=MODELS[name][1].get("rope_scaling"))
    model = hf_models.load(folder)
    with serve(folder, "float32") as process:
        answer = process.generate(PROMPTS.tolist(), NEW_TOKENS, prompt_log_probs=True)
    torch.testing.assert_close(torch.tensor(answer["log_probs"]), log_probs(model), rtol=0, atol=TOLERANCE)
    ids, untied = PROMPTS, torch.ones(len(PROMPTS), 0, dtype=torch.bool)
    with torch.inference_mode():
        for _ in range(NEW_TOKENS):
            logits = model(ids).logits[:, -1]
            logits[:, model.generation_config.eos_token_id] = -torch.inf  # vLLM's `min_tokens` excludes it
            (first, second), tokens = (part.unbind(-1) for part in logits.topk(2))
            untied = torch.cat([untied, (first - second > TIE)[:, None]], 1)
            ids = torch.cat([ids, tokens[0][:, None]], 1)
    # A prompt's tokens up to its first tie, after which the two may continue differently.
    compared = untied.cumprod(1).bool()
    assert compared.float().mean() > 0.9
    assert torch.equal(torch.tensor(answer["tokens"])[compared], ids[:, PROMPTS.shape[1] :][compared])


# The differences to the reader, relative to what quantization changes; independent roundings would make about 1.4. In
# fp32 nothing but the order of sums differs, which moves few activations to another step of INT8 (0.07 measured). vLLM
# computes FP8 and INT4 in bf16 (it refuses ModelOpt's formats in fp32, and its INT4 kernel for CPUs has no fp32), whose
# rounding moves many FP8 activations to another step (0.60 measured, and 0.04 of INT4).
@pytest.mark.parametrize(
    ("quant_format", "name", "dtype", "most"),
    [
        ("fp8", "qwen3_untied_bf16", "bfloat16", 0.75),
        ("int8", "qwen3_tied", "float32", 0.15),
        ("int4", "qwen3_untied_bf16", "bfloat16", 0.1),
    ],
)
def test_a_quantized_model_computes_as_the_reader_does(
    quant_format: str, name: str, dtype: str, most: float, tmp_path: Path
) -> None:
    student = write_student(tmp_path / "student", name, **SIZES)
    quantize_student(student, quant_format, tmp_path / "out")
    folder = tmp_path / "out" / f"student_{quant_format}"
    with serve(folder, dtype) as process:
        found = torch.tensor(process.generate(PROMPTS.tolist(), 1, prompt_log_probs=True)["log_probs"])
    expected, original = log_probs(reader.load(folder)), log_probs(hf_models.load(student))
    error, change = (found - expected).abs().mean(), (expected - original).abs().mean()
    print(f"{quant_format}: {error:.6f} nats from the reader, which is {change:.6f} from the model before")
    assert error < most * change


@pytest.mark.parametrize(
    ("quant_format", "reason"),
    [
        # ModelOptFp8MoEMethod takes one scale per tensor, on every kind of device.
        ("fp8", "RuntimeError: shape '[]' is invalid for input of size 128"),
        ("int8", "NotImplementedError: No Int8 MoE backend supports the deployment configuration"),
        ("int4", "NotImplementedError: No WNA16 MoE backend supports the deployment configuration"),
    ],
)
def test_quantized_mixtures_that_the_build_for_cpus_cannot_load(
    quant_format: str, reason: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The rule quantize.served_experts says so before a run starts: change it where this test fails."""
    student = write_student(tmp_path / "student", "qwen3_moe", **SIZES, moe_intermediate_size=128)
    quantize_student(student, quant_format, tmp_path / "out")
    folder = tmp_path / "out" / f"student_{quant_format}"
    with pytest.raises(InputError, match=f"{folder}: vLLM ended with status 1"):
        serve(folder, "bfloat16")
    assert reason in capfd.readouterr().err


def truncate_fp8(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Round to FP8 toward zero, as vLLM's kernels for CPUs do when they store keys and values (1.12 becomes 1.0 instead
    of 1.125 there; seen in `cpu_attn_reshape_and_cache` of 0.32). GPUs round to the nearest value."""
    exact = (values / scale).clamp(-reader.FP8_LARGEST, reader.FP8_LARGEST)
    nearest = exact.to(torch.float8_e4m3fn)
    # The next smaller magnitude is the next smaller code.
    codes = nearest.view(torch.uint8) - (nearest.float().abs() > exact.abs()).to(torch.uint8)
    return codes.view(torch.float8_e4m3fn).float() * scale


# vllm/v1/attention/backends/cpu_attn.py:_get_attn_isa
@pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="vLLM's FP8 KV cache on a CPU needs AVX-512")
def test_an_fp8_kv_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM takes it and its scales from the folder. Values of one layer are beyond FP8 but for their scale."""
    student = write_student(tmp_path / "student", "qwen3_tied", **SIZES)
    with safe_open(student / "model.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    tensors["model.layers.1.self_attn.v_proj.weight"] *= 1e5
    tensors["model.layers.1.self_attn.o_proj.weight"] /= 1e5
    save_file(tensors, student / "model.safetensors", {"format": "pt"})
    for name in ("false", "true"):
        quantize_student(student, "int8", tmp_path / name, [f"quantize.fp8_kv_cache={name}"])
    folder = tmp_path / "true" / "student_int8"
    with serve(folder, "float32") as process:
        found = torch.tensor(process.generate(PROMPTS.tolist(), 1, prompt_log_probs=True)["log_probs"])
    without = log_probs(reader.load(tmp_path / "false" / "student_int8"))
    monkeypatch.setattr(reader, "round_fp8_tensor", truncate_fp8)
    expected = log_probs(reader.load(folder))
    error, change = (found - expected).abs().mean(), (expected - without).abs().mean()
    print(f"{error:.6f} nats from the reader, in which the cache changes {change:.6f}")
    # 0.10 measured: other orders of sums move a few activations to another step of INT8.
    assert error < 0.2 * change


def test_a_folder_that_vllm_cannot_load(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = write_student(tmp_path / "student")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=f"{folder}: vLLM ended with status 1"):
        serve(folder, "bfloat16")
    assert "weights" in capfd.readouterr().err
