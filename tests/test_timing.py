"""Timing is tested with a made-up clock: no test here depends on how fast the machine is."""

import pytest
import torch
from torch import nn

from sparseprop.errors import SparsePropError
from sparseprop.timing import Comparison, compare, module_step


class FakeClock:
    """A clock that only the timed steps advance."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def __call__(self) -> float:
        return self.now

    def step(self, name: str, seconds: float):
        def run() -> None:
            self.order.append(name)
            self.now += seconds

        return run


def test_medians_and_ratio_are_those_of_the_steps():
    clock = FakeClock()
    times = compare({"dense": clock.step("d", 0.004), "sparse": clock.step("s", 0.001)}, clock=clock)
    assert times.median_ms("dense") == pytest.approx(4.0)
    assert times.median_ms("sparse") == pytest.approx(1.0)
    assert times.ratio("sparse", "dense") == pytest.approx(0.25)
    assert times.fastest() == "sparse"


def test_candidates_run_twice_unmeasured_then_in_turn():
    clock = FakeClock()
    compare(
        {"a": clock.step("a", 1), "b": clock.step("b", 1)},
        clock=clock,
        budget_s=100,
        min_rounds=1,
        max_rounds=3,
    )
    assert "".join(clock.order) == "aabb" + "ab" + "ba" + "ab"


@pytest.mark.parametrize(
    ("seconds", "rounds"),
    [
        (0.001, 100),  # the cap
        (0.02, 11),  # the budget of 0.25 s after two warm-ups
        (0.1, 5),  # over the budget: min_rounds
        (0.3, 2),  # far over it: as many as fit into four budgets
        (9.0, 1),  # one round whatever it costs
    ],
)
def test_total_time_is_bounded(seconds, rounds):
    clock = FakeClock()
    times = compare({"a": clock.step("a", seconds)}, clock=clock)
    assert len(times.seconds["a"]) == rounds


def test_one_disturbed_run_does_not_decide():
    times = Comparison({"dense": (1.0, 1.0, 1.0), "sparse": (0.5, 90.0, 0.5)})
    assert times.ratio("sparse", "dense") == 0.5
    assert times.fastest("dense", "sparse") == "sparse"


@pytest.mark.parametrize(
    ("steps", "options"),
    [({}, {}), ({"a": print}, {"budget_s": 0.0}), ({"a": print}, {"min_rounds": 9, "max_rounds": 3})],
)
def test_nonsense_is_refused(steps, options):
    with pytest.raises(SparsePropError, match="compare needs candidates, budget_s > 0 and 1 <= min_rounds"):
        compare(steps, **options)


class Recorder(nn.Module):
    """A layer that notes under which conditions it ran."""

    def __init__(self, *, frozen: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3), requires_grad=not frozen)
        self.graphs: list[bool] = []
        self.backwards = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = x * self.weight
        self.graphs.append(out.requires_grad)
        if out.requires_grad:
            out.register_hook(self._count)
        return out

    def _count(self, grad: torch.Tensor) -> None:
        self.backwards += 1


@pytest.mark.parametrize(
    ("frozen", "input_grad", "grad", "backward"),
    [
        (False, False, True, True),
        (True, True, True, True),
        (True, False, True, False),
        (False, True, False, False),
    ],
)
def test_a_step_runs_backward_only_where_training_would(frozen, input_grad, grad, backward):
    layer = Recorder(frozen=frozen)
    step = module_step(layer, torch.ones(2, 3, requires_grad=input_grad), grad=grad)
    runs_before = layer.backwards
    step()
    assert layer.graphs[-1] == backward
    assert layer.backwards - runs_before == int(backward)
    assert layer.weight.grad is None


def test_a_step_counts_as_one_optimizer_step_for_caches():
    layer = Recorder()
    step = module_step(layer, torch.ones(2, 3))
    version = layer.weight._version
    step()
    assert layer.weight._version > version


def test_a_step_ignores_the_callers_no_grad():
    layer = Recorder()
    step = module_step(layer, torch.ones(2, 3))
    with torch.no_grad():
        step()
    assert layer.backwards == 1
