"""Typed configuration of a run: one dataclass a config group, `RunConfig` at the root.

The values are in the YAML files in `conf/`; `prune_distill.config.load` merges them into these classes, so that an
unknown key or a wrong type is refused. Sizes are in tokens, sequences or layers as their names say; paths may be
relative to the working directory. Fields marked with `placement()` say how the work is laid out or watched, not what
comes out of it: they are left out of a stage's identity (see `prune_distill.pipeline.artifact`), so that a run can
resume on another layout. Fields marked with `recorded()` are left out as well, though they change what a stage writes;
those marked with `matters()` are part of it only where they have an effect.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING


def placement(default: Any) -> Any:
    """A field that does not change a stage's result, only where, how fast or how visibly it is computed."""
    if callable(default):
        return field(default_factory=default, metadata={"identity": False})
    return field(default=default, metadata={"identity": False})


def recorded(default: Any) -> Any:
    """A field that changes what a stage writes, but not which stage it is, so that an unfinished stage continues with a
    new value. A complete stage keeps the value that it was made with: its manifest records it, and a launch with
    another one says that this has no effect."""
    if callable(default):
        return field(default_factory=default, metadata={"identity": False, "recorded": True})
    return field(default=default, metadata={"identity": False, "recorded": True})


def matters(default: Any, where: Callable[[Any], bool]) -> Any:
    """A field that changes a stage's result only where `where` is true of the object that holds the field."""
    if callable(default):
        return field(default_factory=default, metadata={"identity": where})
    return field(default=default, metadata={"identity": where})


def site_specific(wanted: str) -> Any:
    """A field without a default, as it differs from site to site; `wanted` says what to set it to."""
    return field(default=MISSING, metadata={"wanted": wanted})


class Family(Enum):
    """Model families, named as `model_type` in a Hugging Face `config.json`."""

    qwen3 = "qwen3"
    qwen2 = "qwen2"
    llama = "llama"
    mistral = "mistral"
    nemotron = "nemotron"
    qwen3_moe = "qwen3_moe"


class Precision(Enum):
    """Training precision. `bf16`: NeMo's bf16-mixed, weights in bf16 with fp32 master weights; `fp32`: all in fp32."""

    bf16 = "bf16"
    fp32 = "fp32"


class MatmulPrecision(Enum):
    """How fp32 matrix products are computed, in torch's terms: `medium` may go through bf16, `high` through TF32."""

    highest = "highest"
    high = "high"
    medium = "medium"


class Recompute(Enum):
    """Activation recomputation: nothing, the attention core, or whole layers."""

    none = "none"
    selective = "selective"
    full = "full"


class ExportDtype(Enum):
    """The type of an exported model's weights; `keep`: that of the checkpoint."""

    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"
    keep = "keep"


class GpuRequest(Enum):
    """How a job asks for GPUs: `--gpus-per-node=N`, `--gres=gpu:N`, or not at all, where a node comes with its own."""

    gpus_per_node = "gpus_per_node"
    gres = "gres"
    none = "none"


class NumaBinding(Enum):
    """Which cores a rank is bound to, as torchrun's --numa-binding names them: all of its GPU's NUMA node, all of the
    socket, a share of the node's that no other rank has, or those that share a cache."""

    node = "node"
    socket = "socket"
    exclusive = "exclusive"
    core_complex = "core-complex"


class Loss(Enum):
    """`kd`: from the teacher, as `distill.kd` says. `ce`: cross-entropy on the data, no teacher."""

    kd = "kd"
    ce = "ce"


class Divergence(Enum):
    """How far the student's distribution is from the teacher's: `forward_kl` weighs by the teacher's probabilities,
    `reverse_kl` by the student's, `jensen_shannon` is the mean of both models' KL divergences to their mean."""

    forward_kl = "forward_kl"
    reverse_kl = "reverse_kl"
    jensen_shannon = "jensen_shannon"


class TeacherSignal(Enum):
    """Where distillation has the teacher's distributions from. `live`: the teacher runs beside the student. `stored`:
    it ran once before, in a stage of its own, which kept the most probable tokens of each distribution."""

    live = "live"
    stored = "stored"


