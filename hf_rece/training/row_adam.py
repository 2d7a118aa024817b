"""AdamW that updates only the rows that a step touched: for row-sparse gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from hf_rece.errors import ArgumentError


class RowAdamW(torch.optim.Optimizer):
    """AdamW for parameters with dense and with row-sparse gradients.

    Parameters with a dense gradient are updated as by torch.optim.AdamW. Of a parameter with a
    sparse gradient, only the rows in it are touched:

        m_r <- beta1 m_r + (1 - beta1) g_r,  v_r <- beta2 v_r + (1 - beta2) g_r^2
        w_r <- (1 - lr weight_decay) w_r
               - lr (m_r / (1 - beta1^t)) / (sqrt(v_r / (1 - beta2^t)) + eps)

    t counts all steps of the parameter. A row that a step leaves out keeps its value and both its
    moments: under dense Adam it would go on moving by its old momentum, its moments would fade, and
    it would decay. So a rare row moves by 3.2 lr at most when it comes back after long (beta1 = .9,
    beta2 = .999), whatever its gradient, and then stays; weight_decay is a decay per visit.
    Equals AdamW where every row is in every step.

    A step costs time and working memory in proportion to the rows touched; the moments are as large
    as the parameter.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: decay rates of the two moments, in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: decoupled.

    Raises:
        ArgumentError: for a setting out of range.

    Reference:
        Loshchilov and Hutter 2019, arXiv 1711.05101; the sparse rule is that of
        torch.optim.SparseAdam, with decoupled weight decay.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ArgumentError(name, value, "negative", "Pass 0 or more")
        if not all(0 <= beta < 1 for beta in betas):
            raise ArgumentError("betas", betas, "not decay rates", "Pass two numbers in [0, 1)")
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters by their gradients; return what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            dense, gradients = [], []
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                self._make_state(parameter)
                if gradient.is_sparse:
                    self._update_rows(parameter, gradient.coalesce(), group)
                else:
                    dense.append(parameter)
                    gradients.append(gradient)
            if dense:
                self._update_dense(dense, gradients, group)
        return loss

    def _make_state(self, parameter: Tensor) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)

    def _update_dense(
        self, parameters: list[Tensor], gradients: list[Tensor], group: dict[str, Any]
    ) -> None:
        states = [self.state[parameter] for parameter in parameters]
        beta1, beta2 = group["betas"]
        adamw(
            parameters,
            gradients,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _update_rows(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        ids, values = gradient.indices()[0], gradient.values()
        state["step"] += 1
        beta1, beta2 = group["betas"]
        step = state["step"].item()
        first = state["exp_avg"].index_select(0, ids).lerp_(values, 1 - beta1)
        second = state["exp_avg_sq"].index_select(0, ids).mul_(beta2)
        second.addcmul_(values, values, value=1 - beta2)
        state["exp_avg"].index_copy_(0, ids, first)
        state["exp_avg_sq"].index_copy_(0, ids, second)
        scale = second.div_(1 - beta2**step).sqrt_().add_(group["eps"])
        rows = parameter.index_select(0, ids).mul_(1 - group["lr"] * group["weight_decay"])
        rows.addcdiv_(first, scale, value=-group["lr"] / (1 - beta1**step))
        parameter.index_copy_(0, ids, rows)


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients, dense and sparse, to a joint norm of max_norm at most; return the norm.

    Does what torch.nn.utils.clip_grad_norm_ does, which refuses sparse gradients.

    Args:
        parameters: whose gradients are scaled in place; sparse ones are coalesced.
        max_norm: of all gradients together.

    Returns:
        The norm before, a scalar.
    """
    values = []
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
            values.append(parameter.grad.values())
        else:
            values.append(parameter.grad)
    norm = torch.nn.utils.get_total_norm(values)
    # 1e-6 as in torch: a norm of 0 is no division by 0.
    shrink = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in values:
        gradient.mul_(shrink.to(gradient.device))
    return norm
