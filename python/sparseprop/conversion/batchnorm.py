"""Batch-norm statistics measured anew, for a network whose weights have changed."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparseprop.conversion.calibration import Calibration, Forward, evaluating, not_finite
from sparseprop.errors import SparsePropError

__all__ = ["reestimate_batch_norm"]


def reestimate_batch_norm(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    limit: int | None = None,
    forward_fn: Forward | None = None,
) -> int:
    """Replace the running statistics of all batch-norm layers by plain averages over ``batches``.

    Everything else runs in eval mode; weights stay as they are, and so do norms that no batch reaches. 100
    batches are enough in most cases.

    Args:
        model: any module; its training flags are restored.
        batches: inputs as `sparseprop.convert` takes them.
        limit: the most batches to take; all if None.
        forward_fn: ``forward_fn(model, batch)`` for batches of another form.

    Returns:
        The number of batches used; 0 if the model has no batch norm with running statistics.

    Raises:
        SparsePropError: no batches, a limit below 0, or a batch on which the model fails or which makes
            statistics that are not finite; all statistics are then as before.

    >>> import torch
    >>> model = nn.Sequential(nn.BatchNorm1d(1))
    >>> reestimate_batch_norm(model, [torch.tensor([[1.0], [3.0]])]), model[0].running_mean.tolist()
    (1, [2.0])
    """
    if limit is not None and limit < 0:
        raise SparsePropError(f"limit got {limit}, wanted 0 or more batches, or None for all.")
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }
    if not norms or limit == 0:
        return 0
    calibration = Calibration.of(batches, forward_fn)
    before = {name: {k: v.clone() for k, v in norm.state_dict().items()} for name, norm in norms.items()}
    used = 0
    try:
        with evaluating(model), _averaging(norms.values()):
            for used, batch in enumerate(calibration.first(limit), 1):
                calibration.run(model, batch)
                _check_finite(norms, used - 1)
    except BaseException:
        for name, norm in norms.items():
            norm.load_state_dict(before[name])
        raise
    for name, norm in norms.items():
        if not norm.num_batches_tracked:
            norm.load_state_dict(before[name])
    return used


@contextmanager
def _averaging(norms: Collection[_BatchNorm]) -> Iterator[None]:
    """Norms that start anew and take the plain average of what they see."""
    momenta = [norm.momentum for norm in norms]
    handles = [norm.register_forward_hook(_forget_empty) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
        norm.training = True
    try:
        yield
    finally:
        for norm, momentum, handle in zip(norms, momenta, handles, strict=True):
            norm.momentum = momentum
            handle.remove()


def _forget_empty(norm: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
    if out.numel() == 0:  # torch counts it as a batch, though the statistics stay
        norm.get_buffer("num_batches_tracked").sub_(1)


def _check_finite(norms: Mapping[str, _BatchNorm], batch: int) -> None:
    for name, norm in norms.items():
        if not all(norm.get_buffer(key).isfinite().all() for key in ("running_mean", "running_var")):
            raise not_finite(f"batch norm {name!r}", batch)
