import logging

import numpy as np
import pytest
import torch

from pspnet_fast.data.augmentation import Augmentation
from pspnet_fast.data.datasets import Dataset, DatasetError, find_dataset
from pspnet_fast.data.loader import Samples, Steps, loader, order
from pspnet_fast.data.scenes import write_scenes

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(folder, 5, width=64, height=48)
    return find_dataset("scenes", folder, "train")


def batches(dataset, steps, workers=0, seed=3, **options):
    return [*loader(Samples(dataset, 33, Augmentation(), seed, **options), steps, workers, CPU)]


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


def test_epochs_take_every_image_once_in_another_order(dataset):
    samples = Samples(dataset, 33, Augmentation(), seed=3)
    epochs = [[samples.files(p) for p in range(5 * epoch, 5 * epoch + 5)] for epoch in range(3)]
    assert all(set(epoch) == set(dataset.samples) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert not np.array_equal(order(3, 0, 100), order(4, 0, 100))


def test_the_same_image_is_varied_anew(dataset):
    samples = Samples(dataset, 33, Augmentation(), seed=3)
    p = 0
    again = next(q for q in range(5, 10) if samples.files(q) == samples.files(p))
    assert not torch.equal(samples[p][0], samples[again][0])
    assert torch.equal(samples[p][0], samples[p][0])


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(dataset, workers):
    assert_same(batches(dataset, Steps(0, 4, 2), workers), batches(dataset, Steps(0, 4, 2)))


def test_a_later_start_sees_the_rest(dataset):
    assert_same(batches(dataset, Steps(2, 5, 3)), batches(dataset, Steps(0, 5, 3))[2:])


def test_processes_and_parts_share_the_batch(dataset):
    """What they see together is what one process sees."""
    (whole,) = batches(dataset, Steps(1, 2, 8))
    parts = [part for rank in range(2) for part in batches(dataset, Steps(1, 2, 8, parts=2, rank=rank, processes=2))]
    assert len(parts) == 4
    assert_same([whole], [tuple(torch.cat(each) for each in zip(*parts, strict=True))])
    assert len(Steps(1, 4, 8, parts=2)) == 6


def test_shapes_and_dtypes(dataset):
    ((images, labels),) = batches(dataset, Steps(0, 1, 2))
    assert (images.shape, images.dtype) == ((2, 3, 33, 33), torch.float32)
    assert (labels.shape, labels.dtype) == ((2, 33, 33), torch.uint8)


def test_the_global_generators_are_left_alone(dataset):
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1]
    batches(dataset, Steps(0, 2, 2), workers=1)
    batches(dataset, Steps(0, 2, 2))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


def test_corrupt_images(dataset, tmp_path, caplog):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(dataset.samples[1].image.read_bytes()[:300])
    samples = [*dataset.samples]
    samples[1] = samples[1]._replace(image=broken)
    damaged: Dataset = dataset._replace(samples=tuple(samples))
    with pytest.raises(DatasetError, match=str(broken)):
        batches(damaged, Steps(0, 1, 5))
    with caplog.at_level(logging.WARNING):
        ((images, _),) = batches(damaged, Steps(0, 1, 5), skip_corrupt=True)
    assert len(images) == 5
    assert f"skipped: {broken}" in caplog.text
    alone = damaged._replace(samples=(samples[1],))
    with pytest.raises(DatasetError, match="none of the 1 images can be read"):
        batches(alone, Steps(0, 1, 1), skip_corrupt=True)
