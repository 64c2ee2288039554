"""`python -m pytest` puts this folder on sys.path. Where the package is not built in place, take it off again.

The tests then see the installed package, whose `pspnet_fast.kernels` is this folder's `kernels/`.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent

if not any((ROOT / "pspnet_fast").glob("_C.*.so")):
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]
