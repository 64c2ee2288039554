"""zhanghang1989/PyTorch-Encoding: encoding/models/sseg/psp.py, fcn.py, backbone/resnet.py, nn/customize.py.

The pyramid is the first module of the head's sequence, so that the head's numbers are one more than ours. Older files have
the backbone's classifier, which never runs.
"""

from __future__ import annotations

from .family import Family
from .tramac import PRETRAINED, levels

ENCODING = Family(
    name="encoding",
    library="PyTorch-Encoding",
    rules=(
        *PRETRAINED,
        *levels("head.conv5.0"),
        *((f"head.conv5.{i + 1}", f"cls.{i}") for i in (0, 1, 4)),
        *((f"auxlayer.conv5.{i}", f"aux.{i}") for i in (0, 1, 4)),
    ),
    dropped=(r"^pretrained\.fc\.",),
)
