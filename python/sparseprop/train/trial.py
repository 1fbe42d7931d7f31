"""A trial of what training asks of a model, before anything is written."""

import copy

import torch
from torch import Tensor, nn

from sparseprop.errors import SparsePropError
from sparseprop.train.models import ModelSpec

__all__ = ["check_output"]


def check_output(model: nn.Module, spec: ModelSpec, batch_size: int) -> None:
    """Raise `SparsePropError` unless the model, while it trains, gives one logit per image and class.

    The model and the random numbers stay as they were.
    """
    trial = copy.deepcopy(model).train()  # a forward in training moves the averages of batch norms
    images = torch.zeros(batch_size, spec.channels, spec.image_size, spec.image_size)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            output = trial(images)
        except Exception as error:  # the model is anybody's, and so is what it raises
            reason = (str(error) or type(error).__name__).splitlines()[0][:200]
            raise SparsePropError(
                f"the model {spec.arch} cannot train on images of {tuple(images.shape)}: {reason}; choose "
                "another image size, batch size or model"
            ) from error
    wanted = (batch_size, spec.num_classes)
    if not isinstance(output, Tensor) or output.shape != wanted:
        got = tuple(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise SparsePropError(
            f"the model {spec.arch} gives {got} while it trains; expected a tensor of {wanted}, a logit per "
            "image and class; choose a model without further outputs"
        )
