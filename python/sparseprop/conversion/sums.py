"""Sums over rows and over products of rows, accurate however far from zero and however large these are."""

import torch
from torch import Tensor

__all__ = ["Sums"]

_SQUARED_IN_FLOAT32 = (1e-15, 1e15)


class Sums:
    """Sums of rows, and of their products with other rows, all taken from an origin: the first rows' mean.

    From zero, float32 products of rows with a large mean would lose what varies in them.

    >>> sums, rows = Sums(), torch.tensor([[[1e6, 2.0], [1e6 + 1, 4.0]]])
    >>> moved = sums.moved(rows)
    >>> sums.add(moved, moved)
    >>> sums.mean.tolist(), sums.centred(sums).tolist()
    ([[1000000.5, 3.0]], [[[0.25, 0.5], [0.5, 1.0]]])
    """

    def __init__(self) -> None:
        self.count = 0
        self._origin = self._rows = self._products = torch.zeros(())

    def moved(self, rows: Tensor) -> Tensor:
        """Rows (groups, samples, K) from the origin; float64 where float32 could not hold their squares."""
        if self.count == 0:
            self._origin = rows.mean(1, keepdim=True, dtype=torch.float64).to(rows.dtype)
        moved = rows - self._origin.to(rows.dtype)
        least, most = _SQUARED_IN_FLOAT32
        size = max(abs(float(end)) for end in torch.aminmax(moved))
        return moved if size == 0 or least < size < most else moved.double()

    def add(self, moved: Tensor, others: Tensor) -> None:
        """Add moved rows and their products with ``others``, moved as their own sums' origin has it."""
        self.count += moved.shape[1]
        wide = torch.promote_types(moved.dtype, others.dtype)
        product = moved.to(wide).mT @ others.to(wide)
        self._products = self._products.add_(product) if self._products.dim() else product.double()
        self._rows = self._rows + moved.sum(1, dtype=torch.float64)

    @property
    def finite(self) -> bool:
        """Whether all rows were, and their squares where ``others`` were the rows themselves."""
        diagonal = self._products.diagonal(dim1=1, dim2=2) if self._products.dim() else self._products
        return bool(self._rows.isfinite().all() and diagonal.isfinite().all())

    @property
    def offset(self) -> Tensor:
        """The mean from the origin, float64 (groups, K)."""
        return self._rows / self.count

    @property
    def mean(self) -> Tensor:
        """The mean, float64 (groups, K)."""
        return self._origin.double().squeeze(1) + self.offset

    @property
    def variance(self) -> Tensor:
        """Of rows that were multiplied by themselves, float64 (groups, K)."""
        squares = self._products.diagonal(dim1=1, dim2=2) / self.count
        return (squares - self.offset.square()).clamp_min(0.0)

    def centred(self, others: "Sums") -> Tensor:
        """E[x yᵀ] - E[x] E[y]ᵀ of rows x and the others y, float64 (groups, K, K)."""
        column, row = self.offset[:, :, None], others.offset[:, None, :]
        return torch.baddbmm(self._products, column, row, beta=1 / self.count, alpha=-1)
