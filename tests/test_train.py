import contextlib
import copy
import functools
import logging
import os
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import trainings
import yaml
from PIL import Image
from trainings import assert_same, in_one, in_processes, largest_difference, weights

from pspnet_fast import cli, snapshot, train
from pspnet_fast.config import ConfigError, Recipe, plain
from pspnet_fast.data.augmentation import Augmentation
from pspnet_fast.data.datasets import DatasetError
from pspnet_fast.schedule import iterations_of, learning_rate, optimizer, parameter_groups
from pspnet_fast.train import Run, TrainingError

needs_parser = pytest.mark.skipif(find_spec("jsonargparse") is None, reason="jsonargparse is not installed")
scenes, tiny = trainings.scenes, trainings.tiny  # fixtures


def test_a_run(tiny, scenes, caplog):
    recipe, run = tiny()
    with caplog.at_level(logging.INFO):
        result = train.train(recipe, run)
    assert f"train: 10 pictures of {scenes}/images/training" in caplog.text
    assert f"val: 2 pictures of {scenes}/images/validation" in caplog.text
    assert (result.iteration, result.finished) == (6, True)
    assert [i for i, _ in result.losses] == [2, 4, 6]
    assert sorted(os.listdir(run.output)) == sorted(
        [snapshot.BEST, snapshot.LAST, snapshot.PREVIOUS, "learning_curve.png", "train.log", ".lock"]
    )
    last, previous = (snapshot.read(run.output / name) for name in (snapshot.LAST, snapshot.PREVIOUS))
    assert (last["iteration"], previous["iteration"]) == (6, 4)
    assert not torch.equal(last["model"]["cls.4.weight"], previous["model"]["cls.4.weight"])
    assert result.scores == [(6, result.evaluation.scores.miou)] == last["scores"]
    assert (last["best"], last["validation_due"]) == (result.evaluation.scores.miou, False)
    assert len(result.evaluation.images) == 2


def test_deterministic(tiny):
    runs = [tiny(name, deterministic=True, iterations=3, validate_images=1) for name in ("a", "b")]
    for recipe, run in runs:
        train.train(recipe, run)
    assert_same(*(weights(run.output) for _, run in runs))
    assert not torch.are_deterministic_algorithms_enabled()
    recipe, other = tiny("other", deterministic=True, iterations=3, validate_images=1, seed=1)
    train.train(recipe, other)
    assert not torch.equal(weights(other.output)["cls.4.weight"], weights(runs[0][1].output)["cls.4.weight"])


def test_deterministic_refuses_what_does_not_repeat(tiny, monkeypatch):
    """The setting reaches torch: an operation without a deterministic form raises inside the run."""
    seen = []
    step = train._Training._step
    monkeypatch.setattr(
        train._Training,
        "_step",
        lambda self, *rest: (seen.append(torch.are_deterministic_algorithms_enabled()), step(self, *rest))[1],
    )
    recipe, run = tiny(iterations=1, deterministic=True)
    train.train(recipe, run)
    assert seen == [True]


