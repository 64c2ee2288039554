import csv
import importlib.util
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from torch import nn

from pspnet_fast.charts import confusion_picture
from pspnet_fast.data.classes import CLASSES, Classes
from pspnet_fast.data.datasets import DatasetError, find_dataset, read_sample
from pspnet_fast.evaluate import Evaluation, ImageScore, evaluate, table, to_json, write_json
from pspnet_fast.metrics import confusion_matrix, scores
from pspnet_fast.predict import MULTIPLE_SCALES, PictureError, Protocol, predict_labels

_spec = importlib.util.spec_from_file_location("restated", Path(__file__).with_name("test_predict.py"))
restated = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(restated)

FOUR = Classes(("sky", "tree", "road", "lamp post"), ((9, 9, 200), (0, 99, 0), (90, 90, 90), (200, 0, 0)))
SIZES = ((30, 44), (44, 30), (25, 25), (13, 50), (61, 37))
WINDOWS = Protocol(crop=25, base_size=40, batch_size=4)


class Smooth(nn.Module):
    """Four classes, whose logits vary smoothly with the colours around a pixel and with its place in the window."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Conv2d(3, 4, 5, padding=2, padding_mode="replicate")
        nn.init.normal_(self.mix.weight, std=0.3)

    def forward(self, x):
        place = torch.linspace(-1, 1, x.shape[2])[:, None] * torch.linspace(0.5, 1, x.shape[3])
        return self.mix(x) + place * torch.arange(4.0)[:, None, None]


def smooth(low, high, height, width, random):
    """Noise that varies over a few pixels, (height, width)."""
    return restated.resize(random.uniform(low, high, (height // 6 + 2, width // 6 + 2, 1)), height, width)[..., 0]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Five pictures of different sizes, in the format of list files, whose labels are right in part and partly ignored."""
    root, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(3)
    lines = []
    for i, (height, width) in enumerate(SIZES):
        image = np.stack([smooth(0, 255, height, width, random) for _ in range(3)], 2)
        labels = smooth(0, 4, height, width, random).astype(np.uint8)
        labels[smooth(0, 1, height, width, random) > 0.7] = 255
        Image.fromarray(image.astype(np.uint8)).save(root / f"p{i}.png")
        Image.fromarray(labels).save(root / f"l{i}.png")
        lines.append(f"p{i}.png l{i}.png\n")
    (root / "list.txt").write_text("".join(lines))
    return find_dataset("list", root, "val", list_file=root / "list.txt", classes=FOUR)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Smooth().eval()


def run(net, dataset, protocol=WINDOWS, **options):
    return evaluate(net, dataset, protocol, device="cpu", **options)


@pytest.mark.parametrize("kind", ["semseg", "caffe"])
@pytest.mark.parametrize(("scales", "flip"), [((1.0,), False), (MULTIPLE_SCALES, True)], ids=["one", "six"])
def test_equals_the_protocol_restated_in_numpy(net, dataset, kind, scales, flip):
    """To the last pixel, and so in every score. Nothing is close enough to a tie that rounding could decide."""
    protocol = WINDOWS._replace(kind=kind, scales=scales, flip=flip)
    matrix, closest = 0, 1.0
    for sample in dataset.samples:
        image, truth = read_sample(sample, dataset)
        expected = getattr(restated, kind)(net, image.astype(np.float64), 25, 40, scales, flip)
        best = np.sort(expected, 2)
        closest = min(closest, (best[..., -1] - best[..., -2]).min())
        labels = expected.argmax(2)
        ours = predict_labels(net, torch.from_numpy(image).permute(2, 0, 1), protocol)
        np.testing.assert_array_equal(ours.numpy(), labels)
        assert len(np.unique(labels)) >= 3
        matrix = matrix + confusion_matrix(torch.from_numpy(labels), torch.from_numpy(truth), 4)
    assert closest > 2e-5
    found = run(net, dataset, protocol)
    assert torch.equal(found.matrix, matrix)
    assert abs(found.scores.miou - scores(matrix).miou) < 1e-4
    assert 0.1 < found.scores.miou < 0.9


