"""Conv2d layers through the public module, forward and backward, beside dense torch in both its layouts."""

from measure import layer_row, measured, record
from shapes import conv_shapes, sparsities


def pytest_generate_tests(metafunc):
    form = metafunc.config.getoption("form")
    cases = [(shape, s) for shape in conv_shapes(form) for s in sparsities("Conv", form)]
    metafunc.parametrize(("shape", "sparsity"), cases, ids=[f"{shape}-{s:.1%}" for shape, s in cases])


def test_conv(benchmark, shape, sparsity, form, effort, limits):
    found = measured(shape, "Conv", form, effort)
    record(benchmark, layer_row(found, sparsity, limits), found.steps[f"sparse {sparsity}"])
