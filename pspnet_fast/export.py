"""PSPNet for other runtimes: ONNX, torch.export and AOTInductor files that need neither this library nor its kernels.

`exportable` states the network in plain torch operators. Pooling and upsampling are products with the matrices that
`pooling_matrix` and `interpolation_matrix` give: constants where the size of the image is known, computed in the graph where
it is not, and exact either way, also for bins that do not divide the map, which ONNX has no operator for.
`pspnet-fast export` is its command line.

Past 300 lines, because the network, its files and their check are one promise: what was written is what was compared.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import io
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.nn.modules.batchnorm import _BatchNorm

from .checks import check_map_size
from .data import normalisation
from .extras import install
from .files import check_target, replacing
from .geometry import bin_end, bin_start
from .models.checkpoint import FORMAT
from .models.pspnet import PSPNet
from .nn.calls import why_call
from .nn.levels import NORMS
from .nn.plain_ppm import PlainPPM
from .nn.ppm import PPM
from .nn.psp_head import Head, beyond_the_factorised_form, check_head
from .terminal import say

Format = Literal["onnx", "pt2", "aoti"]
Output = Literal["logits", "labels"]
Runner = Callable[[torch.Tensor], torch.Tensor]

OPSET = 18
AXES = {0: "batch", 2: "height", 3: "width"}
TRACED_SIZE = (97, 129)
MOST_PIXELS = 1 << 13
"""Along a side of an exported network's images."""
TOLERANCE = 1e-4
"""How far a file's logits may be from the network's, in units of the largest logit where that is above 1."""


class ExportError(RuntimeError):
    """A file that does not compute what the network does, or not in standard operators. It has been removed."""


