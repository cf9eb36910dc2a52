"""The report of runs in every state, without private information."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prune_distill.pipeline.artifact import write_json
from prune_distill.pipeline.names import LOCK, MANIFEST, PLAN, RESOLVED
from prune_distill.reporting import words
from prune_distill.reporting.comparison import name_runs
from prune_distill.reporting.figures import pick_color, pick_marker
from prune_distill.reporting.privacy import Privacy
from prune_distill.reporting.results import LABELS
from prune_distill.reporting.run_folder import read_run
from recipes import report
from tests.helpers import report_runs
from tests.helpers.report_runs import HOSTILE, SECRETS


def build(*paths: Path, out: Path | None = None) -> tuple[str, dict[str, Any]]:
    """Return the page and the JSON object of a report."""
    where = ["--out", str(out)] if out is not None else []
    assert report.main([*map(str, paths), *where]) == 0
    folder = out or paths[0] / "report"

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not strict JSON")

    content = json.loads((folder / "report.json").read_text(), parse_constant=refuse)
    return (folder / "index.html").read_text(), content


def text_of(page: str) -> str:
    """Return the approximate visible text of a page."""
    body = re.sub(r"(?s)<(style|script|svg).*?</\1>", " ", page)
    return " ".join(re.sub(r"<[^>]+>", " ", body).replace("&#39;", "'").split())


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    return report_runs.finished(tmp_path / "run")


def test_a_finished_run(finished: Path) -> None:
    page, content = build(finished)
    output = text_of(page)
    assert "The student keeps 63 % of the teacher's parameters. Its held-out loss is 3.547 nats per token" in output
    assert "0.033 below the teacher's and 0.173 better than just pruned" in output
    assert "generates text 1.43\N{MULTIPLICATION SIGN} as fast as the teacher, and uses 66 % of the memory" in output
    assert "distill for 160 steps with 0.5 x KL divergence from the teacher + 0.5 x cross-entropy on the data" in output
    assert "0.676 ± 0.021" in output
    assert "Scores are shares of the questions: acc, those whose right choice is the most probable" in output
    assert "4 layers, hidden 256, FFN 704, heads 4 without layers 3-4" in output
    assert "python -m launch.run experiment=demo" in output
    assert page.count("<svg") == 15
    assert content["state"] == "complete"
    assert content["models"]["student"]["hf_path"] == "nemo_to_hf-0000/student"
    assert "hf_path" in content["models"]["teacher"]
    assert content["checks"] == {"import_max_abs_logit_diff": 6.7e-6, "export_max_abs_logit_diff": 7.6e-6}
    assert content["stages"]["prune"] == {"status": "complete", "seconds": 11.0, "starts": 1}
    assert content["tasks"]["held_out_choice"]["student"]["acc"]["stderr"] == 0.021
    assert [row["step"] for row in content["recovery"]] == [40, 80, 120, 160]
    assert content["benchmark"]["ratios"]["student"]["memory"] == 0.66
    assert content["backend"] == "cpu"


def test_quantized_models_and_servers_under_load(tmp_path: Path) -> None:
    run_dir = report_runs.finished(tmp_path / "run", "quantize.formats=[fp8]", "benchmark.engine=vllm")
    entry = {**report_runs.model("student_fp8", 3.55), "engine": "vLLM 0.32.0"}
    report_runs.complete(run_dir, "evaluate.fp8", {"student_fp8": entry})
    path = report_runs.folder_of(run_dir, "benchmark") / "benchmark.json"
    output = text_of(build(run_dir)[0])
    assert "Quantized models are not measured: transformers would compute with dequantized weights." in output
    assert "Continuous batching" not in output
    write_json(path, report_runs.served())
    page, content = build(run_dir)
    output = text_of(page)
    assert "Losses of quantized models are those of vLLM 0.32.0, their tasks" in output
    assert "Quantized models are not measured" not in output
    assert "vllm 0.32.0 on a processor" in output
    table = output.partition("Continuous batching")[2]
    assert "Student, FP8 2.5 240 0.80" in table
    assert "Student, FP8 all at once 480 1.60" in table
    assert "Each model's server got 64 requests at each rate" in table
    # Two points a model.
    assert "Servers under load, a point per rate of requests" in page
    assert content["benchmark"]["models"]["student_fp8"]["load"][1]["request_rate"] is None
    # What another program wrote.
    for nonsense in (3, [3, {"request_rate": "x", "output_tokens_per_second": 3}], [{}]):
        speeds = report_runs.served()
        speeds["models"]["student"]["load"] = speeds["ratios"]["student"]["load"] = nonsense
        write_json(path, speeds)
        build(run_dir)


def test_model_cards_have_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_AbCdEfGhIjKlMnOpQrSt")
    run_dir = report_runs.finished(tmp_path / "run", "quantize.formats=[fp8]", "benchmark.engine=vllm")
    entry = {**report_runs.model("student_fp8", 3.55), "engine": "vLLM 0.32.0"}
    inputs = {"student_fp8": {"path": "quantize.fp8-0000/student_fp8"}}
    report_runs.complete(run_dir, "evaluate.fp8", {"student_fp8": entry}, inputs=inputs)
    write_json(report_runs.folder_of(run_dir, "benchmark") / "benchmark.json", report_runs.served())
    build(run_dir)
    assert not list((run_dir / "report/cards").iterdir()), "a card was made up"
    for folder in ("nemo_to_hf-0000/student", "quantize.fp8-0000/student_fp8"):
        (run_dir / folder).mkdir(parents=True)
        (run_dir / folder / "README.md").write_text(f"# a card of {folder}\nhf_AbCdEfGhIjKlMnOpQrSt\n")
    stale = run_dir / "report/cards/student_int8.md"
    stale.write_text("of a format that is not asked for any more")
    build(run_dir)
    student, fp8 = ((run_dir / f"report/cards/{name}.md").read_text() for name in ("student", "student_fp8"))
    assert student.startswith("# a card of nemo_to_hf-0000/student\n")
    assert "hf_AbCd" not in student
    assert "| Student | 3.5470 | 85.3 % | 0.676 |" in fp8
    assert "| this model | 3.5500 | 85.0 % | 0.675 |" in fp8
    assert "Its loss is that of vLLM 0.32.0." in fp8
    assert "| Teacher | 9,000 | 210 | 0.028 s | 20.0 MiB | 80.0 | 160 |" in fp8
    assert "| this model | 3.5470 |" in student
    assert "server, 2.5 requests/s: tokens/s | server, all at once: tokens/s |" in student
    assert not stale.exists()


def test_models_and_samples_of_controls_come_from_their_own_stages(finished: Path) -> None:
    page, content = build(finished)
    assert list(content["models"]) == ["teacher", "pruned", "student", "ce"]
    assert text_of(page).count("written by the control") == 3


def test_every_commit_is_listed(finished: Path) -> None:
    assert "code 0123456789ab" in text_of(build(finished)[0])
    manifest = report_runs.folder_of(finished, "distill") / MANIFEST
    write_json(manifest, {**json.loads(manifest.read_text()), "git_commit": "ba9876543210-dirty"})
    page, content = build(finished)
    assert content["git_commits"]["ba9876543210-dirty"] == ["distill"]
    assert "distill.ce" in content["git_commits"]["0123456789ab"]
    assert "ba9876543210-dirty (distill)" in text_of(page)
    assert "0123456789ab (demo_model, " in text_of(page)


def test_costs_are_those_of_the_configs_price(tmp_path: Path) -> None:
    _, content = build(report_runs.finished(tmp_path / "run", "benchmark.cost_per_hour=3.6"))
    # 0.01 s per token at a price of 0.001 per second.
    assert content["benchmark"]["models"]["teacher"]["cost_per_million_tokens"] == pytest.approx(10.0)
    _, content = build(report_runs.finished(tmp_path / "free"))
    assert content["benchmark"]["models"]["teacher"]["cost_per_million_tokens"] is None


def test_planned_and_actual(finished: Path) -> None:
    output = text_of(build(finished)[0])
    assert "student: parameters 3,279,616 3,279,616" in output
    assert "distill: time 58 s 1 min 02 s" in output
    assert "distill: memory of a rank 114 MiB 1.40 GiB (the whole process)" in output
    (finished / PLAN).unlink()
    assert "This run has no plan" in text_of(build(finished)[0])


def test_each_model_has_a_color_and_a_marker_of_its_own() -> None:
    style = (Path(report.__file__).parents[1] / "prune_distill/reporting/templates/report.css").read_text()
    for name in LABELS:
        assert style.count(f"--{name}: #") == 2, f"{name}: the page has light and dark colors"
    assert len({pick_color(name) for name in LABELS}) == len({pick_marker(name, 0) for name in LABELS}) == len(LABELS)


def test_the_page_has_no_external_resources(finished: Path) -> None:
    page = build(finished)[0]
    links = re.findall(r"(?:href|src)=\"([^\"]*)\"|url\(([^)]*)\)|@import", page)
    outside = [one or other for one, other in links if not (one or other).startswith(("#", "data:"))]
    assert not outside
    ids = re.findall(r"\sid=\"([^\"]*)\"", page)
    assert len(ids) == len(set(ids))
    used = re.findall(r"(?:xlink:href=\"#|url\(#)([^\")]*)", page)
    assert used
    assert set(used) <= set(ids)


def test_texts_are_escaped(finished: Path) -> None:
    page = build(finished)[0]
    assert HOSTILE not in page
    assert "&lt;script&gt;alert(" in page
    folder = report_runs.folder_of(finished, "evaluate")
    manifest = json.loads((folder / MANIFEST).read_text())
    student = manifest["metrics"]["student"]
    manifest["metrics"][HOSTILE] = {**student, "tasks": {HOSTILE: {"acc": {"value": 0.5, "stderr": None}}}}
    write_json(folder / MANIFEST, manifest)
    page, content = build(finished)
    assert "<script>alert" not in page
    assert HOSTILE in content["models"]


def test_a_failed_run_says_why(tmp_path: Path) -> None:
    page, content = build(report_runs.failed(tmp_path / "run"))
    output = text_of(page)
    assert content["state"] == "failed"
    assert content["stages"]["distill"]["status"] == "failed"
    assert content["stages"]["distill"]["starts"] == 3
    assert "Stage distill failed." in output
    assert "step 91: the loss is nan" in output
    assert "No student has been evaluated yet." in output
    assert "No model has been evaluated: this run has no stage evaluate." in output
    assert "distill 3 times" in output
    assert "<script>alert" not in page
    # The losses before the failure are drawn.
    assert "Held-out loss of the students during training." in output


def test_a_run_that_has_only_started(tmp_path: Path) -> None:
    report_runs.begin(tmp_path / "run")
    page, content = build(tmp_path / "run")
    assert content["state"] == "unfinished"
    assert {stage["status"] for stage in content["stages"].values()} == {"to do"}
    assert "No model has been evaluated: stage evaluate is to do." in text_of(page)
    assert content["models"] == {}


def test_an_interrupted_stage_has_not_failed(tmp_path: Path) -> None:
    run_dir = report_runs.failed(tmp_path / "run")
    write_json(report_runs.folder_of(run_dir, "distill") / "state.json", {"state": "started"})
    page, content = build(run_dir)
    assert content["state"] == content["stages"]["distill"]["status"] == "interrupted"
    assert "Stage distill was interrupted; run the same command to resume it." in text_of(page)


def test_a_paused_and_a_running_stage(tmp_path: Path) -> None:
    import fcntl

    run_dir = report_runs.failed(tmp_path / "run")
    folder = report_runs.folder_of(run_dir, "distill")
    write_json(folder / "state.json", {"state": "paused", "step": 80})
    page, content = build(run_dir)
    assert content["state"] == "paused"
    assert "Stage distill is paused at step 80" in text_of(page)
    with (run_dir / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        page, content = build(run_dir)
    assert content["stages"]["distill"]["status"] == "running"
    assert "Stage distill was running when this was written. Step 90 of 160" in text_of(page)


def test_secrets_and_home_folders_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "s3cr3tWandbKey0123")
    run_dir = report_runs.finished(
        tmp_path / "run",
        "distill.mlflow.tracking_uri='https://tracking.example/x'",
        "distill.mlflow.experiment=/root/runs/x",
        "data.train=[/home/alice/data/part_0.jsonl]",
    )
    # Earlier versions accepted credentials.
    for path in [run_dir / RESOLVED, *run_dir.rglob("*.jsonl")]:
        uri = "https://alice:hunter2@tracking.example/x?sig=5eC2eT5eC2eT"
        path.write_text(path.read_text().replace("https://tracking.example/x", uri))
    folder = report_runs.folder_of(run_dir, "distill.ce")
    (folder / MANIFEST).unlink()
    message = "error: WANDB_API_KEY s3cr3tWandbKey0123, token=hf_AbCdEfGhIjKlMnOpQrSt of /lustre/home/alice/x"
    with (folder / "log.txt").open("a") as log:
        log.write(f"{message}\n  api_key: 5eC2eT5eC2eT\n")
    stored = "".join(path.read_text(errors="replace") for path in run_dir.rglob("*") if path.is_file())
    assert all(secret in stored for secret in SECRETS)
    page, content = build(run_dir)
    for shown in (page, json.dumps(content)):
        assert [secret for secret in (*SECRETS, str(tmp_path), "alice:") if secret in shown] == []
    assert "tracking.example/x?[removed]" in page
    assert "RUN_DIR" in page
    assert "~/data/part_0.jsonl" in page


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("tokens: 143360, tokenizer: gpt2", "tokens: 143360, tokenizer: gpt2"),
        (
            "round_tokens=20480 text_key: text cached_logits_top_k: 64",
            "round_tokens=20480 text_key: text cached_logits_top_k: 64",
        ),
        ("secret: null", "secret: null"),
        ("password='abcdefgh'", "password='[removed]'"),
        ("Authorization: Bearer abcdefghijklmnop", "Authorization: Bearer [removed]"),
        ("s3://key:word@bucket/x", "s3://bucket/x"),
        ("/home/bob/x and /scratch/home/eve.b/y", "~/x and ~/y"),
        ("/root/.cache /rooted /data/root", "~/.cache /rooted /data/root"),
        ("/runs/a/distill-1/log.txt", "RUN_DIR/distill-1/log.txt"),
        ("/runs/ab", "/runs/ab"),
    ],
)
def test_private_parts_of_a_text(text: str, shown: str) -> None:
    assert Privacy((Path("/runs/a"),), {}).text(text) == shown


NONSENSE = (
    "",
    "[1, 2]",
    '{"models": 3, "layers": [{}], "candidates": [1, {"rounds": 3}], "teacher": [], "ratios": 2, "stages": "x"}',
    '{"models": {"student": 1}, "teacher": {"loss": 1}, "candidates": [{"num_layers": 1, "loss": 1, "params": 1}]}',
)


@pytest.mark.parametrize("nonsense", NONSENSE)
@pytest.mark.parametrize("manifests", [False, True])
def test_damaged_files_count_as_missing(finished: Path, nonsense: str, manifests: bool) -> None:
    """The report is written although a run's files, and optionally its manifests, contain nonsense."""
    for path in sorted(path for path in finished.rglob("*") if path.suffix in (".json", ".jsonl", ".txt")):
        if manifests or path.name != MANIFEST:
            path.write_text(nonsense)
    build(finished)


