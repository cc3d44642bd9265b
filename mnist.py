"""MNIST: from MMD-nets to the gradient-constrained MMD, one row a method.

    python mnist.py                                     GRAM, Figure 8: 16 minutes on a CPU core
    python mnist.py --table demystifying                Table 3 of Demystifying MMD GANs: 8 minutes, H200
    python mnist.py --figure gcmmd                      Figure 6 of Scaled MMD: its exact distance, and SMMD's
    python mnist.py --method gmmn-ae gamn wgan wgan-gp  what GAMN's Figure 2 shows, side by side

Expect digits from gram by update 3,000. Scores are those of a LeNet that is trained once, 80 s on a CPU core,
and kept in data/; they are no FID. A run goes to runs/mnist-METHOD-sSEED/: samples-UPDATE.png (data above
samples), figure8.png, samples.npy, log.csv, checkpoint.pt, result.json; the curves of all runs of a command
are runs/mnist-curves.png.
"""
import os

import torch
from matplotlib import image
from matplotlib.figure import Figure
from torch.nn.utils import parametrize

import common

STEPS = 5_000               # GRAM, Figure 8; GMMN 40,000, Demystifying MMD GANs 50,000, WGAN-GP 200,000
BATCH = 64                  # of data and of samples, Demystifying MMD GANs, Scaled MMD; a row has its own
SIGMA = (0.1, 1, 10, 100)   # the kernel "li": GRAM, appendix B.4
RBF = (2, 5, 10, 20, 40, 80)            # Demystifying MMD GANs, section 5; as variances GMMN's, "gmmn"
ALPHA = (0.2, 0.5, 1, 2, 5)             # Demystifying MMD GANs, section 5; its code has 0.1, 1, 10
LAMBDA = 1.0                # GRAM, eq. 9
ENCODE, ENCODE_BATCH = 10_000, 100      # steps of GMMN+AE's autoencoder, all at first; GMMN's go by layers
ADAPT_EVERY, CODES = 500, 2_048         # of rates that adapt by so many samples: Demystifying MMD GANs,
ADAPT = (10, 3, 0.1, 1e-6)              # section 5; window, patience, level and floor: its code's scorer.py.
                                        # Scaled MMD, section 4, has 2,000 updates in place of 500
SAMPLES = 10_000            # to keep and to score, but for --table
BOOTSTRAP, RESAMPLINGS = 100_000, 10    # of the distance, if so many are scored; as Demystifying MMD GANs
LENET_EPOCHS, LENET_BATCH, LENET_RATE = 2, 64, 2e-3     # ours: 99.3 % of the test images, as the tutorial's
PANELS = (100, 250, 500, 750, 1_000, 2_000, 3_000, 4_000, 5_000)        # updates, GRAM, Figure 8a
SHOWN = 50                  # data and as many samples in a panel
LOG_EVERY = 100
TRACE_EVERY = 10            # rows in log.csv of gram after the 100th update, one for each before, Figure 8b
GRID_EVERY = 1_000          # and scores
SAVE_EVERY = 1_000          # a multiple of LOG_EVERY: what is saved has been seen to be finite

# Widths of generator and critic, size of their filters, norms behind the critic's first convolution and the
# others, noise; unit: pixels are in [0, 1], in all papers. common.dcgan_critic names the sources. Those of
# WGAN and WGAN-GP are gan_mnist.py's, but that theirs has batch norm in the generator for WGAN alone.
USUAL = dict(z=100, noise="uniform", kernel=5, norms=("none",), unit=True)      # where a row does not say
SMALL = dict(g=(256, 128, 64), f=(64, 128, 256), z=128, noise="normal")
NETS = {
    "gram":    dict(mlp=(600, 600, 800, 784), pooled=(16, 32, 32)),     # GRAM, appendix B.4, Table 3
    "gmmn":    dict(mlp=(64, 256, 256, 1024, 784), z=10),
    "gmmn-ae": dict(mlp=(64, 256, 256, 1024, 32), encoder=(784, 1024, 32), z=10),
    "dcgan":   dict(g=(512, 256, 128, 64), f=(64, 128, 256, 512), z=128),
    "dcgan16": dict(g=(512, 256, 128, 64), f=(16, 32, 64, 128)),
    "wgan-gp": SMALL,
    "wgan":    dict(SMALL, norms=("none", "batch")),
    "gamn":    dict(SMALL, norms=("none", "layer")),
}

