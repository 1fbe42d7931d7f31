"""A fine-tuning job from its configuration to its run folder, and on from wherever it was stopped."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparseprop.data import ImageData, load_data, mix_seed
from sparseprop.errors import SparsePropError
from sparseprop.train.checkpoint import (
    load_tensors,
    make_folder,
    remove_partials,
    save_tensors,
    write_text,
)
from sparseprop.train.config import FinetuneConfig
from sparseprop.train.ledger import MASK, Clock, Metrics, check_unchanged, pack, read_saved, restore
from sparseprop.train.loop import Hooks, Progress, State, make_optimizer, train_phase
from sparseprop.train.models import ModelSpec, build_model
from sparseprop.train.phases import START, Phase, phases_of, source_of
from sparseprop.train.prune import prunable_layers, sparsity_of
from sparseprop.train.report import FinetuneResult, write_report
from sparseprop.train.start import prepare_start
from sparseprop.train.swapping import swap_pruned, with_masks

__all__ = ["default_folder", "finetune", "resume"]

Watcher = Callable[[Progress], None]


def finetune(config: FinetuneConfig | None = None, *, progress: Watcher | None = None) -> FinetuneResult:
    """Run a whole job and return its result; the run folder is ``config.out`` or a new one under ``runs``.

    ``progress`` is called with a `Progress` after each step. Raises `SparsePropError` for anything in the
    configuration, the model, the data or the disk that keeps the job from going on; what was done until then
    is kept and `resume` goes on from it.

    >>> from sparseprop.train import FinetuneConfig, finetune
    >>> result = finetune(FinetuneConfig(sparsity=0.95))  # doctest: +SKIP
    >>> result.accuracy_sparse > 0.97  # doctest: +SKIP
    True
    """
    config = config or FinetuneConfig()
    folder = Path(config.out) if config.out else default_folder()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SparsePropError(
            f"the run folder {folder} exists and is not empty; choose another or resume that run"
        )
    config = dataclasses.replace(config, out=str(folder), threads=config.threads or torch.get_num_threads())
    with _settings(config):
        job = _prepare(config, folder, progress)
        return job.run()


def default_folder() -> Path:
    """Where a run goes that was not told: a folder named after the time."""
    return Path("runs", time.strftime("finetune-%Y%m%d-%H%M%S"))


def resume(folder: str | Path, *, progress: Watcher | None = None) -> FinetuneResult:
    """Go on with a run that was stopped; the result is the one it would have had without the stop.

    Raises `SparsePropError` when ``folder`` holds no run or a finished one.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise SparsePropError(
            f"{folder} holds no run to resume: it has no config.json; give the folder of a run"
        )
    if (folder / "result.json").is_file():
        raise SparsePropError(f"the run {folder} is finished: it has a result.json; start a new run instead")
    text = (folder / "config.json").read_bytes()
    config = dataclasses.replace(
        FinetuneConfig.from_json(text, where=folder / "config.json"), out=str(folder)
    )
    start = _phase_file(folder, START)
    if start.is_file():
        check_unchanged(config, load_tensors(start)[1], folder)
    remove_partials(folder)
    with _settings(config):
        return _prepare(config, folder, progress).run()


class _settings:
    """Threads and the global generator as the job wants them, and afterwards as they were."""

    def __init__(self, config: FinetuneConfig) -> None:
        self.threads = config.threads
        self.fork = torch.random.fork_rng(devices=[])

    def __enter__(self) -> None:
        self.before = torch.get_num_threads()
        self.fork.__enter__()
        torch.set_num_threads(self.threads or self.before)

    def __exit__(self, *exception: Any) -> None:
        torch.set_num_threads(self.before)
        self.fork.__exit__(*exception)


