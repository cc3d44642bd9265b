"""Scores against independent oracles: FID's network, the Inception score, the three-sample test."""
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import common
from conftest import inception_weights


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
        return torch.cat([chain(block, x, "branch1x1"),
                          chain(block, x, *(f"branch7x7_{i}" for i in (1, 2, 3))),
                          chain(block, x, *(f"branch7x7dbl_{i}" for i in range(1, 6))),
                          chain(block, pool(x, "mean"), "branch_pool")], 1)

    def e(block, x, kind):
        wide, double = chain(block, x, "branch3x3_1"), chain(block, x, "branch3x3dbl_1", "branch3x3dbl_2")
        return torch.cat([chain(block, x, "branch1x1"), chain(block, wide, "branch3x3_2a"),
                          chain(block, wide, "branch3x3_2b"), chain(block, double, "branch3x3dbl_3a"),
                          chain(block, double, "branch3x3dbl_3b"),
                          chain(block, pool(x, kind), "branch_pool")], 1)

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
    wide = chain(block, x, "branch7x7x3_1", "branch7x7x3_2", "branch7x7x3_3")
    x = torch.cat([conv(f"{block}.branch3x3_2", chain(block, x, "branch3x3_1"), 2),
                   conv(f"{block}.branch7x7x3_4", wide, 2),
                   F.max_pool2d(x, 3, 2)], 1)
    return e("Mixed_7c", e("Mixed_7b", x, "mean"), "max").mean((2, 3))


def test_fid_inception_is_the_references():
    state_dict = inception_weights()
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


# ---- biased distances -------------------------------------------------------------------------------------


