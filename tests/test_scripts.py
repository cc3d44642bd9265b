"""The scripts through their command lines, small: every row, scores, resuming, bad input, bad days."""
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error

import numpy as np
import pytest
import torch

import cifar
import common
import mnist
import ring2d
import ring3d
from conftest import SWEPT, by_hand, export, kept, same, says

ROOT = os.path.dirname(os.path.abspath(cifar.__file__))
SMALL = dict(BATCH=8, SAMPLES=20, BOOTSTRAP=20, LOG_EVERY=2, GRID_EVERY=4, SAVE_EVERY=2, BURST=2,
             BURST_UNTIL=1, CODES=20, ENCODE=2,
             TABLES={name: (20, own) for name, (_, own) in cifar.TABLES.items()})


def small_nets(nets):
    """A description of networks with widths of 8 to 12, but for an mlp that ends in an image."""
    small = dict(nets, z=8)
    for key in ("g", "f"):
        small |= {key: (12, *[8] * (len(nets[key]) - 1))} if key in nets else {}
    small |= dict(width=4) if "width" in nets else {}
    return small | dict(mlp=(12, 8), encoder=(3072, 12, 8)) if "encoder" in nets else small


METHODS = {name: dict(row, nets=small_nets(row["nets"]), steps=min(row["steps"], 1),
                      **({"batch": 9} if "batch" in row else {}), **({"every": 4} if "every" in row else {}))
           for name, row in cifar.METHODS.items()}
ROWS, FULL = [name for name in METHODS if name not in SWEPT], cifar.METHODS
FULL_EVERY = {name: getattr(cifar, name) for name in vars(cifar) if name.endswith("_EVERY")}


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """cifar.py and ring2d.py with small constants, a small data set, and a folder of their own to work in."""
    for name, value in SMALL.items():
        monkeypatch.setattr(cifar, name, value)
    monkeypatch.setattr(cifar, "METHODS", METHODS)
    ring = dict(BATCH=16, POINTS=500, LOG_EVERY=4, TRACE_EVERY=2, SAVE_EVERY=2)
    plane = dict(PANELS=(2, 6), WIDTHS=(5, 10), NOISES=(2, 4), GAMN_HIDDEN=(12, 12), AVERAGE=6,
                 AVERAGE_EVERY=2, AVERAGE_POINTS=50, DIRAC_STEPS=40, GRID_5=(5, 4, 3))
    for script, values in ((ring2d, ring | plane), (ring3d, ring)):
        for name, value in values.items():
            monkeypatch.setattr(script, name, value)
    for script, panels in ((ring2d, (2,)), (ring3d, (0, 2))):
        given = dict(panels=panels, batch=16)
        monkeypatch.setattr(script, "METHODS", {
            name: row | {key: value for key, value in given.items() if key in row}
            for name, row in script.METHODS.items()})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    images = np.random.default_rng(0).integers(0, 256, (60, 3, 32, 32), np.uint8)
    os.mkdir("data")
    np.save("data/cifar10-train.npy", images)
    np.save("data/cifar10-test.npy", images[:30])


def offline(*args, **kwargs):
    raise urllib.error.URLError("no network")


def run_cifar(*flags):
    cifar.main(["--device", "cpu", *map(str, flags)])


def run_ring(*flags):
    ring2d.main(["--device", "cpu", *map(str, flags)])


def run_ring3d(*flags):
    ring3d.main(["--device", "cpu", *map(str, flags)])


# ---- every row --------------------------------------------------------------------------------------------


def test_every_row_of_cifar(capsys):
    run_cifar("--method", *ROWS, "--steps", 4, "--features", export("features-tiny.pt2"))
    printed = capsys.readouterr().out
    for method in ROWS:
        row, folder = METHODS[method], f"runs/cifar-{method}-s0"
        assert sorted(os.listdir(folder)) == [
            "checkpoint.pt", "cifar.py", "common.py", "log.csv", "result.json", "samples-4.png",
            "samples.npy", *(["singular-4.npz"] if row["critic"] else [])]
        samples = np.load(f"{folder}/samples.npy")
        assert samples.shape == (20, 3, 32, 32) and samples.dtype == np.uint8 and samples.std() > 1
        log = common.read_log(folder)
        assert log["step"].tolist() == [2, 4] and np.isfinite(log["loss_g"]).all()
        assert np.isfinite(log["mean_r"]).all() == (row["distance"] == "gram")
        assert np.isfinite(log["loss_f"]).all() == (row["critic"] > 0 or "encode" in row)
        result = json.load(open(f"{folder}/result.json"))
        assert (result["method"], result["seed"], result["updates"]) == (method, 0, 4) and result["fd"] >= 0
        assert result["command"].startswith("python cifar.py --device cpu --method gram ")
        assert result["milliseconds"] is result["MiB"] is None      # of a GPU alone
        assert f"| {method} " in printed
    *_, last, picture = (line for line in printed.splitlines() if line)
    assert last.startswith(f"| {ROWS[-1]} ") and picture == "runs/cifar-curves.png"
    assert "26.82 ± 0.49" in printed and "BATCH" in printed
    check_steps()


def check_steps():
    """As many steps of the critic as its row says, of the generator one an update; all weights move."""
    for method, row in ((name, METHODS[name]) for name in ROWS):
        _, tensors, _ = kept(f"runs/cifar-{method}-s0")
        taken = {name: {float(t) for path, t in tensors.items() if path[0] == name and path[-1] == "step"}
                 for name in ("opt_g", "opt_f")}
        # of MMD-GAN two steps of the critic at update 1, then one; GMMN+AE's encoder is done after two
        critic = {5.0} if "burst" in row else {2.0} if "encode" in row else {4.0} if row["critic"] else set()
        assert taken == {"opt_g": {4.0}, "opt_f": critic}, method
        torch.manual_seed(0)
        for name, network in zip(("g", "game.f", "game.decoder"), cifar.networks(row)):
            name, *part = name.split(".")
            for weight, start in (network.state_dict() if network else {}).items():
                moved = tensors[name, ".".join([*part, weight])]
                tiny = row["distance"] in ("mmd2", "smmd")      # of widths so small it may round to 0
                if weight[-3:] in ("._u", "._v"):
                    continue
                if row["distance"] == "gan" or weight != f"{len(network) - 1}.bias" and not tiny:
                    assert not torch.equal(moved, start), (method, name, weight)


PLAYED = {name: METHODS[name] for name in ROWS
          if METHODS[name]["distance"] != "gram" and METHODS[name]["critic"]}


@pytest.mark.parametrize("method", PLAYED)
def test_losses_of_every_row(method):
    """In float64 the losses of common.Game and their gradients are those of the formulas written out."""
    row, (a, rng) = PLAYED[method], (torch.rand(8, generator=torch.Generator().manual_seed(5)).double(), None)
    torch.manual_seed(0)
    _, f, decoder = cifar.networks(row)
    for p in f.parameters():
        p.data.mul_(8)              # far enough from 0 that no loss vanishes
    f, decoder = f.double().eval(), decoder and decoder.double()
    x, y = torch.rand(2, 8, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()
    y = (0.5 * y).requires_grad_()
    kernels = common.kernels(cifar.SIGMA, cifar.RBF, cifar.ALPHA, dtype=torch.float64)
    game = common.Game(row, f, decoder, kernels.get(row.get("kernel")), rng).double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda *args, **kwargs: a)
        found_f = game.critic(x, y)
    found_g, h_x, h_y = game.generator(x, y)
    loss_f, loss_g = by_hand(row, f, decoder, x, y, a)
    assert float(found_f.detach()) == pytest.approx(float(loss_f.detach()), rel=1e-9)
    assert float(found_g.detach()) == pytest.approx(float(loss_g.detach()), rel=1e-9)
    assert torch.equal(h_x, f(x)) and torch.equal(h_y, f(y))
    weights = list(f.parameters())
    for found, expected in ((torch.autograd.grad(found_f, weights, retain_graph=True),
                             torch.autograd.grad(loss_f, weights, retain_graph=True)),
                            (torch.autograd.grad(found_g, [y]), torch.autograd.grad(loss_g, [y]))):
        for u, v in zip(found, expected):
            assert torch.allclose(u, v, rtol=1e-6, atol=1e-9 * float(v.abs().max() + 1e-3))


