"""The contractions alone, called natively on buffers in their own layout, as shares of the limit.

At 99.9 % hardly any arithmetic is left: that is what moving the activations costs.
"""

import os

import pytest
import torch

from measure import record, sparse_layer, spread
from rows import Row
from shapes import FLAGSHIP, ConvShape, LinearShape
from sparseprop import _native

SHORT = (
    FLAGSHIP,
    LinearShape(3072, 768, 1024),
    ConvShape(256, 256, 3, 14, 1, 16),
    ConvShape(512, 128, 1, 28, 1, 16),
)
MORE = (
    LinearShape(4096, 4096, 512),
    LinearShape(768, 3072, 1024),
    ConvShape(64, 64, 3, 56, 1, 16),
    ConvShape(128, 128, 3, 56, 2, 16),
    ConvShape(512, 512, 3, 7, 1, 16),
    ConvShape(1024, 256, 1, 14, 1, 64),
)
TINY = (LinearShape(16, 24, 8), ConvShape(4, 8, 3, 7, 1, 2))
SHAPES = {"tiny": TINY, "short": SHORT, "full": SHORT + MORE}
SPARSITIES = {"tiny": (0.9,), "short": (0.9, 0.999), "full": (0.5, 0.8, 0.9, 0.95, 0.98, 0.999)}
CONTRACTIONS = ("forward", "grad_input", "grad_weight", "both gradients")


def lift(numbers, fill):
    """Up to three numbers as three, filled up in front."""
    return (*(fill,) * (3 - len(numbers)), *numbers)


def lowered(layer):
    """The native contraction of a layer, which borrows the layer's index arrays."""
    g, indices = layer._geometry, (layer.pattern.row_ptr.numpy(), layer.pattern.col_idx.numpy())
    options = [lift(numbers, 1) for numbers in (g.kernel_size, g.stride, g.dilation)]
    return _native.Contraction(g.out_channels, g.in_channels, g.groups, *options, *indices)


class Buffers:
    """One layer's operator and tensors, all allocated, batch innermost, with the calls to time."""

    def __init__(self, shape, sparsity):
        layer = sparse_layer(shape, sparsity)
        self.contraction = lowered(layer)
        self.shape, self.values, self.bias = shape, layer.weight_values.detach(), layer.bias.detach()
        x = torch.randn(shape.input().shape)
        self.x = x.movedim(0, -1).contiguous()  # channels, height, width, batch
        out = (shape.layer()(x).detach()).movedim(0, -1)
        geometry = layer._geometry
        self.in_size, self.out_size = lift(x.shape[2:], 1), lift(out.shape[1:-1], 1)
        self.padding = lift([left for left, _ in geometry.padding], 0)
        self.out, self.grad_out = torch.empty_like(out).contiguous(), torch.randn(out.shape)
        self.grad_x, self.grad_values = torch.empty_like(self.x), torch.empty_like(self.values)
        self.layer, self.plain_x = layer, x

    def strides(self, tensor):
        own = tensor.stride()
        return (own[-1], own[0], *lift(own[1:-1], 0))

    def forward(self):
        self.contraction.forward(
            0, self.shape.batch, self.in_size, self.padding, self.out_size, self.x.data_ptr(),
            self.strides(self.x), self.values.data_ptr(), self.bias.data_ptr(), self.out.data_ptr(),
            self.strides(self.out),
        )  # fmt: skip

    def backward(self, to_input, to_values):
        self.contraction.backward(
            0, self.shape.batch, self.in_size, self.padding, self.out_size, self.x.data_ptr(),
            self.strides(self.x), self.values.data_ptr(), self.grad_out.data_ptr(),
            self.strides(self.grad_out), self.grad_x.data_ptr() if to_input else 0,
            self.strides(self.grad_x), self.grad_values.data_ptr() if to_values else 0, 0,
        )  # fmt: skip

    def steps(self):
        return {
            "forward": self.forward,
            "grad_input": lambda: self.backward(True, False),
            "grad_weight": lambda: self.backward(False, True),
            "both gradients": lambda: self.backward(True, True),
        }

    def error(self):
        """Largest difference of the buffers from dense torch."""
        dense, x = self.layer.to_dense(), self.plain_x.requires_grad_()
        out = dense(x)
        grads = torch.autograd.grad(out, (x, dense.weight), self.grad_out.movedim(-1, 0))
        self.forward()
        self.backward(True, True)
        pairs = (
            (self.out.movedim(-1, 0), out.detach()),
            (self.grad_x.movedim(-1, 0), grads[0]),
            (self.grad_values, grads[1].reshape(-1)[self.layer.pattern.flat_index()]),
        )
        return max(float((mine - theirs).abs().max() / theirs.abs().max()) for mine, theirs in pairs)

    def cost(self, contraction):
        """Operations, and bytes of reading and writing each thing once."""
        read, written = self.shape.moved()
        products = 2 if contraction == "both gradients" else 1
        arrays = read + written + (read if products == 2 else 0)
        return products * 2.0 * self.contraction.nnz * self.shape.columns, 4.0 * (
            arrays + products * self.contraction.nnz
        )


def pytest_generate_tests(metafunc):
    form = metafunc.config.getoption("form")
    cases = [(shape, s) for shape in SHAPES[form] for s in SPARSITIES[form]]
    metafunc.parametrize(
        "buffers", cases, ids=[f"{shape}-{s:.1%}" for shape, s in cases], indirect=True, scope="module"
    )
    metafunc.parametrize("contraction", CONTRACTIONS)


@pytest.fixture(scope="module")
def buffers(request, effort):
    shape, sparsity = request.param
    found = Buffers(shape, sparsity)
    error = found.error()
    assert error < 1e-4, f"{shape} at {sparsity} differs from dense torch by {error:.1e}"
    return found, sparsity, error, effort.compare(found.steps())


def test_contraction(benchmark, buffers, contraction, limits):
    found, sparsity, error, times = buffers
    flop, moved = found.cost(contraction)
    row = Row(
        "contraction",
        found.shape.group,
        str(found.shape),
        sparsity,
        variant=contraction,
        nnz=found.contraction.nnz,
        ms={contraction: times.median_ms(contraction)},
        spread={contraction: spread(times.seconds[contraction])},
        gflops=1e-6 * flop / times.median_ms(contraction),
        limit_gflops=limits.gflops(flop, moved),
        intensity=flop / moved,
        error=error,
        load=os.getloadavg()[0],
    )
    record(benchmark, row, found.steps()[contraction])
