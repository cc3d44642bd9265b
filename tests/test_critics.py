"""Adversarial critics, scaled and gradient-constrained MMD, the losses of cifar.py's rows."""
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
from conftest import agree, by_hand, narrow

unit = common.unit_gaussian


def points(*shape, seed=0, shift=0.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def net(t, v, w):
    """A critic of points with weights v [D, 8] and w [8, K]."""
    return torch.tanh(t @ v) @ w


def slopes(t, v, w):
    """Its Jacobians [N, K, D] in closed form."""
    return torch.einsum("nj,jk,dj->nkd", 1 - torch.tanh(t @ v).square(), w, v)


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


# ---- scaled and gradient-constrained MMD ------------------------------------------------------------------

@pytest.mark.parametrize("s, lam", [(1, 0.1), (2, 1)])
def test_gradient_constrained_mmd_equals_the_dense_system(s, lam):
    """Value, and gradients in the critic's weights and in the samples, also in float32."""
    x, y, v, w = points(5, 4), points(6, 4, seed=1, shift=0.5), points(4, 8) / 2, points(8, s)

    def reduced(v, w, y):
        h, J = net(x.to(v.dtype), v, w), slopes(x.to(v.dtype), v, w)
        return common.gradient_constrained_mmd2(h, net(y, v, w), h, J, lam)[0]

    agree(reduced, lambda v, w, y: dense(lambda t: net(t, v, w), x, y, x, lam), v, w, y, near_32=1e-3)


def test_gradient_constrained_critic_meets_its_constraint():
    """The critic g / S: its norm (eq. 5) is 1, its mean difference of P and Q is S; Scaled MMD is less."""
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
    assert in_mu < squared                      # the rest is lam |g|^2 in the kernel's space
    mmd2 = common.mmd2(*common.gram(unit, h, f(y)))
    scaled, wanted = common.smmd2(mmd2, J, 1, 1 + lam), mmd2 / (1 + lam + J.square().sum() / 6)
    assert 0 < scaled < squared and scaled.item() == pytest.approx(wanted.item())


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

@pytest.fixture(autouse=True)
def small_nets(monkeypatch):
    monkeypatch.setattr(cifar, "NETS", {name: narrow(nets) for name, nets in cifar.NETS.items()})


PLAYED = [name for name, row in cifar.METHODS.items() if row.get("loss") != "gram"]
PLAYED += [f"{name}+slope={slope}" for name in PLAYED for slope in ("columns", "pixels")
           if cifar.METHODS[name].get("penalty") and not cifar.METHODS[name].get("weights")]


@pytest.mark.parametrize("name", PLAYED)
def test_losses_of_every_row(name):
    """In float64 the losses and their gradients are those of the formulas written out."""
    row = cifar.row_of(name)[1]
    codes = row["nets"] == "gmmn-ae"
    row |= dict(rho=0.5) if row["loss"] == "sobolev" else {}
    torch.manual_seed(0)
    _, f, decoder = (network and network.double() for network in cifar.networks(row))
    for p in f.parameters() if f else ():
        p.data.mul_(8)              # far enough from 0 that no loss vanishes
    f = f and f.eval()              # spectral norms stay
    x, y = torch.rand(2, 8, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()
    y = (0.5 * (y.flatten(1)[:, :8] if codes else y)).requires_grad_()
    multiplier = torch.tensor(0.3, dtype=torch.float64)
    a = torch.rand(8, 1, 1, 1, generator=torch.Generator().manual_seed(5)).double()
    kernel = cifar.kernels(dtype=torch.float64)[row["kernel"]]
    loss_f, loss_g = by_hand(row, f, decoder, x, y, a, 0.3)
    with common.frozen(f):
        found, h_x, h_y = cifar.generator_loss(row, f, kernel, x, y)
    assert torch.equal(h_x, f(x) if f else x.flatten(1))
    assert torch.equal(h_y, f(y) if f and not codes else y.flatten(1))
    pairs = [(found, loss_g, [y])]
    if f:
        frozen = torch.autograd.grad(found, list(f.parameters()), allow_unused=True, retain_graph=True)
        assert set(frozen) == {None}
        weights = [*f.parameters(), *(decoder.parameters() if decoder else ())]
        pairs.append((cifar.critic_loss(row, f, decoder, kernel, x, y, a, multiplier), loss_f, weights))
        if row["loss"] == "sobolev":
            omega = common.jacobian(*common.pullback(f, x)).square().sum((1, 2)).mean() - 1
            assert float(multiplier) == pytest.approx(0.3 + 0.5 * float(omega.detach()))
    for found, wanted, at in pairs:
        assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-9)
        for u, v in zip(*(torch.autograd.grad(loss, at, retain_graph=True) for loss in (found, wanted))):
            assert torch.allclose(u, v, rtol=1e-6, atol=1e-9 * float(v.abs().max() + 1e-3))


def test_dropout_of_gmmn_ae():
    f = cifar.networks(cifar.row_of("gmmn-ae")[1])[1]
    assert [layer.p for layer in f if isinstance(layer, nn.Dropout)] == [0.2, 0.5]
    kinds = " ".join(type(layer).__name__ for layer in f)
    assert kinds == "Flatten Dropout Linear ReLU Dropout Linear Sigmoid"


@pytest.mark.parametrize("name", ["sn-smmd", "sn-smmd+precision=bf16", "cramer", "sobolev"])
def test_compiled_losses_are_the_same(name, monkeypatch):
    """torch.compile as it traces and differentiates them, also a spectral norm's iteration; two calls."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    row = cifar.row_of(name)[1]
    torch.manual_seed(0)
    f, kernel, a = cifar.networks(row)[1], cifar.kernels()[row["kernel"]], torch.rand(6, 1, 1, 1)
    x, y = torch.rand(2, 6, 3, 32, 32)

    def compute(f, wanted):
        multiplier, found = torch.tensor(0.3), []
        loss_of = common.compiled(
            lambda x, y: cifar.critic_loss(row, f, None, kernel, x, y, a, multiplier), wanted)
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


