"""Check that complete folders still contain what their stages wrote. No torch."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from prune_distill.errors import InputError
from prune_distill.pipeline.artifact import Located, is_intact, read_manifest
from prune_distill.pipeline.names import CHECKPOINTS, CONTEXT, LAUNCHES, MANIFEST, OUTPUTS, WEIGHTS, find_checkpoints
from prune_distill.pipeline.outputs import Entries, compute_crc32, differences, parse_record, select, select_share
from prune_distill.pipeline.stage import Output

# Maximum number of files in a message.
MOST_FILES = 3


@dataclass(frozen=True)
class Damage:
    """A folder with missing or changed files.

    Attributes:
        folder: the folder to remove before its stage can run again.
        files: fault by file.
    """

    folder: Path
    files: Mapping[str, str]

    def __str__(self) -> str:
        named = [f"{name} {fault}" for name, fault in list(self.files.items())[:MOST_FILES]]
        more = len(self.files) - len(named)
        return f"{self.folder} is damaged: {', '.join(named)}{f', and {more} more files' if more else ''}"


@dataclass(frozen=True)
class Record:
    """The record of a complete folder.

    Attributes:
        entries: size and CRC-32 by file; None: the folder is older than records.
        faults: faults of the record itself, by file.
    """

    entries: Entries | None
    faults: Mapping[str, str]


def read_record(folder: Path) -> Record:
    """Read the record of a stage's complete folder."""
    manifest = read_manifest(folder) or {}
    if "outputs" not in manifest and "crc32" not in manifest:
        return Record(None, {})
    if not is_intact(manifest):
        return Record({}, {MANIFEST: "has other content than was written"})
    try:
        content = (folder / OUTPUTS).read_bytes()
    except OSError:
        return Record({}, {OUTPUTS: "is missing"})
    entries = parse_record(content)
    if entries is None or compute_crc32(content) != manifest.get("outputs", {}).get("crc32"):
        return Record({}, {OUTPUTS: "has other content than was written"})
    return Record(entries, {})


def find_damage(
    folder: Path,
    part: str = ".",
    files: Iterable[str] = ("*",),
    contents: bool = True,
    share: tuple[int, int] = (0, 1),
) -> Damage | None:
    """Find damage in a stage's complete folder; None if it is intact or has no record.

    Args:
        part: the path in the folder to check.
        files: patterns of the file names to check.
        contents: whether to read the files; otherwise only presence and sizes are compared.
        share: index of this process and number of processes that share the reading.
    """
    record = read_record(folder)
    if record.entries is None:
        return None
    wanted = select(record.entries, part, files)
    faults = dict(record.faults)
    if not wanted and not faults and part not in (".", CHECKPOINTS):
        faults[part] = "is not among what was written"
    faults |= _faults(folder, wanted, contents, share)
    return Damage(folder, faults) if faults else None


def _faults(folder: Path, entries: Entries, contents: bool, share: tuple[int, int]) -> dict[str, str]:
    """Compare the sizes in every process, and the content of each file in one of them."""
    faults = differences(folder, entries, contents=False)
    readable = {name: entry for name, entry in select_share(entries, *share).items() if contents and name not in faults}
    return {**faults, **differences(folder, readable)}


def checkpoint_damage(checkpoint: Path, contents: bool = True, share: tuple[int, int] = (0, 1)) -> Damage | None:
    """Find damage in a training checkpoint by its own record; see `find_damage`.

    A checkpoint without a record is older than records; it must contain weights and their context.
    """
    record = checkpoint / OUTPUTS
    if not record.exists():
        missing = [name for name in (WEIGHTS, CONTEXT) if not (checkpoint / name).is_dir()]
        return Damage(checkpoint, {f"{name}/": "is missing" for name in missing}) if missing else None
    entries = parse_record(record.read_bytes())
    if entries is None:
        return Damage(checkpoint, {OUTPUTS: "has other content than was written"})
    faults = _faults(checkpoint, entries, contents, share)
    return Damage(checkpoint, faults) if faults else None


def damaged_inputs(
    located: Located, stages: Mapping[str, Located], contents: bool, share: tuple[int, int] = (0, 1)
) -> list[Damage]:
    """Find damage in the inputs of a stage from earlier stages; see `find_damage`."""
    found = []
    for source in _outputs_read(located):
        folder = stages[source.stage].folder
        found.append(find_damage(folder, source.path, source.files, contents, share))
        if source.path == CHECKPOINTS:
            checkpoints = find_checkpoints(folder / CHECKPOINTS).values()
            found += [checkpoint_damage(checkpoint, contents, share) for checkpoint in checkpoints]
    return [damage for damage in found if damage is not None]


def raise_if_damaged(damages: Iterable[Damage], run_dir: Path) -> None:
    """Raise InputError if there is any damage, with the files and the command that repairs them."""
    by_folder: dict[Path, Damage] = {}
    for damage in damages:
        before = by_folder.get(damage.folder)
        by_folder[damage.folder] = Damage(damage.folder, {**(before.files if before else {}), **damage.files})
    if not by_folder:
        return
    remove = shlex.join(["rm", "-r", *map(str, by_folder)])
    raise InputError(f"{'; '.join(map(str, by_folder.values()))}; to repair it: {remove} && {_relaunch(run_dir)}")


def describe_unrecorded(stages: Iterable[Located]) -> str | None:
    """Format a sentence that names the complete stages that cannot be checked; None if there are none."""
    complete = [stage for stage in stages if stage.complete]
    names = sorted({stage.stage.name for stage in complete if read_record(stage.folder).entries is None})
    return f"{', '.join(names)}: not checked, because made before outputs were recorded" if names else None


def list_inputs(located: Located, stages: Mapping[str, Located]) -> list[Located]:
    """List the stages whose outputs a stage reads."""
    return [stages[name] for name in sorted({source.stage for source in _outputs_read(located)})]


def _outputs_read(located: Located) -> Iterator[Output]:
    sources = located.stage.inputs(located.cfg).values()
    return (source for source in sources if isinstance(source, Output))


def _relaunch(run_dir: Path) -> str:
    """Return the command that last launched a run, or a description if none is recorded."""
    try:
        last = json.loads((run_dir / LAUNCHES).read_text().splitlines()[-1])["command"]
    except (OSError, ValueError, IndexError, KeyError, TypeError):
        last = None
    return last if isinstance(last, str) and last else "the command that started the run"
