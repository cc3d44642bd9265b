"""CIFAR-10: every image method of five papers on kernel-based generative models, one row a method.

    python cifar.py --method gram                           2 minutes on an H200, an hour on a CPU core
    python cifar.py --method gram gan mmdgan --seeds 3      at once, side by side
    python cifar.py --method gram+critic=8 smmd+lr=2e-4     a row with other values of its keys, see DEFAULTS
    python cifar.py --table scaled                          the methods of a paper's table beside its numbers
    python cifar.py --figure scores                         scores over training, updates and seconds
    python cifar.py --draw results/gram-cifar10.pt          samples of a trained generator, in seconds

Expect a Frechet distance of 29 ± 3 from gram on EfficientNet-Lite0 features, no FID: results/cifar.md.
A run goes to runs/cifar-METHOD-sSEED/: samples-UPDATE.png, samples.npy, log.csv, checkpoint.pt, result.json;
the curves of all runs of a command are runs/cifar-curves.png.
"""
import math
from functools import partial

import numpy as np
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torchvision.transforms.functional import gaussian_blur

import common

STEPS = 60_000              # GRAM's and GAMN's do not say, GRAMFlow has 156,000; the other papers 150,000
SIGMA = (1, 2, 4, 8, 16)    # bandwidths of Li et al. 2017, GRAM, section 4; for GRAMFlow they are variances
RBF = (2, 5, 10, 20, 40, 80)            # Demystifying MMD GANs, section 5; as variances GMMN's, "gmmn"
ALPHA = (0.2, 0.5, 1, 2, 5)             # Demystifying MMD GANs, section 5; its code has 0.1, 1, 10
LAMBDA = 1.0                # GRAM, eq. 9
CLIP = 0.01                 # bound of the weights of a critic with clip, Li et al. 2017
BURST, BURST_UNTIL, BURST_EVERY = 100, 25, 500      # MMD-GAN's critic steps: at updates 1 to 25, every 500th
ENCODE, ENCODE_BATCH = 20_000, 100      # steps of GMMN+AE's autoencoder, all at first; GMMN's go by layers
ADAPT_EVERY, CODES = 2_000, 2_048       # of rates that adapt, and samples for it; window, patience, level,
ADAPT = (10, 3, 0.1, 1e-6)              # floor: Demystifying MMD GANs, section 5, and its code's scorer.py
SAMPLES = dict(cuda=10_000, cpu=2_000)  # to score and to keep, if neither --samples nor --table says
BOOTSTRAP, RESAMPLINGS = 25_000, 10     # of the distance, if so many are scored; as Demystifying MMD GANs
COMPILE = 10_000            # updates from which torch.compile pays on a GPU; with batch norm it does not
LOG_EVERY = 200
SCORE_EVERY = 20_000        # and a grid of samples; a figure may have its own
SAVE_EVERY = 5_000          # a multiple of LOG_EVERY: what is saved has been seen to be finite
COLUMNS = ("loss_f", "loss_g", "pearson", "mean_r", "spread")   # spread: variance of f(x) over that of f(y)
READINGS = ("condition", "fd", "kid", "isc", "p", "lr_g")       # condition: of the matrix the ratio inverts

# Widths of generator and critic, size of their filters, norms behind the critic's first convolution and the
# others, noise; unit: pixels are in [0, 1] instead of [-1, 1]. common.dcgan_critic names the sources.
NORMAL, UNIFORM = common.normal_noise, common.uniform_noise
BATCH, LAYER = common.batch_norm, common.LayerNorm
GRAMFLOW = dict(g=(128, 64, 32), kernel=4, norms=(BATCH,), z=128, noise=UNIFORM)
DEMYSTIFYING = dict(g=(512, 256, 128, 64), kernel=5, norms=(None,), z=100, noise=UNIFORM, unit=True)
GULRAJANI = dict(g=(512, 256, 128), f=(128, 256, 512), kernel=5, z=128, noise=NORMAL)
NETS = {
    "gram":    dict(GRAMFLOW, f=(32, 64, 128)),                                         # GRAM, Tables 5 and 6
    "weak":    dict(GRAMFLOW, f=(32, 32, 64)),                                          # its Table 7
    "gram2":   dict(GRAMFLOW, g=(256, 128, 64), f=(64, 128, 256)),                      # ours: 2, 4, 8 times
    "gram4":   dict(GRAMFLOW, g=(512, 256, 128), f=(128, 256, 512)),                    # as wide
    "gram8":   dict(GRAMFLOW, g=(1024, 512, 256), f=(256, 512, 1024)),
    "plain4":  dict(GRAMFLOW, g=(512, 256, 128), f=(128, 256, 512), norms=(None,)),     # for held slopes
    "li":      dict(g=(256, 128, 64), f=(64, 128, 256), kernel=4, norms=(None, BATCH), z=128, noise=NORMAL),
    "dcgan":   dict(DEMYSTIFYING, f=(64, 128, 256, 512)),
    "dcgan16": dict(DEMYSTIFYING, f=(16, 32, 64, 128)),
    "gamn":    dict(GULRAJANI, norms=(None, LAYER)),
    "wgan":    dict(GULRAJANI, norms=(None, BATCH)),
    "wgan-gp": dict(GULRAJANI, norms=(None,)),
    "sngan":   dict(width=64, z=128, noise=UNIFORM, unit=True),
    "gmmn":    dict(mlp=(64, 256, 256, 1024, 3072), z=10, noise=UNIFORM, unit=True),
    "gmmn-ae": dict(mlp=(64, 256, 256, 1024, 32), encoder=(3072, 1024, 32), z=10, noise=UNIFORM, unit=True),
}

