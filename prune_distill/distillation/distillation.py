"""NeMo's models for distillation, with the losses of `kd_loss` instead of ModelOpt's.

Teacher, pipeline and checkpoints are those of NeMo and ModelOpt (nemo/collections/llm/modelopt/distill). `FusedHead`
replaces the output layer and the loss of both models. The auxiliary loss of a mixture's router is Megatron's, with the
family's settings: autograd adds it to the student's gradients at the router
(megatron/core/transformer/moe/moe_utils.py:MoEAuxLossAutoScaler); the teacher's is never computed. With
`distill.kd.implementation=upstream`, output layer and loss are upstream's too, for reference.

Import this module after `backend.activate()`; the runner calls that before it imports a stage.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import modelopt.torch.distill as mtd
import torch
from lightning.pytorch.callbacks import Callback
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from modelopt.torch.distill.plugins.megatron import HiddenStateCosineLoss, LogitsKLLoss, MSELoss, ProjectionLayer
from nemo.collections import llm
from nemo.collections.llm.modelopt.distill.model import DistillationGPTModel
from nemo.collections.llm.modelopt.distill.utils import adjust_distillation_model_for_mcore, teacher_provider
from torch import Tensor

from prune_distill.distillation import cached_logits_batch
from prune_distill.distillation.fake_quantizers import FakeQuantization
from prune_distill.distillation.kd_loss import check_implementation, check_vocabularies, distillation_loss
from prune_distill.distillation.loss_chunk import Head, slice_rows
from prune_distill.distillation.loss_terms import TopK
from prune_distill.model.tokenizer_check import check_tokenizers
from prune_distill.nemo import backend, devices, nemo_api
from prune_distill.nemo.nemo_api import core_model
from prune_distill.nemo.precision import match_precision
from prune_distill.nemo.token_loss import TokenLoss, masked_sum
from prune_distill.pipeline.names import CONTEXT, TOKENIZER
from prune_distill.schema import DistillConfig, Divergence, HiddenLoss, KdConfig, LossImplementation, QuantizeConfig

log = logging.getLogger("recipes.distillation")

# Parts of the loss that a training step reports.
PARTS = ("kd_loss", "lm_loss", "hidden_loss")


class FusedHead:
    """Replaces output layer and loss of a student, and of its teacher if there is one, by losses in chunks.

    Megatron's model calls its output layer, and then a function that computes the loss from the logits
    (gpt_model.py:_postprocess). Both are replaced, and pass a `Head` between them. The output layer is still called as
    a module, because Megatron's hooks wait there for its gathered weight
    (distributed_data_parallel.py:_make_forward_pre_hook).

    Attributes:
        batch: the current micro batch, with the loss mask and cached logits. It is set before each forward pass,
            because NeMo passes neither to Megatron's model (nemo/collections/llm/gpt/model/base.py:128).
        teacher_rows: the teacher's output weight for this rank's slice of the student's vocabulary, where the two
            vocabularies differ in size. Built once; None: to be built from the teacher's weights.
    """

    def __init__(self, student: Any, teacher: Any | None, config: KdConfig, shared: int | None = None) -> None:
        """`shared`: the number of ids of cached logits, the first of the student's; a teacher has its own."""
        self.student, self.config = student, config
        self.batch: dict[str, Any] = {}
        self.teacher_head: Head | None = None
        self.teacher_rows: Tensor | None = None
        self.shared = shared if teacher is None else teacher.vocab_size
        if student.post_process:
            _replace_output(student, self._student_losses)
        if teacher is not None and teacher.post_process:
            _replace_output(teacher, self._store_teacher_head)

    def _store_teacher_head(self, labels: Tensor, head: Head) -> Tensor:
        weight = head.weight
        if self.shared != self.student.vocab_size:
            if self.teacher_rows is None:
                group = parallel_state.get_tensor_model_parallel_group()
                self.teacher_rows = slice_rows(weight, self.student.vocab_size, group)
            weight = self.teacher_rows
        self.teacher_head = Head(head.hidden, weight)
        return head.hidden

    def _student_losses(self, labels: Tensor, head: Head) -> Any:
        """Return the masked sum, and both parts per token `[b, s]`; in evaluation mode the cross-entropy `[b, s]`."""
        batch_size, tokens = labels.shape[0], _token_order(labels)
        group = parallel_state.get_tensor_model_parallel_group()
        if not self.student.training:
            _, losses = distillation_loss(head, None, tokens, torch.ones_like(tokens), _data_loss(self.config), group)
            return _batch_order(losses.lm, batch_size)
        mask = _token_order(self.batch["loss_mask"])
        total, losses = distillation_loss(head, self._pop_teacher(), tokens, mask, self.config, group, self.shared)
        return total, _batch_order(losses.kd, batch_size), _batch_order(losses.lm, batch_size)

    def _pop_teacher(self) -> Head | TopK | None:
        if "cached_ids" in self.batch:
            ids, log_probs, tail = (self.batch[f"cached_{name}"] for name in ("ids", "logprobs", "tail"))
            return TopK(_token_order(ids), _token_order(log_probs).float(), _token_order(tail).float())
        teacher, self.teacher_head = self.teacher_head, None
        return teacher


