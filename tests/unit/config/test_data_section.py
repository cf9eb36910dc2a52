"""What can be wrong with the data section, and is said before anything is started."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from prune_distill.config.data_files import key_of, packing, sources
from prune_distill.config.load import compose, load_resolved, save_resolved
from prune_distill.errors import ConfigError
from prune_distill.pipeline.artifact import locate
from prune_distill.pipeline.identity import hashed_values
from prune_distill.schema import DataConfig, DataSource, DocumentFormat

QWEN = ["experiment=qwen3_8b_to_6b_width"]
TWO = [*QWEN, "data.train=null", "data.sources={web: {files: [w.jsonl]}, code: {files: [c.jsonl]}}"]

CASES: list[tuple[list[str], list[str]]] = [
    ([*TWO, "data.train=[a.jsonl]"], ["data.train and data.sources are both set", "set one of them to null"]),
    ([*QWEN, "data.train=null", "data.sources={}"], ["data.sources={} names no source"]),
    ([*QWEN, "data.train=null", "data.sources=[a]"], ["data.sources=['a'] is a value; set data.sources.NAME.KEY"]),
    ([*TWO, "data.sources.web.files=[]"], ["data.sources.web.files=[] names no file"]),
    ([*TWO, "~data.sources.web.files"], ["data.sources.web.files is not set; set data.sources.web.files to a list"]),
    ([*TWO, "+data.sources.web.wieght=1"], ["data.sources.web.wieght is not a known key (did you mean"]),
    ([*TWO, "+data.sources.web.weight=heavy"], ["data.sources.web.weight='heavy' is not a number"]),
    ([*TWO, "+data.sources.web.weight=1"], ["data.sources.code.weight=null, but other sources have one"]),
    (
        [*TWO, "+data.sources.web.weight=1", "+data.sources.code.weight=0"],
        ["data.sources.code.weight=0.0 must be above 0"],
    ),
    ([*TWO, "+data.sources.web.max_tokens=0"], ["data.sources.web.max_tokens=0 must be above 0"]),
    ([*TWO, "+data.sources.web.sample=1.5"], ["data.sources.web.sample=1.5 must be between 0 and 1"]),
    ([*TWO, "+data.sources.validation={files: [a]}"], ["data.sources.validation is no name for a source"]),
    ([*TWO, "data.validation=[c.jsonl]"], ["data.validation holds c.jsonl, which data.sources holds too"]),
    ([*QWEN, "data.sample=0"], ["data.sample=0.0 must be between 0 and 1", "above 0 and at most 1"]),
    ([*QWEN, "data.shard_bytes=0"], ["data.shard_bytes=0 must be above 0"]),
    ([*QWEN, "data.num_workers=0"], ["data.num_workers=0 must be above 0"]),
    ([*QWEN, "data.array_tasks=0"], ["data.array_tasks=0 must be above 0"]),
    ([*QWEN, "data.format=txt"], ["data.format=txt is not known (did you mean text?)", "text or tokens or chat"]),
    ([*QWEN, "data.mask_prompts=true"], ["data.mask_prompts=True needs data of format=chat"]),
    ([*QWEN, "data.train=['hf://OptimalScale/x.jsonl']"], ["data.train holds", "hf://datasets/OWNER/NAME"]),
]


@pytest.mark.parametrize(("overrides", "parts"), CASES)
def test_one_fault_gives_one_sentence_with_its_mend(overrides: list[str], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    (fault,) = caught.value.faults
    for part in parts:
        assert part in fault


def test_sources_travel_through_the_resolved_file(tmp_path: Path) -> None:
    cfg = compose([*TWO, "+data.sources.web.weight=0.7", "+data.sources.code.weight=3"])
    save_resolved(cfg, tmp_path / "resolved.yaml")
    assert load_resolved(tmp_path / "resolved.yaml") == cfg
    assert cfg.data.sources is not None
    assert cfg.data.sources["web"] == DataSource(["w.jsonl"], weight=0.7)
    assert cfg.data.sources["code"].weight == 3.0


def test_one_source_is_what_train_names() -> None:
    data = DataConfig(train=["a.jsonl"], text_key="content", sample=0.25)
    assert sources(data) == {"train": DataSource(["a.jsonl"], key="content", sample=0.25)}
    assert key_of(sources(DataConfig(train=[], format=DocumentFormat.chat))["train"]) == "messages"
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
        ("a.txt", b"text", ["a.txt, which is of no known kind", ".jsonl.zst"]),
        ("a.jsonl.gz", b'{"text": "a"}', ["a.jsonl.gz, which is not a gz file, whatever its name says"]),
        ("a.jsonl.zst", b'{"text": "a"}', ["a.jsonl.zst, which is not a zst file"]),
        ("a.parquet", b'{"text": "a"}', ["a.parquet, which is not a parquet file"]),
        ("a.jsonl", b'{"content": "a", "id": 1}\n', ["whose first record has no field 'text', only content, id"]),
        ("b.jsonl.gz", gzip.compress(b'{"txt": "a"}\n', mtime=0), ["whose first record has no field 'text', only txt"]),
        (
            "a.jsonl",
            b'{"content": {"text": "a"}, "id": 1}\n',
            ["no field 'text', only content, id", "'content' holds one, but it must be at the top level"],
        ),
        ("a.jsonl", b'[{"text": "a"}]', ["a.jsonl, which holds a JSON array", "jq -c"]),
        ("folder/readme.md", b"", ["a folder without documents"]),
    ],
)
def test_files_that_cannot_be_documents_are_named_before_the_queue(
    tmp_path: Path, name: str, content: bytes, parts: list[str]
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    given = path.parent if "folder" in name else path
    with pytest.raises(ConfigError) as caught:
        compose([*QWEN, f"data.train=[{given}]"], check_files=True)
    (fault,) = caught.value.faults
    assert fault.startswith("data.train names ")
    for part in parts:
        assert part in fault


def test_files_of_sources_are_looked_for(tmp_path: Path) -> None:
    (tmp_path / "w.jsonl").write_text(json.dumps({"text": "a"}) + "\n")
    sources = f"data.sources={{web: {{files: [{tmp_path}/*.jsonl]}}, code: {{files: [nowhere/c.jsonl]}}}}"
    with pytest.raises(ConfigError) as caught:
        compose([*QWEN, "data.train=null", sources], check_files=True)
    assert caught.value.faults == [
        "data.sources.code.files names nowhere/c.jsonl, not to be found; set data.sources.code.files=[FILE.jsonl] to "
        "files that exist (relative to the working directory), or put them there"
    ]