def test_frechet_distance_can_order_two_normals_wrongly():
    """Binkowski et al. 2018, D.1: FID(P1, Q) > FID(P2, Q) = 0, and the estimates the other way round."""
    m, rng = 4, torch.Generator().manual_seed(0)
    q = torch.zeros(1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    p_1 = torch.zeros(1, dtype=torch.float64), torch.full((1, 1), (m - 1) / m, dtype=torch.float64)
    assert common.frechet_distance(p_1, q) == pytest.approx(1 / m ** 2) and common.frechet_distance(q, q) == 0
    d_m = math.sqrt(2 / (m - 1)) * math.gamma(m / 2) / math.gamma((m - 1) / 2)
    expected = (1 / m ** 2 - 1 / m + 2 * (d_m - 1)) / m
    differences = []
    for y in torch.randn(8_000, m, 1, generator=rng, dtype=torch.float64):
        one, two = (common.frechet_distance(common.gaussian_fit(s * y), q) for s in ((m - 1) / m, 1))
        differences.append(one - two)
    error = np.std(differences) / 8_000 ** 0.5
    assert np.mean(differences) == pytest.approx(expected, abs=3 * error) and expected < 0


def test_wasserstein_estimates_are_biased():
    """Binkowski et al. 2018, B.4: W(N(1, 1), N(0, 1)) = 1. A critic t or -t that one pair has chosen
    overrates itself on that pair, and is worth 1 - 2 Phi(-1 / sqrt(2)) = 0.52 on another."""
    normal = torch.randn(4, 40_000, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x, y, x_new, y_new = normal[0] + 1, normal[1], normal[2] + 1, normal[3]
    sign = common.wasserstein(x, y).sign()[:, None, None]
    expected = 1 - math.erfc(0.5)
    biased = 2 * math.exp(-0.25) / math.sqrt(math.pi) + math.erf(0.5)      # E |N(1, 2)| = 1.399
    assert float(common.wasserstein(sign * x, sign * y).mean()) == pytest.approx(biased, abs=0.02)
    assert float(common.wasserstein(sign * x_new, sign * y_new).mean()) == pytest.approx(expected, abs=0.03)
    assert expected == pytest.approx(0.52, abs=0.001)


def test_censored_normal_against_samples():
    rng = torch.Generator().manual_seed(0)
    A = torch.randn(3, 3, generator=rng, dtype=torch.float64)
    mean, covariance = torch.tensor([0.3, -0.5, 1.0], dtype=torch.float64), A @ A.T + 0.1 * torch.eye(3)
    noise = torch.randn(1_000_000, 3, generator=rng, dtype=torch.float64)
    x = noise @ torch.linalg.cholesky(covariance).T + mean
    found, root = common.censored_fit(mean, covariance)
    s = covariance.diagonal().sqrt()
    grid = torch.linspace(0, 12, 200_001, dtype=torch.float64)[:, None] * s     # each alone, by quadrature
    density = torch.exp(-((grid - mean) / s).square() / 2) / (s * math.sqrt(2 * math.pi))
    first, second = (torch.trapezoid(grid ** k * density / s, dx=12 / 200_000, dim=0) * s * s for k in (1, 2))
    assert torch.allclose(found, first, rtol=1e-8) and torch.allclose(
        (root.T @ root).diagonal(), second - first.square(), rtol=1e-8)
    assert torch.allclose(found, x.relu().mean(0), atol=0.01)
    assert torch.allclose(root.T @ root, x.relu().T.cov(), atol=0.02)
    one = common.censored_fit(torch.zeros(1).double(), torch.ones(1, 1).double())       # the half of a normal
    assert float(one[0]) == pytest.approx((2 * math.pi) ** -0.5)
    assert float(one[1] ** 2) == pytest.approx(0.5 - 0.5 / math.pi)


def test_bootstrap_is_biased_upward():
    x = torch.randn(300, 5, generator=torch.Generator().manual_seed(0))
    fit = common.gaussian_fit(torch.randn(300, 5, generator=torch.Generator().manual_seed(1)))
    plain = common.frechet_distance(common.gaussian_fit(x), fit)
    mean, std = common.bootstrap_frechet_distance(x, fit, resamplings=20)
    assert mean > plain + 3 * std / 20 ** 0.5 and std > 0
    assert common.bootstrap_frechet_distance(x, fit, resamplings=20) == (mean, std)
    rng = torch.Generator().manual_seed(0)
    drawn = [common.frechet_distance(common.gaussian_fit(x[torch.randint(300, (300,), generator=rng)]), fit)
             for _ in range(20)]
    assert mean == pytest.approx(np.mean(drawn)) and std == pytest.approx(np.std(drawn))


def test_fits_of_many_parts_and_shifts():
    """Features in parts of 4,096, far from 0: the covariance keeps its digits."""
    x = torch.randn(9_000, 4, generator=torch.Generator().manual_seed(0)).double() * 0.1 + 1_000
    mean, root = common.gaussian_fit(x)
    assert torch.allclose(mean, x.mean(0), rtol=1e-14, atol=0)
    assert torch.allclose(root.T @ root, x.T.cov(), rtol=1e-9, atol=1e-12)


# ---- disturbances -----------------------------------------------------------------------------------------


def test_disturbances():
    rng = torch.Generator().manual_seed(0)
    images, others = (torch.randint(256, (20, 3, 32, 32), generator=rng, dtype=torch.uint8) for _ in range(2))
    found = {}
    for kind, levels in common.DISTURBANCES.items():
        for alpha in levels:
            y = common.disturb(images, kind, alpha, torch.Generator().manual_seed(1), others)
            found[kind, alpha] = y
            assert y.shape == images.shape and y.dtype == torch.uint8
            assert torch.equal(y, images) == (alpha == 0), (kind, alpha)
    salted = found["salt and pepper", 0.3]
    changed = (salted != images).any(1, keepdim=True)
    assert float(changed.float().mean()) == pytest.approx(0.3, abs=0.02)
    assert set(salted[changed.expand_as(images)].tolist()) == {0, 255}
    assert float((salted == 255)[changed.expand_as(images)].float().mean()) == pytest.approx(0.5, abs=0.03)
    black = (found["black rectangles", 0.25] == 0).all(1)
    assert black.sum((1, 2)).max() <= 5 * 64 and black.sum((1, 2)).min() >= 64      # five of 8 x 8
    assert float(black.sum((1, 2)).float().mean()) == pytest.approx(280, abs=15)    # less what they share
    assert (found["contamination", 0.25] != images).flatten(1).any(1).sum() == 5
    assert (found["contamination", 1][:, None] == others).flatten(2).all(2).any(1).all()
    grey = torch.full((2, 3, 33, 33), 9, dtype=torch.uint8)
    assert torch.equal(common.disturb(grey, "swirl", 4, rng, others), grey)
    grey[:, :, 16, 16] = 200                                                        # the centre stays
    swirled = common.disturb(grey, "swirl", 4, rng, others)
    assert (swirled[:, :, 16, 16] == 200).all() and (swirled[:, :, 0, 0] == 9).all()
    ramp = (7 * torch.arange(33)).byte().expand(1, 3, 33, 33)       # 8 below the centre, at its turned column
    angle = math.pi / 2 + 4 * math.exp(-8 * 5 / (math.log(2) * 25))
    turned = common.disturb(ramp, "swirl", 4, rng, others)[..., 24, 16]
    assert turned.float().mean() == pytest.approx(7 * (16 + 8 * math.cos(angle)), abs=0.51)
    noise = common.disturb(images, "Gaussian noise", 0.75, rng, others).float()
    assert float(noise.mean()) == pytest.approx(127.5, abs=8)
    noise = common.disturb(0 * images, "Gaussian noise", 0.75, rng, others).float()
    assert noise.min() == 0 and noise.max() == round(0.75 * 255)        # its extremes are black and white
    assert float(noise.std()) == pytest.approx(0.75 * 255 / 2 / 4.4, rel=0.1)   # which are at 4.4 std here
    with pytest.raises(ValueError, match="found the disturbance 'rain'"):
        common.disturb(images, "rain", 1, rng, others)


# ---- the three-sample test --------------------------------------------------------------------------------


def trials(means, n=1_500, m=50):
    """p-values, u_old, its variance and u_old - u_new of trials with y_old and y_new at means, x at 0."""
    rng = torch.Generator().manual_seed(0)
    found = []
    for _ in range(n):
        x, old, new = (torch.randn(m, 3, generator=rng, dtype=torch.float64) + mean for mean in (0, *means))
        a, b = (common.similarity(common.cubic(x, y), common.cubic(y, y)) for y in (old, new))
        found.append((common.relative_similarity(a, b), float(a[0]), float(a[1]), float(a[0] - b[0])))
    return np.array(found).T


def test_similarity_equals_double_loops():
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 7, 3, generator=rng, dtype=torch.float64)
    K_xy, K_yy = common.cubic(x, y).numpy(), common.cubic(y, y).numpy()
    h = [[K_yy[i, j] - K_xy[i, j] - K_xy[j, i] for j in range(7)] for i in range(7)]
    pairs = [(i, j) for i in range(7) for j in range(7) if i != j]
    u, variance, rows = common.similarity(common.cubic(x, y), common.cubic(y, y))
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
    same = common.similarity(*[common.cubic(*torch.ones(2, 9, 3, dtype=torch.float64))] * 2)
    assert common.relative_similarity(same, same) == 0.5    # no variance: nothing is known


# ---- learning rates that adapt ----------------------------------------------------------------------------


def adaptive(lr=0.4):
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    optimizers = [torch.optim.Adam([torch.zeros(1, requires_grad=True)], rate)
                  for rate in (lr, torch.tensor(2.0))]
    found = common.AdaptiveRate(optimizers, x, "key", window=4, patience=3, decay=0.5, level=0.1, floor=0.15)
    return found, optimizers


def sample(shift, seed):
    return torch.randn(40, 3, generator=torch.Generator().manual_seed(seed)) + shift


def test_rates_fall_after_three_failures_in_a_row():
    rate, (first, second) = adaptive()
    lr = second.param_groups[0]["lr"]
    assert [rate.step(sample(3, seed)) for seed in range(4)] == [None] * 4      # no model to compare with yet
    oldest = rate.models[0]
    assert rate.step(sample(1, 4)) < 0.1 and rate.models[0] is not oldest       # a success moves the window
    oldest = rate.models[0]
    assert rate.step(sample(4, 5)) > 0.1 and rate.step(sample(4, 6)) > 0.1      # two failures: it stays
    assert rate.models[0] is oldest and len(rate.models) == 4 and rate.failures == 2
    assert rate.step(sample(1, 7)) < 0.1 and rate.failures == 0                 # a success: from 0 again
    assert (first.param_groups[0]["lr"], float(lr)) == (0.4, 2)
    models = rate.models
    assert all(rate.step(sample(4, seed)) > 0.1 for seed in (8, 9, 10))
    assert first.param_groups[0]["lr"] == 0.2 and second.param_groups[0]["lr"] is lr and float(lr) == 1
    assert rate.failures == 0 and len(rate.models) == 3 and rate.models[0] is models[2]
    assert rate.step(sample(4, 11)) is None                                     # the window fills again
    assert all(rate.step(sample(4, seed)) is not None for seed in (12, 13, 14))
    assert (first.param_groups[0]["lr"], float(lr)) == (0.15, 0.5)              # not below the floor


def test_adaptive_rates_resume(tmp_path):
    """Stopped after any evaluation and loaded, the p-values and rates are those of a run in one go."""
    shifts = (3, 3, 3, 3, 1, 4, 4, 4, 4, 4, 4, 4)

    def whole():
        rate, optimizers = adaptive()
        found = [rate.step(sample(shift, seed)) for seed, shift in enumerate(shifts)]
        return found, optimizers[0].param_groups[0]["lr"]

    for stop in (2, 6, 9):
        rate, (optimizer, _) = adaptive()
        found = [rate.step(sample(shift, seed)) for seed, shift in enumerate(shifts[:stop])]
        state = dict(rate=rate, optimizer=optimizer)
        common.save(str(tmp_path), stop, state, {})
        assert (tmp_path / "checkpoint.pt").stat().st_size < 30_000             # row sums and no features
        rate, (optimizer, other) = adaptive()
        assert common.load(str(tmp_path), dict(rate=rate, optimizer=optimizer), {}) == stop
        found += [rate.step(sample(shift, seed)) for seed, shift in enumerate(shifts) if seed >= stop]
        assert (found, optimizer.param_groups[0]["lr"]) == whole()
