"""Adversarial critics, scaled and gradient-constrained MMD, Stack: finite differences, closed forms."""
import copy
import math

import pytest
import torch
from torch import nn

import common
from conftest import dense

UNIT = torch.ones(1, dtype=torch.float64)


def unit(a, b):
    return common.gaussian(a, b, UNIT)


def points(*shape, seed=0, shift=0.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def features(d, s, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(d, 8), nn.Tanh(), nn.Linear(8, s)).double()


def differences(function, x, step=1e-5):
    """Central differences of function(x) -> scalar in every entry of x."""
    out = torch.zeros_like(x)
    for i in range(x.numel()):
        shift = torch.zeros_like(x).view(-1)
        shift[i] = step
        shift = shift.view_as(x)
        out.view(-1)[i] = (function(x + shift) - function(x - shift)) / (2 * step)
    return out


# ---- pieces -----------------------------------------------------------------------------------------------


def test_witness_is_the_derivative_of_the_mmd():
    """Moving one sample y_j moves MMD^2 along the witness: d MMD^2 / d y_j = -2/M grad witness(y_j)."""
    x, y = points(6, 3), points(5, 3, seed=1, shift=0.4)
    expected = sum(math.exp(-float((t - x[0]).square().sum()) / 2) for t in x) / 6 - sum(
        math.exp(-float((t - x[0]).square().sum()) / 2) for t in y) / 5
    assert float(common.witness(unit, x[:1], x, y)) == pytest.approx(expected)
    found = differences(lambda t: common.witness(unit, t, x, y).sum(), y)
    slope = differences(lambda y: common.mmd2(*common.gram(unit, x, y)), y)
    assert torch.allclose(slope, -2 / 5 * found, atol=1e-8)


def test_jacobian_equals_finite_differences():
    f, x = features(4, 3), points(5, 4)
    h, J = common.jacobian(f, x)
    assert h.shape == (5, 3) and J.shape == (5, 3, 4) and torch.equal(h, f(x))
    for s in range(3):
        assert torch.allclose(J[:, s], differences(lambda t: f(t)[:, s].sum(), x), atol=1e-8)
    images = points(2, 3, 4, 4)
    _, J = common.jacobian(lambda t: t.flatten(1)[:, :2] * 2, images)
    assert J.shape == (2, 2, 48) and float(J.sum()) == 8


def test_gradient_penalty_equals_finite_differences():
    f = features(3, 2)
    x, y, a = points(6, 3), points(6, 3, seed=1), torch.rand(6, dtype=torch.float64)
    between = a[:, None] * x + (1 - a)[:, None] * y
    slope = differences(lambda t: f(t).sum(), between)
    expected = (slope.norm(dim=1) - 1).square().mean()
    found = common.gradient_penalty(lambda t: f(t).sum(-1), x, y, a)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-7)
    found.backward()                # twice differentiable: it teaches the weights
    weight = f[0].weight
    numeric = differences(lambda w: common.gradient_penalty(
        lambda t: f[2](torch.tanh(t @ w.T + f[0].bias)).sum(-1), x, y, a), weight.detach())
    assert torch.allclose(weight.grad, numeric, atol=1e-7)


def test_gradient_penalty_takes_the_norm_of_the_whole_image():
    """f = mean of 3 * 4 * 4 pixels times c: one gradient of norm c / sqrt(48) an image, not one a row."""
    x = points(5, 3, 4, 4)
    found = common.gradient_penalty(lambda t: t.flatten(1).mean(1) * 96, x, -x, torch.rand(5))
    assert float(found) == pytest.approx((96 / 48 ** 0.5 - 1) ** 2)


@pytest.mark.parametrize("kind", ["columns", "pixels"])
def test_gradient_penalty_of_released_code_has_a_norm_for_each_line(kind):
    """As mbinkowski/MMD-GAN, axis 1 of [N, H, W, C], and Scaled-MMD-GAN, axis 1 of [N, C, H, W]."""
    f = torch.nn.Sequential(torch.nn.Flatten(-3), features(48, 2))
    x, y, a = points(5, 3, 4, 4), points(5, 3, 4, 4, seed=1), torch.rand(5, dtype=torch.float64)
    between = a.view(5, 1, 1, 1) * x + (1 - a.view(5, 1, 1, 1)) * y
    slope = torch.func.jacrev(lambda t: f(t).sum())(between)
    lines = slope.permute(0, 2, 3, 1) if kind == "columns" else slope
    expected = (lines.square().sum(1).sqrt() - 1).square().mean()
    found = common.gradient_penalty(lambda t: f(t).sum(-1), x, y, a, common.AXES[kind])
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-9)
    stacked = common.gradient_penalty(lambda t: f(t).sum(-1), *(t.expand(2, *t.shape) for t in (x, y, a)),
                                      common.AXES[kind])
    assert torch.allclose(stacked, expected.expand(2)) and stacked.shape == (2,)


