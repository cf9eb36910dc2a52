"""python -m launch.run experiment=demo [key=value ...]

Composes a run's config, checks it, and brings the run to its end: on this machine, or, with cluster=slurm, as jobs. The
same command again goes on from where it stopped, and redoes exactly what a changed setting touches.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from conf.composition import config_groups, sweep
from conf.errors import ConfigError, InputError
from conf.load import compose, to_yaml
from conf.schema import RunConfig
from launch import nodes, pipeline, records, slurm
from launch.jobs import everywhere
from recipes.stages import STAGES, Stage

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _StoppedError(Exception):
    """A signal asked the launcher to end."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def main(arguments: Sequence[str] | None = None, stages: Sequence[Stage] = STAGES) -> int:
    """The command line; returns the exit status: 0, 1 (a stage failed), 2 (the user can mend it), 128 + signal."""
    args = _parser().parse_intermixed_args(arguments)
    args.command = shlex.join(["python", "-m", "launch.run", *(sys.argv[1:] if arguments is None else arguments)])
    # Said like a setting, but none of the run's.
    if "dry_run=true" in args.overrides:
        args.overrides.remove("dry_run=true")
        args.dry_run = True
    try:
        with _signals_raised():
            for cfg in _jobs(args.overrides, args.multirun, check_files=args.cfg is None):
                _one(cfg, args, stages)
    except (ConfigError, InputError) as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"cannot write the run's folder ({error}); free some space, or set another run_dir", file=sys.stderr)
        return 2
    except pipeline.StageFailedError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except _StoppedError as error:
        print(f"\nstopped by {error}; the same command goes on from where it was", file=sys.stderr)
        return 128 + error.signum
    return 0


def _one(cfg: RunConfig, args: argparse.Namespace, stages: Sequence[Stage]) -> None:
    if cfg.cluster.slurm is not None:
        cfg = everywhere(cfg)
    if args.cfg:
        print(to_yaml(cfg), end="")
    elif args.list:
        print(pipeline.listing(cfg, args.until, stages))
    elif cfg.cluster.slurm is not None:
        slurm.run(cfg, args.until, stages, args.dry_run, args.command)
    elif args.dry_run:
        print(pipeline.commands(cfg, args.until, stages))
    else:
        _here(cfg, args, stages)


def _here(cfg: RunConfig, args: argparse.Namespace, stages: Sequence[Stage]) -> None:
    """A run, or this node's part of one. The first node leaves a report of one that fails or pauses as well."""
    try:
        if cfg.cluster.nodes > 1:
            nodes.run(cfg, args.until, stages, args.command)
        else:
            pipeline.run(cfg, args.until, stages, command=args.command)
    except pipeline.StageFailedError:
        if cfg.cluster.node_rank == 0:
            records.leave_report(Path(cfg.run_dir))
        raise


def _jobs(overrides: list[str], multirun: bool, check_files: bool) -> list[RunConfig]:
    """The configs to run, all of them checked before the first starts."""
    if not multirun:
        return [compose(overrides, check_files)]
    jobs = []
    for number, job in enumerate(sweep(overrides)):
        cfg = compose(job, check_files)
        cfg.run_dir = f"{cfg.run_dir}/{number}"
        jobs.append(cfg)
    return jobs


def _parser() -> argparse.ArgumentParser:
    groups = "\n".join(f"  {group}: {', '.join(choices)}" for group, choices in config_groups().items())
    parser = argparse.ArgumentParser(
        prog="python -m launch.run",
        usage="python -m launch.run experiment=NAME [key=value ...] [options]",
        description=(__doc__ or "").partition("\n")[2],
        epilog=f"config groups, chosen as GROUP=NAME:\n{groups}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config groups and values, as Hydra has them")
    parser.add_argument("--cfg", "-c", choices=["job"], help="print the composed config and stop")
    parser.add_argument("--multirun", "-m", action="store_true", help="run every combination of a=1,2, one by one")
    parser.add_argument("--list", action="store_true", help="print the stages and their folders and stop")
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be started or submitted and stop (also dry_run=true)"
    )
    parser.add_argument("--until", metavar="STAGE", help="stop after this stage")
    return parser


@contextmanager
def _signals_raised() -> Iterator[None]:
    """Has the signals that end a program raise `_StoppedError`."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise _StoppedError(signum)

    # Those that are ignored stay so: nohup means it.
    heeded = [signum for signum in _SIGNALS if signal.getsignal(signum) is not signal.SIG_IGN]
    before = {signum: signal.signal(signum, stop) for signum in heeded}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


if __name__ == "__main__":
    sys.exit(main())
