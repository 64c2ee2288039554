"""The command line of `make demo`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..data.picture import draw_street
from ..predict import make_folder
from ..terminal import say
from . import compare, learn


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demonstration; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m pspnet_fast.demo", description=__doc__)
    parser.add_argument(
        "--image", type=Path, help="a picture of yours to compare on, instead of one that the project draws"
    )
    parser.add_argument("--layers", type=int, default=50, help="depth of the ResNet that is timed (default 50)")
    parser.add_argument("--crop", type=int, default=473, help="side of its input in pixels (default 473)")
    parser.add_argument("--repeats", type=int, default=4, help="how often each stage is timed (default 4)")
    parser.add_argument("--scenes", type=int, default=600, help="how many are drawn to learn from (default 600)")
    parser.add_argument("--iterations", type=int, help="of the training, instead of the recipe's")
    parser.add_argument("--output", type=Path, default=Path("build/demo"), metavar="DIR", help="default: build/demo")
    args = parser.parse_args(argv)
    try:
        for name in ("repeats", "crop", "scenes", "iterations"):
            value = getattr(args, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")
        make_folder(args.output)
        picture = args.image or args.output / "street.png"
        if args.image is None:
            draw_street().save(picture)
        print("1. A small PSPNet learns\n")
        learn.learn(args.output, args.scenes, args.iterations)
        print("\n2. PSPNet in plain PyTorch and on the kernels\n")
        compare.show(picture, args.layers, args.crop, args.repeats)
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        say(f"pspnet_fast.demo: {error}", sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