def pooling_matrix(length: int, bins: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(bins, length): the mean over every window of adaptive pooling (`geometry.bin_start`, `bin_end`) along an axis."""
    cell, pixel = torch.arange(bins, device=device)[:, None], torch.arange(length, device=device)
    start, end = cell * length // bins, ((cell + 1) * length + bins - 1) // bins
    inside = (pixel >= start) & (pixel < end)
    return inside.to(dtype) / (end - start).to(dtype)


def interpolation_matrix(
    pixels: torch.Tensor, length: int, cells: int, align_corners: bool, dtype: torch.dtype
) -> torch.Tensor:
    """(..., cells): the weight of every cell at given pixels of an axis of `length`, 0 at pixels outside it.

    The taps of `geometry.bilinear_tap`, as a hat around every cell in whole numbers: max(0, d - |position - cell * d|) / d for
    a pixel at position / d.
    """
    if align_corners:
        position, denominator = pixels * (cells - 1), torch.sym_max(length - 1, 1)
    else:
        position, denominator = (2 * pixels + 1) * cells - length, 2 * length
    position = position.clamp(0, (cells - 1) * denominator)
    cell = torch.arange(cells, device=pixels.device)
    hat = (denominator - (position[..., None] - cell * denominator).abs()).clamp(min=0)
    inside = (pixels >= 0) & (pixels < length)
    weights: torch.Tensor = (hat * inside[..., None]).to(dtype) / denominator
    return weights


class _Matrix(nn.Module):
    """A matrix that some lengths decide: a constant, rounded once from float64, or computed in the graph."""

    matrix: torch.Tensor | None

    def __init__(self, build: Callable[..., torch.Tensor], *lengths: int, like: torch.Tensor) -> None:
        super().__init__()
        self.build = build
        constant = build(*lengths, dtype=torch.float64, device=like.device).to(like.dtype) if lengths else None
        self.register_buffer("matrix", constant)

    def forward(self, x: torch.Tensor, *lengths: int) -> torch.Tensor:
        return self.build(*lengths, dtype=x.dtype, device=x.device) if self.matrix is None else self.matrix


class _AveragePools(nn.Module):
    """x (N, C, H, W) to every level's cells (N, C, b, b), in one pass over x."""

    def __init__(self, bins: Sequence[int], size: Sequence[int], like: torch.Tensor) -> None:
        super().__init__()
        self.bins = [*bins]
        self.rows = nn.ModuleList(_Matrix(self._of_rows(b), *size[:1], like=like) for b in bins)
        self.columns = _Matrix(self._of_columns, *size[1:], like=like)

    @staticmethod
    def _of_rows(bins: int) -> Callable[..., torch.Tensor]:
        def build(length: int, **of: Any) -> torch.Tensor:
            return pooling_matrix(length, bins, **of)

        return build

    def _of_columns(self, length: int, **of: Any) -> torch.Tensor:
        return torch.cat([pooling_matrix(length, b, **of) for b in self.bins]).T

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        narrow = (x @ self.columns(x, x.shape[3])).split(self.bins, -1)
        return [rows(x, x.shape[2]) @ part for rows, part in zip(self.rows, narrow, strict=True)]


class _MaximumPools(nn.Module):
    """The same with the maximum, of a map of known size: windows are slices."""

    def __init__(self, bins: Sequence[int], size: Sequence[int]) -> None:
        super().__init__()
        self.windows = [
            [[(bin_start(i, length, b), bin_end(i, length, b)) for i in range(b)] for length in size] for b in bins
        ]

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        pooled = []
        for rows, columns in self.windows:
            narrow = torch.stack([x[..., first:last].amax(-1) for first, last in columns], -1)
            pooled.append(torch.stack([narrow[:, :, first:last].amax(2) for first, last in rows], 2))
        return pooled


class _Upsample(nn.Module):
    """y (N, K, h, w) to (N, K, H, W), bilinear: rows y columns^T."""

    def __init__(self, align_corners: bool, size: Sequence[int], of: Sequence[int], like: torch.Tensor) -> None:
        super().__init__()
        self.align_corners = align_corners
        axes: list[tuple[int, ...]] = [*zip(size, of, strict=True)] or [(), ()]
        self.rows, self.columns = (_Matrix(self._build, *lengths, like=like) for lengths in axes)

    def _build(self, length: int, cells: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        pixels = torch.arange(length, device=device)
        return interpolation_matrix(pixels, length, cells, self.align_corners, dtype)

    def forward(self, y: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        rows, columns = (
            axis(y, length, cells)
            for axis, length, cells in zip((self.rows, self.columns), size, y.shape[2:], strict=True)
        )
        return cast(torch.Tensor, rows @ (y @ columns.T))


class _Concatenated(nn.Module):
    """The head as the paper draws it, up to the end of the bottleneck's convolution."""

    def __init__(
        self, conv: nn.Module, bins: Sequence[int], align_corners: bool, size: Sequence[int], like: torch.Tensor
    ) -> None:
        super().__init__()
        self.conv = conv
        self.upsample = nn.ModuleList(_Upsample(align_corners, size, [b, b][: len(size)], like) for b in bins)

    def forward(self, x: torch.Tensor, levels: Sequence[torch.Tensor]) -> torch.Tensor:
        size = x.shape[2:]
        maps = [upsample(level, size) for upsample, level in zip(self.upsample, levels, strict=True)]
        return cast(torch.Tensor, self.conv(torch.cat([x, *maps], 1)))


class _Factorised(nn.Module):
    """The same without the concatenation: conv(x), plus the levels' part from their cells (`ops/pyramid_conv2d.py`).

    With taps (dy, dx) and cells (i, j), along W for every level, row of cells and dy, then along H for all of them at once:

        z[n, o, (dy, i), (dx, j)] = sum over r of  weight[o, r, dy, dx] p[n, r, i, j]
        y[n, o] = conv(x)[n, o] + sum over levels of  U_h[H, (dy, i)] z[n, o] U_w[W, (dx, j)]^T

    A batch norm that follows is a factor of all weights and a bias, because no runtime would see it behind the sum.
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        norm: _BatchNorm | None,
        channels: int,
        bins: Sequence[int],
        align_corners: bool,
        size: Sequence[int],
    ) -> None:
        super().__init__()
        self.bins, self.align_corners = [*bins], align_corners
        self.kernel, self.padding = conv.kernel_size[0], cast("tuple[int, int]", conv.padding)[0]
        weight, bias = _folded(conv.weight.detach(), norm)
        of_x, of_levels = weight.split((channels, weight.shape[1] - channels), 1)
        self.register_buffer("weight", of_x.contiguous())
        self.register_buffer("bias", bias)
        for k, part in enumerate(of_levels.chunk(len(bins), 1)):
            self.register_buffer(f"taps{k}", part.permute(0, 2, 3, 1).flatten(0, 2).contiguous())
        self.rows = _Matrix(self._all_levels, *size[:1], like=weight)
        self.columns = nn.ModuleList(_Matrix(self._of_level(b), *size[1:], like=weight) for b in bins)

    def _taps(self, length: int, cells: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """(length of the result, taps * cells)."""
        result = length + 2 * self.padding - self.kernel + 1
        tap = torch.arange(self.kernel, device=device) - self.padding
        pixels = torch.arange(result, device=device)[:, None] + tap
        return interpolation_matrix(pixels, length, cells, self.align_corners, dtype).flatten(1)

    def _of_level(self, cells: int) -> Callable[..., torch.Tensor]:
        def build(length: int, **of: Any) -> torch.Tensor:
            return self._taps(length, cells, **of).T

        return build

    def _all_levels(self, length: int, **of: Any) -> torch.Tensor:
        return torch.cat([self._taps(length, b, **of) for b in self.bins], 1)

    def forward(self, x: torch.Tensor, levels: Sequence[torch.Tensor]) -> torch.Tensor:
        y = nn.functional.conv2d(x, self.weight, self.bias, padding=self.padding)  # type: ignore[arg-type]
        parts = []
        for k, (b, level, columns) in enumerate(zip(self.bins, levels, self.columns, strict=True)):
            z = self.get_buffer(f"taps{k}") @ level.flatten(2)
            z = z.unflatten(2, (b, b)).unflatten(1, (-1, self.kernel, self.kernel)).permute(0, 1, 2, 4, 3, 5)
            parts.append(z.flatten(4, 5).flatten(2, 3) @ columns(x, x.shape[3]))
        return y + cast(torch.Tensor, self.rows(x, x.shape[2]) @ torch.cat(parts, 2))


def _folded(weight: torch.Tensor, norm: _BatchNorm | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A convolution's weight and bias with the batch norm that follows it, in float64 until they are rounded."""
    if norm is None:
        return weight, None
    mean, var = (cast(torch.Tensor, each).double() for each in (norm.running_mean, norm.running_var))
    scale = (var + norm.eps).rsqrt()
    shift = torch.zeros_like(mean)
    if norm.affine:
        scale, shift = scale * norm.weight.detach(), norm.bias.detach().double()
    folded = weight.double() * scale[:, None, None, None]
    return folded.to(weight.dtype), (shift - mean * scale).to(weight.dtype)


class Exportable(nn.Module):
    """What `exportable` returns: image (N, in_channels, H, W) to logits (N, K, h, w), or labels (N, h, w) as `predict`."""

    def __init__(self, net: PSPNet, size: tuple[int, int] | None, head: Head, output: Output) -> None:
        super().__init__()
        net = _sharing_copy(net)
        cls, ppm = [*net.cls], net.ppm if net.use_ppm else None
        like = next(net.cls.parameters())
        self.zoom_factor, self.output, self.in_channels = net.zoom_factor, output, net.in_channels
        for name in ("ppm", "cls", "aux", "criterion"):
            setattr(net, name, None)
        self.trunk = net
        coarse: Sequence[int] = ()
        if size is not None:
            with torch.no_grad():
                coarse = net.features(like.new_zeros(1, net.in_channels, *size))[1].shape[2:]
        self.head: nn.Module | None = None
        if ppm is not None:
            maxima = _pools_maxima(ppm)
            self.pools = _MaximumPools(ppm.bins, coarse) if maxima else _AveragePools(ppm.bins, coarse, like)
            self.levels = nn.ModuleList(level[1:] for level in cast("list[nn.Sequential]", ppm.features))
            if head == "factorised":
                conv, norm = cast(nn.Conv2d, cls[0]), cast(_BatchNorm, cls[1])
                folds = type(norm) in NORMS and norm.running_mean is not None and not why_call(norm)
                channels = net.channels[1]
                self.head = _Factorised(conv, norm if folds else None, channels, ppm.bins, ppm.align_corners, coarse)
                cls = cls[2:] if folds else cls[1:]
            else:
                self.head = _Concatenated(cls[0], ppm.bins, ppm.align_corners, coarse, like)
                cls = cls[1:]
        self.tail = nn.Sequential(*cls)
        fine = () if size is None else self._size(size)
        self.upsample = (
            None if fine and tuple(fine) == tuple(coarse) else _Upsample(net.align_corners, fine, coarse, like)
        )

    def _size(self, size: Sequence[int]) -> list[int]:
        return [(length - 1) * self.zoom_factor // 8 + 1 for length in size]

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.trunk.features(image)[1]
        if self.head is not None:
            levels = [layers(cells) for layers, cells in zip(self.levels, self.pools(x), strict=True)]
            x = self.head(x, levels)
        logits: torch.Tensor = self.tail(x)
        if self.upsample is not None:
            logits = self.upsample(logits, self._size(image.shape[2:]))
        if self.output == "logits":
            return logits
        return logits.argmax(1).to(torch.uint8 if logits.shape[1] <= 256 else torch.int64)


def exportable(
    net: PSPNet, size: tuple[int, int] | None, head: Head = "factorised", output: Output = "logits"
) -> Exportable:
    """The network in plain torch operators, as `net.eval()` computes it.

    It shares the network's parameters and running statistics, but not those of a factorised bottleneck, which is cut into its
    parts and takes up the batch norm that follows it, as they are now.

    Args:
        net: the network; it is not changed.
        size: (H, W) of the images, or None for any: the matrices are then computed from each image's size.
        head: "factorised" never builds the concatenation, as `PSPHead`; "concat" is the head as the paper draws it.
        output: "logits", or "labels".

    Shapes:
        image (N, in_channels, H, W), normalised, to logits (N, K, h, w) of `PSPNet.forward`'s size, or labels (N, h, w),
        uint8 where K <= 256, else int64.

    Raises:
        TypeError: `net` is no PSPNet, or not in float32.
        ValueError: what cannot be exported, in a sentence: weights that are NaN or infinite, maximum pooling of any size,
            hooks, a factorised bottleneck that is no plain convolution.
    """
    if not isinstance(net, PSPNet):
        raise TypeError(f"export: net must be a PSPNet, got {type(net).__name__}")
    check_head("export", head)
    if output not in get_args(Output):
        raise ValueError(f"export: output must be 'logits' or 'labels', got {output!r}")
    if size is not None:
        size = check_map_size("export", size)
    if other := {parameter.dtype for parameter in net.parameters()} - {torch.float32}:
        raise TypeError(f"export: net must be in float32, got {', '.join(map(str, other))}: net.float() makes it so")
    if broken := [name for name, each in net.state_dict().items() if not each.isfinite().all()]:
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        raise ValueError(f"export: weights must be finite, got NaN or infinity in {', '.join(broken[:3])}{more}")
    if reason := _not_exportable(net, size, head):
        raise ValueError(f"export: {reason}")
    return Exportable(net, size, head, output).eval()


def _not_exportable(net: PSPNet, size: tuple[int, int] | None, head: Head) -> str | None:
    """Why the network cannot be stated, or None."""
    replaced = "forward" in net.__dict__ or type(net).forward is not PSPNet.forward
    if replaced or net._forward_hooks or net._forward_pre_hooks:
        return "net has hooks or a forward of its own, and would not be called"
    if not net.use_ppm:
        return None
    ppm, cls = cast(nn.Module, net.ppm), cast(nn.Module, net.cls)
    if type(ppm) not in (PPM, PlainPPM) or type(cls) is not nn.Sequential or len(cls) < 2:
        return f"ppm and cls must be as PSPNet makes them, got {type(ppm).__name__} and {type(cls).__name__}"
    for name, module in (("ppm", ppm), ("cls", cls)):
        if reason := why_call(module):
            return f"{name} {reason}, and would not be called"
    if _bins_of(ppm) != [*cast("Sequence[int]", ppm.bins)]:
        return "ppm must have the levels that it was made with: average or maximum pooling, convolution, norm and ReLU each"
    if size is None and _pools_maxima(ppm):
        return "pooling='max' needs a size: the windows of any size are no standard operators"
    reason = beyond_the_factorised_form(cls[0])
    if head == "factorised" and reason:
        return f"cls.0 cannot be factorised, {reason}: head must be 'concat'"
    return None


def _bins_of(ppm: nn.Module) -> list[int] | None:
    """Bins of the levels as the modules are now; None where they are no such levels any more."""
    if isinstance(ppm, PPM):
        read = ppm.read()
        return None if isinstance(read, str) else read[0]
    pools = [level[0] for level in cast("list[nn.Sequential]", ppm.features)]
    kinds = {type(pool) for pool in pools}
    if kinds not in ({nn.AdaptiveAvgPool2d}, {nn.AdaptiveMaxPool2d}):
        return None
    return [cast(int, pool.output_size) for pool in pools]


def _pools_maxima(ppm: nn.Module) -> bool:
    return type(cast("list[nn.Sequential]", ppm.features)[0][0]) is nn.AdaptiveMaxPool2d


def _sharing_copy(net: PSPNet) -> PSPNet:
    """The modules copied, in evaluation mode, and their tensors not."""
    return copy.deepcopy(net, {id(tensor): tensor for tensor in chain(net.parameters(), net.buffers())}).eval()


def export(
    net: PSPNet,
    path: str | os.PathLike[str],
    format: Format = "onnx",  # noqa: A002
    size: tuple[int, int] | None = None,
    dynamic: bool = False,
    head: Head = "factorised",
    output: Output = "logits",
    overwrite: bool = True,
) -> list[str]:
    """Write the network as a file that needs no pspnet_fast, after it was read back and compared with the network.

    The input is "image" (N, in_channels, H, W), normalised by the mean and standard deviation in the file's metadata; the
    output is "logits" or "labels" (see `exportable`). Logits agree to `TOLERANCE`, of the largest logit where that is above 1;
    a label is one whose logit is no further than twice that below the largest. The file appears under its name when all of
    this holds, not before.

    Args:
        net: the network, in float32 on the CPU; it is not changed.
        path: to write: .onnx for ONNX, .pt2 for the others.
        format: "onnx" (operators of the default domain, opset 18), "pt2" (`torch.export.load`) or "aoti" (AOTInductor's
            package of compiled code for processors like this one, `torch._inductor.aoti_load_package`).
        size: (H, W) of the images; the batch is then 1. With `dynamic`, only what it is traced and compared at.
        dynamic: whether any batch, H and W will do.
        head: see `exportable`.
        output: see `exportable`.
        overwrite: whether a file that is there may be replaced.

    Returns:
        Lines of a report: what was written, and what it was compared with. ONNX is compared where onnxruntime is installed;
        where it is not, a line says so.

    Raises:
        TypeError, ValueError: what `exportable` raises, another format or ending, no size.
        ExportError: the network cannot be traced, or the file does not compute what the network does.
        ImportError: ONNX, and its packages are not installed.
        OSError: the file cannot be written; what was there is untouched.
    """
    path = Path(path)
    size = _check_file(path, format, size, dynamic, overwrite)
    module = exportable(net, None if dynamic else size, head, output)
    if device := {tensor.device.type for tensor in module.state_dict().values()} - {"cpu"}:
        raise ValueError(f"export: net must be on the CPU, got {', '.join(device)}")
    onnx = _onnx() if format == "onnx" else None
    convolutions = [each for each in net.cls.modules() if isinstance(each, nn.Conv2d)]
    metadata = {
        "format": FORMAT,
        "version": version("pspnet_fast"),
        "classes": str(convolutions[-1].out_channels),
        "align_corners": json.dumps(net.align_corners),
    }
    if net.in_channels == 3:  # of other images nothing is known
        metadata["normalisation"] = normalisation.JSON
    with replacing(path) as temporary:
        program = _traced(module, size, dynamic)
        if onnx is not None:
            _write_onnx(onnx, program, temporary, output, metadata)
            run = _onnxruntime(temporary)
        elif format == "pt2":
            _write_pt2(program, temporary, metadata)
            run = torch.export.load(temporary).module()
        else:
            run = _compiled(program, temporary, metadata)
        shapes = [(1, *size)]
        if dynamic:  # 32 apart: a backbone may want multiples
            shapes += [(2, size[0] + 32, size[1] + 64), (1, *size[::-1])]
        lines = [] if run is None else _compared(net, run, shapes, output)
    axes = "any size" if dynamic else f"{size[0]}x{size[1]}"
    return [
        f"{path}: {format}, {output}, {axes}, {head} head",
        *(lines or ["not compared: onnxruntime is not installed"]),
    ]


def _check_file(
    path: Path,
    format: Format,  # noqa: A002
    size: tuple[int, int] | None,
    dynamic: bool,
    overwrite: bool,
) -> tuple[int, int]:
    """See that the file can be written, before the work. Returns the size that the network is traced at."""
    if format not in get_args(Format):
        raise ValueError(f"export: format must be one of {', '.join(get_args(Format))}, got {format!r}")
    suffix = ".onnx" if format == "onnx" else ".pt2"
    if path.suffix != suffix:
        raise ValueError(f"{path}: a file of format {format} must end in {suffix}")
    if size is None:
        if not dynamic:
            raise ValueError("export: size must be given, (H, W), unless dynamic, got None")
        size = TRACED_SIZE
    size = check_map_size("export", size)
    if max(size) > MOST_PIXELS:
        raise ValueError(f"export: size must be at most {MOST_PIXELS} along each side, got {size}")
    check_target(path, overwrite=overwrite)
    return size


def _write_pt2(program: ExportedProgram, path: Path, metadata: dict[str, str]) -> None:
    """By way of memory: where the disk is full, torch's writer ends the process."""
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={"metadata.json": json.dumps(metadata)})
    path.write_bytes(file.getbuffer())


def _traced(module: Exportable, size: tuple[int, int], dynamic: bool) -> ExportedProgram:
    """The module as a graph of torch's own operators, whose axes are as free as they were asked to be."""
    axes = (0, 2, 3) if dynamic else ()
    image = torch.rand(2 if dynamic else 1, module.in_channels, *size)
    try:
        with torch.no_grad():
            program = torch.export.export(
                module, (image,), dynamic_shapes={"image": dict.fromkeys(axes, torch.export.Dim.AUTO)}, strict=False
            )
    except RuntimeError as error:
        raise ExportError(f"export: torch.export cannot trace the network: {_first_line(error)}") from error
    for graph in program.graph_module.modules():
        for node in graph.graph.nodes if isinstance(graph, torch.fx.GraphModule) else ():
            if getattr(node.target, "namespace", "").startswith("pspnet_fast"):
                raise ExportError(f"export: the backbone must not call this library's ops, got {node.target}")
    shape = _image(program).shape
    if fixed := [name for axis, name in AXES.items() if axis in axes and isinstance(shape[axis], int)]:
        raise ExportError(
            f"export: dynamic needs a backbone that takes any size, and {', '.join(fixed)} came out fixed"
        )
    return program


def _image(program: ExportedProgram) -> torch.Tensor:
    """The input as it was traced, with symbols for its free axes."""
    name = program.graph_signature.user_inputs[0]
    node = next(node for node in program.graph.nodes if node.name == name)
    return cast(torch.Tensor, node.meta["val"])


def _onnx() -> Any:
    try:
        importlib.import_module("onnxscript")
        return importlib.import_module("onnx")
    except ImportError as error:
        raise ImportError(f"export: format 'onnx' needs onnx and onnxscript ({error}): {install('onnx')}") from error


def _write_onnx(onnx: Any, program: ExportedProgram, path: Path, output: Output, metadata: dict[str, str]) -> None:
    with _quiet():
        made = torch.onnx.export(
            program, (), dynamo=True, opset_version=OPSET, input_names=["image"], output_names=[output], verbose=False
        )
    model = cast(Any, made).model_proto
    nodes = [*model.graph.node, *chain.from_iterable(function.node for function in model.functions)]
    if foreign := {each.domain for each in (*nodes, *model.opset_import)} - {"", "ai.onnx"}:
        raise ExportError(f"export: only operators of ONNX's default domain may be used, got {sorted(foreign)}")
    symbols = {str(length): AXES[axis] for axis, length in enumerate(_image(program).shape) if axis in AXES}
    for value in chain(model.graph.input, model.graph.output, model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(r"\w+", lambda word: symbols.get(word[0], word[0]), dim.dim_param)
    onnx.helper.set_model_props(model, metadata)
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())


def _onnxruntime(path: Path) -> Runner | None:
    if find_spec("onnxruntime") is None:
        return None
    session = importlib.import_module("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda image: torch.from_numpy(session.run(None, {"image": image.numpy()})[0])


def _compiled(program: ExportedProgram, path: Path, metadata: dict[str, str]) -> Runner:
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    try:
        aoti_compile_and_package(program, package_path=str(path), inductor_configs={"aot_inductor.metadata": metadata})
    except RuntimeError as error:
        raise ExportError(f"export: AOTInductor cannot compile the network: {_first_line(error)}") from error
    return cast(Runner, aoti_load_package(str(path)))


def _compared(net: PSPNet, run: Runner, shapes: Sequence[Sequence[int]], output: Output) -> list[str]:
    """A line for every shape (N, H, W): how far the file's output is from the network's."""
    reference, generator, lines = _sharing_copy(net), torch.Generator().manual_seed(0), []
    for batch, height, width in shapes:
        image = torch.randn(batch, net.in_channels, height, width, generator=generator)
        with torch.no_grad():
            expected, got = reference(image), run(image)
        allowed, factor = TOLERANCE * max(1.0, float(expected.abs().max())), 1
        where = f"{batch}x{net.in_channels}x{height}x{width}"
        if output == "logits":
            distance, words = float((got - expected).abs().max()), "largest difference of a logit"
        else:
            chosen = expected.gather(1, got.long()[:, None])[:, 0]
            distance, words = (
                float((expected.amax(1) - chosen).max()),
                "largest distance of a label's logit from the best",
            )
            factor = 2
        if not distance <= factor * allowed:  # NaN, too
            # Where the network itself is less exact than that, the file may be as far from the truth, and as far again.
            with torch.no_grad():
                exact = copy.deepcopy(reference).double()(image.double())
            allowed = max(allowed, 3 * float((expected - exact).abs().max()))
        if not distance <= factor * allowed:
            raise ExportError(
                f"export: the file must agree with the network to {factor * allowed:.1e}, got {distance:.1e} at {where}"
            )
        lines.append(f"compared with the network at {where}: {words} {distance:.1e}")
    return lines


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's ONNX exporter says of packages that the network does not use, and of its own future."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("weights", type=Path, metavar="W", help="a snapshot of a training, or a checkpoint")
    parser.add_argument("out", type=Path, metavar="OUT", help="the file to write, .onnx or .pt2")
    parser.add_argument("--format", choices=get_args(Format), default="onnx", help="default onnx")
    parser.add_argument(
        "--size", type=int, nargs=2, metavar=("H", "W"), help=f"of the images, from 1 to {MOST_PIXELS} pixels each"
    )
    parser.add_argument("--dynamic", action="store_true", help="images of any size, in batches of any")
    parser.add_argument(
        "--head",
        choices=get_args(Head),
        default="factorised",
        help="factorised (default) computes the bottleneck with half the work; concat is as the paper draws it",
    )
    parser.add_argument("--output", choices=get_args(Output), default="logits", help="default logits")
    parser.add_argument(
        "--ema", action="store_true", help="the averages of the weights, where W has both (default the weights)"
    )
    parser.add_argument("--force", action="store_true", help="replace OUT where it is there")


def run(args: argparse.Namespace) -> int:
    """Exit status 0; 2 where nothing could be written."""
    try:
        from .checkpoints import load_checkpoint

        size = None if args.size is None else (args.size[0], args.size[1])
        _check_file(args.out, args.format, size, args.dynamic, args.force)
        check_target(args.out, sources=[args.weights], overwrite=args.force)
        net = load_checkpoint(args.weights, ema=args.ema)
        report = export(net, args.out, args.format, size, args.dynamic, args.head, args.output, args.force)
    except (ImportError, OSError, TypeError, ValueError, RuntimeError) as error:
        say(f"pspnet-fast export: {error}", sys.stderr)
        return 2
    say("\n".join(report))
    return 0
