import importlib
import pickle
import re
import shutil
import sys

import numpy as np
import pytest
from making import HEIGHT, THREE, WIDTH, ade20k, cityscapes, voc2012, write_labels, write_picture
from PIL import Image

from pspnet_fast.data import datasets
from pspnet_fast.data.classes import CLASSES, Classes
from pspnet_fast.data.datasets import (
    Dataset,
    DatasetError,
    Sample,
    check_dataset,
    find_dataset,
    read_image,
    read_labels,
    read_sample,
)
from pspnet_fast.data.scenes import SCENES


@pytest.mark.parametrize("parent", [False, True])
@pytest.mark.parametrize(("split", "part"), [("train", "training"), ("val", "validation")])
def test_ade20k(tmp_path, split, part, parent):
    home = tmp_path / "ADEChallengeData2016"
    ade20k(home, part)
    found = find_dataset("ade20k", tmp_path if parent else home, split)
    assert (found.name, found.split, found.classes) == ("ade20k", split, CLASSES["ade20k"])
    assert [(s.image.name, s.labels.name) for s in found.samples] == [(f"x{i}.jpg", f"x{i}.png") for i in (1, 2, 3)]
    image, labels = read_sample(found.samples[0], found)
    assert image.shape == (HEIGHT, WIDTH, 3)
    assert labels.dtype == np.uint8
    assert labels.ravel()[:4].tolist() == [255, 0, 149, 255]
    assert found.source == f"3 pictures of {home / 'images' / part}"
    assert pickle.loads(pickle.dumps(found)).samples == found.samples  # goes to workers


def test_labels_that_ade20k_does_not_have(tmp_path):
    ade20k(tmp_path)
    write_labels(tmp_path / "annotations" / "training" / "x2.png", [151, 0, 151, 200, 1, 1])
    with pytest.raises(
        DatasetError, match=r"ade20k: .*x2\.png: labels must be 0 to 150, got 151 \(18 .*200 \(9 pixels"
    ):
        find_dataset("ade20k", tmp_path, "train")


def test_scenes_have_their_own_classes(tmp_path):
    ade20k(tmp_path, values=(0, 1, 3))
    found = find_dataset("scenes", tmp_path, "train", classes=THREE)
    assert read_labels(found.samples[0].labels, found).ravel()[:3].tolist() == [255, 0, 2]
    write_labels(tmp_path / "annotations" / "training" / "x1.png", [4])
    with pytest.raises(DatasetError, match="labels must be 0 to 3, got 4 "):
        find_dataset("scenes", tmp_path, "train", classes=THREE)


def test_scenes_find_their_classes(tmp_path):
    ade20k(tmp_path, values=(0, 1, len(SCENES.names)))
    assert find_dataset("scenes", tmp_path, "train").classes == SCENES


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(DatasetError, match=f"ade20k: expected a folder at {tmp_path}/absent, there is none"):
        find_dataset("ade20k", tmp_path / "absent", "train")
    (tmp_path / "pictures").mkdir()
    expected = (
        f"ade20k: expected pictures in {tmp_path}/images/training, there is no such folder; below {tmp_path} there"
    )
    with pytest.raises(DatasetError, match=f"{expected} are: pictures"):
        find_dataset("ade20k", tmp_path, "train")
    (tmp_path / "pictures").rmdir()
    with pytest.raises(DatasetError, match=f"{expected} are no folders"):
        find_dataset("ade20k", tmp_path, "train")


def test_an_empty_folder(tmp_path):
    ade20k(tmp_path)
    for path in (tmp_path / "images" / "training").iterdir():
        path.rename(path.with_suffix(".gif"))
    with pytest.raises(DatasetError, match=r"ade20k: expected pictures in .*/training, there is no file \*\.jpg"):
        find_dataset("ade20k", tmp_path, "train")


def test_pictures_without_labels_and_the_reverse(tmp_path):
    ade20k(tmp_path, names=[f"x{i}" for i in range(8)])
    for i in range(5):
        (tmp_path / "annotations" / "training" / f"x{i}.png").unlink()
    (tmp_path / "images" / "training" / "x7.jpg").unlink()
    pattern = (
        r"ade20k: 5 of 7 pictures have no labels in .*annotations/training: x0, x1, x2 and 2 more; "
        r"1 of 3 label files in .* have no picture: x7"
    )
    with pytest.raises(DatasetError, match=pattern):
        find_dataset("ade20k", tmp_path, "train")


