import errno
import hashlib
import importlib
import sys
import time

import numpy as np
import pytest
from PIL import Image

from pspnet_fast.data import scenes
from pspnet_fast.data._draw import Camera, Canvas
from pspnet_fast.data._figures import Label
from pspnet_fast.data.scenes import SCENES, SceneError, draw_scene, scene_seeds, write_scenes

CLASSES = len(SCENES.names)


@pytest.fixture(scope="module")
def drawn():
    """Eighty scenes (picture, labels)."""
    return [draw_scene(seed) for seed in range(80)]


def digest(array):
    return hashlib.sha256(array.tobytes()).hexdigest()


def mean_iou(predicted, labels):
    pairs = np.bincount(CLASSES * labels.astype(int) + predicted, minlength=CLASSES**2).reshape(CLASSES, CLASSES)
    hit = np.diag(pairs)
    return (hit / (pairs.sum(0) + pairs.sum(1) - hit)).mean()


def test_the_table():
    assert len(SCENES.colours) == len(set(SCENES.colours)) == len(set(SCENES.names)) == CLASSES == 11
    assert all(SCENES.names[label] == label.name.lower() for label in Label)
    colours = np.array(SCENES.colours)
    apart = np.abs(colours[:, None] - colours[None]).sum(2) + 1000 * np.eye(CLASSES)
    assert apart.min() > 60  # told apart by eye


@pytest.mark.parametrize(("width", "height"), [(192, 144), (97, 65), (48, 48), (130, 210)])
def test_a_scene_is_that_of_its_seed(width, height):
    state = np.random.get_state()[1].copy()
    pixels, labels = draw_scene(3, width, height)
    again = draw_scene(3, width, height)
    other = draw_scene(4, width, height)
    assert pixels.shape == (height, width, 3)
    assert labels.shape == (height, width)
    assert pixels.dtype == labels.dtype == np.uint8
    assert labels.max() < CLASSES
    assert digest(pixels) == digest(again[0])
    assert digest(labels) == digest(again[1])
    assert (pixels != other[0]).mean() > 0.5
    assert (labels != other[1]).mean() > 0.05
    assert (np.random.get_state()[1] == state).all()  # nobody else's randomness is touched


def test_no_two_scenes_are_the_same(drawn):
    assert len({digest(labels) for _, labels in drawn}) == len(drawn)


def test_every_class_is_seen_often_and_is_large_enough_to_be_learnt(drawn):
    counts = np.array([np.bincount(labels.ravel(), minlength=CLASSES) for _, labels in drawn])
    seen = (counts >= 64).mean(0)  # as much as one cell at output stride 8
    assert dict(zip(SCENES.names, seen >= 0.25, strict=True)) == dict.fromkeys(SCENES.names, True)
    share = counts.sum(0) / counts.sum()
    assert share.min() > 0.01
    assert share.max() < 0.35


def test_labels_have_the_pictures_edges(drawn):
    """Where labels change, so do colours, and more there than a pixel to the side."""
    steps = np.zeros(7)
    for pixels, labels in drawn:
        colour = np.abs(np.diff(pixels.astype(float), axis=1)).sum(2)
        edge = np.diff(labels.astype(int), axis=1) != 0
        steps += [colour[:, 3:-3][np.roll(edge, shift, 1)[:, 3:-3]].sum() for shift in range(-3, 4)]
    assert steps.argmax() == 3
    assert steps[3] > 1.5 * max(steps[0], steps[6])


def test_colour_and_label_are_one_drawing():
    canvas = Canvas((90, 60), Camera(90.0, 2.0, 45.0, 20.0), (1.0, 1.0, 1.0), 1)
    front, side = canvas.box((1, 2), (0, 2.5), (5, 8), (200, 40, 30), Label.VEHICLE)
    canvas.patch(front, (0.2, 0.2, 0.6, 0.7), (10, 20, 240), Label.SIGN)
    assert side is not None
    red, _, blue, label = np.moveaxis(np.asarray(canvas.image), 2, 0)
    assert ((label == Label.VEHICLE) == (red > 100)).all()
    assert ((label == Label.SIGN) == (blue > 150)).all()
    assert (label == Label.SIGN).sum() > 50
    (left, bottom), (right, top) = (canvas.camera.project(x, y, 5) for x, y in ((1, 0), (2, 2.5)))
    assert label[round((bottom + top) / 2), round(left) + 1] == Label.VEHICLE
    assert label[round((bottom + top) / 2), round(right) + 2] == 0


