"""The benchmarks run and check what they time; their report says what the numbers say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import plots
import report
import summary
from limits import Limits, measure_limits
from patterns import PATTERNS, make_mask
from rows import Row, load
from shapes import ConvShape, LinearShape, conv_shapes, linear_shapes
from sparseprop import SparsePropError

BENCH = Path(report.__file__).parent
SEPARATE = {"bench_masks.py", "bench_gpu.py", "bench_step.py"}  # with commands and checks of their own
FILES = sorted({path.name for path in BENCH.glob("bench_*.py")} - SEPARATE)


def layer(group, shape, sparsity, speedup, plan="sparse"):
    return Row(
        "layer",
        group,
        shape,
        sparsity,
        nnz=10,
        ms={"dense": 2.0 * speedup, "dense channels_last": 3.0 * speedup, "sparse": 2.0},
        spread={"sparse": 0.02},
        speedup=speedup,
        speedup_range=(0.9 * speedup, 1.1 * speedup),
        gflops=50.0,
        limit_gflops=200.0,
        intensity=8.0,
        error=3e-7,
        plan=plan,
    )


ROWS = (
    layer("Linear", "A", 0.5, 0.5),
    layer("Linear", "A", 0.9, 2.0),
    layer("Linear", "B", 0.5, 2.0),
    layer("Linear", "B", 0.9, 8.0),
    layer("Conv", "C", 0.5, 0.25, plan="dense"),
    layer("Conv", "C", 0.9, 0.8, plan="dense"),
    Row("threads", "Linear", "A", 0.9, ms={"1 threads": 2.0, "2 threads": 1.0}, speedup=2.0),
    Row("isa", "Linear", "A", 0.9, ms={"avx2": 2.0, "avx512": 1.5}, speedup=1.33),
)


def written(folder, rows=ROWS):
    own = {"threads": 2, "cores": 2, "isa": "avx2", "versions": {"torch": "9.9"}, "busy": False}
    own |= {"fma_gflops": 200.0, "memory_gbs": [[2**20, 100.0], [2**28, 20.0]], "limits_from": "a probe"}
    machine = {"cpu": {"brand_raw": "Some CPU"}, "system": "Linux", "sparseprop": own}
    benchmarks = [{"name": str(i), "extra_info": row.as_dict()} for i, row in enumerate(rows)]
    path = folder / "short.json"
    path.write_text(json.dumps({"machine_info": machine, "benchmarks": benchmarks}))
    return path


def test_rows_survive_the_file(tmp_path):
    results = load(written(tmp_path))
    assert [row.shape for row in results.rows] == [row.shape for row in ROWS]
    assert results.rows[0].ms == ROWS[0].ms
    assert results.rows[0].of_limit == 0.25


def test_means_are_geometric_and_name_the_worst_shape():
    means = summary.speedups(row for row in ROWS if row.family == "layer")
    assert means["Linear"][0.5].value == pytest.approx(1.0)
    assert means["Linear"][0.9].value == pytest.approx(4.0)
    assert means["Linear"][0.9].worst.shape == "A"
    assert means["Conv"][0.9].count == 1


def test_the_limit_counts_arithmetic_memory_and_an_idle_call(tmp_path):
    idle = Row("overhead", "Linear", "D", 0.9, variant="forward + backward", ms={"sparse": 1.0, "idle": 0.5})
    results = load(written(tmp_path, (*ROWS, idle)))
    # A takes 4 ms dense and 2 sparse, at a quarter of the limit; B 16 and 2
    assert summary.at_limit(results)["Linear"][0.9] == pytest.approx((4.0 * 16.0) ** 0.5)
    without = summary.at_limit(load(written(tmp_path)))
    assert without["Linear"][0.9] == pytest.approx((8.0 * 32.0) ** 0.5)
    assert "| Linear, at the limit |" in report.write(written(tmp_path), tmp_path).read_text()


def test_break_even_is_interpolated_or_says_which_side():
    found = summary.crossovers(ROWS[:6])
    assert found["A"] == (pytest.approx(0.7), True)
    assert found["B"] == (0.5, False)
    assert found["C"] == (None, False)


def test_losses_and_wrong_choices_are_found(tmp_path):
    results = load(written(tmp_path))
    assert [(row.shape, row.sparsity) for row in summary.slower_than_dense(results)] == [
        ("A", 0.5),
        ("C", 0.9),
    ]
    choices = summary.choices(results.of("layer"))
    assert (choices.right, choices.of, choices.worst.shape, choices.cost) == (5, 6, "A", 2.0)


def test_report_names_machine_and_columns_and_shows_its_plots(tmp_path):
    text = report.write(written(tmp_path), tmp_path).read_text()
    for part in (
        "Some CPU",
        "torch 9.9",
        "| speed over dense | 50 % | 90 % |",
        "| Linear (2 shapes) | 1x | 4x |",
    ):
        assert part in text
    for column in ("dense ms", "channels_last ms", "sparse ms", "spread", "of limit", "error", "plan"):
        assert f"| {column} |" in text
    for plot in plots.PLOTS:
        assert plot.__doc__
    for name in ("speed_by_sparsity", "roofline", "threads", "isa", "break_even"):
        assert f"({name}.png)" in text
        assert (tmp_path / f"{name}.png").stat().st_size > 5000


WRONG = {
    "missing": (None, "cannot read .*No such file"),
    "empty": ("", "is not a result of these benchmarks .JSONDecodeError"),
    "truncated": ('{"machine_info": {', "is not a result of these benchmarks .JSONDecodeError"),
    "other content": ("[]", "is not a result of these benchmarks .TypeError"),
    "no rows": ('{"machine_info": {}, "benchmarks": []}', "holds no rows .* run bench/run.py"),
    "foreign fields": (
        '{"machine_info": {}, "benchmarks": [{"extra_info": {"family": "layer", "colour": 1}}]}',
        "is not a result of these benchmarks .TypeError",
    ),
}


@pytest.mark.parametrize(("content", "message"), WRONG.values(), ids=WRONG)
def test_wrong_results_are_refused(tmp_path, capsys, content, message):
    path = tmp_path / "short.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SparsePropError, match=message):
        load(path)
    assert report.main([str(path)]) == 2
    assert "run bench/run.py to make one" in capsys.readouterr().err
    assert not (tmp_path / "report.md").exists()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.98])
def test_patterns_have_the_density_asked_for(pattern, sparsity):
    mask = make_mask(torch.Size((256, 512)), sparsity, pattern)
    assert mask.float().mean().item() == pytest.approx(1 - sparsity, rel=0.15)
    assert torch.equal(mask, make_mask(torch.Size((256, 512)), sparsity, pattern))


def test_skewed_patterns_have_full_and_empty_rows():
    rows = np.asarray(make_mask(torch.Size((512, 256)), 0.9, "skewed").sum(1))
    assert (rows == 0).sum() >= 51
    assert (rows == 256).sum() >= 10


def test_shapes_name_themselves_and_know_their_output():
    for form in ("tiny", "short", "full"):
        shapes = (*linear_shapes(form), *conv_shapes(form))
        assert len({str(shape) for shape in shapes}) == len(shapes)
    conv = ConvShape(3, 8, 7, 20, 2, 2)
    assert conv.layer()(conv.input()).shape == (2, 8, conv.out_size, conv.out_size)
    assert LinearShape(3, 5, 8).group != LinearShape(3, 5, 64).group


def test_limits_take_the_slower_of_arithmetic_and_memory():
    limits = Limits(1, 100.0, 90.0, ((1000, 50.0), (10**6, 10.0)), "by hand")
    assert limits.gflops(2e6, 1e3) == pytest.approx(100.0)
    assert limits.gflops(1e5, 1e5) == pytest.approx(10.0)
    assert limits.bandwidth(10**9) == 10.0
    assert measure_limits(1, probe=False).fma > 0


def test_every_benchmark_runs_and_is_right_on_a_tiny_shape():
    files = [str(BENCH / name) for name in FILES]
    assert len(files) == 8
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--benchmark-disable",
        "--form=tiny",
        "--threads=2",
        *files,
    ]
    done = subprocess.run(command, cwd=BENCH.parent, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "24 passed" in done.stdout
