"""What a conversion did, layer by layer: it prints as a table and round-trips through JSON."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from torch import Tensor, nn

from sparseprop._table import table_lines
from sparseprop.errors import SparsePropError

__all__ = ["ConversionReport", "LayerReport"]

_FORMAT = 1
_HEADER = (
    *("layer", "kind", "shape", "pattern", "was", "density", "retained"),
    *("error masked", "error fitted", "note"),
)
_RIGHT_ALIGNED = {4, 5, 6, 7, 8}


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    Attributes:
        name, kind, shape: as in `LayerPlan`.
        pattern: the N:M pattern it has now; None if it was left alone.
        density_before: part of the weights that were not zero.
        density: part of the weights inside the mask.
        retained: part of the magnitude, sum of |w|, that the mask keeps.
        error_masked: mean square of the output's error on the calibration inputs after masking, as a part of
            the output's mean square, bias left out; None where it was not measured.
        error: the same after the least-squares fit; None where there was none.
        reason: why it was left alone or not fitted; empty otherwise.

    >>> LayerReport("fc", "Linear", (8, 8), "2:4", 1.0, 0.5, 0.77, 0.2, 0.1, "").converted
    True
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    pattern: str | None
    density_before: float | None
    density: float | None
    retained: float | None
    error_masked: float | None
    error: float | None
    reason: str

    @property
    def converted(self) -> bool:
        """Whether the layer has the pattern now."""
        return self.pattern is not None


@dataclass(frozen=True)
class ConversionReport:
    """What `sparseprop.convert` did; a sequence of `LayerReport` in the model's order.

    Attributes:
        pattern: what was asked for.
        score: what the masks were chosen by, "magnitude" or "wx2".
        layers: one entry for each Linear or Conv layer.
        bn_batches: batches that the batch-norm statistics were measured on, 0 if they were left alone.
        masks: the mask of each converted layer, bool and shaped like its weight; zeros inside it count as
            weights, so pass it to ``from_dense(layer, mask=...)``. Not part of the JSON, nor is `model`.
        model: the converted model.

    >>> layer = LayerReport("fc", "Linear", (8, 8), "2:4", 1.0, 0.5, 0.77, 0.2, 0.1, "")
    >>> print(ConversionReport("2:4", "magnitude", (layer,)))
    layer  kind    shape  pattern      was  density  retained  error masked  error fitted  note
    fc     Linear  8x8    2:4      100.0 %   50.0 %    77.0 %        0.2000        0.1000
    1 of 1 layers converted to 2:4 by magnitude
    """

    pattern: str
    score: str
    layers: tuple[LayerReport, ...]
    bn_batches: int = 0
    masks: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)
    model: nn.Module | None = field(default=None, compare=False, repr=False)

    def to_json(self) -> str:
        """The report as JSON text."""
        data = {name: getattr(self, name) for name in ("pattern", "score", "bn_batches")}
        layers = [asdict(layer) for layer in self.layers]
        return json.dumps({"format": _FORMAT, **data, "layers": layers}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "ConversionReport":
        """The report that `to_json` wrote, without masks and model; SparsePropError for anything else."""
        try:
            data = json.loads(text)
            if data.pop("format") != _FORMAT:
                raise ValueError(f"its format is not {_FORMAT}")
            layers = tuple(_layer(entry) for entry in data.pop("layers"))
            return cls(layers=layers, **data)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise SparsePropError(
                f"This is not the JSON of a ConversionReport: {error}; pass what to_json wrote."
            ) from None

    def __iter__(self) -> Iterator[LayerReport]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, key: int | str) -> LayerReport:
        """By position or by layer name."""
        if isinstance(key, int):
            return self.layers[key]
        for layer in self.layers:
            if layer.name == key:
                return layer
        raise SparsePropError(f"The report has no layer {key!r}, wanted a Linear or Conv layer of the model.")

    @property
    def converted(self) -> tuple[str, ...]:
        """Names of the layers that have the pattern now."""
        return tuple(layer.name for layer in self.layers if layer.converted)

    def __str__(self) -> str:
        lines = table_lines(_HEADER, [_row(layer) for layer in self.layers], _RIGHT_ALIGNED)
        total = f"{len(self.converted)} of {len(self)} layers converted to {self.pattern} by {self.score}"
        norms = f"; batch norm measured on {self.bn_batches} batches" if self.bn_batches else ""
        return "\n".join([*lines, total + norms])


def _row(layer: LayerReport) -> tuple[str, ...]:
    return (
        layer.name or "(model)",
        layer.kind,
        "x".join(map(str, layer.shape)) or "-",
        layer.pattern or "-",
        _percent(layer.density_before),
        _percent(layer.density),
        _percent(layer.retained),
        _number(layer.error_masked),
        _number(layer.error),
        layer.reason,
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _layer(entry: Any) -> LayerReport:
    if set(entry) != {part.name for part in fields(LayerReport)}:
        raise ValueError("a layer lacks fields or has others")
    return LayerReport(**{**entry, "shape": tuple(entry["shape"])})
