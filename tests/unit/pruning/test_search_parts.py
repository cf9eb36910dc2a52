"""The search from a teacher to its table, the Pareto front, and scores in successive halving."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prune_distill.errors import InputError
from prune_distill.nemo import backend

backend.activate()

from prune_distill.nemo import nemo_api  # noqa: E402
from prune_distill.pruning import evidence, scoring, search_space  # noqa: E402
from prune_distill.pruning.importance import Importance  # noqa: E402
from prune_distill.pruning.search_space import measure  # noqa: E402
from prune_distill.schema import Family, RunConfig, TaskScore  # noqa: E402
from recipes import search  # noqa: E402
from tests.conftest import Compose  # noqa: E402
from tests.helpers.one_rank import SHAPE, core_model, one_rank, positions, write_data  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Iterator[None]:
    with one_rank():
        yield


def teacher() -> Any:
    return core_model(seed=3, modelopt_spec=True)


@pytest.fixture(scope="module")
def importance() -> Importance:
    core = teacher()
    ids = torch.arange(12)[None]
    return measure(core, lambda: core(ids, positions(ids), None))


@pytest.fixture
def cfg(demo: Compose) -> RunConfig:
    sizes = ("prune.num_layers=null", "prune.ffn_hidden_size=null", "prune.calibration_seq_length=6")
    budget = (
        "prune.budget={params_fraction: 0.9, max_depth_pruning: 0.5, max_width_pruning: 0.5, layer_sets: 2, samples: 3}"
    )
    made = demo(*sizes, "prune.block_samples=4", budget)
    made.model.shape, made.model.family = SHAPE, Family.qwen3
    return made


def run(cfg: RunConfig, importance: Importance, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the stage's module with a teacher in memory."""
    trainer = SimpleNamespace(strategy=SimpleNamespace(barrier=lambda: None))
    core = teacher()
    model = SimpleNamespace(module=core, config=core.config, modules=core.modules)
    monkeypatch.setattr(nemo_api, "restore", lambda *_, **__: (model, trainer))
    monkeypatch.setattr(search, "_space", lambda cfg, model, device: (search.student.build_space(cfg), None))
    monkeypatch.setattr(search, "Subnets", lambda _, scores, shape: _subnets(core, scores, shape))
    importance.save(folder)
    # Held-out documents that differ from the training documents.
    write_data(folder, {"a": [[*range(1, 20), 0]] * 6}, [[*range(47, 20, -1), 0]] * 2)
    content = {"vocab_size": 48, "eod_token": 0, "sources": {}, "lines": {}}
    content["validation"] = {"documents": 2, "tokens": 56, "bytes": 1}
    content["train"] = [{"prefix": "train-a", "source": "a", "documents": 6, "tokens": 120, "weight": 1.0}]
    (folder / "data.json").write_text(json.dumps(content))
    return search.run(cfg, search.Inputs(teacher=folder, data=folder, importance=folder), folder)


def _subnets(core: Any, scores: Importance, shape: Any) -> Any:
    from prune_distill.pruning.subnets import Subnets

    return Subnets(core, scores, shape)