class HiddenLoss(Enum):
    """Between hidden states of student and teacher: 1 - cosine, or the mean of squared differences."""

    cosine = "cosine"
    mse = "mse"


class LossImplementation(Enum):
    """`chunked`: from hidden states, never holding whole logits. `upstream`: NeMo's LogitsKLLoss, for reference."""

    chunked = "chunked"
    upstream = "upstream"


class Init(Enum):
    """What a student starts from: the pruned teacher's weights, or random ones."""

    pruned = "pruned"
    random = "random"


@dataclass
class Shape:
    """What a Hugging Face `config.json` says of the model's size, in Megatron's terms."""

    num_layers: int = MISSING
    hidden_size: int = MISSING
    ffn_hidden_size: int = MISSING
    num_attention_heads: int = MISSING
    num_query_groups: int = MISSING
    kv_channels: int = MISSING
    vocab_size: int = MISSING
    max_position_embeddings: int = MISSING
    tie_word_embeddings: bool = False
    # Of a mixture of experts: how many a layer has, the FFN of each, and how many a token goes through; null: a dense
    # model. All layers of a mixture are of experts, and none has an FFN of `ffn_hidden_size`.
    num_moe_experts: int | None = None
    moe_ffn_hidden_size: int | None = None
    moe_router_topk: int | None = None


@dataclass
class Parallel:
    """Megatron's parallel layout; data parallelism is what is left of the ranks."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1
    # Takes effect where tensor_model_parallel_size > 1.
    sequence_parallel: bool = True
    # Ranks among which each layer's experts are shared out; taken from the others of a pipeline stage, so that it needs
    # no more of them. An expert is never cut (expert tensor parallelism is 1).
    expert_model_parallel_size: int = 1


class Schedule(Enum):
    """How the learning rate falls from `lr` to `min_lr` after the warm-up: in half a cosine wave, in a line, or (`wsd`)
    not before the last `decay_steps`, then in a line."""

    cosine = "cosine"
    linear = "linear"
    wsd = "wsd"


@dataclass
class Phase:
    """A stretch of a training with settings of its own; null: the training's."""

    # How long it is: optimizer steps, or tokens, of which it takes as many as make whole steps. One of the two.
    max_steps: int | None = None
    tokens: int | None = None
    seq_length: int | None = None
    global_batch_size: int | None = None
    micro_batch_size: int | None = placement(None)
    # The schedule runs over the phase's own steps, from this lr to this min_lr.
    lr: float | None = None
    min_lr: float | None = None
    # Null: the training's in the first phase, none in the later ones.
    warmup_steps: int | None = None
    # Of the data's sources by name, instead of those that `data.sources` gives; those left out are not read.
    weights: dict[str, float] | None = None


@dataclass
class WeightsAndBiases:
    """Also writes a training's figures to Weights & Biases. Its key comes from WANDB_API_KEY alone."""

    project: str = MISSING
    entity: str | None = None


@dataclass
class Mlflow:
    """Also writes a training's figures to MLflow. Its credentials come from MLflow's own environment variables."""

    tracking_uri: str = MISSING
    experiment: str = MISSING


