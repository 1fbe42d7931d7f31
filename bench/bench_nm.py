"""N:M layers beside dense ones and unstructured ones of equal density, all in turn."""

import os

import torch

from measure import SPARSE_TYPE, dense_steps, largest_error, record, sparse_layer, timed
from rows import Row
from shapes import SMALL_BATCH, ConvShape, linear_shapes
from sparseprop.masks import nm_mask
from sparseprop.timing import module_step


def whole_groups(shapes, group):
    """Linear shapes whose rows are whole groups of so many, on batches that are not small."""
    return tuple(s for s in shapes if s.in_features % group == 0 and s.batch >= SMALL_BATCH)


SHORT = (*whole_groups(linear_shapes("short"), 8), ConvShape(256, 256, 3, 14, 1, 16))
SHAPES = {
    "tiny": linear_shapes("tiny"),
    "short": SHORT,
    "full": (
        *whole_groups(linear_shapes("full"), 32),
        *(ConvShape(256, 256, 3, 14, 1, 16), ConvShape(512, 128, 1, 28, 1, 16)),
    ),
}
PATTERNS = {
    "tiny": ("1:8",),
    "short": ("2:4", "1:4", "2:8", "1:8"),
    "full": ("2:4", "1:4", "2:8", "1:8", "4:32"),
}


def pytest_generate_tests(metafunc):
    form = metafunc.config.getoption("form")
    cases = [(shape, pattern) for shape in SHAPES[form] for pattern in PATTERNS[form]]
    metafunc.parametrize(("shape", "pattern"), cases, ids=[f"{shape}-{pattern}" for shape, pattern in cases])


def nm_layer(shape, pattern):
    torch.manual_seed(0)
    dense = shape.layer()
    mask = nm_mask(dense.weight.detach().abs(), *map(int, pattern.split(":")))
    return SPARSE_TYPE[type(dense)].from_dense(dense, mask=mask, pattern=pattern)


def test_nm(benchmark, shape, pattern, effort):
    x = shape.input()
    layer = nm_layer(shape, pattern)
    assert layer.nm == pattern
    dense = dense_steps(shape, x)
    steps = {
        **dense,
        "unstructured": module_step(sparse_layer(shape, 1 - layer.density), x),
        "N:M": module_step(layer, x),
    }
    times = effort.compare(steps)
    best = times.fastest(*dense)
    names = {best: "dense", "unstructured": "unstructured", "N:M": "N:M"}
    row = Row(
        "nm",
        shape.group,
        f"{shape}, {pattern}",
        1 - layer.density,
        pattern=pattern,
        nnz=layer.nnz,
        error=largest_error(layer, x),
        load=os.getloadavg()[0],
        **timed(times, names, "N:M", best),
    )
    record(benchmark, row, steps["N:M"])
