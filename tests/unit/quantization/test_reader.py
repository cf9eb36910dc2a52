"""The reader of quantized models: how it rounds, and which formats it knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from prune_distill.errors import InputError
from prune_distill.nemo import backend

backend.activate()

from modelopt.torch.quantization.qtensor import NVFP4QTensor, nvfp4_tensor  # noqa: E402

from prune_distill.quantization import compressed_tensors, reader  # noqa: E402
from prune_distill.quantization.reader import Quantized  # noqa: E402
from prune_distill.schema import QuantFormat  # noqa: E402


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def test_int8_per_token() -> None:
    values = torch.tensor([[127.0, 0.4, -0.6, -126.6], [1.27, -0.004, 0.006, 0.0]])
    expected = torch.tensor([[127.0, 0.0, -1.0, -127.0], [1.27, 0.0, 0.01, 0.0]])
    torch.testing.assert_close(reader.round_int8(values), expected)


def test_fp8_has_three_bits_after_the_first() -> None:
    # The scale is 1 in the first row and 2 in the second.
    values = torch.tensor([[448.0, 17.0, 19.0, -1.06], [896.0, 34.0, 38.0, -2.12]])
    expected = torch.tensor([[448.0, 16.0, 20.0, -1.0], [896.0, 32.0, 40.0, -2.0]])
    assert torch.equal(reader.round_fp8(values), expected)


def test_a_static_scale_clamps() -> None:
    rounded = reader.round_fp8_tensor(torch.tensor([[1000.0, -1000.0, 1.0]]), torch.tensor(0.5))
    assert rounded.tolist() == [[224.0, -224.0, 1.0]]


def test_zeros_stay_zeros() -> None:
    zeros = torch.zeros(2, 32)
    for rounded in (reader.round_int8(zeros), reader.round_fp8(zeros), reader.round_nvfp4(zeros, torch.tensor(1.0))):
        assert torch.equal(rounded, zeros)


def test_fp4_rounds_to_its_grid() -> None:
    block = [6.0, 5.1, 4.9, 3.6, 2.4, 1.8, 1.3, 0.7, 0.3, 0.2, -0.3, -5.1, 0.0, 0.0, 0.0, 0.0]
    expected = [6.0, 6.0, 4.0, 4.0, 2.0, 2.0, 1.5, 0.5, 0.5, 0.0, -0.5, -6.0, 0.0, 0.0, 0.0, 0.0]
    # A static scale of 1 makes the scale of this block 1.
    assert reader.round_nvfp4(torch.tensor([block]), torch.tensor(1.0)).tolist() == [expected]


def test_weights_in_fp4_equal_those_of_modelopt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its quantizer needs CUDA to simulate, but to pack only for a question about the GPU."""
    monkeypatch.setattr(nvfp4_tensor, "fp4_compatible", lambda: False)
    weight = random(8, 64)
    quantized, scale, scale_2 = NVFP4QTensor.quantize(weight.clone(), reader.FP4_BLOCK)
    parts = {"weight": quantized._quantized_data, "weight_scale": scale, "weight_scale_2": scale_2}
    expected = quantized.dequantize(
        dtype=torch.float32, scale=scale, double_scale=scale_2, block_sizes={-1: reader.FP4_BLOCK}
    )
    found = reader.dequantize(Quantized(QuantFormat.nvfp4), parts)
    torch.testing.assert_close(found, expected)
    # The same rounding as that of activations.
    torch.testing.assert_close(reader.round_nvfp4(weight, scale_2), expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_integers_are_off_by_half_a_step(bits: int) -> None:
    weight = random(6, 64)
    groups = 2 if bits == 4 else 1
    scale = weight.unflatten(1, (groups, -1)).abs().amax(-1) / (2 ** (bits - 1) - 1)
    integers = compressed_tensors.quantize_weight(weight, scale, bits)
    assert int(integers.abs().max()) == 2 ** (bits - 1) - 1
    parts = {"weight": integers, "weight_scale": scale}
    if bits == 4:
        shape = torch.tensor(weight.shape)
        parts = {"weight_packed": compressed_tensors.pack(integers), "weight_scale": scale, "weight_shape": shape}
    quant_format = QuantFormat.int4 if bits == 4 else QuantFormat.int8
    found = reader.dequantize(Quantized(quant_format, 32), parts)
    steps = (found - weight).unflatten(1, (groups, -1)).abs() / scale[..., None]
    assert 0.45 < float(steps.max()) <= 0.5 + 1e-5


def test_packed_integers_are_in_the_order_of_compressed_tensors() -> None:
    weight = torch.tensor([[-8, -7, -1, 0, 1, 2, 3, 7]], dtype=torch.int8)
    # Each plus 8, the first in the lowest four bits.
    assert compressed_tensors.pack(weight).tolist() == [[int("fba98710", 16) - 2**32]]


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"},
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"weights": {"num_bits": 8, "strategy": "group", "group_size": 32}}},
        },
    ],
)
def test_other_formats_are_refused(config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    assert reader.is_quantized(tmp_path)
    with pytest.raises(InputError, match="which is not read"):
        reader.read_format(tmp_path)
