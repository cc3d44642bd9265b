"""Figures 6 and 9b of Generative Ratio Matching Networks (ICLR 2020): a tilted ring, seen in 2 dimensions.

    python ring3d.py                    all four methods: 6 to 16 minutes on a CPU core
    python ring3d.py --method gram      Figure 6 alone

Expect over three seeds 8 of 8 modes from gram, with 0.68 to 0.83 of the samples within 0.6 of a mode, and
from mmdnet, with 0.76 to 0.78. gan collapses with one seed of three; mmdgan diverges with all. A run goes to
runs/ring3d-METHOD-sSEED/: figure.png, points-UPDATE.npz, log.csv, checkpoint.pt, result.json.
"""
import math
import sys
from functools import partial

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

import common

STEPS = 10_000                      # Figure 6 ends here
BATCH = 200                         # of data and of samples, appendix B.1
MODES, RADIUS = 8, 2.0              # JuliaGRAM; the paper gives no radius
STD, STD_3 = 0.2, 0.1               # in the ring's plane, JuliaGRAM (the paper says 0.01); across it, B.2
DEGREES = 60                        # about the second axis, appendix B.2
HIDDEN, Z, K = (100, 100), 20, 2    # section 3.4; Z, of N(0, I), JuliaGRAM, scripts/predefined_args.jl
SIGMA = (1.0,)                      # appendix B.1
RIDGE = 1e-3                        # JuliaGRAM, src/kmm.jl; not in the paper
LAMBDA = 1.0                        # GRAM, eq. 9
FEASIBLE, AUTOENCODER = 16.0, 8.0   # weights of MMD-GAN's terms, OctoberChang/MMD-GAN and JuliaGRAM
CRITIC_STEPS, CLIP = 5, 0.1         # MMD-GAN, appendix B.3 and its footnote
POINTS = 10_000                     # samples on which modes and shares are counted
COVERED = 0.02                      # ours: a mode is found with this share of the samples or more
LOG_EVERY = 1_000                   # rows in the terminal
TRACE_EVERY = 10                    # rows in log.csv
SAVE_EVERY = 5_000                  # a multiple of TRACE_EVERY: what is saved has been seen to be finite

METHODS = {         # appendix B.1; panels: the updates of Figures 6 and 9b
    "gram":   dict(adam=(1e-3, 0.5, 0.999), form="sum", panels=(0, 100, 1_000, 10_000)),
    "gan":    dict(adam=(1e-4, 0.5, 0.999), panels=(0, 100, 1_000, 10_000)),
    "mmdnet": dict(rmsprop=1e-3, panels=(0, 100, 1_000, 10_000)),
    "mmdgan": dict(adam=(5e-5, 0.5, 0.999), panels=(100, 500, 1_000)),
}
COLUMNS = ("loss_f", "loss_g", "pearson", "mean_r")


def tilt(points):
    """Points [N, 3] turned by DEGREES about the second axis (B.2; MLToolkit, src/Datasets/ring.jl)."""
    c, s = math.cos(math.radians(DEGREES)), math.sin(math.radians(DEGREES))
    return points @ torch.tensor([[c, 0, -s], [0, 1, 0], [s, 0, c]], dtype=points.dtype, device=points.device)


def networks(method):
    """Generator, critic and decoder, None for what the method has not."""
    return (common.mlp(Z, *HIDDEN, 3),
            None if method == "mmdnet" else common.mlp(3, *HIDDEN, 1 if method == "gan" else K),
            common.mlp(K, *HIDDEN, 3) if method == "mmdgan" else None)


