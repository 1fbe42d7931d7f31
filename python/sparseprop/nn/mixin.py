"""Behaviour mixed into a module's class, and taken out again; copied and pickled as any module is."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

__all__ = ["Mixin", "mix", "unmix"]


class Mixin(nn.Module):
    """To derive from: what stands in a derived class goes before the class it is mixed into."""

    _mixin: type[Mixin]
    _base: type[nn.Module]
    _derived: tuple[str, ...] = ()  # attributes that follow from the module: not copied, gone with the mixin

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()  # type: ignore[no-untyped-call]  # the class may have one of its own
        if not isinstance(state, dict):
            return cast("dict[str, Any]", state)
        return {key: value for key, value in state.items() if key not in self._derived}

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (self._mixin, self._base), self.__getstate__()


def mix(mixin: type[Mixin], module: nn.Module) -> None:
    """Put `mixin` before the module's class."""
    module.__class__ = _mixed(mixin, type(module))


def unmix(module: Mixin) -> None:
    """Give the module its class back."""
    for name in module._derived:
        vars(module).pop(name, None)
    module.__class__ = module._base  # type: ignore[assignment]


_classes: dict[tuple[type[Mixin], type[nn.Module]], type[Mixin]] = {}


def _mixed(mixin: type[Mixin], base: type[nn.Module]) -> type[Mixin]:
    if (mixin, base) not in _classes:
        members = {"_mixin": mixin, "_base": base}
        _classes[mixin, base] = type(f"Fused{base.__name__}", (mixin, base), members)
    return _classes[mixin, base]


def _blank(mixin: type[Mixin], base: type[nn.Module]) -> Mixin:
    kind = _mixed(mixin, base)
    return kind.__new__(kind)