def test_what_is_found(net, dataset):
    found = run(net, dataset, absent="nan", progress=True)
    assert (found.dataset, found.split, found.names, found.absent) == ("list", "val", FOUR.names, "nan")
    assert found.protocol == WINDOWS
    assert found.skipped == ()
    assert found.scores == scores(found.matrix, "nan")
    assert [one.image.name for one in found.images] == [f"p{i}.png" for i in range(5)]
    truths = [read_sample(sample, dataset)[1] for sample in dataset.samples]
    assert found.pixels == tuple(sum(int((truth == k).sum()) for truth in truths) for k in range(4))
    assert found.images_per_second == 5 / found.seconds > 0
    for one, sample in zip(found.images, dataset.samples, strict=True):
        alone = run(net, dataset._replace(samples=(sample,)), absent="nan")
        assert one.miou == alone.scores.miou


def _process(rank, world_size, store, net, dataset, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    found = run(
        net, dataset, output=folder / "out", predictions=True, skip_corrupt=True, rank=rank, world_size=world_size
    )
    torch.save({**found._asdict(), "protocol": None}, folder / f"found.{rank}", pickle_protocol=4)
    dist.destroy_process_group()


def test_two_processes_are_one(net, dataset, tmp_path, monkeypatch):
    """The same matrix, scores, pictures and files; one picture of the second process cannot be read."""
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    samples = [*dataset.samples]
    samples[3] = samples[3]._replace(image=broken)
    dataset = dataset._replace(samples=tuple(samples))
    mp.start_processes(_process, (2, tmp_path / "store", net, dataset, tmp_path), nprocs=2, start_method="fork")
    parts = [torch.load(tmp_path / f"found.{rank}", weights_only=False) for rank in range(2)]
    alone = run(net, dataset, output=tmp_path / "alone", predictions=True, skip_corrupt=True)
    for part in parts:
        assert torch.equal(part["matrix"], alone.matrix)
        assert part["scores"] == alone.scores
        assert part["images"] == alone.images
        assert part["skipped"] == alone.skipped
    assert [one.image.name for one in alone.images] == ["p0.png", "p1.png", "p2.png", "p4.png"]
    assert len(alone.skipped) == 1
    assert str(broken) in alone.skipped[0]
    files = {path.relative_to(tmp_path / "alone"): path for path in (tmp_path / "alone").rglob("*.*")}
    assert {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*.*")} == set(files)
    for path, one in files.items():
        if path.name != "results.json":  # holds the time
            assert one.read_bytes() == (tmp_path / "out" / path).read_bytes(), path


def _unwritable(rank, world_size, store, net, dataset, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)

    def report(_):
        time.sleep(1)  # in which a process that failed would long have ended
        (folder / "reported").touch()

    options = {"output": folder / "out", "predictions": True, "rank": rank, "world_size": world_size}
    try:
        run(net, dataset, report=report, **options)
        ended = "well"
    except PictureError as error:
        ended = str(error)
    (folder / f"ended.{rank}").write_text(f"{(folder / 'reported').exists()} {ended}")
    dist.destroy_process_group()


def test_what_one_process_cannot_write_the_first_one_says(net, dataset, tmp_path):
    """The others end well, and after it has reported: torchrun stops all where one fails."""
    (tmp_path / "out" / "predictions" / "p1_labels.png").mkdir(parents=True)  # of the second process
    mp.start_processes(_unwritable, (2, tmp_path / "store", net, dataset, tmp_path), nprocs=2, start_method="fork")
    first, second = ((tmp_path / f"ended.{rank}").read_text() for rank in range(2))
    assert "p1_labels.png: cannot be written" in first
    assert second == "True well"
    assert {"results.json", "p0_labels.png", "p2_labels.png", "p4_labels.png"} < _files(tmp_path / "out")
    assert "p3_labels.png" not in _files(tmp_path / "out")


def test_files(net, dataset, tmp_path):
    (tmp_path / "worst").mkdir()
    for name in ("01_0.111_earlier.png", "my_own.png"):
        (tmp_path / "worst" / name).touch()
    found = run(net, dataset, output=tmp_path, absent="nan")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "confusion.png",
        "per_class.csv",
        "results.json",
        "worst",
    ]

    with (tmp_path / "per_class.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["class", "IoU", "accuracy", "pixels"]
    assert [row[0] for row in rows[1:]] == list(FOUR.names)
    assert [float(row[1]) for row in rows[1:]] == list(found.scores.iou)
    assert [float(row[2]) for row in rows[1:]] == list(found.scores.acc)
    assert [int(row[3]) for row in rows[1:]] == list(found.pixels)
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(to_json(found)))

    lowest = sorted(found.images, key=lambda one: one.miou)
    names = [f"{i:02d}_{one.miou:.3f}_{one.image.stem}.png" for i, one in enumerate(lowest, 1)]
    assert sorted(path.name for path in (tmp_path / "worst").iterdir()) == [*names, "my_own.png"]
    sample = next(sample for sample in dataset.samples if sample.image == lowest[0].image)
    image, truth = read_sample(sample, dataset)
    shown = np.asarray(Image.open(tmp_path / "worst" / names[0]))
    height, width = truth.shape
    palette = np.array([*FOUR.colours, *[(255, 255, 255)] * 252], np.uint8)
    labels = predict_labels(net, torch.from_numpy(image).permute(2, 0, 1), WINDOWS).numpy()
    assert shown.shape == (height, 3 * width + 16, 3)
    np.testing.assert_array_equal(shown[:, :width], image)
    np.testing.assert_array_equal(shown[:, width + 8 : 2 * width + 8], palette[labels])
    np.testing.assert_array_equal(shown[:, 2 * width + 16 :], palette[truth])


def test_no_more_than_eight_worst(net, dataset, tmp_path):
    """Of ten pictures the two best are left out; those of one name are numbered; one of ignored pixels is not among them."""
    unlabelled = tmp_path / "empty.png"
    Image.fromarray(np.full(SIZES[0], 255, np.uint8)).save(unlabelled)
    samples = (dataset.samples[0]._replace(labels=unlabelled), *dataset.samples, *dataset.samples)
    found = run(net, dataset._replace(samples=samples), output=tmp_path)
    assert math.isnan(found.images[0].miou)
    mious = sorted(one.miou for one in found.images[1:])
    names = sorted(path.name for path in (tmp_path / "worst").iterdir())
    assert [name[:9] for name in names] == [f"{i:02d}_{miou:.3f}_" for i, miou in enumerate(mious[:8], 1)]
    assert len({name[9:15] for name in names}) == 8


def test_predictions(net, dataset, tmp_path):
    run(net, dataset, output=tmp_path, predictions=True)
    names = [f"p{i}_{kind}.png" for i in range(5) for kind in ("colour", "labels")]
    assert sorted(path.name for path in (tmp_path / "predictions").iterdir()) == names
    image, _ = read_sample(dataset.samples[1], dataset)
    labels = predict_labels(net, torch.from_numpy(image).permute(2, 0, 1), WINDOWS).numpy()
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "predictions" / "p1_labels.png")), labels)
    coloured = np.asarray(Image.open(tmp_path / "predictions" / "p1_colour.png"))
    np.testing.assert_array_equal(coloured, np.array(FOUR.colours, np.uint8)[labels])


