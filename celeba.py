"""CelebA: Scaled MMD and Demystifying MMD GANs at 160x160, GRAM's table at 64x64, LSUN bedrooms at 64x64.

    python celeba.py --method sn-smmd           the FID of 12.2 of Scaled MMD, Table 1a: 150,000 updates
    python celeba.py --table scaled             its other rows, of 50,000 samples; demystifying, gram, lsun
    python celeba.py --set celeba64 --method gram gan       at 64x64; --set lsun: bedrooms
    python celeba.py --figure singular          Scaled MMD, Figure 2b; scores: Figure 2a
    torchrun --nproc-per-node=2 celeba.py ...   on several GPUs, 64 images of either kind on each

Images are those of data/celeba/img_align_celeba and data/lsun, from which arrays are built once (17.4 GB for
160x160). 150,000 updates of sn-smmd take about 4 hours on one H200; its scores are not measured yet. A run
goes to runs/celeba-METHOD-sSEED/: samples-UPDATE.png, samples.npy, log.csv, checkpoint.pt, result.json; the
curves of all runs of a command are runs/celeba-curves.png.
"""
import sys
from contextlib import closing

import torch
from torch.nn.utils import parametrize

import common

STEPS = 150_000             # Demystifying MMD GANs, Scaled MMD; GRAM and GAMN do not say
BATCH = 64                  # of data and of samples, in all papers, on each GPU
SIGMA = (1, 2, 4, 8, 16)    # bandwidths of Li et al. 2017, GRAM, section 4; for GRAMFlow they are variances
RBF = (2, 5, 10, 20, 40, 80)            # as variances GMMN's, and so GAMN's, "gmmn"
ALPHA = (0.2, 0.5, 1, 2, 5)             # Demystifying MMD GANs, section 5; its code has 0.1, 1, 10
LAMBDA = 1.0                # GRAM, eq. 9
BURST, BURST_UNTIL, BURST_EVERY = 100, 25, 500      # MMD-GAN's critic steps: at updates 1 to 25, every 500th
AVERAGE = 3                 # samples come from averaged weights of the generator, those of update t count as
                            # t^3; the average, mirrored data at 64, contrast are ours: see cifar.py
ADAPT_EVERY, CODES = 2_000, 2_048       # of rates that adapt by so many samples: Demystifying MMD GANs,
ADAPT = (10, 3, 0.1, 1e-6)              # section 5; window, patience, level and floor: its code's scorer.py
SAMPLES = 10_000            # to score during training
FINAL = 25_000              # to score at the end, Demystifying MMD GANs; Scaled MMD has 50,000
KEEP = 1_000                # of them in samples.npy
BOOTSTRAP, RESAMPLINGS = 25_000, 10     # of the distance, if so many are scored; as Demystifying MMD GANs
LOG_EVERY = 200
GRID_EVERY = 10_000         # and, with a feature network, scores
SAVE_EVERY = 5_000          # a multiple of LOG_EVERY: what is saved has been seen to be finite

# The array of a set, the size of its crops that are trained on, the row that is trained if none is named.
# CelebA's faces are cropped at random from 178x178 (mbinkowski/MMD-GAN, as "resized and cropped to 160x160");
# GRAM does not state its resolution, 64 is that of Li et al. 2017, whose settings it has.
SETS = {
    "celeba160": dict(array="celeba178", size=160, method="sn-smmd"),
    "celeba64":  dict(array="celeba64", size=64, method="gram"),
    "lsun":      dict(array="lsun64", size=64, method="mmd-rqdot"),
}

# Widths of generator and critic, size of their filters, norms behind the critic's first convolution and the
# others, noise; unit: pixels are in [0, 1] instead of [-1, 1]; start: see common.residual_generator, which
# names the sources, as common.dcgan_critic does. GRAM's Tables 5 and 6 are of 32x32: one more layer is ours.
USUAL = dict(z=128, noise="uniform", kernel=5, norms=("none",))         # where a row does not say otherwise
TEN_LAYERS = dict(g=(1024, 512, 256, 128, 64), f=(64, 128, 256, 512, 1024), start=5, unit=True)
DCGAN = dict(g=(512, 256, 128, 64), f=(64, 128, 256, 512))
NETS = {
    "scaled":  dict(TEN_LAYERS),
    "bf16":    dict(TEN_LAYERS, bfloat16=True),
    "resnet":  dict(TEN_LAYERS, z=100),
    "gram":    dict(g=(256, 128, 64, 32), f=(32, 64, 128, 256), kernel=4, norms=("batch",)),
    "li":      dict(DCGAN, z=64, kernel=4, norms=("none", "batch"), noise="normal"),
    "dcgan":   dict(DCGAN, z=100, unit=True),
    "dcgan16": dict(DCGAN, f=(16, 32, 64, 128), z=100, unit=True),
    "gamn":    dict(DCGAN, norms=("none", "layer"), noise="normal"),        # igul222, gan_64x64.py
    "wgan":    dict(DCGAN, norms=("none", "batch"), noise="normal"),
    "wgan-gp": dict(DCGAN, noise="normal"),
}