def test_two_processes_are_one_with_the_joint_batch(tiny):
    """Weights and running statistics, to rounding; without synchronised norms they are not."""
    options = {"iterations": 3, "dropout": 0.0, "validate_images": 2}
    recipe, one = tiny("one", **options)
    first = train.train(recipe, one)
    _, two = tiny("two", **options)
    in_processes(recipe, two)
    _, apart = tiny("apart", **options, sync_bn=False)
    in_processes(recipe, apart)
    expected = weights(one.output)
    same, other = (largest_difference(weights(run.output), expected) for run in (two, apart))
    assert same < 5e-4
    assert other > 20 * same
    content = snapshot.read(two.output / snapshot.LAST)
    assert content["processes"] == 2
    assert [i for i, _ in content["losses"]] == [2, 3]
    for ours, theirs in zip(content["losses"], first.losses, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_all_processes_leave_together(tiny, monkeypatch):
    """Where one of two is asked to stop: at the next look, and what goes on ends as one process with the joint batch."""
    options = {"dropout": 0.0, "validate_images": 2}
    recipe, whole = tiny("whole", **options)
    train.train(recipe, whole)
    _, run = tiny("run", resume="auto", **options)
    with monkeypatch.context() as patch:
        patch.setattr(train.Stop, "__enter__", lambda self: setattr(self, "asked", os.environ["RANK"] == "1") or self)
        in_processes(recipe, run)
    assert snapshot.read(run.output / snapshot.LAST)["iteration"] == 2
    in_processes(recipe, run)
    assert largest_difference(weights(run.output), weights(whole.output)) < 5e-4


def _broken(rank, world_size, port, recipe, run):
    send = train._Training._to_device

    def broken(self, batch):
        images, labels = send(self, batch)
        return images * float("nan") if rank == 1 else images, labels

    train._Training._to_device = broken
    try:
        in_one(rank, world_size, port, recipe, run)
    except TrainingError as error:
        (run.output / f"error.{rank}").write_text(str(error))


def test_a_loss_that_is_not_finite_in_one_process(tiny):
    """All end; the one whose it is names the files of its half of the batch."""
    recipe, run = tiny(sync_bn=False)
    in_processes(recipe, run, process=_broken)
    own, other = ((run.output / f"error.{rank}").read_text() for rank in (1, 0))
    assert other == "iteration 0: the loss of another process is not finite"
    assert own.startswith("iteration 0: the loss is not finite (main nan")
    assert own.count(".jpg") == 2


def test_a_batch_without_labels_is_no_loss(tiny, monkeypatch):
    """Nothing to learn, nothing broken."""
    send = train._Training._to_device
    monkeypatch.setattr(
        train._Training, "_to_device", lambda self, batch: (send(self, batch)[0], torch.full_like(batch[1].long(), 255))
    )
    recipe, run = tiny(iterations=2, validate_images=1)
    assert train.train(recipe, run).losses == [(2, 0.0)]
    assert all(tensor.isfinite().all() for tensor in weights(run.output).values())


def test_micro_batches_add_up_as_processes_do(tiny):
    """Cut into the same two halves, each normalised by itself: the same parameters."""
    options = {"iterations": 3, "dropout": 0.0, "validate_images": 1}
    recipe, parts = tiny("parts", accumulate=2, **options)
    train.train(recipe, parts)
    _, processes = tiny("processes", sync_bn=False, **options)
    in_processes(recipe, processes)
    _, whole = tiny("whole", **options)
    train.train(recipe, whole)
    runs = (parts, processes, whole)
    ours, theirs, other = ({k: v for k, v in weights(run.output).items() if "running" not in k} for run in runs)
    same = largest_difference(ours, theirs)
    assert same < 5e-4
    assert largest_difference(ours, other) > 20 * same


def test_schedule_and_parameter_groups(tiny, monkeypatch):
    """Every step's rates, ten times higher for pyramid and classifiers, and weight decay for all."""
    recipe, run = tiny(iterations=4, base_lr=0.02, validate_images=1)
    rates, step = [], torch.optim.SGD.step

    def recorded(self, *rest):
        rates.append([group["lr"] for group in self.param_groups])
        assert all(group["momentum"] == 0.9 and group["weight_decay"] == 1e-4 for group in self.param_groups)
        return step(self, *rest)

    monkeypatch.setattr(torch.optim.SGD, "step", recorded)
    train.train(recipe, run)
    expected = [0.02 * (1 - i / 4) ** 0.9 for i in range(4)]
    assert rates == [pytest.approx([rate, 10 * rate]) for rate in expected]
    assert learning_rate(recipe, 0, 4) == 0.02
    rising = Recipe(base_lr=0.02, warmup=4)
    assert [learning_rate(rising, i, 8) for i in (0, 3, 6)] == pytest.approx(
        [0.005, 0.02 * (5 / 8) ** 0.9, 0.02 * (2 / 8) ** 0.9]
    )

    net = recipe.network()
    of_backbone, of_head = (group["params"] for group in parameter_groups(net, recipe))
    names = {id(p): name for name, p in net.named_parameters()}
    assert len(of_backbone) + len(of_head) == len(names)
    assert {names[id(p)].split(".")[0] for p in of_backbone} == {f"layer{i}" for i in range(5)}
    assert {names[id(p)].split(".")[0] for p in of_head} == {"ppm", "cls", "aux"}


def test_adamw(tiny):
    """It trains, its rates are the schedule's, and it goes on to the bit."""
    recipe, whole = tiny("whole", optimizer="adamw", base_lr=1e-3, weight_decay=0.01, validate_images=1)
    made = optimizer(recipe.network(), recipe)
    assert isinstance(made, torch.optim.AdamW)
    assert [group["betas"] for group in made.param_groups] == [(0.9, 0.999)] * 2
    assert [group["weight_decay"] for group in made.param_groups] == [0.01] * 2
    train.train(recipe, whole)
    _, again = tiny("again", resume=str(whole.output / snapshot.PREVIOUS), validate_images=1)
    train.train(recipe, again)
    assert_same(weights(again.output), weights(whole.output))


def test_epochs():
    assert iterations_of(Recipe(epochs=3, batch_size=4), 10) == 8
    assert iterations_of(Recipe(iterations=5), 10) == 5
    for both in ({}, {"epochs": 1, "iterations": 1}):
        with pytest.raises(ConfigError, match="give iterations or epochs"):
            iterations_of(Recipe(**both), 10)


def test_the_auxiliary_loss_has_its_weight(tiny):
    """With weight 0 there is no auxiliary head; with others the third stage learns something else."""
    found = []
    for weight in (0.0, 0.4, 0.9):
        recipe, run = tiny(str(weight), aux_weight=weight, iterations=1, dropout=0.0, validate_images=1)
        train.train(recipe, run)
        found.append(weights(run.output))
    assert not any(name.startswith("aux") for name in found[0])
    moved = [state["aux.0.weight"] for state in found[1:]]
    assert not torch.equal(*moved)


def test_clipping(tiny):
    """With the norm of all gradients clipped to nothing, weights without decay stay where they started."""
    options = {"iterations": 1, "weight_decay": 0.0, "validate_images": 1}
    recipe, run = tiny(clip_norm=1e-12, **options)
    train.train(recipe, run)
    torch.manual_seed(run.seed)
    for name, parameter in recipe.network().named_parameters():
        torch.testing.assert_close(weights(run.output)[name], parameter.detach(), atol=1e-9, rtol=0)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast(tiny, precision):
    recipe, run = tiny(precision=precision, iterations=2, validate_images=1)
    result = train.train(recipe, run)
    content = snapshot.read(run.output / snapshot.LAST)
    assert all(torch.isfinite(t).all() for t in content["model"].values())
    assert content["model"]["cls.4.weight"].dtype == torch.float32
    assert bool(content["scaler"]) == (precision == "fp16")
    recipe, plain_run = tiny("plain", iterations=2, validate_images=1)
    expected = train.train(recipe, plain_run).losses
    assert result.losses != expected
    assert result.losses[0][1] == pytest.approx(expected[0][1], rel=0.05)


def test_compiled(tiny, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager", fullgraph=True))
    options = {"iterations": 2, "dropout": 0.0, "validate_images": 1}
    recipe, compiled = tiny("compiled", compile=True, **options)
    train.train(recipe, compiled)
    _, eager = tiny("eager", **options)
    train.train(recipe, eager)
    assert set(weights(compiled.output)) == set(weights(eager.output))
    assert largest_difference(weights(compiled.output), weights(eager.output)) < 1e-3


def test_validation_keeps_the_best(tiny, monkeypatch):
    real, scores = train.evaluate, iter([0.2, 0.5, 0.3])

    def scored(*args, **options):
        found = real(*args, **options)
        return found._replace(scores=found.scores._replace(miou=next(scores)))

    monkeypatch.setattr(train, "evaluate", scored)
    recipe, run = tiny(validate_every=2)
    result = train.train(recipe, run)
    assert result.scores == [(2, 0.2), (4, 0.5), (6, 0.3)]
    best = snapshot.read(run.output / snapshot.BEST)
    assert (best["iteration"], best["best"]) == (4, 0.5)


def test_tensorboard(tiny):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    recipe, run = tiny(tensorboard=True, validate_images=1)
    result = train.train(recipe, run)
    found = events.EventAccumulator(str(run.output), {"images": 0}).Reload()
    assert [(e.step, pytest.approx(e.value)) for e in found.Scalars("train/loss")] == result.losses
    assert found.Scalars("validation/miou")[0].value == pytest.approx(result.evaluation.scores.miou)
    assert {"train/aux_loss", "train/learning_rate", "train/images_per_s"} <= set(found.Tags()["scalars"])
    assert found.Images("predictions/0")[0].width > 64


def test_a_loss_that_is_not_finite(tiny, capsys):
    """Named by iteration and files; the snapshot is from before."""
    recipe, run = tiny(base_lr=1e30, iterations=10)
    with pytest.raises(TrainingError, match=r"^iteration [1-3]: the loss is not finite .*scene_\d+\.jpg") as error:
        train.train(recipe, run)
    assert str(error.value).count(".jpg") == 4
    for name in (snapshot.LAST, snapshot.PREVIOUS):
        with contextlib.suppress(FileNotFoundError):
            assert all(t.isfinite().all() for t in weights(run.output, name).values())


@needs_parser
def test_a_full_disk(tiny, monkeypatch, capsys, tmp_path):
    """The command ends with the reason, and the snapshot of before is whole."""
    recipe, run = tiny()
    saved = torch.save
    done = []

    def full(content, file):
        if len(done) == 1:
            raise OSError(28, "No space left on device")
        done.append(content["iteration"])
        saved(content, file)

    monkeypatch.setattr(torch, "save", full)
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**plain(recipe), **plain(run)}))
    assert cli.main(["train", str(path)]) == 2
    error = capsys.readouterr().err
    assert "last.pth: cannot be written: No space left on device; the last.pth that was there is untouched" in error
    assert snapshot.read(run.output / snapshot.LAST)["iteration"] == 2


