"""CIFAR-10 in Generative Ratio Matching Networks (ICLR 2020), Table 1 and Figure 5c: DCGAN networks.

    python cifar.py --method gram --features FILE.pt2       under 2 minutes on an H200, an hour on a CPU core
    python cifar.py --method gram gram-weak gan gan-weak --seeds 3 --features FILE.pt2   at once, 7 minutes
    python cifar.py --figure 5c --features FILE.pt2         the critic's dimension from 2 to 2048, 6 minutes
    python cifar.py --figure bias                           what estimates of FID and KID are worth, 4 minutes

Expect a Frechet distance of 29 ± 3 from gram on EfficientNet-Lite0 features (FID has others; see README.md).
A run goes to runs/cifar-METHOD-sSEED/: samples-UPDATE.png, samples.npy, log.csv, checkpoint.pt, result.json;
the curves of all runs of a command are runs/cifar-curves.png.
"""
import sys

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

import common

STEPS = 60_000              # the paper does not say; GRAMFlow 200 epochs, which are 156,000
BATCH = 64                  # of data and of samples, section 4
Z = 128                     # U[-1, 1]^128, GRAMFlow; Table 5
GENERATOR = (128, 64, 32)   # widths, Table 5
FULL = (32, 64, 128)        # widths of the critic, Table 6
WEAK = (32, 32, 64)         # widths of the critic, Table 7
K = 128                     # the critic's dimension, that of the noise, section 4
SIGMA = (1, 2, 4, 8, 16)    # bandwidths of Li et al. 2017, as section 4 says; GRAMFlow takes them for squares
BETAS = (0.5, 0.999)        # Adam, GRAMFlow
LAMBDA = 1.0                # eq. 9
FEASIBLE, AUTOENCODER = 16.0, 8.0   # weights of MMD-GAN's terms, here and below OctoberChang/MMD-GAN
CRITIC_STEPS, CLIP = 5, 0.01        # for each step of its generator
BURST, BURST_UNTIL, BURST_EVERY = 100, 25, 500      # critic steps of the first 25 updates and of every 500th
AVERAGE = 3                 # samples come from averaged weights of the generator, those of update t count as
                            # t^3; the average, mirrored data, the data's contrast are ours: see README.md
ADAPT_EVERY, WINDOW, PATIENCE, DECAY = 2_000, 10, 3, 0.5    # adaptive rates, Demystifying MMD GANs, section 5
LEVEL, CODES, FLOOR = 0.1, 2_048, 1e-6  # mbinkowski/MMD-GAN, gan/utils/scorer.py; Scaled MMD has DECAY 0.8
SAMPLES = 10_000            # to keep and to score
BOOTSTRAP, RESAMPLINGS = 25_000, 10     # of the distance's bootstrap, Demystifying MMD GANs, section 5
LOG_EVERY = 200
GRID_EVERY = 20_000         # and, with --features, a Frechet distance
SAVE_EVERY = 5_000          # a multiple of LOG_EVERY: what is saved has been seen to be finite

