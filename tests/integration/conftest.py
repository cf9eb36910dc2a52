"""Fixtures of several integration tests."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from xdist.scheduler import LoadScopeScheduling

from tests.helpers import tiny, tolerance
from tests.helpers.fork_server import fork_server, real_starts
from tests.helpers.fork_site.sitecustomize import FORK_SERVER

# Modules whose tests share what a fixture of theirs makes, so that one worker runs all of a module.
SHARED = (
    *("test_layouts.py", "test_mixture.py", "test_correct_teacher.py", "test_conversion.py", "test_cached_logits.py"),
    *("test_search.py", "test_masked_losses.py", "test_report_page.py", "test_fake_quantization.py"),
    *("test_on_policy.py", "test_own_teacher.py", "test_source_teachers.py"),
)
# The longest modules start first. The first two do not need `finished`, which the third makes in the meantime.
LONGEST = (
    *SHARED[:6],
    *("test_own_teacher.py", "test_on_policy.py", "test_source_teachers.py"),
    *("test_a_training_killed_ten_times_gives_the_same_curve", "test_a_run_that_prunes_all_axes"),
    *("test_each_round_prunes_the_student_of_the_previous_round", "test_masked_losses.py"),
)
_session = ExitStack()


class Scheduling(LoadScopeScheduling):  # type: ignore[misc]
    """Assigns one test at a time to each worker, or a whole module of `SHARED`.

    pytest-xdist's own groups need node ids that can be set, which those of pytest 9.2 cannot (xdist/remote.py:254).
    """

    def _split_scope(self, nodeid: str) -> str:
        module = nodeid.partition("::")[0]
        return module if Path(module).name in SHARED else nodeid


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling:
    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        return next((n for n, name in enumerate(LONGEST) if name in (item.name, item.path.name)), len(LONGEST))

    items.sort(key=place)


def pytest_sessionstart() -> None:
    """Start the fork server for most processes of these tests, except on a GPU. xdist's workers share it."""
    if FORK_SERVER not in os.environ and not tolerance.GPU:
        _session.enter_context(fork_server())


def pytest_sessionfinish() -> None:
    _session.close()


@pytest.fixture
def real_start() -> Iterator[None]:
    """Do not use the fork server in a test of starts, kills or orphans."""
    with real_starts():
        yield


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete tiny run with depth pruning. Tests read or copy it (`tiny.copy_run`).

    pytest-xdist's workers share it: the first one makes it, the others wait. It does not use the fork server:
    the tests that expect the same numbers again compare those of the fork server with them.
    """
    base = tmp_path_factory.getbasetemp()
    run_dir = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "finished"
    with FileLock(f"{run_dir}.lock"), real_starts():
        tiny.launch(run_dir, *tiny.DEPTH)
    return run_dir


SmallDisk = Callable[[str], Path]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """Return a function that mounts a file system of a size (`"256k"`), if the user may; further calls resize it."""
    folder = tmp_path / "disk"

    def sized(size: str) -> Path:
        option = f"remount,size={size}" if folder.exists() else f"size={size}"
        folder.mkdir(exist_ok=True)
        if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", option, "tmpfs", folder]).returncode:
            pytest.skip("a full disk can be made by root only")
        return folder

    yield sized
    if folder.is_mount():
        subprocess.run(["umount", folder], check=True)
