"""Adversarial critics, scaled and gradient-constrained MMD, the losses of cifar.py's rows, ring2d.Stack."""
import copy
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import cifar
import common
import ring2d
from conftest import PLAIN, agree, by_hand

unit = common.unit_gaussian


def points(*shape, seed=0, shift=0.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def net(t, v, w):
    """A critic of points or images with weights v [D, 8] and w [8, K]."""
    return torch.tanh((t.flatten(-3) if t.ndim > 2 else t) @ v) @ w


def slopes(t, v, w):
    """Its Jacobians [N, K, D] in closed form."""
    return torch.einsum("nj,jk,dj->nkd", 1 - torch.tanh(t.flatten(1) @ v).square(), w, v)


def dense(f, x, y, mu, lam):
    """Proposition 4, with 1 / M: the M (1 + d) system in data space, by autograd; f of one point."""
    def k(u, v):
        return (-(f(u) - f(v)).square().sum() / 2).exp()

    def eta(t):
        return torch.stack([k(t, u) for u in x]).mean() - torch.stack([k(t, v) for v in y]).mean()

    def jet(u, v):              # k and its derivatives in u and in v, [1 + d, 1 + d]
        def row(u):
            return torch.cat([k(u, v)[None], torch.func.jacrev(k, 1)(u, v)])
        return torch.cat([row(u)[None], torch.func.jacrev(row)(u).T])

    G = torch.cat([torch.cat([jet(u, v) for v in mu], 1) for u in mu])
    delta = torch.cat([torch.cat([eta(t)[None], torch.func.jacrev(eta)(t)]) for t in mu])
    mmd2 = torch.stack([eta(u) for u in x]).mean() - torch.stack([eta(v) for v in y]).mean()
    solved = torch.linalg.solve(G + len(mu) * lam * torch.eye(len(G), dtype=G.dtype), delta)
    return (mmd2 - delta @ solved) / lam


# ---- pieces -----------------------------------------------------------------------------------------------


def test_witness():
    k = PLAIN["unit"]
    agree(lambda *sets: common.witness(unit, *sets), lambda t, x, y: k(t, x).mean(1) - k(t, y).mean(1),
          points(4, 3, seed=2), points(6, 3), points(5, 3, seed=1, shift=0.4))


@pytest.mark.parametrize("slope", common.AXES)
def test_gradient_penalty_has_a_norm_an_image_or_a_line(slope):
    """Lines of mbinkowski/MMD-GAN, axis 1 of [N, H, W, C], and of Scaled-MMD-GAN, axis 1 of [N, C, H, W]."""
    def wanted(G):
        lines = {"image": G.flatten(1), "columns": G.permute(0, 2, 1, 3), "pixels": G}[slope]
        return (lines.square().sum(1).sqrt() - 1).square().mean()

    agree(lambda G: common.gradient_penalty(G, common.AXES[slope]).mean(), wanted, points(5, 3, 4, 4))
    agree(lambda G: common.gradient_penalty(G).mean(-1), lambda G: torch.stack([
        (g.square().sum(1).sqrt() - 1).square().mean() for g in G]), points(2, 5, 3))       # of a stack's points


def test_gradient_penalty_of_a_flat_critic_is_finite():
    slope = torch.zeros(4, 3, requires_grad=True)
    found = common.gradient_penalty(slope).mean()
    gradient, = torch.autograd.grad(found, slope)
    assert float(found.detach()) == 1 and torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", ["cramer", "mmd-dist"])
@pytest.mark.parametrize("a", [0.0, 1.0])
def test_a_slope_at_a_point_of_either_set_is_finite(name, a):
    """Where the distance kernel has its kink: TF32 rounds points near x to x."""
    row = cifar.row_of(name)[1]
    _, f, _ = cifar.networks(row)
    x, y = torch.rand(2, 6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    loss = cifar.critic_loss(row, f, None, cifar.kernels()[row["kernel"]], x, y, torch.full((6, 1, 1, 1), a))
    gradient = torch.autograd.grad(loss, list(f.parameters()))
    assert all(g.isfinite().all() for g in gradient) and any(g.abs().max() > 0 for g in gradient)


def test_feasible_set_wasserstein_and_reconstruction():
    """Means of x (1, 5), of y (3, 2): only the first output breaks E f(x) >= E f(y), by 2."""
    h_x, h_y = torch.tensor([[0.0, 4.0], [2.0, 6.0]]), torch.tensor([[3.0, 2.0]])
    assert float(common.feasible_set(h_x, h_y)) == -1 and float(common.feasible_set(h_y, h_x)) == -1.5
    assert float(common.feasible_set(h_x, h_x)) == 0
    x, y = points(2, 3, 4), points(2, 3, 4, seed=1)
    agree(common.feasible_set, lambda u, v: (sum(u[:, 0]) / 2 - v[0, 0]) / 2 + 0 * (u + v).sum(), h_x, h_y)
    agree(common.wasserstein, lambda u, v: sum(u[:, 0]) / 3 - sum(v[:, 0]) / 2, x[0, :, :1], y[0, :2, :1])
    agree(common.reconstruction,
          lambda u, v: torch.stack([((s - t) ** 2).sum() / 12 for s, t in zip(u, v)]), x, y)


def test_clipping_clips():
    network = common.mlp(3, 50, 50, 2)
    before = [p.detach().clamp(-0.05, 0.05) for p in network.parameters()]
    common.clip_weights(network, 0.05)
    assert all(torch.equal(p, old) for p, old in zip(network.parameters(), before))


# ---- scaled and gradient-constrained MMD ------------------------------------------------------------------


@pytest.mark.parametrize("theta, psi, lam", [(1.0, 0.5, 0.1), (-3.0, 0.2, 1.0), (2.0, -1.5, 0.1)])
def test_dirac_closed_forms(theta, psi, lam):
    """P = delta_0, Q = delta_theta, f(x) = psi x (Scaled MMD, eq. 3)."""
    t = torch.tensor([theta, psi])

    def squared(t):
        return common.mmd2(*common.gram(unit, 0 * t[:1, None], (t[0] * t[1]).view(1, 1)))

    def closed(t):
        return 2 * (1 - (-t[1] ** 2 * t[0] ** 2 / 2).exp())

    agree(squared, closed, t)
    for c, constant in ((1, lam + 1), (10, 1)):         # Proposition 5, section 4
        agree(lambda t: common.smmd2(squared(t), t[1].view(1, 1, 1), c, constant),
              lambda t: closed(t) / (constant + c * t[1] ** 2), t)


def test_scaled_losses_have_the_mean_squared_slope():
    """smmd2, swgan, sobolev and its constraint: values, and gradients in the critic's weights."""
    x, y, v = points(6, 4), points(7, 4, seed=1, shift=0.5), points(4, 8) / 2

    def check(found, wanted, K):        # found: from f(x), f(y), J; wanted: from those and E |J|^2
        def of(v, w):
            h_x, h_y = (net(t.to(v.dtype), v, w) for t in (x, y))
            return found(h_x, h_y, slopes(x.to(v.dtype), v, w))

        agree(of, lambda v, w: wanted(net(x, v, w), net(y, v, w), slopes(x, v, w).square().sum() / 6),
              v, points(8, K))

    def mmd2(a, b, unbiased=True):
        return common.mmd2(*common.gram(unit, a, b), unbiased)

    check(lambda a, b, J: common.smmd2(mmd2(a, b), J, 1, 1.1), lambda a, b, E: mmd2(a, b) / (1.1 + E), 2)
    check(lambda a, b, J: common.smmd2(mmd2(a, b), J, 10), lambda a, b, E: mmd2(a, b) / (1 + 10 * E), 2)
    check(lambda a, b, J: common.swgan(a, b, J, 10),
          lambda a, b, E: (a.mean() - b.mean()) / (1 + 10 * (a.square().mean() + E)).sqrt(), 1)
    check(lambda a, b, J: common.sobolev(a, b, J, 0.3, 2.0)[0],
          lambda a, b, E: a.mean() - b.mean() - 0.3 * (E - 1) - (E - 1) ** 2, 1)
    check(lambda a, b, J: common.sobolev(a, b, J, 0.3, 2.0)[1], lambda a, b, E: E - 1, 1)


@pytest.mark.parametrize("s", [1, 2])
def test_gradient_constrained_mmd_equals_the_dense_system(s):
    """Value, and gradients in the critic's weights and in the samples, also in float32."""
    x, y, v, w = points(5, 4), points(6, 4, seed=1, shift=0.5), points(4, 8) / 2, points(8, s)

    def reduced(v, w, y):
        h, J = net(x.to(v.dtype), v, w), slopes(x.to(v.dtype), v, w)
        return common.gradient_constrained_mmd2(h, net(y, v, w), h, J, 0.1)[0]

    agree(reduced, lambda v, w, y: dense(lambda t: net(t, v, w), x, y, x, 0.1), v, w, y, near_32=1e-3)


def test_gradient_constrained_critic_meets_its_constraint():
    """The critic g / S: its norm (eq. 5) is 1 and its mean difference between P and Q is S."""
    x, y, v, w, lam = points(6, 3), points(5, 3, seed=1, shift=1.0), points(3, 8) / 2, points(8, 2), 0.1

    def f(t):
        return net(t, v, w)

    h, J = f(x), slopes(x, v, w)
    squared, critic = common.gradient_constrained_mmd2(h, f(y), h, J, lam)
    S = squared.sqrt()
    difference = critic(f(x)).mean() - critic(f(y)).mean()
    assert (difference / S).item() == pytest.approx(S.item(), rel=1e-9)
    slope = torch.func.grad(lambda t: critic(f(t)).sum())(x)
    in_mu = critic(f(x)).square().mean() + slope.square().sum(1).mean()
    shorter = common.gradient_constrained_mmd2(h, f(y), h, J, 10 * lam)[0]
    scaled = common.smmd2(common.mmd2(*common.gram(unit, h, f(y))), J, 1, 1 + lam)
    assert in_mu < squared                      # the rest is lam |g|^2 in the kernel's space
    assert shorter < squared and 0 < scaled < squared


def test_sobolev_critic_of_a_known_solution():
    """mu = 1 on the square of side pi: f = sin x sin y has -div grad f = 2 f; and the constraint holds."""
    line = torch.linspace(0, math.pi, 33, dtype=torch.float64)
    h = float(line[1])
    known = line.sin()[:, None] * line.sin()
    found = ring2d.sobolev_critic(2 * known, torch.zeros_like(known), torch.ones_like(known), h)
    u, v = torch.gradient(found, spacing=h)
    assert float((u.square() + v.square()).sum() * h ** 2) == pytest.approx(1, rel=0.07)
    assert torch.allclose(found / found.max(), known / known.max(), atol=1e-3)
    assert float(found[0].abs().max()) == 0


# ---- Cramer, spectral parametrisation ---------------------------------------------------------------------


def test_cramer_is_eq_10():
    x, y = points(4, 3), points(5, 3, seed=1, shift=0.5)

    def rho(a, b=0):
        return (a - b).square().sum().sqrt()

    def eq_10(x, y):
        pairs = [rho(y[i], y[j]) for i in range(5) for j in range(5) if i != j]
        return -(sum(pairs) / 20 + sum(map(rho, x)) / 4 - sum(map(rho, y)) / 5
                 - sum(rho(a, b) for a in x for b in y) / 20)

    agree(common.cramer, eq_10, x, y)
    agree(common.cramer_witness,
          lambda x, y: torch.stack([sum(rho(a, b) for b in y) / 5 - rho(a) for a in x]), x, y)
    origin, away = torch.zeros(6, 1).double(), torch.full((6, 1), 3.0).double()
    assert float(common.cramer(away, origin)) == 0          # the paper's two laws that it takes for one


@pytest.mark.parametrize("learned", [False, True])
def test_spectral_parametrisation(learned):
    """|W| is gamma to 1e-4 after 100 iterations; only gamma is added, one a layer."""
    torch.manual_seed(0)
    plain = common.dcgan_critic(3, (8, 16), 1, norms=(None, None), size=8)
    f = common.spectral(copy.deepcopy(plain), learned)
    assert len(list(f.parameters())) == len(list(plain.parameters())) + 3 * learned
    for name, p in f.named_parameters():
        p.data.fill_(2) if name.endswith("gamma") else None
    for _ in range(100):
        f(torch.zeros(1, 3, 8, 8))
    for s, r in zip(common.singular_values(f), common.singular_values(plain)):
        assert torch.allclose(s, r / r[0] * (2 if learned else 1), rtol=1e-4) and f.training


# ---- cifar.py's rows --------------------------------------------------------------------------------------


def small(nets):
    """A description of networks with widths of 4 to 12, but for an mlp that ends in an image."""
    found = dict(nets, z=8) | {key: (12, *[8] * (len(nets[key]) - 1)) for key in ("g", "f") if key in nets}
    found |= dict(width=4) if "width" in nets else {}
    found |= dict(mlp=(12, 3072)) if "mlp" in nets else {}
    return found | dict(mlp=(12, 8), encoder=(3072, 12, 8)) if "encoder" in nets else found


@pytest.fixture(autouse=True)
def small_nets(monkeypatch):
    monkeypatch.setattr(cifar, "NETS", {name: small(nets) for name, nets in cifar.NETS.items()})


PLAYED = [name for name, row in cifar.METHODS.items() if row.get("loss") != "gram" and name != "gmmn-ae"]
PLAYED += [f"{name}+slope={slope}" for name in PLAYED for slope in ("columns", "pixels")
           if cifar.METHODS[name].get("penalty") and not cifar.METHODS[name].get("weights")]


@pytest.mark.parametrize("name", PLAYED)
def test_losses_of_every_row(name):
    """In float64 the losses and their gradients are those of the formulas written out."""
    row = cifar.row_of(name)[1]
    row |= dict(rho=0.5) if row["loss"] == "sobolev" else {}
    torch.manual_seed(0)
    _, f, decoder = (network and network.double() for network in cifar.networks(row))
    for p in f.parameters() if f else ():
        p.data.mul_(8)              # far enough from 0 that no loss vanishes
    f = f and f.eval()              # spectral norms stay
    x, y = torch.rand(2, 8, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()
    y = (0.5 * y).requires_grad_()
    multiplier = torch.tensor(0.3, dtype=torch.float64)
    a = torch.rand(8, generator=torch.Generator().manual_seed(5)).double()
    kernel = cifar.kernels(dtype=torch.float64)[row["kernel"]]
    loss_f, loss_g = by_hand(row, f, decoder, x, y, a, 0.3)
    with common.frozen(f):
        found, h_x, h_y = cifar.generator_loss(row, f, kernel, x, y)
    assert torch.equal(h_x, f(x) if f else x.flatten(1)) and torch.equal(h_y, f(y) if f else y.flatten(1))
    pairs = [(found, loss_g, [y])]
    if f:
        weights = [*f.parameters(), *(decoder.parameters() if decoder else ())]
        between = a[:, None, None, None]
        pairs.append((cifar.critic_loss(row, f, decoder, kernel, x, y, between, multiplier), loss_f, weights))
        if row["loss"] == "sobolev":
            omega = common.jacobian(*common.pullback(f, x)).square().sum((1, 2)).mean() - 1
            assert float(multiplier) == pytest.approx(0.3 + 0.5 * float(omega.detach()))
    for found, wanted, at in pairs:
        assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-9)
        for u, v in zip(*(torch.autograd.grad(loss, at, retain_graph=True) for loss in (found, wanted))):
            assert torch.allclose(u, v, rtol=1e-6, atol=1e-9 * float(v.abs().max() + 1e-3))


def test_losses_of_gmmn_ae():
    """The autoencoder's is the cross-entropy, with dropout in training; codes of the data have none."""
    row = cifar.row_of("gmmn-ae")[1]
    g, f, decoder = (network.double() for network in cifar.networks(row))
    assert [layer.p for layer in f if isinstance(layer, nn.Dropout)] == [0.2, 0.5]
    kinds = " ".join(type(layer).__name__ for layer in f)
    assert kinds == "Flatten Dropout Linear ReLU Dropout Linear Sigmoid"
    x = torch.rand(9, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()
    y, kernel, k = g(points(9, 8)), cifar.kernels(dtype=torch.float64)["unit"], PLAIN["unit"]
    weights = [*f.parameters(), *decoder.parameters()]
    dropped = cifar.critic_loss(row, f, decoder, kernel, x, y, None)
    found = cifar.critic_loss(row, f.eval(), decoder, kernel, x, y, None)
    x_hat = decoder(f(x))
    entropy = -(x * x_hat.log() + (1 - x) * (1 - x_hat).log()).mean()
    assert dropped.item() != found.item() == pytest.approx(entropy.item(), rel=1e-9)
    for a, b in zip(*(torch.autograd.grad(loss, weights) for loss in (found, entropy))):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    with common.frozen(f):
        loss, h_x, h_y = cifar.generator_loss(row, f, kernel, x, y)
    assert torch.equal(h_x, f(x)) and torch.equal(h_y, y) and all(p.requires_grad for p in weights)
    squared = k(h_x, h_x).mean() + k(y, y).mean() - 2 * k(h_x, y).mean()
    assert float(loss.detach()) == pytest.approx(float((squared + 1e-6).sqrt().detach()), rel=1e-9)
    assert set(torch.autograd.grad(loss, weights[:len(list(f.parameters()))], allow_unused=True)) == {None}


@pytest.mark.parametrize("name", ["sn-smmd", "cramer", "sobolev"])
def test_compiled_losses_are_the_same(name, monkeypatch):
    """torch.compile as it traces and differentiates them, also a spectral norm's iteration; two calls."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    row = cifar.row_of(name)[1]
    torch.manual_seed(0)
    f, kernel, a = cifar.networks(row)[1], cifar.kernels()[row["kernel"]], torch.rand(6, 1, 1, 1)
    x, y = torch.rand(2, 6, 3, 32, 32)

    def compute(f, wanted):
        multiplier, found = torch.tensor(0.3), []
        loss_of = common.compiled(lambda x, y: cifar.critic_loss(row, f, None, kernel, x, y, a, multiplier), wanted)
        for _ in range(2):
            with parametrize.cached():
                loss = loss_of(x, y)
                found += [loss.detach(), *torch.autograd.grad(loss, list(f.parameters()))]
        return [*found, multiplier, *f.buffers()]
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for found, wanted in zip(compute(copy.deepcopy(f), True), compute(f, False), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs + 1


def test_what_cannot_be_compiled_runs_as_it_is(capsys):
    function = common.compiled(lambda x: (torch._dynamo.graph_break(), x + 1)[1], True)
    assert [function(torch.tensor(2.0)) for _ in range(2)] == [3, 3]
    assert capsys.readouterr().out.count("slower, without it") == 1


@pytest.mark.parametrize("name", ["sn-smmd", "sn-mmd-gp-l2", "sn-gan"])
def test_a_spectral_norm_is_iterated_once_a_step(name, tmp_path, monkeypatch):
    """However often a step uses a weight: at data, at samples, between them."""
    iterated, iterate = [], parametrizations._SpectralNorm._power_method
    monkeypatch.setattr(parametrizations._SpectralNorm, "_power_method",
                        lambda self, weight, n: iterated.append(n) or iterate(self, weight, n))
    row, networks = dict(cifar.row_of(name)[1], batch=4, critic_steps=2), cifar.networks
    monkeypatch.setattr(cifar, "networks", lambda row: (networks(row), iterated.clear())[0])
    images = torch.randint(256, (9, 3, 32, 32), dtype=torch.uint8)
    for _ in cifar.train(name, row, 0, str(tmp_path), 2, torch.device("cpu"), images, samples=4):
        pass
    assert iterated == [1] * 8 * 2 * (2 + 1)      # layers, updates, steps of critic and generator


# ---- stacks -----------------------------------------------------------------------------------------------

SIZES = [(4, 20, 20, 2), (16, 100, 100, 2), (2, 7, 7, 2)]


def build(sizes=SIZES, **options):
    torch.manual_seed(0)
    return [common.mlp(*own, **options) for own in sizes]


@pytest.mark.parametrize("norm", [nn.LayerNorm, lambda n: nn.BatchNorm1d(n, track_running_stats=False)])
def test_stack_with_norms_equals_its_members(norm):
    networks, x = build([(2, 9, 9, 3)] * 3, norm=norm), torch.randn(3, 11, 2)
    with torch.no_grad():
        for network in networks:
            for p in network.parameters():
                p.uniform_(-1, 1)
    stack = ring2d.Stack(networks)
    assert torch.allclose(stack(x), torch.stack([n(t) for n, t in zip(networks, x)]), atol=1e-5)
    squares = sum(p.square().sum() for i in (1, 4) for p in stack.network[i].parameters())
    assert torch.allclose(common.weight_penalty(stack, "l2"), squares)


def test_a_trained_stack_equals_its_members_trained_alone():
    """Of other sizes, after 50 steps of Adam on GRAM's losses: the same samples; what is padded stays 0."""
    widths, z_all = [4, 16, 2], torch.randn(50, 3, 32, 16)
    for i, width in enumerate(widths):
        z_all[:, i, :, width:] = 0
    x_all = torch.randn(50, 3, 32, 2)

    def train(g, f, z, x):
        opt_g, opt_f = (common.optimizer(network, "adam", 1e-3, (0.5, 0.9)) for network in (g, f))
        for z_t, x_t in zip(z, x):
            K = common.gram(unit, f(x_t), f(g(z_t)))
            common.descend((opt_f, -common.gram_objective(*K, "mean", 0.1, 1.0)[0]), (opt_g, common.mmd2(*K)))
        return g(z[0]).detach()

    g = ring2d.Stack(build())
    stacked = train(g, ring2d.Stack(build([(2, 10, 3)] * 3)), z_all, x_all)
    for i, (network, f, width) in enumerate(zip(build(), build([(2, 10, 3)] * 3), widths)):
        start = network(z_all[0, i, :, :width]).detach()
        alone = train(network, f, z_all[:, i, :, :width], x_all[:, i])
        assert float((alone - start).abs().max()) > 0.05
        assert torch.allclose(stacked[i], alone, atol=1e-3)
    first, second = g.network[0].weight, g.network[2].weight
    assert not first[0, 20:].any() and not first[0, :, 4:].any() and not second[0, 20:].any()
    assert not second[2, :, 7:].any() and second[1].all()
