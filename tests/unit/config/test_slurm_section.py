"""The section `cluster.slurm`, and its faults before submission."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from launch.planning.automatic import compose
from prune_distill.config.input_files import HUB_FOLDERS
from prune_distill.config.load import load_resolved, save_resolved
from prune_distill.schema import RunConfig
from tests.helpers.faults import check_fault, find_faults
from tests.helpers.hf_folders import hub_snapshot

SITE = ["partition=gpu", "account=lab", "container_image='nvcr.io#lab/prune:1'"]
BASE = ["experiment=demo", "cluster=slurm", "cluster.devices_per_node=1"]


def run(*settings: str, check_files: bool = False) -> RunConfig:
    return compose([*BASE, *(f"cluster.slurm.{setting}" for setting in (*SITE, *settings))], check_files)


def test_the_partition_and_account_must_be_set_or_null() -> None:
    found = find_faults(BASE)
    keys = [f"cluster.slurm.{key}" for key in ("partition", "account", "container_image")]
    assert [(fault.rule, fault.keys[0]) for fault in found] == [("value.missing", key) for key in keys]
    assert "set cluster.slurm.account to the account that pays, or null where the site has none" in str(found[1])
    nulls = [f"cluster.slurm.{key}=null" for key in ("partition", "account", "container_image")]
    slurm = compose([*BASE, *nulls]).cluster.slurm
    assert slurm is not None
    assert (slurm.partition, slurm.account, slurm.container_image) == (None, None, None)


def test_the_section_round_trips(tmp_path: Path) -> None:
    cfg = run("secrets=[HF_TOKEN]", "setup=['module load \"cuda 12\"']")
    save_resolved(cfg, tmp_path / "resolved.yaml")
    assert load_resolved(tmp_path / "resolved.yaml") == cfg


CASES = [
    ("slurm.partition='gpu short'", "slurm.names", "cluster.slurm.partition", "one word"),
    ('slurm.account="it\'s"', "slurm.names", "cluster.slurm.account", ""),
    ("slurm.qos='high\"'", "slurm.names", "cluster.slurm.qos", ""),
    (
        "slurm.secrets=['HF_TOKEN=hf_abc']",
        "value.credential",
        "cluster.slurm.secrets[0]",
        "its name in cluster.slurm.secrets",
    ),
    (
        "slurm.setup=['export WANDB_API_KEY=abcdef']",
        "value.credential",
        "cluster.slurm.setup[0]",
        "set the variable in",
    ),
    ("slurm.secrets=['HF TOKEN=x']", "slurm.secrets", "cluster.slurm.secrets", ""),
    ("slurm.gpu_type='h100 80'", "slurm.names", "cluster.slurm.gpu_type", ""),
    ("slurm.cpus_per_gpu=0", "value.bounds", "cluster.slurm.cpus_per_gpu", ""),
    ("slurm.mem='2 GB'", "slurm.mem", "cluster.slurm.mem", "200G"),
    ("slurm.sbatch=[exclusive]", "slurm.sbatch", "cluster.slurm.sbatch", "--exclusive"),
    ("slurm.warn_seconds=0", "value.bounds", "cluster.slurm.warn_seconds", ""),
    ("slurm.max_restarts=-1", "value.bounds", "cluster.slurm.max_restarts", ""),
    ("slurm.gpu_request=gpus", "value.choice", "cluster.slurm.gpu_request", "gpus_per_node or gres or none"),
    ("slurm.container_image=' '", "slurm.container_image", "cluster.slurm.container_image", ""),
    ("slurm.container_workdir=here", "slurm.container_workdir", "cluster.slurm.container_workdir", ""),
    ("slurm.container_mounts=['/data,/more:/x']", "slurm.mounts", "cluster.slurm.container_mounts", "SOURCE:TARGET"),
    ("slurm.container_mounts=['data:/data']", "slurm.mounts", "cluster.slurm.container_mounts", ""),
    ("time_limit=null", "slurm.time_limit", "cluster.time_limit", "cluster.time_limit='4:00:00'"),
    ("time_limit=4h", "cluster.time_limit", "cluster.time_limit", "set cluster.time_limit="),
    ("time_limit=14400", "cluster.time_limit", "cluster.time_limit", "cluster.time_limit='4:00:00'"),
    ("time_limit=0:11:00", "slurm.time_limit", "cluster.time_limit", ""),
]


@pytest.mark.parametrize(("override", "rule", "key", "fix"), CASES, ids=[case[0] for case in CASES])
def test_a_fault_names_the_key_and_the_fix(override: str, rule: str, key: str, fix: str) -> None:
    site = [f"cluster.slurm.{setting}" for setting in SITE]
    check_fault([*BASE, *site, f"cluster.{override}"], rule, key, fix)


def test_a_secret_in_a_list_of_names_is_not_shown() -> None:
    site = [f"cluster.slurm.{setting}" for setting in SITE]
    for secret in ("HF_TOKEN=hf_abc", "HF TOKEN=hf_abc"):
        (fault,) = find_faults([*BASE, *site, f"cluster.slurm.secrets=['{secret}']"])
        assert "hf_abc" not in str(fault)


def test_mounts_need_an_image_and_a_chain_without_requeue_has_an_end() -> None:
    site = [f"cluster.slurm.{setting}" for setting in SITE]
    mounts = ["cluster.slurm.container_image=null", "cluster.slurm.container_mounts=['/tmp:/tmp']"]
    check_fault(
        [*BASE, *site, *mounts], "slurm.container_mounts", "cluster.slurm.container_mounts", "container_mounts=[]"
    )
    restarts = ["cluster.slurm.requeue=false", "cluster.slurm.max_restarts=101"]
    check_fault([*BASE, *site, *restarts], "slurm.max_restarts", "cluster.slurm.max_restarts", "to at most 100")
    run("requeue=false", "max_restarts=100")
    run("max_restarts=1000")


def test_a_run_folder_that_no_mount_can_name() -> None:
    site = [f"cluster.slurm.{setting}" for setting in SITE]
    check_fault([*BASE, *site, "run_dir='a:b'"], "slurm.run_dir", "run_dir", "set run_dir")


def test_all_faults_of_the_section_are_in_one_message(tmp_path: Path) -> None:
    documents = tmp_path / "docs" / "a.jsonl"
    documents.parent.mkdir()
    documents.write_text("")
    found = find_faults(
        [
            *("experiment=qwen3_8b_to_6b_depth", "layout=published", "cluster=slurm", f"data.train=[{documents}]"),
            "cluster.slurm.account='my lab'",
            "cluster.slurm.qos='a\"b'",
            "cluster.slurm.container_mounts=[/no/such:/data,/tmp:/scratch]",
            "cluster.slurm.secrets=[NO_SUCH_TOKEN]",
            "cluster.time_limit=0:05:00",
        ],
        check_files=True,
    )
    assert sorted((fault.rule, fault.keys[0].rpartition(".")[2]) for fault in found) == [
        ("slurm.mounts_exist", "container_mounts"),
        ("slurm.names", "account"),
        ("slurm.names", "qos"),
        ("slurm.secrets_are_set", "secrets"),
        ("slurm.time_limit", "time_limit"),
        ("value.missing", "container_image"),
        ("value.missing", "partition"),
    ]


def test_paths_that_are_not_mounted(tmp_path: Path) -> None:
    for name in ("a/x.jsonl", "a/y.jsonl", "b/z.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    train = f"data.train=['{tmp_path}/a/*.jsonl','{tmp_path}/b/z.jsonl']"
    site = [f"cluster.slurm.{setting}" for setting in SITE]

    def unmounted(mounts: str) -> list[str]:
        found = find_faults([*BASE, *site, train, f"cluster.slurm.container_mounts={mounts}"], check_files=True)
        assert {fault.rule for fault in found} == {"slurm.inputs_are_mounted"}
        assert all("data.train" in fault.keys for fault in found)
        return sorted(str(fault).partition("; ")[2] for fault in found)

    fixes = [f"add {tmp_path}/{name}:{tmp_path}/{name} to cluster.slurm.container_mounts" for name in "ab"]
    assert unmounted("[]") == fixes
    # Another path in the container does not help: the stage reads the path in the config.
    assert unmounted(f"['{tmp_path}:/elsewhere']") == fixes
    assert unmounted(f"['{tmp_path}/a:{tmp_path}/a:ro']") == fixes[1:]
    compose([*BASE, *site, train, f"cluster.slurm.container_mounts=['{tmp_path}:{tmp_path}']"], check_files=True)
    compose([*BASE, *site[:2], "cluster.slurm.container_image=null", train], check_files=True)


def test_mounts_for_a_snapshot_in_the_hub_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hf_folder: Callable[..., Path]
) -> None:
    snapshot, blobs = hub_snapshot(hf_folder(), tmp_path)
    (tmp_path / "docs.jsonl").write_text("")
    site = [*BASE[1:], *(f"cluster.slurm.{setting}" for setting in SITE), "cluster.gpu=null"]
    own = ["experiment=own", f"data.train=[{tmp_path}/docs.jsonl]", "prune.num_layers=2", *site]
    mounts = f"cluster.slurm.container_mounts=['{tmp_path}/docs.jsonl:{tmp_path}/docs.jsonl','{snapshot}:{snapshot}']"
    check_unmounted([*own, f"model.hf_path={snapshot}", mounts], "model.hf_path", blobs)
    # Hub models are searched in the cache of the submitting shell.
    for name in HUB_FOLDERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    demo = ["experiment=demo", "model=qwen3_0_6b", f"data.train=[{tmp_path}/docs.jsonl]", "prune.ffn_hidden_size=null"]
    check_unmounted([*demo, *site, mounts], "HF_HOME", tmp_path)


def check_unmounted(overrides: list[str], named_by: str, folder: Path) -> None:
    fix = f"add {folder}:{folder} to cluster.slurm.container_mounts"
    check_fault(overrides, "slurm.inputs_are_mounted", "cluster.slurm.container_mounts", fix, check_files=True)
    (fault,) = find_faults(overrides, check_files=True)
    assert f" {folder}/" in str(fault)
    assert f" of {named_by} " in str(fault)


def test_an_image_file_must_exist(tmp_path: Path) -> None:
    absent = [*BASE, *(f"cluster.slurm.{s}" for s in (*SITE[:2], f"container_image={tmp_path}/nowhere.sqsh"))]
    check_fault(absent, "slurm.image_exists", "cluster.slurm.container_image", ".sqsh file", check_files=True)
    (tmp_path / "there.sqsh").write_text("")
    run(f"container_image={tmp_path}/there.sqsh", check_files=True)