def test_two_files_of_one_name(tmp_path):
    ade20k(tmp_path)
    write_picture(tmp_path / "images" / "training" / "x1.png")
    with pytest.raises(DatasetError, match=r"expected one file x1 of pictures in .*, got x1\.jpg, x1\.png"):
        find_dataset("ade20k", tmp_path, "train")


@pytest.mark.parametrize("name", ["x1", "x3", "x5"])
def test_the_first_the_middle_and_the_last_are_read(tmp_path, name):
    ade20k(tmp_path, names=("x1", "x2", "x3", "x4", "x5"))
    (tmp_path / "images" / "training" / "x2.jpg").write_text("not read")
    find_dataset("ade20k", tmp_path, "train")
    write_picture(tmp_path / "images" / "training" / f"{name}.jpg", (9, 6))
    with pytest.raises(DatasetError, match=rf"{name}\.png: labels must be as large as .*{name}\.jpg, 6x9, got 9x6"):
        find_dataset("ade20k", tmp_path, "train")


@pytest.mark.parametrize("below", ["", "VOC2012", "VOCdevkit/VOC2012"])
def test_voc2012_labels_are_the_palettes_indices(tmp_path, below):
    voc2012(tmp_path / below, ["b", "a"])
    found = find_dataset("voc2012", tmp_path, "train")
    assert [sample.image.stem for sample in found.samples] == ["b", "a"]  # the list's order
    assert read_labels(found.samples[0].labels, found).ravel()[:4].tolist() == [0, 20, 255, 0]
    assert found.source.endswith("train.txt, labels of SegmentationClass")


def test_voc2012_takes_the_augmented_list_in_training(tmp_path):
    voc2012(tmp_path, ["a"], split="val")
    voc2012(tmp_path, ["b"])
    voc2012(tmp_path, ["b", "c"], palette=False, folder="SegmentationClassAug", split="trainaug")
    found = find_dataset("voc2012", tmp_path, "train")
    assert [sample.labels.parent.name for sample in found.samples] == ["SegmentationClassAug"] * 2
    assert (
        found.source == f"2 pictures of {tmp_path}/ImageSets/Segmentation/trainaug.txt, labels of SegmentationClassAug"
    )
    assert [sample.image.stem for sample in find_dataset("voc2012", tmp_path, "val").samples] == ["a"]
    shutil.rmtree(tmp_path / "SegmentationClassAug")
    assert [sample.image.stem for sample in find_dataset("voc2012", tmp_path, "train").samples] == ["b"]


def test_voc2012_with_files_missing(tmp_path):
    voc2012(tmp_path, ["a", "b"])
    with pytest.raises(DatasetError, match=r"voc2012: expected the list of pictures .*val\.txt, there is no such file"):
        find_dataset("voc2012", tmp_path, "val")
    (tmp_path / "SegmentationClass" / "b.png").unlink()
    with pytest.raises(DatasetError, match=r"the labels of .*train\.txt in .*Class, 1 of 2 are missing: b\.png"):
        find_dataset("voc2012", tmp_path, "train")
    (tmp_path / "JPEGImages" / "a.jpg").unlink()
    with pytest.raises(DatasetError, match=r"the pictures of .* in .*JPEGImages, 1 of 2 are missing: a\.jpg"):
        find_dataset("voc2012", tmp_path, "train")
    (tmp_path / "ImageSets" / "Segmentation" / "train.txt").write_text("\n")
    with pytest.raises(DatasetError, match=r"expected names of pictures in .*train\.txt, it is empty"):
        find_dataset("voc2012", tmp_path, "train")
    with pytest.raises(DatasetError, match=r"voc2012: expected pictures in .*JPEGImages, there is no such folder"):
        find_dataset("voc2012", tmp_path / "ImageSets", "train")


def test_voc2012_test_pictures_have_no_labels(tmp_path):
    voc2012(tmp_path, ["a"], split="test")
    shutil.rmtree(tmp_path / "SegmentationClass")
    found = find_dataset("voc2012", tmp_path, "test")
    assert found.samples == (Sample(tmp_path / "JPEGImages" / "a.jpg", None),)
    with pytest.raises(DatasetError, match=r"a\.jpg: has no labels in split test"):
        read_sample(found.samples[0], found)


