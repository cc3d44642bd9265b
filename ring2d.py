"""The plane in three papers: rings of Gaussians, grids, a Swiss roll, and what stable means, counted.

    python ring2d.py                        Figure 1 of GRAM: 1 to 4 minutes on a CPU core
    python ring2d.py --method mmdgan        Figure 9a of GRAM: 5 minutes; the same of gan or mmdnet
    python ring2d.py --method gram+ridge=1e-2 gan+std=0.01      rows with other values of keys, see DEFAULTS
    python ring2d.py --figure 2             Figures 2 and 7 of GRAM: 144 runs, 8 minutes on an H200
    python ring2d.py --figure gamn          Figure 1 and Table 1 of GAMN: 45 runs, 4 minutes on an H200
    python ring2d.py --figure k             appendix B.3 of GRAM, 2 to 16 outputs: 30 minutes on a CPU
    python ring2d.py --figure ratio         does a critic preserve density ratios? 7 minutes on a CPU
    python ring2d.py --figure gradients     which gradients are unbiased? Demystifying MMD GANs: 1 minute
    python ring2d.py --figure dirac         Figure 1 of Scaled MMD: 20 seconds on a CPU; gaussians: 4 and 5

Expect of the first 8 of 8 modes, and 0.89 of the samples within 3 std of a mode (three seeds; of data 0.989);
of Figure 2, that GRAM succeeds in 12 of 12 settings. A run goes to runs/ring2d-METHOD-sSEED/ (figure1.png,
training.gif), all of a method to runs/ring2d-figureNAME-METHOD/ (figure2.png), both with points-UPDATE.npz,
log.csv, checkpoint.pt, result.json. What compares methods is runs/ring2d-figureNAME.md and .png.
"""
import copy
import glob
import itertools
import math
import os
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

import common

MODES, RADIUS = 8, 2.0              # JuliaGRAM; the paper gives no radius
HIDDEN, Z = (100, 100), 20          # GRAM, section 3.4; Z, of N(0, I), JuliaGRAM, scripts/predefined_args.jl
LAMBDA = 1.0                        # GRAM, eq. 9
PANELS, PANELS_9 = (10, 100, 1_000, 10_000), (100, 500, 1_000)      # updates, Figure 1a, Figure 9a of mmdgan
FRAMES = tuple(round(10 ** (i / 10)) for i in range(10, 61))        # updates in training.gif
WIDTHS, NOISES = (20, 100, 200), (2, 4, 8, 16)      # Figure 2: of the generator's two layers, of its noise
SUCCESS = (0.02, 0.8)               # ours: this share of the samples or more in each mode, and in all modes
POINTS, SHOWN = 10_000, 1_000       # samples on which modes and shares are counted; points in pictures
GAMN_SETS = ("8 Gaussians", "25 Gaussians", "Swiss roll")
GAMN_HIDDEN, GAMN_Z = (512, 512, 512), 2            # GAMN, "Experiments"; Z, of N(0, I), gan_toy.py
GAMN_SIGMA = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)        # ours: the paper names none; these span the sets' scales
AVERAGE, AVERAGE_EVERY = 1_000, 10  # Table 1's MMD: a mean over the last so many updates, of every tenth
AVERAGE_POINTS = 1_000              # ours: between so many fresh samples and as many fresh data
SCALED_LAMBDA = 0.1                 # Figure 1 of Scaled MMD, as its section 4; 1 in its Figure 5
DIRAC_STEPS, DIRAC_RATE = 4_000, 0.05               # of gradient descent and ascent at once
DIRAC_BETWEEN = (torch.arange(32, dtype=torch.float64) + 0.5) / 32      # where a penalty of weight 1 holds
GRID_5 = (31, 25, 25)               # of mu, of sigma and of psi, Figure 5 of Scaled MMD
LOG_EVERY = 1_000                   # rows in the terminal
TRACE_EVERY = 10                    # rows in log.csv after the 100th update, one for each before, Figure 1b
SAVE_EVERY = 5_000                  # a multiple of TRACE_EVERY: what is saved has been seen to be finite
COLUMNS = ("loss_f", "loss_g", "pearson", "mean_r")

DEFAULTS = dict(            # 0, False and "": without
    std=0.2,                # of the ring's modes; JuliaGRAM's, the paper says 0.01
    loss="mmd",             # critic_loss() and generator_loss() say what each is; gram: Algorithm 1 of GRAM
    form="",                # of gram: common.gram_objective
    ridge=0.0,              # of gram's density ratio
    sigma=(1.0,),           # bandwidths; GRAM, appendix B.1
    critic=0,               # outputs of the critic
    critic_steps=0,         # to one of the generator; gram moves both at once
    opt="adam",             # or rmsprop
    lr=1e-3,                # learning rate
    beta=(0.5, 0.999),      # of Adam
    clip=0.0,               # bound of the critic's weights
    penalty=0.0,            # weight of the gradient penalty, or of the norm of
    weights="",             # l1, l2: weights of normalisation layers, l2-all: all weights
    autoencoder=0.0,        # weight of the decoder's mean squared error
    feasible=0.0,           # weight of the feasible set reduction
    data_mmd=False,         # the generator minimises the MMD of the points, too
    norms=False,            # batch norm in the generator, LayerNorm in the critic, as GAMN
    batch=200,              # of data and of samples; GRAM, appendix B.1
)
NAMES = dict(loss="gram gan mmd wasserstein".split(), form=["", *common.FORMS],
             opt=["adam", "rmsprop"], weights=["", "l1", "l2", "l2-all"])

# Numbers of GRAM's rows: appendix B.1 and B.3; 8 and 16 are Li et al.'s. WGAN's and WGAN-GP's numbers are in
# gan_toy.py. GAMN names none: steps, rates and 10 are those of WGAN-GP on images, the other weights ours.
GRAM = dict(loss="gram", critic=2, ridge=1e-3)              # JuliaGRAM, src/kmm.jl; not in the paper
GAMN = dict(critic=10, critic_steps=5, lr=1e-4, beta=(0.5, 0.9), batch=256, sigma=GAMN_SIGMA, norms=True)
WGAN = dict(loss="wasserstein", critic=1, critic_steps=5, batch=256)
METHODS = {
    # GRAM: Figures 1, 2, 7 and 9; two outputs can be drawn, Figure 2 has ten, see FIGURES
    "gram":        dict(GRAM, form="sum"),                                      # eq. 9, the paper's
    "gram-mean":   dict(GRAM, form="mean"),
    "gram-clip":   dict(GRAM, form="clip"),
    "gram-swap":   dict(GRAM, form="swap"),         # eq. 9 with p and q exchanged, cifar.py's gram
    "gram-flow":   dict(GRAM, form="flow"),         # its second term alone, cifar.py's gram-flow
    "gan":         dict(loss="gan", critic=1, critic_steps=1, lr=1e-4),
    "mmdnet":      dict(opt="rmsprop"),
    "mmdgan":      dict(critic=2, critic_steps=5, lr=5e-5, clip=0.1, autoencoder=8.0, feasible=16.0),
    # GAMN: Figure 1 and Table 1
    "wgan":        dict(WGAN, opt="rmsprop", lr=5e-5, clip=0.01),
    "wgan-gp":     dict(WGAN, lr=1e-4, beta=(0.5, 0.9), penalty=0.1),
    "gmmn":        dict(lr=1e-4, beta=(0.5, 0.9), batch=256, sigma=GAMN_SIGMA), # of 1,000 in the paper
    "gamn":        dict(GAMN, penalty=10.0),                                    # eq. 7
    "gamn-mmd":    dict(GAMN, penalty=10.0, data_mmd=True),                     # as "Robustness" says
    "gamn-l1":     dict(GAMN, penalty=1e-3, weights="l1"),                      # eq. 9
    "gamn-l2":     dict(GAMN, penalty=1e-3, weights="l2"),                      # eq. 8
    "gamn-l2-all": dict(GAMN, penalty=1e-3, weights="l2-all"),                  # footnote 3: "classical L2"
}

