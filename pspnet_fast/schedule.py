"""How a recipe trains a network: steps, rates, and the optimiser over its parameters."""

from __future__ import annotations

import math
from typing import Any, cast

import torch

from .config import ConfigError, Recipe
from .models.pspnet import PSPNet


def learning_rate(recipe: Recipe, iteration: int, iterations: int) -> float:
    """base_lr * (1 - iteration / iterations) ** power, the backbone's rate in step `iteration`, counted from 0.

    Over the first `warmup` iterations it is multiplied with (iteration + 1) / warmup.
    """
    rising = min(1.0, (iteration + 1) / recipe.warmup) if recipe.warmup else 1.0
    return float(recipe.base_lr * (1 - iteration / iterations) ** recipe.power * rising)


def parameter_groups(net: PSPNet, recipe: Recipe) -> list[dict[str, Any]]:
    """The backbone's parameters, and the others with `factor` 10 (`head_lr_factor`)."""
    backbone = ("layer0.", "layer1.", "layer2.", "layer3.", "layer4.", "backbone.")
    named = [*net.named_parameters()]
    of_backbone = [p for name, p in named if name.startswith(backbone)]
    of_head = [p for name, p in named if not name.startswith(backbone)]
    return [{"params": of_backbone, "factor": 1.0}, {"params": of_head, "factor": recipe.head_lr_factor}]


def optimizer(net: PSPNet, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's, over `parameter_groups`."""
    groups, rate, decay = parameter_groups(net, recipe), recipe.base_lr, recipe.weight_decay
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=rate, betas=(recipe.momentum, 0.999), weight_decay=decay)
    return torch.optim.SGD(groups, lr=rate, momentum=recipe.momentum, weight_decay=decay)


def iterations_of(recipe: Recipe, images: int) -> int:
    """Steps of the whole training; epochs are rounded up to whole batches.

    Raises:
        ConfigError: neither or both of iterations and epochs are given.
    """
    if (recipe.iterations is None) == (recipe.epochs is None):
        raise ConfigError(f"give iterations or epochs, got {recipe.iterations} and {recipe.epochs}")
    return recipe.iterations or math.ceil(cast(int, recipe.epochs) * images / recipe.batch_size)
