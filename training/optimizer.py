"""Muon for the matrices of a model, Adam for everything else.

Muon (Jordan et al., 2024) replaces the momentum of a matrix by the nearest matrix with equal singular values, found by
five steps of a Newton-Schulz iteration, in bfloat16 where that is fast. Scaled so that an update has the size of one of
Adam's (Liu et al., 2025).
"""

from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

STEPS = 5
ADAM = 0.1  # factor of the learning rate: at the full rate, rare words are not learnt
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class Muon(Optimizer):
    """`params`: pairs of a name and a parameter. Matrices inside layers take Muon's steps, all others Adam's."""

    def __init__(self, params: Iterable[tuple[str, Tensor]], lr: float = 1e-3, weight_decay: float = 0.01) -> None:
        named = list(params)
        matrices = [p for name, p in named if p.ndim == 2 and (".layers." in name or "projector" in name)]
        ids = {id(p) for p in matrices}
        others = [p for _, p in named if id(p) not in ids]
        groups: list[dict[str, Any]] = [{"params": matrices, "muon": True}, {"params": others, "muon": False}]
        super().__init__(
            [group for group in groups if group["params"]],
            dict(lr=lr, weight_decay=weight_decay, momentum=0.95, betas=(0.9, 0.98)),
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update: Muon for matrices within layers, AdamW for everything else."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                p.mul_(1 - group["lr"] * group["weight_decay"] * (p.ndim > 1))
                if group["muon"]:
                    momentum = state.setdefault("momentum", torch.zeros_like(p))
                    momentum.lerp_(p.grad, 1 - group["momentum"])
                    update = orthogonal(p.grad.lerp(momentum, group["momentum"]))
                    p.add_(update, alpha=-0.2 * max(p.shape) ** 0.5 * group["lr"])
                else:
                    first, second = (state.setdefault(name, torch.zeros_like(p)) for name in ("first", "second"))
                    state["step"] = state.get("step", 0) + 1
                    slow, slower = group["betas"]
                    first.lerp_(p.grad, 1 - slow)
                    second.lerp_(p.grad.square(), 1 - slower)
                    scale = (second / (1 - slower ** state["step"])).sqrt_().add_(1e-8)
                    p.addcdiv_(first / (1 - slow ** state["step"]), scale, value=-ADAM * group["lr"])


def orthogonal(matrix: Tensor) -> Tensor:
    """Roughly U V^T of the matrix's singular value decomposition: singular values between 0.7 and 1.2."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    x = x.bfloat16() if bfloat16_is_fast(x.device.type) else x
    for _ in range(STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).to(matrix.dtype)


@cache
def bfloat16_is_fast(device_type: str) -> bool:
    """Whether products in bfloat16 are faster than in float32: on GPUs, and on CPUs with instructions for them."""
    if device_type != "cpu":
        return True
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    return "avx512_bf16" in flags or "amx_bf16" in flags
