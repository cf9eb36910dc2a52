"""Sequences of whole documents, and attention within them, on a real tiny model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prune_distill.nemo import backend

backend.activate()

from nemo.collections.llm.gpt.model.base import gpt_data_step, gpt_forward_step  # noqa: E402

from prune_distill.data.folder import DataFolder  # noqa: E402
from prune_distill.data.shards import SplitWriter  # noqa: E402
from prune_distill.nemo.datasets import make_data_module  # noqa: E402
from prune_distill.nemo.forward import run_forward  # noqa: E402
from prune_distill.schema import Packing  # noqa: E402
from tests.helpers.one_rank import TOKENIZER, core_model, one_rank, positions, write_data  # noqa: E402

LENGTH = 8
# The second is longer than a sequence; the last is only an end.
DOCUMENTS = [[1, 2, 3, 0], [*range(10, 30), 0], [4, 5, 0], [6, 7, 8, 9, 0], [31, 0], [32, 33, 34, 35, 36, 0], [0]]
# A sum of up to 8 products in fp32, in another order.
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Iterator[None]:
    with one_rank():
        yield


def sequences(data: DataFolder, out: Path, count: int, seed: int = 3) -> Any:
    sizes = {"seq_length": LENGTH, "micro_batch_size": 1, "global_batch_size": 1, "num_workers": 0}
    module = make_data_module(TOKENIZER, data, out, seed=seed, packing=Packing.documents, **sizes)
    module.build(count, 4, 1, 0)
    return module._train_ds


def pieces(item: dict[str, torch.Tensor]) -> list[tuple[list[int], list[int], list[float]]]:
    """Return tokens, labels and masks of the parts of a sequence, the padding included."""
    ends = item["cu_seqlens"][: int(item["cu_seqlens_argmin"])].tolist()
    assert (ends[0], ends[-1], item["cu_seqlens"][len(ends) :].tolist()) == (0, LENGTH, [-1])
    columns = [item[name].split(np.diff(ends).tolist()) for name in ("tokens", "labels", "loss_mask")]
    return [tuple(part.tolist() for part in parts) for parts in zip(*columns, strict=True)]  # type: ignore[misc]


def test_an_epoch_has_each_document_whole_and_once(tmp_path: Path) -> None:
    data = write_data(tmp_path, {"a": DOCUMENTS}, [[9, 8, 0]] * 20)
    dataset = sequences(data, tmp_path / "out", 5)
    items = [dataset[number] for number in range(len(dataset))]
    found = [piece for item in items for piece in pieces(item)]
    learned = Counter(tuple(tokens + labels[-1:]) for tokens, labels, mask in found if all(mask))
    assert all(all(mask) or not any(mask + tokens) for tokens, _, mask in found)  # the rest is padding
    long = DOCUMENTS[1]
    whole = [document for document in DOCUMENTS if 1 < len(document) <= LENGTH + 1]
    assert learned == Counter(map(tuple, [*whole, long[:9], long[8:17], long[16:]]))
    # 33 places of 40: the fewest sequences.
    assert len(dataset) == 5
    for item in items:
        assert item["max_seqlen"] == item["cu_seqlens"][:-1].diff().max()
        starts = item["cu_seqlens"][:-1].tolist()
        used = int(item["loss_mask"].sum())
        expected = [place - max(start for start in starts if start <= place) for place in range(used)]
        assert item["position_ids"][:used].tolist() == expected
    assert dataset[None]["loss_mask"].sum() == 0
    # The second attempt reads the index of the first.
    index = tmp_path / "out" / "index_mapping"
    before = {path.name: path.stat().st_mtime_ns for path in index.glob("*PackedDataset-train*")}
    again = sequences(data, tmp_path / "out", 5)
    assert {path.name: path.stat().st_mtime_ns for path in index.glob("*PackedDataset-train*")} == before
    assert len(before) == 3
    for number, item in enumerate(items):
        assert all(torch.equal(again[number][name], item[name]) for name in item)
    documents = {int(number) for place in range(5) for number in again._query_document_sample_shuffle_indices(place)[1]}
    assert documents == set(range(len(DOCUMENTS) - 1))


def test_more_sequences_than_an_epoch_are_packed_by_epoch(tmp_path: Path) -> None:
    data = write_data(tmp_path, {"a": DOCUMENTS}, [[9, 8, 0]] * 20)
    dataset = sequences(data, tmp_path / "out", 12)
    assert len(dataset) == 15
    epochs = [[str(pieces(dataset[start + number])) for number in range(5)] for start in (0, 5, 10)]
    assert len({tuple(epoch) for epoch in epochs}) > 1
    count = Counter(token for epoch in epochs for token in "".join(epoch) if token == "[")
    assert count  # each epoch has the same documents
    tokens = [
        sorted(dataset[start + n]["labels"].tolist()[k] for n in range(5) for k in range(8)) for start in (0, 5, 10)
    ]
    assert tokens[0] == tokens[1] == tokens[2]


def test_masks_of_documents_are_kept(tmp_path: Path) -> None:
    data = write_data(tmp_path, {"a": DOCUMENTS}, [[9, 8, 0]] * 20)
    writer = SplitWriter(tmp_path / "train-a_mask", np.dtype(np.uint8), 2)
    for document in DOCUMENTS:
        writer.add([np.array([token % 2 for token in document], np.uint8)], (0, 0, 0))
    writer.finish()
    dataset = sequences(data, tmp_path / "out", 5)
    for number in range(len(dataset)):
        for tokens, labels, mask in pieces(dataset[number]):
            assert mask == ([label % 2 for label in labels] if any(tokens) else [0] * len(labels))


@pytest.mark.parametrize("settings", [{}, {"window_size": (2, 0)}], ids=["full", "window"])
def test_documents_do_not_see_each_other(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Logits and gradients of a packed sequence are those of its documents one by one."""
    data = write_data(tmp_path, {"a": DOCUMENTS}, [[9, 8, 0]] * 20)
    dataset, model = sequences(data, tmp_path / "out", 5), core_model(**settings)
    item = max((dataset[number] for number in range(5)), key=lambda item: len(item["cu_seqlens"]))
    ends = item["cu_seqlens"][:-1]
    assert len(ends) >= 4
    parts = item["tokens"].split(ends.diff().tolist())
    with torch.no_grad():
        alone = torch.cat([model(part[None], positions(part[None]), None)[0] for part in parts])
    together: list[torch.Tensor] = []
    run_forward(model, [item["tokens"][None]], together.append, [ends])
    torch.testing.assert_close(together[0][0], alone, **ROUNDING)
    # As NeMo trains: the columns of the dataset become Megatron's parameters of packed sequences.
    batch = gpt_data_step(iter([torch.utils.data.default_collate([item])]))
    losses = gpt_forward_step(partial(model, attention_mask=None), batch)
    losses.sum().backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    # Megatron's loss in both, as its fused kernel rounds gradients to bf16.
    labels = item["labels"].split(ends.diff().tolist())
    expected = torch.cat(
        [
            model(part[None], positions(part[None]), None, labels=own[None])[0]
            for part, own in zip(parts, labels, strict=True)
        ]
    )
    torch.testing.assert_close(losses[0], expected, **ROUNDING)
    expected.sum().backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(gradients[name], weight.grad, rtol=1e-4, atol=1e-4, msg=name)
