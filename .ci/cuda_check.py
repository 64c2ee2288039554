"""Build the extension with its CUDA kernels for sm_80 and sm_90 and load it; neither a GPU nor a CUDA torch is needed.

Prints registers, stack and spilled bytes of every kernel, and fails where one does not compile, spills or keeps a stack,
where the compiler warns, or where the library does not load or lacks an op.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "cuda"


class Row(NamedTuple):
    kernel: str
    arch: str
    registers: int
    stack: int
    spilled: int


def build() -> str:
    shutil.rmtree(BUILD, ignore_errors=True)
    environment = {
        **os.environ,
        "PSPNET_FAST_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": "8.0;9.0",
        "NVCC_APPEND_FLAGS": "-Xptxas=-v",
    }
    command = [sys.executable, "setup.py", "build_ext", "--build-temp", BUILD / "temp", "--build-lib", BUILD / "lib"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{done.stdout}\n{done.stderr}\ncuda-check: the build failed")
    if warnings := [line for line in (done.stdout + done.stderr).splitlines() if ": warning" in line]:
        sys.exit("\n".join(warnings) + "\ncuda-check: the compiler warns")
    return done.stdout + done.stderr


def short(mangled: str) -> str:
    """`pyramid_norm_sums_kernel<float, 1, true>` of a kernel's full name."""
    full = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    full = re.sub(r"\(anonymous namespace\)::|pspnet_fast::cuda::|_GLOBAL__N__\w+::|__nv_|\(\w+\)(?=\w)", "", full)
    name = re.search(r"\w+_kernel(<.*>)?", full.split("(")[0])
    return name[0].replace("__half", "float16") if name else full


def rows(log: str) -> list[Row]:
    found = []
    for part in re.split(r"Compiling entry function '", log)[1:]:
        mangled, arch = re.match(r"(\S+)' for '(\w+)'", part).groups()
        stack, stores, loads = map(
            int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part).groups()
        )
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        found.append(Row(short(mangled), arch, registers, stack, stores + loads))
    return sorted(set(found))


def main() -> None:
    table = rows(build())
    width = max(len(row.kernel) for row in table)
    print(f"{'kernel':{width}}  arch   registers  stack  spilled")
    for row in table:
        print(f"{row.kernel:{width}}  {row.arch}  {row.registers:9}  {row.stack:5}  {row.spilled:7}")
    spilling = [row for row in table if row.stack or row.spilled]
    (library,) = (BUILD / "lib" / "pspnet_fast").glob("_C*.so")
    code = (
        "import sys, torch; torch.ops.load_library(sys.argv[1]); native = torch.ops.pspnet_fast_native;"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key;"
        "names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith('pspnet_fast_native::pyramid')"
        " or n.startswith('pspnet_fast_native::upsample')];"
        "missing = [n for n in names if not has(n, 'CUDA')]; print(*missing, sep='\\n');"
        "print(f'loads, with {len(names)} ops for', native.cuda_architectures()); sys.exit(bool(missing))"
    )
    loaded = subprocess.run([sys.executable, "-P", "-c", code, library], check=False, text=True, capture_output=True)
    print(f"\n{len(table)} compiled, {len(spilling)} spill or keep a stack")
    print(f"{library.relative_to(ROOT)}: {loaded.stdout.strip()}")
    if loaded.returncode:
        sys.exit(f"{loaded.stderr}\ncuda-check: the library does not load, or lacks CUDA code")
    sys.exit(bool(spilling))


if __name__ == "__main__":
    main()
