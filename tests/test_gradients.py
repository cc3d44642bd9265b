"""Figure of biased and unbiased gradients: against all minibatches, closed forms, quadrature."""
import itertools
import math

import numpy as np
import pytest
import torch

import common
import ring2d


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def networks():
    torch.manual_seed(1)
    return common.mlp(2, 5, 3).double(), common.mlp(2, 4, 2).double()


def plain(name, a, b):
    """The kernels of two points by their formulas."""
    d = (a - b).norm() if (a != b).any() else a.new_zeros(())
    match name:
        case "rbf": return sum((-d ** 2 / (2 * s ** 2)).exp() for s in (2, 5, 10, 20, 40, 80))
        case "rational quadratic": return sum((1 + d ** 2 / (2 * s)) ** -s for s in (0.2, 0.5, 1, 2, 5))
        case "dot": return (a * b).sum()
        case "distance": return (a.norm() + b.norm() - d) / 2


@pytest.mark.parametrize("name", ring2d.KERNELS)
def test_all_minibatches_of_two(name):
    """Of 3 points and 3 noises there are 9 x 9 minibatches: their mean is an expectation without noise."""
    (f, g), x, z, kernel = networks(), 2 * noise(3, 2), noise(3, 2, seed=1), ring2d.KERNELS[name]
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    i, j = (torch.stack(side) for side in zip(*itertools.product(pairs, pairs)))
    biased, unbiased = ring2d.mmd2_gradients(kernel, f, g, x[i], z[j])

    h_x, h_y = f(x), f(g(z))                        # the population's MMD^2: all pairs, in double loops
    def mean(a, b): return sum(plain(name, u, v) for u in a for v in b) / 9
    def same(a): return sum(plain(name, u, u) for u in a) / 3
    squared = mean(h_x, h_x) + mean(h_y, h_y) - 2 * mean(h_x, h_y)
    excess = (same(h_x) + same(h_y) - mean(h_x, h_x) - mean(h_y, h_y)) / 2          # over n = 2
    weights = [*f.parameters(), *g.parameters()]
    truth, bias = (torch.cat([t.flatten() for t in torch.autograd.grad(
        value, weights, retain_graph=True, materialize_grads=True)]) for value in (squared, excess))
    assert truth.norm() > 1e-2 and bias.norm() > 0.1 * truth.norm()
    torch.testing.assert_close(unbiased, truth, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(biased, truth + bias, atol=1e-12, rtol=1e-9)
    population, other = ring2d.mmd2_gradients(kernel, f, g, x, z)    # the figure's exact values
    torch.testing.assert_close(population, truth, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close((3 - 1) * (population - other) / 2, bias, atol=1e-12, rtol=1e-9)

    def value():
        return float(common.mmd2(*common.gram(kernel, f(x), f(g(z)))))
    with torch.no_grad():                           # finite differences of the population's, all weights
        at = 0
        for p in weights:
            for k in range(p.numel()):
                p.view(-1)[k] += 1e-5
                up = value()
                p.view(-1)[k] -= 2e-5
                assert (up - value()) / 2e-5 == pytest.approx(float(truth[at]), abs=1e-7)
                p.view(-1)[k] += 1e-5
                at += 1


@pytest.mark.parametrize("n", [2, 5])
def test_best_direction_is_the_best_of_all_angles(n):
    x, y = noise(4, n, 2) + torch.tensor([1.0, 0]), noise(4, n, 2, seed=1)
    theta = ring2d.best_direction(x, y)
    angle = torch.linspace(0, math.pi, 20_001, dtype=torch.float64)
    for a, b, own in zip(x, y, theta):
        all_angles = torch.stack([angle.cos(), angle.sin()])[:, None]           # [2, 1, angles]
        u, v = ((s @ all_angles.flatten(1)).T[..., None] for s in (a, b))       # [angles, n, 1]
        values = common.mmd2(*common.gram(common.dot, u, v), unbiased=True)
        found = common.mmd2(*common.gram(common.dot, a @ own, b @ own), unbiased=True)
        assert float(own.norm()) == pytest.approx(1)
        assert float(found) == pytest.approx(float(values.max()), abs=1e-6)


def best_direction_mean(n, points=1_000):
    """E theta_1^2 of best_direction() at n points each of N((1, 0), I) and N(0, I), by quadrature.

    The matrix is d d^T - W / (n^2 - n), W ~ Wishart(2 n - 2) and d the means' difference, of length r at an
    angle a. 2 theta's angle is that of (r^2 cos 2a, r^2 sin 2a) + v with v ~ N(0, 8 u / (n^2 - n)^2 I) and
    u ~ Gamma(n - 1). Means over the angles a and of v are ratios of Bessel functions.
    """
    i0, i1 = torch.special.i0e, torch.special.i1e
    t, r = (torch.linspace(*ends, points, dtype=torch.float64) for ends in ((-20, 6), (1e-3, 8)))   # u = e^t
    weight = (r * i0(r * n / 2) * torch.exp(-(r - 1).square() * n / 4)
              * torch.exp((n - 1) * t - t.exp() - math.lgamma(n - 1))[:, None])
    b = r ** 4 * (n * n - n) ** 2 / (32 * t.exp()[:, None])
    toward = (math.pi * b / 2).sqrt() * (i0(b) + i1(b)) * (1 - 4 * i1(r * n / 2) / (r * n * i0(r * n / 2)))
    return float(0.5 + (weight * toward).sum() / (2 * weight.sum()))


def test_best_direction_mean():
    exact = [best_direction_mean(n) for n in ring2d.SIZES]
    assert list(ring2d.BEST_DIRECTION) == pytest.approx(exact, abs=5.1e-5)
    assert exact[0] == pytest.approx(best_direction_mean(2, 1_700), abs=2e-6)    # a finer grid
    for n, value in zip(ring2d.SIZES[:4], exact):            # simulated, the matrix by covariances
        x, y = noise(20_000, n, 2) + torch.tensor([1.0, 0]), noise(20_000, n, 2, seed=1)
        d = x.mean(1) - y.mean(1)
        spread = sum((s - s.mean(1, keepdim=True)).square().sum(1) for s in (x, y)) / (n * n - n)
        cross = sum((s - s.mean(1, keepdim=True)).prod(2).sum(1) for s in (x, y)) / (n * n - n)
        a, b = (d.square() - spread) @ d.new_tensor([1, -1]), 2 * (d.prod(1) - cross)
        squares = ring2d.best_direction(x, y)[:, 0, 0].square()      # cos^2 of half of (a, b)'s angle
        torch.testing.assert_close(squares, (1 + a / (a ** 2 + b ** 2).sqrt()) / 2)
        assert float(squares.mean()) == pytest.approx(value, abs=4 * float(squares.std()) / 20_000 ** 0.5)


def test_trained_critics(monkeypatch):
    monkeypatch.setattr(ring2d, "DRAWN", 8 * 40_000)
    for n, paper in ((2, 0.6827), (8, 0.9545)):                 # of a normal law within 1 and within 2 std
        found = ring2d.trained_critics(n, torch.Generator().manual_seed(3))
        mmd = best_direction_mean(n)
        assert found[0].tolist() == pytest.approx([paper, paper], abs=4 * 1.1 / 200)
        assert found[1].tolist() == pytest.approx([mmd, mmd], abs=4 * 1.6 / 200)
        assert math.erf(math.sqrt(n) / 2) == pytest.approx(paper, abs=1e-4)
    x, y = 1 + noise(100_000), noise(100_000, seed=1)           # one pair, appendix B.4
    assert math.erf(math.sqrt(1) / 2) == pytest.approx(0.5205, abs=1e-4)
    assert float((x - y).sign().mean()) == pytest.approx(0.5205, abs=4 * 0.86 / 316)


def test_score_gradients_are_those_of_fid_and_kid(monkeypatch):
    """Ten draws: FID as common.frechet_distance, KID as common.kid, gradients by finite differences."""
    n = 5
    monkeypatch.setattr(ring2d, "DRAWN", 10 * n)
    found = ring2d.score_gradients(n, torch.Generator().manual_seed(4))
    x, z = torch.randn(2, 10, n, 1, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    target = torch.zeros(1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    for a, b, gradient in zip(x, z, found.T):
        def fid(std): return common.frechet_distance(common.gaussian_fit(std * b), target)
        def kid(std): return common.kid(a, std * b)[0]
        for score, curvature, own in ((fid, 2, gradient[0]), (kid, 24, gradient[1])):
            slope = (score(1 + 1e-4) - score(1 - 1e-4)) / 2e-4
            assert float(own) == pytest.approx(slope / curvature, rel=1e-5, abs=1e-5)


def test_mean_gradients_of_fid_and_kid(monkeypatch):
    """FID's mean is (1 + 1 / n) std^2 + 1 - 2 c std, c of Gamma functions; KID's is 3 (std^2 - 1)^2."""
    monkeypatch.setattr(ring2d, "DRAWN", 2 ** 18)
    for n, c in ((2, math.sqrt(2 / math.pi)), (16, math.sqrt(2 / 15) * math.gamma(8) / math.gamma(7.5))):
        fid, kid = ring2d.score_gradients(n, torch.Generator().manual_seed(5))
        error = 4 / len(fid) ** 0.5
        assert float(fid.mean()) == pytest.approx(1 + 1 / n - c, abs=error * float(fid.std()))
        assert abs(float(kid.mean())) < error * float(kid.std())
        y = 0.7 * noise(50_000, n)                              # the value, at another std
        values = y.mean(1).square() + (y.std(1) - 1).square()
        exact = (1 + 1 / n) * 0.49 + 1 - 2 * c * 0.7
        assert float(values.mean()) == pytest.approx(exact, abs=4 * float(values.std()) / 50_000 ** 0.5)
    nodes, weights = (torch.from_numpy(t) for t in np.polynomial.hermite_e.hermegauss(12))
    nodes, weights = nodes[:, None], weights / weights.sum()

    def population(std):                                        # KID of the two laws, by Gauss's quadrature
        y = std * nodes
        return float(weights @ (common.cubic(nodes, nodes) + common.cubic(y, y) - 2 * common.cubic(nodes, y))
                     @ weights)
    assert population(0.7) == pytest.approx(3 * (0.7 ** 2 - 1) ** 2)
    assert (population(1.001) + population(0.999) - 2 * population(1)) / 1e-6 == pytest.approx(24, rel=1e-4)


def test_appendix_d1_turns_two_generators_round():
    """P1 = N(0, (1 - 1 / m)^2) is worse than P2 = N(0, 1), but has the smaller mean FID."""
    for m in ring2d.SIZES:
        c = math.sqrt(2 / (m - 1)) * math.exp(math.lgamma(m / 2) - math.lgamma((m - 1) / 2))
        first, second = ((1 + 1 / m) * s ** 2 + 1 - 2 * c * s for s in (1 - 1 / m, 1))
        assert first < second


def test_figure(monkeypatch, capsys):
    monkeypatch.setattr(ring2d, "DRAWN", 2 ** 9)
    monkeypatch.setattr(ring2d, "GROUPS", 8)
    figure = ring2d.figure_gradients()
    out = capsys.readouterr().out
    assert len(figure.axes) == 3 and "nan" not in out and "std of the smallest mean FID: 0.5319" in out
