"""What benchmarks/device.sh measures on a GPU: ops, the PPM and the head, against PyTorch and against a copy of as many bytes.

    python benchmarks/device.py ops --output ops.json
    python benchmarks/device.py ppm --output ppm.json
    python benchmarks/device.py report --output FOLDER      a Markdown table of both
    python benchmarks/device.py sanitize                    every kernel once, on small tensors, for compute-sanitizer

Times are medians of CUDA events, in microseconds. *Cold*: each call finds other tensors than the one before, more than three
times the L2 cache in all. *Warm*: the same ones. *Graph*: a replayed CUDA graph of many calls, per call. No time is given of
a provider that misses the accuracy rule on the very tensors that are timed.

Past 300 lines, because what is measured, how, and its report belong to one command that runs on a machine without the rest.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from workloads import BINS, FORMATS, WORKLOADS, Workload, seed_of

import pspnet_fast
from pspnet_fast import PPM, PSPHead, testing, use_backend
from pspnet_fast.functional import (
    pyramid_conv2d,
    pyramid_norm,
    pyramid_pool,
    pyramid_project,
    upsample_argmax,
    upsample_concat,
    upsample_cross_entropy,
    upsample_softmax_add,
)
from pspnet_fast.nn.plain_ppm import PlainPPM

OURS = ("triton", "cuda")
KIND = ("work", "workload", "format")  # rows that agree in these are compared
CALLS = 40  # of each kind that are timed
CLASSES = 150


class Case(NamedTuple):
    """One piece of work on one set of tensors.

    `ours` and `plain` take the tensors. With a cotangent the work has a backward pass, to all of them.
    """

    work: str
    workload: str
    memory_format: str
    ours: Callable[..., torch.Tensor]
    plain: Callable[..., torch.Tensor]
    tensors: list[torch.Tensor]
    ops: tuple[str, ...]
    moved: int  # bytes that must move
    cotangent: torch.Tensor | None = None
    floor: Callable[..., Any] | None = None


def dense(shape: Sequence[int], memory_format: str, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(dtype).contiguous(memory_format=FORMATS[memory_format])


def op_cases(name: str, workload: Workload, memory_format: str) -> Iterator[Case]:
    n, c, h, w, r, _ = workload
    cells, levels = sum(b * b for b in BINS), len(BINS)
    x = dense((n, c, h, w), memory_format)
    case = functools.partial(Case, workload=name, memory_format=memory_format)
    pooled, reduced = (torch.randn(n, cells, k, device="cuda").bfloat16() for k in (c, r))
    written = x.nbytes * (c + levels * r) // c

    yield case(
        "pyramid_pool forward",
        ours=lambda x: pyramid_pool(x, BINS),
        plain=lambda x: testing.plain_pyramid_pool(x, BINS),
        tensors=[x],
        ops=("pyramid_pool",),
        moved=x.nbytes,
    )
    yield case(
        "pyramid_pool forward + backward",
        ours=lambda x: pyramid_pool(x, BINS),
        plain=lambda x: testing.plain_pyramid_pool(x, BINS),
        tensors=[x],
        ops=("pyramid_pool",),
        moved=2 * x.nbytes,
        cotangent=pooled,
    )
    yield case(
        "upsample_concat forward",
        ours=lambda x, p: upsample_concat(x, p, BINS),
        plain=lambda x, p: testing.plain_upsample_concat(x, p, BINS),
        tensors=[x, reduced],
        ops=("upsample_concat",),
        moved=x.nbytes + written,
    )
    yield case(
        "upsample_concat forward + backward, levels alone",
        # The gate asks for a few images alone.
        ours=lambda p: upsample_concat(x[: p.shape[0]], p, BINS, order=range(levels)),
        plain=lambda p: testing.plain_upsample_concat(x[: p.shape[0]].to(p.dtype), p, BINS, order=range(levels)),
        tensors=[reduced],
        ops=("upsample_concat",),
        moved=2 * (written - x.nbytes),
        cotangent=dense((n, levels * r, h, w), memory_format),
    )
    yield from _head_and_loss_cases(case, workload, memory_format, reduced)
    if memory_format == "nchw":  # packed pyramids have but one format
        weights = [(torch.randn(r, c, device="cuda") / c**0.5).bfloat16() for _ in BINS]
        products = {
            "ours": lambda p, *weight: pyramid_project(p, weight, BINS, relu=False),
            "plain": lambda p, *weight: testing.plain_pyramid_project(p, *weight, bins=BINS, relu=False),
            "tensors": [pooled, *weights],
            "ops": ("pyramid_project",),
        }
        weight_bytes = sum(weight.nbytes for weight in weights)
        forward = weight_bytes + pooled.nbytes + reduced.nbytes
        yield case("pyramid_project forward", **products, moved=forward)
        yield case("pyramid_project forward + backward", **products, moved=3 * forward, cotangent=reduced)
        if n > 1:
            weight, bias = torch.rand(2, levels, r, device="cuda").bfloat16().float() + 0.5
            yield case(
                "pyramid_norm forward + backward",
                ours=lambda y: pyramid_norm(y, BINS, weight=weight, bias=bias, training=True, relu=False),
                plain=lambda y: testing.plain_pyramid_norm(y, weight.to(y.dtype), bias.to(y.dtype), BINS, relu=False),
                tensors=[reduced],
                ops=("pyramid_norm",),
                moved=5 * reduced.nbytes,
                cotangent=torch.randn_like(reduced),
            )


def _head_and_loss_cases(
    case: Callable[..., Case], workload: Workload, memory_format: str, reduced: torch.Tensor
) -> Iterator[Case]:
    n, c, h, w, r, _ = workload
    weight = dense((c // 4, len(BINS) * r, 3, 3), memory_format) / (9 * len(BINS) * r) ** 0.5
    y = dense((n, c // 4, h, w), memory_format)
    yield case(
        "pyramid_conv2d forward + backward",
        ours=lambda p: pyramid_conv2d(p, weight, (h, w), BINS, memory_format=FORMATS[memory_format]),
        plain=lambda p: testing.plain_pyramid_conv2d(p, weight.to(p.dtype), (h, w), BINS),
        tensors=[reduced],
        ops=("pyramid_conv2d",),
        moved=3 * weight.nbytes + 2 * y.nbytes,
        cotangent=y,
    )
    logits, size = dense((n, CLASSES, h, w), memory_format), (8 * h - 7, 8 * w - 7)
    target = torch.randint(CLASSES, (n, *size), device="cuda")
    yield case(
        "upsample_cross_entropy forward + backward",
        ours=lambda x: upsample_cross_entropy(x, target[: len(x)]),
        plain=lambda x: testing.plain_upsample_cross_entropy(x, target[: len(x)]),
        tensors=[logits],
        ops=("upsample_cross_entropy",),
        moved=2 * logits.nbytes + target.nbytes,
        cotangent=torch.ones((), device="cuda"),
    )
    yield case(
        "upsample_argmax labels and confidence",
        ours=lambda x: upsample_argmax(x, size, confidence=True)[1],
        plain=lambda x: testing.plain_upsample_argmax(x, size)[1],
        tensors=[logits],
        ops=("upsample_argmax",),
        moved=logits.nbytes + 5 * n * size[0] * size[1],
    )


def ppm_cases(name: str, workload: Workload, memory_format: str) -> Iterator[Case]:
    n, c, h, w, r, _ = workload
    x = dense((n, c, h, w), memory_format)
    for training in (False, True):
        if training and n == 1:
            continue  # bin 1's batch norm would see one value per channel
        plain = PlainPPM(c, r, BINS).cuda().bfloat16().train(training)
        ours = PPM(c, r, BINS).cuda().bfloat16().train(training)
        for level in plain.features:
            torch.nn.init.uniform_(level[2].running_var, 0.001, 0.01)
        testing.clear_of_kinks(plain, x[:2])  # the images that the gate compares
        ours.load_state_dict(plain.state_dict())
        wide = copy.deepcopy(plain).double()
        yield Case(
            "PPM training step" if training else "PPM evaluation",
            name,
            memory_format,
            ours,
            # The accuracy rule asks for float64, too.
            lambda x, plain=plain, wide=wide: (wide if x.dtype == torch.float64 else plain)(x),
            [x],
            ("pyramid_pool", "pyramid_project", "pyramid_norm", "upsample_concat"),
            (6 if training else 3) * x.nbytes,
            dense((n, c + len(BINS) * r, h, w), memory_format) if training else None,
            plain,
        )
        yield _head_case(name, workload, memory_format, x, training)


def _head_case(name: str, workload: Workload, memory_format: str, x: torch.Tensor, training: bool) -> Case:
    """PPM, bottleneck and batch norm; at evaluation the ReLU, too, whose kink no gate on gradients would forgive."""
    n, c, h, w, r, _ = workload
    ours = PSPHead(c, r, c // 4, CLASSES, BINS)
    ours.cls = ours.cls[:3]
    if training:
        ours.cls[2] = torch.nn.Identity()
    for norm in (m for m in ours.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        torch.nn.init.uniform_(norm.running_var, 0.001, 0.01)
    plain = torch.nn.Sequential(PlainPPM(c, r, BINS), copy.deepcopy(ours.cls))
    layout = FORMATS[memory_format]
    ours, plain = (m.cuda().bfloat16().to(memory_format=layout).train(training) for m in (ours, plain))
    testing.clear_of_kinks(plain[0], x[:2])
    ours.ppm.load_state_dict(plain[0].state_dict())
    wide = copy.deepcopy(plain).double()
    weight = sum(p.nbytes for p in ours.parameters())
    return Case(
        "head training step" if training else "head evaluation",
        name,
        memory_format,
        ours,
        lambda x: (wide if x.dtype == torch.float64 else plain)(x),
        [x],
        ("pyramid_pool", "pyramid_project", "pyramid_norm", "pyramid_conv2d"),
        (3 if training else 1) * (x.nbytes * 5 // 4 + weight),
        dense((n, c // 4, h, w), memory_format) if training else None,
        plain,
    )


def call(function: Callable[..., torch.Tensor], tensors: list[torch.Tensor], cotangent: torch.Tensor | None) -> Any:
    if cotangent is None:
        with torch.no_grad():
            return function(*tensors)
    leaves = [t.detach().requires_grad_() for t in tensors]
    parameters = [p for p in getattr(function, "parameters", list)() if p.requires_grad]
    return torch.autograd.grad(function(*leaves), [*leaves, *parameters], cotangent)


def sets_of(case: Case) -> list[tuple[list[torch.Tensor], torch.Tensor | None]]:
    """As many copies of the tensors as are three times the L2 cache, at least two."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    size = sum(t.nbytes for t in case.tensors) + (0 if case.cotangent is None else case.cotangent.nbytes)
    count = min(max(2, -(-3 * cache // size)), 64)
    return [
        ([t.clone() for t in case.tensors], None if case.cotangent is None else case.cotangent.clone())
        for _ in range(count)
    ]


def by_events(run: Callable[[int], Any], calls: int = CALLS) -> list[float]:
    """Microseconds of every call, the host far ahead."""
    for i in range(3):
        run(i)
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    torch.cuda._sleep(2_000_000)
    for i, (start, end) in enumerate(pairs):
        start.record()
        run(i)
        end.record()
    torch.cuda.synchronize()
    return [1e3 * start.elapsed_time(end) for start, end in pairs]


def by_graph(run: Callable[[int], Any], calls: int = 20) -> float | None:
    """Microseconds a call of a replayed graph of `calls` calls; None with what cannot be captured."""
    side = torch.cuda.Stream()
    try:
        with torch.cuda.stream(side):
            run(0)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            for i in range(calls):
                run(i)
    except RuntimeError as error:
        print(f"    no graph: {str(error).splitlines()[0]}")
        torch.cuda.synchronize()
        return None
    return statistics.median(by_events(lambda _: graph.replay(), 15)) / calls


def providers(case: Case, compiled: bool) -> Iterator[tuple[str, str | None, Callable[..., torch.Tensor]]]:
    """Name, backend of ours, function: eager and ours, or what takes long to compile.

    max-autotune is without its own CUDA graphs: everybody's calls are replayed from graphs here.
    """
    plain = case.floor or case.plain
    if not compiled:
        yield "eager", None, plain
        for backend in OURS:
            yield backend, backend, case.ours
        return
    yield "autocast", None, _under_autocast(plain)
    for mode in ("default", "max-autotune-no-cudagraphs"):
        torch.compiler.reset()
        yield f"compile {mode}", None, torch.compile(plain, fullgraph=True, mode=mode)


def _under_autocast(module: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The module's parameters in float32, as autocast has them."""
    wide = copy.deepcopy(module).float() if isinstance(module, torch.nn.Module) else module

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return wide(*tensors)

    return run


def gate(case: Case, function: Callable[..., torch.Tensor]) -> None:
    """The accuracy rule, against plain PyTorch in bfloat16 and in float64, a few images of the batch."""
    few = [t[:2] if t.dim() > 2 else t for t in case.tensors]
    cotangent = case.cotangent
    if cotangent is not None and cotangent.dim() > 0:
        cotangent = cotangent[:2]
    same = testing.evaluate(case.plain, few, cotangent)
    exact = testing.evaluate(case.plain, [t.double() for t in few], None if cotangent is None else cotangent.double())
    for i, parts in enumerate(zip(testing.evaluate(function, few, cotangent), same, exact, strict=True)):
        testing.assert_within(*parts, "value" if i == 0 else f"gradient {i - 1}")


def copy_rate(size: int) -> float:
    """Bytes a second of a copy that reads and writes `size` bytes together, cold."""
    count = max(2, -(-3 * torch.cuda.get_device_properties(0).L2_cache_size // size))
    buffers = [torch.randn(2, size // 8, device="cuda") for _ in range(min(count, 64))]
    times = by_events(lambda i: buffers[i % len(buffers)][0].copy_(buffers[i % len(buffers)][1]))
    return size / (statistics.median(times) / 1e6)


def measure(case: Case, compiled: bool) -> Iterator[dict[str, Any]]:
    rate = copy_rate(case.moved)
    sets = sets_of(case)
    for name, backend, function in providers(case, compiled):
        row: dict[str, Any] = dict(zip(KIND, (case.work, case.workload, case.memory_format), strict=True))
        row |= {"provider": name, "copy GB/s": rate / 1e9}
        started = time.perf_counter()
        try:
            with use_backend(backend):
                if backend:
                    if reason := next(filter(None, (testing.unavailable(op, backend) for op in case.ops)), None):
                        raise NotImplementedError(reason)
                    gate(case, function)

                def cold(i: int, function: Any = function) -> Any:
                    tensors, cotangent = sets[i % len(sets)]
                    return call(function, tensors, cotangent)

                cold(0)
                torch.cuda.synchronize()
                row["first call ms"] = 1e3 * (time.perf_counter() - started)
                row["peak MB"] = testing.peak_memory(lambda: cold(0), "cuda") / 1e6
                times = sorted(by_events(cold))
                row["cold us"] = statistics.median(times)
                row["p20 us"], row["p80 us"] = times[len(times) // 5], times[-len(times) // 5]
                row["warm us"] = statistics.median(by_events(lambda _: cold(0)))
                row["graph us"] = by_graph(cold)
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            torch.cuda.synchronize()
        best = min((row[key] for key in ("cold us", "graph us") if row.get(key)), default=None)
        if best:
            row["GB/s"] = case.moved / best / 1e3
            row["of copy"] = row["GB/s"] / row["copy GB/s"]
        print("   ", *(f"{key}={value:.4g}" if isinstance(value, float) else value for key, value in row.items()))
        yield row


def machine() -> str:
    properties = torch.cuda.get_device_properties(0)
    import triton

    return (
        f"{properties.name}, {properties.multi_processor_count} multiprocessors, {properties.total_memory / 2**30:.0f} GiB; "
        f"torch {torch.__version__}, triton {triton.__version__}, pspnet_fast {pspnet_fast.__version__}, "
        f"Python {platform.python_version()}"
    )


def run(section: str, output: Path) -> int:
    """Measure and write JSON after every row. The number of our rows that failed."""
    make, passes = {"ops": (op_cases, (False,)), "ppm": (ppm_cases, (False, True))}[section]
    names = ("ade20k_473", "ade20k_473_batch", *(["cityscapes_512x1024"] if section == "ppm" else []))
    rows: list[dict[str, Any]] = []
    print(machine())
    for compiled in passes:  # what takes long comes last: a round has little time
        for name in names:
            for memory_format in FORMATS:
                for i, case in enumerate(make(name, WORKLOADS[name], memory_format)):
                    for row in measure(case, compiled):
                        rows.append(row)
                        output.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1))
                    torch.cuda.empty_cache()
                    torch.manual_seed(seed_of(name, i))  # the next case's numbers, whatever measuring this one drew
    return sum("error" in row and row["provider"] in OURS for row in rows)


def report(folder: Path) -> None:
    """Markdown of what the sections left in a folder."""
    lines: list[str] = []
    for section in ("ops", "ppm"):
        path = folder / f"{section}.json"
        if not path.exists():
            lines.append(f"{section}: not measured\n")
            continue
        content = json.loads(path.read_text())
        lines += [f"## {section}", "", f"`benchmarks/device.sh {section}`, bfloat16. {content['machine']}", ""]
        keys = [*KIND, "provider", "cold us", "warm us", "graph us", "GB/s", "of copy", "peak MB"]
        lines += ["| " + " | ".join([*keys, "times eager"]) + " |", "|" + "---|" * (len(keys) + 1)]
        eager: dict[tuple[str, ...], float] = {}
        for row in sorted(content["rows"], key=lambda row: [row[key] for key in KIND]):
            kind = tuple(row[key] for key in KIND)
            if "error" in row:
                lines.append("| " + " | ".join([*kind, row["provider"], row["error"]]) + " |")
                continue
            if row["provider"] == "eager":
                eager[kind] = row["cold us"]
            ratio = eager[kind] / row["cold us"] if kind in eager else float("nan")
            values = [row.get(key) for key in keys]
            cells = [f"{v:.3g}" if isinstance(v, float) else "" if v is None else str(v) for v in values]
            lines.append("| " + " | ".join([*cells, f"{ratio:.2f}"]) + " |")
        lines.append("")
    (folder / "report.md").write_text("\n".join(lines))
    print("\n".join(lines))


def _sanitize_head(pyramid: torch.Tensor, size: tuple[int, int], memory_format: torch.memory_format) -> None:
    weight = torch.randn(11, len(BINS) * pyramid.shape[2], 3, 3, device=pyramid.device).to(pyramid.dtype)
    factors = torch.randn(2, 11, device=pyramid.device)
    out = pyramid_conv2d(pyramid, weight, size, BINS, memory_format=memory_format)
    pyramid_conv2d(pyramid, weight, size, BINS, out=out, scale=factors[0], shift=factors[1], relu=True)
    leaf = pyramid.detach().requires_grad_()
    pyramid_conv2d(leaf, weight, size, BINS, 0, False, out=out[:, :, 1:-1, 1:-1].clone()).float().sum().backward()


def _sanitize_logits(x: torch.Tensor) -> None:
    size, classes = (2 * x.shape[2] + 1, 7 * x.shape[3]), x.shape[1]
    target = torch.randint(classes, (len(x), *size), device=x.device)
    target[:, ::3] = 255
    upsample_cross_entropy(x, target, torch.rand(classes, device=x.device), label_smoothing=0.1).backward()
    upsample_cross_entropy(x, target.byte(), reduction="none", align_corners=False).sum().backward()
    upsample_argmax(x, size)
    upsample_argmax(x, size, align_corners=False, confidence=True)
    total = torch.zeros(classes, size[0], size[1], device=x.device)
    for flip in (False, True):
        upsample_softmax_add(total, x, [(3 * i - 2, 5 * i - 4) for i in range(len(x))], size, not flip, flip)


def sanitize() -> None:
    """Every CUDA kernel, forward and backward, once: small tensors, odd ones, every dtype and memory format."""
    where = testing.device("cuda")  # the CPU, where the kernels are emulated
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for memory_format in FORMATS.values():
            for n, c, h, w, r in ((2, 24, 12, 12, 8), (1, 19, 13, 9, 5), (2, 16, 61, 3, 16)):
                x = torch.randn(n, c, h, w, device=where).to(dtype).contiguous(memory_format=memory_format)
                x.requires_grad_()
                weights = [torch.randn(r, c, device=where).to(dtype).requires_grad_() for _ in BINS]
                with use_backend("cuda"):
                    pyramid, room = pyramid_pool(x, BINS, reserve=(0, len(BINS) * r))
                    y = pyramid_project(pyramid, weights, BINS, relu=n == 1)
                    y = pyramid_norm(y, BINS, training=True) if n > 1 else y
                    out = upsample_concat(room, y, BINS, in_place=True)
                    other = upsample_concat(x, y, BINS, align_corners=False, order=(0, 1, -1, 2, 3))
                    total = out.float().sum() + other.float().square().sum() + pyramid_pool(x, BINS).float().sum()
                    total.backward()
                    statistics_of_y = torch.zeros(2, len(BINS), r, device=where) + 1
                    pyramid_norm(y.detach().requires_grad_(), BINS, *statistics_of_y.clone()).sum().backward()
                    torch.ops.pspnet_fast.pyramid_norm_statistics(y.detach(), BINS)
                    _sanitize_head(y.detach(), (h, w), memory_format)
                    _sanitize_logits(x)
    print("every kernel ran")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=("ops", "ppm", "report", "sanitize"))
    parser.add_argument("--output", type=Path, default=Path("build/device"))
    args = parser.parse_args()
    if args.section == "report":
        report(args.output)
        return 0
    torch.manual_seed(0)
    if args.section == "sanitize":
        sanitize()
        return 0
    if not torch.cuda.is_available():
        print("device.py: torch finds no CUDA GPU here", file=sys.stderr)
        return 2
    return min(run(args.section, args.output), 100)


if __name__ == "__main__":
    sys.exit(main())
