"""Figures 6 and 9b of Generative Ratio Matching Networks (ICLR 2020): a tilted ring, seen in 2 dimensions.

    python ring3d.py                            all four methods: 6 to 16 minutes on a CPU core
    python ring3d.py --method gram              Figure 6 alone
    python ring3d.py --method gram+form=swap    a row with other values of its keys, see DEFAULTS

Expect over three seeds 8 of 8 modes from gram, with 0.68 to 0.83 of the samples within 0.6 of a mode, and
from mmdnet, with 0.76 to 0.78. gan collapses with one seed of three; mmdgan diverges with all. A run goes to
runs/ring3d-METHOD-sSEED/: figure.png, points-UPDATE.npz, log.csv, checkpoint.pt, result.json.
"""
import math
from functools import partial

import numpy as np
import torch
from torch import nn

import common

STEPS = 10_000                      # Figure 6 ends here
PANELS, PANELS_9 = (0, 100, 1_000, 10_000), (100, 500, 1_000)       # updates, Figure 6, Figure 9b of mmdgan
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
COLUMNS = ("loss_f", "loss_g", "pearson", "mean_r")

DEFAULTS = dict(
    loss="gram",            # of NAMES; train() has what each is
    form="sum",             # of gram: common.gram_objective
    opt="adam",             # or rmsprop
    lr=1e-3,                # learning rate
    beta=(0.5, 0.999),      # of Adam
    batch=200,              # of data and of samples
)
NAMES = dict(loss="gram gan mmdnet mmdgan".split(), form=[*common.FORMS],
             opt=["adam", "rmsprop"])
METHODS = {                 # appendix B.1
    "gram":   dict(loss="gram", form="sum"),                # eq. 9, the paper's
    "gan":    dict(loss="gan", lr=1e-4),
    "mmdnet": dict(loss="mmdnet", opt="rmsprop"),
    "mmdgan": dict(loss="mmdgan", lr=5e-5),
}
CONSTANTS = {k: v for k, v in globals().items() if k.isupper() and isinstance(v, (int, float, tuple))}


def tilt(points):
    """Points [N, 3] turned by DEGREES about the second axis (B.2; MLToolkit, src/Datasets/ring.jl)."""
    c, s = math.cos(math.radians(DEGREES)), math.sin(math.radians(DEGREES))
    x, y, z = points.unbind(1)
    return torch.stack([c * x + s * z, y, c * z - s * x], 1)


def networks(row):
    """Generator, critic and decoder of a row, None for what it has not."""
    return (common.mlp(Z, *HIDDEN, 3),
            None if row["loss"] == "mmdnet" else common.mlp(3, *HIDDEN, 1 if row["loss"] == "gan" else K),
            common.mlp(K, *HIDDEN, 3) if row["loss"] == "mmdgan" else None)


