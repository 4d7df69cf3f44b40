"""What a recipe is, and the two helpers that its figures need: where a model lives, and inputs moved there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Recipe:
    """A pretrained model, inputs to calibrate it with, inputs to check it with, and its task figures."""

    name: str
    model: nn.Module  # in eval mode
    example_inputs: Any  # tensor, tuple or dict, as for torch.export
    batches: list[Any]  # calibration inputs, unlabelled
    held_out: list[Any]  # inputs that share no document, tone or prompt with `batches`
    metrics: Callable[[nn.Module], dict[str, float]]  # of any model with the same call signature
    licence: str  # to be quoted wherever a figure is shown
    notes: str = ""  # what the figures mean and how the data was made


def device_of(model: nn.Module) -> torch.device:
    """Where the model's weights are; the CPU for one without any."""
    tensor = next(model.parameters(), None)
    return torch.device("cpu") if tensor is None else tensor.device


def moved(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def show(recipe: Recipe) -> None:
    """Print the dense model's figures."""
    print(f"{recipe.name}, dense: {recipe.notes}")
    for name, value in recipe.metrics(recipe.model).items():
        print(f"  {name:<20} {value:.4f}")
    print(f"licence: {recipe.licence}")
