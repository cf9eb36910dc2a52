"""python -m launch.run experiment=demo [key=value ...]

Composes a run's config, checks it, and brings the run to its end: on this machine, or, with cluster=slurm, as jobs. The
same command again continues where it stopped, and redoes exactly what a changed setting affects.
"""

from __future__ import annotations

import argparse
import errno
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from launch import help_config, nodes, pipeline, records, slurm
from launch.jobs import make_paths_absolute
from launch.planning.automatic import compose
from launch.verification import verify
from prune_distill.config.composition import config_groups, sweep
from prune_distill.config.load import show, to_yaml
from prune_distill.credentials import redact
from prune_distill.errors import ConfigError, InputError
from prune_distill.pipeline.artifact import locate
from prune_distill.pipeline.stage import Stage
from prune_distill.pipeline.stages import STAGES
from prune_distill.schema import RunConfig


class _StoppedError(Exception):
    """A signal asked the launcher to end."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def main(arguments: Sequence[str] | None = None, stages: Sequence[Stage] = STAGES) -> int:
    """The command line; returns the exit status: 0, 1 (a stage failed), 2 (the user can fix it), 128 + signal."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        args = read_arguments(words)
        if args.help_config is not None:
            _print_reference(args)
            return 0
        with _signals_raised():
            for cfg in _jobs(args):
                _one(cfg, args, stages)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(redact(f"cannot write the run's folder ({error}); {_fix(error)}"), file=sys.stderr)
        return 2
    except pipeline.StageFailedError as error:
        print(redact(str(error)), file=sys.stderr)
        return error.exit_code
    except _StoppedError as error:
        print(f"\nstopped by {error}; the same command continues from there", file=sys.stderr)
        return 128 + error.signum
    return 2 if args.damaged else 0


def read_arguments(words: Sequence[str]) -> argparse.Namespace:
    """The command line as `overrides`, flags, and `command`, which repeats it.

    Raises:
        ConfigError: `--config-dir` names a folder that cannot be used, or options do not go together.
    """
    # Before the rest, as the help lists the folder's files too.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config-dir")
    args = _parser(first.parse_known_args(words)[0].config_dir).parse_intermixed_args(words)
    args.command = redact(shlex.join(["python", "-m", "launch.run", *words]))
    # Said like a setting, but none of the run's.
    if "dry_run=true" in args.overrides:
        args.overrides.remove("dry_run=true")
        args.dry_run = True
    args.damaged = False
    if args.help_config is not None and args.overrides:
        raise ConfigError(f"--help-config describes keys, not a run; remove {shlex.join(args.overrides)}")
    if args.markdown and args.help_config is None:
        raise ConfigError("--markdown is an option of --help-config; add --help-config")
    if args.markdown and args.help_config:
        raise ConfigError(f"--markdown writes all keys; remove {args.help_config}")
    return args


def _print_reference(args: argparse.Namespace) -> None:
    try:
        print(help_config.to_markdown() if args.markdown else help_config.to_text(args.help_config), end="", flush=True)
    except BrokenPipeError:
        # A reader such as `head` has ended; Python would report it once more when it closes standard output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fix(error: OSError) -> str:
    """What to do about a run folder that cannot be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some space, or set another run_dir"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "it is not writable; set another run_dir"
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return "a file is in its place; set another run_dir"
    return "set another run_dir"


def _one(cfg: RunConfig, args: argparse.Namespace, stages: Sequence[Stage]) -> None:
    if cfg.cluster.slurm is not None:
        cfg = make_paths_absolute(cfg)
    if args.cfg:
        print(to_yaml(cfg), end="")
    elif args.list:
        print(pipeline.listing(cfg, args.until, stages))
    elif args.verify:
        located = pipeline.up_to(locate(cfg, stages), args.until)
        args.damaged |= not verify({stage.stage.name: stage for stage in located}, Path(cfg.run_dir))
    elif cfg.cluster.slurm is not None:
        slurm.run(cfg, args.until, stages, args.dry_run, args.command)
    elif args.dry_run:
        print(pipeline.commands(cfg, args.until, stages))
    else:
        _here(cfg, args, stages)


def _here(cfg: RunConfig, args: argparse.Namespace, stages: Sequence[Stage]) -> None:
    """A run, or this node's part of one. The first node also writes a report of a run that fails or pauses."""
    try:
        if cfg.cluster.nodes > 1:
            nodes.run(cfg, args.until, stages, args.command)
        else:
            pipeline.run(cfg, args.until, stages, command=args.command)
    except pipeline.StageFailedError:
        if cfg.cluster.node_rank == 0:
            records.write_interim_report(Path(cfg.run_dir))
        raise


def _jobs(args: argparse.Namespace) -> list[RunConfig]:
    """The configs to run, all of them checked before the first starts."""
    check_files = args.cfg is None
    if not args.multirun:
        try:
            return [compose(args.overrides, check_files, args.config_dir)]
        except ConfigError:
            if args.cfg:
                print(show(args.overrides, args.config_dir), end="")
            raise
    jobs = []
    for number, job in enumerate(sweep(args.overrides, args.config_dir)):
        cfg = compose(job, check_files, args.config_dir)
        cfg.run_dir = f"{cfg.run_dir}/{number}"
        jobs.append(cfg)
    return jobs


def add_config_dir(parser: argparse.ArgumentParser) -> None:
    """Adds the option `--config-dir`, as Hydra has it."""
    parser.add_argument(
        "--config-dir",
        metavar="DIR",
        help="a folder with more files of the config groups, such as DIR/cluster/my_site.yaml for cluster=my_site",
    )


def _parser(config_dir: str | None) -> argparse.ArgumentParser:
    groups = "\n".join(f"  {group}: {', '.join(choices)}" for group, choices in config_groups(config_dir).items())
    parser = argparse.ArgumentParser(
        prog="python -m launch.run",
        usage="python -m launch.run experiment=NAME [key=value ...] [options]",
        description=(__doc__ or "").partition("\n")[2],
        epilog=f"config groups, chosen as GROUP=NAME:\n{groups}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config groups and values, as Hydra has them")
    add_config_dir(parser)
    parser.add_argument(
        "--help-config",
        nargs="?",
        const="",
        metavar="GROUP",
        help="print every key, or those of a group such as distill or distill.kd, with its type, bounds, default and "
        "meaning, and stop",
    )
    parser.add_argument("--markdown", action="store_true", help="with --help-config: print docs/configuration.md")
    parser.add_argument("--cfg", "-c", choices=["job"], help="print the composed config and stop; faults follow")
    parser.add_argument("--multirun", "-m", action="store_true", help="run every combination of a=1,2, one by one")
    parser.add_argument("--list", action="store_true", help="print the stages and their folders and stop")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read what complete stages wrote, list all damage and stop",
    )
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
    heeded = [signum for signum in pipeline.STOP_SIGNALS if signal.getsignal(signum) is not signal.SIG_IGN]
    before = {signum: signal.signal(signum, stop) for signum in heeded}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


if __name__ == "__main__":
    sys.exit(main())
