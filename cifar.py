"""CIFAR-10: every image method of five papers on kernel-based generative models, one row a method.

    python cifar.py --method gram --features FILE.pt2       under 2 minutes on an H200, an hour on a CPU core
    python cifar.py --method gram gan mmdgan --seeds 3 --features FILE.pt2          at once, side by side
    python cifar.py --table scaled                          the methods of a paper's table beside its numbers
    python cifar.py --figure scores                         scores over training, updates and seconds

Expect a Frechet distance of 29 ± 3 from gram on EfficientNet-Lite0 features (FID has others; see README.md).
A run goes to runs/cifar-METHOD-sSEED/: samples-UPDATE.png, samples.npy, log.csv, checkpoint.pt, result.json;
the curves of all runs of a command are runs/cifar-curves.png.
"""
import torch
from torch import nn
from torch.nn.utils import parametrize

import common

STEPS = 60_000              # GRAM's and GAMN's do not say, GRAMFlow has 156,000; the other papers 150,000
BATCH = 64                  # of data and of samples, in all papers; a row may have its own
SIGMA = (1, 2, 4, 8, 16)    # bandwidths of Li et al. 2017, GRAM, section 4; for GRAMFlow they are variances
RBF = (2, 5, 10, 20, 40, 80)            # Demystifying MMD GANs, section 5; as variances GMMN's, "gmmn"
ALPHA = (0.2, 0.5, 1, 2, 5)             # Demystifying MMD GANs, section 5; its code has 0.1, 1, 10
LAMBDA = 1.0                # GRAM, eq. 9
BURST, BURST_UNTIL, BURST_EVERY = 100, 25, 500      # MMD-GAN's critic steps: at updates 1 to 25, every 500th
ENCODE = 20_000             # steps of GMMN+AE's autoencoder, all at first; ours, the paper's go by layers
AVERAGE = 3                 # samples come from averaged weights of the generator, those of update t count as
                            # t^3; the average, mirrored data, the data's contrast are ours: see README.md
ADAPT_EVERY, CODES = 2_000, 2_048       # of rates that adapt, and samples for it; window, patience, level,
ADAPT = (10, 3, 0.1, 1e-6)              # floor: Demystifying MMD GANs, section 5, and its code's scorer.py
SAMPLES = 10_000            # to keep and to score, except with --table
BOOTSTRAP, RESAMPLINGS = 25_000, 10     # of the distance, if so many are scored; as Demystifying MMD GANs
LOG_EVERY = 200
GRID_EVERY = 20_000         # and, with a feature network, scores; a row may have its own
SAVE_EVERY = 5_000          # a multiple of LOG_EVERY: what is saved has been seen to be finite

# Widths of generator and critic, size of their filters, norms behind the critic's first convolution and the
# others, noise; unit: pixels are in [0, 1] instead of [-1, 1]. common.dcgan_critic names the sources.
USUAL = dict(z=128, noise="uniform", kernel=4, norms=("none",))         # where a row does not say otherwise
NETS = {
    "gram":    dict(g=(128, 64, 32), f=(32, 64, 128), norms=("batch",)),
    "weak":    dict(g=(128, 64, 32), f=(32, 32, 64), norms=("batch",)),
    "li":      dict(g=(256, 128, 64), f=(64, 128, 256), norms=("none", "batch"), noise="normal"),
    "dcgan":   dict(g=(512, 256, 128, 64), f=(64, 128, 256, 512), kernel=5, z=100, unit=True),
    "dcgan16": dict(g=(512, 256, 128, 64), f=(16, 32, 64, 128), kernel=5, z=100, unit=True),
    "gamn":    dict(g=(512, 256, 128), f=(128, 256, 512), kernel=5, norms=("none", "layer"), noise="normal"),
    "wgan":    dict(g=(512, 256, 128), f=(128, 256, 512), kernel=5, norms=("none", "batch"), noise="normal"),
    "wgan-gp": dict(g=(512, 256, 128), f=(128, 256, 512), kernel=5, noise="normal"),
    "sngan":   dict(width=64, unit=True),
    "gmmn":    dict(mlp=(64, 256, 256, 1024, 3072), z=10, unit=True),
    "gmmn-ae": dict(mlp=(64, 256, 256, 1024, 32), encoder=(3072, 1024, 32), z=10, unit=True),
}

