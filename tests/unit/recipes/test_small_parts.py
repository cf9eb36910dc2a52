"""Metrics files, exported configs, the report's content, the check of a teacher: no NeMo."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conf.errors import ConfigError, InputError
from conf.load import compose
from recipes import importance, report
from recipes.runtime.huggingface import local_folder
from recipes.runtime.metrics_file import MetricsFile, read_metrics
from recipes.runtime.stage_main import command_line


def test_a_resumed_run_forgets_the_steps_it_repeats(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        file.append(step=step, loss=1.0 / step)
    file.append(step=2, val_loss=0.5)
    with file.path.open("a") as cut:
        cut.write('{"step": 4, "lo')
    file.forget_after(2)
    assert read_metrics(file.path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}, {"step": 2, "val_loss": 0.5}]
    assert read_metrics(tmp_path / "none") == []


def test_model_folders_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no config\.json"):
        local_folder(tmp_path, None, weights=True)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(InputError, match=r"holds no \*\.safetensors"):
        local_folder(tmp_path, None, weights=True)
    assert local_folder(tmp_path, None, weights=False) == tmp_path
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["x.Y", null]}}')
    with pytest.raises(InputError, match="asks for code of its own"):
        local_folder(tmp_path, None, weights=False)


def test_a_teacher_that_knows_nothing_is_refused() -> None:
    trainer = SimpleNamespace(callback_metrics={"val_loss": 3.2})
    assert importance._plausible(trainer, 1000) == 3.2
    for loss in (math.log(1000) + 0.1, math.nan):
        trainer.callback_metrics["val_loss"] = loss
        with pytest.raises(InputError, match="no better than chance"):
            importance._plausible(trainer, 1000)


@pytest.mark.parametrize(
    ("error", "said"),
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
def test_what_a_user_can_mend_ends_with_one_message(
    error: Exception, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended, command_line():
        raise error
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(said)


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError), command_line():
        _ = 1 / 0


def manifests() -> dict[str, dict[str, Any]]:
    model = {
        "params": 100,
        "num_layers": 4,
        "hidden_size": 8,
        "ffn_hidden_size": 8,
        "num_attention_heads": 2,
        "num_query_groups": 1,
        "val_loss": 3.5,
        "perplexity": 33.0,
        "bits_per_byte": 2.0,
        "tokens": 640,
    }
    done = {"status": "complete", "seconds": 1.5, "git_commit": "abc"}
    models = {
        "teacher": model,
        "pruned": {**model, "val_loss": 4.0},
        "student": {**model, "val_loss": 3.6, "params": 60},
    }
    places = {"teacher": "demo_model-1/hf", "pruned": "nemo_to_hf-2/pruned", "student": "nemo_to_hf-2/student"}
    return {
        "prune": {**done, "metrics": {"params_before": 100, "params": 60, "kept_layers": [1, 2]}},
        "distill": {**done, "metrics": {"backend": "cpu"}},
        "verify": {
            **done,
            "metrics": {"tokens": 9, "import_max_abs_logit_diff": 1e-6, "export_max_abs_logit_diff": 2e-6},
        },
        "evaluate": {**done, "metrics": models, "inputs": {name: {"path": path} for name, path in places.items()}},
    }


def test_the_report_says_what_came_out() -> None:
    cfg = compose(["experiment=demo"])
    summary = report.summarize(cfg, manifests())
    assert summary["models"]["student"]["hf_path"] == "nemo_to_hf-2/student"
    assert summary["checks"] == {"import_max_abs_logit_diff": 1e-6, "export_max_abs_logit_diff": 2e-6}
    assert summary["stages"]["prune"] == {"status": "complete", "seconds": 1.5}
    curve = [{"step": 5, "loss": 0.2}, {"step": 10, "loss": 0.1}, {"step": 10, "val_loss": 3.6}]
    page = report.render(cfg, summary, {"student": curve})
    assert "keeps 60 % of the teacher" in page
    assert "0.100 above the teacher" in page
    assert "0.400 better than just pruned" in page
    assert page.count("<svg") == 2
    assert "http" not in page.replace("http://www.w3.org", "").replace("https://matplotlib.org", "").replace(
        "http://purl.org", ""
    ).replace("http://creativecommons.org", "")


def test_a_teacher_of_the_users_is_not_placed() -> None:
    cfg = compose(["experiment=qwen3_8b_to_6b_depth", "data.train=[x.jsonl]"])
    content = manifests()
    content["evaluate"]["inputs"]["teacher"]["path"] = "../../home/someone/model"
    summary = report.summarize(cfg, content)
    assert "hf_path" not in summary["models"]["teacher"]
    assert "someone" not in json.dumps(summary)
