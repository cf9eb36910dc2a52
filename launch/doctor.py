"""python -m launch.doctor [experiment=NAME key=value ...] [--json]

Check this machine (a laptop, a login node, the inside of a container) for problems that would stop a run. With a run's
overrides, check what that run needs. The exit status is 1 if a check fails. Nothing is started or written.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence

from launch import checks
from launch.checks import Finding, State
from launch.filesystem import find_unshared
from launch.planning import disk
from launch.planning.automatic import compose
from launch.planning.plan import make_plan
from launch.run import add_config_dir
from prune_distill.errors import ConfigError, Fault
from prune_distill.schema import RunConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.doctor",
        description=(__doc__ or "").partition("\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="a run's overrides, as for launch.run")
    add_config_dir(parser)
    parser.add_argument("--json", action="store_true", help="a list of objects: name, state, found, fix")
    args = parser.parse_intermixed_args(arguments)
    findings = list(examine(args.overrides, args.config_dir))
    print(format_json(findings) if args.json else format_table(findings))
    return 1 if any(finding.state is State.fail for finding in findings) else 0


def examine(overrides: Sequence[str], config_dir: str | None = None) -> Iterator[Finding]:
    """Yield all findings, those of the run last."""
    cfg = None
    faults: list[Fault] = []
    if overrides:
        try:
            cfg = compose(overrides, check_files=True, config_dir=config_dir)
        except ConfigError as error:
            faults = error.faults
    yield from checks.libraries()
    yield from checks.accelerator(cfg)
    yield from checks.numa(cfg)
    yield from checks.limits()
    yield from checks.shared_memory(cfg)
    yield from checks.hub()
    yield from checks.slurm(cfg)
    yield from (Finding("config", State.fail, str(fault)) for fault in faults)
    if cfg is not None:
        yield from check_run(cfg)


def check_run(cfg: RunConfig) -> Iterator[Finding]:
    """Check that the disk of the run's folder and the memory of the configured GPU are large enough."""
    plan = make_plan(cfg)
    found = plan.disk.describe(cfg.run_dir)
    yield Finding("disk", State.ok, found) if plan.disk.has_room else Finding("disk", State.fail, found, disk.FIX)
    for fault in find_unshared(cfg) if cfg.cluster.nodes > 1 else []:
        yield Finding("shared disk", State.fail, fault)
    for stage, sentence in plan.impossible.items():
        yield Finding(f"memory of {stage}", State.fail, sentence)


def format_table(findings: Sequence[Finding]) -> str:
    """Format the findings, one per line, each followed by its fix."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.state.value:<4}  {finding.name:<{width}}  {finding.found}")
        if finding.fix:
            lines.append(f"{'':<4}  {'':<{width}}  -> {finding.fix}")
    counts = {state: sum(finding.state is state for finding in findings) for state in State}
    return "\n".join([*lines, "", ", ".join(f"{count} {state.value}" for state, count in counts.items())])


def format_json(findings: Sequence[Finding]) -> str:
    """Format the findings as a JSON list of objects with the keys name, state, found and fix."""
    return json.dumps([{**vars(finding), "state": finding.state.value} for finding in findings], indent=1)


if __name__ == "__main__":
    sys.exit(main())
