import numpy as np
import pytest
from PIL import Image

from pspnet_fast.charts import GAP, grid, learning_curve, side_by_side


def block(colour, width, height):
    return Image.new("RGB", (width, height), colour)


def test_pictures_side_by_side_and_below_each_other():
    rows = [[block("red", 3, 2), block("blue", 4, 5)], [block("lime", 2, 1)]]
    pixels = np.asarray(grid(rows))
    assert pixels.shape == (5 + GAP + 1, 3 + GAP + 4, 3)
    assert np.array_equal(pixels[:5], np.asarray(side_by_side(rows[0])))
    assert (pixels[:2, :3] == (255, 0, 0)).all()
    assert (pixels[:5, 3 + GAP :] == (0, 0, 255)).all()
    assert (pixels[5 + GAP, :2] == (0, 255, 0)).all()
    rest = pixels.copy()
    rest[:2, :3] = rest[:5, 3 + GAP :] = rest[5 + GAP, :2] = 255
    assert (rest == 255).all()


@pytest.mark.parametrize("scores", [[], [(3, 0.2)], [(3, 0.2), (6, 0.4)]])
def test_a_learning_curve(scores):
    """Losses and scores both show; so does a change of either."""
    losses = [(i, 1 / (i + 1)) for i in range(60)]
    first = np.asarray(learning_curve(losses, scores))
    assert first.shape == (480, 960, 3)
    assert not np.array_equal(first, np.asarray(learning_curve(losses[:30], scores)))
    if scores:
        assert not np.array_equal(first, np.asarray(learning_curve(losses, [])))
