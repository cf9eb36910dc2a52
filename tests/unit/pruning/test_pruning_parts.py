"""Small parts of importance, search and successive halving."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prune_distill.errors import InputError
from prune_distill.model.student import AXES
from prune_distill.nemo import backend
from prune_distill.pipeline.artifact import write_json
from prune_distill.pruning import evidence, finalists, successive_halving
from prune_distill.pruning.evidence import best_first
from prune_distill.pruning.importance import Importance, refuse_infinite, warn_if_few_sequences
from prune_distill.reporting import plots
from prune_distill.schema import PruneConfig


def scores() -> Importance:
    return Importance(
        {1: 3.0, 2: 0.5, 3: 0.5, 4: 2.0},
        {n: [torch.full((6,), float(n)), torch.ones(6)] for n in range(1, 5)},
        {n: torch.arange(8.0) for n in range(1, 5)},
        {n: torch.arange(12.0) for n in range(1, 5)},
    )


def test_importance_round_trips(tmp_path: Path) -> None:
    scores().save(tmp_path)
    back = Importance.load(tmp_path)
    assert back.layers == scores().layers
    for n in back.layers:
        assert torch.equal(back.ffn[n], scores().ffn[n])
        assert torch.equal(back.heads[n], scores().heads[n])
        assert all(torch.equal(a, b) for a, b in zip(back.hidden[n], scores().hidden[n], strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["importance.safetensors"]


def test_the_least_important_layers_are_those_that_modelopt_drops() -> None:
    assert scores().least_important(0) == []
    # Of equal layers the later one is dropped, as in a stable descending sort.
    assert scores().least_important(1) == [3]
    assert scores().least_important(3) == [2, 3, 4]


@pytest.mark.parametrize(("part", "words"), [("ffn", "MLP"), ("heads", "attention"), ("layers", "output")])
def test_non_finite_activations_are_rejected_with_their_layer(part: str, words: str) -> None:
    damaged = scores()
    refuse_infinite(damaged)
    values: Any = getattr(damaged, part)
    values[3] = math.nan if part == "layers" else torch.tensor([1.0, math.inf])
    with pytest.raises(InputError, match=f"layer 3: activations of its {words} are non-finite"):
        refuse_infinite(damaged)


def test_too_few_calibration_samples_cause_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    prune = PruneConfig(calibration_samples=10, calibration_seq_length=100)
    with caplog.at_level(logging.WARNING):
        warn_if_few_sequences(prune, train_tokens=1001)
        assert not caplog.records
        warn_if_few_sequences(prune, train_tokens=900)
    assert "prune.calibration_samples=10: the training documents contain only 8 sequences of 100 tokens" in caplog.text


def test_the_tables_and_plots_of_importance(tmp_path: Path) -> None:
    config = SimpleNamespace(num_attention_heads=4, num_query_groups=2)
    table = evidence.importance_table(scores(), config)
    json.dumps(table)
    assert [row["score"] for row in table["layers"]] == [3.0, 0.5, 0.5, 2.0]
    assert len(table["layers"][0]["heads"]) == 4
    assert len(table["layers"][0]["query_groups"]) == 2
    # Both norms of all four layers: 1 + 1, sqrt(2) + 1, ...
    assert table["hidden_size"][0] == pytest.approx(sum(n**0.5 + 1 for n in range(1, 5)))
    plots.importance(table).save(tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").read_text().count("<svg") == 1


def row(layers: int, params: int, loss: float, latency: float | None = None) -> dict[str, Any]:
    return {"num_layers": layers, "params": params, "loss": loss, "latency_ms": latency}


def test_the_pareto_front(tmp_path: Path) -> None:
    rows = [row(4, 100, 3.0), row(4, 90, 3.0), row(4, 80, 3.5), row(4, 85, 3.6)]
    evidence.mark_front(rows)
    assert [entry["front"] for entry in rows] == [False, True, True, False]
    fast = [row(4, 100, 3.0, 5.0), row(4, 90, 3.0, 9.0)]
    evidence.mark_front(fast)
    assert [entry["front"] for entry in fast] == [True, True]
    assert plots.pareto_front([(9, 3), (9, 2), (8, 3), (7, 5), (7, 4), (7.5, 4), (8, 3)]) == [(7, 4), (8, 3), (9, 2)]
    rows[0]["rounds"] = [{"step": 1, "val_loss": 2.9}]
    plots.pareto(rows, {"params": 200, "loss": 2.5}).save(tmp_path / "pareto.svg")
    assert "Pareto front" in (tmp_path / "pareto.svg").read_text()


def test_candidates_are_interleaved_by_kept_layers() -> None:
    rows = [row(6, 1, 4.0), row(6, 2, 4.1), row(5, 3, 3.2), row(4, 4, 3.0), row(4, 5, 3.1), row(4, 6, 3.3)]
    for entry in rows:
        entry["drop_layers"] = list(range(3, 9 - entry["num_layers"]))
    assert [entry["params"] for entry in best_first(rows)] == [4, 3, 1, 5, 2, 6]
    others = {**row(4, 7, 3.5), "drop_layers": [2, 4]}
    assert [entry["params"] for entry in best_first([*rows, others])] == [4, 3, 7, 1, 5, 2, 6]


def test_layer_sets_with_a_shifted_layer() -> None:
    backend.activate()
    from prune_distill.pruning import layer_sets

    assert layer_sets.list_shifted([3, 4], 6) == [[2, 4], [3, 5]]
    assert layer_sets.list_shifted([1, 3], 6) == [[1, 2], [1, 4], [2, 3]]
    assert layer_sets.list_shifted([6], 6) == [[5]]
    assert layer_sets.list_shifted([], 6) == layer_sets.list_shifted([1, 2], 2) == []


def test_candidate_names_contain_all_sizes() -> None:
    shape = dict(zip(AXES, (4, 256, 704, 4, 2), strict=True))
    one, other = ({**shape, "drop_layers": layers} for layers in ([3, 4], [2, 4]))
    assert finalists.name_of(one) == "candidate-l4-h256-f704-a4-q2-d3-d4"
    assert finalists.name_of(other) != finalists.name_of(one)
    assert plots.shape_words(one) == "4 layers, hidden 256, FFN 704, heads 4"
    assert plots.describe_dropped_layers(one) == "without layers 3-4"
    assert plots.describe_dropped_layers({"drop_layers": [3]}) == "without layer 3"
    assert plots.describe_dropped_layers({"drop_layers": [2, 4, 7, 8, 9]}) == "without layers 2, 4, 7-9"


def test_scores_that_are_clearly_worse() -> None:
    scores = {
        "best": {"value": 0.60, "stderr": 0.03},
        "near": {"value": 0.52, "stderr": 0.04},  # 1.6 standard errors of the difference
        "far": {"value": 0.45, "stderr": 0.04},  # 3
    }
    assert successive_halving.find_clearly_worse(scores, 2.0) == ["far"]
    assert successive_halving.find_clearly_worse(scores, 1.5) == ["near", "far"]
    assert successive_halving.find_clearly_worse(scores, 0.0) == ["near", "far"]
    # The difference counts, not what is left of the best score.
    assert successive_halving.find_clearly_worse(
        {"best": {"value": 0.9, "stderr": 0.05}, "third": {"value": 0.3, "stderr": 0.05}}, 2.0
    ) == ["third"]
    exact = {name: {**score, "stderr": None} for name, score in scores.items()}
    assert successive_halving.find_clearly_worse(exact, 2.0) == ["near", "far"]


def test_the_files_of_a_round(tmp_path: Path) -> None:
    candidate = tmp_path / "candidate"
    for name in ("weights", "context"):
        (candidate / "checkpoints" / "step=4" / name).mkdir(parents=True)
    (candidate / "checkpoints" / "step=4" / "weights" / ".metadata").write_text("w")
    (candidate / "checkpoints" / ".damaged.step=6").mkdir()
    lines = [{"step": 2, "val_loss": 3.0}, {"step": 4, "loss": 0.1}, {"step": 4, "val_loss": 2.0}]
    (candidate / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert not successive_halving.has_reached(candidate, 4)
    write_json(candidate / "state.json", {"state": "paused", "step": 4})
    assert successive_halving.has_reached(candidate, 4)
    assert not successive_halving.has_reached(candidate, 8)
    # Saved, but its validation is lost or its checkpoint damaged: it is trained to that step again.
    (candidate / "metrics.jsonl").rename(tmp_path / "aside.jsonl")
    assert not successive_halving.has_reached(candidate, 4)
    (tmp_path / "aside.jsonl").rename(candidate / "metrics.jsonl")
    (candidate / "checkpoints" / "step=4" / "context").rename(tmp_path / "context")
    with pytest.raises(InputError, match="context/ is missing"):
        successive_halving.has_reached(candidate, 4)
    (tmp_path / "context").rename(candidate / "checkpoints" / "step=4" / "context")
    assert successive_halving.read_val_loss(candidate, 4) == 2.0
    assert successive_halving.select_survivors({"a": 2.0, "b": 1.0, "c": 3.0}, 2) == ["b", "a"]
    assert successive_halving.select_survivors({"a": 2.0, "b": 1.0, "c": 3.0}, 2, worse=["b"]) == ["a", "c"]
    assert successive_halving.select_survivors({"a": 2.0, "b": 1.0}, 2, worse=["a", "b"]) == ["b", "a"]

    (candidate / "stop").touch()
    successive_halving.discard_unfinished(candidate, 5)
    assert successive_halving.has_reached(candidate, 4)
    assert not (candidate / "stop").exists()

    successive_halving.keep_winner(candidate, tmp_path / "winner")
    out = tmp_path / "distill"
    out.mkdir()
    successive_halving.resume_from_winner(tmp_path / "winner", out)
    assert (out / "checkpoints" / "step=4" / "weights" / ".metadata").read_text() == "w"
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step=4"]
    assert (out / "metrics.jsonl").read_text() == (candidate / "metrics.jsonl").read_text()
    # A training that has started resumes from its own checkpoints.
    (out / "checkpoints" / "step=4").rename(out / "checkpoints" / "step=6")
    (out / "metrics.jsonl").write_text("")
    successive_halving.resume_from_winner(tmp_path / "winner", out)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step=6"]
    assert (out / "metrics.jsonl").read_text() == ""
    # A checkpoint that was saved, but not validated, before a kill.
    successive_halving.discard_unfinished(candidate, 4)
    assert not list((candidate / "checkpoints").glob("step=*"))
    assert (tmp_path / "winner" / "checkpoints" / "step=4" / "weights" / ".metadata").read_text() == "w"


def test_every_setting_of_the_search_decides_its_folder() -> None:
    # None of them is placement, so a folder always belongs to its settings.
    from prune_distill.schema import Budget, SuccessiveHalving
    from prune_distill.schema.fields import Identity, identity_of

    for cls in (Budget, SuccessiveHalving):
        assert all(identity_of(field, None) is Identity.hashed for field in dataclasses.fields(cls))
