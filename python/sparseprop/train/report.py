"""What a finished run says: accuracies, step times, memory, layers; as JSON and as pictures."""

import copy
import dataclasses
import json
import os
import platform
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparseprop
from sparseprop import SwapPlan
from sparseprop.data import ImageData
from sparseprop.timing import Step, compare
from sparseprop.train.checkpoint import read_text, save_tensors, write_text
from sparseprop.train.config import FinetuneConfig
from sparseprop.train.loop import make_optimizer
from sparseprop.train.models import ModelSpec
from sparseprop.train.swapping import example_batch

__all__ = ["FinetuneResult", "StepTimes", "environment", "parameter_bytes", "step_times", "write_report"]

_TIMING_S = 10.0  # for the steps of dense and sparse together


@dataclass(frozen=True)
class StepTimes:
    """Median milliseconds of one training step, timed in turn on the same batch in one process.

    ``dense_ms`` is the faster of the two dense layouts and ``speedup`` the median over the rounds of its time
    divided by the sparse model's.
    """

    batch_size: int
    rounds: int
    dense_nchw_ms: float
    dense_channels_last_ms: float
    sparse_ms: float
    speedup: float
    rounds_ms: dict[str, list[float]] = dataclasses.field(repr=False)

    @property
    def dense_ms(self) -> float:
        return min(self.dense_nchw_ms, self.dense_channels_last_ms)


@dataclass(frozen=True)
class FinetuneResult:
    """The result of a run; ``result.json`` in ``folder`` holds the same and more."""

    folder: Path
    accuracy_dense: float
    accuracy_sparse: float
    sparsity: float
    step: StepTimes
    parameter_bytes_dense: int
    parameter_bytes_sparse: int
    plan: SwapPlan


def write_report(
    config: FinetuneConfig,
    folder: Path,
    spec: ModelSpec,
    data: ImageData,
    notes: Mapping[str, Mapping[str, Any]],
    *,
    dense: nn.Module,
    sparse: nn.Module,
    masked: nn.Module,
) -> FinetuneResult:
    """Time both models and the layers of the ``masked`` one, which is the sparse one before its swap; write
    the model file, the plots and, last of all, ``result.json``."""
    plan = _measured(SwapPlan.from_json(read_text(folder / "plan.json")), masked, config, spec)
    result = FinetuneResult(
        folder=folder,
        accuracy_dense=notes["dense"]["accuracy"],
        accuracy_sparse=notes["sparse"]["accuracy"],
        sparsity=_planned_sparsity(plan),
        step=step_times(config, data, dense=dense, sparse=sparse),
        parameter_bytes_dense=parameter_bytes(dense),
        parameter_bytes_sparse=parameter_bytes(sparse),
        plan=plan,
    )
    note = {"spec": dataclasses.asdict(spec), "seed": config.seed}  # the seed says which images were held out
    save_tensors(folder / "model.safetensors", sparse.state_dict(), note)
    if config.plots:
        from sparseprop.train.plots import write_plots

        write_plots(folder, result)
    seconds = {name: note["seconds"] for name, note in notes.items()}
    write_text(folder / "result.json", json.dumps(_as_json(config, result, seconds), indent=2) + "\n")
    return result


def step_times(config: FinetuneConfig, data: ImageData, *, dense: nn.Module, sparse: nn.Module) -> StepTimes:
    """Time whole training steps (forward, loss, backward, optimizer) of copies of both models, in turn."""
    indices = torch.arange(min(config.batch_size, len(data.train.labels)))
    images, labels = data.train.fetch(indices), data.train.labels[indices]
    steps = {
        "dense_nchw": _step(config, copy.deepcopy(dense), images, labels),
        "dense_channels_last": _step(
            config, _channels_last(dense), images.to(memory_format=torch.channels_last), labels
        ),
        "sparse": _step(config, copy.deepcopy(sparse), images, labels),
    }
    times = compare(steps, budget_s=_TIMING_S, min_rounds=5, max_rounds=30)
    best = times.fastest("dense_nchw", "dense_channels_last")
    return StepTimes(
        batch_size=len(indices),
        rounds=len(times.seconds["sparse"]),
        dense_nchw_ms=times.median_ms("dense_nchw"),
        dense_channels_last_ms=times.median_ms("dense_channels_last"),
        sparse_ms=times.median_ms("sparse"),
        speedup=1 / times.ratio("sparse", best),
        rounds_ms={name: [1e3 * value for value in values] for name, values in times.seconds.items()},
    )


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and of the pattern indices that sparse layers keep in their state."""
    names = {name for name, _ in model.named_parameters()}
    state = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    pattern = (v for k, v in state.items() if k not in names and k.rpartition(".")[2].startswith("weight_"))
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *pattern])


def environment() -> dict[str, Any]:
    """What the numbers of a run depend on: processor features, threads, versions."""
    return {
        "isa": sparseprop.active_isa(),
        "threads": torch.get_num_threads(),
        "cpus": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sparseprop": sparseprop.__version__,
    }


def _step(config: FinetuneConfig, model: nn.Module, images: Tensor, labels: Tensor) -> Step:
    optimizer = make_optimizer(config, model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # the time of a step without its effect
    model.train()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def _channels_last(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def _measured(plan: SwapPlan, masked: nn.Module, config: FinetuneConfig, spec: ModelSpec) -> SwapPlan:
    """The plan as it was obeyed, with measured times in place of estimated ones."""
    example = example_batch(config.batch_size, spec)
    choices = {layer.name: layer for layer in plan}
    timed = sparseprop.plan(masked, example, filter_fn=lambda _, name: choices[name].sparse_ms is not None)
    layers = (
        choices[layer.name]
        if layer.sparse_ms is None
        else dataclasses.replace(layer, choice=choices[layer.name].choice)
        for layer in timed
    )
    return dataclasses.replace(plan, layers=tuple(layers))


def _planned_sparsity(plan: SwapPlan) -> float:
    """The share of zeros over the layers that became sparse."""
    sizes = [
        (torch.Size(layer.shape).numel(), layer.sparsity or 0.0) for layer in plan if layer.choice == "sparse"
    ]
    return sum(size * sparsity for size, sparsity in sizes) / sum(size for size, _ in sizes)


def _as_json(config: FinetuneConfig, result: FinetuneResult, seconds: Mapping[str, float]) -> dict[str, Any]:
    dense, sparse, step = result.accuracy_dense, result.accuracy_sparse, result.step
    return {
        "model": config.model,
        "data": config.data,
        "sparsity": {"wanted": config.sparsity, "of_swapped_layers": round(result.sparsity, 6)},
        "accuracy": {"dense": dense, "sparse": sparse, "difference": round(sparse - dense, 6)},
        "step_ms": {
            "dense": step.dense_ms,
            "sparse": step.sparse_ms,
            "speedup": step.speedup,
            "dense_nchw": step.dense_nchw_ms,
            "dense_channels_last": step.dense_channels_last_ms,
            "spread": {name: _quartiles(values) for name, values in step.rounds_ms.items()},
            "batch_size": step.batch_size,
            "rounds": step.rounds,
        },
        "parameter_bytes": {"dense": result.parameter_bytes_dense, "sparse": result.parameter_bytes_sparse},
        "layers": json.loads(result.plan.to_json())["layers"],
        "seconds": dict(seconds),
        "seed": config.seed,
        "environment": environment(),
    }


def _quartiles(values: list[float]) -> list[float]:
    if len(values) < 2:
        return values * 3
    return [round(value, 3) for value in statistics.quantiles(values, n=4)]
