"""Detect folders on local disks, by the type of their file system."""

from __future__ import annotations

import os
from pathlib import Path

from prune_distill.schema import RunConfig

# Local file systems. A server may export one of the first five, hence `cluster.run_dir_is_shared`.
LOCAL = {"ext4", "ext3", "xfs", "btrfs", "zfs", "tmpfs", "ramfs", "overlay", "aufs", "squashfs"}


def find_unshared(cfg: RunConfig) -> list[str]:
    """Return a fault if the run's folder, which several machines need, appears to be on a local disk."""
    kind = local_type(Path(cfg.run_dir))
    if kind is None or cfg.cluster.run_dir_is_shared:
        return []
    return [
        f"run_dir={cfg.run_dir}: {kind} appears to be a local disk of this machine; set run_dir to a disk "
        "that all nodes share, or cluster.run_dir_is_shared=true if they share this one"
    ]


def local_type(path: Path, mounts: Path = Path("/proc/mounts")) -> str | None:
    """Return the type of the file system of a path (which need not exist) if it is local to this machine.

    Returns None for a shared one (nfs, lustre, gpfs, beegfs, wekafs, ceph, fuse.*, ...) and if it is unknown.
    """
    try:
        lines = mounts.read_text().splitlines()
    except OSError:
        return None
    place = os.path.realpath(path)
    # Later mounts hide earlier ones at the same path, so the last of the longest matches counts.
    longest, found = "", None
    for line in lines:
        _, point, kind, *_ = line.split(" ")
        # Spaces and other special characters are octal escapes (man 5 fstab).
        point = point.encode().decode("unicode_escape").encode("latin-1").decode(errors="replace")
        if os.path.commonpath([point, place]) == point and len(point) >= len(longest):
            longest, found = point, kind
    return found if found in LOCAL else None