# distance and the weights of its terms: common.Game says, but for gram. critic: its outputs. steps: of the
# critic to one of the generator; gram moves both at once. adam: rate, betas; adam_g: those of the generator,
# if others; rmsprop: rate. clip: bound of the critic's weights. spectral: its gains. decay: of rates that
# adapt to KID. paper: Inception score, FID, KID of its table. What is ours, of GRAM, MMD-GAN and GAMN, is
# ours in cifar.py too.
AT_160 = dict(set="celeba160", steps=5, adam=(1e-4, 0.5, 0.9))
MMD = dict(AT_160, nets="resnet", distance="mmd2", critic=16, decay=0.5)
ONE, TEN = dict(penalty=("gradient", 1.0)), dict(penalty=("gradient", 10.0))
FAR = dict(MMD, **TEN, kernel="distance", critic=256)
SCALED = dict(AT_160, nets="scaled", kernel="unit", critic=1, decay=0.8, scale=10.0)
SN, LEARNED = dict(SCALED, spectral="fixed"), dict(SCALED, spectral="learned")
METHODS = {
    "mmd-rqdot":    dict(MMD, **ONE, kernel="rq*", activation=1.0, paper="2.61, 20.55, .013"),  # footnote 19
    "cramer":       dict(FAR, distance="cramer", paper="2.86, 31.30, .025"),
    "wgan-gp":      dict(MMD, **TEN, critic=1, distance="wasserstein", paper="2.72, 29.24, .022"),
    "smmd":         dict(SCALED, distance="smmd", scale=0.1, paper="2.83, 25.9, .019"),     # "Rank collapse"
    "sn-smmd":      dict(LEARNED, distance="smmd", paper="2.91, 12.2, .006"),
    "sn-smmd-bf16": dict(LEARNED, nets="bf16", distance="smmd"),     # all but the last layers in bfloat16
    "swgan":        dict(SCALED, distance="swgan"),
    "sn-swgan":     dict(LEARNED, distance="swgan", paper="2.86, 18.6, .011"),
    "sn-gan":       dict(SN, distance="gan", paper="2.64, 27.7, .018"),
    "sobolev":      dict(SCALED, distance="sobolev", rho=1e-6, paper="2.84, 20.4, .014"),       # rho is ours
}
SMALL = dict(set="celeba64", nets="gram", kernel="li", critic=128)
LI = dict(SMALL, distance="mmd", steps=5, rmsprop=5e-5, clip=0.01, burst=True, autoencoder=8.0, feasible=16.0)
METHODS |= {
    "celeba64-gram": dict(SMALL, distance="gram", steps=0, adam=(4e-4, 0.5, 0.999), form="swap", ridge=1.0,
                          paper="-, 27.04 ± 4.24"),
    "celeba64-gan":  dict(SMALL, distance="gan", critic=1, steps=1, adam=(2e-4, 0.5, 0.999),
                          adam_g=(4e-4, 0.5, 0.999), paper="-, 30.97 ± 5.32"),
    "celeba64-mmdgan": dict(LI, paper="-, 41.105 ± 1.42"),
    "celeba64-mmdgan-conv": dict(LI, nets="li", critic=64, paper="-, 40.27 ± 1.32"),        # Table 2
}
BED = dict(set="lsun", nets="dcgan")
METHODS |= {
    "lsun-mmd-rqdot": dict(METHODS["mmd-rqdot"], **BED, paper="2.80, 31.95, .028"),
    "lsun-mmd-dist": dict(FAR, **BED, activation=1e-4, paper="2.79, 35.28, .032"),             # footnote 19
    "lsun-cramer":  dict(METHODS["cramer"], **BED, paper="3.44, 54.18, .050"),
    "lsun-wgan-gp": dict(METHODS["wgan-gp"], **BED, paper="3.12, 41.39, .039"),
    "lsun-gamn":    dict(BED | dict(nets="gamn"), **TEN, distance="mmd", kernel="gmmn", critic=10, steps=5,
                         adam=(1e-4, 0.5, 0.9)),                                            # Figure 4
    "lsun-gamn-wgan-gp": dict(BED | dict(nets="wgan-gp"), **TEN, distance="wasserstein", critic=1, steps=5,
                              adam=(1e-4, 0.5, 0.9)),
    "lsun-wgan":    dict(BED | dict(nets="wgan"), distance="wasserstein", critic=1, steps=5, rmsprop=5e-5,
                         clip=0.01),
}
METHODS |= {f"{name}-16": dict(METHODS[name], nets="dcgan16", paper=paper) for name, paper in {
    "lsun-mmd-rqdot": "3.13, 86.47, .091", "lsun-mmd-dist": "3.42, 104.85, .109",
    "lsun-cramer": "3.46, 122.03, .132", "lsun-wgan-gp": "2.40, 292.77, .370"}.items()}