# distance and the weights of its terms: common.Game says, but for gram. critic: its outputs, 0 for no critic.
# steps: of the critic to one of the generator; gram moves both at once. adam: rate, betas; rmsprop: rate.
# clip: bound of the critic's weights. spectral: its gains. decay: of rates that adapt to KID. paper:
# Inception score, FID, KID of its Table 3. gram is eq. 9 as printed, with JuliaGRAM's ridge: on digits it
# learns for 5,000 updates (on cifar.py's images not, whose gram is gram-swap). lam is Figure 5's of Scaled
# MMD, which has none for its Figure 6. GAMN's critic steps, rates and weight are those of WGAN-GP: it names
# none.
GRAM = dict(nets="gram", distance="gram", kernel="li", critic=100, steps=0, adam=(1e-3, 0.5, 0.999),
            batch=200, ridge=1e-3)
MMD = dict(nets="dcgan16", distance="mmd2", critic=16, steps=5, adam=(1e-4, 0.5, 0.9), decay=0.5)
ONE, TEN = dict(penalty=("gradient", 1.0)), dict(penalty=("gradient", 10.0))
FAR = dict(MMD, **TEN, kernel="distance", critic=256)
GULRAJANI = dict(steps=5, adam=(1e-4, 0.5, 0.9), batch=50)             # gan_mnist.py
GMMN = dict(nets="gmmn", distance="mmd", kernel="gmmn", critic=0, steps=0, adam=(1e-3, 0.5, 0.999),
            batch=1_000)        # its code has momentum; rate and Adam are ours
SCALED = dict(MMD, nets="dcgan", kernel="unit", critic=1, decay=0.8)
METHODS = {
    "gram":         dict(GRAM, form="sum"),                                             # eq. 9, the paper's
    "gram-clip":    dict(GRAM, form="clip"),                                            # footnote 3
    "gram-swap":    dict(GRAM, form="swap", ridge=1.0), # eq. 9, p and q exchanged; cifar.py's gram
    "mmd-rqdot-16": dict(MMD, **ONE, kernel="rq*", activation=1.0, paper="9.11, 4.206, .005"),  # footnote 19
    "mmd-rbf-16":   dict(MMD, **ONE, kernel="rbf", paper="8.98, 8.264, .011"),
    "mmd-dot-16":   dict(MMD, **ONE, kernel="dot", paper="8.86, 6.245, .006"),
    "mmd-dist-16":  dict(FAR, activation=1e-4, paper="9.13, 6.179, .005"),              # footnote 19
    "cramer-16":    dict(FAR, distance="cramer", paper="9.25, 3.385, .006"),
    "wgan-gp-16":   dict(MMD, **TEN, critic=1, distance="wasserstein", paper="9.12, 6.915, .009"),
    "gmmn":         dict(GMMN),
    "gmmn-ae":      dict(GMMN, nets="gmmn-ae", kernel="unit", encode=(0.2, 0.5)),      # dropout of its code
    "gamn":         dict(GULRAJANI, **TEN, nets="gamn", distance="mmd", kernel="gmmn", critic=10),  # eq. 7
    "wgan":         dict(nets="wgan", distance="wasserstein", critic=1, steps=5, rmsprop=5e-5, clip=0.01,
                         batch=50),
    "wgan-gp":      dict(GULRAJANI, **TEN, nets="wgan-gp", distance="wasserstein", critic=1),
    "gan":          dict(nets="wgan", distance="gan", critic=1, steps=1, adam=(2e-4, 0.5, 0.999),
                         batch=50),     # batch norm as DCGAN; gan_mnist.py has none: all samples became one
    "smmd":         dict(SCALED, distance="smmd", scale=10.0),
    "sn-smmd":      dict(SCALED, distance="smmd", scale=10.0, spectral="learned"),
    "gcmmd":        dict(SCALED, distance="gcmmd", lam=1.0),                            # Proposition 4
    "sn-gcmmd":     dict(SCALED, distance="gcmmd", lam=1.0, spectral="learned"),
}
METHODS |= common.released(METHODS, {"dcgan16": "columns"})
METHODS |= common.activated(METHODS, "mmd-rbf-16", "mmd-dot-16", "mmd-dist-16")
METHODS = {name: dict(row, nets=USUAL | NETS[row["nets"]]) for name, row in METHODS.items()}

