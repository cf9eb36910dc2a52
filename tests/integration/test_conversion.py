"""Hugging Face → NeMo → Hugging Face through the real command lines, and what they refuse."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import tolerance
from tests.helpers.tiny import convert
from tests.integration.conftest import SmallDisk

pytestmark = pytest.mark.xdist_group("conversion")
SMALL: dict[str, Any] = {
    "vocab_size": 517,  # a multiple of nothing
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 24,  # not hidden_size / num_attention_heads
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 0,
}
LLAMA_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


@pytest.fixture(scope="module", params=["qwen3_untied_bf16", "llama31_tied_fp32"])
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny random model of a family's real class, and its NeMo checkpoint."""
    folder = tmp_path_factory.mktemp("conversion")
    write_model(request.param, folder / "hf")
    convert("hf_to_nemo", "--hf-model", folder / "hf", "--out", folder / "nemo")
    return folder / "hf", folder / "nemo"


def write_model(kind: str, folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, models
    from transformers import (
        GenerationConfig,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    torch.manual_seed(0)
    if kind.startswith("qwen3"):
        model = Qwen3ForCausalLM(Qwen3Config(**SMALL, tie_word_embeddings=False, rope_theta=5e5)).to(torch.bfloat16)
    else:
        model = LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True, rope_scaling=LLAMA_ROPE))
    for parameter in model.parameters():  # norms of ones and logits of nearly nothing would hide mistakes
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    GenerationConfig(eos_token_id=[0, 7], temperature=0.6, do_sample=True).save_pretrained(folder)
    vocabulary = {f"w{number}": number for number in range(SMALL["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w2"))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="w1", eos_token="w0", unk_token="w2")
    fast.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    fast.save_pretrained(folder)


def test_a_round_trip_keeps_every_tensor_and_every_setting(converted: tuple[Path, Path], tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    hf, nemo = converted
    convert("nemo_to_hf", "--checkpoint", nemo, "--hf-model", hf, "--out", tmp_path / "back")
    before, after = (load_file(folder / "model.safetensors") for folder in (hf, tmp_path / "back"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name]), name
    config, config_back = (json.loads((folder / "config.json").read_text()) for folder in (hf, tmp_path / "back"))
    config["torch_dtype"] = config.pop("dtype", config.get("torch_dtype"))
    assert config_back == config
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "back" / name).read_bytes() == (hf / name).read_bytes()


def test_logits_are_those_of_transformers(converted: tuple[Path, Path]) -> None:
    hf, nemo = converted
    done = convert("verify", "--hf-model", hf, "--checkpoint", nemo)
    assert float(done.stdout.split()[-1]) < tolerance.LOGITS


def test_a_checkpoint_without_a_parameter_is_refused(converted: tuple[Path, Path], tmp_path: Path) -> None:
    """Loaded leniently, the parameter would stay at its random start, unseen."""
    hf, nemo = converted
    key = "module.decoder.final_layernorm.weight"
    broken = tmp_path / "broken"
    (broken / "weights").mkdir(parents=True)
    (broken / "context").symlink_to(nemo / "context")
    for path in (nemo / "weights").iterdir():
        if path.name != ".metadata":
            (broken / "weights" / path.name).symlink_to(path)
    metadata = pickle.loads((nemo / "weights" / ".metadata").read_bytes())
    del metadata.state_dict_metadata[key]
    metadata.storage_data = {index: place for index, place in metadata.storage_data.items() if index.fqn != key}
    (broken / "weights" / ".metadata").write_bytes(pickle.dumps(metadata))
    done = convert("verify", "--hf-model", hf, "--checkpoint", broken, check=False)
    assert done.returncode != 0
    assert key in done.stderr


def test_a_full_disk_is_one_clear_message(converted: tuple[Path, Path], small_disk: SmallDisk) -> None:
    hf, _ = converted
    out = small_disk("256k") / "nemo"
    done = convert("hf_to_nemo", "--hf-model", hf, "--out", out, check=False)
    assert done.returncode == 2
    assert "error: no space left" in done.stderr
    assert "free some and run again" in done.stderr
    assert not out.exists()


def test_an_unknown_family_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "model.safetensors").touch()
    done = convert("hf_to_nemo", "--hf-model", tmp_path, "--out", tmp_path / "nemo", check=False)
    assert done.returncode == 2
    assert "'bert' model; the families known here are qwen3, llama" in done.stderr
