"""PSPNet: the pyramid scene parsing network (Zhao et al., CVPR 2017).

Past 300 lines, because a third of them are what the arguments mean, which is said once, here.
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn

from ..checks import check_bins, check_features
from ..functional import upsample_argmax
from ..nn.losses import UpsampleCrossEntropyLoss
from ..nn.plain_ppm import PlainPPM, Pooling
from ..nn.ppm import PPM
from ..nn.psp_head import Head, check_head, classifier, psp_head
from .checkpoint import Loadable, bare_state_dict, read_checkpoint
from .resnet import Choices, Dilation, NormLayer, ResNet, Stem, StrideIn, check_image

Pretrained = str | os.PathLike[str] | Mapping[str, Any] | None
Stages = Literal[2, 3, 4]


class TrainingOutput(NamedTuple):
    """What training with targets returns. The auxiliary loss is not weighted; without an auxiliary head it is 0."""

    prediction: torch.Tensor
    main_loss: torch.Tensor
    aux_loss: torch.Tensor


class TrainingLogits(NamedTuple):
    """What training without targets returns."""

    logits: torch.Tensor
    aux_logits: torch.Tensor | None


class PSPNet(Loadable):
    """A backbone, the pyramid pooling module, and a 3x3 + 1x1 classifier; an auxiliary classifier in training.

    After semseg's PSPNet (hszhao/semseg, model/pspnet.py): the positional arguments are its arguments, and with the
    default keywords the state_dict has its keys, `layer0` to `layer4`, `ppm`, `cls`, `aux`. Its checkpoints load with
    `strict=True` as they are, with "module." before every name and inside {"state_dict": ...}; one that does not fit
    raises one error with all the keys, and changes nothing. `aux.*` may be absent from a checkpoint, and is ignored by
    a network without an auxiliary head.

    In training, `aux` reads the third stage. Its loss is returned unweighted, as semseg does: the trainer adds
    0.4 times it (section 4 of the paper). In evaluation it is not computed.

    Logits, targets and losses live at one size: (H - 1) * zoom_factor // 8 + 1 by the same of W, the size of the input
    for zoom_factor 8, whatever the output stride. Targets of the input's size are brought there by taking the nearest
    label, never a mixture of two.

    The backbone's convolutions start as kaiming-normal (see `ResNet`); the rest as PyTorch makes it, as in semseg.

    Args:
        layers: depth of the ResNet: 18, 34, 50, 101, 152 or 269.
        bins: cells per axis of each level of the pyramid. Each level gets C // len(bins) of the backbone's C channels.
        dropout: probability that a channel is dropped before either classifier.
        classes: number of classes K.
        zoom_factor: 1, 2, 4 or 8, the size of the logits in eighths of the input.
        use_ppm: without it, the classifier reads the backbone.
        criterion: (logits (N, K, h, w), targets (N, h, w)) to a loss; None is cross entropy that ignores label 255. An
            `UpsampleCrossEntropyLoss`, as None makes, gets the logits before they are upsampled, which then never are.
        pretrained: None (or False) to start at random, or the path of a checkpoint, read with `weights_only=True`, or a
            state_dict: of this network, or of the ResNet alone with ImageNet's names (`conv1`, `layer1`, ..., `fc`). Or
            "torchvision": the ImageNet weights of the installed torchvision, which then downloads them if it must; for
            stem="plain" with the other choices as torchvision's ("halved" is its dilation, "full" loads too). Nothing
            else is ever downloaded.
        stem, output_stride, dilation, dilate_second, stride_in, conv_bias, share_stage3, width: see `ResNet`.
        in_channels: channels of the images, 3 unless said. `pretrained` must have been trained on images of as many.
        norm_layer: makes a norm from its channel count, everywhere in the network.
        align_corners: of every upsampling, in the pyramid and of the logits.
        aux: whether there is an auxiliary head.
        head: "factorised" never builds the concatenation, and computes the bottleneck with half the work (`PSPHead`); "concat"
            is the head as the paper draws it. Parameters, keys and results are the same, to rounding.
        pooling, reduction: the paper's ablations of the pyramid ("max", and levels of all channels), in plain PyTorch: see
            `PlainPPM`. The head is then "concat".
        backbone: any module instead of the ResNet: from (N, C, H, W) to a sequence of feature maps, of which the last
            two are taken. `layers` and the ResNet's choices then mean nothing and must be left alone. Its keys are
            under `backbone`.
        channels: the channel counts of those two feature maps; needed with `backbone`, and only then.
        stages: how many of the ResNet's four stages there are. The features are the last one's; `aux` reads the one before.
            2 is segmentation_models_pytorch's PSPNet (encoder_depth=3), at an output stride of 8 without dilation.
        kernel_sizes: of the bottleneck and of the convolution to the classes, 1 or 3 each; segmentation_models_pytorch has
            (1, 3).
        bin1_norm: without it, the level of bin 1 has a bias in place of a norm (see `PPM`), as in segmentation_models_pytorch.
        reduction_channels: channels of each level; None is C // len(bins).
        bottleneck_channels: channels between the bottleneck and the classes; None is C // 4.
        aux_channels: those of the auxiliary head; None is a quarter of the channels it reads.

    Attributes:
        settings: the arguments above that decide which function the weights are, by name; None with `backbone`.
        in_channels: of the images; with `backbone`, what was said of them.

    Shapes:
        x (N, in_channels, H, W), of any H and W, and targets (N, H, W) of integers
        - in evaluation to logits (N, K, h, w); targets are not read,
        - in training to `TrainingLogits` (logits, aux_logits), both (N, K, h, w),
        - in training with targets to `TrainingOutput` (prediction (N, h, w), main_loss, aux_loss).

    Raises:
        ValueError: an argument outside its choices, an x or targets of another shape; CheckpointError is one too.
        TypeError: an x that is not floating point, targets that are not integers, pretrained=True.
        OSError: no file at `pretrained`.
        ImportError: "torchvision" is not installed.

    Example:
        >>> net = PSPNet(layers=50, classes=150).eval()
        >>> net(torch.rand(1, 3, 65, 97)).shape
        torch.Size([1, 150, 65, 97])
    """

    optional_prefixes = ("aux.", "criterion.")
    first_convolution = "layer0.0.weight"

    def __init__(
        self,
        layers: int = 50,
        bins: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1,
        classes: int = 2,
        zoom_factor: int = 8,
        use_ppm: bool = True,
        criterion: nn.Module | None = None,
        pretrained: Pretrained = None,
        *,
        stem: Stem = "deep",
        output_stride: int = 8,
        dilation: Dilation = "full",
        stride_in: StrideIn = "conv2",
        conv_bias: bool = False,
        share_stage3: bool = False,
        width: int = 64,
        norm_layer: NormLayer = nn.BatchNorm2d,
        align_corners: bool = True,
        aux: bool = True,
        head: Head = "factorised",
        pooling: Pooling = "average",
        reduction: bool = True,
        backbone: nn.Module | None = None,
        channels: tuple[int, int] | None = None,
        stages: Stages = 4,
        dilate_second: bool = True,
        kernel_sizes: tuple[int, int] = (3, 1),
        bin1_norm: bool = True,
        reduction_channels: int | None = None,
        bottleneck_channels: int | None = None,
        aux_channels: int | None = None,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if classes < 1:
            raise ValueError(f"PSPNet: classes must be at least 1, got {classes}")
        if zoom_factor not in (1, 2, 4, 8):
            raise ValueError(f"PSPNet: zoom_factor must be 1, 2, 4 or 8, got {zoom_factor!r}")
        check_head("PSPNet", head)
        if stages not in (2, 3, 4):
            raise ValueError(f"PSPNet: stages must be 2, 3 or 4, got {stages!r}")
        if len(kernel_sizes) != 2 or not {*kernel_sizes} <= {1, 3}:
            raise ValueError(f"PSPNet: kernel_sizes must be two of 1 and 3, got {kernel_sizes!r}")
        widths = {
            "reduction_channels": reduction_channels,
            "bottleneck_channels": bottleneck_channels,
            "aux_channels": aux_channels,
        }
        for name, count in widths.items():
            if count is not None and count < 1:
                raise ValueError(f"PSPNet: {name} must be at least 1, got {count}")
        if not bin1_norm and (pooling != "average" or not reduction):
            raise ValueError("PSPNet: bin1_norm=False needs pooling='average' and reduction=True")
        self.zoom_factor = zoom_factor
        self.use_ppm = use_ppm
        self.head: Head = head
        self.align_corners = align_corners
        self.criterion = UpsampleCrossEntropyLoss(align_corners=align_corners) if criterion is None else criterion
        self.backbone = backbone
        self.stage_names = tuple(f"layer{k}" for k in range(1, stages + 1))
        choices: Choices = {
            "stem": stem,
            "output_stride": output_stride,
            "dilation": dilation,
            "dilate_second": dilate_second,
            "stride_in": stride_in,
            "conv_bias": conv_bias,
            "share_stage3": share_stage3,
            "width": width,
            "in_channels": in_channels,
        }
        _check_backbone(backbone, channels, {"layers": layers, "stages": stages, **choices})
        self.in_channels = in_channels

        weights = _pretrained_weights(pretrained, layers, choices)
        of_resnet = weights is not None and backbone is None and "conv1.weight" in weights
        if backbone is None:
            resnet = ResNet(layers, norm_layer=norm_layer, **choices)
            if weights is not None and of_resnet:
                resnet.load_state_dict(weights)
            self.layer0 = nn.Sequential(*resnet.stem())
            for name in self.stage_names:
                self.add_module(name, resnet.get_submodule(name))
            last = resnet.channels[1] >> (4 - stages)
            channels = (last // 2, last)
        self.channels = cast("tuple[int, int]", channels)
        third, fourth = self.channels

        features = fourth
        if use_ppm:
            bins = check_bins("PSPNet", bins)
            if len(bins) > fourth:
                raise ValueError(f"PSPNet: there must be at most as many bins as channels = {fourth}, got {bins}")
            reduced = reduction_channels or fourth // len(bins)
            self.ppm: PPM | PlainPPM
            if pooling == "average" and reduction:
                self.ppm = PPM(fourth, reduced, bins, norm_layer, align_corners, bin1_norm)
            else:
                self.ppm = PlainPPM(fourth, reduced, bins, norm_layer, align_corners, pooling, reduction)
            features += len(bins) * (reduced if reduction else fourth)
        inner = bottleneck_channels or max(fourth // 4, 1)
        self.cls = classifier(features, inner, classes, dropout, norm_layer, kernel_sizes)
        inner = aux_channels or max(third // 4, 1)
        self.aux = classifier(third, inner, classes, dropout, norm_layer) if aux else None
        self.settings: dict[str, Any] | None = None
        if backbone is None:
            self.settings = {"layers": layers, "stages": stages, **choices, **widths}
            self.settings |= {"bins": tuple(bins), "use_ppm": use_ppm, "pooling": pooling, "reduction": reduction}
            self.settings |= {
                "align_corners": align_corners,
                "kernel_sizes": tuple(kernel_sizes),
                "bin1_norm": bin1_norm,
            }
        if weights is not None and not of_resnet:
            self.load_state_dict(weights)

    def features(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The backbone's last two feature maps."""
        if self.backbone is not None:
            check_features("PSPNet", x)
            return self._features_of(self.backbone(x))
        check_image("PSPNet", x, self.layer0[0])
        x = self.layer0(x)
        for name in self.stage_names[:-1]:
            x = getattr(self, name)(x)
        return x, getattr(self, self.stage_names[-1])(x)

    def coarse_logits(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (N, K, h', w') at the backbone's resolution: what `forward` upsamples in evaluation."""
        return self._head(self.features(x)[1])

    def predict(self, x: torch.Tensor, confidence: bool = False) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The labels that `forward`'s logits have in evaluation, without these logits.

        Args:
            x: (N, in_channels, H, W).
            confidence: whether the labels' probabilities are returned, too.

        Returns:
            Labels (N, h, w), uint8 where K <= 256, else int64; or (labels, probabilities), the latter in float32.

        Raises:
            RuntimeError: in training, where dropout and batch statistics would decide.
        """
        if self.training:
            raise RuntimeError("PSPNet: predict is for evaluation: call eval() first")
        logits = self.coarse_logits(x)
        return upsample_argmax(logits, self._size(x), self.align_corners, confidence)

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor | TrainingLogits | TrainingOutput:
        third, fourth = self.features(x)
        size = self._size(x)
        targets = self._targets(x, y, size) if self.training and y is not None else None
        logits = self._head(fourth)
        if not self.training:
            return self._resize(logits, size)
        aux_logits = None if self.aux is None else self.aux(third)
        if targets is None:
            aux_logits = None if aux_logits is None else self._resize(aux_logits, size)
            return TrainingLogits(self._resize(logits, size), aux_logits)
        main_loss = self._loss(logits, targets)
        aux_loss = main_loss.new_zeros(()) if aux_logits is None else self._loss(aux_logits, targets)
        prediction = cast(torch.Tensor, upsample_argmax(logits, size, self.align_corners, dtype=torch.int64))
        return TrainingOutput(prediction, main_loss, aux_loss)

    def _size(self, x: torch.Tensor) -> tuple[int, int]:
        """The logits' size."""
        height, width = ((size - 1) * self.zoom_factor // 8 + 1 for size in x.shape[2:])
        return height, width

    def _head(self, features: torch.Tensor) -> torch.Tensor:
        if not self.use_ppm:
            return cast(torch.Tensor, self.cls(features))
        return psp_head(self.ppm, self.cls, features, self.head)

    def _loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if not isinstance(self.criterion, UpsampleCrossEntropyLoss):
            logits = self._resize(logits, cast("tuple[int, int]", tuple(targets.shape[1:])))
        loss: torch.Tensor = self.criterion(logits, targets)
        return loss

    def _features_of(self, maps: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        if not isinstance(maps, (list, tuple)) or len(maps) < 2:
            raise TypeError(f"PSPNet: backbone must return its last two feature maps, got {type(maps).__name__}")
        third, fourth = maps[-2:]
        for features, channels in zip((third, fourth), self.channels, strict=True):
            if features.dim() != 4 or features.shape[1] != channels:
                raise ValueError(
                    f"PSPNet: backbone must return feature maps of channels = {self.channels} (N, C, H, W), "
                    f"got {tuple(third.shape)} and {tuple(fourth.shape)}"
                )
        return third, fourth

    def _resize(self, logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        if logits.shape[2:] == size:
            return logits
        return F.interpolate(logits, size, mode="bilinear", align_corners=self.align_corners)

    def _targets(self, x: torch.Tensor, y: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """`y` as int64 at `size`: each pixel takes the label nearest to where the logits of that pixel lie."""
        if y.is_floating_point() or y.is_complex():
            raise TypeError(f"PSPNet: targets must be integers, got {y.dtype}")
        given = tuple(y.shape[1:])
        if y.dim() != 3 or len(y) != len(x) or given not in (tuple(x.shape[2:]), size):
            raise ValueError(
                f"PSPNet: targets must be (N, H, W) of x {tuple(x.shape)} or of its logits' size {size}, "
                f"got {tuple(y.shape)}"
            )
        if given != size:
            rows, columns = (
                _nearest(length, count, self.align_corners, y.device) for length, count in zip(given, size, strict=True)
            )
            y = y[:, rows[:, None], columns]
        return y.long()


def _nearest(length: int, count: int, align_corners: bool, device: torch.device) -> torch.Tensor:
    """For `count` samples spread over `length` pixels as bilinear resizing spreads them, the nearest pixel of each."""
    i = torch.arange(count, device=device)
    if align_corners:
        return (2 * i * (length - 1) + count - 1) // max(2 * (count - 1), 1)
    return (2 * i + 1) * length // (2 * count)


def _check_backbone(
    backbone: nn.Module | None, channels: tuple[int, int] | None, choices: Mapping[str, object]
) -> None:
    if backbone is None:
        if channels is not None:
            raise ValueError(f"PSPNet: channels are those of a backbone, and none is given, got {channels!r}")
        return
    if channels is None or len(channels) != 2 or min(channels) < 1:
        raise ValueError(
            f"PSPNet: channels must be the two channel counts of backbone's feature maps, got {channels!r}"
        )
    defaults = inspect.signature(PSPNet).parameters
    for name, value in choices.items():
        if name != "in_channels" and value != defaults[name].default:
            raise ValueError(
                f"PSPNet: {name} is a choice of the ResNet and must be left alone with backbone, got {value!r}"
            )


def _pretrained_weights(
    pretrained: Pretrained | bool, layers: int, choices: Mapping[str, object]
) -> Mapping[str, torch.Tensor] | None:
    if pretrained is None or pretrained is False:
        return None
    if isinstance(pretrained, Mapping):
        return bare_state_dict(pretrained)
    if pretrained == "torchvision":
        return _torchvision_weights(layers, choices)
    if isinstance(pretrained, (str, os.PathLike)):
        return bare_state_dict(read_checkpoint(pretrained))
    raise TypeError(
        "PSPNet: pretrained must be the path of a checkpoint, a state_dict or 'torchvision', which alone may download, "
        f"got {pretrained!r}"
    )


def _torchvision_weights(layers: int, choices: Mapping[str, object]) -> Mapping[str, torch.Tensor]:
    if choices["in_channels"] != 3:
        raise ValueError(
            f"PSPNet: pretrained='torchvision' is for images of 3 channels, got in_channels={choices['in_channels']}"
        )
    if layers == 269 or choices["stem"] != "plain" or choices["stride_in"] != "conv2":
        raise ValueError(
            "PSPNet: pretrained='torchvision' needs stem='plain', stride_in='conv2' and layers other than 269, "
            f"got {choices['stem']!r}, {choices['stride_in']!r} and {layers}"
        )
    try:
        models = importlib.import_module("torchvision.models")
    except ImportError as error:
        raise ImportError(
            "PSPNet: pretrained='torchvision' needs torchvision: pip install torchvision (the one made for this "
            "torch), or give the path of a checkpoint"
        ) from error
    weights: Mapping[str, torch.Tensor] = models.get_model(f"resnet{layers}", weights="DEFAULT").state_dict()
    return weights
