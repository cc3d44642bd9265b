"""CelebA at 160x160 and 64x64, bedrooms of LSUN at 64x64: large images of four papers, one row a method.

    python celeba.py --method sn-smmd                   4 hours on an H200, 3 with sn-smmd+precision=bf16
    python celeba.py --set celeba64 --method gram gan   at 64x64, side by side; --set lsun: bedrooms
    python celeba.py --set ./photos --method gram       any folder of images, as squares of 64x64
    python celeba.py --table scaled                     the methods of a paper's table beside its numbers
    python celeba.py --figure singular                  Scaled MMD, Figure 2b; scores: Figure 2a
    torchrun --nproc-per-node=2 celeba.py --set lsun    on two GPUs, a batch of 64 on each

Images are those of data/celeba/img_align_celeba and data/lsun, of which arrays are built once (17.4 GB for
160x160). The paper has an FID of 12.2 for sn-smmd; no row has been trained to its end here yet.
A run goes to runs/celeba-SET-METHOD-sSEED/: samples-UPDATE.png, samples.npy, log.csv, checkpoint.pt,
result.json; the curves of all runs of a command are runs/celeba-curves.png.
"""
import hashlib
import os
from functools import partial

import numpy as np
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrize

import common

STEPS = 150_000             # Demystifying MMD GANs, Scaled MMD; GRAM and GAMN do not say
SIGMA = (1, 2, 4, 8, 16)    # bandwidths of Li et al. 2017, GRAM, section 4; for GRAMFlow they are variances
RBF = (2, 5, 10, 20, 40, 80)            # variances of GMMN's kernels, "gmmn"
ALPHA = (0.2, 0.5, 1, 2, 5)             # Demystifying MMD GANs, section 5; its code has 0.1, 1, 10
LAMBDA = 1.0                # GRAM, eq. 9
CLIP = 0.01                 # OctoberChang/MMD-GAN, as the next: critic steps at updates 1 to 25, every 500th
BURST, BURST_UNTIL, BURST_EVERY = 100, 25, 500
ADAPT_EVERY, CODES = 2_000, 2_048       # of rates that adapt, and samples for it; window, patience, level,
ADAPT = (10, 3, 0.1, 1e-6)              # floor: Demystifying MMD GANs, section 5, and its code's scorer.py
SAMPLES = dict(cuda=10_000, cpu=2_000)  # to score, if neither --samples nor --table says
KEEP = 1_000                # of them in samples.npy
BOOTSTRAP, RESAMPLINGS = 25_000, 10     # of the distance, if so many are scored; as Demystifying MMD GANs
COMPILE = 3_000             # updates from which torch.compile pays on a GPU; with batch norm it does not
LOG_EVERY = 200
SCORE_EVERY = 10_000        # and a grid of samples
SAVE_EVERY = 5_000          # a multiple of LOG_EVERY: what is saved has been seen to be finite
COLUMNS = ("loss_f", "loss_g", "pearson", "mean_r", "spread")   # spread: variance of f(x) over that of f(y)
READINGS = ("condition", "fd", "kid", "isc", "p", "lr_g")       # condition: of the matrix the ratio inverts

# Of a set: the array, the side of its squares, the size that is trained on, the folder of its images, the row
# that is trained if none is named. Faces are cropped at random from 178x178 to 160x160 (mbinkowski/MMD-GAN).
# GRAM does not state its resolution; 64 is that of Li et al. 2017, whose settings it has.
FACES = "celeba/img_align_celeba"
SETS = {
    "celeba160": dict(array="celeba178", side=178, size=160, folder=FACES, method="sn-smmd"),
    "celeba64":  dict(array="celeba64", side=64, size=64, folder=FACES, method="gram"),
    "lsun":      dict(array="lsun64", side=64, size=64, folder="lsun", method="mmd-rqdot"),
}
CELEBA = dict(train=(1, 162_770), val=(162_771, 182_637), test=(182_638, 202_599))  # list_eval_partition.txt
OWN = dict(side=64, size=64, method="gram")         # a folder's, of any images
HELD_OUT = 25_000           # images of LSUN to score against: Demystifying MMD GANs, section 5

