"""CIFAR-10: every image method of five papers on kernel-based generative models, one row a method.

    python cifar.py --method gram --features FILE.pt2       under 2 minutes on an H200, an hour on a CPU core
    python cifar.py --method gram gan mmdgan --seeds 3 --features FILE.pt2          at once, side by side
    python cifar.py --table scaled                          the methods of a paper's table beside its numbers
    python cifar.py --figure bias                           what estimates of FID and KID are worth, 4 minutes

Expect a Frechet distance of 29 ± 3 from gram on EfficientNet-Lite0 features (FID has others; see README.md).
A run goes to runs/cifar-METHOD-sSEED/: samples-UPDATE.png, samples.npy, log.csv, checkpoint.pt, result.json;
the curves of all runs of a command are runs/cifar-curves.png.
"""
import os
import sys

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn.utils import parametrize

import common

STEPS = 60_000              # GRAM's paper does not say, GRAMFlow has 156,000; all others 150,000
BATCH = 64                  # of data and of samples, in all papers; a row may have its own
SIGMA = (1, 2, 4, 8, 16)    # bandwidths of Li et al. 2017, as GRAM's section 4 says; GRAMFlow: their squares
RBF = (2, 5, 10, 20, 40, 80)            # Demystifying MMD GANs, section 5; GMMN's code: their squares
ALPHA = (0.2, 0.5, 1, 2, 5)             # Demystifying MMD GANs, section 5; its code has 0.1, 1, 10
LAMBDA = 1.0                # GRAM, eq. 9
BURST, BURST_UNTIL, BURST_EVERY = 100, 25, 500      # MMD-GAN's critic steps: at updates 1 to 25, every 500th
ENCODE = 20_000             # steps of GMMN+AE's autoencoder, before all; ours, the paper trains layer by layer
AVERAGE = 3                 # samples come from averaged weights of the generator, those of update t count as
                            # t^3; the average, mirrored data, the data's contrast are ours: see README.md
ADAPT_EVERY, WINDOW, PATIENCE = 2_000, 10, 3        # rates that adapt, Demystifying MMD GANs, section 5
LEVEL, CODES, FLOOR = 0.1, 2_048, 1e-6              # mbinkowski/MMD-GAN, gan/utils/scorer.py
SAMPLES = 10_000            # to keep and to score, but for --table
BOOTSTRAP, RESAMPLINGS = 25_000, 10     # of the distance, if so many are scored; as Demystifying MMD GANs
LOG_EVERY = 200
GRID_EVERY = 20_000         # and, with --features, scores
SAVE_EVERY = 5_000          # a multiple of LOG_EVERY: what is saved has been seen to be finite

# Widths of generator and critic, size of their filters, norms behind the critic's first convolution and the
# others, noise; unit: pixels are in [0, 1] instead of [-1, 1]. common.dcgan_critic names the sources.
USUAL = dict(z=128, noise="uniform", kernel=4, norms=("batch",))        # where a row does not say otherwise
UNIT = dict(unit=True, z=100)
NETS = {
    "gram":    dict(g=(128, 64, 32), f=(32, 64, 128)),
    "weak":    dict(g=(128, 64, 32), f=(32, 32, 64)),
    "li":      dict(g=(256, 128, 64), f=(64, 128, 256), norms=("none", "batch"), noise="normal"),
    "dcgan":   dict(g=(512, 256, 128, 64), f=(64, 128, 256, 512), kernel=5, norms=("none",), **UNIT),
    "dcgan16": dict(g=(512, 256, 128, 64), f=(16, 32, 64, 128), kernel=5, norms=("none",), **UNIT),
    "gamn":    dict(g=(512, 256, 128), f=(128, 256, 512), kernel=5, norms=("none", "layer"), noise="normal"),
    "wgan":    dict(g=(512, 256, 128), f=(128, 256, 512), kernel=5, norms=("none", "batch"), noise="normal"),
    "sngan":   dict(width=64, unit=True),
    "gmmn":    dict(mlp=(64, 256, 256, 1024, 3072), z=10, unit=True),
    "gmmn-ae": dict(mlp=(64, 256, 256, 1024, 32), encoder=(3072, 1024, 32), z=10, unit=True),
}