def damaged(scenes, folder):
    """A copy of the data with one training image cut short, and one label out of range, in the middle of the list."""
    import shutil

    shutil.copytree(scenes, folder)
    images = sorted((folder / "images" / "training").iterdir())
    images[2].write_bytes(images[2].read_bytes()[:200])
    labels = folder / "annotations" / "training" / f"{images[3].stem}.png"
    raw = np.array(Image.open(labels))
    raw[:2, :3] = 99
    Image.fromarray(raw).save(labels)
    return folder, images[2], labels


def test_data_that_cannot_be_read(tiny, scenes, tmp_path, caplog):
    folder, image, labels = damaged(scenes, tmp_path / "damaged")
    recipe, run = tiny(data=folder, check_data=True)
    with pytest.raises(DatasetError, match="2 problems in split train") as error:
        train.train(recipe, run)
    assert str(image) in str(error.value)
    assert f"{labels}: labels must be 0 to 11, got 99 (6 pixels)" in str(error.value)
    recipe, run = tiny(data=folder)
    with pytest.raises(DatasetError, match=f"{image}|{labels}"):
        train.train(recipe, run)
    recipe, run = tiny(data=folder, skip_corrupt=True, validate_images=1)
    with caplog.at_level(logging.WARNING):
        assert train.train(recipe, run).finished
    assert {str(image), str(labels)} <= {word.rstrip(":") for word in caplog.text.split()}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"accumulate": 3}, "batch_size must be a multiple of 1 processes times accumulate = 3, got 4"),
        ({"data": None}, "data is missing"),
        ({"device": "cuda:99"}, "device"),
        ({"device": "gpu"}, "device must be cpu, cuda or cuda:1, got 'gpu'"),
        ({"epochs": 2}, "give iterations or epochs, got 6 and 2"),
    ],
)
def test_settings_that_cannot_work(tiny, changes, words):
    if changes.get("device") == "cuda:99" and torch.cuda.is_available():
        pytest.skip("there are GPUs")
    recipe, run = tiny(**changes)
    with pytest.raises(ConfigError, match=words):
        train.train(recipe, run)


