"""Networks that users have, built without any download, small inputs for them, and how to prune them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class ModelCase:
    """A network for training: dropout off, float32. `layers` of it are pruned, then swapped."""

    make: Callable[[], nn.Module]
    example: Callable[[], tuple[torch.Tensor, ...]]
    layers: int


def _images(size: int) -> Callable[[], tuple[torch.Tensor, ...]]:
    return lambda: (torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1)),)


def _tokens() -> tuple[torch.Tensor, ...]:
    return (torch.randint(100, (4, 16), generator=torch.Generator().manual_seed(1)),)


def _resnet50() -> nn.Module:
    from torchvision.models import resnet50

    return resnet50(num_classes=10)


def _mobilenet_v2() -> nn.Module:
    from torchvision.models import mobilenet_v2

    return mobilenet_v2(num_classes=10, dropout=0.0)


def _vit_tiny() -> nn.Module:
    import timm

    return timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=10)


class PooledBert(nn.Module):
    """A BERT encoder as a function from tokens to one vector a sentence."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4}
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        self.bert = BertModel(BertConfig(vocab_size=100, num_attention_heads=4, **sizes, **dropout))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.bert(tokens).pooler_output


MODELS = {
    "resnet50": ModelCase(_resnet50, _images(48), 54),
    "mobilenet_v2": ModelCase(_mobilenet_v2, _images(48), 34),
    "vit_tiny": ModelCase(_vit_tiny, _images(64), 50),
    "bert": ModelCase(PooledBert, _tokens, 25),
}


def smooth(model: nn.Module) -> nn.Module:
    """The model with SiLU for ReLU: the gradient of ReLU jumps where float32 rounding crosses its kink."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.ReLU | nn.ReLU6):
                setattr(parent, name, nn.SiLU())
    return model


def prune_by_magnitude(model: nn.Module, sparsity: float) -> dict[str, torch.Tensor]:
    """Zero the smallest weights of each larger layer; returns the masks by parameter name.

    Depthwise and other tiny layers stay dense, as in practice: a channel that loses its last weight has no
    variance, and batch norm then magnifies rounding errors without bound.
    """
    masks = {}
    for name, layer in model.named_modules():
        if (
            isinstance(layer, nn.Linear | nn.Conv2d)
            and layer.weight.numel() >= 1000
            and layer.weight.shape[1] > 1
        ):
            size = layer.weight.detach().abs()
            threshold = size.flatten().kthvalue(round(sparsity * size.numel())).values
            masks[f"{name}.weight"] = size > threshold
            layer.weight.data.mul_(masks[f"{name}.weight"])
    return masks
