"""mnist.py --figure collapse: the predicted floor, what is measured, and the figure."""
import os

import numpy as np
import pytest
import torch
from torch import nn

import common
import mnist


@pytest.mark.parametrize("k, known", [(1, 0.3634), (2, 0.2146), (4, 0.1164)])       # results/mnist.md
def test_noise_floor(k, known):
    """Against 1 - (E |s|)^2 / E |s|^2 of normal vectors; a best multiple has it, no covariance has less."""
    s = torch.randn(200_000, k, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    size = s.norm(dim=1)
    best = size.mean() / size.square().mean()
    assert mnist.noise_floor(k) == pytest.approx(known, abs=1e-4)
    assert float((best * size - 1).square().mean()) == pytest.approx(known, abs=3e-3)
    if k > 1:
        uneven = (s * torch.linspace(0.2, 1, k)).norm(dim=1)
        assert 1 - uneven.mean() ** 2 / uneven.square().mean() > known + 0.005


@pytest.mark.parametrize("scales, k", [((3,), 1), ((1, 1), 2), ((1, 1, 1, 1), 4), ((2, 1), 25 / 17)])
def test_noise_dimension(scales, k):
    """Of normal slopes with known covariance, embedded in more dimensions, other at each point."""
    rng = torch.Generator().manual_seed(0)
    s = torch.randn(1_500, 2, len(scales), generator=rng) * torch.tensor(scales)
    frames, _ = torch.linalg.qr(torch.randn(2, 9, len(scales), generator=rng))
    frames[1] *= 1e-9                                   # as of a critic that is nearly 0
    slopes = torch.einsum("rpk,pdk->rpd", s, frames)
    assert float(mnist.noise_dimension(slopes)) == pytest.approx(k, rel=0.05)
    few = slopes[:3, :1].double()                       # by loops
    pairs = [(i, j) for i in range(3) for j in range(3) if i != j]
    up = sum(few[i, 0].square().sum() * few[j, 0].square().sum() for i, j in pairs)
    wanted = float(up / sum((few[i, 0] @ few[j, 0]) ** 2 for i, j in pairs))
    assert float(mnist.noise_dimension(slopes[:3, :1])) == pytest.approx(wanted, rel=1e-6)


def small_critic(K):
    torch.manual_seed(0)
    return common.Layers(nn.Flatten(), nn.Linear(784, 6), nn.LeakyReLU(0.2), nn.Linear(6, K))


@pytest.mark.parametrize("name", ["dot", "rbf", "distance", "rqdot"])
def test_witness_slopes(name):
    """Against autograd through the critic and the kernel, point by point; the penalty is critic_loss's."""
    f, kernel, rng = small_critic(3), mnist.kernels()[name], torch.Generator().manual_seed(0)
    x, y, x_2, y_2 = torch.rand(4, 5, 1, 28, 28, generator=rng).unbind()
    a = torch.rand(5, 1, 1, 1, generator=rng)
    t = a * x + (1 - a) * y
    slopes = mnist.witness_slopes(f, kernel, t, [(x, y), (x_2, y_2)])
    assert slopes.shape == (2, 5, 784) and not slopes.requires_grad
    for slope, (p, q) in zip(slopes, [(x, y), (x_2, y_2)]):
        for i in range(5):
            point = t[i:i + 1].clone().requires_grad_()
            gap = kernel(f(point), f(p)).sum() / 5 - kernel(f(point), f(q)).sum() / 5
            wanted, = torch.autograd.grad(gap, point)
            assert torch.allclose(slope[i], wanted.flatten(), rtol=1e-3, atol=1e-6)
    if name == "dot":
        W, V = f[1].weight, f[3].weight
        masks = torch.where(f[1](t.flatten(1)) > 0, 1.0, 0.2)
        w = (f(x) - f(y)).mean(0)                       # of the features, the same at each t
        assert torch.allclose(slopes[0], (w @ V * masks) @ W, rtol=1e-4, atol=1e-7)
    row = mnist.DEFAULTS | mnist.METHODS["mmd-dot"] | dict(batch=5)
    with_it, without = (mnist.critic_loss(row | dict(penalty=weight), f, None, kernel, x, y, a)
                        for weight in (1.0, 0.0))
    penalty = float((slopes[0].norm(dim=1) - 1).square().mean())
    assert (with_it - without).item() == pytest.approx(penalty, abs=1e-5)


def test_no_less_than_the_floor():
    """One output and the dot kernel: at a point the slope is |J N(0, v)|: its best multiple has 0.363."""
    images = torch.randint(256, (500, 1, 28, 28), generator=(rng := torch.Generator().manual_seed(0)))
    f = small_critic(1)
    draws = [[common.draw_images(images, 16, rng) / 255 for _ in "xy"] for _ in range(2_000)]
    size = mnist.witness_slopes(f, common.dot, draws[0][0], draws).norm(dim=2)
    at_each = 1 - size.mean(0) ** 2 / size.square().mean(0)
    assert torch.allclose(at_each, torch.tensor(mnist.noise_floor(1)), atol=0.04)
    assert 1 - size.mean() ** 2 / size.square().mean() > at_each.mean()         # |J| varies over points


def test_figure_collapse(monkeypatch, tmp_path, capsys):
    """A row a setting under it, in order; panels have what the table has, and the floor."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("data")
    images = np.random.default_rng(0).integers(0, 256, (60, 1, 28, 28), np.uint8)
    np.save("data/mnist-train.npy", images)
    monkeypatch.setattr(mnist, "COLLAPSE", mnist.COLLAPSE | dict(
        outputs=(1, 3), batch=4, updates={4: 3, 6: 2}, points=5, draws=20, hidden=5))
    threads, saved, losses, call = torch.get_num_threads(), {}, [], mnist.critic_loss
    save = common.save_figure
    monkeypatch.setattr(common, "save_figure", lambda path, f: (saved.update({path: f}), save(path, f)))
    monkeypatch.setattr(mnist, "critic_loss", lambda row, *given: losses.append(row) or call(row, *given))
    try:
        mnist.main(["--figure", "collapse", "--device", "cpu"])
    finally:
        torch.set_num_threads(threads)
    rows = [[cell.strip() for cell in line.strip("|").split("|")]
            for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]
    kinds = [kernel + on for kernel in ("rbf", "dot", "distance", "rqdot") for on in ("", " + activation")]
    assert [row[:3] for row in rows] == [
        [kind, n, K] for kind in kinds for n, K in (("4", "1"), ("6", "1"), ("4", "3"))]
    assert all(row[3] == f"{mnist.noise_floor(int(row[2])):.3f}" for row in rows)
    assert all(row[4] == "1.00" for row in rows if row[2] == "1")       # one output, one dimension
    assert len(losses) == 8 * (3 + 2 + 3) and {row["penalty"] for row in losses} == {1.0}
    assert {row["kernel"] + (row["activation"] == 1) * " + activation" for row in losses} == set(kinds)
    (path, figure), = saved.items()
    assert path == "runs/mnist-figurecollapse.png" and os.path.exists(path)
    for axes, place, kept in zip(figure.axes, (1, 2, 4), (lambda n, K: K == "1", lambda n, K: n == "4",
                                                          lambda n, K: True)):
        wanted = [(float(row[place]), float(row[6].split()[0])) for row in rows if kept(*row[1:3])]
        drawn = [point for bars in axes.containers for point in bars.lines[0].get_xydata()]
        assert np.allclose(wanted, drawn, atol=6e-3)
    k, floor = figure.axes[1].lines[-1].get_data()
    assert np.allclose(floor, [mnist.noise_floor(x) for x in k])
