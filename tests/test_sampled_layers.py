"""Any combination of options, sampled: set SPARSEPROP_EXAMPLES for a longer run (150 by default)."""

import os
from dataclasses import dataclass

import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from checks import BACKENDS, LAYOUTS, assert_right, running
from sparseprop.nn import SparseConv1d, SparseConv2d, SparseConv3d, SparseLinear

EXAMPLES = int(os.environ.get("SPARSEPROP_EXAMPLES", "150"))
CONVS = (SparseConv1d, SparseConv2d, SparseConv3d)
widths = st.one_of(st.integers(1, 12), st.sampled_from((15, 16, 17, 31, 33, 64, 65)))


@dataclass(frozen=True)
class Case:
    """One sampled layer and how it is called."""

    dims: int
    channels: tuple[int, int]
    batch: int
    size: tuple[int, ...]
    options: dict
    density: float
    dtype: torch.dtype
    bias: bool
    layouts: tuple[str, str]
    needs: tuple[bool, bool, bool]
    backend: str
    threads: int
    seed: int


@st.composite
def conv_options(draw, dims):
    def per_dimension(low, high):
        if draw(st.booleans()):
            return (draw(st.integers(low, high)),) * dims
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    options = {"kernel_size": per_dimension(1, 4), "dilation": per_dimension(1, 3)}
    options["padding_mode"] = draw(
        st.sampled_from(("zeros", "zeros", "zeros", "reflect", "replicate", "circular"))
    )
    options["padding"] = draw(st.sampled_from(("same", "valid", "numbers", "numbers")))
    if options["padding"] == "numbers":
        options["padding"] = per_dimension(0, 3)
    if options["padding"] != "same":
        options["stride"] = per_dimension(1, 3)
    options["groups"] = draw(st.sampled_from((1, 1, 2, 3)))
    return options


def smallest_size(options):
    """Spatial sizes that hold the kernel, and the padding that modes like 'reflect' copy from."""
    reach = [
        spread * (kernel - 1)
        for kernel, spread in zip(options["kernel_size"], options["dilation"], strict=True)
    ]
    pads = options["padding"]
    if pads == "same":
        return [total - total // 2 + 1 for total in reach]
    pads = [0] * len(reach) if pads == "valid" else pads
    return [max(total + 1 - 2 * pad, pad + 1) for total, pad in zip(reach, pads, strict=True)]


@st.composite
def cases(draw):
    dims = draw(st.sampled_from((0, 0, 1, 2, 2, 2, 3)))
    channels, options, size = (draw(widths), draw(widths)), {}, ()
    if dims:
        options = draw(conv_options(dims))
        channels = tuple(options["groups"] * draw(st.integers(1, 6)) for _ in range(2))
        room = {1: 70, 2: 10, 3: 4}[dims]
        size = tuple(least + draw(st.integers(0, room)) for least in smallest_size(options))
    return Case(
        dims,
        channels,
        draw(st.one_of(st.integers(0, 4), st.sampled_from((8, 17, 33))))
        if dims < 2
        else draw(st.integers(0, 3)),
        size,
        options,
        draw(st.sampled_from((0.0, 0.05, 0.2, 0.5, 1.0))),
        draw(st.sampled_from((torch.float32, torch.float32, torch.float64))),
        draw(st.booleans()),
        (draw(st.sampled_from(sorted(LAYOUTS))), draw(st.sampled_from(sorted(LAYOUTS)))),
        (draw(st.booleans()), draw(st.booleans()), draw(st.booleans())),
        draw(st.sampled_from(BACKENDS)),
        draw(st.sampled_from((1, 2))),
        draw(st.integers(0, 2**16)),
    )


@given(cases())
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
def test_any_layer_agrees_with_its_dense_twin(case):
    note(str(case))
    torch.manual_seed(case.seed)
    common = {"density": case.density, "bias": case.bias, "dtype": case.dtype}
    if case.dims:
        layer = CONVS[case.dims - 1].random(*case.channels, **case.options, **common)
    else:
        layer = SparseLinear.random(*case.channels, **common)
    x = torch.randn(case.batch, case.channels[0], *case.size, dtype=case.dtype)
    with torch.no_grad():
        grad = torch.randn_like(layer.to_dense()(x))
    if case.batch:
        x, grad = LAYOUTS[case.layouts[0]](x), LAYOUTS[case.layouts[1]](grad)
    torch.set_num_threads(case.threads)
    try:
        with running(case.backend):
            assert_right(layer, x, grad, case.needs)
    finally:
        torch.set_num_threads(1)