def test_non_finite_numbers(finished: Path) -> None:
    folder = report_runs.folder_of(finished, "evaluate")
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["metrics"]["student"] |= {"val_loss": math.nan, "perplexity": math.inf, "params": None, "agreement": 3}
    manifest["metrics"]["pruned"] = {"val_loss": 3.7}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    speeds = report_runs.benchmark()
    speeds["models"]["student"] = {"decode_tokens_per_second": {"median": None}}
    speeds["ratios"] = {"student": {"decode": {"median": None}}}
    write_json(report_runs.folder_of(finished, "benchmark") / "benchmark.json", speeds)
    page, content = build(finished)
    assert content["models"]["student"]["val_loss"] is None
    assert "No student has been evaluated yet." in text_of(page)
    assert "nan" not in text_of(page).lower()


def test_an_interim_report_is_not_complete(finished: Path) -> None:
    write_json(finished / "report" / MANIFEST, {"status": "complete", "config_hash": "of another config"})
    build(finished)
    assert not (finished / "report" / MANIFEST).exists()


def test_a_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = {**report_runs.MODELS, "student": 3.61}
    runs = [
        report_runs.finished(tmp_path / "sweep" / "0"),
        report_runs.finished(tmp_path / "sweep" / "1", "distill.lr=0.0005", losses=losses),
        report_runs.failed(tmp_path / "sweep" / "2"),
    ]
    page, content = build(tmp_path / "sweep")
    output = text_of(page)
    assert "Of 2 students, that of demo: 0 has the lowest held-out loss: 3.547 nats per token." in output
    assert "demo: 2 has no evaluated student (failed)." in output
    assert "distill.lr 0.001 0.0005 0.001" in output
    assert "run_dir" not in output.partition("Settings that differ")[2].partition("Made by")[0]
    assert set(content["runs"]) == {"demo: 0", "demo: 1", "demo: 2"}
    assert page.count("<svg") == 3
    assert build(*runs, out=tmp_path / "out")[1] == content
    assert str(tmp_path) not in page
    assert report.main([str(tmp_path / "nowhere")]) == 2
    assert "nowhere: does not exist; give the folder of a run" in capsys.readouterr().err


