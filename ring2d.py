"""The plane in three papers: rings of Gaussians, grids, a Swiss roll, and what stable means, counted.

    python ring2d.py                       Figure 1 of GRAM: 1 to 4 minutes on a CPU core
    python ring2d.py --method mmdgan       Figure 9a of GRAM: 5 minutes; gan, mmdnet likewise
    python ring2d.py --figure 2            Figures 2 and 7 of GRAM: 144 runs, 8 minutes on an H200
    python ring2d.py --figure gamn         Figure 1 and Table 1 of GAMN: 45 runs, 4 minutes on an H200
    python ring2d.py --figure dirac        Figure 1 of Scaled MMD: 10 seconds on a CPU
    python ring2d.py --figure gaussians    Figures 4 and 5 of Scaled MMD: 45 seconds on a CPU

Expect of the first 8 of 8 modes, and 0.89 of the samples within 3 std of a mode (three seeds; of data 0.989);
of Figure 2, that GRAM succeeds in 12 of 12 settings. A run goes to runs/ring2d-METHOD-sSEED/, or all of a
method to runs/ring2d-figureNAME-METHOD/: figure1.png or figure2.png, points-UPDATE.npz, log.csv,
checkpoint.pt, result.json; what compares methods is runs/ring2d-figureNAME.md and .png.
"""
import itertools
import math
import sys
from functools import partial

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

import common

# figure: its methods, seeds and updates, if no flag names others. The paper trains Figure 2 for 2,000 epochs,
# MMD-GAN for 4,000: of 60,000 points, by 200, these are 600,000 and 1,200,000 updates. GAMN does not say.
FIGURES = {
    "1":         dict(method=["gram"], seeds=1, steps=10_000),
    "2":         dict(method=["gan", "gram", "mmdnet", "mmdgan"], seeds=3, steps=60_000),
    "gamn":      dict(method=["wgan", "wgan-gp", "gmmn", "gamn", "gamn-mmd"], seeds=3, steps=5_000),
    "dirac":     {},
    "gaussians": {},
}
MODES, RADIUS = 8, 2.0              # JuliaGRAM; the paper gives no radius
STD = 0.2                           # JuliaGRAM; the paper says 0.01
HIDDEN, Z, K = (100, 100), 20, 2    # GRAM, section 3.4; Z, of N(0, I), JuliaGRAM, scripts/predefined_args.jl
WIDTHS, NOISES = (20, 100, 200), (2, 4, 8, 16)      # Figure 2: of the generator's two layers, of its noise
K_FIGURE_2 = 10                     # appendix B.1
SUCCESS = (0.02, 0.8)               # ours: this share of the samples or more in each mode, and in all modes
GAMN_SETS = ("8 Gaussians", "25 Gaussians", "Swiss roll")
GAMN_HIDDEN, GAMN_Z, GAMN_K = (512, 512, 512), 2, 10    # GAMN, "Experiments"; Z, of N(0, I), gan_toy.py
GAMN_SIGMA = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)        # ours: the paper names none; these span the sets' scales
AVERAGE, AVERAGE_EVERY = 1_000, 10  # Table 1's MMD: a mean over the last so many updates, of every tenth
AVERAGE_POINTS = 1_000              # ours: between so many fresh samples and as many fresh data
BATCH = 200                         # of data and of samples, GRAM, appendix B.1
SIGMA = (1.0,)                      # appendix B.1
RIDGE = 1e-3                        # JuliaGRAM, src/kmm.jl; not in the paper
LAMBDA = 1.0                        # GRAM, eq. 9
SCALED_LAMBDA = 0.1                 # Figure 1 of Scaled MMD, as its section 4; 1 in its Figure 5
PANELS = (10, 100, 1_000, 10_000)   # updates, Figure 1a
GRID_5 = (31, 25, 25)               # of mu, of sigma and of psi, Figure 5 of Scaled MMD
POINTS = 10_000                     # samples on which modes and shares are counted
DIRAC_STEPS, DIRAC_RATE = 4_000, 0.05   # of gradient descent and ascent at once
LOG_EVERY = 1_000                   # rows in the terminal
TRACE_EVERY = 10                    # rows in log.csv after the 100th update, one for each before, Figure 1b
SAVE_EVERY = 5_000                  # a multiple of TRACE_EVERY: what is saved has been seen to be finite