DEFAULTS = dict(            # 0, False and "": without
    nets="gram",            # of NETS
    loss="mmd",             # gram: GRAM's Algorithm 1; critic_loss() and generator_loss() say what others are
    form="", ridge=0.0,     # of gram: common.gram_objective, and its density ratio
    kernel="li",            # of kernels()
    critic=0,               # outputs of the critic
    critic_steps=0, burst=False,            # to one of the generator; BURST of them now and then
    opt="adam", lr=1e-4, lr_g=0.0, beta=(0.5, 0.999),       # lr_g: the generator's rate, if another
    clip=False,             # critic's weights to CLIP
    penalty=0.0, slope="image",             # weight of the gradient penalty, whose norm it holds: common.AXES
    weights="",             # of common.weight_penalty, in place of the gradient penalty
    activation=0.0,         # weight of common.activation_penalty
    autoencoder=0.0, feasible=0.0,          # weights of common.reconstruction and common.feasible_set
    data_mmd=False,         # the generator minimises the MMD of pixels, too
    spectral="",            # fixed or learned gains of spectrally normalised weights
    scale=0.0, rho=0.0,     # of smmd and swgan: common.smmd2; of sobolev
    decay=0.0,              # of rates that adapt to KID
    batch=64,               # of data and of samples, in all papers but GMMN's
    precision="tf32",       # or bf16: all layers but the last in bfloat16
    average=3,              # samples come from averaged weights, those of update t count as t^3; this, the
    contrast=True, mirror=True,             # data's contrast, and mirrored data are ours: results/cifar.md
)
NAMES = dict(nets=list(NETS), loss="gram gan mmd mmd2 wasserstein cramer smmd swgan sobolev".split(),
             form=["", *common.FORMS], opt=["adam", "rmsprop"], slope=[*common.AXES],
             kernel="li rbf gmmn rq rqdot dot distance unit".split(), weights=["", "l1", "l2", "l2-all"],
             spectral=["", "fixed", "learned"], precision=["tf32", "bf16"])

# results/cifar.md says how gram's rates and ridges were found; 8 and 16 are OctoberChang/MMD-GAN's; GAMN has
# no weights, rates or steps: they are WGAN-GP's or ours.
GRAM = dict(loss="gram", form="swap", ridge=1.0, critic=128, lr=4e-4)
PRINTED = dict(GRAM, ridge=1e-3, lr=5e-5)                       # the paper's rate, JuliaGRAM's ridge
LI = dict(critic=128, critic_steps=5, opt="rmsprop", lr=5e-5, clip=True, burst=True)
MMD = dict(nets="dcgan", loss="mmd2", critic=16, critic_steps=5, beta=(0.5, 0.9), decay=0.5)
GAMN = dict(nets="gamn", kernel="gmmn", critic=10, critic_steps=5, beta=(0.5, 0.9))
GMMN = dict(nets="gmmn", kernel="gmmn", lr=1e-3, batch=1_000)  # its code has momentum; rate, Adam are ours
SCALED = dict(nets="sngan", loss="mmd2", kernel="unit", critic=1, critic_steps=5, beta=(0.5, 0.9), decay=0.8)
METHODS = {
    # GRAM: Tables 1, 2, 4 and 8
    "gram":         dict(GRAM),                                                # eq. 9 with p and q exchanged
    "gram-flow":    dict(GRAM, form="flow", ridge=1e-2),                                # GRAMFlow's objective
    "gram-eq9":     dict(PRINTED, form="sum"),                                          # eq. 9 as printed
    "gram-clip":    dict(PRINTED, form="clip"),                                         # footnote 3
    "gan":          dict(loss="gan", critic=1, critic_steps=1, lr=2e-4, lr_g=4e-4),
    "mmdnet":       dict(lr=1e-3),                                                      # Adam is ours
    "mmdgan":       dict(LI, autoencoder=8.0, feasible=16.0),
    "mmdgan-noae":  dict(LI, feasible=16.0),                                            # Table 4
    "mmdgan-nofsr": dict(LI, autoencoder=8.0),
    "mmdgan-plain": dict(LI),
    "mmdgan-conv":  dict(LI, autoencoder=8.0, feasible=16.0, nets="li"),                # Table 2
    # Demystifying MMD GANs: Table 4; +nets=dcgan16: its small critic; +slope=columns: its code's penalty
    "mmd-rqdot":    dict(MMD, kernel="rqdot", penalty=1.0, activation=1.0),
    "mmd-rq":       dict(MMD, kernel="rq", penalty=1.0),
    "mmd-rbf":      dict(MMD, kernel="rbf", penalty=1.0),
    "mmd-dot":      dict(MMD, kernel="dot", penalty=1.0),
    "mmd-dist":     dict(MMD, kernel="distance", critic=256, penalty=10.0, activation=1e-4),    # footnote 19
    "cramer":       dict(MMD, loss="cramer", kernel="distance", critic=256, penalty=10.0),
    "wgan-gp":      dict(MMD, loss="wasserstein", critic=1, penalty=10.0),
    # GAMN: Tables 2 and 3
    "gamn":         dict(GAMN, penalty=10.0),                                           # eq. 7
    "gamn-mmd":     dict(GAMN, penalty=10.0, data_mmd=True),                            # as "Robustness" says
    "gamn-l1":      dict(GAMN, penalty=1e-3, weights="l1"),                             # eq. 9
    "gamn-l2":      dict(GAMN, penalty=1e-3, weights="l2"),                             # eq. 8
    "gamn-l2-all":  dict(GAMN, penalty=1e-3, weights="l2-all"),                         # footnote 3
    "gamn-wgan-gp": dict(GAMN, penalty=10.0, nets="wgan-gp", loss="wasserstein", critic=1),
    "gmmn":         dict(GMMN),
    "gmmn-ae":      dict(GMMN, nets="gmmn-ae", kernel="unit"),
    "wgan":         dict(nets="wgan", loss="wasserstein", critic=1, critic_steps=5, opt="rmsprop", lr=5e-5,
                         clip=True),
    # Scaled MMD: Tables 1a and 2; +slope=pixels: its code's penalty
    "smmd":         dict(SCALED, loss="smmd", scale=10.0),                              # section 4
    "sn-smmd":      dict(SCALED, loss="smmd", scale=10.0, spectral="learned"),
    "swgan":        dict(SCALED, loss="swgan", scale=10.0),
    "sn-swgan":     dict(SCALED, loss="swgan", scale=10.0, spectral="learned"),
    "sn-gan":       dict(SCALED, loss="gan", spectral="fixed"),
    "sobolev":      dict(SCALED, loss="sobolev", rho=1e-6),                             # ours
    "sngan-wgan-gp": dict(SCALED, loss="wasserstein", penalty=10.0),
    "mmd-gp-l2":    dict(SCALED, penalty=1.0, activation=1.0),
    "mmd-plain":    dict(SCALED),
    "sn-mmd":       dict(SCALED, spectral="fixed"),
    "sn-wgan":      dict(SCALED, loss="wasserstein", spectral="fixed"),
    "sn-mmd-gp":    dict(SCALED, penalty=1.0, spectral="learned"),
    "sn-wgan-gp":   dict(SCALED, loss="wasserstein", penalty=10.0, spectral="learned"),
    "sn-mmd-gp-l2": dict(SCALED, penalty=1.0, activation=1.0, spectral="learned"),
    "sn-mmd-l2":    dict(SCALED, activation=1.0, spectral="fixed"),
}

