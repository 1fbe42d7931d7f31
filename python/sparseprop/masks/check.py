"""Whether a mask follows an N:M pattern, and which one it follows."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparseprop.masks._layout import Tail, as_planes, check_mask, check_tail
from sparseprop.masks.pattern import NMPattern, check_pattern

__all__ = ["check_nm", "detect_nm"]

_USUAL = (4, 8, 16, 32)
_ROWS, _COLS = 1, 2


def check_nm(
    mask: Tensor,
    n: int,
    m: int,
    *,
    transposable: bool = False,
    groups: int = 1,
    tail: Tail = "pad",
    exact_count: bool = False,
) -> bool:
    """Whether every ``m`` consecutive inputs keep at most ``n``; if ``transposable``, every m outputs too.

    ``mask``: bool, a Linear (out, in) or Conv (out, in/groups, *kernel) weight's; conv layers pass
    ``groups``. An incomplete last group must hold to ``n`` as well, unless ``tail="dense"``, which
    ignores it, or ``"error"``, which says False. ``exact_count`` asks for exactly ``n`` in every whole
    group (whole tile, if transposable). Raises SparsePropError for a mask that is not bool and for a bad
    pattern.

    >>> import torch
    >>> mask = torch.tensor([[1, 0], [1, 0]]).bool()
    >>> check_nm(mask, 1, 2), check_nm(mask, 1, 2, transposable=True)
    (True, False)
    """
    check_pattern(n, m)
    check_tail(tail)
    planes = as_planes(check_mask(mask), groups)
    ragged = planes.shape[_COLS] % m or (transposable and planes.shape[_ROWS] % m)
    if ragged and tail == "error":
        return False
    whole = planes[:, :, : _whole(planes, _COLS, m)]
    if transposable:
        whole = whole[:, : _whole(planes, _ROWS, m)]
    limited = whole if tail == "dense" else planes
    for axis in (_COLS, _ROWS) if transposable else (_COLS,):
        if (_counts(limited, axis, m) > n).any():
            return False
        if exact_count and (_counts(whole, axis, m) < n).any():
            return False
    return True


def detect_nm(mask: Tensor, *, groups: int = 1, min_fill: float = 0.9) -> NMPattern | None:
    """The tightest N:M pattern (m of 4, 8, 16, 32) that a mask follows, or None.

    Tightest is the lowest n / m, then the lowest m. A pattern counts only if the mask uses at least
    ``min_fill`` of the n places per group, so that storing it as N:M wastes little. ``mask``: as `check_nm`.

    >>> import torch
    >>> from sparseprop.masks import nm_mask
    >>> scores = torch.rand(16, 16, generator=torch.Generator().manual_seed(0))
    >>> str(detect_nm(nm_mask(scores, 2, 4)))
    '2:4'
    """
    planes = as_planes(check_mask(mask), groups)
    nnz, found = int(planes.sum()), []
    for m in _USUAL:
        if planes.shape[_COLS] < m or nnz == 0:
            continue
        n = int(_counts(planes, _COLS, m).amax())
        lengths = torch.full((-(-planes.shape[_COLS] // m),), m)
        lengths[-1] -= -planes.shape[_COLS] % m
        places = int(lengths.clamp_max(n).sum()) * (planes.numel() // planes.shape[_COLS])
        if n < m and nnz >= min_fill * places:
            found.append((n / m, m, n))
    if not found:
        return None
    _, m, n = min(found)
    transposable = planes.shape[_ROWS] >= m and not bool((_counts(planes, _ROWS, m) > n).any())
    return NMPattern(n, m, transposable)


def _whole(planes: Tensor, axis: int, m: int) -> int:
    return planes.shape[axis] - planes.shape[axis] % m


def _counts(planes: Tensor, axis: int, m: int) -> Tensor:
    lines = planes.movedim(axis, -1)
    lines = pad(lines, (0, -lines.shape[-1] % m))
    groups = lines.shape[-1] // m
    return lines.reshape(*lines.shape[:-1], groups, m).sum(-1, dtype=torch.int32)