def evaluation(names, matrix, absent, skipped=()):
    images = (ImageScore(Path("a.png"), 0.5), ImageScore(Path("b.png"), math.nan))
    return Evaluation("list", "val", names, WINDOWS, absent, scores(matrix, absent), matrix, images, skipped, 4.0)


def test_json_is_strict(tmp_path):
    matrix = torch.diag(torch.tensor([3, 1, 0]))
    found = evaluation(("a", "b", "c"), matrix, "nan", ("c.png: cannot be read",))
    write_json(found, tmp_path / "a.json")
    read = json.loads((tmp_path / "a.json").read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert read["IoU"] == read["accuracy"] == [1.0, 1.0, None]
    assert (read["mIoU"], read["mAcc"], read["aAcc"], read["absent"]) == (1.0, 1.0, 1.0, "nan")
    assert read["protocol"] == {**WINDOWS._asdict(), "scales": [1.0]}
    assert (read["pixels"], read["classes"], read["images"]) == ([3, 1, 0], ["a", "b", "c"], 2)
    assert read["skipped"] == ["c.png: cannot be read"]
    assert (read["seconds"], read["images_per_second"]) == (4.0, 0.5)
    with pytest.raises(PictureError, match=r"absent.a\.json: cannot be written"):
        write_json(found, tmp_path / "absent" / "a.json")


def test_table():
    found = evaluation(("a", "long name", "c"), torch.tensor([[3, 1, 0], [0, 1, 0], [0, 0, 0]]), "nan", ("c.png: bad",))
    assert table(found).splitlines() == [
        "class        IoU    acc",
        "a          75.00  75.00",
        "long name  50.00 100.00",
        "c              -      -",
        "",
        "mIoU  62.50   mAcc  87.50   aAcc  80.00   (per cent; absent classes: nan)",
        "list val: 2 pictures in 4.0 s, 0.50 a second, 1 skipped",
    ]


def test_a_long_table_is_set_in_columns():
    names = tuple(f"class {i}" for i in range(50))
    lines = table(evaluation(names, torch.eye(50, dtype=torch.int64), "zero")).splitlines()
    assert len(lines) == 1 + 17 + 3
    for i in range(50):
        assert sum(f"class {i} " in line for line in lines) == 1
    assert lines[1].count("100.00") == 6


def test_a_corrupt_picture(net, dataset, tmp_path):
    cut = tmp_path / "cut.jpg"
    image, _ = read_sample(dataset.samples[0], dataset)
    Image.fromarray(image).save(cut)
    cut.write_bytes(cut.read_bytes()[:-200])
    samples = [*dataset.samples]
    samples[2] = samples[2]._replace(image=cut)
    damaged = dataset._replace(samples=tuple(samples))
    with pytest.raises(DatasetError, match=r"cut\.jpg"):
        run(net, damaged)
    found = run(net, damaged, skip_corrupt=True)
    assert len(found.images) == 4
    assert len(found.skipped) == 1
    assert "cut.jpg" in found.skipped[0]
    del samples[2]
    assert torch.equal(found.matrix, run(net, dataset._replace(samples=tuple(samples))).matrix)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"absent": "skip"}, "absent must be one of zero, nan, one, got 'skip'"),
        ({"predictions": True}, "predictions need an output folder, got none"),
        ({"rank": 1}, "got rank 1 of 1"),
        ({"world_size": 2}, "with torch.distributed initialised for more than one process, got rank 0 of 2"),
    ],
)
def test_options_that_cannot_work(net, dataset, options, words):
    with pytest.raises(ValueError, match=f"^evaluate: .*{words}"):
        run(net, dataset, **options)