# distance and the weights of its terms: common.Game says, but for gram. critic: its outputs, 0 for no critic.
# steps: of the critic to one of the generator; gram moves both at once. adam: rate, betas; adam_g: those of
# the generator, if others; rmsprop: rate. clip: bound of the critic's weights. spectral: its gains. decay: of
# rates that adapt to KID. every: see GRID_EVERY. paper: Inception score (GRAM's: mean of Table 8), FID, KID.
# README.md says how rates and ridges of gram were found; 16, 8, the bound and the burst are OctoberChang/
# MMD-GAN's; GAMN names no weights, rates or steps: they are WGAN-GP's or ours; scale: Scaled MMD, section 4.
GRAM = dict(nets="gram", distance="gram", kernel="li", critic=128, steps=0, adam=(4e-4, 0.5, 0.999))
PRINTED = dict(GRAM, ridge=1e-3, adam=(5e-5, 0.5, 0.999))      # the paper's rate, JuliaGRAM's ridge
GAN = dict(nets="gram", distance="gan", critic=1, steps=1, adam=(2e-4, 0.5, 0.999))
LI = dict(nets="gram", distance="mmd", kernel="li", critic=128, steps=5, rmsprop=5e-5, clip=0.01, burst=True)
FULL = dict(LI, autoencoder=8.0, feasible=16.0)
MMD = dict(nets="dcgan", distance="mmd2", critic=16, steps=5, adam=(1e-4, 0.5, 0.9), decay=0.5)
ONE, TEN = dict(penalty=("gradient", 1.0)), dict(penalty=("gradient", 10.0))
FAR = dict(MMD, **TEN, kernel="distance", critic=256)
GAMN = dict(nets="gamn", distance="mmd", kernel="gmmn", critic=10, steps=5, adam=(1e-4, 0.5, 0.9))
GMMN = dict(nets="gmmn", distance="mmd", kernel="gmmn", critic=0, steps=0, adam=(1e-3, 0.5, 0.999),
            batch=1_000)        # its code has momentum; rate and Adam are ours
