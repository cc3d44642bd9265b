"""ImageNet at 64x64: Scaled MMD, Table 1b, networks of ten layers, one row a method.

    python imagenet.py --method sn-smmd                         4.5 hours on an H200, 64 images of either kind
    python imagenet.py --method sn-smmd+precision=bf16          in bfloat16: 3.3 hours
    python imagenet.py --method smmd sn-gan gram                three others, side by side
    torchrun --nproc-per-node=3 imagenet.py --method sn-smmd    on three GPUs, as the paper: its FID is 36.6

Images are those of data/imagenet/train and val (ILSVRC2012), of which arrays are built once (16.4 GB). No row
has been trained to its end here yet. Scores of fewer than 50,000 samples are no scores of the paper.
A run goes to runs/imagenet-METHOD-sSEED/: samples-UPDATE.png, samples.npy, log.csv, checkpoint.pt,
result.json; the curves of all runs of a command are runs/imagenet-curves.png.
"""
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

import common

SIZE = 64                   # of central squares, resized with antialiasing (the released code has none)
STEPS = 150_000             # Scaled MMD, section 4
SIGMA = (1, 2, 4, 8, 16)    # bandwidths of gram: Li et al. 2017, GRAM, section 4
LAMBDA = 1.0                # GRAM, eq. 9
ADAPT_EVERY, CODES = 2_000, 2_048       # of rates that adapt, and samples for it: Scaled MMD, section 4;
ADAPT = (10, 3, 0.1, 1e-6)              # window, patience, level, floor: mbinkowski/MMD-GAN, scorer.py
SAMPLES = dict(cuda=10_000, cpu=2_000)  # to score, without --samples; Scaled MMD has 50,000
KEEP = 5_000                # of them in samples.npy
BOOTSTRAP, RESAMPLINGS = 50_000, 10     # of the distance, if so many are scored
COMPILE = 3_000             # updates from which torch.compile pays on a GPU; with batch norm it does not
LOG_EVERY = 200
SCORE_EVERY = 10_000        # and a grid of samples
SAVE_EVERY = 5_000          # a multiple of LOG_EVERY: what is saved has been seen to be finite
COLUMNS = ("loss_f", "loss_g", "pearson", "mean_r", "spread")   # spread: variance of f(x) over that of f(y)
READINGS = ("condition", "fd", "kid", "isc", "p", "lr_g")       # condition: of the matrix the ratio inverts

# Widths of generator and critic, noise; common.residual_generator and residual_critic name the sources
UNIFORM = common.uniform_noise
NETS = {"scaled": dict(g=(1024, 512, 256, 128, 64), f=(64, 128, 256, 512, 1024), z=128, noise=UNIFORM)}

DEFAULTS = dict(            # 0, False and "": without
    nets="scaled",          # of NETS
    loss="smmd",            # critic_loss() and generator_loss() say what each is; gram: Algorithm 1 of GRAM
    form="", ridge=0.0,     # of gram: common.gram_objective, and its density ratio
    kernel="unit",          # of kernels()
    critic=0,               # outputs of the critic
    critic_steps=0,         # to one of the generator
    lr=2e-4,                # learning rate
    lr_g=0.0,               # the generator's, if another
    beta=(0.5, 0.999),      # of Adam
    spectral="",            # fixed or learned gains of spectrally normalised weights
    scale=0.0,              # of smmd: common.smmd2
    decay=0.0,              # of rates that adapt to KID
    batch=64,               # of data and of samples, on each GPU; the mean of an MMD a GPU is the loss
    precision="tf32",       # or bf16: all layers but the last in bfloat16
    average=3,              # samples come from averaged weights, those of update t count as t^3; this and the
    contrast=True,          # data's contrast are ours: results/cifar.md
)
NAMES = dict(nets=list(NETS), loss=["gram", "gan", "smmd"], form=["", *common.FORMS],
             kernel=["li", "unit"], spectral=["", "fixed", "learned"], precision=["tf32", "bf16"])

