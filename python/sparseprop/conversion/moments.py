"""Second moments of a layer's inputs, gathered batch by batch: all that a least-squares fit needs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparseprop.conversion.sums import Sums

__all__ = ["Fit", "Moments"]

_CHUNK = 8192  # rows multiplied at a time
_CONSTANT = 4.0  # inputs that spread by fewer roundings of their size are constant


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
        self._a, self._d = Sums(), Sums()
        self._rounding = 0.0
        self._energy: Tensor | None = None

    @property
    def count(self) -> int:
        """Number of rows."""
        return self._a.count

    @property
    def finite(self) -> bool:
        """Whether all rows were, and their squares."""
        return self._a.finite and self._d.finite

    def add(self, rows: Tensor, original: Tensor | None = None, weight: Tensor | None = None) -> None:
        """Add rows (groups, samples, K); of the original network the same rows, and the weight (g, R, K).

        The latter two come with all rows or with none.
        """
        rows = rows.float() if rows.dtype not in (torch.float32, torch.float64) else rows
        self._rounding = torch.finfo(rows.dtype).eps
        for start in range(0, rows.shape[1], _CHUNK):
            part = rows[:, start : start + _CHUNK]
            moved = self._a.moved(part)
            self._a.add(moved, moved)
            if original is not None and weight is not None:
                drift = self._d.moved(original[:, start : start + _CHUNK].to(rows.dtype) - part)
                self._d.add(drift, moved)
                energy = (drift @ weight.to(drift.dtype).mT).square().sum(1, dtype=torch.float64)
                self._energy = energy if self._energy is None else self._energy + energy

    @property
    def covariance(self) -> Tensor:
        """E[a aᵀ] - E[a] E[a]ᵀ, float64 (groups, K, K); zero for constant inputs."""
        varies = self._varies()
        return self._a.centred(self._a).mul_(varies[:, None, :]).mul_(varies[:, :, None])

    @property
    def second(self) -> Tensor:
        """E[a aᵀ], float64 (groups, K, K)."""
        return _plus_outer(self.covariance, self._a.mean, self._a.mean)

    @property
    def mean_square(self) -> Tensor:
        """E[a²], float64 (groups, K)."""
        return self._a.variance + self._a.mean.square()

    def fit(self, weight: Tensor, *, bias: bool) -> "Fit":
        """The least-squares problem of a layer with this weight (groups, R, K)."""
        weight, mean = weight.double(), self._a.mean
        if self._energy is None:
            none = torch.zeros(weight.shape[:2], dtype=torch.float64, device=weight.device)
            return Fit(
                weight, self.covariance, mean, None, torch.zeros_like(mean), none, bias, self._rounding
            )
        shift = self._d.centred(self._a).mul_(self._varies()[:, None, :])
        moved_mean = (weight @ self._d.offset[:, :, None]).squeeze(-1)
        energy = (self._energy / self.count - moved_mean.square()).clamp_min(0.0)
        return Fit(weight, self.covariance, mean, shift, self._d.mean, energy, bias, self._rounding)

    def _varies(self) -> Tensor:
        return self._a.variance > (_CONSTANT * self._rounding) ** 2 * self.mean_square


@dataclass(frozen=True, eq=False)
class Fit:
    """min over V, c of E‖(W r + b) - (V a + b + c)‖², with c = 0 unless the layer has a bias.

    Attributes:
        weight: W, float64 (groups, R, K), as all that follows.
        covariance, mean: E[aᶜ aᶜᵀ] and E[a], where ᶜ takes the mean off.
        shift, drift_mean, drift_energy: of the drift d = r - a: E[dᶜ aᶜᵀ] (None if r = a), E[d], E[(W dᶜ)²].
        bias: whether c is free.
        rounding: that of the rows' type.
    """

    weight: Tensor
    covariance: Tensor
    mean: Tensor
    shift: Tensor | None
    drift_mean: Tensor
    drift_energy: Tensor
    bias: bool
    rounding: float

    def normal_equations(self, ridge: float) -> tuple[Tensor, Tensor]:
        """H and C of V H = C, with ``ridge`` times the mean diagonal of H pulling V towards W.

        A free bias takes up all means, so it is the same problem in centred inputs: a constant input as one
        more column would give the same solution from a worse conditioned H. The pull is never less than
        what rounding does to H, which would not be positive definite otherwise.
        """
        hessian = self.covariance.clone()
        ridge = max(ridge, self.rounding * hessian.shape[1])
        cross = hessian if self.shift is None else hessian + self.shift
        if not self.bias:
            cross = _plus_outer(cross, self.mean + self.drift_mean, self.mean)
            hessian = _plus_outer(hessian, self.mean, self.mean)
        size = hessian.diagonal(dim1=1, dim2=2).mean(1)
        pull = torch.where(size > 0, ridge * size, 1.0)  # constant or dead inputs: any pull gives V = W
        target = self.weight @ cross + pull[:, None, None] * self.weight
        hessian.diagonal(dim1=1, dim2=2).add_(pull[:, None])
        return hessian, target

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
        lost = self._energy(found, step)
        total = self._energy(torch.zeros_like(found), None)
        return float(lost / total) if total != 0 else 0.0

    def _energy(self, found: Tensor, step: Tensor | None) -> Tensor:
        """E‖W r - found a - step‖²: of what varies, and of the mean."""
        change = self.weight - found
        varying = ((change @ self.covariance) * change).sum() + self.drift_energy.sum()
        if self.shift is not None:
            varying = varying + 2 * ((self.weight @ self.shift) * change).sum()
        mean = self._mean_error(found) if step is None else self._mean_error(found) - step
        return varying.clamp_min(0.0) + mean.square().sum()


def _plus_outer(matrix: Tensor, column: Tensor, row: Tensor) -> Tensor:
    return torch.baddbmm(matrix, column[:, :, None], row[:, None, :])
