"""python -m launch.docker [--image IMAGE] [--gpus all|none|N] [--print] -- experiment=NAME [key=value ...]

Run `launch.run` in the Dockerfile's image on this machine, with all GPUs, as this user, and with every folder that the
run reads or writes mounted at the same path. Arguments after `--` are passed to `launch.run`.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.planning.automatic import compose
from launch.run import read_arguments
from prune_distill.config.input_files import HUB_FOLDERS, HUB_SETTINGS, absolute, input_files
from prune_distill.errors import ConfigError
from prune_distill.schema import RunConfig

IMAGE = "nemo-prune-distill"
# Path of this repository in the image (see the Dockerfile).
CODE = "/opt/nemo-prune-distill"
CACHE = "/huggingface"
# Environment variables that are passed by name, so that process lists do not show their values.
PASSED_VARIABLES = (
    *("HF_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"),
    *(*HUB_SETTINGS, "CLIMBMIX_DIR"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status, which is docker's if it was started."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.docker",
        description=(__doc__ or "").partition("\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--image", default=IMAGE, help=f"built by docker build -t {IMAGE} . ({IMAGE})")
    parser.add_argument("--gpus", default="all", help="all, none, or how many (all)")
    parser.add_argument("--print", action="store_true", help="print the command and stop")
    parser.add_argument("run", nargs="+", metavar="key=value", help="arguments of launch.run")
    args = parser.parse_args(arguments)
    try:
        run = read_arguments(args.run)
        cfg = compose(run.overrides, check_files=True, config_dir=run.config_dir)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    words = command(cfg, args.run, args.image, args.gpus, run.config_dir)
    if args.print:
        print(shlex.join(words))
        return 0
    if shutil.which("docker") is None:
        print("docker not found; install it, or add --print to see the command", file=sys.stderr)
        return 2
    for folder in (Path(cfg.run_dir), _cache(), *map(Path, _cache_variables().values())):
        folder.mkdir(parents=True, exist_ok=True)  # otherwise docker creates them as root
    return subprocess.call(words)


def command(cfg: RunConfig, run: Sequence[str], image: str, gpus: str, config_dir: str | None = None) -> list[str]:
    """Return the `docker run` command for a run's overrides and flags."""
    words = ["docker", "run", "--rm", "--init"]
    if sys.stdin.isatty():
        words += ["--interactive", "--tty"]
    if gpus != "none":
        words += ["--gpus", gpus]
    # NCCL and data loaders communicate through shared memory, and NCCL locks its buffers.
    words += ["--ipc=host", "--ulimit", "memlock=-1", "--ulimit", "stack=67108864"]
    if gpus != "none" and cfg.cluster.numa_binding is not None:
        # Without it, docker's seccomp profile blocks numactl (numactl pull request 232).
        words += ["--cap-add=SYS_NICE"]
    words += ["--user", f"{os.getuid()}:{os.getgid()}", "--env", "HOME=/tmp"]
    words += ["--env", f"HF_HOME={CACHE}", "--volume", f"{_cache()}:{CACHE}"]
    for name, folder in _cache_variables().items():
        words += ["--env", f"{name}={folder}", "--volume", f"{folder}:{folder}"]
    for name in PASSED_VARIABLES:
        if name in os.environ:
            words += ["--env", name]
    for folder, flags in _folders(cfg, config_dir).items():
        words += ["--volume", f"{folder}:{folder}{flags}"]
    words += ["--workdir", os.getcwd(), "--env", f"PYTHONPATH={CODE}"]
    return [*words, image, "python", "-m", "launch.run", *run]


def _cache_variables() -> dict[str, str]:
    """Return the cache folders of the Hub that are set in addition to HF_HOME, by variable."""
    return {name: absolute(os.environ[name]) for name in HUB_FOLDERS if name != "HF_HOME" and os.environ.get(name)}


def _folders(cfg: RunConfig, config_dir: str | None) -> dict[str, str]:
    """Return the folders to mount, with docker's flags for each; folders inside others are omitted.

    The working directory is one of them, so that relative paths stay valid in the container.
    """
    folders = {os.getcwd(): "", os.path.abspath(cfg.run_dir): ""}
    if config_dir is not None:
        folders.setdefault(os.path.abspath(config_dir), ":ro")
    for _, path in input_files(cfg):
        folders.setdefault(path if os.path.isdir(path) else os.path.dirname(path), ":ro")
    return {
        folder: flags
        for folder, flags in folders.items()
        if not any(_contains(other, folder) and flags in (other_flags, ":ro") for other, other_flags in folders.items())
    }


def _contains(folder: str, path: str) -> bool:
    """Return whether a folder contains a path."""
    return folder != path and os.path.commonpath([folder, path]) == folder


def _cache() -> Path:
    return Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser().absolute()


if __name__ == "__main__":
    sys.exit(main())
