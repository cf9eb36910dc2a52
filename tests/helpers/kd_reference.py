"""Compare our loss with ModelOpt's LogitsKLLoss on equal hidden states and output weights, on ranks (`run_ranks`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any


@dataclass(frozen=True)
class Case:
    """One comparison: the vocabulary is sharded over ranks; if tied, the weight is also the input embedding."""

    vocabulary: int
    temperature: float = 1.0
    reverse: bool = False
    masked: bool = False
    tied: bool = False


# Odd and even vocabularies, whole and, on each of two ranks, an odd slice.
CASES = [
    Case(1021),
    Case(1021, temperature=2.0, masked=True),
    Case(1021, reverse=True, temperature=0.7),
    Case(1021, tied=True, masked=True),
]
SLICED = [
    Case(2 * 521),
    Case(2 * 521, temperature=2.0, masked=True),
    Case(2 * 521, reverse=True, temperature=0.7),
]
SEQUENCE, BATCH, HIDDEN = 48, 2, 64


def differences(cases: list[Case]) -> list[dict[str, float]]:
    """Return the relative differences of losses and gradients for each case; the largest entry counts as 1."""
    from prune_distill.nemo import backend

    backend.activate()
    import torch
    from megatron.core import parallel_state

    torch.use_deterministic_algorithms(True)
    ranks = torch.distributed.get_world_size()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks)
    return [_difference(case) for case in cases]


def _difference(case: Case) -> dict[str, float]:
    results = [_run(case, loss) for loss in (_upstream, _ours)]
    (theirs, *their_gradients), (ours, *our_gradients) = results
    apart = [
        ((mine - other).abs().max() / other.abs().max()).item()
        for mine, other in zip(our_gradients, their_gradients, strict=True)
    ]
    return {"loss": abs((ours - theirs) / theirs).item(), "gradient": max(apart)}


def _run(case: Case, loss: Callable[..., Any]) -> tuple[Any, ...]:
    """Return the mean loss over tokens, and its gradients by hidden states and weight."""
    import torch

    generator = torch.Generator().manual_seed(0)
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    hidden = torch.randn(SEQUENCE, BATCH, HIDDEN, generator=generator).requires_grad_()
    teacher_states = torch.randn(SEQUENCE, BATCH, HIDDEN, generator=generator)
    weight, teacher_weight = (
        (0.3 * torch.randn(case.vocabulary, HIDDEN, generator=generator)).chunk(ranks)[rank].clone() for _ in range(2)
    )
    weight.requires_grad_()
    mask = torch.ones(SEQUENCE, BATCH)
    if case.masked:
        mask[: SEQUENCE // 3] = 0
    states = hidden
    if case.tied:
        ids = torch.randint(case.vocabulary, (SEQUENCE, BATCH), generator=generator)
        states = hidden + torch.nn.functional.embedding(ids, weight)
    total = loss(case, (states, weight), (teacher_states, teacher_weight), mask)
    total.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    torch.distributed.all_reduce(hidden.grad)
    return total.detach(), hidden.grad, weight.grad


def _upstream(case: Case, student: Any, teacher: Any, mask: Any) -> Any:
    """Reduce the loss like NeMo (nemo/collections/llm/modelopt/distill/model.py:_masked_token_loss)."""
    import torch
    from modelopt.torch.distill.plugins.megatron import LogitsKLLoss

    ranks = torch.distributed.get_world_size()
    config: Any = SimpleNamespace(tensor_model_parallel_size=ranks, sequence_parallel=False)
    criterion = LogitsKLLoss(config, case.temperature, case.reverse)
    with torch.no_grad():
        teacher_states = torch.nn.functional.linear(*teacher)
    losses, *_ = criterion(torch.nn.functional.linear(*student), teacher_states)
    total = (losses * mask.t()).sum() / mask.sum()
    if ranks > 1:
        torch.distributed.all_reduce(total)
    return total


def _ours(case: Case, student: Any, teacher: Any, mask: Any) -> Any:
    """Compute our loss without the squared temperature, which upstream omits."""
    import torch

    from prune_distill.distillation.kd_loss import distillation_loss
    from prune_distill.distillation.loss_chunk import Head
    from prune_distill.schema import Divergence, KdConfig

    divergence = Divergence.reverse_kl if case.reverse else Divergence.forward_kl
    spec = KdConfig(divergence, case.temperature, kd_weight=case.temperature**-2, chunk_tokens=20)
    heads = [Head(states.flatten(0, 1), weight) for states, weight in (student, teacher)]
    total, _ = distillation_loss(*heads, None, mask.flatten(), spec, torch.distributed.group.WORLD)
    return total / mask.sum()


def nothing_to_learn() -> dict[str, Any]:
    """What micro batches cost of which every token is masked, as in a chat where only a prompt fits: one by itself, and
    one beside another of which two tokens are learned."""
    from prune_distill.nemo import backend

    backend.activate()
    import torch
    from megatron.core import parallel_state

    from prune_distill.distillation.distillation import LossReduction
    from prune_distill.errors import InputError
    from prune_distill.nemo.token_loss import TokenLoss
    from prune_distill.schema import KdConfig

    parallel_state.initialize_model_parallel()
    nothing = {"loss_mask": torch.zeros(2, 4)}
    some = {"loss_mask": torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])}
    losses = torch.arange(8.0).view(2, 4)
    distilled = LossReduction(KdConfig(), core=None, fused=True)
    distilled.setup(nothing)
    loss, report = distilled((torch.zeros((), requires_grad=True), losses, losses))
    found = {"loss": float(loss), "step": float(distilled.reduce([report]))}
    plain, reports = TokenLoss(), []
    for batch in (nothing, some):
        plain.setup(batch)
        reports.append(plain(losses)[1])
    plain.reduce(reports[:1])
    try:
        plain.mean("the tests")
    except InputError as fault:
        found["fault"] = str(fault)
    return {**found, "both": float(plain.reduce(reports)), "mean": plain.mean("the tests")}