# critic: its widths. form: what it maximises, one of common.gram_objective's, or that of GAN or MMD-GAN.
# ridge: 1e-3 is JuliaGRAM's (src/kmm.jl), neither the paper nor GRAMFlow has one. lr_f, lr_g: rates of critic
# and generator; 5e-5 is the paper's, 1e-3 JuliaGRAM's for MMD-nets. README.md says how the others were found.
METHODS = {
    "gram":      dict(critic=FULL, form="swap",   ridge=1.0,  lr_f=4e-4, lr_g=4e-4),   # eq. 9, p, q exchanged
    "gram-weak": dict(critic=WEAK, form="swap",   ridge=1.0,  lr_f=4e-4, lr_g=4e-4),
    "gram-flow": dict(critic=FULL, form="flow",   ridge=1e-2, lr_f=4e-4, lr_g=4e-4),   # GRAMFlow's objective
    "gram-eq9":  dict(critic=FULL, form="sum",    ridge=1e-3, lr_f=5e-5, lr_g=5e-5),   # eq. 9 as printed
    "gram-clip": dict(critic=FULL, form="clip",   ridge=1e-3, lr_f=5e-5, lr_g=5e-5),   # footnote 3
    "gan":       dict(critic=FULL, form="gan",                lr_f=2e-4, lr_g=4e-4),
    "gan-weak":  dict(critic=WEAK, form="gan",                lr_f=2e-4, lr_g=2e-4),
    "mmdgan":    dict(critic=FULL, form="mmdgan",             lr_f=5e-5, lr_g=5e-5),
    "mmdnet":    dict(critic=None, form=None,                            lr_g=1e-3),
}
METHODS["gram-adaptive"] = dict(METHODS["gram"], adaptive=True)
METHODS |= {f"gram-k{k}": dict(METHODS["gram"], k=k) for k in (2, 8, 32, 128, 512, 1024, 2048)}
FIGURES = {"5c": dict(method=[name for name, row in METHODS.items() if "k" in row], steps=20_000),
           "neighbours": dict(method=["gram"]), "bias": {}, "noise": {}}
ESTIMATES = 100             # for each n of --figure bias, Demystifying MMD GANs, Figure 1
KID_N, FID_N = (50, 100, 200, 500, 1_000, 2_000), (1_000, 2_500, 5_000, 7_500, 10_000)
CENSORED, CENSORED_M = 2048, (10_000, 20_000, 50_000, 100_000)      # dimension and sample sizes of its D.2
PAPER = {"gram": "24.85 ± 0.94", "gram-eq9": "24.85 ± 0.94", "gan": "26.82 ± 0.49",         # FID, Table 1
         "mmdgan": "40.00 ± 0.56", "gram-weak": "24.82 ± 0.62", "gan-weak": "31.64 ± 2.10"}
COLUMNS = ("loss_f", "loss_g", "pearson", "mean_r", "spread")   # spread: variance of f(x) over that of f(y)
READINGS = ("condition", "fd", "p", "lr_g")     # of the Gram matrix the ratio inverts, the largest of all


def networks(row):
    """Generator, critic and decoder of a row of METHODS, None for what it has not."""
    out = 1 if row["form"] == "gan" else row.get("k", K)
    return (common.dcgan_generator(Z, GENERATOR, 3),
            common.dcgan_critic(3, row["critic"], out) if row["critic"] else None,
            common.dcgan_generator(out, GENERATOR, 3) if row["form"] == "mmdgan" else None)


