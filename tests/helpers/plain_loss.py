"""The distillation loss as one would write it first, from whole logits, and exact gradients to compare with.

given = random_heads(tokens=8192, hidden=4096, vocabulary=151936, device="cuda", dtype=torch.bfloat16)
chunked_gradients(given, config).errors(exact_gradients(given, config))     # the library's loss, next to float64
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from prune_distill.distillation.kd_loss import distillation_loss
from prune_distill.distillation.loss_chunk import Head
from prune_distill.schema import Divergence, KdConfig

# Of loss and gradients to float64 (`Gradients.errors`), by the inputs' type. fp32: sums of 64 to 1009 products in
# another order; at most 1.4e-6 measured on a CPU. bf16: the logits' gradient and the results are rounded to 8 bits;
# gradients at most 3e-3 on a CPU. Not measured on a GPU, whose random numbers are others.
TOLERANCES = {torch.float32: {"loss": 1e-5, "gradients": 1e-5}, torch.bfloat16: {"loss": 1e-5, "gradients": 5e-3}}
# All divergences with and without cross-entropy, and a temperature; chunks that do not divide the tokens.
CONFIGS = [
    KdConfig(divergence, temperature, kd_weight=1 - lm_weight, lm_weight=lm_weight, chunk_tokens=40)
    for divergence in Divergence
    for temperature, lm_weight in ((1.0, 0.0), (1.0, 0.3), (2.0, 0.3))
]


@dataclass(frozen=True)
class Heads:
    """What the loss is computed from: `[n, h]` hidden states and `[v, h]` output weights of both models, `[n]` labels.

    Attributes:
        mask: `[n]`, the weight of each token.
    """

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor
    mask: Tensor

    def first(self, tokens: int) -> Heads:
        """Return the same with the first tokens only."""
        rows = {name: getattr(self, name)[:tokens].detach() for name in ("hidden", "teacher_hidden", "labels", "mask")}
        return dataclasses.replace(self, **rows)

    def as_parameters(self) -> Heads:
        """Return the same tensors, of which the student's get gradients."""
        hidden, weight = (tensor.detach().requires_grad_() for tensor in (self.hidden, self.weight))
        return dataclasses.replace(self, hidden=hidden, weight=weight)


def random_heads(tokens: int, hidden: int, vocabulary: int, device: str, dtype: torch.dtype) -> Heads:
    """Make heads whose logits have a standard deviation of about 3, the student's and the teacher's being related."""
    generator = torch.Generator(device).manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    states, weight = noise(tokens, hidden), noise(vocabulary, hidden) * (3 / hidden**0.5)
    return Heads(
        hidden=states.to(dtype),
        weight=weight.to(dtype),
        teacher_hidden=(states + 0.5 * noise(tokens, hidden)).to(dtype),
        teacher_weight=(weight + noise(vocabulary, hidden) * (1 / hidden**0.5)).to(dtype),
        labels=torch.randint(vocabulary, (tokens,), device=device, generator=generator),
        mask=torch.ones(tokens, device=device),
    )


def plain_loss(given: Heads, config: KdConfig) -> Tensor:
    """The loss summed over tokens, from whole logits in fp32, for autograd or torch.compile."""
    student = (given.hidden @ given.weight.t()).float()
    with torch.no_grad():
        teacher = (given.teacher_hidden @ given.teacher_weight.t()).float()
    return (token_losses(student, teacher, given.labels, config) * given.mask).sum()


def token_losses(student: Tensor, teacher: Tensor, labels: Tensor, config: KdConfig) -> Tensor:
    """The loss of every token `[n]` from the logits `[n, v]`; the definitions of `prune_distill.schema.Divergence`."""
    scaled = [logits if config.temperature == 1 else logits / config.temperature for logits in (student, teacher)]
    log_q, log_p = (log_softmax(logits, -1) for logits in scaled)
    if config.divergence is Divergence.forward_kl:
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    elif config.divergence is Divergence.reverse_kl:
        divergence = (log_q.exp() * (log_q - log_p)).sum(-1)
    else:
        p, q = log_p.exp(), log_q.exp()
        log_m = ((p + q) / 2).log()
        divergence = ((p * (log_p - log_m)).sum(-1) + (q * (log_q - log_m)).sum(-1)) / 2
    loss = config.kd_weight * config.temperature**2 * divergence
    if config.lm_weight:
        loss = loss + config.lm_weight * cross_entropy(student, labels, reduction="none")
    return loss