def test_the_ground_under_an_object_is_nearer_the_lower_it_is(drawn):
    """People grow with the row they stand in."""
    heights, feet = [], []
    for _, labels in drawn:
        for column in np.flatnonzero((labels == Label.PERSON).sum(0) > 4):
            rows = np.flatnonzero(labels[:, column] == Label.PERSON)
            if rows[-1] < labels.shape[0] - 2 and np.ptp(rows) == len(rows) - 1:
                heights.append(len(rows))
                feet.append(rows[-1])
    assert len(heights) > 200
    assert np.corrcoef(heights, feet)[0, 1] > 0.3


def test_colour_alone_does_not_decide(drawn):
    """A histogram of colours by class, the best a pixel by itself can do, fitted on half of the scenes."""

    def flat(some):
        bins = np.concatenate([(pixels.reshape(-1, 3) >> 4).astype(int) @ (256, 16, 1) for pixels, _ in some])
        return bins, np.concatenate([labels.ravel() for _, labels in some]).astype(int)

    (bins, labels), (unseen, truth) = flat(drawn[:40]), flat(drawn[40:])
    table = np.bincount(bins * CLASSES + labels, minlength=4096 * CLASSES).reshape(4096, CLASSES)
    found = table / np.bincount(labels, minlength=CLASSES) ** 0.5  # between likely and balanced: the best for mIoU
    assert mean_iou(found.argmax(1)[bins], labels) > 0.15
    assert mean_iou(found.argmax(1)[unseen], truth) < 0.3


def test_what_stands_nearer_is_painted_later(monkeypatch):
    depths = []
    for name in ("tree", "person", "sign"):
        monkeypatch.setattr(scenes, name, lambda sprite, *rest: depths[-1].append(sprite.depth))
    for seed in range(10):
        depths.append([])
        draw_scene(seed)
    assert all(some == sorted(some, reverse=True) for some in depths)
    assert sum(len(some) for some in depths) > 30


def test_scenes_are_drawn_fast():
    """Twenty-five a second of one core are asked for; this much holds on a core that others keep busy, too."""
    times = []
    for first in range(0, 24, 4):
        start = time.process_time()
        for seed in range(first, first + 4):
            draw_scene(seed)
        times.append(time.process_time() - start)
    assert min(times) < 4 / 15


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1,), "seed must be at least 0, got -1"),
        ((0, 47, 90), "from 48 to 2048, got 47 and 90"),
        ((0, 90, 2049), "from 48 to 2048, got 90 and 2049"),
        ((0, 90, 0), "got 90 and 0"),
    ],
    ids=str,
)
def test_scenes_that_cannot_be_drawn(arguments, message):
    with pytest.raises(SceneError, match=f"draw_scene: .*{message}"):
        draw_scene(*arguments)


def test_seeds_are_disjoint():
    sets = [set(part) for seed in (0, 1, 2) for part in scene_seeds(50, seed)]
    assert [len(part) for part in sets] == [50, 10] * 3
    assert len(set().union(*sets)) == 180
    assert [len(part) for part in scene_seeds(1)] == [1, 1]
    assert scene_seeds(100)[1][:10] == scene_seeds(50)[1]  # more training scenes leave the first ones as they are


