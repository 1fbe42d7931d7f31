"""Stub of the extension module; a test keeps it equal to what the module exports."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_Norm = tuple[int, int, int, int, float, float]  # mean, variance, gamma, beta, eps, cap of an activation
_Sizes = tuple[Sequence[int], Sequence[int], Sequence[int]]  # of an image: input, padding, output
_Step = tuple[Contraction, _Sizes, int, int, _Norm]  # values and bias

class Contraction:
    """A validated sparsity pattern of one Linear or Conv layer, lowered for this CPU on first use.

    Tensors come as addresses with element strides in the order (batch, channel, depth, height, width).
    Activation dtypes: 0 float32, 1 float64, 2 bfloat16. Values, bias and their gradients are float64
    when the activations are, float32 otherwise. Address 0 means "absent" (bias) or "not wanted" (gradients).
    """

    def __init__(
        self,
        out_channels: int,
        in_channels: int,
        groups: int,
        kernel: Sequence[int],
        stride: Sequence[int],
        dilation: Sequence[int],
        row_ptr: npt.NDArray[np.int64],
        col_idx: npt.NDArray[np.int32],
    ) -> None: ...
    @staticmethod
    def from_nm(
        out_channels: int,
        in_channels: int,
        groups: int,
        kernel: Sequence[int],
        stride: Sequence[int],
        dilation: Sequence[int],
        kept: int,
        of: int,
        bits: npt.NDArray[np.uint8],
    ) -> Contraction:
        """The same for the bits of a `sparseprop.packed.PackedNM`, which are borrowed like the indices."""

    @property
    def nnz(self) -> int: ...
    @property
    def storage_bytes(self) -> int: ...
    def forward(
        self,
        dtype: int,
        batch: int,
        in_size: Sequence[int],
        padding: Sequence[int],
        out_size: Sequence[int],
        x: int,
        x_strides: Sequence[int],
        values: int,
        bias: int,
        out: int,
        out_strides: Sequence[int],
        finish: tuple[_Norm, int, Sequence[int]] | None = None,
    ) -> None:
        """`finish` follows at once; not for bfloat16 or the reference. See `ops.finish.Finish.arguments`."""

    def backward(
        self,
        dtype: int,
        batch: int,
        in_size: Sequence[int],
        padding: Sequence[int],
        out_size: Sequence[int],
        x: int,
        x_strides: Sequence[int],
        values: int,
        grad_out: int,
        grad_out_strides: Sequence[int],
        grad_in: int,
        grad_in_strides: Sequence[int],
        grad_values: int,
        grad_bias: int,
        added: int = 0,
        added_strides: Sequence[int] = ...,
    ) -> None: ...

def gelu_backward(grad: int, x: int, grad_x: int, n: int) -> None: ...
def available_isas() -> tuple[str, ...]: ...
def active_isa() -> str: ...
def amd_family() -> int: ...
def set_max_isa(name: str) -> None: ...

# scores and mask come as addresses with element strides in the order (group, row, column, position);
# dtype: 0 float32, 1 float64; the mask is one byte per element
def nm_mask(
    dtype: int,
    shape: Sequence[int],
    n: int,
    m: int,
    dense_tail: bool,
    scores: int,
    scores_strides: Sequence[int],
    mask: int,
    mask_strides: Sequence[int],
) -> None: ...
def transposable_nm_mask(
    method: str,
    at_most: bool,
    dtype: int,
    shape: Sequence[int],
    n: int,
    m: int,
    dense_tail: bool,
    scores: int,
    scores_strides: Sequence[int],
    mask: int,
    mask_strides: Sequence[int],
    row_dual: int,
    col_dual: int,
) -> None: ...

# Activations as (outer, channels, inner), inner contiguous; float64 if wide, else float32; address 0: absent.
# `cap` of the activation: 0 none, infinity ReLU, 6 ReLU6.
class Windows:
    """Windows that slide over planes; ValueError for some that do not fit, or of more than 255 elements."""

    def __init__(
        self,
        planes: int,
        in_size: Sequence[int],
        out_size: Sequence[int],
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
    ) -> None: ...

def max_pool2d(wide: bool, pool: Windows, x: int, values: int, taps: int) -> None:
    """Max pooling; `taps`, if not 0: the number of each maximum in its window, a byte."""

def max_pool2d_backward(wide: bool, pool: Windows, grad: int, taps: int, grad_x: int) -> None:
    """Its gradient, from the `taps` that the forward pass wrote."""

class AttentionSizes:
    """Sizes of one call; ValueError for empty ones, or widths that are no multiples of 16."""

    def __init__(
        self,
        batch: int,
        heads: int,
        queries: int,
        keys: int,
        width: int,
        value_width: int,
        scale: float,
        causal: bool,
    ) -> None: ...

_Heads = tuple[int, int, int, int]  # address; strides of batch, head and row
_Mask = tuple[int, bool, int, int, int, int]  # address, bytes or floats; strides of batch, head, query, key

def attention(
    sizes: AttentionSizes, q: _Heads, k: _Heads, v: _Heads, mask: _Mask, out: _Heads, stats: int
) -> None:
    """softmax(q k^T * scale + mask) v per head; `stats` (batch, heads, 2, queries) too. float32."""

def attention_backward(
    sizes: AttentionSizes,
    q: _Heads,
    k: _Heads,
    v: _Heads,
    mask: _Mask,
    stats: int,
    grad_out: _Heads,
    grad_q: _Heads,
    grad_k: _Heads,
    grad_v: _Heads,
) -> None:
    """The gradients of q, k and v, from what the forward pass read and the `stats` that it wrote."""

def norm_forward(
    wide: bool,
    outer: int,
    channels: int,
    inner: int,
    cap: float,
    training: bool,
    eps: float,
    x: int,
    residual: int,
    gamma: int,
    beta: int,
    mean: int,
    inv_std: int,
    out: int,
    running_mean: int,
    running_variance: int,
    momentum: float,
    pool: Windows | None,
    taps: int,
) -> None:
    """Batch norm, and what follows it; with a `pool` of its planes, `out` and `taps` are the pooling's."""