def test_the_generator_s_step_takes_no_gradient_in_the_critic_s_weights(monkeypatch):
    counted = []
    weight = torch.nn.grad.conv2d_weight
    monkeypatch.setattr(torch.nn.grad, "conv2d_weight", lambda *args: counted.append(1) or weight(*args))
    for method in ("smmd", "sn-gan", "sobolev", "mmd-rqdot-16", "gamn", "mmdgan"):
        row = METHODS[method]
        g, f, decoder = cifar.networks(row)
        game = common.Game(row, f, decoder, common.kernels((1,), (1,), (1,)).get(row.get("kernel")),
                           torch.Generator())
        x, y = torch.rand(6, 3, 32, 32), g(torch.rand(6, 8))
        game.critic(x, y.detach()).backward()
        assert bool(counted) == (method != "mmdgan")            # batch norm: torch's own convolutions
        counted.clear()
        torch.autograd.grad(game.generator(x, y)[0], list(g.parameters()))
        assert not counted and all(p.requires_grad for p in f.parameters()), method


def test_what_happens_every_so_often_happens_at_a_row_of_the_log():
    every = [row.get("every", FULL_EVERY["GRID_EVERY"]) for row in FULL.values()]
    for interval in {*every, FULL_EVERY["SAVE_EVERY"], FULL_EVERY["ADAPT_EVERY"]}:
        assert interval % FULL_EVERY["LOG_EVERY"] == 0


FIRST = ["gram", "gram-flow", "gram-eq9", "gram-clip", "gan", "mmdgan", "mmdnet"]


@pytest.mark.parametrize("method", FIRST)
def test_first_update_is_the_papers(method):
    """One update written out anew: signs, order of the players, which loss is whose, the average."""
    run_cifar("--method", method, "--steps", 1)
    step, tensors, log = kept(f"runs/cifar-{method}-s0")
    row = METHODS[method]
    sigma = torch.tensor([1.0, 2, 4, 8, 16])
    torch.manual_seed(0)
    g, f, decoder = cifar.networks(row)
    rng = torch.Generator().manual_seed(0)
    images = torch.from_numpy(np.load("data/cifar10-train.npy")).float() / 127.5 - 1

    def draw():
        x = images[torch.randint(60, (8,), generator=rng)]
        for i, chance in enumerate(torch.rand(8, 1, 1, 1, generator=rng).flatten()):
            x[i] = x[i, :, :, list(range(31, -1, -1))] if chance < 0.5 else x[i]
        return x, g(torch.rand(8, 8, generator=rng) * 2 - 1)

    def K(a, b):
        return (-(a[:, None] - b).square().sum(-1) / (2 * sigma.square())[:, None, None]).exp()

    def mmd2(a, b):
        return (K(a, a).mean((1, 2)) + K(b, b).mean((1, 2)) - 2 * K(a, b).mean((1, 2))).sum()

    def ratio(a, b):            # of the density of b to that of a, at a
        return torch.linalg.solve(K(a, a) + row["ridge"] * torch.eye(8), K(a, b).sum(2)).mean(0)

    rate_g = row.get("adam_g", row.get("adam", (5e-5,)))[0]
    if method == "mmdgan":
        opt_g = torch.optim.RMSprop(g.parameters(), 5e-5)
        opt_f = torch.optim.RMSprop([*f.parameters(), *decoder.parameters()], 5e-5)
    else:
        opt_g = torch.optim.Adam(g.parameters(), rate_g, (0.5, 0.999))
        opt_f = torch.optim.Adam(f.parameters(), row["adam"][0], (0.5, 0.999)) if f else None
    loss_f, losses = None, dict(feasible=16.0, autoencoder=8.0)
    for _ in range({"mmdgan": 2, "gan": 1}.get(method, 0)):
        x, y = draw()
        loss_f, _ = by_hand(dict(row, **losses) if decoder else row, f, decoder, x, y.detach(), None)
        opt_f.zero_grad()
        loss_f.backward()
        opt_f.step()
        for p in f.parameters() if decoder else ():
            p.data.clamp_(-0.01, 0.01)
    x, y = draw()
    if method == "mmdnet":
        loss_g = (mmd2(x.flatten(1), y.flatten(1)) + 1e-6).sqrt()
    elif method in ("mmdgan", "gan"):                       # the generator against the critic as it now is
        _, loss_g = by_hand(dict(row, **losses) if decoder else row, f, decoder, x, y, None)
    else:
        f_x, f_y = f(x), f(y)
        printed = method in ("gram-eq9", "gram-clip")           # p / q at y, and otherwise q / p at x
        K_ratio, r = (K(f_y, f_y), ratio(f_y, f_x)) if printed else (K(f_x, f_x), ratio(f_x, f_y))
        loss_f = -{"gram-flow": r.mean(),
                   "gram-clip": (r.clamp(min=0) - 1).square().mean()
                   }.get(method, (r - 1).square().mean() + r.sum())
        loss_g = mmd2(f_x, f_y)
        gradient = torch.autograd.grad(loss_f, f.parameters(), retain_graph=True)
        values = np.linalg.cond((K_ratio + row["ridge"] * torch.eye(8)).detach().double().numpy())
        assert log["condition"] == [pytest.approx(values.max(), rel=1e-7 / row["ridge"])]     # rounding
        spread = float((f_x.var(0).sum() / f_y.var(0).sum()).detach())
        assert log["spread"] == [pytest.approx(spread, rel=1e-4)]
    opt_g.zero_grad()
    loss_g.backward()
    if method.startswith("gram"):                           # both gradients were taken at the same weights
        for p, p_gradient in zip(f.parameters(), gradient):
            p.grad = p_gradient
        opt_f.step()
    opt_g.step()
    rounding = 2e-3 if decoder else 2e-4        # MMD-GAN's distance is next to 0 under clipped weights
    assert log["loss_g"] == [pytest.approx(float(loss_g.detach()), rel=rounding)]
    assert loss_f is None or log["loss_f"] == [pytest.approx(float(loss_f.detach()), rel=rounding)]
    players = torch.nn.ModuleDict({name: n for name, n in (("f", f), ("decoder", decoder)) if n})
    for name, network in (("g", g), ("game", players)):
        for weight, value in network.state_dict().items():
            if (name, weight) == ("game", "f.10.bias") and method.startswith("gram"):
                continue        # it moves all outputs alike: its gradient is rounding
            first = (rate_g if name == "g" else row["adam"][0]) if "adam" in row else 5e-4      # RMSprop's
            wrong = (tensors[name, weight] - value).abs() > 0.1 * first
            assert wrong.sum() <= max(4, 100 * rounding * wrong.numel()), (name, weight)
    for weight in g.state_dict():
        assert torch.equal(tensors["sampler", f"0.network.{weight}"], tensors["g", weight]), weight


def test_scores_and_their_names(capsys):
    features = export("features-tiny.pt2")
    run_cifar("--method", "gram", "gan", "--seeds", 2, "--steps", 2, "--features", features)
    printed = capsys.readouterr().out
    results = [json.load(open(f"runs/cifar-gram-s{seed}/result.json")) for seed in (0, 1)]
    network = common.load_features(features, torch.device("cpu"))
    against = "cifar10-test, 30 images"
    reference, _ = network(torch.from_numpy(np.load("data/cifar10-test.npy")))
    fit = common.gaussian_fit(reference)
    for seed, result in enumerate(results):
        found, logits = network(torch.from_numpy(np.load(f"runs/cifar-gram-s{seed}/samples.npy")))
        assert result["fd"] == common.frechet_distance(common.gaussian_fit(found), fit)
        assert (result["kid"], result["kid_std"]) == common.kid(found, reference)
        assert (result["isc"], result["isc_std"]) == common.inception_score(logits)
        assert result["fd_bootstrap"] == common.bootstrap_frechet_distance(found, fit)[0]
        assert (result["features"], result["samples"], result["reference"]) == ("tiny", 20, against)
    assert printed.count(f"tiny; 20 samples against {against}") == 1
    row = next(line for line in printed.splitlines() if line.startswith("| gram "))
    assert "2 of 2" in row and all(common.mean_std([result[key] for result in results], digits) in row
                                   for key, digits in (("fd", 1), ("fd_bootstrap", 1), ("isc", 2)))
    assert printed.split("mean ± std over seeds")[1].count("FID") == 1     # the paper's


