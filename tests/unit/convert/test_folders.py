"""Whole folders from Hugging Face to NeMo, and the text by which folders are compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from convert.hf_to_nemo import convert
from convert.stored import blocks
from convert.torch_dist import TorchDistReader
from prune_distill.nemo import backend
from prune_distill.pipeline.names import CONTEXT, TOKENIZER, WEIGHTS
from tests.helpers.hf_folders import complete

backend.activate()

from convert.parity import token_ids  # noqa: E402


def numbered(folder: Path) -> Path:
    """A complete folder whose weights are the numbers 0 to 126, over and over, so that places can be told apart."""
    file = complete(folder) / "model.safetensors"
    weights = load_file(file)
    for tensor in weights.values():
        flat = tensor.view(-1)
        for start in range(0, flat.numel(), 127):
            flat[start : start + 127] = flat.new_tensor(range(len(flat[start : start + 127])))
    save_file(weights, file, {"format": "pt"})
    return folder


def test_a_converted_folder_holds_the_models_weights(hf_folder: Callable[..., Path], tmp_path: Path) -> None:
    source, target = numbered(hf_folder(num_hidden_layers=2, vocab_size=128)), tmp_path / "nemo"
    assert convert(source, None, target) == {"hub_commit": None}
    assert {path.name for path in target.iterdir()} == {CONTEXT, WEIGHTS}
    assert (target / CONTEXT / TOKENIZER / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert (target / CONTEXT / "io.json").exists()
    weights, reader = load_file(source / "model.safetensors"), TorchDistReader(target / WEIGHTS)
    prefix = next(name for name in reader.tensors if name.endswith("word_embeddings.weight"))
    embedding = reader.tensor(prefix)
    expected = weights["model.embed_tokens.weight"]
    assert embedding.shape == tuple(expected.shape)
    assert b"".join(map(bytes, blocks(embedding))) == expected.view(torch.uint8).numpy().tobytes()
    assert sum(tensor.numel() for tensor in weights.values()) == sum(
        int(np.prod(chunked.shape)) for chunked in reader.tensors.values()
    )


def test_random_ids_are_those_of_the_models_vocabulary(hf_folder: Callable[..., Path]) -> None:
    folder = complete(hf_folder(vocab_size=128))
    ids = token_ids([folder], None, 1000)
    assert ids.shape == (1, 1000)
    assert (ids.min(), ids.max()) == (0, 127)
    assert np.array_equal(ids, token_ids([folder], None, 1000))


def test_a_checkpoint_alone_brings_its_vocabulary(hf_folder: Callable[..., Path], tmp_path: Path) -> None:
    source, target = complete(hf_folder(num_hidden_layers=2, vocab_size=128)), tmp_path / "nemo"
    convert(source, None, target)
    # The Hugging Face folder comes first wherever it stands, and the checkpoint's own files do where there is none.
    for folders in ([target, source], [target]):
        assert token_ids(folders, None, 100).max() < 128
