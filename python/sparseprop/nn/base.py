"""What the sparse layers share: parameters, construction, dense views and the state dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from sparseprop.errors import SparsePropError
from sparseprop.geometry import Geometry
from sparseprop.nn.state import fitted
from sparseprop.nn.storage import (
    Pattern,
    buffers_of,
    check_shape,
    fingerprint,
    pattern_in,
    plain,
    store,
    warn_if_overwritten,
)
from sparseprop.nn.twin import DenseTwin
from sparseprop.ops import Finish, Operator, apply, apply_again, apply_finished, apply_shared
from sparseprop.ops.eligible import watched
from sparseprop.ops.inverted import SparseStep
from sparseprop.packed import PackedNM
from sparseprop.pattern import SparsityPattern

__all__ = ["SparseLayer"]


class SparseLayer(DenseTwin):
    """Base of `SparseLinear` and `SparseConv1d/2d/3d`; not for direct use.

    `weight_values` (nnz,) is the Parameter, `weight_shape` a buffer like the pattern: `weight_row_ptr` and
    `weight_col_idx`, or for a packed N:M pattern `weight_nm` and `weight_nm_bits`.
    """

    weight_shape: Tensor
    _pattern_keys: tuple[str, str]

    def __init__(
        self,
        geometry: Geometry,
        pattern: Pattern | None,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        device = torch.get_default_device() if device is None else torch.device(device)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in (torch.float32, torch.float64) and device.type != "meta":
            raise SparsePropError(f"dtype must be torch.float32 or torch.float64, got {dtype}.")
        if pattern is None:
            pattern = SparsityPattern.random(geometry.out_channels, geometry.cols, nnz=0)
        check_shape(pattern, geometry.weight_shape)
        self._geometry = geometry
        self._pads_first = geometry.padding_mode != "zeros"
        self._kernel_geometry = geometry.without_padding() if self._pads_first else geometry
        self._operator: Operator | None = None
        self.weight_values = Parameter(torch.empty(pattern.nnz, device=device, dtype=dtype))
        self._hold({key: tensor.to(device) for key, tensor in buffers_of(pattern).items()})
        self.register_buffer("weight_shape", torch.tensor(geometry.weight_shape, device=device))
        empty_bias = torch.empty(geometry.out_channels, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if empty_bias is None else Parameter(empty_bias))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw values and bias as torch's layers do, with each row's number of non-zeros as its fan-in."""
        if self.weight_values.is_meta:
            return
        fan_in = self._held.row_nnz()
        bound = fan_in.clamp(min=1).to(self.weight_values.dtype).rsqrt()
        with torch.no_grad():
            self.weight_values.uniform_(-1, 1, generator=generator)
            self.weight_values.mul_(torch.repeat_interleave(bound, fan_in))
            if self.bias is not None:
                self.bias.uniform_(-1, 1, generator=generator).mul_(bound * (fan_in > 0))

    def forward(self, input: Tensor) -> Tensor:
        """The layer's output for an input of the shape its dense twin takes."""
        values, bias, head, index = self._operands()
        if watched() or not index.is_cpu or type(index) is not Tensor:
            return apply(input, values, bias, head, index, self._geometry, None)
        operator = self._operator_for(head, index)
        out = None if self._pads_first else apply_again(operator, input, values, bias)
        return apply(input, values, bias, head, index, self._geometry, operator) if out is None else out

    def shared(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """`ops.apply_shared` of the input; None if that needs more than one step."""
        operator = self.operator()
        values, bias, _, _ = self._operands()
        return None if operator is None else apply_shared(operator, x, values, bias)

    def finished(self, x: Tensor, finish: Finish) -> Tensor | None:
        """`finish` of the output, where no gradient is wanted; None if that needs more than one step."""
        operator = self.operator()
        if operator is None:
            return None
        values, bias, _, _ = self._operands()
        return apply_finished(operator, x, values, bias, finish)

    def step(self, finish: Finish) -> SparseStep | None:
        """The layer and `finish` as a part of a larger call; None if it cannot be one."""
        operator = self.operator()
        values, bias, _, _ = self._operands()
        return None if operator is None else SparseStep(operator, values, bias, finish)

    def operator(self) -> Operator | None:
        """What runs the layer in one step, another one once the pattern was changed; None if nothing does."""
        if watched():
            return None
        head, index = (self._buffers[key] for key in self._pattern_keys)
        if self._pads_first or head is None or index is None or not index.is_cpu or type(index) is not Tensor:
            return None
        return self._operator_for(head, index)

    def _operands(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        parameters, buffers = self._parameters, self._buffers  # attribute look-up of modules is slow
        values, bias = parameters.get("weight_values"), parameters.get("bias")
        if values is None or "bias" not in parameters:
            values, bias = self.weight_values, self.bias  # parametrized
        head_key, index_key = self._pattern_keys
        head, index = buffers[head_key], buffers[index_key]
        assert head is not None
        assert index is not None
        return values, bias, head, index

    def _operator_for(self, head: Tensor, index: Tensor) -> Operator:
        operator = self._operator
        if operator is None or not operator.matches(head, index):
            now = fingerprint(self._buffers)
            warn_if_overwritten(type(self).__name__, self._fingerprint, now)
            object.__setattr__(self, "_fingerprint", now)
            operator = Operator(self._kernel_geometry, head, index)
            object.__setattr__(self, "_operator", operator)
        return operator

    def _hold(self, buffers: Mapping[str, Tensor]) -> None:
        store(self, buffers)
        head, index = buffers
        self._pattern_keys = (head, index)
        self._fingerprint = fingerprint(self._buffers)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        error_msgs = kwargs["error_msgs"] if "error_msgs" in kwargs else args[-1]
        try:
            assign = bool(local_metadata.get("assign_to_params_buffers", False))
            own = fitted(self, state_dict, prefix, assign)
        except SparsePropError as error:
            error_msgs.append(f"{prefix[:-1] or type(self).__name__}: {error}")
            return
        super()._load_from_state_dict(own, prefix, local_metadata, *args, **kwargs)
        self._fingerprint = fingerprint(self._buffers)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_operator": None}  # lowered again by whoever needs it

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise SparsePropError(
                "the weight of a sparse layer is a read-only view; write to `weight_values` (the non-zeros, "
                "in the order of `weight[mask]`), or use `from_mask` for another pattern."
            )
        super().__setattr__(name, value)

    @property
    def pattern(self) -> SparsityPattern:
        """The pattern; shares memory with the layer's buffers unless they are packed."""
        return plain(self._held)

    @property
    def nm(self) -> str | None:
        """The N:M of a layer whose pattern is packed, such as `"2:4"`, else None."""
        held = self._held
        return held.name if isinstance(held, PackedNM) and not held.nm.is_meta else None

    @property
    def _held(self) -> Pattern:
        held = pattern_in(self._buffers, self._geometry.weight_shape)  # type: ignore[arg-type]  # no None there
        assert held is not None
        return held

    @property
    def weight(self) -> Tensor:
        """The dense weight, built anew at each access and differentiable; read-only."""
        values = self.weight_values
        flat = values.new_zeros(self._geometry.numel).index_put((self.pattern.flat_index(),), values)
        return flat.view(self._geometry.weight_shape)

    @property
    def mask(self) -> Tensor:
        """The dense bool mask, built anew at each access."""
        return self.pattern.to_mask().view(self._geometry.weight_shape)

    @property
    def nnz(self) -> int:
        """Number of weights in the pattern."""
        return self.weight_values.numel() if self.weight_shape.is_meta else self._held.nnz

    @property
    def density(self) -> float:
        """Share of the dense weight that the pattern keeps."""
        return self.nnz / self._geometry.numel if self._geometry.numel else 0.0

    def _sparsity_repr(self) -> str:
        packed = f", pattern={self.nm!r}" if self.nm else ""
        return f"bias={self.bias is not None}, nnz={self.nnz}, density={self.density:.4g}{packed}"
