"""States of jobs and job arrays from squeue."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.queue import filter_active, query_jobs


@pytest.mark.parametrize(
    ("rows", "state"),
    [
        (["7_0|COMPLETED|None|0:00", "7_1|RUNNING|None|9:00", "7_[2-3]|PENDING|Resources|10:00"], "RUNNING"),
        (["7_[2-3]|PENDING|Resources|10:00", "7_0|FAILED|None|0:00"], "PENDING"),
        (["7_0|FAILED|NonZeroExitCode|0:00", "7_1|COMPLETED|None|0:00"], "FAILED"),
        (["7_0|COMPLETED|None|0:00", "7_1|COMPLETED|None|0:00"], "COMPLETED"),
        (["7|RUNNING|None|9:00", "71_0|FAILED|None|0:00"], "RUNNING"),
    ],
)
def test_an_array_has_the_state_of_its_most_relevant_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[str], state: str
) -> None:
    squeue = tmp_path / "squeue"
    squeue.write_text("#!/bin/sh\ncat <<END\n" + "\n".join(rows) + "\nEND\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert {job: queued.state for job, queued in query_jobs(["7", "8"]).items()} == {"7": state}
    assert filter_active(["7", "8"]) == (["7"] if state in ("RUNNING", "PENDING") else [])
