"""The padding of a checkpoint's vocabulary is not exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from convert import families
from convert.families import nemo_tensor, parts, read_config
from convert.torch_dist import TorchDistReader, TorchDistWriter
from prune_distill.errors import InputError
from tests.unit.convert.test_torch_dist import numbers, stored

VOCABULARY, PADDED, HIDDEN = 10, 16, 8


def checkpoint(folder: Path, rows: int) -> tuple[TorchDistReader, torch.Tensor, dict[str, object]]:
    """Write a Llama with one layer and a number of embedding rows; return the reader, embedding and config."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        max_position_embeddings=32,
    )
    config.save_pretrained(folder)
    read = read_config(folder)
    shapes = {
        "self_attention.linear_qkv.layer_norm_weight": (HIDDEN,),
        "self_attention.linear_qkv.weight": (16, HIDDEN),
        "self_attention.linear_proj.weight": (HIDDEN, 8),
        "mlp.linear_fc1.layer_norm_weight": (HIDDEN,),
        "mlp.linear_fc1.weight": (24, HIDDEN),
        "mlp.linear_fc2.weight": (HIDDEN, 12),
    }
    torch.manual_seed(0)
    embedding = torch.randn(rows, HIDDEN)
    whole = {f"module.decoder.layers.{name}": torch.randn(1, *shape) for name, shape in shapes.items()}
    whole |= {"module.decoder.final_layernorm.weight": torch.ones(HIDDEN)}
    whole |= {"module.embedding.word_embeddings.weight": embedding, "module.output_layer.weight": 2 * embedding}
    writer = TorchDistWriter()
    for key, tensor in whole.items():
        chunk = tensor.squeeze(0) if "layers." in key else tensor
        writer.add(key, tuple(tensor.shape), (0,) * tensor.dim(), stored(chunk, folder))
    writer.write(folder / "weights", {"epoch": 0}, threads=1)
    return TorchDistReader(folder / "weights"), embedding, read


@pytest.mark.parametrize("rows", [VOCABULARY, PADDED])
def test_rows_beyond_the_vocabulary_are_dropped(tmp_path: Path, rows: int) -> None:
    reader, embedding, config = checkpoint(tmp_path, rows)
    tensors = {tensor.name: tensor for tensor in families.hf_tensors(reader, config)}
    for name, factor in (("model.embed_tokens.weight", 1), ("lm_head.weight", 2)):
        assert tensors[name].shape == (VOCABULARY, HIDDEN)
        assert torch.equal(numbers(tensors[name]), factor * embedding[:VOCABULARY])


def test_a_vocabulary_that_is_too_small_is_rejected(tmp_path: Path) -> None:
    reader, _, config = checkpoint(tmp_path, VOCABULARY - 1)
    with pytest.raises(InputError, match="embed_tokens"):
        list(families.hf_tensors(reader, config))


def test_layers_are_read_in_order_with_all_tensors(tmp_path: Path) -> None:
    reader, _, config = checkpoint(tmp_path, PADDED)
    names = [name for _, _, found in parts(config) for name in found]
    assert [tensor.name for tensor in families.hf_tensors(reader, config)] == names
    rule, index, _ = next(part for part in parts(config) if part[0].nemo.endswith("linear_qkv.weight"))
    assert nemo_tensor(reader, rule, index).shape == (16, HIDDEN)
    assert families.count_layers(reader) == 1