# A paper's tables: the number of samples, ours for GRAM and GAMN; a row's Inception score, FID, KID
TABLES = {
    "gram": (10_000, {
        "mmdgan": "5.29, 40.00 ± 0.56", "gan": "5.13, 26.82 ± 0.49", "gram": "5.54, 24.85 ± 0.94",
        "mmdgan+nets=weak": "-, 210.85 ± 8.92", "gan+nets=weak": "-, 31.64 ± 2.10",
        "gram+nets=weak": "-, 24.82 ± 0.62", "mmdgan-conv": "-, 38.39 ± 0.28", "mmdgan-noae": "5.40",
        "mmdgan-nofsr": "3.26", "mmdgan-plain": "3.51", "mmdgan+batch=300": "5.43",
        "mmdgan-noae+batch=300": "5.15", "mmdgan-nofsr+batch=300": "3.68", "mmdgan-plain+batch=300": "3.87"}),
    "gram-printed": (10_000, {              # at the paper's rates, without our changes
        f"{name}+average=0+contrast=0+mirror=0": text for name, text in {
            "gram-eq9": "5.54, 24.85 ± 0.94", "gram+ridge=0.001+lr=5e-05": "5.54, 24.85 ± 0.94",
            "gram-clip": "5.54, 24.85 ± 0.94", "gram-eq9+form=square": "5.54, 24.85 ± 0.94",
            "gan+lr=5e-05+lr_g=0": "5.13, 26.82 ± 0.49", "mmdgan": "5.29, 40.00 ± 0.56",
            "mmdnet+lr=5e-05": ""}.items()}),
    "demystifying": (25_000, {
        "mmd-rqdot+nets=dcgan16": "5.86, 48.10, .032", "mmd-rqdot": "6.51, 39.90, .027",
        "mmd-dist+nets=dcgan16": "4.53, 80.48, .061", "mmd-dist": "6.39, 40.25, .028",
        "cramer+nets=dcgan16": "4.67, 74.93, .060", "cramer": "6.39, 40.27, .028",
        "wgan-gp+nets=dcgan16": "3.15, 147.09, .116", "wgan-gp": "6.53, 37.52, .026"}),
    "gamn": (50_000, {
        "gmmn": "2.45", "gmmn-ae": "2.78", "wgan": "5.61", "gamn-wgan-gp": "6.16", "gamn": "6.44",
        "gamn+critic=2": "6.43", "gamn+critic=3": "6.43", "gamn-l1": "6.35", "gamn-l2": "6.25",
        "gamn-l2-all": "6.01"}),
    "scaled": (50_000, {
        "mmd-gp-l2": "7.55, 23.6, .014", "sngan-wgan-gp": "6.68, 40.2, .024", "sn-gan": "7.29, 26.1, .015",
        "sobolev": "3.21, 132.2, .113", "smmd": "7.48, 25.1, .015", "sn-smmd": "7.43, 24.5, .015",
        "sn-swgan": "7.34, 27.9, .016", "mmd-plain": "7.01, 30.9, .02", "sn-mmd": "5.23, 69.0, .046",
        "sn-wgan": "2.95, 162.3, .125", "sn-mmd-gp": "5.02, 137.0, .084", "sn-wgan-gp": "4.49, 73.1, .058",
        "sn-mmd-gp-l2": "7.43, 23.4, .015", "sn-mmd-l2": "4.46, 67.0, .053"}),
}
PAPER = {name: text for _, rows in TABLES.values() for name, text in rows.items()}

# GRAM, Figure 5: {axis: (key, its values)}; the paper's values of a and b are not in its text
SWEEPS = {"5": {"learning rate": ("lr", (5e-5, 1e-4, 2e-4, 4e-4, 8e-4)),
                "batch size": ("batch", (16, 32, 64, 128, 256))},
          "5c": {"K": ("critic", (2, 8, 32, 128, 512, 1024, 2048))}}
# Rows, updates and how often they are scored, if no flag names others
FIGURES = {
    "5": dict(method=[f"{name}+{key}={value:g}" for key, values in SWEEPS["5"].values()
                      for name in ("gram", "gan", "mmdgan") for value in values], steps=20_000),
    "5c": dict(method=[f"gram+critic={k}" for k in SWEEPS["5c"]["K"][1]], steps=20_000),
    "scores": dict(method=["smmd", "sn-smmd", "mmd-rqdot+nets=dcgan16", "wgan-gp+nets=dcgan16"], steps=20_000,
                   every=2_000),                                                # Scaled MMD, Figures 2a and 8
    "singular": dict(method=["smmd", "sn-smmd"], steps=20_000),                 # Scaled MMD, Figures 2b and 7
    "gamn": dict(method=["gamn"], every=2_000),                                 # GAMN, Figure 5
    "neighbours": dict(method=["gram"]),                                        # GRAM, Figure 4
    "samples": dict(method=["wgan", "gamn-wgan-gp", "gmmn", "gmmn-ae", "gamn"]),    # GAMN, Figure 3; Scaled
                                                    # MMD's 6 and Demystifying's 13 with the rows of --method
    "bias": dict(method=[]),                        # Demystifying MMD GANs, Figure 1 and appendix D.2
    "noise": dict(method=[]),                       # its appendix E, with digits where it has ImageNet
}
CURVES = {"all": [(name, "update") for name in ("loss_f", "loss_g", "fd", "mean_r", "condition", "spread")],
          "scores": [(name, over) for over in ("update", "second") for name in ("fd", "kid", "isc")],
          "gamn": [(name, "update") for name in ("loss_g", "kid", "isc")]}
