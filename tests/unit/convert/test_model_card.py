"""The model card of an exported model, without private information."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from convert.model_card import Provenance, model_card
from tests.conftest import QWEN3


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    folder = tmp_path / "secret-place" / "source"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(QWEN3))
    return folder


def card(base: str, reference: Path, provenance: Provenance | None = None, **sizes: int) -> tuple[dict[str, Any], str]:
    """Return the metadata of a card, and its text."""
    text = model_card("small", base, reference, {**QWEN3, **sizes}, provenance or Provenance())
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def test_a_hub_model_is_in_the_metadata(reference: Path) -> None:
    metadata, body = card("Qwen/Qwen3-8B", reference)
    assert metadata == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "Qwen/Qwen3-8B",
        "base_model_relation": "finetune",
        "tags": ["nemo"],
    }
    assert "Made from Qwen/Qwen3-8B." in body


@pytest.mark.parametrize(
    ("where", "base"),
    [
        ("", "{}"),
        ("", "{}/"),
        ("", "secret-place/source"),  # looks like a Hub id, and is a folder
        ("", "~/source"),
        ("secret-place", "./source"),
        ("secret-place", "../secret-place/source"),
        ("secret-place/source", "."),
    ],
)
def test_local_paths_are_not_published(
    tmp_path: Path, reference: Path, monkeypatch: pytest.MonkeyPatch, where: str, base: str
) -> None:
    monkeypatch.chdir(tmp_path / where)
    metadata, body = card(base.format(reference), reference, hidden_size=64)
    assert "base_model" not in metadata
    assert "Made from source." in body
    assert "| | source | this model |" in body
    assert "secret-place" not in body


def test_the_license_comes_from_the_source(reference: Path) -> None:
    (reference / "README.md").write_text(
        "---\nlicense: other\nlicense_name: tongyi\nlicense_link: https://x.org/L\ntags: [chat]\n---\n# Source\n---\n"
    )
    metadata, _ = card("Qwen/Qwen3-8B", reference)
    licenses = {key: value for key, value in metadata.items() if key.startswith("license")}
    assert licenses == {"license": "other", "license_name": "tongyi", "license_link": "https://x.org/L"}
    assert metadata["tags"] == ["nemo"]


@pytest.mark.parametrize(
    "readme",
    ["", "# Source\n", "---\nlicense: mit\n", "---\n[: no yaml\n---\n", "---\n- license\n---\n", "\x00\ufffd---\n"],
)
def test_a_card_without_metadata_gives_no_license(reference: Path, readme: str) -> None:
    (reference / "README.md").write_text(readme)
    metadata, _ = card("Qwen/Qwen3-8B", reference)
    assert "license" not in metadata


def test_the_table_shows_changed_sizes(reference: Path) -> None:
    metadata, body = card("Qwen/Qwen3-8B", reference, num_hidden_layers=2, num_key_value_heads=1)
    rows = [line for line in body.splitlines() if line.startswith("| ")]
    assert rows == ["| | Qwen/Qwen3-8B | this model |", "| layers | 4 | 2 |", "| query groups | 2 | 1 |"]
    assert metadata["tags"] == ["nemo", "minitron", "pruning"]
    assert "this model |" not in card("Qwen/Qwen3-8B", reference)[1]


def stage(run: Path, name: str, student: str | None = None, **metrics: Any) -> Path:
    folder = run / name
    (folder / "nemo").mkdir(parents=True)
    inputs = {"student": {"path": student}} if student else {}
    manifest = {"stage": name.split("-")[0], "status": "complete", "inputs": inputs, "metrics": metrics}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder / "nemo"


def test_stages_are_described_in_order(tmp_path: Path, reference: Path) -> None:
    stage(tmp_path, "prune-1", params=3_000_000, params_before=5_000_000, kept_layers=[1, 2, 3, 6])
    checkpoint = stage(tmp_path, "distill-2", "prune-1/nemo", tokens=160_000, steps=160, val_loss=3.65432)
    metadata, body = card("Qwen/Qwen3-8B", reference, Provenance.read(checkpoint))
    message = body.splitlines()
    begin = message.index("Made from Qwen/Qwen3-8B.")
    assert message[begin + 1 : begin + 3] == [
        "Pruned with NVIDIA ModelOpt (Minitron) from 5,000,000 to 3,000,000 parameters; layers kept: 1-3, 6.",
        "Trained on 160,000 tokens in 160 steps after pruning; validation loss 3.6543 nats per token.",
    ]
    assert metadata["tags"] == ["nemo", "distillation"]
    assert Provenance.read(tmp_path / "elsewhere" / "nemo").sentences == []


@pytest.mark.parametrize("student", ["distill-1/nemo", "../" + "run/distill-1/nemo", "./distill-1/../distill-1/nemo"])
def test_a_manifest_that_names_itself_is_followed_once(tmp_path: Path, student: str) -> None:
    checkpoint = stage(tmp_path / "run", "distill-1", student, tokens=8, steps=2)
    assert Provenance.read(checkpoint).sentences == ["Trained on 8 tokens in 2 steps after pruning."]


def test_manifests_that_name_each_other_are_followed_once(tmp_path: Path) -> None:
    stage(tmp_path, "prune-1", "distill-2/nemo", params=3, params_before=5)
    checkpoint = stage(tmp_path, "distill-2", "prune-1/nemo", tokens=8, steps=2)
    assert len(Provenance.read(checkpoint).sentences) == 2


@pytest.mark.parametrize(
    "odd",
    [
        {"stage": 7},
        {"stage": None},
        {"inputs": []},
        {"inputs": {"student": 7}},
        {"inputs": {"student": {"path": [1]}}},
        {"inputs": {"student": {"path": "a\0b"}}},
        {"inputs": {"student": {"path": "a" * 5000}}},
        {"metrics": []},
        {"metrics": {"tokens": "many", "steps": None}},
    ],
)
def test_odd_manifests_do_not_fail(tmp_path: Path, odd: dict[str, Any]) -> None:
    checkpoint = stage(tmp_path, "distill-1")
    manifest = {"stage": "distill", "status": "complete", "inputs": {}, "metrics": {}, **odd}
    (checkpoint.parent / "manifest.json").write_text(json.dumps(manifest))
    assert Provenance.read(checkpoint).sentences == []