def test_a_search_scores_heldout_documents_and_sorts_candidates(
    cfg: RunConfig, importance: Importance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = run(cfg, importance, tmp_path, monkeypatch)
    tokens = torch.tensor(([*range(47, 20, -1), 0] * 2)[:19])
    rows = torch.stack([tokens[n : n + 7] for n in (0, 6, 12)])
    with torch.no_grad():
        logits = teacher()(rows[:, :-1], positions(rows[:, :-1]), None)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item()
    assert metrics["teacher"]["loss"] == pytest.approx(expected, rel=1e-4)
    table = json.loads((tmp_path / "candidates.json").read_text())["candidates"]
    assert metrics["candidates"] == len(table)
    assert json.loads((tmp_path / "choice.json").read_text()) == table[0]
    assert table[0]["loss"] == min(row["loss"] for row in table)
    assert all(row["params"] <= 0.9 * metrics["teacher"]["params"] for row in table)
    assert any(row["front"] for row in table)
    by_depth = {row["num_layers"]: set() for row in table}  # type: ignore[var-annotated]
    for row in table:
        assert len(row["drop_layers"]) == 4 - row["num_layers"]
        by_depth[row["num_layers"]].add(tuple(row["drop_layers"]))
    for depth, sets in by_depth.items():
        if depth < 4:
            assert len(sets) == 2
            assert tuple(importance.least_important(4 - depth)) in sets


def row(params: int, loss: float, latency: float | None = None) -> dict[str, Any]:
    return {"params": params, "loss": loss, "latency_ms": latency, "drop_layers": []}


def test_the_front_is_small_and_good() -> None:
    rows = [row(10, 3.0, 5.0), row(20, 2.0, 5.0), row(20, 3.0, 5.0), row(30, 2.0, 4.0), row(30, 2.5, 5.0)]
    evidence.mark_front(rows)
    assert [entry["front"] for entry in rows] == [True, True, False, True, False]
    alike = [row(10, 3.0), row(10, 3.0)]
    evidence.mark_front(alike)
    assert [entry["front"] for entry in alike] == [True, True]


def test_importance_for_people_by_hand() -> None:
    scores = Importance(
        {1: 0.5},
        {1: [torch.tensor([4.0, 9.0]), torch.tensor([1.0, 16.0])]},
        {1: torch.tensor([1.0, 4.0, 9.0, 16.0, 25.0])},
        # Four heads of two channels in two groups: 0 and 1, 2 and 3.
        {1: torch.tensor([9.0, 16.0, 0.0, 0.0, 1.0, 0.0, 0.0, 4.0])},
        {1: torch.tensor([[6.0, 3.0, 1.0], [3.0, 0.0, 2.0]])},
    )
    table = evidence.importance_table(scores, SimpleNamespace(num_attention_heads=4, num_query_groups=2))
    (entry,) = table["layers"]
    assert entry["heads"] == pytest.approx([5.0, 0.0, 1.0, 2.0])
    assert entry["query_groups"] == pytest.approx([5.0, 5**0.5])
    assert entry["ffn_quantiles"] == pytest.approx([1.2, 2.0, 3.0, 4.0, 4.8])
    assert entry["experts"] == pytest.approx([2.0, 3.0, 0.5])
    assert entry["expert_tokens"] == [3, 0, 2]
    assert table["hidden_size"] == pytest.approx([2 + 1, 3 + 4])


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> scoring.Scores:
    """Scores with an evaluator that returns given entries."""
    entries = {
        "own": {"acc": {"value": 0.5, "stderr": 0.1}, "perplexity": {"value": 9.0, "stderr": None}, "samples": 4}
    }
    entries["own"]["mine (strict)"] = {"value": 0.25, "stderr": None}
    made = object.__new__(scoring.Scores)
    made.score, made.export, made.room = TaskScore(task="own", metric="acc"), lambda *_: None, tmp_path
    made.evaluator = SimpleNamespace(score=lambda name, make, task: entries)  # type: ignore[assignment]
    better = {"acc": True, "perplexity": False}
    module = SimpleNamespace(is_higher_better=lambda metric: better.get(metric))
    for name in ("lm_eval", "lm_eval.api"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", module)

    @contextmanager
    def export_temporarily(*_: Any) -> Iterator[Any]:
        yield lambda: tmp_path

    monkeypatch.setattr(scoring, "export_temporarily", export_temporarily)
    return made


def test_a_candidates_score(scores: scoring.Scores) -> None:
    assert scores.measure("x", Path("x")) == {"value": 0.5, "stderr": 0.1}
    scores.score = TaskScore(task="own", metric="mine (strict)")
    assert scores.measure("x", Path("x"))["value"] == 0.25


@pytest.mark.parametrize(
    ("task", "metric", "message"),
    [
        ("group", "acc", "task.* own"),
        ("own", "f1", r"metric.* acc, mine \(strict\), perplexity$"),
        ("own", "perplexity", "perplexity"),
    ],
)
def test_scores_that_cannot_rank_are_rejected(scores: scoring.Scores, task: str, metric: str, message: str) -> None:
    scores.score = TaskScore(task=task, metric=metric)
    with pytest.raises(InputError, match=message):
        scores.measure("x", Path("x"))


def test_an_expert_without_tokens_has_activations_of_zero() -> None:
    def expert(activations: torch.Tensor | None) -> SimpleNamespace:
        return SimpleNamespace(_activations=activations, get_hparam=lambda name: SimpleNamespace(max=3))

    local = [expert(torch.tensor([1.0, 2.0, 3.0])), expert(None)]
    layer = SimpleNamespace(mlp=SimpleNamespace(experts=SimpleNamespace(local_experts=local)))
    assert search_space._ffn(layer).tolist() == [[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]
    dense = SimpleNamespace(mlp=SimpleNamespace(_activations=torch.tensor([4.0])))
    assert search_space._ffn(dense).tolist() == [4.0]
