"""The status line, the summary of a run and the reasons in the log of a failed stage."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import progress
from launch.progress import StatusLine, duration, summary, training_status
from prune_distill.pipeline.artifact import locate, write_json, write_manifest
from prune_distill.pipeline.stage_log import describe_exit, last_attempt, read_reason
from prune_distill.schema import RunConfig


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminals_line_is_rewritten() -> None:
    stream = Terminal()
    shown = StatusLine(stream)
    shown.status("one")
    shown.status("two" * 200)
    shown.event("done")
    shown.event("next")
    first, second, done, after = stream.getvalue().replace("\n", "\r").split("\r")[1:5]
    assert first == "\x1b[2Kone"
    assert second.startswith("\x1b[2Ktwotwo")
    # Not wider than the terminal, so that it can be rewritten.
    assert len(second) < 200
    assert (done, after) == ("\x1b[2Kdone", "next")


def test_without_a_terminal_lines_are_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    shown = StatusLine(stream)
    for second in range(40):
        now[0] = 100.0 + second
        shown.status(str(second))
    assert stream.getvalue().split() == ["15", "30"]


def test_training_status_shows_the_newest_values(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": step, "max_steps": 5000, "loss": 3.0 - step / 5000} for step in range(1000)]
    text = "".join(json.dumps(line) + "\n" for line in [*lines, {"step": 999, "val_loss": 3.5}])
    path.write_text(text + '{"step": 1000, "lo')
    assert training_status(path, since=0) == "step 999/5000, cross-entropy 2.800, val cross-entropy 3.500"
    assert training_status(path, since=time.time() + 100) == ""
    assert training_status(tmp_path / "none", since=0) == ""


@pytest.mark.parametrize("part", ["kd_loss", "hidden_loss"])
def test_the_loss_of_a_distillation_is_named_as_such(tmp_path: Path, part: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1, "loss": 1.5, part: 1.0, "lm_loss": 2.0}) + "\n")
    assert training_status(path, since=0) == "step 1/?, distillation loss 1.500"


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (59, "59 s"), (60, "1:00"), (725, "12:05"), (10925, "3:02:05")]
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_describe_exit() -> None:
    assert describe_exit(3) == "exit code 3"
    assert describe_exit(-9) == "killed by SIGKILL (out of memory?)"
    assert describe_exit(-15) == "killed by SIGTERM"
    assert describe_exit(-7) == "killed by SIGBUS (a full disk, or a truncated file?)"


def test_a_reason_is_read_from_the_last_attempt_only(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("error: of the first attempt\n")
    start = log.stat().st_size
    with log.open("a") as file:
        file.write("x.py:1: UserWarning: noise\n\n" + "".join(f"line {number}\n" for number in range(50)))
        file.write("E1122 02:45:26.013000 4951 /s/torch/distributed/elastic/multiprocessing/api.py:1002] failed ")
        file.write("(exitcode: 1) local_rank: 3 (pid: 5024) of binary: python\nTraceback: of torchrun's own\n")
        # The first death counts, and what follows it is torchrun's.
        file.write("E1122 02:45:26.013000 4951 /s/torch/distributed/elastic/multiprocessing/api.py:1002] failed ")
        file.write("(exitcode: -15) local_rank: 0 (pid: 5021) of binary: python\n")
    reason = read_reason(log, start)
    assert reason.fault is None
    assert reason.death == "rank 3: exit code 1"
    assert reason.lines == [f"line {number}" for number in range(20, 50)]


def test_only_the_last_attempt_counts_and_srun_messages_are_ignored(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text(
        "--- 2030-01-01 00:00:00 +0000 job 1, restart 0, on n1\nerror: fixed since\n"
        "--- 2030-01-02 00:00:00 +0000 job 2, restart 0, on n1\n--- no date\nValueError: x\n"
        "srun: error: n1: task 0: Exited with exit code 1\nsrun: Terminating StepId=2.0\n"
    )
    reason = read_reason(log, last_attempt(log))
    assert reason.fault is None
    assert reason.lines == ["--- no date", "ValueError: x"]
    log.write_text("no attempt was marked\n")
    assert last_attempt(log) == 0


def test_a_fault_with_several_lines_is_read_once(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    fault = "error: 2 faults in the configuration:\n  - one\n  - two\n"
    log.write_text(f"Loading\n{fault}[rank1]: {fault}W1122 torchrun\n")
    assert read_reason(log, 0).fault == "2 faults in the configuration:\n  - one\n  - two"


def test_stages_with_their_times_and_the_reports_figures(demo: Callable[..., RunConfig], tmp_path: Path) -> None:
    located = list(locate(demo()).values())
    for number, stage in enumerate(located):
        write_manifest(stage, 0.0, 60.0 + number, {})
    student = {"params": 3_000_000, "val_loss": None, "hf_path": "nemo_to_hf-0123/student"}
    report = {"models": {"teacher": {"params": 5_250_000, "val_loss": 3.588}, "student": student}}
    folder = located[-1].folder
    write_json(folder / "report.json", report)
    text = summary(located)
    rows = [line.split() for line in text.splitlines()]
    assert ["demo_model", "1:00"] in rows
    evaluate = [stage.stage.name for stage in located].index("evaluate")
    assert ["evaluate", f"1:{evaluate:02}"] in rows
    assert "teacher       5.25 M parameters  val loss 3.5880\n" in text
    assert f"student: {folder.parent / 'nemo_to_hf-0123/student'}\nreport: {folder / 'report.json'}" in text
    (folder / "index.html").write_text("")
    assert f"report: {folder / 'index.html'}" in summary(located)
    (folder / "report.json").write_text("{")
    assert "report:" not in summary(located)
