"""Checks before the first step, losses over learned tokens, and checks of a checkpoint's bytes, on real tiny models."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from prune_distill.errors import InputError
from prune_distill.nemo import backend

backend.activate()

from prune_distill.distillation.distillation import FusedHead  # noqa: E402
from prune_distill.nemo import nemo_api, start_check  # noqa: E402
from prune_distill.nemo.datasets import make_data_module  # noqa: E402
from prune_distill.nemo.forward import run_forward  # noqa: E402
from prune_distill.nemo.start_check import StartCheck, _teacher_loss, check_resumed  # noqa: E402
from prune_distill.nemo.token_loss import TokenLoss, average_over_tokens, masked_sum  # noqa: E402
from prune_distill.schema import KdConfig  # noqa: E402
from tests.helpers.one_rank import (  # noqa: E402
    SHAPE,
    TOKENIZER,
    VOCABULARY,
    config,
    core_model,
    nemo_model,
    one_rank,
    positions,
    save_weights,
    write_data,
)


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Iterator[None]:
    with one_rank():
        yield


def rows(seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(seed))


def batch() -> dict[str, torch.Tensor]:
    return {"tokens": rows(), "labels": rows(1)}


def loss_by_hand(core: Any) -> float:
    with torch.no_grad():
        logits = core(rows(), positions(rows()), None)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows(1).flatten()).item()


def test_logits_are_computed_per_batch() -> None:
    core, found = core_model(), []
    with torch.no_grad():
        expected = [core(ids, positions(ids), None) for ids in (rows(0), rows(1))]
    run_forward(core, [rows(0), rows(1)], found.append)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert not ours.requires_grad


def test_the_teachers_loss_is_the_mean_cross_entropy() -> None:
    core = core_model()
    assert _teacher_loss(core, batch()) == pytest.approx(loss_by_hand(core), rel=1e-5)


def test_the_teachers_loss_behind_a_fused_head() -> None:
    core = core_model()
    expected = loss_by_hand(core)
    FusedHead(core_model(seed=1), core, KdConfig())
    replaced = core.output_layer.forward
    assert _teacher_loss(core, batch()) == pytest.approx(expected, rel=1e-5)
    assert core.output_layer.forward is replaced


def test_outputs_that_modelopts_hooks_kept_are_dropped() -> None:
    core = core_model()
    core.decoder._intermediate_output = torch.ones(1)
    _teacher_loss(core, batch())
    assert core.decoder._intermediate_output is None


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the teacher."""
    return save_weights(core_model(), tmp_path_factory.mktemp("teacher"))


def module_of(checkpoint: Path, teacher: Any, vocabulary: int) -> Any:
    core = SimpleNamespace(teacher_model=teacher)
    sizes = SimpleNamespace(vocab_size=vocabulary)
    return SimpleNamespace(module=core, _teacher_ckpt_path=str(checkpoint), _teacher_config=sizes)


def trainer(core: Any = None) -> Any:
    data = SimpleNamespace(first_validation=batch)
    parallel = SimpleNamespace(sharded_state_dict=lambda: core.sharded_state_dict(prefix="module."))
    return SimpleNamespace(datamodule=data, strategy=SimpleNamespace(megatron_parallel=parallel))


def test_a_teacher_is_compared_with_chance(saved: Path) -> None:
    teacher = core_model()
    loss = loss_by_hand(teacher)
    better = math.ceil(math.exp(loss)) + 1  # a vocabulary size for which chance is worse than this teacher
    StartCheck(None).on_train_start(trainer(), module_of(saved, teacher, better))
    with pytest.raises(InputError, match="chance"):
        StartCheck(None).on_train_start(trainer(), module_of(saved, teacher, math.floor(math.exp(loss))))
    teacher.decoder.final_layernorm.weight.data[0] = torch.nan
    with pytest.raises(InputError, match="nan .*chance"):
        StartCheck(None).on_train_start(trainer(), module_of(saved, teacher, better))


def test_parameters_that_a_checkpoint_lacks_are_named(tmp_path: Path, saved: Path) -> None:
    student = core_model()
    tied = save_weights(core_model(dataclasses.replace(SHAPE, tie_word_embeddings=True)), tmp_path / "tied")
    alone = SimpleNamespace(module=SimpleNamespace())
    StartCheck(saved).on_train_start(trainer(student), alone)
    with pytest.raises(InputError, match="output_layer.weight"):
        StartCheck(tied).on_train_start(trainer(student), alone)


def test_an_incomplete_checkpoint_is_rejected(tmp_path: Path, saved: Path) -> None:
    checkpoint = tmp_path / "whole"
    shutil.copytree(saved, checkpoint)
    nemo_api.check_bytes(checkpoint)
    file = max((checkpoint / "weights").glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=file.name):
        nemo_api.check_bytes(checkpoint)


