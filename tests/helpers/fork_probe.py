"""python -m tests.helpers.fork_probe state|exit|fail|signal|wait: the initial state of a process, and ways to end."""

from __future__ import annotations

import json
import os
import signal
import sys
import time


def state() -> dict[str, object]:
    """Return everything that a process inherits from its parent."""
    files = {}
    for name in os.listdir("/proc/self/fd"):
        path = f"/proc/self/fd/{name}"
        if os.path.exists(path) and os.get_inheritable(int(name)):
            files[name] = os.readlink(path)
    return {
        "argv": sys.argv,
        "orig_argv": sys.orig_argv,
        "path": sys.path,
        "executable": sys.executable,
        "name": __name__,
        "file": __file__,
        "folder": os.getcwd(),
        "umask": os.umask(0o22),
        "environment": dict(os.environ),
        "files": files,
        "ignored": sorted(s for s in signal.valid_signals() if signal.getsignal(s) == signal.SIG_IGN),
        "handled": sorted(s for s in signal.valid_signals() if callable(signal.getsignal(s))),
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        "leader": os.getpgrp() == os.getpid(),
    }


def main() -> None:
    how = sys.argv[1]
    if how == "state":
        print(json.dumps(state()))
    if how == "exit":
        sys.exit("it ends")
    if how == "fail":
        raise ValueError("it fails")
    if how == "signal":
        os.kill(os.getpid(), signal.SIGUSR2)
    if how == "wait":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
        print(os.getpid(), flush=True)
        time.sleep(600)


if __name__ == "__main__":
    main()