def chunked_loss(given: Heads, config: KdConfig) -> Tensor:
    """The library's loss."""
    student, teacher = Head(given.hidden, given.weight), Head(given.teacher_hidden, given.teacher_weight)
    return distillation_loss(student, teacher, given.labels, given.mask, config)[0]


@dataclass(frozen=True)
class Gradients:
    """A loss, and its gradients by the student's hidden states and output weight."""

    loss: Tensor
    hidden: Tensor
    weight: Tensor

    def errors(self, exact: Gradients) -> dict[str, float]:
        """Return |this - exact| / |exact| of each, in the Euclidean norm."""
        return {name: _error(getattr(self, name), getattr(exact, name)) for name in ("loss", "hidden", "weight")}

    def rounded(self, dtype: torch.dtype) -> Gradients:
        """Return the nearest gradients of a type: no method that returns this type has a smaller error."""
        return Gradients(self.loss, self.hidden.to(dtype), self.weight.to(dtype))


def _error(found: Tensor, exact: Tensor) -> float:
    pairs = zip(_rows(found), _rows(exact), strict=True)
    difference = sum(float((mine.double() - other).square().sum()) for mine, other in pairs)
    return float((difference / float(exact.square().sum())) ** 0.5)


def _rows(values: Tensor) -> tuple[Tensor, ...]:
    """Cut `[..., h]` into a few rows at a time: the difference of whole weights in float64 would be large."""
    return values.reshape(-1, values.shape[-1] if values.dim() else 1).split(4096)


def chunked_gradients(given: Heads, config: KdConfig) -> Gradients:
    """Compute the library's loss and gradients."""
    given = given.as_parameters()
    return _gradients(chunked_loss(given, config), given)


def plain_gradients(given: Heads, config: KdConfig) -> Gradients:
    """Compute the loss and gradients of whole logits in fp32 and autograd."""
    given = given.as_parameters()
    return _gradients(plain_loss(given, config), given)


def _gradients(loss: Tensor, given: Heads) -> Gradients:
    loss.backward()  # type: ignore[no-untyped-call]
    assert given.hidden.grad is not None
    assert given.weight.grad is not None
    return Gradients(loss.detach(), given.hidden.grad, given.weight.grad)


def exact_gradients(given: Heads, config: KdConfig, block: int = 64) -> Gradients:
    """Compute loss and gradients in float64 from the tensors as they are stored, `block` tokens at a time."""
    weight, teacher_weight = given.weight.double(), given.teacher_weight.double()
    total = torch.zeros((), dtype=torch.float64, device=weight.device)
    grad_hidden, grad_weight = [], torch.zeros_like(weight)
    for start in range(0, len(given.hidden), block):
        rows = slice(start, start + block)
        hidden = given.hidden[rows].detach().double()
        student = (hidden @ weight.t()).requires_grad_()
        teacher = given.teacher_hidden[rows].double() @ teacher_weight.t()
        loss = (token_losses(student, teacher, given.labels[rows], config) * given.mask[rows].double()).sum()
        (gradient,) = torch.autograd.grad(loss, student)
        total += loss.detach()
        grad_hidden.append(gradient @ weight)
        grad_weight.addmm_(gradient.t(), hidden)
    return Gradients(total, torch.cat(grad_hidden), grad_weight)


def assert_exact(config: KdConfig, device: str, dtype: torch.dtype) -> None:
    """Check the library's loss and gradients on a small head against float64."""
    given = random_heads(96, 64, 1009, device, dtype)
    exact = exact_gradients(given, config)
    errors = chunked_gradients(given, config).errors(exact)
    tolerance = TOLERANCES[dtype]
    assert errors["loss"] < tolerance["loss"], errors
    assert max(errors["hidden"], errors["weight"]) < tolerance["gradients"], errors