def test_written_as_ade20k_is(tmp_path, capsys):
    folder = tmp_path / "new" / "scenes"
    write_scenes(folder, 7, seed=2, width=96, height=72)
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert files == sorted(
        f"{kind}/{split}/scene_{number:08}.{end}"
        for kind, end in (("images", "jpg"), ("annotations", "png"))
        for split, count in (("training", 7), ("validation", 1))
        for number in range(1, count + 1)
    )
    assert sorted(path.name for path in folder.iterdir()) == ["annotations", "images"]
    out = capsys.readouterr()
    assert out.out == ""
    assert "8/8" in out.err
    for split, seeds in zip(("training", "validation"), scene_seeds(7, 2), strict=True):
        for number, seed in enumerate(seeds, 1):
            pixels, labels = draw_scene(seed, 96, 72)
            with Image.open(folder / "annotations" / split / f"scene_{number:08}.png") as file:
                assert (file.mode, file.size) == ("L", (96, 72))
                raw = np.asarray(file)
            with Image.open(folder / "images" / split / f"scene_{number:08}.jpg") as file:
                assert (file.mode, file.size) == ("RGB", (96, 72))
                picture = np.asarray(file).astype(int)
            void = raw == 0
            assert 0.005 < void.mean() < 0.06
            assert void[-1, 0]
            assert (raw[~void] == labels[~void] + 1).all()
            clear = np.abs(picture - pixels)[:56]  # above the stamp
            assert clear.mean() < 8
            stamp = picture[np.ix_(void.any(1), void.any(0))]
            assert (stamp.max(2) < 60).mean() > 0.3  # dark, with
            assert (stamp[..., 0] > 80).sum() > 5  # bright figures


def test_written_scenes_repeat(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()  # an empty folder will do
        write_scenes(tmp_path / name, 2, seed=1, width=64, height=48)
    write_scenes(tmp_path / "c", 2, seed=0, width=64, height=48)
    for path in (tmp_path / "a").rglob("*.*g"):
        inside = path.relative_to(tmp_path / "a")
        assert path.read_bytes() == (tmp_path / "b" / inside).read_bytes()
        assert path.read_bytes() != (tmp_path / "c" / inside).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": 0}, "write_scenes: images must be from 1 to 1000000, got 0"),
        ({"images": 10**9}, "write_scenes: images must be from 1 to 1000000, got 1000000000"),
        ({"images": 1, "seed": 2**31}, "write_scenes: seed must be from 0 to 2147483647, got 2147483648"),
        ({"images": 1, "seed": -1}, "write_scenes: seed must be from 0 to 2147483647, got -1"),
        ({"images": 1, "height": 20}, "write_scenes: width and height must be from 48 to 2048, got 192 and 20"),
    ],
    ids=str,
)
def test_datasets_that_cannot_be(tmp_path, arguments, message):
    with pytest.raises(SceneError, match=message):
        write_scenes(tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


def test_folders_that_scenes_are_not_written_into(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SceneError, match=r"file: must be a new or an empty folder, is a file"):
        write_scenes(tmp_path / "file", 1)
    with pytest.raises(SceneError, match=r"below: cannot be written: Not a directory"):
        write_scenes(tmp_path / "file" / "below", 1)
    with pytest.raises(SceneError, match=r"must be a new or an empty folder, holds file and 0 more"):
        write_scenes(tmp_path, 1)
    assert (tmp_path / "file").read_text() == ""


def test_an_interrupted_run_is_named_and_leaves_nothing_that_looks_complete(tmp_path, monkeypatch):
    drawn = []

    def interrupted(*arguments):
        drawn.append(arguments)
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return draw_scene(*arguments)

    monkeypatch.setattr(scenes, "draw_scene", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_scenes(tmp_path / "new", 3, width=64, height=48)
    assert [path.name for path in (tmp_path / "new").iterdir()] == [scenes.PART]
    with pytest.raises(SceneError, match=r"new: holds \.part, left by a run that was interrupted: delete it"):
        write_scenes(tmp_path / "new", 3, width=64, height=48)


def test_a_full_disk(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(SceneError, match=r"new: cannot be written: No space left on device"):
        write_scenes(tmp_path / "new", 1, width=64, height=48)
    assert not any((tmp_path / "new").iterdir())


@pytest.mark.parametrize("module", ["scenes", "_landscape", "_draw"])
def test_without_pillow_the_extra_is_named(monkeypatch, module):
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.delitem(sys.modules, f"pspnet_fast.data.{module}", raising=False)
    with pytest.raises(ImportError, match=r"needs? Pillow.*pip install --no-build-isolation '\.\[predict\]'"):
        importlib.import_module(f"pspnet_fast.data.{module}")