def test_gradient_penalty_of_a_flat_critic_is_finite():
    weight = torch.zeros(3, requires_grad=True)
    found = common.gradient_penalty(lambda t: t @ weight, torch.randn(4, 3), torch.randn(4, 3), torch.rand(4))
    gradient, = torch.autograd.grad(found, weight)
    assert float(found.detach()) == 1 and torch.isfinite(gradient).all()


@pytest.mark.parametrize("a", [0.0, 1.0])
def test_gradient_penalty_at_a_point_of_either_set_is_finite(a):
    """Where the distance kernel has its kink: TF32 rounds points near x to x."""
    f = common.dcgan_critic(3, (4, 8), 5, norms=(None, None), size=8)
    x, y = torch.rand(2, 6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    h_x, h_y = f(x), f(y)
    for best in (lambda h: common.cramer_witness(h, h_y),
                 lambda h: common.witness(common.distance, h, h_x, h_y)):
        penalty = common.gradient_penalty(lambda t: best(f(t)), x, y, torch.full((6,), a))
        gradient = torch.autograd.grad(penalty, list(f.parameters())[:-1], retain_graph=True)
        assert all(g.isfinite().all() for g in gradient) and any(g.abs().max() > 0 for g in gradient)


def test_feasible_set_by_hand():
    """Means of x (1, 5), of y (3, 2): only the first output breaks E f(x) >= E f(y), by 2."""
    h_x, h_y = torch.tensor([[0.0, 4.0], [2.0, 6.0]]), torch.tensor([[3.0, 2.0]])
    assert float(common.feasible_set(h_x, h_y)) == -1
    assert float(common.feasible_set(h_y, h_x)) == -1.5
    assert float(common.feasible_set(h_x, h_x)) == 0


def test_wasserstein_and_reconstruction_by_hand():
    assert float(common.wasserstein(torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0]]))) == -3
    assert common.reconstruction(torch.zeros(2, 3, 4), 2 * torch.ones(2, 3, 4)).tolist() == [4, 4]


def test_dropout_in_front_of_the_linear_layers():
    """Of the input a fifth, of the hidden layer a half is zeroed, the rest scaled; by the generator alone."""
    rng, x = torch.Generator().manual_seed(3), torch.ones(200, 100)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(100, 100), torch.nn.ReLU(),
                                  torch.nn.Linear(100, 100))
    for layer in network[1::2]:
        torch.nn.init.eye_(layer.weight), torch.nn.init.zeros_(layer.bias)
    h = common.with_dropout(network, x, (0.2, 0.5), rng)
    assert sorted(set(h.flatten().tolist())) == [0, 2.5]
    assert float((h > 0).float().mean()) == pytest.approx(0.8 * 0.5, abs=0.02)
    first = common.with_dropout(network, x, (0.2, 0.0), rng)
    assert float((first > 0).float().mean()) == pytest.approx(0.8, abs=0.02)
    assert torch.equal(common.with_dropout(network, x, (0.0, 0.0), rng), network(x))
    assert torch.equal(common.with_dropout(network, x, (0.2, 0.5), torch.Generator().manual_seed(3)), h)


def test_clipping_clips():
    torch.manual_seed(0)
    network = common.mlp(3, 50, 50, 2)
    before = [p.detach().clone() for p in network.parameters()]
    common.clip_weights(network, 0.05)
    for p, old in zip(network.parameters(), before):
        assert float(p.detach().abs().max()) == pytest.approx(0.05)
        assert torch.equal(p, old.clamp(-0.05, 0.05))


def test_penalties_on_norm_layers():
    network = common.mlp(2, 4, 4, 1, norm=nn.LayerNorm)
    own = common.norm_weights(network)
    assert sum(p.numel() for p in own) == 16            # scale and shift of two layers of 4
    assert float(common.l1(own)) == 8 and float(common.l2(own)) == 8
    with torch.no_grad():
        own[0].fill_(-3)
    assert float(common.l1(own)) == 16 and float(common.l2(own)) == 40
    assert float(common.l2(network.parameters())) > 40


# ---- scaled and gradient-constrained MMD ------------------------------------------------------------------


