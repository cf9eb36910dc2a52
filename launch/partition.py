"""What a Slurm partition allows, asked before anything is submitted.

With Slurm's defaults sbatch takes a job that its partition can never run (EnforcePartLimits=NO), which then waits for
ever.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

from prune_distill.schema import RunConfig
from prune_distill.units import parse_time_limit

UNLIMITED = "UNLIMITED"
SECONDS_TO_ANSWER = 60


def faults(cfg: RunConfig) -> list[str]:
    """What keeps a run's jobs from ever starting, as far as its partition tells; it may be a list of several."""
    slurm = cfg.cluster.slurm
    if slurm is None or slurm.partition is None:
        return []
    try:
        command = ["scontrol", "show", "partition", "--all", "--oneliner"]
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS_TO_ANSWER).stdout
    except subprocess.CalledProcessError as error:
        reason = " ".join(error.stderr.split()) or f"exit code {error.returncode}"
        return [f"Slurm does not answer ({reason}); scontrol ping shows whether it is up"]
    except subprocess.TimeoutExpired:
        return [f"Slurm has not answered for {SECONDS_TO_ANSWER} s; scontrol ping shows whether it is up"]
    known = {row["PartitionName"]: row for row in map(_row, told.splitlines()) if "PartitionName" in row}
    wanted = slurm.partition.split(",")
    unknown = [name for name in wanted if name not in known]
    if unknown:
        return [f"cluster.slurm.partition={unknown[0]} does not exist; set cluster.slurm.partition to {_any_of(known)}"]
    return list(_limits(cfg, [known[name] for name in wanted]))


def _limits(cfg: RunConfig, partitions: list[dict[str, str]]) -> Iterator[str]:
    names = ",".join(row["PartitionName"] for row in partitions)
    longest = max((row.get("MaxTime", UNLIMITED) for row in partitions), key=_seconds)
    limit = cfg.cluster.time_limit
    if limit is not None and _seconds(limit) > _seconds(longest):
        yield (
            f"cluster.time_limit={limit} is more than the {longest} that partition {names} allows; "
            f"set cluster.time_limit='{longest}'"
        )
    most = max(min(_count(row.get("TotalNodes")), _count(row.get("MaxNodes"))) for row in partitions)
    if cfg.cluster.nodes > most:
        yield (
            f"cluster.nodes={cfg.cluster.nodes}, but partition {names} gives a job {most:.0f} at most; "
            f"set cluster.nodes={most:.0f}, or cluster.slurm.partition to another one"
        )


def _row(line: str) -> dict[str, str]:
    """The `Key=value` pairs of a line."""
    return dict(word.split("=", 1) for word in line.split() if "=" in word)


def _seconds(limit: str) -> float:
    """Of a limit in Slurm's form; none is longer than all."""
    try:
        return parse_time_limit(limit)
    except ValueError:
        return float("inf")


def _count(number: str | None) -> float:
    return int(number) if number is not None and number.isdecimal() else float("inf")


def _any_of(names: dict[str, dict[str, str]]) -> str:
    return " or ".join(names) or "null, for there is none"