def test_networks_and_datasets_that_cannot_work(net, dataset, tmp_path):
    with pytest.raises(ValueError, match="evaluate: list must have at least one picture in split val, got none"):
        run(net, dataset._replace(samples=()))
    with pytest.raises(ValueError, match=r"evaluate: net must be in evaluation mode.*call eval\(\) first"):
        run(net.train(), dataset)
    fewer = dataset._replace(classes=Classes(FOUR.names[:2], FOUR.colours[:2]))
    with pytest.raises(ValueError, match="confusion_matrix: (targets|labels) must be from 0 to 1"):
        run(net.eval(), fewer)
    with pytest.raises(DatasetError, match=r"p0\.png: has no labels in split test"):
        run(net, dataset._replace(split="test", samples=(dataset.samples[0]._replace(labels=None),)))
    (tmp_path / "file").touch()
    with pytest.raises(PictureError, match="file: cannot be written into"):
        run(net, dataset, output=tmp_path / "file")


def test_confusion_picture():
    matrix = torch.tensor([[5, 1, 0, 2], [3, 4, 1, 0], [0, 0, 9, 1], [1, 7, 0, 2]])
    drawn, scaled, turned = (
        np.asarray(confusion_picture(one, FOUR.names))
        for one in (matrix, matrix * torch.tensor([[1], [7], [2], [5]]), matrix.T)
    )
    np.testing.assert_array_equal(drawn, scaled)  # rows are normalised
    assert (drawn != turned).any()
    empty = np.asarray(confusion_picture(torch.zeros(4, 4, dtype=torch.int64), FOUR.names))
    grey = (empty == 211).all(2).mean()
    assert grey > 0.2 > (drawn == 211).all(2).mean()
    many = confusion_picture(torch.eye(150), [f"class {i}" for i in range(150)])
    assert max(many.size) < 2000
    with pytest.raises(ValueError, match=r"confusion_picture: matrix must be \(4, 4\), got \(3, 3\)"):
        confusion_picture(torch.eye(3), FOUR.names)


def test_matplotlib_is_missed_at_the_start_and_only_where_it_is_needed(net, dataset, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "pspnet_fast.charts", raising=False)
    monkeypatch.delattr("pspnet_fast.charts", raising=False)
    run(net, dataset)
    monkeypatch.setattr("pspnet_fast.evaluate.predict_labels", lambda *_: pytest.fail("pictures came first"))
    with pytest.raises(ImportError, match=r"charts need matplotlib.*pip install --no-build-isolation '\.\[train\]'"):
        run(net, dataset, output=tmp_path)