SCALED = dict(MMD, nets="sngan", kernel="unit", critic=1, decay=0.8, scale=10.0)
SN, LEARNED, OFTEN = dict(SCALED, spectral="fixed"), dict(SCALED, spectral="learned"), dict(every=2_000)
METHODS = {
    "gram":         dict(GRAM, form="swap", ridge=1.0, paper="5.54, 24.85 ± 0.94"),  # eq. 9, p, q exchanged
    "gram-flow":    dict(GRAM, form="flow", ridge=1e-2),                                # GRAMFlow's objective
    "gram-eq9":     dict(PRINTED, form="sum", paper="5.54, 24.85 ± 0.94"),              # eq. 9 as printed
    "gram-clip":    dict(PRINTED, form="clip"),                                         # footnote 3
    "gram-adaptive": dict(GRAM, form="swap", ridge=1.0, decay=0.5),
    "gan":          dict(GAN, adam_g=(4e-4, 0.5, 0.999), paper="5.13, 26.82 ± 0.49"),
    "mmdnet":       dict(GRAM, distance="mmd", critic=0, adam=(1e-3, 0.5, 0.999)),      # Adam is ours
    "gram-weak":    dict(GRAM, form="swap", ridge=1.0, nets="weak", paper="-, 24.82 ± 0.62"),   # Table 1
    "gan-weak":     dict(GAN, nets="weak", paper="-, 31.64 ± 2.10"),
    "mmdgan-weak":  dict(FULL, nets="weak", paper="-, 210.85 ± 8.92"),
    "mmdgan":       dict(FULL, paper="5.29, 40.00 ± 0.56"),
    "mmdgan-noae":  dict(LI, feasible=16.0, paper="5.40"),                              # Table 4
    "mmdgan-nofsr": dict(LI, autoencoder=8.0, paper="3.26"),
    "mmdgan-plain": dict(LI, paper="3.51"),
    "mmdgan-conv":  dict(FULL, nets="li", paper="-, 38.39 ± 0.28"),                     # Table 2
    "mmd-rqdot":    dict(MMD, **ONE, **OFTEN, kernel="rq*", activation=1.0, paper="6.51, 39.90, .027"),
    "mmd-rq":       dict(MMD, **ONE, kernel="rq"),
    "mmd-rbf":      dict(MMD, **ONE, kernel="rbf"),
    "mmd-dot":      dict(MMD, **ONE, kernel="dot"),
    "mmd-dist":     dict(FAR, activation=1e-4, paper="6.39, 40.25, .028"),          # activation: footnote 19
    "cramer":       dict(FAR, distance="cramer", paper="6.39, 40.27, .028"),
    "wgan-gp":      dict(MMD, **TEN, **OFTEN, critic=1, distance="wasserstein", paper="6.53, 37.52, .026"),
    "gamn":         dict(GAMN, **TEN, **OFTEN, paper="6.44"),                           # eq. 7
    "gamn-2":       dict(GAMN, **TEN, critic=2, paper="6.43"),                          # Table 3
    "gamn-3":       dict(GAMN, **TEN, critic=3, paper="6.43"),
    "gamn-mmd":     dict(GAMN, **TEN, data_mmd=True),                                   # as "Robustness" says
    "gamn-l1":      dict(GAMN, penalty=("l1", 1e-3), paper="6.35"),                     # eq. 9
    "gamn-l2":      dict(GAMN, penalty=("l2", 1e-3), paper="6.25"),                     # eq. 8
    "gamn-classical-l2": dict(GAMN, penalty=("l2-all", 1e-3), paper="6.01"),            # footnote 3
    "gamn-wgan-gp": dict(GAMN, **TEN, nets="wgan-gp", distance="wasserstein", critic=1, paper="6.16"),
    "gmmn":         dict(GMMN, paper="2.45"),
    "gmmn-ae":      dict(GMMN, nets="gmmn-ae", kernel="unit", encode=(0.2, 0.5), paper="2.78"),
    "wgan":         dict(nets="wgan", distance="wasserstein", critic=1, steps=5, rmsprop=5e-5, clip=0.01,
                         paper="5.61"),
    "smmd":         dict(SCALED, **OFTEN, distance="smmd", paper="7.48, 25.1, .015"),
    "sn-smmd":      dict(LEARNED, **OFTEN, distance="smmd", paper="7.43, 24.5, .015"),
    "swgan":        dict(SCALED, distance="swgan"),
    "sn-swgan":     dict(LEARNED, distance="swgan", paper="7.34, 27.9, .016"),
    "sn-gan":       dict(SN, distance="gan", paper="7.29, 26.1, .015"),
    "sobolev":      dict(SCALED, distance="sobolev", rho=1e-6, paper="3.21, 132.2, .113"),      # rho is ours
    "sngan-wgan-gp": dict(SCALED, **TEN, distance="wasserstein", paper="6.68, 40.2, .024"),
    "mmd-gp-l2":    dict(SCALED, **ONE, activation=1.0, paper="7.55, 23.6, .014"),
    "mmd-plain":    dict(SCALED, paper="7.01, 30.9, .02"),                              # Table 2
    "sn-mmd":       dict(SN, paper="5.23, 69.0, .046"),
    "sn-wgan":      dict(SN, distance="wasserstein", paper="2.95, 162.3, .125"),
    "sn-mmd-gp":    dict(LEARNED, **ONE, paper="5.02, 137.0, .084"),
    "sn-wgan-gp":   dict(LEARNED, **TEN, distance="wasserstein", paper="4.49, 73.1, .058"),
    "sn-mmd-gp-l2": dict(LEARNED, **ONE, activation=1.0, paper="7.43, 23.4, .015"),
    "sn-mmd-l2":    dict(SN, activation=1.0, paper="4.46, 67.0, .053"),
}
METHODS |= {f"{name}-16": dict(METHODS[name], nets="dcgan16", paper=paper) for name, paper in {
    "mmd-rqdot": "5.86, 48.10, .032", "mmd-rq": "-", "mmd-rbf": "-", "mmd-dot": "-",
    "mmd-dist": "4.53, 80.48, .061", "cramer": "4.67, 74.93, .060", "wgan-gp": "3.15, 147.09, .116"}.items()}
METHODS |= {f"{name}-300": dict(METHODS[name], batch=300, paper=paper) for name, paper in {
    "mmdgan": "5.43", "mmdgan-noae": "5.15", "mmdgan-nofsr": "3.68", "mmdgan-plain": "3.87"}.items()}
METHODS |= common.released(METHODS, {"dcgan": "columns", "dcgan16": "columns", "sngan": "pixels"})
METHODS |= common.activated(METHODS, "mmd-rbf-16", "mmd-dot-16", "mmd-dist-16")

# GRAM, Figure 5: {axis: {row: its place there}}; the paper's values of a and b are not in its text
SWEEPS = {
    "5": {"learning rate": {f"{name}-lr{rate:.5f}": rate for name in ("gram", "gan", "mmdgan")
                            for rate in (5e-5, 1e-4, 2e-4, 4e-4, 8e-4)},
          "batch size": {f"{name}-batch{n}": n for name in ("gram", "gan", "mmdgan")
                         for n in (16, 32, 64, 128, 256)}},
    "5c": {"K": {f"gram-k{k}": k for k in (2, 8, 32, 128, 512, 1024, 2048)}},
}
METHODS |= {name: common.swept(METHODS[name.rsplit("-", 1)[0]], axis, value) for panels in SWEEPS.values()
            for axis, own in panels.items() for name, value in own.items()}
