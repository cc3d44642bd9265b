"""Figure 1 of Generative Ratio Matching Networks (ICLR 2020): a generator learns a ring of eight Gaussians.

    python ring2d.py                                        45 seconds on a CPU core
    python ring2d.py --method gram gram-clip --seeds 3      two forms of the critic's objective, three seeds

Expect 8 of 8 modes, and 0.88 to 0.90 of the samples within 3 std of a mode (of data: 0.989). A run goes to
runs/ring2d-METHOD-sSEED/: figure1.png, points-UPDATE.npz, log.csv, checkpoint.pt, result.json.
"""
import sys

import numpy as np
import torch
from matplotlib.figure import Figure

import common

STEPS = 10_000                      # Figure 1a ends here
PANELS = (10, 100, 1_000, 10_000)   # updates, Figure 1a
BATCH = 200                         # of data and of samples, appendix B.1
MODES, RADIUS = 8, 2.0              # JuliaGRAM; the paper gives no radius
STD = 0.2                           # JuliaGRAM; the paper says 0.01
Z = 20                              # N(0, I), JuliaGRAM, scripts/predefined_args.jl
HIDDEN = (100, 100)                 # of both networks, section 3.4
K = 2                               # the critic's dimension, section 3.4
SIGMA = (1.0,)                      # appendix B.1
LR, BETAS = 1e-3, (0.5, 0.999)      # Adam, appendix B.1
RIDGE = 1e-3                        # JuliaGRAM, src/kmm.jl; not in the paper
LAMBDA = 1.0                        # eq. 9
POINTS = 10_000                     # samples on which modes and share are counted
LOG_EVERY = 1_000                   # rows in the terminal
TRACE_EVERY = 10                    # rows in log.csv after the 100th update, one for each before, Figure 1b
SAVE_EVERY = 1_000                  # a multiple of TRACE_EVERY: what is saved has been seen to be finite

METHODS = {     # what the critic maximises (common.gram_objective); the generator minimises eq. 10
    "gram":      dict(form="sum"),      # eq. 9, the paper's; on the ring it does as well as the next two
    "gram-mean": dict(form="mean"),
    "gram-clip": dict(form="clip"),
    "gram-flow": dict(form="flow"),     # what trains on images, behind the others here (README.md)
}
COLUMNS = ("loss_f", "loss_g", "pearson", "mean_r")


def networks():
    """Generator and critic."""
    return common.mlp(Z, *HIDDEN, 2), common.mlp(2, *HIDDEN, K)


def train(method, seed, folder, settings, steps, device):
    """One run: a generator function that yields after each update and returns the run's result."""
    form = METHODS[method]["form"]
    torch.manual_seed(seed)
    g, f = (network.to(device) for network in networks())
    opt_g, opt_f = common.adam(g, LR, BETAS), common.adam(f, LR, BETAS)
    rng = torch.Generator(device).manual_seed(seed)
    log = common.Log(folder, COLUMNS, steps, device)
    centres = common.ring_centres(MODES, RADIUS).to(device)
    sigma = torch.tensor(SIGMA, device=device)

    def update():       # GRAM, Algorithm 1: one forward pass, one K, both gradients, both steps
        x = common.draw_mixture(centres, STD, BATCH, rng)
        y = g(common.normal_noise(BATCH, Z, rng))
        K_all = common.gram(lambda a, b: common.gaussian(a, b, sigma), f(x), f(y))
        objective, r = common.gram_objective(*K_all, form, RIDGE, LAMBDA)
        loss_g = common.mmd2(*K_all)
        common.descend((opt_f, -objective), (opt_g, loss_g))
        log.add(-objective, loss_g, common.pearson(r), r.mean())

    @torch.no_grad()
    def points(n):      # the same draws at every update
        fixed = torch.Generator(device).manual_seed(0)
        x = common.draw_mixture(centres, STD, n, fixed)
        y = g(common.normal_noise(n, Z, fixed))
        return {name: t.cpu() for name, t in (("x", x), ("y", y), ("f_x", f(x)), ("f_y", f(y)))}

    state = dict(g=g, f=f, opt_g=opt_g, opt_f=opt_f, rng=rng, log=log)
    step = common.load(folder, state, settings)
    update = common.capture(update, state)
    log.start(step)
    while step < steps:
        update()
        step += 1
        if step <= 100 or step % TRACE_EVERY == 0 or step == steps:
            log.row(step, shown=step % LOG_EVERY == 0)
        if step in PANELS:
            with common.replacing(f"{folder}/points-{step}.npz") as file:
                np.savez(file, **points(1_000))
        if step % SAVE_EVERY == 0 or step == steps:
            common.save(folder, step, state, settings)
        yield

    modes, share = common.mode_coverage(points(POINTS)["y"], centres.cpu(), STD)
    return dict(method=method, seed=seed, updates=step, modes=modes, share=share, samples=POINTS,
                seconds=log.seconds, **common.machine(device))


