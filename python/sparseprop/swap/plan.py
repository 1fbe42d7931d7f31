"""What a swap will do, as plain data: it prints as a table and round-trips through JSON."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any, overload

from sparseprop._table import table_lines
from sparseprop.errors import SparsePropError

__all__ = ["LayerPlan", "SwapPlan"]

_FORMAT = 1
_HEADER = ("layer", "kind", "shape", "sparsity", "choice", "dense ms", "sparse ms", "reason")
_RIGHT_ALIGNED = {3, 5, 6}


@dataclass(frozen=True)
class LayerPlan:
    """The decision for one layer.

    Attributes:
        name: the layer's name in ``model.named_modules()``; ``""`` is the model itself.
        kind: class name of the dense layer, such as ``"Linear"``.
        shape: shape of the dense weight; ``()`` while a lazy layer has none.
        sparsity: fraction of weights outside the pattern; None where it could not be read.
        choice: ``"sparse"`` or ``"dense"``.
        dense_ms, sparse_ms: milliseconds a step, measured or estimated as `reason` says; None if unknown.
        reason: why, in a few words.

    Raises:
        SparsePropError: a field has the wrong type or value.

    >>> LayerPlan("fc", "Linear", (10, 20), 0.9, "sparse", 1.0, 0.25, "measured").speedup
    4.0
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    sparsity: float | None
    choice: str
    dense_ms: float | None
    sparse_ms: float | None
    reason: str

    def __post_init__(self) -> None:
        for field in ("name", "kind", "choice", "reason"):
            if not isinstance(getattr(self, field), str):
                raise _bad_field(self.name, field, getattr(self, field), "a string")
        if self.choice not in ("sparse", "dense"):
            raise _bad_field(self.name, "choice", self.choice, '"sparse" or "dense"')
        if not isinstance(self.shape, tuple) or not all(type(size) is int for size in self.shape):
            raise _bad_field(self.name, "shape", self.shape, "a tuple of ints")
        if self.sparsity is not None and not (_is_number(self.sparsity) and 0 <= self.sparsity <= 1):
            raise _bad_field(self.name, "sparsity", self.sparsity, "a number from 0 to 1, or None")
        for field in ("dense_ms", "sparse_ms"):
            value = getattr(self, field)
            if value is not None and not (_is_number(value) and 0 <= value < float("inf")):
                raise _bad_field(self.name, field, value, "milliseconds, or None")

    @property
    def speedup(self) -> float | None:
        """Dense time over sparse time, None where either is unknown."""
        if self.dense_ms is None or not self.sparse_ms:
            return None
        return self.dense_ms / self.sparse_ms


