"""The command line: `pspnet-fast predict`, `pspnet-fast doctor`."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Iterator, Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit status."""
    from . import __version__, predict

    parser = argparse.ArgumentParser(prog="pspnet-fast", description="PSPNet on fast kernels.")
    parser.add_argument("--version", action="version", version=f"pspnet_fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    predict.add_arguments(commands.add_parser("predict", help="label pictures"))
    commands.add_parser("doctor", help="print versions, hardware and backends, for a bug report")
    args = parser.parse_args(argv)
    if args.command == "doctor":
        print("\n".join(report()))
        return 0
    return predict.run(args)


def report() -> Iterator[str]:
    """What `pspnet-fast doctor` prints: versions, what was built, the hardware, and which backend each op would take."""
    from importlib import metadata

    import torch

    from . import __version__, backends

    def version(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "not installed"

    yield f"pspnet_fast  {__version__}"
    yield f"Python       {platform.python_version()} on {platform.platform()}"
    yield f"torch        {torch.__version__}, CUDA {torch.version.cuda or 'not compiled in'}"
    yield f"triton       {version('triton')}{', interpreted' if backends.interpreted() else ''}"
    yield f"numpy        {version('numpy')}"
    missing = backends.load_extension()
    if missing:
        yield f"extension    {missing}"
        capability = torch.backends.cpu.get_cpu_capability()
        yield f"CPU          {torch.get_num_threads()} threads, {capability}"
    else:
        native = torch.ops.pspnet_fast_native
        yield f"extension    built, CUDA code for {native.cuda_architectures() or 'no architecture'}"
        yield f"CPU          {torch.get_num_threads()} threads, kernels for {native.cpu_capability()}"
    devices = ["cpu"]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        yield (
            f"GPU {i}        {properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
            f"compute capability {properties.major}.{properties.minor}"
        )
        devices = ["cpu", "cuda"]
    for device in devices:
        yield f"\nOps on float32 {device} tensors"
        for op in backends.ops():
            yield backends.describe(op, torch.empty(1, 1, 1, 1, device=device))


if __name__ == "__main__":
    sys.exit(main())
