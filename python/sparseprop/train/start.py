"""What a job starts with: its data, its model, its weights and what is already pruned in them."""

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparseprop import dense_state_dict, swap_like
from sparseprop.checkpoint import check_tensor
from sparseprop.data import ImageData, load_data, mix_seed
from sparseprop.errors import SparsePropError
from sparseprop.nn import SparseLayer
from sparseprop.nn.storage import PATTERN_KEYS
from sparseprop.swap.state import check_patterns
from sparseprop.train.checkpoint import load_tensors
from sparseprop.train.config import FinetuneConfig
from sparseprop.train.models import ModelSpec, build_model, default_image_size, parse_arch
from sparseprop.train.phases import source_of
from sparseprop.train.prune import prunable_layers, sparsity_of
from sparseprop.train.swapping import check_swap
from sparseprop.train.trial import check_output

__all__ = [
    "Start",
    "is_file_name",
    "load_model",
    "mask_of",
    "own_channels",
    "prepare_start",
    "read_checkpoint",
    "with_own_classes",
]

_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_SPARSE_KEYS = ("weight_values", "weight_shape", *PATTERN_KEYS)
_MASKS = {"weight_orig": "weight_mask", "weight": "mask"}  # of torch's pruned layers, of our masked ones
_CLOSE = 0.005  # as sparse as asked for, give or take the rounding of small layers


@dataclass(frozen=True)
class Start:
    """The checked beginning of a job; ``config`` has its paths made absolute."""

    config: FinetuneConfig
    spec: ModelSpec
    target: ImageData
    model: nn.Module
    needs_pruning: bool
    masks: dict[str, Tensor] = field(default_factory=dict)


def prepare_start(config: FinetuneConfig) -> Start:
    """Check and load everything a job needs before anything is written. Raises `SparsePropError`."""
    if config.plots:
        _require_matplotlib()
    tensors, note = read_checkpoint(config.model) if is_file_name(config.model) else (None, {})
    arch = _arch(config, note)
    known = note.get("spec", {})
    size = config.image_size or known.get("image_size") or default_image_size(arch)
    channels = known.get("channels") or (1 if parse_arch(arch)[0] == "small" and _grey(config) else 3)
    target = load_data(config.data, image_size=size, channels=channels, seed=config.seed)
    source = source_of(config)
    if source:
        load_data(source, image_size=size, channels=channels, seed=config.seed)
    spec = ModelSpec(arch, len(target.classes), channels, size)
    torch.manual_seed(mix_seed(config.seed, "init"))
    model, masks = load_model(spec, tensors, where=config.model)
    layers = prunable_layers(model, num_classes=spec.num_classes)
    masks = {name: masks[name] for name in layers if name in masks} if masks else {}
    found = sparsity_of(masks) if masks else 0.0
    needs_pruning = source is not None or found < config.sparsity - _CLOSE
    check_swap(model, layers, config, spec)
    check_output(model, spec, min(2, config.batch_size, len(target.train.labels)))
    return Start(_absolute(config), spec, target, model, needs_pruning, masks)


def is_file_name(model: str) -> bool:
    """Whether ``model`` means a file (or the folder of a run) rather than the name of an architecture."""
    return model.endswith(_SUFFIXES) or "/" in model or Path(model, "model.safetensors").is_file()


def read_checkpoint(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a checkpoint file, or of the model in a run folder, and the note of how to build it.

    Raises `SparsePropError` for a file that is missing, truncated, or holds anything but dense tensors, and
    for sparse layers that are incomplete or not well-formed.
    """
    path = Path(name, "model.safetensors") if Path(name).is_dir() else Path(name)
    if not path.is_file():
        raise SparsePropError(
            f"there is no checkpoint {path}; expected a .safetensors or .pt file; check the path"
        )
    if path.suffix == ".safetensors":
        tensors, note = load_tensors(path)
        return _unwrapped(tensors), note
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file of anything else leads the unpickler into errors of any kind
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise SparsePropError(
            f"the checkpoint {path} is corrupted, truncated, or no state dict ({reason}); expected tensors "
            "by name; save model.state_dict() again"
        ) from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        raise SparsePropError(
            f"the checkpoint {path} holds no state dict; expected tensors by name; save model.state_dict()"
        )
    for key, value in content.items():
        check_tensor(key, value)
    tensors = _unwrapped(content)
    check_patterns(tensors)
    return tensors, {}


def _unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names without the ``module.`` that data parallelism puts before all of them."""
    if not all(key.startswith("module.") for key in tensors):
        return tensors
    return {key.removeprefix("module."): value for key, value in tensors.items()}


def mask_of(tensors: Mapping[str, Tensor], key: str) -> Tensor | None:
    """The mask kept beside a weight, by torch's pruning or by a masked layer; None if there is none."""
    layer, dot, leaf = key.rpartition(".")
    mask = tensors.get(f"{layer}{dot}{_MASKS[leaf]}") if leaf in _MASKS else None
    return mask if mask is not None and mask.shape == tensors[key].shape else None


def with_own_classes(spec: ModelSpec, tensors: Mapping[str, Tensor]) -> ModelSpec:
    """``spec`` with the number of classes that a checkpoint of this architecture has, whatever it was."""
    for key, tensor in build_model(spec).state_dict().items():
        shape = _stored_shape(key, tensors)
        if shape and shape != tensor.shape and tensor.shape[:1] == (spec.num_classes,):
            return dataclasses.replace(spec, num_classes=shape[0])
    return spec


def own_channels(arch: str, tensors: Mapping[str, Tensor]) -> int:
    """The input channels of a checkpoint's first convolution, whatever the order of its names; else 3."""
    model = build_model(ModelSpec(arch, 10, 3, default_image_size(arch)))
    first = next((name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)), None)
    shape = None if first is None else _stored_shape(f"{first}.weight", tensors)
    return shape[1] if shape and len(shape) == 4 else 3


