"""A fork server: processes that have imported the libraries, and fork a child for each command of a test.

A stage's process spends most of its time on the import of torch, NeMo, Megatron and ModelOpt. Here the imports are made
once per pytest session. What runs in a child is still the command line: the launcher starts `python -m recipes ...` as
ever, and that interpreter hands its command to the server (`tests/helpers/fork_site/sitecustomize.py`).

The server is a tree of processes, one for each set of libraries, each a fork of its parent with more imported. Each has
a socket. None has started a thread of Python, OpenMP or torch when it forks, and none has used CUDA. A request is run
by two processes: a guard, and its child, which becomes what the interpreter would have become. The guard tells the
interpreter how the child ended, passes signals on, and kills the child when the interpreter dies; the kernel kills
the child when the guard dies.

A command whose environment differs from the server's in a variable that may affect an import is not run: its
interpreter runs it itself.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import gc
import importlib
import logging
import marshal
import os
import re
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

from launch.environment import ROOT
from prune_distill.nemo import backend
from prune_distill.pipeline.processes import import_libraries, set_parent_death_signal
from prune_distill.pipeline.stages import STAGES
from tests.helpers.fork_site.sitecustomize import (
    COMMANDS,
    FORK_SERVER,
    NEMO,
    TORCHRUN,
    TRANSFORMERS,
    without_options,
)

SITE = Path(__file__).parent / "fork_site"
LOG = "log.txt"
# Each server's parent in the tree, whose libraries it has too, and the modules that it imports.
SERVERS: dict[str, tuple[str | None, tuple[str, ...]]] = {
    COMMANDS: (
        None,
        (
            "launch.run",
            "recipes.report",
            "matplotlib.backends.backend_svg",
            "recipes.prepare_data",
            "convert.hf_to_nemo",
            "convert.nemo_to_hf",
        ),
    ),
    TORCHRUN: (COMMANDS, ("torch.distributed.run",)),
    TRANSFORMERS: (
        TORCHRUN,
        ("recipes.evaluate", "recipes.benchmark", "transformers.models.auto.modeling_auto", "lm_eval"),
    ),
    NEMO: (TORCHRUN, ()),
}
# Read when they are used, and not when a library is imported; or set by an import itself.
FREE = re.compile(
    r"RANK|(LOCAL|GROUP|NODE|ROLE)_RANK|ROLE_NAME|((LOCAL|GROUP|ROLE)_)?WORLD_SIZE|MASTER_(ADDR|PORT)|TORCHELASTIC_\w+"
    r"|PET_\w+|TORCH_NCCL_\w+|NVTE_\w+|CUDA_DEVICE_MAX_CONNECTIONS|TOKENIZERS_PARALLELISM|PRUNE_DISTILL_\w+|SPOILED"
    r"|SLURM_JOB_NAME|COLUMNS|LINES"
    r"|PYTEST_\w+|PYTHONUNBUFFERED|PWD|OLDPWD|SHLVL|_|KMP_\w+|TORCHINDUCTOR_CACHE_DIR|PYTORCH_NVML\w+"
)
SECONDS_TO_END = 5.0


def python_path() -> str:
    """The PYTHONPATH of test processes: the repository, and what hands commands to a server where there is one."""
    return os.pathsep.join([str(ROOT), *([str(SITE)] if FORK_SERVER in os.environ else [])])


@contextmanager
def fork_server() -> Iterator[Path]:
    """Run a server for processes started during the block; yield its folder. It exits with this process."""
    # The path of a socket is limited to 107 bytes, and pytest's folders are long.
    with tempfile.TemporaryDirectory(prefix="forks-", ignore_cleanup_errors=True) as folder:
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{SITE}", "OMP_NUM_THREADS": "1"}
        with (Path(folder) / LOG).open("wb") as log:
            server = subprocess.Popen(
                [sys.executable, "-u", "-m", "tests.helpers.fork_server", folder],
                env={**environment, "PYTHONUNBUFFERED": "1"},
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        assert server.stdin is not None
        os.environ[FORK_SERVER] = folder
        try:
            yield Path(folder)
        finally:
            del os.environ[FORK_SERVER]
            server.stdin.close()
            try:
                server.wait(SECONDS_TO_END)
            except subprocess.TimeoutExpired:  # still importing
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()


@contextmanager
def real_starts() -> Iterator[None]:
    """Processes started during the block do not use the fork server."""
    with patch.dict(os.environ):
        os.environ.pop(FORK_SERVER, None)
        yield


class Request:
    """A command of another interpreter, and its open files."""

    def __init__(self, connection: socket.socket) -> None:
        length, self.received, _, _ = socket.recv_fds(connection, 4, 250)
        content = connection.recv(int.from_bytes(length, "little"), socket.MSG_WAITALL)
        self.message: dict[str, Any] = marshal.loads(content)

    def differing(self, own: dict[bytes, bytes]) -> list[str]:
        """The environment variables that may act on an import and have another value than in a server's environment."""
        theirs = self.message["environment"]
        names = sorted(os.fsdecode(name) for name in own.keys() | theirs if own.get(name) != theirs.get(name))
        folders = [{*values.get(b"PYTHONPATH", b"").split(b":")} for values in (own, theirs)]
        # What a stage with an active backend starts has its folder too.
        same_path = folders[0] == folders[1] - {os.fsencode(backend._SITE)}
        return [name for name in names if not FREE.fullmatch(name) and not (name == "PYTHONPATH" and same_path)]

    def close(self) -> None:
        for received in self.received:
            os.close(received)

    def become(self, set_by_imports: dict[str, str]) -> None:
        """Give this process the files, folder, environment and signals of the requesting interpreter."""
        os.setsid()
        # Keep them away from the target numbers.
        aside = [fcntl.fcntl(received, fcntl.F_DUPFD, 512) for received in self.received]
        self.close()
        for kept, number in zip(aside, self.message["files"], strict=True):
            os.dup2(kept, number)
            os.close(kept)
        os.chdir(self.message["folder"])
        os.umask(self.message["umask"])
        os.environ.clear()
        os.environb.update(self.message["environment"])
        for name, value in set_by_imports.items():
            os.environ.setdefault(name, value)
        for signum in self.message["ignored"]:
            if signal.getsignal(signum) != signal.SIG_IGN:
                signal.signal(signum, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, self.message["blocked"])
        self._take_parent()

    def _take_parent(self) -> None:
        """Make `os.getppid` return the parent of the requesting interpreter."""
        child, parent_of_this = os.getpid(), os.getppid
        stat = Path(f"/proc/{self.message['pid']}/stat")

        def parent() -> int:
            if os.getpid() != child:
                return parent_of_this()
            return int(stat.read_text().rpartition(")")[2].split()[1])

        os.getppid = parent

    def run(self) -> None:
        """Run the command as `python` does (Modules/main.c:pymain_run_python)."""
        sys.executable = self.message["executable"]
        sys.orig_argv[:] = self.message["words"]
        words = self.message["words"][1:]
        if not {"-W", "-Wignore"}.isdisjoint(words):
            sys.warnoptions.append("ignore")
            warnings.simplefilter("ignore")
        option, program, *arguments = without_options(words)
        sys.path[:] = ["" if option == "-c" else self.message["folder"], *self.message["path"]]
        importlib.invalidate_caches()
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        if option == "-c":
            sys.argv[:] = [option, *arguments]
            exec(program, main.__dict__)
            return
        sys.argv[:] = [option, *arguments]
        sys.modules.pop(program, None)
        runpy._run_module_as_main(program)  # type: ignore[attr-defined]


