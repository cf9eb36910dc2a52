"""Let a fork server run the command of this interpreter (`tests/helpers/fork_server.py`), if a test enables it.

Python imports a `sitecustomize` on its path before it looks at its command line. If `FORK_SERVER` is set, this one
sends the command line, the environment, the working folder and all open files to the server. The server forks a child
that has already imported the libraries. This process then forwards signals to the child, and exits like it. If it
is killed, the server kills the child. If the server does not serve the command, this process runs it as usual.
"""

import os
import sys

FORK_SERVER = "PRUNE_DISTILL_TEST_FORK_SERVER"  # the folder of the server's sockets
RANK_FUNCTION = "PRUNE_DISTILL_TEST_RANK"  # set for the processes of `tests/helpers/ranks.py`

COMMANDS, TORCHRUN, TRANSFORMERS, NEMO = "commands", "torchrun", "transformers", "nemo"
# Interpreter options that the server has, or gives to a child.
OPTIONS = (["-u"], ["-B"], ["-Wignore"], ["-W", "ignore"])
# Libraries that a command needs, by the module of `python -m`.
OF_MODULES = {
    "launch.run": COMMANDS,
    "launch.torchrun": TORCHRUN,
    "torch.distributed.run": TORCHRUN,
    "recipes.prepare_data": COMMANDS,
    "recipes.report": COMMANDS,
    "recipes.benchmark": TRANSFORMERS,
    "recipes.recovery": TRANSFORMERS,
    "convert.hf_to_nemo": COMMANDS,
    "convert.nemo_to_hf": COMMANDS,
    "tests.helpers.harness_directly": TRANSFORMERS,
    "tests.helpers.bf16_logits": NEMO,
    "tests.helpers.nemo_importer": NEMO,
    "tests.helpers.parity": NEMO,
    "tests.helpers.prune_all": NEMO,
    "tests.helpers.prune_directly": NEMO,
    "tests.helpers.candidate_losses": NEMO,
    "tests.helpers.killed_training": NEMO,
    "tests.helpers.masked_trainings": NEMO,
    "tests.helpers.fork_probe": NEMO,
    "tests.helpers.memory_probe": NEMO,
    "tests.helpers.mixture_gradients": NEMO,
    "tests.helpers.sequences": NEMO,
    "tests.helpers.spoiled_training": NEMO,
}
# Stages of `recipes`, without their variants. Others need NeMo.
OF_STAGES = {
    "prepare_data": COMMANDS,
    "hf_to_nemo": COMMANDS,
    "nemo_to_hf": COMMANDS,
    "report": COMMANDS,
    "evaluate": TRANSFORMERS,
    "benchmark": TRANSFORMERS,
    "generate": TRANSFORMERS,
}


def without_options(words: list[str]) -> list[str]:
    """Return a Python command line without interpreter options."""
    words = list(words)
    while words[:1] in OPTIONS or words[:2] in OPTIONS:
        del words[: 1 if words[:1] in OPTIONS else 2]
    return words


def libraries_of(words: list[str]) -> str | None:
    """Return the libraries that a Python command line needs; None if a server does not run it.

    Args:
        words: arguments of the interpreter.
    """
    words = without_options(words)
    if words[:1] == ["-c"] and words[-1] == "--multiprocessing-fork":
        # A test's rank, or what a stage spawns: the manager of Megatron's checkpoint writers, which needs torch.
        return NEMO if RANK_FUNCTION in os.environ else TORCHRUN
    if words[:1] != ["-m"] or len(words) < 3:
        return None
    if words[1] == "recipes":
        return OF_STAGES.get(words[2].partition(".")[0], NEMO)
    if words[1] == "convert.verify":
        return COMMANDS if "--no-logits" in words else NEMO
    return OF_MODULES.get(words[1])


def run_by_server(address: str) -> None:
    """Exit like the child; return if the server does not run the command."""
    import marshal
    import signal
    import socket

    files = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.get_inheritable(int(name)):
                files.append(int(name))
        except OSError:  # the listing's own
            continue
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(address)
    except OSError:
        connection.close()
        return
    forwarded = [
        signum
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT)
        if signal.getsignal(signum) != signal.SIG_IGN
    ]
    own = {signum: signal.getsignal(signum) for signum in forwarded}
    request = {
        "pid": os.getpid(),
        "executable": sys.executable,
        "words": sys.orig_argv,
        "path": sys.path,
        "environment": dict(os.environb),
        "folder": os.getcwd(),
        "umask": (mask := os.umask(0o22)),
        "files": files,
        "ignored": [int(signum) for signum in signal.valid_signals() if signal.getsignal(signum) == signal.SIG_IGN],
        "blocked": [int(signum) for signum in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
    }
    os.umask(mask)
    for signum in forwarded:
        signal.signal(signum, lambda number, _: connection.sendall(bytes([number])))
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _end_with_parent()  # as a rank does itself (prune_distill/pipeline/processes.py:exit_with_torchrun)
    content = marshal.dumps(request)
    try:
        socket.send_fds(connection, [len(content).to_bytes(4, "little")], files)
        connection.sendall(content)
        runs = connection.recv(1) == b"\1"
    except OSError:
        runs = False
    if not runs:
        connection.close()
        for signum, handler in own.items():
            signal.signal(signum, handler)
        return
    message = connection.recv(4, socket.MSG_WAITALL)
    # No answer: the server's process was killed.
    status = os.waitstatus_to_exitcode(int.from_bytes(message, "little")) if len(message) == 4 else -signal.SIGKILL
    if status >= 0:
        os._exit(status)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [-status])
    if -status in own:
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)


def _end_with_parent() -> None:
    import ctypes
    import signal

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


# Elsewhere this module is imported for its names, by that of its package.
if (
    __name__ == "sitecustomize"
    and FORK_SERVER in os.environ
    and (_libraries := libraries_of(sys.orig_argv[1:])) is not None
):
    run_by_server(os.path.join(os.environ[FORK_SERVER], _libraries))