SCALED = dict(critic=1, critic_steps=5, beta=(0.5, 0.9), decay=0.8)
METHODS = {
    "sn-smmd":      dict(SCALED, scale=10.0, spectral="learned"),           # section 4
    "smmd":         dict(SCALED, scale=10.0),
    "sn-gan":       dict(SCALED, loss="gan", spectral="fixed"),
    "gram":         dict(loss="gram", form="swap", ridge=1.0, kernel="li", critic=128),    # ours: cifar.py
}
# Inception score, FID, KID of Table 1b, whose SN-GAN is Miyato et al.'s, of 250,000 updates
PAPER = {"sn-smmd": "10.91, 36.6, .035", "sn-gan": "11.16, 47.5, .044"}

CURVES = {"all": [(name, "update") for name in ("loss_f", "loss_g", "fd", "kid", "isc", "spread")]}
CONSTANTS = {k: v for k, v in globals().items() if k.isupper() and isinstance(v, (int, float, tuple))}


def kernels(device=None, dtype=torch.float32):
    """The kernels that rows name, functions from [N, D] and [M, D] to [S, N, M]."""
    sigma = torch.tensor(SIGMA, dtype=dtype, device=device)
    return {"li": partial(common.gaussian, sigma=sigma), "unit": common.unit_gaussian}