def test_another_models_checkpoint_is_not_resumed_from(monkeypatch: pytest.MonkeyPatch) -> None:
    found = nemo_model()
    monkeypatch.setattr(nemo_api, "load_model", lambda checkpoint: found)
    check_resumed(config(), Path("x"))
    for name, value in (("num_layers", 3), ("ffn_hidden_size", 64), ("num_query_groups", 1)):
        with pytest.raises(InputError, match=f"{name} {getattr(SHAPE, name)}.*{name} {value}"):
            check_resumed(config(dataclasses.replace(SHAPE, **{name: value})), Path("x"))
    assert set(start_check.SIZES) >= {"hidden_size", "num_attention_heads", "kv_channels", "vocab_size"}


def test_documents_of_another_tokenizer_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nemo_api, "load_model", lambda checkpoint: nemo_model())
    data = write_data(tmp_path, {"a": [[1, 0]]}, [[1, 0]])
    nemo_api.match_tokenizer(Path("x"), data)
    with pytest.raises(InputError, match="vocabulary 47, but 48 in the model"):
        nemo_api.match_tokenizer(Path("x"), dataclasses.replace(data, vocab_size=47))
    with pytest.raises(InputError, match="end-of-document id 5, but 0 in the model"):
        nemo_api.match_tokenizer(Path("x"), dataclasses.replace(data, eod_token=5))


def test_the_mean_over_learned_tokens() -> None:
    losses = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    mask = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    assert masked_sum(losses, mask) == 37
    reduction = TokenLoss()
    reduction.learned = 2.0
    reduction.setup({"loss_mask": mask})
    loss, first = reduction(losses)
    assert loss == 37 / 2
    assert first["sums"].tolist() == [37, 3]
    reduction.setup({"loss_mask": 1 - mask})
    _, second = reduction(losses)
    assert reduction.reduce([first, second]).item() == pytest.approx(63 / 6)
    assert reduction.reduce([second]).item() == pytest.approx(26 / 3)
    assert reduction.mean("x") == pytest.approx((63 + 26) / 9)
    reduction.reset()
    reduction.setup({"loss_mask": 0 * mask})
    _, none = reduction(losses)
    assert reduction.reduce([none]).item() == 0
    with pytest.raises(InputError, match=r"data\.learn"):
        reduction.mean("x")


def test_nemos_model_averages_over_tokens() -> None:
    model = nemo_model()
    average_over_tokens(model)
    assert isinstance(model.training_loss_reduction, TokenLoss)
    assert isinstance(model.validation_loss_reduction, TokenLoss)
    assert model.training_loss_reduction is not model.validation_loss_reduction


def test_sequences_of_documents_count_every_token(tmp_path: Path) -> None:
    """The padding token of the tokenizer, 0, also ends documents, and is learned."""
    data = write_data(tmp_path, {"a": [[1, 2, 0], [3, 4, 5, 0], [6, 0, 7, 0]]}, [[9, 8, 0]] * 4)
    module = make_data_module(
        TOKENIZER,
        data,
        tmp_path / "out",
        seq_length=5,
        micro_batch_size=1,
        global_batch_size=1,
        num_workers=0,
        seed=3,
    )
    module.build(2, 2, 1, 0)
    for dataset in (module._train_ds, module._validation_ds):
        for item in (dataset[0], dataset[1]):
            assert torch.equal(item["tokens"][1:], item["labels"][:-1])
            assert item["loss_mask"].tolist() == [1.0] * 5
    held_out = {int(token) for n in range(2) for token in module._validation_ds[n]["tokens"]}
    assert held_out == {0, 8, 9}
    assert any(0 in module._train_ds[n]["labels"] for n in range(2))
    assert (tmp_path / "out" / "index_mapping").is_dir()


def test_the_mask_of_a_sequence_is_that_of_its_labels(tmp_path: Path) -> None:
    from prune_distill.data.shards import SplitWriter

    data = write_data(tmp_path, {"a": [[1, 2, 3, 0], [4, 5, 6, 7, 0]]}, [[9, 8, 0]] * 4)
    learned = {1: 0, 2: 1, 3: 1, 4: 0, 5: 0, 6: 1, 7: 0, 0: 1}
    writer = SplitWriter(tmp_path / "train-a_mask", np.dtype(np.uint8), 2)
    for document in ([1, 2, 3, 0], [4, 5, 6, 7, 0]):
        writer.add([np.array([learned[token] for token in document], np.uint8)], (0, 0, 0))
    writer.finish()
    assert data.masked
    options = {"micro_batch_size": 1, "global_batch_size": 1, "num_workers": 0, "seed": 3}
    module = make_data_module(TOKENIZER, data, tmp_path / "out", seq_length=4, **options)
    module.build(3, 3, 1, 0)
    for n in range(3):
        item = module._train_ds[n]
        assert item["loss_mask"].tolist() == [float(learned[token]) for token in item["labels"].tolist()]
