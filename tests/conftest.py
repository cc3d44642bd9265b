"""What several test files use."""
import os
import sys
import time
from contextlib import contextmanager

import pytest
import torch
import torchvision
from torch import nn

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))     # where the scripts are
import cifar  # noqa: E402
import common  # noqa: E402

SWEPT = {name for panels in cifar.SWEEPS.values() for own in panels.values() for name in own}   # for a figure


@contextmanager
def says(*parts):
    """Expect the program to stop with a message of at most two lines that has all these parts."""
    with pytest.raises(SystemExit) as end:
        yield
    text = str(end.value)
    assert len(text.splitlines()) <= 2 and all(part in text for part in parts), text


def wait_for(happened, seconds=60):
    """Wait until happened() is true, which another process sees to."""
    deadline = time.time() + seconds
    while not happened():
        assert time.time() < deadline
        time.sleep(0.02)


def image_shape(script, method):
    """(C, H, W) of the images that a row of an image script is trained on, before they are cropped."""
    shapes = {"mnist": (1, 28, 28), "cifar": (3, 32, 32), "imagenet": (3, 64, 64)}
    if script.__name__ in shapes:
        return shapes[script.__name__]
    side, *_ = common.FOLDERS[script.SETS[script.METHODS[method]["set"]]["array"]]
    return 3, side, side


