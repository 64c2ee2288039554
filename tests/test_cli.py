import dataclasses
import io
import json
import os
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import pspnet_fast
from pspnet_fast import PSPNet, cli
from pspnet_fast.config import Recipe, dataset_of, plain, protocol_of, recipe_of, trained_network
from pspnet_fast.data.classes import Classes
from pspnet_fast.data.scenes import SCENES
from pspnet_fast.evaluate import evaluate as evaluate_network

needs_parser = pytest.mark.skipif(find_spec("jsonargparse") is None, reason="jsonargparse is not installed")
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


def test_a_converted_checkpoint_takes_the_names_of_a_dataset(pictures, tmp_path, capsys):
    """Written by convert, it knows its network and no names; `--dataset` gives them, where the classes are as many."""
    pytest.importorskip("safetensors")
    torch.save({"state_dict": PSPNet(layers=18, width=4, classes=21).state_dict()}, tmp_path / "net.pth")
    assert cli.main(["convert", str(tmp_path / "net.pth"), str(tmp_path / "net.safetensors")]) == 0
    weights = ["--weights", tmp_path / "net.safetensors", "--output", tmp_path / "out"]
    assert predict(pictures / "p0.png", *weights) == 0
    assert cli.main(["predict", str(pictures / "p0.png"), *map(str, weights), "--dataset", "cityscapes"]) == 2
    assert "--dataset cityscapes has 19 classes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{pictures}/p0.png", "--weights", "{tmp}/absent.pth"], "absent.pth"),
        (["{tmp}/empty", "--random-weights"], "holds no picture"),
        (["{pictures}/p0.png", "{tmp}/twin/p0.png", "--random-weights"], "both would be written to"),
        (["{pictures}/p0.png", "--random-weights", "--output", "{pictures}/p1.png"], "p1.png"),
        (["{pictures}/p0.png", "{pictures}/p0_labels.png", "--random-weights", "--output", "{pictures}"], "overwrite"),
        (["{pictures}/p0.png", "--random-weights", "--scales", "0"], "--scales must be from 0.01 to 100"),
        (["{pictures}/p0.png", "--random-weights", "--batch-size", "0"], "--batch-size must be from 1 to 1024, got 0"),
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
    assert not [path for path in (tmp_path / "out").iterdir() if ".part" in path.name]


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


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Drawn by the command, and a snapshot as a training of it leaves one."""
    folder = tmp_path_factory.mktemp("data")
    assert cli.main(["scenes", str(folder / "scenes"), "--images", "4", "--seed", "3", "--size", "64", "48"]) == 0
    recipe = Recipe(dataset="scenes", layers=18, width=4, bins=(1, 2), crop=33, base_size=None)
    torch.save({"model": recipe.network().state_dict(), "recipe": plain(recipe)}, folder / "best.pth")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(plain(recipe)))
    return folder


def test_scenes(scenes, capsys):
    files = sorted(str(path.relative_to(scenes / "scenes")) for path in (scenes / "scenes").rglob("*.*"))
    assert len(files) == 2 * (4 + 1)
    assert files[0] == "annotations/training/scene_00000001.png"
    assert cli.main(["scenes", str(scenes / "scenes")]) == 2
    assert "scenes:" in capsys.readouterr().err
    assert cli.main(["scenes", str(scenes / "other"), "--images", "0"]) == 2
    assert "images must be from 1 to 1000000, got 0" in capsys.readouterr().err


def evaluate(scenes, *arguments):
    options = ["--data", str(scenes / "scenes"), "--device", "cpu"]
    return cli.main(["evaluate", str(scenes / "recipe.yaml"), *options, *map(str, arguments)])


@needs_parser
def test_evaluate(scenes, tmp_path, capsys):
    """The table, the file, the folder; the network is the snapshot's."""
    made = ["--output", tmp_path / "out", "--json", tmp_path / "scores.json", "--predictions"]
    assert (
        evaluate(scenes, "--weights", scenes / "best.pth", "--layers", "50", "--scales", "0.5", "1", "--flip", *made)
        == 0
    )
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "scores.json").read_text())
    assert f"mIoU {100 * found['mIoU']:6.2f}" in said
    assert (found["images"], found["protocol"]["scales"], found["protocol"]["flip"]) == (1, [0.5, 1.0], True)
    assert found["classes"][0] == "sky"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("confusion.png", "per_class.csv", "results.json", "worst", "predictions")
    }
    assert evaluate(scenes, "--weights", scenes / "best.pth", "--split", "train", "--images", "3", "--check-data") == 0
    assert "scenes train: 3 pictures" in capsys.readouterr().out


@needs_parser
def test_evaluate_agrees_with_the_function(scenes, tmp_path, capsys):
    recipe = recipe_of(yaml.safe_load((scenes / "recipe.yaml").read_text()))
    recipe = dataclasses.replace(recipe, data=scenes / "scenes")
    net, _ = trained_network(scenes / "best.pth", recipe)
    expected = evaluate_network(net, dataset_of(recipe, "val"), protocol_of(recipe), device="cpu")
    assert (
        evaluate(scenes, "--weights", scenes / "best.pth", "--json", tmp_path / "scores.json", "--no-channels-last")
        == 0
    )
    assert json.loads((tmp_path / "scores.json").read_text())["IoU"] == [*expected.scores.iou]