def test_dirac_closed_forms():
    """P = delta_0, Q = delta_theta, f(x) = psi x (Scaled MMD, eq. 3): values and slopes."""
    for theta, psi, lam in ((1.0, 0.5, 0.1), (-3.0, 0.2, 1.0), (2.0, -1.5, 0.1)):
        t = torch.tensor([theta, psi], dtype=torch.float64, requires_grad=True)

        def both(t):
            squared = common.mmd2(*common.gram(unit, 0 * t[:1, None], (t[0] * t[1]).view(1, 1)))
            return squared, common.smmd2(squared, t[1].view(1, 1, 1), lam)

        mmd2 = 2 * (1 - math.exp(-psi ** 2 * theta ** 2 / 2))
        squared, scaled = both(t)
        assert float(squared) == pytest.approx(mmd2, rel=1e-12)
        assert float(scaled) == pytest.approx(mmd2 / (lam + 1 + psi ** 2), rel=1e-12)
        assert float(common.smmd2_section_4(squared, t[1].view(1, 1, 1), 10)) == pytest.approx(
            mmd2 / (1 + 10 * psi ** 2))
        for i in (0, 1):
            gradient, = torch.autograd.grad(both(t)[i], t)
            assert torch.allclose(gradient, differences(lambda t: both(t)[i], t.detach()), atol=1e-8)


def test_scaled_mmd_has_the_mean_squared_slope():
    f, x, y = features(3, 2), points(6, 3), points(5, 3, seed=1)
    squared = common.mmd2(*common.gram(unit, f(x), f(y)))
    slope = sum(differences(lambda t: f(t)[:, s].sum(), x).square().sum() for s in range(2)) / 6
    found = common.smmd2(squared, common.jacobian(f, x)[1], 0.1)
    assert float(found) == pytest.approx(float(squared / (1.1 + slope)), rel=1e-7)


def test_kernel_jet_equals_finite_differences():
    a, b = points(3, 2), points(4, 2, seed=1)
    jet = common.kernel_jet(a, b)
    assert jet.shape == (3, 3, 4, 3) and torch.allclose(jet[:, 0, :, 0], unit(a, b)[0])
    for n in range(3):
        for m in range(4):
            assert torch.allclose(jet[n, 1:, m, 0], differences(lambda t: unit(t[None], b)[0, 0, m], a[n]))
            assert torch.allclose(jet[n, 0, m, 1:], differences(lambda t: unit(a, t[None])[0, n, 0], b[m]))
            mixed = [differences(lambda t: common.kernel_jet(a, t[None])[n, i, 0, 0], b[m]) for i in (1, 2)]
            assert torch.allclose(jet[n, 1:, m, 1:], torch.stack(mixed), atol=1e-8)


@pytest.mark.parametrize("s", [1, 2])
def test_gradient_constrained_mmd_equals_the_dense_system(s):
    """Value, and gradients in the critic's weights and in the samples."""
    f, x, y, lam = features(4, s), points(5, 4), points(6, 4, seed=1, shift=0.5).requires_grad_(), 0.1

    def reduced():
        h, J = common.jacobian(f, x)
        return common.gradient_constrained_mmd2(h, f(y), h, J, lam)[0]

    wanted, found = dense(f, x, y, x, lam), reduced()
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-10)
    weights = [*f.parameters(), y]
    for a, b in zip(*(torch.autograd.grad(value, weights) for value in (wanted, found))):
        assert torch.allclose(a, b, atol=1e-10)


def test_gradient_constrained_critic_meets_its_constraint():
    """The critic g / S: its norm (eq. 5) is 1 and its mean difference between P and Q is S."""
    f, x, y, lam = features(3, 2), points(6, 3), points(5, 3, seed=1, shift=1.0), 0.1
    h, J = common.jacobian(f, x)
    squared, critic = common.gradient_constrained_mmd2(h, f(y), h, J, lam)
    S = squared.sqrt()
    difference = critic(f(x)).mean() - critic(f(y)).mean()
    assert float(difference / S) == pytest.approx(float(S), rel=1e-9)
    _, slope = common.jacobian(lambda t: critic(f(t))[:, None], x)
    in_mu = critic(f(x)).square().mean() + slope.square().sum((1, 2)).mean()
    assert float(in_mu) < float(squared)        # the rest is lam |g|^2 in the kernel's space
    shorter = common.gradient_constrained_mmd2(h, f(y), h, J, 10 * lam)[0]
    assert float(shorter) < float(squared)


def test_scaled_is_at_most_gradient_constrained():
    for seed in range(20):
        f, x, y = features(4, 2, seed), 2 * points(8, 4, seed=seed), points(7, 4, seed=seed + 99, shift=0.3)
        h, J = common.jacobian(f, x)
        squared = common.mmd2(*common.gram(unit, h, f(y)))
        constrained, _ = common.gradient_constrained_mmd2(h, f(y), h, J, 0.1)
        assert 0 < float(common.smmd2(squared, J, 0.1)) <= float(constrained)


