"""Trainings that are warned, preempted or canceled on a real Slurm save, pause, and resume."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from launch.queue import query_jobs
from prune_distill.pipeline.metrics_file import read_metrics
from tests.helpers.slurm_cluster import GRACE_SECONDS
from tests.slurm.conftest import WARNED_EARLY, Chain, slurm

# The fakes take 0.05 s a step.
LONG = 2000


def steps(chain: Chain) -> list[int]:
    return [line["step"] for line in read_metrics(chain.folder("second") / "metrics.jsonl")]


def wait_for_step(chain: Chain, step: int) -> None:
    chain.wait(lambda: list(chain.run_dir.glob("second*/metrics.jsonl")) and (steps(chain) or [0])[-1] >= step)


def warn(chain: Chain) -> str:
    """Send the signal that slurmctld sends before the time limit."""
    (job,) = chain.jobs("second")
    slurm("scancel", "--signal=USR1", "--batch", job)
    return job


def attempts(chain: Chain) -> int:
    return chain.log("second").count("\n--- 20") + chain.log("second").startswith("--- 20")


def test_a_time_limit_shorter_than_the_training(chain: Chain) -> None:
    """The whole protocol, with Slurm's own warning: it comes within 40 s, and the training takes 50."""
    chain.submit({"second": "steps 1000"}, f"cluster.slurm.sbatch={WARNED_EARLY}")
    wait_for_step(chain, 1)
    chain.wait(lambda: chain.state("second").get("state") == "paused")
    paused_at = chain.state("second")["step"]
    # One query each: a moment later the job may run again.
    looks: list[dict[str, Any]] = []
    chain.wait(lambda: looks.append(chain.status()["second"]) or looks[-1]["state"] == "queued")
    assert looks[-1]["detail"].startswith(f"paused at step {paused_at}")
    chain.wait_until_ended()
    assert chain.complete() == {"first", "second", "aside", "report"}, chain.report()
    assert steps(chain) == list(range(1, 1001))
    assert attempts(chain) >= 2
    assert f"paused at step {paused_at}: requeued" in chain.log("second")
    assert chain.status()["second"]["jobs"] == chain.jobs("second")


def test_a_warning_before_the_trainer_is_up_and_a_stale_stop_file(chain: Chain) -> None:
    chain.submit({"first": "sleep", "second": f"late {LONG}"}, "--until", "second")
    # An earlier attempt's file does not stop this one.
    (chain.folder("second") / "stop").touch()
    slurm("scancel", *chain.jobs("first"))
    chain.wait_until_ended()
    chain.submit({"second": f"late {LONG}"}, "--until", "second")
    chain.wait(lambda: "--- 20" in chain.log("second"))
    assert not (chain.folder("second") / "stop").exists()
    warn(chain)
    chain.wait(lambda: chain.state("second") == {"state": "paused", "step": 1})
    wait_for_step(chain, 20)
    slurm("scancel", *chain.jobs("second"))


def test_a_preempted_training_resumes_after_the_urgent_job(chain: Chain) -> None:
    chain.submit({"second": "steps 150"})
    wait_for_step(chain, 5)
    # Only trainings pause; another stage would fail.
    chain.wait(lambda: "aside" in chain.complete())
    started = time.monotonic()
    urgent = slurm(
        "sbatch", "--parsable", "-p", "urgent", "-N2", "--exclusive", "-o/dev/null", "--wrap=sleep 2"
    ).strip()
    chain.wait(lambda: chain.state("second").get("state") == "paused")
    chain.wait(lambda: query_jobs([urgent])[urgent].state == "COMPLETED")
    # The step was signaled at once, and the job did not use its whole grace time.
    assert time.monotonic() - started < GRACE_SECONDS
    chain.wait_until_ended()
    assert chain.complete() == {"first", "second", "aside", "report"}, chain.report()
    assert steps(chain) == list(range(1, 151))
    assert attempts(chain) == 2


def test_a_canceled_training_saves_and_stays_canceled(chain: Chain) -> None:
    chain.submit({"second": f"steps {LONG}"})
    wait_for_step(chain, 5)
    slurm("scancel", *chain.jobs("second"))
    chain.wait_until_ended()
    assert chain.status()["second"]["state"] == "paused"
    assert chain.state("second")["state"] == "paused"
    assert chain.status()["report"]["state"] == "cancelled"
    time.sleep(3)
    assert query_jobs(chain.jobs("second"))[chain.jobs("second")[0]].state == "CANCELLED"
    before = steps(chain)[-1]
    chain.submit({"second": f"steps {before + 5}"})
    chain.wait_until_ended()
    assert steps(chain) == list(range(1, before + 6))


def test_no_progress_and_too_many_restarts_end_a_chain(chain: Chain) -> None:
    chain.submit({"second": f"steps {LONG}"}, "cluster.slurm.max_restarts=1")
    for attempt in (1, 2):
        chain.wait(lambda attempt=attempt: attempts(chain) == attempt)  # type: ignore[misc]
        wait_for_step(chain, 10 * attempt)
        warn(chain)
    chain.wait_until_ended()
    stages = chain.status()
    assert stages["second"]["state"] == "paused"
    assert "after 1 restarts, the limit cluster.slurm.max_restarts" in stages["second"]["cause"]
    assert stages["report"]["state"] == "cancelled"
    assert not ({"second", "report"} & chain.complete())

    chain.submit({"second": "stuck"}, "cluster.slurm.max_restarts=1")
    chain.wait_until_ended()
    assert "paused at step 0, without progress" in chain.status()["second"]["cause"]


