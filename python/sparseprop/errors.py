"""The one error class of the package."""

__all__ = ["SparsePropError"]


class SparsePropError(ValueError):
    """What was asked cannot be done; the message says what, got, wanted, and what to do.

    >>> import sparseprop
    >>> issubclass(sparseprop.SparsePropError, ValueError)
    True
    """