# Written down by name, apart from the package's table: (labelId, trainId).
CITYSCAPES = {
    "road": 7,
    "sidewalk": 8,
    "building": 11,
    "wall": 12,
    "fence": 13,
    "pole": 17,
    "traffic light": 19,
    "traffic sign": 20,
    "vegetation": 21,
    "terrain": 22,
    "sky": 23,
    "person": 24,
    "rider": 25,
    "car": 26,
    "truck": 27,
    "bus": 28,
    "train": 31,
    "motorcycle": 32,
    "bicycle": 33,
}


def test_cityscapes_ids_become_train_ids(tmp_path):
    cityscapes(tmp_path)
    found = find_dataset("cityscapes", tmp_path, "train")
    assert [sample.image.parent.name for sample in found.samples] == ["bonn", "ulm"]
    labels = read_labels(found.samples[0].labels, found).ravel()[:34]
    for i in range(34):
        names = [name for name, label in CITYSCAPES.items() if label == i]
        assert labels[i] == (found.classes.names.index(names[0]) if names else 255), i
    assert found.source.endswith("leftImg8bit/train, labelIds")
    write_labels(found.samples[0].labels, [34])
    with pytest.raises(DatasetError, match="labels must be 0 to 33 or 255, got 34"):
        find_dataset("cityscapes", tmp_path, "train")


def test_cityscapes_train_ids_where_ids_are_not_complete(tmp_path):
    cityscapes(tmp_path, ("labelIds", "labelTrainIds"))
    assert find_dataset("cityscapes", tmp_path, "train").source.endswith(", labelIds")
    next(tmp_path.glob("gtFine/*/ulm/*labelIds.png")).unlink()
    found = find_dataset("cityscapes", tmp_path, "train")
    assert found.source.endswith(", labelTrainIds")
    assert all(sample.labels.name.endswith("_gtFine_labelTrainIds.png") for sample in found.samples)
    assert read_labels(found.samples[1].labels, found).ravel()[:20].tolist() == [*range(19), 255]
    write_labels(found.samples[0].labels, [19])
    with pytest.raises(DatasetError, match="labels must be 0 to 18 or 255, got 19"):
        find_dataset("cityscapes", tmp_path, "train")
    for path in tmp_path.glob("gtFine/*/bonn/*.png"):
        path.unlink()
    with pytest.raises(DatasetError, match=r"1 of 2 pictures have no labels in .*: bonn/bonn_000000_000019"):
        find_dataset("cityscapes", tmp_path, "train")
    next(tmp_path.glob("gtFine/*/ulm/*.png")).unlink()
    with pytest.raises(
        DatasetError, match=r"cityscapes: expected labels in .*train, there is no file CITY/\*_gtFine_label"
    ):
        find_dataset("cityscapes", tmp_path, "train")


def test_cityscapes_test_pictures_have_no_labels(tmp_path):
    cityscapes(tmp_path, split="test")
    assert [sample.labels for sample in find_dataset("cityscapes", tmp_path, "test").samples] == [None, None]
    with pytest.raises(DatasetError, match=r"expected pictures in .*leftImg8bit/val, there is no such folder"):
        find_dataset("cityscapes", tmp_path, "val")
    (tmp_path / "leftImg8bit" / "val").mkdir()
    with pytest.raises(DatasetError, match=r"there is no file CITY/\*_leftImg8bit.png"):
        find_dataset("cityscapes", tmp_path, "val")


TWO = Classes(("background", "lesion"), ((0, 0, 0), (255, 255, 255)))


def masks(root, values):
    """A list dataset of two classes, a mask for each of `values`."""
    for i, some in enumerate(values):
        write_picture(root / f"{i}.jpg")
        write_labels(root / f"{i}.png", some)
    (root / "list.txt").write_text("".join(f"{i}.jpg {i}.png\n" for i in range(len(values))))
    return {"list_file": root / "list.txt", "classes": TWO}


def test_masks_of_0_and_255_are_said(tmp_path, caplog):
    found = masks(tmp_path, [(0, 255)] * 5)
    find_dataset("list", tmp_path, "train", **found)
    (sentence,) = caplog.messages
    assert sentence == (
        "list train: 1 of 2 classes never occur in 5 label files of 5: 1 (lesion). Raw labels of 255 are ignored: a mask of "
        "0 and 255 has to be written as 0 and 1"
    )