# distance and the weights of its terms: common.Game says, but for gram. critic: its outputs, 0 for no critic.
# steps: of the critic to one of the generator; gram moves both at once. adam: rate, betas; adam_g: those of
# the generator, if others; rmsprop: rate. clip: bound of the critic's weights. spectral: its gains. decay: of
# rates that adapt to KID. README.md says how rates and ridges of gram were found; 16, 8, the bound and the
# burst are OctoberChang/MMD-GAN's, GAMN's weights ours, scale is that of Scaled MMD, section 4.
GRAM = dict(nets="gram", distance="gram", kernel="li", critic=128, steps=0, adam=(4e-4, 0.5, 0.999))
PRINTED = dict(GRAM, ridge=1e-3, adam=(5e-5, 0.5, 0.999))      # the paper's rate, JuliaGRAM's ridge
GAN = dict(nets="gram", distance="gan", critic=1, steps=1, adam=(2e-4, 0.5, 0.999))
LI = dict(nets="gram", distance="mmd", kernel="li", critic=128, steps=5, rmsprop=5e-5, clip=0.01, burst=True)
FULL = dict(LI, autoencoder=8.0, feasible=16.0)
MMD = dict(nets="dcgan", distance="mmd2", critic=16, steps=5, adam=(1e-4, 0.5, 0.9), decay=0.5)
ONE, TEN = dict(penalty=("gradient", 1.0)), dict(penalty=("gradient", 10.0))
GAMN = dict(nets="gamn", distance="mmd", kernel="rbf", critic=10, steps=5, adam=(1e-4, 0.5, 0.9))
GMMN = dict(nets="gmmn", distance="mmd", kernel="rbf", critic=0, steps=0, adam=(1e-3, 0.5, 0.999),
            batch=1_000)        # its code has momentum; rate and Adam are ours
SCALED = dict(MMD, nets="sngan", kernel="unit", critic=1, decay=0.8, scale=10.0)
SN = dict(SCALED, spectral="fixed")
METHODS = {
    "gram":           dict(GRAM, form="swap", ridge=1.0),               # eq. 9, p and q exchanged
    "gram-flow":      dict(GRAM, form="flow", ridge=1e-2),              # GRAMFlow's objective
    "gram-eq9":       dict(PRINTED, form="sum"),                        # eq. 9 as printed
    "gram-clip":      dict(PRINTED, form="clip"),                       # footnote 3
    "gram-adaptive":  dict(GRAM, form="swap", ridge=1.0, decay=0.5),
    "gan":            dict(GAN, adam_g=(4e-4, 0.5, 0.999)),
    "mmdnet":         dict(GRAM, distance="mmd", critic=0, adam=(1e-3, 0.5, 0.999)),
    "gram-weak":      dict(GRAM, form="swap", ridge=1.0, nets="weak"),  # Table 1, the weaker critic
    "gan-weak":       dict(GAN, nets="weak"),
    "mmdgan-weak":    dict(FULL, nets="weak"),
    "mmdgan":         FULL,
    "mmdgan-noae":    dict(LI, feasible=16.0),                          # Table 4
    "mmdgan-nofsr":   dict(LI, autoencoder=8.0),
    "mmdgan-plain":   LI,
    "mmdgan-conv":    dict(FULL, nets="li"),                            # Table 2
    "mmd-rqdot":      dict(MMD, **ONE, kernel="rq*", activation=1.0),   # footnote 19
    "mmd-rq":         dict(MMD, **ONE, kernel="rq"),
    "mmd-rbf":        dict(MMD, **ONE, kernel="rbf"),
    "mmd-dot":        dict(MMD, **ONE, kernel="dot"),
    "mmd-dist":       dict(MMD, **TEN, kernel="distance", critic=256, activation=1e-4),
    "cramer":         dict(MMD, **TEN, kernel="distance", critic=256, distance="cramer"),
    "wgan-gp":        dict(MMD, **TEN, critic=1, distance="wasserstein"),
    "gamn":           dict(GAMN, **TEN),                                # eq. 7; its weights are ours
    "gamn-2":         dict(GAMN, **TEN, critic=2),                      # Table 3
    "gamn-3":         dict(GAMN, **TEN, critic=3),
    "gamn-mmd":       dict(GAMN, **TEN, data_mmd=True),                 # the advice of "Robustness"
    "gamn-l1":        dict(GAMN, penalty=("l1", 1e-3)),                 # eq. 9
    "gamn-l2":        dict(GAMN, penalty=("l2", 1e-3)),                 # eq. 8
    "gamn-classical-l2": dict(GAMN, penalty=("l2-all", 1e-3)),          # footnote 3
    "gmmn":           GMMN,
    "gmmn-ae":        dict(GMMN, nets="gmmn-ae", kernel="unit", encode=True),
    "wgan":           dict(nets="wgan", distance="wasserstein", critic=1, steps=5, rmsprop=5e-5, clip=0.01),
    "smmd":           dict(SCALED, distance="smmd"),
    "sn-smmd":        dict(SCALED, distance="smmd", spectral="learned"),
    "swgan":          dict(SCALED, distance="swgan"),
    "sn-swgan":       dict(SCALED, distance="swgan", spectral="learned"),
    "sn-gan":         dict(SN, distance="gan"),
    "sobolev":        dict(SCALED, distance="sobolev", rho=1e-6),       # rho is ours
    "mmd-gp-l2":      dict(SCALED, **ONE, activation=1.0),
    "mmd-plain":      SCALED,                                           # Table 2
    "sn-mmd":         SN,
    "sn-wgan":        dict(SN, distance="wasserstein"),
    "sn-mmd-gp":      dict(SCALED, **ONE, spectral="learned"),
    "sn-wgan-gp":     dict(SCALED, **TEN, spectral="learned", distance="wasserstein"),
    "sn-mmd-gp-l2":   dict(SCALED, **ONE, spectral="learned", activation=1.0),
    "sn-mmd-l2":      dict(SN, activation=1.0),
}
METHODS |= {f"{name}-16": dict(METHODS[name], nets="dcgan16")
            for name in ("mmd-rqdot", "mmd-rq", "mmd-rbf", "mmd-dot", "mmd-dist", "cramer", "wgan-gp")}
