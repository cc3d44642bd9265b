"""The mathematics against independent oracles: double loops, closed forms, numpy, finite differences."""
import math

import numpy as np
import pytest
import torch

import common

SIGMA = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)


def sets(n=7, m=5, dim=3, shift=0.5, seed=0):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(n, dim, generator=rng, dtype=torch.float64)
    return x, torch.randn(m, dim, generator=rng, dtype=torch.float64) + shift


def blocks(x, y, sigma=SIGMA):
    return common.gram(lambda a, b: common.gaussian(a, b, sigma), x, y)


def k(a, b, sigma):
    return math.exp(-sum((float(s) - float(t)) ** 2 for s, t in zip(a, b)) / (2 * sigma ** 2))


def loop_mmd2(x, y, sigmas, unbiased):
    total = 0.0
    for sigma in sigmas:
        for points in (x, y):
            pairs = [(i, j) for i in range(len(points)) for j in range(len(points)) if i != j or not unbiased]
            total += sum(k(points[i], points[j], sigma) for i, j in pairs) / len(pairs)
        total -= 2 * sum(k(a, b, sigma) for a in x for b in y) / (len(x) * len(y))
    return total


@pytest.mark.parametrize("unbiased", [False, True])
def test_mmd2_equals_a_double_loop(unbiased):
    x, y = sets()
    assert float(common.mmd2(*blocks(x, y), unbiased)) == pytest.approx(
        loop_mmd2(x, y, SIGMA.tolist(), unbiased), rel=1e-12)


def test_mixture_is_the_sum_of_its_kernels():
    x, y = sets()
    singles = [common.mmd2(*blocks(x, y, s[None])) for s in SIGMA]
    assert float(common.mmd2(*blocks(x, y))) == pytest.approx(float(sum(singles)), rel=1e-12)


def test_unbiased_is_zero_in_the_mean_and_biased_is_not():
    values = []
    for seed in range(3000):
        K = blocks(*sets(6, 6, 2, shift=0, seed=seed), SIGMA[1:2])
        values.append([float(common.mmd2(*K, unbiased=True)), float(common.mmd2(*K))])
    unbiased, biased = np.array(values).T
    error = unbiased.std() / len(values) ** 0.5
    assert abs(unbiased.mean()) < 4 * error
    assert biased.mean() > 20 * error and biased.min() >= 0


def test_mmd_is_the_root_and_has_a_gradient_at_equal_sets():
    x, y = sets()
    expected = (loop_mmd2(x, y, SIGMA.tolist(), False) + 1e-6) ** 0.5
    assert float(common.mmd(*blocks(x, y))) == pytest.approx(expected)
    for dtype in (torch.float32, torch.float64):
        same = x.to(dtype).requires_grad_()
        value = common.mmd(*blocks(same, x.to(dtype), SIGMA.to(dtype)))
        gradient, = torch.autograd.grad(value, same)
        assert torch.isfinite(gradient).all() and float(value.detach()) == pytest.approx(1e-3, rel=0.1)


def test_distances_do_not_cancel_far_from_the_origin():
    x, y = sets(50, 40, 8)
    found = common.squared_distances(x.float() + 1000, y.float() + 1000)
    exact = ((x.float() + 1000).double()[:, None] - (y.float() + 1000).double()).square().sum(-1)
    assert float(((found - exact).abs() / exact).max()) < 1e-5
    assert common.squared_distances(x.float(), x.float()).min() >= 0


def test_gram_is_the_kernel_of_each_pair_of_sets():
    x, y = sets()
    K_xx, K_xy, K_yy = blocks(x, y)
    assert K_xx.shape == (3, 7, 7) and K_xy.shape == (3, 7, 5) and K_yy.shape == (3, 5, 5)
    for s, sigma in enumerate(SIGMA.tolist()):
        for K, a, b in ((K_xx, x, x), (K_xy, x, y), (K_yy, y, y)):
            expected = [[k(u, v, sigma) for v in b] for u in a]
            assert torch.allclose(K[s], torch.tensor(expected, dtype=torch.float64))