@pytest.mark.parametrize("rows", [100, 61, 31, 30, 20, 7, 1], ids=lambda rows: f"{rows} rows")
@pytest.mark.parametrize("base_size", [None, 25, 60])
def test_the_matrix_does_not_depend_on_the_bands(net, dataset, base_size, rows):
    """Pictures of 13 to 61 rows: one band, several, last ones of one row."""
    protocol = WINDOWS._replace(base_size=base_size, scales=(1.0, 0.5), flip=True)
    expected = 0
    for sample in dataset.samples:
        image, truth = (torch.from_numpy(array) for array in read_sample(sample, dataset))
        labels = restated.plain(net, image.permute(2, 0, 1), protocol).argmax(0)
        expected = expected + confusion_matrix(labels, truth, 4)
    found = run(net, dataset, protocol, band=4 * 44 * rows)
    assert torch.equal(found.matrix, expected)


@pytest.mark.parametrize(
    "protocol",
    [Protocol(batch_size=1), Protocol(crop=None, base_size=None, flip=True, batch_size=1)],
    ids=["windows", "whole"],
)
def test_a_picture_of_512x384_and_150_classes(tmp_path, protocol):
    """As large as most, in several bands: the base size is its own long side."""
    net, pixels = restated.telling(150), restated.smooth_picture(384, 512)
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(tmp_path / "p.png")
    with torch.inference_mode():
        truth = restated.plain(net, pixels, protocol)
    best = truth.topk(2, 0).values
    labels = truth.argmax(0).masked_fill(best[0] - best[1] < 1e-6, 255)  # where rounding decides, nothing is counted
    assert (labels == 255).float().mean() < 0.02
    Image.fromarray(labels.to(torch.uint8).numpy()).save(tmp_path / "l.png")
    (tmp_path / "list.txt").write_text("p.png l.png\n")
    pictures = find_dataset("list", tmp_path, "val", list_file=tmp_path / "list.txt", classes=CLASSES["ade20k"])
    found = run(net, pictures, protocol)
    assert int(found.matrix.diag().sum()) == int(found.matrix.sum()) == int((labels != 255).sum())
    assert (found.matrix.diag() > 0).sum() >= 3


