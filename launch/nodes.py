"""Run on several nodes without Slurm, with the same command on each. The first node runs the stages like
`launch.pipeline`; the others wait, and join it by torchrun's rendezvous in the stages that span nodes.

The first node rewrites `RUN_DIR/.pulse.json` every few seconds with its current stage, or with the reason why it
ended.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch import local, pipeline
from launch.environment import nodes_and_ranks
from launch.filesystem import find_unshared
from launch.pipeline import StageFailedError
from launch.progress import StatusLine
from prune_distill.errors import ConfigError
from prune_distill.pipeline.artifact import Located, locate, write_json
from prune_distill.pipeline.names import RESOLVED
from prune_distill.pipeline.stage import Stage
from prune_distill.pipeline.stages import STAGES
from prune_distill.schema import RunConfig

PULSE = ".pulse.json"
SECONDS_BETWEEN_BEATS = 5.0
# A shared disk may show a new file after a minute.
SECONDS_WITHOUT_PULSE = 180.0
SECONDS_BETWEEN_LOOKS = 0.5


def run(cfg: RunConfig, until: str | None = None, stages: Sequence[Stage] = STAGES, command: str = "") -> None:
    """Run this node's part of a run.

    Raises:
        ConfigError: the nodes cannot find each other; also as `launch.pipeline.run`.
        StageFailedError: a stage failed on the first node, or that node does not respond.
    """
    faults = [*_faults(cfg), *find_unshared(cfg)]
    if faults:
        raise ConfigError(faults)
    if cfg.cluster.node_rank > 0:
        _follow(cfg, until, stages)
        return
    pulse = _Pulse(Path(cfg.run_dir) / PULSE)
    try:
        pipeline.run(cfg, until, stages, pulse.beat, command)
    except StageFailedError as error:
        pulse.end(str(error))
        raise
    except BaseException:
        pulse.end("the first node was stopped")
        raise
    pulse.end(None)


def _faults(cfg: RunConfig) -> Iterator[str]:
    nodes, rank, endpoint = cfg.cluster.nodes, cfg.cluster.node_rank, cfg.cluster.rdzv_endpoint
    if endpoint is None or not re.fullmatch(r"[^\s:]+:\d{1,5}", endpoint):
        yield (
            f"cluster.rdzv_endpoint={'null' if endpoint is None else endpoint}: cluster.nodes={nodes} needs HOST:PORT "
            "of the first node; start the same command on every node with it and cluster.node_rank=0, 1, ..., or set "
            "cluster=slurm"
        )
    if rank >= nodes:
        yield f"cluster.node_rank={rank}: must be below cluster.nodes={nodes}; lower it to at most {nodes - 1}"


@dataclass(frozen=True)
class _Beat:
    """Content of the pulse file: the first node's stage, or why it ended (empty: the run is complete), and the time."""

    stage: str | None = None
    ended: str | None = None
    beat: float = 0.0


class _Pulse:
    """Writes the pulse file, on the first node."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last: tuple[str | None, float] = (None, 0.0)

    def beat(self, stage: str) -> None:
        """Record the current stage, unless it was recorded recently."""
        if stage != self._last[0] or time.monotonic() - self._last[1] > SECONDS_BETWEEN_BEATS:
            self._last = (stage, time.monotonic())
            write_json(self._path, {"stage": stage, "beat": time.time()})

    def end(self, reason: str | None) -> None:
        """Record that this node has ended, with the reason if the run is not complete."""
        if self._path.parent.is_dir():
            write_json(self._path, {"ended": reason or "", "beat": time.time()})


class _FirstNode:
    """Reads the pulse file, on the other nodes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # Ignore the file of an earlier run.
        self._seen = self._read()
        self._since = time.monotonic()
        self._alive = False

    def stage(self) -> str | None:
        """Return the current stage of the first node; None if it is unknown.

        Raises:
            StageFailedError: it ended, or has not responded for too long.
        """
        beat = self._read()
        if beat != self._seen:
            self._seen, self._since, self._alive = beat, time.monotonic(), True
        if self._alive and beat.ended:
            raise StageFailedError(f"the first node: {beat.ended}")
        if time.monotonic() - self._since > SECONDS_WITHOUT_PULSE:
            raise StageFailedError(f"no response from the first node for {SECONDS_WITHOUT_PULSE:.0f} s; is it running?")
        return beat.stage if self._alive else None

    def _read(self) -> _Beat:
        try:
            return _Beat(**json.loads(self._path.read_text()))
        except (OSError, ValueError, TypeError, RecursionError):
            return _Beat()


def _follow(cfg: RunConfig, until: str | None, stages: Sequence[Stage]) -> None:
    progress, run_dir = StatusLine(sys.stdout), Path(cfg.run_dir)
    first = _FirstNode(run_dir / PULSE)
    located = pipeline.up_to(locate(cfg, stages), until)
    for number, stage in enumerate(located, 1):
        label = f"[{number}/{len(located)}] {stage.stage.name}"
        joined = False
        while not stage.complete:
            at = first.stage()
            if at == stage.stage.name and nodes_and_ranks(stage)[0] > 1 and not joined:
                joined = True
                progress.event(f"{label}: joined, log in {_log(stage)}")
                _join(stage, run_dir / RESOLVED)
            else:
                progress.status(f"{label}: waiting for the first node")
                time.sleep(SECONDS_BETWEEN_LOOKS)
        progress.event(f"{label}: complete")


def _join(stage: Located, resolved: Path) -> None:
    """Run this node's ranks of a stage. The first node reports the result."""
    with _log(stage).open("ab") as file:
        process = local.start(stage, resolved, file)
        try:
            process.wait()
        finally:
            local.stop(process)


def _log(stage: Located) -> Path:
    return stage.folder / f"log-node{stage.cfg.cluster.node_rank}.txt"
