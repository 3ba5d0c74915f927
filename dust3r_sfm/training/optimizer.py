"""Muon for the network's matrices and Adam for the rest, over flat buffers, with an averaged copy of the weights.

Muon (Jordan et al. 2024) steps along the orthogonalised momentum of a matrix; its size is matched to Adam's
(Liu et al. 2025), so that both share one learning rate. Matrices of one shape are orthogonalised as one batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(x: Float[Tensor, "n r c"], steps: int = 5) -> Float[Tensor, "n r c"]:
    """About the nearest (semi-)orthogonal matrix to each, by Newton-Schulz iterations in bfloat16."""
    a, b, c = _NEWTON_SCHULZ
    tall = x.shape[1] > x.shape[2]
    y = x.transpose(1, 2) if tall else x
    y = (y / (y.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(steps):
        s = y @ y.transpose(1, 2)
        y = torch.baddbmm(y, torch.baddbmm(s, s, s, beta=b, alpha=c), y, beta=a)
    return (y.transpose(1, 2) if tall else y).to(x.dtype)


@dataclass(frozen=True)
class _Stack:
    """Matrices of one shape that lie one after the other in the flat buffers."""

    start: int
    count: int
    rows: int
    columns: int

    def of(self, flat: Tensor) -> Float[Tensor, "n r c"]:
        size = self.count * self.rows * self.columns
        return flat[self.start : self.start + size].view(self.count, self.rows, self.columns)


def _matrix_shape(name: str, p: Tensor, muon: bool) -> tuple[int, int] | None:
    """Shape of the matrices a parameter holds for Muon; queries, keys and values are three."""
    if not muon or p.ndim != 2 or "blocks" not in name:
        return None
    return (p.shape[1], p.shape[1]) if "qkv" in name else tuple(p.shape)


class Optimizer:
    """Owns the model's parameters as one flat float32 buffer; `take_gradients` after each backward fills another."""

    def __init__(
        self,
        model: nn.Module,
        muon: bool = True,
        betas: tuple[float, float] = (0.9, 0.95),
        momentum: float = 0.95,
        weight_decay: float = 0.05,
    ) -> None:
        self.betas, self.momentum, self.weight_decay = betas, momentum, weight_decay
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        shapes = {n: _matrix_shape(n, p, muon) for n, p in named}
        named.sort(key=lambda item: (shapes[item[0]] is None, shapes[item[0]] or (0, 0)))
        total = sum(p.numel() for _, p in named)
        device = named[0][1].device
        self.parameters, self.gradient = torch.empty(total, device=device), torch.zeros(total, device=device)
        self.stacks: list[_Stack] = []
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []
        self.names = [n for n, _ in named]
        at = 0
        for name, p in named:
            self._claim(p, at)
            if shapes[name]:
                self._stack(at, p.numel(), *shapes[name])
            at += p.numel()
        self.split = sum(s.count * s.rows * s.columns for s in self.stacks)
        self.average = self.parameters.clone()
        self.first, self.second = torch.zeros_like(self.parameters), torch.zeros(total - self.split, device=device)
        self.decayed = torch.cat([torch.full((p.numel(),), float(p.ndim > 1)) for n, p in named if not shapes[n]]).to(
            device
        )
        self.step_count = 0
        self._model_names = dict(named)

    def _claim(self, p: nn.Parameter, at: int) -> None:
        """Moves a parameter and its gradient into the flat buffers."""
        view = self.parameters[at : at + p.numel()].view_as(p)
        with torch.no_grad():
            view.copy_(p)
        p.data = view
        self._gradients.append((p, self.gradient[at : at + p.numel()].view_as(p)))

    def _stack(self, at: int, size: int, rows: int, columns: int) -> None:
        count = size // (rows * columns)
        last = self.stacks[-1] if self.stacks else None
        if last and (last.rows, last.columns) == (rows, columns):
            self.stacks[-1] = _Stack(last.start, last.count + count, rows, columns)
        else:
            self.stacks.append(_Stack(at, count, rows, columns))

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Moves what backward left in the parameters into `gradient`; zeros for those that the loss left out."""
        reached = [(view, p.grad) for p, view in self._gradients if p.grad is not None]
        torch._foreach_copy_([view for view, _ in reached], [gradient for _, gradient in reached])
        for p, view in self._gradients:
            if p.grad is None:
                view.zero_()
            p.grad = None

    @torch.no_grad()
    def step(self, learning_rate: float, clip: float, average_decay: float) -> Tensor:
        """One update from `gradient`, which is left as it is; returns the gradient's norm, without waiting for it."""
        self.step_count += 1
        norm = self.gradient.norm()
        g = self.gradient * (clip / (norm + 1e-6)).clamp(max=1.0)
        g = torch.where(norm.isfinite(), g, torch.zeros_like(g))  # a step that overflowed changes little
        self._muon(g, learning_rate)
        self._adam(g[self.split :], learning_rate)
        self.average.lerp_(self.parameters, 1 - min(average_decay, (1 + self.step_count) / (10 + self.step_count)))
        return norm

    def _muon(self, g: Tensor, learning_rate: float) -> None:
        for stack in self.stacks:
            gradient, momentum, p = stack.of(g), stack.of(self.first), stack.of(self.parameters)
            momentum.lerp_(gradient, 1 - self.momentum)
            update = orthogonalize(torch.lerp(gradient, momentum, self.momentum))
            p.mul_(1 - learning_rate * self.weight_decay)
            p.add_(update, alpha=-learning_rate * 0.2 * math.sqrt(max(stack.rows, stack.columns)))

    def _adam(self, g: Tensor, learning_rate: float) -> None:
        b1, b2 = self.betas
        first, p = self.first[self.split :], self.parameters[self.split :]
        first.lerp_(g, 1 - b1)
        self.second.mul_(b2).addcmul_(g, g, value=1 - b2)
        scale = math.sqrt(1 - b2**self.step_count) / (1 - b1**self.step_count)
        p.mul_(1 - learning_rate * self.weight_decay * self.decayed)
        p.addcdiv_(first, self.second.sqrt() + 1e-8 * math.sqrt(1 - b2**self.step_count), value=-learning_rate * scale)

    def averaged_weights(self) -> dict[str, Tensor]:
        """The averaged weights by parameter name."""
        out, at = {}, 0
        for name in self.names:
            p = self._model_names[name]
            out[name] = self.average[at : at + p.numel()].view_as(p).clone()
            at += p.numel()
        return out

    def state(self) -> dict[str, Tensor]:
        """All that a resumed run needs; parameters are in the order of `names`."""
        keys = ("parameters", "average", "first", "second")
        return {k: getattr(self, k) for k in keys} | {"step_count": torch.tensor(self.step_count)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        for key in ("parameters", "average", "first", "second"):
            getattr(self, key).copy_(state[key])
        self.step_count = int(state["step_count"])