# Rows, seeds and updates, if no flag names others. GRAM's Figure 2 has ten outputs (appendix B.1) and 2,000
# epochs of 60,000 points, by 200: 600,000 updates, for MMD-GAN twice as many. GAMN does not say how many.
NONE = dict(method=[], seeds=0, steps=0)
FIGURES = {
    "1":         dict(method=["gram"], seeds=1, steps=10_000),
    "2":         dict(method=["gan", "gram+critic=10", "mmdnet", "mmdgan+critic=10"], seeds=3, steps=60_000),
    "gamn":      dict(method=["wgan", "wgan-gp", "gmmn", "gamn", "gamn-mmd"], seeds=3, steps=5_000),
    "k":         dict(method=[f"{name}+critic={K}" for name in ("gram", "mmdgan") for K in (2, 4, 8, 16)],
                      seeds=3, steps=4_000),
    "ratio":     dict(method=["gram", "gram-swap", "gram-mean", "gram-flow", "gram-clip", "gram+form=square",
                              "mmdgan", "gan"], seeds=1, steps=500),
    "gradients": NONE, "dirac": NONE, "gaussians": NONE,
}
GAMN_PAPER = {"wgan": (0.300, 0.312, 0.305), "wgan-gp": (0.285, 0.294, 0.298),     # Table 1
              "gmmn": (0.281, 0.291, 0.289), "gamn": (0.276, 0.284, 0.286)}
CONSTANTS = {k: v for k, v in globals().items() if k.isupper() and isinstance(v, (int, float, tuple))}
row_of = partial(common.find_row, methods=METHODS, defaults=DEFAULTS, names=NAMES)     # of NAME+KEY=VALUE...

# Figure "ratio": dimensions of its Gaussians, outputs of critics, when they are looked at and on how many
# points, their neighbours of which a fit has so many, sizes and ridges of estimates by kernel mean matching
RATIO_DIMS, RATIO_K, RATIO_CRITICS = (2, 5, 20), (1, 2, 4, 8), {"MLP": HIDDEN, "linear": ()}
RATIO_BATCH, RATIO_LR = 100, 1e-3
RATIO_AT = (0, 10, 30, 100, 300)
RATIO_POINTS, NEAREST = 2_000, 60
RATIO_N, RATIO_RIDGES = (50, 100, 200, 400, 800), (1e-3, 1e-2, 0.1, 1.0)
# Figure "gradients": Demystifying MMD GANs, section 3, appendices B.4, B.5 and D.1
RBF, ALPHA = (2, 5, 10, 20, 40, 80), (0.2, 0.5, 1, 2, 5)            # its section 5
KERNELS = {"rbf": partial(common.gaussian, sigma=torch.tensor(RBF, dtype=torch.float64)), "dot": common.dot,
           "distance": common.distance, "rational quadratic":
               partial(common.rational_quadratic, alpha=torch.tensor(ALPHA, dtype=torch.float64))}
WHOLE = 200                         # ours: p is so many points and q as many samples; their MMD is exact
SIZES = (2, 4, 8, 16, 32, 64)       # of minibatches, of critics' training sets, of samples to be scored
DRAWN, GROUPS = 2 ** 17, 256        # points drawn for a mean, in groups, whose scatter is its standard error
FRESH = 8                           # points that a trained critic compares; no mean depends on it
BEST_DIRECTION = (0.5911, 0.6723, 0.7780, 0.8759, 0.9374, 0.9687)   # E theta_1^2 at SIZES: quadrature, tests


class Stack(nn.Module):
    """Networks of one form as one, whose matrix products are batched: [B, N, in] to [B, N, out].

    Narrower ones are padded with zeros to the widest. A padded hidden unit has weights, output and gradient 0
    under ReLU and stays absent (but LayerNorm would count it); a padded input has to be 0. Parameters have
    their names under `network`, [B, ...].
    """

    def __init__(self, networks):
        super().__init__()
        self.network = copy.deepcopy(networks[0])
        for name, layer in self.network.named_modules():
            for key in [key for key, _ in layer.named_parameters(recurse=False)]:
                own = [getattr(network.get_submodule(name), key).detach() for network in networks]
                padded = torch.zeros(len(own), *(max(sizes) for sizes in zip(*(p.shape for p in own))))
                for slot, p in zip(padded, own):
                    slot[tuple(slice(size) for size in p.shape)] = p
                setattr(layer, key, nn.Parameter(padded))

    def forward(self, x):
        def member(weights, x):
            return torch.func.functional_call(self.network, weights, (x,))
        return torch.vmap(member)(dict(self.network.named_parameters()), x)


def grid_centres(side, spacing):
    """Centres of a square of side x side modes around the origin, [side^2, 2] (improved_wgan_training)."""
    line = spacing * (torch.arange(side) - (side - 1) / 2)
    return torch.cartesian_prod(line, line)


def swiss_roll_centres(n):
    """n points along the Swiss roll t (cos t, sin t), t uniform in [1.5, 4.5] pi: [n, 2] (scikit-learn)."""
    t = 1.5 * math.pi * (1 + 2 * (torch.arange(n) + 0.5) / n)
    return torch.stack([t * t.cos(), t * t.sin()], 1)


def mixture(name, std=DEFAULTS["std"], device=None):
    """Centres [modes, 2] and std of a set; but for the ring, those of improved_wgan_training, gan_toy.py."""
    centres, std = {"ring":         (common.ring_centres(MODES, RADIUS), std),
                    "8 Gaussians":  (common.ring_centres(8, 2) / 1.414, 0.02 / 1.414),
                    "25 Gaussians": (grid_centres(5, 2) / 2.828, 0.05 / 2.828),
                    "Swiss roll":   (swiss_roll_centres(2_000) / 7.5, 0.25 / 7.5)}[name]
    return centres.to(device), std


def cells(figure, seeds):
    """The models of a figure that one method trains as one Stack: what is drawn, noise, widths, seed."""
    if figure == "2":
        return [dict(data="ring", z=z, g=(width, width), f=HIDDEN, seed=seed)
                for seed, width, z in itertools.product(seeds, WIDTHS, NOISES)]
    if figure == "gamn":
        return [dict(data=name, z=GAMN_Z, g=GAMN_HIDDEN, f=GAMN_HIDDEN, seed=seed)
                for name, seed in itertools.product(GAMN_SETS, seeds)]
    return [dict(data="ring", z=Z, g=HIDDEN, f=HIDDEN, seed=seed) for seed in seeds]


def networks(row, cell):
    """Generator, critic and decoder of a cell, None for what the row has not."""
    common.check_row(row, row["critic"])
    torch.manual_seed(cell["seed"])
    out, norms = row["critic"], (partial(nn.BatchNorm1d, track_running_stats=False), nn.LayerNorm)
    norm_g, norm_f = norms if row["norms"] else (None, None)
    return (common.mlp(cell["z"], *cell["g"], 2, norm=norm_g),
            common.mlp(2, *cell["f"], out, norm=norm_f) if out else None,
            common.mlp(out, *cell["f"][::-1], 2) if row["autoencoder"] else None)


def critic_loss(row, f, decoder, kernel, x, y, rng):
    """What the critics of a Stack minimise at data x and samples y, both [B, N, 2], but for GRAM's: [B]."""
    h_x, h_y = common.both(f, x, y)
    match row["loss"]:
        case "gan": loss = common.gan_critic(h_x, h_y)
        case "wasserstein": loss = -common.wasserstein(h_x, h_y)
        case "mmd": loss = -common.mmd(*common.gram(kernel, h_x, h_y))
    if row["weights"]:          # the norm is that of all critics: each has an equal share of it
        loss = loss + row["penalty"] / len(x) * common.weight_penalty(f, row["weights"])
    elif row["penalty"]:        # on the slope of the sum of the critic's outputs
        a = torch.rand(*x.shape[:-1], 1, generator=rng, device=x.device)
        t = (a * x + (1 - a) * y).requires_grad_()
        slope, = torch.autograd.grad(f(t).sum(), t, create_graph=True)
        loss = loss + row["penalty"] * common.gradient_penalty(slope).mean(-1)
    if row["feasible"]:
        loss = loss - row["feasible"] * common.feasible_set(h_x, h_y)
    if row["autoencoder"]:
        loss = loss + row["autoencoder"] * (common.reconstruction(x, decoder(h_x))
                                            + common.reconstruction(y, decoder(h_y)))
    return loss