# ---- density ratios ---------------------------------------------------------------------------------------


def test_ratio_equals_numpys_solver():
    x, y = sets(9, 6)
    K_xx, K_xy, K_yy = blocks(x, y)
    expected = np.mean([np.linalg.solve(Q.numpy() + 0.01 * np.eye(6), P.numpy().T.sum(1) * 6 / 9)
                        for Q, P in zip(K_yy, K_xy)], 0)
    assert np.allclose(common.density_ratio(K_yy, K_xy.mT, 0.01), expected, rtol=1e-10)


def test_ratio_of_two_gaussians():
    """p = N(0.3, 0.8^2), q = N(0, 1): n = 2,000, sigma 0.5, ridge 1: p / q within 0.1 in the mean over q."""
    rng = torch.Generator().manual_seed(0)
    x = 0.3 + 0.8 * torch.randn(2000, 1, generator=rng, dtype=torch.float64)
    y = torch.randn(2000, 1, generator=rng, dtype=torch.float64)
    _, K_xy, K_yy = blocks(x, y, SIGMA[:1])
    r = common.density_ratio(K_yy, K_xy.mT, 1.0)
    normal = torch.distributions.Normal
    exact = (normal(0.3, 0.8).log_prob(y) - normal(0.0, 1.0).log_prob(y)).exp().squeeze(1)
    assert float((r - exact).abs().mean()) < 0.1
    assert float((exact - 1).abs().mean()) > 0.3         # so that a constant 1 would not pass


def test_ratio_of_equal_distributions_is_near_one():
    x, _ = sets(200, 1, 2)
    K_xx, K_xy, K_yy = blocks(x, x.clone(), SIGMA[1:])
    assert float((common.density_ratio(K_yy, K_xy.mT, 1e-3) - 1).abs().max()) < 0.05
    x, y = sets(400, 400, 1, shift=0)
    K_xx, K_xy, K_yy = blocks(x, y, SIGMA[1:2])
    assert float(common.density_ratio(K_yy, K_xy.mT, 1.0).mean()) == pytest.approx(1, abs=0.05)


def test_ratio_is_kulsif():
    """r are the values at y of the minimiser of mean(w(y)^2) / 2 - mean(w(x)) + ridge / 2M |w|^2."""
    x, y = sets(7, 5)
    M, ridge = 5, 0.2
    K_xx, K_xy, K_yy = (K[0] for K in blocks(x, y, SIGMA[:1]))
    K = torch.cat([torch.cat([K_xx, K_xy], 1), torch.cat([K_xy.T, K_yy], 1)])       # w = sum of a_i k(., z_i)
    quadratic = K[:, 7:] @ K[7:] / M + ridge / M * K
    a = torch.linalg.lstsq(quadratic, K[:, :7].mean(1, keepdim=True), driver="gelsd").solution
    r = common.density_ratio(K_yy[None], K_xy.T[None], ridge)
    assert torch.allclose((K[7:] @ a).squeeze(1), r, rtol=1e-6)


def test_ratio_is_nan_where_its_matrix_is_not_positive():
    K_qq = torch.stack([torch.eye(3), -torch.eye(3)])[:, None]
    r = common.density_ratio(K_qq, torch.ones(2, 1, 3, 3), 1e-3)
    assert r.isnan().tolist() == [[False] * 3, [True] * 3]


def test_squared_ratio_has_its_bound():
    """mean(r^2) <= M / (4 ridge), and one point whose kernel is the ridge reaches it."""
    ridge = 1e-3
    largest = 0
    for seed in range(50):
        rng = torch.Generator().manual_seed(seed)
        spread = 10 ** (4 * torch.rand(2, 1, 1, generator=rng) - 2)
        x, y = (spread * torch.randn(2, 12, 3, generator=rng)).double()
        for sigma in SIGMA:
            _, K_xy, K_yy = blocks(x, y, sigma[None])
            largest = max(largest, float(common.density_ratio(K_yy, K_xy.mT, ridge).square().mean()))
    assert 0.01 < largest / (12 / (4 * ridge)) < 1
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    r = common.density_ratio(ridge * one, ridge ** 0.5 * one, ridge)
    assert float(r) ** 2 == pytest.approx(1 / (4 * ridge))


