"""A whole optimizer step (forward, loss, backward, SGD with momentum): sparse and dense.

Run: python bench/bench_step.py [--short] [--models resnet18,mlp] [--compile]
It writes bench/out/step.json and step.md.

Each form trains its own copy; forms run in turn, so that noise of the machine meets all alike. The dense
model pays nothing for its masks. On a busy machine use --threads 1 --cpu-time: the processor's time counts.
"fused" is sparse with `sparseprop.fuse`. Agreement: 20 steps beside the masked dense model from equal
weights at a lower learning rate, on 64x64 images or 32 tokens, batch 8, without dropout.
"""

import argparse
import copy
import functools
import json
import os
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import sparseprop
from sparseprop.timing import Comparison, compare
from step_models import MODELS, Net, prune

OUT = Path(__file__).parent / "out"
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Run:
    """A form of a model in training, on one batch."""

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        classes: int,
        layout: str,
        *,
        compiled: bool = False,
        rate: float = 0.01,
    ) -> None:
        self.model = copy.deepcopy(model)
        self.x = x
        if x.dim() == 4:
            self.model = self.model.to(memory_format=LAYOUTS[layout])
            self.x = x.contiguous(memory_format=LAYOUTS[layout])
        self.labels = torch.arange(len(x)) % classes
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=rate, momentum=0.9)
        self.call = torch.compile(self.model) if compiled else self.model
        self.masks: dict[str, Tensor] = {}

    def step(self) -> float:
        loss = functional.cross_entropy(self.call(self.x), self.labels)
        loss.backward()
        for name, mask in self.masks.items():  # for agreement only
            self.model.get_submodule(name).weight.grad.mul_(mask)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def infer(self) -> None:
        with torch.no_grad():
            self.call(self.x)


def forms(dense: nn.Module, sparse: nn.Module, x: Tensor, classes: int, compiled: bool) -> dict[str, Run]:
    layouts = LAYOUTS if x.dim() == 4 else ["contiguous"]
    models = {"dense": dense, "sparse": sparse}
    if any(fusion.native for fusion in sparseprop.plan_fusion(sparse)):
        models["fused"] = sparseprop.fuse(sparse, inplace=False)
    runs = {
        f"{form} {layout}": Run(model, x, classes, layout)
        for form, model in models.items()
        for layout in layouts
    }
    if compiled:
        for form, model in (("dense", dense), ("sparse", sparse)):
            last = list(layouts)[-1]
            runs[f"compiled {form}"] = Run(model, x, classes, last, compiled=True)
    return runs


def summary(found: Comparison) -> dict:
    """Milliseconds of all forms, and the speed-up of the best eager sparse form over the best dense one."""
    dense = [name for name in found.seconds if name.startswith("dense")]
    sparse = [name for name in found.seconds if name.startswith(("sparse", "fused"))]
    best = found.fastest(*dense), found.fastest(*sparse)
    return {
        "ms": {name: round(found.median_ms(name), 2) for name in found.seconds},
        "rounds": len(found.seconds[best[0]]),
        "best": best,
        "speedup": round(1 / found.ratio(best[1], best[0]), 3),
    }


