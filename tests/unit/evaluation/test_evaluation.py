"""Parts of an evaluation without models: its own task, the store, results of the harness, the recovery curve."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from prune_distill.config.values import OWN_TASK
from prune_distill.data.folder import _kinds
from prune_distill.errors import InputError
from prune_distill.evaluation import continuations, heldout, recovery
from prune_distill.evaluation.generation import Prompts
from prune_distill.evaluation.harness import scores
from prune_distill.evaluation.heldout import Logits, _score_tokens
from prune_distill.evaluation.holding import hold, holding
from prune_distill.evaluation.store import Store
from prune_distill.nemo import devices, hf_models
from prune_distill.pipeline.artifact import write_json
from prune_distill.pipeline.names import find_checkpoints
from prune_distill.schema import Continuations, DistillConfig, ExportDtype

SMALL = Continuations(questions=20, context_words=4, choice_words=2)
DOCUMENTS = [" ".join(f"{word}{number}" for number in range(60)) for word in ("ab", "cd", "ef", "gh", "ij")]


def test_questions_are_fair() -> None:
    questions = continuations.make_questions(DOCUMENTS, SMALL, seed=3)
    assert questions == continuations.make_questions(DOCUMENTS, SMALL, seed=3)
    assert questions != continuations.make_questions(DOCUMENTS, SMALL, seed=4)
    assert len(questions) == SMALL.questions
    assert len({question["context"] for question in questions}) == SMALL.questions
    assert {question["answer"] for question in questions} == {0, 1, 2, 3}
    for question in questions:
        document = next(text for text in DOCUMENTS if question["context"] in text)
        follows = [question["context"] + choice in document for choice in question["choices"]]
        assert follows == [number == question["answer"] for number in range(4)]
        # The wrong ones come from other documents, and have the same length.
        assert [choice in document for choice in question["choices"]] == follows
        assert {len(choice.split()) for choice in question["choices"]} == {SMALL.choice_words}
        assert all(choice[0] == " " and choice[1].isalpha() for choice in question["choices"])


def test_the_number_of_questions_is_limited_by_the_documents() -> None:
    many = Continuations(questions=10_000, context_words=4, choice_words=2)
    questions = continuations.make_questions(DOCUMENTS, many, seed=3)
    assert len(questions) == len(DOCUMENTS) * 60 // 6
    assert len({question["context"][:2] for question in questions[: len(DOCUMENTS)]}) == len(DOCUMENTS)


def test_too_few_documents_are_rejected() -> None:
    with pytest.raises(InputError, match="only 3 of 4 have them; add documents, or set evaluate.continuations=null"):
        continuations.make_questions([*DOCUMENTS[:3], "short"], SMALL, seed=0)


def test_the_harness_loads_the_task(tmp_path: Path) -> None:
    continuations.write_task(DOCUMENTS, SMALL, 0, tmp_path)
    definition = yaml.safe_load((tmp_path / f"{OWN_TASK}.yaml").read_text())
    assert definition["task"] == OWN_TASK
    lines = (tmp_path / definition["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()
    assert set(json.loads(lines[0])) == {"context", "choices", "answer"}
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{OWN_TASK}.jsonl", f"{OWN_TASK}.yaml"]


def test_losses_and_agreement_of_tokens() -> None:
    torch.manual_seed(0)
    logits, teacher, targets = torch.randn(7, 11), torch.randn(7, 11), torch.arange(7)
    teacher[3] = logits[3]
    values = _score_tokens(logits, teacher, targets)
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none").double()
    assert torch.allclose(values[:, 0], expected, atol=1e-6)  # fp32
    assert values[:, 1].tolist() == [1.0] * 7
    assert values[3, 2:].tolist() == pytest.approx([1.0, 0.0], abs=1e-6)
    p, q = teacher.softmax(-1), logits.softmax(-1)
    assert torch.allclose(values[:, 3], (p * (p / q).log()).sum(-1).double(), atol=1e-5)
    assert _score_tokens(logits, None, targets)[:, 2:].abs().sum() == 0


class CountingModel:
    """A model whose logits are the tokens, which counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache
        self.calls += 1
        return SimpleNamespace(logits=torch.nn.functional.one_hot(ids, 8).float())


def test_kept_logits_are_those_of_their_batch_and_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[7, 0, 1], [2, 3, 4]])
    expected = [torch.nn.functional.one_hot(ids[:, :-1], 8).float().flatten(0, 1) for ids in (first, second)]
    # Room for the first batch only: 4 tokens, 8 logits of 4 bytes each.
    monkeypatch.setattr(heldout, "KEPT_BYTES", 4 * 8 * 4)
    for keep, calls in ((False, 4), (True, 3)):
        logits = Logits(CountingModel(), keep=keep)
        for _ in range(2):
            for number, ids in enumerate((first, second)):
                assert torch.equal(logits.compute(number, ids), expected[number])
        assert logits.model.calls == calls