ESTIMATES = 100             # for each n of --figure bias, Demystifying MMD GANs, Figure 1
KID_N, FID_N = (50, 100, 200, 500, 1_000, 2_000), (1_000, 2_500, 5_000, 7_500, 10_000)
CENSORED, CENSORED_M = 2048, (10_000, 20_000, 50_000, 100_000)      # dimension and sample sizes of its D.2
DISTURBANCES = {"Gaussian noise": (0, 0.25, 0.5, 0.75), "Gaussian blur": (0, 1, 2, 4),     # as in TTUR's code
                "black rectangles": (0, 0.25, 0.5, 0.75), "swirl": (0, 1, 2, 4),
                "salt and pepper": (0, 0.1, 0.2, 0.3), "contamination": (0, 0.25, 0.5, 0.75, 1)}
CONSTANTS = {k: v for k, v in globals().items() if k.isupper() and isinstance(v, (int, float, tuple))}
row_of = partial(common.find_row, methods=METHODS, defaults=DEFAULTS, names=NAMES)     # of NAME+KEY=VALUE...


def kernels(device=None, dtype=torch.float32):
    """The kernels that rows name, functions from [N, D] and [M, D] to [S, N, M]."""
    sigma, rbf, alpha = (torch.tensor(v, dtype=dtype, device=device) for v in (SIGMA, RBF, ALPHA))
    rq = partial(common.rational_quadratic, alpha=alpha)
    return {"li": partial(common.gaussian, sigma=sigma), "rbf": partial(common.gaussian, sigma=rbf),
            "gmmn": partial(common.gaussian, sigma=rbf.sqrt()), "rq": rq, "dot": common.dot,
            "rqdot": lambda x, y: torch.cat([rq(x, y), common.dot(x, y)], -3),          # Demystifying's rq*
            "distance": common.distance, "unit": common.unit_gaussian}


def sngan_generator(noise, channels, width):
    """Generator of SN-GAN: [N, noise] to images [N, channels, 32, 32] in [0, 1].

    A linear layer to 8 width at 4x4, three transposed convolutions of 4x4 and stride 2, batch norm and ReLU
    in front of all, a convolution of 3x3 (Miyato et al. 2018, Table 3; Scaled-MMD-GAN has 5x5 and sigmoid).
    """
    widths = [8 * width, 4 * width, 2 * width, width]
    layers = [nn.Linear(noise, widths[0] * 16), nn.Unflatten(1, (widths[0], 4, 4))]
    for a, b in zip(widths, widths[1:]):
        layers += [BATCH(a), nn.ReLU(inplace=True), nn.ConvTranspose2d(a, b, 4, 2, 1, bias=False)]
    layers += [BATCH(width), nn.ReLU(inplace=True), nn.Conv2d(width, channels, 3, 1, 1), nn.Sigmoid()]
    return common.dcgan_init(common.Layers(*layers))


def sngan_critic(channels, out, width):
    """Critic of SN-GAN: images [N, channels, 32, 32] to [N, out].

    Seven convolutions without norms, 3x3 of stride 1 and 4x4 of stride 2 in turn, widths doubled with each
    pair, LeakyReLU 0.2, and a linear layer (Scaled MMD, section 4; Miyato et al. 2018, Table 3, have 0.1).
    """
    layers, before = [], channels
    for i, after in enumerate(width * m for m in (1, 2, 2, 4, 4, 8, 8)):
        shape = (4, 2, 1) if i % 2 else (3, 1, 1)
        layers += [nn.Conv2d(before, after, *shape), nn.LeakyReLU(0.2, inplace=True)]
        before = after
    return common.dcgan_init(common.Layers(*layers, nn.Flatten(), nn.Linear(before * 16, out)))


def networks(row):
    """Generator, critic and decoder of a row, None for what it has not."""
    nets, out, decoder = NETS[row["nets"]], row["critic"], None
    common.check_row(row, out and "mlp" not in nets, BATCH in nets.get("norms", ()))
    last = nn.Sigmoid if "unit" in nets else nn.Tanh
    to_image = last(), nn.Unflatten(1, (3, 32, 32))
    if "encoder" in nets:               # GMMN+AE: the generator makes codes; dropout: yujiali/gmmn, train.py
        first, act, end = common.mlp(*nets["encoder"])
        return (nn.Sequential(common.mlp(nets["z"], *nets["mlp"]), nn.Sigmoid()),
                nn.Sequential(nn.Flatten(), nn.Dropout(0.2), first, act, nn.Dropout(0.5), end, nn.Sigmoid()),
                nn.Sequential(common.mlp(*reversed(nets["encoder"])), *to_image))
    if "mlp" in nets:
        return nn.Sequential(common.mlp(nets["z"], *nets["mlp"]), *to_image), None, None
    if "width" in nets:
        g, f = sngan_generator(nets["z"], 3, nets["width"]), sngan_critic(3, out, nets["width"])
    else:
        g = common.dcgan_generator(nets["z"], nets["g"], 3, nets["kernel"], last)
        f = common.dcgan_critic(3, nets["f"], out, nets["kernel"], nets["norms"]) if out else None
    if row["autoencoder"]:
        decoder = common.dcgan_generator(out, nets["g"], 3, nets["kernel"], last)
    for network in filter(None, (g, f)):
        network.bfloat16 = row["precision"] == "bf16"
    if f and BATCH not in nets.get("norms", ()):
        f.to(memory_format=torch.channels_last)         # the faster layout, but for the reshaping of Layers
    return g, common.spectral(f, row["spectral"] == "learned") if row["spectral"] else f, decoder