def train(method, seed, folder, settings, steps, device):
    """One run: a generator that yields when ready and after each update, and returns its result.

    It is sent whether to save.
    """
    row = METHODS[method]
    torch.manual_seed(seed)
    g, f, decoder = (network.to(device) if network else None for network in networks(method))

    rng = torch.Generator(device).manual_seed(seed)
    log = common.Log(folder, COLUMNS, steps, device)
    opt_g = common.optimizer(g, row.get("adam"), row.get("rmsprop"))
    state = dict(g=g, opt_g=opt_g, rng=rng, log=log)
    if f:
        critic = nn.ModuleList([f, decoder] if decoder else [f])
        opt_f = common.optimizer(critic, row.get("adam"), row.get("rmsprop"))
        state |= dict(critic=critic, opt_f=opt_f)
    centres = common.ring_centres(MODES, RADIUS).to(device)
    kernel = partial(common.gaussian, sigma=torch.tensor(SIGMA, device=device))

    def data(n, rng):
        plane = common.draw_mixture(centres, STD, n, rng)
        return tilt(torch.cat([plane, STD_3 * common.normal_noise(n, 1, rng)], 1))

    def update():
        x, y = data(BATCH, rng), g(common.normal_noise(BATCH, Z, rng))
        if method == "gram":        # Algorithm 1: one forward pass, one K, both gradients, both steps
            K_all = common.gram(kernel, f(x), f(y))
            objective, r = common.gram_objective(*K_all, row["form"], RIDGE, LAMBDA)
            loss_g = common.mmd2(*K_all)
            common.descend((opt_f, -objective), (opt_g, loss_g))
            log.add(-objective, loss_g, common.pearson(r), r.mean())
        elif method == "gan":
            loss_f = common.gan_critic(f(x), f(y.detach()))
            common.descend((opt_f, loss_f))
            loss_g = common.gan_generator(f(g(common.normal_noise(BATCH, Z, rng))))
            common.descend((opt_g, loss_g))
            log.add(loss_f, loss_g, None, None)
        elif method == "mmdnet":
            loss_g = common.mmd(*common.gram(kernel, x, y))
            common.descend((opt_g, loss_g))
            log.add(None, loss_g, None, None)
        else:                       # Li et al. 2017, Algorithm 1: the critic maximises, held by three terms
            for _ in range(CRITIC_STEPS):
                a, b = data(BATCH, rng), g(common.normal_noise(BATCH, Z, rng)).detach()
                h_a, h_b = f(a), f(b)
                loss_f = (AUTOENCODER * (common.reconstruction(a, decoder(h_a))
                                         + common.reconstruction(b, decoder(h_b)))
                          - common.mmd(*common.gram(kernel, h_a, h_b))
                          - FEASIBLE * common.feasible_set(h_a, h_b))
                common.descend((opt_f, loss_f))
                common.clip_weights(f, CLIP)
            h_x, h_y = f(x), f(y)
            loss_g = common.mmd(*common.gram(kernel, h_x, h_y)) + FEASIBLE * common.feasible_set(h_x, h_y)
            common.descend((opt_g, loss_g))
            log.add(loss_f, loss_g, None, None)

    @torch.no_grad()
    def points(n):                  # the same draws at every update
        fixed = torch.Generator(device).manual_seed(0)
        x, y = data(n, fixed), g(common.normal_noise(n, Z, fixed))
        found = dict(x=x, y=y, f_x=f(x), f_y=f(y)) if f else dict(x=x, y=y)
        return {name: t.cpu() for name, t in found.items()}

    def keep_points():
        with common.replacing(f"{folder}/points-{step}.npz") as file:
            np.savez(file, **points(1_000))

    step = common.load(folder, state, settings)
    if step == 0 and 0 in row["panels"]:
        keep_points()
    update = common.capture(update, state)
    yield                               # when all runs are ready, the clock starts
    log.start(step)
    while step < steps:
        update()
        step += 1
        if step % TRACE_EVERY == 0 or step == steps:
            log.row(step, shown=step % LOG_EVERY == 0)
        if step in row["panels"]:
            keep_points()
        if (yield) or step % SAVE_EVERY == 0 or step == steps:
            common.save(folder, step, state, settings)

    flat = torch.cat([centres.cpu(), torch.zeros(MODES, 1)], 1)
    masses = common.mode_masses(points(POINTS)["y"], tilt(flat), STD)
    return dict(method=method, seed=seed, updates=step, modes=int((masses >= COVERED).sum()),
                share=float(masses.sum()), samples=POINTS, seconds=log.seconds, **common.machine(device))


def figure(folder, method, result):
    """Figure 6 or 9b: data and samples in space, and in the critic's space, during training."""
    shown = [step for step in METHODS[method]["panels"] if step <= result["updates"]]
    picture = Figure(figsize=(2.8 * max(len(shown), 2), 6), layout="constrained")
    for column, step in enumerate(shown, 1):
        p = np.load(f"{folder}/points-{step}.npz")
        axes = picture.add_subplot(2, len(shown), column, projection="3d")
        for points, colour, label in ((p["x"], "tab:blue", "data"), (p["y"], "tab:orange", "samples")):
            axes.scatter(*points.T, s=3, color=colour, alpha=0.4, linewidths=0, label=label)
        axes.set_title(f"update {step:,}: data space", fontsize=9)
        axes.tick_params(labelsize=6)
        if column == 1:
            axes.legend(fontsize=7, markerscale=3)
        if "f_x" in p:
            axes = picture.add_subplot(2, len(shown), len(shown) + column)
            common.scatter_panel(axes, p["f_x"], p["f_y"], "critic's space")
    picture.suptitle(f"{method}, {result['updates']:,} updates: {result['modes']} of {MODES} modes,\n"
                     f"{result['share']:.3f} of the samples within {3 * STD:.1f} of a mode", fontsize=10)
    common.save_figure(f"{folder}/figure.png", picture)


def main(argv=None):
    args = common.flags(__doc__, METHODS, list(METHODS), STEPS, images=False).parse_args(argv)
    device = common.setup(args.device)
    torch.set_num_threads(1)            # the matrices are too small to share between cores
    runs = common.open_runs(args.out, __file__, globals(), args.method, args.seeds, args.resume, device)
    for method in dict.fromkeys(args.method):
        g, f, decoder = networks(method)
        print(f"{method}: generator of {common.count(g):,} parameters, critic of {common.count(f):,}, "
              f"decoder of {common.count(decoder):,}")
    print(common.log_head(COLUMNS))
    results = common.train_all(runs, lambda run: train(*run, args.steps, device),
                               common.command(__file__, argv))

    for (method, _, folder, _), result in common.ended(runs, results):
        figure(folder, method, result)
        print(f"{folder}: {result['modes']} of {MODES} modes, "
              f"{result['share']:.3f} of {POINTS:,} samples within {3 * STD:.1f} of a mode")
    if all(isinstance(result, FloatingPointError) for result in results):
        sys.exit("no run finished")


if __name__ == "__main__":
    common.run(main)
