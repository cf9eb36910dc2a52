"""Rules of the run folder and of the group `cluster`, except for Slurm's."""

from __future__ import annotations

import os.path
from collections.abc import Iterator

from prune_distill.config.rule import Finding, rule
from prune_distill.schema import RunConfig
from prune_distill.units import parse_time_limit

# Linux's limits of a file name and a path. Paths in a run folder are up to 500 bytes longer than its own.
LONGEST_FILE_NAME = 255
LONGEST_RUN_DIR = 4096 - 500


@rule("run_dir", "run_dir")
def run_dir(cfg: RunConfig) -> Iterator[Finding]:
    long = [part for part in cfg.run_dir.split("/") if len(os.fsencode(part)) > LONGEST_FILE_NAME]
    if long:
        yield Finding(
            "run_dir",
            f"the name {long[0][:20]}... is longer than the {LONGEST_FILE_NAME} bytes of a file name; "
            "set a shorter run_dir, or a shorter name if run_dir contains it",
        )
    if len(os.fsencode(os.path.abspath(cfg.run_dir))) > LONGEST_RUN_DIR:
        yield Finding("run_dir", f"the path is longer than {LONGEST_RUN_DIR} bytes; set a shorter run_dir")
    if cfg.run_dir.startswith("-"):
        yield Finding("run_dir", f"other commands would read it as an option; set run_dir=./{cfg.run_dir}")


@rule("cluster.time_limit", "cluster.time_limit")
def time_limit(cfg: RunConfig) -> Iterator[Finding]:
    limit = cfg.cluster.time_limit
    if limit is not None:
        try:
            parse_time_limit(limit)
        except ValueError as error:
            number = " (without quotes YAML reads 4:00:00 as a number)" if limit.isdecimal() else ""
            yield Finding("cluster.time_limit", f"{error}{number}; set cluster.time_limit='4:00:00' or '1-12:00:00'")


@rule("cluster.network", "cluster.nodes", "cluster.gpu?.network_gbs", "cluster.gpu?.memory_gbs", "cluster.gpu?.mfu")
def network(cfg: RunConfig) -> Iterator[Finding]:
    gpu, nodes = cfg.cluster.gpu, cfg.cluster.nodes
    if nodes > 1 and gpu is not None and gpu.memory_gbs is not None and gpu.network_gbs is None and gpu.mfu is None:
        yield Finding(
            "cluster.gpu.network_gbs",
            f"the time of {nodes} nodes depends on their network; set cluster.gpu.network_gbs to the GB/s of each GPU, "
            "such as 50 for a 400 Gbit/s card per GPU, or cluster.gpu.mfu to a measured share of the peak",
        )
