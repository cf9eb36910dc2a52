"""Findings of the doctor, on machines that are simulated by commands on the PATH."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch import checks, doctor
from launch.checks import Finding, State
from tests.helpers.numa import two_nodes

Fake = Callable[[str, str], None]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Return a function that adds a shell script to an otherwise empty PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def make(name: str, script: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)

    return make


def state_of(findings: list[Finding], name: str) -> State:
    (state,) = {finding.state for finding in findings if finding.name == name}
    return state


def test_this_machine_has_the_locked_libraries() -> None:
    findings = list(checks.libraries())
    assert {finding.name for finding in findings} == {*checks.RANGES, *checks.OTHERS}
    assert state_of(findings, "hydra-core") is State.ok


@pytest.mark.parametrize(
    ("versions", "name", "state"),
    [
        ({"megatron-core": "0.16.0"}, "megatron-core", State.fail),
        ({"nvidia-modelopt": "0.41.0"}, "nvidia-modelopt", State.fail),
        ({"nvidia-modelopt": "0.37.0"}, "nvidia-modelopt", State.fail),
        ({"nemo_toolkit": "2.6.0"}, "nemo_toolkit", State.warn),
        ({"nemo_toolkit": "2.5.0"}, "nemo_toolkit", State.fail),
        ({"torch": "2.9.0a0+50eac811a6.nv25.09"}, "torch", State.warn),
        ({"transformers": None}, "transformers", State.fail),
        ({"torch": None, "nemo_toolkit": None}, "libraries", State.warn),
    ],
)
def test_other_versions(
    versions: dict[str, str | None], name: str, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked = checks._locked()
    monkeypatch.setattr(checks, "installed_version", lambda name: versions.get(name, locked.get(checks._normal(name))))
    findings = list(checks.libraries())
    assert state_of(findings, name) is state
    assert all(finding.fix for finding in findings if finding.state is not State.ok)


# What the probe prints: devices are [name, bytes, compute capability].
H100 = ["H100", 80 * 2**30, 9]


def seen(**changes: Any) -> str:
    machine = {"built_for_cuda": "12.8", "devices": [H100, H100], "nccl": "2.27.3", "transformer_engine": True}
    return json.dumps({**machine, **changes})


@pytest.mark.parametrize(
    ("probe", "nvidia_smi", "expected"),
    [
        (seen(), "echo 'GPU0 X NV18'", {"GPUs": "ok", "NCCL": "ok", "GPU links": "ok"}),
        (seen(), "echo 'GPU0 X PHB'", {"GPUs": "ok", "NCCL": "ok", "GPU links": "warn"}),
        (seen(nccl=None), "exit 1", {"GPUs": "ok", "NCCL": "fail"}),
        (seen(transformer_engine=False), "exit 1", {"GPUs": "ok", "NCCL": "ok", "Transformer Engine": "fail"}),
        (seen(devices=[["V100", 2**34, 7]]), "exit 1", {"GPUs": "ok", "bf16": "fail"}),
        (seen(devices=[], transformer_engine=False), "exit 1", {"GPUs": "ok"}),
        (seen(devices=[], transformer_engine=True), "exit 1", {"GPUs": "ok", "Transformer Engine": "fail"}),
        (seen(devices=[], transformer_engine=False), "echo 'GPU 0: H100'", {"GPUs": "fail"}),
        ("Segmentation fault", "exit 1", {"PyTorch": "fail"}),
    ],
)
def test_gpus(
    probe: str, nvidia_smi: str, expected: dict[str, str], fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake("python", f"echo '{probe}'")
    fake("nvidia-smi", nvidia_smi)
    monkeypatch.setattr("sys.executable", str(tmp_path / "bin" / "python"))
    findings = list(checks.accelerator(None))
    assert {finding.name: finding.state.value for finding in findings} == expected


def test_fewer_gpus_than_the_run_needs(
    demo: Callable[..., Any], fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake("python", f"echo '{seen()}'")
    monkeypatch.setattr("sys.executable", str(tmp_path / "bin" / "python"))
    cfg = demo("cluster.devices_per_node=4", "distill.global_batch_size=16")
    (fault,) = [finding for finding in checks.accelerator(cfg) if finding.state is State.fail]
    assert "2 GPUs, but cluster.devices_per_node=4" in fault.found
    assert fault.fix == "set cluster.devices_per_node=2"


def test_a_run_for_gpus_where_there_are_none(
    demo: Callable[..., Any], fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake("python", f"echo '{seen(devices=[], transformer_engine=False)}'")
    monkeypatch.setattr("sys.executable", str(tmp_path / "bin" / "python"))
    cfg = demo("cluster=one_gpu_24gb")
    (finding,) = checks.accelerator(cfg)
    assert finding.state is State.warn
    assert "RTX 4090" in finding.found


def test_the_probe_runs_here() -> None:
    assert state_of(list(checks.accelerator(None)), "GPUs") is State.ok


@pytest.mark.parametrize(
    ("overrides", "numactl", "state", "part"),
    [
        ([], "exit 0", "warn", "2 nodes, but ranks are not bound to one"),
        (["cluster.numa_binding=core_complex"], "exit 0", "ok", "are bound (cluster.numa_binding=core-complex)"),
        (
            ["cluster.numa_binding=node"],
            "echo denied >&2; exit 1",
            "warn",
            "numactl does not work on this machine (denied)",
        ),
        (None, "exit 0", "ok", "2 nodes; ranks can be bound"),
    ],
)
def test_numa_nodes(
    overrides: list[str] | None,
    numactl: str,
    state: str,
    part: str,
    demo: Callable[..., Any],
    fake: Fake,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake("numactl", numactl)
    two_nodes(tmp_path, monkeypatch)
    (finding,) = checks.numa(None if overrides is None else demo(*overrides), tmp_path)
    assert (finding.state.value, part in finding.found) == (state, True), finding
    (tmp_path / "sys/devices/system/node/node1/cpulist").write_text("\n")
    (finding,) = checks.numa(None, tmp_path)
    assert finding == Finding("NUMA", State.ok, "1 node; nothing to bind: all available cores belong to one NUMA node")


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {checks.resource.RLIMIT_NOFILE: (1024, 4096), checks.resource.RLIMIT_MEMLOCK: (65536, 65536)}
    monkeypatch.setattr(checks.resource, "getrlimit", few.get)
    assert [finding.name for finding in checks.limits(tmp_path / "absent")] == ["open files"]
    (tmp_path / "mlx5_0").mkdir()
    assert [finding.state for finding in checks.limits(tmp_path)] == [State.warn, State.warn]


def test_little_shared_memory_matters_with_several_ranks(
    demo: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=64 << 20)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    two = demo("cluster.devices_per_node=2", "distill.global_batch_size=8")
    assert [finding.state for finding in checks.shared_memory(two, tmp_path)] == [State.fail]
    assert [finding.state for finding in checks.shared_memory(None, tmp_path)] == [State.warn]


def test_the_hubs_token_is_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    findings = list(checks.hub())
    assert state_of(findings, "Hub token") is State.ok
    assert "hf_secret" not in doctor.format_json(findings) + doctor.format_table(findings)


SLURM_COMMANDS = ("sbatch", "squeue", "scancel")


@pytest.mark.parametrize(
    ("ping", "srun", "expected"),
    [
        ("Slurmctld(primary) at head is UP", "--container-image=IMAGE", {"Slurm": "ok", "pyxis": "ok"}),
        ("Slurmctld(primary) at head is UP", "--nodes=N", {"Slurm": "ok", "pyxis": "warn"}),
        ("Slurmctld(primary) at head is DOWN", "", {"Slurm": "warn"}),
    ],
)
def test_slurm(ping: str, srun: str, expected: dict[str, str], fake: Fake) -> None:
    for name in SLURM_COMMANDS:
        fake(name, "exit 1")
    fake("scontrol", f"echo '{ping}'")
    fake("srun", f"echo '{srun}'")
    assert {finding.name: finding.state.value for finding in checks.slurm(None)} == expected


def test_slurm_does_not_matter_to_a_run_without_it(demo: Callable[..., Any], fake: Fake) -> None:
    for name in (*SLURM_COMMANDS, "scontrol", "srun"):
        fake(name, "exit 1")
    assert list(checks.slurm(demo())) == []


def test_missing_slurm_only_fails_runs_that_need_it(demo: Callable[..., Any], fake: Fake) -> None:
    assert [finding.state for finding in checks.slurm(None)] == [State.ok]
    asked = "{partition:null,account:null,container_image:null}"
    cfg = demo(f"cluster.slurm={asked}", "cluster.time_limit='4:00:00'")
    (missing,) = checks.slurm(cfg)
    assert missing.state is State.fail
    assert missing.found.startswith("sbatch, srun")


def test_a_full_disk_fails_the_check(demo: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.planning.disk.free_bytes", lambda path: 1 << 20)
    cfg = demo(f"run_dir={tmp_path}")
    (finding,) = [finding for finding in doctor.check_run(cfg) if finding.name == "disk"]
    assert finding.state is State.fail
    assert f"{finding.found}; {finding.fix}" in doctor.make_plan(cfg).warnings
    assert finding.found.startswith(f"{tmp_path} has 0.0 GiB free, and the run still writes about")


def test_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert doctor.main(["experiment=demo", f"run_dir={tmp_path}", "--json"]) in (0, 1)
    findings = json.loads(capsys.readouterr().out)
    assert {"name", "state", "found", "fix"} == set(findings[0])
    assert [finding["state"] for finding in findings if finding["name"] == "disk"] == ["ok"]
    assert not os.listdir(tmp_path)

    assert doctor.main(["experiment=demo", "distill.lrr=1", "prune.num_layers=9"]) == 1
    out = capsys.readouterr().out
    assert "fail  config" in out
    assert "distill.lrr: not a known key" in out
    assert "2 fail" in out
