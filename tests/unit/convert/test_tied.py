"""A tied model whose output layer is saved nevertheless."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from convert.families import read_config
from convert.hf_to_nemo import check
from convert.safetensors_files import read_folder
from convert.verify import compare_tensors
from prune_distill.errors import InputError
from prune_distill.model.hf_weights import expected_shapes
from tests.conftest import QWEN3


def write(folder: Path, output: torch.Tensor | None) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(QWEN3))
    torch.manual_seed(0)
    tensors = {name: torch.randn(shape) for name, shape in expected_shapes(read_config(folder)).items()}
    if output is not None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + output
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_the_copy_is_ignored(tmp_path: Path) -> None:
    with_copy, without = write(tmp_path / "with", torch.zeros(1)), write(tmp_path / "without", None)
    assert check(read_folder(with_copy), read_config(with_copy), with_copy) == "float32"
    for pair in ((with_copy, without), (without, with_copy)):
        digests, differences = compare_tensors(*pair)
        assert "model.norm.weight" in digests
        assert differences == []


@pytest.mark.parametrize("output", [torch.full((1,), 1e-3), torch.zeros(1, dtype=torch.float64)])
def test_another_output_layer_is_rejected(tmp_path: Path, output: torch.Tensor) -> None:
    other, without = write(tmp_path / "other", output), write(tmp_path / "without", None)
    with pytest.raises(InputError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        check(read_folder(other), read_config(other), other)
    assert compare_tensors(other, without)[1] == [f"lm_head.weight is only in {other}"]
