"""The mathematics against independent oracles: double loops, plain solves, closed forms, numpy."""
import itertools
from functools import partial

import numpy as np
import pytest
import torch

import cifar
import common
from conftest import PLAIN, SIGMA, agree, plain_objective, says


def sets(n=7, m=5, dim=3, shift=0.5, seed=0):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(n, dim, generator=rng, dtype=torch.float64)
    return x, torch.randn(m, dim, generator=rng, dtype=torch.float64) + shift


def blocks(x, y, sigma=SIGMA):
    return common.gram(lambda a, b: common.gaussian(a, b, sigma.to(a.dtype)), x, y)


def loop_mmd2(k, x, y, unbiased):
    """One pair after the other; k from [1, D] and [1, D] to [1, 1]."""
    total = 0
    for points in (x, y):
        pairs = [(i, j) for i in range(len(points)) for j in range(len(points)) if i != j or not unbiased]
        total = total + sum(k(points[i:i + 1], points[j:j + 1]) for i, j in pairs) / len(pairs)
    return (total - 2 * sum(k(a[None], b[None]) for a in x for b in y) / (len(x) * len(y))).squeeze()


# ---- kernels and MMD --------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", PLAIN)
def test_mmd_under_each_kernel_is_a_double_loop(name):
    """Biased, unbiased and its root, of sets of different sizes, as sums over the kernels of a mixture."""
    def gram(x, y):
        return common.gram(cifar.kernels(dtype=x.dtype)[name], x, y)

    def plain(x, y, unbiased=False):
        return loop_mmd2(PLAIN[name], x, y, unbiased)

    for u in (False, True):
        agree(lambda *s: common.mmd2(*gram(*s), u), lambda *s: plain(*s, u), *sets(), near_32=1e-3)
    agree(lambda *s: common.mmd(*gram(*s)), lambda *s: (plain(*s) + 1e-6).sqrt(), *sets(), near_32=1e-3)


