"""A profile as plain data: it prints as a table, goes to JSON and back, and draws itself."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from sparseprop.errors import SparsePropError

__all__ = ["PARTS", "LayerTimes", "Parts", "StepProfile", "StepTimes"]

_FORMAT = 1
PARTS = ("forward", "grad_input", "grad_weight", "layout", "other")


@dataclass(frozen=True)
class Parts:
    """Milliseconds of one step.

    Attributes:
        forward: computing outputs.
        grad_input: computing gradients of inputs. A backward pass that cannot be divided (batch norm,
            activations, pooling, attention) counts here as a whole.
        grad_weight: computing gradients of weights and biases.
        layout: changing the layout of activations and gradients on the way into and out of a sparse kernel,
            and calling it. What torch does inside its own kernels is not visible and counts as theirs.
        other: the rest, such as adding gradients up and the optimizer.

    >>> (Parts(forward=1.0) + Parts(forward=2.0, layout=1.5)).total
    4.5
    """

    forward: float = 0.0
    grad_input: float = 0.0
    grad_weight: float = 0.0
    layout: float = 0.0
    other: float = 0.0

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return self.forward + self.grad_input + self.grad_weight + self.layout + self.other

    def __add__(self, other: "Parts") -> "Parts":
        return Parts(*(getattr(self, part) + getattr(other, part) for part in PARTS))


@dataclass(frozen=True)
class LayerTimes:
    """One module's own time, without that of the modules inside it.

    Attributes:
        name: its name in ``model.named_modules()``, or ``"(loss)"``, ``"(optimizer)"``,
            ``"(gradient sums)"``: time the step spends outside all modules.
        kind: class of the dense module; a block's own time is its code between its layers.
        density: share of the weights that the sparse form keeps; None where both forms are dense.
        dense, sparse: its parts in the dense and in the sparse model.
    """

    name: str
    kind: str
    density: float | None
    dense: Parts
    sparse: Parts


@dataclass(frozen=True)
class StepTimes:
    """A whole step of one form of the model.

    Attributes:
        layout: of the images and of what is dense, the faster: ``"contiguous"`` or ``"channels_last"``.
        step_ms: median of steps that nothing watches.
        watched_ms: median of steps with the stop-watch, which the parts add up to (but for the medians).
        others_ms: medians for the layouts that were slower.
    """

    layout: str
    step_ms: float
    watched_ms: float
    others_ms: dict[str, float]


@dataclass(frozen=True)
class StepProfile:
    """Where the time of a training step goes; made by `sparseprop.profile`.

    >>> layer = LayerTimes("fc", "Linear", 0.1, Parts(2.0, 1.0, 1.0), Parts(0.5, 0.5, 0.5, 0.5))
    >>> dense, sparse = (StepTimes("contiguous", ms, ms, {}) for ms in (4.0, 2.0))
    >>> found = StepProfile("Net", (8, 64), 1, "avx2", dense, sparse, (layer,))
    >>> found.speedup, StepProfile.from_json(found.to_json()) == found
    (2.0, True)
    """

    model: str
    input_shape: tuple[int, ...]
    threads: int
    isa: str
    dense: StepTimes
    sparse: StepTimes
    layers: tuple[LayerTimes, ...]

    @property
    def speedup(self) -> float:
        """Time of a dense step over that of a sparse one, neither of them watched."""
        return self.dense.step_ms / self.sparse.step_ms

    def by_kind(self) -> tuple[LayerTimes, ...]:
        """The layers summed up by kind, sparse ones apart; the most expensive in the sparse model first."""
        groups: dict[tuple[str, bool], list[LayerTimes]] = {}
        for layer in self.layers:
            groups.setdefault((layer.kind, layer.density is not None), []).append(layer)
        sums = [
            LayerTimes(f"{len(group)} x", f"{kind}, sparse" if is_sparse else kind, None, *_sums(group))
            for (kind, is_sparse), group in groups.items()
        ]
        return tuple(sorted(sums, key=lambda row: -row.sparse.total))

    def to_json(self) -> str:
        """The profile as JSON text."""
        return json.dumps({"format": _FORMAT, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "StepProfile":
        """The profile that `to_json` wrote.

        Raises:
            SparsePropError: `text` is something else.
        """
        try:
            data = json.loads(text)
            if data.pop("format") != _FORMAT:
                raise ValueError(f"its format is not {_FORMAT}")
            layers = tuple(
                LayerTimes(**{**one, "dense": Parts(**one["dense"]), "sparse": Parts(**one["sparse"])})
                for one in data["layers"]
            )
            sides = {side: StepTimes(**data[side]) for side in ("dense", "sparse")}
            shape = tuple(data["input_shape"])
            return cls(**{**data, **sides, "layers": layers, "input_shape": shape})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise SparsePropError(f"This is not the JSON of a StepProfile: {error!r}.") from None

    def save_png(self, path: str | Path) -> None:
        """Draw the profile as stacked bars, by kind of layer and layer by layer; needs matplotlib."""
        from sparseprop.profiling.plot import draw

        draw(self, Path(path))

    def table(self, *, top: int | None = None) -> str:
        """Layers and kinds as text; `top` keeps the layers that cost most in the sparse model.

        Each cell is ``dense > sparse`` in milliseconds. Raises `SparsePropError` for a negative `top`.
        """
        if top is not None and top < 0:
            raise SparsePropError(f"top must be 0 or more, got {top}.")
        layers = self.layers
        if top is not None:
            kept = {layer.name for layer in sorted(layers, key=lambda row: -row.sparse.total)[:top]}
            layers = tuple(layer for layer in layers if layer.name in kept)
        head = ("layer", "kind", "density", *(part.replace("_", " ") for part in PARTS), "total")
        rows = [head, *map(_cells, layers)]
        rows += [("",) * len(head), *map(_cells, self.by_kind())]
        total = LayerTimes("sum", "", None, *_sums(self.layers))
        rows += [("",) * len(head), _cells(total)]
        return "\n".join([*_aligned(rows), *self._footer()])

    def __str__(self) -> str:
        return self.table()

    def _footer(self) -> Iterable[str]:
        for side, times in (("dense", self.dense), ("sparse", self.sparse)):
            others = ", ".join(f"{layout} {ms:.2f} ms" for layout, ms in times.others_ms.items())
            yield (
                f"{side}: {times.step_ms:.2f} ms a step, {times.layout}{f' ({others})' if others else ''}; "
                f"{times.watched_ms:.2f} ms watched"
            )
        shape = "x".join(map(str, self.input_shape))
        where = f"{self.model}, input {shape}, {self.threads} threads, {self.isa}"
        yield f"{where}: {self.speedup:.2f}x dense speed"


def _sums(layers: Iterable[LayerTimes]) -> tuple[Parts, Parts]:
    dense = sparse = Parts()
    for layer in layers:
        dense, sparse = dense + layer.dense, sparse + layer.sparse
    return dense, sparse


def _cells(layer: LayerTimes) -> tuple[str, ...]:
    pairs = [(getattr(layer.dense, part), getattr(layer.sparse, part)) for part in (*PARTS, "total")]
    times = ("" if not one and not two else f"{one:.2f} > {two:.2f}" for one, two in pairs)
    density = "" if layer.density is None else f"{100 * layer.density:.1f} %"
    return (layer.name or "(model)", layer.kind, density, *times)


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
