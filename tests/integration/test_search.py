"""A budget through the real command lines: the search, successive halving, and the distillation that continues it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prune_distill.model.student import AXES
from prune_distill.pipeline.artifact import Located, read_manifest
from prune_distill.pipeline.names import STOP
from prune_distill.pruning.finalists import name_of
from tests.helpers import corruption, tiny, tolerance

BUDGET = (
    *("prune.budget.params_fraction=0.6", "prune.budget.max_depth_pruning=0.5", "prune.budget.max_width_pruning=0.5"),
    "prune.budget.samples=16",
)
# A step is 512 tokens: three candidates for one step, two for another.
HALVING = (*BUDGET, "prune.successive_halving.candidates=3", "prune.successive_halving.round_tokens=512")


@pytest.fixture(scope="module")
def searched(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a budget and successive halving, complete up to its distillation."""
    run_dir = tiny.copy_run(finished, tmp_path_factory.mktemp("searched") / "run")
    tiny.launch(run_dir, *HALVING, "--until", "distill")
    return run_dir


def stage(run_dir: Path, name: str, *overrides: str) -> tuple[Located, dict[str, Any]]:
    located = tiny.stages(run_dir, *(overrides or HALVING))[name]
    manifest = read_manifest(located.folder)
    assert manifest is not None
    return located, manifest["metrics"]


