"""Uneven patterns against random ones of the same shape: time per non-zero, all in turn."""

import os

from measure import largest_error, record, sparse_layer, timed
from patterns import PATTERNS
from rows import Row
from shapes import FLAGSHIP, ConvShape, LinearShape
from sparseprop.timing import module_step

SHORT = (FLAGSHIP, ConvShape(256, 256, 3, 14, 1, 16))
MORE = (
    LinearShape(3072, 768, 1024),
    LinearShape(509, 1021, 509),
    LinearShape(4096, 4096, 256),
    ConvShape(512, 128, 1, 28, 1, 16),
    ConvShape(512, 512, 3, 7, 1, 16),
    ConvShape(128, 128, 3, 56, 2, 16),
)
SHAPES = {"tiny": (LinearShape(16, 24, 8),), "short": SHORT, "full": SHORT + MORE}
SPARSITIES = {"tiny": (0.8,), "short": (0.9,), "full": (0.8, 0.9, 0.98)}


def pytest_generate_tests(metafunc):
    form = metafunc.config.getoption("form")
    cases = [(shape, s) for shape in SHAPES[form] for s in SPARSITIES[form]]
    metafunc.parametrize(("shape", "sparsity"), cases, ids=[f"{shape}-{s:.1%}" for shape, s in cases])
    metafunc.parametrize("pattern", [name for name in PATTERNS if name != "random"])


def test_pattern(benchmark, shape, sparsity, pattern, effort):
    x = shape.input()
    layers = {name: sparse_layer(shape, sparsity, name) for name in ("random", pattern)}
    steps = {name: module_step(layer, x) for name, layer in layers.items()}
    fields = timed(effort.compare(steps), {name: name for name in steps}, pattern, "random")
    per_weight = layers[pattern].nnz / layers["random"].nnz
    fields["speedup"] *= per_weight
    fields["speedup_range"] = tuple(per_weight * end for end in fields["speedup_range"])
    row = Row(
        "pattern",
        shape.group,
        str(shape),
        sparsity,
        pattern=pattern,
        nnz=layers[pattern].nnz,
        error=largest_error(layers[pattern], x),
        load=os.getloadavg()[0],
        **fields,
    )
    record(benchmark, row, steps[pattern])
