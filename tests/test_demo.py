import numpy as np
import pytest
from PIL import Image

from pspnet_fast.demo.__main__ import main
from pspnet_fast.demo.learn import learn

pytest.importorskip("jsonargparse")
SMALL = ["--layers", "18", "--repeats", "1", "--crop", "65", "--scenes", "8", "--iterations", "3"]


def test_the_demo_learns_compares_and_writes_its_pictures(tmp_path, capsys):
    assert main([*SMALL, "--output", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "8 drawn scenes to learn from, 1 to be tested on, 11 classes" in said
    assert "mIoU on unseen scenes: 0." in said
    difference = float(said.split("largest difference of the logits")[1].split(",")[0])
    assert difference < 1e-3
    assert float(said.split("same label")[1].split("%")[0]) > 99
    assert "head (pyramid, bottleneck, classifier)" in said
    pictures = ["unseen.png", "street_overlay.png", "run/learning_curve.png", "evaluation/confusion.png"]
    assert all(str(tmp_path / name) in said for name in pictures[:3])
    for name in pictures:
        with Image.open(tmp_path / name) as picture:
            assert np.asarray(picture).std() > 1
    with Image.open(tmp_path / "street_labels.png") as labels:
        assert labels.size == (640, 480)
    assert (tmp_path / "run" / "best.pth").exists()


def test_a_second_demo_goes_on_with_what_the_first_learned(tmp_path, capsys):
    """Its folder holds a training, which is not begun again."""
    for _ in range(2):
        learn(tmp_path, 8, 3)
    first, second = (said for said in capsys.readouterr().out.split("drawn scenes to learn from")[1:])
    scores = [said.split("untrained, ")[1].split()[0] for said in (first, second)]
    assert scores[0] == scores[1]


def test_what_the_demo_cannot_read_is_named(tmp_path, capsys):
    assert main([*SMALL, "--image", str(tmp_path / "absent.jpg"), "--output", str(tmp_path)]) == 2
    assert "absent.jpg: no such file" in capsys.readouterr().err
    assert main([*SMALL, "--repeats", "0", "--output", str(tmp_path)]) == 2
    assert "--repeats must be at least 1, got 0" in capsys.readouterr().err