@dataclass(frozen=True)
class SwapPlan:
    """The decisions for all ``Linear`` and ``Conv`` layers of a model, in the model's order.

    Behaves as a sequence of `LayerPlan`, prints as a table, and survives `to_json` and `from_json` unchanged,
    so that every process of a job, or every re-run, can make the same swap.

    Attributes:
        layers: the decisions.
        layout: of images, ``"contiguous"`` or ``"channels_last"``, in which the measured layers cost least
            together; None if nothing was measured that has a choice.

    >>> plan = SwapPlan((LayerPlan("fc", "Linear", (10, 20), 0.9, "sparse", None, None, "at least 0.8"),))
    >>> print(plan)
    layer  kind    shape  sparsity  choice  dense ms  sparse ms  reason
    fc     Linear  10x20    90.0 %  sparse         -          -  at least 0.8
    1 of 1 layers become sparse
    >>> SwapPlan.from_json(plan.to_json()) == plan
    True
    """

    layers: tuple[LayerPlan, ...] = ()
    layout: str | None = None

    def __post_init__(self) -> None:
        if self.layout not in (None, "contiguous", "channels_last"):
            raise SparsePropError(
                f'layout of a SwapPlan must be "contiguous", "channels_last" or None, got {self.layout!r}.'
            )
        object.__setattr__(self, "layers", tuple(self.layers))
        seen: set[str] = set()
        for layer in self.layers:
            if not isinstance(layer, LayerPlan):
                raise SparsePropError(f"A SwapPlan holds LayerPlan entries, got {type(layer).__name__}.")
            if layer.name in seen:
                raise SparsePropError(f"The plan names layer {layer.name!r} twice; keep one entry.")
            seen.add(layer.name)

    @property
    def sparse_names(self) -> tuple[str, ...]:
        """Names of the layers that become sparse."""
        return tuple(layer.name for layer in self.layers if layer.choice == "sparse")

    def to_json(self) -> str:
        """The plan as JSON text."""
        layers = [asdict(layer) for layer in self.layers]
        return json.dumps({"format": _FORMAT, "layout": self.layout, "layers": layers}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "SwapPlan":
        """The plan that `to_json` wrote.

        Raises:
            SparsePropError: `text` is no JSON, of another format, or holds a field that is missing or wrong.
        """
        try:
            data = json.loads(text)
        except (TypeError, ValueError) as error:
            raise SparsePropError(f"This is not the JSON of a SwapPlan: {error}.") from None
        layers = data.get("layers") if isinstance(data, dict) and data.get("format") == _FORMAT else None
        if not isinstance(layers, list):
            raise SparsePropError(
                f'A SwapPlan is written as {{"format": {_FORMAT}, "layers": [...]}}, got {text[:60]!r}.'
            )
        return cls(tuple(_layer_from_json(entry) for entry in layers), data.get("layout"))

    def __iter__(self) -> Iterator[LayerPlan]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @overload
    def __getitem__(self, key: int | str) -> LayerPlan: ...
    @overload
    def __getitem__(self, key: slice) -> "SwapPlan": ...
    def __getitem__(self, key: int | str | slice) -> "LayerPlan | SwapPlan":
        """By position, by slice (a smaller plan), or by layer name."""
        if isinstance(key, slice):
            return SwapPlan(self.layers[key], self.layout)
        if isinstance(key, int):
            return self.layers[key]
        for layer in self.layers:
            if layer.name == key:
                return layer
        names = [layer.name for layer in self]
        raise SparsePropError(f"The plan has no layer {key!r}; it has {_some(names)}.")

    def __str__(self) -> str:
        lines = table_lines(_HEADER, [_row(layer) for layer in self.layers], _RIGHT_ALIGNED)
        chosen = f"{len(self.sparse_names)} of {len(self)} layers become sparse"
        lines.append(f"{chosen}; images cost least {self.layout}" if self.layout else chosen)
        return "\n".join(lines)


def _row(layer: LayerPlan) -> tuple[str, ...]:
    return (
        layer.name or "(model)",
        layer.kind,
        "x".join(map(str, layer.shape)) or "-",
        "-" if layer.sparsity is None else f"{100 * layer.sparsity:.1f} %",
        layer.choice,
        "-" if layer.dense_ms is None else f"{layer.dense_ms:.3f}",
        "-" if layer.sparse_ms is None else f"{layer.sparse_ms:.3f}",
        layer.reason,
    )


def _layer_from_json(entry: Any) -> LayerPlan:
    wanted = {field.name for field in fields(LayerPlan)}
    if not isinstance(entry, dict) or set(entry) != wanted:
        got = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
        raise SparsePropError(f"A layer of a SwapPlan needs the fields {sorted(wanted)}, got {got}.")
    shape = entry["shape"]
    return LayerPlan(**{**entry, "shape": tuple(shape) if isinstance(shape, list) else shape})


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _bad_field(name: object, field: str, got: object, wanted: str) -> SparsePropError:
    return SparsePropError(f"LayerPlan {name!r}: {field} must be {wanted}, got {got!r}.")


def _some(names: list[str], limit: int = 5) -> str:
    shown = ", ".join(repr(name) for name in names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown or "no layers"