class Features(nn.Module):
    """Channel means, twice: as the features, or in a tuple, or as an image of them."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, images):
        mean = images.float().mean((2, 3)) / 255
        features = torch.cat([mean, mean.square()], 1)
        return {"plain": features, "tuple": (features, mean), "image": features[:, :, None, None],
                "nan": (features - 1).log(), "dict": {"features": features}}[self.kind]


def inception_weights():
    """Random weights for FID's network, in the keys of pytorch-fid's file, that leave no layer dead."""
    torch.manual_seed(0)
    network = torchvision.models.Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1), layer.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(layer.weight, 0.5, 1.5), nn.init.normal_(layer.bias, 0, 0.1)
    return network.state_dict()


def export(path, kind="tuple", dynamic=True):
    """Write a small feature network where --features finds it; returns the path as text."""
    example = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    shapes = ({0: torch.export.Dim("batch", min=2)},) if dynamic else None
    program = torch.export.export(Features(kind), (example,), dynamic_shapes=shapes)
    torch.export.save(program, str(path))
    return str(path)


def kept(folder):
    """All tensors of a run's checkpoint but the clock's, and its log without the times."""
    state = torch.load(f"{folder}/checkpoint.pt", weights_only=True)
    log = common.read_log(folder)
    log = {name: log[name].tolist() for name in log.dtype.names if name != "seconds"}
    return state["step"], common.tensors(state["state"]), log


def same(a, b):
    (step_a, tensors_a, log_a), (step_b, tensors_b, log_b) = kept(a), kept(b)
    assert step_a == step_b and str(log_a) == str(log_b) and tensors_a.keys() == tensors_b.keys()
    return all(torch.equal(tensors_a[path], tensors_b[path]) for path in tensors_a)


def by_hand(row, f, decoder, x, y, a):
    """The losses of critic and generator of a row, from plain formulas."""
    h_x, h_y = f(x), f(y)
    d = lambda u, v: (u[:, None] - v[None]).square().sum(-1)                                    # noqa: E731
    kernels = {
        "li": lambda u, v: sum(torch.exp(-d(u, v) / (2 * s * s)) for s in (1, 2, 4, 8, 16)),
        "rbf": lambda u, v: sum(torch.exp(-d(u, v) / (2 * s * s)) for s in (2, 5, 10, 20, 40, 80)),
        "rq": lambda u, v: sum((1 + d(u, v) / (2 * s)) ** -s for s in (0.2, 0.5, 1, 2, 5)),
        "dot": lambda u, v: u @ v.T, "unit": lambda u, v: torch.exp(-d(u, v) / 2),
        "distance": lambda u, v: (u.norm(dim=1)[:, None] + v.norm(dim=1) - (d(u, v) + 1e-30).sqrt()) / 2}
    kernels["gmmn"] = lambda u, v: sum(torch.exp(-d(u, v) / (2 * s)) for s in (2, 5, 10, 20, 40, 80))
    kernels["rq*"] = lambda u, v: kernels["rq"](u, v) + kernels["dot"](u, v)
    k, kind, n = kernels.get(row.get("kernel")), row["distance"], len(x)

    def root(u, v):
        return (k(u, u).mean() + k(v, v).mean() - 2 * k(u, v).mean() + 1e-6).sqrt()

    def unbiased(u, v):
        off = 1 - torch.eye(n, dtype=x.dtype)
        return sum((k(t, t) * off).sum() / (n * n - n) for t in (u, v)) - 2 * k(u, v).mean()

    def slope(t):
        t = t.detach().requires_grad_()
        return torch.autograd.grad(f(t).sum(), t, create_graph=True)[0].flatten(1).square().sum(1)

    w = h_x.mean() - h_y.mean()
    if kind in ("smmd", "swgan"):
        E = slope(x).mean() + (h_x.square().mean() if kind == "swgan" else 0)
        loss_g = unbiased(h_x, h_y) / (1 + 10 * E) if kind == "smmd" else w / (1 + 10 * E).sqrt()
    else:
        loss_g = (-torch.sigmoid(h_y).log().mean() if kind == "gan" else root(h_x, h_y) if kind == "mmd"
                  else w if kind in ("wasserstein", "sobolev") else unbiased(h_x, h_y))
    loss_f = -loss_g
    if kind == "gan":
        loss_f = -torch.sigmoid(h_x).log().mean() - (1 - torch.sigmoid(h_y)).log().mean()

    def cramer(t):
        return (t[:, None] - h_y[None]).norm(dim=-1).mean(1) - t.norm(dim=1)

    if kind == "cramer":
        own = (h_y[:, None] - h_y[None] + 1e-30).norm(dim=-1).sum() / (n * n - n) - h_y.norm(dim=1).mean()
        loss_f = -(cramer(h_x).mean() - own)
    if kind == "sobolev":
        loss_f = -w + 1e-6 / 2 * (slope(x).mean() - 1) ** 2
    if "feasible" in row:
        least = (h_x.mean(0) - h_y.mean(0)).clamp(max=0).mean()
        loss_f, loss_g = loss_f - 16 * least, loss_g + 16 * least
    if "autoencoder" in row:
        loss_f = loss_f + 8 * sum((t - decoder(h)).square().mean() for t, h in ((x, h_x), (y, h_y)))
    if "data_mmd" in row:
        loss_g = loss_g + root(x.flatten(1), y.flatten(1))
    if "activation" in row:
        for t in (x, y):
            for layer in f:
                t = layer(t)
                if isinstance(layer, (torch.nn.LeakyReLU, torch.nn.Linear)):
                    loss_f = loss_f + row["activation"] * t.square().mean()
    name, weight = row.get("penalty", (None, 0))
    if name in ("gradient", "columns", "pixels"):
        t = (a[:, None, None, None] * x + (1 - a[:, None, None, None]) * y).detach().requires_grad_()
        best = (cramer(f(t)) if kind == "cramer" else k(f(t), h_x).mean(1) - k(f(t), h_y).mean(1)
                if kind == "mmd2" else f(t).sum(1))
        G = torch.autograd.grad(best.sum(), t, create_graph=True)[0]
        G = G.flatten(1) if name == "gradient" else G.movedim(2, 1) if name == "columns" else G
        loss_f = loss_f + weight * (G.norm(dim=1) - 1).square().mean()
    elif name:
        norms = [p for layer in f if isinstance(layer, torch.nn.GroupNorm) for p in layer.parameters()]
        weights = f.parameters() if name == "l2-all" else norms
        loss_f = loss_f + weight * sum(p.abs().sum() if name == "l1" else p.square().sum() for p in weights)
    return loss_f, loss_g


def dense(f, x, y, mu, lam):
    """Proposition 4 as printed, with 1 / M: the M (1 + d) system in data space, by autograd."""
    def k(u, v):
        return (-(f(u) - f(v)).square().sum() / 2).exp()

    def eta(t):
        return torch.stack([k(t, u) for u in x]).mean() - torch.stack([k(t, v) for v in y]).mean()

    M, d = mu.shape
    both = torch.func.jacrev(torch.func.jacrev(k, 0), 1)
    K = torch.stack([torch.stack([k(u, v) for v in mu]) for u in mu])
    G = torch.stack([torch.stack([torch.func.jacrev(k, 0)(u, v) for v in mu]) for u in mu])      # [M, M, d]
    H = torch.stack([torch.stack([both(u, v) for v in mu]) for u in mu])                 # [M, M, d, d]
    left = G.permute(0, 2, 1).reshape(M * d, M)
    system = torch.cat([torch.cat([K, left.T], 1),
                        torch.cat([left, H.permute(0, 2, 1, 3).reshape(M * d, M * d)], 1)])
    delta = torch.cat([torch.stack([eta(t) for t in mu]),
                       torch.cat([torch.func.jacrev(eta)(t) for t in mu])])
    solved = torch.linalg.solve(system + M * lam * torch.eye(len(system), dtype=system.dtype), delta)
    mmd2 = (torch.stack([eta(u) for u in x]).mean() - torch.stack([eta(v) for v in y]).mean())
    return (mmd2 - delta @ solved) / lam