def norm_backward(
    wide: bool,
    outer: int,
    channels: int,
    inner: int,
    cap: float,
    training: bool,
    grad: int,
    x: int,
    out: int,
    gamma: int,
    beta: int,
    mean: int,
    inv_std: int,
    grad_x: int,
    grad_residual: int,
    grad_gamma: int,
    grad_beta: int,
    pool: Windows | None,
    taps: int,
) -> None: ...

class Stage:
    """A batch norm of a chain, with its activation; addresses, 0 for what is absent."""

    def __init__(
        self,
        training: bool,
        eps: float,
        cap: float,
        momentum: float,
        gamma: int,
        beta: int,
        mean: int,
        inv_std: int,
        running_mean: int,
        running_variance: int,
        grad_gamma: int,
        grad_beta: int,
    ) -> None: ...

def chain_forward(
    wide: bool,
    windows: Windows,
    channels: int,
    x: int,
    first: Stage | None,
    weights: int,
    second: Stage,
    out: int,
) -> None:
    """[Batch norm, activation,] depthwise convolution, batch norm, activation."""

def inverted_forward(
    x: int,
    out: int,
    wide: bool,
    images: int,
    expand: _Step | None,
    windows: Windows,
    channels: int,
    weights: int,
    norm: _Norm,
    project: _Step,
) -> None:
    """An inverted residual block in evaluation, contiguous images."""

def chain_backward(
    wide: bool,
    windows: Windows,
    channels: int,
    x: int,
    first: Stage | None,
    weights: int,
    second: Stage,
    grad: int,
    grad_x: int,
    grad_weights: int,
) -> None:
    """Its gradients; those of the batch norms' parameters go to the stages' addresses."""

class ModuleWatch:
    """A module and all modules in it as they are now, but for the numbers in their tensors.

    Counts: attributes, children, parameters, buffers, hooks, and where tensors lie; of integer tensors also
    whether they were written to.
    """

    def __init__(self, module: object) -> None: ...
    def holds(self, module: object) -> bool:
        """Whether this is that module, and nothing has changed."""
