import numpy as np
import pytest
import torch
from PIL import Image

import pspnet_fast
from pspnet_fast import PSPNet, cli

SMALL = ["--layers", "18", "--crop", "33", "--base-size", "40", "--dataset", "voc2012", "--device", "cpu"]


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, size in enumerate([(40, 30), (33, 50)]):
        noise = np.random.default_rng(i).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"p{i}.png")
    return folder


def predict(*arguments):
    return cli.main(["predict", *map(str, arguments), *SMALL])


def test_predict_a_folder(pictures, tmp_path, capsys):
    torch.save(PSPNet(layers=18, classes=21).state_dict(), tmp_path / "net.pth")
    assert predict(pictures, "--weights", tmp_path / "net.pth", "--output", tmp_path / "out", "--flip") == 0
    assert "2 of 2 pictures predicted" in capsys.readouterr().out
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert made == {f"p{i}_{kind}.png" for i in range(2) for kind in ("labels", "colour", "overlay")}
    with Image.open(tmp_path / "out" / "p0_labels.png") as labels:
        assert labels.mode == "L"
        assert labels.size == (40, 30)
        assert np.asarray(labels).max() < 21


def test_a_corrupt_picture_is_named_and_the_rest_goes_on(pictures, tmp_path, capsys):
    (pictures / "bad.png").write_bytes(b"\x89PNG no more")
    assert predict(pictures, "--random-weights", "--output", tmp_path / "out") == 1
    said = capsys.readouterr()
    assert "bad.png" in said.err
    assert "untrained" in said.err
    assert "2 of 3 pictures predicted" in said.out
    assert len(list((tmp_path / "out").iterdir())) == 6


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{pictures}/p0.png", "--weights", "{tmp}/absent.pth"], "absent.pth"),
        (["{tmp}/empty", "--random-weights"], "holds no picture"),
        (["{pictures}/p0.png", "{tmp}/twin/p0.png", "--random-weights"], "both would be written to"),
        (["{pictures}/p0.png", "--random-weights", "--output", "{pictures}/p1.png"], "p1.png"),
        (["{pictures}/p0.png", "{pictures}/p0_labels.png", "--random-weights", "--output", "{pictures}"], "overwrite"),
        (["{pictures}/p0.png", "--random-weights", "--scales", "0"], "--scales must be positive"),
        (["{pictures}/p0.png", "--random-weights", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["{pictures}/p0.png", "--random-weights", "--output", "/proc/self"], "/proc/self: cannot be written into"),
    ],
)
def test_what_cannot_start(pictures, tmp_path, capsys, arguments, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "twin").mkdir()
    arguments = [argument.format(pictures=pictures, tmp=tmp_path) for argument in arguments]
    if "--output" not in arguments:
        arguments += ["--output", tmp_path / "out"]
    assert predict(*arguments) == 2
    assert words in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.png"))


@pytest.mark.parametrize("device", ["nowhere", "cuda:99" if torch.cuda.is_available() else "cuda"])
def test_a_device_that_is_not_there(pictures, tmp_path, capsys, device):
    arguments = ["--random-weights", "--layers", "18", "--device", device, "--output", str(tmp_path / "out")]
    assert cli.main(["predict", str(pictures), *arguments]) == 2
    assert capsys.readouterr().err.startswith("pspnet-fast predict: ")


def test_a_result_that_cannot_be_written_is_named_and_the_rest_goes_on(pictures, tmp_path, capsys):
    (tmp_path / "out" / "p0_labels.png").mkdir(parents=True)
    assert predict(pictures, "--random-weights", "--output", tmp_path / "out") == 1
    said = capsys.readouterr()
    assert "p0_labels.png: cannot be written" in said.err
    assert "1 of 2 pictures predicted" in said.out
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.endswith(".part")]


def test_random_weights_are_the_same_every_time(pictures, tmp_path):
    for name in ("a", "b"):
        assert predict(pictures / "p0.png", "--random-weights", "--output", tmp_path / name) == 0
    first, second = ((tmp_path / name / "p0_labels.png").read_bytes() for name in ("a", "b"))
    assert first == second


def test_weights_must_be_asked_for(pictures, capsys):
    with pytest.raises(SystemExit) as stop:
        predict(pictures)
    assert stop.value.code == 2
    assert "--weights" in capsys.readouterr().err


def test_version_and_help(capsys):
    for flag, words in (("--version", pspnet_fast.__version__), ("--help", "predict")):
        with pytest.raises(SystemExit) as stop:
            cli.main([flag])
        assert stop.value.code == 0
        assert words in capsys.readouterr().out


def test_doctor(capsys):
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert f"torch        {torch.__version__}" in said
    for line in ("pyramid_pool_forward", "pyramid_norm_statistics", "upsample_concat_backward", "  reference"):
        assert line in said