@dataclass
class Training:
    """One training run through `prune_distill.training.training`. A step is one optimizer step of one global batch."""

    max_steps: int = MISSING
    seq_length: int = MISSING
    global_batch_size: int = MISSING
    micro_batch_size: int = placement(1)
    lr: float = MISSING
    min_lr: float = MISSING
    schedule: Schedule = Schedule.cosine
    warmup_steps: int = 0
    # Of schedule=wsd: the steps at the end, of each phase, in which the learning rate falls.
    decay_steps: int | None = None
    # Consecutive phases that together take max_steps. Each reads the data in its own order, so that a document may
    # come in several. Validation keeps to the training's own sizes throughout.
    phases: list[Phase] | None = None
    # Norms and biases have none.
    weight_decay: float = 0.1
    decay_embeddings: bool = True
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    clip_grad: float = 1.0
    precision: Precision = Precision.bf16
    # Matters where precision is fp32; see torch.set_float32_matmul_precision.
    float32_matmul_precision: MatmulPrecision = MatmulPrecision.highest
    parallel: Parallel = placement(Parallel)  # noqa: RUF009
    use_distributed_optimizer: bool = placement(True)
    overlap_grad_reduce: bool = placement(True)
    overlap_param_gather: bool = placement(True)
    recompute: Recompute = placement(Recompute.none)  # noqa: RUF009
    # A loss above so many times the median of the last ones stops the training, as a non-finite one always does;
    # null: however high it is.
    max_loss_ratio: float | None = placement(10.0)
    # Spans of steps, [first, last] counted from 1, whose batches are skipped: each takes a newly drawn one instead. A
    # step that is named again takes a further one.
    skip_steps: list[list[int]] = recorded(list)  # noqa: RUF009
    save_every_n_steps: int = recorded(100)
    # The newest ones, and, of those whose step was validated, the one with the lowest loss.
    keep_checkpoints: int = recorded(2)
    keep_best: bool = recorded(True)
    # Goes on training while a checkpoint is written.
    async_save: bool = placement(True)
    val_every_n_steps: int = recorded(100)
    # Global batches a validation takes, always the same ones; null: the whole validation set, once.
    val_batches: int | None = recorded(8)
    log_every_n_steps: int = recorded(10)
    wandb: WeightsAndBiases | None = placement(None)  # noqa: RUF009
    mlflow: Mlflow | None = placement(None)  # noqa: RUF009
    num_workers: int = placement(2)


@dataclass
class DemoModel:
    """The teacher that stage `demo_model` makes, its shape being `model.shape`."""

    training: Training = field(default_factory=Training)


@dataclass
class ModelConfig:
    """The teacher: a Hugging Face folder or Hub id, or (`demo`) one made on the spot."""

    name: str = MISSING
    family: Family = MISSING
    # A folder, or a Hub id such as Qwen/Qwen3-8B; null where `demo` makes the model.
    hf_path: str | None = None
    # Hub revision (commit, branch or tag); null: the default branch.
    revision: str | None = None
    # Null: read from config.json, which then has to be at hand when the run is composed.
    shape: Shape | None = None
    demo: DemoModel | None = None


class DocumentFormat(Enum):
    """What a record holds.

    `text`: a text. `tokens`: ids of `data.source_tokenizer`, as in nvidia/ClimbMix. `chat`: a list of messages with
    `role` and `content`, which the model's chat template renders.
    """

    text = "text"
    tokens = "tokens"
    chat = "chat"


class LongDocuments(Enum):
    """What becomes of what is beyond `max_document_tokens`: it is cut off, or makes further documents."""

    cut = "cut"
    split = "split"


@dataclass
class DataSource:
    """One source of training documents, and its share. All sources have a `weight`, or none has."""

    # Files, folders or globs; or files in a dataset on the Hub: hf://datasets/OWNER/NAME[@REVISION]/GLOB.
    files: list[str] = MISSING
    format: DocumentFormat = DocumentFormat.text
    # Field of the document; null: text, tokens or messages, as the format is.
    key: str | None = None
    # Share of the tokens that training reads, in proportion to the others'; null: as many as there are.
    weight: float | None = None
    # Tokens to take at most, chosen at random among all of the source's documents; null: all. The whole source is
    # tokenised first: of a much larger one take a `sample` as well.
    max_tokens: int | None = None
    # Share of the documents that is taken, chosen at random, before they are tokenised.
    sample: float = 1.0