@needs_parser
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "weights"),
        (["--weights", "{tmp}/absent.pth"], "absent.pth"),
        (["--weights", "{scenes}/best.pth", "--dataset", "ade20k"], "has 11 classes (scenes), and ade20k 150"),
        (["--weights", "{scenes}/best.pth", "--data", "{tmp}"], "scenes: expected pictures in {tmp}/images/validation"),
        (["--weights", "{scenes}/best.pth", "--scale", "1"], "no option 'scale', did you mean 'scales'"),
        (["--weights", "{scenes}/recipe.yaml"], "cannot be read as a checkpoint"),
        (["--weights", "{scenes}/best.pth", "--device", "tpu"], "device must be cpu, cuda or cuda:1"),
    ],
)
def test_evaluate_refuses(scenes, tmp_path, capsys, arguments, words):
    places = {"tmp": tmp_path, "scenes": scenes}
    assert evaluate(scenes, *(argument.format(**places) for argument in arguments)) == 2
    said = capsys.readouterr().err
    assert "pspnet-fast evaluate: " in said
    assert words.format(**places) in said


@needs_parser
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--json", "{tmp}/nodir/x.json"], "x.json: cannot be written: there is no folder {tmp}/nodir"),
        (["--json", "{tmp}"], "{tmp}: is a folder, give the name of a file"),
        (["--json", "{scenes}/best.pth"], "best.pth: would overwrite a file that is read"),
        (["--json", "{scenes}/recipe.yaml"], "recipe.yaml: would overwrite a file that is read"),
        (["--output", "/proc/self"], "/proc/self: cannot be written into"),
        (["--windows", "100000"], "windows must be"),
        (["--scales", "1", "70", "--base-size", "512"], "scales times the base size must be at most 32768 pixels"),
    ],
)
def test_evaluate_says_before_the_work_what_cannot_be(scenes, tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.setattr("pspnet_fast.evaluate.predict_labels", lambda *_, **__: pytest.fail("pictures came first"))
    before = (scenes / "best.pth").read_bytes()
    places = {"tmp": tmp_path, "scenes": scenes}
    given = [argument.format(**places) for argument in arguments]
    assert evaluate(scenes, "--weights", scenes / "best.pth", *given) == 2
    said = capsys.readouterr()
    assert words.format(**places) in said.err
    assert said.out == ""
    assert (scenes / "best.pth").read_bytes() == before


@needs_parser
@pytest.mark.parametrize("full", ["out", "scores.json", "both"])
def test_evaluate_prints_what_it_cannot_write(scenes, tmp_path, capsys, monkeypatch, full):
    """The table is there, the error is one line, and one file that cannot be written leaves the other."""
    replace, out, scores = os.replace, tmp_path / "out", tmp_path / "scores.json"

    def full_disk(source, target):
        if full == "both" or full in str(target):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr("os.replace", full_disk)
    assert evaluate(scenes, "--weights", scenes / "best.pth", "--output", out, "--json", scores) == 2
    said = capsys.readouterr()
    assert "mIoU" in said.out
    assert "scenes val: 1 pictures" in said.out
    errors = [line for line in said.err.splitlines() if line.startswith("pspnet-fast")]
    assert len(errors) == 1
    assert "cannot be written: No space left on device" in errors[0]
    assert scores.exists() == (full == "out")
    assert (out / "results.json").exists() == (full == "scores.json")


@needs_parser
@pytest.mark.parametrize("raised", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_evaluate_out_of_memory(scenes, capsys, monkeypatch, raised):
    def fails(*_, **__):
        raise raised

    monkeypatch.setattr("pspnet_fast.evaluate.predict_labels", fails)
    assert evaluate(scenes, "--weights", scenes / "best.pth") == 2
    assert "scene_00000001.jpg: cannot be evaluated: out of memory" in capsys.readouterr().err


@needs_parser
def test_evaluate_needs_a_network_of_three_channels(scenes, capsys, monkeypatch):
    def of_four(*arguments):
        net, recipe = trained_network(*arguments)
        net.layer0[0] = torch.nn.Conv2d(4, 8, 3)
        return net, recipe

    monkeypatch.setattr("pspnet_fast.config.trained_network", of_four)
    assert evaluate(scenes, "--weights", scenes / "best.pth") == 2
    assert "the network must take 3 channels, pictures are read in RGB, got one of 4" in capsys.readouterr().err


@needs_parser
def test_evaluate_on_an_ascii_terminal(scenes, tmp_path, monkeypatch):
    """A name that it cannot show is escaped: the table and the file are there."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stream)
    names = Classes(("Straße\x1b[2J", *SCENES.names[1:]), SCENES.colours)
    monkeypatch.setattr("pspnet_fast.config.SCENES", names)
    assert evaluate(scenes, "--weights", scenes / "best.pth", "--json", tmp_path / "中.json") == 0
    assert rb"Stra\xdfe\x1b[2J" in stream.buffer.getvalue()
    assert json.loads((tmp_path / "中.json").read_text())["classes"][0] == names.names[0]


def test_predict_by_a_snapshot(scenes, tmp_path, capsys):
    """It knows its network, its classes and the size of its windows."""
    picture = scenes / "scenes" / "images" / "validation" / "scene_00000001.jpg"
    arguments = ["--weights", str(scenes / "best.pth"), "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert cli.main(["predict", str(picture), *arguments]) == 0
    with Image.open(tmp_path / "out" / "scene_00000001_labels.png") as labels:
        assert labels.size == (64, 48)
        assert np.asarray(labels).max() < 11