def test_without_requeue_the_next_job_resumes(chain: Chain) -> None:
    chain.submit({"second": "steps 100"}, "cluster.slurm.requeue=false", "cluster.slurm.max_restarts=2")
    first, second, third = chain.jobs("second")
    for job, step in ((first, 10), (second, 30)):
        wait_for_step(chain, step)
        slurm("scancel", "--signal=USR1", "--batch", job)
        chain.wait(lambda job=job: query_jobs([job])[job].state == "COMPLETED")  # type: ignore[misc]
    chain.wait_until_ended()
    assert chain.complete() == {"first", "second", "aside", "report"}, chain.report()
    assert steps(chain) == list(range(1, 101))
    log = chain.log("second")
    assert [f"job {job}, restart 0" in log for job in (first, second, third)] == [True] * 3
    assert "the next job of the chain resumes" in log


def kill(job: str) -> None:
    """Kill a job's processes without warning, like a node failure; scancel would terminate them first."""
    marks = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_CONF={os.environ['SLURM_CONF']}".encode()}
    killed = 0
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if marks <= set((place / "environ").read_bytes().split(b"\0")):
                os.kill(int(place.name), signal.SIGKILL)
                killed += 1
    assert killed > 1


def test_a_chain_resumes_after_a_job_killed_without_warning(chain: Chain) -> None:
    chain.submit({"second": "steps 100"}, "cluster.slurm.requeue=false", "cluster.slurm.max_restarts=2")
    first, second, third = chain.jobs("second")
    wait_for_step(chain, 15)
    kill(first)
    chain.wait_until_ended()
    assert chain.complete() == {"first", "second", "aside", "report"}, chain.report()
    assert {job: query_jobs([job])[job].state for job in (first, second, third)} == {
        first: "FAILED",
        second: "COMPLETED",
        third: "COMPLETED",
    }
    # Resumed from the last save: no step is missing or repeated.
    assert steps(chain) == list(range(1, 101))


def test_a_chain_ends_if_a_killed_job_made_no_progress(chain: Chain) -> None:
    chain.submit({"second": f"late {LONG}"}, "cluster.slurm.requeue=false", "cluster.slurm.max_restarts=3")
    jobs = chain.jobs("second")
    chain.wait(lambda: attempts(chain) == 1 and list(chain.folder("second").glob("pid-0")))
    kill(jobs[0])
    chain.wait_until_ended()
    assert [query_jobs([job])[job].state for job in jobs] == ["FAILED", "FAILED", "CANCELLED", "CANCELLED"], (
        chain.report()
    )
    stages = chain.status()
    assert stages["second"]["state"] == "failed"
    assert stages["second"]["cause"].startswith("the previous job saved no checkpoint beyond step 0")
    assert stages["report"]["state"] == "cancelled"


@pytest.mark.parametrize(("action", "states"), [("fail", "FAILED"), (f"steps {LONG}", "CANCELLED")])
def test_a_failed_or_canceled_job_ends_its_chain(chain: Chain, action: str, states: str) -> None:
    chain.submit({"second": action}, "cluster.slurm.requeue=false", "cluster.slurm.max_restarts=2")
    jobs = chain.jobs("second")
    if states == "CANCELLED":
        wait_for_step(chain, 5)
        slurm("scancel", jobs[0])
    chain.wait_until_ended()
    assert [query_jobs([job])[job].state for job in jobs] == [states, "CANCELLED", "CANCELLED"], chain.report()
    assert attempts(chain) == 1
    assert chain.status()["second"]["state"] == ("failed" if action == "fail" else "paused")
    assert chain.status()["report"]["state"] == "cancelled"


def test_a_canceled_pending_job_does_not_start_a_second_running_job(chain: Chain) -> None:
    chain.submit({"second": "steps 100"}, "cluster.slurm.requeue=false", "cluster.slurm.max_restarts=2")
    first, second, third = chain.jobs("second")
    wait_for_step(chain, 5)
    slurm("scancel", second)
    time.sleep(2)
    assert query_jobs([third])[third].state == "PENDING"
    assert query_jobs([first])[first].state == "RUNNING"
    chain.wait_until_ended()
    assert chain.complete() == {"first", "second", "aside", "report"}, chain.report()


@pytest.mark.parametrize("done_in", [1, 3])
def test_a_chain_that_is_too_short_fails_its_dependents(chain: Chain, done_in: int) -> None:
    """Later links do nothing."""
    plan = {"second": "steps 20" if done_in == 1 else f"steps {LONG}"}
    chain.submit(plan, "cluster.slurm.requeue=false", "cluster.slurm.max_restarts=1")
    if done_in == 1:
        chain.wait_until_ended()
        assert chain.complete() == {"first", "second", "aside", "report"}
        assert "already complete" in chain.log("second")
        return
    for job, step in zip(chain.jobs("second"), (5, 15), strict=True):
        wait_for_step(chain, step)
        slurm("scancel", "--signal=USR1", "--batch", job)
    chain.wait_until_ended()
    assert "in the last job of the chain; run launch.run again to resume" in chain.log("second")
    assert chain.status()["report"]["state"] == "cancelled"
