"""What several test files use."""
import os
import sys
from contextlib import contextmanager

import pytest
import torch
import torchvision
from torch import nn

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))     # where the scripts are
import common  # noqa: E402

torch.set_num_threads(1)            # as matrices are small, and so that a run is the same in any process


@contextmanager
def says(*parts):
    """Expect an error whose message is one line that has all these parts."""
    with pytest.raises((ValueError, OSError, RuntimeError)) as found:
        yield
    text = str(found.value)
    assert len(text.splitlines()) == 1 and all(part in text for part in parts), text


class Features(nn.Module):
    """Channel means and their squares: as the features, in a tuple with logits, or as NaN."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, images):
        mean = images.float().mean((2, 3)) / 255
        features = torch.cat([mean, mean.square()], 1)
        return {"plain": features, "tuple": (features, mean), "nan": (features - 1).log()}[self.kind]


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


def export(path, kind="tuple"):
    """Write a small feature network where --features finds it; returns the path as text."""
    example = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    dim = torch.export.Dim
    shapes = ({0: dim("batch", min=2), 2: dim("height"), 3: dim("width")},)
    torch.export.save(torch.export.export(Features(kind), (example,), dynamic_shapes=shapes), str(path))
    return str(path)


def narrow(nets):
    """A description of networks with widths of 8 or so, for images of 32x32."""
    small = dict(nets, z=8, **{key: (12, 8, 8) for key in ("g", "f") if key in nets})
    small |= dict(width=4) if "width" in nets else dict(start=4) if "start" in nets else {}
    if "mlp" in nets:
        small["mlp"] = (12, 8) if "encoder" in nets else (12, nets["mlp"][-1])
        small |= dict(encoder=(nets["encoder"][0], 12, 8)) if "encoder" in nets else {}
    return small | (dict(pooled=(4, 4, 4)) if "pooled" in nets else {})


def tensors(tree, path=()):
    """All tensors in nested dicts and lists, by their paths."""
    if torch.is_tensor(tree):
        return {path: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return {p: t for key, value in items for p, t in tensors(value, (*path, key)).items()}


def kept(folder):
    """Step and tensors of a run's checkpoint, by paths as ("g", "0.weight"), and its log but for times."""
    found, log = torch.load(f"{folder}/checkpoint.pt", weights_only=True), common.read_log(folder)
    log = {name: log[name].tolist() for name in log.dtype.names if name != "seconds"}
    return found["step"], tensors(found["state"]) | tensors(found["generators"]), log


def same(a, b):
    """Whether two runs have the same tensors, bit for bit; their steps and logs have to be the same."""
    (step_a, tensors_a, log_a), (step_b, tensors_b, log_b) = kept(a), kept(b)
    assert step_a == step_b and str(log_a) == str(log_b) and tensors_a.keys() == tensors_b.keys()
    return all(torch.equal(tensors_a[path], tensors_b[path]) for path in tensors_a)


def squares(u, v):
    return (u[:, None] - v[None]).square().sum(-1)


def mixture(*variances):
    return lambda u, v: sum(torch.exp(-squares(u, v) / (2 * s)) for s in variances)


# The kernels that image scripts name, summed over bandwidths: [N, D] and [M, D] to [N, M]
PLAIN = {"li": mixture(1, 4, 16, 64, 256), "rbf": mixture(4, 25, 100, 400, 1600, 6400),
         "gmmn": mixture(2, 5, 10, 20, 40, 80), "unit": mixture(1), "dot": lambda u, v: u @ v.T,
         "rq": lambda u, v: sum((1 + squares(u, v) / (2 * s)) ** -s for s in (0.2, 0.5, 1, 2, 5)),
         "rqdot": lambda u, v: PLAIN["rq"](u, v) + u @ v.T,
         "distance": lambda u, v: (u.norm(dim=1)[:, None] + v.norm(dim=1) - (u[:, None] - v).norm(dim=2)) / 2}


