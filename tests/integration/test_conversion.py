"""Hugging Face → NeMo → Hugging Face through the real command lines for each family, and rejected inputs."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from convert.torch_dist import TorchDistReader
from convert.verify import digest
from prune_distill.model.hf_config import read_config
from prune_distill.model.hf_shape import parse_shape
from tests.helpers import tolerance
from tests.helpers.models import MODELS, write_model
from tests.helpers.tiny import convert, environment
from tests.helpers.tokenizers import sentencepiece_model
from tests.integration.conftest import SmallDisk

# NeMo's importers are wrong of Qwen3 models whose heads are not of 128, of Qwen2 models whose heads are not
# hidden_size / num_attention_heads or which are tied, and of windows; that of Qwen3's mixtures ends in an IndexError
# here (nemo/lightning/io/state.py:342). Those are compared by their logits alone.
AS_NEMO_IMPORTS: dict[str, dict[str, int]] = {
    "qwen3_untied_bf16": {"head_dim": 128},
    "qwen2": {"head_dim": 16},
    "llama2_mha": {},
    "llama31_tied": {},
    "mistral_nemo": {},
    "nemotron": {},
}


def change_side_files(name: str, folder: Path) -> None:
    """Write side files that transformers cannot save (all models) or load, as some models have them."""
    greedy = {"eos_token_id": [0, 7], "do_sample": False, "temperature": 0.6, "note": "kept as it is"}
    (folder / "generation_config.json").write_text(json.dumps(greedy))
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    if name == "qwen2":
        path.write_text(json.dumps({**config, "tokenizer_class": "TokenizersBackend"}))
    if name == "nemotron":
        path.write_text(json.dumps({**config, "extra_special_tokens": ["w3", "w4"]}))
    if name == "mistral_nemo":
        config_json = (folder / "config.json").read_text()
        for file in ("tokenizer.json", "special_tokens_map.json"):
            (folder / file).unlink()
        sentencepiece_model(folder)
        (folder / "config.json").write_text(config_json)


def side_files(folder: Path) -> dict[str, bytes]:
    """Return the files of a model's folder besides weights, their description and the model card."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    names = {str(path.relative_to(folder)): path for path in paths}
    return {name: path.read_bytes() for name, path in names.items() if name not in ("config.json", "README.md")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `hf`, `nemo` and `back` for every model."""
    root = tmp_path_factory.mktemp("conversion")
    for name in MODELS:
        write_model(name, root / name / "hf")
        change_side_files(name, root / name / "hf")
        convert("hf_to_nemo", "--hf-model", root / name / "hf", "--out", root / name / "nemo")
        source = ("--checkpoint", root / name / "nemo", "--hf-model", root / name / "hf")
        convert("nemo_to_hf", *source, "--out", root / name / "back", "--dtype", "keep")
    return root


@pytest.mark.parametrize("name", MODELS)
def test_a_round_trip_keeps_every_tensor_and_every_setting(folders: Path, name: str) -> None:
    hf, back = folders / name / "hf", folders / name / "back"
    done = convert("verify", "--no-logits", hf, back)
    assert done.stdout.endswith("all equal\n")
    config, config_back = (json.loads((folder / "config.json").read_text()) for folder in (hf, back))
    config["torch_dtype"] = config.pop("dtype", config.get("torch_dtype"))
    # Named as in transformers 5; transformers 4 omits null values of one family.
    rope = {"rope_type": "default", **(config.setdefault("rope_scaling", None) or {})}
    rope |= {key: config[key] for key in ("rope_theta", "partial_rotary_factor") if key in config}
    assert config_back == {**config, "rope_parameters": rope}
    assert side_files(back) == side_files(hf)


def check_logits(pairs: list[tuple[Path, Path]]) -> None:
    """Check that the logits of each pair agree."""
    done = run_helper("parity", *(folder for pair in pairs for folder in pair))
    found = [json.loads(line) for line in done.splitlines() if line.startswith('["')]
    assert [checkpoint for checkpoint, *_ in found] == [str(checkpoint) for _, checkpoint in pairs]
    for checkpoint, difference, largest, agreement in found:
        assert difference < tolerance.LOGITS, checkpoint
        assert largest > 1, checkpoint  # zero logits would agree, too
        assert agreement == 1, checkpoint


def run_helper(module: str, *arguments: str | Path) -> str:
    """Return the output of `python -m tests.helpers.MODULE`."""
    command = [sys.executable, "-W", "ignore", "-m", f"tests.helpers.{module}", *map(str, arguments)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_logits_match_transformers(folders: Path) -> None:
    check_logits([(folders / name / "hf", folders / name / "nemo") for name in MODELS])


AXES = {
    "depth": {"num_layers": 2},
    "hidden": {"hidden_size": 64},
    "ffn": {"ffn_hidden_size": 128},
    "heads": {"num_attention_heads": 4, "num_query_groups": 2},
    "groups": {"num_attention_heads": 3, "num_query_groups": 1},
    "together": {
        "num_layers": 2,
        "hidden_size": 64,
        "ffn_hidden_size": 128,
        "num_attention_heads": 2,
        "num_query_groups": 1,
    },
}


def test_models_pruned_by_modelopt_are_exported(folders: Path, tmp_path: Path) -> None:
    """For one family, each axis alone and all together; for the others, all together."""
    cases = [("qwen3_tied", axis) for axis in AXES]
    cases += [(name, "together") for name in ("qwen2", "llama31_tied", "mistral_nemo", "nemotron")]
    jobs = [(folders / name / "nemo", tmp_path / f"{name}_{axis}", json.dumps(AXES[axis])) for name, axis in cases]
    run_helper("prune_all", *(part for job in jobs for part in job))
    pairs = []
    for (name, axis), (_, pruned, _) in zip(cases, jobs, strict=True):
        source = ("--checkpoint", pruned, "--hf-model", folders / name / "hf")
        exported = tmp_path / f"{pruned.name}_hf"
        convert("nemo_to_hf", *source, "--out", exported, "--dtype", "keep")
        # Pruning writes the context again, with NeMo.
        assert side_files(pruned / "context" / "tokenizer") == side_files(folders / name / "hf") == side_files(exported)
        shape, before = (
            dataclasses.asdict(parse_shape(read_config(folder / "config.json")))
            for folder in (exported, folders / name / "hf")
        )
        assert shape == before | AXES[axis]
        pairs.append((exported, pruned))
    check_logits(pairs)


def test_the_command_line_compares_logits_on_a_text(folders: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(" ".join(f"w{number * 7 % 517}" for number in range(50)))
    model = folders / "llama31_tied"
    done = convert("verify", model / "hf", model / "nemo", "--text", tmp_path / "text.txt", "--digests")
    assert "tensors: 29, all equal" in done.stdout
    values = dict(pair.split(" ") for pair in done.stdout.splitlines()[-1].removeprefix("logits: ").split(", "))
    assert float(values["max_abs_diff"]) < tolerance.LOGITS
    assert float(values["top1_agreement"]) == 1
    assert abs(float(values["kl"])) < 1e-6
    assert len([line for line in done.stdout.splitlines() if line.endswith(".weight")]) == 29


def test_checkpoints_equal_those_of_nemos_own_importer(folders: Path, tmp_path: Path) -> None:
    """Every key, shape, type, chunk and number."""
    for name, settings in AS_NEMO_IMPORTS.items():
        write_model(name, tmp_path / name / "hf", **settings)
        convert("hf_to_nemo", "--hf-model", tmp_path / name / "hf", "--out", tmp_path / name / "ours")
    run_helper("nemo_importer", *(tmp_path / name / kind for name in AS_NEMO_IMPORTS for kind in ("hf", "theirs")))
    for name in AS_NEMO_IMPORTS:
        ours, theirs = (TorchDistReader(tmp_path / name / made / "weights") for made in ("ours", "theirs"))
        assert ours.tensors.keys() == theirs.tensors.keys(), name
        for key, tensor in theirs.tensors.items():
            own = ours.tensors[key]
            assert (own.dtype, own.shape) == (tensor.dtype, tensor.shape), (name, key)
            assert {(c.offsets, c.sizes) for c in own.chunks} == {(c.offsets, c.sizes) for c in tensor.chunks}, key
        numbers = [
            digest({str(index): reader.tensor(*index) for index in _matrices(theirs)}) for reader in (ours, theirs)
        ]
        assert numbers[0] == numbers[1], name
        # The real Transformer Engine also has an empty one for attention.
        their_objects = {chunk.key for chunk in theirs.objects if "core_attention" not in chunk.key}
        assert {chunk.key for chunk in ours.objects} == their_objects, name


def _matrices(reader: TorchDistReader) -> list[tuple[str | int, ...]]:
    """List the matrices of a checkpoint: key, layer and expert."""
    found: list[tuple[str | int, ...]] = []
    for key, tensor in reader.tensors.items():
        depth = 0 if "decoder.layers." not in key else 2 if ".experts.experts." in key else 1
        indices: list[tuple[int, ...]] = [()]
        for extent in tensor.shape[:depth]:
            indices = [(*index, place) for index in indices for place in range(extent)]
        found += [(key, *index) for index in indices]
    return found


@pytest.mark.parametrize("split", ["rows", "columns", "layers"])
def test_a_checkpoint_saved_by_several_ranks_is_read(folders: Path, tmp_path: Path, split: str) -> None:
    """Written by Megatron on several ranks: tensor parallel along both axes, and pipeline parallel."""
    from tests.helpers.ranks import run_ranks
    from tests.helpers.resave import save_parts

    weights = folders / "qwen3_tied" / "nemo" / "weights"
    run_ranks(save_parts, 2, weights, tmp_path / "weights", split)
    before, after = TorchDistReader(weights), TorchDistReader(tmp_path / "weights")
    key = "module.decoder.layers.mlp.linear_fc2.weight"
    assert len(after.tensors[key].chunks) == (3 if split == "layers" else 6)
    for layer in range(3):
        numbers = [digest({"": reader.tensor(key, layer)}) for reader in (before, after)]
        assert numbers[0] == numbers[1]


def test_a_checkpoint_without_a_parameter_is_rejected(folders: Path, tmp_path: Path) -> None:
    """Lenient loading would silently keep random initial values."""
    hf, nemo = (folders / "qwen3_untied_bf16" / kind for kind in ("hf", "nemo"))
    key = "module.decoder.final_layernorm.weight"
    broken = tmp_path / "broken"
    (broken / "weights").mkdir(parents=True)
    (broken / "context").symlink_to(nemo / "context")
    for path in (nemo / "weights").iterdir():
        if path.name != ".metadata":
            (broken / "weights" / path.name).symlink_to(path)
    content = (nemo / "weights" / ".metadata").read_bytes()
    other = key.replace("final", "fimal")
    (broken / "weights" / ".metadata").write_bytes(content.replace(key.encode(), other.encode()))
    done = convert("nemo_to_hf", "--checkpoint", broken, "--hf-model", hf, "--out", tmp_path / "out", check=False)
    assert done.returncode == 2
    assert f"error: {broken / 'weights'} has no tensor {key}" in done.stderr
    assert not (tmp_path / "out").exists()
    loaded = restore(broken)
    assert loaded.returncode != 0
    assert key in loaded.stderr


def restore(checkpoint: Path) -> subprocess.CompletedProcess[str]:
    """Load a checkpoint with NeMo, in a separate process."""
    program = (
        "import sys\nfrom pathlib import Path\nfrom prune_distill.nemo import backend\nbackend.activate()\n"
        "from prune_distill.nemo import nemo_api\nnemo_api.restore(Path(sys.argv[1]))"
    )
    command = [sys.executable, "-W", "ignore", "-c", program, str(checkpoint)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)


def test_a_changed_byte_of_a_checkpoint_is_detected_by_all_readers(folders: Path, tmp_path: Path) -> None:
    """torch.load silently returns the wrong number."""
    hf, nemo = (folders / "qwen3_untied_bf16" / kind for kind in ("hf", "nemo"))
    damaged = tmp_path / "damaged"
    shutil.copytree(nemo, damaged)
    chunk = TorchDistReader(damaged / "weights").tensor("module.decoder.final_layernorm.weight").rows[0].spans[0]
    content = bytearray(chunk.file.read_bytes())
    content[chunk.offset] ^= 1
    chunk.file.write_bytes(content)
    fault = f"{chunk.file} is damaged: the CRC-32 of module.decoder.final_layernorm.weight"
    for command in (
        ("nemo_to_hf", "--checkpoint", damaged, "--hf-model", hf, "--out", tmp_path / "out"),
        ("verify", "--no-logits", hf, damaged),
    ):
        done = convert(*command, check=False)
        assert done.returncode == 2
        assert fault in done.stderr
    assert not (tmp_path / "out").exists()
    loaded = restore(damaged)
    assert loaded.returncode != 0
    assert fault in loaded.stderr


def test_a_full_disk_is_reported_in_one_message(folders: Path, small_disk: SmallDisk) -> None:
    hf, nemo = (folders / "qwen3_untied_bf16" / kind for kind in ("hf", "nemo"))
    for command in (
        ("hf_to_nemo", "--hf-model", hf),
        ("nemo_to_hf", "--hf-model", hf, "--checkpoint", nemo),
    ):
        out = small_disk("256k") / "out"
        done = convert(*command, "--out", out, check=False)
        assert done.returncode == 2, done.stderr
        assert "error: no space left" in done.stderr
        assert "free some space and run again" in done.stderr
        assert not out.exists()


@pytest.mark.usefixtures("real_start")
@pytest.mark.parametrize("module", ["hf_to_nemo", "nemo_to_hf"])
def test_a_killed_conversion_leaves_no_partial_files_and_can_be_repeated(
    folders: Path, tmp_path: Path, module: str
) -> None:
    hf, nemo = (folders / "qwen3_tied" / kind for kind in ("hf", "nemo"))
    out = tmp_path / "out"
    arguments = ["--hf-model", hf, "--out", out, *(["--checkpoint", nemo] if module == "nemo_to_hf" else [])]
    command = [sys.executable, "-m", f"convert.{module}", *map(str, arguments)]
    for delay in (0.3, 0.6, 0.9, 1.2):
        process = subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        ended = process.wait() == 0
        assert ended or not out.exists() or _whole(out)
    convert(module, *arguments)
    assert _whole(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def _whole(folder: Path) -> bool:
    return (folder / "weights" / ".metadata").exists() or (folder / "config.json").exists()


def cut(folder: Path) -> str:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1000)
    return "model.safetensors is truncated: it ends within"


def damage_header(folder: Path) -> str:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[8:20] = b"notjsonatall"
    path.write_bytes(content)
    return "model.safetensors has a damaged header"


def rename_tensor(folder: Path) -> str:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + length].replace(b"layers.1.self_attn.k_proj", b"layers.1.self_attn.x_proj")
    path.write_bytes(content[:8] + header + content[8 + length :])
    return "it lacks model.layers.1.self_attn.k_proj.weight, which config.json describes"


def spoil_number(folder: Path) -> str:
    """Set the first number of the last tensor in an fp32 file to NaN."""
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    entries = json.loads(content[8 : 8 + length])
    last = max((name for name in entries if name != "__metadata__"), key=lambda name: entries[name]["data_offsets"])
    begin = 8 + length + entries[last]["data_offsets"][0]
    content[begin : begin + 4] = struct.pack("<f", float("nan"))
    path.write_bytes(content)
    return f"{last} (1 NaN or infinite)"


def rename_shard(folder: Path) -> str:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    return "model-00001-of-00001.safetensors is not called model.safetensors"


def settings(**values: object) -> None:
    def change(folder: Path) -> str:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **values}))
        return next(iter(values))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut, ""),
        (damage_header, ""),
        (rename_tensor, ""),
        (spoil_number, ""),
        (rename_shard, ""),
        (settings(model_type="bert"), 'model_type="bert": not a supported family'),
        (settings(use_sliding_window=True), "use_sliding_window=true: only some of the layers would have windows"),
        (settings(rope_scaling={"rope_type": "yarn", "factor": 4.0}), 'rope_scaling.rope_type="yarn": '),
        (settings(quantization_config={"quant_method": "fp8"}), "quantization_config: "),
        (settings(attention_bias=True), "attention_bias=true: "),
        (settings(num_hidden_layers=10**9), "num_hidden_layers=1000000000: "),
        (settings(hidden_size=128), "model.embed_tokens.weight [517, 96] (config.json: [517, 128])"),
    ],
)
def test_models_that_cannot_be_converted_are_reported(
    folders: Path, tmp_path: Path, change: object, message: str
) -> None:
    source = tmp_path / "hf"
    shutil.copytree(folders / "qwen3_tied" / "hf", source)
    expected = change(source)  # type: ignore[operator]
    done = convert("hf_to_nemo", "--hf-model", source, "--out", tmp_path / "nemo", check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert (message or expected) in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