def test_data_may_be_larger_than_pictures_to_predict(tmp_path, monkeypatch):
    ade20k(tmp_path)
    found = find_dataset("ade20k", tmp_path, "train")
    for bound, fits in ((HEIGHT * WIDTH, True), (HEIGHT * WIDTH - 1, False)):
        monkeypatch.setattr(datasets, "LARGEST", bound)
        for path, reader in (
            (found.samples[0].image, read_image),
            (found.samples[0].labels, lambda p: read_labels(p, found)),
        ):
            if fits:
                assert reader(path).shape[:2] == (HEIGHT, WIDTH)
            else:
                with pytest.raises(DatasetError, match="must have at most 53 pixels .*, got 9x6"):
                    reader(path)


def test_255_is_not_blamed_where_it_is_no_label(tmp_path, caplog):
    ade20k(tmp_path, values=(0, 1))
    find_dataset("scenes", tmp_path, "train", classes=TWO)
    assert caplog.messages == ["scenes train: 1 of 2 classes never occur in 3 label files of 3: 1 (lesion)"]


def test_a_class_of_few_is_looked_for_until_it_is_seen(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(datasets, "LOOKED", 4)
    found = masks(tmp_path, [(0,)] * 9 + [(0, 1)])  # the last is among four of ten
    find_dataset("list", tmp_path, "train", **found)
    assert caplog.messages == []
    write_labels(tmp_path / "0.png", [0, 1])
    read = []
    with monkeypatch.context() as patched:
        patched.setattr(
            datasets, "read_labels", lambda path, dataset: read.append(path.name) or read_labels(path, dataset)
        )
        find_dataset("list", tmp_path, "train", **found)
    assert read == ["0.png", "5.png", "9.png", "0.png"]  # what every dataset is looked at for, and one more
    write_labels(tmp_path / "0.png", [0])
    write_labels(tmp_path / "9.png", [0])
    write_labels(tmp_path / "1.png", [0, 1])  # not looked at: 0, 3, 6, 9
    (tmp_path / "3.png").write_text("whoever trains on it names it")
    find_dataset("list", tmp_path, "train", **found)
    assert caplog.messages == ["list train: 1 of 2 classes never occur in 3 label files of 10: 1 (lesion)"]
    caplog.clear()
    write_labels(tmp_path / "3.png", [0])
    with caplog.at_level("INFO"):
        check_dataset(find_dataset("list", tmp_path, "train", **found), 2)
    assert caplog.messages[-1] == "list train: 2 of 2 classes occur: background 95.00 %, lesion 5.00 %, ignored 0.00 %"
    assert not any("all 10 label files" in sentence for sentence in caplog.messages)


def test_many_classes_are_not_looked_for_at_the_start(tmp_path, caplog):
    ade20k(tmp_path, values=(0, 1, 150))
    found = find_dataset("ade20k", tmp_path, "train")
    assert caplog.messages == []
    with caplog.at_level("INFO"):
        check_dataset(found, 2)
    assert caplog.messages == [
        "ade20k train: 2 of 150 classes occur: ignored 33.33 %",
        "ade20k train: 148 of 150 classes never occur in all 3 label files: 1 (building), 2 (sky), 3 (floor), 4 (tree), "
        "5 (ceiling), 6 (road), 7 (bed), 8 (windowpane) and 140 more",
    ]


def turned_picture(path, turn, size=(HEIGHT, WIDTH)):
    exif = Image.Exif()
    exif[0x0112] = turn
    pixels = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, exif=exif)


def test_upright_masks_of_pictures_that_exif_turns(tmp_path):
    """Where the sides are swapped, EXIF is named, and only where EXIF swaps them."""
    ade20k(tmp_path)
    at = tmp_path / "images" / "training" / "x1.jpg"
    for turn, named in ((6, True), (8, True), (3, False), (1, False)):
        turned_picture(at, turn, (WIDTH, HEIGHT))
        with pytest.raises(
            DatasetError, match=r"x1\.png: labels must be as large as .*x1\.jpg, 6x9, got 9x6"
        ) as caught:
            find_dataset("ade20k", tmp_path, "train")
        assert ("EXIF orientation turns it by 90 degrees" in str(caught.value)) == named