def test_sobolev_critic_of_a_known_solution():
    """mu = 1 on the square of side pi: f = sin x sin y has -div grad f = 2 f; and the constraint holds."""
    line = torch.linspace(0, math.pi, 33, dtype=torch.float64)
    h = float(line[1])
    known = line.sin()[:, None] * line.sin()
    found = common.sobolev_critic(2 * known, torch.zeros_like(known), torch.ones_like(known), h)
    u, v = torch.gradient(found, spacing=h)
    assert float((u.square() + v.square()).sum() * h ** 2) == pytest.approx(1, rel=0.07)
    assert torch.allclose(found / found.max(), known / known.max(), atol=1e-3)
    assert float(found[0].abs().max()) == 0


# ---- Cramer, Scaled WGAN, Sobolev GAN, spectral parametrisation --------------------------------------------


def test_cramer_is_eq_10():
    x, y = points(4, 3), points(5, 3, seed=1, shift=0.5)

    def rho(a, b):
        return float((a - b).norm())

    zero = torch.zeros(3).double()
    pairs = [rho(y[i], y[j]) for i in range(5) for j in range(5) if i != j]
    eq_10 = (sum(pairs) / 20 + sum(rho(t, zero) for t in x) / 4 - sum(rho(t, zero) for t in y) / 5
             - sum(rho(a, b) for a in x for b in y) / 20)
    assert float(common.cramer(x, y)) == pytest.approx(-eq_10)
    found = common.cramer_witness(x, y)
    assert found.tolist() == pytest.approx([sum(rho(t, b) for b in y) / 5 - rho(t, zero) for t in x])
    origin, away = torch.zeros(6, 1).double(), torch.full((6, 1), 3.0).double()
    assert float(common.cramer(away, origin)) == 0          # the paper's two laws that it takes for one


def test_scaled_losses_against_autograd():
    f, x, y = features(4, 1), points(6, 4), points(7, 4, seed=1)
    rows = torch.stack([torch.autograd.functional.jacobian(lambda t: f(t).squeeze(-1), point) for point in x])
    slope = float(rows.square().sum(1).mean())
    h, J = common.jacobian(f, x)
    assert torch.allclose(J[:, 0], rows)
    w = float(f(x).mean() - f(y).mean())
    value = float(f(x).square().mean())
    assert float(common.swgan(h, f(y), J, 10)) == pytest.approx(w / math.sqrt(1 + 10 * (value + slope)))
    mmd2 = common.mmd2(*common.gram(unit, h, f(y)), unbiased=True)
    assert float(common.smmd2_section_4(mmd2, J, 10)) == pytest.approx(float(mmd2) / (1 + 10 * slope))
    found, omega = common.sobolev(h, f(y), J, 0.3, 2.0)
    assert float(omega) == pytest.approx(slope - 1)
    assert float(found) == pytest.approx(w - 0.3 * (slope - 1) - (slope - 1) ** 2)


def test_activation_penalty_by_hand():
    f = common.dcgan_critic(3, (4, 8), 2, norms=(None, None), size=8)
    x = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    y, layers, expected = 3 * torch.rand(x.shape), [], 0
    common.both(f, x, y, layers)
    assert [h.shape for h in layers] == [(10, 4, 4, 4), (10, 8, 2, 2), (10, 2)]
    for t in (x, y):
        first = nn.functional.leaky_relu(f[0](t), 0.2)
        second = nn.functional.leaky_relu(f[2](first), 0.2)
        expected += float((first ** 2).mean() + (second ** 2).mean() + (f(t) ** 2).mean())
    assert float(common.activation_penalty(layers)) == pytest.approx(expected)


