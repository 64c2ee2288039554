"""Recipes and command lines: typed settings, YAML files found by name, `--option value` over them.

`pspnet-fast train NAME --layers 101 --augmentation.scale 0.75 1.5`: NAME is a file of `pspnet_fast/configs` without its
ending, or the path of a YAML file. jsonargparse parses, checks types and prints (`--print_config`). What its command line
lacks is added here: dashes in names, flags without a value (`--flip`, `--no-flip`), lists without brackets
(`--scales 0.5 1 1.5`), and the nearest name where one is unknown.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

import torch

from .data.classes import CLASSES, Classes
from .data.datasets import Dataset, find_dataset
from .data.scenes import SCENES
from .data.transforms import Augmentation
from .models.checkpoint import CheckpointError, read_checkpoint
from .models.pspnet import PSPNet
from .models.resnet import Dilation, Stem
from .nn.losses import UpsampleCrossEntropyLoss
from .nn.plain_ppm import Pooling
from .nn.ppm import PPM
from .nn.psp_head import Head
from .predict import Protocol

Precision = Literal["fp32", "bf16", "fp16"]
DatasetName = Literal["ade20k", "voc2012", "cityscapes", "scenes", "list"]
Settings = TypeVar("Settings")

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
        bins: cells per axis of each level of the pyramid.
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
    bins: tuple[int, ...] = (1, 2, 3, 6)
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
        _at_least(self, 1, "layers", "width", "crop", "batch_size", "classes", "iterations", "epochs", "base_size")
        _at_least(self, 0, "aux_weight", "base_lr", "head_lr_factor", "momentum", "weight_decay", "power")
        _at_least(self, 0, "warmup", "ohem_min_kept")
        if self.crop < self.output_stride:
            raise ConfigError(f"crop must be at least output_stride = {self.output_stride}, got {self.crop}")
        if not self.bins or min(self.bins) < 1:
            raise ConfigError(f"bins must be positive and at least one, got {[*self.bins]}")
        if not self.scales or min(self.scales) <= 0:
            raise ConfigError(f"scales must be positive and at least one, got {[*self.scales]}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.dataset == "list" and self.classes is None:
            raise ConfigError("dataset 'list' needs classes, the number of classes of its labels")

    def class_table(self) -> Classes:
        """Names and colours of the classes; with "list", numbers for names."""
        if self.dataset == "list":
            count = cast(int, self.classes)
            if count > 255:
                raise ConfigError(f"classes must be at most 255, label 255 is ignored, got {count}")
            colours = tuple((37 * k % 256, 91 * k % 256, 151 * k % 256) for k in range(1, count + 1))
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
        )


# What decides which network a checkpoint's weights mean.
NETWORK = (
    *("dataset", "classes", "layers", "width", "stem", "output_stride", "dilation"),
    *("bins", "pooling", "reduction", "align_corners"),
)


def _at_least(settings: object, least: float, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value >= least:  # NaN is refused, too
            raise ConfigError(f"{name} must be at least {least}, got {value}")


def recipes() -> list[str]:
    """The names of the recipes that are installed."""
    return sorted(file.name[:-5] for file in _folder().iterdir() if file.name.endswith(".yaml"))


def _folder() -> Any:
    return resources.files("pspnet_fast").joinpath("configs")


def find_recipe(name: str) -> Path:
    """The file of a recipe: a name of `recipes()`, or a path.

    Raises:
        ConfigError: there is none; it lists the names.
    """
    if name in recipes():
        return Path(str(_folder().joinpath(f"{name}.yaml")))
    if Path(name).is_file():
        return Path(name)
    nearest = _nearest(name, recipes())
    raise ConfigError(f"no recipe {name!r}{nearest}: give the path of a YAML file, or one of {', '.join(recipes())}")


def parse(prog: str, argv: Sequence[str], kind: type[Settings], description: str) -> tuple[Recipe, Settings]:
    """`CONFIG [--option value ...]` to the recipe and the command's own settings, a dataclass.

    Raises:
        ConfigError: an unknown recipe, option or key (with the nearest name), a value of another type, settings that cannot
            work. SystemExit 0 after `--help` and `--print_config`.
        ImportError: jsonargparse is not installed; nothing else here needs it.
    """
    try:
        from jsonargparse import ArgumentError, ArgumentParser
    except ImportError as error:
        raise ImportError(f"recipes need jsonargparse ({error}): pip install 'pspnet_fast[train]'") from error
    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False, allow_abbrev=False)
    parser.usage = f"{prog} CONFIG [--option VALUE ...]"
    parser.add_argument("--config", action="config", help="a YAML file of settings, in place of CONFIG or over it")
    parser.add_class_arguments(kind, fail_untyped=True)
    parser.add_class_arguments(Recipe, fail_untyped=True)
    known = _names(kind) | _names(Recipe)
    given = [*argv]
    if given and not given[0].startswith("-"):
        given[:1] = ["--config", str(find_recipe(given[0]))]
    elif not {"-h", "--help"} & {*given} and not any(each.startswith("--config") for each in given):
        raise ConfigError(f"CONFIG is missing: one of {', '.join(recipes())}, or the path of a YAML file")
    given = _arguments(given, known)
    for one, other in (("epochs", "iterations"), ("iterations", "epochs")):
        # Either says how long to train: one on the command line replaces the recipe's other.
        if any(word.startswith(f"--{one}=") for word in given) and not any(
            word.startswith(f"--{other}=") for word in given
        ):
            given.append(f"--{other}=null")
    try:
        namespace = parser.parse_args(given)
        values = parser.instantiate(namespace).as_dict()
        parts = []
        for each in (Recipe, kind):
            names = [part.name for part in dataclasses.fields(cast(Any, each))]
            parts.append(each(**{name: values[name] for name in names}))
    except (ArgumentError, TypeError, ValueError) as error:
        raise ConfigError(_explained(str(error), known)) from error
    return cast(Recipe, parts[0]), cast(Settings, parts[1])


def recipe_of(settings: Mapping[str, Any]) -> Recipe:
    """The recipe that `dataclasses.asdict` made a dictionary of, as checkpoints hold it (`plain`)."""
    values: dict[str, Any] = _tuples(settings)
    for key, hint in get_type_hints(Recipe).items():
        if values.get(key) is not None and Path in get_args(hint):
            values[key] = Path(values[key])
    return Recipe(**{**values, "augmentation": Augmentation(**_tuples(settings["augmentation"]))})


def _tuples(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}


def plain(settings: Any) -> dict[str, Any]:
    """A dataclass as a dictionary of what YAML and JSON know: lists, and strings for paths."""
    return cast("dict[str, Any]", _plain(dataclasses.asdict(settings)))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def device_of(name: str | None) -> torch.device:
    """The device of that name; CUDA where it is for None.

    Raises:
        ConfigError: there is no such device.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ConfigError(f"device must be cpu, cuda or cuda:1, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {name}: torch {torch.__version__} finds no CUDA GPU here")
    return device