def test_runs_with_equal_names_get_unique_names(tmp_path: Path) -> None:
    paths = [tmp_path / "a" / "x", tmp_path / "b" / "x"]
    for path in paths:
        report_runs.begin(path)
    assert list(name_runs([read_run(path) for path in paths])) == ["demo: x", "demo: x (2)"]


def test_a_config_of_another_version_is_shown_unchanged(finished: Path) -> None:
    with (finished / RESOLVED).open("a") as file:
        file.write("forgotten_setting: 3\n")
    output = text_of(build(finished)[0])
    assert "The run's config is not valid here" in output
    assert "forgotten_setting: 3" in output
    assert "The student keeps 63 %" in output


def test_the_report_imports_neither_torch_nor_nemo() -> None:
    code = (
        "import sys, recipes.report; print(sorted({'torch', 'nemo', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (words.number(-1234.56, 1), "\N{MINUS SIGN}1,234.6"),
        (words.number(math.nan), "\N{EN DASH}"),
        (words.signed(0.0004, 3), "0.000"),
        (words.signed(-0.5, 2), "\N{MINUS SIGN}0.50"),
        (words.significant(1234.5), "1,230"),
        (words.significant(0.00123), "0.00123"),
        (words.significant(9.999), "10.00"),
        (words.significant(1.2e-7), "1.2e\N{MINUS SIGN}07"),
        (words.count(5_246_976), "5.25 M"),
        (words.count(90e9), "90.0 B"),
        (words.size(1_500_000_000), "1.40 GiB"),
        (words.size(12), "12 B"),
        (words.duration(0.028), "0.028 s"),
        (words.duration(725), "12 min 05 s"),
        (words.duration(3 * 3600 + 125), "3 h 02 min"),
        (words.duration(200_000), "2 d 7 h"),
        (words.duration(None), "\N{EN DASH}"),
        (words.change(63, 100), "\N{MINUS SIGN}37 %"),
        (words.change(63, 0), ""),
        (words.moment(1e30), "\N{EN DASH}"),
    ],
)
def test_formatted_numbers(output: str, expected: str) -> None:
    assert output == expected


def test_losses_on_other_tokens_are_not_drawn_together(tmp_path: Path) -> None:
    whole, _ = build(report_runs.finished(tmp_path / "whole"))
    assert "Held-out loss of the students during training.</" in whole
    batches, _ = build(report_runs.finished(tmp_path / "batches", "distill.val_batches=8"))
    assert "during training, on the validation batches: not comparable with the losses of the evaluation." in batches
    # A complete distillation keeps the value that it was made with.
    run_dir = report_runs.finished(tmp_path / "kept")
    (manifest,) = run_dir.glob("distill-*/manifest.json")
    content = json.loads(manifest.read_text())
    write_json(manifest, {**content, "settings": {"distill.val_batches": 8}})
    assert "on the validation batches" in build(run_dir)[0]
