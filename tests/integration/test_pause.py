"""A training pauses at its stop file, on one and on two ranks, and resumes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from launch import local
from launch.planning.automatic import compose
from prune_distill.config.load import save_resolved
from prune_distill.pipeline.artifact import locate, read_state
from tests.helpers import tiny, tolerance

RANKS = ("cluster.devices_per_node=2", "distill.parallel.tensor_model_parallel_size=2")


# With data loader workers, which could outlive a pause.
@pytest.mark.parametrize("layout", [("distill.num_workers=1",), RANKS], ids=["one_rank", "two_ranks"])
def test_a_paused_distillation_resumes_with_the_same_losses(
    finished: Path, tmp_path: Path, layout: tuple[str, ...]
) -> None:
    run_dir = tiny.copy_run(finished, tmp_path / "run")
    settings = (*tiny.DEPTH, *layout, "distill.save_every_n_steps=100", "--until", "distill")
    folder = tiny.stages(run_dir, *tiny.DEPTH)["distill"].folder
    folder.mkdir()
    command, pipe = tiny.command(run_dir, *settings), subprocess.PIPE
    launcher = subprocess.Popen(command, env=tiny.environment(), stdout=pipe, stderr=pipe, text=True)
    # Written before there is anyone to look for it, once the launcher has taken away what an earlier attempt left.
    tiny.wait_for("log.txt", folder, launcher)
    (folder / "stop").touch()
    _, message = launcher.communicate(timeout=600)
    log = (folder / "log.txt").read_text()
    assert launcher.returncode == 1, message + log
    assert "stage distill is paused at step 1; run the same command to resume it" in message
    assert read_state(folder) == {"state": "paused", "step": 1}
    assert [path.name for path in folder.glob("checkpoints/*")] == ["step=1"]
    assert not (folder / "stop").exists()
    assert not (folder / "manifest.json").exists()
    # No validation was due.
    assert tiny.validations(folder) == {}

    tiny.launch(run_dir, *settings)
    assert f"training from {folder}/checkpoints/step=1" in (folder / "log.txt").read_text()
    assert read_state(folder) == {"state": "done", "step": tiny.DISTILL["max_steps"]}
    unbroken = tiny.stages(finished, *tiny.DEPTH)["distill"].folder
    accuracy = tolerance.RESUMED if layout is not RANKS else tolerance.LOSS
    assert tiny.losses(folder) == pytest.approx(tiny.losses(unbroken), rel=0, abs=accuracy)
    assert tiny.validations(folder) == pytest.approx(tiny.validations(unbroken), rel=0, abs=accuracy)


@pytest.mark.usefixtures("real_start")
@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_from_slurm_to_every_process_pauses(finished: Path, tmp_path: Path, ranks: int) -> None:
    """Like preemption of a step: torchrun, the ranks and data loader workers get the signal, and none may exit."""
    run_dir = tiny.copy_run(finished, tmp_path / "run")
    settings = (*tiny.DEPTH, "distill.num_workers=1", "distill.max_steps=500", "distill.save_every_n_steps=2")
    layout = (f"cluster.devices_per_node={ranks}", f"distill.parallel.tensor_model_parallel_size={ranks}")
    cfg = compose(tiny.overrides(run_dir, *settings, *layout))
    save_resolved(cfg, run_dir / "resolved.yaml")
    located = locate(cfg)["distill"]
    folder = located.folder
    folder.mkdir()
    command = [sys.executable, "-m", "launch.guard", str(folder / "stop")]
    command += local.command(located, run_dir / "resolved.yaml")
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, env=tiny.environment(), stdout=log, stderr=log, start_new_session=True)
    try:
        # After a save, which starts processes and changes the blocked signals.
        tiny.wait_for_checkpoint(folder, process)
        for pid in _descendants(process.pid):
            with suppress(ProcessLookupError):  # helpers of a save come and go
                os.kill(pid, signal.SIGTERM)
        assert process.wait(timeout=120) == 0, (folder / "log.txt").read_text()[-5000:]
    finally:
        if process.poll() is None:
            for pid in _descendants(process.pid):
                os.kill(pid, signal.SIGKILL)
    step = read_state(folder).get("step", 0)
    assert read_state(folder) == {"state": "paused", "step": step}, (folder / "log.txt").read_text()[-5000:]
    assert 1 < step < 500
    assert [path.name for path in folder.glob("checkpoints/step=*")] == [f"step={step}"]


def _descendants(leader: int) -> list[int]:
    """Return a process and all its descendants."""
    message = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True).stdout.splitlines()[
        1:
    ]
    parents = {int(pid): int(parent) for pid, parent in (line.split() for line in message)}
    found = [leader]
    for process in found:
        found += [pid for pid, parent in parents.items() if parent == process]
    return found