def placed(net: PSPNet, device: torch.device, channels_last: bool) -> PSPNet:
    """The network on a device, its weights in a memory format."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    net = cast(PSPNet, cast(Any, net).to(device, memory_format=layout))
    if isinstance(net.ppm, PPM):
        for weight in (p for p in net.ppm.parameters() if p.dim() == 4):
            # 1x1: the same memory in both formats, and the strides that its gradient has, which DDP compares.
            weight.data = weight.data.clone(memory_format=torch.contiguous_format)
    return net


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Autocast to a precision; for "fp32" one that does nothing."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


def _names(kind: type) -> dict[str, Any]:
    """Every option and its type, those of nested dataclasses with a dot."""
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        found[name] = hint
        if dataclasses.is_dataclass(hint):
            found |= {f"{name}.{inner}": of for inner, of in _names(cast(type, hint)).items()}
    return found


def _arguments(argv: Sequence[str], known: Mapping[str, Any]) -> list[str]:
    """The command line as jsonargparse reads it."""
    made: list[str] = []
    rest = [*argv]
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            made.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        negated = name.startswith("no_") and known.get(name[3:]) is bool
        name = name[3:] if negated else name
        values = [value] if equals else []
        while not equals and rest and not rest[0].startswith("--"):
            values.append(rest.pop(0))
        hint = known.get(name)
        if hint is bool and not values:
            made.append(f"--{name}={'false' if negated else 'true'}")
        elif _is_tuple(hint) and values and not values[0].startswith("["):
            made.append(f"--{name}=[{','.join(values)}]")
        elif len(values) == 1:
            made.append(f"--{name}={values[0]}")
        else:
            made += [f"--{name}", *values]
    return made


def _is_tuple(hint: Any) -> bool:
    return get_origin(hint) is tuple or any(get_origin(each) is tuple for each in get_args(hint))


def _explained(message: str, known: Mapping[str, Any]) -> str:
    """The message of jsonargparse, with the nearest name where one is unknown."""
    message = " ".join(message.split())
    unknown = re.search(r"unrecognized arguments: --(\S+?)(?:=.*)?$|(?:Option|Key|key) '([^']+)' is not", message)
    if unknown is None:
        return message
    name = unknown.group(1) or unknown.group(2)
    return f"there is no option {name!r}{_nearest(name, list(known))}"


def _nearest(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, 1, 0.5)
    return f", did you mean {close[0]!r}?" if close else ""


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


def dataset_of(recipe: Recipe, split: str) -> Dataset:
    """The recipe's images of a split, "train" or "val".

    Raises:
        ConfigError: no folder is given. DatasetError: it does not hold what it must.
    """
    if recipe.data is None:
        raise ConfigError("data is missing: --data FOLDER")
    list_file = recipe.train_list if split == "train" else recipe.val_list
    return find_dataset(recipe.dataset, recipe.data, split, list_file=list_file, classes=recipe.class_table())


def differing_settings(recipe: Recipe, saved: Mapping[str, Any]) -> list[str]:
    """What makes the network of a snapshot another one than the recipe's, such as "layers 18 instead of 50"."""
    before, now = plain(recipe_of(saved)), plain(recipe)
    return [f"{name} {before[name]} instead of {now[name]}" for name in NETWORK if before[name] != now[name]]


