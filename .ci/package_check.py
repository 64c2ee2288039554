"""Build the wheel and the sdist, build a wheel from the sdist, and look inside.

Both wheels must hold the package, its kernels, one extension for every Python from 3.10 on, and no top-level `kernels`.
"""

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def build(kind: str, source: Path, out: Path) -> Path:
    subprocess.run(
        [
            sys.executable,
            "-m",
            "build",
            "--no-isolation",
            "--skip-dependency-check",
            f"--{kind}",
            "--outdir",
            out,
            source,
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    (built,) = out.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return built


def names_in_wheel(wheel: Path) -> set[str]:
    assert wheel.name.split("-")[2:4] == ["cp310", "abi3"], f"{wheel.name} is not for cp310-abi3"
    return set(zipfile.ZipFile(wheel).namelist())


def main() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    expected = {f for f in tracked if f.startswith("pspnet_fast/")}
    expected |= {f"pspnet_fast/{f}" for f in tracked if f.startswith("kernels/")} | {"pspnet_fast/_C.abi3.so"}
    with tempfile.TemporaryDirectory() as scratch:
        clean, out = Path(scratch) / "clean", Path(scratch) / "out"
        subprocess.run(["git", "clone", "-q", ROOT, clean], check=True)
        archive = build("sdist", clean, out / "sdist")
        with tarfile.open(archive) as tar:
            tar.extractall(out, filter="data")
        unpacked = out / archive.name.removesuffix(".tar.gz")
        for wheel in (build("wheel", clean, out / "wheel"), build("wheel", unpacked, out / "again")):
            names = names_in_wheel(wheel)
            assert not (missing := expected - names), f"{wheel}: lacks {sorted(missing)}"
            strays = {n for n in names if not n.startswith(("pspnet_fast/", "pspnet_fast-"))}
            assert not strays, f"{wheel}: holds {sorted(strays)}"
            print(f"{wheel.parent.name}/{wheel.name}: {len(names)} files, as expected")


if __name__ == "__main__":
    main()