# Widths of generator and critic, size of their filters, norms behind the critic's first convolution and the
# others, noise; unit: pixels are in [0, 1] instead of [-1, 1]; start: size of residual_generator's first
# layer for images of 160x160; it is 4 for 64x64, as in imagenet.py. common.dcgan_critic names the sources.
# GRAM's Tables 5 and 6 are of 32x32: one more layer is ours.
NORMAL, UNIFORM, BATCH = common.normal_noise, common.uniform_noise, common.batch_norm
DEEP = dict(g=(1024, 512, 256, 128, 64), start=5, f=(64, 128, 256, 512, 1024), kernel=5, norms=(None,))
DCGAN = dict(g=(512, 256, 128, 64), f=(64, 128, 256, 512), kernel=5, norms=(None,), z=128, noise=UNIFORM)
NETS = {
    "scaled":  dict(DEEP, z=128, noise=UNIFORM, unit=True),
    "resnet":  dict(DEEP, z=100, noise=UNIFORM, unit=True),
    "gram":    dict(DCGAN, g=(256, 128, 64, 32), f=(32, 64, 128, 256), kernel=4, norms=(BATCH,)),
    "li":      dict(DCGAN, kernel=4, norms=(None, BATCH), z=64, noise=NORMAL),
    "dcgan":   dict(DCGAN, z=100, unit=True),
    "dcgan16": dict(DCGAN, f=(16, 32, 64, 128), z=100, unit=True),
    "gamn":    dict(DCGAN, norms=(None, common.LayerNorm), noise=NORMAL),      # igul222, gan_64x64.py
    "wgan":    dict(DCGAN, norms=(None, BATCH), noise=NORMAL),
    "wgan-gp": dict(DCGAN, noise=NORMAL),
}

DEFAULTS = dict(            # 0, False and "": without
    nets="gram",            # of NETS
    loss="mmd",             # critic_loss() and generator_loss() say what each is; gram: Algorithm 1 of GRAM
    form="", ridge=0.0,     # of gram: common.gram_objective, and its density ratio
    kernel="li",            # of kernels()
    critic=0,               # outputs of the critic
    critic_steps=0,         # to one of the generator
    burst=False,            # BURST of them now and then
    opt="adam", lr=1e-4, lr_g=0.0, beta=(0.5, 0.999),       # lr_g: the generator's rate, if another
    clip=False,             # critic's weights to CLIP
    penalty=0.0,            # weight of the gradient penalty
    slope="image",          # whose norm the gradient penalty holds: see common.AXES
    activation=0.0,         # weight of the penalty on the activations of all layers
    autoencoder=0.0,        # weight of the decoder's mean squared error
    feasible=0.0,           # weight of the feasible set reduction
    spectral="",            # fixed or learned gains of spectrally normalised weights
    scale=0.0, rho=0.0,     # of smmd and swgan: common.smmd2; of sobolev
    decay=0.0,              # of rates that adapt to KID
    batch=64,               # of data and of samples, in all papers, on each GPU
    precision="tf32",       # or bf16: all layers but the last in bfloat16
    average=3,              # samples come from averaged weights, those of update t count as t^3; this, the
    contrast=True,          # data's contrast and, at 64x64,
    mirror=True,            # mirrored data are ours: results/cifar.md
)
NAMES = dict(nets=list(NETS), loss="gram gan mmd mmd2 wasserstein cramer smmd swgan sobolev".split(),
             form=["", *common.FORMS], kernel="li gmmn rq rqdot distance unit".split(),
             opt=["adam", "rmsprop"], slope=list(common.AXES), spectral=["", "fixed", "learned"],
             precision=["tf32", "bf16"])

