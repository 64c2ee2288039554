"""`import peers` in the tests of this folder, which pytest imports by their path and without it."""

import importlib.util
import sys
from pathlib import Path

if "peers" not in sys.modules:
    spec = importlib.util.spec_from_file_location("peers", Path(__file__).with_name("peers.py"))
    sys.modules["peers"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["peers"])