def test_scores_equal_those_of_pruned_models(searched: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.helpers.candidate_losses", searched / "resolved.yaml"]
    done = subprocess.run(command, env=tiny.environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"found"')]
    assert len(rows) > 2
    for row in rows:
        # The same products, sums in another order where channels are sorted that are not cut.
        assert abs(row["found"] - row["cut"]) < tolerance.LOSS
        assert row["params"][0] == row["params"][1]
    assert max(row["found"] for row in rows) - min(row["found"] for row in rows) > 10 * tolerance.LOSS


def test_a_damaged_search_is_rejected(searched: Path, tmp_path: Path) -> None:
    stages = tiny.stages(searched, *HALVING)
    tried, silent = corruption.find_silent_uses(stages, tmp_path / "aside", ["search", "successive_halving"])
    assert silent == []
    assert tried > 60


def test_each_shape_is_tried_with_two_layer_sets(searched: Path) -> None:
    located, _ = stage(searched, "search")
    rows = json.loads((located.folder / "candidates.json").read_text())["candidates"]
    by_shape: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for row in rows:
        by_shape.setdefault(tuple(row[axis] for axis in AXES), set()).add(tuple(row["drop_layers"]))
    assert {shape[0] for shape in by_shape} == {2, 3, 4}
    for (layers, *_), sets in by_shape.items():
        assert len(sets) == (1 if layers == 4 else 2)
        if layers < 4:
            one, other = map(set, sets)
            (gone,), (come,) = one - other, other - one
            assert abs(gone - come) == 1


def test_two_pipeline_ranks_find_the_results_of_one(searched: Path, tmp_path: Path) -> None:
    run_dir = tiny.copy_run(searched, tmp_path / "run")
    two = (*BUDGET, "cluster.devices_per_node=2", "prune.pipeline_model_parallel_size=2")
    tiny.launch(run_dir, *two, "--until", "search")
    found = [
        {name_of(row): row for row in json.loads((folder / "candidates.json").read_text())["candidates"]}
        for folder in (stage(searched, "search")[0].folder, stage(run_dir, "search", *two)[0].folder)
    ]
    assert found[0].keys() == found[1].keys()
    for name, row in found[0].items():
        assert abs(row["loss"] - found[1][name]["loss"]) < tolerance.LOSS
        assert abs(row["kl"] - found[1][name]["kl"]) < tolerance.LOSS


def test_the_winner_is_chosen_by_its_loss_and_pruned(searched: Path) -> None:
    located, metrics = stage(searched, "successive_halving")
    choice = json.loads((located.folder / "choice.json").read_text())
    assert choice == metrics["choice"]
    assert len({name_of(row) for row in metrics["candidates"]}) == 3
    last = [row["rounds"][-1] for row in metrics["candidates"] if len(row["rounds"]) == 2]
    assert len(last) == 2
    assert choice["rounds"][-1]["val_loss"] == min(entry["val_loss"] for entry in last)
    first = sorted(row["rounds"][0]["val_loss"] for row in metrics["candidates"])
    assert {row["rounds"][0]["val_loss"] for row in metrics["candidates"] if len(row["rounds"]) == 2} == {*first[:2]}
    _, pruned = stage(searched, "prune")
    assert pruned["params"] == choice["params"]
    assert pruned["kept_layers"] == [layer for layer in range(1, 5) if layer not in choice["drop_layers"]]
    for name in ("candidates.json", "pareto.svg"):
        assert (located.folder / name).stat().st_size > 0


def test_a_task_score_affects_the_ranking(searched: Path, tmp_path: Path) -> None:
    """With a margin of 0 the score decides; equal scores are ranked by loss."""
    run_dir = tiny.copy_run(searched, tmp_path / "run")
    task = [
        f"prune.successive_halving.score.{name}" for name in ("task=heldout_continuations", "metric=acc", "margin=0")
    ]
    scored = (*HALVING, *task)
    tiny.launch(run_dir, *scored, "--until", "successive_halving")
    located, metrics = stage(run_dir, "successive_halving", *scored)
    rounds = [[row["rounds"][n] for row in metrics["candidates"] if len(row["rounds"]) > n] for n in range(2)]
    assert [len(ended) for ended in rounds] == [3, 2]
    for ended in rounds:
        assert all(0 <= entry["score"]["value"] <= 1 for entry in ended)

    def standing(entry: dict[str, Any]) -> tuple[bool, float]:
        best = max(other["score"]["value"] for other in rounds[0 if entry["step"] == 1 else 1])
        return entry["score"]["value"] < best, entry["val_loss"]

    went_on = [row["rounds"][0] for row in metrics["candidates"] if len(row["rounds"]) == 2]
    assert sorted(map(standing, went_on)) == sorted(map(standing, rounds[0]))[:2]
    assert metrics["choice"]["rounds"][-1] == min(rounds[1], key=standing)
    # Losses are those without a task, as far as the same candidates came.
    plain = {
        name_of(row): row["rounds"][0]["val_loss"] for row in stage(searched, "successive_halving")[1]["candidates"]
    }
    assert {name_of(row): row["rounds"][0]["val_loss"] for row in metrics["candidates"]} == plain
    # Of the first candidate before anything was trained, of all three, and of two.
    assert not list((located.folder / "recovery").glob("exported*"))
    assert len(list(located.folder.glob("measured/candidate-*/step=*/task.*.json"))) == 3 + 2 + 1


def test_the_winners_steps_equal_those_of_an_uninterrupted_distillation(searched: Path, tmp_path: Path) -> None:
    located, metrics = stage(searched, "distill")
    choice = stage(searched, "successive_halving")[1]["choice"]
    log = (located.folder / "log.txt").read_text()
    assert "checkpoints/step=2" in log  # where successive halving ended
    by_hand = [f"prune.{axis}={choice[axis]}" for axis in ("hidden_size", "ffn_hidden_size", "num_attention_heads")]
    by_hand.append(f"prune.num_query_groups={choice['num_query_groups']}")
    layers = choice["drop_layers"]
    by_hand.append(f"prune.drop_layers={json.dumps(layers)}" if layers else "prune.num_layers=4")
    run_dir = tiny.copy_run(searched, tmp_path / "run")
    tiny.launch(run_dir, *by_hand, "--until", "distill")
    alone, metrics_by_hand = stage(run_dir, "distill", *by_hand)
    assert tiny.losses(located.folder) == tiny.losses(alone.folder)
    assert metrics["val_loss"] == metrics_by_hand["val_loss"]


def test_a_paused_and_a_killed_successive_halving_resume(searched: Path, tmp_path: Path) -> None:
    run_dir = tiny.copy_run(searched, tmp_path / "run")
    before = stage(searched, "successive_halving")[1]
    shutil.rmtree(next(run_dir.glob("successive_halving-*")))
    located = tiny.stages(run_dir, *HALVING)["successive_halving"]

    def start() -> subprocess.Popen[str]:
        command = tiny.command(run_dir, *HALVING, "--until", "successive_halving")
        return subprocess.Popen(
            command, env=tiny.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    first = start()
    # After the start of the stage, which removes files of earlier attempts.
    tiny.wait_for("successive_halving-*/log.txt", run_dir, first)
    (located.folder / STOP).touch()
    output, _ = first.communicate(timeout=300)
    assert "stage successive_halving is paused at step 1" in output
    assert not located.complete
    second = start()
    tiny.wait_for("successive_halving-*/candidate-*/checkpoints/step=2", run_dir, second)
    second.kill()
    second.communicate(timeout=60)
    tiny.launch(run_dir, *HALVING, "--until", "successive_halving")
    assert stage(run_dir, "successive_halving")[1] == before