# The rows of a paper's table, its number of samples, updates: the paper's are 50,000
TABLES = {
    "demystifying": (100_000, "mmd-rqdot-16 mmd-rbf-16 mmd-dot-16 mmd-dist-16 cramer-16 wgan-gp-16", 20_000),
}
FIGURES = {"gcmmd": dict(method=["smmd", "sn-smmd", "gcmmd", "sn-gcmmd"], steps=20_000)}
CURVES = {      # over updates: as Demystifying MMD GANs, Figure 2, and the loss; as Scaled MMD, Figure 6
    "all": [(name, "update") for name in ("fd", "kid", "isc", "loss_g")],
    "gcmmd": [("loss_g", "update"), ("kid", "update")],
}


def networks(row):
    """Generator, critic and decoder of a row of METHODS, None for what it has not."""
    return common.image_networks(row["nets"], row, 1, 28)


def train(method, seed, folder, settings, steps, device, images, samples=SAMPLES, judge=None):
    """One run: a generator that yields when ready and after each update, and returns its result.

    It is sent whether to save. samples: how many to keep and to score, by common.Judge, if there is one.
    """
    row = METHODS[method]
    nets, batch = row["nets"], row.get("batch", BATCH)
    before = common.gpu_memory(device)
    torch.manual_seed(seed)
    g, f, decoder = (network.to(device) if network else None for network in networks(row))
    sampler = common.Sampler(g, nets, decoder=decoder if "encode" in row else None)
    rng = torch.Generator(device).manual_seed(seed)
    kernel = common.kernels(SIGMA, RBF, ALPHA, device).get(row.get("kernel"))
    game = common.Game(row, f, decoder, kernel, rng).to(device)
    opt_g = common.optimizer(g, row.get("adam"), row.get("rmsprop"))
    opt_f = common.optimizer(game, row.get("adam"), row.get("rmsprop")) if f else None
    scorer = common.Scorer(judge, sampler, folder, BOOTSTRAP, RESAMPLINGS)
    log = common.Log(folder, common.COLUMNS, steps, device, common.READINGS)
    state = dict(g=g, opt_g=opt_g, game=game, rng=rng, log=log)
    if f:
        state["opt_f"] = opt_f
    K_ratio = torch.zeros(len(SIGMA), batch, batch, device=device)      # what the last ratio has inverted

    def draw(n):
        return (common.draw_images(images, n, rng) + 1) / 2, g(sampler.noise(n, rng))

    def ascend():
        x, y = torch.no_grad()(draw)(ENCODE_BATCH if "encode" in row else batch)
        with parametrize.cached():      # so that a spectral norm is iterated once
            loss = game.critic(x, y)
            common.descend((opt_f, loss))
        if "clip" in row:
            common.clip_weights(f, row["clip"])
        game.loss.copy_(loss.detach())

    def update():
        x, y = draw(batch)
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

    def cycle(n):
        for _ in range(n):
            ascend()
        update()

    def readings(step):
        found = {}
        if "ridge" in row and step % LOG_EVERY == 0:
            found["condition"] = common.condition(K_ratio, row["ridge"])
        if step % GRID_EVERY == 0 or step == steps:
            found |= scorer.score(SAMPLES)
        if "adaptive" in state and step % ADAPT_EVERY == 0:
            found["p"] = state["adaptive"].step(judge.codes(sampler.draw(CODES, step)))
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
        cycle(row["steps"])
        step += 1
        shown = step % LOG_EVERY == 0 or step == steps
        if shown or row["distance"] == "gram" and (step <= 100 or step % TRACE_EVERY == 0):
            log.row(step, lambda: readings(step), shown)
        if step in PANELS or step % GRID_EVERY == 0 or step == steps:
            panel = torch.cat([images[:SHOWN].cpu(), sampler.draw(500)[:SHOWN]])
            common.save_grid(f"{folder}/samples-{step}.png", panel, 10)
        if (yield) or step % SAVE_EVERY == 0 or step == steps:
            common.save(folder, step, state, settings)

    return dict(method=method, seed=seed, updates=step, seconds=log.seconds, **speed,
                **common.machine(device), **scorer.keep(samples))


