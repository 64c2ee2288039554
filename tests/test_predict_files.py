"""`predict_files` and its command: what is shared, what fails and what that costs, what is written and what never is."""

import contextlib
import gc
import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from PIL import Image
from torch import nn

from pspnet_fast import PSPNet, cli, predict
from pspnet_fast.config import Recipe, plain
from pspnet_fast.data.classes import CLASSES, Classes
from pspnet_fast.data.normalisation import MEAN, STD
from pspnet_fast.predict import (
    PictureError,
    Protocol,
    colour,
    load_network,
    overlay,
    pictures_of,
    predict_file,
    predict_files,
    predict_labels,
    save,
    save_labels,
)

VOC = CLASSES["voc2012"]
SMALL = Protocol(crop=33, base_size=40)
OPTIONS = ["--layers", "18", "--crop", "33", "--base-size", "40", "--dataset", "voc2012", "--device", "cpu"]


class Net(nn.Module):
    """21 classes by colour; what `fails` raises comes for pictures whose first pixel is as bright as its place in the list."""

    def __init__(self, fails=(), classes=21):
        super().__init__()
        self.mix = nn.Conv2d(3, classes, 1)
        self.fails = fails
        self.held = []

    def forward(self, x):
        found = self.mix(x)
        bright = round(float(x[0, 0, 0, 0] * STD[0] + MEAN[0])) if self.fails else 0
        if 0 < bright <= len(self.fails):
            self.held.append(weakref.ref(found))
            raise self.fails[bright - 1]
        return found


