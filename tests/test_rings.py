"""ring2d.py and ring3d.py, small: updates by plain formulas, stacks, figures, resuming, command lines."""
import itertools
import json
import math
import os
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import common
import ring2d
import ring3d
from conftest import PLAIN, by_hand, kept, mixture, plain_objective, same, says

SMALL = dict(POINTS=500, LOG_EVERY=4, TRACE_EVERY=2, SAVE_EVERY=4, PANELS=(2, 6), AVERAGE=6, WIDTHS=(5, 10),
             NOISES=(2, 4), AVERAGE_EVERY=2, AVERAGE_POINTS=50, GAMN_HIDDEN=(8, 8), GRID_5=(5, 4, 3),
             DIRAC_STEPS=9, LAMBDA=0.7)         # the second as in plain_objective
s, SAVE = 0.75 ** 0.5, common.save_figure
TILT = torch.tensor([[0.5, 0, -s], [0, 1, 0], [s, 0, 0.5]], dtype=torch.float64)        # by 60 degrees
CUBE = {"gram": {}, "mmdnet": dict(loss="mmd"), "gan": dict(critic_steps=1),        # in ring2d.py's keys
        "mmdgan": dict(loss="mmd", critic_steps=5, clip=0.1, autoencoder=8, feasible=16)}


@pytest.fixture(autouse=True)
def pictures(monkeypatch, tmp_path):
    """Small constants, a folder to work in, and figures by their paths, which are not drawn."""
    for script, (name, value) in itertools.product((ring2d, ring3d), SMALL.items()):
        monkeypatch.setattr(script, name, value, raising=script is ring2d)
    for row in (ring2d.DEFAULTS, ring3d.DEFAULTS, *ring2d.METHODS.values()):
        monkeypatch.setitem(row, "batch", 16)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "save_figure", (found := {}).__setitem__)
    yield found
    torch.set_default_dtype(torch.float32)


def run(script, *flags):
    script.main(["--device", "cpu", *map(str, flags)])


def texts(figure):
    return " | ".join(part.get_text() for part in figure.findobj(lambda part: hasattr(part, "get_text")))


def train(script, name, folder, steps, figure="1", stop=None):
    """The result of a run with seed 1; None of one that was told to stop at an update."""
    os.makedirs(folder, exist_ok=True)
    row, given = script.DEFAULTS | script.METHODS[name], (folder, steps, torch.device("cpu"))
    running = script.train(name, row, *((1, *given) if script is ring3d else ([1], *given, figure)))
    try:
        for step in range((stop or steps) + 1):
            running.send(step == stop if step else None)
    except StopIteration as end:
        return end.value


def formulas(row, f, decoder, x, y, a):
    """Losses of critic and generator, and of GRAM eq. 7 and the mean of r; a: where a slope is held."""
    if row["loss"] == "gram":
        objective, r = plain_objective(row["form"], f(x), f(y), 1e-3, (1.0,))
        mmd2 = by_hand(dict(kernel="own", loss="mmd"), f, None, x, y, 0)[1].square() - 1e-6
        return torch.stack([-objective, mmd2, (r - 1).square().mean(), r.mean()])
    return torch.stack(by_hand(row | dict(kernel="own"), f, decoder, x, y, a))


