"""2:4 sparse Linear layers on CUDA devices, over torch's own semi-structured sparse tensors."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseprop import semi_structured_backend
from sparseprop.errors import SparsePropError
from sparseprop.masks import NMPattern, check_nm, pattern_mask
from sparseprop.nn.convert import finished_weight
from sparseprop.semi_structured_backend import Backend, shape_misfit

__all__ = ["DTYPES", "SemiStructuredLinear", "best_mask"]

DTYPES = (torch.float16, torch.bfloat16)


def best_mask(weight: Tensor, pattern: NMPattern) -> Tensor:
    """The 2:4 mask that keeps the most of |weight|; where it is 2:4 already, one that keeps all of it.

    Torch's own pruning kernel ranks by signed value, which drops large negative weights.

    >>> best_mask(torch.tensor([[-4.0, 1.0, 2.0, -3.0]]), NMPattern(2, 4)).tolist()
    [[True, False, False, True]]
    """
    weight = weight.detach()
    present = weight != 0
    if pattern.transposable and check_nm(present.cpu(), pattern.n, pattern.m, transposable=True):
        full = pattern_mask(present.float(), pattern)
        return full if bool((full | ~present).all()) else present  # room for weights that are zero now
    return pattern_mask(weight.abs(), pattern)


class SemiStructuredLinear(nn.Module):
    """`torch.nn.Linear` in half precision with a 2:4 mask that stays, on CUDA: (..., in) to (..., out).

    ``weight`` is the dense Parameter, zero outside the bool buffer ``mask``. A compressed copy is made for
    each pass that can train it, and kept between others until it changes; not seen are writes to
    ``weight.data`` between two passes without gradients. With a transposable mask ("2:4T") the gradient of
    the input is a 2:4 product too; otherwise it is dense, as is that of the weight always. A layer made
    without a dense one keeps nothing until a state dict is loaded.

    >>> layer = SemiStructuredLinear.from_dense(nn.Linear(64, 32).bfloat16())
    >>> layer.density, check_nm(layer.mask, 2, 4)
    (0.5, True)
    """

    mask: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        pattern: str = "2:4",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.pattern = NMPattern.parse(pattern)
        if (self.pattern.n, self.pattern.m) != (2, 4):
            raise SparsePropError(f"CUDA devices multiply by 2:4 only, got {pattern}; use '2:4' or '2:4T'.")
        self.weight = nn.Parameter(torch.zeros(out_features, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.register_buffer("mask", torch.zeros_like(self.weight, dtype=torch.bool))
        self._backend: Backend | None = None
        self._compressed: dict[str, tuple[object, Tensor]] = {}

    @classmethod
    def from_dense(
        cls,
        module: nn.Linear,
        *,
        pattern: str = "2:4",
        mask: Tensor | None = None,
        backend: Backend | None = None,
    ) -> Self:
        """The 2:4 twin of a float16 or bfloat16 ``Linear`` on any device, pruned by |weight|, or to ``mask``.

        Raises SparsePropError for other layers, dtypes and patterns, and a shape or mask that does not fit.
        """
        if not isinstance(module, nn.Linear):
            raise SparsePropError(f"2:4 on CUDA wants a Linear layer, got {type(module).__name__}.")
        weight, bias = finished_weight(module), module.bias
        backend = backend or semi_structured_backend.torch_backend()
        layer = cls(
            module.in_features,
            module.out_features,
            bias is not None,
            pattern=pattern,
            device=weight.device,
            dtype=weight.dtype,
        )
        if weight.dtype not in DTYPES:
            raise SparsePropError(
                f"2:4 on CUDA wants float16 or bfloat16 weights, got {weight.dtype}; use .bfloat16() or "
                ".half()."
            )
        reason = shape_misfit(tuple(weight.shape), backend, transposable=layer.pattern.transposable)
        if reason is not None:
            raise SparsePropError(f"{reason}; leave this layer dense.")
        keep = best_mask(weight, layer.pattern) if mask is None else mask
        if keep.shape != weight.shape or not check_nm(keep, 2, 4, transposable=layer.pattern.transposable):
            raise SparsePropError(f"mask must be {layer.pattern} and of shape {tuple(weight.shape)}.")
        layer._backend = backend
        with torch.no_grad():
            layer.mask.copy_(keep)
            layer.weight.copy_(weight * layer.mask)
            if layer.bias is not None:
                layer.bias.copy_(bias)
                layer.bias.requires_grad_(bias.requires_grad)
        original = getattr(module, "weight_orig", module.weight)
        layer.weight.requires_grad_(original.requires_grad)
        return layer.train(module.training)

    def forward(self, input: Tensor) -> Tensor:
        """The layer's output, in the weight's dtype."""
        x = input
        if x.shape[-1] != self.in_features:
            raise SparsePropError(
                f"SemiStructuredLinear expects (..., {self.in_features}) inputs, got {tuple(x.shape)}."
            )
        if x.dtype != self.weight.dtype:
            if not torch.is_autocast_enabled(x.device.type):
                raise SparsePropError(
                    f"SemiStructuredLinear has {self.weight.dtype} weights and got {x.dtype} inputs; convert "
                    "the inputs, or run under torch.autocast."
                )
            x = x.to(self.weight.dtype)
        rows = x.reshape(-1, self.in_features)
        with torch.autocast(x.device.type, enabled=False):
            if len(rows) == 0:
                out = F.linear(rows, self.weight * self.mask, self.bias)
            else:
                learns = torch.is_grad_enabled() and self.weight.requires_grad
                out = _Product.apply(rows, self.weight, self.bias, self, learns)  # type: ignore[no-untyped-call]
        return out.reshape(*x.shape[:-1], self.out_features)

    def compressed(self, side: str, *, anew: bool = False) -> Tensor:
        """The compressed weight ("forward") or its transpose ("backward"), made after updates or ``anew``."""
        state = (self.weight._version, self.weight.data_ptr(), self.mask._version)
        known = self._compressed.pop(side, None)
        if known is None or known[0] != state or anew:
            known = state, self._compress(side)
        if not anew:  # optimizers that write to weight.data leave its version as it is
            self._compressed[side] = known
        return known[1]

    def _compress(self, side: str) -> Tensor:
        if self._backend is None:
            self._backend = semi_structured_backend.torch_backend()
        kept = torch.where(self.mask, self.weight.detach(), 0.0)
        matrix = kept if side == "forward" else kept.t()
        return self._backend.compress(matrix.contiguous())

    @property
    def nnz(self) -> int:
        """Number of weights inside the mask."""
        return int(self.mask.sum())

    @property
    def density(self) -> float:
        """Part of the weights inside the mask."""
        return self.nnz / self.mask.numel()

    def to_dense(self) -> nn.Module:
        """The plain ``Linear`` with the same weights."""
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        dense.weight = nn.Parameter((self.weight * self.mask).detach(), self.weight.requires_grad)
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().clone(), self.bias.requires_grad)
        return dense.train(self.training)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        mask = state_dict.get(prefix + "mask")
        if isinstance(mask, Tensor) and mask.shape == self.mask.shape and not self._fits(mask):
            wrong = f"{prefix}mask must be a bool tensor of the pattern {self.pattern}; this one is not."
            (kwargs["error_msgs"] if "error_msgs" in kwargs else args[-1]).append(wrong)
            return
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _fits(self, mask: Tensor) -> bool:
        bits = mask.cpu()
        return bits.dtype is torch.bool and check_nm(bits, 2, 4, transposable=self.pattern.transposable)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_compressed": {}, "_backend": None}  # made again by whoever needs it

    def extra_repr(self) -> str:
        """Shown by `print(module)`."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self.pattern}"
        )


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layer: SemiStructuredLinear,
        learns: bool,
    ) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.layer, ctx.learns = layer, learns
        return F.linear(rows, layer.compressed("forward", anew=learns), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        rows, weight = ctx.saved_tensors  # raises if the weight was updated since
        layer: SemiStructuredLinear = ctx.layer
        need_rows, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad = grad.contiguous()
        grad_rows = grad_weight = None
        if need_rows and layer.pattern.transposable:
            grad_rows = F.linear(grad, layer.compressed("backward", anew=ctx.learns))
        elif need_rows:
            grad_rows = grad @ torch.where(layer.mask, weight, 0.0)
        if need_weight:
            grad_weight = torch.where(layer.mask, grad.t() @ rows, 0.0)
        return grad_rows, grad_weight, grad.sum(0) if need_bias else None, None, None