def test_documents_are_grouped_by_source_or_cluster() -> None:
    assert _kinds([("web", 1), ("code", 2)]) == ["web", "code"]
    assert _kinds([("train", 7), ("train", -1)]) == ["cluster 7", "no cluster"]


def test_measurements_only_count_for_their_versions(tmp_path: Path) -> None:
    store = Store(tmp_path, {"lm_eval": "1"})
    with store.locked("recovery/step=3"):
        assert store.get("recovery/step=3", "task.a/b") is None
        store.put("recovery/step=3", "task.a/b", {"acc": 0.5})
    assert store.get("recovery/step=3", "task.a/b") == {"acc": 0.5}
    assert Store(tmp_path, {"lm_eval": "2"}).get("recovery/step=3", "task.a/b") is None
    (path,) = tmp_path.glob("recovery/step=3/*.json")
    path.write_text(path.read_text().replace("0.5", "0.7"))
    assert store.get("recovery/step=3", "task.a/b") is None
    path.write_text('{"key": {"lm_')
    assert store.get("recovery/step=3", "task.a/b") is None


def test_non_finite_numbers_are_written_as_null(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": [math.nan, (math.inf, 1.5)], "y": {"z": -math.inf}})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [None, [None, 1.5]], "y": {"z": None}}


HARNESS: dict[str, Any] = {
    "results": {
        "one": {
            "acc,none": 0.5,
            "acc_stderr,none": 0.1,
            "acc_norm,none": 1,
            "acc_norm_stderr,none": "N/A",
            "alias": "",
        },
        "two": {"exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": 0.0},
        "both": {"acc,none": 0.4, "acc_stderr,none": 0.2, "sample_len": 30},
    },
    "groups": {"both": {"acc,none": 0.4, "acc_stderr,none": 0.2}},
    "group_subtasks": {"both": ["one", "two"]},
    "n-samples": {"one": {"original": 10, "effective": 10}, "two": {"original": 90, "effective": 20}},
}


def test_scores_of_tasks_and_groups() -> None:
    one = scores(HARNESS, "one")["one"]
    assert one["acc"] == {"value": 0.5, "stderr": 0.1}
    assert one["acc_norm"] == {"value": 1.0, "stderr": None}
    assert one["samples"] == 10
    assert scores(HARNESS, "two")["two"]["exact_match (strict-match)"] == {"value": 0.25, "stderr": 0.0}
    assert scores(HARNESS, "both") == {"both": {"acc": {"value": 0.4, "stderr": 0.2}, "samples": 30}}
    tag = {"results": {"one": HARNESS["results"]["one"]}, "n-samples": HARNESS["n-samples"]}
    assert list(scores(tag, "a_tag")) == ["one"]


def _checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"step={step}"
    (path / "weights").mkdir(parents=True)
    for number in range(20):
        (path / "weights" / f"{number}.distcp").write_bytes(bytes([step]) * 100)
    return path


def test_a_held_checkpoint_survives_its_deletion(tmp_path: Path) -> None:
    checkpoint = _checkpoint(tmp_path / "checkpoints", 2)
    (tmp_path / "checkpoints" / ".partial.step=4").mkdir()
    seen: set[int] = set()
    assert hold(tmp_path / "checkpoints", tmp_path / "pen", seen) == [2]
    shutil.rmtree(tmp_path / "pen")
    assert hold(tmp_path / "checkpoints", tmp_path / "pen", seen) == []
    assert hold(tmp_path / "checkpoints", tmp_path / "pen", set()) == [2]
    assert hold(tmp_path / "checkpoints", tmp_path / "pen", set()) == []
    shutil.rmtree(checkpoint)
    held = find_checkpoints(tmp_path / "pen")
    assert list(held) == [2]
    assert len(list(held[2].glob("weights/*"))) == 20
    assert hold(tmp_path / "absent", tmp_path / "pen", set()) == []


def test_checkpoints_are_held_while_the_process_is_busy(tmp_path: Path) -> None:
    """The last checkpoint appears just before the last check, and is held."""
    checkpoints, pen = tmp_path / "checkpoints", tmp_path / "pen"
    _checkpoint(checkpoints, 1)
    with holding(checkpoints, pen, seconds=0.01):
        for step in (1, 2):
            deadline = time.monotonic() + 60
            while step not in find_checkpoints(pen):
                assert time.monotonic() < deadline
            shutil.rmtree(checkpoints / f"step={step}")
            _checkpoint(checkpoints, step + 1)
    assert list(find_checkpoints(pen)) == [1, 2, 3]


def test_the_watcher_ends_when_the_process_is_killed(tmp_path: Path) -> None:
    script = (
        "import os, sys, pathlib; from prune_distill.evaluation.holding import holding\n"
        "with holding(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), 60): os.kill(os.getpid(), 9)"
    )
    # Returns when no process has its output open.
    done = subprocess.run([sys.executable, "-c", script, tmp_path, tmp_path / "pen"], capture_output=True, timeout=50)
    assert done.returncode == -signal.SIGKILL


def test_checkpoints_deleted_while_being_linked_are_held_completely_or_not_at_all(tmp_path: Path) -> None:
    """Training deletes a checkpoint by renaming it, then removing its files."""
    pen, gone = tmp_path / "pen", tmp_path / "checkpoints"

    def come_and_go() -> None:
        for step in range(1, 40):
            checkpoint = _checkpoint(tmp_path / "written", step).rename(gone / f"step={step}")
            shutil.rmtree(checkpoint.rename(checkpoint.with_name(f".removed.{checkpoint.name}")))

    gone.mkdir()
    training = threading.Thread(target=come_and_go)
    training.start()
    while training.is_alive():
        hold(gone, pen, set())
    training.join()
    for step, checkpoint in find_checkpoints(pen).items():
        files = list(checkpoint.glob("weights/*"))
        assert len(files) == 20, step
        assert all(file.read_bytes() == bytes([step]) * 100 for file in files)
    assert not list(pen.glob(".step=*")) if pen.exists() else True


def test_the_curve_is_sorted_and_counts_tokens() -> None:
    distill = DistillConfig(max_steps=10, seq_length=8, global_batch_size=4, lr=1e-3, min_lr=1e-4)
    entry = {"val_loss": 2.0, "agreement": {"top1": 0.5, "kl": 0.1}, "params": 3}
    found = recovery.curve({10: {"val_loss": 1.5}, 0: entry, 5: None}, distill)
    assert found == [
        {"model": "student", "step": 0, "tokens": 0, "val_loss": 2.0, "agreement": {"top1": 0.5, "kl": 0.1}},
        {"model": "student", "step": 10, "tokens": 320, "val_loss": 1.5},
    ]


class _Documents:
    def __init__(self, lengths: list[int]) -> None:
        self.documents = [np.arange(length, dtype=np.uint16) for length in lengths]

    def validation_documents_ids(self) -> list[np.ndarray]:
        return self.documents


def test_prompts_are_the_beginnings_of_long_documents(demo: Any) -> None:
    cfg = demo("evaluate.samples=2", "evaluate.sample_prompt_tokens=4", "evaluate.sample_new_tokens=3").evaluate
    prompts = Prompts.read(_Documents([3, 20, 9, 5, 30]), cfg)  # type: ignore[arg-type]
    assert prompts.ids.tolist() == [[0, 1, 2, 3]] * 2
    assert [len(ids) for ids in prompts.following] == [3, 3]
    assert Prompts.read(_Documents([2, 3]), cfg).ids.shape == (0, 4)  # type: ignore[arg-type]


def test_a_model_that_does_not_fit_is_rejected_before_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(100, 50, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    assert hf_models.weight_bytes(tmp_path) == 10_000
    assert hf_models.weight_bytes(tmp_path, ExportDtype.fp32) == 20_000
    monkeypatch.setattr(devices, "free_memory_bytes", lambda: 2**30)
    hf_models.check_fits([("model", 2**30)], "fix")
    with pytest.raises(InputError, match=r"3.5 GiB are needed \(teacher 2.0, student 1.5\), but .* 1.0 GiB free; buy"):
        hf_models.check_fits([("teacher", 2 * 2**30), ("student", 3 * 2**29)], "buy more")


@pytest.mark.parametrize(
    ("content", "ids"),
    [
        ({"eos_token_id": [0, 7], "do_sample": False, "num_return_sequences": 4}, {"eos_token_id": [0, 7]}),
        ({"pad_token_id": "x", "eos_token_id": 2}, {"eos_token_id": 2}),
        ({"eos_token_id": 2, "do_sample": False, "temperature": 0.6}, None),  # read, only not saved
        ({"eos_token_id": 2, "temperature": 0.6, "do_sample": True}, None),
    ],
)
def test_ids_of_an_invalid_generation_config_are_kept(
    tmp_path: Path, content: dict[str, Any], ids: dict[str, Any] | None
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    options = hf_models.generation_options(tmp_path)
    if ids is None:
        assert options == {}
    else:
        assert options["generation_config"].to_diff_dict().items() >= ids.items()
        assert options["generation_config"].num_return_sequences == 1


@pytest.mark.parametrize("number", [0, 1])
def test_a_checkpoint_is_exported_by_the_first_rank_and_removed(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "rank", lambda: number)
    waits: list[None] = []
    monkeypatch.setattr(recovery.ranks, "wait", lambda: waits.append(None))

    def export(checkpoint: Path, folder: Path) -> None:
        assert checkpoint == tmp_path / "step=3"
        folder.mkdir()

    with recovery.export_temporarily("recovery/step=3", tmp_path / "step=3", tmp_path, export) as make:
        assert list(tmp_path.iterdir()) == []
        folder = make()
        assert folder == tmp_path / "exported_recovery_step_3"
        assert folder.exists() is (number == 0)
        assert len(waits) == 1
        folder.mkdir(exist_ok=True)
    # Another rank leaves it to the first one.
    assert folder.exists() is (number != 0)
