"""Held-out loss of a small model on documents, compared with a plain implementation."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from prune_distill.data.folder import DataFolder
from prune_distill.data.shards import SplitWriter
from prune_distill.errors import InputError
from prune_distill.evaluation import harness, heldout, recovery
from prune_distill.evaluation.harness import Harness
from prune_distill.evaluation.heldout import Logits, Served, heldout_sequences, measure_heldout, measure_served
from prune_distill.pipeline.artifact import write_json
from prune_distill.schema import DistillConfig, EvaluateConfig, Phase

VOCABULARY, LENGTH = 11, 4
# By source: 23 tokens in total, which make 5 sequences of 4, each with a token to predict.
DOCUMENTS = {"web": [[1, 2, 3, 4, 5, 0], [6, 7, 0]], "code": [[8, 9, 10, 1, 3, 5, 7, 9, 0], [2, 4, 6, 8, 0]]}
BYTES = 7


def write_documents(folder: Path, documents: dict[str, list[list[int]]] | None = None) -> DataFolder:
    """Write held-out documents, with shards that record their sources."""
    found = DOCUMENTS if documents is None else documents
    folder.mkdir(exist_ok=True)
    whole = SplitWriter(folder / "validation", np.dtype(np.uint16), VOCABULARY)
    for number, (source, texts) in enumerate(found.items()):
        shard = folder / "shards" / str(number)
        shard.mkdir(parents=True)
        writer = SplitWriter(shard / "validation", np.dtype(np.uint16), VOCABULARY)
        for text in texts:
            for target in (whole, writer):
                target.add([np.array(text)], (0, -1, BYTES))
        writer.finish()
        write_json(shard / "manifest.json", {"source": source})
    written = whole.finish()
    return DataFolder(folder, VOCABULARY, 0, [], written.documents, written.tokens, written.bytes, {}, {})


class Model:
    """A bigram model: logits of the next token depend on the last one."""

    def __init__(self, seed: int) -> None:
        self.weights = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed))
        self.device = torch.device("cpu")
        self.config = SimpleNamespace(vocab_size=VOCABULARY)

    def __call__(self, ids: torch.Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=self.weights[ids])


def pairs(count: int = 5) -> list[tuple[int, int, str]]:
    """Return each predicted token with the token before it and its source."""
    tokens = [(token, source) for source, texts in DOCUMENTS.items() for text in texts for token in text]
    return [(tokens[n][0], *tokens[n + 1]) for n in range(count * LENGTH)]


@pytest.fixture
def data(tmp_path: Path) -> DataFolder:
    return write_documents(tmp_path / "data")


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_heldout_loss_is_the_next_token_loss(data: DataFolder, batch: int) -> None:
    model, teacher = Model(0), Model(1)
    cfg = EvaluateConfig(seq_length=LENGTH, micro_batch_size=batch)
    found = measure_heldout(Logits(model), Logits(teacher, keep=True), data, cfg)
    q, p = (one.weights.double().log_softmax(-1) for one in (model, teacher))
    losses = [-q[before, token].item() for before, token, _ in pairs()]
    assert found["tokens"] == len(losses) == 20
    assert found["val_loss"] == pytest.approx(sum(losses) / 20, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(sum(losses) / 20), rel=1e-5)
    # Bits of all 23 tokens over the bytes of the four documents.
    assert found["bits_per_byte"] == pytest.approx(sum(losses) / 20 * math.log2(math.e) * 23 / (4 * BYTES), rel=1e-5)
    same = [float(q[before].argmax() == p[before].argmax()) for before, _, _ in pairs()]
    kl = [(p[before].exp() * (p[before] - q[before])).sum().item() for before, _, _ in pairs()]
    assert found["agreement"]["top1"] == pytest.approx(sum(same) / 20)
    assert found["agreement"]["kl"] == pytest.approx(sum(kl) / 20, rel=1e-4)
    for source in DOCUMENTS:
        own = [loss for loss, (_, _, name) in zip(losses, pairs(), strict=True) if name == source]
        assert found["per_source"][source]["tokens"] == len(own)
        assert found["per_source"][source]["val_loss"] == pytest.approx(sum(own) / len(own), rel=1e-5)


@pytest.mark.parametrize("batch", [2, 5])
@pytest.mark.parametrize("rank", [0, 1])
def test_an_engine_s_results_are_summed_alike(
    data: DataFolder, batch: int, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heldout, "world_size", lambda: 2)
    monkeypatch.setattr(heldout, "rank", lambda: rank)
    monkeypatch.setattr(heldout.ranks, "all_reduce", lambda values: values)
    cfg = EvaluateConfig(seq_length=LENGTH, micro_batch_size=batch)
    model, teacher = Model(0), Model(1)
    sequences = heldout_sequences(data, cfg)
    log_probs = model.weights.double().log_softmax(-1)[sequences[:, :-1]]
    served = Served(log_probs.gather(-1, sequences[:, 1:, None]).squeeze(-1), log_probs.argmax(-1))
    expected = measure_heldout(Logits(model), Logits(teacher), data, cfg)
    found = measure_served(served, Logits(teacher), VOCABULARY, data, cfg)
    assert found["agreement"] == {"top1": expected["agreement"]["top1"]}
    assert found["tokens"] == expected["tokens"]
    assert found["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-6)
    for source, own in expected["per_source"].items():
        assert found["per_source"][source] == pytest.approx(own, rel=1e-6)


def test_max_sequences_limits_the_evaluation(data: DataFolder) -> None:
    model = Model(0)
    found = measure_heldout(Logits(model), None, data, EvaluateConfig(seq_length=LENGTH, max_sequences=2))
    q = model.weights.log_softmax(-1)
    assert found["tokens"] == 8
    assert found["val_loss"] == pytest.approx(sum(-q[b, t].item() for b, t, _ in pairs(2)) / 8, rel=1e-5)
    assert "agreement" not in found


def test_documents_of_one_source_have_no_groups(tmp_path: Path) -> None:
    data = write_documents(tmp_path / "one", {"web": [*DOCUMENTS["web"], *DOCUMENTS["code"]]})
    found = measure_heldout(Logits(Model(0)), None, data, EvaluateConfig(seq_length=LENGTH))
    assert found["tokens"] == 20
    assert "per_source" not in found


def test_ranks_share_the_sequences(data: DataFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    sums = []
    monkeypatch.setattr(heldout, "world_size", lambda: 2)
    monkeypatch.setattr(heldout.ranks, "all_reduce", lambda values: sums.append(values) or values)
    tokens = []
    for rank in range(2):
        monkeypatch.setattr(heldout, "rank", lambda rank=rank: rank)
        tokens.append(measure_heldout(Logits(Model(0)), None, data, EvaluateConfig(seq_length=LENGTH))["tokens"])
    assert tokens == [12, 8]
    model = Model(0).weights.double().log_softmax(-1)
    whole = sum(-model[before, token].item() for before, token, _ in pairs())
    assert float(sum(sums)[:, 0].sum()) == pytest.approx(whole, rel=1e-5)


def test_fewer_tokens_than_a_sequence_are_rejected(data: DataFolder) -> None:
    measure_heldout(Logits(Model(0)), None, data, EvaluateConfig(seq_length=22))
    with pytest.raises(InputError, match="evaluate.seq_length"):
        measure_heldout(Logits(Model(0)), None, data, EvaluateConfig(seq_length=23))


def test_a_non_finite_loss_is_logged(data: DataFolder, caplog: pytest.LogCaptureFixture) -> None:
    model = Model(0)
    model.weights[3] = torch.nan
    found = measure_heldout(Logits(model), None, data, EvaluateConfig(seq_length=LENGTH))
    assert math.isnan(found["val_loss"])
    assert "not finite" in caplog.text
    model = Model(0)
    model.weights[:, 0] = 1e6
    found = measure_heldout(Logits(model), None, data, EvaluateConfig(seq_length=LENGTH))
    assert found["perplexity"] == math.inf


def test_chunking_logits_does_not_change_results(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    logits, teacher, targets = torch.randn(7, 11), torch.randn(7, 11), torch.arange(7)
    whole = heldout._score_tokens(logits, teacher, targets)
    monkeypatch.setattr(heldout, "CHUNK_LOGITS", 22)
    torch.testing.assert_close(heldout._score_tokens(logits, teacher, targets), whole)
    monkeypatch.setattr(heldout, "CHUNK_LOGITS", 1)
    torch.testing.assert_close(heldout._score_tokens(logits, teacher, targets), whole)


@pytest.mark.parametrize(("own", "other"), [(11, 13), (13, 11)])
def test_vocabularies_of_different_size_are_compared_on_the_shared_ids(own: int, other: int) -> None:
    torch.manual_seed(0)
    logits, teacher, targets = torch.randn(7, own), torch.randn(7, other), torch.arange(7)
    values = heldout._score_tokens(logits, teacher, targets)
    log_q, log_p = logits.double().log_softmax(-1), teacher[:, :11].double().log_softmax(-1)
    torch.testing.assert_close(values[:, 3], (log_p.exp() * (log_p - log_q[:, :11])).sum(-1), rtol=1e-5, atol=0)
    assert values[:, 2].tolist() == (log_p.argmax(-1) == log_q.argmax(-1)).double().tolist()
    torch.testing.assert_close(values[:, 0], -log_q[range(7), targets], rtol=1e-5, atol=0)


def test_cached_logits_are_limited_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.tensor([[1, 2, 3]])
    size = 2 * VOCABULARY * 4
    for room, kept in ((size - 1, []), (size, [0]), (2 * size, [0, 1]), (3 * size - 1, [0, 1])):
        monkeypatch.setattr(heldout, "KEPT_BYTES", room)
        logits = Logits(Model(0), keep=True)
        for number in range(3):
            logits.compute(number, ids)
        assert list(logits._kept) == kept


def test_a_task_uses_the_settings_of_the_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def simple_evaluate(**options: Any) -> dict[str, Any]:
        asked.update(options, folder=Path.cwd())
        results = {"one": {"acc,none": 0.5, "acc_stderr,none": 0.1}}
        return {"results": results, "n-samples": {"one": {"effective": 3}}}

    monkeypatch.setitem(
        sys.modules, "lm_eval", SimpleNamespace(evaluator=SimpleNamespace(simple_evaluate=simple_evaluate))
    )
    monkeypatch.setattr(harness, "_language_model", lambda *given: given)
    monkeypatch.setattr(harness, "_manager", lambda *given: given)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "")
    cfg = EvaluateConfig(tasks=["one"], task_limit=3, num_fewshot=2, task_batch_size=5)
    before = Path.cwd()
    tested = Harness(cfg, tmp_path / "own", "mine", tmp_path)
    assert tested.places == {"mine": tmp_path / "own", "one": tmp_path}
    assert tested.tasks == ["mine", "one"]
    assert tested.measure("one", "model", "tokenizer") == {"one": {"acc": {"value": 0.5, "stderr": 0.1}, "samples": 3}}
    assert (asked["limit"], asked["num_fewshot"], asked["tasks"]) == (3, 2, ["one"])
    assert asked["model"] == ("model", "tokenizer", 5)
    assert asked["task_manager"] == (tmp_path, "one")
    assert (asked["folder"], Path.cwd()) == (tmp_path, before)
    assert Harness(EvaluateConfig(), None, "mine", None).tasks == []


def test_the_curve_of_a_recovery() -> None:
    distill = DistillConfig(
        max_steps=6,
        seq_length=4,
        global_batch_size=2,
        lr=1.0,
        min_lr=0.1,
        phases=[Phase(max_steps=4), Phase(max_steps=2, seq_length=8)],
    )
    measured = {6: {"val_loss": 1.0, "params": 9}, 0: {"val_loss": 3.0, "tasks": {}}, 4: None, 5: {"agreement": 0.5}}
    assert recovery.curve(measured, distill) == [  # type: ignore[arg-type]
        {"model": "student", "step": 0, "tokens": 0, "val_loss": 3.0, "tasks": {}},
        {"model": "student", "step": 5, "tokens": 4 * 8 + 16, "agreement": 0.5},
        {"model": "student", "step": 6, "tokens": 4 * 8 + 2 * 16, "val_loss": 1.0},
    ]
