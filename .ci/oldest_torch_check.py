"""Compile the extension's CUDA files against the headers of the oldest torch supported, and look up what they import there.

    python .ci/oldest_torch_check.py FOLDER      a folder with torch-2.11.0-*.whl, as `make oldest-torch-check` fetches it

Fails where a file does not compile, or needs a function that none of that torch's libraries has.
"""

import subprocess
import sys
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = [f"torch/lib/lib{name}.so" for name in ("torch", "torch_cpu", "torch_cuda", "c10")]
TORCH = ("torch_", "aoti_torch_")  # how the functions of the stable ABI are called


def symbols(options: list[str], path: Path) -> set[str]:
    lines = subprocess.run(["nm", *options, path], check=True, capture_output=True, text=True).stdout.splitlines()
    return {line.split()[-1].split("@")[0] for line in lines if line.strip()}


def main() -> None:
    (wheel,) = Path(sys.argv[1]).glob("torch-*.whl")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(
                folder, [n for n in archive.namelist() if n.startswith("torch/include/") or n in LIBRARIES]
            )

        def compile_one(source: Path) -> Path:
            to = folder / f"{source.stem}.o"
            flags = ["-std=c++20", "-O1", "-arch=sm_90", "-Xcompiler", "-fPIC", "-DUSE_CUDA"]
            flags += ["-DTORCH_TARGET_VERSION=0x020b000000000000", '-DPSPNET_FAST_CUDA_ARCHITECTURES="9.0"']
            flags += [f"-I{ROOT / 'csrc'}", f"-I{folder / 'torch' / 'include'}"]
            subprocess.run(["nvcc", *flags, "-c", source, "-o", to], check=True)
            return to

        with ThreadPoolExecutor(2) as pool:
            objects = [*pool.map(compile_one, sorted((ROOT / "csrc" / "cuda").glob("*.cu")))]
        imported = {name for path in objects for name in symbols(["-u"], path) if name.startswith(TORCH)}
        exported = {name for library in LIBRARIES for name in symbols(["-D", "--defined-only"], folder / library)}
    if missing := sorted(imported - exported):
        sys.exit(f"{wheel.name} has not: {', '.join(missing)}")
    print(
        f"{len(objects)} files compile against {wheel.name}, which has all {len(imported)} functions that they import"
    )


if __name__ == "__main__":
    main()