def agreement(net: Net, sparsity: float) -> dict:
    """Losses of 20 steps from equal weights: masked dense, sparse, and dense once more in its other layout.

    The last tells rounding from error: with batch norm over few pixels, steps differ by as much as the
    order of additions makes them. At the rate of the timed steps, a ResNet-50 at 95 % parts from itself in
    another layout even in float64: losses equal to four digits for 8 steps, anything at the twentieth. At a
    fifth of it all forms stay within some hundredths of the first loss.
    """
    torch.manual_seed(0)
    dense = without_dropout(net.make(True))
    masks = prune(dense, net, sparsity)
    sparse = swapped(dense, masks)
    x = net.example(8, True)
    run = functools.partial(Run, x=x, classes=net.classes, rate=0.002)
    runs = {"masked dense": run(dense, layout="contiguous")}
    runs["sparse"] = run(sparseprop.fuse(sparse), layout="contiguous")
    runs["dense again"] = run(dense, layout="channels_last")
    runs["masked dense"].masks = runs["dense again"].masks = masks
    losses = {form: [one.step() for _ in range(20)] for form, one in runs.items()}
    wanted = losses["masked dense"]

    def largest(form: str) -> float:
        return max(abs(one - other) for one, other in zip(losses[form], wanted, strict=True)) / wanted[0]

    return {
        "loss after 20 steps": {form: found[-1] for form, found in losses.items()},
        "largest difference": largest("sparse"),
        "largest difference of dense": largest("dense again"),
    }


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def swapped(dense: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    return sparseprop.swap_modules(
        dense, min_sparsity=0.0, filter_fn=lambda _, name: name in masks, inplace=False
    )


def peak_bytes(run: Run) -> int:
    """The most that torch holds at once during a step beyond what it held before."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run.step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def bench(name: str, net: Net, sparsity: float, options: argparse.Namespace) -> dict:
    torch.manual_seed(0)
    timed = functools.partial(
        compare,
        budget_s=20.0 if options.short else 120.0,
        min_rounds=3 if options.short else 5,
        max_rounds=5 if options.short else 15,
        clock=time.process_time if options.cpu_time else time.perf_counter,
    )
    batch = max(1, net.batch // 4) if options.short else net.batch
    dense = net.make(False)
    masks = prune(dense, net, sparsity)
    sparse = swapped(dense, masks)
    x = net.example(batch, False)
    runs = forms(dense, sparse, x, net.classes, options.compile)
    row: dict = {"model": name, "sparsity": sparsity, "batch": batch, "wanted": net.wanted[sparsity]}
    row["load"] = os.getloadavg()[0]
    row["step"] = summary(timed({form: run.step for form, run in runs.items()}))
    best_dense, best_sparse = (runs[form] for form in row["step"]["best"])
    memory = sparseprop.parameter_memory(best_sparse.model, best_sparse.optimizer)
    row["memory"] = {"ratio": memory.ratio, "ratio with indices": memory.ratio_with_indices}
    peaks = [peak_bytes(run) for run in (best_dense, best_sparse)]
    row["peak MB of a step"] = {"dense": peaks[0] / 1e6, "sparse": peaks[1] / 1e6}
    del runs, best_dense, best_sparse
    for size in (1, 32):
        runs = forms(dense.eval(), sparse.eval(), net.example(size, False), net.classes, False)
        row[f"inference {size}"] = summary(timed({form: run.infer for form, run in runs.items()}))
    row |= agreement(net, sparsity)
    return row


def table(rows: list[dict]) -> str:
    head = (
        "| model | sparsity | batch | dense ms | sparse ms | step | wanted | inference 1 | inference 32 | "
        "compiled dense / sparse ms | memory (+ indices) | peak MB sparse / dense | loss dense / sparse | "
        "largest difference / first loss (of dense in its other layout) |"
    )
    lines = [head, "|" + "---|" * (head.count("|") - 1)]
    for row in rows:
        step, ms = row["step"], row["step"]["ms"]
        losses, peak, memory = row["loss after 20 steps"], row["peak MB of a step"], row["memory"]
        compiled = [
            f"{ms[f'compiled {form}']:.0f}" for form in ("dense", "sparse") if f"compiled {form}" in ms
        ]
        cells = [
            row["model"],
            f"{100 * row['sparsity']:.0f} %",
            row["batch"],
            *(f"{ms[form]:.0f} ({form})" for form in step["best"]),
            f"**{step['speedup']:.2f}x**",
            f"{row['wanted']:g}x" if row["wanted"] else "-",
            *(f"{row[f'inference {size}']['speedup']:.2f}x" for size in (1, 32)),
            " / ".join(compiled) or "-",
            f"{100 * memory['ratio']:.1f} % ({100 * memory['ratio with indices']:.1f} %)",
            f"{peak['sparse']:.0f} / {peak['dense']:.0f}",
            f"{losses['masked dense']:.4f} / {losses['sparse']:.4f}",
            f"{row['largest difference']:.1e} ({row['largest difference of dense']:.1e})",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS), help="some of: " + ", ".join(MODELS))
    parser.add_argument("--short", action="store_true", help="a quarter of the batch, few rounds")
    parser.add_argument("--compile", action="store_true", help="time torch.compile of both forms as well")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="count processor time; with one thread only")
    parser.add_argument(
        "--return-memory", action="store_true", help="without sparseprop.keep_freed_memory, for either form"
    )
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    if options.cpu_time and options.threads != 1:
        parser.error("--cpu-time adds up the threads' time: use it with --threads 1")
    names = options.models.split(",")
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        parser.error(f"--models got {', '.join(unknown)}, wanted some of {', '.join(MODELS)}")
    torch.set_num_threads(options.threads)
    kept = not options.return_memory and sparseprop.keep_freed_memory()
    options.out.mkdir(exist_ok=True, parents=True)
    rows = []
    for name in names:
        for sparsity in MODELS[name].wanted:
            rows.append(bench(name, MODELS[name], sparsity, options))
            about = {"isa": sparseprop.active_isa(), "threads": options.threads, "torch": torch.__version__}
            about["freed memory kept"] = kept
            (options.out / "step.json").write_text(json.dumps(about | {"rows": rows}, indent=1))
            (options.out / "step.md").write_text(table(rows) + "\n")
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
