"""Models of real layer shapes with random weights, cut to what one GPU holds, and runs that distill them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from launch.planning.automatic import MARGIN, compose
from launch.planning.memory import fullest
from launch.planning.plan import stage_memory
from prune_distill.config.values import replace_values
from prune_distill.data import demo_corpus
from prune_distill.model.hf_weights import expected_shapes
from prune_distill.nemo import devices
from prune_distill.schema import RunConfig
from prune_distill.units import GIB
from tests.benchmarks.gpu.machine import gpu_choice

MICRO_BATCHES = (4, 2, 1)
SEQ_LENGTHS, TOY_LENGTH = (4096, 2048, 1024), 64
# Sequences of a step. Those of real runs are larger, so that the optimizer's share of the time is smaller there.
GLOBAL_BATCH = 8
TOKENIZER_SIZE = 4096
# A model with fewer layers than this shows nothing: one is dropped, and the loss would dwarf the others.
LEAST_LAYERS = 3


@dataclass(frozen=True)
class Model:
    """A teacher, of whose layers a third is dropped.

    Attributes:
        experiment: whose settings are used.
        layers: the most that are tried. Fewer than the 8B model has, whose files are written and read several times.
        at_least: layers without which a smaller micro batch is tried first.
    """

    name: str
    experiment: str
    layers: int
    at_least: int
    sizes: dict[str, int | bool]

    @property
    def overrides(self) -> list[str]:
        return [f"model.shape.{key}={str(value).lower()}" for key, value in self.sizes.items()]


_QWEN3: dict[str, int | bool] = {
    "hidden_size": 1024,
    "ffn_hidden_size": 3072,
    "num_attention_heads": 16,
    "num_query_groups": 8,
    "kv_channels": 128,
    "vocab_size": 151_936,
    "max_position_embeddings": 40_960,
    "tie_word_embeddings": True,
}
_QWEN3_8B = {"hidden_size": 4096, "ffn_hidden_size": 12_288, "num_attention_heads": 32, "tie_word_embeddings": False}
SMALL = Model("qwen3_0_6b", "qwen3_0_6b_one_gpu", 28, 28, _QWEN3)
BIG = Model("qwen3_8b_cut", "qwen3_8b_to_6b_depth", 12, LEAST_LAYERS, _QWEN3 | _QWEN3_8B)
_TOY: dict[str, int | bool] = {
    "hidden_size": 64,
    "ffn_hidden_size": 128,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 24,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
}


def as_toy(model: Model) -> Model:
    """The same model at a size for a CPU."""
    return dataclasses.replace(
        model, layers=4, at_least=4, sizes=_TOY | {"tie_word_embeddings": model.sizes["tie_word_embeddings"]}
    )


@dataclass(frozen=True)
class Run:
    """A run that distills a model.

    Attributes:
        gpu: its name in `conf/cluster/gpu`; None: another, for which no peak is known.
        free: bytes of the GPU for which the following were chosen.
        layers: of the teacher.
        micro_batches: sizes that fit, the largest first.
    """

    model: Model
    folder: Path
    gpu: str | None
    free: int
    layers: int
    seq_length: int
    micro_batches: tuple[int, ...]
    toy: bool

    @property
    def kept(self) -> int:
        return self.layers - self.layers // 3

    def overrides(self, micro_batch_size: int, *more: str) -> list[str]:
        """The command line. Nothing is `auto`; no checkpoint is written; losses may do what they like."""
        training = {
            "max_steps": 1000,
            "seq_length": self.seq_length,
            "global_batch_size": GLOBAL_BATCH,
            "micro_batch_size": micro_batch_size,
            "recompute": "none",
            **dict.fromkeys((f"parallel.{name}_model_parallel_size" for name in ("tensor", "pipeline", "expert")), 1),
            "parallel.context_parallel_size": 1,
            "warmup_steps": 0,
            "max_loss_ratio": "null",
            "log_every_n_steps": 1000,
            **dict.fromkeys(("val_every_n_steps", "save_every_n_steps"), 100_000),
            "val_batches": 1,
        }
        return [
            *(f"experiment={self.model.experiment}", "cluster=one_gpu_24gb", f"cluster.gpu={self.gpu or 'null'}"),
            *(f"name={self.model.name}", f"run_dir={self.folder / 'run'}", f"model.hf_path={self.folder / 'hf'}"),
            *(*self.model.overrides, f"model.shape.num_layers={self.layers}"),
            *("data=jsonl", f"data.train=[{self.folder / 'text.jsonl'}]", "data.holdout_every=20"),
            *("prune.num_layers=null", f"prune.drop_layers={[*range(self.kept, self.layers)]}".replace(" ", "")),
            *("prune.micro_batch_size=1", "prune.pipeline_model_parallel_size=1", "prune.calibration_seq_length=64"),
            *("evaluate=default", "evaluate.tasks=[]", "evaluate.verify_tokens=0", "benchmark.enabled=false"),
            *(f"distill.{key}={value}" for key, value in training.items()),
            *more,
        ]


def choose(model: Model, folder: Path, gpu: str | None, free: int, toy: bool = False) -> Run | None:
    """Return the largest run whose memory by the plan is below `free` bytes; None where none is.

    First with a micro batch of 4 sequences, then with smaller ones, then with shorter sequences; of `at_least` layers
    first, and then with fewer.
    """
    most = Run(model, folder, gpu, free, model.layers, TOY_LENGTH if toy else SEQ_LENGTHS[0], MICRO_BATCHES, toy)
    for at_least in sorted({model.at_least, LEAST_LAYERS}, reverse=True):
        for run in _smaller(most):
            if run.layers >= at_least and planned_bytes(run) <= free:
                return run
    return None


def _smaller(most: Run) -> Iterator[Run]:
    for seq_length in SEQ_LENGTHS if most.seq_length in SEQ_LENGTHS else (most.seq_length,):
        for micro_batch in MICRO_BATCHES:
            below = tuple(size for size in MICRO_BATCHES if size <= micro_batch)
            for layers in range(most.layers, LEAST_LAYERS - 1, -1):
                yield dataclasses.replace(most, layers=layers, seq_length=seq_length, micro_batches=below)


def planned_bytes(run: Run) -> int:
    """Return the memory of the fullest stage by the plan, the reserve included."""
    cfg = replace_values(
        _compose_once(run),
        {
            "model.shape.num_layers": run.layers,
            "prune.drop_layers": [*range(run.kept, run.layers)],
            "distill.seq_length": run.seq_length,
            "distill.micro_batch_size": run.micro_batches[0],
        },
    )
    return max(fullest(memory).total for memory in stage_memory(cfg).values())


_composed: dict[str, RunConfig] = {}


def _compose_once(run: Run) -> RunConfig:
    """Compose the config of a model's run: Hydra takes half a second."""
    if run.model.name not in _composed:
        _composed[run.model.name] = compose(run.overrides(1), for_plan=True)
    return _composed[run.model.name]