def test_mean_ratio_is_above_one_in_the_middle():
    """Of a set in the middle of the other, below one of a set around it, nothing far off (gram_objective)."""
    angle = torch.arange(16, dtype=torch.float64) * math.pi / 8
    around = torch.stack([angle.cos(), angle.sin()], 1)

    def means(x, y):
        K = blocks(x, y, SIGMA[1:2])
        return [float(common.gram_objective(*K, form, 1e-3, 1.0)[1].mean()) for form in ("flow", "sum")]

    (flow, printed), swapped = means(around, 0.1 * around), means(0.1 * around, around)
    assert flow > 1.2 and printed < 0.8
    assert swapped == pytest.approx([printed, flow])
    assert max(means(around, 0.1 * around + 20)) < 1e-6


# ---- objectives -------------------------------------------------------------------------------------------


def objective(form, x, y):
    return common.gram_objective(*blocks(x, y), form, 0.1, 0.7)


def test_objectives_are_what_their_equations_say():
    x, y = sets(6, 6)
    K_xx, K_xy, K_yy = (K.numpy() for K in blocks(x, y))
    p_over_q = np.mean([np.linalg.solve(Q + 0.1 * np.eye(6), P.T.sum(1)) for Q, P in zip(K_yy, K_xy)], 0)
    q_over_p = np.mean([np.linalg.solve(P + 0.1 * np.eye(6), C.sum(1)) for P, C in zip(K_xx, K_xy)], 0)
    divergence = ((p_over_q - 1) ** 2).mean()
    expected = {"sum": divergence + 0.7 * p_over_q.sum(), "mean": divergence + 0.7 * p_over_q.mean(),
                "clip": ((np.maximum(p_over_q, 0) - 1) ** 2).mean(), "flow": q_over_p.mean(),
                "swap": ((q_over_p - 1) ** 2).mean() + 0.7 * q_over_p.sum()}
    for form, value in expected.items():
        assert float(objective(form, x, y)[0]) == pytest.approx(value, rel=1e-9), form
    assert torch.allclose(objective("sum", x, y)[1], torch.tensor(p_over_q))
    assert torch.allclose(objective("flow", x, y)[1], torch.tensor(q_over_p))
    with pytest.raises(ValueError, match="form 'eq9'"):
        objective("eq9", x, y)


@pytest.mark.parametrize("form", ["sum", "mean", "clip", "swap", "flow"])
def test_gradients_of_objectives(form):
    """Against finite differences in float64, with a set of ratios that clipping does and does not touch."""
    x, y = (s.requires_grad_() for s in sets(6, 6, 2, shift=2.0))
    assert form != "clip" or 0 < int((objective("sum", x, y)[1] < 0).sum()) < 6
    assert torch.autograd.gradcheck(lambda x, y: objective(form, x, y)[0], (x, y))


@pytest.mark.parametrize("form", ["sum", "mean", "clip", "swap", "flow"])
@pytest.mark.parametrize("K", [1, 2, 10])
def test_objectives_in_float32(form, K):
    """Value, ratio and gradient against a solve in float64: of near points A has the condition 1e5."""
    for std in (0.3, 1, 3):
        rng = torch.Generator().manual_seed(0)
        x, y = (std * torch.randn(200, K, generator=rng) for _ in range(2))
        low, high = ([t.to(d).requires_grad_() for t in (x, y)] for d in (torch.float32, torch.float64))
        value, r = common.gram_objective(*blocks(*low, SIGMA[1:2].float()), form, 1e-3, 0.7)
        assert r.dtype == torch.float32
        p, q = high[::-1] if form in ("swap", "flow") else high
        A, B = ((-(q[:, None] - t).square().sum(-1) / 2).exp() for t in (q, p))
        ratio = torch.linalg.solve(A + 1e-3 * torch.eye(200), B.sum(1))
        square = (ratio - 1).square().mean()
        expected = {"sum": square + 0.7 * ratio.sum(), "mean": square + 0.7 * ratio.mean(),
                    "clip": (ratio.clamp(min=0) - 1).square().mean(), "flow": ratio.mean(),
                    "swap": square + 0.7 * ratio.sum()}[form]
        wanted = [expected, ratio.clamp(min=0) if form == "clip" else ratio,
                  *torch.autograd.grad(expected, high, retain_graph=True)]
        for found, exact in zip([value, r, *torch.autograd.grad(value, low)], wanted):
            assert float(((found - exact).norm() / exact.norm()).detach()) < 2e-3, std


