"""Where there is no GPU, Triton kernels are interpreted and CUDA kernels emulated: said before either is loaded."""

import os
from pathlib import Path

import pytest
import torch

EMULATION = Path(__file__).parents[1] / "build" / "emulation" / "pspnet_fast_emulated.so"

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    if EMULATION.exists():
        os.environ.setdefault("PSPNET_FAST_CUDA_EMULATION", str(EMULATION))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
