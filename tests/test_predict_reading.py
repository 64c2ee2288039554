"""What `predict` makes of odd files: each is one line, and the rest is done."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from pspnet_fast.cli import main
from pspnet_fast.data.classes import Classes
from pspnet_fast.data.datasets import read_image
from pspnet_fast.predict import PictureError, Protocol, pictures_of, predict_files, read_picture

TWO = Classes(("a", "b"), ((0, 0, 0), (255, 255, 255)))
WHOLE = Protocol(crop=None, base_size=None)


class Bright(torch.nn.Module):
    """Class 1 where red is above the mean."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        return torch.cat([-x[:, :1], x[:, :1]], 1) * self.weight


def picture(size=(6, 9)):
    return np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)


def test_odd_files_are_one_error_each_and_the_rest_is_done(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "good.png")
    (tmp_path / "eps.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    os.mkfifo(tmp_path / "pipe.png")
    Image.fromarray(np.full((4, 4), 200, np.int32)).save(tmp_path / "deep.tif")
    Image.fromarray(np.full((4, 4), 4000, np.uint16)).save(tmp_path / "twelve.png")
    names = ("eps.png", "pipe.png", "deep.tif", "twelve.png", "absent.png", "good.png")
    failed = predict_files(Bright().eval(), [tmp_path / name for name in names], tmp_path, TWO, WHOLE)
    assert all(isinstance(error, PictureError) for error in failed)
    words = ("got EPS", "ordinary file", "no known range", "below 4096", "no such file")
    assert len(failed) == len(words)
    for name, error, some in zip(names, failed, words, strict=False):
        assert name in str(error)
        assert some in str(error)
    assert (tmp_path / "good_labels.png").exists()


def test_training_and_prediction_read_the_same_file_alike(tmp_path):
    """A telephone's JPEG with a film behind it, read by both; cut short, by none."""
    Image.fromarray(picture((40, 30))).save(tmp_path / "a.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(whole + b"\0\0\0\x18ftypmp42" + bytes(range(256)) * 9)
    assert (np.asarray(read_picture(tmp_path / "a.jpg")) == read_image(tmp_path / "a.jpg")).all()
    (tmp_path / "a.jpg").write_bytes(whole[:-300] + whole[:300])
    for reader in (read_picture, read_image):
        with pytest.raises(ValueError, match=r"a\.jpg: cannot be read as a picture: the JPEG"):
            reader(tmp_path / "a.jpg")


def test_max_pixels(tmp_path, capsys):
    Image.fromarray(picture((8, 9))).save(tmp_path / "a.png")
    Image.fromarray(picture((8, 8))).save(tmp_path / "b.png")
    arguments = ["predict", str(tmp_path / "a.png"), str(tmp_path / "b.png"), "--output", str(tmp_path / "out")]
    arguments += ["--random-weights", "--layers", "18", "--whole", "--device", "cpu"]
    assert main([*arguments, "--max-pixels", "64"]) == 1
    captured = capsys.readouterr()
    assert "a.png: cannot be read as a picture: must have at most 64 pixels (max_pixels), got 9x8" in captured.err
    assert "1 of 2 pictures predicted" in captured.out
    assert main([*arguments, "--max-pixels", "0"]) == 2
    assert "--max-pixels must be at least 1, got 0" in capsys.readouterr().err


def test_a_folders_pictures_in_capitals_without_hidden_ones(tmp_path):
    for name in ("a.JPG", "b.jpeg", "c.PNG", "d.txt", "._a.JPG"):
        (tmp_path / name).touch()
    assert [path.name for path in pictures_of([tmp_path], tmp_path / "out")] == ["a.JPG", "b.jpeg", "c.PNG"]
    assert pictures_of([tmp_path / "._a.JPG"], tmp_path / "out") == [tmp_path / "._a.JPG"]
