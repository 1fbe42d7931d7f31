"""A job as a list of phases, each of which starts where an earlier one ended."""

from dataclasses import dataclass
from typing import Literal

from sparseprop.train.config import FinetuneConfig

__all__ = ["Phase", "phases_of", "source_of"]

START = "start"  # the weights a job begins with, kept in the run like the end of a phase


@dataclass(frozen=True)
class Phase:
    """One stretch of training.

    ``parent`` is the phase whose weights it starts from, ``data`` what it sees, ``kind`` what it does to the
    weights: ``"dense"`` trains all of them, ``"prune"`` removes them gradually, ``"sparse"`` swaps the pruned
    layers first and trains what is left.
    """

    name: str
    parent: str
    data: Literal["source", "target"]
    kind: Literal["dense", "prune", "sparse"]
    epochs: int


def source_of(config: FinetuneConfig) -> str | None:
    """The data set to pretrain on, or None when the job starts from the weights it was given."""
    if config.source == "auto":
        fresh = config.model.partition(":")[0] == "small"
        return "mnist5k" if fresh and config.data == "digits" else None
    return None if config.source == "none" else config.source


def phases_of(config: FinetuneConfig, *, needs_pruning: bool) -> tuple[Phase, ...]:
    """The phases of a job. Dense and sparse fine-tuning start from the same weights, and when pruning is done
    on the target data its epochs are given to the dense model as well.

    >>> [phase.name for phase in phases_of(FinetuneConfig(), needs_pruning=True)]
    ['pretrain', 'prune', 'dense', 'sparse']
    """
    source = source_of(config)
    phases = []
    before = START
    if source:
        phases.append(Phase("pretrain", START, "source", "dense", config.pretrain_epochs))
        before = "pretrain"
    pruned, dense_epochs = before, config.finetune_epochs
    if needs_pruning:
        phases.append(Phase("prune", before, "source" if source else "target", "prune", config.prune_epochs))
        pruned = "prune"
        dense_epochs += 0 if source else config.prune_epochs
    phases.append(Phase("dense", before, "target", "dense", dense_epochs))
    phases.append(Phase("sparse", pruned, "target", "sparse", config.finetune_epochs))
    return tuple(phases)
