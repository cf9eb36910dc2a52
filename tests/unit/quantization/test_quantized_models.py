"""The stage quantize on tiny models, in all formats that need no GPU."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from prune_distill.errors import InputError
from prune_distill.model import hf_config
from prune_distill.nemo import hf_models
from tests.helpers.quantized import quantize_student, write_student

from prune_distill.quantization import check, reader  # isort: skip (after the backend is activated)

IDS = torch.randint(3, 517, (2, 24), generator=torch.Generator().manual_seed(2))


def log_probs(model: object) -> torch.Tensor:
    with torch.inference_mode():
        return torch.log_softmax(model(IDS).logits.float(), -1)  # type: ignore[operator]


def divergence(model: object, other: torch.Tensor) -> float:
    """KL(other || model) in nats per token."""
    return float(torch.nn.functional.kl_div(log_probs(model), other, reduction="none", log_target=True).sum(-1).mean())


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_student(tmp_path_factory.mktemp("quantized") / "student")


@pytest.mark.parametrize(
    ("quant_format", "types"),
    [
        ("fp8", {"weight": "F8_E4M3", "weight_scale": "F32"}),
        ("fp8_tensor", {"weight": "F8_E4M3", "weight_scale": "F32", "input_scale": "F32"}),
        ("int8", {"weight": "I8", "weight_scale": "F32"}),
        ("int4", {"weight_packed": "I32", "weight_scale": "BF16", "weight_shape": "I64"}),
    ],
)
def test_a_format(quant_format: str, types: dict[str, str], student: Path) -> None:
    metrics = quantize_student(student, quant_format, student.parent / quant_format)
    folder = student.parent / quant_format / f"student_{quant_format}"
    assert metrics["kept_layers"] == ["lm_head"]
    assert float(metrics["bytes"]) < 0.8 * float(metrics["bytes_before"])  # type: ignore[arg-type]
    with safe_open(folder / "model.safetensors", "pt") as file:
        found = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    layer = "model.layers.1.mlp.down_proj."
    assert {name.removeprefix(layer): kind for name, kind in found.items() if name.startswith(layer)} == types
    assert found["lm_head.weight"] == found["model.norm.weight"] == "BF16"
    config = hf_config.parse(folder / "config.json")
    del config["quantization_config"]
    assert config == hf_config.make_compatible(hf_config.read_config(student / "config.json"))
    for name in ("tokenizer.json", "generation_config.json"):
        assert (folder / name).read_bytes() == (student / name).read_bytes()
    card = (folder / "README.md").read_text()
    assert f"- {quant_format}\n" in card
    assert "base_model: owner/teacher\nbase_model_relation: quantized\n" in card
    for part in (f"# demo: student_{quant_format}\n", "demo: student, quantized", "vLLM", "Made from owner/teacher."):
        assert part in card
    assert "AutoModelForCausalLM" not in card
    # Quantization changes the model a little: more than nothing, and much less than another model would.
    original = log_probs(hf_models.load(student))
    changed = divergence(reader.load(folder), original)
    assert 1e-6 < changed < {"int4": 0.5}.get(quant_format, 0.05)


@pytest.mark.parametrize("quant_format", ["fp8", "int8", "int4"])
def test_an_fp8_kv_cache(quant_format: str, student: Path, tmp_path: Path) -> None:
    """Large values of one layer are inside the range of its scale; the others have ModelOpt's scale of 1."""
    large = shutil.copytree(student, tmp_path / "student")
    with safe_open(large / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["model.layers.1.self_attn.v_proj.weight"] *= 1e5
    save_file(tensors, large / "model.safetensors", {"format": "pt"})
    quantize_student(large, quant_format, tmp_path / "plain")
    quantize_student(large, quant_format, tmp_path / "out", ["quantize.fp8_kv_cache=true"])
    folder = tmp_path / "out" / f"student_{quant_format}"
    config = hf_config.parse(folder / "config.json")["quantization_config"]
    scheme = config["kv_cache_scheme"]
    assert (scheme["type"], scheme["num_bits"], scheme["dynamic"]) == ("float", 8, False)
    with safe_open(folder / "model.safetensors", "pt") as file:
        scales = {name: file.get_tensor(name).item() for name in file.keys() if name.endswith(("k_scale", "v_scale"))}  # noqa: SIM118
    expected = [f"model.layers.{number}.self_attn.{kind}_proj.{kind}_scale" for number in range(3) for kind in "kv"]
    assert sorted(scales) == expected
    assert scales.pop("model.layers.1.self_attn.v_proj.v_scale") > 1.5
    assert set(scales.values()) == {1.0}
    assert "keys and values in FP8" in (folder / "README.md").read_text()
    assert 2 * hf_models.kv_cache_bytes(folder, 10) == hf_models.kv_cache_bytes(large, 10)
    # check_export compared the result with ModelOpt's simulation. The cache changes the model, but not much.
    plain = log_probs(reader.load(tmp_path / "plain" / f"student_{quant_format}"))
    assert 1e-6 < divergence(reader.load(folder), plain) < 0.05


def test_kept_layers_are_not_changed(student: Path) -> None:
    out = student.parent / "keep"
    metrics = quantize_student(student, "int8", out, ["quantize.keep=[model.layers.0.*,*.down_proj]"])
    first = [f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"]
    first += [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")]
    kept = [*first, "model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj", "lm_head"]
    assert metrics["kept_layers"] == kept
    folder = out / "student_int8"
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["ignore"] == kept
    before, after = hf_models.load(student).state_dict(), reader.load(folder).state_dict()
    for name in kept:
        assert torch.equal(before[f"{name}.weight"], after[f"{name}.weight"])
    assert not torch.equal(before["model.layers.1.mlp.up_proj.weight"], after["model.layers.1.mlp.up_proj.weight"])


def test_routers_are_kept_and_experts_quantized(tmp_path: Path) -> None:
    student = write_student(tmp_path / "student", "qwen3_moe", moe_intermediate_size=64)
    metrics = quantize_student(student, "fp8", tmp_path / "out")
    assert metrics["kept_layers"] == [*(f"model.layers.{number}.mlp.gate" for number in range(3)), "lm_head"]
    folder = tmp_path / "out" / "student_fp8"
    model = reader.load(folder)
    assert divergence(model, log_probs(hf_models.load(student))) < 0.05
    assert reader.count_parameters(reader.read_config(folder)) == hf_models.load(student).num_parameters()
    assert "vLLM 0.32 does not read mixtures of experts in this format." in (folder / "README.md").read_text()


@pytest.mark.parametrize("quant_format", ["fp8_tensor", "int4"])
def test_experts_that_no_token_reached_are_quantized_too(quant_format: str, tmp_path: Path) -> None:
    student = write_student(tmp_path / "student", "qwen3_moe", moe_intermediate_size=64)
    tokens = ["quantize.calibration_samples=1", "quantize.calibration_seq_length=1"]
    metrics = quantize_student(student, quant_format, tmp_path / "out", tokens)
    assert metrics["kept_layers"] == [*(f"model.layers.{number}.mlp.gate" for number in range(3)), "lm_head"]
    model = reader.load(tmp_path / "out" / f"student_{quant_format}")
    assert divergence(model, log_probs(hf_models.load(student))) < 0.5


def test_a_tied_output_layer_stays_tied(tmp_path: Path) -> None:
    student = write_student(tmp_path / "student", "qwen3_tied")
    for quant_format in ("fp8", "int4"):
        quantize_student(student, quant_format, tmp_path / quant_format)
        model = reader.load(tmp_path / quant_format / f"student_{quant_format}")
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.equal(model.lm_head.weight, hf_models.load(student).lm_head.weight)


def test_a_learned_format_has_the_largest_values_as_ranges(student: Path, tmp_path: Path) -> None:
    """Those of the fake quantizers that trained it, instead of searched ones."""
    quantize_student(student, "int4", tmp_path / "out", ["distill.quantize=int4"])
    layer = "model.layers.1.mlp.down_proj"
    with safe_open(student / "model.safetensors", "pt") as file:
        weight = file.get_tensor(f"{layer}.weight").float()
    with safe_open(tmp_path / "out" / "student_int4" / "model.safetensors", "pt") as file:
        scale = file.get_tensor(f"{layer}.weight_scale")
    torch.testing.assert_close(scale, (weight.unflatten(1, (-1, 32)).abs().amax(-1) / 7).bfloat16(), rtol=0, atol=0)
    card = (tmp_path / "out" / "student_int4" / "README.md").read_text()
    assert "after distillation with its rounding" in card
    assert "clipping search" not in card


def test_a_wrong_scale_is_found(student: Path, tmp_path: Path) -> None:
    """The check of the stage, on a folder whose values went wrong."""
    from safetensors.torch import load_file, save_file

    quantize_student(student, "int8", tmp_path / "out")
    folder = tmp_path / "out" / "student_int8"
    simulated = reader.load(folder)(IDS).logits
    assert check.check_export(folder, IDS, simulated) < 1e-6
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight_scale"] *= 3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="differ from those of ModelOpt's simulation"):
        check.check_export(folder, IDS, simulated)


def test_a_missing_tensor_is_found(student: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    quantize_student(student, "fp8", tmp_path / "out")
    folder = shutil.copytree(tmp_path / "out" / "student_fp8", tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"], tensors["model.layers.1.mlp.down_proj.weight_scale"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="lacks model.layers.1.mlp.down_proj.weight"):
        reader.load(folder)


def test_too_few_documents(student: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="quantize.calibration_seq_length=1000"):
        quantize_student(student, "int8", tmp_path / "out", ["quantize.calibration_seq_length=1000"])