def test_clipping_has_a_dead_end():
    """Critic outputs so far apart that K_xy is 0: r = 0, the objective is 1 and its gradient 0."""
    x, y = sets(6, 6)
    y = (y + 1000).requires_grad_()
    value, r = objective("clip", x, y)
    gradient, = torch.autograd.grad(value, y)
    assert float(value.detach()) == 1 and r.abs().max() == 0 and gradient.abs().max() == 0


def test_gan_losses():
    d_x, d_y = torch.tensor([[0.3], [-2.0]], dtype=torch.float64), torch.tensor([[1.5]], dtype=torch.float64)

    def s(t):
        return 1 / (1 + math.exp(-t))

    assert float(common.gan_critic(d_x, d_y)) == pytest.approx(
        -(math.log(s(0.3)) + math.log(s(-2.0))) / 2 - math.log(1 - s(1.5)))
    assert float(common.gan_generator(d_y)) == pytest.approx(-math.log(s(1.5)))
    assert torch.isfinite(common.gan_critic(torch.tensor([[-500.0]]), torch.tensor([[500.0]])))


def test_descend_takes_all_gradients_before_any_step():
    a, b = (torch.tensor(v, requires_grad=True) for v in (1.0, 2.0))
    players = [torch.optim.SGD([p], lr=0.1) for p in (a, b)]
    common.descend((players[0], a * b), (players[1], -a * b))
    assert a.item() == pytest.approx(1 - 0.1 * 2) and b.item() == pytest.approx(2 + 0.1 * 1)
    common.descend((players[0], a * b))
    common.descend((players[1], -a * b))
    assert b.item() == pytest.approx(2.1 + 0.1 * (0.8 - 0.1 * 2.1))     # it saw the first one's step


# ---- distances between features ---------------------------------------------------------------------------


