"""Fine-tuning jobs: prune gradually, swap, train, report; resumable at any moment."""

from sparseprop.train.config import FinetuneConfig
from sparseprop.train.loop import Progress
from sparseprop.train.models import ModelSpec, SmallResNet, build_model
from sparseprop.train.report import FinetuneResult, StepTimes
from sparseprop.train.run import finetune, resume

__all__ = [
    "FinetuneConfig",
    "FinetuneResult",
    "ModelSpec",
    "Progress",
    "SmallResNet",
    "StepTimes",
    "build_model",
    "finetune",
    "resume",
]