@dataclass
class DataConfig:
    """Documents for calibration, distillation and validation: JSON lines (also .gz, .zst) or parquet."""

    # One source: files, folders, globs or hf://datasets/...; null where the demo's corpus or `sources` is used.
    train: list[str] | None = None
    # Several sources by name, instead of `train`.
    sources: dict[str, DataSource] | None = None
    # As `train`; null: one in `holdout_every` documents of the sources, chosen by a hash of its text.
    validation: list[str] | None = None
    # Null: 10, 100, 1000 or 10,000, the largest of them that holds out 1 MB of the sources' files, or else 10.
    holdout_every: int | None = None
    # Of `train` and `validation`; a source of `sources` says its own.
    format: DocumentFormat = DocumentFormat.text
    text_key: str = "text"
    sample: float = 1.0
    # Hugging Face folder or Hub id of the tokenizer whose ids documents of the format `tokens` hold.
    source_tokenizer: str = "openai-community/gpt2"
    # Field with a whole number by which tokens are counted, such as ClimbMix's topic.
    cluster_key: str = "cluster_id"
    # Longer documents are cut, or split, at this many tokens, end-of-document not counted.
    max_document_tokens: int = 32000
    long_documents: LongDocuments = LongDocuments.cut
    # Of chat: whether loss is taken on what the assistant says only.
    mask_prompts: bool = False
    # Leaves out documents whose text was there before, in all sources together.
    deduplicate: bool = False
    # Share of a shard's lines that may be broken (bad JSON, no text) before the stage fails. Not part of the identity:
    # a complete stage is redone only where a shard of it has more.
    max_bad_share: float = placement(0.001)
    # Bytes of files that are worked on at a time and make one pair of .bin/.idx; a compressed file is never divided.
    shard_bytes: int = 512 * 2**20
    # Processes of a node; null: one a core.
    num_workers: int | None = placement(None)
    # Nodes that share the work under Slurm, each a task of a job array.
    array_tasks: int = placement(1)
    # Seconds without a sign of life after which another node takes over what a node was working on.
    stale_seconds: int = placement(300)


class Depth(Enum):
    """Which layers go where only their number is known.

    `importance`: those that change the hidden states the least (Minitron). `block`: neighbours, namely the block
    without which the model's loss on calibration text is lowest.
    """

    importance = "importance"
    block = "block"


@dataclass
class Budget:
    """What the student may cost: the search finds its sizes. Limits hold together; null sets none.

    Each is a number, or (`_share`) a share of what the teacher costs.
    """

    params: float | None = None
    params_share: float | None = None
    # Weights, in convert.export_dtype, and KV cache of `batch_size` sequences of `seq_length` tokens; 10^9 bytes.
    memory_gb: float | None = None
    memory_share: float | None = None
    # Milliseconds of a forward pass over that batch, on the machine that searches: measured there.
    latency: float | None = None
    latency_share: float | None = None
    batch_size: int = 1
    # Null: prune.calibration_seq_length.
    seq_length: int | None = None
    # The most that may go of the layers, and of each width.
    max_depth_cut: float = 1 / 3
    max_width_cut: float = 0.4
    # Shapes that are scored at most; of more, as many are taken evenly.
    max_candidates: int = 64
    # Sets of layers that each shape is tried without: the one that `depth` names and, of those in which one layer gives
    # its place to a neighbour, the best by loss on `block_samples` sequences of calibration text.
    layer_sets: int = 2
    # Held-out sequences of `prune.calibration_seq_length` tokens that each is scored on.
    samples: int = 64


@dataclass
class TaskScore:
    """A task that has a say in who is left: after each round, a candidate whose score is clearly worse than the best
    one ranks below all that are not, whatever its loss."""

    # heldout_continuations, or one of evaluate.tasks; asked as the stage evaluate asks it.
    task: str = MISSING
    metric: str = "acc"
    # How many standard errors of their difference two scores are apart for one to be clearly worse.
    margin: float = 2.0


@dataclass
class Tournament:
    """Short distillations of the best candidates. After a round the worse half is dropped, and the next is as long as
    all before it."""

    candidates: int = 4
    # Tokens of the first round; rounded up to whole steps of the distillation.
    round_tokens: int = MISSING
    score: TaskScore | None = None


@dataclass
class TargetSizes:
    """The sizes after a round of pruning; null keeps the size before it."""

    num_layers: int | None = None
    hidden_size: int | None = None
    ffn_hidden_size: int | None = None
    num_attention_heads: int | None = None
    num_query_groups: int | None = None
    # Of a mixture: experts of each layer, and the FFN of each.
    num_moe_experts: int | None = None
    moe_ffn_hidden_size: int | None = None
    # Layers to drop, counted from 1; instead of num_layers, which chooses them by `depth`.
    drop_layers: list[int] | None = None


@dataclass
class PruneRound(TargetSizes):
    """A round before the last: what the model in between is pruned to, and for how many steps it is distilled before it
    is pruned in its turn. All else is said by `prune` and `distill`."""

    steps: int = MISSING