def residual_critic(channels, widths, out, size=64):
    """Critic of ten layers: images [N, channels, size, size] to [N, out], without norms.

    A convolution of 3x3 to widths[0], LeakyReLU 0.2, a Residual at half the size to each further width,
    LeakyReLU, the sum over all pixels, a linear layer. (64, 128, 256, 512, 1024) at 64x64: Scaled MMD,
    section 4 (MichaelArbel/Scaled-MMD-GAN).
    """
    first, last = common.dcgan_init(nn.ModuleList([nn.Conv2d(channels, widths[0], 3, 1, 1),
                                                   nn.Linear(widths[-1], out)]))
    blocks = [common.Residual(a, b, False) for a, b in zip(widths, widths[1:])]
    total = nn.AvgPool2d(size // 2 ** len(blocks), divisor_override=1)
    return common.Layers(first, nn.LeakyReLU(0.2), *blocks, nn.LeakyReLU(0.2), total, nn.Flatten(), last)


def networks(row):
    """Generator and critic of a row."""
    nets = NETS[row["nets"]]
    common.check_row(row, row["critic"])
    g = common.residual_generator(nets["z"], nets["g"], 3, nn.Sigmoid, SIZE)
    f = residual_critic(3, nets["f"], row["critic"], SIZE)
    f.to(memory_format=torch.channels_last)             # the faster layout, but for the reshaping of Layers
    g.bfloat16 = f.bfloat16 = row["precision"] == "bf16"
    return g, common.spectral(f, row["spectral"] == "learned") if row["spectral"] else f


def critic_loss(row, f, kernel, x, y):
    """What the critic minimises, but GRAM's, at data x and samples y, both [N, 3, H, W]: a scalar."""
    match row["loss"]:
        case "gan":
            return common.gan_critic(*common.both(f, x, y))
        case "smmd":                                    # scaled by the critic's slope at the data
            h, back = common.pullback(f, torch.cat([x, y]))
            h_x, h_y = h.split(len(x))
            squared = common.mmd2(*common.gram(kernel, h_x, h_y), unbiased=True)
            return -common.smmd2(squared, common.jacobian(h_x, back), row["scale"])


def generator_loss(row, f, kernel, x, y):
    """What the generator minimises, but with GRAM's critic, at data x and samples y: a scalar, f(x), f(y)."""
    if row["loss"] == "smmd":
        h_x, back = common.pullback(f, x)
        J, h_y = common.jacobian(h_x, back), f(y)
    else:
        h_x, h_y = common.both(f, x, y)
    match row["loss"]:
        case "gan":
            loss = common.gan_generator(h_y)
        case "smmd":
            loss = common.smmd2(common.mmd2(*common.gram(kernel, h_x, h_y), unbiased=True), J, row["scale"])
    return loss, h_x, h_y


def train(name, row, seed, folder, steps, device, images, network=None, reference=None,
          samples=SAMPLES["cuda"]):
    """One run, a generator: it yields after each update, is sent whether to save, and returns its result.

    images: uint8 [N, 3, SIZE, SIZE], on the device or mapped; network, reference: of common.scores, or None;
    samples: how many to score.
    """
    torch.manual_seed(seed)             # the same networks in all processes, but other noise and other data:
    rank, processes = common.ranks()
    rng, draws = (torch.Generator(on).manual_seed(seed + 1_000_003 * rank) for on in (device, "cpu"))
    nets, kernel = NETS[row["nets"]], kernels(device)[row["kernel"]]
    g, f = (part.to(device) for part in networks(row))
    inputs = torch.zeros(row["batch"], *images.shape[1:], dtype=torch.uint8, device=device)
    average = common.Average(g, row["average"]) if row["average"] else g
    few = common.take(images, torch.arange(CODES) * len(images) // CODES).to(device)
    contrast = common.Contrast(few) if row["contrast"] else None
    opt_g = common.optimizer(g, "adam", row["lr_g"] or row["lr"], row["beta"])
    opt_f = common.optimizer(f, "adam", row["lr"], row["beta"])
    log = common.Log(folder, COLUMNS, steps, device, READINGS)
    K_ratio = kernel(*2 * [torch.zeros(row["batch"], 1, device=device)])     # what the ratio inverts
    state = dict(g=g, opt_g=opt_g, f=f, opt_f=opt_f, average=average, rng=rng, draws=draws, log=log)
    state |= dict(contrast=contrast) if contrast else {}

    def draw():
        return inputs / 255, nets["noise"](row["batch"], nets["z"], rng)

    def critic(x, z):
        with torch.no_grad():
            y = g(z)
        return critic_loss(row, f, kernel, x, y)

    def generator(x, z):
        return generator_loss(row, f, kernel, x, g(z))

    def critic_step():
        with parametrize.cached():      # a spectral norm is iterated once
            loss = critic(*draw())
            common.descend((opt_f, loss))
        log.add(loss_f=loss)

    def generator_step():
        x, z = draw()
        if row["loss"] == "gram":       # Algorithm 1: one Gram matrix, both gradients, both steps
            h_x, h_y = common.both(f, x, g(z))
            K_xx, K_xy, K_yy = common.gram(kernel, h_x, h_y)
            objective, r = common.gram_objective(K_xx, K_xy, K_yy, row["form"], row["ridge"], LAMBDA)
            loss = common.mmd2(K_xx, K_xy, K_yy)
            common.descend((opt_f, -objective), (opt_g, loss))
            K_ratio.copy_((K_xx if row["form"] in common.AT_DATA else K_yy).detach())
            log.add(loss_f=-objective, pearson=common.pearson(r), mean_r=r.mean())
        else:
            with common.frozen(f), parametrize.cached():
                loss, h_x, h_y = generator(x, z)
                common.descend((opt_g, loss))
        log.add(loss_g=loss, spread=h_x.var(0).sum() / h_y.var(0).sum())
        if row["average"]:
            average.follow(g)

    def sample(generator, contrast, n, seed=0):         # uint8 [n, 3, SIZE, SIZE] of a seed's noise
        def image(z):
            return contrast(generator(z)) if contrast else generator(z)
        z = nets["noise"](n, nets["z"], torch.Generator().manual_seed(seed))
        return common.draw_samples(image, z.to(device))

    def score():
        return common.scores(network, sample(average, contrast, samples), reference, BOOTSTRAP, RESAMPLINGS)

    def readings():
        nonlocal last
        found = dict(condition=common.condition(K_ratio, row["ridge"])) if row["loss"] == "gram" else {}
        if network and (step % SCORE_EVERY == 0 or step == steps):
            last = score()
            found |= last
        if row["decay"] and step % ADAPT_EVERY == 0:
            if network:                 # only rank 0 has one; all processes take its rates
                found["p"] = state["adaptive"].step(network(sample(g, None, CODES, step))[0])
            for lr in common.rates(opt_g, opt_f) if processes > 1 else ():
                torch.distributed.broadcast(lr, 0)
            found["lr_g"] = round(float(common.rates(opt_g)[0]), 10)
        return found

    if row["decay"] and network:
        x, _ = network(few)
        state["adaptive"] = common.AdaptiveRate([opt_g, opt_f], x, row["decay"], *ADAPT)
    settings = dict(CONSTANTS, row=row, seed=seed, device=device.type, images=common.fingerprint(images),
                    features=network and network.key, reference=reference and reference["key"],
                    processes=processes)
    last = dict(rates="constant: no feature network") if row["decay"] and not network else {}
    step = common.load(folder, state, settings)
    fast = device.type == "cuda" and steps >= COMPILE
    critic, generator = common.compiled(critic, fast), common.compiled(generator, fast)
    critic_step, generator_step = common.capture(critic_step, rng), common.capture(generator_step, rng)
    log.start(step)
    while step < steps:
        for _ in range(row["critic_steps"]):
            common.copy_batch(images, draws, inputs)
            critic_step()
        common.copy_batch(images, draws, inputs)
        generator_step()
        step += 1
        if step % LOG_EVERY == 0 or step == steps:
            log.row(step, readings)
        if step % SCORE_EVERY == 0 or step == steps:
            common.save_grid(f"{folder}/samples-{step}.png", sample(average, contrast, 64), 8)
        stop = yield
        if stop or step % SAVE_EVERY == 0 or step == steps:
            common.save(folder, step, state, settings)

    with common.replacing(f"{folder}/samples.npy") as file:
        np.save(file, sample(average, contrast, KEEP).numpy())
    if network and not last:            # of a finished run that is resumed
        last = score()
    return dict(method=name, row=row, seed=seed, updates=step, seconds=log.seconds, **last,
                parameters=common.parameters(g, f), **common.machine(device))


def main(argv=None):
    args = common.flags(__doc__, METHODS, "sn-smmd", STEPS, "those, fetched").parse_args(argv)
    common.join(args.device)
    names, steps = args.method or ["sn-smmd"], args.steps or STEPS
    rows = dict(common.find_row(name, METHODS, DEFAULTS, NAMES) for name in names)

    device = common.setup(args.device)
    samples = args.samples or SAMPLES[device.type]
    train_path, val_path = (f"{args.data}/imagenet64-{split}.npy" for split in ("train", "val"))
    images = common.load_folder(train_path, f"{args.data}/imagenet/train", SIZE)
    common.load_folder(val_path, f"{args.data}/imagenet/val", SIZE)
    network = common.load_features(args.features, device)
    reference = common.load_reference(val_path, network)
    images = common.to_device(images, device)

    for name, row in rows.items():
        common.show(name, row, *networks(row))
        if row["decay"] and network is None:
            print(f"{name}: without a feature network its learning rates stay as they are")
    runs = [common.Run(name, row, seed, f"{args.out}/imagenet-{name}-s{seed}")
            for name, row in rows.items() for seed in args.seeds]
    common.run_folders([run.folder for run in runs], __file__, args.resume)
    print(common.log_head(COLUMNS + READINGS, steps, device, samples, network, reference))
    results = common.interleave({run.folder: train(*run, steps, device, images, network, reference, samples)
                                 for run in runs}, common.command(argv))
    print(f"\n{common.score_table(runs, results, PAPER)}\n")

    finished = [(run, results[run.folder]) for run in runs if "failed" not in results[run.folder]]
    if not finished:
        raise common.RunError("no run finished")
    if common.ranks()[0] == 0:
        common.save_figure(f"{args.out}/imagenet-curves.png", common.curves_figure(finished, CURVES["all"]))


if __name__ == "__main__":
    common.run(main)