def serve(listener: socket.socket, own: dict[bytes, bytes], set_by_imports: dict[str, str]) -> Request:
    """Fork for every request. Returns in the child that runs one; a server exits here."""
    while True:
        # The pipe from the tests closes when they end for any reason.
        ready, _, _ = select.select([listener, 0], [], [])
        if 0 in ready:
            listener.close()
            with contextlib.suppress(ChildProcessError):
                while True:
                    os.wait()
            os._exit(0)
        connection, _ = listener.accept()
        if not os.fork():
            listener.close()
            return _guarded(connection, own, set_by_imports)
        connection.close()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _guarded(connection: socket.socket, own: dict[bytes, bytes], set_by_imports: dict[str, str]) -> Request:
    """Return in a child, which this process guards."""
    try:
        request = Request(connection)
    except (OSError, EOFError, ValueError):  # the interpreter was killed
        os._exit(0)
    words = " ".join(request.message["words"][1:])
    if differing := request.differing(own):
        print(f"not run, for {', '.join(differing)}: {words}")
        connection.sendall(b"\0")
        os._exit(0)
    guard = os.getpid()
    child = os.fork()
    if not child:
        set_parent_death_signal(signal.SIGKILL, guard)
        connection.close()
        request.become(set_by_imports)
        return request
    request.close()
    with contextlib.suppress(OSError):
        connection.sendall(b"\1")
        _pass_signals_on(connection, child)
    _, status, usage = os.wait4(child, 0)
    print(f"{usage.ru_utime + usage.ru_stime:.1f} CPU s, status {status}: {words}")
    with contextlib.suppress(OSError):
        connection.sendall(status.to_bytes(4, "little"))
    os._exit(0)


