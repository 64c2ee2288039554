"""Compile every Triton kernel to machine code for sm_80 and sm_90, with the launchers' own tiles; no GPU is needed.

Prints registers, spilled bytes and shared memory of each, and fails where a kernel does not compile, spills without a
reason (`CompileCase.spills`), or has no entry in its file's COMPILE_CASES. A pattern as argument limits it to the kernels
whose names match.
"""

import contextlib
import importlib
import io
import multiprocessing
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

ARCHITECTURES = (80, 90)
KERNELS = Path(__file__).resolve().parents[1] / "kernels"


class Row(NamedTuple):
    kernel: str
    variant: str
    arch: int
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    reason: str = ""
    error: str = ""

    @property
    def failed(self):
        return bool(self.error) or (self.spilled > 0 and not self.reason)


def modules():
    names = sorted(path.stem for path in KERNELS.glob("*.py") if path.stem != "__init__")
    return [importlib.import_module(f"pspnet_fast.kernels.{name}") for name in names]


def cases():
    return [case for module in modules() for case in getattr(module, "COMPILE_CASES", ())]


def without_cases():
    """Kernels, `_..._kernel` by name, that no COMPILE_CASES names."""
    known = {case.kernel.fn for case in cases()}
    for module in modules():
        for name, value in vars(module).items():
            if isinstance(value, JITFunction) and re.fullmatch("_.*_kernel", name) and value.fn not in known:
                yield f"{module.__name__}.{name}"


def source(case):
    arguments = {name: case.signature.get(name, "constexpr") for name in case.kernel.arg_names}
    attributes = {}
    for position, (name, kind) in enumerate(arguments.items()):
        pointers = [(position, i) for i in range(len(kind))] if isinstance(kind, tuple) else [(position,)]
        if isinstance(kind, tuple) or kind.startswith("*") or name in case.divisible:
            attributes |= {path: [["tt.divisibility", 16]] for path in pointers}
    return ASTSource(fn=case.kernel, signature=arguments, constexprs=dict(case.constexprs), attrs=attributes)


def compile_one(task):
    index, arch = task
    case = cases()[index]
    row = Row(case.kernel.fn.__name__, case.variant, arch, reason=case.spills)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
            binary = triton.compile(source(case), target=GPUTarget("cuda", arch, 32), options=options)
    except Exception as error:
        return row._replace(error=f"{type(error).__name__}: {error}\n{printed.getvalue()}")
    log = printed.getvalue()
    return row._replace(
        registers=int(re.search(r"Used (\d+) registers", log)[1]),
        spilled=sum(map(int, re.findall(r"(\d+) bytes spill", log))),
        shared=binary.metadata.shared,
    )


def main():
    if triton.knobs.runtime.interpret:
        sys.exit("triton-check: TRITON_INTERPRET must not be set, nothing is compiled then")
    missing = [*without_cases()]
    pattern = sys.argv[1] if len(sys.argv) > 1 else ""
    chosen = [index for index, case in enumerate(cases()) if re.search(pattern, case.kernel.fn.__name__)]
    tasks = [(index, arch) for index in chosen for arch in ARCHITECTURES]
    with tempfile.TemporaryDirectory() as cache:
        triton.knobs.cache.dir = cache
        triton.knobs.nvidia.dump_ptxas_log = True
        with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
            rows = pool.map(compile_one, tasks, chunksize=1)
    width = max((len(row.kernel) for row in rows), default=6)
    print(f"triton {triton.__version__}")
    print(f"{'kernel':{width}}  arch  registers  spilled  shared  variant")
    for row in rows:
        numbers = "  does not compile        " if row.error else f"{row.registers:9}  {row.spilled:7}  {row.shared:6}"
        print(f"{row.kernel:{width}}  sm_{row.arch}{numbers}  {row.variant}")
        if row.spilled and row.reason:
            print(f"{'':{width}}  spills because {row.reason}")
    for row in rows:
        if row.error:
            print(f"\n{row.kernel} {row.variant} sm_{row.arch}: {row.error}")
    spilling = [row for row in rows if row.failed and not row.error]
    print(
        f"\n{len(rows)} compiled, {sum(bool(row.error) for row in rows)} failed, {len(spilling)} spill without a reason"
    )
    for name in missing:
        print(f"{name} has no entry in COMPILE_CASES")
    sys.exit(bool(missing) or any(row.failed for row in rows))


if __name__ == "__main__":
    main()