def _data_loss(kd: KdConfig) -> KdConfig:
    """Cross-entropy alone, computed in the same way."""
    return KdConfig(kd_weight=0.0, lm_weight=1.0, chunk_tokens=kd.chunk_tokens, implementation=kd.implementation)


def _replace_output(model: Any, loss: Callable[[Tensor, Head], Any]) -> None:
    """Make a Megatron `GPTModel` return `loss(labels, head)`."""
    layer = model.output_layer
    if layer.bias is not None or model.mtp_process:
        raise NotImplementedError("an output layer with a bias, or multi-token prediction")

    def forward(hidden: Tensor, weight: Tensor | None = None, **_: Any) -> tuple[Head, None]:
        return _head(hidden, layer.weight if weight is None else weight, model.config), None

    layer.forward = forward
    model.compute_language_model_loss = loss


def _head(hidden: Tensor, weight: Tensor, config: Any) -> Head:
    """Build the head from the hidden states of the whole sequence and this rank's rows of the output weight.

    The backward passes of the mappings sum the gradients over ranks, as in ColumnParallelLinear
    (megatron/core/tensor_parallel/layers.py:497-531).
    """
    if config.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
    else:
        hidden = copy_to_tensor_model_parallel_region(hidden)
    return Head(hidden.flatten(0, 1), weight)


def _token_order(values: Tensor) -> Tensor:
    """Reshape `[b, s, ...]` to `[s x b, ...]`, the order of Megatron's hidden states `[s, b, h]`."""
    return values.transpose(0, 1).flatten(0, 1)


def _batch_order(values: Tensor, batch_size: int) -> Tensor:
    """Reshape `[s x b]` to `[b, s]`."""
    return values.view(-1, batch_size).t().contiguous()