def features_with(mean, covariance, n=500, seed=0):
    """n features whose sample mean and covariance are exactly these."""
    z = torch.randn(n, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    z = z - z.mean(0)
    z = z @ torch.linalg.inv(torch.linalg.cholesky(z.T @ z / (n - 1))).T
    return z @ torch.linalg.cholesky(covariance).T + mean


def distance(a, b):
    return common.frechet_distance(common.gaussian_fit(a), common.gaussian_fit(b))


def test_frechet_distance_closed_forms():
    a, b = torch.tensor([[1.0, 4.0, 9.0], [4.0, 4.0, 0.25]], dtype=torch.float64)
    m = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    found = distance(features_with(m, a.diag()), features_with(0 * m, b.diag(), 400, seed=1))
    assert found == pytest.approx(float(m.square().sum() + (a.sqrt() - b.sqrt()).square().sum()), rel=1e-9)
    # covariances that do not commute: the trace of a 2x2 root is sqrt(tr + 2 sqrt(det))
    S = torch.tensor([[2.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
    T = torch.tensor([[1.0, -0.5], [-0.5, 3.0]], dtype=torch.float64)
    product, zero = S @ T, torch.zeros(2, dtype=torch.float64)
    root = float((product.trace() + 2 * product.det().sqrt()).sqrt())
    assert distance(features_with(zero, S), features_with(zero, T, seed=1)) == pytest.approx(
        float(S.trace() + T.trace()) - 2 * root, rel=1e-9)


@pytest.mark.parametrize("n", [12, 300])
def test_frechet_distance_with_fewer_and_more_samples_than_dimensions(n):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(n, 40)), rng.normal(size=(n + 3, 40)) * 1.5 + 0.2
    S, T = np.cov(a.T), np.cov(b.T)
    root = np.sqrt(np.maximum(np.linalg.eigvals(S @ T).real, 0)).sum()
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(S) + np.trace(T) - 2 * root
    found = distance(torch.tensor(a), torch.tensor(b))
    assert found == pytest.approx(expected, abs=1e-6 * np.trace(S))


def test_frechet_distance_below_full_rank_loses_no_digits():
    """Twelve features in a 3-dimensional subspace against 300 in all 40: a 3 x 3 root tells the trace."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(12, 3)), rng.normal(size=(300, 40)) * np.linspace(0.5, 2, 40)
    plane = np.linalg.qr(rng.normal(size=(40, 3)))[0].T
    C, T = np.cov(a.T), np.cov(b.T)
    root = np.sqrt(np.linalg.eigvals(C @ (plane @ T @ plane.T)).real).sum()
    expected = ((a.mean(0) @ plane - b.mean(0)) ** 2).sum() + np.trace(C) + np.trace(T) - 2 * root
    found = distance(torch.tensor(a @ plane), torch.tensor(b))
    assert found == pytest.approx(expected, rel=1e-11)


def test_frechet_distance_of_a_set_with_itself():
    for n in (20, 400):
        a = torch.randn(n, 50, generator=torch.Generator().manual_seed(0))
        assert abs(distance(a, a)) < 1e-10 * 50      # of the trace
    constant = torch.ones(10, 4)
    assert distance(constant, constant) == 0


def test_kid_equals_a_double_loop():
    x, y = sets(6, 9, 4)

    def cubic(a, b):
        return (float(a @ b) / 4 + 1) ** 3

    def u_statistic(u, v):
        n = len(u)
        within = sum(cubic(s[i], s[j]) for s in (u, v) for i in range(n) for j in range(n) if i != j)
        return within / (n * (n - 1)) - 2 * sum(cubic(a, b) for a in u for b in v) / n ** 2

    mean, std = common.kid(x, y[:6], subsets=3)         # fewer than a subset: each is the whole set
    assert mean == pytest.approx(u_statistic(x, y[:6]), rel=1e-12) and std == pytest.approx(0, abs=1e-12)
    assert common.kid(x, x, subsets=2)[0] < 0           # unbiased, so negative for a set with itself
    rng = torch.Generator().manual_seed(0)
    expected = [u_statistic(x[torch.randperm(6, generator=rng)[:4]], y[torch.randperm(9, generator=rng)[:4]])
                for _ in range(5)]
    assert common.kid(x, y, 5, 4) == pytest.approx((np.mean(expected), np.std(expected)), rel=1e-9)


# ---- kernels of Demystifying MMD GANs ---------------------------------------------------------------------


def rq_star(x, y):
    alpha = torch.tensor([0.2, 0.5, 1, 2, 5], dtype=torch.float64)
    return torch.cat([common.rational_quadratic(x, y, alpha), common.dot(x, y)], -3)


def test_kernels_by_hand():
    x, y = torch.tensor([[3.0, 4.0], [0.0, 0.0]]).double(), torch.tensor([[3.0, 0.0], [3.0, 4.0]]).double()
    assert common.dot(x, y).tolist() == [[[9, 25], [0, 0]]]
    assert common.distance(x, y).tolist() == [[[(5 + 3 - 4) / 2, 5], [0, 0]]]
    rq = common.rational_quadratic(x, y, torch.tensor([0.5, 2.0]).double())
    assert torch.allclose(rq[0], torch.tensor([[17, 1], [10, 26]]).double() ** -0.5)
    assert torch.allclose(rq[1], torch.tensor([[5, 1], [3.25, 7.25]]).double() ** -2)


@pytest.mark.parametrize("kernel", [rq_star, common.dot, common.distance, lambda x, y: rq_star(x, y)[:5]])
def test_kernels_are_positive_semi_definite(kernel):
    x, _ = sets(30, 1, 4)
    for K in kernel(x, x):
        assert torch.allclose(K, K.mT) and float(torch.linalg.eigvalsh(K).min()) > -1e-10 * float(K.trace())


def test_rational_quadratic_is_a_mixture_of_gaussians():
    """Over precisions t / alpha, t ~ Gamma(alpha, 1): the integral of exp(-t d^2 / 2 alpha) by quadrature."""
    x, y = sets(3, 4, 2)
    u = torch.linspace(-60, 8, 400_001, dtype=torch.float64)        # t = exp(u)
    for alpha in (0.2, 1.0, 5.0):
        density = torch.exp(alpha * u - u.exp() - math.lgamma(alpha))
        d_2 = common.squared_distances(x, y)
        expected = torch.stack([torch.trapezoid(density * torch.exp(-u.exp() * d / (2 * alpha)), u)
                                for d in d_2.flatten()]).view_as(d_2)
        found = common.rational_quadratic(x, y, torch.tensor([alpha], dtype=torch.float64))[0]
        assert torch.allclose(found, expected, rtol=1e-4)


def test_mmd_of_dot_and_of_distance():
    """Biased: the squared distance of means. Unbiased: the energy distance, E|x - y| - half of the others."""
    x, y = sets(7, 5, 3)
    found = common.mmd2(*common.gram(common.dot, x, y))
    assert float(found) == pytest.approx(float((x.mean(0) - y.mean(0)).square().sum()))
    apart = [[float((a - b).norm()) for b in y] for a in x]
    within = [sum(float((s[i] - s[j]).norm()) for i in range(len(s)) for j in range(len(s)) if i != j)
              / (len(s) * (len(s) - 1)) for s in (x, y)]
    found = common.mmd2(*common.gram(common.distance, x, y), unbiased=True)
    assert float(found) == pytest.approx(np.mean(apart) - sum(within) / 2)


def test_unbiased_mmd_of_rq_star_has_no_diagonal():
    """The linear part's diagonal is no constant: with it the estimate would grow with the features' norm."""
    x, y = sets(6, 6, 3)
    loops = 0
    for a, b, weight in ((x, x, 1 / 30), (y, y, 1 / 30), (x, y, -2 / 36)):
        K = rq_star(a, b).sum(0)
        loops += sum(float(K[i, j]) * weight for i in range(6) for j in range(6) if a is not b or i != j)
    assert float(common.mmd2(*common.gram(rq_star, x, y), unbiased=True)) == pytest.approx(loops)


def test_distance_kernel_has_finite_slopes():
    x = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
    common.mmd2(*common.gram(common.distance, x, 0 * x)).backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("name", ["dot", "distance", "rq*"])
def test_mmd_and_slope_of_the_witness_do_not_feel_the_origin(name):
    """In float32 with features 65,536 away from 0, as a critic's may be, and in float64 at 0."""
    rng = torch.Generator().manual_seed(0)
    x, y, t = (torch.randn(9, 4, generator=rng).mul(64).round() / 64 for _ in range(3))    # exact far away
    y = y + 1
    found = []
    for shift, dtype in ((2.0 ** 16, torch.float32), (0, torch.float64)):
        kernel = common.kernels((1,), (1,), (0.5, 2), dtype=dtype)[name]
        a, b, c = ((points + shift).to(dtype).requires_grad_() for points in (x, y, t))
        mmd2 = common.mmd2(*common.gram(kernel, a, b), unbiased=True)
        slope, = torch.autograd.grad(common.witness(kernel, c, a, b).sum(), c, retain_graph=True)
        found.append([v.double() for v in (mmd2, slope, *torch.autograd.grad(mmd2, [a, b]))])
    for far, near in zip(*found):
        torch.testing.assert_close(far, near, rtol=1e-4, atol=1e-5)