def by_hand(row, f, decoder, x, y, a, multiplier=0.0):
    """Losses of critic and generator of a row from plain formulas; a: where a slope is held."""
    k, kind, n, off = PLAIN[row["kernel"]], row["loss"], len(x), 1 - torch.eye(len(x), dtype=x.dtype)

    def root(u, v):
        return (k(u, u).mean() + k(v, v).mean() - 2 * k(u, v).mean() + 1e-6).sqrt()

    if row.get("nets") == "gmmn-ae":                # y are codes
        x_hat = decoder(f(x))
        return -(x * x_hat.log() + (1 - x) * (1 - x_hat).log()).mean(), root(f(x), y)
    h_x, h_y = (f(x), f(y)) if f else (x.flatten(1), y.flatten(1))

    def slope(t, best):
        t = t.detach().requires_grad_()
        return torch.autograd.grad(best(f(t)).sum(), t, create_graph=True)[0]

    def cramer(h):
        return (h[:, None] - h_y[None]).norm(dim=-1).mean(1) - h.norm(dim=1)

    unbiased = sum((k(h, h) * off).sum() / (n * n - n) for h in (h_x, h_y)) - 2 * k(h_x, h_y).mean()
    w = h_x.mean() - h_y.mean()
    E = slope(x, lambda h: h).flatten(1).square().sum(1).mean() if f else 0
    scale = 1 + row.get("scale", 0) * (E + (h_x.square().mean() if kind == "swgan" else 0))
    loss_g = (-torch.sigmoid(h_y).log().mean() if kind == "gan" else root(h_x, h_y) if kind == "mmd" else
              w if kind in ("wasserstein", "sobolev") else unbiased / scale if kind == "smmd" else
              w / scale.sqrt() if kind == "swgan" else unbiased)
    loss_f = -loss_g
    if kind == "gan":
        loss_f = -torch.sigmoid(h_x).log().mean() - (1 - torch.sigmoid(h_y)).log().mean()
    if kind == "cramer":
        own = (h_y[:, None] - h_y).norm(dim=-1).sum() / (n * n - n) - h_y.norm(dim=1).mean()
        loss_f = own - cramer(h_x).mean()
    if kind == "sobolev":
        loss_f = -w + multiplier * (E - 1) + row["rho"] / 2 * (E - 1) ** 2
    least = row.get("feasible", 0) * (h_x.mean(0) - h_y.mean(0)).clamp(max=0).mean()
    loss_f, loss_g = loss_f - least, loss_g + least
    if row.get("autoencoder"):
        loss_f = loss_f + row["autoencoder"] * sum((t - decoder(f(t))).square().mean() for t in (x, y))
    if row.get("data_mmd"):
        loss_g = loss_g + root(x.flatten(1), y.flatten(1))
    for t in (x, y) if row.get("activation") else ():
        for layer in f:
            t = layer(t)
            if isinstance(layer, (nn.LeakyReLU, nn.Linear)):
                loss_f = loss_f + row["activation"] * t.square().mean()
    if row.get("weights"):
        chosen = nn.Module if row["weights"] == "l2-all" else (nn.GroupNorm, nn.LayerNorm)
        weights = [p for layer in f if isinstance(layer, chosen) for p in layer.parameters()]
        loss_f = loss_f + row["penalty"] * sum((p.abs() ** (1 if row["weights"] == "l1" else 2)).sum()
                                               for p in weights)
    elif row.get("penalty"):
        t = a * x + (1 - a) * y
        witness = (lambda h: k(h, h_x).mean(1) - k(h, h_y).mean(1))
        G = slope(t, {"cramer": cramer, "mmd2": witness}.get(kind, torch.sum))
        G = {"columns": G.transpose(1, -2), "pixels": G}.get(row.get("slope"), G.flatten(1))
        loss_f = loss_f + row["penalty"] * (G.norm(dim=1) - 1).square().mean()
    return loss_f, loss_g


def agree(found, wanted, *points, near=1e-9, near_32=1e-4):
    """found(*points) has wanted's value and gradients in float64, and in float32 up to its rounding."""
    def results(function, dtype):
        own = [p.detach().float().to(dtype).requires_grad_() for p in points]
        value = function(*own)
        slope = torch.linspace(1, 2, value.numel(), dtype=dtype).view(value.shape)
        return [value.detach(), *torch.autograd.grad(value, own, slope)]

    truth = results(wanted, torch.float64)
    for dtype, error in ((torch.float64, near), (torch.float32, near_32)):
        for i, (r, t) in enumerate(zip(results(found, dtype), truth)):
            assert r.shape == t.shape and float((r - t).norm()) <= error * float(t.norm()), (dtype, i)


SIGMA = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)


def plain_objective(form, x, y, ridge=0.1, sigma=SIGMA):
    """The table of gram_objective's docstring, by a plain solve; and the ratio."""
    p, q = (y, x) if form in ("swap", "flow") else (x, y)

    def K(a, b, s):
        return (-(a[:, None] - b).square().sum(-1) / (2 * s * s)).exp()

    eye = ridge * torch.eye(len(q), dtype=q.dtype)
    r = sum(torch.linalg.solve(K(q, q, s) + eye, K(q, p, s).sum(1)) for s in sigma) / len(sigma)
    r = r * len(q) / len(p)
    r = r.clamp(min=0) if form == "clip" else r
    square = (r - 1).square().mean()
    return {"sum": square + 0.7 * r.sum(), "swap": square + 0.7 * r.sum(), "mean": square + 0.7 * r.mean(),
            "clip": square, "square": r.square().mean() - 1, "flow": r.mean()}[form], r