METHODS |= {f"{name}-300": dict(METHODS[name], batch=300) for name in METHODS if name.startswith("mmdgan")}
METHODS |= {f"gram-k{k}": dict(METHODS["gram"], critic=k) for k in (2, 8, 32, 128, 512, 1024, 2048)}
METHODS = {name: dict(row, nets=USUAL | NETS[row["nets"]]) for name, row in METHODS.items()}
COLUMNS = ("loss_f", "loss_g", "pearson", "mean_r", "spread")   # spread: variance of f(x) over that of f(y)
READINGS = ("condition", "fd", "kid", "isc", "p", "lr_g")       # condition: of the matrix the ratio inverts
CURVES = {"fd": "Fréchet distance to the test images", "mean_r": "mean of r",
          "condition": "condition number of K + ridge I", "spread": "variance of f(x) over variance of f(y)"}
# A paper's table: its number of samples (ours for GRAM and GAMN), and Inception score, FID, KID of each row
TABLES = {
    "gram": (10_000, {
        "mmdgan": "5.29, 40.00 ± 0.56", "gan": "5.13, 26.82 ± 0.49", "gram": "5.54, 24.85 ± 0.94",
        "mmdgan-weak": "-, 210.85 ± 8.92", "gan-weak": "-, 31.64 ± 2.10", "gram-weak": "-, 24.82 ± 0.62",
        "mmdgan-conv": "-, 38.39 ± 0.28", "mmdgan-noae": "5.40", "mmdgan-nofsr": "3.26",
        "mmdgan-plain": "3.51", "mmdgan-300": "5.43", "mmdgan-noae-300": "5.15", "mmdgan-nofsr-300": "3.68",
        "mmdgan-plain-300": "3.87"}),
    "demystifying": (25_000, {
        "mmd-rqdot-16": "5.86, 48.10, .032", "mmd-rqdot": "6.51, 39.90, .027", "cramer": "6.39, 40.27, .028",
        "mmd-dist-16": "4.53, 80.48, .061", "mmd-dist": "6.39, 40.25, .028", "cramer-16": "4.67, 74.93, .060",
        "wgan-gp-16": "3.15, 147.09, .116", "wgan-gp": "6.53, 37.52, .026"}),
    "gamn": (50_000, {
        "gmmn": "2.45", "gmmn-ae": "2.78", "wgan": "5.61", "wgan-gp": "6.16", "gamn": "6.44",
        "gamn-2": "6.43", "gamn-3": "6.43", "gamn-l1": "6.35", "gamn-l2": "6.25",
        "gamn-classical-l2": "6.01"}),
    "scaled": (50_000, {
        "mmd-gp-l2": "7.55, 23.6, .014", "wgan-gp": "6.68, 40.2, .024", "sn-gan": "7.29, 26.1, .015",
        "sobolev": "3.21, 132.2, .113", "smmd": "7.48, 25.1, .015", "sn-smmd": "7.43, 24.5, .015",
        "sn-swgan": "7.34, 27.9, .016", "mmd-plain": "7.01, 30.9, .02", "sn-mmd": "5.23, 69.0, .046",
        "sn-wgan": "2.95, 162.3, .125", "sn-mmd-gp": "5.02, 137.0, .084", "sn-wgan-gp": "4.49, 73.1, .058",
        "sn-mmd-gp-l2": "7.43, 23.4, .015", "sn-mmd-l2": "4.46, 67.0, .053"}),
}
FIGURES = {"5c": dict(method=[name for name in METHODS if name.startswith("gram-k")], steps=20_000),
           "neighbours": dict(method=["gram"]), "bias": {}, "noise": {}}
