"""The networks whose whole training step is timed: built without any download, pruned by magnitude."""

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from sparseprop.train._torchvision import import_timm, import_torchvision_models

__all__ = ["MODELS", "Net", "prune"]


@dataclass(frozen=True)
class Net:
    """A network, its batch, and the speed-ups wanted: by sparsity, of a training step, None for any.

    `make(small)` and `example(batch, small)` give the full form, or a smaller one to check results on.
    `dense` names layers that stay dense, as patterns.
    """

    make: Callable[[bool], nn.Module]
    example: Callable[[int, bool], Tensor]
    batch: int
    wanted: dict[float, float | None]
    classes: int
    dense: tuple[str, ...] = ()
    images: bool = True


class Bert(nn.Module):
    """A BERT-base-shaped encoder (12 layers of 768, 12 heads, 3072) on sentences of 128 tokens.

    Without dropout, so that dense and sparse runs agree; with a small vocabulary, since it times the encoder.
    """

    def __init__(self, layers: int) -> None:
        super().__init__()
        import_torchvision_models()  # transformers imports torchvision, which may need help to load
        from transformers import BertConfig, BertModel

        none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        self.bert = BertModel(BertConfig(vocab_size=1000, num_hidden_layers=layers, **none))
        self.classifier = nn.Linear(768, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.classifier(self.bert(tokens).pooler_output)


def _vision(name: str) -> Callable[[bool], nn.Module]:
    return lambda small: getattr(import_torchvision_models(), name)()


def _vit(small: bool) -> nn.Module:
    return import_timm().create_model("vit_small_patch16_224", img_size=64 if small else 224)


def _mlp(small: bool) -> nn.Module:
    hidden = [part for _ in range(4) for part in (nn.Linear(2048, 2048), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(2048, 10))


def _images(batch: int, small: bool) -> Tensor:
    side = 64 if small else 224
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


def _tokens(batch: int, small: bool) -> Tensor:
    return torch.randint(1000, (batch, 32 if small else 128), generator=torch.Generator().manual_seed(1))


def _features(batch: int, small: bool) -> Tensor:
    return torch.randn(batch, 2048, generator=torch.Generator().manual_seed(1))


MODELS = {
    "resnet50": Net(_vision("resnet50"), _images, 32, {0.95: 3.5, 0.9: 2.5}, 1000, ("conv1", "fc")),
    "resnet18": Net(_vision("resnet18"), _images, 64, {0.95: 3.0, 0.9: None}, 1000, ("conv1", "fc")),
    # pointwise convolutions only: the first layer, depthwise ones and the classifier stay dense
    "mobilenet_v2": Net(
        _vision("mobilenet_v2"), _images, 32, {0.9: 2.0}, 1000, ("features.0.0", "classifier.1")
    ),
    "vit_small": Net(_vit, _images, 16, {0.9: 2.5}, 1000, ("patch_embed.proj", "head")),
    "bert": Net(
        lambda small: Bert(2 if small else 12), _tokens, 8, {0.9: 3.0, 0.97: 4.0}, 2, ("classifier",), False
    ),
    "mlp": Net(_mlp, _features, 256, {0.95: 8.0, 0.9: None}, 10, ("8",), False),
}


def prune(model: nn.Module, net: Net, sparsity: float) -> dict[str, Tensor]:
    """Zero the smallest weights of every layer that is to become sparse; masks by name of the layer."""
    masks = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear | nn.Conv2d) or getattr(layer, "groups", 1) > 1:
            continue
        if any(fnmatchcase(name, pattern) for pattern in net.dense):
            continue
        size = layer.weight.detach().abs()
        masks[name] = size > size.flatten().kthvalue(round(sparsity * size.numel())).values
        layer.weight.data.mul_(masks[name])
    return masks
