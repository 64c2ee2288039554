"""What the network's input is normalised by: ImageNet's mean and standard deviation, of RGB from 0 to 255."""

import json

MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)

JSON = json.dumps({"mean": MEAN, "std": STD, "of": "RGB from 0 to 255"})
"""The same for the metadata of files."""
