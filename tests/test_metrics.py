"""Scores against independent oracles, feature networks, references that are kept."""
import math
import os
import time

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import cifar
import common
from conftest import Features, export, inception_weights, says

CPU = torch.device("cpu")


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pictures(n, channels=3, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, channels, 32, 32), dtype=torch.uint8, generator=rng)


# ---- FID's network ----------------------------------------------------------------------------------------

def by_hand(state, images):
    """The network's features from its weights alone: every block as the paper draws it."""
    def conv(name, x, stride=1, padding=0):
        x = F.conv2d(x, state[f"{name}.conv.weight"], None, stride, padding)
        return F.relu(F.batch_norm(x, state[f"{name}.bn.running_mean"], state[f"{name}.bn.running_var"],
                                   state[f"{name}.bn.weight"], state[f"{name}.bn.bias"], False, 0, 1e-3))

    def chain(block, x, *names):            # each padded so that the size stays
        for name in (f"{block}.branch{name}" for name in names):
            height, width = state[f"{name}.conv.weight"].shape[-2:]
            x = conv(name, x, 1, (height // 2, width // 2))
        return x

    def mean(x):                            # of the pixels that are there
        return F.avg_pool2d(x, 3, 1, 1) / F.avg_pool2d(torch.ones_like(x), 3, 1, 1)

    def mixed(block, x, pooled, *branches):
        branches = [chain(block, x, *names.split()) for names in branches]
        return torch.cat([*branches, chain(block, pooled, "_pool")], 1)

    for axis in (2, 3):                     # TensorFlow 1's bilinear resize
        n = np.arange(images.shape[axis])
        images = np.apply_along_axis(lambda v: np.interp(np.arange(299) * len(n) / 299, n, v), axis, images)
    x = conv("Conv2d_1a_3x3", (torch.from_numpy(images).float() - 128) / 128, 2)
    x = F.max_pool2d(conv("Conv2d_2b_3x3", conv("Conv2d_2a_3x3", x), 1, 1), 3, 2)
    x = F.max_pool2d(conv("Conv2d_4a_3x3", conv("Conv2d_3b_1x1", x)), 3, 2)
    for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        x = mixed(block, x, mean(x), "1x1", "5x5_1 5x5_2", "3x3dbl_1 3x3dbl_2 3x3dbl_3")
    double = chain("Mixed_6a", x, "3x3dbl_1", "3x3dbl_2")
    x = torch.cat([conv("Mixed_6a.branch3x3", x, 2), conv("Mixed_6a.branch3x3dbl_3", double, 2),
                   F.max_pool2d(x, 3, 2)], 1)
    for block in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        x = mixed(block, x, mean(x), "1x1", "7x7_1 7x7_2 7x7_3",
                  "7x7dbl_1 7x7dbl_2 7x7dbl_3 7x7dbl_4 7x7dbl_5")
    first, wide = chain("Mixed_7a", x, "3x3_1"), chain("Mixed_7a", x, "7x7x3_1", "7x7x3_2", "7x7x3_3")
    x = torch.cat([conv("Mixed_7a.branch3x3_2", first, 2), conv("Mixed_7a.branch7x7x3_4", wide, 2),
                   F.max_pool2d(x, 3, 2)], 1)
    for block, pool in (("Mixed_7b", mean), ("Mixed_7c", lambda x: F.max_pool2d(x, 3, 1, 1))):
        x = mixed(block, x, pool(x), "1x1", "3x3_1 3x3_2a", "3x3_1 3x3_2b", "3x3dbl_1 3x3dbl_2 3x3dbl_3a",
                  "3x3dbl_1 3x3dbl_2 3x3dbl_3b")
    return x.mean((2, 3))


def test_fid_inception_is_the_references(tmp_path, monkeypatch, capsys):
    """And it is called FID's only if its file is the published one; where that cannot be fetched, None."""
    weights, images, path = inception_weights(), pictures(2), str(tmp_path / "net.pth")
    assert len(weights) == 566 and sum(t.numel() for t in weights.values() if t.ndim) == 23_885_392
    torch.save(weights, path)
    network = common.load_features(path, CPU)
    assert network.name == "net"
    features, logits = network(images)
    expected = by_hand(weights, images.numpy())
    assert features.shape == (2, 2048) and logits.shape == (2, 1008)
    assert float((features - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    assert torch.allclose(logits, expected @ weights["fc.weight"].T, rtol=1e-3, atol=1e-3)   # without bias
    monkeypatch.setattr(common, "FID_KEY", network.key)
    assert common.load_features(path, CPU).name == "inception-2015-12-05"

    def offline(*args, **kwargs):
        raise OSError("no route to host")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    assert common.load_features(None, CPU) is None
    assert "no route to host" in (said := capsys.readouterr().out) and "--features FILE" in said
    with pytest.raises(OSError, match="no feature network"):
        common.score_files(path, path)


# ---- feature networks, references, scores -----------------------------------------------------------------

def test_feature_networks_that_fail(tmp_path):
    images = pictures(35)
    images[:, 0, 0, 0], images[23, 0, 0, 0] = 1, 0          # of the third of four parts
    with pytest.raises(common.RunError, match="net: features or logits of image 23 are not"):
        common.Features(lambda x: torch.where(x[:, 0, :1, 0] == 0, torch.nan, 1.0), "net", "key", CPU)(images)
    def with_logits(logits):
        return lambda x: (x[:, :, 0, 0].float(), logits(x[:, 0, 0, :2].float()))
    with pytest.raises(common.RunError, match="logits of image 0 are not"):
        common.Features(with_logits(lambda x: x * torch.nan), "net", "key", CPU)(images)
    wrong_logits = lambda x: x[:1], lambda x: x[:, 0], lambda x: x + 1j
    for wrong in (lambda x: x.float(), lambda x: x[:1, :, 0, 0].float(), lambda x: {"a": x},
                  lambda x: x[:, 3], lambda x: x[:, :, 0, 0], *map(with_logits, wrong_logits)):
        with pytest.raises(common.RunError, match="net fails on 35 images: .*"):
            common.Features(wrong, "net", "key", CPU)(images)
    for name in ("net.pt2", "net.pth"):
        (tmp_path / name).write_bytes(b"half")
        with says(name, "cannot be loaded", ".pth", ".pt2"):
            common.load_features(str(tmp_path / name), CPU)
    other = common.load_features(export(tmp_path / f"{common.FID_NAME}.pt2"), CPU)
    assert other.name != common.FID_NAME                    # no other network's distance is an FID


@pytest.mark.parametrize("kind", ["plain", "tuple"])
def test_scores(kind, tmp_path):
    """Of 23 images, whose features come in three parts; of files the same, and of one channel as of three."""
    y, x = pictures(23, seed=1), pictures(30, 1).expand(-1, 3, -1, -1)
    for name, images in (("y", y), ("x", x), ("grey", x[:, :1])):
        np.save(tmp_path / f"{name}.npy", images.numpy())
    path = export(tmp_path / f"features-{kind}.pt2", kind)
    network = common.load_features(path, CPU)
    (f_y, logits), f_x = network(y), Features("plain")(x)
    assert torch.allclose(f_y, Features("plain")(y)) and (logits is None) == (kind == "plain")
    fit = common.gaussian_fit(f_x)
    pairs = dict(kid=common.kid(f_y, f_x), fd_bootstrap=common.bootstrap(
        f_y[:20], lambda x: common.frechet_distance(common.gaussian_fit(x), fit), 3))
    pairs |= dict(isc=common.inception_score(logits), isc_bootstrap=common.bootstrap(
        logits[:20], lambda x: common.inception_score(x)[0], 3)) if kind == "tuple" else {}
    expected = {key: v for name, pair in pairs.items() for key, v in zip((name, f"{name}_std"), pair)}
    expected |= dict(fd=common.frechet_distance(common.gaussian_fit(f_y), fit), samples=23)
    reference = common.load_reference(f"{tmp_path}/x.npy", network)
    found = common.scores(network, y, reference, 20, 3)
    assert (found.pop("features"), found.pop("reference")) == (kind, "x, 30 images")
    for name in ("kid_std", "isc_std"):         # of too few images
        assert found.pop(name, None) is expected.pop(name, None) is None
    assert found == pytest.approx(expected, rel=1e-5)
    assert not {"fd_bootstrap", "fd_bootstrap_std"} & common.scores(network, y, reference, 24).keys()
    for name in ("x", "grey"):
        of_files = common.score_files(f"{tmp_path}/y.npy", f"{tmp_path}/{name}.npy", path, "cpu")
        assert (of_files["fd"], of_files["kid"]) == (found["fd"], found["kid"])
        assert of_files["reference"] == f"{name}, 30 images"


def test_a_reference_is_kept_while_its_files_stay(tmp_path, monkeypatch):
    path, calls, images = str(tmp_path / "set.npy"), [], pictures(9)
    network = common.Features(lambda x: calls.append(len(x)) or Features("plain")(x), "net", "key", CPU)

    def computed(path, *side):
        calls.clear()
        found = common.load_reference(path, network, *side)
        return sum(calls), found["features"]

    for age in (1000, 0):                       # another file of the same size, older or newer
        np.save(path, images.numpy())
        os.utime(path, (time.time() - age,) * 2)
        for n in (9, 0):
            assert computed(path)[0] == n and torch.equal(computed(path)[1], Features("plain")(images))
        images = 255 - images
    assert torch.equal(computed(path, 16)[1], Features("plain")(common.crop_images(255 - images, 16)))
    (tmp_path / "set-net-key.pt").write_bytes(b"half")
    assert computed(path)[0] == 9 and computed(path)[0] == computed(path, 16)[0] == 0
    monkeypatch.setattr(common, "SCORE_PRECISION", "tf32")
    assert computed(path)[0] == 9
    os.mkdir(tmp_path / "a.folder")
    for n in (2, 3):                            # a folder with one more image
        for i in range(n):
            common.save_grid(f"{tmp_path}/a.folder/{i}.png", images[i:i + 1], 1)
        assert computed(f"{tmp_path}/a.folder/")[0] == n and computed(f"{tmp_path}/a.folder/")[0] == 0
    monkeypatch.setattr(os, "replace", lambda *paths: exec("raise PermissionError(13, 'no')"))
    os.utime(path, (0, 0))
    assert computed(path)[0] == computed(path)[0] == 9          # where nothing can be kept


# ---- scores -----------------------------------------------------------------------------------------------

def test_kid_equals_a_double_loop():
    x, y = noise(6, 4), noise(9, 4, seed=1) + 0.5

    def u_statistic(u, v):
        k, n = [[(float(s @ t) / 4 + 1) ** 3 for s in (*u, *v)] for t in (*u, *v)], len(u)
        sums = [sum(k[i][j] for i in range(2 * n) for j in range(2 * n) if i != j and (i < n) + (j < n) == m)
                for m in (0, 1, 2)]
        return (sums[0] + sums[2]) / (n * (n - 1)) - sums[1] / n ** 2

    mean, std = common.kid(x, y[:6], subsets=3)             # each subset is all of both sets: no std
    assert mean == pytest.approx(u_statistic(x, y[:6]), rel=1e-12) and std is None
    assert common.kid(x, y)[1] is None and common.kid(x, x, subsets=2)[0] < 0       # unbiased
    rng = torch.Generator().manual_seed(0)
    draws = [[s[torch.randperm(len(s), generator=rng)[:4]] for s in (x, y)] for _ in range(5)]
    expected = [u_statistic(*draw) for draw in draws]
    assert common.kid(x, y, 5, 4) == pytest.approx((np.mean(expected), np.std(expected)), rel=1e-9)


def test_inception_score():
    """Certain and balanced: the number of classes. Against plain probabilities."""
    logits = torch.eye(8).repeat(50, 1) * 1e4       # a plain softmax has logarithms of 0 here
    assert common.inception_score(logits, splits=1) == (pytest.approx(8), None)
    assert common.inception_score(logits)[0] == pytest.approx(7.9, abs=0.1)     # of 4 splits
    assert common.inception_score(logits[:8]) == (pytest.approx(8), None)       # by ten of one image: 1
    logits, order = noise(90, 5), torch.randperm(90, generator=torch.Generator().manual_seed(3)).numpy()
    values = [math.exp((part * np.log(part / part.mean(0))).sum(1).mean())
              for part in np.split(logits.softmax(1).numpy()[order], 9)]
    assert common.inception_score(logits, 9, 3) == pytest.approx((np.mean(values), np.std(values)), rel=1e-10)


def test_censored_normal_against_samples():
    """And each coordinate alone by quadrature."""
    A, mean = noise(3, 3), torch.tensor([0.3, -0.5, 1.0], dtype=torch.float64)
    covariance = A @ A.T + 0.1 * torch.eye(3)
    x = noise(1_000_000, 3, seed=1) @ torch.linalg.cholesky(covariance).T + mean
    found, root = cifar.censored_fit(mean, covariance)
    s = covariance.diagonal().sqrt()
    grid = torch.linspace(0, 12, 200_001, dtype=torch.float64)[:, None] * s
    density = torch.exp(-((grid - mean) / s).square() / 2) / math.sqrt(2 * math.pi)
    first, second = (torch.trapezoid(grid ** k * density, dx=12 / 200_000, dim=0) for k in (1, 2))
    assert torch.allclose(found, first, rtol=1e-8) and torch.allclose(found, x.relu().mean(0), atol=0.01)
    assert torch.allclose((root.T @ root).diagonal(), second - first.square(), rtol=1e-8)
    assert torch.allclose(root.T @ root, x.relu().T.cov(), atol=0.02)


def test_fits_of_many_parts_and_of_resampled_features():
    """In parts of 4,096, far from 0, covariances keep their digits."""
    x = noise(9_000, 4) * 0.1 + 1_000
    mean, root = common.gaussian_fit(x)
    assert torch.allclose(mean, x.mean(0), rtol=1e-14, atol=0)
    assert torch.allclose(root.T @ root, x.T.cov(), rtol=1e-9, atol=1e-12)
    x, fit, rng = noise(300, 5), common.gaussian_fit(noise(300, 5, seed=1)), torch.Generator().manual_seed(0)
    drawn = [common.frechet_distance(common.gaussian_fit(x[torch.randint(300, (300,), generator=rng)]), fit)
             for _ in range(20)]
    mean, std = common.bootstrap(x, lambda x: common.frechet_distance(common.gaussian_fit(x), fit), 20)
    assert mean == pytest.approx(np.mean(drawn)) and std == pytest.approx(np.std(drawn))


def test_disturbances():
    rng, images, others = torch.Generator().manual_seed(0), pictures(20), pictures(20, seed=1)
    found = {(kind, alpha): cifar.disturb(images, kind, alpha, torch.Generator().manual_seed(1), others)
             for kind, levels in cifar.DISTURBANCES.items() for alpha in levels}
    for (kind, alpha), y in found.items():
        assert y.shape == images.shape and y.dtype == torch.uint8
        assert torch.equal(y, images) == (alpha == 0), (kind, alpha)
    salted = found["salt and pepper", 0.3]
    changed = (salted != images).any(1, keepdim=True).expand_as(images)
    assert float(changed.float().mean()) == pytest.approx(0.3, abs=0.02)
    assert set(salted[changed].tolist()) == {0, 255}
    assert float((salted == 255)[changed].float().mean()) == pytest.approx(0.5, abs=0.03)
    black = (found["black rectangles", 0.25] == 0).all(1).sum((1, 2)).float()
    assert black.max() <= 5 * 64 and black.min() >= 64 and float(black.mean()) == pytest.approx(280, abs=15)
    assert (found["contamination", 0.25] != images).flatten(1).any(1).sum() == 5
    assert (found["contamination", 1][:, None] == others).flatten(2).all(2).any(1).all()
    ramp = (7 * torch.arange(33)).byte().expand(1, 3, 33, 33)       # 8 below the centre, at its turned column
    turned = cifar.disturb(ramp, "swirl", 4, rng, others)
    angle = math.pi / 2 + 4 * math.exp(-8 * 5 / (math.log(2) * 25))
    assert turned[0, 0, 24, 16].item() == pytest.approx(7 * (16 + 8 * math.cos(angle)), abs=0.51)
    assert torch.equal(turned[..., 16, 16], ramp[..., 16, 16])
    y = cifar.disturb(0 * images, "Gaussian noise", 0.75, rng, others).float()
    assert y.min() == 0 and y.max() == round(0.75 * 255)        # the extremes, at 4.4 std
    assert float(y.std()) == pytest.approx(0.75 * 255 / 2 / 4.4, rel=0.1)


# ---- the three-sample test --------------------------------------------------------------------------------

def test_similarity_equals_double_loops():
    x, y = noise(2, 7, 3)
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
    """p-values of trials with x at 0, y_old and y_new at two means: of one law; nearer; farther."""
    def trials(*means, n=1_500, m=50):
        rng, found = torch.Generator().manual_seed(0), []
        for _ in range(n):
            x, old, new = (torch.randn(m, 3, generator=rng).double() + mean for mean in (0, *means))
            a, b = (common.similarity(common.cubic(x, y), common.cubic(y, y)) for y in (old, new))
            found.append((common.relative_similarity(a, b), float(a[0]), float(a[1])))
        return np.array(found).T

    p, u, variance = trials(0.5, 0.5)
    assert 0.08 < (p < 0.1).mean() < 0.13 and 0.46 < p.mean() < 0.54
    assert np.mean(variance) == pytest.approx(np.var(u), rel=0.15)
    assert (trials(0.5, 0.2, n=300)[0] < 0.1).mean() > 0.7
    assert (trials(0.2, 0.5, n=300)[0] < 0.1).mean() < 0.01
    same = common.similarity(*[common.cubic(*torch.ones(2, 9, 3, dtype=torch.float64))] * 2)
    assert common.relative_similarity(same, same) == 0.5    # no variance: nothing is known
