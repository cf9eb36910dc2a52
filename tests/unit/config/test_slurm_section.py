"""The section `cluster.slurm`: what it asks for, and what is said of it before anything is submitted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from prune_distill.config.load import compose, load_resolved, save_resolved
from prune_distill.config.rules.slurm import HUB_FOLDERS
from prune_distill.errors import ConfigError
from prune_distill.schema import RunConfig
from tests.helpers.hf_folders import hub_snapshot

SITE = ["partition=gpu", "account=lab", "container_image='nvcr.io#lab/prune:1'"]
BASE = ["experiment=demo", "cluster=slurm", "cluster.devices_per_node=1"]


def run(*settings: str, check_files: bool = False) -> RunConfig:
    return compose([*BASE, *(f"cluster.slurm.{setting}" for setting in (*SITE, *settings))], check_files)


def faults(overrides: list[str], check_files: bool = False) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        compose(overrides, check_files)
    return caught.value.faults


def test_a_site_has_to_be_named_or_null() -> None:
    assert [fault.partition(" ")[0] for fault in faults(BASE)] == [
        "cluster.slurm.partition",
        "cluster.slurm.account",
        "cluster.slurm.container_image",
    ]
    assert "set cluster.slurm.account to the account that pays, or null where the site has none" in faults(BASE)[1]
    nulls = [f"cluster.slurm.{key}=null" for key in ("partition", "account", "container_image")]
    slurm = compose([*BASE, *nulls]).cluster.slurm
    assert slurm is not None
    assert (slurm.partition, slurm.account, slurm.container_image) == (None, None, None)


def test_it_is_written_and_read_back(tmp_path: Path) -> None:
    cfg = run("secrets=[HF_TOKEN]", "setup=['module load \"cuda 12\"']")
    save_resolved(cfg, tmp_path / "resolved.yaml")
    assert load_resolved(tmp_path / "resolved.yaml") == cfg


CASES = [
    ("slurm.partition='gpu short'", ["cluster.slurm.partition='gpu short' is no name", "one word"]),
    ('slurm.account="it\'s"', ['cluster.slurm.account="it\'s" is no name']),
    ("slurm.qos='high\"'", ["cluster.slurm.qos='high\"' is no name"]),
    (
        "slurm.secrets=['HF_TOKEN=hf_abc']",
        ["secrets[0] contains a secret setting", "its name in cluster.slurm.secrets"],
    ),
    ("slurm.setup=['export WANDB_API_KEY=abcdef']", ["setup[0] contains a secret setting", "set the variable in"]),
    ("slurm.secrets=['HF TOKEN=x']", ["names 'HF TOKEN', which is no name", "give names only"]),
    ("slurm.gpu_type='h100 80'", ["cluster.slurm.gpu_type='h100 80' is no name"]),
    ("slurm.cpus_per_gpu=0", ["cluster.slurm.cpus_per_gpu=0 must be above 0"]),
    ("slurm.mem='2 GB'", ["cluster.slurm.mem='2 GB' is not an amount of memory", "200G"]),
    ("slurm.sbatch=[exclusive]", ["cluster.slurm.sbatch holds 'exclusive', which is no option", "--exclusive"]),
    ("slurm.warn_seconds=0", ["cluster.slurm.warn_seconds=0 must be above 0"]),
    ("slurm.max_restarts=-1", ["cluster.slurm.max_restarts=-1 must not be negative"]),
    ("slurm.gpu_request=gpus", ["gpu_request=gpus is not known", "gpus_per_node or gres or none"]),
    ("slurm.container_image=' '", ["cluster.slurm.container_image=' ' is no image"]),
    ("slurm.container_workdir=here", ["cluster.slurm.container_workdir=here is relative"]),
    ("slurm.container_mounts=['/data,/more:/x']", ["holds '/data,/more:/x', which is no mount", "SOURCE:TARGET"]),
    ("slurm.container_mounts=['data:/data']", ["holds 'data:/data', which is no mount"]),
    ("time_limit=null", ["cluster.time_limit=null, but a Slurm job needs one"]),
    ("time_limit=4h", ["cluster.time_limit: '4h' is not a time limit of the form H:MM:SS", "set cluster.time_limit="]),
    ("time_limit=14400", ["'14400' is not a time limit", "without quotes YAML reads 4:00:00 as a number"]),
    ("time_limit=0:11:00", ["leaves no time to train", "cluster.slurm.warn_seconds=600", "may warn 60 s early"]),
]


@pytest.mark.parametrize(("override", "parts"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_one_fault_names_the_value_and_the_mend(override: str, parts: list[str]) -> None:
    key = override.partition("=")[0]
    site = [f"cluster.slurm.{setting}" for setting in SITE]
    (fault,) = faults([*BASE, *site, f"cluster.{override}"])
    for part in (*parts, key.removeprefix("slurm.")):
        assert part in fault
    assert "hf_abc" not in fault


def test_mounts_need_an_image_and_a_chain_without_requeue_has_an_end() -> None:
    assert (
        "without an image"
        in faults(
            [
                *BASE,
                *(f"cluster.slurm.{s}" for s in (*SITE[:2], "container_image=null", "container_mounts=['/tmp:/tmp']")),
            ]
        )[0]
    )
    with pytest.raises(ConfigError, match="max_restarts=101 would queue as many jobs"):
        run("requeue=false", "max_restarts=101")
    run("requeue=false", "max_restarts=100")
    run("max_restarts=1000")


def test_a_run_folder_that_no_mount_can_name() -> None:
    site = [f"cluster.slurm.{setting}" for setting in SITE]
    (fault,) = faults([*BASE, *site, "run_dir='a:b'"])
    assert "run_dir='a:b' cannot be mounted" in fault


def test_everything_wrong_comes_in_one_message(tmp_path: Path) -> None:
    documents = tmp_path / "docs" / "a.jsonl"
    documents.parent.mkdir()
    documents.write_text("")
    found = faults(
        [
            *("experiment=qwen3_8b_to_6b_depth", "cluster=slurm", f"data.train=[{documents}]"),
            "cluster.slurm.account='my lab'",
            "cluster.slurm.qos='a\"b'",
            "cluster.slurm.container_mounts=[/no/such:/data,/tmp:/scratch]",
            "cluster.slurm.secrets=[NO_SUCH_TOKEN]",
            "cluster.time_limit=0:05:00",
        ],
        check_files=True,
    )
    told = "\n".join(found)
    assert len(found) == 7
    for part in (
        "cluster.slurm.partition is not set",
        "cluster.slurm.container_image is not set",
        "cluster.slurm.account='my lab'",
        "cluster.slurm.qos='a\"b'",
        "cluster.time_limit=0:05:00 leaves no time",
        "/no/such does not exist",
        "NO_SUCH_TOKEN, not set in this environment",
    ):
        assert part in told


def test_what_the_container_would_not_see(tmp_path: Path) -> None:
    for name in ("a/x.jsonl", "a/y.jsonl", "b/z.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    train = f"data.train=['{tmp_path}/a/*.jsonl','{tmp_path}/b/z.jsonl']"
    site = [f"cluster.slurm.{setting}" for setting in SITE]

    def told(mounts: str) -> list[str]:
        return faults([*BASE, *site, train, f"cluster.slurm.container_mounts={mounts}"], check_files=True)

    assert sorted(fault.partition(", ")[0] for fault in told("[]")) == [
        f"data.train names {tmp_path}/a/x.jsonl",
        f"data.train names {tmp_path}/b/z.jsonl",
    ]
    # Another name inside is no help: the stage reads the path that the config gives.
    assert len(told(f"['{tmp_path}:/elsewhere']")) == 2
    (fault,) = told(f"['{tmp_path}/a:{tmp_path}/a:ro']")
    assert f"add {tmp_path}/b:{tmp_path}/b to cluster.slurm.container_mounts" in fault
    compose([*BASE, *site, train, f"cluster.slurm.container_mounts=['{tmp_path}:{tmp_path}']"], check_files=True)
    compose([*BASE, *site[:2], "cluster.slurm.container_image=null", train], check_files=True)


def test_what_a_snapshot_of_the_hubs_cache_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hf_folder: Callable[..., Path]
) -> None:
    snapshot, blobs = hub_snapshot(hf_folder(), tmp_path)
    (tmp_path / "docs.jsonl").write_text("")
    site = [*BASE[1:], *(f"cluster.slurm.{setting}" for setting in SITE), "cluster.gpu=null"]
    own = ["experiment=own", f"data.train=[{tmp_path}/docs.jsonl]", "prune.num_layers=2", *site]
    mounts = f"cluster.slurm.container_mounts=['{tmp_path}/docs.jsonl:{tmp_path}/docs.jsonl','{snapshot}:{snapshot}']"
    (fault,) = faults([*own, f"model.hf_path={snapshot}", mounts], check_files=True)
    assert f"model.hf_path names {blobs}/" in fault
    assert f"add {blobs}:{blobs} to cluster.slurm.container_mounts" in fault
    # A model of the Hub is looked for where the submitting shell keeps its cache.
    for name in HUB_FOLDERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    demo = ["experiment=demo", "model=qwen3_0_6b", f"data.train=[{tmp_path}/docs.jsonl]", "prune.ffn_hidden_size=null"]
    (fault,) = faults([*demo, *site, mounts], check_files=True)
    assert f"HF_HOME names {tmp_path}/" in fault
    assert f"add {tmp_path}:{tmp_path} to cluster.slurm.container_mounts" in fault


def test_an_image_that_is_a_file_has_to_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere.sqsh does not exist"):
        run(f"container_image={tmp_path}/nowhere.sqsh", check_files=True)
    (tmp_path / "there.sqsh").write_text("")
    run(f"container_image={tmp_path}/there.sqsh", check_files=True)
