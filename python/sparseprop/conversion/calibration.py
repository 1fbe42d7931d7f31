"""Running models on calibration batches, and catching what single layers read there."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from sparseprop.errors import SparsePropError

__all__ = ["Calibration", "evaluating", "inputs_of", "not_finite", "reached"]

Forward = Callable[[nn.Module, Any], Any]


def feed(model: nn.Module, batch: Any) -> Any:
    """Run a model on a batch: a tensor, a dict of named arguments, or a tuple that starts with the input."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list) and batch:
        return model(batch[0])
    if isinstance(batch, Tensor):
        return model(batch)
    raise SparsePropError(
        f"a calibration batch got {type(batch).__name__}, wanted a tensor, a tuple that starts with the "
        "input, or a dict of named arguments; pass forward_fn=lambda model, batch: ... for anything else."
    )


@dataclass(frozen=True)
class Calibration:
    """Batches that can be gone through several times, and how a model runs on one."""

    batches: Iterable[Any]
    forward: Forward = feed

    @classmethod
    def of(cls, batches: Any, forward: Forward | None = None) -> "Calibration":
        """Checks that ``batches`` can be gone through again and again, and holds one.

        >>> len(list(Calibration.of([torch.zeros(2, 3)])))
        1
        """
        if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
            raise SparsePropError(
                f"calibration got a {type(batches).__name__}, wanted an iterable of batches such as a "
                "DataLoader; put a single batch into a list."
            )
        if iter(batches) is batches:
            raise SparsePropError(
                "calibration got an iterator that can be gone through once, wanted one that starts anew each "
                "time, such as a list or a DataLoader; wrap it in list()."
            )
        if next(iter(batches), None) is None:
            raise SparsePropError("calibration got no batches, wanted at least one.")
        return cls(batches, forward or feed)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def first(self, count: int | None) -> Iterator[Any]:
        """The first ``count`` batches, all if None."""
        return islice(iter(self.batches), count)

    def run(self, model: nn.Module, batch: Any) -> None:
        """The model on one batch, without gradients."""
        try:
            with torch.no_grad(), _plain_attention():
                self.forward(model, batch)
        except SparsePropError:
            raise
        except Exception as error:
            raise SparsePropError(
                f"the model fails on a calibration batch: {type(error).__name__}: {error} "
                "Pass batches that the model accepts, or forward_fn."
            ) from error


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Torch's fast path for encoders skips layers or hands them nested tensors."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class _Enough(BaseException):  # passes through whatever the model itself catches
    """All that was wanted of this run has been seen."""


def not_finite(what: str, batch: int) -> SparsePropError:
    """The error of something that is given what nothing can be learnt from, in a batch of this number."""
    return SparsePropError(
        f"{what} got NaN, inf or numbers too large to square in calibration batch {batch}, wanted finite "
        "inputs; repair that batch or leave it out."
    )


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Models in eval mode, each module's own flag restored afterwards.

    Raises SparsePropError where that mode writes into weights: what is learnt then is not about them.
    """
    flags = [(module, module.training) for model in models for module in model.modules()]
    weights = [tensor for model in models for tensor in model.parameters() if not tensor.is_inference()]
    versions = [tensor._version for tensor in weights]
    try:
        for model in models:
            model.eval()
        if [tensor._version for tensor in weights] != versions:
            raise SparsePropError(
                "the model's eval() writes into its weights, as merging adapters does; call model.eval() "
                "first, and convert what it is then."
            )
        yield
    finally:
        for module, flag in flags:
            if module.training != flag:
                module.train(flag)  # by its own method, which may do more than set the flag


def reached(model: nn.Module, layers: Mapping[str, nn.Module], calibration: Calibration) -> dict[str, int]:
    """How often each of ``layers`` runs on a batch, at most; in the order of their first runs."""
    calls, most = Counter[str](), dict[str, int]()

    def count(name: str, *_: Any) -> None:
        calls[name] += 1

    handles = [layer.register_forward_pre_hook(partial(count, name)) for name, layer in layers.items()]
    try:
        for batch in calibration:
            calls.clear()
            calibration.run(model, batch)
            most |= {name: max(times, most.get(name, 0)) for name, times in calls.items()}
    finally:
        for handle in handles:
            handle.remove()
    return most


def inputs_of(
    model: nn.Module, names: Iterable[str], calibration: Calibration, batch: Any, *, calls: int | None = None
) -> list[tuple[str, Tensor]]:
    """What the named layers read on a batch, call by call; stops after so many ``calls``.

    Copies, since the model may write into its tensors after the layer has read them.
    """
    seen: list[tuple[str, Tensor]] = []

    def catch(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((name, (args[0] if args else kwargs["input"]).detach().clone()))
        if len(seen) == calls:
            raise _Enough

    modules = dict(model.named_modules())
    handles = [
        modules[name].register_forward_pre_hook(partial(catch, name), with_kwargs=True) for name in names
    ]
    try:
        calibration.run(model, batch)
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return seen
