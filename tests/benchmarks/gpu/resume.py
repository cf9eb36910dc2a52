"""A distillation that is killed with SIGKILL and resumes, next to one that is not."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tests.benchmarks.gpu.figures import Figures
from tests.helpers import tiny
from tests.helpers.killed_run import kill_and_resume
from tests.helpers.tolerance import DETERMINISTIC


def measure(figures: Figures) -> None:
    os.environ.update(DETERMINISTIC)
    source = figures.work / "pipeline"
    pruned = tiny.stages(source, *tiny.DEPTH)["prune"]
    if not pruned.complete:
        shutil.rmtree(source, ignore_errors=True)
        tiny.launch(source, *tiny.DEPTH, "--until", "prune")
    undisturbed = _copy(source, figures.work / "undisturbed")
    tiny.launch(undisturbed, *tiny.DEPTH, "--until", "distill")
    expected = tiny.losses(tiny.stages(undisturbed, *tiny.DEPTH)["distill"].folder)
    found = kill_and_resume(_copy(source, figures.work / "killed"), *tiny.DEPTH)
    differences = [abs(mine - other) for mine, other in zip(found.losses, expected, strict=True)]
    how = f"{len(expected)} steps in fp32, deterministic kernels ({', '.join(DETERMINISTIC)})"
    figures.add("resume/steps_before", found.step, "steps", "of the checkpoint from which it resumed")
    figures.add("resume/equal", found.losses == expected, "", f"{how}: all losses, to the last digit")
    before = "largest difference in the steps before the kill: that of two runs of the same, where nothing was resumed"
    figures.add("resume/difference_before", max(differences[: found.step]), "nats per token", before)
    after = f"largest difference in the steps after it; {how}"
    figures.add("resume/difference_after", max(differences[found.step :]), "nats per token", after)


def _copy(source: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    return tiny.copy_run(source, target)