# The rates of gram and gan and the ridge are those of cifar.py, as is what is ours of MMD-GAN and GAMN.
MMD = dict(nets="resnet", loss="mmd2", critic=16, critic_steps=5, beta=(0.5, 0.9), decay=0.5)
BED = dict(MMD, nets="dcgan")
SCALED = dict(nets="scaled", kernel="unit", critic=1, critic_steps=5, beta=(0.5, 0.9), decay=0.8)
CLIPPED = dict(critic_steps=5, opt="rmsprop", lr=5e-5, clip=True)
LI = dict(CLIPPED, critic=128, burst=True, autoencoder=8.0, feasible=16.0)
GAMN = dict(nets="gamn", kernel="gmmn", critic=10, critic_steps=5, beta=(0.5, 0.9), penalty=10.0)
METHODS = {
    "celeba160": {
        # Demystifying MMD GANs: Table 2; with +slope=columns its code's penalty
        "mmd-rqdot":    dict(MMD, kernel="rqdot", penalty=1.0, activation=1.0),     # footnote 19
        "cramer":       dict(MMD, loss="cramer", kernel="distance", critic=256, penalty=10.0),
        "wgan-gp":      dict(MMD, loss="wasserstein", critic=1, penalty=10.0),
        # Scaled MMD: Table 1a
        "smmd":         dict(SCALED, loss="smmd", scale=0.1),                       # "Rank collapse"
        "sn-smmd":      dict(SCALED, loss="smmd", scale=10.0, spectral="learned"),  # section 4
        "swgan":        dict(SCALED, loss="swgan", scale=10.0),
        "sn-swgan":     dict(SCALED, loss="swgan", scale=10.0, spectral="learned"),
        "sn-gan":       dict(SCALED, loss="gan", spectral="fixed"),
        "sobolev":      dict(SCALED, loss="sobolev", rho=1e-6),                     # ours
    },
    "celeba64": {
        # GRAM: Tables 1 and 2
        # eq. 9 with p and q exchanged
        "gram":         dict(loss="gram", form="swap", ridge=1.0, critic=128, lr=4e-4),
        "gan":          dict(loss="gan", critic=1, critic_steps=1, lr=2e-4, lr_g=4e-4),
        "mmdgan":       dict(LI),
        "mmdgan-conv":  dict(LI, nets="li", critic=64),
    },
    "lsun": {
        # Demystifying MMD GANs: Table 1; with +nets=dcgan16 its small critic
        "mmd-rqdot":    dict(BED, kernel="rqdot", penalty=1.0, activation=1.0),
        "mmd-dist":     dict(BED, kernel="distance", critic=256, penalty=10.0, activation=1e-4),
        "cramer":       dict(BED, loss="cramer", kernel="distance", critic=256, penalty=10.0),
        "wgan-gp":      dict(BED, loss="wasserstein", critic=1, penalty=10.0),
        # GAMN: Figure 4
        "gamn":         dict(GAMN),
        "gamn-wgan-gp": dict(GAMN, nets="wgan-gp", loss="wasserstein", critic=1),
        "wgan":         dict(CLIPPED, nets="wgan", loss="wasserstein", critic=1),
    },
}
METHODS["own"] = METHODS["celeba160"] | METHODS["lsun"] | METHODS["celeba64"]      # of a folder: all at 64x64

# A paper's tables: the set, the number of samples, ours for GRAM, and of each row Inception score, FID, KID
TABLES = {
    "demystifying": ("celeba160", 25_000, {
        "mmd-rqdot": "2.61, 20.55, .013", "cramer": "2.86, 31.30, .025", "wgan-gp": "2.72, 29.24, .022"}),
    "scaled": ("celeba160", 50_000, {
        "mmd-rqdot": "2.61, 20.55, .013", "wgan-gp": "2.72, 29.24, .022", "sn-gan": "2.64, 27.7, .018",
        "sobolev": "2.84, 20.4, .014", "smmd": "2.83, 25.9, .019", "sn-smmd": "2.91, 12.2, .006",
        "sn-swgan": "2.86, 18.6, .011"}),
    "gram": ("celeba64", 10_000, {
        "mmdgan": "-, 41.105 ± 1.42", "gan": "-, 30.97 ± 5.32", "gram": "-, 27.04 ± 4.24",
        "mmdgan-conv": "-, 40.27 ± 1.32"}),
    "lsun": ("lsun", 25_000, {
        "mmd-rqdot+nets=dcgan16": "3.13, 86.47, .091", "mmd-rqdot": "2.80, 31.95, .028",
        "mmd-dist+nets=dcgan16": "3.42, 104.85, .109", "mmd-dist": "2.79, 35.28, .032",
        "cramer+nets=dcgan16": "3.46, 122.03, .132", "cramer": "3.44, 54.18, .050",
        "wgan-gp+nets=dcgan16": "2.40, 292.77, .370", "wgan-gp": "3.12, 41.39, .039"}),
}
FIGURES = {"scores": ["mmd-rqdot", "wgan-gp", "sn-gan", "sobolev", "smmd", "sn-smmd", "sn-swgan"],
           "singular": ["smmd", "sn-smmd"]}             # their rows; Scaled MMD, Figures 2a and 2b
