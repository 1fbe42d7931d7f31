"""Where the time of a training step goes, dense and sparse side by side."""

from sparseprop.profiling.report import LayerTimes, Parts, StepProfile, StepTimes
from sparseprop.profiling.run import profile

__all__ = ["LayerTimes", "Parts", "StepProfile", "StepTimes", "profile"]