ESTIMATES = 100             # for each n of --figure bias, Demystifying MMD GANs, Figure 1
KID_N, FID_N = (50, 100, 200, 500, 1_000, 2_000), (1_000, 2_500, 5_000, 7_500, 10_000)
CENSORED, CENSORED_M = 2048, (10_000, 20_000, 50_000, 100_000)      # dimension and sample sizes of its D.2


def networks(row):
    """Generator, critic and decoder of a row of METHODS, None for what it has not."""
    return common.image_networks(row["nets"], row, 3, 32)


def kernels(sigma, rbf, alpha):
    """The kernels that rows name, from [N, D] and [M, D] to [S, N, M]; SIGMA, RBF and ALPHA as tensors."""
    return {"li": lambda x, y: common.gaussian(x, y, sigma), "rbf": lambda x, y: common.gaussian(x, y, rbf),
            "rq": lambda x, y: common.rational_quadratic(x, y, alpha), "dot": common.dot,
            "rq*": lambda x, y: torch.cat([common.rational_quadratic(x, y, alpha), common.dot(x, y)], -3),
            "distance": common.distance, "unit": common.unit_gaussian}


def train(method, seed, folder, settings, steps, device, images, samples=SAMPLES, judge=(None, None)):
    """One run: a generator function that yields after each generator update and returns the run's result.

    samples: how many to keep and to score. judge: load_features() and reference_statistics().
    """
    row, (features, reference) = METHODS[method], judge
    nets, batch = row["nets"], row.get("batch", BATCH)
    noise = common.normal_noise if nets["noise"] == "normal" else common.uniform_noise
    torch.manual_seed(seed)
    g, f, decoder = (network.to(device) if network else None for network in networks(row))
    opt_g = common.optimizer(g, row.get("adam_g", row.get("adam")), row.get("rmsprop"))
    average = common.Average(g, AVERAGE)
    sampler = nn.Sequential(average, *([decoder] if "encode" in row else []),
                            *([common.Signed()] if "unit" in nets else []),
                            common.Contrast(3).fit(images).to(device))
    critic = nn.ModuleList([network for network in (f, decoder) if network])
    critic.register_buffer("multiplier", torch.zeros((), device=device))        # Sobolev GAN's
    opt_f = common.optimizer(critic, row.get("adam"), row.get("rmsprop")) if f else None
    rng = torch.Generator(device).manual_seed(seed)
    log = common.Log(folder, COLUMNS, steps, device, READINGS)
    state = dict(g=g, opt_g=opt_g, critic=critic, sampler=sampler, rng=rng, log=log)
    state |= dict(opt_f=opt_f) if f else {}
    numbers = (torch.tensor(v, dtype=torch.float32, device=device) for v in (SIGMA, RBF, ALPHA))
    kernel = kernels(*numbers).get(row.get("kernel"))
    game = common.Game(row, f, decoder, kernel, critic.multiplier, rng)
    K_ratio = torch.zeros(len(SIGMA), batch, batch, device=device)      # what the last ratio has inverted
    loss_ascent = torch.zeros((), device=device)                        # of the critic's last step

    def draw():
        x = common.flip_images(common.draw_images(images, batch, rng), rng)
        return (x + 1) / 2 if "unit" in nets else x, g(noise(batch, nets["z"], rng))

    def ascend():
        x, y = draw()
        with parametrize.cached():      # so that a spectral norm is iterated once
            loss = game.critic(x, y.detach())
            common.descend((opt_f, loss))
        if "clip" in row:
            common.clip_weights(f, row["clip"])
        loss_ascent.copy_(loss.detach())

    def update():
        x, y = draw()
        if row["distance"] == "gram":   # Algorithm 1, simultaneous: one K, both gradients, both steps
            h_x, h_y = common.both(f, x, y)
            K_all = K_xx, _, K_yy = common.gram(kernel, h_x, h_y)
            objective, r = common.gram_objective(*K_all, row["form"], row["ridge"], LAMBDA)
            loss_g = common.mmd2(*K_all)
            common.descend((opt_f, -objective), (opt_g, loss_g))
            K_ratio.copy_(K_xx.detach() if row["form"] in common.AT_DATA else K_yy.detach())
            means = -objective, loss_g, common.pearson(r), r.mean()
        else:
            with parametrize.cached():
                loss_g, h_x, h_y = game.generator(x, y)
                common.descend((opt_g, loss_g))
            means = loss_ascent if f else None, loss_g, None, None
        log.add(*means, h_x.var(0).sum() / h_y.var(0).sum() if f else None)
        average.follow(g)

    def critic_steps(step):
        if "encode" in row:
            return ENCODE if step == 0 else 0
        return BURST if "burst" in row and (step < BURST_UNTIL or step % BURST_EVERY == 0) else row["steps"]

    def readings(step):
        found = {}
        if "ridge" in row:
            values = torch.linalg.eigvalsh(K_ratio.double().cpu()) + row["ridge"]
            found["condition"] = float((values[:, -1] / values[:, 0]).max())
        if features and (step % GRID_EVERY == 0 or step == steps):
            rescore(step == steps)
            found |= scores
        if adaptive and step % ADAPT_EVERY == 0:
            found["p"] = adaptive.step(codes(sample(CODES, step)))
            found["lr_g"] = float(opt_g.param_groups[0]["lr"])
        return found

    @torch.no_grad()
    def sample(n, seed=0):      # of a seed's noise; batch norm by at most 500 at a time (common.batch_norm)
        z = noise(n, nets["z"], torch.Generator().manual_seed(seed)).to(device)
        return torch.cat([common.to_bytes(sampler(part)) for part in z.split(500)]).cpu()

    def rescore(last):
        scores.clear()
        drawn = sample(samples if last else SAMPLES)
        with common.scoring(folder):
            scores.update(common.score(drawn, reference, features, device, BOOTSTRAP, RESAMPLINGS))

    def codes(some):
        return common.extract(features, some, device)[0].to(device)

    scores, adaptive = {}, None
    if features and "decay" in row:
        adaptive = common.AdaptiveRate([opt_g, opt_f], codes(images[:CODES]), features.key,
                                       WINDOW, PATIENCE, row["decay"], LEVEL, FLOOR)
        state["adaptive"] = adaptive
    step = common.load(folder, state, settings)
    update = common.capture(update, state)
    if row["steps"] or "encode" in row:
        ascend = common.capture(ascend, state)
    log.start(step)
    while step < steps:
        for _ in range(critic_steps(step)):
            ascend()
        update()
        step += 1
        if step % LOG_EVERY == 0 or step == steps:
            log.row(step, lambda: readings(step))
        if step % GRID_EVERY == 0 or step == steps:
            common.save_grid(f"{folder}/samples-{step}.png", sample(128))
        if step % SAVE_EVERY == 0 or step == steps:
            common.save(folder, step, state, settings)
        yield

    if features and not scores:         # a run that had been trained before
        rescore(True)
    with common.replacing(f"{folder}/samples.npy") as file:
        np.save(file, sample(samples).numpy())
    return dict(method=method, seed=seed, updates=step, seconds=log.seconds,
                **common.machine(device), **scores)