@dataclass
class PruneConfig(TargetSizes):
    """Target sizes of the student (Minitron), null keeping the teacher's; or a budget, for which they are searched."""

    # Rounds of pruning and distillation before the one that the sizes are of; the teacher stays the same.
    rounds: list[PruneRound] = field(default_factory=list)
    depth: Depth = Depth.importance
    budget: Budget | None = None
    tournament: Tournament | None = None
    calibration_samples: int = 1024
    calibration_seq_length: int = 4096
    # Sequences of calibration text by which a block of layers, or another set than the least important, is chosen.
    block_samples: int = 32
    # Of sequences whose loss is compared; importance is measured one sequence at a time.
    micro_batch_size: int = placement(1)
    # Uneven where it does not divide the layers: the last stage then has fewer of them, or more.
    pipeline_model_parallel_size: int = placement(1)
    # Above 1 only where the layers to drop are named, and nothing else is pruned.
    tensor_model_parallel_size: int = placement(1)


@dataclass
class LayerPair:
    """A layer of the student and the one of the teacher whose output it learns, counted from 1."""

    student: int = MISSING
    teacher: int = MISSING


@dataclass
class KdConfig:
    """The loss of distillation: kd_weight x temperature² x divergence + lm_weight x cross-entropy of the data
    + intermediate_weight x mean over the pairs. The weights are fixed: nothing is scaled behind them."""

    divergence: Divergence = Divergence.forward_kl
    # Both models' logits are divided by it, in the divergence only.
    temperature: float = 1.0
    kd_weight: float = 1.0
    lm_weight: float = 0.0
    # Takes of the teacher's distribution its k most probable tokens and the rest as one; null: the whole vocabulary.
    top_k: int | None = None
    intermediate_pairs: list[LayerPair] = field(default_factory=list)
    intermediate_loss: HiddenLoss = matters(HiddenLoss.cosine, lambda kd: bool(kd.intermediate_pairs))  # noqa: RUF009
    intermediate_weight: float = matters(1.0, lambda kd: bool(kd.intermediate_pairs))
    implementation: LossImplementation = placement(LossImplementation.chunked)  # noqa: RUF009
    # Tokens whose logits are in memory at a time (`chunked`).
    chunk_tokens: int = placement(256)


@dataclass
class DistillConfig(Training):
    """Distillation of the pruned student from the teacher."""

    loss: Loss = Loss.kd
    init: Init = Init.pruned
    kd: KdConfig = matters(KdConfig, lambda distill: distill.loss is Loss.kd)  # noqa: RUF009
    signal: TeacherSignal = matters(TeacherSignal.live, lambda distill: distill.loss is Loss.kd)  # noqa: RUF009
    # Tokens of each distribution that a stored signal keeps. Part of the identity of the stage teacher_signal, and of
    # what reads it through that.
    signal_top_k: int = recorded(64)
    # Sequences that a file of a stored signal holds: what is lost at most when the stage is killed, a rank.
    signal_shard_sequences: int = placement(256)
    # Trains the teacher on the distillation data first, as language models are trained; null: it stays as it is. Its
    # learning rate is best low, that of the end of its pretraining. Part of the identity of the stage correct_teacher.
    correct_teacher: Training | None = placement(None)  # noqa: RUF009
    # The step at which the corrected teacher takes the original one's place; null: it is the teacher from the start.
    swap_teacher_at_step: int | None = matters(None, lambda distill: distill.loss is Loss.kd)
    # Further students of the same steps and data that the report sets beside it: "ce" (no teacher), "scratch" (no
    # teacher, and random weights to begin with).
    controls: list[str] = field(default_factory=list, metadata={"identity": False})

    @property
    def runs_teacher(self) -> bool:
        """Whether the teacher runs beside the student."""
        return self.loss is Loss.kd and self.signal is TeacherSignal.live

    @property
    def loss_in_words(self) -> str:
        """What training minimises, as cards and reports call it."""
        if self.loss is Loss.ce:
            return "cross-entropy on the data"
        kd = self.kd
        names = {Divergence.forward_kl: "KL", Divergence.reverse_kl: "reverse KL"}
        parts = {
            f"{names.get(kd.divergence, 'Jensen-Shannon')} divergence from the teacher": kd.kd_weight,
            "cross-entropy on the data": kd.lm_weight,
            "distance of layer pairs": kd.intermediate_weight if kd.intermediate_pairs else 0.0,
        }
        weighted = {words: weight for words, weight in parts.items() if weight}
        return " + ".join(
            words if len(weighted) == 1 else f"{weight:g} x {words}" for words, weight in weighted.items()
        )

    @property
    def reads_signal(self) -> bool:
        """Whether the student learns from a stored signal."""
        return self.loss is Loss.kd and self.signal is TeacherSignal.stored