def prepare(model: Model, folder: Path, toy: bool) -> Run | None:
    """Choose the sizes for the memory that is free, and write the model; None where nothing fits.

    In a process of its own, as this uses the GPU: the caller's memory on it would count in later measurements.
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_prepare, model, folder, toy).result()


def _prepare(model: Model, folder: Path, toy: bool) -> Run | None:
    cuda = devices.torch_device() == "cuda"
    # On a CPU as many bytes as a toy needs.
    free = round((1 - MARGIN) * devices.free_memory_bytes()) if cuda else 64 * GIB
    run = choose(as_toy(model) if toy else model, folder, gpu_choice(devices.device_name()), free, toy)
    if run is not None:
        shutil.rmtree(folder, ignore_errors=True)
        write(run)
    return run


def write(run: Run) -> None:
    """Write the documents to `text.jsonl`, and the teacher to `hf`."""
    run.folder.mkdir(parents=True)
    texts, _ = demo_corpus.documents()
    texts = texts[: 200 if run.toy else None]
    (run.folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    write_model(run.folder / "hf", {**run.model.sizes, "num_layers": run.layers}, texts)


def write_model(folder: Path, sizes: dict[str, Any], texts: list[str]) -> None:
    """Write a Qwen3 with random weights in bf16, and a byte-level BPE of the texts as its tokenizer."""
    import transformers
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    frequencies = _write_tokenizer(folder, texts, sizes["vocab_size"])
    config = transformers.Qwen3Config(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["ffn_hidden_size"],
        num_hidden_layers=sizes["num_layers"],
        num_attention_heads=sizes["num_attention_heads"],
        num_key_value_heads=sizes["num_query_groups"],
        head_dim=sizes["kv_channels"],
        max_position_embeddings=sizes["max_position_embeddings"],
        tie_word_embeddings=sizes["tie_word_embeddings"],
        rope_theta=1e6,
        bos_token_id=None,
        eos_token_id=0,
        dtype="bfloat16",
        architectures=["Qwen3ForCausalLM"],
    )
    config.save_pretrained(folder)
    shapes = expected_shapes(json.loads((folder / "config.json").read_text()))
    save_file(_weights(shapes, frequencies), folder / "model.safetensors", metadata={"format": "pt"})


# Standard deviation of the weights, and of what all layers together add to the residual stream. That is more than the
# embedding's: were it much less, student and teacher would be equal, and of a loss of 0 all gradients are zeros, with
# which a chip runs faster than with others.
_SCALE, _ADDED = 0.02, 0.04
# Of the first column of the embedding: 1 + _SLOPE x log frequency, which stays above 0.
_SLOPE = 0.02


def _weights(shapes: dict[str, tuple[int, ...]], frequencies: torch.Tensor) -> dict[str, torch.Tensor]:
    """Draw weights of a model that knows how frequent each token is, and nothing else.

    A stage refuses a teacher that is no better than chance. Here the first place of the residual stream is about 1 for
    every token, and the first column of the output weight differs by the log frequencies, so that the logits do. The
    final norm's first weight scales them to what they should be.
    """
    device = devices.torch_device()
    generator = torch.Generator(device).manual_seed(0)
    tensors = {}
    adding = [name for name in shapes if name.endswith(("o_proj.weight", "down_proj.weight"))]
    for name, shape in shapes.items():
        # The inputs of the products that add to the stream are about 1.
        scale = _ADDED / (len(adding) * shape[-1]) ** 0.5 if name in adding else _SCALE
        drawn = torch.randn(shape, device=device, generator=generator, dtype=torch.bfloat16) * scale
        tensors[name] = (torch.ones_like(drawn) if len(shape) == 1 else drawn).cpu()
    column = 1 + _SLOPE * frequencies.log()
    embedding = tensors["model.embed_tokens.weight"]
    tensors.get("lm_head.weight", embedding)[:, 0] = column
    embedding[:, 0] = column
    hidden = embedding.shape[1]
    place = float((frequencies * column).sum())  # mean over the tokens of a text
    rms = ((place**2 + (hidden - 1) * _SCALE**2) / hidden) ** 0.5
    # Less of the other places: with a tied embedding every token would predict itself.
    tensors["model.norm.weight"].fill_(0.4)
    tensors["model.norm.weight"][0] = rms / (place * _SLOPE)
    return tensors


def _write_tokenizer(folder: Path, texts: list[str], vocab_size: int) -> torch.Tensor:
    """Write a tokenizer of at most `vocab_size` entries; return the share of each entry of the vocabulary in texts."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(TOKENIZER_SIZE, vocab_size),
        show_progress=False,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    sample = texts[:200]
    tokenizer.train_from_iterator(sample, trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    fast.save_pretrained(folder)
    ids = torch.tensor([number for encoding in tokenizer.encode_batch(sample) for number in encoding.ids])
    counts = torch.bincount(ids, minlength=vocab_size).double() + 1e-3
    return counts / counts.sum()
