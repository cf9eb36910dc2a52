"""A real Slurm cluster on this machine's loopback: Debian's packages, started as root, without systemd.

Two nodes, both this machine, of 16 pretended CPUs and 8 pretended GPUs each. They are named by addresses, as torchrun
looks node names up. Partitions: `main`, and `urgent`, whose jobs preempt those of `main`.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.helpers.launches import wait_for_exit

DAEMONS = ("munged", "slurmctld", "slurmd")
NODES = ("127.0.0.1", "127.0.0.2")
GRACE_SECONDS = 30
# Below the ephemeral ports (ip_local_port_range of Linux: from 32768).
PORTS = (20_000, 32_000)
CONFIG = """
ClusterName=loop
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire: how long a requeued job has to wait; 120 s by default, 5 at least.
AuthInfo=socket={root}/munge.sock,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=5
MinJobAge=600
UnkillableStepTimeout=30
GresTypes=gpu
SlurmdParameters=config_overrides
NodeName=127.0.0.1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=16 RealMemory=4000 Gres=gpu:8
NodeName=127.0.0.2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=16 RealMemory=4000 Gres=gpu:8
PartitionName=main Nodes=ALL Default=YES MaxTime=04:00:00 State=UP PriorityTier=1 GraceTime={grace}
PartitionName=urgent Nodes=ALL MaxTime=04:00:00 State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str | None:
    """Return what is missing on this machine for a cluster; None if nothing is."""
    absent = [name for name in (*DAEMONS, "sbatch", "srun") if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)} not found (apt-get install slurm-wlm munge)"
    return None if os.geteuid() == 0 else "needs root, to start Slurm's daemons"


@contextmanager
def cluster(root: Path) -> Iterator[Path]:
    """Run a cluster in its own folder with a short path during the block; yield its slurm.conf.

    Raises:
        RuntimeError: it did not come up; the message holds the ends of its logs.
    """
    host = socket.gethostname().partition(".")[0]
    for name in ("state", *(f"spool/{node}" for node in NODES), "dev"):
        (root / name).mkdir(parents=True)
    for number in range(8):
        (root / "dev" / f"fake{number}").touch()
    (root / "munge.key").write_bytes(secrets.token_bytes(128))
    (root / "munge.key").chmod(0o600)
    (root / "gres.conf").write_text(f"Name=gpu File={root}/dev/fake[0-7]\n")
    config = root / "slurm.conf"
    config.write_text(CONFIG.format(root=root, host=host, ports=_free_ports(3), grace=GRACE_SECONDS))
    env = {**os.environ, "SLURM_CONF": str(config)}
    nodes = [["slurmd", "-N", node] for node in NODES]
    munge = [f"--{name}={root}/{file}" for name, file in MUNGE_FILES.items()]
    try:
        for command in (["munged", "--force", *munge], ["slurmctld", "-c"], *nodes):
            started = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30)
            if started.returncode:
                raise RuntimeError(f"{' '.join(command)}: {started.stderr}{_logs(root)}")
        _wait(lambda: _idle_nodes(env) == 2, 30, lambda: _logs(root))
        yield config
    finally:
        # End jobs first, otherwise their processes would outlive the daemons.
        with contextlib.suppress(subprocess.SubprocessError, RuntimeError):
            subprocess.run(["scancel", "--me", "--signal=KILL", "--full"], env=env, capture_output=True, timeout=20)
            subprocess.run(["scancel", "--me"], env=env, capture_output=True, timeout=20)
            _wait(lambda: _idle_nodes(env) == 2, 20, lambda: "jobs are left")
        for name in (*(f"slurmd-{node}" for node in NODES), "slurmctld", "munged"):
            _end(root / f"{name}.pid")


MUNGE_FILES = {
    "key-file": "munge.key",
    "socket": "munge.sock",
    "pid-file": "munged.pid",
    "log-file": "munged.log",
    "seed-file": "munged.seed",
}


def _idle_nodes(env: dict[str, str]) -> int:
    describe = subprocess.run(["sinfo", "-h", "-N", "-p", "main", "-o", "%T"], env=env, capture_output=True, text=True)
    return describe.stdout.split().count("idle")


def _end(pid_file: Path) -> None:
    """End the daemon of a pid file."""
    try:
        pid = int(pid_file.read_text())
    except (FileNotFoundError, ValueError):
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    if not wait_for_exit(pid, seconds=10):
        os.kill(pid, signal.SIGKILL)


def _wait(holds: Callable[[], bool], seconds: float, describe: Callable[[], str]) -> None:
    until = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > until:
            raise RuntimeError(describe())
        time.sleep(0.1)


def _logs(root: Path) -> str:
    wait_for_exit = [f"{path.name}:\n{path.read_text()[-1500:]}" for path in sorted(root.glob("*.log"))]
    return "the cluster did not come up\n" + "\n".join(wait_for_exit)


def _free_ports(count: int) -> list[int]:
    """Find free ports below the ephemeral ones, which any process may get before the daemons listen."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.SystemRandom().randrange(*PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            ports += [port] if port not in ports else []
    return ports