def _pass_signals_on(connection: socket.socket, child: int) -> None:
    """Return when the child has ended, or is killed because the requesting interpreter has died."""
    ended = os.pidfd_open(child)
    while True:
        ready, _, _ = select.select([connection, ended], [], [])
        if ended in ready:
            return
        signals = connection.recv(16)
        for signum in signals:
            os.kill(child, signum)
        if not signals:
            # Including the rest of its process group, like a launcher (launch/local.py:stop).
            with contextlib.suppress(ProcessLookupError):  # it leads no group yet
                os.killpg(child, signal.SIGKILL)
            os.kill(child, signal.SIGKILL)
            return


def prepare(name: str) -> None:
    """Import the libraries of a server, after the log has a handler, as in their processes."""
    if name == NEMO:
        _activate()
    import_libraries(*SERVERS[name][1])


def _activate() -> None:
    """Activate the backend, and make `activate` repeat its effects on the process in a child."""
    chosen = backend.activate()
    if chosen.name != "cpu":
        raise SystemExit("a process that uses CUDA cannot be forked")
    import_libraries(*{stage.module for stage in STAGES if stage.needs_nemo})

    @cache
    def activate() -> backend.Backend:
        backend._put_first_on_path(str(backend._SITE))
        from lightning.fabric.utilities import rank_zero

        # As lightning/fabric/utilities/rank_zero.py does on import.
        rank_zero.rank_zero_only.rank = rank_zero._get_rank() or 0
        return chosen

    backend.activate = activate


def start(name: str, listeners: dict[str, socket.socket], first: dict[bytes, bytes]) -> Request:
    """Import, start the servers that build on this one, and serve. Returns in a child that runs a request.

    Args:
        listeners: sockets of this server and of those to start.
        first: environment before the first import.
    """
    path = list(sys.path)
    handler = logging.NullHandler()
    logging.root.addHandler(handler)
    prepare(name)
    logging.root.removeHandler(handler)
    logging.root.setLevel(logging.WARNING)
    sys.path[:] = path
    gc.freeze()
    for successor in (successor for successor, (parent, _) in SERVERS.items() if parent == name):
        if not os.fork():
            return start(successor, listeners, first)
    listener = listeners[name]
    for other in listeners.values():
        if other is not listener:
            other.close()
    set_by_imports = {os.fsdecode(key): os.fsdecode(os.environb[key]) for key in os.environb.keys() - first.keys()}
    threads = sorted((task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir())
    print(f"{name}: ready; threads: {', '.join(threads)}; set by imports: {set_by_imports}")
    return serve(listener, first, set_by_imports)


def _run_to_end(request: Request) -> NoReturn:
    """Run a command and exit like Python (Python/pythonrun.c, Python/pylifecycle.c:Py_FinalizeEx).

    Modules are not destroyed, which would copy most of the memory that is shared with the server.
    """
    status = 1
    try:
        request.run()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status & 0xFF)


def main() -> None:
    folder = Path(sys.argv[1])
    listeners = {name: socket.socket(socket.AF_UNIX) for name in SERVERS}
    for name, listener in listeners.items():
        listener.bind(str(folder / name))
        listener.listen(64)
    _run_to_end(start(COMMANDS, listeners, dict(os.environb)))


if __name__ == "__main__":
    main()