def train(method, seed, folder, settings, steps, device, images, features=None, reference=None):
    """One run: a generator function that yields after each generator update and returns the run's result.

    features, reference: what to score with, load_features() and reference_statistics(), or None.
    """
    row = METHODS[method]
    torch.manual_seed(seed)
    g, f, decoder = (network.to(device) if network else None for network in networks(row))

    def optimizer(network, lr):
        return common.rmsprop(network, lr) if decoder else common.adam(network, lr, BETAS)

    opt_g, average = optimizer(g, row["lr_g"]), common.Average(g, AVERAGE)
    sampler = nn.Sequential(average, common.Contrast(3).fit(images).to(device))
    rng = torch.Generator(device).manual_seed(seed)
    log = common.Log(folder, COLUMNS, steps, device, READINGS)
    state = dict(g=g, opt_g=opt_g, sampler=sampler, rng=rng, log=log)
    if f:
        critic = nn.ModuleList([f, decoder] if decoder else [f])
        opt_f = optimizer(critic, row["lr_f"])
        state |= dict(critic=critic, opt_f=opt_f)
    sigma = torch.tensor(SIGMA, dtype=torch.float32, device=device)
    K_ratio = torch.zeros(len(sigma), BATCH, BATCH, device=device)      # what the last ratio has inverted
    loss_ascent = torch.zeros((), device=device)                        # of the last step of MMD-GAN's critic

    def draw():
        x = common.flip_images(common.draw_images(images, BATCH, rng), rng)
        return x, g(common.uniform_noise(BATCH, Z, rng))

    def gram(h_x, h_y):
        return common.gram(lambda a, b: common.gaussian(a, b, sigma), h_x, h_y)

    def mmdgan(h_x, h_y):               # what MMD-GAN's critic maximises, but for the autoencoder
        return common.mmd(*gram(h_x, h_y)) + FEASIBLE * common.feasible_set(h_x, h_y)

    def spread(h_x, h_y):
        return h_x.var(0).sum() / h_y.var(0).sum()

    def ascend():                       # MMD-GAN's critic: a step of Li et al. 2017, Algorithm 1
        x, y = draw()
        y = y.detach()
        h_x, h_y = f(x), f(y)
        held = sum(common.reconstruction(t.flatten(1), decoder(h).flatten(1))
                   for t, h in ((x, h_x), (y, h_y)))
        objective = mmdgan(h_x, h_y) - AUTOENCODER * held
        common.descend((opt_f, -objective))
        common.clip_weights(f, CLIP)
        loss_ascent.copy_(-objective.detach())

    def update():
        x, y = draw()
        if f is None:                   # MMD-net: a fixed kernel on the pixels
            loss_g = common.mmd(*gram(x.flatten(1), y.flatten(1)))
            common.descend((opt_g, loss_g))
            log.add(None, loss_g, None, None, None)
        elif row["form"] == "gan":      # alternating: the generator sees the critic after its step
            loss_f = common.gan_critic(f(x), f(y.detach()))
            common.descend((opt_f, loss_f))
            loss_g = common.gan_generator(f(y))
            common.descend((opt_g, loss_g))
            log.add(loss_f, loss_g, None, None, None)
        elif decoder:                   # MMD-GAN's generator
            h_x, h_y = f(x), f(y)
            loss_g = mmdgan(h_x, h_y)
            common.descend((opt_g, loss_g))
            log.add(loss_ascent, loss_g, None, None, spread(h_x, h_y))
        else:                           # GRAM, Algorithm 1, simultaneous: one K, both gradients, both steps
            h_x, h_y = f(x), f(y)
            K_all = K_xx, _, K_yy = gram(h_x, h_y)
            objective, r = common.gram_objective(*K_all, row["form"], row["ridge"], LAMBDA)
            loss_g = common.mmd2(*K_all)
            common.descend((opt_f, -objective), (opt_g, loss_g))
            K_ratio.copy_(K_xx.detach() if row["form"] in common.AT_DATA else K_yy.detach())
            log.add(-objective, loss_g, common.pearson(r), r.mean(), spread(h_x, h_y))
        average.follow(g)

    def readings(step):
        found = {}
        if "ridge" in row:
            values = torch.linalg.eigvalsh(K_ratio.double().cpu()) + row["ridge"]
            found["condition"] = float((values[:, -1] / values[:, 0]).max())
        if features and (step % GRID_EVERY == 0 or step == steps):
            rescore(step == steps)
            found["fd"] = scores.get("fd")
        if adaptive and step % ADAPT_EVERY == 0:
            found["p"] = adaptive.step(codes(sample(CODES, step)))
            found["lr_g"] = float(opt_g.param_groups[0]["lr"])
        return found

    @torch.no_grad()
    def sample(n, noise=0):     # of a seed's noise; batch norm by at most 500 at a time (common.batch_norm)
        z = common.uniform_noise(n, Z, torch.Generator().manual_seed(noise)).to(device)
        return torch.cat([common.to_bytes(sampler(part)) for part in z.split(500)]).cpu()

    def rescore(last):
        scores.clear()
        try:
            scores.update(common.score(sample(SAMPLES), reference, features, device))
            if last:
                more = common.bootstrap_score(sample(BOOTSTRAP), reference, features, device, RESAMPLINGS)
                scores.update(more)
        except RuntimeError as error:       # the run goes on, and can be scored later
            print(f"{folder}: not scored: {error}")

    def codes(some):
        return common.extract(features, some, device)[0].to(device)

    scores, adaptive = {}, None
    if row.get("adaptive"):
        adaptive = common.AdaptiveRate([opt_g, opt_f], codes(images[:CODES]), features.key,
                                       WINDOW, PATIENCE, DECAY, LEVEL, FLOOR)
        state["adaptive"] = adaptive
    step = common.load(folder, state, settings)
    update = common.capture(update, state)
    ascend = common.capture(ascend, state) if decoder else None
    log.start(step)
    while step < steps:
        if decoder:
            for _ in range(BURST if step < BURST_UNTIL or step % BURST_EVERY == 0 else CRITIC_STEPS):
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

    samples = sample(SAMPLES)
    with common.replacing(f"{folder}/samples.npy") as file:
        np.save(file, samples.numpy())
    if features and not scores:         # a run that had been trained before
        rescore(True)
    return dict(method=method, seed=seed, updates=step, seconds=log.seconds,
                **common.machine(device), **scores)