METHODS = {name: dict(row, nets=USUAL | NETS[row["nets"]]) for name, row in METHODS.items()}

# The rows of a paper's table and its number of samples, ours for GRAM and GAMN
TABLES = {
    "gram": (10_000, "mmdgan gan gram mmdgan-weak gan-weak gram-weak mmdgan-conv mmdgan-noae mmdgan-nofsr "
                     "mmdgan-plain mmdgan-300 mmdgan-noae-300 mmdgan-nofsr-300 mmdgan-plain-300"),
    "demystifying": (25_000, "mmd-rqdot-16 mmd-rqdot mmd-dist-16 mmd-dist cramer-16 cramer wgan-gp-16 "
                             "wgan-gp"),
    "gamn": (50_000, "gmmn gmmn-ae wgan gamn-wgan-gp gamn gamn-2 gamn-3 gamn-l1 gamn-l2 gamn-classical-l2"),
    "scaled": (50_000, "mmd-gp-l2 sngan-wgan-gp sn-gan sobolev smmd sn-smmd sn-swgan mmd-plain sn-mmd "
                       "sn-wgan sn-mmd-gp sn-wgan-gp sn-mmd-gp-l2 sn-mmd-l2"),
}
FIGURES = {name: dict(method=[row for own in panels.values() for row in own], steps=20_000)
           for name, panels in SWEEPS.items()}
FIGURES |= {"scores": dict(method=["smmd", "sn-smmd", "mmd-rqdot-16", "wgan-gp-16"], steps=20_000),
            "singular": dict(method=["smmd", "sn-smmd"], steps=20_000),     # Scaled MMD, Figures 2b and 7
            "gamn": dict(method=["gamn"]), "neighbours": dict(method=["gram"]), "bias": {}, "noise": {}}
CURVES = {      # over updates, or seconds of a run alone: as Scaled MMD, Figures 2a and 8; GAMN, Figure 5
    "all": [(name, "update") for name in ("fd", "mean_r", "condition", "spread")],
    "scores": [(name, over) for over in ("update", "second") for name in ("fd", "kid", "isc")],
    "gamn": [(name, "update") for name in ("loss_g", "kid", "isc")],
}
ESTIMATES = 100             # for each n of --figure bias, Demystifying MMD GANs, Figure 1
KID_N, FID_N = (50, 100, 200, 500, 1_000, 2_000), (1_000, 2_500, 5_000, 7_500, 10_000)
CENSORED, CENSORED_M = 2048, (10_000, 20_000, 50_000, 100_000)      # dimension and sample sizes of its D.2


def networks(row):
    """Generator, critic and decoder of a row of METHODS, None for what it has not."""
    return common.image_networks(row["nets"], row, 3, 32)


