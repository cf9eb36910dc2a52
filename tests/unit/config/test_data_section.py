"""Faults of the data section, reported before a run starts."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from launch.planning.automatic import compose
from prune_distill.config.data_files import document_fields, packing, sources
from prune_distill.config.load import load_resolved, save_resolved
from prune_distill.pipeline.artifact import locate
from prune_distill.pipeline.identity import hashed_values
from prune_distill.schema import DataConfig, DataSource, DocumentFormat
from tests.helpers.faults import check_fault, find_faults

QWEN = ["experiment=qwen3_8b_to_6b_width", "layout=published"]
TWO = [*QWEN, "data.train=null", "data.sources={web: {files: [w.jsonl]}, code: {files: [c.jsonl]}}"]

# Overrides, and their one fault: its rule, its first key, and a part of the fix.
CASES: list[tuple[list[str], str, str, str]] = [
    ([*TWO, "data.train=[a.jsonl]"], "data.files", "data.train", ""),
    (
        [*QWEN, "data.train=null", "data.sources={}"],
        "data.files",
        "data.sources",
        "data.sources.NAME.files=[FILE.jsonl]",
    ),
    ([*QWEN, "data.train=null", "data.sources=[a]"], "value.type", "data.sources", "set data.sources.NAME.KEY"),
    (
        [*TWO, "data.sources.web.files=[]"],
        "data.sources",
        "data.sources.web.files",
        "data.sources.web.files=[FILE.jsonl]",
    ),
    (
        [*TWO, "~data.sources.web.files"],
        "value.missing",
        "data.sources.web.files",
        "set data.sources.web.files to a list",
    ),
    ([*TWO, "+data.sources.web.wieght=1"], "key.unknown", "data.sources.web.wieght", ""),
    ([*TWO, "+data.sources.web.weight=heavy"], "value.type", "data.sources.web.weight", ""),
    ([*TWO, "+data.sources.web.weight=1"], "data.weights", "data.sources.code.weight", ""),
    (
        [*TWO, "+data.sources.web.weight=1", "+data.sources.code.weight=0"],
        "value.bounds",
        "data.sources.code.weight",
        "",
    ),
    ([*TWO, "+data.sources.web.max_tokens=0"], "value.bounds", "data.sources.web.max_tokens", ""),
    ([*TWO, "+data.sources.web.sample=1.5"], "value.bounds", "data.sources.web.sample", ""),
    ([*TWO, "+data.sources.validation={files: [a]}"], "data.sources", "data.sources.validation", ""),
    ([*TWO, "data.validation=[c.jsonl]"], "data.files", "data.validation", "data.validation=null"),
    ([*QWEN, "data.sample=0"], "value.bounds", "data.sample", "above 0 and at most 1"),
    ([*QWEN, "data.shard_bytes=0"], "value.bounds", "data.shard_bytes", ""),
    ([*QWEN, "data.num_workers=0"], "value.bounds", "data.num_workers", ""),
    ([*QWEN, "data.array_tasks=0"], "value.bounds", "data.array_tasks", ""),
    ([*QWEN, "data.format=txt"], "value.choice", "data.format", "text or tokens or chat or ids"),
    ([*QWEN, "data.learn=assistant"], "data.learn", "data.learn", "data.learn=all"),
    ([*QWEN, "data.format=chat", "data.split_turns=true"], "data.learn", "data.split_turns", "data.learn=assistant"),
    ([*QWEN, "data.train=['hf://OptimalScale/x.jsonl']"], "data.hub_files", "data.train", "hf://datasets/OWNER/NAME"),
]


@pytest.mark.parametrize(("overrides", "rule", "key", "fix"), CASES)
def test_a_fault_names_the_key_and_the_fix(overrides: list[str], rule: str, key: str, fix: str) -> None:
    check_fault(overrides, rule, key, fix)


def test_sources_travel_through_the_resolved_file(tmp_path: Path) -> None:
    cfg = compose([*TWO, "+data.sources.web.weight=0.7", "+data.sources.code.weight=3"])
    save_resolved(cfg, tmp_path / "resolved.yaml")
    assert load_resolved(tmp_path / "resolved.yaml") == cfg
    assert cfg.data.sources is not None
    assert cfg.data.sources["web"] == DataSource(["w.jsonl"], weight=0.7)
    assert cfg.data.sources["code"].weight == 3.0


def test_data_train_is_one_source() -> None:
    data = DataConfig(train=["a.jsonl"], text_key="content", sample=0.25)
    assert sources(data) == {"train": DataSource(["a.jsonl"], key="content", sample=0.25)}
    assert document_fields(sources(DataConfig(train=[], format=DocumentFormat.chat))["train"])[0] == "messages"
    assert [packing(name) for name in ("a.jsonl", "a.txt", "b.parquet.gz")][1:] == [None, None]


def test_what_is_placement_and_what_is_identity(tmp_path: Path) -> None:
    def hash_of(*overrides: str) -> str:
        return locate(compose([*overrides, "experiment=demo", f"run_dir={tmp_path}"]))["prepare_data"].config_hash

    for setting in ("num_workers=3", "array_tasks=4", "stale_seconds=7"):
        assert hash_of(f"data.{setting}") == hash_of()
    for setting in ("deduplicate=true", "sample=0.5", "shard_bytes=1000", "long_documents=split", "holdout_every=9"):
        assert hash_of(f"data.{setting}") != hash_of()
    assert hash_of("seed=5") != hash_of()
    weighed = DataConfig(sources={"a": DataSource(["x"], weight=1.0)})
    assert hashed_values(weighed)["sources"]["a"]["weight"] == 1.0


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.txt", b"text", ["a.txt has an unknown extension", ".jsonl.zst"]),
        ("a.jsonl.gz", b'{"text": "a"}', ["a.jsonl.gz is not a gz file"]),
        ("a.jsonl.zst", b'{"text": "a"}', ["a.jsonl.zst is not a zst file"]),
        ("a.parquet", b'{"text": "a"}', ["a.parquet is not a parquet file"]),
        ("a.jsonl", b'{"content": "a", "id": 1}\n', ["first record of", "no field 'text', only content, id"]),
        ("b.jsonl.gz", gzip.compress(b'{"txt": "a"}\n', mtime=0), ["first record of", "no field 'text', only txt"]),
        (
            "a.jsonl",
            b'{"content": {"text": "a"}, "id": 1}\n',
            ["no field 'text', only content, id", "'content' contains one, but it must be at the top level"],
        ),
        ("a.jsonl", b'[{"text": "a"}]', ["a.jsonl contains a JSON array", "jq -c"]),
        ("folder/readme.md", b"", ["the folder", "contains no documents"]),
    ],
)
def test_invalid_files_are_reported_before_submission(
    tmp_path: Path, name: str, content: bytes, parts: list[str]
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    given = path.parent if "folder" in name else path
    (fault,) = find_faults([*QWEN, f"data.train=[{given}]"], check_files=True)
    assert (fault.rule, fault.keys[0]) == ("data.readable", "data.train")
    for part in parts:
        assert part in str(fault)


def test_missing_source_files_are_reported(tmp_path: Path) -> None:
    (tmp_path / "w.jsonl").write_text(json.dumps({"text": "a"}) + "\n")
    sources = f"data.sources={{web: {{files: [{tmp_path}/*.jsonl]}}, code: {{files: [nowhere/c.jsonl]}}}}"
    (fault,) = find_faults([*QWEN, "data.train=null", sources], check_files=True)
    assert (fault.rule, fault.keys) == ("data.exist", ("data.sources.code.files",))
    assert str(fault) == (
        "data.sources.code.files=[nowhere/c.jsonl]: nowhere/c.jsonl not found; set data.sources.code.files="
        "[FILE.jsonl] to files that exist (relative to the working directory)"
    )
