import pytest
import torch
import torch.nn.functional as F

from pspnet_fast.nn.plain_ppm import PlainPPM


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize(("pooling", "pool"), [("average", F.adaptive_avg_pool2d), ("max", F.adaptive_max_pool2d)])
def test_levels_of_all_channels(pooling, pool, align_corners):
    x = torch.randn(2, 5, 7, 9)
    module = PlainPPM(5, 1, (1, 3), align_corners=align_corners, pooling=pooling, reduction=False)
    assert not module.state_dict()
    pooled = [F.interpolate(pool(x, b), (7, 9), mode="bilinear", align_corners=align_corners) for b in (1, 3)]
    assert torch.equal(module(x), torch.cat([x, *pooled], 1))


def test_maximum_pooling_reduces_as_the_average_does():
    x = torch.randn(2, 5, 7, 9)
    module = PlainPPM(5, 2, (3,), pooling="max").eval()
    conv = module.features[0][1].weight
    level = F.relu(F.conv2d(F.adaptive_max_pool2d(x, 3), conv) / (1 + 1e-5) ** 0.5)
    expected = F.interpolate(level, (7, 9), mode="bilinear", align_corners=True)
    torch.testing.assert_close(module(x)[:, 5:], expected)


def test_bad_input():
    with pytest.raises(ValueError, match=r"^PlainPPM: pooling must be 'average' or 'max', got 'sum'$"):
        PlainPPM(4, 2, pooling="sum")
    with pytest.raises(ValueError, match="^PlainPPM: bins"):
        PlainPPM(4, 2, ())
