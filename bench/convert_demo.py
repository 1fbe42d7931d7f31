"""A trained network to N:M without training, and trained as N:M: accuracies in two Markdown tables.

Run: python bench/convert_demo.py [--epochs 6] [--out FOLDER]
Trains a small ResNet on MNIST-5k (one minute or two on one core), prunes it to 90 % and fine-tunes it,
converts both networks to several patterns, and trains the same network with SR-STE and transposable masks.
"""

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import sparseprop
from sparseprop.data import ImageData, batch_order, in_order, load_data
from sparseprop.masks import unstructured_mask
from sparseprop.nn import MaskedConv2d, MaskRule
from sparseprop.swap.replace import replace_layers
from sparseprop.train.models import SmallResNet

PATTERNS = ("2:4", "4:8", "4:8T", "1:4", "2:8T", "1:8")
BATCH = 64


def train(model: nn.Module, data: ImageData, epochs: int, lr: float, seed: int) -> nn.Module:
    batches = [batch_order(len(data.train.labels), BATCH, seed=seed, epoch=e) for e in range(epochs)]
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=1e-4, nesterov=True)
    steps = sum(map(len, batches))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    model.train()
    for indices in torch.cat(batches):
        loss = F.cross_entropy(model(data.train.fetch(indices)), data.train.labels[indices])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


def score(model: nn.Module, data: ImageData) -> tuple[float, float]:
    """Held-out accuracy in percent, and cross-entropy."""
    model.eval()
    right, loss = 0, 0.0
    with torch.no_grad():
        for images, labels in in_order(data.test, 250):
            outputs = model(images)
            right += int((outputs.argmax(1) == labels).sum())
            loss += float(F.cross_entropy(outputs, labels, reduction="sum"))
    count = len(data.test.labels)
    return 100 * right / count, loss / count


def pruned(model: nn.Module, data: ImageData, sparsity: float, epochs: int, seed: int) -> nn.Module:
    """The network with `sparsity` zeros in each convolution but the first, fine-tuned so."""

    def prune(layer: nn.Module, name: str) -> nn.Module:
        return MaskedConv2d.from_dense(layer, mask=unstructured_mask(layer.weight.abs(), 1 - sparsity))

    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and n != "stem"}
    model = replace_layers(model, layers, prune, inplace=False)
    return sparseprop.to_dense(train(model, data, epochs, 0.02, seed))


def conversions(start: str, model: nn.Module, data: ImageData, batches: list[torch.Tensor]) -> list[dict]:
    before, rows = score(model, data), []
    for pattern in PATTERNS:
        row = {"start": start, "pattern": pattern, "before": before}
        for column, options in {
            "masked": {"reconstruct": False, "bn_batches": 0},
            "masked + BN": {"reconstruct": False},
            "least squares": {"bn_batches": 0},
            "least squares + BN": {},
            "w2x2 + least squares + BN": {"score": "wx2"},
        }.items():
            report = sparseprop.convert(model, pattern, batches, inplace=False, **options)
            row[column] = score(report.model, data)
        rows.append(row)
        print(row, flush=True)
    return rows


def trainings(
    make: Callable[[], nn.Module], data: ImageData, epochs: int, dense: tuple[float, float]
) -> list[dict]:
    rows = [{"training": "dense", "accuracy": dense}]
    inner = lambda layer, name: name != "stem"  # noqa: E731
    for title, rule in {
        "2:4, SR-STE": MaskRule("2:4"),
        "4:8, SR-STE": MaskRule("4:8"),
        "1:4, SR-STE": MaskRule("1:4"),
        "2:4T, exact masks every 40 steps": MaskRule("2:4T"),
        "4:8T, exact masks every 40 steps": MaskRule("4:8T"),
    }.items():
        model = sparseprop.mask_modules(make(), rule, filter_fn=inner)
        frozen = sparseprop.freeze_modules(train(model, data, epochs, 0.1, seed=0))
        rows.append({"training": title, "accuracy": score(frozen, data)})
        print(rows[-1], flush=True)
    return rows


def markdown(rows: list[dict]) -> str:
    def cell(value: object) -> str:
        return value if isinstance(value, str) else f"{value[0]:.1f} ({value[1]:.3f})"

    lines = [list(rows[0]), ["---"] * len(rows[0]), *([cell(v) for v in row.values()] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for the figures as JSON")
    options = parser.parse_args()

    def make() -> nn.Module:
        torch.manual_seed(options.seed)
        return SmallResNet(width=options.width)

    data = load_data("mnist5k", image_size=28, channels=1)
    order = batch_order(len(data.train.labels), BATCH, seed=1, epoch=0)
    batches = [data.train.fetch(indices) for indices in order[:16]]
    dense = train(make(), data, options.epochs, 0.1, seed=0)
    sparse = pruned(copy.deepcopy(dense), data, 0.9, 3, seed=1)
    converted = conversions("dense", dense, data, batches)
    converted += conversions("90 % zeros", sparse, data, batches)
    trained = trainings(make, data, options.epochs, score(dense, data))
    print("held-out accuracy in % (cross-entropy)\n")
    print(markdown(converted), "\n\n", markdown(trained), sep="")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"converted": converted, "trained": trained}, indent=1)
        (options.out / "convert_demo.json").write_text(text)


if __name__ == "__main__":
    main()