def test_pictures_that_exif_turns_are_said(tmp_path, caplog):
    """The sizes fit: nothing but EXIF tells that the labels may be drawn upright."""
    ade20k(tmp_path)
    turned_picture(tmp_path / "images" / "training" / "x3.jpg", 3)
    found = find_dataset("ade20k", tmp_path, "train")
    sentence = "ade20k train: EXIF turns x3.jpg, whose pixels and labels are taken as they are stored"
    assert caplog.messages == [sentence]
    caplog.clear()
    check_dataset(found, 1)
    assert caplog.messages[0] == sentence


def test_arguments_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match="the name must be one of ade20k, scenes, voc2012, cityscapes, list, got coco"):
        find_dataset("coco", tmp_path, "train")
    with pytest.raises(ValueError, match="ade20k: the split must be train, val or test, got validation"):
        find_dataset("ade20k", tmp_path, "validation")
    with pytest.raises(ValueError, match="ade20k: has the splits train and val, got test"):
        find_dataset("ade20k", tmp_path, "test")
    with pytest.raises(ValueError, match="list: needs a list file and a class table"):
        find_dataset("list", tmp_path, "train", list_file=tmp_path / "list.txt")
    for count in (0, 256):
        with pytest.raises(ValueError, match=f"the class table must have 1 to 255 classes, got {count}"):
            find_dataset("scenes", tmp_path, "train", classes=Classes(("a",) * count, ((0, 0, 0),) * count))


def test_pictures_are_rgb_as_stored(tmp_path):
    pixels = write_picture(tmp_path / "a.png")
    read = read_image(tmp_path / "a.png")
    assert (read == pixels).all()
    assert read.dtype == np.uint8
    Image.fromarray(pixels[..., 0]).save(tmp_path / "grey.png")
    assert (read_image(tmp_path / "grey.png") == pixels[..., :1]).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # a camera held upright: shown, the picture would be HEIGHT wide
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    read = read_image(tmp_path / "turned.jpg")
    assert read.shape == pixels.shape
    assert (read == np.asarray(Image.open(tmp_path / "turned.jpg"))).all()


@pytest.mark.parametrize("progressive", [False, True])
def test_truncated_jpegs_are_named(tmp_path, progressive):
    """Such as has a thumbnail, too, a whole JPEG in the head of the picture."""
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels[::8, ::8]).save(tmp_path / "small.jpg")
    exif = b"Exif\0\0" + (tmp_path / "small.jpg").read_bytes()
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, progressive=progressive)
    whole, path = (tmp_path / "a.jpg").read_bytes(), tmp_path / "cut.jpg"
    assert whole.count(b"\xff\xd9") == 2
    after_thumbnail = whole.index(b"\xff\xd9") + 2
    for length in (0, 1, 3, 100, after_thumbnail, len(whole) // 2, len(whole) - 300, len(whole) - 1):
        for rest in (b"", bytes(len(whole) - length)):  # zeros are what a full disk leaves
            path.write_bytes(whole[:length] + rest)
            with pytest.raises(DatasetError, match=r"cut\.jpg: cannot be read as a picture: "):
                read_image(path)
    for rest in (b"\n\n", bytes(50)):  # after the end, they do no harm
        path.write_bytes(whole + rest)
        assert (read_image(path) == np.asarray(Image.open(tmp_path / "a.jpg"))).all()


def test_truncated_pngs_are_named(tmp_path):
    write_picture(tmp_path / "a.png", (64, 64))
    whole, path = (tmp_path / "a.png").read_bytes(), tmp_path / "cut.png"
    for length in (1, 20, 100, len(whole) // 2, len(whole) - 20):
        path.write_bytes(whole[:length])
        with pytest.raises(DatasetError, match=r"cut\.png: cannot be read as a picture: "):
            read_image(path)


def test_files_that_are_no_pictures(tmp_path):
    (tmp_path / "text.jpg").write_text("no picture")
    for name, problem in (("text.jpg", "cannot be read"), ("absent.jpg", "no such file"), (".", "cannot be read")):
        with pytest.raises(DatasetError, match=f"{tmp_path / name}: {problem}"):
            read_image(tmp_path / name)


def test_labels_that_cannot_be_read(tmp_path):
    found = Dataset("list", "train", THREE, (), np.zeros(256, np.uint8), np.ones(256, bool), "")
    write_picture(tmp_path / "rgb.png")
    write_labels(tmp_path / "a.png", range(54))
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:48])
    found.valid[7] = False
    Image.fromarray(np.array([[0, 255, 256], [7, 300, 300]], np.uint16)).save(tmp_path / "deep.png")
    for name, problem in (
        ("rgb.png", "cannot be read as labels: must be one channel of whole numbers .*, got Pillow's mode RGB"),
        ("deep.png", r"labels must be .*, got 7 \(1 pixels\), 256 \(1 pixels\), 300 \(2 pixels\)"),
        ("cut.png", "cannot be read as labels"),
        ("absent.png", "no such file"),
    ):
        with pytest.raises(DatasetError, match=f"{tmp_path / name}: {problem}"):
            read_labels(tmp_path / name, found)


