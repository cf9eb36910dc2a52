"""Data preparation from files to the folder that other stages read."""

from __future__ import annotations

import json
import random
import shutil
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prune_distill.data import prepare as preparing
from prune_distill.data import work
from prune_distill.data.check import check_folder, document_text
from prune_distill.data.documents import document_key, held_out
from prune_distill.data.encoder import TokenizersEncoder
from prune_distill.data.folder import DataFolder
from prune_distill.data.plan import VALIDATION, Shard, holdout_every, local_files, make_plan
from prune_distill.data.prepare import prepare
from prune_distill.data.readers import Lines
from prune_distill.data.shards import read_manifest
from prune_distill.data.tokenizer import TokenizerSpec, read_tokenizer
from prune_distill.errors import InputError
from prune_distill.schema import DataConfig, DataSource, DocumentFormat, Learn, LongDocuments
from tests.helpers.tokenizers import byte_level, words

WORDS = ["<eos>", "alpha", "beta", "gamma", "delta"]
Files = dict[str, list[str]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    return {"words": words(base / "words", WORDS, len(WORDS)), "bytes": byte_level(base / "bytes")}


@pytest.fixture(scope="module")
def specs(folders: dict[str, Path]) -> dict[str, TokenizerSpec]:
    return {name: read_tokenizer(folder) for name, folder in folders.items()}


@pytest.fixture
def model(folders: dict[str, Path], specs: dict[str, TokenizerSpec], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The word model, whose tokenizer is cached, which saves a second per test."""
    known = {str(folders[name]): spec for name, spec in specs.items()}
    read = preparing.read_tokenizer
    monkeypatch.setattr(
        preparing, "read_tokenizer", lambda folder, model=True: known.get(str(folder)) or read(folder, model)
    )
    return folders["words"]


def write_lines(path: Path, *lines: Any) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def sentences(count: int, seed: int = 0, length: int = 8) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS[1:], k=length)) for _ in range(count)]


def make(model: Path, out: Path, files: Files, seed: int = 1, **settings: Any) -> DataFolder:
    settings = {"num_workers": 1, **settings}
    return prepare(DataConfig(**settings), files, model, out, seed)


def texts_of(folder: DataFolder, split: str = "train") -> list[str]:
    """Return documents of the word model as text."""
    text = " ".join(WORDS[token] for token in folder.tokens(split).tolist())
    return [document.strip() for document in text.split("<eos>")[:-1]]


def test_megatron_reads_the_documents(model: Path, tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    train = write_lines(tmp_path / "t.jsonl", {"text": "alpha beta"}, {"text": "gamma"}, {"text": "  "})
    validation = write_lines(tmp_path / "v.jsonl", {"text": "delta delta alpha"})
    folder = make(model, tmp_path / "out", {"train": [train], "validation": [validation]})
    assert (folder.lines["lines"], folder.lines["empty"], folder.lines["bad"]) == (4, 1, 0)
    assert folder == DataFolder.read(tmp_path / "out")
    (prefix,) = folder.train_paths
    dataset = IndexedDataset(prefix)
    assert [dataset[number].tolist() for number in range(len(dataset))] == [[1, 2, 0], [3, 0]]
    assert folder.tokens("train").tolist() == [1, 2, 0, 3, 0]
    assert folder.tokens("validation").tolist() == [4, 4, 1, 0]
    assert (folder.train_documents, folder.train_tokens, folder.validation_tokens) == (2, 5, 4)
    assert folder.validation_bytes == len("delta delta alpha")
    assert folder.validation_sequences(2).tolist() == [[4, 4, 1]]
    assert folder.validation_sequences(9).shape == (0, 10)
    assert "2 training documents of 5 tokens in 1 parts" in check_folder(tmp_path / "out")


@pytest.mark.parametrize(
    ("how", "tokens"),
    [(LongDocuments.truncate, [1, 2, 0, 1, 2, 0, 1, 0]), (LongDocuments.split, [1, 2, 3, 0, 1, 2, 0, 1, 0])],
)
def test_long_documents_are_cut_or_split(model: Path, tmp_path: Path, how: LongDocuments, tokens: list[int]) -> None:
    lines = [{"text": "alpha beta gamma"}, {"text": "alpha beta"}, {"text": "alpha"}]
    train = write_lines(tmp_path / "t.jsonl", *lines)
    files = {"train": [train], "validation": [train]}
    folder = make(model, tmp_path / "out", files, max_document_tokens=2, long_documents=how)
    assert folder.tokens("train").tolist() == tokens
    assert folder.train_documents == (3 if how is LongDocuments.truncate else 4)
    assert folder.validation_bytes == sum(len(line["text"]) for line in lines)
    check_folder(tmp_path / "out")


def test_held_out_documents_only_depend_on_their_text(model: Path, tmp_path: Path) -> None:
    texts = sentences(200)
    one = write_lines(tmp_path / "1.jsonl", *({"text": text} for text in texts))
    two = write_lines(tmp_path / "2.jsonl", *({"text": text} for text in sentences(200, seed=1)))
    folder = make(model, tmp_path / "one", {"train": [one]}, holdout_every=4)
    expected = [text for text in texts if held_out(document_key(text.encode()), 4)]
    assert texts_of(folder, "validation") == expected
    assert 25 < len(expected) < 75  # 50 expected; 4 standard deviations are 25
    both = make(model, tmp_path / "both", {"train": [two, one]}, holdout_every=4, shard_bytes=3000)
    assert len(both.train) > 5
    assert texts_of(both, "validation")[-len(expected) :] == expected


def test_the_division_into_shards_does_not_change_documents(model: Path, tmp_path: Path) -> None:
    train = write_lines(tmp_path / "t.jsonl", *({"text": text} for text in sentences(300)))
    whole = make(model, tmp_path / "whole", {"train": [train]}, holdout_every=10)
    cut = make(model, tmp_path / "cut", {"train": [train]}, holdout_every=10, shard_bytes=1500, num_workers=2)
    assert (len(whole.train), len(cut.train)) == (1, 12)
    for split in ("train", "validation"):
        assert whole.tokens(split).tolist() == cut.tokens(split).tolist()
    assert whole.train_paths == [str(tmp_path / "whole" / "shards" / "00000" / "train")]
    # The weight of each shard is its number of tokens.
    assert [float(weight) for weight in cut.train_paths[::2]] == [part["tokens"] for part in cut.train]


def test_sources_have_weights_budgets_and_clusters(model: Path, tmp_path: Path) -> None:
    files: Files = {}
    for number, name in enumerate(("web", "code")):
        lines = [{"text": text, "cluster_id": n % 3} for n, text in enumerate(sentences(400, seed=number))]
        files[name] = [write_lines(tmp_path / f"{name}.jsonl", *lines)]
    files["validation"] = [write_lines(tmp_path / "v.jsonl", {"text": "alpha"})]
    sources = {
        "web": DataSource(files["web"], weight=3.0, max_tokens=900),
        "code": DataSource(files["code"], weight=1.0, sample=0.5),
    }
    folder = make(model, tmp_path / "out", files, sources=sources, shard_bytes=5000)
    assert len(folder.train) > 6
    # A document has 9 tokens, a divisor of the budget.
    assert folder.sources["web"]["tokens"] == 900
    assert 150 < folder.sources["code"]["documents"] < 250  # 200 expected; 4 standard deviations are 40
    for name, weight in (("web", 3.0), ("code", 1.0)):
        assert folder.sources[name]["weight"] == pytest.approx(weight)
        clusters = folder.sources[name]["clusters"]
        assert sorted(clusters) == ["0", "1", "2"]
        assert sum(clusters.values()) == folder.sources[name]["tokens"]
        # A third each, 33 documents of 100 at least: 4 standard deviations are 19.
        assert min(clusters.values()) > 0.14 * folder.sources[name]["tokens"]
    taken = Counter(texts_of(folder))
    assert not taken - Counter(text for number in (0, 1) for text in sentences(400, seed=number))
    # Spread over the source, not from its beginning.
    assert len([part for part in folder.train if part["source"] == "web"]) > 3
    again = make(model, tmp_path / "again", files, sources=sources, shard_bytes=5000)
    assert texts_of(again) == texts_of(folder)
    other = make(model, tmp_path / "other", files, seed=2, sources=sources, shard_bytes=5000)
    assert texts_of(other) != texts_of(folder)
    check_folder(tmp_path / "out")


def test_deduplication(model: Path, tmp_path: Path) -> None:
    texts = sentences(100)
    lines = [{"text": text} for text in [*texts, *texts[:50], "alpha beta gamma delta " * 3, *texts]]
    files = {
        "train": [write_lines(tmp_path / "t.jsonl", *lines)],
        "validation": [write_lines(tmp_path / "v.jsonl", {"text": "alpha"})],
    }
    settings: dict[str, Any] = {"shard_bytes": 1000, "max_document_tokens": 8, "long_documents": LongDocuments.split}
    every = make(model, tmp_path / "all", files, **settings)
    unique = make(model, tmp_path / "unique", files, deduplicate=True, **settings)
    assert len(texts_of(every)) == 251
    assert texts_of(unique) == [*dict.fromkeys(texts), ("alpha beta gamma delta " * 3).strip()]
    assert check_folder(tmp_path / "unique")
    # Nothing was written twice.
    assert {path.suffix for path in (tmp_path / "unique" / "selected").iterdir() if not path.is_symlink()} == {".idx"}


@pytest.mark.parametrize(
    ("lines", "settings", "fault"),
    [
        (
            ['{"text": "alpha"}', "{oops"],
            {},
            r"max_invalid_fraction=0.001: 1 of 2 lines are invalid.*t.jsonl, line 2: invalid JSON",
        ),
        (['{"text": "alpha delta"}', '{"text": "alpha"}'], {"vocab_size": 4}, "returns token id 4"),
        ([""], {}, "no training documents in .*1 of them empty"),
        (['{"text": "alpha"}'], {"holdout_every": 10**9}, "holdout_every=1000000000: none of .* is held out"),
        (['{"txt": "alpha"}'], {}, "1 of 1 lines are invalid.*no field 'text'"),
    ],
)
def test_unusable_documents_are_rejected(
    model: Path, tmp_path: Path, lines: list[str], settings: dict[str, Any], fault: str
) -> None:
    settings = dict(settings)
    if "vocab_size" in settings:
        model = words(tmp_path / "model", WORDS, settings.pop("vocab_size"))
    files = {"train": [write_lines(tmp_path / "t.jsonl", *lines)]}
    if "holdout_every" not in settings:
        files["validation"] = [write_lines(tmp_path / "v.jsonl", {"text": "alpha"})]
    with pytest.raises(InputError, match=fault):
        make(model, tmp_path / "out", files, **settings)
    assert not (tmp_path / "out" / "data.json").exists()


def test_a_lower_limit_of_invalid_lines_applies_to_existing_shards(model: Path, tmp_path: Path) -> None:
    files = {
        "train": [write_lines(tmp_path / "t.jsonl", {"text": "alpha"}, {"text": "beta"}, {"text": "gamma"}, "{oops")],
        "validation": [write_lines(tmp_path / "v.jsonl", {"text": "alpha"})],
    }
    assert make(model, tmp_path / "out", files, max_invalid_fraction=0.3).worst_bad_share == 0.25
    assert make(model, tmp_path / "out", files, max_invalid_fraction=0.25).worst_bad_share == 0.25
    with pytest.raises(InputError, match=r"max_invalid_fraction=0.2: 1 of 4 lines are invalid.*t.jsonl, line 4"):
        make(model, tmp_path / "out", files, max_invalid_fraction=0.2)


def test_faults_of_several_shards_are_reported_together_and_complete_shards_are_kept(
    model: Path, tmp_path: Path
) -> None:
    good = {"text": "alpha beta"}
    files = [write_lines(tmp_path / f"{n}.jsonl", good, "{" if n in (1, 3) else good) for n in range(5)]
    paths = {"train": files, "validation": [write_lines(tmp_path / "v.jsonl", good)]}
    with pytest.raises(InputError, match=r"(1.jsonl, line 2.*3.jsonl, line 2)|(3.jsonl, line 2.*1.jsonl, line 2)"):
        make(model, tmp_path / "out", paths, shard_bytes=46)
    assert len(list((tmp_path / "out" / "shards").glob("0*"))) == 4
    assert not list((tmp_path / "out" / "claims").iterdir())


def test_unknown_files_and_missing_columns(model: Path, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"content": ["alpha"]}), tmp_path / "a.parquet")
    (tmp_path / "b.txt").write_text("alpha")
    with pytest.raises(InputError, match=r"no column 'text', only content.*b.txt has an unknown extension"):
        make(model, tmp_path / "out", {"train": [str(tmp_path / "a.parquet"), str(tmp_path / "b.txt")]})


def test_hub_files_come_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repo = tmp_path / "datasets--lab--mix"
    for name in ("part_1.jsonl", "part_0.jsonl", "README.md", "more/part_2.jsonl"):
        path = repo / "snapshots" / ("a" * 40) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    (repo / "refs").mkdir()
    for reference in ("main", "v1"):
        (repo / "refs" / reference).write_text("a" * 40)
    for url in ("hf://datasets/lab/mix/part_*.jsonl", "hf://datasets/lab/mix@v1/part_*.jsonl"):
        assert [Path(path).name for path in local_files((url,))] == ["part_0.jsonl", "part_1.jsonl"]
    with pytest.raises(InputError, match=r"matches no file of the dataset"):
        local_files(("hf://datasets/lab/mix/*.parquet",))
    with pytest.raises(InputError, match=r"hf://datasets/lab/other/\* cannot be downloaded"):
        local_files(("hf://datasets/lab/other/*",))


def test_a_file_listed_twice_is_read_once_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one, two = write_lines(tmp_path / "a.jsonl", {"text": "a"}), write_lines(tmp_path / "b.jsonl", {"text": "b"})
    (tmp_path / "c.jsonl").write_bytes(b"")
    (tmp_path / "linked").symlink_to(tmp_path)
    assert local_files((tmp_path, Path(one), tmp_path / "linked" / "b.jsonl")) == [one, two, str(tmp_path / "c.jsonl")]
    assert "2 files are listed twice" in caplog.text
    assert "1 files are empty" in caplog.text
    caplog.clear()
    assert local_files((Path(one), Path(two))) == [one, two]
    assert not caplog.records


@pytest.mark.parametrize(
    ("megabytes", "sample", "every"),
    [(0.1, 1.0, 10), (99, 1.0, 10), (100, 1.0, 100), (400_000, 1.0, 10_000), (4_000, 1.0, 1000), (4_000, 0.2, 100)],
)
def test_a_small_corpus_holds_out_a_larger_share(megabytes: float, sample: float, every: int) -> None:
    sizes = {"train": round(megabytes * 5e5), VALIDATION: 10**12}
    plan = [
        Shard(number, split, split, DocumentFormat.text, ("text",), sample, (), sizes[split], "")
        for number, split in enumerate(("train", VALIDATION, "train"))
    ]
    assert holdout_every(DataConfig(), plan) == every
    assert holdout_every(DataConfig(holdout_every=7), plan) == 7


def test_a_small_corpus_gets_a_default_validation_split(model: Path, tmp_path: Path) -> None:
    train = write_lines(tmp_path / "t.jsonl", *({"text": text} for text in sentences(400)))
    folder = make(model, tmp_path / "out", {"train": [train]})
    assert 16 < folder.validation_documents < 64  # 40 expected; 4 standard deviations are 24


def snapshot(folder: Path) -> dict[str, bytes]:
    """Return the content of a prepared folder, without logs."""
    left_out = ("claims", "metrics.jsonl")
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] not in left_out
    }


def test_only_missing_shards_are_made(model: Path, tmp_path: Path) -> None:
    files = {"train": [write_lines(tmp_path / "t.jsonl", *({"text": text} for text in sentences(200)))]}
    settings: dict[str, Any] = {"shard_bytes": 1000, "holdout_every": 10}
    make(model, tmp_path / "out", files, **settings)
    before = snapshot(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "shards" / "00003")
    (tmp_path / "out" / "data.json").unlink()
    (tmp_path / "out" / "shards" / ".00003.node.1").mkdir()
    kept = (tmp_path / "out" / "shards" / "00002" / "train.bin").stat().st_mtime_ns
    make(model, tmp_path / "out", files, **settings)
    assert snapshot(tmp_path / "out") == before
    assert (tmp_path / "out" / "shards" / "00002" / "train.bin").stat().st_mtime_ns == kept
    with pytest.raises(InputError, match=r"differ from those in .*plan.json"):
        make(model, tmp_path / "out", files, **{**settings, "holdout_every": 11})
    with pytest.raises(InputError, match=r"differ from those in .*plan.json"):
        make(model, tmp_path / "out", files, **settings, deduplicate=True)


def test_two_processes_share_the_work_and_declare_it_once(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"train": [write_lines(tmp_path / "t.jsonl", *({"text": text} for text in sentences(400)))]}
    declared: list[int] = []
    declare = preparing.declare
    monkeypatch.setattr(preparing, "declare", lambda *arguments: (declared.append(1), declare(*arguments)))
    results: list[DataFolder] = []

    def one() -> None:
        results.append(make(model, tmp_path / "out", files, shard_bytes=500, holdout_every=10))

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(results) == 2
    assert results[0] == results[1]
    assert declared == [1]
    alone = make(model, tmp_path / "alone", files, shard_bytes=500, holdout_every=10)
    assert alone.tokens("train").tolist() == results[0].tokens("train").tolist()


def test_a_truncated_document_frees_the_rest() -> None:
    ids, lines = np.arange(100, dtype=np.uint32), Lines()
    ((part, learned),) = work._parts(ids, None, 0, DataConfig(max_document_tokens=10), False, lines)
    assert [each.tolist() for each in part] == [[*range(10)], [0]]
    assert part[0].base is None or part[0].base.nbytes == 40
    assert learned.tolist() == [1] * 11
    assert (lines.too_long, lines.dropped) == (1, 0)


def test_a_worker_returns_samples_from_fastokens(
    specs: dict[str, TokenizerSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["The quick brown fox", "jumps", "over the lazy dog"]
    path = write_lines(tmp_path / "t.jsonl", *({"text": text} for text in texts))
    data = DataConfig(train=[path])
    (shard,) = make_plan(data, {"train": [path]}, specs["bytes"], None, 1)
    settings = work.Settings(data, 1, specs["bytes"], None, holdout_every=0)
    monkeypatch.setattr(work, "_settings", settings, raising=False)
    monkeypatch.setattr(work, "SAMPLE_EVERY", 11)
    monkeypatch.setattr(work, "SAMPLE_CHARACTERS", 15)
    own = TokenizersEncoder(specs["bytes"])

    class Wrong(work.FastokensEncoder):
        def __call__(self, text: str) -> np.ndarray:
            return super().__call__(text)[:-1]

    made = work.make_shard(shard, tmp_path / "partial", "fastokens")
    assert [text for text, _ in made.samples] == ["The quick brown", "over the lazy d"]
    assert own.find_mismatch(made.samples) is None
    monkeypatch.setattr(work, "_encoders", {"fastokens": Wrong(specs["bytes"])})
    made = work.make_shard(shard, tmp_path / "partial", "fastokens")
    assert own.find_mismatch(made.samples[1:]) == "over the lazy d"
    assert work.make_shard(shard, tmp_path / "partial", "tokenizers").samples == []


def test_a_shard_with_different_ids_is_encoded_again_with_the_tokenizer(
    model: Path,
    folders: dict[str, Path],
    specs: dict[str, TokenizerSpec],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    texts = {"one": "The quick brown fox", "two": "jumps", "validation": "over the lazy dog"}
    files = {name: [write_lines(tmp_path / f"{name}.jsonl", {"text": text})] for name, text in texts.items()}
    # fastokens is correct in the worker processes, so the comparison is made to fail for one shard.
    monkeypatch.setattr(TokenizersEncoder, "find_mismatch", lambda own, samples: {"jumps": "jumps"}.get(samples[0][0]))
    made = prepare(DataConfig(num_workers=1), files, folders["bytes"], tmp_path / "out", 1)
    assert "is encoded again with the model's tokenizer: fastokens returned other ids for 'jumps'" in caplog.text
    manifests = {shard: read_manifest(shard) for shard in (tmp_path / "out" / "shards").iterdir()}
    assert Counter(manifest["encoder"] for manifest in manifests.values()) == {"fastokens": 2, "tokenizers": 1}
    (again,) = (shard for shard, manifest in manifests.items() if manifest["encoder"] == "tokenizers")
    assert manifests[again]["encoder_note"] == "fastokens returned other ids for 'jumps'"
    own, eod = TokenizersEncoder(specs["bytes"]), specs["bytes"].eod_token
    tokens = {name: [*own(text).tolist(), eod] for name, text in texts.items()}
    assert np.fromfile(again / "train.bin", dtype=np.uint16).tolist() == tokens["two"]
    assert made.tokens("validation").tolist() == tokens["validation"]
    assert sorted(made.tokens("train").tolist()) == sorted([*tokens["one"], *tokens["two"]])
    check_folder(tmp_path / "out")


def test_chat_is_rendered_with_loss_masks(
    model: Path, folders: dict[str, Path], specs: dict[str, TokenizerSpec], tmp_path: Path
) -> None:
    chat = [
        {"role": "user", "content": "What is 2+2?"},
        {"role": "assistant", "content": "Four <|im_end|> é汉."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes"},
    ]
    lines = [{"messages": chat}, {"messages": chat[:1]}, {"messages": chat[:2]}]
    files = {"train": [write_lines(tmp_path / "c.jsonl", *lines)], "validation": [str(tmp_path / "c.jsonl")]}
    settings = {"format": DocumentFormat.chat, "learn": Learn.assistant}
    with pytest.raises(
        InputError, match=r"1 of 3 lines are invalid \(the first: .*line 2: there is no message of the "
    ):
        make(folders["bytes"], tmp_path / "strict", files, **settings)
    folder = make(folders["bytes"], tmp_path / "out", files, max_invalid_fraction=0.4, **settings)
    prefix = Path(folder.train_paths[0])
    tokens = np.fromfile(f"{prefix}.bin", dtype=np.uint16)
    mask = np.fromfile(f"{prefix}_mask.bin", dtype=np.uint8)
    own = TokenizersEncoder(specs["bytes"])

    def encoded(*parts: Sequence[Any]) -> tuple[list[int], list[int]]:
        ids = [own(text).tolist() for text, _ in parts]
        return [token for part in ids for token in part], [
            learn for part, (_, learn) in zip(ids, parts, strict=True) for _ in part
        ]

    ids, learn = encoded(
        ("<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n", 0),
        ("Four <|im_end|> é汉.<|im_end|>\n", 1),
        ("<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n", 0),
        ("Yes<|im_end|>\n", 1),
    )
    eod = specs["bytes"].eod_token
    assert tokens[: len(ids) + 1].tolist() == [*ids, eod]
    # The end of a document ends the last turn once more.
    assert mask[: len(ids) + 1].tolist() == [*learn, 0]
    two_messages = learn[: learn.index(0, learn.index(1))]
    assert mask[len(ids) + 1 :].tolist() == [*two_messages, 0]
    assert (folder.lines["documents"], folder.lines["bad"], folder.lines["dropped"]) == (4, 2, 0)
    check_folder(tmp_path / "out")


def test_documents_are_shown_and_damage_is_found(model: Path, tmp_path: Path) -> None:
    files = {"train": [write_lines(tmp_path / "t.jsonl", *({"text": text} for text in sentences(100)))]}
    out = tmp_path / "out"
    folder = make(model, out, files, shard_bytes=1000, holdout_every=10)
    texts = texts_of(folder)
    shown = document_text(out, "train", len(texts) - 1)
    assert shown.splitlines()[1] == f"{texts[-1]} <eos>"
    assert f"train document {len(texts) - 1}: number " in shown
    assert document_text(out, "validation", 0).splitlines()[1] == f"{texts_of(folder, 'validation')[0]} <eos>"
    with pytest.raises(InputError, match=rf"has no train document {len(texts)}; choose one from 0"):
        document_text(out, "train", len(texts))
    with pytest.raises(InputError, match=r"has no data.json"):
        check_folder(tmp_path)
    whole = snapshot(out)
    for name, fault in (
        ("shards/00001/train.bin", "has changed"),
        ("shards/00001/train.idx", "has changed"),
        ("validation.bin", "has changed"),
    ):
        content = bytearray(whole[name])
        content[len(content) // 2] ^= 1
        (out / name).write_bytes(content)
        with pytest.raises(InputError, match=rf"{name} {fault}"):
            check_folder(out)
        (out / name).write_bytes(whole[name][:-1])
        with pytest.raises(InputError, match=name):
            check_folder(out)
        (out / name).write_bytes(whole[name])
    check_folder(out)
