"""Metrics files, exported configs, the check of a teacher, without NeMo."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from launch.progress import training_status
from prune_distill.errors import ConfigError, InputError
from prune_distill.model.huggingface import local_folder
from prune_distill.nemo.chance import require_better_than_chance
from prune_distill.pipeline.metrics_file import MetricsFile, loss_gain, read_metrics
from prune_distill.pipeline.stage_main import command_line
from prune_distill.pruning.importance import check_loss
from recipes.prepare_data import describe_repetition
from tests.conftest import QWEN3


def test_a_resumed_run_removes_repeated_steps(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        file.append(step=step, loss=1.0 / step)
    file.append(step=2, val_loss=0.5)
    with file.path.open("a") as cut:
        cut.write('{"step": 4, "lo')
    file.truncate_after(2)
    assert read_metrics(file.path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}, {"step": 2, "val_loss": 0.5}]
    assert read_metrics(tmp_path / "none") == []


ODD_LINES = (
    '{"step": 3, "loss": 1',  # cut by a kill
    "\0\0\0\0",
    "\x80\xff garbage",
    "[1, 2]",
    "7",
    '{"loss": 1.0}',
    '{"step": "3", "loss": 1.0}',
    '{"step": -1, "loss": 1.0}',
    '{"step": true}',
    '{"step": 3, "loss": "low"}',
    '{"step": 3, "loss": ' + "9" * 400 + "}",
    "[" * 100_000,
)


@pytest.mark.parametrize("odd", ODD_LINES)
def test_invalid_metrics_lines_are_skipped_and_removed_on_resume(
    tmp_path: Path, odd: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    good = ['{"step": 2, "loss": 2.0}', '{"step": 2, "val_loss": 3.0}', '{"step": 3, "loss": 9.0}']
    # Steps 2 and 3 twice, from two starts of a stage.
    again = ['{"step": 2, "loss": 2.5}', '{"step": 3, "loss": 1.0}']
    path.write_bytes("\n".join([good[0], odd, *good[1:], *again]).encode("latin-1"))
    assert [line["step"] for line in read_metrics(path)] == [2, 2, 3, 2, 3]
    assert training_status(path, 0) == "step 3/?, cross-entropy 1.000, val cross-entropy 3.000"
    MetricsFile(path).truncate_after(2)
    assert path.read_text().splitlines() == ['{"step": 2, "loss": 2.5}', good[1]]
    assert "2 of steps after 2, 1 that were repeated, 1 that are not metrics" in caplog.text


def test_a_missing_metrics_file_causes_a_warning_on_resume(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.truncate_after(0)
    assert caplog.text == ""
    file.path.unlink()
    file.truncate_after(7)
    assert "metrics.jsonl is missing: the record starts after step 7" in caplog.text
    assert loss_gain(file.path) == {"val_loss_before": None, "val_loss_after": None, "val_loss_gain": None}


def test_model_folders_that_cannot_be_used_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no config\.json"):
        local_folder(tmp_path, None, weights=True)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(InputError, match="hidden_size: missing"):
        local_folder(tmp_path, None, weights=False)
    assert local_folder(tmp_path, None, weights=False, model=False) == tmp_path
    (tmp_path / "config.json").write_text(json.dumps(QWEN3))
    with pytest.raises(InputError, match=r"holds no \*\.safetensors"):
        local_folder(tmp_path, None, weights=True)
    assert local_folder(tmp_path, None, weights=False) == tmp_path
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["x.Y", null]}}')
    with pytest.raises(InputError, match="needs custom code"):
        local_folder(tmp_path, None, weights=False)


def test_an_untrained_teacher_is_rejected() -> None:
    check_loss(3.2, vocab_size=1000)
    with pytest.raises(InputError, match="no better than chance"):
        check_loss(math.log(1000) + 0.1, vocab_size=1000)
    with pytest.raises(InputError, match="logits are non-finite"):
        check_loss(math.nan, vocab_size=1000)
    with pytest.raises(InputError, match="on the data is nan .* no better than chance"):
        require_better_than_chance(math.nan, 1000, "the data", "check the weights")


@pytest.mark.parametrize(
    ("error", "output"),
    [
        (ConfigError("set x"), "error: 1 fault in the configuration:\n  - set x"),
        (InputError("bring y"), "error: bring y"),
        (
            RuntimeError("inline_container.cc:672: unexpected pos 7 vs 5"),
            "error: no space left (RuntimeError: inline_container.cc",
        ),
        (
            RuntimeError("writer: No space left on device"),
            "error: no space left (RuntimeError: writer: No space left on device)",
        ),
    ],
)
def test_user_errors_end_with_one_message(error: Exception, output: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, command_line():
        raise error
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(output)


def test_a_full_disk_is_recognized_where_numpy_only_counts_what_it_wrote(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, command_line(), Path("/dev/full").open("wb") as file:
        np.save(file, np.zeros(100_000))
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: no space left (OSError: ")


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError), command_line():
        _ = 1 / 0


def test_repeated_documents_cause_a_warning() -> None:
    assert describe_repetition(available=1000, read=1000) is None
    output = describe_repetition(available=4_000, read=10_000)
    assert output is not None
    assert "10,000 tokens, but there are 4,000: each document is read 2.5 times" in output
