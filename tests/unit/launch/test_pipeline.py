"""The launcher with fake stages as real processes."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from launch import progress
from launch.planning.automatic import compose
from launch.run import main
from prune_distill.config.load import load_resolved
from prune_distill.pipeline.artifact import locate, write_manifest
from prune_distill.pipeline.names import LAUNCHES
from prune_distill.pipeline.stage import Stage
from tests.helpers.fake_stage import MODULE, PLAN, TABLE

ALL = ["first", "second", "aside", "report"]


class Launcher:
    """Runs `launch.run` over the fake table on one run folder."""

    def __init__(self, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self.run_dir = run_dir
        self._monkeypatch = monkeypatch
        self._capfd = capfd

    def run(
        self, *arguments: str, plan: dict[str, str] | None = None, stages: Sequence[Stage] = TABLE
    ) -> tuple[int, str, str]:
        """Exit status, stdout, stderr."""
        self._monkeypatch.setenv(PLAN, json.dumps(plan or {}))
        self._capfd.readouterr()
        status = main(["experiment=demo", f"run_dir={self.run_dir}", *arguments], stages)
        return (status, *self._capfd.readouterr())

    def calls(self) -> list[str]:
        """Return the stages that were started since the last call."""
        path = self.run_dir / "calls.txt"
        names = path.read_text().split() if path.exists() else []
        path.unlink(missing_ok=True)
        return names

    def folder(self, stage: str) -> Path:
        (found,) = self.run_dir.glob(f"{stage}*")
        return found


@pytest.fixture
def launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Launcher:
    return Launcher(tmp_path / "run", monkeypatch, capfd)


def test_a_run_its_repetition_and_a_change(launcher: Launcher) -> None:
    code, out, err = launcher.run()
    assert (code, err) == (0, "")
    assert launcher.calls() == ALL
    assert load_resolved(launcher.run_dir / "resolved.yaml").name == "demo"
    log = (launcher.folder("second") / "log.txt").read_text()
    assert "-m tests.helpers.fake_stage second --config" in log.splitlines()[0]

    code, out, err = launcher.run()
    assert (code, err) == (0, "")
    assert launcher.calls() == []
    assert out.count("complete, skipped") == len(ALL)

    assert launcher.run("distill.lr=2e-3")[0] == 0
    assert launcher.calls() == ["second", "report"]
    assert load_resolved(launcher.run_dir / "resolved.yaml").distill.lr == 2e-3
    # Reverted: earlier results still exist; only the report, of which a run folder has one, is written again.
    assert launcher.run("cluster.threads_per_rank=3")[0] == 0
    assert launcher.calls() == ["report"]


def test_until_and_list(launcher: Launcher) -> None:
    assert launcher.run("--until", "second")[0] == 0
    assert launcher.calls() == ["first", "second"]
    code, out, _ = launcher.run("--list")
    assert code == 0
    assert [line.split()[:2] for line in out.splitlines()] == [
        ["first", "complete"],
        ["second", "complete"],
        ["aside", "to"],
        ["report", "to"],
    ]
    assert launcher.calls() == []
    code, _, err = launcher.run("--until", "prune")
    assert code == 2
    assert "no such stage" in err
    assert ", ".join(ALL) in err


def test_a_failed_stage_is_named_with_its_last_lines_and_resumed(launcher: Launcher) -> None:
    code, _, err = launcher.run(plan={"second": "fail"})
    assert code == 1
    assert "stage second failed (exit code 1)" in err
    assert "about to divide" in err
    assert "ZeroDivisionError: nothing by nothing" in err
    assert str(launcher.folder("second") / "log.txt") in err
    assert launcher.calls() == ["first", "second"]

    assert launcher.run()[0] == 0
    assert launcher.calls() == ALL[1:]
    # The log of the failed attempt is kept above that of the second one.
    assert (launcher.folder("second") / "log.txt").read_text().count("--- 20") == 2


def test_a_disk_without_room_for_the_log_is_named(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.pipeline.free_bytes", lambda path: 4096)
    code, _, err = launcher.run(plan={"second": "fail"})
    assert code == 2
    assert f"error: no space left on the disk of {launcher.folder('second')}; free some space" in err
    assert "about to divide" not in err


def test_only_the_message_of_a_user_error_is_shown(launcher: Launcher) -> None:
    code, _, err = launcher.run(plan={"first": "fault"})
    assert code == 2
    assert "stage first failed (exit code 2)\n1 fault in the configuration:\n  - distill.lr=9 is too high; set 1" in err
    assert "Loading" not in err


@pytest.mark.parametrize("action", ["no_manifest", "half"])
def test_success_without_a_valid_manifest_is_an_error(launcher: Launcher, action: str) -> None:
    code, _, err = launcher.run("--until", "first", plan={"first": action})
    assert code == 1
    assert "no manifest.json" in err
    assert launcher.run("--until", "first")[0] == 0
    assert launcher.calls() == ["first", "first"]


def test_progress_is_read_from_the_metrics_file(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.1)
    code, out, _ = launcher.run("--until", "first", plan={"first": "train"})
    assert code == 0
    (line,) = {line.partition(" s, ")[2] for line in out.splitlines() if "step " in line}
    assert line == "step 40/150, cross-entropy 2.500, val cross-entropy 3.250, 1,234 tokens/s, 1:15 left"


def test_a_sweep_runs_every_combination_in_its_own_folder(launcher: Launcher) -> None:
    code, _, err = launcher.run("-m", "distill.lr=1e-3,2e-3", "--until", "first")
    assert (code, err) == (0, "")
    rates = [load_resolved(launcher.run_dir / number / "resolved.yaml").distill.lr for number in "01"]
    assert rates == [1e-3, 2e-3]
    assert not (launcher.run_dir / "resolved.yaml").exists()


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["-m", "prune.num_layers=4,9"], "prune.num_layers=9: larger"),
        (["distill.lrr=1", "cluster.nodes=0"], "2 faults in the configuration:\n"),
        (["data.train=[nowhere/a.jsonl]"], "data.train=[nowhere/a.jsonl]: "),
        (["cluster.nodes=2", "distill.global_batch_size=8"], "cluster.rdzv_endpoint=null: cluster.nodes=2 needs"),
        (["distill.lr=1e-3,1e-4"], "add --multirun"),
    ],
)
def test_a_fault_starts_nothing(launcher: Launcher, arguments: list[str], fault: str) -> None:
    code, out, err = launcher.run(*arguments)
    assert (code, out) == (2, "")
    assert fault in err
    assert not launcher.run_dir.exists()


def test_a_run_folder_that_cannot_be_written(launcher: Launcher, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, _, err = launcher.run(f"run_dir={tmp_path / 'file' / 'run'}")
    assert code == 2
    assert str(tmp_path / "file") in err
    assert "a file is in its place; set another run_dir" in err


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EROFS, "it is not writable; set another run_dir"),
        (errno.EACCES, "it is not writable; set another run_dir"),
        (errno.ENOSPC, "free some space, or set another run_dir"),
        (errno.EDQUOT, "free some space, or set another run_dir"),
    ],
)
def test_why_a_run_folder_cannot_be_written(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number), "run")

    monkeypatch.setattr("launch.records.save_resolved", fail)
    code, _, err = launcher.run()
    assert (code, err.strip().endswith(words)) == (2, True)


def test_a_config_with_faults_prints_and_so_does_one_without_an_experiment(capsys: pytest.CaptureFixture[str]) -> None:
    secret = "http://u:hunter2@h/"
    assert main(["experiment=demo", "distill.lr=fast", f"model.name='{secret}'", "--cfg", "job"]) == 2
    out, err = capsys.readouterr()
    tree = yaml.safe_load(out)
    assert (tree["distill"]["lr"], tree["distill"]["max_steps"], tree["name"]) == ("fast", 160, "demo")
    assert tree["distill"]["clip_grad"] == 1.0  # of the schema
    assert err.startswith("2 faults in the configuration")
    assert "hunter2" not in out + err
    assert main(["--cfg", "job"]) == 2
    out, err = capsys.readouterr()
    assert yaml.safe_load(out)["model"]["name"] == "???"
    assert "experiment: not chosen" in err


def test_the_help_lists_user_config_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "my_site.yaml").write_text("name: my_site\n")
    with pytest.raises(SystemExit):
        main(["--config-dir", str(tmp_path), "--help"])
    assert "my_site" in capsys.readouterr().out
    assert main(["--config-dir", str(tmp_path / "nowhere")]) == 2


def test_commands_are_recorded_without_credentials_unless_rejected(launcher: Launcher) -> None:
    key = "distill.mlflow.tracking_uri"
    assert launcher.run(f"{key}='http://u:hunter2@h/'", "distill.mlflow.experiment=x", "--until", "first")[0] == 2
    assert not launcher.run_dir.exists()
    # A later override takes its place, so that the config holds none.
    assert launcher.run("name='http://u:hunter2@h/'", "name=x", "--until", "first")[0] == 0
    (line,) = (launcher.run_dir / LAUNCHES).read_text().splitlines()
    assert "name=x" in line
    assert "hunter2" not in line


def test_threads_are_divided_among_ranks(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    launcher.run("--until", "first")
    cores = len(os.sched_getaffinity(0))
    assert f"threads {cores}\n" in (launcher.folder("first") / "log.txt").read_text()
    launcher.run("cluster.threads_per_rank=5", "seed=2", "--until", "first")
    logs = {path.read_text().splitlines()[1] for path in launcher.run_dir.glob("first-*/log.txt")}
    assert logs == {f"threads {cores}", "threads 5"}


def test_a_run_starts_with_its_plan(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.planning.disk.free_bytes", lambda path: 100 << 20)
    code, out, _ = launcher.run("--until", "first")
    assert code == 0
    assert out.splitlines()[:2] == [
        "plan: 5.25 M -> 3.28 M parameters (-37%), 160 steps, 164 k tokens",
        "plan: 0.84 GiB on disk, 0.10 GiB are free",
    ]
    # Without a configured GPU there are neither memory nor hours.
    assert "GPU" not in out
    assert f"warning: {launcher.run_dir} has 0.1 GiB free, and the run still writes about 0.8 GiB" in out
    # Complete stages have no plan.
    assert "plan:" not in launcher.run("--until", "first")[1]


SMALL_GPU = "cluster.gpu={name: tiny, memory_gib: 0.1, bf16_tflops: 100}"


def test_stages_that_do_not_fit_the_gpu_are_rejected_unless_complete(launcher: Launcher) -> None:
    table = (Stage("distill", MODULE, ("distill",), lambda cfg: {}),)
    code, out, err = launcher.run(SMALL_GPU, stages=table)
    assert (code, out) == (2, "")
    assert "distill needs 0.1 GiB a GPU for its tensors alone, and cluster.gpu.memory_gib=0.1 (tiny)" in err
    assert "or set cluster.gpu=null to go unchecked" in err
    assert not launcher.run_dir.exists()

    (located,) = locate(compose(["experiment=demo", f"run_dir={launcher.run_dir}"]), table).values()
    write_manifest(located, 0.0, 1.0, {})
    assert launcher.run(SMALL_GPU, stages=table)[0] == 0


def test_stages_that_only_lack_the_reserve_cause_a_warning(launcher: Launcher) -> None:
    code, out, _ = launcher.run("--until", "first", SMALL_GPU.replace("0.1", "1"))
    assert code == 0
    assert "warning: the plan does not fit: " in out