def critic_loss(row, f, decoder, kernel, x, y, a, multiplier=None):
    """What the critic minimises at data x and samples y, both [N, 3, 32, 32], but for GRAM's: a scalar.

    a ~ U[0, 1], [N, 1, 1, 1]: where between them a penalty holds the critic's slope; multiplier: of sobolev's
    constraint, which moves with each call.
    """
    if row["nets"] == "gmmn-ae":                        # the autoencoder's cross-entropy; y is not looked at
        return F.binary_cross_entropy(decoder(f(x)), x)
    n, held, outputs = len(x), row["penalty"] and not row["weights"], []
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
    if row["weights"]:
        loss = loss + row["penalty"] * common.weight_penalty(f, row["weights"])
    elif held:              # on the slope of the best critic in f's space, or of f: WGAN-GP, GAMN, eq. 7
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
    """What the generator minimises at data x and samples y, but with GRAM's critic; and f(x), f(y)."""
    if row["nets"] == "gmmn-ae":                    # y are codes
        h_x, h_y = f(x), y
    elif row["loss"] in ("smmd", "swgan"):
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
            squared = common.mmd2(*common.gram(kernel, h_x, h_y), unbiased=True)
            loss = common.smmd2(squared, J, row["scale"])
        case "swgan": loss = common.swgan(h_x, h_y, J, row["scale"])
    if row["feasible"]:
        loss = loss + row["feasible"] * common.feasible_set(h_x, h_y)
    if row["data_mmd"]:
        loss = loss + common.mmd(*common.gram(kernel, x.flatten(1), y.flatten(1)))
    return loss, h_x, h_y


@torch.no_grad()
def sample(row, g, decoder, contrast, n, seed=0):
    """n images, uint8 [n, 3, 32, 32] on the CPU, that a row's generator g makes of a seed's noise."""
    def image(z):                       # in [0, 1]
        y = decoder(g(z)) if row["nets"] == "gmmn-ae" else g(z)
        y = y if "unit" in nets else (y + 1) / 2
        return contrast(y) if contrast else y

    nets = NETS[row["nets"]]
    z = nets["noise"](n, nets["z"], torch.Generator().manual_seed(seed))
    return common.draw_samples(image, z.to(next(g.parameters()).device))


def load_generator(path, device):
    """What sample() takes of a checkpoint, or of its part in results/: row, generator, decoder, contrast."""
    try:
        kept = torch.load(path, map_location="cpu", weights_only=True)
        row, state = DEFAULTS | kept["settings"]["row"], kept["state"]      # of an earlier version, perhaps
        g, _, decoder = networks(row)
        g = common.Average(g, row["average"]) if row["average"] else g
        g.load_state_dict(state["average"])
        contrast = common.Contrast(torch.zeros(1, 3, 1, 1)) if row["contrast"] else None
        if contrast:
            contrast.load_state_dict(state["contrast"])
        if decoder:
            decoder.load_state_dict({key.removeprefix("decoder."): value for key, value in
                                     state["players"].items() if key.startswith("decoder.")})
    except Exception as error:          # whatever its reader stumbles over
        raise ValueError(f"{path}: found no checkpoint of cifar.py ({common.first_line(error)}); expected "
                         "runs/cifar-METHOD-sSEED/checkpoint.pt or results/gram-cifar10.pt") from error
    print(f"{path}: {kept['step']:,} updates of {kept.get('about', row['loss'])}")
    return row, g.to(device), decoder and decoder.to(device), contrast and contrast.to(device)


def train(name, row, seed, folder, steps, device, images, network=None, reference=None,
          samples=SAMPLES["cuda"], every=SCORE_EVERY):
    """One run, a generator: it yields after each update, is sent whether to save, and returns its result.

    images: uint8 [N, 3, 32, 32] on the device; network, reference: of common.scores, or None; samples: how
    many to score and to keep; every: so many updates they are scored and shown.
    """
    torch.manual_seed(seed)
    nets, codes = NETS[row["nets"]], row["nets"] == "gmmn-ae"
    g, f, decoder = (part.to(device) if part else None for part in networks(row))
    kernel, rng = kernels(device)[row["kernel"]], torch.Generator(device).manual_seed(seed)
    players = nn.ModuleDict({key: part for key, part in dict(f=f, decoder=decoder).items() if part})
    players.register_buffer("multiplier", torch.zeros((), device=device))       # of sobolev
    average = common.Average(g, row["average"]) if row["average"] else g
    contrast = common.Contrast(images) if row["contrast"] else None
    opt_g = common.optimizer(g, row["opt"], row["lr_g"] or row["lr"], row["beta"])
    opt_f = common.optimizer(players, row["opt"], row["lr"], row["beta"]) if f else None
    log = common.Log(folder, COLUMNS, steps, device, READINGS)
    K_ratio = kernel(*2 * [torch.zeros(row["batch"], 1, device=device)])     # what the ratio inverts
    state = dict(g=g, opt_g=opt_g, players=players, average=average, rng=rng, log=log)
    state |= dict(opt_f=opt_f) if f else {}
    state |= dict(contrast=contrast) if contrast else {}

    def draw(n):
        x = common.draw_images(images, n, rng)
        x = common.flip_images(x, rng) if row["mirror"] else x
        return x / 255 if "unit" in nets else x / 127.5 - 1, nets["noise"](n, nets["z"], rng)

    def critic(x, z, a):
        with torch.no_grad():
            y = g(z)
        return critic_loss(row, f, decoder, kernel, x, y, a, players.multiplier)

    def generator(x, z):
        return generator_loss(row, f, kernel, x, g(z))

    def critic_step():
        x, z = draw(ENCODE_BATCH if codes else row["batch"])
        a = torch.rand(len(x), 1, 1, 1, generator=rng, device=device) if row["penalty"] else None
        with parametrize.cached():      # a spectral norm is iterated once
            loss = critic(x, z, a)
            common.descend((opt_f, loss))
        if row["clip"]:
            common.clip_weights(f, CLIP)
        log.add(loss_f=loss)

    def generator_step():
        x, z = draw(row["batch"])
        if row["loss"] == "gram":       # Algorithm 1: one Gram matrix, both gradients, both steps
            h_x, h_y = common.both(f, x, g(z))
            K_xx, K_xy, K_yy = common.gram(kernel, h_x, h_y)
            objective, r = common.gram_objective(K_xx, K_xy, K_yy, row["form"], row["ridge"], LAMBDA)
            loss = common.mmd2(K_xx, K_xy, K_yy)
            common.descend((opt_f, -objective), (opt_g, loss))
            K_ratio.copy_((K_xx if row["form"] in common.AT_DATA else K_yy).detach())
            log.add(loss_f=-objective, loss_g=loss, pearson=common.pearson(r), mean_r=r.mean(),
                    spread=h_x.var(0).sum() / h_y.var(0).sum())
        else:
            with common.frozen(f), parametrize.cached():
                loss, h_x, h_y = generator(x, z)
                common.descend((opt_g, loss))
            log.add(loss_g=loss, **(dict(spread=h_x.var(0).sum() / h_y.var(0).sum()) if f else {}))
        if row["average"]:
            average.follow(g)

    def score():
        y = sample(row, average, decoder, contrast, samples)
        return common.scores(network, y, reference, BOOTSTRAP, RESAMPLINGS)

    def readings():
        nonlocal last
        found = dict(condition=common.condition(K_ratio, row["ridge"])) if row["loss"] == "gram" else {}
        if network and (step % every == 0 or step == steps):
            last = score()
            found |= last
        if "adaptive" in state and step % ADAPT_EVERY == 0:
            y = sample(row, g, decoder, None, CODES, step)
            found["p"] = state["adaptive"].step(network(y)[0])
            found["lr_g"] = round(float(common.rates(opt_g)[0]), 10)
        return found

    if row["decay"] and network:
        x, _ = network(images[:CODES])
        state["adaptive"] = common.AdaptiveRate([opt_g, opt_f], x, row["decay"], *ADAPT)
    settings, last = dict(CONSTANTS, row=row, seed=seed, device=device.type,
                          images=common.fingerprint(images), features=network and network.key,
                          reference=reference and reference["key"]), {}
    last |= dict(rates="constant: no feature network") if row["decay"] and not network else {}
    step = common.load(folder, state, settings, -ENCODE if codes else 0)
    fast = device.type == "cuda" and steps >= COMPILE and not codes and BATCH not in nets.get("norms", ())
    critic, generator = common.compiled(critic, fast), common.compiled(generator, fast)
    critic_step, generator_step = common.capture(critic_step, rng), common.capture(generator_step, rng)
    for step in common.progress(f"{name}: steps of its autoencoder", range(step + 1, 1), -step, lambda _: 1):
        torch.manual_seed(step - seed * ENCODE)         # dropout draws from PyTorch's own generator
        critic_step()
        if common.signals or step % SAVE_EVERY == 0:
            common.save(folder, step, state, settings)
        if common.signals:              # for this turn, and for the next, in which all others save
            yield
            yield
    if codes:
        f.eval()                        # without dropout from now on
    log.start(step)
    while step < steps:
        burst = row["burst"] and (step < BURST_UNTIL or step % BURST_EVERY == 0)
        for _ in range(BURST if burst else row["critic_steps"]):
            critic_step()
        generator_step()
        step += 1
        if step % LOG_EVERY == 0 or step == steps:
            log.row(step, readings)
        if step % every == 0 or step == steps:
            common.save_grid(f"{folder}/samples-{step}.png", sample(row, average, decoder, contrast, 128))
            if f:
                with common.replacing(f"{folder}/singular-{step}.npz") as file:
                    np.savez(file, *common.singular_values(f))
        stop = yield
        if stop or step % SAVE_EVERY == 0 or step == steps:
            common.save(folder, step, state, settings)

    with common.replacing(f"{folder}/samples.npy") as file:
        np.save(file, sample(row, average, decoder, contrast, samples).numpy())
    if network and not last:            # of a finished run that is resumed
        last = score()
    return dict(method=name, row=row, seed=seed, updates=step, seconds=log.seconds, **last,
                parameters=common.parameters(g, f, decoder), **common.machine(device))


