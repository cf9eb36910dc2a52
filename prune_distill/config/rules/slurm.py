"""Rules of the section `cluster.slurm`, each fault naming a key, its value and the value to set instead."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from typing import cast

from prune_distill.config.data_files import find_existing, is_on_hub
from prune_distill.model.hf_shape import may_be_hub_id
from prune_distill.schema import RunConfig, SlurmConfig
from prune_distill.units import seconds_of_time_limit

# Slurm sends a warning up to this much earlier than asked (man sbatch, --signal).
WARNING_MAY_BE_EARLY = 60
# More of them, and the chain of jobs would be longer than most sites let one user queue.
MOST_RESTARTS_WITHOUT_REQUEUE = 100
# Where huggingface_hub, datasets and transformers keep and look for files, and whether they ask the Hub. Jobs and
# containers take these from the shell that starts them.
HUB_FOLDERS = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_DATASETS_CACHE")
HUB_SETTINGS = ("HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
# Linux follows no more links than this in one path.
_MOST_LINKS = 40
_MEMORY = re.compile(r"\d+[KMGT]?", re.IGNORECASE)
_NAME = re.compile(r"[\w.,+@-]+")
_VARIABLE = re.compile(r"[A-Za-z_]\w*")
# A ":" parts a mount's source and target, "," one mount from the next (pyxis, --container-mounts).
_IN_NO_MOUNT = re.compile(r"[:,\n]")

Rule = Callable[[RunConfig], Iterator[str]]


def time_limit(cfg: RunConfig) -> Iterator[str]:
    text, warn_seconds = cfg.cluster.time_limit, _slurm(cfg).warn_seconds
    if text is None:
        yield "cluster.time_limit=null, but a Slurm job needs one; set cluster.time_limit='4:00:00'"
        return
    try:
        seconds = seconds_of_time_limit(text)
    except ValueError:
        return  # known already
    if seconds <= warn_seconds + WARNING_MAY_BE_EARLY:
        yield (
            f"cluster.time_limit={text} leaves no time to train: cluster.slurm.warn_seconds={warn_seconds} of it are "
            f"kept for a save, and Slurm may warn {WARNING_MAY_BE_EARLY} s early; set cluster.time_limit to more, or "
            "cluster.slurm.warn_seconds to less"
        )


def _name(key: str) -> Rule:
    """Each on its own, so that one that is missing does not hide what is wrong with another."""

    def rule(cfg: RunConfig) -> Iterator[str]:
        value = getattr(cfg.cluster.slurm, key, None)
        if value is not None and not _NAME.fullmatch(value):
            yield f"cluster.slurm.{key}={value!r} is no name that Slurm knows; set it to one word, without quotes"

    return rule


def secrets(cfg: RunConfig) -> Iterator[str]:
    bad = [name for name in _slurm(cfg).secrets if not _VARIABLE.fullmatch(name)]
    if bad:
        yield (
            f"cluster.slurm.secrets names {bad[0].partition('=')[0]!r}, which is no name of an environment variable; "
            "give names only, such as HF_TOKEN: their values are taken from the environment of launch.run"
        )


def memory(cfg: RunConfig) -> Iterator[str]:
    value = _slurm(cfg).mem
    if value is not None and not _MEMORY.fullmatch(value):
        yield (
            f"cluster.slurm.mem={value!r} is not an amount of memory; set cluster.slurm.mem to one such as 200G, to 0 "
            "for all of a node's, or to null for the site's default"
        )


def lines(cfg: RunConfig) -> Iterator[str]:
    slurm = _slurm(cfg)
    bad = [line for line in slurm.sbatch if not re.match(r"--?\w", line) or "\n" in line]
    if bad:
        yield f"cluster.slurm.sbatch holds {bad[0]!r}, which is no option; set it to options such as --exclusive"
    if not slurm.requeue and slurm.max_restarts > MOST_RESTARTS_WITHOUT_REQUEUE:
        yield (
            f"cluster.slurm.max_restarts={slurm.max_restarts} would queue as many jobs a training stage, as "
            f"cluster.slurm.requeue=False; set cluster.slurm.max_restarts to at most {MOST_RESTARTS_WITHOUT_REQUEUE}"
        )


def image(cfg: RunConfig) -> Iterator[str]:
    value = _slurm(cfg).container_image
    if value is not None and (not value.strip() or "\n" in value):
        yield (
            f"cluster.slurm.container_image={value!r} is no image; set cluster.slurm.container_image to "
            "registry#name:tag or a .sqsh file, or to null for none"
        )
    if value is not None and _IN_NO_MOUNT.search(cfg.run_dir):
        yield f"run_dir={cfg.run_dir!r} cannot be mounted, for its comma or colon; set run_dir to a path without"
    if value is None and _slurm(cfg).container_mounts:
        yield (
            f"cluster.slurm.container_mounts={_slurm(cfg).container_mounts} without an image; set "
            "cluster.slurm.container_image, or cluster.slurm.container_mounts=[]"
        )


def inside(cfg: RunConfig) -> Iterator[str]:
    workdir = _slurm(cfg).container_workdir
    if not os.path.isabs(workdir):
        yield (
            f"cluster.slurm.container_workdir={workdir} is relative; set it to where the image has this repository, "
            "such as /opt/nemo-prune-distill"
        )
    for mount in _slurm(cfg).container_mounts:
        if not _is_mount(mount):
            yield (
                f"cluster.slurm.container_mounts holds {mount!r}, which is no mount; set it to SOURCE:TARGET or "
                "SOURCE:TARGET:ro, both absolute and without commas"
            )


def _with_slurm(rule: Rule) -> Rule:
    def apply(cfg: RunConfig) -> Iterator[str]:
        if cfg.cluster.slurm is not None:
            yield from rule(cfg)

    return apply


RULES: tuple[Rule, ...] = tuple(
    map(
        _with_slurm,
        (time_limit, *map(_name, ("partition", "account", "qos", "gpu_type")), secrets, memory, lines, image, inside),
    )
)


def unset_variables(cfg: RunConfig) -> Iterator[str]:
    unset = [name for name in _slurm(cfg).secrets if _VARIABLE.fullmatch(name) and name not in os.environ]
    if unset:
        yield (
            f"cluster.slurm.secrets names {', '.join(unset)}, not set in this environment; "
            "export it, or take it out of cluster.slurm.secrets"
        )


def absent_mounts(cfg: RunConfig) -> Iterator[str]:
    for mount in filter(_is_mount, _slurm(cfg).container_mounts):
        source, _ = _source_and_target(mount)
        if not os.path.exists(source):
            yield (
                f"cluster.slurm.container_mounts holds {mount!r}, but {source} does not exist; set it to a folder that "
                "the nodes see"
            )


def absent_image(cfg: RunConfig) -> Iterator[str]:
    value = _slurm(cfg).container_image
    if value is not None and os.path.isabs(value) and not os.path.exists(value):
        yield (
            f"cluster.slurm.container_image={value} does not exist; set cluster.slurm.container_image to a .sqsh file "
            "or registry#name:tag"
        )


def unmounted_inputs(cfg: RunConfig) -> Iterator[str]:
    if _slurm(cfg).container_image is None:
        return
    mounts = list(filter(_is_mount, _slurm(cfg).container_mounts))
    for key, path in (*input_files(cfg), *_hub_folders(cfg)):
        if not any(_holds(mount, path) for mount in mounts):
            folder = os.path.dirname(path)
            yield (
                f"{key} names {path}, which the container would not see under that name; "
                f"add {folder}:{folder} to cluster.slurm.container_mounts"
            )


# What the machine that submits lacks.
RULES_OF_FILES: tuple[Rule, ...] = tuple(
    map(_with_slurm, (unset_variables, absent_mounts, absent_image, unmounted_inputs))
)


def _slurm(cfg: RunConfig) -> SlurmConfig:
    return cast(SlurmConfig, cfg.cluster.slurm)


def warnings(cfg: RunConfig) -> list[str]:
    """What jobs do not ask for and a site may give too little of by default."""
    slurm = _slurm(cfg)
    options = " ".join(slurm.sbatch)
    faults = []
    if slurm.cpus_per_gpu is None and not re.search(r"--exclusive|--cpus-per-|--cores-per-|(^| )-c", options):
        faults.append(
            "cluster.slurm.cpus_per_gpu=null: jobs do not ask for CPU cores, and where the site confines them all "
            "ranks of a node may share one; set cluster.slurm.cpus_per_gpu to a node's cores divided by its GPUs "
            "(sinfo -o '%c %G')"
        )
    if slurm.mem is None and "--mem" not in options:
        faults.append(
            "cluster.slurm.mem=null: jobs do not ask for memory, and the site's default may be too little; set "
            "cluster.slurm.mem to one such as 200G, or to 0 for all of a node's"
        )
    return faults


def _hub_folders(cfg: RunConfig) -> Iterator[tuple[str, str]]:
    """Folders of the Hub's caches that jobs are pointed to, for a model that has to be there."""
    path = cfg.model.hf_path
    if path is None or not may_be_hub_id(path) or os.path.exists(path):
        return
    for name in HUB_FOLDERS:
        folder = absolute(os.environ.get(name) or os.devnull)
        if os.path.isdir(folder):
            yield name, os.path.join(folder, "")


