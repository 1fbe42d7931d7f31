"""Tables and oracles shared by the tests of masks."""

from itertools import combinations, product

import torch

from sparseprop.masks._layout import as_planes, to_tiles

# families of score tiles: every solver must be right on all of them
FAMILIES = ("gaussian", "tied", "sparse", "constant", "zero", "one_hot")

# what a score tensor must not be, with the message
WRONG_SCORES = [
    (torch.tensor([[1.0, float("nan"), 1, 1]] * 4), r"scores got NaN or inf, wanted finite values"),
    (torch.tensor([[1.0, float("inf"), 1, 1]] * 4), r"scores got NaN or inf, wanted finite values"),
    (
        torch.tensor([[1.0, -2.0, 1, 1]] * 4),
        r"negative values \(lowest -2\), wanted values >= 0 such as weight.abs",
    ),
    (
        torch.ones(4, 4, dtype=torch.int64),
        r"scores got torch.int64, wanted float32, float64, bfloat16 or float16",
    ),
    (
        torch.ones(4, 4).to_sparse(),
        r"scores got layout torch.sparse_coo, wanted a strided tensor; call .to_dense",
    ),
    ([[1.0, 2.0]], r"scores got list, wanted a tensor"),
    (torch.ones(4), r"scores got shape \(4,\), wanted a Linear"),
    (torch.ones([4] * 6), r"scores got shape .*, wanted a Linear \(out, in\) or Conv"),
]
WRONG_PATTERNS = [
    (0, 4, r"n=0, m=4, wanted 1 <= n <= m"),
    (5, 4, r"n=5, m=4, wanted 1 <= n <= m"),
    (2.0, 4, r"n got 2.0, wanted an integer"),
    (2, True, r"m got True, wanted an integer"),
    (2, 65, r"m got 65, wanted at most 64"),
]
# (shape, groups): Linear and Conv1d-3d, with and without groups and ragged edges for m = 4 and 8
WEIGHTS = [
    ((16, 16), 1),
    ((19, 13), 1),
    ((16, 8, 3), 1),
    ((16, 8, 3, 3), 2),
    ((30, 11, 3, 2), 2),
    ((8, 9, 1, 2, 3), 1),
]
LAYOUTS = ("contiguous", "transposed", "channels_last", "expanded", "sliced")


def scores_of(shape, seed=0, levels=None):
    """Uniform scores, or whole numbers below ``levels``."""
    draws = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return draws if levels is None else (draws * levels).floor()


def tiles(family, count, m, *, seed=0, dtype=torch.float64):
    """(count, m, m) scores."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(count, m, m, generator=generator, dtype=torch.float64).abs()
    draws = torch.rand(count, m, m, generator=generator, dtype=torch.float64)
    if family == "gaussian":
        scores = normal
    elif family == "tied":
        scores = (3 * draws).floor()
    elif family == "sparse":
        scores = normal * (draws > 0.7)
    elif family == "constant":
        scores = torch.full_like(normal, 0.7)
    elif family == "zero":
        scores = torch.zeros_like(normal)
    else:
        scores = (draws == draws.amax((1, 2), keepdim=True)).double()
    return scores.to(dtype)


def stack(tile_batch):
    """(count, m, m) tiles as one (count * m, m) weight."""
    return tile_batch.reshape(-1, tile_batch.shape[2])


def unstack(weight, m):
    return to_tiles(as_planes(weight), (m, m))


def kept(scores, mask):
    """Kept mass per tile."""
    return (scores * mask).sum((1, 2))


def all_masks(n, m, *, at_most=False):
    """Every feasible tile, by brute force: (masks, m, m)."""
    sizes = range(n + 1) if at_most else (n,)
    rows = [tuple(int(j in chosen) for j in range(m)) for s in sizes for chosen in combinations(range(m), s)]
    feasible = (lambda c: c <= n) if at_most else (lambda c: c == n)
    found = [
        tile for tile in product(rows, repeat=m) if all(feasible(sum(c)) for c in zip(*tile, strict=True))
    ]
    return torch.tensor(found, dtype=torch.bool)


def best_by_brute_force(scores, n, *, at_most=False):
    masks = all_masks(n, scores.shape[1], at_most=at_most)
    return torch.einsum("tij,kij->tk", scores.double(), masks.double()).amax(1)


def lay_out(weight, layout):
    """The same values under other strides."""
    if layout == "transposed":
        return weight.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "channels_last":
        return weight.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "sliced":
        wide = torch.full((weight.shape[0], 2 * weight.shape[1], *weight.shape[2:]), 99.0, dtype=weight.dtype)
        wide[:, ::2] = weight
        return wide[:, ::2]
    return weight.contiguous()
