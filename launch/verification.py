"""Check the outputs of complete stages: presence and sizes before each launch, and the content on request."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from prune_distill.errors import InputError
from prune_distill.pipeline.artifact import Located
from prune_distill.pipeline.integrity import (
    Damage,
    checkpoint_damage,
    describe_unrecorded,
    find_damage,
    raise_if_damaged,
    read_record,
)
from prune_distill.pipeline.names import CHECKPOINTS, find_checkpoints
from prune_distill.pipeline.outputs import total_bytes


def check_sizes(stage: Located) -> Damage | None:
    """Find files of a complete stage that are missing or have another size, without reading them."""
    return find_damage(stage.folder, contents=False) if stage.complete else None


def refuse_damaged(stages: Sequence[Located], run_dir: Path) -> None:
    """Check sizes, and print which stages cannot be checked. Raises: InputError, if files are missing or differ."""
    if notice := describe_unrecorded(stages):
        print(notice, file=sys.stderr)
    raise_if_damaged(filter(None, map(check_sizes, stages)), run_dir)


def verify(stages: Mapping[str, Located], run_dir: Path) -> bool:
    """Read all outputs and checkpoints of complete stages, and print what is wrong. Returns whether all are intact."""
    print(f"{run_dir}:")
    damages: list[Damage] = []
    width = max(map(len, stages))
    for name, stage in stages.items():
        if not stage.complete:
            print(f"{name:<{width}}  not complete", flush=True)
            continue
        found = list(_all_damage(stage.folder))
        damages += found
        print(f"{name:<{width}}  {_describe(stage.folder, found)}", flush=True)
        for damage in found:
            print(*(f"  {damage.folder / file} {fault}" for file, fault in damage.files.items()), sep="\n", flush=True)
    try:
        raise_if_damaged(damages, run_dir)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
    return not damages


def _all_damage(folder: Path) -> Iterable[Damage]:
    yield from filter(None, [find_damage(folder)])
    yield from filter(None, map(checkpoint_damage, find_checkpoints(folder / CHECKPOINTS).values()))


def _describe(folder: Path, found: Sequence[Damage]) -> str:
    if found:
        return "damaged"
    entries = read_record(folder).entries
    if entries is None:
        return "not checked: made before outputs were recorded"
    return f"intact: {len(entries):,} files, {total_bytes(entries) / 1e6:,.1f} MB"
