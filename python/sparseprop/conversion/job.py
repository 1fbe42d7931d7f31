"""The layers of a network, converted one after the other."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils import prune

from sparseprop.conversion.calibration import Calibration, inputs_of, not_finite, reached
from sparseprop.conversion.layer import LayerConverter, Reconstruction, grouped_weight
from sparseprop.conversion.moments import Moments
from sparseprop.conversion.report import LayerReport
from sparseprop.conversion.samples import Sampler
from sparseprop.masks import NMPattern
from sparseprop.swap.decide import Candidate
from sparseprop.swap.kinds import is_pruned

__all__ = ["ConvertProgress", "Job", "Progress"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ConvertProgress:
    """What a progress callback is told: ``done`` of ``total`` layers, now at ``layer``.

    >>> ConvertProgress("conv1", 0, 12).layer
    'conv1'
    """

    layer: str
    done: int
    total: int


Progress = Callable[[ConvertProgress], None]


@dataclass(frozen=True)
class Job:
    """The network as it was, and the copy of it that is converted."""

    model: nn.Module
    work: nn.Module
    candidates: list[Candidate]
    converter: LayerConverter
    data: Calibration | None
    sequential: bool
    progress: Progress | None

    def run(self) -> tuple[tuple[LayerReport, ...], dict[str, Tensor]]:
        """Convert all layers of the copy that can be; their reports in the model's order, and their masks."""
        by_name = {c.name: c for c in self.candidates}
        able = {
            c.name: c.module for c in self.candidates if isinstance(self.converter.pattern_of(c), NMPattern)
        }
        for layer in able.values():
            if is_pruned(layer):
                prune.remove(layer, "weight")  # type: ignore[no-untyped-call]
        calls = reached(self.work, able, self.data) if self.data is not None and self.sequential else {}
        ready = {} if self.sequential else self._moments(able)
        seen = list(calls or ready)
        order = [*seen, *(name for name in able if name not in seen)]
        reports, masks = {}, dict[str, Tensor]()
        for done, name in enumerate(order):
            self._tell(name, done, len(order))
            moments = ready.pop(name, None)
            if name in calls:
                moments = self._moments([name], calls=calls[name], drifting=bool(masks)).get(name)
            reports[name], mask = self.converter.convert(by_name[name], moments)
            if mask is not None:
                masks[name] = mask
        self._tell("", len(order), len(order))
        for name in by_name.keys() - reports.keys():
            reports[name], _ = self.converter.convert(by_name[name], None)
        return tuple(reports[c.name] for c in self.candidates), masks

    def _moments(
        self, names: Iterable[str], *, calls: int | None = None, drifting: bool = False
    ) -> dict[str, Moments]:
        """Moments of what the named layers read; with the drift from the original network if asked for."""
        if self.data is None:
            return {}
        modules = dict(self.work.named_modules())
        positions = (self.converter.fit or Reconstruction()).positions
        samplers = {name: Sampler.of(modules[name], positions) for name in names}
        weights = {name: grouped_weight(modules[name]) for name in names} if drifting else {}
        moments: dict[str, Moments] = {}
        for index, batch in enumerate(self.data):
            found = inputs_of(self.work, samplers, self.data, batch, calls=calls)
            before = inputs_of(self.model, samplers, self.data, batch, calls=calls) if drifting else []
            for call, (name, x) in enumerate(found):
                seed = index * 1009 + call
                rows = samplers[name].rows(x, seed)
                original = rows if drifting else None
                # a network that chooses its way by its data may hand a layer other samples than before
                if call < len(before) and (name, x.shape) == (before[call][0], before[call][1].shape):
                    original = samplers[name].rows(before[call][1], seed)
                sums = moments.setdefault(name, Moments())
                sums.add(rows, original, weights.get(name))
                if not sums.finite:
                    raise not_finite(f"layer {name!r}" if name else "the model", index)
        return {name: sums for name, sums in moments.items() if sums.count}

    def _tell(self, layer: str, done: int, total: int) -> None:
        logger.debug("converting %s (%d of %d)", layer, done, total)
        if self.progress is not None:
            self.progress(ConvertProgress(layer, done, total))