@pytest.fixture
def pictures(tmp_path):
    """Six pictures, p0 to p5, the first pixels of which are 0 to 5."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(6):
        noise = np.random.default_rng(i).integers(30, 255, (20, 24 + i, 3), dtype=np.uint8)
        noise[0, 0] = i
        Image.fromarray(noise).save(folder / f"p{i}.png")
    return folder


def test_one_pictures_failure_is_one_line(pictures, tmp_path):
    """Whatever it is; the rest is done, and nothing of the failed one stays in memory."""
    fails = (
        torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        IndexError("of a decoder"),
    )
    net = Net(fails).eval()
    paths = sorted(pictures.iterdir())
    failed = predict_files(net, paths, tmp_path, VOC, Protocol(crop=None, base_size=None))
    p = [str(path) for path in paths]
    assert [str(error) for error in failed] == [
        f"{p[1]}: cannot be predicted: out of memory: CUDA out of memory. Tried to allocate 20 GiB",
        f"{p[2]}: cannot be predicted: out of memory: MemoryError",
        f"{p[3]}: cannot be predicted: out of memory: DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 9 bytes",
        f"{p[4]}: cannot be predicted: of a decoder",
    ]
    assert sorted(path.name for path in tmp_path.glob("*_labels.png")) == ["p0_labels.png", "p5_labels.png"]
    del fails
    net.fails = ()
    gc.collect()
    assert len(net.held) == 4
    assert all(tensor() is None for tensor in net.held)


def test_ctrl_c_is_no_failure_of_a_picture(pictures, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        predict_files(
            Net((KeyboardInterrupt(),)).eval(),
            sorted(pictures.iterdir()),
            tmp_path,
            VOC,
            Protocol(crop=None, base_size=None),
        )


def test_out_of_memory_on_the_command_line(pictures, tmp_path, capsys, monkeypatch):
    """`predict big.png small.png --whole`: status 1, a line for the big one, and small.png is done."""
    coarse = PSPNet.coarse_logits

    def small_memory(net, images):
        if images.shape[3] > 28:
            raise torch.OutOfMemoryError("big")
        return coarse(net, images)

    monkeypatch.setattr(PSPNet, "coarse_logits", small_memory)
    given = [str(pictures / "p5.png"), str(pictures / "p4.png"), "--whole", "--random-weights"]
    assert cli.main(["predict", *given, "--output", str(tmp_path / "out"), *OPTIONS[:2], *OPTIONS[6:]]) == 1
    said = capsys.readouterr()
    assert "p5.png: cannot be predicted: out of memory: big\n" in said.err
    assert "1 of 2 pictures predicted" in said.out
    assert (tmp_path / "out" / "p4_overlay.png").exists()


def test_a_pipe_is_no_picture(pictures, tmp_path):
    """Reading it would wait for ever, and take what another program is to read."""
    os.mkfifo(pictures / "pipe.png")
    failed = []
    paths = pictures_of([pictures], tmp_path)
    thread = threading.Thread(
        target=lambda: failed.extend(predict_files(Net().eval(), paths, tmp_path, VOC, SMALL)), daemon=True
    )
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert [str(error) for error in failed] == [
        f"{pictures / 'pipe.png'}: cannot be read as a picture: is not an ordinary file"
    ]


def test_the_start_is_linear_in_the_number_of_pictures(tmp_path, monkeypatch):
    """Twenty thousand names, none of which exist; every path is resolved once."""
    resolved, resolve = [], Path.resolve
    monkeypatch.setattr(Path, "resolve", lambda path, *a: resolved.append(path) or resolve(path, *a))
    for count in (10, 20_000):
        resolved.clear()
        start = time.process_time()
        found = pictures_of([tmp_path / f"p{i}.png" for i in range(count)], tmp_path / "out")
        assert len(found) == count
        assert len(resolved) <= count + 1
    assert time.process_time() - start < 30  # 20,000 squared would be hours


def test_results_that_would_overwrite_pictures(pictures, tmp_path):
    """Also where the picture or the folder of the results goes by another name."""
    (pictures / "p0_labels.png").write_bytes((pictures / "p1.png").read_bytes())
    (tmp_path / "link").symlink_to(pictures)
    (pictures / "p2_colour.png").symlink_to(tmp_path / "elsewhere.png")
    (tmp_path / "elsewhere.png").write_bytes((pictures / "p1.png").read_bytes())
    for chosen in (["p0.png", "p0_labels.png"], ["p2.png", "p2_colour.png"]):
        for folder in (pictures, tmp_path / "link"):
            with pytest.raises(PictureError, match=r"p[02]\.png: its result .* would overwrite a picture to predict"):
                pictures_of([pictures / name for name in chosen], folder)
    assert pictures_of([tmp_path / "link" / "p0.png"], pictures) == [tmp_path / "link" / "p0.png"]


def test_a_link_is_called_by_its_own_name(pictures, tmp_path):
    """Two names of one picture are two results; those of two pictures of one name are not told apart."""
    (pictures / "twin.png").symlink_to(pictures / "p0.png")
    assert len(pictures_of([pictures / "p0.png", pictures / "twin.png"], tmp_path)) == 2
    (tmp_path / "p0.png").symlink_to(pictures / "p1.png")
    with pytest.raises(PictureError, match="both would be written to"):
        pictures_of([pictures / "p0.png", tmp_path / "p0.png"], tmp_path / "out")


@pytest.mark.parametrize(("classes", "mode"), [(256, "L"), (257, "I;16"), (2**16, "I;16")])
def test_labels_of_many_classes_are_read_back(tmp_path, classes, mode):
    labels = torch.arange(classes - 16, classes, dtype=torch.int32).view(2, 8)
    save_labels(labels, classes, tmp_path / "labels.png")
    with Image.open(tmp_path / "labels.png") as read:
        assert read.mode == mode
        np.testing.assert_array_equal(np.asarray(read), labels.numpy())
    with pytest.raises(ValueError, match="at most 65536 classes in a PNG, got 65537"):
        save_labels(labels, 2**16 + 1, tmp_path / "labels.png")


def test_colours_and_legend():
    classes = CLASSES["voc2012"]
    labels = torch.zeros(120, 200, dtype=torch.uint8)
    labels[:, 150:] = 15
    picture = np.asarray(colour(labels, classes))
    assert tuple(picture[0, 0]) == (0, 0, 0)
    assert tuple(picture[0, 199]) == (192, 128, 128)
    shown = overlay(Image.new("RGB", (200, 120), "white"), labels, classes)
    assert shown.height == 120
    assert shown.width > 250
    legend = np.asarray(shown)[:, 200:].reshape(-1, 3)
    assert (legend == (192, 128, 128)).all(1).sum() > 50  # the swatch of "person"
    assert not (legend == classes.colours[2]).all(1).any()  # a class that is not there has none


def test_what_is_no_class_is_white():
    picture = np.asarray(colour(torch.tensor([[0, 255, 21]], dtype=torch.uint8), CLASSES["voc2012"]))
    assert picture.tolist() == [[[0, 0, 0], [255, 255, 255], [255, 255, 255]]]


def test_a_legend_longer_than_the_picture_says_how_many_are_left():
    labels = torch.arange(150, dtype=torch.uint8).repeat_interleave(20).view(50, 60)
    shown = overlay(Image.new("RGB", (60, 50), "white"), labels, CLASSES["ade20k"])
    swatches = {tuple(c) for c in np.asarray(shown)[:, 60:].reshape(-1, 3)} & set(CLASSES["ade20k"].colours)
    assert 2 <= len(swatches) < 10


def test_save_leaves_no_part_behind(tmp_path):
    save(Image.new("L", (4, 4)), tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    with pytest.raises(PictureError, match="absent.*cannot be written"):
        save(Image.new("L", (4, 4)), tmp_path / "absent" / "a.png")


def many_classes(count):
    return Classes(tuple(f"class {k}" for k in range(count)), tuple((k % 256, k // 256, 9) for k in range(count)))


def test_a_picture_of_many_classes(pictures, tmp_path):
    """Labels above 255 come as they are, in their colours, and with their names."""
    net, classes = Net(classes=300).eval(), many_classes(300)
    with torch.no_grad():
        net.mix.bias[:256] -= 100
    predict_file(net, pictures / "p0.png", tmp_path, classes, SMALL)
    pixels = torch.from_numpy(np.array(Image.open(pictures / "p0.png"))).permute(2, 0, 1)
    expected = predict_labels(net, pixels, SMALL)
    assert expected.min() > 255
    assert len(expected.unique()) > 3
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "p0_labels.png")), expected.numpy())
    shown = np.asarray(Image.open(tmp_path / "p0_colour.png"))
    np.testing.assert_array_equal(shown, np.array(classes.colours, np.uint8)[expected.numpy()])
    legend = np.asarray(Image.open(tmp_path / "p0_overlay.png"))[:, 24:].reshape(-1, 3)
    assert (legend == classes.colours[int(expected.mode().values.mode().values)]).all(1).any()


def test_colours_of_labels_that_are_no_class():
    for count in (21, 256, 300):
        shown = np.asarray(colour(torch.tensor([[0, count - 1, count, 400]]), many_classes(count)))
        ours = [[0, 0, 9], [(count - 1) % 256, (count - 1) // 256, 9]]
        assert shown.tolist() == [[*ours, [255] * 3, [255] * 3]]
    assert overlay(Image.new("RGB", (4, 2)), torch.full((2, 4), 299), many_classes(300)).size[0] > 4


def test_a_converted_network_of_many_classes(pictures, tmp_path, capsys):
    """Through the command, whose classes are numbers then."""
    recipe = Recipe(dataset="list", classes=300, layers=18, width=4, crop=33, base_size=40)
    state = recipe.network().state_dict()
    state["cls.4.bias"][:299] -= 100
    torch.save({"model": state, "recipe": plain(recipe)}, tmp_path / "net.pth")
    given = [str(pictures / "p0.png"), "--weights", str(tmp_path / "net.pth"), "--output", str(tmp_path / "out")]
    assert cli.main(["predict", *given, "--device", "cpu"]) == 0
    assert (np.asarray(Image.open(tmp_path / "out" / "p0_labels.png")) == 299).all()


def test_load_network(tmp_path):
    state = PSPNet(layers=18, classes=21).state_dict()
    torch.save({"epoch": 1, "state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "a.pth")
    net = load_network(tmp_path / "a.pth", 18, 21)
    assert not net.training
    assert torch.equal(net.cls[4].weight, state["cls.4.weight"])
    with pytest.raises(ValueError, match=r"a\.pth: has 21 classes, and the dataset 150"):
        load_network(tmp_path / "a.pth", 18, 150)
    with pytest.raises(ValueError, match="does not fit"):
        load_network(tmp_path / "a.pth", 34, 21)
    with pytest.raises(FileNotFoundError):
        load_network(tmp_path / "b.pth", 18, 21)


def test_networks_of_other_channels(pictures, tmp_path, capsys, monkeypatch):
    state = PSPNet(layers=18, width=4, classes=21).state_dict()
    state["layer0.0.weight"] = torch.zeros(4, 5, 3, 3)
    torch.save(state, tmp_path / "five.pth")
    with pytest.raises(ValueError, match=r"five\.pth: the network must take 3 channels, .* in RGB, got one of 5$"):
        load_network(tmp_path / "five.pth", 18, 21)
    network = cli._network

    def of_four(args):
        net, *rest = network(args)
        net.layer0[0] = nn.Conv2d(4, 8, 3)
        return net, *rest

    monkeypatch.setattr(cli, "_network", of_four)
    given = [str(pictures), "--random-weights", "--output", str(tmp_path / "out"), *OPTIONS]
    assert cli.main(["predict", *given]) == 2
    assert "the network must take 3 channels, pictures are read in RGB, got one of 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (["--scales", "nan"], "--scales must be from 0.01 to 100, and one at least, got [nan]"),
        (["--scales", "1", "inf"], "--scales must be from 0.01 to 100"),
        (["--scales", "1e9"], "--scales must be from 0.01 to 100"),
        (["--scales", "70", "--base-size", "512"], "--scales times the base size must be at most 32768 pixels"),
        (["--scales", "100"], "--scales times the base size must be at most 32768 pixels, got 100 times 512"),
        (["--crop", "0"], "--crop must be from 1 to 8192, got 0"),
        (["--crop", "1000000000"], "--crop must be from 1 to 8192, got 1000000000"),
        (["--base-size", "1000000000"], "--base-size must be from 1 to 32768, got 1000000000"),
        (["--batch-size", "1000000000"], "--batch-size must be from 1 to 1024, got 1000000000"),
    ],
)
def test_numbers_out_of_bounds(pictures, tmp_path, capsys, option, words):
    given = [str(pictures), "--random-weights", "--layers", "18", "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert cli.main(["predict", *given, *option]) == 2
    assert words in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.png"))


def test_a_scale_that_is_too_large_for_one_picture(pictures, tmp_path, capsys):
    Image.new("RGB", (1000, 10)).save(pictures / "p9.png")
    given = [str(pictures / "p9.png"), "--whole", "--scales", "40", "--random-weights", *OPTIONS[:2], *OPTIONS[6:]]
    assert cli.main(["predict", *given, "--output", str(tmp_path / "out")]) == 1
    assert "p9.png: cannot be predicted: Protocol: the long side" in capsys.readouterr().err


def test_bounds_stand_in_the_help(capsys):
    with pytest.raises(SystemExit):
        cli.main(["predict", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    for words in ("from 1 to 8192", "from 1 to 32768", "from 1 to 1024", "from 0.01 to 100"):
        assert words in said


def command(*arguments, **environment):
    """`pspnet-fast` in a process of its own, as a shell runs it."""
    return subprocess.run(
        [sys.executable, "-m", "pspnet_fast.cli", *map(str, arguments)],
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        timeout=300,
        check=False,
    )


def test_names_reach_an_ascii_terminal_as_escapes(pictures, tmp_path):
    """No UnicodeEncodeError, and no escape sequence that a terminal would obey."""
    evil = pictures / "b\x1b]0;owned\x07中.png"
    evil.write_bytes(b"no picture")
    output = tmp_path / "Ergebnisse \x1b[2J é"
    given = [pictures / "p0.png", evil, "--random-weights", "--output", output, *OPTIONS]
    done = command("predict", *given, PYTHONIOENCODING="ascii", LC_ALL="C")
    assert done.returncode == 1
    said = done.stdout + done.stderr
    assert b"\x1b]" not in said
    assert b"\x1b[2J" not in said
    assert b"Traceback" not in said
    assert rb"b\x1b]0;owned\x07\u4e2d.png: cannot be read" in done.stderr
    assert rb"1 of 2 pictures predicted, in " in done.stdout
    assert rb"Ergebnisse \x1b[2J \xe9" in done.stdout


def _process(rank, port, log, arguments):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    one = predict.predict_file

    def noted(net, path, *rest):
        (log / f"{rank}_{path.stem}").touch()
        one(net, path, *rest)

    predict.predict_file = noted
    with (
        (log / f"out.{rank}").open("w") as out,
        (log / f"err.{rank}").open("w") as err,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        status = cli.main(arguments)
    (log / f"status.{rank}").write_text(str(status))


def test_processes_share_the_pictures(pictures, tmp_path):
    """Each is predicted once, into the folder of the pictures; the first process prints, and ends with the status."""
    (pictures / "p4.png").write_bytes(b"no picture")
    log = tmp_path / "log"
    log.mkdir()
    alone, shared = tmp_path / "alone", pictures
    assert cli.main(["predict", str(pictures), "--random-weights", "--output", str(alone), *OPTIONS]) == 1
    arguments = ["predict", str(pictures), "--random-weights", "--output", str(shared), *OPTIONS]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    mp.start_processes(_process, (port, log, arguments), nprocs=2, start_method="fork")
    assert {path.name for path in log.glob("?_p*")} == {f"{i % 2}_p{i}" for i in range(6)}
    assert [(log / f"status.{rank}").read_text() for rank in range(2)] == ["1", "0"]
    assert (log / "out.0").read_text() == f"5 of 6 pictures predicted, in {shared}\n"
    assert (log / "out.1").read_text() == ""
    first, second = ((log / f"err.{rank}").read_text() for rank in range(2))
    assert f"{pictures / 'p4.png'}: cannot be read" in first
    assert "p4.png" not in second
    assert "untrained" not in second
    made = sorted(alone.iterdir())
    assert len(made) == 15
    for path in made:
        assert path.read_bytes() == (shared / path.name).read_bytes()


# A photograph of 12 megapixels and 150 classes, by the default protocol: what the process held at most, in KiB.
PHOTOGRAPH = r"""
    import re, sys
    import torch
    torch.set_num_threads(int(sys.argv[1]))
    from pspnet_fast import PSPNet
    from pspnet_fast.protocol import Protocol, predict_labels
    net = PSPNet(layers=18, width=8, classes=150, aux=False).eval()
    predict_labels(net, torch.randint(0, 255, (3, 3000, 4000), dtype=torch.uint8), Protocol())
    # Not ru_maxrss, which a process takes over from the one that started it.
    print(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_a_photograph_takes_less_than_a_gigabyte(threads):
    """Five hundred bands in one memory; in memory of their own they took 4.5 GB."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PHOTOGRAPH), str(threads)],
        capture_output=True,
        env={**os.environ, "OMP_WAIT_POLICY": "passive"},
        check=True,
        timeout=600,
    )
    assert int(done.stdout) < 1_000_000


def test_a_snapshot_of_a_training_is_predicted_without_opencv(pictures, tmp_path):
    """The extra "predict" holds Pillow and tqdm alone, and a snapshot's recipe is read by the code of the recipes."""
    recipe = {"layers": 18, "width": 4, "dataset": "voc2012", "crop": 33, "base_size": 40}
    net = PSPNet(layers=18, width=4, classes=21)
    torch.save({"model": net.state_dict(), "recipe": recipe}, tmp_path / "best.pth")
    words = ["predict", str(pictures), "--weights", str(tmp_path / "best.pth"), "--output", str(tmp_path / "out")]
    hidden = "import sys; sys.modules.update(dict.fromkeys(('cv2', 'yaml', 'jsonargparse', 'matplotlib')))"
    code = f"{hidden}; from pspnet_fast import cli; sys.exit(cli.main({[*words, '--device', 'cpu']!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("recipe", ["text", {"layers": 18, "width": 2_000_000}, {"layers": "x"}], ids=str)
def test_a_recipe_that_cannot_be_is_named_with_its_file(pictures, tmp_path, capsys, recipe):
    """Not taken for a checkpoint that has none, whose network the options would say."""
    torch.save({"model": {}, "recipe": recipe}, tmp_path / "odd.pth")
    given = [str(pictures), "--weights", str(tmp_path / "odd.pth"), "--output", str(tmp_path / "out"), *OPTIONS]
    assert cli.main(["predict", *given]) == 2
    assert f"{tmp_path / 'odd.pth'}: its recipe cannot be: " in capsys.readouterr().err
