"""Second moments of a layer's inputs, gathered batch by batch: all that a least-squares fit needs."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

__all__ = ["Fit", "Moments"]

_CHUNK = 8192  # rows multiplied at a time


class Moments:
    """Running sums over rows a that a layer reads, and optionally over their drift d = r - a from rows r.

    ``a`` comes from the network as converted so far, ``r`` from the original one. Holds one (K, K) matrix per
    group in float64, two once a drift is given; never the rows.

    >>> moments = Moments()
    >>> moments.add(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]))
    >>> moments.second.tolist()
    [[[5.0, 7.0], [7.0, 10.0]]]
    """

    def __init__(self) -> None:
        self.count = 0
        self._aa: Tensor | None = None
        self._da: Tensor | None = None
        self._a = self._d = torch.zeros(())
        self._drift: Tensor | None = None

    def add(self, rows: Tensor, original: Tensor | None = None, weight: Tensor | None = None) -> None:
        """Add rows (groups, samples, K); of the original network the same rows, and the weight (g, R, K)."""
        rows = rows.float() if rows.dtype not in (torch.float32, torch.float64) else rows
        for start in range(0, rows.shape[1], _CHUNK):
            part = rows[:, start : start + _CHUNK]
            self.count += part.shape[1]
            self._aa = _plus(self._aa, part.mT @ part)
            self._a = self._a + part.sum(1, dtype=torch.float64)
            if original is not None and weight is not None:
                self._add_drift(original[:, start : start + _CHUNK].to(rows.dtype) - part, part, weight)

    def _add_drift(self, drift: Tensor, part: Tensor, weight: Tensor) -> None:
        self._da = _plus(self._da, drift.mT @ part)
        self._d = self._d + drift.sum(1, dtype=torch.float64)
        energy = (drift @ weight.to(drift.dtype).mT).square().sum(1, dtype=torch.float64)
        self._drift = energy if self._drift is None else self._drift + energy

    @property
    def second(self) -> Tensor:
        """E[a aᵀ], float64 (groups, K, K)."""
        return cast(Tensor, self._aa) / self.count

    @property
    def mean_square(self) -> Tensor:
        """E[a²], float64 (groups, K)."""
        return self.second.diagonal(dim1=1, dim2=2)

    def fit(self, weight: Tensor, *, bias: bool) -> "Fit":
        """The least-squares problem of a layer with this weight (groups, R, K)."""
        weight = weight.double()
        mean = self._a / self.count
        if self._da is None or self._drift is None:
            none = torch.zeros(weight.shape[:2], dtype=torch.float64, device=weight.device)
            return Fit(weight, self.second, mean, None, torch.zeros_like(mean), none, bias)
        drift = self._drift / self.count
        return Fit(weight, self.second, mean, self._da / self.count, self._d / self.count, drift, bias)


@dataclass(frozen=True, eq=False)
class Fit:
    """min over V, c of E‖(W r + b) - (V a + b + c)‖², with c = 0 unless the layer has a bias.

    Attributes:
        weight: W, float64 (groups, R, K), as all that follows.
        second, mean: E[a aᵀ] and E[a].
        shift, drift_mean, drift_energy: E[d aᵀ] (None if r = a), E[d] and E[(W d)²] of the drift d = r - a.
        bias: whether c is free.
    """

    weight: Tensor
    second: Tensor
    mean: Tensor
    shift: Tensor | None
    drift_mean: Tensor
    drift_energy: Tensor
    bias: bool

    def normal_equations(self, ridge: float) -> tuple[Tensor, Tensor]:
        """H and C of V H = C, with ``ridge`` times the mean diagonal of H pulling V towards W.

        A free bias takes up all means, so it is the same problem in centred inputs: a constant input as one
        more column would give the same solution from a worse conditioned H.
        """
        hessian = self.second
        cross = hessian if self.shift is None else hessian + self.shift
        if self.bias:
            means = self.mean[:, :, None] @ self.mean[:, None, :]
            hessian = hessian - means
            cross = cross - means - self.drift_mean[:, :, None] @ self.mean[:, None, :]
        size = hessian.diagonal(dim1=1, dim2=2).mean(1).clamp_min(0.0)
        size = torch.where(size > 0, ridge * size, 1.0)  # constant or dead inputs: any pull gives V = W
        pull = torch.diag_embed(size[:, None].expand(-1, hessian.shape[1]))
        return hessian + pull, self.weight @ (cross + pull)

    def bias_step(self, found: Tensor) -> Tensor:
        """The best c (groups, R) for V = ``found``; zero if the bias is not free."""
        if not self.bias:
            return torch.zeros_like(found[:, :, 0])
        return self._mean_error(found)

    def _mean_error(self, found: Tensor) -> Tensor:
        mean_d, mean_a = self.drift_mean[:, :, None], self.mean[:, :, None]
        return (self.weight @ mean_d + (self.weight - found) @ mean_a).squeeze(-1)

    def error(self, found: Tensor, step: Tensor | None = None) -> float:
        """E‖error of the outputs‖² for V = ``found`` and c = ``step``, as a part of E‖W r‖²."""
        lost = self._energy(self.weight - found)
        if step is not None:
            lost = lost + (step * (step - 2 * self._mean_error(found))).sum()
        total = self._energy(self.weight)
        return float((lost / total).clamp_min(0.0)) if total > 0 else 0.0

    def _energy(self, change: Tensor) -> Tensor:
        """E‖W d + change a‖²."""
        energy = ((change @ self.second) * change).sum() + self.drift_energy.sum()
        if self.shift is not None:
            energy = energy + 2 * ((self.weight @ self.shift) * change).sum()
        return energy


def _plus(total: Tensor | None, product: Tensor) -> Tensor:
    return product.double() if total is None else total.add_(product)
