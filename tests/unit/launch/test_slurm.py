"""Job scripts, and faults before submission. Tests with a real Slurm are in tests/slurm."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path

import pytest

from launch.filesystem import local_type
from launch.jobs import make_paths_absolute
from launch.planning.automatic import compose
from launch.run import main
from prune_distill.pipeline.artifact import locate, write_manifest
from prune_distill.pipeline.stages import STAGES
from tests.helpers.fake_stage import DISTRIBUTED, TABLE

SITE = (
    *("cluster=slurm", "cluster.devices_per_node=1", "cluster.run_dir_is_shared=true", "cluster.slurm.partition=gpu"),
    *("cluster.slurm.account=lab", "cluster.slurm.container_image='nvcr.io#lab/prune:1'"),
    *("cluster.slurm.cpus_per_gpu=12", "cluster.slurm.mem=0"),
)


class DryRun:
    """Runs `launch.run dry_run=true` over the fake table."""

    def __init__(self, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.run_dir = run_dir
        self._capsys = capsys

    def __call__(self, *overrides: str, stages: tuple = TABLE, dry: str = "dry_run=true") -> tuple[int, str, str]:  # type: ignore[type-arg]
        status = main(["experiment=demo", f'run_dir="{self.run_dir}"', *SITE, *overrides, dry], stages)
        return (status, *self._capsys.readouterr())

    def scripts(self, *overrides: str, stages: tuple = TABLE) -> dict[str, str]:  # type: ignore[type-arg]
        """Return the script of each stage."""
        status, out, err = self(*overrides, stages=stages)
        assert (status, err) == (0, "")
        return {text.split("# Stage ")[1].partition(".")[0]: text for text in out.split("#!/bin/bash -l\n")[1:]}


@pytest.fixture
def dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> DryRun:
    return DryRun(tmp_path / "run", capsys)


@pytest.mark.parametrize("way", ["dry_run=true", "--dry-run"])
def test_a_dry_run_shows_every_script_and_writes_nothing(dry_run: DryRun, way: str) -> None:
    status, out, err = dry_run(dry=way)
    assert (status, err) == (0, "")
    commands = [line for line in out.splitlines() if line.startswith("# sbatch")]
    folder = dry_run.run_dir / "slurm"
    assert commands == [
        f"# sbatch --parsable {folder}/01-first.sbatch",
        f"# sbatch --parsable '--dependency=afterok:<first>' {folder}/02-second.sbatch",
        f"# sbatch --parsable '--dependency=afterok:<first>' {folder}/03-aside.sbatch",
        f"# sbatch --parsable '--dependency=afterok:<aside>:<first>:<second>' {folder}/04-report.sbatch",
    ]
    assert not dry_run.run_dir.exists()


def test_all_later_stages_wait_for_a_gate(dry_run: DryRun) -> None:
    """Also stages that do not read it, but none before it."""
    first, second, aside, report = TABLE
    gated = (first, second, dataclasses.replace(aside, gate=True), dataclasses.replace(report, inputs=second.inputs))
    out = dry_run(stages=gated)[1]
    commands = [line.rpartition("/")[2] + " " + line.split("'")[1] for line in out.splitlines() if "afterok" in line]
    assert commands == [
        "02-second.sbatch --dependency=afterok:<first>",
        "03-aside.sbatch --dependency=afterok:<first>",
        "04-report.sbatch --dependency=afterok:<aside>:<first>",
    ]


def test_the_lines_of_a_script(dry_run: DryRun) -> None:
    script = dry_run.scripts(
        *("cluster.slurm.qos=high", "cluster.time_limit=1-00:00:00", "cluster.slurm.warn_seconds=300"),
        *("cluster.slurm.sbatch=['--exclusive']", "cluster.slurm.setup=['module load cuda']"),
    )["second"]
    for line in (
        *("#SBATCH --job-name=demo/second", "#SBATCH --nodes=1 --ntasks-per-node=1", "#SBATCH --time=1-00:00:00"),
        *("#SBATCH --partition=gpu", "#SBATCH --account=lab", "#SBATCH --qos=high", "#SBATCH --gpus-per-node=1"),
        *("#SBATCH --signal=B:USR1@300", "#SBATCH --requeue --kill-on-invalid-dep=yes", "#SBATCH --exclusive"),
        *("#SBATCH --cpus-per-task=12", "#SBATCH --mem=0", "module load cuda"),
    ):
        assert line in script.splitlines()
    assert "torch.distributed.run" not in script
    (export,) = [line for line in script.splitlines() if line.startswith("#SBATCH --export=")]
    assert export.removeprefix("#SBATCH --export=").split(",") == [
        *("HOME", "USER", "PATH", "LANG", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_DATASETS_CACHE"),
        *("HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"),
    ]


def test_jobs_request_cores_and_a_gpu_type(dry_run: DryRun) -> None:
    layout = ("cluster.devices_per_node=4", "distill.global_batch_size=16", "cluster.slurm.gpu_type=h100")
    scripts = dry_run.scripts(*layout, stages=DISTRIBUTED)
    assert "#SBATCH --gpus-per-node=h100:4\n#SBATCH --cpus-per-task=48\n" in scripts["ranks"]
    by_gres = dry_run.scripts(*layout, "cluster.slurm.gpu_request=gres", stages=DISTRIBUTED)
    assert "#SBATCH --gres=gpu:h100:4\n" in by_gres["ranks"]
    # A stage of one rank takes one GPU and its cores; data preparation has the cores of a whole node.
    real = dry_run.scripts(*layout, stages=STAGES)
    assert "#SBATCH --gpus-per-node=h100:1\n#SBATCH --cpus-per-task=12\n" in real["prune"]
    assert "#SBATCH --cpus-per-task=48\n" in real["prepare_data"]
    assert (
        "#SBATCH --cpus-per-task=6\n" in dry_run.scripts(*layout, "data.num_workers=6", stages=STAGES)["prepare_data"]
    )


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        ((), []),
        (("cluster.slurm.cpus_per_gpu=null",), ["cluster.slurm.cpus_per_gpu"]),
        (
            ("cluster.slurm.cpus_per_gpu=null", "cluster.slurm.mem=null"),
            ["cluster.slurm.cpus_per_gpu", "cluster.slurm.mem"],
        ),
        (
            (
                "cluster.slurm.cpus_per_gpu=null",
                "cluster.slurm.mem=null",
                "cluster.slurm.sbatch=['--cpus-per-task=8','--mem=0']",
            ),
            [],
        ),
        (("cluster.slurm.cpus_per_gpu=null", "cluster.slurm.sbatch=[--exclusive]"), []),
    ],
)
def test_missing_resource_requests_cause_a_warning(
    dry_run: DryRun, overrides: tuple[str, ...], keys: list[str]
) -> None:
    status, _, err = dry_run(*overrides)
    assert status == 0
    assert [line.removeprefix("warning: ").partition("=")[0] for line in err.splitlines()] == keys


def test_stages_with_several_ranks_run_torchrun_on_every_node(dry_run: DryRun) -> None:
    layout = ("cluster.nodes=2", "cluster.devices_per_node=8", "cluster.slurm.gpu_request=gres")
    batches = ("distill.global_batch_size=64", "distill.parallel.tensor_model_parallel_size=2")
    script = dry_run.scripts(*layout, *batches, stages=DISTRIBUTED)["ranks"]
    assert "#SBATCH --nodes=2 --ntasks-per-node=1\n" in script
    assert "#SBATCH --gres=gpu:8\n" in script
    assert "  launch.torchrun --numa-binding=node --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d" in script
    unbound = dry_run.scripts(*layout, *batches, "cluster.numa_binding=null", stages=DISTRIBUTED)["ranks"]
    assert "  torch.distributed.run --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d" in unbound
    assert '--rdzv_id="$SLURM_JOB_ID.$restarts" --rdzv_endpoint="$head:$(( 10000 + SLURM_JOB_ID % 20000 ))"' in script
    assert 'export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"' in script
    assert "export OMP_NUM_THREADS=$(( (SLURM_CPUS_ON_NODE + 7) / 8 ))" in script


def test_scripts_are_valid_bash_for_any_name(dry_run: DryRun, tmp_path: Path) -> None:
    dry_run.run_dir = tmp_path / "it's $HOME `date` 100%"
    scripts = dry_run.scripts("name='a \\'b'", "cluster.slurm.requeue=false")
    assert len(scripts) == 4
    for script in scripts.values():
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    values = subprocess.run(
        ["bash"],
        input='eval "$(grep -E "^folder=" <<< "$script")"; printf %s "$folder"',
        env={"script": scripts["report"], "PATH": "/usr/bin:/bin"},
        text=True,
        check=True,
        capture_output=True,
    ).stdout
    assert values == str(dry_run.run_dir / "report")
    assert "100%%/report/log.txt" in scripts["report"]


def test_complete_stages_have_no_script(dry_run: DryRun) -> None:
    cfg = make_paths_absolute(compose(["experiment=demo", f"run_dir={dry_run.run_dir}", *SITE]))
    located = locate(cfg, TABLE)
    write_manifest(located["first"], 0.0, 1.0, {})
    assert set(dry_run.scripts()) == {"second", "aside", "report"}
    assert "# sbatch --parsable '--dependency=afterok:<aside>:<second>'" in dry_run()[1]
    for stage in located.values():
        write_manifest(stage, 0.0, 1.0, {})
    assert dry_run()[1] == "every stage is complete; nothing would be submitted\n"


def test_without_requeue_a_training_is_a_chain(dry_run: DryRun) -> None:
    _, out, _ = dry_run("cluster.slurm.requeue=false", "cluster.slurm.max_restarts=2")
    script = dry_run.run_dir / "slurm" / "02-second.sbatch"
    assert [line for line in out.splitlines() if line.startswith("# sbatch") and "02-second" in line] == [
        f"# sbatch --parsable '--dependency=afterok:<first>' {script} 1 3",
        f"# sbatch --parsable '--dependency=afterok:<first>,afterany:<second 1>' {script} 2 3",
        f"# sbatch --parsable '--dependency=afterok:<first>,afterany:<second 1>:<second 2>' {script} 3 3",
    ]
    assert "#SBATCH --no-requeue" in out
    assert "scontrol requeue" not in out
    # Stages without training are ordinary jobs.
    assert out.count("end_chain()") == 1


def test_the_container_image_determines_the_folders(dry_run: DryRun, monkeypatch: pytest.MonkeyPatch) -> None:
    before = dry_run.scripts()["first"]
    monkeypatch.setattr("prune_distill.pipeline.identity.library_versions", lambda: {"torch": "0.0"})
    assert dry_run.scripts()["first"] == before
    image = "cluster.slurm.container_image='nvcr.io#lab/prune:2'"
    assert f"{dry_run.run_dir}/first-" in before
    folder = next(line for line in before.splitlines() if line.startswith("folder="))
    assert folder not in dry_run.scripts(image)["first"]
    monkeypatch.undo()
    own = dry_run.scripts("cluster.slurm.container_image=null")["first"]
    monkeypatch.setattr("prune_distill.pipeline.identity.library_versions", lambda: {"torch": "0.0"})
    assert dry_run.scripts("cluster.slurm.container_image=null")["first"] != own


def test_relative_paths_refer_to_the_submission_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs.jsonl").write_text("")
    own = ("cluster.devices_per_node=8", "run_dir=runs/x", "data.train=[docs.jsonl]")
    cfg = compose(["experiment=qwen3_8b_to_6b_depth", *SITE, *own])
    placed = make_paths_absolute(cfg)
    assert placed.run_dir == f"{tmp_path}/runs/x"
    assert placed.data.train == [f"{tmp_path}/docs.jsonl"]
    assert placed.model.hf_path == "Qwen/Qwen3-8B"
    assert cfg.run_dir == "runs/x"


def test_missing_slurm_and_a_local_disk_are_one_message(dry_run: DryRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("launch.filesystem.local_type", lambda path: "ext4")
    status, out, err = dry_run("cluster.run_dir_is_shared=false", dry="experiment=demo")
    assert (status, out) == (2, "")
    assert "2 faults in the configuration" in err
    assert "sbatch, srun, squeue, scontrol, scancel not found; run this on a login node, or add" in err
    assert f"run_dir={dry_run.run_dir}: ext4 appears to be a local disk of this machine" in err
    assert "cluster.run_dir_is_shared=true" in err
    assert not dry_run.run_dir.exists()
    # A dry run works on any machine.
    status, out, err = dry_run("cluster.run_dir_is_shared=false")
    assert (status, out.count("#!/bin/bash -l")) == (0, 4)
    assert err.startswith("warning: run_dir=")


def test_file_systems(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "overlay / overlay rw 0 0\n"
        "/dev/sda1 /home ext4 rw 0 0\n"
        "server:/x /home/shared nfs4 rw 0 0\n"
        "10.0.0.1@o2ib:/fs /scratch lustre rw 0 0\n"
        "gpfs0 /gpfs gpfs rw 0 0\n"
        "tmpfs /with\\040space tmpfs rw 0 0\n"
        "auto /auto autofs rw 0 0\n"
        "server:/y /auto/y nfs rw 0 0\n"
        "x /odd somethingfs rw 0 0\n"
    )
    kinds = {
        "/home/me/run": "ext4",
        "/homes/run": "overlay",
        "/home/shared/run": None,
        "/scratch/run": None,
        "/gpfs/a/b": None,
        "/with space/run": "tmpfs",
        "/auto/y/run": None,
        "/odd/run": None,
    }
    assert {path: local_type(Path(path), mounts) for path in kinds} == kinds
    assert local_type(Path("/home/me"), tmp_path / "none") is None
