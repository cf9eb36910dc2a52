"""Teachers by source of the data, through the real command line: each sequence is taught by its source's teacher."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prune_distill.distillation.cached_logits import CachedLogitsReader
from tests.helpers import teachers, tiny, tolerance
from tests.helpers.ranks import run_ranks

TP2 = ("cluster.devices_per_node=2", "distill.parallel.tensor_model_parallel_size=2")
TOP_K = 16
CACHED = ("distill.teacher_logits=cached", f"distill.cached_logits_top_k={TOP_K}")
SEQUENCES = tiny.DISTILL["max_steps"] * tiny.DISTILL["global_batch_size"]
# Rows of the smallest vocabulary: those of the student and the teachers are 540, 530 and 522.
SHARED = 522
# fp16 moves a log-probability by up to half of 2^-7 between -16 and -8, and sums in another order by less than that.
ONE_STEP = 2**-7


@dataclass(frozen=True)
class Models:
    """Folders of the model that is pruned and of two teachers, of three shapes; a file of documents of each source."""

    pruned: Path
    teachers: dict[str, Path]
    corpus: Path
    documents: dict[str, Path]

    def overrides(self, run_dir: Path, taught: dict[str, Path], *more: str) -> list[str]:
        """The command line of a run; `taught`: the teacher of each source that has one of its own."""
        sources = [
            f"{name}: {{files: [{file}], weight: {weight}"
            + (f", teacher: {{hf_path: {taught[name]}}}}}" if name in taught else "}")
            for (name, file), weight in zip(self.documents.items(), (2, 1, 1), strict=True)
        ]
        arguments = teachers.overrides(run_dir, self.pruned, self.corpus, *CACHED, *more)
        plain = [argument for argument in arguments if not argument.startswith("data.train=")]
        return [*plain, f"data.sources={{{', '.join(sources)}}}"]


@pytest.fixture(scope="module")
def models(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Models:
    """A Qwen3 model of 540 ids, taught by itself, a deeper and wider Llama of 530 ids, and the demo's model of 522."""
    demo = tiny.stages(finished, *tiny.DEPTH)["demo_model"].folder
    folder = tmp_path_factory.mktemp("source_teachers")
    trained = teachers.train_models(demo, folder)
    lines = (trained.corpus / "train.jsonl").read_text().splitlines(keepends=True)
    documents = {name: folder / f"{name}.jsonl" for name in ("web", "code", "math")}
    for number, file in enumerate(documents.values()):
        file.write_text("".join(lines[number::3]))
    return Models(trained.qwen, {"code": trained.llama, "math": demo / "hf"}, trained.corpus, documents)


