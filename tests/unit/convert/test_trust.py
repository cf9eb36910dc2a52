"""Checkpoints with code are rejected, and their code is not run."""

from __future__ import annotations

import argparse
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from convert import verify
from convert.nemo_context import Call, Reference, model_call, write_context
from convert.torch_dist import TorchDistWriter
from convert.trust import refuse_code
from prune_distill.errors import InputError
from tests.helpers.dcp_metadata import read_metadata

QWEN3 = "nemo.collections.llm.gpt.model.qwen3"


def write(checkpoint: Path, **config: Any) -> Path:
    """Write a safe checkpoint without tensors, with more arguments of its config."""
    (checkpoint / "context").mkdir(parents=True)
    config |= {
        "num_layers": 3,
        "params_dtype": Reference("torch", "bfloat16"),
        # As recorded by NeMo's importers.
        "generation_config": Call(
            Reference("nemo.lightning.io.artifact.hf_auto", "from_pretrained"),
            {
                "auto_cls": Reference("transformers.generation.configuration_utils", "GenerationConfig"),
                "pretrained_model_name_or_path": "./artifacts",
            },
        ),
    }
    write_context(
        checkpoint / "context",
        model_call(Reference(QWEN3, "Qwen3Model"), Call(Reference(QWEN3, "Qwen3Config"), config)),
    )
    writer = TorchDistWriter()
    writer.add_object("module.mlp._extra_state/shard_0_1", [None])
    writer.write(checkpoint / "weights", {"epoch": 0}, threads=1)
    return checkpoint


class Evil:
    """Runs a command when it is unpickled."""

    command = ""

    def __reduce__(self) -> Any:
        return os.system, (Evil.command,)


@pytest.fixture
def evil_marker(tmp_path: Path) -> Path:
    """The file that exists if malicious code has run."""
    marker = tmp_path / "ran"
    Evil.command = f"touch {marker}"
    pickle.loads(pickle.dumps(Evil()))
    assert marker.exists()  # the code works
    marker.unlink()
    return marker


def test_a_safe_checkpoint_passes(tmp_path: Path) -> None:
    refuse_code(write(tmp_path / "nemo"))


def test_states_of_transformer_engine_and_a_trainer_pass(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "nemo")
    plugin = {
        "type": "pyref",
        "module": "nemo.lightning.pytorch.plugins.mixed_precision",
        "name": "MegatronMixedPrecision",
    }
    add_objects(checkpoint, plugin={"type": plugin, "items": [["IdentityElement()", "0f3a"]], "metadata": None})
    # The pickle of such a plugin, without importing NeMo: its class, a type of torch, and its settings.
    made = b"c" + plugin["module"].encode() + b"\nMegatronMixedPrecision\n)\x81"
    state = b"}X\x05\x00\x00\x00dtypectorch\nbfloat16\nsb."
    (checkpoint / "context" / "0f3a").write_bytes(b"\x80\x02" + made + state)
    refuse_code(checkpoint)


def test_metadata_pickled_by_torch_passes(tmp_path: Path) -> None:
    """With everything that Megatron's writer stores except its own class (filesystem_async.py:496)."""
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        StorageMeta,
        TensorProperties,
        TensorStorageMetadata,
    )
    from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

    checkpoint = write(tmp_path / "nemo")
    properties = TensorProperties(dtype=torch.bfloat16)
    chunk = ChunkStorageMetadata(torch.Size([0]), torch.Size([2]))
    item = WriteItem(MetadataIndex("w"), WriteItemType.TENSOR, None, TensorWriteData(chunk, properties, chunk.sizes))
    metadata = Metadata({"w": TensorStorageMetadata(properties, chunk.sizes, [chunk])}, [SavePlan([item])], {})
    metadata.storage_meta = StorageMeta(checkpoint / "weights")
    (checkpoint / "weights" / ".metadata").write_bytes(pickle.dumps(metadata))
    refuse_code(checkpoint)


def add_objects(checkpoint: Path, **objects: Any) -> None:
    path = checkpoint / "context" / "io.json"
    content = json.loads(path.read_text())
    content["objects"] |= objects
    path.write_text(json.dumps(content))


def in_metadata(name: str) -> Callable[[Path], None]:
    """Call `name` before the description is read, and drop the result, in the pickle format of Python 3.4."""

    def change(checkpoint: Path) -> None:
        path = checkpoint / "weights" / ".metadata"
        module, _, function = name.partition(":")
        argument = Evil.command.encode()
        call = f"c{module}\n{function}\n(X".encode() + len(argument).to_bytes(4, "little") + argument + b"tR0"
        path.write_bytes(b"\x80\x04" + call + path.read_bytes())

    return change


def in_common(checkpoint: Path) -> None:
    torch.save({"epoch": Evil()}, checkpoint / "weights" / "common.pt")