def samples_figure(finished):
    """64 samples of each run under its name; finished: as in common.curves_figure."""
    columns = min(len(finished), 4)
    rows = math.ceil(len(finished) / columns)
    figure = common.Figure(figsize=(3 * columns, 3.2 * rows), layout="constrained")
    for place, (run, _) in enumerate(finished, 1):
        grid = torchvision.utils.make_grid(common.read_images(f"{run.folder}/samples.npy")[:64], 8, padding=1)
        axes = figure.add_subplot(rows, columns, place)
        axes.imshow(grid.permute(1, 2, 0).numpy())
        axes.set_title(f"{run.name}, seed {run.seed}", fontsize=9)
        axes.axis("off")
    return figure


def sweep_figure(finished, sweeps):
    """Frechet distances over a number that rows vary (GRAM, Figure 5): lines through the means over seeds."""
    figure = common.Figure(figsize=(5 * len(sweeps), 3.5), layout="constrained")
    panels = figure.subplots(1, len(sweeps), squeeze=False).flat
    for axes, (axis, (key, values)) in zip(panels, sweeps.items()):
        for base in ("gram", "gan", "mmdgan"):
            names = {row_of(f"{base}+{key}={value:g}")[0]: value for value in values}
            points = [(names[run.name], result["fd"]) for run, result in finished
                      if run.name in names and "fd" in result]
            line = sorted({value for value, _ in points})
            if line:
                means = [np.mean([fd for v, fd in points if v == value]) for value in line]
                [drawn] = axes.semilogx(line, means, label=base)
                axes.scatter([v for v, _ in points], [fd for _, fd in points], s=12, color=drawn.get_color())
                axes.set_xticks(values, [f"{value:g}" for value in values])
                axes.legend(fontsize=7)
        axes.set(xlabel=axis, ylabel="Fréchet distance")
        axes.minorticks_off()
    return figure


def neighbours_figure(samples, images, network):
    """Samples [N, C, H, W], each above its five nearest images in pixels and features (GRAM, Figure 4)."""
    figure = common.Figure(figsize=(0.5 * len(samples), 6.5), layout="constrained")
    for axes, (name, space) in zip(figure.subplots(2), (("pixels", lambda s: s.flatten(1).float()),
                                                        ("features", lambda s: network(s)[0]))):
        nearest = torch.cdist(space(samples.to(images)), space(images)).topk(5, largest=False).indices.T
        shown = torch.cat([samples[None].to(images), images[nearest]]).flatten(0, 1)
        grid = torchvision.utils.make_grid(shown.cpu(), len(samples), padding=1)
        axes.imshow(grid.permute(1, 2, 0).numpy())
        axes.set_title(f"nearest in {name}", fontsize=9)
        axes.axis("off")
    return figure


