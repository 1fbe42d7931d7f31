"""Honest timing of modules: warm-up, candidates in turn, medians of many short runs, a bounded total."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from sparseprop.errors import SparsePropError

__all__ = ["Comparison", "Step", "Timer", "compare", "module_step"]

Step = Callable[[], None]


@dataclass(frozen=True)
class Comparison:
    """Times of several candidates, run in turn so that noise of the machine meets all of them alike.

    Attributes:
        seconds: for each candidate, the time of each round; round i of all candidates belongs together.

    >>> Comparison({"dense": (4.0, 8.0, 4.0), "sparse": (1.0, 2.0, 3.0)}).ratio("sparse", "dense")
    0.25
    """

    seconds: Mapping[str, tuple[float, ...]]

    def median_ms(self, name: str) -> float:
        """Median time of one run of candidate `name` in milliseconds."""
        return 1e3 * statistics.median(self.seconds[name])

    def fastest(self, *names: str) -> str:
        """The candidate with the lowest median, among `names` or all."""
        return min(names or tuple(self.seconds), key=self.median_ms)

    def ratio(self, name: str, base: str) -> float:
        """Median over the rounds of the time of `name` over that of `base`: below 1 means faster."""
        pairs = zip(self.seconds[name], self.seconds[base], strict=True)
        return statistics.median(mine / max(other, 1e-12) for mine, other in pairs)


Timer = Callable[[Mapping[str, Step]], Comparison]


def compare(
    steps: Mapping[str, Step],
    *,
    budget_s: float = 0.25,
    min_rounds: int = 5,
    max_rounds: int = 100,
    clock: Callable[[], float] = time.perf_counter,
) -> Comparison:
    """Time the candidates `steps` against each other.

    Every candidate runs twice unmeasured (the first run may build caches). Then rounds follow in which each
    runs once, starting with another one every round, until `budget_s` is spent (warm-up included) or
    `max_rounds` are done. Fewer than `min_rounds` are taken only when they would need more than four times
    the budget; at least one round is always measured.

    Raises:
        SparsePropError: no candidates, or a budget or round count that is not positive.

    >>> sorted(compare({"a": lambda: None, "b": lambda: None}, budget_s=0.01).seconds)
    ['a', 'b']
    """
    if not steps or not budget_s > 0 or not 1 <= min_rounds <= max_rounds:
        raise SparsePropError(
            f"compare needs candidates, budget_s > 0 and 1 <= min_rounds <= max_rounds, got {sorted(steps)}, "
            f"{budget_s}, {min_rounds} and {max_rounds}."
        )
    start = clock()
    for step in steps.values():
        step()
        step()
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for done in range(max_rounds):
        spent = clock() - start
        if done and spent > (budget_s if done >= min_rounds else 4 * budget_s):
            break
        for name in names[done % len(names) :] + names[: done % len(names)]:
            before = clock()
            steps[name]()
            seconds[name].append(clock() - before)
    return Comparison({name: tuple(times) for name, times in seconds.items()})


def module_step(module: nn.Module, x: torch.Tensor, *, grad: bool = True) -> Step:
    """One training step of `module` on `x` as a function to time: forward, and backward if `grad`.

    The backward pass asks for the gradients that training would ask for: of each parameter, and of `x`, that
    requires one. Parameters count as changed before each run, as after an optimizer step, so that whatever a
    module derives from them and caches is paid for.

    >>> step = module_step(nn.Linear(3, 2), torch.ones(4, 3))
    >>> step()
    """
    parameters = list(module.parameters())
    wanted = [tensor for tensor in (*parameters, x) if tensor.requires_grad]
    if not grad or not wanted:

        def forward_only() -> None:
            _mark_changed(parameters)
            with torch.no_grad():
                module(x)

        return forward_only

    with torch.enable_grad():
        grad_out = torch.ones_like(module(x))  # keeps the strides that the module hands on

    def forward_backward() -> None:
        _mark_changed(parameters)
        with torch.enable_grad():
            torch.autograd.grad(module(x), wanted, grad_out)

    return forward_backward


def _mark_changed(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        torch.autograd.graph.increment_version(parameter)
