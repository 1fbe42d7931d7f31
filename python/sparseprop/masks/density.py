"""How dense each layer should be, given one density for all: uniform, Erdos-Renyi, the same with kernels."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from sparseprop.errors import SparsePropError
from sparseprop.masks.unstructured import count_of, nearest

__all__ = ["layer_counts", "layer_densities"]

Rule = Literal["uniform", "er", "erk"]


def layer_densities(
    shapes: Mapping[str, Sequence[int]],
    density: float,
    *,
    rule: Rule = "erk",
    power: float = 1.0,
    fixed: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """The density of every layer, such that the numel-weighted mean is ``density``.

    ``shapes``: layer name to weight shape. ``rule``: ``"uniform"``; ``"er"``, proportional to
    (out + in) / (out * in); ``"erk"``, proportional to sum(shape) / numel; both raised to ``power``. Layers
    that would exceed 1 become dense and the others share what is left. ``fixed`` sets some layers by hand,
    e.g. ``{"fc": 0.2}``; the rest makes up for them. Raises SparsePropError if the budget cannot be met.
    ER after Mocanu et al. (SET, arXiv 1707.04780), ERK after Evci et al. (RigL, arXiv 1911.11134).

    >>> densities = layer_densities({"a": (64, 64), "b": (256, 256)}, 0.1)
    >>> {name: round(d, 4) for name, d in densities.items()}
    {'a': 0.34, 'b': 0.085}
    """
    fixed = dict(fixed or {})
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    budget = _free_budget(sizes, density, fixed)
    raw = {name: _raw(name, shape, rule) ** power for name, shape in shapes.items() if name not in fixed}
    result = dict(fixed)
    while raw:
        scale = budget / sum(raw[name] * sizes[name] for name in raw)
        highest = max(raw.values())
        if scale * highest <= 1.0 + 1e-12:
            result.update({name: min(1.0, scale * value) for name, value in raw.items()})
            break
        for name in [name for name, value in raw.items() if value == highest]:
            result[name] = 1.0
            budget -= sizes[name]
            del raw[name]
    return {name: result[name] for name in shapes}


def layer_counts(shapes: Mapping[str, Sequence[int]], densities: Mapping[str, float]) -> dict[str, int]:
    """Whole numbers of weights per layer whose sum is exactly the rounded total of the densities.

    What rounding down leaves over goes to the layers with the largest fractional part, ties to the earliest.
    Raises SparsePropError for a missing density or one outside 0..1.

    >>> layer_counts({"a": (3,), "b": (3,), "c": (4,)}, {"a": 0.5, "b": 0.5, "c": 0.5})
    {'a': 2, 'b': 1, 'c': 2}
    """
    wanted = {}
    for name, shape in shapes.items():
        if name not in densities:
            raise SparsePropError(f"densities got none for layer {name!r}, wanted one for every layer.")
        count_of(densities[name], 0)
        # a density computed from a budget is off by rounding; a whole number must not fall below itself
        exact = densities[name] * math.prod(shape)
        wanted[name] = float(round(exact)) if math.isclose(exact, round(exact), rel_tol=1e-12) else exact
    counts = {name: math.floor(x) for name, x in wanted.items()}
    left = nearest(math.fsum(wanted.values())) - sum(counts.values())
    for name in sorted(wanted, key=lambda name: counts[name] - wanted[name])[:left]:
        counts[name] += 1
    return counts


def _free_budget(sizes: Mapping[str, int], density: float, fixed: Mapping[str, float]) -> float:
    count_of(density, 0)
    for name, value in fixed.items():
        if name not in sizes:
            raise SparsePropError(f"fixed got unknown layer {name!r}, wanted one of {', '.join(sizes)}.")
        count_of(value, 0)
    budget = density * sum(sizes.values()) - sum(value * sizes[name] for name, value in fixed.items())
    free = sum(size for name, size in sizes.items() if name not in fixed)
    slack = 1e-9 * sum(sizes.values())
    if not -slack <= budget <= free + slack:
        raise SparsePropError(
            f"layer_densities got density {density} with fixed densities that leave {budget:.0f} weights for "
            f"{free} places in the other layers; change density or fixed."
        )
    return min(max(budget, 0.0), float(free))


def _raw(name: str, shape: Sequence[int], rule: str) -> float:
    if rule not in get_args(Rule):
        raise SparsePropError(f"rule got {rule!r}, wanted one of {', '.join(get_args(Rule))}.")
    if len(shape) < 2 or min(shape) < 1:
        raise SparsePropError(f"shapes[{name!r}] got {tuple(shape)}, wanted a Linear or Conv weight's shape.")
    if rule == "uniform":
        return 1.0
    sides = shape[:2] if rule == "er" else shape
    return sum(sides) / math.prod(sides)
