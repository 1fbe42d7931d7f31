"""Fixtures for all tests: seeds, one thread, and every implementation this machine can run."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch
from sparseprop import backend as backends

# torchvision's compiled operators need CUDA's runtime and do not load beside a CPU torch; declaring the two that its
# Python code registers fake kernels for lets it, and all that import it, load. Kept alive for the whole run.
_VISION = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    _VISION.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def pytest_configure(config: pytest.Config) -> None:
    """Dense torch announces a copy that is no concern of ours."""
    config.addinivalue_line("filterwarnings", "ignore:Using padding='same' with even kernel:UserWarning")


def _native_isas() -> tuple[str, ...]:
    try:
        from sparseprop import _native
    except ImportError:  # only under SPARSEPROP_BACKEND=reference: importing sparseprop fails otherwise
        return ()
    return tuple(_native.available_isas())


BACKENDS = ("reference", *_native_isas())


@contextmanager
def running(name: str) -> Iterator[str]:
    """Run with the reference loops, or with the native kernels of one instruction set."""
    with ExitStack() as stack:
        if name == "reference":
            stack.enter_context(backends.use("reference"))
        else:
            from sparseprop import _native

            before = _native.active_isa()
            stack.enter_context(backends.use("native"))
            stack.callback(_native.set_max_isa, before)
            _native.set_max_isa(name)
        yield name


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