def figure_8(folder, result):
    """Figure 8 of GRAM: data above samples during training, and the traces of eq. 10 and eq. 7."""
    figure = Figure(figsize=(8, 11), layout="constrained")
    grid = figure.add_gridspec(4, 6)
    pictures = {step: f"{folder}/samples-{step}.png" for step in PANELS if step <= result["updates"]}
    for place, step in enumerate(step for step, path in pictures.items() if os.path.exists(path)):
        axes = figure.add_subplot(grid[place // 3, place % 3 * 2:place % 3 * 2 + 2])
        axes.imshow(image.imread(pictures[step]))
        axes.set_title(f"update {step:,}", fontsize=9)
        axes.axis("off")
    trace, left = common.read_log(folder), figure.add_subplot(grid[3, :3])
    right = figure.add_subplot(grid[3, 3:], sharey=left)
    for axes, part in ((left, trace["step"] <= 100), (right, trace["step"] >= 100)):
        common.curve_panel(axes, trace["step"][part], {
            "generator's loss, eq. 10": trace["loss_g"][part],
            "Pearson divergence estimate, eq. 7": trace["pearson"][part]})
    right.legend(fontsize=7)
    figure.supxlabel("The paper draws D* (eq. 5), a constant minus the Pearson divergence; the constant is "
                     "unknown.", fontsize=8)
    figure.suptitle(f"{result['method']}: data (top halves) and samples", fontsize=11)
    return figure


def main(argv=None):
    network = "a LeNet, trained once and kept with the data"
    args = common.parse(common.flags(__doc__, METHODS, ["gram"], STEPS, network), argv, FIGURES, TABLES)
    device, samples = common.setup(args.device), args.samples or SAMPLES
    adaptive = any("decay" in METHODS[method] for method in args.method)
    least = max(SHOWN, CODES if adaptive else 0, *(METHODS[name].get("batch", BATCH) for name in args.method))
    images = common.load_images("mnist", "train", args.data, least).to(device)
    common.load_images("mnist", "test", args.data)          # for the judge to read
    lenet = args.features or common.load_lenet(args.data, device, LENET_EPOCHS, LENET_BATCH, LENET_RATE)
    judge = common.open_judge(lenet, f"{args.data}/mnist-test.npy", device)
    finished = common.train_runs(__file__, globals(), args, argv, device,
                                 lambda run: train(*run, args.steps, device, images, samples, judge))
    for (method, _, folder, _), result in finished:
        if METHODS[method]["distance"] == "gram":
            common.save_figure(f"{folder}/figure8.png", figure_8(folder, result))
    if args.table:
        own = judge.score(images[:samples])     # the paper has the test images' own: 9.78, 4.305, .003
        shown = common.shown_scores(own["features"])
        found = (f"{name} {scale * own[key]:.3g}" for key, (name, scale, _) in shown.items() if key in own)
        print("the training images, scored likewise:", ", ".join(found))


if __name__ == "__main__":
    common.run(main)
