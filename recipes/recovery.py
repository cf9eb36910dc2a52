"""python -m recipes.recovery RUN_DIR [--watch]

Measure the recovery curve of a run's distillation: evaluate each checkpoint once, and write
`RUN_DIR/evaluate-*/recovery.json`. With `--watch` this continues until the training ends, and holds every saved
checkpoint until it is measured. It needs memory for two models: if the training fills the GPU, run it
on another one, or with CUDA_VISIBLE_DEVICES= on the CPU. The stage `evaluate` reuses the measurements.

Modules that load torch are imported inside functions: checkpoints must be held first, because a training that saves
often could delete some during the imports, which take seconds.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from prune_distill.config.load import load_resolved
from prune_distill.errors import ConfigError
from prune_distill.evaluation.holding import hold, holding
from prune_distill.pipeline.artifact import Located, locate, remove_folder, update_record
from prune_distill.pipeline.integrity import checkpoint_damage, find_damage, raise_if_damaged
from prune_distill.pipeline.names import CHECKPOINTS, DISTILLED, NEMO, RECOVERY, RESOLVED, ROOM, find_checkpoints
from prune_distill.pipeline.stage import Output
from prune_distill.pipeline.stage_main import command_line
from prune_distill.schema import Init, RunConfig

log = logging.getLogger("recipes.recovery")

NEEDED = ("data", "teacher", "original")


@dataclass
class Follower:
    """Measures the checkpoints of a distillation.

    Attributes:
        cfg: config of the run; `stages`: its stages.
    """

    cfg: RunConfig
    stages: dict[str, Located]

    @property
    def out(self) -> Path:
        return self.stages["evaluate"].folder

    @property
    def checkpoints(self) -> Path:
        return self.stages["distill"].folder / CHECKPOINTS

    @cached_property
    def references(self) -> tuple[Path, Path]:
        """The teacher, and the model that is pruned."""
        from prune_distill.evaluation.references import find_references  # after the watcher holds the checkpoints

        inputs = self.stages["evaluate"].inputs
        return find_references(self.cfg, inputs["teacher"], inputs.get("original"))

    @cached_property
    def evaluator(self) -> Any:
        from prune_distill.data.folder import DataFolder  # after the watcher holds the checkpoints
        from prune_distill.evaluation.evaluator import Evaluator  # after the watcher holds the checkpoints

        inputs, (teacher, original) = self.stages["evaluate"].inputs, self.references
        data = DataFolder.read(inputs["data"])
        return Evaluator(self.cfg, data, teacher, self.out, inputs.get("task_folder"), original)

    @property
    def room(self) -> Path:
        return self.out / ROOM

    def measure(self) -> None:
        """Measure the held checkpoints, and the models before and after the training, if they exist."""
        from prune_distill.evaluation import recovery  # after the watcher holds the checkpoints

        for step, checkpoint in find_checkpoints(self.room).items():
            if damage := checkpoint_damage(checkpoint, self.cfg.verify_inputs):
                log.warning("%s; step %d is missing in the curve", damage, step)
            else:
                self._measure(recovery.measurement_name(step), checkpoint)
            remove_folder(checkpoint)
        ends = {"student" if self.cfg.distill.on_policy is None else DISTILLED: self.stages["distill"]}
        if self.cfg.distill.init is Init.pruned:
            ends["pruned"] = self.stages["prune"]
        for name, stage in ends.items():
            if stage.complete:
                self._measure(name, stage.folder / NEMO)
        recovery.write(self.evaluator, self.cfg.distill, self.out)
        if self.stages["evaluate"].complete:
            update_record(self.out, (RECOVERY,))

    def _measure(self, name: str, checkpoint: Path) -> None:
        from convert.exporting import make_exporter  # after the watcher holds the checkpoints
        from prune_distill.evaluation import recovery  # after the watcher holds the checkpoints

        export = make_exporter(self.cfg, self.references[1])
        recovery.measure_checkpoint(self.evaluator, name, checkpoint, self.room, export)


def follow(run_dir: Path, watch: bool, seconds: float) -> Path | None:
    """Measure a run's checkpoints; return the file with the curve, if there is one.

    Raises:
        ConfigError: the folder is not a run, or teacher or data do not exist yet.
        InputError: teacher or data are damaged.
    """
    follower = Follower(*open_run(run_dir))
    if watch:
        with holding(follower.checkpoints, follower.room, seconds):
            os.nice(19)
            while not follower.stages["distill"].complete:
                follower.measure()
                time.sleep(seconds)
    else:
        hold(follower.checkpoints, follower.room, set())
    follower.measure()
    path = follower.out / RECOVERY
    return path if path.exists() else None


def open_run(run_dir: Path) -> tuple[RunConfig, dict[str, Located]]:
    """Return the config of a run whose teacher and data can be read, and its stages. Raises: see `follow`."""
    if not (run_dir / RESOLVED).is_file():
        raise ConfigError(f"{run_dir} has no {RESOLVED}; give the folder of a run that was started")
    cfg = load_resolved(run_dir / RESOLVED)
    cfg.run_dir = str(run_dir)
    stages = locate(cfg)
    inputs = stages["evaluate"].stage.inputs(cfg)
    missing = [
        source.stage
        for name in NEEDED
        if isinstance(source := inputs.get(name), Output) and not stages[source.stage].complete
    ]
    if missing:
        raise ConfigError(f"{run_dir}: stage {' and '.join(missing)} must be complete first")
    made = [source for name in NEEDED if isinstance(source := inputs.get(name), Output)]
    damages = [find_damage(stages[source.stage].folder, source.path, contents=cfg.verify_inputs) for source in made]
    raise_if_damaged(filter(None, damages), run_dir)
    return cfg, stages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--watch", action="store_true", help="continue until the distillation ends")
    parser.add_argument("--seconds", type=float, default=5.0, help="interval of checks for new checkpoints (5)")
    arguments = parser.parse_args()
    with command_line():
        path = follow(arguments.run_dir, arguments.watch, arguments.seconds)
        print(path or "no checkpoint has been saved yet")


if __name__ == "__main__":
    main()