CURVES = {"all": [(name, "update") for name in ("loss_f", "loss_g", "fd", "kid", "isc", "spread")],
          "scores": [(name, over) for over in ("update", "second") for name in ("fd", "kid", "isc")]}
CONSTANTS = {k: v for k, v in globals().items() if k.isupper() and isinstance(v, (int, float, tuple))}


def celeba_files(files, split):
    """CelebA's image files of a split, "train", "val" or "test", by the numbers that are their names."""
    (first, last), (_, end) = CELEBA[split], CELEBA["test"]
    ids = [int(stem) if (stem := os.path.basename(file).split(".")[0]).isdecimal() else 0 for file in files]
    odd = [file for file, number in zip(files, ids) if not 1 <= number <= end]
    if odd and split == "train":        # said once
        print(f"{len(odd):,} images are left out: their names, as {odd[0]}, are no numbers from 1 to {end:,}")
    return [file for file, number in zip(files, ids) if first <= number <= last]


def tenth_files(files, split):
    """Image files of a split: "test" is each tenth, of few 2 or more, of many each n-th, "train" the rest."""
    each = max(1, min(10, len(files) // 2), len(files) // HELD_OUT)
    return [file for i, file in enumerate(files) if (i % each == 0) == (split == "test")]


def find_set(name):
    """Of a set of SETS or a folder of images: (a name for runs, its METHODS, a dict as in SETS)."""
    if name in SETS:
        return name, METHODS[name], SETS[name]
    if not os.path.isdir(name):
        raise ValueError(f"--set {name}: found no such folder, expected {', '.join(SETS)}, or a folder")
    path = os.path.realpath(name)
    stem = f"{os.path.basename(path)}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}"
    return stem, METHODS["own"], dict(OWN, array=stem, folder=path)


def load_set(own, data):
    """The images of a set to train on, uint8 [N, 3, side, side], and the path of those to score against."""
    folder, side = os.path.join(data, own["folder"]), own["side"]
    faces = own["folder"] == FACES
    files = celeba_files if faces else tenth_files
    train, test = f"{data}/{own['array']}-train.npy", f"{data}/{own['array']}-test.npy"
    if faces and common.ranks()[0] == 0 and not os.path.exists(train) and not os.path.exists(folder):
        try:
            torchvision.datasets.CelebA(data, download=True)
        except Exception as error:      # whatever its hosts and its unpacking raise
            raise OSError(f"{folder}: not there, and torchvision cannot download CelebA ({error}); unpack "
                          "img_align_celeba.zip there, or name another folder with --data") from error
    images = common.load_folder(train, folder, side, partial(files, split="train"))
    if os.path.exists(test) or len(files(common.image_files(folder), "test")) > 1:
        common.load_folder(test, folder, side, partial(files, split="test"))
        return images, test
    print(f"{folder} has fewer than two test images: scores are against the training images")
    return images, train


def kernels(device=None, dtype=torch.float32):
    """The kernels that rows name, functions from [N, D] and [M, D] to [S, N, M]."""
    sigma, rbf, alpha = (torch.tensor(v, dtype=dtype, device=device) for v in (SIGMA, RBF, ALPHA))
    rq = partial(common.rational_quadratic, alpha=alpha)
    return {"li": partial(common.gaussian, sigma=sigma), "gmmn": partial(common.gaussian, sigma=rbf.sqrt()),
            "rq": rq, "rqdot": lambda x, y: torch.cat([rq(x, y), common.dot(x, y)], -3),  # Demystifying's rq*
            "distance": common.distance, "unit": common.unit_gaussian}


def networks(row, size):
    """Generator, critic and decoder of a row for images of size x size, None for what it has not."""
    nets, out, decoder = NETS[row["nets"]], row["critic"], None
    common.check_row(row, out, BATCH in nets["norms"])
    last = nn.Sigmoid if "unit" in nets else nn.Tanh
    start = nets.get("start") if size == 160 else 4
    g = (common.residual_generator(nets["z"], nets["g"], 3, last, size, start) if "start" in nets else
         common.dcgan_generator(nets["z"], nets["g"], 3, nets["kernel"], last, size))
    f = common.dcgan_critic(3, nets["f"], out, nets["kernel"], nets["norms"], size)
    if row["autoencoder"]:
        decoder = common.dcgan_generator(out, nets["g"], 3, nets["kernel"], last, size)
    if BATCH not in nets["norms"]:
        f.to(memory_format=torch.channels_last)         # the faster layout, but for the reshaping of Layers
    g.bfloat16 = f.bfloat16 = row["precision"] == "bf16"
    return g, common.spectral(f, row["spectral"] == "learned") if row["spectral"] else f, decoder


def critic_loss(row, f, decoder, kernel, x, y, a, multiplier=None):
    """What the critic minimises, but GRAM's, at data x and samples y, both [N, 3, H, W]: a scalar.

    a ~ U[0, 1], [N, 1, 1, 1]: where between them a penalty holds the critic's slope.
    """
    n, held, outputs = len(x), row["penalty"], []
    if held or row["activation"] or row["loss"] in ("smmd", "swgan", "sobolev"):
        between = [a * x + (1 - a) * y] if held else []
        h, back = common.pullback(f, torch.cat([x, y, *between]), outputs)
        h_x, h_y, h_t = h[:n], h[n:2 * n], h[2 * n:]
    else:
        h_x, h_y = common.both(f, x, y)
    match row["loss"]:
        case "gan": loss = common.gan_critic(h_x, h_y)
        case "wasserstein": loss = -common.wasserstein(h_x, h_y)
        case "cramer": loss = -common.cramer(h_x, h_y)
        case "mmd": loss = -common.mmd(*common.gram(kernel, h_x, h_y))
        case "mmd2": loss = -common.mmd2(*common.gram(kernel, h_x, h_y), unbiased=True)
        case "smmd":
            squared = common.mmd2(*common.gram(kernel, h_x, h_y), unbiased=True)
            loss = -common.smmd2(squared, common.jacobian(h_x, back), row["scale"])
        case "swgan": loss = -common.swgan(h_x, h_y, common.jacobian(h_x, back), row["scale"])
        case "sobolev":
            J = common.jacobian(h_x, back)
            objective, omega = common.sobolev(h_x, h_y, J, multiplier.clone(), row["rho"])
            loss = -objective
            multiplier.add_(row["rho"] * omega.detach())
    if held:                # on the slope of the best critic in f's space, or of f: WGAN-GP, GAMN, eq. 7
        best = {"cramer": lambda h: common.cramer_witness(h, h_y),
                "mmd2": lambda h: common.witness(kernel, h, h_x, h_y)}.get(row["loss"], lambda h: h.sum(-1))
        slope = back(torch.func.grad(lambda h: best(h).sum())(h_t), slice(2 * n, None))
        loss = loss + row["penalty"] * common.gradient_penalty(slope, common.AXES[row["slope"]]).mean()
    if row["activation"]:
        loss = loss + row["activation"] * common.activation_penalty([h[:2 * n] for h in outputs])
    if row["feasible"]:
        loss = loss - row["feasible"] * common.feasible_set(h_x, h_y)
    if row["autoencoder"]:
        x_hat, y_hat = common.both(decoder, h_x, h_y)
        loss = loss + row["autoencoder"] * (common.reconstruction(x.flatten(1), x_hat.flatten(1))
                                            + common.reconstruction(y.flatten(1), y_hat.flatten(1)))
    return loss


def generator_loss(row, f, kernel, x, y):
    """What the generator minimises, but with GRAM's critic, at data x and samples y: a scalar, f(x), f(y)."""
    if row["loss"] in ("smmd", "swgan"):
        h_x, back = common.pullback(f, x)
        J, h_y = common.jacobian(h_x, back), f(y)
    else:
        h_x, h_y = common.both(f, x, y)
    match row["loss"]:
        case "gan": loss = common.gan_generator(h_y)
        case "wasserstein" | "sobolev": loss = common.wasserstein(h_x, h_y)
        case "mmd": loss = common.mmd(*common.gram(kernel, h_x, h_y))
        case "mmd2" | "cramer": loss = common.mmd2(*common.gram(kernel, h_x, h_y), unbiased=True)
        case "smmd":
            loss = common.smmd2(common.mmd2(*common.gram(kernel, h_x, h_y), unbiased=True), J, row["scale"])
        case "swgan": loss = common.swgan(h_x, h_y, J, row["scale"])
    if row["feasible"]:
        loss = loss + row["feasible"] * common.feasible_set(h_x, h_y)
    return loss, h_x, h_y


def train(name, row, seed, folder, steps, device, images, size, network=None, reference=None,
          samples=SAMPLES["cuda"]):
    """One run, a generator: it yields after each update, is sent whether to save, and returns its result.

    images: uint8 [N, 3, H, W], on the device or mapped; size: of their crops to train on; network, reference:
    of common.scores, or None; samples: how many to score.
    """
    torch.manual_seed(seed)             # the same networks in all processes, but other noise and other data:
    rank, processes = common.ranks()
    rng, draws = (torch.Generator(on).manual_seed(seed + 1_000_003 * rank) for on in (device, "cpu"))
    nets, kernel, crops = NETS[row["nets"]], kernels(device)[row["kernel"]], images.shape[-1] > size
    g, f, decoder = (part.to(device) if part else None for part in networks(row, size))
    inputs = torch.zeros(row["batch"], *images.shape[1:], dtype=torch.uint8, device=device)
    players = nn.ModuleDict({key: part for key, part in dict(f=f, decoder=decoder).items() if part})
    average = common.Average(g, row["average"]) if row["average"] else g
    few = common.crop_images(common.take(images, torch.arange(CODES) * len(images) // CODES), size).to(device)
    contrast = common.Contrast(few) if row["contrast"] else None
    opt_g = common.optimizer(g, row["opt"], row["lr_g"] or row["lr"], row["beta"])
    opt_f = common.optimizer(players, row["opt"], row["lr"], row["beta"])
    log = common.Log(folder, COLUMNS, steps, device, READINGS)
    K_ratio = kernel(*2 * [torch.zeros(row["batch"], 1, device=device)])     # what the ratio inverts
    players.register_buffer("multiplier", torch.zeros((), device=device))       # sobolev's
    state = dict(g=g, opt_g=opt_g, players=players, opt_f=opt_f, average=average, rng=rng, draws=draws,
                 log=log) | (dict(contrast=contrast) if contrast else {})

    def draw():
        x = common.crop_images(inputs, size, rng) if crops else inputs
        x = common.flip_images(x, rng) if row["mirror"] else x
        return x / 255 if "unit" in nets else x / 127.5 - 1, nets["noise"](row["batch"], nets["z"], rng)

    def critic(x, z, a):
        with torch.no_grad():
            y = g(z)
        return critic_loss(row, f, decoder, kernel, x, y, a, players.multiplier)

    def generator(x, z):
        return generator_loss(row, f, kernel, x, g(z))

    def critic_step():
        x, z = draw()
        a = torch.rand(len(x), 1, 1, 1, generator=rng, device=device) if row["penalty"] else None
        with parametrize.cached():      # a spectral norm is iterated once
            loss = critic(x, z, a)
            common.descend((opt_f, loss))
        if row["clip"]:
            common.clip_weights(f, CLIP)
        if row["loss"] == "sobolev":    # of several processes the constraint is that of all data
            players.multiplier.copy_(common.averaged(players.multiplier)[0])
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

    def sample(generator, contrast, n, seed=0):         # uint8 [n, 3, size, size] of a seed's noise
        def image(z):
            y = generator(z) if "unit" in nets else (generator(z) + 1) / 2
            return contrast(y) if contrast else y
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
                    size=size, processes=processes)
    last = dict(rates="constant: no feature network") if row["decay"] and not network else {}
    step = common.load(folder, state, settings)
    fast = device.type == "cuda" and steps >= COMPILE and BATCH not in nets["norms"]
    critic, generator = common.compiled(critic, fast), common.compiled(generator, fast)
    critic_step, generator_step = common.capture(critic_step, rng), common.capture(generator_step, rng)
    log.start(step)
    while step < steps:
        burst = row["burst"] and (step < BURST_UNTIL or step % BURST_EVERY == 0)
        for _ in range(BURST if burst else row["critic_steps"]):
            common.copy_batch(images, draws, inputs)
            critic_step()
        common.copy_batch(images, draws, inputs)
        generator_step()
        step += 1
        if step % LOG_EVERY == 0 or step == steps:
            log.row(step, readings)
        if step % SCORE_EVERY == 0 or step == steps:
            common.save_grid(f"{folder}/samples-{step}.png", sample(average, contrast, 64), 8)
            with common.replacing(f"{folder}/singular-{step}.npz") as file:
                np.savez(file, *common.singular_values(f))
        stop = yield
        if stop or step % SAVE_EVERY == 0 or step == steps:
            common.save(folder, step, state, settings)

    with common.replacing(f"{folder}/samples.npy") as file:
        np.save(file, sample(average, contrast, KEEP).numpy())
    if network and not last:            # of a finished run that is resumed
        last = score()
    return dict(method=name, row=row, seed=seed, updates=step, seconds=log.seconds, **last,
                parameters=common.parameters(g, f, decoder), **common.machine(device))


def main(argv=None):
    parser = common.flags(__doc__, (), "sn-smmd", STEPS, "those, fetched")
    parser.epilog += "".join(f"\n--set {name}:\n  {' '.join(METHODS[name])}" for name in SETS)
    parser.epilog += "\n--set FOLDER:\n  all of these, at 64x64"
    parser.add_argument("--set", metavar="NAME", type=os.path.expanduser,
                        help=f"{', '.join(SETS)} or a folder of images (default celeba160, or the table's)")
    parser.add_argument("--table", choices=TABLES, help="train, score a paper's rows; finished ones are kept")
    parser.add_argument("--figure", choices=FIGURES, help="draw a paper's figure; finished runs are kept")
    args = parser.parse_args(argv)
    common.join(args.device)
    where, samples, table = TABLES.get(args.table, ("celeba160" if args.set is None else args.set, 0, {}))
    if args.table and args.set not in (None, where):
        raise ValueError(f"--table {args.table}: found --set {args.set}, expected {where}, or no --set")
    chosen, methods, own = find_set(where)
    names = args.method or table or FIGURES.get(args.figure) or [own["method"]]
    rows = dict(common.find_row(name, methods, DEFAULTS, NAMES) for name in names)
    most, size, steps = max(row["batch"] for row in rows.values()), own["size"], args.steps or STEPS

    device = common.setup(args.device)
    samples = args.samples or samples or SAMPLES[device.type]
    images, path = load_set(own, args.data)
    if chosen not in SETS and len(images) < most:
        raise ValueError(f"{own['folder']}: found {len(images)} images to train on, expected {most} or "
                         f"more, a batch; name a smaller one by --method NAME+batch=N, or add images and "
                         f"delete {args.data}/{own['array']}-*.npy")
    network = common.load_features(args.features, device)
    reference = common.load_reference(path, network, size if images.shape[-1] > size else None)
    images = common.to_device(images, device)

    resume = args.resume or bool(args.table or args.figure)
    for name, row in rows.items():
        common.show(name, row, *networks(row, size))
        if row["decay"] and network is None:
            print(f"{name}: without a feature network its learning rates stay as they are")
    runs = [common.Run(name, row, seed, f"{args.out}/celeba-{chosen}-{name}-s{seed}")
            for name, row in rows.items() for seed in args.seeds]
    common.run_folders([run.folder for run in runs], __file__, resume)
    print(common.log_head(COLUMNS + READINGS, steps, device, samples, network, reference))
    results = common.interleave({run.folder: train(*run, steps, device, images, size, network, reference,
                                                   samples) for run in runs}, common.command(argv))
    paper = {name: text for where, _, own in TABLES.values() if where == chosen for name, text in own.items()}
    print(f"\n{common.score_table(runs, results, paper)}\n")

    finished = [(run, results[run.folder]) for run in runs if "failed" not in results[run.folder]]
    if not finished:
        raise common.RunError("no run finished")
    if common.ranks()[0]:
        return
    common.save_figure(f"{args.out}/celeba-curves.png", common.curves_figure(finished, CURVES["all"]))
    picture = f"{args.out}/celeba-figure{args.figure}.png"
    if args.figure in CURVES:
        common.save_figure(picture, common.curves_figure(finished, CURVES[args.figure]))
    if args.figure == "singular":
        common.save_figure(picture, common.singular_figure(finished))


if __name__ == "__main__":
    common.run(main)
