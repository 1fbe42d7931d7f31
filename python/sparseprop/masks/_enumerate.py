"""Exact masks of tiny tiles by trying every pattern (90 for 2:4)."""

from functools import cache
from itertools import combinations, product

import torch
from torch import Tensor

_CHUNK = 16384


@cache
def _table(n: int, m: int) -> tuple[Tensor, Tensor]:
    """All n-subsets of a row, and for every feasible tile the index of each row's subset; lexicographic."""
    rows = [[int(j in kept) for j in range(m)] for kept in combinations(range(m), n)]
    rows.sort()
    tiles = [
        choice
        for choice in product(range(len(rows)), repeat=m)
        if all(sum(rows[r][j] for r in choice) == n for j in range(m))
    ]
    return torch.tensor(rows, dtype=torch.bool), torch.tensor(tiles)


def enumerate_tiles(tiles: Tensor, n: int) -> Tensor:
    """(tiles, m, m) scores to their best masks; ties go to the lexicographically first pattern."""
    rows, choices = (t.to(tiles.device) for t in _table(n, tiles.shape[1]))
    return torch.cat([_best(chunk, rows, choices) for chunk in torch.split(tiles, _CHUNK)])


def _best(tiles: Tensor, rows: Tensor, choices: Tensor) -> Tensor:
    # sums in one fixed order, unlike a matrix product's, so that ties do not depend on the batch
    scores = tiles.double()
    # no sum of a tile overflows; by a power of two, so that none is rounded another way
    excess = (scores.amax((1, 2), keepdim=True).frexp().exponent - 1000).clamp_min(0)
    scores = scores * torch.exp2(-excess.double())
    row_sums = torch.zeros(
        tiles.shape[0], tiles.shape[1], rows.shape[0], dtype=torch.float64, device=tiles.device
    )
    for j in range(tiles.shape[2]):
        row_sums += scores[:, :, j, None] * rows[:, j]
    totals = torch.zeros(tiles.shape[0], choices.shape[0], dtype=torch.float64, device=tiles.device)
    for i in range(tiles.shape[1]):
        totals += row_sums[:, i, choices[:, i]]
    return rows[choices[totals.argmax(1)]]