def censored_fit(mean, covariance):
    """gaussian_fit of ReLU(X), X ~ N(mean [D], covariance [D, D]): mean and root in float64, no sampling.

    With a = mean / s, s the standard deviations, and rho the correlations: E ReLU = s (a Phi(a) + phi(a)),
    E ReLU^2 = s^2 ((a^2 + 1) Phi(a) + a phi(a)), and since d^2 cov / d rho^2 = s_i s_j phi_2(a_i, a_j; rho)
    (Price's theorem), cov = s_i s_j (rho Phi(a_i) Phi(a_j) + int_0^rho (rho - u) phi_2(a_i, a_j; u) du), by
    64 nodes of Gauss and Legendre, of which |rho| near 1 needs the more (Binkowski et al. 2018, appendix D.2,
    take it from Rosenbaum 1961).
    """
    s = covariance.diagonal().sqrt()
    a, rho = mean / s, covariance / s.outer(s)
    Phi, phi = torch.special.ndtr(a), (-a.square() / 2).exp() / math.sqrt(2 * math.pi)
    found = a * Phi + phi
    rho = rho - rho.diag().diag()               # the diagonal has the closed form
    joint = rho * Phi.outer(Phi)
    for t, w in zip(*np.polynomial.legendre.leggauss(64)):
        u = rho * (t + 1) / 2
        density = (-(a.square()[:, None] - 2 * u * a.outer(a) + a.square()) / (2 * (1 - u * u))).exp()
        joint = joint + w / 2 * rho * (rho - u) * density / (2 * math.pi * (1 - u * u).sqrt())
    joint = joint + ((a.square() + 1) * Phi + a * phi - found.square()).diag()
    return found * s, common.covariance_root(joint * s.outer(s))


def bias_figure(images, network, reference):
    """Mean and std of estimates over their number of points: what is biased, and what that does.

    KID and Frechet distance from the images and from the reference, which have one law: only KID is 0 in the
    mean (Binkowski et al. 2018, Figure 1; drawn with replacement, so a little above 0). FIDs of P1, P2 from Q
    are estimated in the wrong order (appendix D.2): P1 = ReLU(N(0, I)), P2 = ReLU(N(1, 0.8 Sigma + 0.2 I)),
    Q = ReLU(N(1, I)), Sigma = (4 / d) C C^T, C of standard normals.
    """
    (x, _), y, d = network(images), reference["features"], CENSORED
    rng = torch.Generator(x.device).manual_seed(0)

    def draw(s, n):
        return s[torch.randint(len(s), (n,), generator=rng, device=s.device)]

    def panel(axes, name, sizes, truth, estimate):
        values = np.array([[estimate(n) for _ in range(ESTIMATES)] for n in sizes])
        line = axes.errorbar(sizes, values.mean(1), values.std(1), marker=".", capsize=2, label=name)[0]
        axes.axhline(truth, color=line.get_color(), linestyle=":", linewidth=1)
        axes.set_xlabel("number of points; dotted: from infinitely many")
        axes.legend(fontsize=8)
        print(f"{name}, {ESTIMATES} estimates; dotted: {truth:.1f}")
        for n, row in zip(sizes, values):
            print(f"{n:>9,}{row.mean():>12.5g} ± {row.std():.2g}", flush=True)

    figure, title = common.Figure(figsize=(11, 3.5), layout="constrained"), f"{len(x):,} training images"
    figure.suptitle(f"{network.name}; draws with replacement from {title}, {reference['name']}", fontsize=9)
    print(figure.get_suptitle())
    first, second, third = figure.subplots(1, 3)
    panel(first, "KID of training and test images", KID_N, 0,
          lambda n: common.kid(draw(x, n), draw(y, n), subsets=1, size=n)[0])
    panel(second, "Fréchet distance of the same", FID_N, 0,
          lambda n: common.frechet_distance(common.gaussian_fit(draw(x, n)), common.gaussian_fit(draw(y, n))))
    zero = torch.zeros(d, dtype=torch.float64, device=x.device)
    one, C = torch.ones_like(zero), torch.randn(d, d, generator=rng, device=x.device).double()
    q, eye = censored_fit(one, one.diag()), one.diag()
    for name, mean, covariance in (("P1", zero, eye), ("P2", one, 3.2 / d * C @ C.T + 0.2 * eye)):
        root, shift = torch.linalg.cholesky(covariance).float(), mean.float()
        truth = common.frechet_distance(censored_fit(mean, covariance), q)
        panel(third, f"FID of {name} and Q", CENSORED_M, truth, lambda m: common.frechet_distance(
            common.gaussian_fit((common.normal_noise(m, d, rng) @ root.T + shift).relu()), q))
    return figure


def disturb(images, kind, alpha, rng, others):
    """uint8 images [N, C, H, W] with a disturbance of DISTURBANCES at level alpha; rng on their device.

    Binkowski et al. 2018, appendix E; Heusel et al. 2017, appendix A1 (bioinf-jku/TTUR, fidutils.py, turns
    swirls either way, but for a border): alpha is the weight of noise over [0, 255]; a Gaussian filter's std
    in pixels; the side of five black rectangles over the image's; the strength of a swirl of 25 pixels; the
    share of pixels that turn black or white; the share of images replaced by others [M, C, H, W].
    """
    n, _, height, width = images.shape
    uniform = partial(torch.rand, generator=rng, device=images.device)
    rows, columns = (torch.arange(m, device=images.device) for m in (height, width))
    match kind:
        case "Gaussian noise":          # its extremes, over all images, become black and white
            noise = torch.randn(images.shape, generator=rng, device=images.device)
            low, high = noise.aminmax()
            return ((1 - alpha) * images + alpha * 255 * (noise - low) / (high - low)).round().byte()
        case "Gaussian blur":
            return gaussian_blur(images, 8 * alpha + 1, alpha) if alpha else images
        case "black rectangles":
            side = round(alpha * height)
            for _ in range(5):
                top, left = ((uniform(n, 1, 1) * (m - side + 1)).long() for m in (height, width))
                inside = ((rows >= top) & (rows < top + side)).mT
                inside = inside & (columns >= left) & (columns < left + side)
                images = images.masked_fill(inside[:, None], 0)
            return images
        case "swirl":
            y, x = ((at - (len(at) - 1) / 2) for at in (rows, columns))
            radius = torch.hypot(x, y[:, None])
            angle = torch.atan2(y[:, None], x) + alpha * torch.exp(-5 * radius / (math.log(2) * 25))
            at = torch.stack([radius * angle.cos() * 2 / (width - 1),
                              radius * angle.sin() * 2 / (height - 1)], -1)
            return F.grid_sample(images.float(), at.expand(n, -1, -1, -1), padding_mode="border",
                                 align_corners=True).round().byte()
        case "salt and pepper":
            hit, salt = uniform(n, 1, height, width) < alpha, uniform(n, 1, height, width) < 0.5
            return torch.where(hit, salt * images.new_tensor(255), images)
        case "contamination":
            index = torch.randint(len(others), (n,), generator=rng, device=images.device)
            hit = torch.arange(n, device=images.device) < alpha * n
            return torch.where(hit[:, None, None, None], others[index.to(others.device)].to(images), images)


