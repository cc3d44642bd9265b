"""Scores against independent oracles: FID's network, the Inception score, the three-sample test."""
import math

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import common


@pytest.fixture(scope="module")
def state_dict():
    """Weights for FID's network, in the keys of pytorch-fid's file, that leave no layer dead."""
    torch.manual_seed(0)
    network = torchvision.models.Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1), layer.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(layer.weight, 0.5, 1.5), nn.init.normal_(layer.bias, 0, 0.1)
    return network.state_dict()


def pool(x, kind):
    """3x3 windows of stride 1 on [N, C, H, W], the mean or the largest of the pixels that are there."""
    H, W = x.shape[-2:]
    out = torch.empty_like(x)
    for i in range(H):
        for j in range(W):
            window = x[..., max(i - 1, 0):i + 2, max(j - 1, 0):j + 2].flatten(2)
            out[..., i, j] = window.mean(-1) if kind == "mean" else window.amax(-1)
    return out


def by_hand(state, images):
    """The network's features from its weights alone: every block as the paper draws it, pools as above."""
    def conv(name, x, stride=1, padding=0):
        x = F.conv2d(x, state[f"{name}.conv.weight"], None, stride, padding)
        return F.relu(F.batch_norm(x, state[f"{name}.bn.running_mean"], state[f"{name}.bn.running_var"],
                                   state[f"{name}.bn.weight"], state[f"{name}.bn.bias"], False, 0, 1e-3))

    def same(name, x):          # padded so that the size stays
        height, width = state[f"{name}.conv.weight"].shape[-2:]
        return conv(name, x, 1, (height // 2, width // 2))

    def chain(block, x, *names):
        for name in names:
            x = same(f"{block}.{name}", x)
        return x

    def a(block, x):
        return torch.cat([chain(block, x, "branch1x1"), chain(block, x, "branch5x5_1", "branch5x5_2"),
                          chain(block, x, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
                          chain(block, pool(x, "mean"), "branch_pool")], 1)

    def c(block, x):
        return torch.cat([chain(block, x, "branch1x1"), chain(block, x, *(f"branch7x7_{i}" for i in (1, 2, 3))),
                          chain(block, x, *(f"branch7x7dbl_{i}" for i in range(1, 6))),
                          chain(block, pool(x, "mean"), "branch_pool")], 1)

    def e(block, x, kind):
        wide, double = chain(block, x, "branch3x3_1"), chain(block, x, "branch3x3dbl_1", "branch3x3dbl_2")
        return torch.cat([chain(block, x, "branch1x1"), chain(block, wide, "branch3x3_2a"),
                          chain(block, wide, "branch3x3_2b"), chain(block, double, "branch3x3dbl_3a"),
                          chain(block, double, "branch3x3dbl_3b"), chain(block, pool(x, kind), "branch_pool")], 1)

    x = torch.empty(*images.shape[:2], 299, 299)
    for i in range(299):                                                # TensorFlow 1's bilinear resize
        for j in range(299):
            (y_0, t), (x_0, s) = divmod(i * images.shape[2] / 299, 1), divmod(j * images.shape[3] / 299, 1)
            y_0, x_0 = int(y_0), int(x_0)
            y_1, x_1 = min(y_0 + 1, images.shape[2] - 1), min(x_0 + 1, images.shape[3] - 1)
            x[..., i, j] = ((1 - t) * ((1 - s) * images[..., y_0, x_0] + s * images[..., y_0, x_1])
                            + t * ((1 - s) * images[..., y_1, x_0] + s * images[..., y_1, x_1]))
    x = (x - 128) / 128
    x = same("Conv2d_2b_3x3", conv("Conv2d_2a_3x3", conv("Conv2d_1a_3x3", x, 2)))
    x = conv("Conv2d_4a_3x3", conv("Conv2d_3b_1x1", F.max_pool2d(x, 3, 2)))
    x = F.max_pool2d(x, 3, 2)
    for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        x = a(block, x)
    block = "Mixed_6a"
    x = torch.cat([conv(f"{block}.branch3x3", x, 2),
                   conv(f"{block}.branch3x3dbl_3", chain(block, x, "branch3x3dbl_1", "branch3x3dbl_2"), 2),
                   F.max_pool2d(x, 3, 2)], 1)
    for block in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        x = c(block, x)
    block = "Mixed_7a"
    x = torch.cat([conv(f"{block}.branch3x3_2", chain(block, x, "branch3x3_1"), 2),
                   conv(f"{block}.branch7x7x3_4", chain(block, x, *(f"branch7x7x3_{i}" for i in (1, 2, 3))), 2),
                   F.max_pool2d(x, 3, 2)], 1)
    return e("Mixed_7c", e("Mixed_7b", x, "mean"), "max").mean((2, 3))


def test_fid_inception_is_the_references(state_dict):
    assert len(state_dict) == 566 and sum(t.numel() for t in state_dict.values() if t.ndim) == 23_885_392
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features, logits = common.FidInception(state_dict)(images)
    expected = by_hand(state_dict, images.float())
    assert features.shape == (2, 2048) and logits.shape == (2, 1008)
    assert float((features - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    assert torch.allclose(logits, expected @ state_dict["fc.weight"].T, rtol=1e-3, atol=1e-3)   # without bias


def test_tf_resize_of_two_by_two():
    x = torch.tensor([[0.0, 4.0], [8.0, 12.0]])
    assert common.tf_resize(x, 4).tolist() == [[0, 2, 4, 4], [4, 6, 8, 8], [8, 10, 12, 12], [8, 10, 12, 12]]
    assert torch.equal(common.tf_resize(x, 2), x) and common.tf_resize(x, 1).tolist() == [[0]]


def test_inception_score():
    """Certain and balanced: the number of classes. Uniform or all alike: 1. Against plain probabilities."""
    logits = torch.eye(8).repeat(50, 1) * 1e4       # a plain softmax has logarithms of 0 here
    assert common.inception_score(logits, splits=1) == (pytest.approx(8), 0)
    assert common.inception_score(torch.zeros(50, 8)) == (pytest.approx(1), pytest.approx(0, abs=1e-12))
    assert common.inception_score(logits[:1].repeat(40, 1))[0] == pytest.approx(1)
    logits = torch.randn(90, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    order = torch.randperm(90, generator=torch.Generator().manual_seed(3)).numpy()
    values = []
    for part in np.split(logits.softmax(1).numpy()[order], 9):
        values.append(math.exp((part * np.log(part / part.mean(0))).sum(1).mean()))
    assert common.inception_score(logits, 9, 3) == pytest.approx((np.mean(values), np.std(values)), rel=1e-10)


# ---- the three-sample test --------------------------------------------------------------------------------


def cubic(a, b):
    return (a @ b.T / a.shape[1] + 1) ** 3


def trials(means, n=1_500, m=50):
    """p-values, and for each trial (u_old, its variance, u_old - u_new), of y_old and y_new at means; x at 0."""
    rng = torch.Generator().manual_seed(0)
    found = []
    for _ in range(n):
        x, old, new = (torch.randn(m, 3, generator=rng, dtype=torch.float64) + mean for mean in (0, *means))
        a, b = (common.similarity(cubic(x, y), cubic(y, y)) for y in (old, new))
        found.append((common.relative_similarity(a, b), float(a[0]), float(a[1]), float(a[0] - b[0])))
    return np.array(found).T


def test_similarity_equals_double_loops():
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 7, 3, generator=rng, dtype=torch.float64)
    K_xy, K_yy = cubic(x, y).numpy(), cubic(y, y).numpy()
    h = [[K_yy[i, j] - K_xy[i, j] - K_xy[j, i] for j in range(7)] for i in range(7)]
    pairs = [(i, j) for i in range(7) for j in range(7) if i != j]
    u, variance, rows = common.similarity(cubic(x, y), cubic(y, y))
    assert float(u) == pytest.approx(np.mean([h[i][j] for i, j in pairs]))
    one = np.mean([h[i][j] * h[i][k] for i, j in pairs for k in range(7) if k not in (i, j)])
    none = np.mean([h[i][j] * h[k][l] for i, j in pairs for k, l in pairs if len({i, j, k, l}) == 4])
    two = np.mean([h[i][j] ** 2 for i, j in pairs])
    assert float(variance) == pytest.approx((4 * 5 * (one - none) + 2 * (two - none)) / 42)
    assert rows.numpy() == pytest.approx(K_xy.mean(1))


def test_relative_similarity_has_its_level_and_power():
    p, u, variance, difference = trials((0.5, 0.5))         # of one law, which is not that of x
    assert 0.08 < (p < 0.1).mean() < 0.13 and 0.46 < p.mean() < 0.54
    assert np.mean(variance) == pytest.approx(np.var(u), rel=0.15)
    assert (trials((0.5, 0.2))[0] < 0.1).mean() > 0.7       # the new one is nearer
    assert (trials((0.2, 0.5))[0] < 0.1).mean() < 0.01      # farther
    same = common.similarity(*[cubic(*torch.ones(2, 9, 3, dtype=torch.float64))] * 2)
    assert common.relative_similarity(same, same) == 0.5    # no variance: nothing is known
