"""Rules of the group `cluster.slurm`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from prune_distill.config.input_files import hub_folders, input_files
from prune_distill.config.rule import Finding, Rule, rule
from prune_distill.config.rules.data import SOURCES, VALIDATION
from prune_distill.config.values import get_value, require
from prune_distill.schema import RunConfig
from prune_distill.units import parse_time_limit

# Slurm sends a warning up to so many seconds early (man sbatch, --signal).
WARNING_MAY_BE_EARLY = 60
# With more, a chain of jobs would be longer than most sites let one user queue.
MOST_RESTARTS_WITHOUT_REQUEUE = 100
_MEMORY = re.compile(r"\d+[KMGT]?", re.IGNORECASE)
_NAME = re.compile(r"[\w.,+@-]+")
_VARIABLE = re.compile(r"[A-Za-z_]\w*")
# ":" separates a mount's source from its target, "," a mount from the next (pyxis, --container-mounts).
_NOT_IN_MOUNTS = re.compile(r"[:,\n]")
_IMAGE, _MOUNTS, _SECRETS = (f"cluster.slurm.{name}" for name in ("container_image", "container_mounts", "secrets"))


@rule("slurm.time_limit", "cluster.time_limit", "cluster.slurm.warn_seconds")
def time_limit(cfg: RunConfig) -> Iterator[Finding]:
    key, limit, warn_seconds = "cluster.time_limit", cfg.cluster.time_limit, require(cfg.cluster.slurm).warn_seconds
    if limit is None:
        yield Finding(key, f"a Slurm job needs a time limit; set {key}='4:00:00'")
        return
    try:
        seconds = parse_time_limit(limit)
    except ValueError:
        return  # The rule cluster.time_limit reports it.
    if seconds <= warn_seconds + WARNING_MAY_BE_EARLY:
        yield Finding(
            key,
            f"leaves no time to train, as cluster.slurm.warn_seconds={warn_seconds} are reserved for a save, and Slurm "
            f"may warn {WARNING_MAY_BE_EARLY} s early; set {key} to more, or cluster.slurm.warn_seconds to less",
        )


def _name_rule(key: str) -> Rule:
    """A rule for each name, so that a missing one does not hide what is wrong with another."""

    @rule("slurm.names", key)
    def name(cfg: RunConfig) -> Iterator[Finding]:
        value = get_value(cfg, key)
        if value is not None and not _NAME.fullmatch(value):
            yield Finding(key, f"not a name that Slurm accepts; set {key} to one word, without quotes")

    return name


names = [_name_rule(f"cluster.slurm.{name}") for name in ("partition", "account", "qos", "gpu_type")]


@rule("slurm.secrets", _SECRETS)
def secrets(cfg: RunConfig) -> Iterator[Finding]:
    bad = [name for name in require(cfg.cluster.slurm).secrets if not _VARIABLE.fullmatch(name)]
    if bad:
        # What follows "=" may be a secret.
        name = bad[0].partition("=")[0]
        yield Finding(
            _SECRETS,
            f"{name!r} is not the name of an environment variable; list names only (such as HF_TOKEN), whose values "
            "launch.run takes from its environment",
            value=[name],
        )


@rule("slurm.mem", "cluster.slurm.mem")
def mem(cfg: RunConfig) -> Iterator[Finding]:
    key, value = "cluster.slurm.mem", require(cfg.cluster.slurm).mem
    if value is not None and not _MEMORY.fullmatch(value):
        yield Finding(
            key,
            f"not an amount of memory; set {key} to an amount such as 200G, to 0 for all of a node's, or to null for "
            "the site's default",
        )


@rule("slurm.sbatch", "cluster.slurm.sbatch")
def sbatch(cfg: RunConfig) -> Iterator[Finding]:
    key = "cluster.slurm.sbatch"
    bad = [line for line in require(cfg.cluster.slurm).sbatch if not re.match(r"--?\w", line) or "\n" in line]
    if bad:
        yield Finding(key, f"{bad[0]!r} is not an option of sbatch; set {key} to options such as --exclusive")


@rule("slurm.max_restarts", "cluster.slurm.requeue", "cluster.slurm.max_restarts")
def max_restarts(cfg: RunConfig) -> Iterator[Finding]:
    key, slurm = "cluster.slurm.max_restarts", require(cfg.cluster.slurm)
    if not slurm.requeue and slurm.max_restarts > MOST_RESTARTS_WITHOUT_REQUEUE:
        yield Finding(
            key,
            "cluster.slurm.requeue=false would queue so many jobs for each training stage; "
            f"set {key} to at most {MOST_RESTARTS_WITHOUT_REQUEUE}",
        )


@rule("slurm.container_image", _IMAGE)
def container_image(cfg: RunConfig) -> Iterator[Finding]:
    image = require(cfg.cluster.slurm).container_image
    if image is not None and (not image.strip() or "\n" in image):
        yield Finding(
            _IMAGE, f"not an image; set {_IMAGE} to registry#name:tag or a .sqsh file, or to null for no container"
        )


@rule("slurm.run_dir", _IMAGE, "run_dir")
def run_dir(cfg: RunConfig) -> Iterator[Finding]:
    if require(cfg.cluster.slurm).container_image is not None and _NOT_IN_MOUNTS.search(cfg.run_dir):
        yield Finding("run_dir", "pyxis cannot mount a path with a comma or colon; set run_dir to a path without")


@rule("slurm.container_mounts", _IMAGE, _MOUNTS)
def container_mounts(cfg: RunConfig) -> Iterator[Finding]:
    slurm = require(cfg.cluster.slurm)
    if slurm.container_image is None and slurm.container_mounts:
        yield Finding(_MOUNTS, f"there is no container; set {_IMAGE}, or {_MOUNTS}=[]")


@rule("slurm.mounts", _MOUNTS)
def mounts(cfg: RunConfig) -> Iterator[Finding]:
    for mount in require(cfg.cluster.slurm).container_mounts:
        if not _is_mount(mount):
            yield Finding(
                _MOUNTS,
                f"{mount!r} is not a mount; set it to SOURCE:TARGET or SOURCE:TARGET:ro, both absolute and without "
                "commas",
            )


@rule("slurm.container_workdir", "cluster.slurm.container_workdir")
def container_workdir(cfg: RunConfig) -> Iterator[Finding]:
    if not os.path.isabs(require(cfg.cluster.slurm).container_workdir):
        yield Finding(
            "cluster.slurm.container_workdir",
            "not absolute; set it to the folder of this repository in the image, such as /opt/nemo-prune-distill",
        )


@rule("slurm.secrets_are_set", _SECRETS, on_machine=True)
def secrets_are_set(cfg: RunConfig) -> Iterator[Finding]:
    known = [name for name in require(cfg.cluster.slurm).secrets if _VARIABLE.fullmatch(name)]
    unset = [name for name in known if name not in os.environ]
    if unset:
        problem = f"{', '.join(unset)} not set in this environment"
        yield Finding(_SECRETS, f"{problem}; export it, or remove it from {_SECRETS}", value=known)


@rule("slurm.mounts_exist", _MOUNTS, on_machine=True)
def mounts_exist(cfg: RunConfig) -> Iterator[Finding]:
    for mount in filter(_is_mount, require(cfg.cluster.slurm).container_mounts):
        source, _ = _source_and_target(mount)
        if not os.path.exists(source):
            yield Finding(_MOUNTS, f"{source} of {mount!r} does not exist; set it to a folder that the nodes see")


@rule("slurm.image_exists", _IMAGE, on_machine=True)
def image_exists(cfg: RunConfig) -> Iterator[Finding]:
    image = require(cfg.cluster.slurm).container_image
    if image is not None and os.path.isabs(image) and not os.path.exists(image):
        yield Finding(_IMAGE, f"does not exist; set {_IMAGE} to a .sqsh file or registry#name:tag")


@rule(
    "slurm.inputs_are_mounted",
    *(_IMAGE, _MOUNTS, *SOURCES, VALIDATION, "data.source_tokenizer", "model.hf_path", "teacher.hf_path"),
    "distill.on_policy?.prompts",
    on_machine=True,
)
def inputs_are_mounted(cfg: RunConfig) -> Iterator[Finding]:
    slurm = require(cfg.cluster.slurm)
    if slurm.container_image is None:
        return
    mounts = list(filter(_is_mount, slurm.container_mounts))
    for key, path in (*input_files(cfg), *hub_folders(cfg)):
        if not any(_holds(mount, path) for mount in mounts):
            folder = os.path.dirname(path)
            yield Finding(
                _MOUNTS,
                f"the container would not see {path} of {key} under that name; add {folder}:{folder} to {_MOUNTS}",
            )


def warnings(cfg: RunConfig) -> list[str]:
    """What jobs do not request, although a site's default may be too little."""
    slurm = require(cfg.cluster.slurm)
    options = " ".join(slurm.sbatch)
    found = []
    if slurm.cpus_per_gpu is None and not re.search(r"--exclusive|--cpus-per-|--cores-per-|(^| )-c", options):
        found.append(
            "cluster.slurm.cpus_per_gpu=null: jobs do not request CPU cores, and where the site confines them all "
            "ranks of a node may share one; set cluster.slurm.cpus_per_gpu to a node's cores divided by its GPUs "
            "(sinfo -o '%c %G')"
        )
    if slurm.mem is None and "--mem" not in options:
        found.append(
            "cluster.slurm.mem=null: jobs do not request memory, and the site's default may be too little; set "
            "cluster.slurm.mem to an amount such as 200G, or to 0 for all of a node's"
        )
    return found


def _holds(mount: str, path: str) -> bool:
    """Whether a mount brings a path into the container under the same name."""
    source, target = _source_and_target(mount)
    return source == target and os.path.commonpath([source, path]) == os.path.normpath(source)


def _is_mount(mount: str) -> bool:
    return all(map(os.path.isabs, _source_and_target(mount))) and not re.search(r"[,\n]", mount)


def _source_and_target(mount: str) -> tuple[str, str]:
    """Both ends of `SOURCE:TARGET[:FLAGS]`; pyxis takes a lone `SOURCE` for both."""
    source, _, rest = mount.partition(":")
    return source, rest.partition(":")[0] or source