def noise_figure(images, others, network, reference):
    """Scores of images under DISTURBANCES, each scaled to [0, 1] (Binkowski et al. 2018, appendix E)."""
    rng = torch.Generator(images.device).manual_seed(0)
    figure = common.Figure(figsize=(11, 6), layout="constrained")
    figure.suptitle(f"{network.name}; {len(images):,} images against {reference['name']}", fontsize=9)
    print(figure.get_suptitle())
    clean = common.scores(network, images, reference)
    for axes, (kind, levels) in zip(figure.subplots(2, 3).flat, DISTURBANCES.items()):
        disturbed = (disturb(images, kind, alpha, rng, others) for alpha in levels[1:])
        found = [clean, *(common.scores(network, images, reference) for images in disturbed)]
        for key, sign in (("fd", 1), ("kid", 1), ("isc", -1)):      # the sign with which less is better
            if key in clean:
                values = sign * np.array([scores[key] for scores in found])
                print(f"{kind:<20}{key:<5}", *(f"{a}: {v:<10.5g}" for a, v in zip(levels, sign * values)))
                low, high = values.min(), values.max()
                axes.plot(levels, (values - low) / (high - low), marker=".",
                          label=f"{'-' if sign < 0 else ''}{key}: {low:.4g} to {high:.4g}")
        axes.set_title(kind, fontsize=9)
        axes.legend(fontsize=7)
    return figure


def main(argv=None):
    parser = common.flags(__doc__, METHODS, "gram", STEPS, "those, fetched")
    parser.add_argument("--table", choices=TABLES, help="train and score a paper's rows; finished ones stay")
    parser.add_argument("--figure", choices=FIGURES, help="draw a paper's figure; finished runs stay")
    parser.add_argument("--draw", metavar="FILE", help="samples of a checkpoint: a grid, and --samples")
    args = parser.parse_args(argv)
    chosen = dict(method=["gram"], steps=STEPS, every=SCORE_EVERY) | FIGURES.get(args.figure, {})
    steps, table = args.steps or chosen["steps"], TABLES.get(args.table, (0, {}))
    rows = dict(row_of(name) for name in args.method or table[1] or chosen["method"])

    device = common.setup(args.device)
    if args.draw:
        y = sample(*load_generator(args.draw, device), max(args.samples or 0, 128), args.seeds[0])
        common.save_grid(f"{args.out}/cifar-draw.png", y[:128])
        if args.samples:
            with common.replacing(f"{args.out}/cifar-draw.npy") as file:
                np.save(file, y[:args.samples].numpy())
        return print(f"{args.out}/cifar-draw.png", *[f"{args.out}/cifar-draw.npy"] * bool(args.samples))
    samples = args.samples or table[0] or SAMPLES[device.type]
    images = common.load_images("cifar10", "train", args.data).to(device)
    common.load_images("cifar10", "test", args.data)
    network = common.load_features(args.features, device)
    reference = common.load_reference(f"{args.data}/cifar10-test.npy", network)
    if args.figure in ("bias", "noise", "neighbours") and network is None:
        raise ValueError(f"--figure {args.figure} needs a feature network; name one with --features FILE")
    picture = f"{args.out}/cifar-figure{args.figure}.png"
    if args.figure == "bias":
        return common.save_figure(picture, bias_figure(images, network, reference))
    if args.figure == "noise":
        digits = F.pad(common.load_images("mnist", "train", args.data), (2, 2, 2, 2)).expand(-1, 3, -1, -1)
        return common.save_figure(picture, noise_figure(images, digits, network, reference))

    resume = args.resume or bool(args.table or args.figure)
    for name, row in rows.items():
        common.show(name, row, *networks(row))
        if row["decay"] and network is None:
            print(f"{name}: without a feature network its learning rates stay as they are")
    runs = [common.Run(name, row, seed, f"{args.out}/cifar-{name}-s{seed}")
            for name, row in rows.items() for seed in args.seeds]
    common.run_folders([run.folder for run in runs], __file__, resume)
    print(common.log_head(COLUMNS + READINGS, steps, device, samples, network, reference))
    results = common.interleave({run.folder: train(*run, steps, device, images, network, reference, samples,
                                                   chosen["every"]) for run in runs}, common.command(argv))
    if args.table == "gamn":            # its Table 2 has the best score during training
        for folder, result in results.items():
            if "isc" in result:
                result["isc_best"] = float(np.nanmax([result["isc"], *common.read_log(folder)["isc"]]))
    print(f"\n{common.score_table(runs, results, PAPER)}\n")

    finished = [(run, results[run.folder]) for run in runs if "failed" not in results[run.folder]]
    if not finished:
        raise common.RunError("no run finished")
    common.save_figure(f"{args.out}/cifar-curves.png", common.curves_figure(finished, CURVES["all"]))
    if args.figure in CURVES:
        common.save_figure(picture, common.curves_figure(finished, CURVES[args.figure]))
    if args.figure in SWEEPS:
        common.save_figure(picture, sweep_figure(finished, SWEEPS[args.figure]))
    if args.figure == "singular":
        common.save_figure(picture, common.singular_figure(finished))
    if args.figure == "samples":
        common.save_figure(picture, samples_figure(finished))
    if args.figure == "neighbours":
        shown = common.read_images(f"{finished[0][0].folder}/samples.npy")[:20]
        common.save_figure(picture, neighbours_figure(shown, images, network))


if __name__ == "__main__":
    common.run(main)