class LossReduction(TokenLoss):
    """`kd_weight` x T² x divergence + `lm_weight` x cross-entropy + `intermediate_weight` x mean over the layer pairs.

    Upstream's balancer is not used: it rescales the parts in every step, regardless of their weights
    (nemo/collections/llm/modelopt/distill/loss.py:LogitsAndIntermediatesLossBalancer).

    Attributes:
        parts: means over the unmasked tokens of the last step, in the order of `PARTS`; on the last pipeline stage.
    """

    def __init__(self, kd: KdConfig, core: Any, fused: bool) -> None:
        super().__init__()
        self.kd, self.fused = kd, fused
        self.hooked = core.compute_kd_loss if isinstance(core, mtd.DistillationModel) else None
        self.parts = torch.zeros(len(PARTS))

    def add_up(self, mask: Tensor, forward_out: Any) -> tuple[Tensor, list[Tensor]]:
        kd = self.kd
        logits_loss, hidden = self._hook_losses(mask)
        if self.fused:
            loss, kd_tokens, lm_tokens = forward_out
            divergence, lm = masked_sum(kd_tokens, mask), masked_sum(lm_tokens, mask)
        else:
            divergence, lm = logits_loss * kd.temperature**2, masked_sum(forward_out, mask)
            loss = kd.kd_weight * divergence + kd.lm_weight * lm
        loss = loss + kd.intermediate_weight * hidden
        whole = kd.kd_weight * divergence + kd.lm_weight * lm + kd.intermediate_weight * hidden
        return loss, [whole, divergence, lm, hidden]

    def _hook_losses(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the losses of ModelOpt's hooks: upstream's loss of the logits, and the mean over the layer pairs.

        Both are summed over this rank's unmasked tokens.
        """
        reduction = functools.partial(_sum_over_ranks, mask=mask)
        hook_losses = self.hooked(loss_reduction_fn=reduction, skip_balancer=True) if self.hooked else {}
        zero = mask.new_zeros(())
        logits_losses = [loss for name, loss in hook_losses.items() if name.startswith(LogitsKLLoss.__name__)]
        pair_losses = [loss for name, loss in hook_losses.items() if not name.startswith(LogitsKLLoss.__name__)]
        pairs_mean = torch.stack(pair_losses).mean() if pair_losses else zero
        return logits_losses[0] if logits_losses else zero, pairs_mean

    def report(self, means: Tensor) -> Tensor:
        self.parts = means[1:].float()
        return super().report(means)


def _sum_over_ranks(loss_output: tuple[Tensor, bool, bool], mask: Tensor) -> Tensor:
    """Sum losses over the unmasked tokens of a micro batch and over all tensor-parallel ranks.

    The value is the sum over all ranks, and the gradient is this rank's part, as in upstream
    (nemo/collections/llm/modelopt/distill/model.py:_masked_token_loss).

    Args:
        loss_output: from ModelOpt: losses `[b, s]`, whether they are this rank's part of each token's loss, and
            whether they cover only this rank's part of the tokens.
    """
    losses, is_partial, is_split = loss_output
    if is_split:
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        mask = torch.tensor_split(mask, ranks, dim=1)[parallel_state.get_tensor_model_parallel_rank()]
    loss = masked_sum(losses, mask)
    if is_partial or is_split:
        torch.distributed.all_reduce(loss, group=parallel_state.get_tensor_model_parallel_group())
    return loss


class _FixedLossModel(llm.GPTModel):
    """Base class of the models below: the fused head, and losses with fixed weights.

    Attributes:
        kd: set after construction, because NeMo records the constructor's arguments in the checkpoint's context.
        shared_ids: the number of ids that cached logits are about; None: all. Set like `kd`.
        fake_quantization: of the student's linear layers; None: it computes with its weights as they are. Set like
            `kd`.
        head: None if output layer and loss are upstream's.
    """

    kd: KdConfig
    shared_ids: int | None = None
    fake_quantization: FakeQuantization | None = None
    head: FusedHead | None = None

    def forward_step(self, batch: dict[str, Any]) -> Any:
        if self.head is not None:
            self.head.batch = batch
        return super().forward_step(batch)

    @property
    def training_loss_reduction(self) -> LossReduction:
        return self._kd_loss_reduction

    @functools.cached_property
    def _kd_loss_reduction(self) -> LossReduction:
        return LossReduction(self.kd, core_model(self), self.head is not None)

    def loss_parts(self) -> dict[str, float]:
        """Return the `PARTS` of the last training step that have a weight, by name. All ranks call it."""
        parts = self.training_loss_reduction.parts.to(backend.activate().device)
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            last = parallel_state.get_pipeline_model_parallel_last_rank()
            torch.distributed.broadcast(parts, last, parallel_state.get_pipeline_model_parallel_group())
        weights = (self.kd.kd_weight, self.kd.lm_weight, len(self.kd.intermediate_pairs))
        return {name: part for name, part, weight in zip(PARTS, parts.tolist(), weights, strict=True) if weight}


class DistilledModel(_FixedLossModel, DistillationGPTModel):
    """A student and its teacher, which runs in the same step."""

    def configure_model(self) -> None:
        """Build both models as upstream does, which has no temperature
        (nemo/collections/llm/modelopt/distill/model.py:142)."""
        if hasattr(self, "module"):
            return
        student, teacher_config = self.config.configure_model(self.tokenizer), self._teacher_config
        if self.fake_quantization is not None:
            self.fake_quantization.insert(student)
        for name in _LAYOUT:
            setattr(teacher_config, name, getattr(self.config, name))
        options = {"tokenizer": self.tokenizer, "trainer": self.trainer}
        settings = {
            "teacher_model": (teacher_provider, [teacher_config, self._teacher_ckpt_path], options),
            "criterion": _criterion(self.kd, self.config, teacher_config),
            "loss_balancer": mtd.DistillationLossBalancer(),  # unused, but required for more than one loss
        }
        model = mtd.convert(student, mode=[("kd_loss", settings)])
        adjust_distillation_model_for_mcore(model, SimpleNamespace(skip_lm_loss=not self.kd.lm_weight))
        if self.kd.implementation is LossImplementation.upstream:
            _copy_logits_for_loss(model)
        else:
            self.head = FusedHead(model, model.teacher_model, self.kd)
        self.module = model

    @contextmanager
    def student_only(self) -> Iterator[None]:
        """Exclude the projections, which only training needs, from the saved model."""
        with core_model(self).hide_loss_modules():
            yield


class StudentModel(_FixedLossModel):
    """A student that learns from the data alone, or from cached logits."""

    def configure_model(self) -> None:
        if hasattr(self, "module"):
            return
        super().configure_model()
        if self.fake_quantization is not None:
            self.fake_quantization.insert(core_model(self))
        self.head = FusedHead(core_model(self), None, self.kd, self.shared_ids)

    def data_step(self, dataloader_iter: Iterator[Any]) -> dict[str, Any]:
        return cached_logits_batch.data_step(dataloader_iter)


def _copy_logits_for_loss(model: Any) -> None:
    """Pass a copy of the logits to Megatron's cross-entropy, which overwrites fp32 logits that ModelOpt's loss reads
    later (megatron/core/tensor_parallel/cross_entropy.py:VocabParallelCrossEntropy.calculate_predicted_logits)."""
    compute_loss = model.compute_language_model_loss
    model.compute_language_model_loss = lambda labels, logits: compute_loss(labels, logits.clone())


# Fields of the teacher's config that are copied from the student's, as in upstream's `configure_model`.
_LAYOUT = (
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"),
    *("expert_model_parallel_size", "expert_tensor_parallel_size", "sequence_parallel", "pipeline_dtype"),
)


def _criterion(kd: KdConfig, student: Any, teacher: Any) -> dict[tuple[str, str], Any]:
    """Return ModelOpt's losses by the names of the layers that they compare; empty except on the last pipeline
    stage."""
    if not parallel_state.is_pipeline_last_stage():
        return {}
    criterion: dict[tuple[str, str], Any] = {}
    if kd.implementation is LossImplementation.upstream:
        reverse = kd.divergence is Divergence.reverse_kl
        criterion["output_layer", "output_layer"] = LogitsKLLoss(student, kd.temperature, reverse)
    loss = {HiddenLoss.cosine: HiddenStateCosineLoss, HiddenLoss.mse: MSELoss}[kd.intermediate_loss]
    # One projection for all pairs, as in upstream.
    projection = ProjectionLayer(student, teacher) if kd.intermediate_pairs else None
    for pair in kd.intermediate_pairs:
        layers = _layer_name(pair.student, student), _layer_name(pair.teacher, teacher)
        criterion[layers] = loss(student, projection_layer=projection)
    return criterion


def _layer_name(number: int, config: Any) -> str:
    """Return the name that a layer, counted from 1 over all stages, has on this pipeline stage."""
    return f"decoder.layers.{number - 1 - get_transformer_layer_offset(config)}"


def student_to_train(
    distill: DistillConfig,
    checkpoint: Path,
    teacher: Path | None,
    quantize: QuantizeConfig | None = None,
    shared_ids: int | None = None,
) -> llm.GPTModel:
    """Build the model that trains a student: with its teacher, or alone on the data or on cached logits.

    Args:
        checkpoint: the student's NeMo checkpoint.
        teacher: the teacher's NeMo checkpoint; None: the student is trained alone.
        quantize: groups and kept layers of the format `distill.quantize`.
        shared_ids: the number of ids that cached logits are about; None: those of the student, or no cached logits.

    Raises:
        InputError: not a NeMo checkpoint; the tokenizers differ; the implementation of the loss does not support
            vocabularies of different size; this device cannot compute the loss.
    """
    check_implementation(distill.kd, devices.torch_device())
    student = nemo_api.load_model(checkpoint)
    fake_quantization = None
    if distill.quantize is not None:
        assert quantize is not None
        nemo_api.use_modelopt_spec(student.config)
        fake_quantization = FakeQuantization(distill.quantize, quantize.int4_group_size, tuple(quantize.keep))
    if teacher is None:
        model: Any = StudentModel(student.config, tokenizer=student.tokenizer)
        model.kd = distill.kd if distill.reads_cached_logits else _data_loss(distill.kd)
        model.shared_ids = shared_ids
    else:
        check_tokenizers(checkpoint / CONTEXT / TOKENIZER, teacher / CONTEXT / TOKENIZER)
        config = nemo_api.load_model(teacher).config
        check_vocabularies(distill.kd, student.config.vocab_size, config.vocab_size)
        match_precision(config, distill.precision, distill.fp8_of_teacher)
        model = DistilledModel(student.config, config, teacher_ckpt_path=str(teacher), tokenizer=student.tokenizer)
        model.kd = distill.kd
    model.fake_quantization = fake_quantization
    # Checkpoints describe the student, so that they load as the student's class (as in nemo's llm.distill).
    model.__io__ = student.__io__
    return model  # type: ignore[no-any-return]


class TeacherSwap(Callback):
    """Loads the weights of the corrected teacher into the teacher after a number of steps.

    Training checkpoints do not contain the teacher, so a resumed run starts with the original teacher. This callback
    then replaces it before the first step.

    Args:
        checkpoint: the NeMo checkpoint of the corrected teacher, which has the shape of the original teacher.
        step: number of steps with the original teacher.
    """

    def __init__(self, checkpoint: Path, step: int) -> None:
        self.checkpoint, self.step = checkpoint, step
        self.done = False

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.done or trainer.global_step < self.step:
            return
        self.done = True
        teacher = nemo_api.core_model(pl_module).teacher_model
        nemo_api.load_parameters(teacher, self.checkpoint, trainer)
        if pl_module.head is not None:
            pl_module.head.teacher_rows = None
        log.info("step %d: teacher weights replaced by %s", trainer.global_step + 1, self.checkpoint)