METHODS |= common.released(METHODS, {"resnet": "columns", "dcgan": "columns", "dcgan16": "columns"})
METHODS = {name: dict(row, nets=USUAL | NETS[row["nets"]]) for name, row in METHODS.items()}

# The rows of a paper's table and its number of samples, ours for GRAM
TABLES = {
    "demystifying": (25_000, "mmd-rqdot cramer wgan-gp"),
    "scaled": (50_000, "mmd-rqdot wgan-gp sn-gan sobolev smmd sn-smmd sn-swgan"),
    "gram": (10_000, "celeba64-mmdgan celeba64-gan celeba64-gram celeba64-mmdgan-conv"),
    "lsun": (25_000, "lsun-mmd-rqdot-16 lsun-mmd-rqdot lsun-mmd-dist-16 lsun-mmd-dist lsun-cramer-16 "
                     "lsun-cramer lsun-wgan-gp-16 lsun-wgan-gp"),
}
FIGURES = {"scores": dict(method="mmd-rqdot wgan-gp sn-gan sobolev smmd sn-smmd sn-swgan".split()),
           "singular": dict(method=["smmd", "sn-smmd"])}
CURVES = {      # over updates, or seconds of a run alone: as Scaled MMD, Figure 2a
    "all": [(name, "update") for name in ("fd", "kid", "loss_g", "spread")],
    "scores": [(name, over) for over in ("update", "second") for name in ("fd", "kid", "isc")],
}


def networks(row):
    """Generator, critic and decoder of a row of METHODS, None for what it has not."""
    return common.image_networks(row["nets"], row, 3, SETS[row["set"]]["size"])


