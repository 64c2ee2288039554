"""`import networks` in the tests of this folder, which pytest imports by their path and without it.

The networks are so narrow that a second thread costs time, and on a busy machine most of it.
"""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

if "networks" not in sys.modules:
    spec = importlib.util.spec_from_file_location("networks", Path(__file__).with_name("networks.py"))
    sys.modules["networks"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["networks"])


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
