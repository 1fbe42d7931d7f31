"""Makes torchvision importable beside a CPU torch.

The wheel that belongs to a CPU torch release may carry an extension that cannot be loaded; its Python part
then trips over two operators nobody declared. Declaring them (without an implementation) is enough: models
and transforms use neither.
"""

from types import ModuleType
from typing import cast

import torch

from sparseprop.errors import SparsePropError

__all__ = ["import_timm", "import_torchvision_models"]

_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_declared: list[torch.library.Library] = []  # a Library that is collected takes its operators with it


def import_torchvision_models() -> ModuleType:
    """``torchvision.models``; raises `SparsePropError` when torchvision is not installed."""
    _declare_operators()
    try:
        from torchvision import models
    except ImportError as error:
        raise SparsePropError(_advice("torchvision", error)) from error
    return models


def import_timm() -> ModuleType:
    """``timm``; raises `SparsePropError` when it, or the torchvision it needs, is not installed."""
    _declare_operators()
    try:
        import timm
    except ImportError as error:
        raise SparsePropError(_advice("timm", error)) from error
    return cast(ModuleType, timm)


def _declare_operators() -> None:
    if _declared:
        return
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(name + _SIGNATURE)  # type: ignore[no-untyped-call]
    _declared.append(library)


def _advice(package: str, error: ImportError) -> str:
    return (
        f"named models need {package}, which cannot be imported ({error}); run `pip install {package}` with "
        "the constraints that fit this torch, or use the built-in model `small`"
    )
