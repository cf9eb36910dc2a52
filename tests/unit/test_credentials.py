"""Passwords and tokens in config values are rejected and never shown."""

from __future__ import annotations

import pytest

from launch.planning.automatic import compose
from prune_distill.credentials import find_credential, redact
from prune_distill.errors import ConfigError

HF = "hf_" + "aBcDeFgHiJ" * 3 + "kLmN"
MLFLOW = "distill.mlflow.experiment=x"
SECRET = "S3cr/et@Pw"
# A key, a value with a credential, the secret, and the kind of credential in the fault.
REFUSED = [
    ("distill.mlflow.tracking_uri", f"http://alice:{SECRET}@mlflow.example:5000/x", SECRET, "MLFLOW_TRACKING_PASSWORD"),
    ("distill.mlflow.tracking_uri", "https://h.example/?a=1&access_token=QuerySecret77", "QuerySecret77", "MLFLOW"),
    ("distill.mlflow.tracking_uri", "databricks://:dapi0123456789@h.example", "dapi0123456789", "MLFLOW"),
    ("distill.wandb.project", "0123456789abcdef0123456789abcdef01234567", "0123456789abcdef0123", "WANDB_API_KEY"),
    ("model.hf_path", HF, HF, "HF_TOKEN"),
    ("model.hf_path", f"https://{HF}@huggingface.co/a/b", HF, "HF_TOKEN"),
    ("data.source_tokenizer", "hf://user:pw123@datasets/a/b", "pw123", "HF_TOKEN"),
    ("name", "https://s3.example/x?X-Amz-Signature=0a1b2c3d", "0a1b2c3d", "environment"),
    ("run_dir", "AKIAABCDEFGHIJKLMNOP", "AKIAABCDEFGHIJKLMNOP", "environment"),
]
ALLOWED = [
    ("distill.mlflow.tracking_uri", "http://mlflow.example:5000/path@x"),
    ("distill.mlflow.tracking_uri", "http://mlflow.example:5000/?experiment=1"),
    ("distill.mlflow.tracking_uri", "sqlite:////data/mlflow.db"),
    ("data.train", "hf://datasets/nvidia/ClimbMix@main/part_?.jsonl"),
    ("cluster.slurm.container_image", "docker://$oauthtoken@nvcr.io#nvidia/nemo:25.11"),
    ("cluster.slurm.setup", "export HF_TOKEN=$(cat ~/.token)"),
    ("cluster.slurm.setup", "export TOKENIZERS_PARALLELISM=false"),
    ("model.revision", "0123456789abcdef0123456789abcdef01234567"),
    ("model.hf_path", "/models/hf_Llama31Minitron4BDepthBase/sk-learn-text-corpus-2"),
    ("data.text_key", "tokens"),
]


@pytest.mark.parametrize(("key", "value", "secret", "place"), REFUSED)
def test_a_credential_is_rejected_without_being_shown(key: str, value: str, secret: str, place: str) -> None:
    more = [MLFLOW] if ".mlflow." in key else []
    with pytest.raises(ConfigError) as caught:
        compose(["experiment=demo", *more, f'{key}="{value}"'])
    (fault,) = [fault for fault in caught.value.faults if fault.keys == (key,)]
    assert fault.rule == "value.credential"
    assert place in str(fault)
    assert secret not in str(caught.value)


@pytest.mark.parametrize(("key", "value"), ALLOWED)
def test_values_that_resemble_credentials_are_accepted(key: str, value: str) -> None:
    assert find_credential(key, value) is None


@pytest.mark.parametrize(
    "override", [f"distill.lr={HF}", f"distill.no_such_key=1 {HF}", f"data.train=(token=abcdef) {HF}"]
)
def test_other_faults_do_not_show_credentials(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(["experiment=demo", override])
    assert HF not in str(caught.value)
    assert "abcdef" not in str(caught.value)


def test_the_values_of_secret_variables_are_removed() -> None:
    environment = {"DB_PASSWORD": "correct horse", "HOME": "/home/someone", "MY_KEY": "short"}
    text = "cannot log in with correct horse at /home/someone, short"
    assert redact(text, environment) == "cannot log in with [removed] at /home/someone, short"
