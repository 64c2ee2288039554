"""Build the extension with its CUDA kernels for sm_80 and sm_90 and load it; neither a GPU nor a CUDA torch is needed.

Prints registers, spilled bytes and stack of every kernel, and fails where one does not compile, spills or has a stack frame
without a reason (`// Spills because ...` above the kernel), or where the library does not load.
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


def reasons() -> dict[str, str]:
    """Kernels that may spill, and why: the comment above them says so."""
    pattern = re.compile(r"// Spills because ((?:.*\n//)*.*)\n(?:.*\n){0,12}?.*?void (?:__launch_bounds__\(.*?\) )?(\w+_kernel)")
    found = {}
    for path in (ROOT / "csrc" / "cuda").iterdir():
        for why, kernel in pattern.findall(path.read_text()):
            found[kernel] = re.sub(r"\n//", "", why)
    return found


def main() -> None:
    table, excused = rows(build()), reasons()
    width = max(len(row.kernel) for row in table)
    print(f"{'kernel':{width}}  arch   registers  stack  spilled")
    failed = []
    for row in table:
        print(f"{row.kernel:{width}}  {row.arch}  {row.registers:9}  {row.stack:5}  {row.spilled:7}")
        if row.stack or row.spilled:
            reason = excused.get(row.kernel.split("<")[0])
            print(f"{'':{width}}  because {reason}" if reason else f"{'':{width}}  without a reason")
            failed += [] if reason else [row]
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
    print(f"\n{len(table)} compiled, {len(failed)} spill without a reason; {library.relative_to(ROOT)}: {loaded.stdout.strip()}")
    if loaded.returncode:
        sys.exit(f"{loaded.stderr}\ncuda-check: the library does not load, or lacks CUDA code")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