def test_unbiased_is_zero_in_the_mean_and_biased_is_not():
    x, y = torch.randn(2, 3000, 6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    unbiased, biased = (common.mmd2(*blocks(x, y, SIGMA[1:2]), unbiased) for unbiased in (True, False))
    error = float(unbiased.std()) / 3000 ** 0.5
    assert unbiased.shape == (3000,) and abs(float(unbiased.mean())) < 4 * error
    assert float(biased.mean()) > 20 * error and float(biased.min()) >= 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_finite_where_points_meet(dtype):
    x = sets()[0].to(dtype).requires_grad_()
    value = common.mmd(*blocks(x, x.detach()))
    gradient, = torch.autograd.grad(value, x)
    assert torch.isfinite(gradient).all() and float(value.detach()) == pytest.approx(1e-3, rel=0.1)
    same = torch.ones(3, 2, dtype=dtype, requires_grad=True)
    value = common.mmd2(*common.gram(common.distance, same, 0 * same))
    gradient, = torch.autograd.grad(value, same, create_graph=True)
    assert gradient.isfinite().all()
    assert torch.autograd.grad(gradient.square().sum(), same)[0].isfinite().all()


def test_distances_do_not_cancel_far_from_the_origin():
    x, y = (points + 1000 for points in sets(50, 40, 8))
    agree(common.squared_distances, lambda x, y: (x[:, None] - y).square().sum(-1), x, y, near=1e-7)
    assert common.squared_distances(x.float(), x.float()).min() >= 0


@pytest.mark.parametrize("name", ["dot", "distance", "rqdot"])
def test_mmd_and_slope_of_the_witness_do_not_feel_the_origin(name):
    """In float32 with features 65,536 away from 0, as a critic's may be, and in float64 at 0."""
    rng = torch.Generator().manual_seed(0)
    x, y, t = (torch.randn(9, 4, generator=rng).mul(64).round() / 64 for _ in range(3))    # exact far away
    y = y + 1
    found = []
    for shift, dtype in ((2.0 ** 16, torch.float32), (0, torch.float64)):
        kernel = cifar.kernels(dtype=dtype)[name]
        a, b, c = ((points + shift).to(dtype).requires_grad_() for points in (x, y, t))
        mmd2 = common.mmd2(*common.gram(kernel, a, b), unbiased=True)
        slope, = torch.autograd.grad(common.witness(kernel, c, a, b).sum(), c, retain_graph=True)
        found.append([v.double() for v in (mmd2, slope, *torch.autograd.grad(mmd2, [a, b]))])
    for far, near in zip(*found):
        torch.testing.assert_close(far, near, rtol=1e-4, atol=1e-5)


# ---- density ratios ---------------------------------------------------------------------------------------

def test_condition():
    K = blocks(*sets())[2]
    cond = [np.linalg.cond(Q.numpy() + 0.01 * np.eye(5)) for Q in K]
    assert common.condition(K, 0.01) == pytest.approx(max(cond)) and max(cond) > 2 * min(cond)


def test_ratio_is_nan_where_its_matrix_is_not_positive():
    K_qq = torch.stack([torch.eye(3), -torch.eye(3)])[:, None]
    r = common.density_ratio(K_qq, torch.ones(2, 1, 3, 3), 1e-3)
    assert r.isnan().tolist() == [[False] * 3, [True] * 3]


# ---- objectives -------------------------------------------------------------------------------------------

def objective(form, x, y, ridge=0.1, sigma=SIGMA):
    return common.gram_objective(*blocks(x, y, sigma), form, ridge, 0.7)


@pytest.mark.parametrize("form", common.FORMS)
def test_objectives_are_what_their_equations_say(form):
    """Value, ratio and gradients, with ratios that clipping does and does not touch."""
    x, y = sets(6, 5, 2, shift=2.0)
    for i in (0, 1):
        agree(lambda x, y: objective(form, x, y)[i], lambda x, y: plain_objective(form, x, y)[i], x, y)
    assert form != "clip" or 0 < int((objective("sum", x, y)[1] < 0).sum()) < 5
    with pytest.raises(ValueError, match="form 'eq9'"):
        objective("eq9", x, y)


@pytest.mark.parametrize("form", common.FORMS)
@pytest.mark.parametrize("K", [1, 2, 10])
def test_objectives_of_many_near_points(form, K):
    """Also in float32 value, ratio and gradient are near: of near points A has the condition 1e5."""
    for std in (0.3, 1, 3):
        x, y = (std * points for points in sets(200, 200, K, shift=0))
        for i in (0, 1):
            own = dict(form=form, ridge=1e-3, sigma=SIGMA[1:2])
            agree(lambda x, y: objective(x=x, y=y, **own)[i],
                  lambda x, y: plain_objective(x=x, y=y, **own)[i], x, y, near=1e-6, near_32=5e-3)


def test_the_loss_of_a_sure_discriminator_is_finite():
    assert torch.isfinite(common.gan_critic(torch.tensor([[-500.0]]), torch.tensor([[500.0]])))


# ---- distances between features ---------------------------------------------------------------------------

def distance(a, b):
    return common.frechet_distance(common.gaussian_fit(a), common.gaussian_fit(b))


@pytest.mark.parametrize("n, m, rank, near", [(300, 303, 40, 1e-11), (12, 300, 3, 1e-11), (12, 15, 40, 1e-6)])
def test_frechet_distance(n, m, rank, near):
    """Of n points in a subspace to m in 40 dimensions, by eigenvalues; of zeros these are only near."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(n, rank)), rng.normal(size=(m, 40)) * np.linspace(0.5, 2, 40) + 0.2
    plane = np.linalg.qr(rng.normal(size=(40, rank)))[0].T
    C, T = np.cov(a.T), np.cov(b.T)
    root = np.sqrt(np.maximum(np.linalg.eigvals(C @ (plane @ T @ plane.T)).real, 0)).sum()
    expected = ((a.mean(0) @ plane - b.mean(0)) ** 2).sum() + np.trace(C) + np.trace(T) - 2 * root
    assert distance(torch.tensor(a @ plane), torch.tensor(b)) == pytest.approx(expected, rel=near)


def test_frechet_distance_of_a_set_with_itself():
    for n in (20, 400):
        a = torch.randn(n, 50, generator=torch.Generator().manual_seed(0))
        assert abs(distance(a, a)) < 1e-10 * 50      # of the trace
    constant = torch.ones(10, 4)
    assert distance(constant, constant) == 0


def test_two_sample_test_is_mmd2_and_its_permutations():
    """The value by mmd2, p by all permutations of a few points, whichever container the points come in."""
    x, y = np.array([[0.0], [0.4], [1.0]]), np.array([[2.0], [2.5], [4.0]])
    pooled = np.concatenate([x, y])
    apart = abs(pooled - pooled.T)[np.triu_indices(6, 1)]
    kernel = partial(common.gaussian, sigma=torch.tensor([np.sort(apart)[7]]))          # the median of 15

    def squared(chosen):
        parts = pooled[list(chosen)], np.delete(pooled, list(chosen), 0)
        return float(common.mmd2(*common.gram(kernel, *map(torch.from_numpy, parts)), unbiased=True))

    every = [squared(chosen) for chosen in itertools.combinations(range(6), 3)]
    exact = np.mean(np.array(every) >= squared((0, 1, 2)) - 1e-12)                      # 2 of 20
    for pair in ((x, y), (x.tolist(), torch.from_numpy(y))):
        value, p = common.two_sample_test(*pair, permutations=4_000)
        assert value == pytest.approx(squared((0, 1, 2))) and p == pytest.approx(exact, abs=0.02)
    line = np.arange(40)[:, None]
    assert common.two_sample_test(line, line + 99, permutations=99)[1] == 0.01          # never 0
    given = common.two_sample_test(x, y, lambda a, b: common.gaussian(a, b, torch.tensor([0.3])), 50)
    assert given[0] != value and common.two_sample_test(x, x, permutations=50)[1] > 0.5
    for wrong in ([[1.0]], [1.0, 2.0], [[1.0, 2.0], [3.0, 4.0]]):
        with says("expected [N, D] of one D, 2 or more points"):
            common.two_sample_test(x, wrong)
    with says("all finite"):
        common.two_sample_test(x, y * np.nan)
    far, binary = common.two_sample_test(x + 1e9, y + 1e9, permutations=50), np.eye(2)[[0, 0, 0, 1]][:, :1]
    assert far == pytest.approx(common.two_sample_test(x, y, permutations=50), rel=1e-5)
    scaled = [common.two_sample_test(s * binary, s * (1 - binary), permutations=50) for s in (1, 0.3)]
    assert scaled[0] == pytest.approx(scaled[1])                    # most distances are 0
    for s in (1e-200, 1e200):
        assert common.two_sample_test(s * x, s * y, permutations=50) == pytest.approx(
            common.two_sample_test(x, y, permutations=50))
    with says("kernel that is not finite"):
        common.two_sample_test(x, y, lambda a, b: torch.nan * common.dot(a, b))


def test_ratio_at_new_points():
    """The minimiser of density_ratio's problem over the span of all kernels, solved as a linear system."""
    rng, ridge = np.random.default_rng(0), 0.3
    x, y, t = rng.normal(size=(8, 2)), rng.normal(size=(6, 2)) + 0.5, rng.normal(size=(5, 2))
    both, wanted = np.concatenate([x, y]), []
    for sigma in (0.7, 1.5):
        K_x, K_y, K_t, K = (np.exp(-((a[:, None] - both) ** 2).sum(-1) / 2 / sigma ** 2)
                            for a in (x, y, t, both))
        c = np.linalg.lstsq(K_y.T @ K_y / 6 + ridge / 6 * K, K_x.mean(0), rcond=None)[0]
        wanted.append(K_t @ c)
    found = common.ratio_at(t.tolist(), x, torch.from_numpy(y), (0.7, 1.5), ridge)
    assert np.allclose(found, np.mean(wanted, 0), atol=1e-6)
    x, y = rng.normal(size=(3_000, 1)), rng.normal(size=(3_000, 1)) + 1                 # truth exp(1/2 - t)
    t = np.linspace(-0.5, 2, 6)[:, None]
    assert np.allclose(common.ratio_at(t, x, y, 1, 1), np.exp(0.5 - t[:, 0]), rtol=0.2)
    x, y = x[:200], y[:200]
    near, far = common.ratio_at(t, x, y, 1, 1), [[1e12]]
    assert torch.allclose(common.ratio_at(t + 1e8, x + 1e8, y + 1e8, 1, 1), near, atol=1e-4)
    assert torch.equal(common.ratio_at(np.concatenate([t, far]), x, y, 1, 1)[:6], near)
    assert torch.allclose(common.ratio_at(t, x, np.concatenate([y, far]), 1, 1), near, rtol=1e-2)
    for wrong in (dict(ridge=0), dict(ridge=np.inf), dict(sigma=[1, 0]), dict(sigma=[]), dict(x=[1.0, 2.0]),
                  dict(points=np.ones((2, 3)))):
        with says("expected"):
            common.ratio_at(**dict(points=t, x=x[:9], y=y[:9], sigma=1, ridge=1) | wrong)
    at_y = common.ratio_at(y[:50], x[:50], y[:50], 1, 0.1)
    K_xx, K_xy, K_yy = common.gram(partial(common.gaussian, sigma=torch.ones(1)), *(
        torch.from_numpy(s[:50]) for s in (x, y)))
    assert torch.allclose(at_y, common.density_ratio(K_yy, K_xy.mT, 0.1), atol=1e-8)