def train(name, row, seed, folder, steps, device):
    """One run, a generator: it yields after each update, is sent whether to save, and returns its result."""
    torch.manual_seed(seed)
    g, f, decoder = (network.to(device) if network else None for network in networks(row))
    players = nn.ModuleDict({key: part for key, part in dict(f=f, decoder=decoder).items() if part})
    rng, batch = torch.Generator(device).manual_seed(seed), row["batch"]
    opt_g = common.optimizer(g, row["opt"], row["lr"], row["beta"])
    opt_f = common.optimizer(players, row["opt"], row["lr"], row["beta"]) if f else None
    log = common.Log(folder, COLUMNS, steps, device)
    state = dict(g=g, opt_g=opt_g, players=players, rng=rng, log=log) | (dict(opt_f=opt_f) if f else {})
    centres = common.ring_centres(MODES, RADIUS).to(device)
    kernel = partial(common.gaussian, sigma=torch.tensor(SIGMA, device=device))

    def data(n, rng):
        plane = common.draw_mixture(centres, STD, n, rng)
        return tilt(torch.cat([plane, STD_3 * common.normal_noise(n, 1, rng)], 1))

    def update():
        x, y = data(batch, rng), g(common.normal_noise(batch, Z, rng))
        match row["loss"]:
            case "gram":        # Algorithm 1: one forward pass, one K, both gradients, both steps
                K_all = common.gram(kernel, f(x), f(y))
                objective, r = common.gram_objective(*K_all, row["form"], RIDGE, LAMBDA)
                loss_g = common.mmd2(*K_all)
                common.descend((opt_f, -objective), (opt_g, loss_g))
                log.add(loss_f=-objective, loss_g=loss_g, pearson=common.pearson(r), mean_r=r.mean())
            case "gan":
                loss_f = common.gan_critic(f(x), f(y.detach()))
                common.descend((opt_f, loss_f))
                loss_g = common.gan_generator(f(g(common.normal_noise(batch, Z, rng))))
                common.descend((opt_g, loss_g))
                log.add(loss_f=loss_f, loss_g=loss_g)
            case "mmdnet":
                loss_g = common.mmd(*common.gram(kernel, x, y))
                common.descend((opt_g, loss_g))
                log.add(loss_g=loss_g)
            case "mmdgan":      # Li et al. 2017, Algorithm 1: the critic maximises, held by three terms
                for _ in range(CRITIC_STEPS):
                    a, b = data(batch, rng), g(common.normal_noise(batch, Z, rng)).detach()
                    h_a, h_b = f(a), f(b)
                    loss_f = (AUTOENCODER * (common.reconstruction(a, decoder(h_a))
                                             + common.reconstruction(b, decoder(h_b)))
                              - common.mmd(*common.gram(kernel, h_a, h_b))
                              - FEASIBLE * common.feasible_set(h_a, h_b))
                    common.descend((opt_f, loss_f))
                    common.clip_weights(f, CLIP)
                    log.add(loss_f=loss_f)
                h_x, h_y = f(x), f(y)
                loss_g = common.mmd(*common.gram(kernel, h_x, h_y)) + FEASIBLE * common.feasible_set(h_x, h_y)
                common.descend((opt_g, loss_g))
                log.add(loss_g=loss_g)

    @torch.no_grad()
    def points(n):                  # the same draws at every update
        fixed = torch.Generator(device).manual_seed(0)
        x, y = data(n, fixed), g(common.normal_noise(n, Z, fixed))
        found = dict(x=x, y=y, f_x=f(x), f_y=f(y)) if f else dict(x=x, y=y)
        return {key: t.cpu() for key, t in found.items()}

    def keep_points():
        with common.replacing(f"{folder}/points-{step}.npz") as file:
            np.savez(file, **points(1_000))

    settings = dict(CONSTANTS, row=row, seed=seed, device=device.type)
    step = common.load(folder, state, settings)
    if step == 0:
        keep_points()
    update = common.capture(update, rng)
    log.start(step)
    while step < steps:
        update()
        step += 1
        if step % TRACE_EVERY == 0 or step == steps:
            log.row(step, shown=step % LOG_EVERY == 0 or step == steps)
        if step in PANELS + PANELS_9:
            keep_points()
        stop = yield
        if stop or step % SAVE_EVERY == 0 or step == steps:
            common.save(folder, step, state, settings)

    flat = torch.cat([centres.cpu(), torch.zeros(MODES, 1)], 1)
    masses = common.mode_masses(points(POINTS)["y"], tilt(flat), STD)
    return dict(method=name, row=row, seed=seed, updates=step, modes=int((masses >= COVERED).sum()),
                share=float(masses.sum()), samples=POINTS, seconds=log.seconds,
                parameters=common.parameters(g, f, decoder), **common.machine(device))


def figure(run, result):
    """Figure 6 or 9b: data and samples in space, and in the critic's space, during training."""
    panels = PANELS_9 if run.row["loss"] == "mmdgan" else PANELS
    shown = [step for step in panels if step <= result["updates"]]
    picture = common.Figure(figsize=(2.8 * max(len(shown), 2), 6), layout="constrained")
    for column, step in enumerate(shown, 1):
        p = np.load(f"{run.folder}/points-{step}.npz")
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
    picture.suptitle(f"{run.name}, {result['updates']:,} updates: {result['modes']} of {MODES} modes,\n"
                     f"{result['share']:.3f} of the samples within {3 * STD:.1f} of a mode", fontsize=10)
    common.save_figure(f"{run.folder}/figure.png", picture)
    print(f"{run.folder}: {result['modes']} of {MODES} modes, "
          f"{result['share']:.3f} of {POINTS:,} samples within {3 * STD:.1f} of a mode")


def main(argv=None):
    args = common.flags(__doc__, METHODS, "gram", STEPS, images="").parse_args(argv)
    rows = dict(common.find_row(name, METHODS, DEFAULTS, NAMES) for name in args.method or METHODS)
    steps, device = args.steps or STEPS, common.setup(args.device)
    torch.set_num_threads(1)            # the matrices are too small to share between cores
    for name, row in rows.items():
        common.show(name, row, *networks(row))
    runs = [common.Run(name, row, seed, f"{args.out}/ring3d-{name}-s{seed}")
            for name, row in rows.items() for seed in args.seeds]
    common.run_folders([run.folder for run in runs], __file__, args.resume)
    print(common.log_head(COLUMNS, steps, device))
    results = common.interleave({run.folder: train(*run, steps, device) for run in runs},
                                common.command(argv))

    finished = [(run, results[run.folder]) for run in runs if "failed" not in results[run.folder]]
    if not finished:
        raise common.RunError("no run finished")
    for run, result in finished:
        figure(run, result)


if __name__ == "__main__":
    common.run(main)
