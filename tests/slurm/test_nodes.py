"""Resources of a job, and the rendezvous of its ranks: two nodes, GPUs, containers."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from pathlib import Path

from launch.queue import query_jobs
from tests.slurm.conftest import Chain, slurm

RANKS = (
    *("cluster.nodes=2", "cluster.devices_per_node=2", "distill.global_batch_size=16", "distill.micro_batch_size=1"),
    "model.demo.training.global_batch_size=16",
)


def test_ranks_on_two_nodes_join(chain: Chain) -> None:
    chain.submit({"ranks": "join"}, *RANKS, "cluster.slurm.gpu_request=gpus_per_node", mode="launch_ranks")
    (job,) = chain.jobs("ranks")
    chain.wait_until_ended()
    joined = [json.loads(path.read_text()) for path in sorted(chain.folder("ranks").glob("joined-*.json"))]
    assert [rank["world"] for rank in joined] == [4] * 4, chain.report()
    assert {rank["total"] for rank in joined} == {0 + 1 + 2 + 3}
    assert sorted(rank["node"] for rank in joined) == ["127.0.0.1"] * 2 + ["127.0.0.2"] * 2
    assert chain.complete() == {"ranks"}
    assert "TresPerNode=gres:gpu:2" in slurm("scontrol", "show", "job", "-o", job)


def test_a_rank_that_dies_ends_the_job_on_both_nodes(chain: Chain) -> None:
    chain.submit({"ranks": "die_on_rank_1"}, *RANKS, "cluster.slurm.gpu_request=gres", mode="launch_ranks")
    chain.wait_until_ended()
    stage = chain.status("status_ranks")["ranks"]
    assert stage["state"] == "failed"
    assert "killed by SIGKILL" in stage["cause"]
    (job,) = chain.jobs("ranks")
    assert "TresPerNode=gres:gpu:2" in slurm("scontrol", "show", "job", "-o", job)


def test_a_chain_resumes_after_a_node_failure(chain: Chain) -> None:
    more = ("cluster.slurm.requeue=false", "cluster.slurm.max_restarts=2")
    chain.submit({"ranks": "lead 300"}, *RANKS, *more, mode="launch_ranks")
    jobs = chain.jobs("ranks")
    chain.wait(lambda: list(chain.run_dir.glob("ranks-*/checkpoints/step=10")))
    # It returns to service when its slurmd responds (ReturnToService=2).
    slurm("scontrol", "update", "NodeName=127.0.0.2", "State=DOWN", "Reason=test")
    chain.wait_until_ended()
    assert chain.complete() == {"ranks"}, chain.report()
    assert [query_jobs(jobs)[job].state for job in jobs] == ["NODE_FAIL", "COMPLETED", "COMPLETED"]
    assert "job " + jobs[1] in chain.log("ranks")


# Knows pyxis' options and no others of that kind, and keeps what it is given; the rest goes to the real one.
SRUN = """#!{python}
import json, os, re, sys
options = ("container-image", "container-mounts", "container-workdir")
taken, rest = {{}}, []
for argument in sys.argv[1:]:
    found = re.fullmatch(r"--(container[a-z-]*)(?:=(.*))?", argument, re.DOTALL)
    if not found or any(not known.startswith("-") for known in rest):
        rest.append(argument)
    elif found[1] in options and found[2] and found[1] not in taken:
        taken[found[1]] = found[2]
    else:
        sys.exit(f"srun: unrecognized option {{argument!r}}")
for mount in taken["container-mounts"].split(","):
    source, target, *flags = mount.split(":")
    assert os.path.isdir(source) and os.path.isabs(target) and flags in ([], ["ro"]), mount
json.dump([taken, rest], open({file!r}, "w"))
os.chdir({root!r})
os.environ["PYTHONPATH"] = {root!r}
os.execv({srun!r}, ["srun", *rest])
"""


def test_pyxis_gets_image_mounts_and_folder(chain: Chain, tmp_path: Path) -> None:
    chain.run_dir = tmp_path / "it's a run"
    stand_ins, seen = tmp_path / "bin", tmp_path / "seen.json"
    stand_ins.mkdir()
    root, srun = str(Path(__file__).resolve().parents[2]), shutil.which("srun")
    (stand_ins / "srun").write_text(SRUN.format(python=sys.executable, file=str(seen), root=root, srun=srun))
    (stand_ins / "python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    for path in stand_ins.iterdir():
        path.chmod(0o755)
    chain.submit(
        {},
        *("--until", "first"),
        "cluster.slurm.container_image='nvcr.io#lab/it is:25.11'",
        f"cluster.slurm.container_mounts=['{tmp_path}:/data:ro','/tmp:/scratch']",
        f"cluster.slurm.setup=['export PATH={stand_ins}:$PATH']",
    )
    chain.wait_until_ended()
    assert chain.complete() == {"first"}, chain.report()
    taken, rest = json.loads(seen.read_text())
    assert taken == {
        "container-image": "nvcr.io#lab/it is:25.11",
        "container-mounts": f"{chain.run_dir}:{chain.run_dir},{tmp_path}:/data:ro,/tmp:/scratch",
        "container-workdir": "/opt/nemo-prune-distill",
    }
    # The Python of the image.
    assert rest[rest.index("launch.guard") - 2] == "python"
    assert str(sys.executable) not in rest
