"""Code of the user's that runs when a module is called: hooks, or a forward put in the place of its own."""

from torch import nn
from torch.nn.modules import module as torch_module

__all__ = ["hooked", "hooks_everywhere"]


def hooked(module: nn.Module) -> bool:
    """Whether calling the module, or going backward through it, runs more than the forward of its class.

    >>> hooked(nn.ReLU())
    False
    """
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
    )


def hooks_everywhere() -> bool:
    """Whether there are hooks on every module, as profilers register them."""
    return bool(torch_module._has_any_global_hook())  # type: ignore[no-untyped-call]
