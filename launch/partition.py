"""Check a run's jobs against the limits of their Slurm partition before they are submitted.

With Slurm's defaults, sbatch accepts jobs that the partition can never run (EnforcePartLimits=NO), and that
then wait forever.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

from prune_distill.schema import RunConfig
from prune_distill.units import parse_time_limit

UNLIMITED = "UNLIMITED"
SECONDS_TO_ANSWER = 60


def faults(cfg: RunConfig) -> list[str]:
    """Return reasons why a run's jobs could never start in its partition, or list of partitions."""
    slurm = cfg.cluster.slurm
    if slurm is None or slurm.partition is None:
        return []
    try:
        command = ["scontrol", "show", "partition", "--all", "--oneliner"]
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS_TO_ANSWER).stdout
    except subprocess.CalledProcessError as error:
        reason = " ".join(error.stderr.split()) or f"exit code {error.returncode}"
        return [f"Slurm does not answer ({reason}); scontrol ping shows whether it is up"]
    except subprocess.TimeoutExpired:
        return [f"Slurm has not answered for {SECONDS_TO_ANSWER} s; scontrol ping shows whether it is up"]
    known = {row["PartitionName"]: row for row in map(_parse_row, output.splitlines()) if "PartitionName" in row}
    names = slurm.partition.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        return [f"cluster.slurm.partition={unknown[0]}: does not exist; set it to {_join_names(known)}"]
    return list(_limits(cfg, [known[name] for name in names]))


def _limits(cfg: RunConfig, partitions: list[dict[str, str]]) -> Iterator[str]:
    names = ",".join(row["PartitionName"] for row in partitions)
    longest = max((row.get("MaxTime", UNLIMITED) for row in partitions), key=_seconds)
    limit = cfg.cluster.time_limit
    if limit is not None and _seconds(limit) > _seconds(longest):
        yield (
            f"cluster.time_limit={limit}: partition {names} allows at most {longest}; "
            f"set cluster.time_limit='{longest}'"
        )
    most = max(min(_count(row.get("TotalNodes")), _count(row.get("MaxNodes"))) for row in partitions)
    if cfg.cluster.nodes > most:
        yield (
            f"cluster.nodes={cfg.cluster.nodes}: partition {names} allows at most {most:.0f} per job; "
            f"set cluster.nodes={most:.0f}, or another cluster.slurm.partition"
        )


def _parse_row(line: str) -> dict[str, str]:
    """Parse the `Key=value` pairs of a line."""
    return dict(word.split("=", 1) for word in line.split() if "=" in word)


def _seconds(limit: str) -> float:
    """Convert a limit in Slurm's format to seconds; infinity if there is none."""
    try:
        return parse_time_limit(limit)
    except ValueError:
        return float("inf")


def _count(number: str | None) -> float:
    return int(number) if number is not None and number.isdecimal() else float("inf")


def _join_names(names: dict[str, dict[str, str]]) -> str:
    return " or ".join(names) or "null: there are no partitions"