@pytest.mark.parametrize("script, name", [(script, n) for script in (ring2d, ring3d) for n in script.METHODS])
def test_two_updates_are_the_papers(script, name, monkeypatch):
    """In float64; ring2d.py's rows as a stack of two models, of other widths, noises and data."""
    plane, full, logged = script is ring2d, script.DEFAULTS | script.METHODS[name], []
    row, again = full if plane else full | CUBE[name], not plane and name == "gan"
    torch.set_default_dtype(torch.float64)
    monkeypatch.setitem(PLAIN, "own", mixture(*(sigma ** 2 for sigma in row.get("sigma", (1,)))))
    monkeypatch.setattr(script, "TRACE_EVERY", 1)
    for norm in (nn.LayerNorm, nn.BatchNorm1d):
        monkeypatch.setattr(norm, "reset_parameters", lambda m: [*map(nn.init.normal_, m.parameters())])
    width = 8 if row.get("norms") else 6        # LayerNorm would count what is padded
    cells = [dict(data="ring", z=3, g=(8, 8), f=(8, 8), seed=1),
             dict(data="25 Gaussians", z=5, g=(6, 6), f=(width, width), seed=5)]
    monkeypatch.setattr(ring2d, "cells", lambda *_: cells)
    rng, _ = torch.Generator().manual_seed(1), torch.manual_seed(1)
    members = [ring2d.networks(full, cell) for cell in cells] if plane else [ring3d.networks(full)]
    norms = [isinstance(m, (nn.BatchNorm1d, nn.LayerNorm)) for m in (*members[0][0], *(members[0][1] or ()))]
    assert sum(norms) == 4 * row.get("norms", 0)

    def draw(old=()):                   # data, unless they are those of old, and samples
        x = [x for x, _ in old] or [common.draw_mixture(common.ring_centres(8, 2), 0.2, 16, rng)]
        if plane:
            x.append(common.draw_mixture(*ring2d.mixture("25 Gaussians"), 16, rng))
        elif not old:
            x = [torch.cat([x[0], 0.1 * torch.randn(16, 1, generator=rng)], 1) @ TILT]
        z = torch.randn(len(x) * 16, 5 if plane else 20, generator=rng).view(len(x), 16, -1)
        return [(x_i, m[0](z_i[:, :m[0][0].in_features])) for x_i, m, z_i in zip(x, members, z)]

    def step(batches, *players):        # of critics, 0, of generators, 1, or of both: first every gradient
        slopes = 0 in players and row.get("penalty") and not row["weights"]
        a = torch.rand(2, 16, 1, generator=rng) if slopes else [0, 0]
        losses = sum(formulas(row, *m[1:], *batch, a_i) for m, batch, a_i in zip(members, batches, a))
        for i in players:
            opts[i].zero_grad()
            losses[i].backward(inputs=weights[i], retain_graph=True)
        for i in players:
            opts[i].step()
        return losses.detach().numpy() / len(members)

    weights = [[p for m in members for net in m[part] if net for p in net.parameters()]
               for part in (slice(1, 3), slice(1))]
    opt = torch.optim.RMSprop if name in ("mmdnet", "wgan") else partial(torch.optim.Adam, betas=row["beta"])
    opts = [own and opt(own, row["lr"]) for own in weights]
    for _ in range(2):
        batches, critics = () if plane else draw(), []
        for _ in range(row.get("critic_steps", 0)):
            critics.append(step(batches if again else draw(), 0)[0])
            for p in (p for _, f, _ in members if row.get("clip") for p in f.parameters()):
                p.data.clamp_(-row["clip"], row["clip"])
        found = step(draw(batches) if again or plane else batches, *[0] * (row["loss"] == "gram"), 1)
        logged.append([np.mean(critics or found[0] if len(found) > 2 or critics else math.nan), *found[1:]])
    train(script, name, "run", 2)
    _, state, log = kept("run")
    for key, own in zip(("g.", "players.f.", "players.decoder."), zip(*members)):
        if own[0]:                      # of a stack padded with zeros
            own = (ring2d.Stack(own) if plane else own[0]).state_dict()
            close = {path: torch.allclose(state[tuple((key + path).split(".", 1))], t, rtol=1e-6, atol=1e-7)
                     for path, t in own.items()}
            assert all(close.values()), close
    for column, values in zip(script.COLUMNS, zip(*logged)):
        assert log[column] == pytest.approx(values, rel=1e-6, abs=1e-9, nan_ok=True), column


def test_models_that_diverge(monkeypatch):
    """One of a stack leaves the others as they were, and the run goes on; a run of one model ends."""
    networks, _ = ring2d.networks, train(ring2d, "mmdgan", "whole", 6, "2")

    def broken(row, cell):
        parts = networks(row, cell)
        parts[0][0].weight.data *= math.nan if cell["z"] in (4, 20) and cell["g"][0] != 10 else 1
        return parts
    monkeypatch.setattr(ring2d, "networks", broken)
    found = [(m["g"][0], m["z"], m["diverged"]) for m in train(ring2d, "mmdgan", "broken", 6, "2")["members"]]
    assert found == [(5, 2, False), (5, 4, True), (10, 2, False), (10, 4, False)]
    (step, a, log), (_, b, _) = kept("broken"), kept("whole")
    assert all(torch.equal(a[path][[0, 2, 3]], b[path][[0, 2, 3]]) for path in a if "network" in path[1])
    assert step == 6 and np.isfinite(log["loss_g"]).all()
    with says("no run finished"):
        run(ring2d, "--method", "gan", "--steps", 6)
    assert "diverged at update 1: loss_f is nan" in open("runs/ring2d-gan-s0/result.json").read()


