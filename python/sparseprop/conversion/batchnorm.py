"""Batch-norm statistics measured anew, for a network whose weights have changed."""

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparseprop.conversion.calibration import Calibration, Forward, evaluating

__all__ = ["reestimate_batch_norm"]


def reestimate_batch_norm(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    limit: int | None = None,
    forward_fn: Forward | None = None,
) -> int:
    """Replace the running statistics of all batch-norm layers by plain averages over ``batches``.

    Everything else runs in eval mode; weights stay as they are. 100 batches are enough in most cases.

    Args:
        model: any module; its training flags are restored.
        batches: inputs as `sparseprop.convert` takes them.
        limit: the most batches to take; all if None.
        forward_fn: ``forward_fn(model, batch)`` for batches of another form.

    Returns:
        The number of batches used; 0 if the model has no batch norm with running statistics.

    Raises:
        SparsePropError: no batches, or the model fails on one; the statistics are then as before.

    >>> import torch
    >>> model = nn.Sequential(nn.BatchNorm1d(1))
    >>> reestimate_batch_norm(model, [torch.tensor([[1.0], [3.0]])]), model[0].running_mean.tolist()
    (1, [2.0])
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms or limit == 0:
        return 0
    calibration = Calibration.of(batches, forward_fn)
    before = [{key: value.clone() for key, value in norm.state_dict().items()} for norm in norms]
    momenta = [norm.momentum for norm in norms]
    used = 0
    try:
        with evaluating(model):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a cumulative average
                norm.training = True
            for batch in calibration.first(limit):
                calibration.run(model, batch)
                used += 1
    except BaseException:
        for norm, state in zip(norms, before, strict=True):
            norm.load_state_dict(state)
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return used