def train(method, seed, folder, settings, steps, device, images, samples=SAMPLES, judge=None):
    """One run: a generator that yields when ready and after each update, and returns its result.

    It is sent whether to save. samples: how many to keep and to score, by common.Judge, if there is one.
    """
    row = METHODS[method]
    nets, batch, grid_every = row["nets"], row.get("batch", BATCH), row.get("every", GRID_EVERY)
    before = common.gpu_memory(device)
    torch.manual_seed(seed)
    g, f, decoder = (network.to(device) if network else None for network in networks(row))
    sampler = common.Sampler(g, nets, AVERAGE, 3, decoder if "encode" in row else None)
    sampler.fit(images).to(device)
    rng = torch.Generator(device).manual_seed(seed)
    kernel = common.kernels(SIGMA, RBF, ALPHA, device).get(row.get("kernel"))
    game = common.Game(row, f, decoder, kernel, rng).to(device)
    opt_g = common.optimizer(g, row.get("adam_g", row.get("adam")), row.get("rmsprop"))
    opt_f = common.optimizer(game, row.get("adam"), row.get("rmsprop")) if f else None
    scorer = common.Scorer(judge, sampler, folder, BOOTSTRAP, RESAMPLINGS)
    log = common.Log(folder, common.COLUMNS, steps, device, common.READINGS)
    state = dict(g=g, opt_g=opt_g, game=game, sampler=sampler, rng=rng, log=log)
    if f:
        state["opt_f"] = opt_f
    K_ratio = torch.zeros(len(SIGMA), batch, batch, device=device)      # what the last ratio has inverted

    def draw():
        x = common.flip_images(common.draw_images(images, batch, rng), rng)
        return (x + 1) / 2 if "unit" in nets else x, g(sampler.noise(batch, rng))

    def ascend():
        x, y = torch.no_grad()(draw)()
        with parametrize.cached():      # so that a spectral norm is iterated once
            loss = game.critic(x, y)
            common.descend((opt_f, loss))
        if "clip" in row:
            common.clip_weights(f, row["clip"])
        game.loss.copy_(loss.detach())

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
            means = game.loss if f else None, loss_g, None, None
        log.add(*means, h_x.var(0).sum() / h_y.var(0).sum() if f else None)
        sampler.follow(g)

    def critic_steps(step):
        return BURST if "burst" in row and (step < BURST_UNTIL or step % BURST_EVERY == 0) else row["steps"]

    def cycle(n):
        for _ in range(n):
            ascend()
        update()

    def readings(step):
        found = dict(condition=common.condition(K_ratio, row["ridge"])) if "ridge" in row else {}
        if step % grid_every == 0 or step == steps:
            found |= scorer.score(SAMPLES)
        if "adaptive" in state and step % ADAPT_EVERY == 0:
            found["p"] = state["adaptive"].step(judge.codes(common.Sampler(g, nets).draw(CODES, step)))
            found["lr_g"] = float(opt_g.param_groups[0]["lr"])
        return found

    if judge and "decay" in row:
        x, key = judge.codes(images[:CODES]), judge.network.key
        state["adaptive"] = common.AdaptiveRate([opt_g, opt_f], x, key, row["decay"], *ADAPT)
    step = common.load(folder, state, settings)
    speed = common.read_result(folder, "milliseconds", "MiB")
    if step < steps:
        update = common.capture(update, state)
        if row["steps"] or "encode" in row:
            ascend = common.capture(ascend, state)
        speed = common.measure(lambda: cycle(row["steps"]), state, device, before)
    yield                               # when all runs are ready, the clock starts
    log.start(step)
    if "encode" in row and step == 0:
        yield from common.encode(ascend, ENCODE, folder)
    while step < steps:
        cycle(critic_steps(step))
        step += 1
        if step % LOG_EVERY == 0 or step == steps:
            log.row(step, lambda: readings(step))
        if step % grid_every == 0 or step == steps:
            common.save_grid(f"{folder}/samples-{step}.png", sampler.draw(128))
            if row["critic"]:
                common.save_singular_values(folder, step, f)
        if (yield) or step % SAVE_EVERY == 0 or step == steps:
            common.save(folder, step, state, settings)

    return dict(method=method, seed=seed, updates=step, seconds=log.seconds, **speed,
                **common.machine(device), **scorer.keep(samples))


def main(argv=None):
    args = common.parse(common.flags(__doc__, METHODS, ["gram"], STEPS, images=True), argv, FIGURES, TABLES)
    device, samples = common.setup(args.device), args.samples or SAMPLES
    adaptive = next((method for method in args.method if "decay" in METHODS[method]), None)
    needed = f"--figure {args.figure}" if args.figure else adaptive
    least = max(CODES if adaptive else 0, *(METHODS[method].get("batch", BATCH) for method in args.method))
    images = common.load_images("cifar10", "train", args.data, least).to(device)
    common.load_images("cifar10", "test", args.data)        # for the judge to read
    judge = common.open_judge(args.features, f"{args.data}/cifar10-test.npy", device, needed)
    figure = f"{args.out}/cifar-figure{args.figure}.png"
    if args.figure == "bias":       # Demystifying MMD GANs, Figure 1 and appendix D.2
        picture = common.bias_figure(images, judge, KID_N, FID_N, CENSORED, CENSORED_M, ESTIMATES)
        return common.save_figure(figure, picture)
    if args.figure == "noise":      # its appendix E, with MNIST's digits where the paper has ImageNet
        digits = nn.functional.pad(common.load_images("mnist", "train", args.data), (2, 2, 2, 2))
        return common.save_figure(figure, common.noise_figure(images, digits.expand(-1, 3, -1, -1), judge))
    finished = common.train_runs(__file__, globals(), args, argv, device,
                                 lambda run: train(*run, args.steps, device, images, samples, judge))
    if args.figure == "neighbours":
        shown = common.read_images(f"{finished[0][0].folder}/samples.npy")[:10]
        common.save_figure(figure, common.neighbours_figure(shown, images, judge))


if __name__ == "__main__":
    common.run(main)