def curves(runs):
    """The logs of runs as curves over updates, a colour a method, a line a seed."""
    titles = {"fd": "Fréchet distance to the test images", "mean_r": "mean of r",
              "condition": "condition number of K + ridge I",
              "spread": "variance of f(x) over variance of f(y)"}
    methods = list(dict.fromkeys(method for method, *_ in runs))
    picture = Figure(figsize=(11, 6.5), layout="constrained")
    for axes, (column, title) in zip(picture.subplots(2, 2).flat, titles.items()):
        for method, _, folder, _ in runs:
            log = common.read_log(folder)
            there = np.isfinite(log[column])
            if there.any():
                axes.plot(log["step"][there], log[column][there], color=f"C{methods.index(method)}",
                          linewidth=1, marker="." if column == "fd" else None, label=method)
        labels = dict(zip(*reversed(axes.get_legend_handles_labels())))     # one for each method
        if labels:
            axes.legend(labels.values(), labels, fontsize=7)
            axes.set_yscale("log")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("update", fontsize=8)
        axes.tick_params(labelsize=7, which="both")
    return picture


def figure_5c(runs, results):
    """GRAM, Figure 5c: the Frechet distance over the critic's dimension."""
    found = [(METHODS[method]["k"], result["fd"]) for (method, *_), result in zip(runs, results)
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


def figure_bias(images, reference, features, device, data):
    """Demystifying MMD GANs, Figure 1 and appendix D.2."""
    x, y = common.extract(features, images, device)[0], reference["features"]
    title = f"{features.name}; draws with replacement from {len(x):,} training images, {reference['name']}"
    print(title)
    figure = common.bias_figure(x, y, KID_N, FID_N, CENSORED, CENSORED_M, ESTIMATES, device)
    figure.suptitle(title, fontsize=9)
    return figure


def figure_noise(images, reference, features, device, data):
    """Demystifying MMD GANs, appendix E, contaminated by MNIST's digits where the paper has ImageNet."""
    digits = nn.functional.pad(common.load_images("mnist", "train", data), (2, 2, 2, 2)).expand(-1, 3, -1, -1)
    return common.noise_figure(images, digits, reference, features, device)


def report(methods, results):
    """The table of the runs, scores as mean ± std over seeds, beside the paper's."""
    rows = []
    for method in dict.fromkeys(methods):
        own = [result for name, result in zip(methods, results) if name == method]
        done = [result for result in own if isinstance(result, dict)]
        failed = [f"seed {seed} {end}" for seed, end in enumerate(own) if isinstance(end, FloatingPointError)]
        finished = "; ".join([f"{len(done)} of {len(own)}", *failed])
        row = [method, f"{done[0]['updates']:,}" if done else "-", finished]
        for key, scale, digits in (("fd", 1, 1), ("fd_bootstrap", 1, 1), ("kid", 1_000, 1), ("isc", 1, 2)):
            row.append(common.spread([scale * result[key] for result in done if key in result], digits))
        rows.append([*row, PAPER.get(method, "-")])
    scored = [result for result in results if isinstance(result, dict) and "features" in result]
    name, against = (scored[0]["features"], scored[0]["reference"]) if scored else ("no features", "nothing")
    fid = name == common.FID_NAME
    head = ["method", "updates", "seeds finished", "FID" if fid else "Fréchet distance",
            f"bootstrap of {BOOTSTRAP:,}, biased upward", "1,000 KID",
            "Inception score" if fid else "score of its logits", "FID in the paper"]
    return (f"{name}; {SAMPLES:,} samples against {against}; mean ± std over seeds\n\n"
            f"{common.table(head, rows)}")


def main(argv=None):
    parser = common.flags(__doc__, METHODS, ["gram"], STEPS, images=True)
    parser.add_argument("--figure", choices=list(FIGURES), metavar="NAME",
                        help=f"draw {', '.join(FIGURES)}; what has been trained for it is not trained again")
    parser.set_defaults(**FIGURES.get(parser.parse_args(argv).figure, {}))
    args = parser.parse_args(argv)
    args.resume = args.resume or bool(args.figure)
    device = common.setup(args.device)
    try:
        features = common.load_features(args.features, device)
    except OSError as error:                # train all the same: the samples can be scored later
        if args.figure:
            sys.exit(str(error))
        print(error)
        features = None
    adaptive = any(METHODS[method].get("adaptive") for method in args.method)
    if adaptive and not features:
        sys.exit("found no feature network, expected one for a method whose rates adapt to KID; "
                 "name it with --features")
    images, _ = (common.load_images("cifar10", split, args.data) for split in ("train", "test"))
    least = max(BATCH, CODES if adaptive else 0)
    if len(images) < least:
        sys.exit(f"{args.data}/cifar10-train.npy: found {len(images)} images, expected {least:,} or more")
    images = images.to(device)
    reference = features and common.reference_statistics(f"{args.data}/cifar10-test.npy", features, device)

    def keep(picture):
        common.make_folder(args.out)
        common.save_figure(f"{args.out}/cifar-figure{args.figure}.png", picture)
        print(f"{args.out}/cifar-figure{args.figure}.png")

    if args.figure in ("bias", "noise"):        # of the data and the scores alone
        draw = figure_bias if args.figure == "bias" else figure_noise
        return keep(draw(images, reference, features, device, args.data))

    runs = common.open_runs(args.out, __file__, globals(), args.method, args.seeds, args.resume, device)
    for method in dict.fromkeys(args.method):
        g, f, decoder = networks(METHODS[method])
        print(f"{method}: generator of {common.count(g):,} parameters, critic of {common.count(f):,}, "
              f"decoder of {common.count(decoder):,}")
    if features:
        print(f"fd: {features.name}, {SAMPLES:,} samples against {reference['name']}")
    print(common.log_head(COLUMNS + READINGS))

    given = args.steps, device, images, features, reference
    results = common.interleave([train(*run, *given) for run in runs])

    command = common.command(__file__, argv)
    for (_, _, folder, _), result in zip(runs, results):
        if isinstance(result, FloatingPointError):
            print(f"{folder}: {result}")
            continue
        common.write_json(f"{folder}/result.json", dict(result, command=command))
        print(f"{folder}: {result['updates']:,} updates, grids, samples.npy, checkpoint.pt, result.json")
    finished = [run for run, result in zip(runs, results) if isinstance(result, dict)]
    if finished:
        common.save_figure(f"{args.out}/cifar-curves.png", curves(finished))
        print(f"{args.out}/cifar-curves.png")
    if finished and args.figure == "5c":
        keep(figure_5c(runs, results))
    if finished and args.figure == "neighbours":
        samples = common.read_images(f"{finished[0][2]}/samples.npy")[:10]
        keep(common.neighbours_figure(samples, images, features, device))
    if not features:
        print(f"to score the samples: {command}{'' if args.resume else ' --resume'}")
    print(f"\n{report([method for method, *_ in runs], results)}")
    if all(isinstance(result, FloatingPointError) for result in results):
        sys.exit("no run finished")


if __name__ == "__main__":
    common.run(main)