# distance and the weights of its terms: common.Game says, but for gram. critic: its outputs, 0 for no critic.
# steps: of the critic to one of the generator; gram moves both at once. adam: rate, betas; rmsprop: rate.
# clip: bound of the critic's weights. GRAM's, GAN's, MMD-net's and MMD-GAN's numbers are in GRAM, appendix
# B.1 and B.3, those of WGAN and WGAN-GP in improved_wgan_training, gan_toy.py. GAMN names none: steps, rates
# and the weight 10 are those of WGAN-GP on images, the other weights ours; GMMN has a batch of 1,000 there.
GRAM = dict(distance="gram", critic="K", steps=0, adam=(1e-3, 0.5, 0.999))
GAMN = dict(distance="mmd", critic="K", steps=5, adam=(1e-4, 0.5, 0.9), batch=256, sigma=GAMN_SIGMA,
            norm=("batch", "layer"))
METHODS = {
    "gram":        dict(GRAM, form="sum"),          # eq. 9, the paper's
    "gram-mean":   dict(GRAM, form="mean"),
    "gram-clip":   dict(GRAM, form="clip"),
    "gram-swap":   dict(GRAM, form="swap"),         # eq. 9 with p and q exchanged, cifar.py's gram
    "gram-flow":   dict(GRAM, form="flow"),         # its second term alone, cifar.py's gram-flow
    "gan":         dict(distance="gan", critic=1, steps=1, adam=(1e-4, 0.5, 0.999)),
    "mmdnet":      dict(distance="mmd", critic=0, steps=0, rmsprop=1e-3),
    "mmdgan":      dict(distance="mmd", critic="K", steps=5, adam=(5e-5, 0.5, 0.999), clip=0.1,
                        autoencoder=8.0, feasible=16.0,         # Li et al.'s weights
                        panels=(100, 500, 1_000)),              # updates, Figure 9
    "wgan":        dict(distance="wasserstein", critic=1, steps=5, rmsprop=5e-5, batch=256, clip=0.01),
    "wgan-gp":     dict(distance="wasserstein", critic=1, steps=5, adam=(1e-4, 0.5, 0.9), batch=256,
                        penalty=("gradient", 0.1)),
    "gmmn":        dict(distance="mmd", critic=0, steps=0, adam=(1e-4, 0.5, 0.9), batch=256,
                        sigma=GAMN_SIGMA),
    "gamn":        dict(GAMN, penalty=("gradient", 10.0)),                  # eq. 7
    "gamn-mmd":    dict(GAMN, penalty=("gradient", 10.0), data_mmd=True),   # the advice of its "Robustness"
    "gamn-l1":     dict(GAMN, penalty=("l1", 1e-3)),                        # eq. 9
    "gamn-l2":     dict(GAMN, penalty=("l2", 1e-3)),                        # eq. 8
    "gamn-l2-all": dict(GAMN, penalty=("l2-all", 1e-3)),                    # "classical L2", its footnote 3
}
COLUMNS = ("loss_f", "loss_g", "pearson", "mean_r")
GAMN_PAPER = {"wgan": (0.300, 0.312, 0.305), "wgan-gp": (0.285, 0.294, 0.298),     # Table 1
              "gmmn": (0.281, 0.291, 0.289), "gamn": (0.276, 0.284, 0.286)}


def cells(figure, seeds):
    """The runs of a figure that one method trains as one Stack: what is drawn, sizes, seed."""
    if figure == "2":
        return [dict(data="ring", z=z, g=(width, width), f=HIDDEN, k=K_FIGURE_2, seed=seed)
                for seed, width, z in itertools.product(seeds, WIDTHS, NOISES)]
    if figure == "gamn":
        return [dict(data=name, z=GAMN_Z, g=GAMN_HIDDEN, f=GAMN_HIDDEN, k=GAMN_K, seed=seed)
                for name, seed in itertools.product(GAMN_SETS, seeds)]
    return [dict(data="ring", z=Z, g=HIDDEN, f=HIDDEN, k=K, seed=seed) for seed in seeds]


def mixture(name):
    """Centres [modes, 2] and std of a set; but for the ring, those of improved_wgan_training, gan_toy.py."""
    return {"ring":         (common.ring_centres(MODES, RADIUS), STD),
            "8 Gaussians":  (common.ring_centres(8, 2) / 1.414, 0.02 / 1.414),
            "25 Gaussians": (common.grid_centres(5, 2) / 2.828, 0.05 / 2.828),
            "Swiss roll":   (common.swiss_roll_centres(2_000) / 7.5, 0.25 / 7.5)}[name]


