"""Where pictures and labels are looked for: list files, endings, names."""

import pytest
from making import HEIGHT, THREE, WIDTH, ade20k, cityscapes, listed, voc2012, write_labels, write_picture

from pspnet_fast.data.classes import CLASSES
from pspnet_fast.data.datasets import DatasetError, Sample, find_dataset, read_labels, read_sample


def test_list_files(tmp_path):
    path = listed(tmp_path, "p/a.jpg l/a.png\n\np/a.jpg l/a.png\n")
    found = find_dataset("list", tmp_path, "train", list_file=path, classes=THREE)
    assert found.samples == (Sample(tmp_path / "p" / "a.jpg", tmp_path / "l" / "a.png"),) * 2
    assert read_labels(found.samples[0].labels, found).ravel()[:3].tolist() == [0, 2, 255]
    named = find_dataset("ade20k", tmp_path, "val", list_file=path)  # a list file of a named dataset: 0 is "wall"
    assert named.classes == CLASSES["ade20k"]
    assert read_labels(found.samples[0].labels, named).ravel()[:3].tolist() == [0, 2, 255]
    listed(tmp_path, "p/a.jpg l/a.png", values=[3])
    with pytest.raises(DatasetError, match=r"l/a\.png: labels must be 0 to 2 or 255, got 3 \(54 pixels\)"):
        find_dataset("list", tmp_path, "train", list_file=path, classes=THREE)


def test_list_files_of_a_test_split(tmp_path):
    path = listed(tmp_path, "p/a.jpg\n")
    found = find_dataset("list", tmp_path, "test", list_file=path, classes=THREE)
    assert found.samples == (Sample(tmp_path / "p" / "a.jpg", None),)


@pytest.mark.parametrize(
    ("text", "split", "problem"),
    [
        ("p/a.jpg l/a.png\np/a.jpg\n", "train", "line 2: expected a picture and its labels, got 1 columns"),
        ("p/a.jpg l/a.png l/a.png\n", "val", "line 1: expected a picture and its labels, got 3 columns"),
        ("p/a.jpg l/a.png\n", "test", "line 1: expected a picture, got 2 columns"),
        ("\n", "train", r"expected pictures in .*list\.txt, it is empty"),
        ("p/b.jpg l/b.png\n", "train", r"2 files of .*list\.txt are missing: .*p/b\.jpg, .*l/b\.png"),
    ],
)
def test_list_files_that_do_not_fit(tmp_path, text, split, problem):
    path = listed(tmp_path, text)
    with pytest.raises(DatasetError, match=f"list: .*{problem}"):
        find_dataset("list", tmp_path, split, list_file=path, classes=THREE)


def test_list_files_of_windows(tmp_path):
    """A byte-order mark, and lines that end in two characters."""
    path = listed(tmp_path, "")
    path.write_bytes("\ufeffp/a.jpg l/a.png\r\np/a.jpg\tl/a.png\r\n\r\n".encode())
    found = find_dataset("list", tmp_path, "train", list_file=path, classes=THREE)
    assert found.samples == (Sample(tmp_path / "p" / "a.jpg", tmp_path / "l" / "a.png"),) * 2


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("p/my dog.jpg\tl/my dog.png", ("my dog.jpg", "my dog.png")),
        ("  p/my dog.jpg \t\t l/my dog.png\t", ("my dog.jpg", "my dog.png")),
        ('"p/my dog.jpg" "l/my dog.png"', ("my dog.jpg", "my dog.png")),
        ("'p/my dog.jpg'\t\"l/my dog.png\"", ("my dog.jpg", "my dog.png")),
        ('"p/my dog.jpg" l/x.png', ("my dog.jpg", "x.png")),
        ("p/dog's.jpg l/dog's.png", ("dog's.jpg", "dog's.png")),
        ("p/'s.jpg l/'s.png", ("'s.jpg", "'s.png")),
        ("p/x.jpg \t l/x.png", ("x.jpg", "x.png")),
        ("p/x.jpg l/x.png\t", ("x.jpg", "x.png")),
        ("p/\u00fc\u2028.jpg l/x.png", ("\u00fc\u2028.jpg", "x.png")),
    ],
)
def test_names_with_spaces_and_quotes_in_a_list(tmp_path, line, names):
    write_picture(tmp_path / "p" / names[0])
    write_labels(tmp_path / "l" / names[1], (0, 1, 2))
    (tmp_path / "list.txt").write_text(f"{line}\n", encoding="utf-8")
    if "\u2028" in line:  # no end of a line here, but it is between words
        with pytest.raises(DatasetError, match="line 1: expected a picture and its labels, got 3 columns"):
            find_dataset("list", tmp_path, "train", list_file=tmp_path / "list.txt", classes=THREE)
        return
    found = find_dataset("list", tmp_path, "train", list_file=tmp_path / "list.txt", classes=THREE)
    assert found.samples == (Sample(tmp_path / "p" / names[0], tmp_path / "l" / names[1]),)
    (tmp_path / "test.txt").write_text(f'p/{names[0]}\n"p/{names[0]}"\n', encoding="utf-8")
    alone = find_dataset("list", tmp_path, "test", list_file=tmp_path / "test.txt", classes=THREE)
    assert alone.samples == (Sample(tmp_path / "p" / names[0], None),) * 2