@pytest.mark.parametrize(
    ("name", "value"),
    [("workers", -1), ("log_every", 0), ("accumulate", 0), ("clip_norm", 0.0), ("checkpoint_every", 0)],
)
def test_runs_that_cannot_work(name, value):
    with pytest.raises(ConfigError, match=f"^{name} must be"):
        Run(**{name: value})


@needs_parser
def test_the_command(tiny, tmp_path, capsys):
    recipe, run = tiny(iterations=2)
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(plain(recipe)))
    options = ["--output", str(run.output), "--workers", "0", "--log-every", "1", "--validate-images", "1"]
    assert cli.main(["train", str(path), *options]) == 0
    assert snapshot.read(run.output / snapshot.LAST)["recipe"] == plain(recipe)
    assert cli.main(["train", str(path), *options, "--bins", "1", "--resume", "auto"]) == 2
    assert "another training: bins [1, 2] instead of [1]" in capsys.readouterr().err
    options[1] = str(tmp_path / "other")
    assert cli.main(["train", str(path), *options, "--data", str(tmp_path / "none")]) == 2
    assert f"scenes: expected a folder at {tmp_path / 'none'}" in capsys.readouterr().err
    assert cli.main(["train", str(path), *options, "--base-lr", "1e30", "--iterations", "6"]) == 1
    assert "the loss is not finite" in capsys.readouterr().err


def test_augmentation_reaches_the_samples(tiny, monkeypatch):
    recipe, run = tiny(iterations=1, augmentation=Augmentation(mirror=1.0), validate_images=1)
    seen = []
    real = train.Samples

    def recorded(*args):
        seen.append(args)
        return real(*args)

    monkeypatch.setattr(train, "Samples", recorded)
    train.train(recipe, run)
    assert seen[0][1:] == (33, Augmentation(mirror=1.0), 0, False)


def test_a_copy_of_the_network_is_not_needed(tiny):
    """Snapshots hold the network's own names, whatever wraps it while it trains."""
    recipe, run = tiny(iterations=1, validate_images=1)
    train.train(recipe, run)
    net = copy.deepcopy(recipe.network())
    net.load_state_dict(weights(run.output))
    assert set(weights(run.output)) == set(net.state_dict())
