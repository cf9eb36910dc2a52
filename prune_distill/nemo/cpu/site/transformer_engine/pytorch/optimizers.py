"""Stand-in for `transformer_engine.pytorch.optimizers` (megatron/core/optimizer/__init__.py:11, clip_grads.py:11)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .._refuse import refuse, refuse_options


class FusedAdam(torch.optim.Optimizer):
    """Adam or AdamW with PyTorch's fused CPU kernel and the state layout of FusedAdam in Transformer Engine and Apex.

    `step` is an int per parameter group, `exp_avg` and `exp_avg_sq` are fp32 tensors per parameter, which
    Megatron's distributed optimizer saves and loads (megatron/core/optimizer/distrib_optimizer.py:651, :792).

    Args:
        params: fp32 parameters or parameter groups.
        lr: learning rate.
        bias_correction: must be True.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        adam_w_mode: decoupled weight decay (AdamW) instead of an L2 term in the gradient.
        weight_decay: weight decay coefficient.
        **options: other options (amsgrad, capturable, master weights, other state types) raise.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        **options: object,
    ) -> None:
        if not bias_correction:
            refuse("FusedAdam without bias correction", "set bias_correction=True")
        refuse_options("FusedAdam", {name: value for name, value in options.items() if name != "set_grad_none"})
        defaults = {"lr": lr, "bias_correction": True, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self._update = torch._fused_adamw_ if adam_w_mode else torch._fused_adam_

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, grad_scaler: object = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient, and return the result of `closure`.

        Raises:
            NotImplementedError: for `grad_scaler`, and for parameters that are not fp32.
        """
        if grad_scaler is not None:
            refuse("FusedAdam with a gradient scaler", "unscale the gradients before the step")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            # As in Transformer Engine, groups without parameters do not count steps.
            if group["params"]:
                group["step"] = group.get("step", 0) + 1
                self._update_group(group)
        return loss

    def _update_group(self, group: dict[str, Any]) -> None:
        params = [param for param in group["params"] if param.grad is not None]
        if not params:
            return
        states = [self._state_of(param) for param in params]
        self._update(
            params,
            [param.grad.float() for param in params],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [torch.tensor(float(group["step"]))] * len(params),
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )

    def _state_of(self, param: Tensor) -> dict[str, Tensor]:
        if param.dtype != torch.float32:
            refuse(f"FusedAdam for {param.dtype} parameters", "give it the fp32 main parameters")
        state = self.state[param]
        if not state:
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        return state


class FusedSGD(torch.optim.Optimizer):
    """Imported by Megatron along with FusedAdam; the constructor raises NotImplementedError."""

    def __init__(self, *_: object, **__: object) -> None:
        refuse("FusedSGD", "set optimizer='adam'")


def multi_tensor_l2norm(
    chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], per_tensor: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the L2 norm `[1]` over all tensors of the first list, and that of each tensor `[n]` if `per_tensor`.

    `chunk_size` and `noop_flag` are arguments of the CUDA kernel and ignored.
    """
    norms = torch.stack(torch._foreach_norm(tensor_lists[0]))
    return torch.linalg.vector_norm(norms).reshape(1), norms if per_tensor else None


def multi_tensor_scale(chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], scale: float) -> None:
    """Write the tensors of the first list, times `scale`, to those of the second.

    Like Megatron's fallback (megatron/core/utils.py:1034) it does not report infinities in `noop_flag`.
    """
    source, target = tensor_lists
    if all(a is b for a, b in zip(source, target, strict=True)):
        torch._foreach_mul_(target, scale)
    else:
        torch._foreach_copy_(target, torch._foreach_mul(source, scale))


def multi_tensor_applier(
    op: Callable[..., Any], noop_flag: Tensor, tensor_lists: list[list[Tensor]], *args: Any
) -> Any:
    """Call one of the functions above with Megatron's signature (megatron/core/optimizer/clip_grads.py:108)."""
    return op(2048 * 32, noop_flag, tensor_lists, *args)