def test_what_was_found_is_reported_before_it_is_written(net, dataset, tmp_path, monkeypatch):
    """A disk that is full by then costs no result; also where the report itself fails, the rest is written."""
    reported = []
    found = run(net, dataset, output=tmp_path / "out", report=lambda one: reported.append((one, _files(tmp_path))))
    assert reported == [(found, set())]
    assert "results.json" in _files(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.replace", full)
        with pytest.raises(PictureError, match="cannot be written: No space left on device"):
            run(net, dataset, output=tmp_path / "full", report=reported.append)
    assert torch.equal(reported[1].matrix, found.matrix)
    assert not _files(tmp_path / "full")

    def unread(_):
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        run(net, dataset, output=tmp_path / "unread", report=unread)
    assert {"results.json", "per_class.csv", "confusion.png"} < _files(tmp_path / "unread")


def _files(folder):
    return {path.name for path in folder.rglob("*.*") if path.is_file()}


def test_predictions_that_cannot_be_written_do_not_end_an_evaluation(net, dataset, tmp_path):
    """It goes on, reports, writes the rest, and says so at the end."""
    (tmp_path / "predictions" / "p1_labels.png").mkdir(parents=True)
    reported = []
    with pytest.raises(PictureError, match=r"p1_labels\.png: cannot be written.*no predictions were written after it"):
        run(net, dataset, output=tmp_path, predictions=True, report=reported.append)
    assert torch.equal(reported[0].matrix, run(net, dataset).matrix)
    names = _files(tmp_path)
    assert {"results.json", "p0_labels.png"} < names
    assert "p2_labels.png" not in names


def test_an_evaluation_that_fails_leaves_the_last_ones_files(net, dataset, tmp_path):
    run(net, dataset, output=tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    broken = dataset._replace(samples=(*dataset.samples, dataset.samples[0]._replace(image=tmp_path / "none.png")))
    with pytest.raises(DatasetError, match=r"none\.png"):
        run(net, broken, output=tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


@pytest.mark.parametrize(
    ("image", "labels", "predictions", "refused"),
    [
        ("p.png", "predictions/p_labels.png", True, True),  # pseudo-labels of an earlier run
        ("p.png", "predictions/p_labels.png", False, False),
        ("worst/p.png", "l.png", False, True),
        ("confusion.png", "l.png", False, True),
    ],
)
def test_results_never_overwrite_the_dataset(net, dataset, tmp_path, image, labels, predictions, refused):
    for name, source in zip((image, labels), dataset.samples[0], strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(source.read_bytes())
    sample = dataset.samples[0]._replace(image=tmp_path / image, labels=tmp_path / labels)
    ours = dataset._replace(samples=(sample,))
    before = (tmp_path / image).read_bytes(), (tmp_path / labels).read_bytes()
    (tmp_path / "link").symlink_to(tmp_path)
    if refused:
        with pytest.raises(PictureError, match="its results would overwrite .* which is read: give another folder"):
            run(net, ours, output=tmp_path / "link", predictions=predictions)
    else:
        run(net, ours, output=tmp_path / "link", predictions=predictions)
    assert ((tmp_path / image).read_bytes(), (tmp_path / labels).read_bytes()) == before


def test_results_do_not_lie_among_pictures_that_a_folder_stands_for(net, dataset, tmp_path):
    """The next run would take confusion.png for a picture without labels."""
    folder = dataset.samples[0].image.parent
    before = sorted(folder.rglob("*"))
    with pytest.raises(PictureError, match="or lie beside it, which is read: give another folder"):
        run(net, dataset._replace(name="scenes"), output=folder)
    assert sorted(folder.rglob("*")) == before


def test_a_picture_that_a_scale_makes_too_large_is_named(net, dataset, tmp_path):
    Image.fromarray(np.zeros((1, 400, 3), np.uint8)).save(tmp_path / "long.png")
    Image.fromarray(np.zeros((1, 400), np.uint8)).save(tmp_path / "labels.png")
    sample = dataset.samples[0]._replace(image=tmp_path / "long.png", labels=tmp_path / "labels.png")
    with pytest.raises(
        ValueError, match=r"long\.png: cannot be evaluated: .* must be at most 32768, got 100 times 400"
    ):
        run(net, dataset._replace(samples=(sample,)), Protocol(crop=None, base_size=None, scales=(100.0,)))


def test_what_can_be_said_before_the_pictures(net, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("pspnet_fast.evaluate.predict_labels", lambda *_, **__: pytest.fail("pictures came first"))
    many = Classes(tuple(map(str, range(256))), ((0, 0, 0),) * 256)
    with pytest.raises(
        ValueError, match="evaluate: there must be at most 255 classes, as label 255 is ignored, got 256"
    ):
        run(net, dataset._replace(classes=many))
    with pytest.raises(ValueError, match="Protocol: scales must be from"):
        run(net, dataset, WINDOWS._replace(scales=(math.nan,)))
    (tmp_path / "results.json").mkdir()
    with pytest.raises(PictureError, match=r"results\.json: is a folder"):
        run(net, dataset, output=tmp_path)


def test_a_picture_that_the_network_fails_on_is_named(net, dataset, monkeypatch):
    for error, words in ((MemoryError(), "out of memory: MemoryError"), (RuntimeError("of\na kernel"), "of a kernel")):

        def fails(*_, raised=error, **__):
            raise raised

        monkeypatch.setattr("pspnet_fast.evaluate.predict_labels", fails)
        with pytest.raises(RuntimeError, match=rf"p0\.png: cannot be evaluated: {words}$"):
            run(net, dataset)


def test_names_of_classes_are_shown_as_they_can_be():
    found = evaluation(("a\x1b[2J", "b\nc"), torch.tensor([[3, 1], [0, 1]]), "nan")
    assert table(found).splitlines()[1:3] == [r"a\x1b[2J  75.00  75.00", "b c       50.00 100.00"]


def test_the_scores_are_written_before_the_pictures(net, dataset, tmp_path):
    """A picture that cannot be written leaves the scores, and those of the earlier evaluation are gone."""
    found = run(net, dataset, output=tmp_path)
    (first, *_) = (tmp_path / "worst").iterdir()
    first.unlink()
    first.mkdir()
    (tmp_path / "results.json").unlink()
    (tmp_path / "worst" / "01_0.111_earlier.png").touch()
    with pytest.raises(PictureError, match=f"{first.name}: cannot be written"):
        run(net, dataset, output=tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["mIoU"] == found.scores.miou
    assert not (tmp_path / "worst" / "01_0.111_earlier.png").exists()
