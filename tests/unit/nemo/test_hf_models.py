"""Teachers in plain transformers, from folders of any transformers version."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from prune_distill.errors import InputError
from prune_distill.model.huggingface import link_compatible_folder
from prune_distill.nemo import hf_models
from tests.conftest import QWEN3


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A model in the format of transformers 5, and its logits."""
    folder = tmp_path_factory.mktemp("hf")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**{**QWEN3, "dtype": "float32", "rope_theta": 1e6})
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # so that positions matter
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    content = json.loads((folder / "config.json").read_text())
    content = {key: value for key, value in content.items() if key not in ("torch_dtype", "rope_theta", "rope_scaling")}
    content |= {"dtype": "float32", "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}
    (folder / "config.json").write_text(json.dumps(content))
    return folder, logits(model)


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(512, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        result: torch.Tensor = model.eval()(ids).logits
    return result


def test_a_folder_of_transformers_5_is_loaded_with_its_rope(newer: tuple[Path, torch.Tensor]) -> None:
    folder, expected = newer
    model = hf_models.load(folder)
    assert model.dtype == torch.float32
    torch.testing.assert_close(logits(model), expected)


def test_other_libraries_are_given_a_folder_that_they_read_right(newer: tuple[Path, torch.Tensor]) -> None:
    folder, expected = newer
    with link_compatible_folder(folder) as loadable:
        assert {path.name for path in loadable.iterdir()} == {path.name for path in folder.iterdir()}
        content = json.loads((loadable / "config.json").read_text())
        assert (content["rope_theta"], content["rope_parameters"]["rope_theta"]) == (1e6, 1e6)
        torch.testing.assert_close(
            logits(transformers.AutoModelForCausalLM.from_pretrained(loadable, torch_dtype="auto")), expected
        )


def test_the_size_of_the_kv_cache(newer: tuple[Path, torch.Tensor]) -> None:
    # Keys and values of 4 layers, 2 groups, heads of 64, in fp32, of 10 tokens.
    assert hf_models.kv_cache_bytes(newer[0], 10) == 2 * 4 * 2 * 64 * 4 * 10


def test_a_config_at_fault_is_rejected_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**QWEN3, "hidden_size": "128"}))
    with pytest.raises(InputError, match="hidden_size="):
        hf_models.load(tmp_path)
