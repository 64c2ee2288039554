"""Builds pspnet_fast._C, one extension on LibTorch's stable ABI. Everything else about the package is in pyproject.toml.

PSPNET_FAST_CUDA=1 compiles csrc/cuda, =0 leaves it out; unset, it is compiled where torch is a CUDA build and nvcc is
here. TORCH_CUDA_ARCH_LIST chooses the architectures: no GPU is needed, and none is looked for.
"""

from __future__ import annotations

import copy
import glob
import os
import platform
import shutil

from setuptools import setup

try:
    import torch
    from torch.utils import cpp_extension
except ModuleNotFoundError as error:
    raise SystemExit(
        "pspnet_fast is built against the torch you have. Install torch, setuptools and ninja first, then run\n"
        "    pip install --no-build-isolation .\nor run `make` in the repository."
    ) from error

STABLE_ABI = "0x020b000000000000"  # the oldest torch that the binary may meet: 2.11
CUDA_ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"
# Without the last two, gcc 12 warns of its own AVX-512 intrinsics.
CXX = ["-O3", "-g0", "-fvisibility=hidden", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
ISA = {  # by the end of the file's name
    "_avx2.cpp": ["-mavx2", "-mfma", "-mf16c", "-DPSPNET_FAST_AVX2"],
    "_avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c", "-DPSPNET_FAST_AVX512"],
}


def cuda_home() -> str | None:
    """The CUDA toolkit to build with. torch's own CUDA_HOME is None in a CPU torch, wrong where nvcc is a wrapper."""
    asked = os.environ.get("PSPNET_FAST_CUDA", "")
    if asked not in ("", "0", "1"):
        raise SystemExit(f"PSPNET_FAST_CUDA must be 0, 1 or unset, got {asked!r}")
    if asked == "0" or (not asked and torch.version.cuda is None):
        return None
    beside_nvcc = os.path.dirname(os.path.dirname(os.path.realpath(shutil.which("nvcc") or "")))
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), beside_nvcc, "/usr/local/cuda"):
        if home and all(os.path.exists(os.path.join(home, part)) for part in ("bin/nvcc", "include/cuda_runtime.h")):
            return home
    if asked:
        raise SystemExit("PSPNET_FAST_CUDA=1, but no CUDA toolkit with nvcc was found: set CUDA_HOME")
    return None


class BuildExtension(cpp_extension.BuildExtension):
    """torch's, with the flags of ISA for the files that end so."""

    def build_extension(self, extension) -> None:
        for suffix, flags in ISA.items():
            group = [source for source in extension.sources if source.endswith(suffix)]
            extension.sources = [source for source in extension.sources if source not in group]
            arguments = copy.deepcopy(extension.extra_compile_args)
            arguments["cxx"] += flags
            if group and platform.machine().lower() in ("x86_64", "amd64"):
                extension.extra_objects += self.compiler.compile(
                    group,
                    output_dir=self.build_temp,
                    macros=extension.define_macros,
                    include_dirs=extension.include_dirs,
                    extra_postargs=arguments,
                    depends=extension.depends,
                )
        super().build_extension(extension)


def extension() -> cpp_extension.CppExtension:
    # No path of this machine in the binary.
    folders = (os.getcwd(), os.path.join(os.path.dirname(torch.__file__), "include"))
    cxx = [*CXX, *(f"-fmacro-prefix-map={folder}/=" for folder in folders)]
    sources = ["csrc/library.cpp", *sorted(glob.glob("csrc/cpu/*.cpp"))]
    options = {
        "include_dirs": [os.path.abspath("csrc")],
        "define_macros": [("TORCH_TARGET_VERSION", STABLE_ABI)],
        "extra_compile_args": {"cxx": cxx},
        "depends": sorted(glob.glob("csrc/**/*.h", recursive=True)),
        "py_limited_api": True,
    }
    home, cuda_sources = cuda_home(), sorted(glob.glob("csrc/cuda/*.cu"))
    if home and cuda_sources:
        cpp_extension.CUDA_HOME = home  # where BuildExtension takes nvcc from
        architectures = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
        sources += cuda_sources
        options["define_macros"] += [("USE_CUDA", None), ("PSPNET_FAST_CUDA_ARCHITECTURES", f'"{architectures}"')]
        options["extra_compile_args"]["nvcc"] = ["-O3", "--threads", "2", "-Xcompiler", ",".join(cxx)]
        options["library_dirs"] = [os.path.join(home, "lib64")]
        options["libraries"] = ["cudart_static", "rt", "dl", "pthread"]
        # libtorch.so brings libtorch_cuda.so along in a CUDA torch, and only libtorch_cpu.so in a CPU torch.
        options["extra_link_args"] = ["-Wl,--no-as-needed", "-ltorch"]
    return cpp_extension.CppExtension("pspnet_fast._C", sources, **options)


setup(
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