def figure_1(folder, result):
    """Figure 1: both spaces during training, and the traces of both objectives."""
    figure = Figure(figsize=(10, 8.2), layout="constrained")
    grid = figure.add_gridspec(3, 4)
    shown = [step for step in PANELS if step <= result["updates"]]
    for column, step in enumerate(shown):
        p = np.load(f"{folder}/points-{step}.npz")
        top, bottom = figure.add_subplot(grid[0, column]), figure.add_subplot(grid[1, column])
        common.scatter_panel(top, p["x"], p["y"], f"update {step:,}: data space")
        common.scatter_panel(bottom, p["f_x"], p["f_y"], "critic's space")
        if column == 0:
            top.legend(fontsize=7, markerscale=3)
    trace = common.read_log(folder)
    eq_7 = "r = q / p at data" if METHODS[result["method"]]["form"] == "flow" else "eq. 7"
    left = figure.add_subplot(grid[2, :2])
    right = figure.add_subplot(grid[2, 2:], sharey=left)
    for axes, part in ((left, trace["step"] <= 100), (right, trace["step"] >= 100)):
        common.curve_panel(axes, trace["step"][part], {
            "generator's loss, eq. 10": trace["loss_g"][part],
            f"Pearson divergence estimate mean((r - 1)$^2$), {eq_7}": trace["pearson"][part]})
    right.legend(fontsize=7)
    figure.suptitle(f"{result['method']}, {result['updates']:,} updates: {result['modes']} of {MODES} modes, "
                    f"{result['share']:.3f} of the samples within 3 std of a mode", fontsize=11)
    figure.supxlabel("The paper draws D* (eq. 5), a constant minus the Pearson divergence; the constant is "
                     "unknown.", fontsize=8)
    common.save_figure(f"{folder}/figure1.png", figure)


def main(argv=None):
    args = common.flags(__doc__, METHODS, "gram", STEPS, images=False).parse_args(argv)
    device = common.setup(args.device)
    torch.set_num_threads(1)            # the matrices are too small to share between cores
    runs = common.open_runs(args.out, __file__, globals(), args.method, args.seeds, args.resume, device)
    g, f = networks()
    print(f"generator of {common.count(g):,} parameters, critic of {common.count(f):,}")
    print(common.log_head(COLUMNS))
    results = common.interleave([train(*run, args.steps, device) for run in runs])

    for (_, _, folder, _), result in zip(runs, results):
        if isinstance(result, FloatingPointError):
            print(f"{folder}: {result}")
            continue
        common.write_json(f"{folder}/result.json", dict(result, command=common.command(__file__, argv)))
        figure_1(folder, result)
        print(f"{folder}/figure1.png\n{result['modes']} of {MODES} modes, "
              f"{result['share']:.3f} of {POINTS:,} samples within 3 std of a mode")
    if all(isinstance(result, FloatingPointError) for result in results):
        sys.exit("no run finished")


if __name__ == "__main__":
    common.run(main)