def input_files(cfg: RunConfig) -> Iterator[tuple[str, str]]:
    """The user's files that a run reads, absolute, each folder of them once, and those that their links lead to."""
    path = cfg.model.hf_path
    if path is not None and not may_be_hub_id(path):
        yield "model.hf_path", absolute(path)
        targets = {os.path.dirname(target): target for target in sorted(_link_targets(absolute(path)), reverse=True)}
        yield from (("model.hf_path", target) for target in targets.values())
    patterns = {f"data.{key}": getattr(cfg.data, key) or [] for key in ("train", "validation")}
    patterns |= {f"data.sources.{name}.files": source.files for name, source in (cfg.data.sources or {}).items()}
    for key, names in patterns.items():
        files = [absolute(file) for name in names if not is_on_hub(name) for file in find_existing(name)]
        found = sorted({*files, *(target for file in files for target in _link_targets(file))})
        for path in {os.path.dirname(file): file for file in reversed(found)}.values():
            yield key, path
    # Its default is a Hub id; a folder is named outright.
    if os.path.exists(cfg.data.source_tokenizer):
        yield "data.source_tokenizer", absolute(cfg.data.source_tokenizer)


def _link_targets(path: str) -> Iterator[str]:
    """What a file's links, or those in a folder, lead to outside of it, link by link: in a snapshot of the Hub's cache
    every file is a link to a blob beside it."""
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    files = [os.path.join(place, name) for place, _, names in os.walk(path) for name in names] or [path]
    for file in files:
        for _ in range(_MOST_LINKS):
            if not os.path.islink(file):
                break
            file = os.path.normpath(os.path.join(os.path.realpath(os.path.dirname(file)), os.readlink(file)))
            if os.path.lexists(file) and os.path.commonpath([folder, file]) != folder:
                yield file


def absolute(path: str) -> str:
    """A path of the user's that means the same in any working directory."""
    return os.path.abspath(os.path.expanduser(path))


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
