"""The one thing in 2:4 layers that needs a GPU, `Backend.compress`, and the shapes that it takes."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from sparseprop.errors import SparsePropError

__all__ = ["Backend", "shape_misfit", "torch_backend"]


@dataclass(frozen=True)
class Backend:
    """What multiplies by a 2:4 weight.

    Attributes:
        name: "cusparselt" or "cutlass".
        rows, cols: what the two sizes of a compressed matrix must be multiples of.
        compress: takes a contiguous (rows, cols) matrix that is 2:4 along its rows, gives what
            ``torch.nn.functional.linear`` takes as a weight.

    >>> Backend("dense", 1, 1, lambda matrix: matrix).name
    'dense'
    """

    name: str
    rows: int
    cols: int
    compress: Callable[[Tensor], Tensor]


def torch_backend() -> Backend:
    """cuSPARSELt where this build of torch has it, else CUTLASS.

    >>> torch_backend().name in ("cusparselt", "cutlass")
    True
    """
    if torch.backends.cusparselt.is_available():
        return Backend("cusparselt", 16, 16, _compressor(torch.sparse.SparseSemiStructuredTensorCUSPARSELT))
    return Backend("cutlass", 32, 64, _compressor(torch.sparse.SparseSemiStructuredTensorCUTLASS))


def _compressor(kind: type[torch.sparse.SparseSemiStructuredTensor]) -> Callable[[Tensor], Tensor]:
    def compress(matrix: Tensor) -> Tensor:
        if not matrix.is_cuda:
            raise SparsePropError(
                f"a 2:4 layer got a weight on {matrix.device}, wanted a CUDA device; move the model there "
                "with .to('cuda'), or swap it for the CPU without device='cuda'."
            )
        with warnings.catch_warnings():  # torch announces a prototype at first use
            warnings.simplefilter("ignore", UserWarning)
            return cast(Tensor, kind.from_dense(matrix))

    return compress


def shape_misfit(shape: tuple[int, ...], backend: Backend, *, transposable: bool = False) -> str | None:
    """Why a weight (out, in) cannot be compressed, None if it can.

    >>> shape_misfit((64, 60), Backend("cusparselt", 16, 16, lambda matrix: matrix))
    '64x60 weight: cusparselt wants multiples of 16x16'
    """
    sizes = (backend.rows, backend.cols)
    if transposable:  # the transpose is compressed too
        sizes = (max(sizes), max(sizes))
    if shape[0] % sizes[0] == 0 and shape[1] % sizes[1] == 0:
        return None
    text = "x".join(map(str, shape))
    return f"{text} weight: {backend.name} wants multiples of {sizes[0]}x{sizes[1]}"
