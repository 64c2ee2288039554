import numpy as np

from pspnet_fast.data.picture import draw_street


def test_the_same_seed_draws_the_same_street():
    first, again, other = (np.asarray(draw_street(seed, 160, 120)) for seed in (0, 0, 1))
    assert first.shape == (120, 160, 3)
    assert (first == again).all()
    assert (first != other).mean() > 0.5


def test_it_shows_sky_above_and_road_below():
    street = np.asarray(draw_street(0, 160, 120)).astype(float)
    top, bottom = street[5:20, 60:100].mean((0, 1)), street[-15:, 60:75].mean((0, 1))
    assert top[2] > top[0] + 30  # blue
    assert bottom.max() - bottom.min() < 25  # grey
    assert top.mean() > bottom.mean() + 30