@dataclass(frozen=True)
class _Job:
    config: FinetuneConfig
    folder: Path
    spec: ModelSpec
    target: ImageData
    phases: tuple[Phase, ...]
    watch: Watcher

    def run(self) -> FinetuneResult:
        notes: dict[str, dict[str, Any]] = {}
        before: dict[str, Any] = {"records": 0}
        for phase in self.phases:
            path = self.phase_file(phase.name)
            if not path.is_file():
                self.run_phase(phase, before)
            before = notes[phase.name] = load_tensors(path)[1]
        sparse, _ = self.model_at("sparse", "sparse")
        dense, _ = self.model_at("dense", "dense")
        self.watch(Progress("report", 0, 1, message="timing steps, dense and sparse in turn"))
        result = write_report(
            self.config,
            self.folder,
            self.spec,
            self.target,
            notes,
            dense=dense,
            sparse=sparse,
            masked=self.masked_model(),
        )
        self.watch(Progress("report", 1, 1, message="written"))
        return result

    def run_phase(self, phase: Phase, before: Mapping[str, Any]) -> None:
        data = self.data_of(phase)
        model, masks = self.start_of(phase)
        state = State(model, make_optimizer(self.config, model), masks)
        state.initial_sparsity = sparsity_of(masks) if masks else 0.0
        seconds, records = 0.0, int(before["records"])
        saved = self.folder / "checkpoint.safetensors"
        if (found := read_saved(saved, phase.name)) is not None:
            tensors, note = found
            restore(state, tensors, note)
            seconds, records = note["seconds"], note["records"]
        metrics = Metrics(self.folder / "metrics.jsonl", records)
        clock = Clock(seconds)

        def save(state: State) -> None:
            save_tensors(saved, pack(state), self.note(phase, state, metrics, clock))

        accuracy = train_phase(self.config, phase, data, state, Hooks(metrics.add, save, self.watch))
        tensors = dict(state.model.state_dict()) | {MASK + name: mask for name, mask in state.masks.items()}
        note = self.note(phase, state, metrics, clock) | {"accuracy": accuracy}
        save_tensors(self.phase_file(phase.name), tensors, note)

    def masked_model(self) -> nn.Module:
        """What the sparse phase starts with, before the swap."""
        model, masks = self.model_at(next(p.parent for p in self.phases if p.kind == "sparse"), "dense")
        with_masks(model, masks)
        return model

    def note(self, phase: Phase, state: State, metrics: Metrics, clock: Clock) -> dict[str, Any]:
        where = {
            "phase": phase.name,
            "step": state.step,
            "records": metrics.count,
            "seconds": clock.seconds(),
        }
        return where | {"initial_sparsity": state.initial_sparsity, "spec": dataclasses.asdict(self.spec)}

    def phase_file(self, name: str) -> Path:
        return _phase_file(self.folder, name)

    def data_of(self, phase: Phase) -> ImageData:
        if phase.data == "target":
            return self.target
        return load_data(
            source_of(self.config) or "",
            image_size=self.spec.image_size,
            channels=self.spec.channels,
            seed=self.config.seed,
        )

    def start_of(self, phase: Phase) -> tuple[nn.Module, dict[str, Tensor]]:
        """The model and masks ``phase`` starts with."""
        model, masks = self.model_at(phase.parent, "dense", classes=len(self.data_of(phase).classes))
        layers = prunable_layers(model, num_classes=len(self.data_of(phase).classes))
        if phase.kind == "dense":
            return model, {}
        if phase.kind == "prune":
            return model, masks or {
                name: torch.ones_like(layer.get_parameter("weight"), dtype=torch.bool)
                for name, layer in layers.items()
            }
        return swap_pruned(model, masks, self.config, self.spec, self.folder / "plan.json")

    def model_at(
        self, name: str, kind: str, *, classes: int | None = None
    ) -> tuple[nn.Module, dict[str, Tensor]]:
        """The model and masks at the end of a phase."""
        tensors, _ = load_tensors(self.phase_file(name))
        masks = {key.removeprefix(MASK): tensors.pop(key) for key in list(tensors) if key.startswith(MASK)}
        if kind == "sparse":
            phase = next(phase for phase in self.phases if phase.name == name)
            model, _ = self.start_of(phase)
            model.load_state_dict(tensors)
            return model, masks
        torch.manual_seed(mix_seed(self.config.seed, "head", name))
        model = build_model(dataclasses.replace(self.spec, num_classes=classes or self.spec.num_classes))
        own = model.state_dict()
        fresh = [key for key in own if own[key].shape != tensors[key].shape]  # the head of another task
        model.load_state_dict(tensors | {key: own[key] for key in fresh})
        return model, masks


def _phase_file(folder: Path, name: str) -> Path:
    return folder / "phases" / f"{name}.safetensors"


def _prepare(config: FinetuneConfig, folder: Path, progress: Watcher | None) -> _Job:
    start = prepare_start(config)
    phases = phases_of(start.config, needs_pruning=start.needs_pruning)
    job = _Job(start.config, folder, start.spec, start.target, phases, progress or (lambda _: None))
    first = job.phase_file(START)
    if not first.is_file():
        new = not folder.exists()
        make_folder(first.parent)
        try:
            write_text(folder / "config.json", start.config.to_json())
            tensors = dict(start.model.state_dict()) | {MASK + n: mask for n, mask in start.masks.items()}
            note = {"spec": dataclasses.asdict(start.spec), "config": dataclasses.asdict(start.config)}
            save_tensors(first, tensors, note)
        except SparsePropError:
            if new:
                _remove_empty(folder)
            raise
    return job


def _remove_empty(folder: Path) -> None:
    (folder / "config.json").unlink(missing_ok=True)
    for path in (folder / "phases", folder):
        if path.is_dir():
            path.rmdir()
