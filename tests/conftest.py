"""Fixtures for all tests: seeds, one thread, and every implementation this machine can run."""

from collections.abc import Iterator

import pytest
import torch

from checks import BACKENDS, running
from sparseprop.ops import attention
from sparseprop.ops.inverted import InvertedBlock

# torchvision's compiled operators need CUDA's runtime and do not load beside a CPU torch. Declaring the two
# that its Python code registers fake kernels for lets it, and all that import it, load.
_VISION = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    _VISION.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def pytest_configure(config: pytest.Config) -> None:
    """Two warnings that torch gives about its own affairs."""
    config.addinivalue_line("filterwarnings", "ignore:Using padding='same' with even kernel:UserWarning")
    config.addinivalue_line("filterwarnings", "ignore:.torch.jit.*is deprecated:DeprecationWarning")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each implementation in turn: the reference, then every instruction set of this CPU."""
    with running(request.param) as name:
        yield name


@pytest.fixture(autouse=True)
def _repeatable() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Two threads for one test."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one element with each call of our attention kernels."""
    calls: list[int] = []
    forward = attention._forward
    monkeypatch.setattr(attention, "_forward", lambda *args: (calls.append(1), forward(*args))[1])
    return calls


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """The outcome of every try to run a block as one call."""
    done: list[bool] = []
    usual = InvertedBlock.__call__

    def counting(self: InvertedBlock, x: torch.Tensor) -> torch.Tensor | None:
        out = usual(self, x)
        done.append(out is not None)
        return out

    monkeypatch.setattr(InvertedBlock, "__call__", counting)
    return done
