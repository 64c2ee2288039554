"""`import making` in the tests of this folder, which pytest imports by their path and without it."""

import importlib.util
import logging
import sys
from pathlib import Path

import pytest

from pspnet_fast.data import images

if "making" not in sys.modules:
    spec = importlib.util.spec_from_file_location("making", Path(__file__).with_name("making.py"))
    sys.modules["making"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["making"])


@pytest.fixture(autouse=True)
def _said_again():
    images._say.cache_clear()


@pytest.fixture
def said(caplog):
    """The warnings until now."""
    caplog.set_level(logging.WARNING)
    return lambda: caplog.messages
