"""The conversion of a teacher that is not the model that is pruned."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from convert import hf_to_nemo
from launch.planning.automatic import compose
from prune_distill.errors import InputError
from tests.helpers.models import write_model


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf_to_nemo") / "teacher"
    write_model("llama2_mha", folder)
    return folder


def convert(teacher: Path, student: Path, out: Path) -> Path:
    cfg = compose(["experiment=demo"])
    hf_to_nemo.run(cfg, hf_to_nemo.Inputs(teacher, student), out)
    return out


def test_a_teacher_with_the_students_tokenizer_is_converted(teacher: Path, tmp_path: Path) -> None:
    student = tmp_path / "student"
    student.mkdir()
    shutil.copy(teacher / "tokenizer.json", student)
    assert (convert(teacher, student, tmp_path / "out") / "nemo" / "weights").is_dir()


def test_another_tokenizer_is_refused_before_anything_is_written(teacher: Path, tmp_path: Path) -> None:
    student = tmp_path / "student"
    student.mkdir()
    tokenizer = json.loads((teacher / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {"w40": 41, "w41": 40, "more": 600}
    (student / "tokenizer.json").write_text(json.dumps(tokenizer))
    message = r"in the ids 40 \('w41' and 'w40'\), 41 \('w40' and 'w41'\), 600 \('more' and nothing\);"
    with pytest.raises(InputError, match=message):
        convert(teacher, student, tmp_path / "out")
    assert not (tmp_path / "out" / "nemo").exists()


def test_a_tokenizer_beyond_the_teachers_vocabulary_is_refused(teacher: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["more"] = 517
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match="id 517, but its config.json a vocab_size of 517"):
        convert(other, other, tmp_path / "out")