def train(method, seed, folder, settings, steps, device, images, samples=FINAL, judge=None):
    """One run: a generator that yields when ready and after each update, and returns its result.

    It is sent whether to save. images: of the GPU, or of a map, see common.on_device; samples: how many
    to score at the end, by common.Judge, if there is one.
    """
    row = METHODS[method]
    nets, batch, size = row["nets"], BATCH, SETS[row["set"]]["size"]
    before = common.gpu_memory(device)
    torch.manual_seed(seed)
    g, f, decoder = (network.to(device) if network else None for network in networks(row))
    some = common.crop_images(common.evenly(images, CODES), size)
    sampler = common.Sampler(g, nets, AVERAGE, 3).fit(some).to(device)
    rng = torch.Generator(device).manual_seed(common.own_seed(seed))
    kernel = common.kernels(SIGMA, RBF, ALPHA, device).get(row.get("kernel"))
    game = common.Game(row, f, decoder, kernel, rng).to(device)
    opt_g = common.optimizer(g, row.get("adam_g", row.get("adam")), row.get("rmsprop"))
    opt_f = common.optimizer(game, row.get("adam"), row.get("rmsprop"))
    batches = common.Batches(images, batch, seed, device)
    scorer = common.Scorer(judge, sampler, folder, BOOTSTRAP, RESAMPLINGS)
    log = common.Log(folder, common.COLUMNS, steps, device, common.READINGS)
    state = dict(g=g, opt_g=opt_g, game=game, opt_f=opt_f, sampler=sampler, rng=rng, batches=batches, log=log)
    K_ratio = torch.zeros(len(SIGMA), batch, batch, device=device)      # what the last ratio has inverted

    def draw():
        x = common.crop_images(batches.x, size, rng) / 127.5 - 1
        x = common.flip_images(x, rng)
        return (x + 1) / 2 if "unit" in nets else x, g(sampler.noise(batch, rng))

    def ascend():
        x, y = torch.no_grad()(draw)()
        with parametrize.cached():      # so that a spectral norm is iterated once
            loss = game.critic(x, y)
            common.descend((opt_f, loss))
        if "clip" in row:
            common.clip_weights(f, row["clip"])
        if "rho" in row:                # of several processes the constraint is that of all data
            game.multiplier.copy_(common.averaged(game.multiplier)[0])
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
            means = game.loss, loss_g, None, None
        log.add(*means, h_x.var(0).sum() / h_y.var(0).sum())
        sampler.follow(g)

    def critic_steps(step):
        return BURST if "burst" in row and (step < BURST_UNTIL or step % BURST_EVERY == 0) else row["steps"]

    def cycle(n):
        for _ in range(n):
            batches.fill()
            ascend()
        batches.fill()
        update()

    def readings(step):
        found = dict(condition=common.condition(K_ratio, row["ridge"])) if "ridge" in row else {}
        if step % GRID_EVERY == 0 or step == steps:
            found |= scorer.score(SAMPLES)
        if "decay" in row and step % ADAPT_EVERY == 0:
            if "adaptive" in state:
                now = common.Sampler(g, nets).draw(CODES, step)
                found["p"] = state["adaptive"].step(judge.codes(now))
            common.share_rates(opt_g, opt_f)
            found["lr_g"] = float(opt_g.param_groups[0]["lr"])
        return found

    if judge and "decay" in row:
        x, key = judge.codes(some), judge.network.key
        state["adaptive"] = common.AdaptiveRate([opt_g, opt_f], x, key, row["decay"], *ADAPT)
    step = common.load(folder, state, settings)
    speed = common.read_result(folder, "milliseconds", "MiB", "waiting")
    begun = step, log.seconds
    if step < steps:
        update = common.capture(update, state)
        if row["steps"]:
            ascend = common.capture(ascend, state)
        speed = common.measure(lambda: cycle(row["steps"]), state, device, before)
        batches.waited = 0.0
    with closing(batches):              # its threads end with the run
        yield                           # when all runs are ready, the clock starts
        log.start(step)
        while step < steps:
            cycle(critic_steps(step))
            step += 1
            if step % LOG_EVERY == 0 or step == steps:
                log.row(step, lambda: readings(step))
            if step % GRID_EVERY == 0 or step == steps:
                common.save_grid(f"{folder}/samples-{step}.png", sampler.draw(64), 8)
                common.save_singular_values(folder, step, f)
            if (yield) or step % SAVE_EVERY == 0 or step == steps:
                common.save(folder, step, state, settings)

    if step > begun[0]:                 # the share of the time in which it waited for images
        speed["waiting"] = batches.waited / (log.seconds - begun[1])
    return dict(method=method, seed=seed, updates=step, seconds=log.seconds, **speed,
                **common.machine(device), **scorer.keep(samples, KEEP))


def main(argv=None):
    names = [*METHODS, *(name.removeprefix(f"{part}-") for part in SETS for name in METHODS if part in name)]
    parser = common.flags(__doc__, dict.fromkeys(names), ["sn-smmd"], STEPS, images=True)
    parser.add_argument("--set", choices=list(SETS), metavar="NAME",
                        help=f"{', '.join(SETS)}: whose rows --method names (default celeba160)")
    parser.set_defaults(method=None)
    args = common.parse(parser, argv, FIGURES, TABLES)
    args.method = [full if (full := f"{args.set}-{name}") in METHODS else name
                   for name in args.method or [SETS[args.set or "celeba160"]["method"]]]
    sets = {METHODS[name]["set"] if name in METHODS else f"none ({name})" for name in args.method}
    if len(sets) > 1 or not sets <= {args.set or "celeba160", *(SETS if args.set is None else ())}:
        sys.exit(f"--method: found rows of {', '.join(sorted(sets))}, expected those of "
                 f"{args.set or 'one set; --set names it'}")
    chosen = SETS[sets.pop()]
    common.join(args.device)
    device, samples = common.setup(args.device), args.samples or FINAL
    adaptive = next((method for method in args.method if "decay" in METHODS[method]), None)
    needed = f"--figure {args.figure}" if args.figure == "scores" else adaptive
    network = common.open_features(args.features, device, needed)
    images, test = common.load_folders(chosen["array"], ("train", "test"), args.data)
    images = common.on_device(images, device)
    reference = f"{args.data}/{chosen['array']}-{'train' if test is None else 'test'}.npy"
    side = chosen["size"] if images.shape[-1] > chosen["size"] else None
    judge = network and common.open_judge(network, reference, device, side=side)
    common.train_runs(__file__, globals(), args, argv, device,
                      lambda run: train(*run, args.steps, device, images, samples, judge))


if __name__ == "__main__":
    common.run(main)
