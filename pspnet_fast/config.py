"""Recipes: typed settings of data, network, schedule and evaluation, and what is made of them.

They come from YAML files and the command line (`arguments.py`), or from a checkpoint, which holds the one it was trained by.
Past 300 lines, because every setting is explained once, here.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from .data.augmentation import Augmentation
from .data.classes import CLASSES, Classes
from .data.datasets import IGNORED, Dataset, find_dataset
from .data.scenes import SCENES
from .models.checkpoint import CheckpointError, fitted, read_checkpoint
from .models.pspnet import PSPNet, Stages
from .models.resnet import Dilation, Stem
from .nn.losses import UpsampleCrossEntropyLoss
from .nn.plain_ppm import Pooling
from .nn.psp_head import Head
from .predict import DEEP_CLASSES
from .protocol import Protocol, check_protocol
from .schema import from_plain, shown

DatasetName = Literal["ade20k", "voc2012", "cityscapes", "scenes", "list"]

_LOG = logging.getLogger(__name__)


class ConfigError(ValueError):
    """Settings that are unknown, of another type, or cannot work together; the message names them."""


@dataclass(frozen=True)
class Recipe:
    """What a YAML file holds: data, network, schedule and evaluation. The defaults are the paper's, for ADE20K.

    Zhao et al., CVPR 2017, section 5.1, and hszhao/semseg where the paper is silent.

    Args:
        dataset: layout and classes of the data; "list" reads semseg's list files.
        data: the folder of the data.
        train_list: with "list", the file of the training images: a line has an image and its labels, relative to `data`.
        val_list: the same of the images to evaluate on.
        classes: with "list", the number of classes; else the data set's own.
        layers: depth of the ResNet.
        width: channels inside the first stage's blocks; 64 is the ResNet of its paper.
        stem: see `ResNet`.
        output_stride: see `ResNet`.
        dilation: see `ResNet`.
        stages: how many of the ResNet's stages there are, see `PSPNet`.
        dilate_second: whether the second convolution of dilated basic blocks is dilated, see `ResNet`.
        bins: cells per axis of each level of the pyramid.
        bin1_norm: false is a bias in place of the norm at bin 1, see `PPM`.
        reduction_channels: channels of each level; null is the features' over the number of levels.
        bottleneck_channels: channels between the bottleneck and the classes; null is a quarter of the features'.
        aux_channels: those of the auxiliary head; null is a quarter of the channels it reads.
        kernel_sizes: of the bottleneck and of the convolution to the classes, 1 or 3 each.
        pooling: of the pyramid; "max" is an ablation.
        reduction: whether the levels are reduced to as many channels, together, as the features have; false is an ablation.
        dropout: probability that a channel is dropped before a classifier.
        align_corners: of every upsampling.
        head: "factorised" or "concat", the same results.
        aux_weight: of the auxiliary loss; 0 leaves the auxiliary head out.
        backbone: a checkpoint to start the ResNet from (ImageNet's weights), or "torchvision".
        crop: side of the training crops and of the sliding windows, in pixels.
        augmentation: what happens to training images.
        batch_size: images in one step, of all processes together.
        iterations: steps of the training; this or `epochs`.
        epochs: passes over the training images; this or `iterations`.
        optimizer: "sgd" with momentum, as in the paper, or "adamw".
        base_lr: learning rate of the backbone at the start.
        head_lr_factor: times base_lr, the learning rate of pyramid and classifiers.
        momentum: of SGD; the first beta of AdamW.
        weight_decay: on every parameter.
        power: the learning rate is base_lr * (1 - iteration / iterations) ** power, the "poly" policy.
        warmup: iterations at the start, over which the learning rate rises to that from nothing.
        label_smoothing: of the loss, in [0, 1].
        ohem_threshold: online hard example mining, see `UpsampleCrossEntropyLoss`; null counts every pixel.
        ohem_min_kept: pixels of a process's batch that mining keeps at least.
        protocol: how images are shown to the network in evaluation: "semseg", "caffe" or "whole".
        base_size: length that the long side is resized to at scale 1; null keeps each image's own.
        scales: factors of base_size in evaluation, averaged over.
        flip: whether the mirrored image is averaged in.
        absent: what a class counts that is in neither labels nor predictions: "zero", "nan" or "one", see `metrics.scores`.
    """

    dataset: DatasetName = "ade20k"
    data: Path | None = None
    train_list: Path | None = None
    val_list: Path | None = None
    classes: int | None = None
    layers: Literal[18, 34, 50, 101, 152, 269] = 50
    width: int = 64
    stem: Stem = "deep"
    output_stride: Literal[8, 16, 32] = 8
    dilation: Dilation = "full"
    stages: Stages = 4
    dilate_second: bool = True
    bins: tuple[int, ...] = (1, 2, 3, 6)
    bin1_norm: bool = True
    reduction_channels: int | None = None
    bottleneck_channels: int | None = None
    aux_channels: int | None = None
    kernel_sizes: tuple[int, int] = (3, 1)
    pooling: Pooling = "average"
    reduction: bool = True
    dropout: float = 0.1
    align_corners: bool = True
    head: Head = "factorised"
    aux_weight: float = 0.4
    backbone: Path | None = None
    crop: int = 473
    augmentation: Augmentation = field(default_factory=Augmentation)
    batch_size: int = 16
    iterations: int | None = None
    epochs: int | None = None
    optimizer: Literal["sgd", "adamw"] = "sgd"
    base_lr: float = 0.01
    head_lr_factor: float = 10.0
    momentum: float = 0.9
    weight_decay: float = 1e-4
    power: float = 0.9
    warmup: int = 0
    label_smoothing: float = 0.0
    ohem_threshold: float | None = None
    ohem_min_kept: int = 100_000
    protocol: Literal["semseg", "caffe", "whole"] = "semseg"
    base_size: int | None = 512
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    absent: Literal["zero", "nan", "one"] = "zero"

    def __post_init__(self) -> None:
        check_between(self, 1, MANY, "layers", "iterations", "epochs")
        check_between(self, 2, 512, "width")
        check_between(self, 1, 2**16, "batch_size", "classes")
        check_between(self, 1, 2**14, "reduction_channels", "bottleneck_channels", "aux_channels")
        check_between(self, 0, MANY, "warmup", "ohem_min_kept")
        check_between(self, 0, LARGE, "aux_weight", "base_lr", "head_lr_factor", "weight_decay")
        check_between(self, 0, 100, "power")
        check_between(self, 0, 1, "momentum", "label_smoothing", "ohem_threshold")
        if self.width % 2:
            raise ConfigError(f"width must be even, got {self.width}")
        if not {*self.kernel_sizes} <= {1, 3}:
            raise ConfigError(f"kernel_sizes must be 1 or 3 each, got {[*self.kernel_sizes]}")
        if not self.bin1_norm and (self.pooling != "average" or not self.reduction):
            raise ConfigError("bin1_norm false needs pooling average and reduction")
        if self.crop < self.output_stride:
            raise ConfigError(f"crop must be at least output_stride = {self.output_stride}, got {self.crop}")
        if not 1 <= len(self.bins) <= 16 or not all(0 < bins <= 2**8 for bins in self.bins):
            raise ConfigError(f"bins must be from 1 to {2**8}, and 1 to 16 of them, got {shown([*self.bins])}")
        if len(self.scales) > 32:
            raise ConfigError(f"scales must be 32 at most, got {len(self.scales)}")
        try:
            check_protocol(protocol_of(self), "{}".format)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        varied = (*self.augmentation.scale, *(self.augmentation.aspect or ()))
        if not all(1 / 100 <= factor <= 100 for factor in varied):
            raise ConfigError(f"augmentation: scale and aspect must be from 0.01 to 100, got {shown([*varied])}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout must be in [0, 1), got {shown(self.dropout)}")
        if self.optimizer == "adamw" and self.momentum == 1:
            raise ConfigError("momentum must be below 1 with optimizer adamw, got 1")
        if self.ohem_threshold == 0:
            raise ConfigError("ohem_threshold must be above 0, got 0")
        if self.dataset == "list" and self.classes is None:
            raise ConfigError("dataset 'list' needs classes, the number of classes of its labels")

    def class_table(self) -> Classes:
        """Names and colours of the classes; with "list", numbers for names."""
        if self.dataset == "list":
            count = cast(int, self.classes)
            if count > DEEP_CLASSES:
                raise ConfigError(f"classes must be at most {DEEP_CLASSES}, got {count}")
            # No two are alike: red and green tell 256 classes of a block apart, and odd steps the blocks.
            colours = tuple(
                ((37 * k + 101 * (k // 256)) % 256, 91 * k % 256, 151 * k % 256) for k in range(1, count + 1)
            )
            return Classes(tuple(str(k) for k in range(count)), colours)
        table = SCENES if self.dataset == "scenes" else CLASSES[self.dataset]
        if self.classes not in (None, len(table.names)):
            raise ConfigError(f"{self.dataset} has {len(table.names)} classes: leave classes out, got {self.classes}")
        return table

    def network(self, aux: bool = True) -> PSPNet:
        """PSPNet as the recipe says, with random weights or the backbone's.

        Its losses are sums over the pixels that count, means where `ohem_threshold` chooses them.
        """
        return PSPNet(
            layers=self.layers,
            bins=self.bins,
            dropout=self.dropout,
            classes=len(self.class_table().names),
            criterion=UpsampleCrossEntropyLoss(
                reduction="sum" if self.ohem_threshold is None else "mean",
                label_smoothing=self.label_smoothing,
                align_corners=self.align_corners,
                ohem_threshold=self.ohem_threshold,
                ohem_min_kept=self.ohem_min_kept,
            ),
            pretrained="torchvision" if str(self.backbone) == "torchvision" else self.backbone,
            stem=self.stem,
            output_stride=self.output_stride,
            dilation=self.dilation,
            width=self.width,
            align_corners=self.align_corners,
            aux=aux and self.aux_weight > 0,
            head=self.head,
            pooling=self.pooling,
            reduction=self.reduction,
            stages=self.stages,
            dilate_second=self.dilate_second,
            kernel_sizes=self.kernel_sizes,
            bin1_norm=self.bin1_norm,
            reduction_channels=self.reduction_channels,
            bottleneck_channels=self.bottleneck_channels,
            aux_channels=self.aux_channels,
        )


# What decides which network a checkpoint's weights mean.
NETWORK = (
    *("dataset", "classes", "layers", "width", "stem", "output_stride", "dilation"),
    *("bins", "pooling", "reduction", "align_corners", "stages", "dilate_second", "kernel_sizes", "bin1_norm"),
    *("reduction_channels", "bottleneck_channels", "aux_channels"),
)


MANY = 10**9
"""The most steps, pictures or pixels that a setting can ask for."""
LARGE = 1e30
"""The largest factor: what is multiplied with another such is still a number in float64."""


def check_between(settings: object, least: float, most: float, *names: str) -> None:
    """See that settings of a dataclass are from `least` to `most`, or None.

    Raises:
        ConfigError: one is not (NaN is not, either); the message names it and the bound.
    """
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value >= least:
            raise ConfigError(f"{name} must be at least {least}, got {shown(value)}")
        if value is not None and not value <= most:
            raise ConfigError(f"{name} must be at most {most}, got {shown(value)}")


def recipe_of(settings: object) -> Recipe:
    """The recipe that `plain` made a dictionary of, as checkpoints hold it.

    What is left out has its default: `pspnet-fast convert` writes what the network is made of, and nothing of a training.

    Raises:
        ConfigError: a setting that is unknown, of another type or out of its bounds, by name.
    """
    return from_plain(Recipe, settings, ConfigError)


def plain(settings: Any) -> dict[str, Any]:
    """A dataclass as a dictionary of what YAML and JSON know: lists, and strings for paths."""
    return cast("dict[str, Any]", _plain(dataclasses.asdict(settings)))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def protocol_of(recipe: Recipe) -> Protocol:
    """How the recipe shows images to the network in evaluation."""
    whole = recipe.protocol == "whole"
    return Protocol(
        crop=None if whole else recipe.crop,
        base_size=recipe.base_size,
        scales=recipe.scales,
        flip=recipe.flip,
        kind="caffe" if recipe.protocol == "caffe" else "semseg",
    )


def dataset_of(recipe: Recipe, split: str, skip_corrupt: bool = False) -> Dataset:
    """The recipe's images of a split, "train" or "val"; `skip_corrupt` as for `find_dataset`.

    Raises:
        ConfigError: no folder is given. DatasetError: it does not hold what it must.
    """
    if recipe.data is None:
        raise ConfigError("data is missing: --data FOLDER")
    count = len(recipe.class_table().names)
    if count > IGNORED:
        raise ConfigError(
            f"classes of labelled data must be at most {IGNORED}, label {IGNORED} is ignored, got {count}"
        )
    list_file = recipe.train_list if split == "train" else recipe.val_list
    return find_dataset(
        recipe.dataset,
        recipe.data,
        split,
        list_file=list_file,
        classes=recipe.class_table(),
        skip_corrupt=skip_corrupt,
    )


def differing_settings(recipe: Recipe, saved: Recipe) -> list[str]:
    """What makes the network of a snapshot another one than the recipe's, such as "layers 18 instead of 50"."""
    before, now = plain(saved), plain(recipe)
    return [f"{name} {before[name]} instead of {now[name]}" for name in NETWORK if before[name] != now[name]]


def trained_network(weights: Path, recipe: Recipe) -> tuple[PSPNet, Recipe]:
    """The network of a checkpoint, in evaluation mode, and the recipe it is evaluated by.

    A snapshot of a training knows its network: what `recipe` says of it otherwise gives way, and is logged.

    Raises:
        OSError: no such file. CheckpointError: it does not fit the recipe's network, or its classes, or the recipe in it
            cannot be.
    """
    content = read_checkpoint(weights)
    if "recipe" in content:
        net, saved = snapshot_network(content, str(weights))
        classes, own = (len(each.class_table().names) for each in (recipe, saved))
        if classes != own:
            raise CheckpointError(f"{weights}: has {own} classes ({saved.dataset}), and {recipe.dataset} {classes}")
        if differing := differing_settings(recipe, saved):
            _LOG.warning("%s: the network is the snapshot's: %s", weights, ", ".join(differing))
        return net, dataclasses.replace(recipe, **{name: getattr(saved, name) for name in NETWORK[2:]})
    return _loaded(recipe, content), recipe


def snapshot_network(content: Mapping[str, Any], name: str = "the snapshot") -> tuple[PSPNet, Recipe]:
    """The network of a training's snapshot, in evaluation mode and without auxiliary head, and the recipe of the training.

    Args:
        content: what `read_checkpoint` found.
        name: of the file, for messages.

    Raises:
        CheckpointError: the recipe cannot be, or the weights are another network's.
    """
    try:
        recipe = recipe_of(content["recipe"])
        return _loaded(recipe, content), recipe
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{name}: its recipe cannot be: {error}") from error


def _loaded(recipe: Recipe, content: Mapping[str, Any]) -> PSPNet:
    """The recipe's network with the weights of a checkpoint, in evaluation mode."""
    recipe = dataclasses.replace(recipe, backbone=None)
    return fitted(lambda: recipe.network(aux=False), content).eval()