@dataclass
class ConvertConfig:
    """Both conversions between Hugging Face and NeMo."""

    export_dtype: ExportDtype = ExportDtype.bf16
    # Reads a model's pytorch_model*.bin where it has no safetensors. Only their tensors are taken; nothing is unpickled
    # that could run code.
    allow_pickle: bool = False
    # Accepts weights that are NaN or infinite, and those that become infinite in the type of an export (above 65504 in
    # fp16); they are named in the log. A model with them has no logits to compare: set evaluate.verify_tokens=0.
    allow_nonfinite: bool = placement(False)
    # Whether the chunks of NeMo checkpoints carry their CRC-32, which is checked when they are read.
    checksum: bool = placement(True)


@dataclass
class Continuations:
    """A multiple-choice task that is made of the run's own held-out documents, in the harness's format: which of four
    continuations follows a text? The wrong ones are taken from other documents."""

    questions: int = 150
    context_words: int = 20
    choice_words: int = 10


@dataclass
class EvaluateConfig:
    """What is measured of the Hugging Face models, and the checks of both conversions."""

    seq_length: int = 2048
    micro_batch_size: int = placement(1)
    # Sequences of held-out text at most; null: all.
    max_sequences: int | None = None
    # Held-out tokens on which NeMo's and Hugging Face's logits are compared; 0 skips the check. Part of the identity of
    # the stages verify_import and verify.
    verify_tokens: int = placement(512)
    # Tasks, groups or tags of EleutherAI's lm-evaluation-harness, such as mmlu or gsm8k.
    tasks: list[str] = field(default_factory=list)
    # Of all tasks that allow examples; null: each task's own number.
    num_fewshot: int | None = None
    # Questions of each task at most, for a first look; null: all.
    task_limit: int | None = None
    task_batch_size: int = placement(8)
    # A folder with task definitions (*.yaml; functions that they name are run) and with data sets as they are on the
    # Hub, OWNER/NAME; it is then not asked for any. Its content is an input of the stage.
    task_folder: str | None = placement(None)
    continuations: Continuations | None = None
    # Held-out documents whose beginnings all models continue, for people to read; 0: none.
    samples: int = 4
    sample_prompt_tokens: int = 32
    sample_new_tokens: int = 64
    # Also measures the checkpoints that distillation kept: the curve of its recovery.
    recovery: bool = False


class Engine(Enum):
    """What runs the models in a benchmark."""

    transformers = "transformers"
    vllm = "vllm"


@dataclass
class BenchmarkConfig:
    """How fast teacher and student are beside each other, with how much memory."""

    enabled: bool = placement(False)
    engine: Engine = Engine.transformers
    # The type in which the models compute; keep: that of their weights.
    dtype: ExportDtype = ExportDtype.keep
    batch_size: int = 1
    prompt_tokens: int = 512
    new_tokens: int = 128
    # Each model once per round, interleaved; a first round is not counted.
    rounds: int = 5
    # Threads of a CPU; null: as many as PyTorch takes.
    threads: int | None = None
    # Price of the machine that is measured, in any currency; null: the report shows no costs.
    cost_per_hour: float | None = placement(None)


