"""Chains of fake stages on a real Slurm: complete, repeated, and with failures."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

from launch.queue import query_jobs
from tests.helpers.fake_stage import PLAN
from tests.helpers.launches import wait_for
from tests.slurm.conftest import Chain, slurm

ALL = {"first", "second", "aside", "report"}


def test_a_chain_completes_and_a_second_submission_does_nothing(chain: Chain) -> None:
    chain.run_dir = chain.run_dir.parent / 'it\'s a run, 100% "whole" $(id) `id` $HOME #1 -é 汉字'
    chain.submit({})
    chain.wait_until_ended()
    assert chain.complete() == ALL, chain.report()
    # One after the other where one reads what another made.
    calls = (chain.run_dir / "calls.txt").read_text().split()
    assert (calls[0], set(calls[1:3]), calls[3:]) == ("first", {"second", "aside"}, ["report"])
    assert not list(chain.run_dir.glob("*/stop"))
    done = chain.launch({})
    assert done.returncode == 0
    assert done.stdout.count("complete, skipped") == 4


def test_complete_stages_are_not_submitted(chain: Chain) -> None:
    chain.submit({}, "--until", "second")
    chain.wait_until_ended()
    assert chain.complete() == {"first", "second"}
    done = chain.launch({})
    assert "first: complete, skipped" in done.stdout
    chain.wait_until_ended()
    assert chain.complete() == ALL
    scripts = sorted(path.name for path in (chain.run_dir / "slurm").glob("*.sbatch"))
    assert scripts == ["01-first.sbatch", "02-second.sbatch", "03-aside.sbatch", "04-report.sbatch"]
    # Submitted by hand, and already complete when it starts: it does nothing.
    script = chain.run_dir / "slurm" / "02-second.sbatch"
    slurm("sbatch", "--wait", str(script))
    assert chain.log("second").count("already complete") == 1
    assert (chain.run_dir / "calls.txt").read_text().split().count("second") == 1


def test_a_failing_stage_cancels_its_dependents_and_reports_the_cause(chain: Chain) -> None:
    chain.submit({"second": "fail"})
    chain.wait_until_ended()
    assert chain.complete() == {"first", "aside"}
    assert chain.log("report") == ""
    stages = chain.status()
    assert {name: stage["state"] for name, stage in stages.items()} == {
        "first": "complete",
        "second": "failed",
        "aside": "complete",
        "report": "cancelled",
    }
    assert "ZeroDivisionError: nothing by nothing" in stages["second"]["cause"]
    assert "needs second" in stages["report"]["detail"]
    # After the fix, the same command submits the remaining stages.
    done = chain.launch({})
    assert done.stdout.count("complete, skipped") == 2, done.stderr
    chain.wait_until_ended()
    assert chain.complete() == ALL, chain.report()
    assert {stage["state"] for stage in chain.status().values()} == {"complete"}


def test_a_user_error_is_reported_as_the_cause(chain: Chain) -> None:
    chain.submit({"first": "fault"}, "--until", "first")
    chain.wait_until_ended()
    cause = chain.status()["first"]["cause"]
    assert cause == "1 fault in the configuration:\n  - distill.lr=9 is too high; set 1"


def test_a_killed_task_fails_its_job(chain: Chain) -> None:
    chain.submit({"first": "sleep"})
    pid = wait_for(chain.run_dir, "first")
    assert chain.status()["first"]["state"] == "running"
    assert chain.status()["second"]["state"] == "queued"
    assert chain.status()["second"]["detail"] == "Dependency"
    os.kill(pid, signal.SIGKILL)
    chain.wait_until_ended()
    assert chain.complete() == set()
    states = [stage["state"] for stage in chain.status().values()]
    assert states == ["failed", "cancelled", "cancelled", "cancelled"]
    assert chain.status()["first"]["cause"].endswith("killed by SIGKILL (out of memory?)")


def test_a_run_is_not_submitted_twice(chain: Chain) -> None:
    chain.submit({"first": "sleep"})
    (first,) = chain.jobs("first")
    done = chain.launch({})
    assert done.returncode == 2
    assert f"unfinished jobs {first}, " in done.stderr
    assert "scancel" in done.stderr
    slurm("scancel", *(job for name in ALL for job in chain.jobs(name)))


def test_a_rejected_submission_cancels_earlier_jobs(chain: Chain, tmp_path: Path) -> None:
    refusing = tmp_path / "bin" / "sbatch"
    refusing.parent.mkdir()
    refusing.write_text(
        "#!/bin/bash\n"
        'case "$*" in *03-aside*) echo "sbatch: error: Invalid qos specification" >&2; exit 1;; esac\n'
        f'exec {shutil.which("sbatch")} "$@"\n'
    )
    refusing.chmod(0o755)
    done = chain.launch({"first": "sleep"}, path=refusing.parent)
    assert done.returncode == 2
    assert "sbatch rejected" in done.stderr
    assert "03-aside.sbatch (sbatch: error: Invalid qos specification)" in done.stderr
    ids = [*chain.jobs("first"), *chain.jobs("second")]
    outcome = f"jobs {', '.join(ids)}, submitted before it, are canceled; set cluster.slurm.qos to one of yours"
    assert outcome in done.stderr
    chain.wait_until_ended()
    assert {job.state for job in query_jobs(ids).values()} == {"CANCELLED"}


def test_jobs_beyond_the_limits_of_the_partition_are_rejected(chain: Chain) -> None:
    """sbatch accepts such jobs, which wait forever."""
    more = ("cluster.time_limit='9:00:00'", "cluster.nodes=3", "distill.global_batch_size=12")
    done = chain.launch({}, *more)
    assert done.returncode == 2
    assert "cluster.time_limit=9:00:00: partition main allows at most 04:00:00; set" in done.stderr
    assert "cluster.nodes=3: partition main allows at most 2 per job; set cluster.nodes=2" in done.stderr
    done = chain.launch({}, "cluster.slurm.partition=gpu")
    fix = "cluster.slurm.partition=gpu: does not exist; set it to main or urgent"
    assert fix in done.stderr
    assert not chain.run_dir.exists()


def test_a_line_of_setup_that_fails_fails_the_job(chain: Chain, tmp_path: Path) -> None:
    (tmp_path / "env.sh").write_text("false\nexport SITE=here\n")
    setup = f"cluster.slurm.setup=['. {tmp_path}/env.sh','test $SITE = here','module load cuda']"
    chain.submit({}, "--until", "first", setup)
    chain.wait_until_ended()
    stage = chain.status()["first"]
    assert (stage["state"], chain.complete()) == ("failed", set())
    assert stage["cause"] == "cluster.slurm.setup: module load cuda failed with exit code 127"


def test_a_sweep_submits_one_chain_per_run(chain: Chain) -> None:
    chain.submit({}, "-m", "distill.lr=1e-3,2e-3", "--until", "second")
    runs = [Chain(chain.run_dir / number) for number in "01"]
    for run in runs:
        run.wait_until_ended()
        assert run.complete() == {"first", "second"}, run.report()
    assert len({job for run in runs for job in run.jobs("second")}) == 2


def test_only_named_variables_reach_a_job(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("OTHER_TOKEN", "other_secret")
    monkeypatch.setenv("HF_HOME", "/shared/hub")
    setup = "cluster.slurm.setup=['env > \"$folder/env.txt\"']"
    resources = ("cluster.slurm.cpus_per_gpu=3", "cluster.slurm.mem=200M")
    chain.submit({}, "--until", "first", f"cluster.slurm.secrets=[{PLAN},HF_TOKEN]", setup, *resources)
    chain.wait_until_ended()
    lines = (chain.folder("first") / "env.txt").read_text().splitlines()
    assert {"HF_TOKEN=hf_secret", "HF_HOME=/shared/hub"} <= set(lines)
    # Cores and memory are as requested.
    assert {"SLURM_CPUS_PER_TASK=3", "SLURM_MEM_PER_NODE=200"} <= set(lines)
    assert not [line for line in lines if "OTHER_TOKEN" in line]
    kept = [path for path in chain.run_dir.rglob("*") if path.is_file() and path.name != "env.txt"]
    assert len(kept) > 5
    assert not [path for path in kept if b"hf_secret" in path.read_bytes()]
