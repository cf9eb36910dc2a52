"""The stages of earlier settings in a run's folder: list them, and remove them when the user asks for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.planning.disk import written_bytes
from launch.queue import filter_active, read_submissions
from launch.verification import check_sizes
from prune_distill.errors import InputError
from prune_distill.pipeline.artifact import Located, in_use, read_manifest, remove_folder
from prune_distill.pipeline.names import parse_stage_folder
from prune_distill.pipeline.stage import Stage
from prune_distill.units import GIB


@dataclass(frozen=True)
class OldStage:
    """The folder of a stage of earlier settings. `complete`: whether it is complete for them."""

    folder: Path
    complete: bool
    bytes: int


def find_old_stages(run_dir: Path, located: Mapping[str, Located], stages: Sequence[Stage]) -> list[OldStage]:
    """Find the folders of stages of the table that the run's config does not use, in order of their names."""
    names = {stage.name for stage in stages}
    used = {stage.folder.name for stage in located.values()}
    read = list(_read_paths(located))
    return [
        OldStage(folder, read_manifest(folder) is not None, written_bytes(folder))
        for folder in sorted(run_dir.iterdir())
        if parse_stage_folder(folder.name) in names
        and folder.name not in used
        and folder.is_dir()
        and not folder.is_symlink()
        and not any(path.is_relative_to(folder.resolve()) for path in read)
    ]


def _read_paths(located: Mapping[str, Located]) -> Iterator[Path]:
    """Yield the paths that the stages read: a config may name files in the folder of an old stage."""
    for stage in located.values():
        for value in stage.inputs.values():
            yield from (Path(path).resolve() for path in (value if isinstance(value, tuple) else (value,)))


def format_list(old: list[OldStage]) -> str:
    """Format the folders with their sizes, below the stages of the run."""
    width = max(len(stage.folder.name) for stage in old)
    lines = [
        f"  {stage.folder.name:<{width}}  {stage.bytes / GIB:10,.3f} GiB{'' if stage.complete else '  not complete'}"
        for stage in old
    ]
    return "\n".join(["of earlier settings (--remove-old removes them):", *lines])


def remove_old_stages(run_dir: Path, located: Mapping[str, Located], stages: Sequence[Stage]) -> None:
    """Remove the folders of stages that the run's config does not use, and print each. The caller holds the run's lock.

    Raises:
        InputError: the run is not complete or is damaged, so that its earlier results may be all that there is; or it
            is in use.
    """
    missing = [name for name, stage in located.items() if not stage.complete or check_sizes(stage) is not None]
    if missing:
        raise InputError(
            f"--remove-old: stages of {run_dir} are not complete for the present settings: {', '.join(missing)}; "
            "complete the run first, or remove folders by hand"
        )
    jobs = filter_active([job for submission in read_submissions(run_dir).values() for job in submission["jobs"]])
    if jobs:
        raise InputError(f"--remove-old: jobs {', '.join(jobs)} use {run_dir}; wait until they have ended")
    old = find_old_stages(run_dir, located, stages)
    busy = [str(stage.folder) for stage in old if in_use(stage.folder)]
    if busy:
        raise InputError(f"--remove-old: a process uses {', '.join(busy)}; wait until it has ended, or end it")
    for stage in old:
        remove_folder(stage.folder)
        print(f"removed {stage.folder} ({stage.bytes / GIB:,.3f} GiB)")