def damaged(root):
    """Ten samples, of which the second to the fifth have something wrong, and the eighth picture and labels."""
    ade20k(root, names=[f"x{i}" for i in range(10)])
    found = find_dataset("ade20k", root, "train")
    write_labels(found.samples[1].labels, [0, 170])
    found.samples[2].image.write_bytes(found.samples[2].image.read_bytes()[:-40])
    write_picture(found.samples[3].image, (9, 6))
    found.samples[4].labels.unlink()
    found.samples[7].image.write_text("")
    write_labels(found.samples[7].labels, [199])
    return found


@pytest.mark.parametrize("workers", [1, 3])
def test_check_dataset_lists_every_problem(tmp_path, workers):
    found = damaged(tmp_path)
    with pytest.raises(DatasetError) as caught:
        check_dataset(found, workers)
    first, *lines = str(caught.value).splitlines()
    assert first == "ade20k: 6 problems in split train:"
    expected = [
        r"x1\.png: labels must be 0 to 150, got 170 \(27 pixels\)",
        r"x2\.jpg: cannot be read as a picture",
        r"x3\.png: labels must be as large as .*x3\.jpg, 6x9, got 9x6",
        r"x4\.png: no such file",
        r"x7\.jpg: cannot be read as a picture",
        r"x7\.png: labels must be 0 to 150, got 199 \(54 pixels\)",
    ]
    assert len(lines) == len(expected)
    for line, pattern in zip(lines, expected, strict=True):
        assert re.search(pattern, line)


def test_check_dataset_says_how_many_more(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "LINES", 4)
    with pytest.raises(DatasetError) as caught:
        check_dataset(damaged(tmp_path), 2)
    lines = str(caught.value).splitlines()
    assert len(lines) == 6
    assert lines[-1] == "and 2 more"


def test_check_dataset_of_what_is_well(tmp_path, capsys):
    ade20k(tmp_path)
    check_dataset(find_dataset("ade20k", tmp_path, "train"), 2)
    assert "3/3" in capsys.readouterr().err
    voc2012(tmp_path / "voc", ["a"], split="test")
    check_dataset(find_dataset("voc2012", tmp_path / "voc", "test"), 1)
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        check_dataset(find_dataset("ade20k", tmp_path, "train"), 0)


@pytest.mark.parametrize("missing", ["PIL", "tqdm"])
def test_a_missing_extra_is_named_with_its_command(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    for module in ("datasets", "layouts", "images"):
        monkeypatch.delitem(sys.modules, f"pspnet_fast.data.{module}")
    with pytest.raises(ImportError, match=r"need Pillow and tqdm.*pip install --no-build-isolation '\.\[predict\]'"):
        importlib.import_module("pspnet_fast.data.datasets")


def test_a_sample_that_will_be_skipped_ends_nothing_at_the_start(tmp_path):
    """The first, middle and last are looked at; who skips corrupt ones meets them later, one by one."""
    ade20k(tmp_path, names=("x1", "x2", "x3"))
    pictures = sorted((tmp_path / "images" / "training").iterdir())
    for count, picture in enumerate(pictures, 1):
        picture.write_bytes(picture.read_bytes()[:60])
        with pytest.raises(DatasetError, match=r"x1\.jpg: cannot be read as a picture"):
            find_dataset("ade20k", tmp_path, "train")
        if count < len(pictures):
            assert len(find_dataset("ade20k", tmp_path, "train", skip_corrupt=True).samples) == 3
    with pytest.raises(DatasetError, match=r"x1\.jpg: cannot be read as a picture"):
        find_dataset("ade20k", tmp_path, "train", skip_corrupt=True)