def figure_5c(runs, results):
    """GRAM, Figure 5c: the Frechet distance over the critic's dimension."""
    found = [(METHODS[method]["critic"], result["fd"]) for (method, *_), result in zip(runs, results)
             if isinstance(result, dict) and "fd" in result]
    picture = Figure(figsize=(5, 3.5), layout="constrained")
    axes = picture.add_subplot()
    dimensions = sorted({k for k, _ in found})
    axes.plot(dimensions, [np.mean([fd for k, fd in found if k == own]) for own in dimensions])
    axes.scatter(*zip(*found), s=12)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("K, the critic's dimension")
    axes.set_ylabel("Fréchet distance")
    return picture


def main(argv=None):
    parser = common.flags(__doc__, METHODS, ["gram"], STEPS, images=True)
    parser.add_argument("--figure", choices=list(FIGURES), metavar="NAME",
                        help=f"draw {', '.join(FIGURES)}; what has been trained for it is not trained again")
    parser.add_argument("--table", choices=list(TABLES), metavar="NAME",
                        help=f"train and score the methods of a paper's table: {', '.join(TABLES)}; likewise")
    args = parser.parse_args(argv)
    every = {method: text for _, own in TABLES.values() for method, text in own.items()}
    samples, paper = TABLES.get(args.table, (SAMPLES, every))
    parser.set_defaults(**FIGURES.get(args.figure, dict(method=list(paper)) if args.table else {}))
    args = parser.parse_args(argv)
    args.resume = args.resume or bool(args.figure or args.table)
    device = common.setup(args.device)
    images, _ = (common.load_images("cifar10", split, args.data) for split in ("train", "test"))
    adaptive = next((method for method in args.method if "decay" in METHODS[method]), None)
    needed = f"--figure {args.figure}" if args.figure else adaptive
    features, reference = common.open_scores(args.features, f"{args.data}/cifar10-test.npy", device, needed)
    least = max(CODES if adaptive else 0, *(METHODS[method].get("batch", BATCH) for method in args.method))
    if len(images) < least:
        sys.exit(f"{args.data}/cifar10-train.npy: found {len(images)} images, expected {least:,} or more")
    images = images.to(device)

    def keep(picture):
        common.make_folder(args.out)
        common.save_figure(f"{args.out}/cifar-figure{args.figure}.png", picture)
        print(f"{args.out}/cifar-figure{args.figure}.png")

    if args.figure == "bias":       # Demystifying MMD GANs, Figure 1 and appendix D.2
        return keep(common.bias_figure(images, reference, features, KID_N, FID_N, CENSORED, CENSORED_M,
                                       ESTIMATES, device))
    if args.figure == "noise":      # its appendix E, with MNIST's digits where the paper has ImageNet
        digits = nn.functional.pad(common.load_images("mnist", "train", args.data), (2, 2, 2, 2))
        return keep(common.noise_figure(images, digits.expand(-1, 3, -1, -1), reference, features, device))

    runs = common.open_runs(args.out, __file__, globals(), args.method, args.seeds, args.resume, device)
    for method in dict.fromkeys(args.method):
        g, f, decoder = networks(METHODS[method])
        print(f"{method}: generator of {common.count(g):,} parameters, critic of {common.count(f):,}, "
              f"decoder of {common.count(decoder):,}")
    if features:
        print(f"scores: {features.name}, {samples:,} samples against {reference['name']}")
    print(common.log_head(COLUMNS + READINGS))

    given = args.steps, device, images, samples, (features, reference)
    results = common.interleave([train(*run, *given) for run in runs])

    command = common.command(__file__, argv)
    finished = []
    for run, result in common.ended(runs, results, command):
        finished.append(run)
        print(f"{run[2]}: {result['updates']:,} updates, {', '.join(sorted(os.listdir(run[2])))}")
    if finished:
        common.save_figure(f"{args.out}/cifar-curves.png", common.curves_figure(finished, CURVES))
        print(f"{args.out}/cifar-curves.png")
    if finished and args.figure == "5c":
        keep(figure_5c(runs, results))
    if finished and args.figure == "neighbours":
        shown = common.read_images(f"{finished[0][2]}/samples.npy")[:10]
        keep(common.neighbours_figure(shown, images, features, device))
    if not features:
        print(f"to score the samples: {command}{'' if args.resume else ' --resume'}")
    print(f"\n{common.score_table([method for method, *_ in runs], results, paper)}")
    if not finished:
        sys.exit("no run finished")


if __name__ == "__main__":
    common.run(main)