@dataclass(frozen=True)
class Evaluating:
    """How a network is evaluated.

    Args:
        weights: a snapshot of a training (best.pth), or a checkpoint of PSPNet, ours or semseg's.
        output: folder for results.json, per_class.csv, confusion.png and the worst images; null writes none.
        json: a file for mIoU, mAcc, aAcc and the lists of the classes.
        predictions: whether `output` gets the labels of every image, too, plain and coloured.
        split: "val", or "train".
        images: how many images are evaluated; null takes all.
        windows: windows in one call of the network.
        precision: "fp32", or autocast to "bf16" or "fp16".
        channels_last: memory format of images and weights.
        device: "cpu", "cuda" or "cuda:1"; null takes CUDA where it is.
        check_data: read every file of the data before.
        skip_corrupt: where an image cannot be read, name it and go on.
    """

    weights: Path
    output: Path | None = None
    json: Path | None = None
    predictions: bool = False
    split: Literal["val", "train"] = "val"
    images: int | None = None
    windows: int = 4
    precision: Precision = "fp32"
    channels_last: bool = True
    device: str | None = None
    check_data: bool = False
    skip_corrupt: bool = False

    def __post_init__(self) -> None:
        _at_least(self, 1, "images", "windows")


def trained_network(weights: Path, recipe: Recipe) -> tuple[PSPNet, Recipe]:
    """The network of a checkpoint, in evaluation mode, and the recipe it is evaluated by.

    A snapshot of a training knows its network: what `recipe` says of it otherwise gives way, and is logged.

    Raises:
        OSError: no such file. CheckpointError: it does not fit the recipe's network, or its classes.
    """
    content = read_checkpoint(weights)
    if isinstance(content.get("recipe"), Mapping):
        net, saved = snapshot_network(content)
        classes, own = (len(each.class_table().names) for each in (recipe, saved))
        if classes != own:
            raise CheckpointError(f"{weights}: has {own} classes ({saved.dataset}), and {recipe.dataset} {classes}")
        if differing := differing_settings(recipe, content["recipe"]):
            _LOG.warning("%s: the network is the snapshot's: %s", weights, ", ".join(differing))
        return net, dataclasses.replace(recipe, **{name: getattr(saved, name) for name in NETWORK[2:]})
    net = dataclasses.replace(recipe, backbone=None).network(aux=False)
    net.load_state_dict(content)
    return net.eval(), recipe


def snapshot_network(content: Mapping[str, Any]) -> tuple[PSPNet, Recipe]:
    """The network of a training's snapshot, in evaluation mode and without auxiliary head, and the recipe of the training."""
    recipe = recipe_of(content["recipe"])
    net = dataclasses.replace(recipe, backbone=None).network(aux=False)
    net.load_state_dict(content)
    return net.eval(), recipe