@pytest.mark.parametrize("learned", [False, True])
def test_spectral_parametrisation(learned):
    """|W| is gamma to 1e-4 after 100 iterations, within 5 % of it after training; only gamma is added."""
    torch.manual_seed(0)
    plain = common.dcgan_critic(3, (8, 16), 1, norms=(None, None), size=8)
    f = common.spectral(copy.deepcopy(plain), learned)
    assert common.count(f) == common.count(plain) + 3 * learned
    for _ in range(100):
        f(torch.zeros(1, 3, 8, 8))
    assert all(float(s[0]) == pytest.approx(1, rel=1e-4) for s in common.singular_values(f.eval()))
    raw = [torch.linalg.svdvals(layer.weight.flatten(1)) for layer in plain if hasattr(layer, "weight")]
    assert all(torch.allclose(s, r / r[0], rtol=1e-4) for s, r in zip(common.singular_values(f), raw))
    optimizer, x = torch.optim.Adam(f.train().parameters(), 1e-3), torch.randn(16, 3, 8, 8)
    for _ in range(30):
        optimizer.zero_grad()
        with nn.utils.parametrize.cached():
            f(x).square().mean().neg().backward()
        optimizer.step()
    gains = [layer.parametrizations.weight[1].gamma.item() if learned else 1.0
             for layer in f if hasattr(layer, "weight")]
    assert all(float(s[0]) == pytest.approx(gain, rel=0.05)
               for s, gain in zip(common.singular_values(f.eval()), gains))
    assert not learned or min(gains) > 1.005        # they have moved, upwards as the loss asks


def test_spectral_parametrisation_iterates_once_where_it_is_cached():
    f = common.spectral(nn.Linear(5, 4), learned=False)
    norm = f.parametrizations.weight[0]
    before = norm._u.clone()
    with nn.utils.parametrize.cached():
        f(torch.ones(2, 5)), f(torch.zeros(2, 5))
    weight = f.parametrizations.weight.original
    v = nn.functional.normalize(weight.T @ before, dim=0)
    assert torch.allclose(norm._u, nn.functional.normalize(weight @ v, dim=0), atol=1e-6)


# ---- stacks -----------------------------------------------------------------------------------------------

SIZES = [(4, 20, 20, 2), (16, 100, 100, 2), (2, 7, 7, 2)]


def build(sizes=SIZES, **options):
    torch.manual_seed(0)
    return [common.mlp(*own, **options) for own in sizes]


def test_stack_equals_its_members():
    networks, z = build(), torch.randn(3, 11, 16)
    for i, (width, *_) in enumerate(SIZES):
        z[i, :, width:] = 0
    found = common.Stack(networks)(z)
    assert found.shape == (3, 11, 2)
    for i, (network, (width, *_)) in enumerate(zip(networks, SIZES)):
        assert torch.allclose(found[i], network(z[i, :, :width]), atol=1e-6)


@pytest.mark.parametrize("norm", [nn.LayerNorm, lambda n: nn.BatchNorm1d(n, track_running_stats=False)])
def test_stack_with_norms_equals_its_members(norm):
    networks, x = build([(2, 9, 9, 3)] * 3, norm=norm), torch.randn(3, 11, 2)
    with torch.no_grad():
        for network in networks:
            for p in network.parameters():
                p.uniform_(-1, 1)
    stack = common.Stack(networks)
    assert torch.allclose(stack(x), torch.stack([n(t) for n, t in zip(networks, x)]), atol=1e-5)
    assert len(common.norm_weights(stack)) == 4


def test_a_trained_stack_equals_its_members_trained_alone():
    """50 steps of Adam on GRAM's losses: the same samples; what is padded stays 0."""
    widths, z_all = [4, 16, 2], torch.randn(50, 3, 32, 16)
    for i, width in enumerate(widths):
        z_all[:, i, :, width:] = 0
    x_all, sigma = torch.randn(50, 3, 32, 2), torch.ones(1)

    def losses(f_x, f_y):
        K = common.gram(lambda a, b: common.gaussian(a, b, sigma), f_x, f_y)
        return common.gram_objective(*K, "mean", 0.1, 1.0)[0], common.mmd2(*K)

    def train(g, f, z, x):
        opt_g, opt_f = common.optimizer(g, (1e-3, 0.5, 0.9)), common.optimizer(f, (1e-3, 0.5, 0.9))
        for z_t, x_t in zip(z, x):
            objective, loss_g = losses(f(x_t), f(g(z_t)))
            common.descend((opt_f, -objective), (opt_g, loss_g))
        return g(z[0]).detach()

    def critics():
        torch.manual_seed(1)
        return [common.mlp(2, 10, 3) for _ in SIZES]

    g = common.Stack(build())
    stacked = train(g, common.Stack(critics()), z_all, x_all)
    for i, (network, f, width) in enumerate(zip(build(), critics(), widths)):
        start = network(z_all[0, i, :, :width]).detach()
        alone = train(network, f, z_all[:, i, :, :width], x_all[:, i])
        assert float((alone - start).abs().max()) > 0.05
        assert torch.allclose(stacked[i], alone, atol=1e-3)
    first, second = g.network[0].weight, g.network[2].weight
    assert not first[0, 20:].any() and not first[0, :, 4:].any() and not second[0, 20:].any()
    assert not second[2, :, 7:].any() and second[1].all()