def test_success():
    """Samples at each of 7 modes, and far off, of 1,000: 2% at each mode, 80% in all, all finite."""
    centres, std = ring2d.mixture("ring")
    for each, far, one, *found in ((21, 190, 9, 8, True), (19, 190, 9, 1, False), (21, 210, 9, 8, False),
                                   (21, 190, math.nan, 8, False)):
        y = centres[:7].repeat(each, 1), centres[7:].repeat(1000 - 7 * each - far, 1)
        y = torch.cat([torch.cat(y) + torch.tensor([0.59, 0]), torch.full((far, 2), 9.0)])
        y[-1] = one
        assert [ring2d.coverage(y, centres, std)[key] for key in ("modes", "success")] == found


@pytest.mark.parametrize("method, said", [
    ("gram", "eq. 7"), ("gram-swap", "r = q / p at data"), ("gan", "critic's loss")])
def test_figure_1(method, said, pictures):
    """What it says; crosses at the panels: the estimate between batches of the data."""
    run(ring2d, "--method", method, "--steps", 6)
    [figure], folder, gram = pictures.values(), f"runs/ring2d-{method}-s0", method != "gan"
    log, wanted = common.read_log(folder), []
    assert "update 2: data space" in texts(figure) and f"{said} | " in texts(figure)
    with Image.open(f"{folder}/training.gif") as film:          # points in both panels, to the last frame
        film.seek(film.n_frames - 1)
        pixels = np.asarray(film.convert("RGB")).astype(int)
    coloured = abs(pixels - pixels.mean(2, keepdims=True)).max(2) > 40
    assert all(half.any() for half in np.split(coloured, [pixels.shape[1] // 2], 1)) and film.n_frames > 1
    *curves, crosses = (list(line.get_ydata()) for line in figure.axes[-2].lines)
    assert curves == [list(log[key]) for key in ("loss_g", "pearson" if gram else "loss_f")]
    for step in (2, 6) if gram else ():
        parts = torch.from_numpy(np.load(f"{folder}/points-{step}.npz")["f_x"][0, :80]).split(16)
        pairs = itertools.permutations(parts, 2)
        r = torch.stack([plain_objective(method[5:] or "sum", *pair, 1e-3, (1,))[1] for pair in pairs])
        wanted.append(float((r - 1).square().mean()))
    assert crosses == pytest.approx(wanted, rel=1e-2)


def test_figure_2(pictures, monkeypatch):
    """Tables of 2 x 2 cells, 2 seeds and two methods, one of them with successes; finished runs are kept."""
    plain, turn = ring2d.coverage, itertools.count()
    monkeypatch.setattr(ring2d, "coverage", lambda *a: plain(*a) | dict(success=next(turn) in (0, 2, 3, 4)))
    run(ring2d, "--figure", 2, "--method", "gram+critic=10", "gan", "--steps", 4, "--seeds", 2)
    lines = open("runs/ring2d-figure2.md").read().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert [row[:4] for row in rows[2:4]] == [["gram+critic=10", "4", "3", "1"], ["gan", "4", "0", "0"]]
    assert [row[-1] for row in rows[6:10]] == ["2 of 2", "0 of 2", "1 of 2", "1 of 2"]
    members = json.load(open("runs/ring2d-figure2-gan/result.json"))["members"]
    assert [row[:5] for row in rows[10:]] == [
        ["gan", *map(str, (a["g"][0], a["z"])), f"{a['modes']} {b['modes']}",
         f"{a['share']:.2f} {b['share']:.2f}"] for a, b in zip(members[:4], members[4:])]
    assert texts(pictures["runs/ring2d-figure2-gan/figure2.png"]).count("width ") == 4
    run(ring2d, "--figure", 2, "--method", "gan", "--steps", 4, "--seeds", 2)
    assert not os.path.exists("runs/ring2d-figure2-gan-old-1")


def test_figure_gamn(pictures):
    """Its MMD: a mean over the last updates, each of fresh points."""
    run(ring2d, "--figure", "gamn", "--method", "gmmn", "gmmn+lr=0", "--steps", 8, "--seeds", 2)
    text, folder = open("runs/ring2d-figuregamn.md").read(), "runs/ring2d-figuregamn-gmmn+lr=0"
    assert "0.281 0.291 0.289 |" in text and "two samples of the data" in text and len(pictures) == 1
    mmds = kept(folder)[1]["players", "mmds"].double()
    own = [m["mmd"] for m in json.load(open(f"{folder}/result.json"))["members"]]
    assert mmds.unique().numel() == 3 * 6 and mmds.mean(0).tolist() == pytest.approx(own)
    assert all(f" {common.mean_std(own[i:i + 2], 4)} " in text for i in (0, 2, 4))
    x, y = torch.randn(2, 9, 2), torch.randn(2, 9, 2) + 1
    k = mixture(*(sigma ** 2 for sigma in (0.05, 0.1, 0.2, 0.5, 1, 2)))
    wanted = [float(k(a, a).mean() + k(b, b).mean() - 2 * k(a, b).mean()) ** 0.5 for a, b in zip(x, y)]
    assert ring2d.average_mmd(x, y).tolist() == pytest.approx(wanted, rel=1e-4)


def test_figures_of_scaled_mmd(capsys, pictures):
    """What is printed, of Figure 1 by the formula 2 - 2 exp(-(theta psi)^2 / 2), and the panels.

    The witness is k(psi t, 0) - k(psi t, psi theta); where each distance has its limit: results/rings.md.
    """
    for name in ("dirac", "gaussians"):
        ring2d.main(["--figure", name])
    printed, found = capsys.readouterr().out, []

    def witness(t, theta, psi):
        return (-(psi * t) ** 2 / 2).exp() - (-(psi * (t - theta)) ** 2 / 2).exp()
    for scaled, weight in ((0, 0), (0, 1), (1, 0)):
        at = torch.tensor([[1, 0.5], [-3, 0.3], [3, 3]], dtype=torch.float64, requires_grad=True)
        for _ in range(9):
            theta, psi = at.T
            loss = (2 - 2 * (-at.prod(1) ** 2 / 2).exp()) / (1.1 + psi ** 2) ** scaled
            d_theta, d_psi = torch.autograd.grad(loss.sum(), at)[0].T
            for a in ring2d.DIRAC_BETWEEN.tolist() if weight else ():
                slopes = [(witness(a * theta + 1e-5, theta, p) - witness(a * theta - 1e-5, theta, p)) / 2e-5
                          for p in (psi + 1e-4, psi - 1e-4)]
                more, less = ((slope.abs() - 1).square() / len(ring2d.DIRAC_BETWEEN) for slope in slopes)
                d_psi = d_psi - (more - less) / 2e-4
            at = (at + 0.05 * torch.stack([-d_theta, d_psi], 1)).detach().requires_grad_()
        found += [f"theta {theta:.2g}, psi {psi:.2g} after" for theta, psi in at.tolist()]
    assert all(end in line for end, line in zip(found, printed.splitlines()))
    low, _, high = printed.split("over the grid: ")[1].split()
    assert 0 < float(low) < float(high) <= 1 and "Sobolev: largest gradient" in printed     # SMMD is smaller
    psi = np.linspace(0.1, 5, 10_000) ** 2                  # Proposition 5 at theta = 1
    scaled = ((2 - 2 * np.exp(-psi / 2)) / (1.1 + psi)).max() ** 0.5
    for name, first, last in (("MMD", 2 ** 0.5, 2 ** 0.5), ("SMMD", scaled, 1e-4),
                              ("gradient-constrained MMD", *2 * [(1 / 0.1 + 1 / 1.1) ** 0.5])):
        [line] = [line for line in printed.splitlines() if line.startswith(f"{name} of delta_0")]
        words = line.split(": ")[1].split()
        assert [float(words[0]), float(words[5])] == pytest.approx([first, last], rel=5e-3)
    assert [len(figure.axes) for figure in pictures.values()] == [9, 2, 12]


def test_share_of_the_divergence_that_features_keep():
    """Linear features of Gaussians, against E_q r^2 in closed form, in their space over the points'."""
    def second(m, P, Q):            # E_q r^2 of N(m, P) over N(0, Q)
        A = 2 * P.inverse() - Q.inverse()
        b = 2 * P.inverse() @ m
        return (Q.det().sqrt() / (P.det() * A.det().sqrt())
                * (b @ A.inverse() @ b / 2 - m @ P.inverse() @ m).exp())
    torch.manual_seed(0)
    pairs = list(ring2d.ratio_pairs().values())
    for p, q in pairs:
        y = q.sample([200_000])
        r = (p.log_prob(y) - q.log_prob(y)).exp()
        assert float(r.mean()) == pytest.approx(1, abs=0.02)
        if isinstance(p, torch.distributions.Independent):
            m, P = p.mean, p.variance.diag()
            whole = float(second(m, P, torch.eye(len(m))))
            assert float(r.square().mean()) == pytest.approx(whole, rel=0.1)
    p, q = pairs[1]                 # in five dimensions
    y, m, P = q.sample([2_000]), p.mean.double(), p.variance.diag().double()
    r = (p.log_prob(y) - q.log_prob(y)).exp().double()
    whole = float(second(m, P, torch.eye(5, dtype=torch.float64)))
    for columns in ([0], [1], [0, 1], [4], [0, 1, 2, 3]):
        W = torch.eye(5, dtype=torch.float64)[:, columns] + 0.2
        h = y.double() @ W
        r_f, share = ring2d.explained(h, r)
        laws = (W.T @ m, W.T @ P @ W), (0 * W[0], W.T @ W)
        assert share == pytest.approx(float((second(*laws[0], W.T @ W) - 1) / (whole - 1)), abs=0.06)
        log_p, log_q = (torch.distributions.MultivariateNormal(*law).log_prob(h) for law in laws)
        exact = (log_p - log_q).exp()
        assert float((r_f - exact).square().mean() / r.var()) < 0.08
    assert ring2d.explained(torch.zeros(2_000, 2).double(), r)[1] == pytest.approx(0, abs=0.05)     # dead


@pytest.mark.parametrize("name", ["gram", "gram-swap", "gram-clip", "mmdgan", "gan"])
def test_critics_alone_learn_their_objective(name, monkeypatch):
    """What each maximises is the papers' formula; a critic with fewer outputs is padded with zeros."""
    row, (p, q) = ring2d.row_of(name)[1], ring2d.ratio_pairs()["Gaussians in 2 dimensions"]
    seen, losses, plain = [law.sample([64]) for law in (p, q)], [], common.descend
    monkeypatch.setattr(common, "descend", lambda player: (losses.append(player[1]), plain(player)))
    torch.manual_seed(3)
    found = ring2d.critics_alone(row, p, q, (8,), seen, 3)
    assert list(found) == [0, 3] and found[0][0].shape == (len(ring2d.RATIO_K), 64, max(ring2d.RATIO_K))
    torch.manual_seed(3)
    nets = [common.mlp(2, 8, K) for K in ring2d.RATIO_K]
    logits = [common.mlp(K, 1) for K in ring2d.RATIO_K]
    x, y = (law.sample([ring2d.RATIO_BATCH]) for law in (p, q))
    for f, logit, h, loss in zip(nets, logits, found[0][1], losses[0]):
        assert torch.allclose(f(seen[1]), h[:, :f[-1].out_features], atol=1e-6)
        if name == "gan":
            wanted = nn.functional.softplus(-logit(f(x))).mean() + nn.functional.softplus(logit(f(y))).mean()
        elif name == "mmdgan":
            sets = itertools.combinations_with_replacement((f(x), f(y)), 2)
            xx, xy, yy = ((-torch.cdist(*pair) ** 2 / 2).exp().mean() for pair in sets)
            wanted = -(xx + yy - 2 * xy).sqrt()
        else:
            wanted = -plain_objective(row["form"], f(x).double(), f(y).double(), 1e-3, (1.0,))[0]
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-3)
        assert not h[:, f[-1].out_features:].any()


def test_figures_ratio_and_k(capsys, pictures, monkeypatch):
    for name, value in dict(RATIO_POINTS=80, NEAREST=20, RATIO_N=(20, 40), RATIO_BATCH=10).items():
        monkeypatch.setattr(ring2d, name, value)
    run(ring2d, "--figure", "ratio", "--method", "gan", "gram", "--steps", 12, "--seeds", 2)
    printed = capsys.readouterr().out.splitlines()
    assert sum(" MLP " in line for line in printed) == sum(" linear " in line for line in printed) == 4 * 2
    assert sum("estimation error" in line for line in printed) == 4 * len(ring2d.RATIO_RIDGES)
    figure = pictures["runs/ring2d-figureratio.png"]
    assert len(figure.axes) == 16 and list(figure.axes[0].lines[0].get_xdata()) == [0, 10, 12]
    with says("--figure ratio", "gram, mmd or gan"):
        run(ring2d, "--figure", "ratio", "--method", "wgan")
    run(ring2d, "--figure", "k", "--steps", 3, "--seeds", 2, "--method", "gram+critic=4", "mmdgan")
    table = open("runs/ring2d-figurek.md").read()
    member = json.load(open("runs/ring2d-figurek-gram+critic=4/result.json"))["members"]
    assert f"| gram+critic=4 | {member[0]['modes']} {member[1]['modes']} " in table and "0 of 2" in table
    assert texts(pictures["runs/ring2d-figurek.png"]).count(" modes") == 2


@pytest.mark.parametrize("off, share", [(0.59, 1), (0.61, 0)])
def test_ring3d_counts(off, share, monkeypatch, pictures):
    """All samples are so far above one mode."""
    g = nn.Linear(20, 3)
    g.weight.data, g.bias.data = torch.zeros(3, 20), torch.tensor([2.0, 0.0, off]) @ TILT.float()
    monkeypatch.setattr(ring3d, "networks", lambda row: (g, None, None))
    run(ring3d, "--method", "mmdnet+lr=0", "--steps", 6)
    found, text = json.load(open("runs/ring3d-mmdnet+lr=0-s0/result.json")), texts(*pictures.values())
    assert (found["share"], found["modes"], found["samples"]) == (share, share, 500)
    assert f"{share} of 8 modes" in text and "update 6: data space" in text


@pytest.mark.parametrize("script, name, figure", [
    (ring2d, "gram", "1"), (ring2d, "mmdgan", "1"), (ring2d, "gan", "2"), (ring2d, "gmmn", "gamn"),
    (ring3d, "gram", "6")])
def test_a_stopped_run_goes_on_bit_for_bit(script, name, figure):
    whole = train(script, name, "whole", 9, figure)
    assert train(script, name, "parts", 9, figure, stop=3) is None and kept("parts")[0] == 3
    parts = train(script, name, "parts", 9, figure)
    assert same("whole", "parts") and str(whole | dict(seconds=0)) == str(parts | dict(seconds=0))


def test_gram_learns():
    first, last = (train(ring2d, "gram", f"run{n}", n)["members"][0]["share"] for n in (1, 300))
    assert first < 0.05 and last > 0.2


def test_the_command_line(capsys, pictures):
    """Files, rows of the log, a row with another key, an earlier run put aside, help, a mistyped row."""
    run(ring2d, "--method", "gram", "gram+std=0.01", "--steps", 105)
    folder, other = "runs/ring2d-gram-s0", "runs/ring2d-gram+std=0.01-s0"
    assert {*os.listdir(folder)} >= {"checkpoint.pt", "common.py", "ring2d.py", "points-105.npz"}
    assert common.read_log(folder)["step"].tolist() == [*range(1, 101), 102, 104, 105]
    assert abs(np.linalg.norm(np.load(f"{other}/points-6.npz")["x"][0], axis=1) - 2).max() < 0.05
    run(ring2d, "--steps", 1)           # ends before its first panel
    assert os.path.exists(f"{folder}-old-1")
    for path, figure in pictures.items():
        SAVE(path, figure)
    for script in (ring2d, ring3d):
        with says("found the row 'grom'", "did you mean gram?"):
            run(script, "--method", "grom")
        capsys.readouterr()
        with pytest.raises(SystemExit):
            run(script, "--help")
        assert len(capsys.readouterr().out.splitlines()) <= 70
