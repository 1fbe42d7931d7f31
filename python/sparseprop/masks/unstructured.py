"""Unstructured masks with exact counts: by score per layer or over all layers, and at random."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sparseprop.errors import SparsePropError
from sparseprop.masks._layout import check_values

__all__ = ["global_unstructured_masks", "random_mask", "random_masks", "unstructured_mask"]


def unstructured_mask(scores: Tensor, density: float) -> Tensor:
    """Keep the round(density * numel) highest scores (halves to even), ties to the lowest flat index.

    ``scores``: any shape, finite and >= 0. Returns a bool mask of that shape. Raises SparsePropError for
    NaN, inf, negative or integer scores, or a density outside 0..1.

    >>> import torch
    >>> unstructured_mask(torch.tensor([[1.0, 3.0], [3.0, 2.0]]), 0.25)
    tensor([[False,  True],
            [False, False]])
    """
    scores = check_values(scores)
    keep = _top(scores.flatten(), count_of(density, scores.numel()))
    return keep.reshape(scores.shape)


def global_unstructured_masks(
    scores: Mapping[str, Tensor], density: float, *, min_keep_per_layer: int = 0
) -> dict[str, Tensor]:
    """Keep the round(density * total) highest scores of all layers together, so densities differ per layer.

    ``scores``: layer name to scores, any shapes, finite and >= 0. Ties go to the earliest layer, then to the
    lowest flat index. ``min_keep_per_layer`` first secures that many per layer (all of a smaller one), within
    the same total. Raises SparsePropError when these minima exceed the total, else as `unstructured_mask`.

    >>> import torch
    >>> masks = global_unstructured_masks({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0])}, 0.5)
    >>> masks["a"].tolist(), masks["b"].tolist()
    ([False, False], [True, True])
    """
    if min_keep_per_layer < 0:
        raise SparsePropError(f"min_keep_per_layer got {min_keep_per_layer}, wanted >= 0.")
    layers = {name: check_values(s, what=f"scores[{name!r}]").flatten() for name, s in scores.items()}
    if not layers:
        return {}
    sizes = [s.numel() for s in layers.values()]
    total = count_of(density, sum(sizes))
    dtype = torch.float64 if any(s.dtype == torch.float64 for s in layers.values()) else torch.float32
    values = torch.cat([s.to("cpu", dtype) for s in layers.values()])
    secured = torch.cat([_top(s, min(min_keep_per_layer, len(s))) for s in torch.split(values, sizes)])
    rest = total - int(secured.sum())
    if rest < 0:
        raise SparsePropError(
            f"global_unstructured_masks got min_keep_per_layer={min_keep_per_layer} for {len(sizes)} layers, "
            f"which needs {total - rest} weights of {total}; lower it or raise the density."
        )
    keep = secured | _top(values.masked_fill(secured, -1.0), rest)
    return {
        name: part.reshape(scores[name].shape).to(scores[name].device)
        for name, part in zip(layers, torch.split(keep, sizes), strict=True)
    }


def random_mask(
    shape: Sequence[int],
    density: float,
    *,
    generator: torch.Generator | None = None,
    min_per_row: int = 0,
    min_per_col: int = 0,
) -> Tensor:
    """Keep round(density * numel) positions drawn uniformly; the same generator state gives the same mask.

    ``min_per_row`` and ``min_per_col`` keep neurons alive at extreme sparsity: that many per output (dim 0)
    and per input (dim 1, all kernel positions together), within the same count: places move where these lack
    some. Returns a bool mask. Raises SparsePropError when the minima do not fit into the count.

    >>> import torch
    >>> int(random_mask((8, 8), 0.25, generator=torch.Generator().manual_seed(0), min_per_row=1).sum())
    16
    """
    draws = torch.rand(tuple(shape), generator=generator, dtype=torch.float64)
    count = count_of(density, draws.numel())
    keep = _top(draws.flatten(), count).reshape(draws.shape)
    rows, cols = (*draws.shape, 1, 1)[:2]
    places = (rows, cols, draws.numel() // max(1, rows * cols))
    for dim, minimum in enumerate((min_per_row, min_per_col)):
        if minimum > 0:
            lines = keep.view(places).transpose(0, dim)
            _check_minimum(("min_per_row", "min_per_col")[dim], minimum, lines, density)
            _even_out(lines, draws.view(places).transpose(0, dim), minimum)
    return keep


def random_masks(
    shapes: Mapping[str, Sequence[int]],
    counts: Mapping[str, int],
    *,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """One random mask per layer with exactly the given counts, such as those of `layer_counts`.

    Raises SparsePropError for a layer without a count, or a count outside 0..numel.

    >>> masks = random_masks({"fc": (4, 4)}, {"fc": 5})
    >>> int(masks["fc"].sum())
    5
    """
    masks = {}
    for name, shape in shapes.items():
        draws = torch.rand(tuple(shape), generator=generator, dtype=torch.float64)
        count = counts.get(name)
        if count is None or not 0 <= count <= draws.numel():
            raise SparsePropError(
                f"counts[{name!r}] got {count}, wanted 0..{draws.numel()}; see layer_counts."
            )
        masks[name] = _top(draws.flatten(), count).reshape(draws.shape)
    return masks


def count_of(density: float, numel: int) -> int:
    if not 0.0 <= density <= 1.0:
        raise SparsePropError(f"density got {density}, wanted 0..1 (the fraction kept, 1 - sparsity).")
    return nearest(density * numel)


def nearest(count: float) -> int:
    """The nearest whole number, halves to even; 15 * (1 - 0.9) is such a half, though not in binary."""
    return round(round(count, 6))


def _top(values: Tensor, count: int) -> Tensor:
    """The count largest of a 1-D tensor; among equals of the last one, the lowest indices."""
    if count <= 0:
        return torch.zeros(values.shape, dtype=torch.bool, device=values.device)
    threshold = values.kthvalue(values.numel() - count + 1).values
    keep = values > threshold
    tied = (values == threshold).nonzero().squeeze(1)
    keep[tied[: count - int(keep.sum())]] = True
    return keep


def _check_minimum(name: str, minimum: int, keep: Tensor, density: float) -> None:
    room, count, least = keep.shape[1] * keep.shape[2], int(keep.sum()), minimum * len(keep)
    if minimum > room:
        raise SparsePropError(f"{name} got {minimum}, wanted at most {room}, what one holds.")
    if count < least:
        raise SparsePropError(
            f"random_mask got density {density} of {keep.numel()} ({count} kept), wanted at least {least} "
            f"for {name}={minimum}; lower it or raise the density."
        )


def _even_out(keep: Tensor, draws: Tensor, minimum: int) -> None:
    """Move kept places of (lines, crossing lines, places) to lines below ``minimum``, within crossing lines.

    So the crossing lines keep their counts. The lowest draws go first. A line above the minimum always has
    more than one below it in some crossing line, so that there is room for one of its own there.
    """
    counts = keep.sum((1, 2))
    short = (counts < minimum).nonzero().flatten().tolist()
    held = keep.nonzero()[draws[keep].argsort(stable=True)] if short else keep.new_empty(0, 3)
    for line in short:
        free = (~keep[line]).sum(1)
        able = ((counts[held[:, 0]] > minimum) & (free[held[:, 1]] > 0)).nonzero().flatten()
        tried = 0
        while counts[line] < minimum:
            index = able[tried]
            source, crossing, place = held[index].tolist()
            tried += 1
            if counts[source] == minimum or free[crossing] == 0:
                continue
            target = draws[line, crossing].masked_fill(keep[line, crossing], -1.0).argmax()
            keep[source, crossing, place], keep[line, crossing, target] = False, True
            held[index, 0] = line
            counts[source] -= 1
            counts[line] += 1
            free[crossing] -= 1
