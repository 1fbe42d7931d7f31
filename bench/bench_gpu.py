"""2:4 Linear layers on a CUDA device: verified against the masked dense layer, then timed against dense.

Run: python bench/bench_gpu.py [--out FOLDER] [--quick]
Exit status 1 if any output or gradient is wrong, 2 without a CUDA device. "step" is forward, backward and a
plain SGD update; it includes compressing the changed weight, once for 2:4 and twice for 2:4T.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import sparseprop
from sparseprop.semi_structured import SemiStructuredLinear
from sparseprop.semi_structured_backend import torch_backend

SHAPES = [
    (4096, 1024, 4096),
    (4096, 4096, 1024),
    (8192, 4096, 4096),
    (16384, 4096, 16384),
    (16384, 8192, 8192),
]


def milliseconds(run: Callable[[], object], rounds: int) -> float:
    """Median of single timed runs, after a warm-up."""
    for _ in range(5):
        run()
    times = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def pair(
    inputs: int, outputs: int, pattern: str, dtype: torch.dtype
) -> tuple[nn.Linear, SemiStructuredLinear]:
    """A 2:4 layer, swapped in by the public function, and the dense layer with its masked weight."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inputs, outputs, dtype=dtype, device="cuda"))
    swapped = sparseprop.swap_modules(model, device="cuda", pattern=pattern, inplace=False)
    layer = swapped[0]
    assert isinstance(layer, SemiStructuredLinear), sparseprop.plan(model, device="cuda", pattern=pattern)
    return sparseprop.to_dense(swapped, inplace=False)[0], layer


def worst_errors(dense: nn.Linear, layer: SemiStructuredLinear, x: torch.Tensor) -> dict[str, float]:
    """Largest errors against the masked dense layer in float32, relative to the largest true entry, with
    those of the masked dense layer in half precision beside them as ``dense ...``."""
    exact = nn.Linear(dense.in_features, dense.out_features, device="cuda")
    exact.load_state_dict({key: value.float() for key, value in dense.state_dict().items()})
    grad = torch.randn(len(x), dense.out_features, dtype=x.dtype, device="cuda")
    results = {}
    for name, net, cast in (("true", exact, torch.float32), ("", layer, x.dtype), ("dense ", dense, x.dtype)):
        net.zero_grad()
        one = x.to(cast).clone().requires_grad_()
        out = net(one)
        out.backward(grad.to(cast))
        grad_weight = net.weight.grad * layer.mask
        results[name] = {"output": out.detach(), "grad input": one.grad, "grad weight": grad_weight}
    true = results.pop("true")
    return {
        name + key: float((value.float() - true[key]).abs().max() / true[key].abs().max())
        for name, found in results.items()
        for key, value in found.items()
    }


def times(net: nn.Module, x: torch.Tensor, rounds: int) -> tuple[float, float]:
    optimizer, one = torch.optim.SGD(net.parameters(), 1e-6), x.clone().requires_grad_()
    grad = torch.randn_like(net(x))

    def step() -> None:
        net(one).backward(grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        one.grad = None

    def forward() -> None:
        with torch.no_grad():
            net(x)

    return milliseconds(forward, rounds), milliseconds(step, rounds)


def measured(shape: tuple[int, int, int], pattern: str, dtype: torch.dtype, rounds: int) -> dict[str, object]:
    rows, inputs, outputs = shape
    dense, layer = pair(inputs, outputs, pattern, dtype)
    x = torch.randn(rows, inputs, dtype=dtype, device="cuda")
    errors = worst_errors(dense, layer, x[:512])
    wrong = [
        key
        for key in ("output", "grad input", "grad weight")
        if errors[key] > 2 * errors["dense " + key] + 1e-3
    ]
    forward, step = times(layer, x, rounds)
    dense_forward, dense_step = times(dense, x, rounds)
    return {
        "shape": f"{rows} x {inputs} -> {outputs}",
        "pattern": pattern,
        "dtype": str(dtype).removeprefix("torch."),
        "forward": f"{dense_forward:.3f} / {forward:.3f} ms, {dense_forward / forward:.2f}x",
        "step": f"{dense_step:.3f} / {step:.3f} ms, {dense_step / step:.2f}x",
        "error": f"{max(errors[key] for key in errors if not key.startswith('dense')):.1e}",
        "dense error": f"{max(errors[key] for key in errors if key.startswith('dense')):.1e}",
        "wrong": ", ".join(wrong) or "-",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for the figures as JSON")
    parser.add_argument("--quick", action="store_true", help="the smallest shape only")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_gpu needs a CUDA device; torch sees none here", file=sys.stderr)
        return 2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {torch_backend().name}; dense / 2:4\n")
    rows = []
    for shape in SHAPES[:1] if options.quick else SHAPES:
        for pattern in ("2:4", "2:4T"):
            for dtype in (torch.bfloat16, torch.float16):
                rows.append(measured(shape, pattern, dtype, 10 if options.quick else 30))
                if len(rows) == 1:
                    print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
                print("| " + " | ".join(map(str, rows[-1].values())) + " |", flush=True)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "bench_gpu.json").write_text(json.dumps(rows, indent=1))
    return 1 if any(row["wrong"] != "-" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