def _stored_shape(key: str, tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
    """The shape of a parameter in a checkpoint that may hold its layer sparse or pruned."""
    if f"{key}_shape" in tensors:
        return tuple(tensors[f"{key}_shape"].tolist())
    found = tensors.get(key, tensors.get(f"{key}_orig"))
    return None if found is None else tuple(found.shape)


def load_model(
    spec: ModelSpec, tensors: dict[str, Tensor] | None, *, where: str
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Build ``spec`` with the given weights; returns the dense model and the masks of its pruned layers.

    A classifier of another number of classes is replaced by a fresh one. Raises `SparsePropError` when
    anything else does not fit.
    """
    model = build_model(spec)
    if tensors is None:
        return model, {}
    tensors, masks = _sparse_parts(model, tensors)
    own = model.state_dict()
    odd = sorted(set(own) ^ set(tensors))
    if odd:
        raise SparsePropError(
            f"{where} does not fit the architecture {spec.arch}: {len(odd)} names differ, such as {odd[0]}; "
            "pass the architecture it was saved from"
        )
    fresh = [key for key in own if own[key].shape != tensors[key].shape]
    if len({key.rpartition(".")[0] for key in fresh}) > 1 or any(
        own[k].shape[1:] != tensors[k].shape[1:] for k in fresh
    ):
        key = fresh[0]
        raise SparsePropError(
            f"{where} does not fit the architecture {spec.arch}: {key} is {tuple(tensors[key].shape)}, "
            f"expected {tuple(own[key].shape)}; pass the architecture it was saved from"
        )
    model.load_state_dict(tensors | {key: own[key] for key in fresh})
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if name not in masks and isinstance(weight, Tensor) and weight.ndim > 1:
            masks[name] = weight.detach() != 0
    return model, masks


def _sparse_parts(
    model: nn.Module, tensors: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Dense weights under their dense names, and the masks of layers that were sparse, masked or pruned."""
    dense, masks = dict(tensors), {}
    for key in tensors:
        name, _, leaf = key.rpartition(".")
        if (mask := mask_of(tensors, key)) is not None:
            masks[name] = mask.bool()
            for part in (leaf, _MASKS[leaf], "mask_age"):
                dense.pop(f"{name}.{part}", None)
            dense[f"{name}.weight"] = tensors[key] * masks[name]
    if any(key.endswith(".weight_values") for key in dense):
        sparse = swap_like(copy.deepcopy(model), dense)
        masks |= {name: m.mask for name, m in sparse.named_modules() if isinstance(m, SparseLayer)}
        layers = {name: dense_state_dict(sparse)[f"{name}.weight"] for name in masks}
        dense = {key: value for key, value in dense.items() if key.rpartition(".")[2] not in _SPARSE_KEYS}
        dense |= {f"{name}.weight": weight.detach() for name, weight in layers.items()}
    return dense, masks


def _arch(config: FinetuneConfig, note: dict[str, Any]) -> str:
    if not is_file_name(config.model):
        return config.model
    arch = config.arch or note.get("spec", {}).get("arch")
    if not arch:
        raise SparsePropError(
            f"{config.model} does not say which architecture it holds; pass it, such as torchvision:resnet50"
        )
    return str(arch)


def _grey(config: FinetuneConfig) -> bool:
    return config.data in ("digits", "mnist5k")


def _absolute(config: FinetuneConfig) -> FinetuneConfig:
    """Paths that still hold when the run is resumed from another folder."""
    model = str(Path(config.model).resolve()) if is_file_name(config.model) else config.model
    data = config.data if _grey(config) else str(Path(config.data).resolve())
    return dataclasses.replace(config, model=model, data=data)


def _require_matplotlib() -> None:
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise SparsePropError(
            "plots need matplotlib; run `pip install matplotlib`, or turn plots off"
        ) from error
