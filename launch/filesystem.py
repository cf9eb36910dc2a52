"""Whether a folder is on a disk that other machines see, as far as its file system's type tells."""

from __future__ import annotations

import os
from pathlib import Path

from prune_distill.schema import RunConfig

# Disks and memory of one machine. A server may export one of the first four, hence `cluster.run_dir_is_shared`.
LOCAL = {"ext4", "ext3", "xfs", "btrfs", "zfs", "tmpfs", "ramfs", "overlay", "aufs", "squashfs"}


def unshared(cfg: RunConfig) -> list[str]:
    """A fault where the run's folder, which several machines are to see, looks like one of this machine only."""
    kind = local_type(Path(cfg.run_dir))
    if kind is None or cfg.cluster.run_dir_is_shared:
        return []
    return [
        f"run_dir={cfg.run_dir} is on {kind}, by the look of it a disk of this machine only; set run_dir to a disk "
        "that all nodes share, or cluster.run_dir_is_shared=true if they share this one"
    ]


def local_type(path: Path, mounts: Path = Path("/proc/mounts")) -> str | None:
    """The type of the file system that holds a path (which need not exist), where it is one of this machine only.

    None for a shared one (nfs, lustre, gpfs, beegfs, wekafs, ceph, fuse.*, ...), and where it cannot be told.
    """
    try:
        lines = mounts.read_text().splitlines()
    except OSError:
        return None
    place = os.path.realpath(path)
    # Mounts hide earlier ones of the same place: the last of the longest counts.
    longest, found = "", None
    for line in lines:
        _, point, kind, *_ = line.split(" ")
        # Spaces and such are written as octal numbers (man 5 fstab).
        point = point.encode().decode("unicode_escape").encode("latin-1").decode(errors="replace")
        if os.path.commonpath([point, place]) == point and len(point) >= len(longest):
            longest, found = point, kind
    return found if found in LOCAL else None