def generator_loss(row, f, kernel, x, y):
    """What the generators minimise at data x and samples y, both [B, N, 2], but with GRAM's critic: [B]."""
    with common.frozen(f):
        h_x, h_y = common.both(f, x, y)
    match row["loss"]:
        case "gan": loss = common.gan_generator(h_y)
        case "wasserstein": loss = common.wasserstein(h_x, h_y)
        case "mmd": loss = common.mmd(*common.gram(kernel, h_x, h_y))
    if row["feasible"]:
        loss = loss + row["feasible"] * common.feasible_set(h_x, h_y)
    if row["data_mmd"]:
        loss = loss + common.mmd(*common.gram(kernel, x, y))
    return loss


def train(name, row, seeds, folder, steps, device, figure="1"):
    """The models of a row in a figure as one Stack, a generator: it yields after each update, is sent whether
    to save, and returns its result. seeds: a list, of one for Figure 1, whose Stack has one model.
    """
    members, batch = cells(figure, seeds), row["batch"]
    built, B = [networks(row, member) for member in members], len(members)
    g, f, decoder = (Stack(own).to(device) if own[0] else None for own in zip(*built))
    players = nn.ModuleDict({key: part for key, part in dict(f=f, decoder=decoder).items() if part})
    kernel = partial(common.gaussian, sigma=torch.tensor(row["sigma"], device=device))
    rng = torch.Generator(device).manual_seed(seeds[0])
    opt_g = common.optimizer(g, row["opt"], row["lr"], row["beta"])
    opt_f = common.optimizer(players, row["opt"], row["lr"], row["beta"]) if f else None
    log = common.Log(folder, COLUMNS, steps, device)
    mmds = torch.zeros(AVERAGE // AVERAGE_EVERY, B, device=device)
    players.register_buffer("mmds", mmds)       # Table 1's, a part of the checkpoint
    state = dict(g=g, opt_g=opt_g, players=players, rng=rng, log=log) | (dict(opt_f=opt_f) if f else {})

    dims = [member["z"] for member in members]
    present = (torch.arange(max(dims)) < torch.tensor(dims)[:, None, None]).float().to(device)  # [B, 1, Z]
    sets = [(*mixture(name, row["std"], device), len(list(own)))
            for name, own in itertools.groupby(member["data"] for member in members)]

    def data(n, rng):               # [B, n, 2]
        return torch.cat([common.draw_mixture(centres, std, own * n, rng).view(own, n, 2)
                          for centres, std, own in sets])

    def noise(n, rng):              # [B, n, Z], 0 where a model has less
        return common.normal_noise(B * n, max(dims), rng).view(B, n, -1) * present

    def update():                   # the critic's steps and the generator's, one CUDA graph
        for _ in range(row["critic_steps"]):
            with torch.no_grad():
                x, y = data(batch, rng), g(noise(batch, rng))
            loss = critic_loss(row, f, decoder, kernel, x, y, rng)
            common.descend((opt_f, loss))
            if row["clip"]:
                common.clip_weights(f, row["clip"])
            log.add(loss_f=loss)
        x, y = data(batch, rng), g(noise(batch, rng))
        if row["loss"] == "gram":   # Algorithm 1: one Gram matrix, both gradients, both steps
            K_all = common.gram(kernel, *common.both(f, x, y))
            objective, r = common.gram_objective(*K_all, row["form"], row["ridge"], LAMBDA)
            loss = common.mmd2(*K_all)
            common.descend((opt_f, -objective), (opt_g, loss))
            log.add(loss_f=-objective, loss_g=loss, pearson=common.pearson(r), mean_r=r.mean(-1))
        else:
            loss = generator_loss(row, f, kernel, x, y)
            common.descend((opt_g, loss))
            log.add(loss_g=loss)

    @torch.no_grad()
    def points(n, seed=0):          # the same draws at every update, [B, n, ...]
        fixed = torch.Generator(device).manual_seed(seed)
        x, y = data(n, fixed), g(noise(n, fixed))
        return dict(x=x, y=y, f_x=f(x), f_y=f(y)) if f else dict(x=x, y=y)

    settings = dict(CONSTANTS, row=row, seeds=seeds, device=device.type, steps=steps * (figure == "gamn"))
    step = common.load(folder, state, settings)
    update = common.capture(update, rng)
    log.start(step)
    while step < steps:
        update()
        step += 1
        if step <= 100 or step % TRACE_EVERY == 0 or step == steps:
            log.row(step, shown=step % LOG_EVERY == 0 or step == steps)
        if step == steps or step in PANELS + PANELS_9 or figure == "1" and step in FRAMES:
            with common.replacing(f"{folder}/points-{step}.npz") as file:
                np.savez(file, **{key: t.cpu() for key, t in points(SHOWN).items()})
        if figure == "gamn" and (left := steps - step) < AVERAGE and left % AVERAGE_EVERY == 0:
            x, y, *_ = points(AVERAGE_POINTS, step).values()
            mmds[left // AVERAGE_EVERY] = average_mmd(x, y)
        stop = yield
        if stop or step % SAVE_EVERY == 0 or step == steps:
            common.save(folder, step, state, settings, check=B == 1)        # of many some may diverge

    for i, (member, y) in enumerate(zip(members, points(POINTS)["y"].cpu())):
        member |= coverage(y, *mixture(member["data"], row["std"]))
        if figure == "gamn":
            mmd = float(mmds[:math.ceil(min(AVERAGE, step) / AVERAGE_EVERY), i].mean())
            member["mmd"] = mmd if math.isfinite(mmd) else None
    return dict(method=name, row=row, members=members, updates=step, samples=POINTS, seconds=log.seconds,
                **common.machine(device))


def coverage(y, centres, std):
    """What is counted of a model's samples [N, 2], a dict; a success has learnt all modes and little else."""
    masses, finite = common.mode_masses(y, centres, std), bool(y.isfinite().all())
    modes, share, least = int((masses >= SUCCESS[0]).sum()), float(masses.sum()), float(masses.min())
    return dict(modes=modes, share=share, least=least, most=float(masses.max()), diverged=not finite,
                success=finite and least >= SUCCESS[0] and share >= SUCCESS[1])


def average_mmd(x, y):
    """Table 1's MMD of each model, eq. 4: data and samples, [B, n, 2] each, to [B]."""
    kernel = partial(common.gaussian, sigma=torch.tensor(GAMN_SIGMA, device=x[0].device))
    return torch.stack([common.mmd(*common.gram(kernel, *pair)) for pair in zip(x, y)])     # for memory


def pearson_of_equals(f_x, row):
    """The estimate of the Pearson divergence between batches of the same features [N, K], where it is 0."""
    kernel = partial(common.gaussian, sigma=torch.tensor(row["sigma"]))
    batches = [part for part in torch.from_numpy(f_x).split(row["batch"]) if len(part) == row["batch"]]
    ratios = [common.gram_objective(*common.gram(kernel, a, b), row["form"], row["ridge"], LAMBDA)[1]
              for a, b in itertools.permutations(batches[:5], 2)]
    return float(np.mean([float(common.pearson(r)) for r in ratios] or math.nan))


def figure_1(run, result):
    """Figure 1 or 9a of GRAM: both spaces during training, and the traces of the losses."""
    figure, [member], row = common.Figure((10, 8.2), layout="constrained"), result["members"], run.row
    grid, gram, equals = figure.add_gridspec(3, 4), row["loss"] == "gram", {}
    panels = PANELS_9 if run.name.startswith("mmdgan") else PANELS
    for column, step in enumerate(step for step in panels if step <= result["updates"]):
        p = np.load(f"{run.folder}/points-{step}.npz")
        axes = figure.add_subplot(grid[0, column])
        common.scatter_panel(axes, p["x"][0], p["y"][0], f"update {step:,}: data space")
        if column == 0:
            axes.legend(fontsize=7, markerscale=3)
        if "f_x" in p:
            axes = figure.add_subplot(grid[1, column])
            common.scatter_panel(axes, p["f_x"][0], p["f_y"][0], "critic's space")
        if gram:
            equals[step] = pearson_of_equals(p["f_x"][0], row)
    trace, curves = common.read_log(run.folder), {"generator's loss": "loss_g", "critic's loss": "loss_f"}
    if gram:
        ratio = "r = q / p at data" if row["form"] in common.AT_DATA else "eq. 7"
        curves = {"generator's loss, eq. 10": "loss_g",
                  f"Pearson divergence estimate mean((r - 1)$^2$), {ratio}": "pearson"}
        figure.supxlabel("The paper draws eq. 5, an unknown constant minus Pearson's divergence.", fontsize=8)
    curves = {label: trace[key] for label, key in curves.items() if np.isfinite(trace[key]).any()}
    left = figure.add_subplot(grid[2, :2])
    right = figure.add_subplot(grid[2, 2:], sharey=left)
    for axes, part in ((left, trace["step"] <= 100), (right, trace["step"] >= 100)):
        for label, values in curves.items():
            axes.plot(trace["step"][part], values[part], label=label, linewidth=1)
        at = [step for step in equals if step in trace["step"][part]]
        axes.plot(at, [equals[step] for step in at], "kx",
                  label="the same of data and data: truly 0" if at else None)
        axes.set_xlabel("update", fontsize=8)
        axes.tick_params(labelsize=7)
    left.set_yscale("log" if all((values > 0).all() for values in curves.values()) else "linear")
    right.legend(fontsize=7)
    found = (f"{run.name}, {result['updates']:,} updates: {member['modes']} of {MODES} modes, "
             f"{member['share']:.3f} of the samples within 3 std of a mode")
    figure.suptitle(found, fontsize=11)
    common.save_figure(f"{run.folder}/figure1.png", figure)
    print(f"seed {member['seed']} of {found}")


def animate(run):
    """training.gif of a run: data and samples, and both in the critic's space, at the updates of FRAMES."""
    from matplotlib.animation import PillowWriter       # after common, which sees to MPLBACKEND
    kept = {int(path.rpartition("-")[2][:-4]): np.load(path)
            for path in glob.glob(f"{glob.escape(run.folder)}/points-*.npz")}
    figure, writer = common.Figure(figsize=(7, 3.6), layout="constrained"), PillowWriter(fps=8)
    spaces = [space for space in ("", "f_") if all(f"{space}x" in p for p in kept.values())]
    panels = figure.subplots(1, len(spaces), squeeze=False)[0]
    part = f"{run.folder}/training.{os.getpid()}.tmp.gif"
    with writer.saving(figure, part, dpi=80):
        for step in [*sorted(kept), *8 * [max(kept)]]:              # the last one for a second more
            for axes, space in zip(panels, spaces):
                axes.clear()
                x, y = kept[step][f"{space}x"][0], kept[step][f"{space}y"][0]
                title = "critic's space" if space else f"{run.name}, update {step:,}"
                common.scatter_panel(axes, x, y, title)
            panels[0].set(adjustable="box", xlim=(-3, 3), ylim=(-3, 3))
            writer.grab_frame()
    os.replace(part, f"{run.folder}/training.gif")
    print(f"{run.folder}/training.gif")


def scatter_figure(panels, columns, title):
    """A matplotlib figure of common.scatter_panel's, from a list of (x, y, title), so many in a row."""
    rows = math.ceil(len(panels) / columns)
    figure = common.Figure(figsize=(2.5 * columns, 2.6 * rows + 0.4), layout="constrained")
    for place, panel in enumerate(panels, 1):
        common.scatter_panel(figure.add_subplot(rows, columns, place), *panel)
    figure.axes[0].legend(fontsize=7, markerscale=3)
    figure.suptitle(title, fontsize=11)
    return figure


def figure_2(finished):
    """Figures 2 and 7 of GRAM, of pairs of a Run and its result: a picture a method, the tables as text."""
    rows, counts, seeds = [], [], sorted({member["seed"] for member in finished[0][1]["members"]})
    for run, result in finished:
        members, p = result["members"], np.load(f"{run.folder}/points-{result['updates']}.npz")
        panels = [(p["x"][i], p["y"][i], f"width {m['g'][0]}, noise {m['z']}: {m['modes']} modes, "
                   f"{m['share']:.2f}") for i, m in enumerate(members) if m["seed"] == seeds[0]]
        common.save_figure(f"{run.folder}/figure2.png", scatter_figure(
            panels, len(NOISES), f"{run.name}, {result['updates']:,} updates, seed {seeds[0]}: modes with "
            f"{SUCCESS[0]:.0%} of the samples or more, share within 3 std of a mode"))
        for width, z in itertools.product(WIDTHS, NOISES):
            own = [m for m in members if m["g"][0] == width and m["z"] == z]
            row = [" ".join(format(m[key], digits) for m in own) for key, digits in
                   (("modes", ""), ("share", ".2f"), ("least", ".3f"), ("most", ".3f"))]
            row += [f"{sum(m[key] for m in own)} of {len(own)}" for key in ("diverged", "success")]
            rows.append([run.name, str(width), str(z), *row])
        successes = [sum(m["success"] for m in members if m["seed"] == seed) for seed in seeds]
        counts.append([run.name, f"{result['updates']:,}", *map(str, successes), f"{result['seconds']:.0f}"])
    each, stds = len(WIDTHS) * len(NOISES), dict.fromkeys(str(run.row["std"]) for run, _ in finished)
    head = ["method", "updates", *(f"seed {seed}: successes of {each}" for seed in seeds), "seconds"]
    columns = "method, width, noise, modes, share, smallest mode, largest mode, diverged, succeed".split(", ")
    return (f"std {', '.join(stds)}; success: finite, {SUCCESS[0]:.0%} or more of {POINTS:,} samples within "
            f"3 std of each mode, {SUCCESS[1]:.0%} or more within 3 std of any\n\n"
            f"{common.table(head, counts)}\n\n{common.table(columns, rows)}")


def figure_k(finished, path):
    """The critic's outputs, GRAM's appendix B.3, of pairs of a Run and its result: a picture, a table."""
    panels, rows = [], []
    for run, result in finished:
        members, p = result["members"], np.load(f"{run.folder}/points-{result['updates']}.npz")
        panels.append((p["x"][0], p["y"][0], f"{run.name}: {members[0]['modes']} modes"))
        rows.append([run.name, " ".join(str(m["modes"]) for m in members),
                     " ".join(f"{m['share']:.2f}" for m in members),
                     f"{sum(m['diverged'] for m in members)} of {len(members)}"])
    common.save_figure(path, scatter_figure(panels, len(panels) // 2 or 1, f"{result['updates']:,} updates, "
                                            f"seed {members[0]['seed']}"))
    return f"{result['updates']:,} updates, a value a seed\n\n" + common.table(
        ["method", "modes", "share within 3 std of a mode", "diverged"], rows)


def figure_gamn(finished, path):
    """Figure 1 and Table 1 of GAMN, of pairs of a Run and its result: a picture at path, a table as text."""
    panels, rows, floor, rng = [], [], ["two samples of the data"], torch.Generator().manual_seed(0)
    for name, (run, result) in itertools.product(GAMN_SETS, finished):
        i = [member["data"] for member in result["members"]].index(name)
        p = np.load(f"{run.folder}/points-{result['updates']}.npz")
        panels.append((p["x"][i], p["y"][i], f"{run.name}, {name}: {result['members'][i]['share']:.2f}"))
    updates, seed = result["updates"], result["members"][0]["seed"]
    common.save_figure(path, scatter_figure(panels, len(finished), f"{updates:,} updates, seed {seed}; share "
                                            "of the samples within 3 std of a mode, or of the roll"))
    for run, result in finished:
        rows.append([run.name])
        for name in GAMN_SETS:
            own = [member for member in result["members"] if member["data"] == name]
            rows[-1] += [common.mean_std([m["mmd"] for m in own if m["mmd"] is not None], 4),
                         common.mean_std([m["share"] for m in own], 2)]
        rows[-1].append(" ".join(f"{value:.3f}" for value in GAMN_PAPER.get(run.name, ())) or "-")
    for name in GAMN_SETS:
        draws = [common.draw_mixture(*mixture(name), AVERAGE_POINTS, rng) for _ in range(20)]
        share = coverage(common.draw_mixture(*mixture(name), POINTS, rng), *mixture(name))["share"]
        floor += [f"{float(average_mmd(draws[::2], draws[1::2]).mean()):.4f}", f"{share:.2f}"]
    head = ["method", *(f"{name}: {what}" for name in GAMN_SETS for what in ("MMD", "share")), "paper's MMD"]
    return (f"MMD: eq. 4, sum of Gaussian kernels of sigma {GAMN_SIGMA}, {AVERAGE_POINTS:,} fresh samples "
            f"and as many fresh data, mean over\nthe last {AVERAGE:,} of {updates:,} updates (every "
            f"{AVERAGE_EVERY}th); share of {POINTS:,} samples within 3 std of a mode or of the roll;\n"
            f"mean ± std over seeds\n\n{common.table(head, [*rows, [*floor, '-']])}")


def ratio_pairs():
    """Pairs p, q of known densities with a finite E_q r^2: {name: two of torch.distributions}."""
    def normal(mean, std):
        return Independent(Normal(mean, std), 1)

    pairs = {}
    for dim in RATIO_DIMS:              # p is shifted along one axis, and narrower along the next three
        mean, std = torch.zeros(dim), torch.ones(dim)
        mean[0], std[1:4] = 0.8, torch.tensor([0.6, 0.8, 0.8])[:dim - 1]
        pairs[f"Gaussians in {dim} dimensions"] = normal(mean, std), normal(torch.zeros(dim), torch.ones(dim))
    centres, std = mixture("ring")
    modes = normal(torch.cat([centres, torch.zeros(1, 2)]),
                   torch.tensor([std] * MODES + [RADIUS])[:, None].expand(-1, 2))
    pairs["ring; q: half ring, half Gaussian"] = [
        MixtureSameFamily(Categorical(torch.tensor([1.0] * MODES + [broad])), modes) for broad in (0, MODES)]
    return pairs


def explained(h, r):
    """r_f = E_q[r | h] and the share of r's variance that it has: [N] and a number.

    r [N]: density ratios p / q at points of q; h [N, K]: a critic's features of these. E_q[r | f(x)] is the
    ratio of the laws of f(x), so E_q (r - r_f)^2 = Var r - Var r_f, and the share is the Pearson divergence
    in f's space over that of x. By a linear fit to each point's NEAREST others, whose weights' squares add to
    the residual.
    """
    h = (h - h.mean(0)) / h.std(0).clamp(min=1e-12)
    d, near = torch.cdist(h, h).fill_diagonal_(math.inf).topk(NEAREST, largest=False)
    X = nn.functional.pad(h[near] - h[:, None], (1, 0), value=1.0)                  # [N, NEAREST, 1 + K]
    closer = (1 - (d / d[:, -1:].clamp(min=1e-12)).square()).clamp(min=1e-3)
    XW = (X * closer[..., None]).mT
    weights = torch.linalg.solve(XW @ X + 1e-6 * torch.eye(X.shape[-1], dtype=h.dtype), XW)[:, 0]
    r_f = (weights * r[near]).sum(1)
    return r_f, float(1 - ((r - r_f).square() / (1 + weights.square().sum(1))).mean() / r.var())


def critics_alone(row, p, q, hidden, seen, steps):
    """Critics of RATIO_K outputs trained by a row's objective, no generator: {update: their f(x), f(y)}.

    seen: x ~ p and y ~ q, [N, D], looked at in the updates of RATIO_AT; f(x), f(y) [critics, N, K], of fewer
    outputs padded with zeros.
    """
    kernel, found = partial(common.gaussian, sigma=torch.tensor(row["sigma"])), {}
    f = Stack([common.mlp(*q.event_shape, *hidden, K) for K in RATIO_K])
    logit = Stack([common.mlp(K, 1) for K in RATIO_K])              # of a GAN, in the critic's space
    players = nn.ModuleList([f, logit] if row["loss"] == "gan" else [f])
    opt = common.optimizer(players, "adam", RATIO_LR, (0.5, 0.999))

    def features(points):
        return f(points.expand(len(RATIO_K), -1, -1))

    for step in range(steps + 1):
        if step in RATIO_AT or step == steps:
            with torch.no_grad():
                found[step] = [features(points) for points in seen]
        h_x, h_y = (features(law.sample([RATIO_BATCH])) for law in (p, q))
        match row["loss"]:
            case "gan": loss = common.gan_critic(logit(h_x), logit(h_y))
            case "mmd": loss = -common.mmd(*common.gram(kernel, h_x, h_y))
            case "gram":
                K_all = common.gram(kernel, h_x, h_y)
                loss = -common.gram_objective(*K_all, row["form"], row["ridge"], LAMBDA)[0]
        common.descend((opt, loss))
    return found


def figure_ratio(rows, seeds, steps):
    """Does a critic preserve density ratios (GRAM, eq. 4, 5)? Critics trained alone where p and q are known.

    rows: {name: row}. A column a pair p, q. explained()'s share, means over seeds: along training, of two
    outputs; at the end, over the outputs. Then the error of kernel mean matching in the first row's space.
    """
    if any(row["loss"] not in ("gram", "mmd", "gan") for row in rows.values()):
        raise ValueError(f"--figure ratio: found {', '.join(rows)}, expected the losses gram, mmd or gan")
    pairs, two = ratio_pairs(), RATIO_K.index(2)
    figure = common.Figure(figsize=(3.6 * len(pairs), 12), layout="constrained")
    grid = figure.subplots(4, len(pairs), sharey="row")
    for column, (name, (p, q)) in zip(grid.T, pairs.items()):
        torch.manual_seed(0)
        seen = [law.sample([RATIO_POINTS]) for law in (p, q)]
        r, space = (p.log_prob(seen[1]) - q.log_prob(seen[1])).exp().double(), None
        for (axes, (kind, hidden)), row_name in itertools.product(zip(column[1:], RATIO_CRITICS.items()),
                                                                  rows):
            shares = []
            for seed in seeds:
                torch.manual_seed(seed)
                found = critics_alone(rows[row_name], p, q, hidden, seen, steps)
                shares.append([[explained(h[:, :K].double(), r)[1] for K, h in zip(RATIO_K, h_y)]
                               for _, h_y in found.values()])
                space = space or [h[two, :, :2] for h in found[steps]]
            shares = np.mean(shares, 0)                     # [updates, outputs]
            print(f"{name:<36}{kind:<8}{row_name:<18}", *(f"{share:.2f}" for share in shares[-1]), flush=True)
            axes.semilogx(RATIO_K, shares[-1], ".-")
            axes.set(xlabel=f"outputs of {kind} critics, {steps:,} updates", ylim=(0, 1.02))
            axes.set_xticks(RATIO_K, RATIO_K)
            axes.minorticks_off()
            if kind == "MLP":
                column[0].plot(list(found), shares[:, two], label=row_name)
        column[0].set(title=name, xscale="symlog", xlabel="update, MLP critics of 2 outputs", ylim=(0, 1.02))
        h_x, h_y = space
        r_f, kernel = explained(h_y.double(), r)[0], partial(common.gaussian, sigma=torch.ones(1))
        for ridge in RATIO_RIDGES:
            errors = []
            for n in RATIO_N:
                K_yy, K_yx = kernel(h_y[:n], h_y[:n]), kernel(h_y[:n], h_x[:n])
                error = common.density_ratio(K_yy, K_yx, ridge) - r_f[:n]
                errors.append(float(error.square().mean() / r.var()))
            column[3].loglog(RATIO_N, errors, ".-", label=f"ridge {ridge:g}")
            print(f"{name}: estimation error at", *(f"{n}: {e:.2g}" for n, e in zip(RATIO_N, errors)),
                  f"points, ridge {ridge:g}", flush=True)
        column[3].set_xlabel(f"points, in the space of {next(iter(rows))}'s MLP critic")
        column[3].set_xticks(RATIO_N, RATIO_N)
        column[3].minorticks_off()
    grid[0, 0].set_ylabel("Pearson divergence kept"), grid[0, 0].legend(fontsize=7)
    grid[3, 0].set_ylabel("E (estimate - r$_f$)$^2$ / Var r"), grid[3, 0].legend(fontsize=7)
    return figure


def mmd2_gradients(kernel, f, g, x, z):
    """Gradients of the biased and the unbiased MMD^2, means over minibatches, in all weights: [2, weights].

    x [..., N, 2] data, z [..., N, 2] noise, f critic, g generator.
    """
    K_all, weights = common.gram(kernel, f(x), f(g(z))), [*f.parameters(), *g.parameters()]
    both = [torch.autograd.grad(common.mmd2(*K_all, unbiased).mean(), weights, retain_graph=True)
            for unbiased in (False, True)]
    return torch.stack([torch.cat([part.flatten() for part in gradient]) for gradient in both])


def best_direction(x, y):
    """The unit vector theta [..., D, 1] with the largest unbiased MMD^2 of theta.x, theta.y under `dot`.

    x, y [..., N, D]. It is a matrix's first eigenvector (Demystifying MMD GANs, appendix B.5).
    """
    n, between = x.shape[-2], x.mean(-2)[..., :, None] * y.mean(-2)[..., None, :]
    within = (s.sum(-2)[..., :, None] * s.sum(-2)[..., None, :] - s.mT @ s for s in (x, y))
    return torch.linalg.eigh(sum(within) / (n * (n - 1)) - between - between.mT).eigenvectors[..., -1:]


def trained_critics(n, rng):
    """What critics trained on n points each of P = N((1, 0), I) and Q = N(0, I) find on fresh points: [2, 2].

    Means over the truth: a row [estimate, gradient in P's mean] of Wasserstein's distance between the first
    coordinates with the critic t or -t (appendix B.4), one of the MMD^2 along best_direction(). The gradient
    is that of a generator's step: the critic stays.
    """
    normal = partial(torch.randn, generator=rng, dtype=torch.float64)
    mean = torch.tensor([1.0, 0], dtype=torch.float64, requires_grad=True)
    (x, y), (t, u) = ((mean + normal(DRAWN // FRESH, k, 2), normal(DRAWN // FRESH, k, 2)) for k in (n, FRESH))
    with torch.no_grad():
        sign, theta = common.wasserstein(x[..., :1], y[..., :1]).sign(), best_direction(x, y)
    w = (sign * common.wasserstein(t[..., :1], u[..., :1])).mean()
    mmd2 = common.mmd2(*common.gram(common.dot, t @ theta, u @ theta), unbiased=True).mean()
    slopes = [torch.autograd.grad(loss, mean, retain_graph=True)[0][0] for loss in (w, mmd2)]
    return torch.stack([w, slopes[0], mmd2, slopes[1] / 2]).detach().view(2, 2)     # |mean|^2 has the slope 2


def score_gradients(n, rng):
    """Gradients in std, at 1, of FID and KID of n samples of N(0, std^2) to N(0, 1): [2, DRAWN // n].

    KID has n data, FID the law itself (appendix D.1). Over the second derivatives there, 2 and 24.
    """
    x, z = torch.randn(2, DRAWN // n, n, 1, generator=rng, dtype=torch.float64)
    std = torch.ones(len(z), 1, 1, dtype=torch.float64, requires_grad=True)
    y, cubic = std * z, lambda a, b: (common.dot(a, b) + 1) ** 3        # common.cubic for D = 1
    fid = y.mean(1).square() + (y.std(1) - 1).square()
    kid = common.mmd2(cubic(x, x), cubic(x, y), cubic(y, y), unbiased=True)
    return torch.stack([torch.autograd.grad(score.sum() / curvature, std, retain_graph=True)[0].flatten()
                        for score, curvature in ((fid, 2), (kid, 24))])


def figure_gradients():
    """What is zero in the mean, and what is not: Demystifying MMD GANs, section 3, appendices B and D."""
    figure, rng = common.Figure((14, 4.4), layout="constrained"), torch.Generator().manual_seed(0)
    fixed, trained, scores = figure.subplots(1, 3)

    def draw(axes, colour, name, *rows):
        print(f"{name}, for {SIZES} points:")
        for what, style, values in rows:
            axes.plot(SIZES, values, style, color=colour, markersize=4, linewidth=1)
            print(f"    {what:<28}" + " ".join(f"{v:7.4f}" for v in values))
        axes.plot([], [], "s", color=colour, markersize=4, label=name)

    torch.manual_seed(0)
    f, g = common.mlp(2, 32, 4).double(), common.mlp(2, 32, 2).double()     # ReLU networks, as initialised
    x = common.draw_mixture(*mixture("ring"), WHOLE, rng).double()
    z = common.normal_noise(WHOLE, 2, rng).double()
    for colour, (name, kernel) in enumerate(KERNELS.items()):
        truth, unbiased = mmd2_gradients(kernel, f, g, x, z)        # all pairs of all points: the population
        exact = (WHOLE - 1) * (truth - unbiased).norm() / truth.norm() / torch.tensor(SIZES)
        found = []
        for n in SIZES:
            draws = (torch.randint(WHOLE, (2, DRAWN // GROUPS // n, n), generator=rng) for _ in range(GROUPS))
            each = torch.stack([mmd2_gradients(kernel, f, g, x[i], z[j]) for i, j in draws])
            error = (each - truth) / truth.norm()                   # [GROUPS, 2, weights]
            found.append([*error.mean(0).norm(dim=1), (error[:, 1].var(0).sum() / GROUPS).sqrt()])
        biased, zero, noise = torch.tensor(found).T
        draw(fixed, f"C{colour}", f"MMD$^2$, {name}", ("biased, exactly", ":", exact),
             ("biased", "o", biased), ("unbiased", "x", zero), ("unbiased, standard error", "-", noise))
        print(f"    mean of (unbiased / error)^2, without bias 1: {(zero / noise).square().mean():.2f}")

    w, mmd2 = torch.stack([trained_critics(n, rng) for n in SIZES]).permute(1, 2, 0)
    signs = [math.erf(math.sqrt(n) / 2) for n in SIZES]             # 2 Phi(sqrt(n / 2)) - 1
    for colour, name, exact, (value, slope) in (("C0", "Wasserstein, critic t or -t", signs, w),
                                                ("C1", "MMD$^2$, dot, best direction", BEST_DIRECTION, mmd2)):
        draw(trained, colour, name,
             ("exactly", ":", exact), ("estimate", "o", value), ("gradient", "x", slope))
    trained.axhline(1, color="black", linewidth=0.6)

    found = [score_gradients(n, rng) for n in SIZES]
    fid, kid = torch.stack([each.mean(1) for each in found], 1)
    factor = [math.sqrt(2 / (n - 1)) * math.exp(math.lgamma(n / 2) - math.lgamma((n - 1) / 2)) for n in SIZES]
    exact = [1 + 1 / n - c for n, c in zip(SIZES, factor)]
    draw(scores, "C0", "FID", ("exactly", ":", exact), ("mean", "o", fid))
    draw(scores, "C1", "KID", ("mean", "x", kid.abs()),
         ("standard error", "-", [float(each[1].std() / each.shape[1] ** 0.5) for each in found]))
    print("std of the smallest mean FID:", " ".join(f"{c * n / (n + 1):.4f}" for n, c in zip(SIZES, factor)))

    fixed.set(title="fixed networks: o biased, dotted exactly,\nx unbiased, line its standard error",
              yscale="log", xlabel="points of a minibatch", ylabel="|mean gradient - truth| / |truth|")
    trained.set(title="trained critics: o estimate,\nx gradient in P's mean, dotted exactly",
                xlabel="training points", ylabel="mean / truth")
    scores.set(title="scores: gradient in the std where the truth is 0,\ndotted exactly, line standard error",
               yscale="log", xlabel="scored samples", ylabel="|mean gradient| / curvature")
    for axes in figure.axes:
        axes.set_xscale("log", base=2)
        axes.set_xticks(SIZES, SIZES)
        axes.legend(fontsize=7)
        axes.title.set_fontsize(9)
    return figure


def figure_dirac():
    """Scaled MMD, Figure 1 and section 2: P at 0, Q at theta, f(x) = psi x; Q descends, f ascends."""
    def losses(kind, theta, psi):           # what Q minimises, and what the critic maximises
        squared = common.mmd2(*common.gram(unit, 0 * theta[..., None, None], (psi * theta)[..., None, None]))
        if kind == "MMD":
            return squared, squared
        if kind == "SMMD":
            scaled = common.smmd2(squared, psi[..., None, None, None], 1.0, SCALED_LAMBDA + 1)
            return scaled, scaled
        t = DIRAC_BETWEEN * theta[..., None]                        # and the slope of the witness there
        p, q = ((-(psi[..., None] * w) ** 2 / 2).exp() * w * -psi[..., None] ** 2
                for w in (t, t - theta[..., None]))
        return squared, squared - common.gradient_penalty((p - q)[..., None]).mean(-1)

    def field(kind, theta, psi):
        theta, psi = theta.detach().requires_grad_(), psi.detach().requires_grad_()
        for_q, for_critic = losses(kind, theta, psi)
        return (-torch.autograd.grad(for_q.sum(), theta, retain_graph=True)[0],
                torch.autograd.grad(for_critic.sum(), psi)[0])

    axis, unit = partial(torch.linspace, dtype=torch.float64), common.unit_gaussian
    figure = common.Figure((13, 8.8), layout="constrained")
    theta, psi = torch.meshgrid(axis(-4, 4, 25), axis(-4, 4, 25), indexing="xy")
    starts = torch.tensor([[1.0, 0.5], [-3.0, 0.3], [3.0, 3.0]], dtype=torch.float64)     # at C MMD is flat
    fields, (critics, weak, sharp) = figure.subplots(2, 3)
    titles = {"MMD": "MMD$^2$", "MMD with a penalty": "MMD$^2$, additive penalty",
              "SMMD": f"SMMD$^2$, $\\lambda$ = {SCALED_LAMBDA}"}
    for axes, (kind, title) in zip(fields, titles.items()):
        u, v = field(kind, theta, psi)
        size = (u.square() + v.square()).sqrt().clamp(min=1e-12)
        arrows = axes.quiver(theta, psi, u / size, v / size, size.log10(), scale=35, width=0.003)
        figure.colorbar(arrows, ax=axes, label="log10 of the length", shrink=0.8)
        path = [starts]
        for _ in range(DIRAC_STEPS):
            path.append(path[-1] + DIRAC_RATE * torch.stack(field(kind, *path[-1].T), 1))
        for label, curve in zip("ABC", torch.stack(path, 1)):       # [time, 2] each
            axes.plot(*curve.T, "r-", linewidth=1.2)
            axes.plot(*curve[0], "ro", markersize=4)
            axes.annotate(label, tuple(curve[0]), xytext=(4, 4), textcoords="offset points", color="red")
            print(f"{kind}, from {label} = ({curve[0][0]:.1f}, {curve[0][1]:.1f}): theta {curve[-1][0]:.2g}, "
                  f"psi {curve[-1][1]:.2g} after {DIRAC_STEPS:,} steps of {DIRAC_RATE}")
        axes.set(title=title, xlabel="$\\theta$", ylabel="$\\psi$", xlim=(-4.2, 4.2), ylim=(-4.2, 4.2))
    t, grid = axis(-5, 25, 1_501)[:, None], axis(0.01, 10, 1_000)
    far = torch.full((1, 1), 20.0, dtype=torch.float64)
    best = float(grid[losses("SMMD", far[0].expand(len(grid)), grid)[0].argmax()])
    for psi, name in ((10.0, "MMD, $\\psi$ = 10"), (1.0, "MMD, $\\psi$ = 1 (spectral norm 1)"),
                      (best, f"SMMD, its best $\\psi$ = {best:.2f}")):
        norm = common.mmd2(*common.gram(unit, 0 * far, psi * far)).sqrt()
        critics.plot(t, common.witness(unit, psi * t, 0 * far, psi * far) / norm, label=name)
    critics.set(title="critics of norm 1 at $\\theta$ = 20", xlabel="x")
    n, psi = torch.logspace(0, 4, 41, dtype=torch.float64), torch.logspace(-3, 6, 901, dtype=torch.float64)
    at = (1 / n)[:, None].expand(-1, len(psi)), psi.expand(len(n), -1)
    h = (psi / n[:, None])[..., None, None]                         # of Q; P is at 0, where mu is
    J = psi.view(-1, 1, 1, 1).expand(len(n), -1, 1, 1, 1)
    exact, _ = common.gradient_constrained_mmd2(0 * h, h, 0 * h, J, SCALED_LAMBDA)
    for name, squared in (("MMD", losses("MMD", *at)[0]), ("SMMD", losses("SMMD", *at)[0]),
                          ("gradient-constrained MMD", exact)):
        values, i = squared.clamp(min=0).sqrt().max(1)
        weak.loglog(n, values, label=f"{name}, its best $\\psi$")
        sharp.loglog(n, psi[i], label=name)
        print(f"{name} of delta_0 and delta_1/n: {values[0]:.3g} at n = 1, {values[-1]:.3g} at {n[-1]:,.0f}")
    spectral = common.mmd2(*common.gram(unit, 0 * n[:, None, None], 1 / n[:, None, None])).clamp(min=0).sqrt()
    weak.loglog(n, spectral, "--", label="MMD, $\\psi$ = 1 (spectral norm 1)")
    weak.set(title="distance of $\\delta_0$ and $\\delta_{1/n}$", xlabel="n")
    sharp.set(title="where it is attained: $\\psi$", xlabel="n")
    for axes in (critics, weak, sharp):
        axes.legend(fontsize=7)
    return figure


def sobolev_critic(p, q, mu, spacing):
    """The Sobolev critic on a grid, [n, n]: its squared gradient has the mean 1 under mu, its border is 0.

    p, q and mu are densities at its nodes, in float64. Up to scale f solves -div(mu grad f) = p - q (Mroueh
    et al. 2018; Scaled MMD, appendix B), here by finite differences, with mu between two nodes their mean.
    """
    n = len(p)
    node, flow = torch.arange(n * n).view(n, n), torch.zeros(n * n, n * n, dtype=p.dtype)
    for at, m in ((node, mu), (node.T, mu.T)):      # neighbours in one direction, in the other
        i, j, between = at[1:].flatten(), at[:-1].flatten(), ((m[1:] + m[:-1]) / 2).flatten()
        for row, column, sign in ((i, i, 1), (j, j, 1), (i, j, -1), (j, i, -1)):
            flow.index_put_((row, column), sign * between, accumulate=True)
    inner = node[1:-1, 1:-1].flatten()
    flow = flow[inner][:, inner]                    # f @ flow @ f: the integral of mu |grad f|^2
    f = torch.linalg.solve(flow, (p - q).flatten()[inner] * spacing ** 2)
    return nn.functional.pad((f / (f @ flow @ f).sqrt()).view(n - 2, n - 2), (1, 1, 1, 1))


def figure_4():
    """Figure 4 of Scaled MMD: gradients of two critics between two Gaussians of our own, mu their mean."""
    centres, std = torch.tensor([[-1.0, 0.0], [1.0, 0.0]], dtype=torch.float64), 0.5
    line = torch.linspace(-3, 3, 61, dtype=torch.float64)
    nodes, spacing = torch.cartesian_prod(line, line), float(line[1] - line[0])             # [61 * 61, 2]
    p, q = ((-(nodes - centre).square().sum(1) / (2 * std ** 2)).exp().view(61, 61)
            / (2 * torch.pi * std ** 2) for centre in centres)
    f = sobolev_critic(p, q, (p + q) / 2, spacing)
    sobolev = torch.stack(torch.gradient(f, spacing=spacing), -1).view(-1, 2)

    rng = torch.Generator().manual_seed(0)
    x, y = (centre + std * torch.randn(200, 2, generator=rng, dtype=torch.float64) for centre in centres)
    mu, J = torch.cat([x, y]), torch.eye(2, dtype=torch.float64).expand(400, 2, 2)          # f(x) = x
    squared, critic = common.gradient_constrained_mmd2(x, y, mu, J, SCALED_LAMBDA)
    t = nodes.clone().requires_grad_()
    constrained, = torch.autograd.grad((critic(t) / squared.sqrt()).sum(), t)

    figure, dense = common.Figure((11, 5.4), layout="constrained"), (p + q > 0.05 * (p + q).max()).flatten()
    some = torch.arange(61 * 61).view(61, 61)[::3, ::3].flatten()
    fields = ("gradient-constrained MMD", constrained), ("Sobolev", sobolev)
    for axes, (name, field) in zip(figure.subplots(1, 2), fields):
        size = field.norm(dim=1, keepdim=True)
        axes.contour(line, line, (p + q).T, levels=4, colors="tab:blue", linewidths=0.6)
        axes.quiver(*nodes[some].T, *(field / size.clamp(min=1e-12))[some].T, color="0.75", scale=30)
        axes.quiver(*nodes[some].T, *field[some].T, color="black", scale=20 * float(size[dense].max()))
        axes.set(title=name, aspect="equal", xlim=(-4, 4), ylim=(-4, 4))
        print(f"{name}: largest gradient {size[dense].max():.3g} where p + q is above a twentieth of "
              f"its maximum, {size.max():.3g} anywhere")
    return figure


def figure_5():
    """Figure 5 of Scaled MMD: logs of distances of N(0, 0.1^2) to N(mu, std^2), f(x) = x / psi, lambda 1."""
    mu, constrained = torch.linspace(-10, 10, GRID_5[0], dtype=torch.float64), "gradient-constrained MMD"
    std = torch.logspace(-2, 1, GRID_5[1], dtype=torch.float64)
    x, noise = (scale * torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)[:, None]
                for scale, n in ((0.1, 48), (1, 128)))      # of equal mass: a quadrature has no noise

    def distances(psi):         # MMD, SMMD and gradient-constrained MMD, each [std, mu]
        rows, J = [], torch.full((len(x), 1, 1), 1 / psi, dtype=torch.float64)
        for s in std:           # one at a time for memory
            h_x, h_y = (x / psi).expand(len(mu), -1, -1), (mu[:, None, None] + s * noise) / psi
            squared = common.mmd2(*common.gram(common.unit_gaussian, h_x, h_y))
            exact, _ = common.gradient_constrained_mmd2(h_x, h_y, x / psi, J, 1.0)
            rows.append(torch.stack([squared, common.smmd2(squared, J, 1.0, 2.0), exact]))
        return torch.stack(rows, 1).clamp(min=1e-30).sqrt()

    best = torch.stack([distances(psi) for psi in torch.logspace(-2, 2, GRID_5[2]).tolist()]).amax(0)
    panels = {f"{name}, $\\psi$ = {psi:g}": distances(psi)[i] for name, i in (("MMD", 0), (constrained, 2))
              for psi in (0.1, 10)}
    panels |= {"SMMD, best $\\psi$ of each point": best[1], f"{constrained}, best $\\psi$": best[2]}
    figure = common.Figure(figsize=(9, 9), layout="constrained")
    for axes, (title, values) in zip(figure.subplots(3, 2).flat, panels.items()):
        mesh = axes.pcolormesh(mu.numpy(), std.numpy(), values.log().numpy(), shading="nearest")
        figure.colorbar(mesh, ax=axes)
        axes.set(title=title, yscale="log", xlabel="$\\mu$", ylabel="$\\sigma$")
    figure.suptitle("log D(N(0, 0.1$^2$), N($\\mu$, $\\sigma^2$)), $\\lambda$ = 1; at one $\\psi$ the SMMD "
                    "is the MMD times a constant", fontsize=10)
    ratio = best[1] / best[2]
    print(f"best SMMD / best gradient-constrained MMD over the grid: {ratio.min():.3f} to {ratio.max():.3f}")
    return figure


def main(argv=None):
    parser = common.flags(__doc__, METHODS, "gram", FIGURES["1"]["steps"], images="")
    parser.add_argument("--figure", default="1", choices=FIGURES,
                        help="of a paper (default 1); 2 and gamn have other defaults, and keep finished runs")
    parser.set_defaults(seeds=None)
    args = parser.parse_args(argv)
    out, chosen, single = f"{args.out}/ring2d-figure{args.figure}", FIGURES[args.figure], args.figure == "1"
    rows = dict(row_of(name) for name in args.method or chosen["method"])
    steps, seeds = args.steps or chosen["steps"], list(args.seeds or range(chosen["seeds"]))
    torch.set_num_threads(1)            # the matrices are too small to share between cores
    match args.figure:
        case "dirac": return common.save_figure(f"{out}.png", figure_dirac())
        case "gradients": return common.save_figure(f"{out}.png", figure_gradients())
        case "ratio": return common.save_figure(f"{out}.png", figure_ratio(rows, seeds, steps))
        case "gaussians":
            common.save_figure(f"{out}4.png", figure_4())
            return common.save_figure(f"{out}5.png", figure_5())

    device, runs = common.setup(args.device), []
    for name, row in rows.items():      # a run has one seed for Figure 1, all seeds for the others
        common.show(name, row, *networks(row, cells(args.figure, seeds)[-1]))       # the largest
        for own in [[seed] for seed in seeds] if single else [seeds]:
            folder = f"{args.out}/ring2d-{name}-s{own[0]}" if single else f"{out}-{name}"
            runs.append(common.Run(name, row, own, folder))
    common.run_folders([run.folder for run in runs], __file__, args.resume or not single)
    print(common.log_head(COLUMNS, steps, device))
    results = common.interleave({run.folder: train(*run, steps, device, args.figure) for run in runs},
                                common.command(argv))

    finished = [(run, results[run.folder]) for run in runs if "failed" not in results[run.folder]]
    if not finished:
        raise common.RunError("no run finished")
    if single:
        for run, result in finished:
            figure_1(run, result)
            animate(run)
        return
    match args.figure:
        case "2": text = figure_2(finished)
        case "k": text = figure_k(finished, f"{out}.png")
        case "gamn": text = figure_gamn(finished, f"{out}.png")
    print(text)
    made = f"{common.command(argv)}\n{', '.join(common.machine(device).values())}"
    with common.replacing(f"{out}.md") as file:
        file.write(f"{made}\n\n{text}\n".encode(errors="backslashreplace"))


if __name__ == "__main__":
    common.run(main)
