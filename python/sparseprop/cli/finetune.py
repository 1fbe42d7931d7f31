"""``sparseprop finetune``: the whole job, or the rest of one that was stopped."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from sparseprop.cli.console import INTERRUPTED, guarded, make_view, show_table
from sparseprop.errors import SparsePropError
from sparseprop.train.config import FinetuneConfig
from sparseprop.train.report import FinetuneResult
from sparseprop.train.run import default_folder, resume
from sparseprop.train.run import finetune as run_job

__all__ = ["finetune"]

_DEFAULTS = FinetuneConfig()
_FIELDS = {field.name for field in dataclasses.fields(FinetuneConfig)}


def _option(text: str, *names: str) -> Any:
    return typer.Option(*names, help=text)


@guarded
def finetune(
    context: typer.Context,
    model: Annotated[
        str, _option("small, a timm or torchvision name, or a checkpoint file.")
    ] = _DEFAULTS.model,
    arch: Annotated[str | None, _option("Architecture of a checkpoint that does not name it.")] = None,
    data: Annotated[
        str, _option("digits, mnist5k, or a folder with a subfolder per class.")
    ] = _DEFAULTS.data,
    source: Annotated[
        str | None, _option("Data to pretrain on; auto: MNIST-5k for small on digits; none.")
    ] = _DEFAULTS.source,
    sparsity: Annotated[float, _option("Share of zeros in each pruned layer.")] = _DEFAULTS.sparsity,
    scope: Annotated[str, _option("layer, or global: rank all weights together.")] = _DEFAULTS.scope,
    min_sparsity: Annotated[float | None, _option("Swap every layer at least this sparse.")] = None,
    measure: Annotated[bool, _option("Decide by measurement which layers to swap.")] = _DEFAULTS.measure,
    fuse: Annotated[
        bool, _option("Fuse batch norms of the sparse model with what follows.")
    ] = _DEFAULTS.fuse,
    pretrain_epochs: Annotated[int, _option("Epochs on the source data.")] = _DEFAULTS.pretrain_epochs,
    prune_epochs: Annotated[int, _option("Epochs of gradual pruning.")] = _DEFAULTS.prune_epochs,
    finetune_epochs: Annotated[int, _option("Epochs after it.", "--epochs")] = _DEFAULTS.finetune_epochs,
    batch_size: Annotated[int, _option("Images a step.")] = _DEFAULTS.batch_size,
    optimizer: Annotated[str, _option("sgd or adamw.")] = _DEFAULTS.optimizer,
    lr: Annotated[float | None, _option("Peak learning rate; 0.05 for sgd, 0.001 for adamw.")] = None,
    weight_decay: Annotated[float, _option("Of weights, not of biases.")] = _DEFAULTS.weight_decay,
    label_smoothing: Annotated[float, _option("Of the loss.")] = _DEFAULTS.label_smoothing,
    image_size: Annotated[int | None, _option("Side of the images, if not the model's own.")] = None,
    seed: Annotated[int, _option("Of the weights, the order and the splits.")] = _DEFAULTS.seed,
    threads: Annotated[int | None, _option("Threads; all by default.")] = None,
    checkpoint_every: Annotated[int, _option("Steps between checkpoints.")] = _DEFAULTS.checkpoint_every,
    plots: Annotated[bool, _option("Draw the PNGs.")] = _DEFAULTS.plots,
    out: Annotated[str | None, _option("Run folder; a new one under runs by default.")] = None,
    resume_run: Annotated[Path | None, _option("Go on with this run.", "--resume")] = None,
) -> None:
    """Prune a model gradually, swap its layers, fine-tune it sparse, and report against dense.

    Without options: pretrain a small ResNet on MNIST-5k, then transfer it, pruned, to the UCI digits.
    """
    given = dict(context.params)
    folder = Path(out) if out else resume_run or default_folder()
    try:
        with make_view() as view:
            if resume_run is not None:
                _refuse_options(context)
                result = resume(resume_run, progress=view)
            else:
                fields = {name: given[name] for name in _FIELDS if name in given} | {"out": str(folder)}
                result = run_job(FinetuneConfig(**fields), progress=view)
    except KeyboardInterrupt:
        advice = f"; go on with: sparseprop finetune --resume {folder}" if folder.exists() else ""
        typer.echo(f"sparseprop: stopped{advice}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    _summary(result)


def _was_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _refuse_options(context: typer.Context) -> None:
    given = [
        "--" + name.replace("_", "-")
        for name in context.params
        if name != "resume_run" and _was_given(context, name)
    ]
    if given:
        raise SparsePropError(
            f"--resume goes on with the settings of the run; got {' '.join(given)} too; drop that"
        )


def _summary(result: FinetuneResult) -> None:
    step = result.step
    show_table(
        {"": False, "dense": True, "sparse": True},
        [
            [
                "held-out accuracy",
                f"{100 * result.accuracy_dense:.2f} %",
                f"{100 * result.accuracy_sparse:.2f} %",
            ],
            ["training step", f"{step.dense_ms:.1f} ms", f"{step.sparse_ms:.1f} ms"],
            [
                "parameters",
                f"{result.parameter_bytes_dense / 1e6:.2f} MB",
                f"{result.parameter_bytes_sparse / 1e6:.2f} MB",
            ],
        ],
    )
    typer.echo(
        f"{len(result.plan.sparse_names)} of {len(result.plan)} layers sparse, {100 * result.sparsity:.1f} % "
        f"zeros in them; a step runs at {step.speedup:.2f}x the dense speed"
    )
    typer.echo(f"everything is in {result.folder}")