def test_apostrophes_are_no_quotes(tmp_path):
    write_picture(tmp_path / "'s.jpg")
    write_labels(tmp_path / "'t.png", (0, 1, 2))
    (tmp_path / "list.txt").write_text("'s.jpg 't.png\n")
    found = find_dataset("list", tmp_path, "train", list_file=tmp_path / "list.txt", classes=THREE)
    assert found.samples == (Sample(tmp_path / "'s.jpg", tmp_path / "'t.png"),)


def test_names_with_spaces_are_explained(tmp_path):
    path = listed(tmp_path, "p/my dog.jpg l/my dog.png\n")
    with pytest.raises(DatasetError, match=r"got 4 columns \(names with spaces stand in quotes, or have tabs"):
        find_dataset("list", tmp_path, "train", list_file=path, classes=THREE)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_lists_of_another_encoding_are_explained(tmp_path, encoding):
    path = listed(tmp_path, "")
    path.write_bytes("p/\u00fc.jpg l/a.png\n".encode(encoding))
    with pytest.raises(DatasetError, match=r"list.txt must be UTF-8, got byte 0xf[cf] at [02] \(Latin-1 or UTF-16"):
        find_dataset("list", tmp_path, "train", list_file=path, classes=THREE)
    voc2012(tmp_path, ["a"])
    names = tmp_path / "ImageSets" / "Segmentation" / "train.txt"
    names.write_bytes("\u00fc\n".encode(encoding))
    with pytest.raises(DatasetError, match=r"voc2012: .*train.txt must be UTF-8"):
        find_dataset("voc2012", tmp_path, "train")


@pytest.mark.parametrize("ending", [".jpg", ".JPG", ".jpeg", ".JPEG", ".png", ".PNG"])
def test_endings_in_every_layout(tmp_path, ending):
    labels = ".PNG" if ending.isupper() else ".png"

    def ends(found):
        assert len(found.samples) == 2
        assert all(s.image.name.endswith(ending) and s.labels.name.endswith(labels) for s in found.samples)
        assert read_sample(found.samples[0], found)[0].shape == (HEIGHT, WIDTH, 3)

    ade20k(tmp_path / "a", names=("x1", "x2.b"))
    voc2012(tmp_path / "v", ["my a", "b.c"])
    cityscapes(tmp_path / "c")
    for folder in (tmp_path / "a/images", tmp_path / "v/JPEGImages", tmp_path / "c/leftImg8bit"):
        for path in [*folder.rglob("*.jpg"), *folder.rglob("*.png")]:
            path.unlink()
            write_picture(path.with_suffix(ending))
    for folder in (tmp_path / "a/annotations", tmp_path / "v/SegmentationClass", tmp_path / "c/gtFine"):
        for path in folder.rglob("*.png"):
            path.rename(path.with_suffix(labels))
    ends(find_dataset("ade20k", tmp_path / "a", "train"))
    ends(find_dataset("voc2012", tmp_path / "v", "train"))
    ends(find_dataset("cityscapes", tmp_path / "c", "train"))


def test_hidden_files_are_no_pictures(tmp_path):
    """As macOS leaves them on disks of others."""
    ade20k(tmp_path)
    (tmp_path / "images" / "training" / "._x1.jpg").write_bytes(b"\0\5\x16\7")
    (tmp_path / "annotations" / "training" / "._x1.png").write_bytes(b"\0\5\x16\7")
    assert len(find_dataset("ade20k", tmp_path, "train").samples) == 3
    cityscapes(tmp_path)
    (tmp_path / "leftImg8bit" / "train" / "ulm" / "._ulm_000001_000019_leftImg8bit.png").write_bytes(b"")
    assert len(find_dataset("cityscapes", tmp_path, "train").samples) == 2


def test_voc2012_takes_its_own_ending_first(tmp_path):
    voc2012(tmp_path, ["a"])
    write_picture(tmp_path / "JPEGImages" / "a.png")
    assert find_dataset("voc2012", tmp_path, "train").samples[0].image.name == "a.jpg"


def test_a_list_file_that_is_not_there(tmp_path):
    with pytest.raises(DatasetError, match=r"list: expected a list of pictures at .*absent\.txt: .*No such file"):
        find_dataset("list", tmp_path, "train", list_file=tmp_path / "absent.txt", classes=THREE)