@dataclass
class Gpu:
    """One GPU, as `launch.plan` counts with it."""

    name: str = MISSING
    # GiB that PyTorch can use, as it names them in an out-of-memory error ("total capacity").
    memory_gib: float = MISSING
    # Peak TFLOP/s of bf16 products with fp32 sums, without sparsity.
    bf16_tflops: float = MISSING
    # Share of the peak that training reaches (MFU). The default is that of the one published run, Qwen3-8B to 6B by
    # depth: 90 B tokens x 50.3 GFLOP a token (student 33.9, teacher 16.3) = 4.52e21 FLOP in about 6,000 H100-hours,
    # and 4.52e21 / (6,000 x 3,600 s x 989.4e12) = 0.21.
    utilisation: float = 0.21


@dataclass
class SlurmConfig:
    """How stages become Slurm jobs. What has no default differs from site to site; null says that a site has none."""

    partition: str | None = site_specific("one that sinfo lists, or null for the site's default")
    account: str | None = site_specific("the account that pays, or null where the site has none")
    qos: str | None = None
    gpu_request: GpuRequest = GpuRequest.gpus_per_node
    # The type of GPU to ask for, as in --gpus-per-node=h100:8; null: any.
    gpu_type: str | None = None
    # CPU cores for each rank (--cpus-per-task, times the ranks on a node; data preparation asks for those of a whole
    # node); null: the site's default, which may be a single core for all ranks.
    cpus_per_gpu: int | None = None
    # Memory of each node as sbatch's --mem takes it: 200G, or 0 for all; null: the site's default.
    mem: str | None = None
    # Further lines for sbatch, such as --exclusive or --constraint=h100.
    sbatch: list[str] = field(default_factory=list)
    # Shell lines that go before the stage, such as `module load cuda`.
    setup: list[str] = field(default_factory=list)
    # Names of environment variables that jobs are given as they are where they are submitted, such as HF_TOKEN.
    secrets: list[str] = field(default_factory=list)
    # An image, or a squash file on a disk that all nodes see (pyxis); null: jobs use this very Python.
    container_image: str | None = site_specific(
        "an image built from the Dockerfile (registry#name:tag or a .sqsh file), or null"
    )
    # SOURCE:TARGET[:FLAGS], further to the run folder, which is always there.
    container_mounts: list[str] = field(default_factory=list)
    # Where the image has this repository.
    container_workdir: str = "/opt/nemo-prune-distill"
    # Whether jobs may be requeued; false: a training stage becomes a chain of jobs, each going on from the last, also
    # where that one was killed, as long as it left a newer checkpoint.
    requeue: bool = True
    # Seconds before its time limit at which a training stage is told to save and pause: one step, one save, and up to a
    # minute until a shared disk shows the stop file.
    warn_seconds: int = 600
    # How often a paused stage is started again.
    max_restarts: int = 20


@dataclass
class ClusterConfig:
    """Where the stages run."""

    name: str = MISSING
    nodes: int = 1
    # Ranks a node: GPUs, or processes on a machine without CUDA.
    devices_per_node: int = 1
    # CPU threads a rank; null: the node's cores shared out among its ranks.
    threads_per_rank: int | None = None
    # Which cores near its GPU a rank is bound to, where a machine has several NUMA nodes; null: any.
    numa_binding: NumaBinding | None = None
    # What launch.plan checks memory and estimates hours with; null: not stated, so neither is done.
    gpu: Gpu | None = None
    # The longest that a job may run, H:MM:SS or D-HH:MM:SS; null: no limit. YAML wants quotes around it.
    time_limit: str | None = None
    # Says that all nodes see the run's folder, where its file system looks like a disk of this machine only.
    run_dir_is_shared: bool = False
    # For several nodes without Slurm, on each of which the same command is started: HOST:PORT of the first one, a port
    # that is free there, and which of them this is, from 0.
    rdzv_endpoint: str | None = None
    node_rank: int = 0
    # Null: launch.run starts the stages itself.
    slurm: SlurmConfig | None = None


@dataclass
class RunConfig:
    """A whole run. `name` is what the report calls it; `run_dir` holds everything that it writes."""

    name: str = MISSING
    run_dir: str = MISSING
    seed: int = 1234
    # Whether a stage reads its inputs once before it starts, and compares them with what was written; false: only
    # their sizes.
    verify_inputs: bool = placement(True)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    convert: ConvertConfig = field(default_factory=ConvertConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
