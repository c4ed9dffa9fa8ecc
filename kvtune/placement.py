"""Where a model's parts live: one device, or several that accelerate spreads it over."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")  # accelerate's own policies
_LAYER = re.compile(r"\.(\d+)\.")


def device_of(module: nn.Module) -> torch.device:
    """The device that a module computes on: of its first weight, or where its weight is brought.

    accelerate leaves no data on a module that waits on the CPU or on disk (its weights are on
    "meta"), and brings them to the module's execution device for each forward.
    """
    device = next(module.parameters()).device
    place = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return device if device.type != "meta" or place is None else torch.device(place)


def input_device(model: Any) -> torch.device:
    """The device that takes a model's tokens; its logits come back to it."""
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Module)
    return device_of(embedding)


def layer_devices(model: nn.Module, weight: re.Pattern[str]) -> dict[int, torch.device]:
    """The device of each layer's keys and values.

    Args:
        weight: finds the names of the weights that make them, such as model.layers.3.k_proj.weight.
    """
    found: dict[int, torch.device] = {}
    for name, module in _owners(model, weight):
        if layer := _LAYER.search(name):
            found.setdefault(int(layer[1]), device_of(module))
    return found


def weights(model: nn.Module, wanted: re.Pattern[str]) -> Iterator[tuple[str, Tensor]]:
    """Every parameter whose name is wanted, on the CPU, also those that wait on disk."""
    from accelerate.utils import align_module_device

    for name, module in _owners(model, wanted):
        waits = any(x.device.type == "meta" for x in module.parameters(recurse=False))
        with align_module_device(module, torch.device("cpu") if waits else None):
            for own, weight in module.named_parameters(recurse=False):
                if wanted.search(f"{name}.{own}"):
                    yield f"{name}.{own}", weight.detach().cpu()


def _owners(model: nn.Module, wanted: re.Pattern[str]) -> Iterator[tuple[str, nn.Module]]:
    """The modules that hold a wanted parameter themselves."""
    for name, module in model.named_modules():
        owned = (f"{name}.{own}" for own, _ in module.named_parameters(recurse=False))
        if any(wanted.search(label) for label in owned):
            yield name, module