def networks(row, cell):
    """Generator, critic and decoder of a run, None for what its method has not."""
    torch.manual_seed(cell["seed"])
    out = cell["k"] if row["critic"] == "K" else row["critic"]
    kinds = {"batch": partial(nn.BatchNorm1d, track_running_stats=False), "layer": nn.LayerNorm, None: None}
    norm_g, norm_f = (kinds[name] for name in row.get("norm", (None, None)))
    return (common.mlp(cell["z"], *cell["g"], 2, norm=norm_g),
            common.mlp(2, *cell["f"], out, norm=norm_f) if out else None,
            common.mlp(out, *cell["f"][::-1], 2) if "autoencoder" in row else None)


def train(method, members, folder, settings, steps, device):
    """Runs of one method as one Stack: a generator that yields when ready and after each update.

    It is sent whether to save. members: the runs, as cells() has them. Returns their result, what is counted
    of each under "members".
    """
    row = METHODS[method]
    built = [networks(row, member) for member in members]
    g, f, decoder = (common.Stack(own).to(device) if own[0] else None for own in zip(*built))
    B, batch = len(members), row.get("batch", BATCH)

    rng = torch.Generator(device).manual_seed(members[0]["seed"])
    log = common.Log(folder, COLUMNS, steps, device)
    table_1 = nn.Module()       # the MMDs to average, a part of the checkpoint
    table_1.register_buffer("mmd", torch.zeros(AVERAGE // AVERAGE_EVERY, B, device=device))
    kernel = partial(common.gaussian, sigma=torch.tensor(row.get("sigma", SIGMA), device=device))
    game = common.Game(row, f, decoder, kernel, rng).to(device)
    opt_g = common.optimizer(g, row.get("adam"), row.get("rmsprop"))
    state = dict(g=g, opt_g=opt_g, rng=rng, log=log, table_1=table_1)
    if f:
        opt_f = common.optimizer(game, row.get("adam"), row.get("rmsprop"))
        state |= dict(game=game, opt_f=opt_f)

    dims = torch.tensor([[[member["z"]]] for member in members], device=device)
    present = (torch.arange(int(dims.max()), device=device) < dims).float()         # [B, 1, Z]
    sets = [(*mixture(name), len(list(own))) for name, own in itertools.groupby(m["data"] for m in members)]
    sets = [(centres.to(device), std, own) for centres, std, own in sets]

    def data(n, rng):       # [B, n, 2]
        return torch.cat([common.draw_mixture(centres, std, own * n, rng).view(own, n, 2)
                          for centres, std, own in sets])

    def noise(n, rng):      # [B, n, Z], 0 where a member has less
        Z_all = present.shape[-1]
        return common.normal_noise(B * n, Z_all, rng).view(B, n, Z_all) * present

    def update():
        loss_f = None
        for _ in range(row["steps"]):
            loss_f = game.critic(data(batch, rng), g(noise(batch, rng)).detach())
            common.descend((opt_f, loss_f))
            if "clip" in row:
                common.clip_weights(f, row["clip"])
        x, y = data(batch, rng), g(noise(batch, rng))
        if row["distance"] != "gram":
            loss_g, _, _ = game.generator(x, y)
            common.descend((opt_g, loss_g))
            log.add(loss_f, loss_g, None, None)
        else:               # GRAM, Algorithm 1: one forward pass, one K, both gradients, both steps
            K_all = common.gram(kernel, f(x), f(y))
            objective, r = common.gram_objective(*K_all, row["form"], RIDGE, LAMBDA)
            loss_g = common.mmd2(*K_all)
            common.descend((opt_f, -objective), (opt_g, loss_g))
            log.add(-objective, loss_g, common.pearson(r), r.mean(-1))

    @torch.no_grad()
    def points(n, seed=0):          # the same draws at every update, [B, n, ...]
        fixed = torch.Generator(device).manual_seed(seed)
        x, y = data(n, fixed), g(noise(n, fixed))
        return dict(x=x, y=y, f_x=f(x), f_y=f(y)) if f else dict(x=x, y=y)

    averaged = members[0]["data"] in GAMN_SETS
    step = common.load(folder, state, settings)
    update = common.capture(update, state)
    yield                               # when all runs are ready, the clock starts
    log.start(step)
    while step < steps:
        update()
        step += 1
        if step <= 100 or step % TRACE_EVERY == 0 or step == steps:
            log.row(step, shown=step % LOG_EVERY == 0)
        if step in row.get("panels", PANELS) or step == steps:
            with common.replacing(f"{folder}/points-{step}.npz") as file:
                np.savez(file, **{name: t.cpu() for name, t in points(1_000).items()})
        left = steps - step
        if averaged and left < AVERAGE and left % AVERAGE_EVERY == 0:
            table_1.mmd[left // AVERAGE_EVERY] = average_mmd(points(AVERAGE_POINTS, step))
        if (yield) or step % SAVE_EVERY == 0 or step == steps:
            common.save(folder, step, state, settings)

    samples = points(POINTS)["y"].cpu()
    counted = [dict(member, **coverage(y, *mixture(member["data"]))) for member, y in zip(members, samples)]
    if averaged:
        mmds = table_1.mmd[:math.ceil(min(AVERAGE, steps) / AVERAGE_EVERY)].mean(0).tolist()
        counted = [dict(member, mmd=mmd if math.isfinite(mmd) else None)
                   for member, mmd in zip(counted, mmds)]
    return dict(method=method, members=counted, updates=step, samples=POINTS, seconds=log.seconds,
                **common.machine(device))


def coverage(y, centres, std):
    """What is counted of the samples of one run: [N, 2] to a dict."""
    masses = common.mode_masses(y, centres, std)
    return dict(modes=int((masses >= SUCCESS[0]).sum()), share=float(masses.sum()), least=float(masses.min()),
                most=float(masses.max()), diverged=not bool(y.isfinite().all()))


def average_mmd(sets):
    """Table 1's MMD of each member, eq. 4: points [B, n, 2] of data and samples to [B]."""
    kernel = partial(common.gaussian, sigma=torch.tensor(GAMN_SIGMA, device=sets["x"].device))
    return torch.stack([common.mmd(*common.gram(kernel, x, y)) for x, y in zip(sets["x"], sets["y"])])


def pearson_of_equals(f_x, form):
    """The estimate of the Pearson divergence between batches of the same features [N, K], where it is 0."""
    kernel, batches = partial(common.gaussian, sigma=torch.tensor(SIGMA)), torch.from_numpy(f_x).split(BATCH)
    ratios = [common.gram_objective(*common.gram(kernel, a, b), form, RIDGE, LAMBDA)[1]
              for a, b in itertools.permutations(batches[:5], 2)]
    return float(np.mean([float(common.pearson(r)) for r in ratios]))


def figure_1(folder, method, result):
    """Figure 1 or 9a of GRAM: both spaces during training, and the traces of the losses."""
    figure, result = Figure(figsize=(10, 8.2), layout="constrained"), result | result["members"][0]
    grid, row, equals = figure.add_gridspec(3, 4), METHODS[method], {}
    panels = row.get("panels", PANELS)
    for column, step in enumerate(step for step in panels if step <= result["updates"]):
        p = np.load(f"{folder}/points-{step}.npz")
        top = figure.add_subplot(grid[0, column])
        common.scatter_panel(top, p["x"][0], p["y"][0], f"update {step:,}: data space")
        if "f_x" in p:
            bottom = figure.add_subplot(grid[1, column])
            common.scatter_panel(bottom, p["f_x"][0], p["f_y"][0], "critic's space")
        if column == 0:
            top.legend(fontsize=7, markerscale=3)
        if row["distance"] == "gram":
            equals[step] = pearson_of_equals(p["f_x"][0], row["form"])
    trace, curves = common.read_log(folder), {"generator's loss": "loss_g", "critic's loss": "loss_f"}
    if row["distance"] == "gram":
        eq_7 = "r = q / p at data" if row["form"] in common.AT_DATA else "eq. 7"
        curves = {"generator's loss, eq. 10": "loss_g",
                  f"Pearson divergence estimate mean((r - 1)$^2$), {eq_7}": "pearson"}
        figure.supxlabel("The paper draws D* (eq. 5), a constant minus the Pearson divergence; the constant "
                         "is unknown.", fontsize=8)
    left = figure.add_subplot(grid[2, :2])
    right = figure.add_subplot(grid[2, 2:], sharey=left)
    for axes, part in ((left, trace["step"] <= 100), (right, trace["step"] >= 100)):
        common.curve_panel(axes, trace["step"][part], {
            label: trace[name][part] for label, name in curves.items() if np.isfinite(trace[name]).any()})
        shown = {step: value for step, value in equals.items() if step in trace["step"][part]}
        if shown:
            axes.plot(list(shown), list(shown.values()), "kx", label="the same of data and data: truly 0")
    right.legend(fontsize=7)
    figure.suptitle(f"{method}, {result['updates']:,} updates: {result['modes']} of {MODES} modes, "
                    f"{result['share']:.3f} of the samples within 3 std of a mode", fontsize=11)
    common.save_figure(f"{folder}/figure1.png", figure)


def succeeds(member):
    """Whether a run of Figure 2 has learnt the ring: finite, each mode and all of them have their share."""
    return not member["diverged"] and member["least"] >= SUCCESS[0] and member["share"] >= SUCCESS[1]


def figure_2(folders, results):
    """Figures 2 and 7 of GRAM: a picture a method, and the tables of all as text."""
    seeds = sorted({member["seed"] for member in results[0]["members"]})
    rows, counts = [], []
    for folder, result in zip(folders, results):
        method, members = result["method"], result["members"]
        p = np.load(f"{folder}/points-{result['updates']}.npz")
        panels = [(p["x"][i], p["y"][i], f"width {m['g'][0]}, noise {m['z']}: {m['modes']} modes, "
                   f"{m['share']:.2f}") for i, m in enumerate(members) if m["seed"] == 0]
        common.save_figure(f"{folder}/figure2.png", common.scatter_figure(
            panels, len(NOISES), f"{method}, {result['updates']:,} updates, seed 0: modes with "
            f"{SUCCESS[0]:.0%} of the samples or more, share within 3 std of a mode"))
        for width, z in itertools.product(WIDTHS, NOISES):
            own = [m for m in members if m["g"][0] == width and m["z"] == z]
            cells = [" ".join(format(m[key], digits) for m in own) for key, digits in
                     (("modes", ""), ("share", ".2f"), ("least", ".3f"), ("most", ".3f"))]
            cells += [f"{sum(m['diverged'] for m in own)} of {len(own)}",
                      f"{sum(map(succeeds, own))} of {len(own)}"]
            rows.append([method, str(width), str(z), *cells])
        successes = [sum(succeeds(m) for m in members if m["seed"] == seed) for seed in seeds]
        counts.append([method, f"{result['updates']:,}", *map(str, successes), f"{result['seconds']:.0f}"])
    each = len(WIDTHS) * len(NOISES)
    head = ["method", "updates", *(f"seed {seed}: successes of {each}" for seed in seeds), "seconds"]
    cells = ["method", "width", "noise", "modes", "share", "smallest mode", "largest mode", "diverged",
             "succeed"]
    return (f"std {STD}; success: finite, {SUCCESS[0]:.0%} or more of {POINTS:,} samples within 3 std of "
            f"each mode, {SUCCESS[1]:.0%} or more within 3 std of any\n\n"
            f"{common.table(head, counts)}\n\n{common.table(cells, rows)}")


def figure_gamn(folders, results):
    """Figure 1 and Table 1 of GAMN: a picture, and the table as text."""
    panels, updates = [], results[0]["updates"]
    for name, (folder, result) in itertools.product(GAMN_SETS, list(zip(folders, results))):
        i = [member["data"] for member in result["members"]].index(name)
        p = np.load(f"{folder}/points-{updates}.npz")
        panels.append((p["x"][i], p["y"][i],
                       f"{result['method']}, {name}: {result['members'][i]['share']:.2f}"))
    picture = common.scatter_figure(panels, len(results), f"{updates:,} updates, seed 0; share of the "
                                    "samples within 3 std of a mode, or of the roll")
    rows = []
    for result in results:
        rows.append([result["method"]])
        for name in GAMN_SETS:
            own = [member for member in result["members"] if member["data"] == name]
            rows[-1] += [common.mean_std([m["mmd"] for m in own if m["mmd"] is not None], 4),
                         common.mean_std([m["share"] for m in own], 2)]
        rows[-1].append(" ".join(f"{value:.3f}" for value in GAMN_PAPER.get(result["method"], ())) or "-")
    floor, rng = ["two samples of the data"], torch.Generator().manual_seed(0)
    for name in GAMN_SETS:
        centres, std = mixture(name)
        pairs = [{key: common.draw_mixture(centres, std, AVERAGE_POINTS, rng)[None] for key in "xy"}
                 for _ in range(10)]
        share = coverage(common.draw_mixture(centres, std, POINTS, rng), centres, std)["share"]
        floor += [f"{float(torch.cat([average_mmd(pair) for pair in pairs]).mean()):.4f}", f"{share:.2f}"]
    head = [f"{name}: {what}" for name in GAMN_SETS for what in ("MMD", "share")]
    return picture, (
        f"MMD: eq. 4, sum of Gaussian kernels of sigma {GAMN_SIGMA}, {AVERAGE_POINTS:,} fresh samples and as "
        f"many fresh data, mean over\nthe last {AVERAGE:,} of {updates:,} updates (every {AVERAGE_EVERY}th); "
        f"share of {POINTS:,} samples within 3 std of a mode or of the roll;\nmean ± std over seeds\n\n"
        + common.table(["method", *head, "MMD in the paper"], [*rows, [*floor, "-"]]))


def figure_dirac():
    """Figure 1 of Scaled MMD: P at 0, Q at theta, f(x) = psi x; Q descends and the critic ascends."""
    def losses(theta, psi):         # MMD^2 and SMMD^2, [...]
        h_x, h_y = 0 * theta[..., None, None], (psi * theta)[..., None, None]
        squared = common.mmd2(*common.gram(common.unit_gaussian, h_x, h_y))
        return squared, common.smmd2(squared, psi[..., None, None, None], SCALED_LAMBDA)

    def field(i, theta, psi):
        theta, psi = theta.detach().requires_grad_(), psi.detach().requires_grad_()
        d_theta, d_psi = torch.autograd.grad(losses(theta, psi)[i].sum(), (theta, psi))
        return -d_theta, d_psi

    axis = partial(torch.linspace, dtype=torch.float64)
    picture = Figure(figsize=(13, 4.4), layout="constrained")
    theta, psi = torch.meshgrid(axis(-4, 4, 25), axis(-4, 4, 25), indexing="xy")
    starts = torch.tensor([[1.0, 0.5], [-3.0, 0.3], [3.0, 3.0]], dtype=torch.float64)     # at C MMD is flat
    text = []
    for i, name in enumerate(("MMD$^2$", f"SMMD$^2$, $\\lambda$ = {SCALED_LAMBDA}")):
        axes = picture.add_subplot(1, 3, i + 1)
        u, v = field(i, theta, psi)
        size = (u.square() + v.square()).sqrt()
        arrows = axes.quiver(theta, psi, u / size.clamp(min=1e-12), v / size.clamp(min=1e-12),
                             size.clamp(min=1e-12).log10(), cmap="viridis", scale=35, width=0.003)
        picture.colorbar(arrows, ax=axes, label="log10 of the length", shrink=0.8)
        path = [starts]
        for _ in range(DIRAC_STEPS):
            path.append(path[-1] + DIRAC_RATE * torch.stack(field(i, *path[-1].T), 1))
        path = torch.stack(path)                                            # [time, start, 2]
        for label, curve in zip("ABC", path.unbind(1)):
            axes.plot(*curve.T, "r-", linewidth=1.2)
            axes.plot(*curve[0], "ro", markersize=4)
            axes.annotate(label, tuple(curve[0]), xytext=(4, 4), textcoords="offset points", color="red")
            text.append(f"{('MMD', 'SMMD')[i]}, from {label} = ({curve[0][0]:.1f}, {curve[0][1]:.1f}): theta "
                        f"{curve[-1][0]:.2g}, psi {curve[-1][1]:.2g} after {DIRAC_STEPS:,} steps of "
                        f"{DIRAC_RATE}")
        axes.set(title=name, xlabel="$\\theta$", ylabel="$\\psi$", xlim=(-4.2, 4.2), ylim=(-4.2, 4.2))
    axes = picture.add_subplot(1, 3, 3)
    t, grid = axis(-5, 25, 1_501)[:, None], axis(0.01, 10, 1_000)
    far = torch.full((1, 1), 20.0, dtype=torch.float64)
    best = float(grid[losses(far[0].expand(len(grid)), grid)[1].argmax()])
    for psi, name in ((10.0, "MMD, $\\psi$ = 10"), (1.0, "MMD, $\\psi$ = 1 (spectral norm 1)"),
                      (best, f"SMMD, its best $\\psi$ = {best:.2f}")):
        norm = common.mmd2(*common.gram(common.unit_gaussian, 0 * far, psi * far)).sqrt()
        axes.plot(t, common.witness(common.unit_gaussian, psi * t, 0 * far, psi * far) / norm, label=name)
    axes.set(title="critics of norm 1 at $\\theta$ = 20", xlabel="x")
    axes.legend(fontsize=7)
    return picture, "\n".join(text)


def quantiles(n):
    """n points of N(0, 1) of equal mass, [n, 1] in float64: a quadrature, so that a figure has no noise."""
    return torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)[:, None]


def figure_5():
    """Figure 5 of Scaled MMD: logs of distances of N(0, 0.1^2) to N(mu, std^2), f(x) = x / psi, lambda 1."""
    mu = torch.linspace(-10, 10, GRID_5[0], dtype=torch.float64)
    std = torch.logspace(-2, 1, GRID_5[1], dtype=torch.float64)
    x, noise = 0.1 * quantiles(48), quantiles(128)

    def distances(psi):         # MMD, SMMD and gradient-constrained MMD, each [std, mu]
        rows = []
        for s in std:           # one at a time for memory
            h_x, h_y = (x / psi).expand(len(mu), -1, -1), (mu[:, None, None] + s * noise) / psi
            J = torch.full((len(x), 1, 1), 1 / psi, dtype=torch.float64)
            squared = common.mmd2(*common.gram(common.unit_gaussian, h_x, h_y))
            constrained, _ = common.gradient_constrained_mmd2(h_x, h_y, x / psi, J, 1.0)
            rows.append(torch.stack([squared, common.smmd2(squared, J, 1.0), constrained]))
        return torch.stack(rows, 1).clamp(min=1e-30).sqrt()

    bandwidths = torch.logspace(-2, 2, GRID_5[2]).tolist()
    (narrow, wide), best = (distances(psi) for psi in (0.1, 10.0)), torch.zeros(3, len(std), len(mu))
    for psi in bandwidths:
        best = torch.maximum(best, distances(psi))
    picture = Figure(figsize=(9, 9), layout="constrained")
    panels = [("MMD, $\\psi$ = 0.1", narrow[0]), ("MMD, $\\psi$ = 10", wide[0]),
              ("gradient-constrained MMD, $\\psi$ = 0.1", narrow[2]),
              ("gradient-constrained MMD, $\\psi$ = 10", wide[2]),
              ("SMMD, best $\\psi$ of each point", best[1]),
              ("gradient-constrained MMD, best $\\psi$", best[2])]
    for place, (title, values) in enumerate(panels, 1):
        axes = picture.add_subplot(3, 2, place)
        mesh = axes.pcolormesh(mu.numpy(), std.numpy(), values.log().numpy(), shading="nearest")
        picture.colorbar(mesh, ax=axes)
        axes.set(title=title, yscale="log", xlabel="$\\mu$", ylabel="$\\sigma$")
    picture.suptitle("log D(N(0, 0.1$^2$), N($\\mu$, $\\sigma^2$)), $\\lambda$ = 1; at one $\\psi$ the SMMD "
                     "is the MMD times a constant", fontsize=10)
    ratio = best[1] / best[2]
    return picture, (f"best SMMD / best gradient-constrained MMD over the grid: {ratio.min():.3f} to "
                     f"{ratio.max():.3f}")


def figure_4():
    """Figure 4 of Scaled MMD: gradients of two critics between two Gaussians of our own, mu their mean."""
    rng = torch.Generator().manual_seed(0)
    centres, std, width = torch.tensor([[-1.0, 0.0], [1.0, 0.0]], dtype=torch.float64), 0.5, 3.0
    line = torch.linspace(-width, width, 61, dtype=torch.float64)
    spacing = float(line[1] - line[0])
    nodes = torch.cartesian_prod(line, line)                                                # [61 * 61, 2]
    p, q = ((-(nodes - centre).square().sum(1) / (2 * std ** 2)).exp().view(61, 61)
            / (2 * torch.pi * std ** 2) for centre in centres)
    f = common.sobolev_critic(p, q, (p + q) / 2, spacing)
    sobolev = torch.stack(torch.gradient(f, spacing=spacing), -1).view(-1, 2)

    x, y = (centre + std * torch.randn(200, 2, generator=rng, dtype=torch.float64) for centre in centres)
    mu, J = torch.cat([x, y]), torch.eye(2, dtype=torch.float64).expand(400, 2, 2)          # f(x) = x
    squared, critic = common.gradient_constrained_mmd2(x, y, mu, J, SCALED_LAMBDA)
    t = nodes.clone().requires_grad_()
    constrained, = torch.autograd.grad((critic(t) / squared.sqrt()).sum(), t)

    picture, text = Figure(figsize=(11, 5.4), layout="constrained"), []
    dense = (p + q > 0.05 * (p + q).max()).flatten()
    some = torch.arange(61 * 61).view(61, 61)[::3, ::3].flatten()
    fields = ("gradient-constrained MMD", constrained), ("Sobolev", sobolev)
    for place, (name, field) in enumerate(fields, 1):
        axes, size = picture.add_subplot(1, 2, place), field.norm(dim=1, keepdim=True)
        axes.contour(line, line, (p + q).T, levels=4, colors="tab:blue", linewidths=0.6)
        axes.quiver(*nodes[some].T, *(field / size.clamp(min=1e-12))[some].T, color="0.75", scale=30)
        axes.quiver(*nodes[some].T, *field[some].T, color="black", scale=20 * float(size[dense].max()))
        axes.set(title=name, aspect="equal", xlim=(-4, 4), ylim=(-4, 4))
        text.append(f"{name}: largest gradient {size[dense].max():.3g} where p + q is above a twentieth of "
                    f"its maximum, {size.max():.3g} anywhere")
    return picture, "\n".join(text)


def main(argv=None):
    parser = common.flags(__doc__, METHODS, None, None, images=False)
    parser.add_argument("--figure", default="1", choices=list(FIGURES), metavar="NAME",
                        help=f"{', '.join(FIGURES)} (default 1)")
    parser.set_defaults(**FIGURES[parser.parse_args(argv).figure])
    args = parser.parse_args(argv)
    out = f"{args.out}/ring2d-figure{args.figure}"
    if args.figure in ("dirac", "gaussians"):
        drawn = {"": figure_dirac} if args.figure == "dirac" else {"4": figure_4, "5": figure_5}
        for name, draw in drawn.items():
            picture, text = draw()
            print(text)
            common.save_figure(f"{out}{name}.png", picture)
        return

    device = common.setup(args.device)
    torch.set_num_threads(1)            # the matrices are too small to share between cores
    stacked = None if args.figure == "1" else args.figure       # whose finished runs are not trained again
    runs = common.open_runs(args.out, __file__, globals(), args.method, args.seeds, args.resume or stacked,
                            device, stacked)

    def members(seed):
        return cells(args.figure, seed if stacked else [seed])

    for method, seed, *_ in runs:
        own = members(seed)
        counts = [[common.count(network) for network in networks(METHODS[method], member)] for member in own]
        g, f, decoder = ("-".join(f"{n:,}" for n in sorted({min(part), max(part)})) for part in zip(*counts))
        print(f"{method}, runs: {len(own)}; parameters of a generator: {g}, critic: {f}, decoder: {decoder}")
    print(common.log_head(COLUMNS))
    typed = common.command(__file__, argv)
    results = common.train_all(runs, lambda run: train(
        run.method, members(run.seed), run.folder, run.settings, args.steps, device), typed)

    done = []
    for (method, _, folder, _), result in common.ended(runs, results):
        done.append((folder, result))
        if not stacked:
            figure_1(folder, method, result)
            print(f"{result['members'][0]['modes']} of {MODES} modes, "
                  f"{result['members'][0]['share']:.3f} of {POINTS:,} samples within 3 std of a mode")
    if not done:
        sys.exit("no run finished")
    if stacked == "2":
        print(text := figure_2(*zip(*done)))
    if stacked == "gamn":
        picture, text = figure_gamn(*zip(*done))
        common.save_figure(f"{out}.png", picture)
        print(text)
    if stacked:
        with common.replacing(f"{out}.md") as file:
            made = f"{typed}\n{', '.join(common.machine(device).values())}"
            file.write(f"{made}\n\n{text}\n".encode())


if __name__ == "__main__":
    common.run(main)