def in_extra_state(checkpoint: Path) -> None:
    """Replace the object in `__0_0.distcp` by one of `torch.save`, of which the description covers the beginning."""
    (checkpoint / "weights" / "__0_0.distcp").unlink()
    torch.save([Evil()], checkpoint / "weights" / "__0_0.distcp")

    metadata = read_metadata(checkpoint / "weights")
    (place,) = metadata.storage_data.values()
    place.length = (checkpoint / "weights" / "__0_0.distcp").stat().st_size
    (checkpoint / "weights" / ".metadata").write_bytes(pickle.dumps(metadata))


def in_modelopt_state(checkpoint: Path) -> None:
    """Also behind a link, because reading follows links."""
    elsewhere = checkpoint.parent / "elsewhere"
    elsewhere.mkdir()
    torch.save([Evil()], elsewhere / "common.pt")
    (checkpoint / "weights" / "modelopt_state").symlink_to(elsewhere)


def as_a_plugin(name: str) -> Callable[[Path], None]:
    def change(checkpoint: Path) -> None:
        plugin = {"type": "pyref", "module": f"{QWEN3}", "name": "Qwen3Config"}
        add_objects(
            checkpoint, plugin={"type": plugin, "items": [["", {"type": "leaf", "value": name}]], "metadata": None}
        )
        (checkpoint / "context" / name).write_bytes(pickle.dumps(Evil()))

    return change


def type_alone(checkpoint: Path) -> None:
    add_objects(
        checkpoint, more={"type": {"type": "leaf", "module": "stranger", "name": "x"}, "items": [["", 1], ["", 2]]}
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (in_metadata("os:system"), r"\.metadata names os\.system"),
        (in_metadata("torch.distributed.checkpoint.filesystem:os.system"), r"names torch\.\S+\.os\.system"),
        (in_metadata("torch.distributed.checkpoint.format_utils:torch_save_to_dcp"), "names .*torch_save_to_dcp"),
        (in_metadata("torch.distributed.checkpoint.planner:SavePlan.mro"), r"names .*SavePlan\.mro"),
        (in_common, r"common\.pt names (posix|os)\.system"),
        (in_extra_state, r"__0_0\.distcp names (posix|os)\.system"),
        (in_modelopt_state, r"common\.pt names (posix|os)\.system"),
        (as_a_plugin("0f3a"), r"context/0f3a names (posix|os)\.system"),
        (as_a_plugin("../0f3a"), r"reads '\.\./0f3a' as a pickle"),
        (type_alone, r"not in NeMo.s format|names stranger\.x"),
    ],
)
def test_code_is_rejected_and_never_run(
    tmp_path: Path, evil_marker: Path, change: Callable[[Path], None], message: str
) -> None:
    checkpoint = write(tmp_path / "nemo")
    change(checkpoint)
    with pytest.raises(InputError, match=message):
        refuse_code(checkpoint)
    assert not evil_marker.exists()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (Call(Reference("os", "system"), {"command": "touch /tmp/ran"}), r"context/io\.json names os\.system"),
        (Call(Reference("stranger.models", "Model"), {}), r"names stranger\.models\.Model"),
        (Reference("nemo.collections.llm.gpt.model.qwen3.torch", "load"), r"names \S+\.torch\.load"),
        (Call(Reference(QWEN3, "Qwen3Config"), {"trust_remote_code": True}), "asks for trust_remote_code"),
        # Names with the beginning or end of safe ones.
        (Reference("torch", "float32.fromfile"), r"names torch\.float32\.fromfile"),
        (Reference("torch.nn.functional", "silu_of_a_stranger"), "names .*silu_of_a_stranger"),
        (Reference("builtins", "dict.__class__"), r"names builtins\.dict\.__class__"),
        (Reference("stranger.torch", "float32"), r"names stranger\.torch\.float32"),
    ],
)
def test_a_context_with_other_names_is_rejected(tmp_path: Path, argument: Any, message: str) -> None:
    checkpoint = write(tmp_path / "nemo", more=argument)
    with pytest.raises(InputError, match=rf"would run code: .*{message}.*--trust-source"):
        refuse_code(checkpoint)


@pytest.mark.parametrize("content", [b"", b"no zip file", pickle.dumps(1)])
def test_a_damaged_pickle_is_reported(tmp_path: Path, content: bytes) -> None:
    checkpoint = write(tmp_path / "nemo")
    (checkpoint / "weights" / "common.pt").write_bytes(content)
    with pytest.raises(InputError, match=r"common\.pt is damaged or not written by torch\.save"):
        refuse_code(checkpoint)


@pytest.mark.parametrize(("trusted", "asked"), [(False, 1), (True, 0)])
def test_verify_asks_unless_the_source_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trusted: bool, asked: int
) -> None:
    checkpoint = write(tmp_path / "nemo")
    seen: list[Path] = []
    monkeypatch.setattr(verify, "refuse_code", seen.append)
    monkeypatch.setattr(verify, "compare_tensors", lambda *_: (_ for _ in ()).throw(InputError("far enough")))
    args = argparse.Namespace(
        folders=[checkpoint, tmp_path], tokens=8, no_logits=False, trust_source=trusted, digests=False
    )
    with pytest.raises(InputError, match="far enough"):
        verify.verify(args)
    assert seen == [checkpoint] * asked