def test_samples_have_averaged_weights_and_the_contrast_of_the_data():
    run_cifar("--steps", 4)
    _, tensors, _ = kept("runs/cifar-gram-s0")
    g = cifar.networks(METHODS["gram"])[0]
    z = torch.rand(20, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x = torch.from_numpy(np.load("data/cifar10-train.npy")).double() / 127.5 - 1
    level = x.mean((0, 2, 3), keepdim=True)
    images = {}
    for name, prefix in (("sampler", "0.network."), ("g", "")):
        g.load_state_dict({path[1].removeprefix(prefix): t for path, t in tensors.items()
                           if path[0] == name and path[1].startswith(prefix)})
        y = g(z).detach().double()
        y = y - y.mean((0, 2, 3), keepdim=True)
        y = level + y / y.square().mean().sqrt() * (x - level).square().mean().sqrt()
        images[name] = ((y + 1) * 127.5).clamp(0, 255).numpy()
    samples = np.load("runs/cifar-gram-s0/samples.npy")
    assert np.abs(samples - images["sampler"]).max() < 0.51 and np.abs(samples - images["g"]).max() > 2


def test_distances_along_the_way():
    """With --features a distance at every grid and at the end, of the samples of that update."""
    features = export("features-tiny.pt2")
    run_cifar("--steps", 6, "--features", features)
    log = common.read_log("runs/cifar-gram-s0")
    assert np.isfinite(log["fd"]).tolist() == [False, True, True] and log["step"].tolist() == [2, 4, 6]
    assert log["fd"][-1] == json.load(open("runs/cifar-gram-s0/result.json"))["fd"]
    run_cifar("--method", "gan", "--steps", 6)
    assert np.isnan(common.read_log("runs/cifar-gan-s0")["fd"]).all()


def test_figure_5c(capsys):
    for name, out in (("gram", 128), ("gram-k2", 2), ("gram-k2048", 2048), ("gan", 1), ("mmdgan", 128)):
        assert cifar.networks(METHODS[name])[1][-1].out_features == out
    with says("cannot be fetched (URLError", "--features"):
        run_cifar("--figure", "5c")
    flags = "--figure", "5c", "--steps", 2, "--features", export("features-tiny.pt2")
    run_cifar(*flags)
    assert min(os.path.getsize(f"runs/cifar-{name}.png") for name in ("figure5c", "curves")) > 5_000
    before = {k: kept(f"runs/cifar-gram-k{k}-s0") for k in (2, 8, 32, 128, 512, 1024, 2048)}
    capsys.readouterr()
    run_cifar(*flags)               # nothing is trained again
    assert capsys.readouterr().out.count("goes on at update 2") == 7
    assert all(str(kept(f"runs/cifar-gram-k{k}-s0")) == str(run) for k, run in before.items())


def test_sampling_as_the_readme_does():
    run_cifar("--steps", 2)
    blocks = open(f"{ROOT}/README.md").read().split("```python\n")[1:]
    [snippet] = [block.split("```")[0] for block in blocks if "sampler.draw" in block]
    exec(snippet)
    assert os.path.getsize("new.png") > 10_000


def test_curves_have_a_panel_for_what_was_logged():
    run_cifar("--method", "gan", "gram", "--steps", 2)
    finished = [((method, 0, f"runs/cifar-{method}-s0", {}), {}) for method in ("gan", "gram")]
    for runs, expected in ((finished[:1], ["spread"]), (finished, ["mean_r", "condition", "spread"])):
        picture = common.curves_figure(runs, cifar.CURVES["all"])
        assert [axes.get_title() for axes in picture.axes] == [common.TITLES[name] for name in expected]
        [legend] = picture.legends
        assert sorted(label.get_text() for label in legend.get_texts()) == [name for (name, *_), _ in runs]


def test_figures_of_trained_rows(monkeypatch, capsys):
    """Each draws what its rows have kept; their places in GRAM's Figure 5 are what their names say."""
    features = export("features-tiny.pt2")
    for figure, wanted in (("5", 30), ("scores", 4), ("singular", 2), ("gamn", 1)):
        capsys.readouterr()
        run_cifar("--figure", figure, "--steps", 2, "--features", features)
        assert os.path.getsize(f"runs/cifar-figure{figure}.png") > 10_000
        done = [line for line in capsys.readouterr().out.splitlines() if ": 2 updates, " in line]
        assert len(done) == wanted
    with np.load("runs/cifar-sn-smmd-s0/singular-2.npz") as kept_values:
        f = cifar.networks(METHODS["sn-smmd"])[1]
        _, tensors, _ = kept("runs/cifar-sn-smmd-s0")
        f.load_state_dict({path[1][2:]: t for path, t in tensors.items()
                           if path[0] == "game" and path[1].startswith("f.")})
        weights = [layer.weight.detach().flatten(1) for layer in f.eval() if hasattr(layer, "weight")]
        for name, weight in zip(kept_values.files, weights):
            assert np.allclose(kept_values[name], np.linalg.svd(weight, compute_uv=False), atol=1e-6)
        assert len(kept_values.files) == len(weights) == 8
    run_cifar("--figure", "singular", "--method", "gram", "--steps", 2, "--features", features)
    with np.load("runs/cifar-gram-s0/singular-2.npz") as kept_values:
        assert len(kept_values.files) == 4
    with says("--figure singular: found mmdnet gmmn, expected rows that have a critic"):
        run_cifar("--figure", "singular", "--method", "mmdnet", "gram", "gmmn", "--features", features)
    assert not os.path.exists("runs/cifar-mmdnet-s0")
    for name in SWEPT:
        row, plain, value = FULL[name], FULL[name.split("-")[0]], re.search(r"[\d.]+$", name)[0]
        changed = {key for key in row.keys() | plain.keys() if row.get(key) != plain.get(key)} - {"paper"}
        if "-lr" in name:
            assert changed <= {"adam", "adam_g", "rmsprop"} and changed == {
                key for key in ("adam", "adam_g", "rmsprop")
                if key in plain and plain[key] not in (float(value), (float(value), 0.5, 0.999))}
        elif "-batch" in name:
            assert changed == {"batch"} and row["batch"] == int(value)
        else:
            assert changed <= {"critic"} and row["critic"] == int(value)


def test_figures_of_the_scores(monkeypatch, capsys):
    small = dict(ESTIMATES=3, KID_N=(5, 9), FID_N=(5, 20), CENSORED=6, CENSORED_M=(40, 80))
    for name, value in small.items():
        monkeypatch.setattr(cifar, name, value)
    np.save("data/mnist-train.npy", np.zeros((7, 1, 28, 28), np.uint8))
    features = export("features-tiny.pt2")
    for figure in ("bias", "noise", "neighbours"):
        run_cifar("--figure", figure, "--features", features, "--steps", 2)
        assert os.path.getsize(f"runs/cifar-figure{figure}.png") > 10_000
    printed = capsys.readouterr().out
    assert printed.count("3 estimates; dotted") == 4 and "KID of training and test images" in printed
    assert all(printed.count(kind) == len(levels) for kind, levels in common.DISTURBANCES.items())
    assert os.listdir("runs").count("cifar-gram-s0") == 1       # for the neighbours


def test_rates_that_adapt(monkeypatch, capsys):
    failing = 2, 2, -1.0, 1e-6
    for name, value in dict(ADAPT_EVERY=2, CODES=20, ADAPT=failing).items():
        monkeypatch.setattr(cifar, name, value)         # every test is a failure
    with says("gram-adaptive needs a feature network", "--features"):
        run_cifar("--method", "gram-adaptive")
    flags = "--method", "gram-adaptive", "--features", export("features-tiny.pt2"), "--steps"
    seen, step = [], common.AdaptiveRate.step
    with monkeypatch.context() as patch:
        patch.setattr(common.AdaptiveRate, "step", lambda self, y: seen.append(y) or step(self, y))
        patch.setitem(cifar.METHODS["gram-adaptive"], "adam_g", (0.0, 0.5, 0.999))     # it stays as it is
        run_cifar(*flags, 4, "--out", "still")
    assert len(seen) == 2 and not torch.equal(*seen)        # the noise is new each time
    run_cifar(*flags, 12, "--out", "whole")
    run_cifar(*flags, 8, "--out", "parts")
    run_cifar(*flags, 12, "--out", "parts", "--resume")
    assert same("whole/cifar-gram-adaptive-s0", "parts/cifar-gram-adaptive-s0")
    log = common.read_log("whole/cifar-gram-adaptive-s0")
    assert np.isnan(log["p"]).tolist() == [True, True, False, False, False, False]      # updates 2, 4, ...
    lr = METHODS["gram"]["adam"][0]
    assert log["lr_g"].tolist() == pytest.approx([lr, lr, lr, lr / 2, lr / 2, lr / 4])
    with says("features of network", "found", "expected"):  # row sums of another network
        export("features-other.pt2", "plain")
        run_cifar(*flags[:3], "features-other.pt2", "--steps", 14, "--out", "whole", "--resume")
    with says("found 60 images, expected 61"), monkeypatch.context() as patch:
        patch.setattr(cifar, "CODES", 61)
        run_cifar(*flags, 12)
    optimizers = torch.load("whole/cifar-gram-adaptive-s0/checkpoint.pt", weights_only=True)["state"]
    assert optimizers["opt_f"]["param_groups"][0]["lr"] == lr / 4


def test_a_finished_run_is_scored_without_training(capsys):
    run_cifar("--steps", 4)
    before = kept("runs/cifar-gram-s0")[1]
    run_cifar("--steps", 4, "--resume", "--features", export("features-tiny.pt2"))
    assert "fd" in json.load(open("runs/cifar-gram-s0/result.json"))
    assert all(torch.equal(t, kept("runs/cifar-gram-s0")[1][p]) for p, t in before.items())


def test_every_row_of_ring2d(capsys):
    run_ring("--method", *ring2d.METHODS, "--steps", 6)
    printed = capsys.readouterr().out
    for method, row in ring2d.METHODS.items():
        folder = f"runs/ring2d-{method}-s0"
        assert f"{folder}/figure1.png" in printed and os.path.getsize(f"{folder}/figure1.png") > 20_000
        points = np.load(f"{folder}/points-6.npz")
        assert points["x"].shape == points["y"].shape == (1, 1000, 2) and np.isfinite(points["y"]).all()
        outputs = ring2d.K if row["critic"] == "K" else row["critic"]
        assert points["f_x"].shape == (1, 1000, outputs) if outputs else "f_x" not in points
        log = common.read_log(folder)
        assert len(log["step"]) == 6 and np.isfinite(log["loss_g"]).all()
        assert np.isfinite(log["mean_r"]).all() == method.startswith("gram")
        assert np.isfinite(log["loss_f"]).all() == (row["critic"] != 0)
        result = json.load(open(f"{folder}/result.json"))
        [member] = result["members"]
        assert 0 <= member["modes"] <= 8 and 0 <= member["share"] <= 1 and result["samples"] == 500


@pytest.mark.parametrize("script, run", [(ring2d, run_ring), (ring3d, run_ring3d)])
def test_players_of_a_ring_take_their_steps(script, run, monkeypatch):
    """Critic steps for one of the generator, clipped weights within their bound, all weights of both move."""
    run("--method", *script.METHODS, "--steps", 2)
    for method, row in script.METHODS.items():
        name = script.__name__
        _, tensors, _ = kept(f"runs/{name}-{method}-s0")
        count = {player: {float(t) for path, t in tensors.items() if path[0] == player and path[-1] == "step"}
                 for player in ("opt_g", "opt_f")}
        each = row["steps"] or 1 if script is ring2d else {"mmdgan": 5}.get(method, 1)
        critic = row["critic"] if script is ring2d else method != "mmdnet"
        assert count == {"opt_g": {2.0}, "opt_f": {2.0 * each} if critic else set()}, method
        bound = row.get("clip") if script is ring2d else {"mmdgan": 0.1}.get(method)
        f, decoder = (("critic", "0."), ("critic", "1.")) if script is ring3d else (
            ("game", "f."), ("game", "decoder."))
        largest = {own: max((float(t.abs().max()) for path, t in tensors.items()
                             if path[0] == own[0] and path[1].startswith(own[1])), default=0)
                   for own in (f, decoder)}
        assert not bound or largest[f] == pytest.approx(bound)
        assert method != "mmdgan" or largest[decoder] > 0.11    # the decoder's weights are free


def gaussians(a, b, sigmas=(1.0,)):
    return torch.stack([(-(a[:, None] - b).square().sum(-1) / (2 * s * s)).exp() for s in sigmas])


def squared_mmd(a, b, sigmas=(1.0,)):
    K_aa, K_ab, K_bb = (gaussians(*pair, sigmas) for pair in ((a, a), (a, b), (b, b)))
    return (K_aa.mean((1, 2)) + K_bb.mean((1, 2)) - 2 * K_ab.mean((1, 2))).sum()


def feasible(f_x, f_y):         # the mean over outputs of -relu(-(E f(x) - E f(y)))
    return -torch.relu(f_y.mean(0) - f_x.mean(0)).mean()


def check_moved(tensors, path, network, rate):
    """That a checkpoint has the weights of a network that has just made a step; path of a weight's name."""
    largest = max(float(p.grad.abs().max()) for p in network.parameters())
    for name, value in network.named_parameters():
        if float(value.grad.abs().max()) < 1e-5 * max(1, largest):
            continue        # shifts all outputs, or precedes a batch norm: the gradient is rounding
        found = tensors[path(name)].view_as(value)
        firm = value.grad.abs() > 0.01 * value.grad.abs().max()      # the rest's sign may be rounding too
        wrong = ((found - value).abs() > 0.2 * rate)[firm]
        assert wrong.float().mean() < 0.1, (name, float(wrong.float().mean()))


@pytest.mark.parametrize("method", ring2d.METHODS)
def test_first_update_of_a_ring_is_the_papers(method):
    """One update written out anew: signs, weights and order of losses; critic steps, clipping, penalties."""
    run_ring("--method", method, "--steps", 1)
    _, tensors, log = kept(f"runs/ring2d-{method}-s0")
    row = ring2d.METHODS[method]
    n, sigmas = row.get("batch", 16), row.get("sigma", (1.0,))
    g, f, decoder = ring2d.networks(row, ring2d.cells("1", [0])[0])
    rng, centres = torch.Generator().manual_seed(0), common.ring_centres(8, 2.0)

    def optimizer(*networks):
        weights = [p for network in networks if network for p in network.parameters()]
        if "rmsprop" in row:
            return torch.optim.RMSprop(weights, row["rmsprop"])
        return torch.optim.Adam(weights, row["adam"][0], row["adam"][1:])

    def draw():
        mode = torch.randint(8, (n,), generator=rng)
        x = centres[mode] + 0.2 * torch.randn(n, 2, generator=rng)
        return x, g(torch.randn(n, 20, generator=rng))

    def mmd(a, b):
        squared = squared_mmd(a, b, sigmas)
        return squared if method.startswith("gram") else (squared + 1e-6).sqrt()

    opt_g, opt_f = optimizer(g), optimizer(f, decoder) if f else None
    loss_f = None
    for _ in range(row["steps"]):
        x, y = draw()
        y = y.detach()
        if method == "gan":
            loss_f = -torch.sigmoid(f(x)).log().mean() - (1 - torch.sigmoid(f(y))).log().mean()
        elif method.startswith("wgan"):
            loss_f = f(y).mean() - f(x).mean()
        else:
            loss_f = -mmd(f(x), f(y))
        if method == "mmdgan":
            codes = torch.cat([x, y])
            loss_f = loss_f - 16 * feasible(f(x), f(y)) + 8 * 2 * (decoder(f(codes)) - codes).square().mean()
        kind, weight = row.get("penalty", (None, 0))
        norms = [p for layer in f[1::3] for p in layer.parameters()] if "norm" in row else []
        if kind == "gradient":
            a = torch.rand(1, n, generator=rng)[0, :, None]
            between = (a * x + (1 - a) * y).requires_grad_()
            slope, = torch.autograd.grad(f(between).sum(), between, create_graph=True)
            loss_f = loss_f + weight * (slope.square().sum(1).sqrt() - 1).square().mean()
        elif kind == "l1":
            loss_f = loss_f + weight * sum(p.abs().sum() for p in norms)
        elif kind:
            penalised = f.parameters() if kind == "l2-all" else norms
            loss_f = loss_f + weight * sum((p ** 2).sum() for p in penalised)
        opt_f.zero_grad()
        loss_f.backward()
        opt_f.step()
        for p in f.parameters() if "clip" in row else ():
            p.data.clamp_(-row["clip"], row["clip"])
    x, y = draw()
    if method.startswith("gram"):
        a, b = (f(x), f(y)) if row["form"] in ("flow", "swap") else (f(y), f(x))
        r = torch.linalg.solve(gaussians(a, a) + 1e-3 * torch.eye(n), gaussians(a, b).sum(2)).mean(0)
        eq_9 = (r - 1).square().mean() + r.sum()
        loss_f = -{"sum": eq_9, "swap": eq_9, "mean": (r - 1).square().mean() + r.mean(),
                   "clip": (r.clamp(min=0) - 1).square().mean(), "flow": r.mean()}[row["form"]]
        gradient = torch.autograd.grad(loss_f, f.parameters(), retain_graph=True)
    if method == "gan":
        loss_g = -torch.sigmoid(f(y)).log().mean()
    elif method.startswith("wgan"):
        loss_g = f(x).mean() - f(y).mean()
    else:
        loss_g = mmd(f(x), f(y)) if f else mmd(x, y)
    if method == "mmdgan":
        loss_g = loss_g + 16 * feasible(f(x), f(y))
    if method == "gamn-mmd":
        loss_g = loss_g + mmd(x, y)
    opt_g.zero_grad()
    loss_g.backward()
    opt_g.step()
    if method.startswith("gram"):
        for p, p_gradient in zip(f.parameters(), gradient):
            p.grad = p_gradient
        opt_f.step()
    assert log["loss_g"] == [pytest.approx(float(loss_g.detach()), rel=1e-3, abs=1e-5)]
    assert loss_f is None or log["loss_f"] == [pytest.approx(float(loss_f.detach()), rel=1e-3, abs=1e-5)]
    rate = row["rmsprop"] if "rmsprop" in row else row["adam"][0]
    check_moved(tensors, lambda name: ("g", f"network.{name}"), g, rate)
    if f:
        check_moved(tensors, lambda name: ("game", f"f.network.{name}"), f, rate)


def test_every_row_of_ring3d(capsys):
    run_ring3d("--steps", 6)
    printed = capsys.readouterr().out
    for method in ring3d.METHODS:
        folder = f"runs/ring3d-{method}-s0"
        assert f"{folder}/figure.png\n{folder}: " in printed
        assert os.path.getsize(f"{folder}/figure.png") > 20_000
        assert {f"points-{step}.npz" for step in (0, 2)} <= set(os.listdir(folder)) or method == "mmdgan"
        points = np.load(f"{folder}/points-2.npz")
        assert points["y"].shape == (1000, 3) and ("f_x" in points) == (method != "mmdnet")
        assert len(common.read_log(folder)["step"]) == 3


@pytest.mark.parametrize("method", ring3d.METHODS)
def test_first_update_of_ring3d_is_the_papers(method):
    """One update of each method written out anew, on the same draws: signs, weights, order of the steps."""
    run_ring3d("--method", method, "--steps", 1, "--seeds", 2)
    _, tensors, log = kept(f"runs/ring3d-{method}-s1")          # whose feasible set terms are not 0
    torch.manual_seed(1)
    g, f, decoder = ring3d.networks(method)
    rng, n, centres = torch.Generator().manual_seed(1), 16, common.ring_centres(8, 2.0)
    rate, betas = {"gram": (1e-3, (0.5, 0.999)), "gan": (1e-4, (0.5, 0.999)),
                   "mmdgan": (5e-5, (0.5, 0.999)), "mmdnet": (1e-3, None)}[method]

    def optimizer(*networks):
        weights = [p for network in networks if network for p in network.parameters()]
        return torch.optim.Adam(weights, rate, betas) if betas else torch.optim.RMSprop(weights, rate)

    def step(optimizer, loss):
        weights = optimizer.param_groups[0]["params"]
        for p, gradient in zip(weights, torch.autograd.grad(loss, weights, retain_graph=True)):
            p.grad = gradient
        optimizer.step()

    def noise():
        return torch.randn(n, 20, generator=rng)

    def draw():
        plane = centres[torch.randint(8, (n,), generator=rng)] + 0.2 * torch.randn(n, 2, generator=rng)
        x = ring3d.tilt(torch.cat([plane, 0.1 * torch.randn(n, 1, generator=rng)], 1))
        return x, g(noise())

    opt_g, opt_f, loss_f = optimizer(g), optimizer(f, decoder) if f else None, None
    x, y = draw()
    if method == "gram":
        h_x, h_y = f(x).double(), f(y).double()
        A = gaussians(h_y, h_y)[0] + 1e-3 * torch.eye(n)
        r = torch.linalg.solve(A, gaussians(h_y, h_x)[0].sum(1))
        loss_f, loss_g = -((r - 1).square().mean() + r.sum()), squared_mmd(h_x, h_y)     # eq. 9 and 10
        step(opt_g, loss_g)
        step(opt_f, loss_f)         # of the same y: both gradients are those before any step
    if method == "gan":
        loss_f = -torch.sigmoid(f(x)).log().mean() - (1 - torch.sigmoid(f(y))).log().mean()
        step(opt_f, loss_f)
        loss_g = -torch.sigmoid(f(g(noise()))).log().mean()
        step(opt_g, loss_g)
    if method == "mmdnet":
        loss_g = (squared_mmd(x, y) + 1e-6).sqrt()
        step(opt_g, loss_g)
    if method == "mmdgan":
        for _ in range(5):
            points = a, b = draw()
            loss_f = (-(squared_mmd(f(a), f(b)) + 1e-6).sqrt() - 16 * feasible(f(a), f(b))
                      + 8 * sum((decoder(f(t)) - t).square().mean() for t in points))
            step(opt_f, loss_f)
            for p in f.parameters():
                p.data.clamp_(-0.1, 0.1)
        assert feasible(f(a), f(b)) and feasible(f(x), f(y))
        loss_g = (squared_mmd(f(x), f(y)) + 1e-6).sqrt() + 16 * feasible(f(x), f(y))
        step(opt_g, loss_g)
    assert log["loss_g"] == [pytest.approx(float(loss_g.detach()), rel=1e-3, abs=2e-5)]
    assert loss_f is None or log["loss_f"] == [pytest.approx(float(loss_f.detach()), rel=2e-5)]
    if method == "gram":
        assert log["pearson"] == [pytest.approx(float((r - 1).square().mean().detach()), rel=1e-3)]
        assert log["mean_r"] == [pytest.approx(float(r.mean().detach()), rel=1e-4)]
    check_moved(tensors, lambda name: ("g", name), g, rate)
    for i, network in enumerate([f, decoder]):
        if network:
            check_moved(tensors, lambda name: ("critic", f"{i}.{name}"), network, rate)


@pytest.mark.parametrize("off, share", [(0.3, 1), (0.9, 0)])
def test_what_ring3d_counts(off, share, monkeypatch):
    """All samples of a generator that ignores its noise lie so far from one mode; 0.6 is near it."""
    whole = ring3d.networks

    def networks(method):
        g, f, decoder = whole(method)
        g[-1].weight.data.zero_()
        g[-1].bias.data = ring3d.tilt(torch.tensor([[2.0, 0.0, off]]))[0]
        return g, f, decoder

    monkeypatch.setattr(ring3d, "networks", networks)
    run_ring3d("--method", "mmdnet", "--steps", 1)
    result = json.load(open("runs/ring3d-mmdnet-s0/result.json"))
    assert result["share"] == share and result["modes"] == share and result["samples"] == 500


def test_the_ring_of_ring3d_is_tilted():
    """Appendix B.2: x' = x cos + z sin, y' = y, z' = -x sin + z cos, 60 degrees; lengths stay."""
    points = torch.eye(3)
    c, s = 0.5, 3 ** 0.5 / 2
    wanted = torch.tensor([[c, 0, -s], [0, 1, 0], [s, 0, c]])
    assert torch.allclose(ring3d.tilt(points), wanted, atol=1e-6)
    run_ring3d("--method", "mmdnet", "--steps", 2)
    x = torch.from_numpy(np.load("runs/ring3d-mmdnet-s0/points-2.npz")["x"])
    back = x @ wanted.T                                     # upright again
    assert float(back[:, 2].std()) == pytest.approx(0.1, rel=0.1)
    assert float(back[:, :2].norm(dim=1).mean()) == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize("method", ["gram", "gram-swap", "gan"])
def test_figure_1_has_the_estimate_between_equals(method, monkeypatch):
    """Crosses at the panels' updates: eq. 7 between different batches of the data, by numpy."""
    pictures = []
    monkeypatch.setattr(common, "save_figure", lambda path, picture: pictures.append(picture))
    run_ring("--method", method, "--steps", 6)
    crosses = [line for axes in pictures[0].axes for line in axes.lines if line.get_marker() == "x"]
    assert len(crosses) == (method != "gan")
    for line in crosses:
        assert list(line.get_xdata()) == [2, 6]
        for step, found in zip((2, 6), line.get_ydata()):
            f_x = np.load(f"runs/ring2d-{method}-s0/points-{step}.npz")["f_x"][0, :80].astype(np.float64)
            K = np.exp(-((f_x[:, None] - f_x) ** 2).sum(2) / 2)
            batches = [slice(i, i + 16) for i in range(0, 80, 16)]
            ratios = [np.linalg.solve(K[q, q] + 1e-3 * np.eye(16), K[q, p].sum(1))
                      for p in batches for q in batches if p != q]
            assert found == pytest.approx(np.mean([((r - 1) ** 2).mean() for r in ratios]), rel=1e-3)


def test_figure_2(capsys):
    """Stacks of 2 x 2 cells and 2 seeds; what is counted."""
    run_ring("--figure", 2, "--steps", 4, "--seeds", 2)
    printed = capsys.readouterr().out
    text = open("runs/ring2d-figure2.md").read()
    assert text.startswith("python ring2d.py --device cpu --figure 2") and text.split("\n\n", 1)[1] in printed
    for method in ("gan", "gram", "mmdnet", "mmdgan"):
        folder = f"runs/ring2d-figure2-{method}"
        assert os.path.getsize(f"{folder}/figure2.png") > 20_000
        members = json.load(open(f"{folder}/result.json"))["members"]
        assert [(m["g"][0], m["z"], m["seed"]) for m in members] == [
            (g, z, seed) for seed in (0, 1) for g in (5, 10) for z in (2, 4)]
        assert text.count(f"\n| {method} ") == 1 + 4
        points = np.load(f"{folder}/points-4.npz")
        assert points["y"].shape == (8, 1000, 2) and len({float(y[0, 0]) for y in points["y"]}) == 8
        weight = kept(folder)[1]["g", "network.0.weight"]           # [8, 10, 4]
        assert not weight[::2, :, 2:].any() and not weight[:2, 5:].any() and weight[3].all()
    done = dict(diverged=False, least=0.02, share=0.8)
    assert ring2d.succeeds(done)
    for worse in (dict(diverged=True), dict(least=0.019), dict(share=0.79)):
        assert not ring2d.succeeds(done | worse)


def test_a_member_that_diverges_leaves_the_others_alone(monkeypatch):
    networks = ring2d.networks

    def broken(row, cell):
        g, f, decoder = networks(row, cell)
        if cell["z"] == 4 and cell["g"][0] == 5:
            g[0].weight.data.fill_(float("nan"))
        return g, f, decoder

    for out, build in (("whole", networks), ("broken", broken)):
        monkeypatch.setattr(ring2d, "networks", build)
        run_ring("--figure", 2, "--method", "gram", "gan", "--steps", 4, "--seeds", 1, "--out", out)
    for method in ("gram", "gan"):
        whole, broken = (json.load(open(f"{out}/ring2d-figure2-{method}/result.json"))["members"]
                         for out in ("whole", "broken"))
        assert [m["diverged"] for m in broken] == [False, True, False, False]
        assert [a == b for a, b in zip(whole, broken)] == [True, False, True, True]
        assert np.isfinite(common.read_log(f"broken/ring2d-figure2-{method}")["loss_g"]).all()


def test_figure_gamn(capsys):
    run_ring("--figure", "gamn", "--steps", 8, "--seeds", 2)
    text = open("runs/ring2d-figuregamn.md").read()
    assert text.split("\n\n", 1)[1] in capsys.readouterr().out and "0.276 0.284 0.286" in text
    assert "two samples of the data" in text and os.path.getsize("runs/ring2d-figuregamn.png") > 20_000
    for method in ring2d.FIGURES["gamn"]["method"]:
        members = json.load(open(f"runs/ring2d-figuregamn-{method}/result.json"))["members"]
        assert [m["data"] for m in members] == [name for name in ring2d.GAMN_SETS for _ in range(2)]
        assert all(0 < m["mmd"] < 4 and not m["diverged"] for m in members)
        table_1 = kept(f"runs/ring2d-figuregamn-{method}")[1]["table_1", "mmd"]
        assert table_1.shape == (3, 6)
        assert table_1.mean(0).tolist() == pytest.approx([m["mmd"] for m in members])
    before = open("runs/ring2d-figuregamn-gamn/log.csv").read()
    run_ring("--figure", "gamn", "--steps", 8, "--seeds", 2)            # nothing is trained again
    assert open("runs/ring2d-figuregamn.md").read() == text
    assert open("runs/ring2d-figuregamn-gamn/log.csv").read() == before


def test_average_mmd_is_that_of_each_member():
    x, y = torch.randn(2, 60, 2), torch.randn(2, 60, 2) + 1
    expected = [sum((-(torch.cdist(p, q) ** 2) / (2 * s * s)).exp().mean() * sign for s in ring2d.GAMN_SIGMA
                    for p, q, sign in ((a, a, 1), (b, b, 1), (a, b, -2))) ** 0.5 for a, b in zip(x, y)]
    found = ring2d.average_mmd(dict(x=x, y=y)).tolist()
    assert found == pytest.approx([float(e) for e in expected], rel=1e-4)


@pytest.mark.parametrize("name, pictures, said", [
    ("dirac", ["dirac"], "MMD, from C = (3.0, 3.0): theta 3, psi 3"),
    ("gaussians", ["gaussians4", "gaussians5"], "best SMMD / best gradient-constrained MMD"),
])
def test_figures_of_scaled_mmd(name, pictures, said, capsys):
    run_ring("--figure", name)
    assert said in capsys.readouterr().out
    assert sorted(os.listdir("runs")) == [f"ring2d-figure{picture}.png" for picture in pictures]
    assert all(os.path.getsize(f"runs/{picture}") > 20_000 for picture in os.listdir("runs"))


def test_a_ring_that_ends_before_its_first_panel():
    run_ring("--steps", 1)
    assert os.path.exists("runs/ring2d-gram-s0/figure1.png")


def test_ring2d_learns_within_a_few_updates():
    """300 real updates: the samples spread from around the origin to the ring's size."""
    run_ring("--steps", 300)
    assert np.abs(np.load("runs/ring2d-gram-s0/points-2.npz")["y"]).max() < 2
    state = torch.load("runs/ring2d-gram-s0/checkpoint.pt", weights_only=True)["state"]["g"]
    g = common.Stack([common.mlp(ring2d.Z, *ring2d.HIDDEN, 2)])
    g.load_state_dict(state)
    y = g(torch.randn(1, 2000, ring2d.Z)).detach()[0]
    assert 1 < float(y.norm(dim=1).mean()) < 4


# ---- seeds, side by side, resuming ------------------------------------------------------------------------


def test_side_by_side_equals_one_after_another():
    """Neither the numbers nor the initial weights of a run depend on who runs beside it, to the bit."""
    run_cifar("--method", "gram", "gan", "--seeds", 2, "--steps", 4, "--out", "side")
    for method in ("gan", "gram"):
        run_cifar("--method", method, "--seeds", 2, "--steps", 4, "--out", "alone")
    for name in ("gram-s0", "gram-s1", "gan-s0", "gan-s1"):
        assert same(f"side/cifar-{name}", f"alone/cifar-{name}")
    weights = [kept(f"side/cifar-gram-s{seed}")[1]["g", "0.weight"] for seed in (0, 1)]
    assert not torch.equal(*weights)


@pytest.mark.parametrize("run, name", [(run_cifar, "cifar"), (run_ring, "ring2d"), (run_ring3d, "ring3d")])
def test_resumed_equals_uninterrupted(run, name, capsys):
    run("--steps", 8, "--out", "whole")
    run("--steps", 4, "--out", "parts")
    run("--steps", 8, "--out", "parts", "--resume")
    assert same(f"whole/{name}-gram-s0", f"parts/{name}-gram-s0")
    assert f"parts/{name}-gram-s0: goes on at update 4" in capsys.readouterr().out


@pytest.mark.parametrize("script, what", [(ring2d, ring2d.cells("1", [0])), (ring3d, 0)])
@pytest.mark.parametrize("every, stopped", [(2, False), (100, True)])
def test_a_ring_saves_while_it_trains_and_when_it_is_stopped(script, what, every, stopped, monkeypatch):
    monkeypatch.setattr(script, "SAVE_EVERY", every)
    run = script.train("gram", what, ".", {}, 8, torch.device("cpu"))
    for _ in range(3):
        next(run)               # ready, and two updates
    assert not os.path.exists("checkpoint.pt")
    run.send(stopped)
    assert kept(".")[0] == 2


@pytest.mark.parametrize("method", ["gmmn-ae", "mmdgan", "sobolev"])
def test_resumed_rows_equal_uninterrupted_ones(method):
    """Steps of the critic only at the first update, bursts, a multiplier that grows; the log to the bit."""
    flags = "--method", method, "--features", export("features-tiny.pt2"), "--steps"
    run_cifar(*flags, 8, "--out", "whole")
    run_cifar(*flags, 4, "--out", "parts")
    run_cifar(*flags, 8, "--out", "parts", "--resume")
    (_, a, log_a), (_, b, log_b) = (kept(f"{out}/cifar-{method}-s0") for out in ("whole", "parts"))
    assert log_a["loss_f"] == log_b["loss_f"] and all(torch.equal(a[path], b[path]) for path in a)


DRIVER = """
import signal, sys; sys.path[:0] = [{root!r}, {tests!r}]
import cifar, common, test_scripts
signal.signal(signal.SIGINT, signal.default_int_handler)    # a shell's background jobs are begun without
for name, value in test_scripts.SMALL.items(): setattr(cifar, name, value)
cifar.METHODS, cifar.LOG_EVERY, cifar.SAVE_EVERY = test_scripts.METHODS, 5, 7
common.run(lambda: cifar.main(["--device", "cpu", "--method", "gram", "gan", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_stopped_and_resumed(ending):
    """kill -9 and Ctrl-C between two rows of the log, then --resume: the same log and weights to the bit."""
    with open("driver.py", "w") as file:
        file.write(DRIVER.format(root=ROOT, tests=os.path.dirname(os.path.abspath(__file__))))
    driver = [sys.executable, "driver.py"]
    stopped = subprocess.Popen([*driver, "--out", "parts", "--steps", "1000000"], stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)
    while not os.path.exists("parts/cifar-gan-s0/checkpoint.pt"):
        assert stopped.poll() is None
        time.sleep(0.01)
    time.sleep(0.1)
    stopped.send_signal(ending)
    error = stopped.communicate()[1]
    if ending == signal.SIGINT:
        assert stopped.returncode == 130 and "--resume" in error and "Traceback" not in error
    reached = [torch.load(f"parts/cifar-{method}-s0/checkpoint.pt", weights_only=True)["step"]
               for method in ("gram", "gan")]
    assert ending == signal.SIGKILL or "stopping" in error and reached[0] == reached[1]     # both have saved
    steps = str(max(reached) // 35 * 35 + 70)
    subprocess.run([*driver, "--out", "parts", "--steps", steps, "--resume"], check=True, capture_output=True)
    subprocess.run([*driver, "--out", "whole", "--steps", steps], check=True, capture_output=True)
    for method in ("gram", "gan"):
        assert same(f"whole/cifar-{method}-s0", f"parts/cifar-{method}-s0")


def test_a_run_s_seconds_are_its_own(monkeypatch):
    """Not those in which the runs beside it are made ready."""
    def slow(*args):
        time.sleep(0.6)
        return dict(milliseconds=None, MiB=None)
    monkeypatch.setattr(common, "measure", slow)
    run_cifar("--steps", 2, "--seeds", 3)
    for seed in range(3):
        with open(f"runs/cifar-gram-s{seed}/result.json") as file:
            assert 0 < json.load(file)["seconds"] < 0.6


def test_an_earlier_run_is_kept(capsys):
    run_cifar("--steps", 2)
    before = kept("runs/cifar-gram-s0")
    run_cifar("--steps", 4)
    assert "now runs/cifar-gram-s0-old-1" in capsys.readouterr().out
    assert str(kept("runs/cifar-gram-s0-old-1")) == str(before) and kept("runs/cifar-gram-s0")[0] == 4
    run_cifar("--steps", 2)
    assert os.path.isdir("runs/cifar-gram-s0-old-2")


# ---- bad days ---------------------------------------------------------------------------------------------


def nan_after(n, real):
    calls = []

    def loss(*args):
        calls.append(args)
        return real(*args) * (float("nan") if len(calls) > n else 1)
    return loss


def test_a_run_that_diverges_stops_alone(monkeypatch, capsys):
    monkeypatch.setattr(common, "gan_critic", nan_after(4, common.gan_critic))
    run_cifar("--method", "gan", "gram", "--steps", 8)
    printed = capsys.readouterr().out
    assert "runs/cifar-gan-s0: diverged at update 6: loss_f is nan" in printed
    row = next(line for line in printed.splitlines() if line.startswith("| gan "))
    assert "0 of 1; seed 0 diverged at update 6" in row
    step, tensors, _ = kept("runs/cifar-gan-s0")
    assert step == 4 and all(torch.isfinite(t.float()).all() for t in tensors.values())     # the last good
    assert kept("runs/cifar-gram-s0")[0] == 8
    monkeypatch.setattr(common, "gan_critic", nan_after(4, common.gan_critic))
    with says("no run finished"):
        run_cifar("--method", "gan", "--steps", 8, "--out", "b")


def test_a_diverged_gram_stops_alone(monkeypatch, capsys):
    """Before its condition number is read off, which a matrix of NaNs has not."""
    left, whole = iter([1.0] * 4), common.gram

    def broken(*args):
        scale = next(left, math.nan)
        return [scale * K for K in whole(*args)]

    monkeypatch.setattr(common, "gram", broken)
    run_cifar("--method", "gram", "gan", "--steps", 8)
    assert "runs/cifar-gram-s0: diverged at update 6: loss_f is nan" in capsys.readouterr().out
    assert kept("runs/cifar-gan-s0")[0] == 8


def test_what_a_run_returns_is_kept_when_it_ends(monkeypatch):
    """Before the runs beside it have ended: here the second of two is stopped on its last line."""
    keep, calls = common.Scorer.keep, []

    def stopped(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return keep(*args)

    monkeypatch.setattr(common.Scorer, "keep", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_cifar("--method", "gram", "gan", "--steps", 2)
    kept_result = json.load(open("runs/cifar-gram-s0/result.json"))
    assert kept_result["updates"] == 2 and kept_result["command"].endswith("--method gram gan --steps 2")
    assert not os.path.exists("runs/cifar-gan-s0/result.json")


def test_training_survives_a_network_that_fails(monkeypatch, capsys):
    features = export("features-tiny.pt2")
    run_cifar("--features", features, "--steps", 2)         # statistics are kept from here on

    def fails(*args, **kwargs):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(common, "extract", fails)
        run_cifar("--features", features, "--steps", 6, "--out", "b")
    assert "b/cifar-gram-s0: not scored: out of memory" in capsys.readouterr().out
    assert kept("b/cifar-gram-s0")[0] == 6 and os.path.exists("b/cifar-gram-s0/samples.npy")
    assert "fd" not in json.load(open("b/cifar-gram-s0/result.json"))
    run_cifar("--features", features, "--steps", 6, "--out", "b", "--resume")
    assert json.load(open("b/cifar-gram-s0/result.json"))["fd"] > 0


def test_bad_input():
    export("rank.pt2", "image")
    open("file", "w").close()
    with says("rank.pt2", "[2, 6, 1, 1]"):
        run_cifar("--features", "rank.pt2")
    with says("nowhere.pt2", "cannot be loaded"):
        run_cifar("--features", "nowhere.pt2")
    with says("static.pt2", "fails on uint8 [3, 3, 32, 32]"):
        run_cifar("--features", export("static.pt2", "plain", dynamic=False))
    with says("file", "name another"):
        run_cifar("--out", "file")
    with says("file", "name another"):
        run_ring("--out", "file/below")
    np.save("data/cifar10-train.npy", np.zeros((7, 3, 32, 32), np.uint8))
    with says("found 7 images, expected 8 or more"):
        run_cifar()
    os.remove("data/cifar10-test.npy")
    np.save("data/cifar10-train.npy", np.zeros((60, 3, 32, 32), np.float64))
    with says("found float64"):
        run_cifar()
    np.save("data/cifar10-train.npy", np.zeros((60, 3, 32, 32), np.uint8))
    with open("data/cifar10-train.npy", "r+b") as file:
        file.truncate(9_999)
    with says("cifar10-train.npy", "no whole .npy file"):
        run_cifar()
    assert sorted(os.listdir()) == ["data", "file", "rank.pt2", "static.pt2"]      # nothing half-written
    os.mkdir("here")
    os.chdir("here")
    run_ring("--out", "", "--steps", 2)         # no folder: this one
    assert os.listdir() == ["ring2d-gram-s0"]


def test_checkpoints_of_other_runs_are_refused(monkeypatch):
    run_cifar("--method", "gram", "gan", "--steps", 2)
    before = kept("runs/cifar-gram-s0")
    monkeypatch.setattr(cifar, "LAMBDA", 0.5)
    with says("cifar-gram-s0/checkpoint.pt", "LAMBDA = 1.0, expected 0.5"):
        run_cifar("--steps", 4, "--resume")
    monkeypatch.setattr(cifar, "LAMBDA", 1.0)
    monkeypatch.setattr(cifar, "METHODS", {"gram": dict(METHODS["gram"], adam=(1.0, 0.5, 0.999))})
    with says("row = ", "expected"):
        run_cifar("--steps", 4, "--resume")
    monkeypatch.setattr(cifar, "METHODS", METHODS)
    shutil.copy("runs/cifar-gan-s0/checkpoint.pt", "runs/cifar-gram-s0/checkpoint.pt")
    with says("method = gan, expected gram"):
        run_cifar("--steps", 4, "--resume")
    open("runs/cifar-gan-s0/checkpoint.pt", "wb").write(b"half")
    with says("no whole checkpoint"):
        run_cifar("--method", "mmdnet", "gan", "--steps", 4, "--resume")
    assert not os.path.exists("runs/cifar-mmdnet-s0")       # refused before any run was begun
    assert str(kept("runs/cifar-gram-s0")[2]) == str(before[2])


@pytest.mark.parametrize("flags, said", [
    (["--method", "gramm"], "invalid choice: 'gramm'"),
    (["--steps", "0"], "expected a whole number of 1 or more"),
    (["--seeds", "two"], "expected a whole number of 1 or more"), (["--device", "abacus"], "--device abacus"),
    (["--features", "none.pt2"], "none.pt2: cannot be loaded"),
])
def test_errors_as_a_user_sees_them(flags, said):
    np.save("data/cifar10-train.npy", np.zeros((64, 3, 32, 32), np.uint8))
    done = subprocess.run([sys.executable, f"{ROOT}/cifar.py", *flags], capture_output=True, text=True)
    assert done.returncode != 0 and said in done.stderr and len(done.stderr.splitlines()) <= 2
    assert os.listdir() == ["data"]


# ---- as a user copies them --------------------------------------------------------------------------------


@pytest.mark.parametrize("script, flags, made", [
    ("ring2d.py", ["--steps", "20"], "runs/ring2d-gram-s0/figure1.png"),
    ("cifar.py", ["--method", "mmdnet", "--steps", "1"], "runs/cifar-mmdnet-s0/samples.npy"),
])
def test_a_script_copied_with_common_alone_runs(script, flags, made):
    images = np.random.default_rng(0).integers(0, 256, (64, 3, 32, 32), np.uint8)
    np.save("data/cifar10-train.npy", images)
    for name in (script, "common.py"):
        shutil.copy(f"{ROOT}/{name}", ".")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, script, "--device", "cpu", *flags], capture_output=True, text=True,
                          env=environment)
    assert done.returncode == 0 and os.path.exists(made), done.stderr


def test_the_copy_in_a_runs_folder_runs():
    run_ring("--steps", 2)
    shutil.copytree("runs", "kept")
    done = subprocess.run([sys.executable, "ring2d.py", "--steps", "20", "--out", ".."], capture_output=True,
                          text=True, cwd="runs/ring2d-gram-s0")
    assert done.returncode == 0, done.stderr
    assert kept("runs/ring2d-gram-s0-old-1")[0] == 2 and kept("runs/ring2d-gram-s0")[0] == 20
    assert open("runs/ring2d-gram-s0/ring2d.py").read() == open("kept/ring2d-gram-s0/ring2d.py").read()


def test_readme_names_what_is_there():
    text = open(f"{ROOT}/README.md").read()
    named = re.findall(r"\((results/[^)]+)\)", text)
    assert len(named) >= 3 and all(os.path.exists(f"{ROOT}/{name}") for name in named)
    assert not re.search("__[A-Z]+__", text)
    functions = text[text.index("| function in `common.py`"):text.index("To adapt it")]
    names = re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (.*?) \|", functions, re.M)))
    assert len(names) > 10 and all(hasattr(common, name) for name in names)


@pytest.mark.parametrize("script", [cifar, mnist, ring2d, ring3d])
def test_help_explains_every_flag(script, capsys):
    with pytest.raises(SystemExit) as end:
        script.main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and script.__doc__.splitlines()[0] in text
    for flag in ("--method", "--seeds", "--steps", "--out", "--resume", "--device"):
        assert flag in text