@pytest.fixture(scope="module")
def complete(models: Models, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command line of a complete run: `web` is taught by the model that is pruned, the others by their own."""
    arguments = models.overrides(tmp_path_factory.mktemp("complete") / "run", models.teachers)
    teachers.launch(arguments)
    return arguments


def copy(arguments: list[str], target: Path, *more: str) -> list[str]:
    """Copy a run without its distillation, and return its command line with more overrides."""
    (source,) = [Path(value.partition("=")[2]) for value in arguments if value.startswith("run_dir=")]
    tiny.copy_run(source, target)
    return [*(value for value in arguments if not value.startswith("run_dir=")), f"run_dir={target}", *more]


def distill(arguments: list[str]) -> list[float]:
    teachers.launch(arguments, "--until", "distill")
    return tiny.losses(teachers.stages(arguments)["distill"].folder)


def training_sequences(data: Path, out: Path, cfg: Any) -> Any:
    """The tokens of each sequence of a distillation, and its source."""
    from prune_distill.nemo import backend

    backend.activate()
    from prune_distill.data.folder import DataFolder
    from prune_distill.training.batches import Batches
    from tests.helpers.one_rank import TOKENIZER

    batches = Batches(TOKENIZER, DataFolder.read(data), out, cfg.distill, cfg.seed)
    dataset = batches.sequences(0)
    names, parts = batches.sources(dataset, 0)
    return [(dataset[number]["tokens"].tolist(), names[parts[number]]) for number in range(SEQUENCES)]


def test_each_cache_holds_the_sequences_of_its_sources_as_its_teacher_predicts_them(
    complete: list[str], models: Models, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    located = teachers.stages(complete)
    distillation = located["distill"]
    (found,) = run_ranks(training_sequences, 1, distillation.inputs["data"], tmp_path / "index", distillation.cfg)
    # Half of the weights and a quarter each, to a sequence.
    assert [sum(source == name for _, source in found) for name in models.documents] == [12, 6, 6]
    caches = {"web": "cached_logits", "code": "source_teacher1", "math": "source_teacher2"}
    for source, teacher in {"web": models.pruned, **models.teachers}.items():
        reader = CachedLogitsReader(distillation.inputs[caches[source]])
        tokens = np.array([tokens for tokens, own in found if own == source])
        assert (reader.description.sequences, reader.description.vocab_size) == (len(tokens), SHARED)
        cached = [reader.read(place, sequence) for place, sequence in enumerate(tokens)]
        model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens)).logits[..., :SHARED].double()
        exact = logits.log_softmax(-1)
        best = exact.topk(TOP_K, -1).values
        ids = torch.from_numpy(np.stack([one.ids for one in cached])).long()
        np.testing.assert_allclose(np.stack([one.logprobs for one in cached]), best, atol=ONE_STEP)
        # Tokens of equal probability in fp32 may be swapped.
        np.testing.assert_allclose(exact.gather(-1, ids), best, atol=1e-4)
        tail = torch.log1p(-best.exp().sum(-1))
        np.testing.assert_allclose(np.stack([one.tail for one in cached]), tail, atol=1e-4)


def test_the_report_and_the_card_name_the_teachers_by_source(complete: list[str], models: Models) -> None:
    located = teachers.stages(complete)
    assert [name for name in located if ".source_teacher" in name] == [
        *(f"{stage}.source_teacher{number}" for number in (1, 2) for stage in ("hf_to_nemo", "verify_import")),
        *(f"cache_logits.source_teacher{number}" for number in (1, 2)),
    ]
    run_dir = located["report"].folder.parent
    report = tiny.report(run_dir)
    assert list(report["models"]) == ["teacher", "pruned", "student"]
    taught = f"{models.teachers['code']} for code; {models.teachers['math']} for math."
    page = (run_dir / "report" / "index.html").read_text()
    assert f"The teachers by source of the data are the model that is pruned for web; {taught}" in page
    card = (run_dir / report["models"]["student"]["hf_path"] / "README.md").read_text()
    assert f"The teachers by source of the data were the model that is pruned for web; {taught}" in card
    for number in (1, 2):
        assert report["checks"][f"source_teacher{number}_import_max_abs_logit_diff"] < tolerance.LOGITS
    assert "Source teacher 2, after import" in page


def test_one_teacher_named_for_all_sources_is_the_teacher_of_the_run(models: Models, tmp_path: Path) -> None:
    llama = models.teachers["code"]
    named = distill(models.overrides(tmp_path / "named", dict.fromkeys(models.documents, llama)))
    of_run = distill(models.overrides(tmp_path / "of_run", {}, f"teacher.hf_path={llama}"))
    assert named == of_run


def test_tensor_parallel_ranks_give_the_losses_of_one(complete: list[str], tmp_path: Path) -> None:
    """Of caches from one rank, which do not depend on the layout, and from two."""
    one_rank = tiny.losses(teachers.stages(complete)["distill"].folder)
    arguments = copy(complete, tmp_path / "read", *TP2)
    assert distill(arguments) == pytest.approx(one_rank, abs=tolerance.LOSS)
    # One of the teachers in a layout of its own.
    own = "data.sources.code.teacher.parallel={pipeline_model_parallel_size: 2}"
    again = [*(argument for argument in arguments if not argument.startswith("run_dir=")), own]
    # fp16 moves a log-probability by 5e-4 nats in the mean, to both sides.
    assert distill([*again, f"run_dir={tmp_path / 'made'}"]) == pytest.approx(one_rank, rel=0, abs=1e-4)


def test_whole_documents_in_each_sequence(complete: list[str], tmp_path: Path) -> None:
    losses = distill(copy(complete, tmp_path / "run", "distill.packing=documents"))
    assert losses[-1] < losses[0]


@pytest.mark.usefixtures("real_start")
def test_a_killed_training_resumes(complete: list[str], tmp_path: Path) -> None:
    arguments = copy(complete, tmp_path / "run")
    folder = teachers.kill_and_resume(arguments)
    whole = tiny.losses(teachers.stages(complete)["distill"].folder)
    assert tiny.losses(folder) == pytest.approx(whole, abs=tolerance.RESUMED)


def test_bad_teachers_are_refused_before_anything_starts(models: Models, tmp_path: Path) -> None:
    other = tmp_path / "other"
    subprocess.run(["cp", "-r", models.teachers["code"], other], check=True)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = (token for token, id_ in vocabulary.items() if id_ in (300, 301))
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    arguments = models.overrides(
        tmp_path / "run", {"code": other, "math": tmp_path / "nowhere"}, "distill.teacher_logits=live"
    )
    refused = teachers.launch(arguments, check=False)
    assert refused.returncode == 2
    assert f"data.sources.math.teacher.hf_path={tmp_path}/nowhere" in refused.stderr
    arguments = models.overrides(tmp_path / "run", {"code": other}, "distill.teacher_logits=live")
    refused = teachers.launch(arguments, check=False)
    assert refused.returncode == 2
    assert "data.sources.code.teacher.hf_path" in refused.stderr
    assert "differ in the ids 300 (" in refused.stderr
    assert "set distill.teacher_logits=cached" in refused.stderr
    assert not (tmp_path / "run").exists()
