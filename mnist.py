"""MNIST: from MMD-nets to the gradient-constrained MMD, one row a method.

    python mnist.py                                     GRAM, Figure 8: 16 minutes on a CPU core
    python mnist.py --table demystifying                Table 3 of Demystifying MMD GANs: 8 minutes on an H200
    python mnist.py --figure gcmmd                      Figure 6 of Scaled MMD: 9 minutes on an H200
    python mnist.py --figure collapse                   when critics meet their slope by noise: 6 minutes, CPU
    python mnist.py --method gamn wgan-gp gmmn+lr=2e-3  side by side; a row with other keys, see DEFAULTS

Expect digits from gram by update 3,000, and a Frechet distance of 60 to 360 at the end, by a LeNet that is
trained once, in 80 s on a CPU core, and kept in data/: that is no FID, and another LeNet has another one.
A run goes to runs/mnist-METHOD-sSEED/: samples-UPDATE.png (data above samples), figure8.png, samples.npy,
log.csv, checkpoint.pt, result.json; the curves of all runs of a command are runs/mnist-curves.png.
"""
import hashlib
import math
import os
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import common

STEPS = 5_000               # GRAM, Figure 8; GMMN 40,000, Demystifying MMD GANs 50,000, WGAN-GP 200,000
SIGMA = (0.1, 1, 10, 100)   # bandwidths of GRAM, appendix B.4
RBF = (2, 5, 10, 20, 40, 80)            # Demystifying MMD GANs, section 5; as variances GMMN's, "gmmn"
ALPHA = (0.2, 0.5, 1, 2, 5)             # Demystifying MMD GANs, section 5; its code has 0.1, 1, 10
LAMBDA, CLIP = 1.0, 0.01    # GRAM, eq. 9; WGAN
ENCODE, ENCODE_BATCH = 10_000, 100      # steps of GMMN+AE's autoencoder, all at first; GMMN's go by layers
ADAPT_EVERY, CODES = 500, 2_048         # of rates that adapt (Scaled MMD: 2,000), and samples for it; window,
ADAPT = (10, 3, 0.1, 1e-6)              # patience, level, floor: Demystifying MMD GANs, section 5, its code
SAMPLES = dict(cuda=10_000, cpu=2_000)  # to score and to keep, if neither --samples nor --table says
BOOTSTRAP, RESAMPLINGS = 100_000, 10    # of the distance, if so many are scored; as Demystifying MMD GANs
LENET_EPOCHS, LENET_BATCH, LENET_RATE = 2, 64, 2e-3     # ours: 99.3 % of the test images, as the tutorial's
COMPILE = 10_000            # updates from which torch.compile pays on a GPU; with batch norm it does not
LOG_EVERY = 100
TRACE_UNTIL, TRACE_EVERY = 100, 10      # of gram, log.csv has each update at first, then each 10th: Figure 8b
PANELS = (100, 250, 500, 750, 1_000, 2_000, 3_000, 4_000, 5_000)        # updates, GRAM, Figure 8a
SHOWN = 50                  # data and as many samples in a panel
SCORE_EVERY = 1_000         # and a panel
SAVE_EVERY = 1_000          # a multiple of LOG_EVERY: what is saved has been seen to be finite
COLUMNS = ("loss_f", "loss_g", "pearson", "mean_r", "spread")   # spread: variance of f(x) over that of f(y)
READINGS = ("condition", "fd", "kid", "isc", "p", "lr_g")   # condition: of the matrix that the ratio inverts

# Widths of generator and critic, whose filters are 5x5, norms behind the critic's first convolution and the
# others, noise; pixels are in [0, 1] in all papers. common.dcgan_critic names the sources. Those of WGANs are
# gan_mnist.py's (igul222/improved_wgan_training), which has batch norm in the generator for WGAN alone.
NORMAL, UNIFORM = common.normal_noise, common.uniform_noise
BATCH, LAYER = common.batch_norm, common.LayerNorm
NETS = {
    # GRAM, Table 3
    "gram":    dict(mlp=(600, 600, 800, 784), pooled=(16, 32, 32), norms=(BATCH,), z=100, noise=UNIFORM),
    "dcgan":   dict(g=(512, 256, 128, 64), f=(64, 128, 256, 512), norms=(None,), z=128, noise=UNIFORM),
    "dcgan16": dict(g=(512, 256, 128, 64), f=(16, 32, 64, 128), norms=(None,), z=100, noise=UNIFORM),
    "gamn":    dict(g=(256, 128, 64), f=(64, 128, 256), norms=(None, LAYER), z=128, noise=NORMAL),
    "wgan":    dict(g=(256, 128, 64), f=(64, 128, 256), norms=(None, BATCH), z=128, noise=NORMAL),
    "wgan-gp": dict(g=(256, 128, 64), f=(64, 128, 256), norms=(None,), z=128, noise=NORMAL),
    "gmmn":    dict(mlp=(64, 256, 256, 1024, 784), z=10, noise=UNIFORM),
    "gmmn-ae": dict(mlp=(64, 256, 256, 1024, 32), encoder=(784, 1024, 32), z=10, noise=UNIFORM),
}

DEFAULTS = dict(            # 0, False and "": without
    nets="gram",            # of NETS
    loss="mmd",             # critic_loss() and generator_loss() say what each is; gram: Algorithm 1 of GRAM
    form="", ridge=0.0,     # of gram: common.gram_objective, and its density ratio
    kernel="li",            # of kernels()
    critic=0, critic_steps=0,               # outputs of the critic; its steps to one of the generator
    opt="adam", lr=1e-4, lr_g=0.0, beta=(0.5, 0.999),       # lr_g: the generator's rate, if another
    clip=False,             # critic's weights to CLIP
    penalty=0.0, slope="image",             # weight of the gradient penalty, whose norm it holds: common.AXES
    activation=0.0,         # weight of the penalty on the activations of all layers
    spectral="",            # fixed or learned gains of spectrally normalised weights
    scale=0.0, lam=0.0,     # of smmd: common.smmd2; of gcmmd: common.gradient_constrained_mmd2
    decay=0.0,              # of rates that adapt to KID
    batch=64,               # of data and of samples
)
NAMES = dict(nets=list(NETS), loss="gram gan mmd mmd2 wasserstein cramer smmd gcmmd".split(),
             form=["", *common.FORMS],
             kernel="li rbf gmmn rq rqdot dot distance unit".split(),
             opt=["adam", "rmsprop"], slope=list(common.AXES), spectral=["", "fixed", "learned"])

GRAM = dict(loss="gram", form="sum", ridge=1e-3, critic=100, lr=1e-3, batch=200)    # ridge: JuliaGRAM
MMD = dict(nets="dcgan16", loss="mmd2", critic=16, critic_steps=5, beta=(0.5, 0.9), decay=0.5)
GAMN = dict(nets="gamn", kernel="gmmn", critic=10, critic_steps=5, beta=(0.5, 0.9), batch=50)
GMMN = dict(nets="gmmn", kernel="gmmn", lr=1e-3, batch=1_000)   # its code has momentum; Adam, rate: ours
SCALED = dict(nets="dcgan", kernel="unit", critic=1, critic_steps=5, beta=(0.5, 0.9), decay=0.8)
METHODS = {
    # GRAM: Figure 8
    "gram":         dict(GRAM),                                                         # eq. 9 as printed
    "gram-clip":    dict(GRAM, form="clip"),                                            # footnote 3
    "gram-swap":    dict(GRAM, form="swap", ridge=1.0), # eq. 9 with p and q exchanged, as cifar.py's gram
    # Demystifying MMD GANs: Table 3; +slope=columns is its code's penalty, +penalty=1+activation=1 is stable
    "mmd-rqdot":    dict(MMD, kernel="rqdot", penalty=1.0, activation=1.0),             # footnote 19
    "mmd-rbf":      dict(MMD, kernel="rbf", penalty=1.0),
    "mmd-dot":      dict(MMD, kernel="dot", penalty=1.0),
    "mmd-dist":     dict(MMD, kernel="distance", critic=256, penalty=10.0, activation=1e-4),    # footnote 19
    "cramer":       dict(MMD, loss="cramer", kernel="distance", critic=256, penalty=10.0),
    # GAMN: Figure 2; rates and batches as gan_mnist.py, whose gan without batch norm drew one sample
    "gmmn":         dict(GMMN),
    "gmmn-ae":      dict(GMMN, nets="gmmn-ae", kernel="unit"),
    "gamn":         dict(GAMN, penalty=10.0),                                           # eq. 7
    "wgan":         dict(nets="wgan", loss="wasserstein", critic=1, critic_steps=5, opt="rmsprop", lr=5e-5,
                         clip=True, batch=50),
    "wgan-gp":      dict(GAMN, penalty=10.0, nets="wgan-gp", loss="wasserstein", critic=1),
    "gan":          dict(nets="wgan", loss="gan", critic=1, critic_steps=1, lr=2e-4, batch=50),
    # Scaled MMD: Figure 6, for which it has no lambda: 1 is its Figure 5's
    "smmd":         dict(SCALED, loss="smmd", scale=10.0),                              # section 4
    "sn-smmd":      dict(SCALED, loss="smmd", scale=10.0, spectral="learned"),
    "gcmmd":        dict(SCALED, loss="gcmmd", lam=1.0),                                # Proposition 4
    "sn-gcmmd":     dict(SCALED, loss="gcmmd", lam=1.0, spectral="learned"),
}
# A paper's table: samples, updates (50,000 in the paper), and of each row the Inception score, FID, KID
TABLES = {"demystifying": (100_000, 20_000, {
    "mmd-rqdot": "9.11, 4.206, .005", "mmd-rbf": "8.98, 8.264, .011", "mmd-dot": "8.86, 6.245, .006",
    "mmd-dist": "9.13, 6.179, .005", "cramer": "9.25, 3.385, .006",
    "wgan-gp+nets=dcgan16+decay=0.5+batch=64": "9.12, 6.915, .009"})}
PAPER = {name: text for _, _, rows in TABLES.values() for name, text in rows.items()}
FIGURES = {"gcmmd": dict(method=["smmd", "sn-smmd", "gcmmd", "sn-gcmmd"], steps=20_000),    # Figure 6
           "collapse": {}}
COLLAPSE = dict(            # ours: critics alone, with an activation penalty of 0 and of 1
    rows=("mmd-rbf", "mmd-dot", "mmd-dist+penalty=1", "mmd-rqdot"), hidden=128, lr=1e-3,
    outputs=(1, 2, 4, 16, 64), batch=64,    # of one output all batches, of more outputs this batch
    updates={16: 400, 64: 300, 256: 100, 1_024: 40},    # at a batch; it goes on from the smaller ones
    points=64, draws=100)                   # where the slope is measured, and with how many batches
CURVES = {"all": [(name, "update") for name in ("fd", "kid", "isc", "loss_g")],     # Demystifying's Figure 2
          "gcmmd": [(name, "update") for name in ("loss_g", "kid")]}
CONSTANTS = {k: v for k, v in globals().items() if k.isupper() and isinstance(v, (int, float, tuple))}


def kernels(device=None, dtype=torch.float32):
    """The kernels that rows name, functions from [N, D] and [M, D] to [S, N, M]."""
    sigma, rbf, alpha = (torch.tensor(v, dtype=dtype, device=device) for v in (SIGMA, RBF, ALPHA))
    rq = partial(common.rational_quadratic, alpha=alpha)
    return {"li": partial(common.gaussian, sigma=sigma), "rbf": partial(common.gaussian, sigma=rbf),
            "gmmn": partial(common.gaussian, sigma=rbf.sqrt()), "rq": rq, "dot": common.dot,
            "rqdot": lambda x, y: torch.cat([rq(x, y), common.dot(x, y)], -3),          # Demystifying's rq*
            "distance": common.distance, "unit": common.unit_gaussian}


def pooled_critic(widths, out):
    """Critic of GRAM's Table 3, convolutions of 3x3 and max pooling: [N, 1, 28, 28] to [N, out]."""
    layers = []
    for a, b in zip([1, *widths], widths):
        layers += [nn.Conv2d(a, b, 3, 1, 1, bias=False), BATCH(b), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    return common.Layers(*layers, nn.Flatten(), nn.Linear(widths[-1] * (28 // 2 ** len(widths)) ** 2, out))


def networks(row):
    """Generator, critic and decoder of a row, None for what it has not."""
    nets, out = NETS[row["nets"]], row["critic"]
    common.check_row(row, out and ("mlp" not in nets or "pooled" in nets),
                     BATCH in nets.get("norms", ()))
    to_image = nn.Sigmoid(), nn.Unflatten(1, (1, 28, 28))
    if "encoder" in nets:               # GMMN+AE: the generator makes codes; dropout: yujiali/gmmn, train.py
        first, act, last = common.mlp(*nets["encoder"])
        return (nn.Sequential(common.mlp(nets["z"], *nets["mlp"]), nn.Sigmoid()),
                nn.Sequential(nn.Flatten(), nn.Dropout(0.2), first, act, nn.Dropout(0.5), last, nn.Sigmoid()),
                nn.Sequential(common.mlp(*reversed(nets["encoder"])), *to_image))
    if "mlp" in nets:
        g = nn.Sequential(common.mlp(nets["z"], *nets["mlp"]), *to_image)
        f = pooled_critic(nets["pooled"], out) if out and "pooled" in nets else None
    else:
        g = common.dcgan_generator(nets["z"], nets["g"], 1, 5, nn.Sigmoid, 28)
        f = common.dcgan_critic(1, nets["f"], out, 5, nets["norms"], 28) if out else None
        if f and BATCH not in nets["norms"]:
            f.to(memory_format=torch.channels_last)     # the faster layout, but for the reshaping of Layers
    return g, common.spectral(f, row["spectral"] == "learned") if row["spectral"] else f, None


def critic_loss(row, f, decoder, kernel, x, y, a):
    """What a critic but GRAM's minimises at data x and samples y, both [N, 1, 28, 28]: a scalar.

    a ~ U[0, 1], [N, 1, 1, 1]: where between them a penalty holds the critic's slope.
    """
    if row["nets"] == "gmmn-ae":                        # the autoencoder's cross-entropy; y is not looked at
        return F.binary_cross_entropy(decoder(f(x)), x)
    n, held, outputs = len(x), row["penalty"], []
    if held or row["activation"] or row["loss"] in ("smmd", "gcmmd"):
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
            mmd2 = common.mmd2(*common.gram(kernel, h_x, h_y), unbiased=True)
            loss = -common.smmd2(mmd2, common.jacobian(h_x, back), row["scale"])
        case "gcmmd":                                   # held at the data
            J = common.jacobian(h_x, back)
            loss = -common.gradient_constrained_mmd2(h_x, h_y, h_x, J, row["lam"])[0]
    if held:                # on the slope of the best critic in f's space, or of f: WGAN-GP, GAMN, eq. 7
        best = {"cramer": lambda h: common.cramer_witness(h, h_y),
                "mmd2": lambda h: common.witness(kernel, h, h_x, h_y)}.get(row["loss"], lambda h: h.sum(-1))
        slope = back(torch.func.grad(lambda h: best(h).sum())(h_t), slice(2 * n, None))
        loss = loss + row["penalty"] * common.gradient_penalty(slope, common.AXES[row["slope"]]).mean()
    if row["activation"]:
        loss = loss + row["activation"] * common.activation_penalty([h[:2 * n] for h in outputs])
    return loss


def generator_loss(row, f, kernel, x, y):
    """What the generator minimises with a critic but GRAM's: a scalar, and f(x), f(y)."""
    if row["nets"] == "gmmn-ae":                    # y are codes
        h_x, h_y = f(x), y
    elif row["loss"] in ("smmd", "gcmmd"):
        h_x, back = common.pullback(f, x)
        J, h_y = common.jacobian(h_x, back), f(y)
    else:
        h_x, h_y = common.both(f, x, y)
    match row["loss"]:
        case "gan": loss = common.gan_generator(h_y)
        case "wasserstein": loss = common.wasserstein(h_x, h_y)
        case "mmd": loss = common.mmd(*common.gram(kernel, h_x, h_y))
        case "mmd2" | "cramer": loss = common.mmd2(*common.gram(kernel, h_x, h_y), unbiased=True)
        case "smmd":
            mmd2 = common.mmd2(*common.gram(kernel, h_x, h_y), unbiased=True)
            loss = common.smmd2(mmd2, J, row["scale"])
        case "gcmmd":
            loss, _ = common.gradient_constrained_mmd2(h_x, h_y, h_x, J, row["lam"])
    return loss, h_x, h_y


def train(name, row, seed, folder, steps, device, images, network=None, reference=None,
          samples=SAMPLES["cuda"]):
    """One run, a generator: it yields after each update, is sent whether to save, and returns its result.

    images: uint8 [N, 1, 28, 28] on the device; network, reference: of common.scores; samples: how
    many to score and to keep.
    """
    torch.manual_seed(seed)
    nets, codes, gram = NETS[row["nets"]], row["nets"] == "gmmn-ae", row["loss"] == "gram"
    g, f, decoder = (part.to(device) if part else None for part in networks(row))
    kernel, rng = kernels(device)[row["kernel"]], torch.Generator(device).manual_seed(seed)
    players = nn.ModuleDict({key: part for key, part in dict(f=f, decoder=decoder).items() if part})
    opt_g = common.optimizer(g, row["opt"], row["lr_g"] or row["lr"], row["beta"])
    opt_f = common.optimizer(players, row["opt"], row["lr"], row["beta"]) if f else None
    log = common.Log(folder, COLUMNS, steps, device, READINGS)
    K_ratio = kernel(*2 * [torch.zeros(row["batch"], 1, device=device)])    # what the last ratio has inverted
    state = dict(g=g, opt_g=opt_g, players=players, rng=rng, log=log)
    state |= dict(opt_f=opt_f) if f else {}

    def draw(n):
        return common.draw_images(images, n, rng) / 255, nets["noise"](n, nets["z"], rng)

    def critic(x, z, a):
        with torch.no_grad():
            y = g(z)
        return critic_loss(row, f, decoder, kernel, x, y, a)

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
        if gram:                        # Algorithm 1: one Gram matrix, both gradients, both steps
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

    def sample(n, seed=0):              # uint8 [n, 1, 28, 28] of a seed's noise
        z = nets["noise"](n, nets["z"], torch.Generator().manual_seed(seed)).to(device)
        return common.draw_samples(nn.Sequential(g, decoder) if codes else g, z)

    def score():
        return common.scores(network, sample(samples), reference, BOOTSTRAP, RESAMPLINGS)

    def readings():
        nonlocal last
        found = dict(condition=common.condition(K_ratio, row["ridge"])) if gram and shown else {}
        if network and (step % SCORE_EVERY == 0 or step == steps):
            last = score()
            found |= last
        if "adaptive" in state and step % ADAPT_EVERY == 0:
            found["p"] = state["adaptive"].step(network(sample(CODES, step))[0])
            found["lr_g"] = round(float(common.rates(opt_g)[0]), 10)
        return found

    if row["decay"] and network:
        x, _ = network(images[:CODES])
        state["adaptive"] = common.AdaptiveRate([opt_g, opt_f], x, row["decay"], *ADAPT)
    settings, last = dict(CONSTANTS, row=row, seed=seed, device=device.type,
                          images=common.fingerprint(images), features=network and network.key,
                          reference=reference and reference["key"]), {}
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
        for _ in range(row["critic_steps"]):
            critic_step()
        generator_step()
        step += 1
        shown = step % LOG_EVERY == 0 or step == steps
        if shown or gram and (step <= TRACE_UNTIL or step % TRACE_EVERY == 0):
            log.row(step, readings, shown)
        if step in PANELS or step % SCORE_EVERY == 0 or step == steps:
            panel = torch.cat([images[:SHOWN].cpu(), sample(500)[:SHOWN]])
            common.save_grid(f"{folder}/samples-{step}.png", panel, 10)
        stop = yield
        if stop or step % SAVE_EVERY == 0 or step == steps:
            common.save(folder, step, state, settings)

    with common.replacing(f"{folder}/samples.npy") as file:
        np.save(file, sample(samples).numpy())
    if network and not last:            # of a finished run that is resumed
        last = score()
    return dict(method=name, row=row, seed=seed, updates=step, seconds=log.seconds, **last,
                parameters=common.parameters(g, f, decoder), **common.machine(device))


class LeNet(nn.Module):
    """Grey uint8 images [N, C, 28, 28] to features [N, 512] and logits [N, 10], in place of Inception.

    As Demystifying MMD GANs, section 4; of TensorFlow's tutorial (tutorials/image/mnist/convolutional.py).
    """

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 5, padding=2),
            nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64 * 49, 512), nn.ReLU())
        self.classes = nn.Linear(512, 10)

    def forward(self, images):
        found = self.features(images[:, :1].float() / 255 - 0.5)
        return found, self.classes(found)


def train_lenet(images, labels):
    """A LeNet trained on uint8 images [N, 1, 28, 28] with labels int64 [N]; its rate rises, then falls."""
    torch.manual_seed(0)                # the tutorial has momentum, dropout and 10 epochs
    network = LeNet().to(images.device)
    batches = [part for _ in range(LENET_EPOCHS) for part in torch.randperm(len(images)).split(LENET_BATCH)]
    optimizer = torch.optim.Adam(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LENET_RATE, total_steps=len(batches))
    for index in common.progress("steps of a LeNet", batches, len(batches), lambda _: 1):
        common.descend((optimizer, F.cross_entropy(network(images[index])[1], labels[index])))
        schedule.step()
    return network


def load_labelled(split, folder, device):
    """MNIST's images of a split, uint8 [N, 1, 28, 28], and their labels, int64 [N]."""
    images = common.load_images("mnist", split, folder).to(device)
    labels = np.load(path := f"{folder}/mnist-{split}-labels.npy")
    if labels.dtype != np.uint8 or labels.shape != images.shape[:1] or labels.max() > 9:
        raise ValueError(f"{path}: found {labels.dtype} {list(labels.shape)}, expected uint8 up to 9, "
                         f"{len(images)} of them; delete it and its images to have both fetched")
    return images, torch.from_numpy(labels).long().to(device)


def load_lenet(folder, device):
    """The Features of FOLDER/features-lenet.pth, trained if it is not there; raises OSError or ValueError."""
    path, network = f"{folder}/features-lenet.pth", LeNet()
    with common.building(path) as needed:
        if needed:
            data, (x, labels) = (load_labelled(split, folder, device) for split in ("train", "test"))
            print(f"{path} is not there: trained once, by {LENET_EPOCHS} epochs of MNIST", flush=True)
            trained = train_lenet(*data)
            with torch.no_grad():
                right = torch.cat([trained(part)[1].argmax(1) for part in x.split(1_000)]) == labels
            kept = dict(weights=trained.state_dict(), accuracy=float(right.double().mean()))
            try:
                common.save_tensors(path, kept)
            except OSError as error:
                print(f"{path}: cannot be kept ({error}); this run goes on with it")
                return common.Features(trained.eval(), "lenet", "not kept", device)
    try:
        kept = torch.load(path, map_location="cpu", weights_only=True)
        network.load_state_dict(kept["weights"])
        print(f"{path}: classifies {kept['accuracy']:.2%} of MNIST's test images rightly")
    except Exception as error:          # whatever its reader stumbles over
        raise ValueError(f"{path}: no LeNet ({common.first_line(error)}); delete it") from error
    key = hashlib.sha256(np.fromfile(path, np.uint8)).hexdigest()[:8]
    return common.Features(network.eval().to(device), "lenet", key, device)


def figure_8(folder, result):
    """GRAM, Figure 8: data above samples during training, and the traces of eq. 10 and eq. 7."""
    figure, trace = common.Figure(figsize=(8, 11), layout="constrained"), common.read_log(folder)
    axes = figure.subplot_mosaic("AABBCC;DDEEFF;GGHHII;LLLRRR")
    pictures = {step: f"{folder}/samples-{step}.png" for step in sorted({*PANELS, result["updates"]})}
    there = [step for step, path in pictures.items() if step <= result["updates"] and os.path.exists(path)]
    for place, step in zip("ABCDEFGHI", there[-9:]):
        axes[place].imshow(common.open_image(pictures[step]))
        axes[place].set_title(f"update {step:,}", fontsize=9)
    for place in "ABCDEFGHI":
        axes[place].axis("off")
    for place, part in (("L", trace["step"] <= TRACE_UNTIL), ("R", trace["step"] >= TRACE_UNTIL)):
        for name, label in (("loss_g", "generator's loss, eq. 10"), ("pearson", "Pearson estimate, eq. 7")):
            axes[place].plot(trace["step"][part], trace[name][part], label=label, linewidth=1)
        axes[place].set(yscale="log", xlabel="update")
    axes["R"].sharey(axes["L"])
    axes["L"].legend(fontsize=7)
    figure.supxlabel("The paper draws eq. 5, an unknown constant minus the Pearson divergence", fontsize=8)
    figure.suptitle(f"{result['method']}: data (top halves) and samples", fontsize=11)
    return figure


def noise_floor(k):
    """The least E (|s| - 1)^2 of all multiples of a normal vector s in k dimensions: 1 - (E chi_k)^2 / k."""
    return 1 - 2 / k * math.exp(2 * (math.lgamma((k + 1) / 2) - math.lgamma(k / 2)))


def noise_dimension(slopes):
    """(tr C)^2 / tr C^2, C the second moments of slopes [R, P, D] over R draws: its mean over P points."""
    s = slopes.double().transpose(0, 1)
    G = (s @ s.mT).masked_fill(torch.eye(len(slopes), dtype=bool, device=s.device), 0)  # no draw with itself
    size = s.square().sum(-1)
    return ((size.sum(1) ** 2 - size.square().sum(1)) / G.square().sum((1, 2))).mean()


@torch.no_grad()
def witness_slopes(f, kernel, t, draws):
    """The witness's slopes at images t [P, ...], [R, P, D], of R draws: pairs of data and samples."""
    (h_t, back), slopes = common.pullback(f, t), []
    for x, y in draws:
        h_x, h_y = common.both(f, x, y)
        u = torch.func.grad(lambda h: common.witness(kernel, h, h_x, h_y).sum())(h_t)
        slopes.append(back(u, slice(None)).flatten(1))
    return torch.stack(slopes)


def figure_collapse(images):
    """The gradient penalty of critics alone whose samples have the law of the data: the witness is noise."""
    own, device, found = COLLAPSE, images.device, []
    rng, outputs = torch.Generator(device).manual_seed(0), own["outputs"]

    def draw(n):
        return common.draw_images(images, n, rng) / 255

    kinds = [(name, on, K) for name in own["rows"] for on in (0, 1) for K in outputs]
    for name, on, K in common.progress("critics", kinds, len(kinds), lambda _: 1):
        torch.manual_seed(0)
        f = common.Layers(nn.Flatten(), nn.Linear(784, own["hidden"]), nn.LeakyReLU(0.2),
                          nn.Linear(own["hidden"], K)).to(device)
        for n in own["updates"] if K == 1 else [own["batch"]]:
            _, row = common.find_row(f"{name}+activation={on}+batch={n}", METHODS, DEFAULTS, NAMES)
            kernel, opt = kernels(device)[row["kernel"]], common.optimizer(f, "adam", own["lr"], row["beta"])
            for _ in range(own["updates"][n]):
                a = torch.rand(n, 1, 1, 1, generator=rng, device=device)
                common.descend((opt, critic_loss(row, f, None, kernel, draw(n), draw(n), a)))
            draws = ((draw(n), draw(n)) for _ in range(own["draws"]))
            slopes = witness_slopes(f, kernel, draw(own["points"]), draws)
            penalty, k = common.gradient_penalty(slopes).mean(1), float(noise_dimension(slopes))
            mean, error = float(penalty.mean()), float(penalty.std()) / len(penalty) ** 0.5
            found.append((row["kernel"] + on * " + activation", n, K, k, mean, error))
    head = "kernel, batch, outputs K, floor of K, dimension k, floor of k, penalty".split(", ")
    print(common.table(head, [[kind, f"{n:,}", str(K), f"{noise_floor(K):.3f}", f"{k:.2f}",
                               f"{noise_floor(k):.3f}", f"{mean:.3f} ± {error:.3f}"]
                              for kind, n, K, k, mean, error in found]))

    figure = common.Figure((14, 5), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for i, kind in enumerate(dict.fromkeys(row[0] for row in found)):
        n, K, k, mean, error = np.array([row[1:] for row in found if row[0] == kind]).T
        for axes, x, part in zip(panels, (n, K, k), (K == 1, n == own["batch"], K > 0)):
            style = "" if axes is panels[2] else "-:"[i % 2]
            axes.errorbar(x[part], mean[part], error[part], label=kind, color=f"C{i // 2}",
                          marker="o^"[i % 2], markersize=5, linestyle=style)
    panels[0].axhline(noise_floor(1), color="black")
    for axes, top in zip(panels[1:], (max(outputs), max(row[3] for row in found))):
        line = np.geomspace(0.9, top)
        axes.plot(line, [noise_floor(k) for k in line], color="black", label="floor")
    for axes, label in zip(panels, ("batch, with one output", f"outputs, with a batch of {own['batch']}",
                                    "dimension of the slope's noise, as measured")):
        axes.set_xscale("linear" if axes is panels[2] else "log")
        axes.set(xlabel=label, ylim=(0, 1.1))
    panels[0].set_ylabel("gradient penalty")
    figure.legend(*panels[1].get_legend_handles_labels(), loc="outside lower center", fontsize=8, ncols=5)
    return figure


def main(argv=None):
    parser = common.flags(__doc__, METHODS, "gram", STEPS, "a LeNet, trained once")
    parser.add_argument("--table", choices=TABLES, help="a paper's rows and numbers; finished runs are kept")
    parser.add_argument("--figure", choices=FIGURES, help="a paper's figure; finished runs are kept")
    args = parser.parse_args(argv)
    samples, steps, table = TABLES.get(args.table, (0, STEPS, {}))
    chosen = dict(method=list(table) or ["gram"], steps=steps) | FIGURES.get(args.figure, {})
    names, steps = args.method or chosen["method"], args.steps or chosen["steps"]
    rows = dict(common.find_row(name, METHODS, DEFAULTS, NAMES) for name in names)

    device = common.setup(args.device)
    samples = args.samples or samples or SAMPLES[device.type]
    images = common.load_images("mnist", "train", args.data).to(device)
    if args.figure == "collapse":
        torch.set_num_threads(1)        # the critics are too small to share between cores
        return common.save_figure(f"{args.out}/mnist-figurecollapse.png", figure_collapse(images))
    common.load_images("mnist", "test", args.data)
    network = common.load_features(args.features, device) if args.features else load_lenet(args.data, device)
    reference = common.load_reference(f"{args.data}/mnist-test.npy", network)

    out, resume = f"{args.out}/mnist", args.resume or bool(args.table or args.figure)
    for name, row in rows.items():
        common.show(name, row, *networks(row))
    runs = [common.Run(name, row, seed, f"{out}-{name}-s{seed}")
            for name, row in rows.items() for seed in args.seeds]
    common.run_folders([run.folder for run in runs], __file__, resume)
    print(common.log_head(COLUMNS + READINGS, steps, device, samples, network, reference))
    results = common.interleave({run.folder: train(*run, steps, device, images, network, reference, samples)
                                 for run in runs}, common.command(argv))
    print(f"\n{common.score_table(runs, results, PAPER)}\n")
    if args.table:                      # the paper has, of the test images themselves, 9.78, 4.305, .003
        own = common.scores(network, images[:samples], reference)
        print(f"{own['samples']:,} training images themselves, {own['features']} against {own['reference']}: "
              + ", ".join(f"{key} {own[key]:.3g}" for key in ("isc", "fd", "kid") if key in own))

    finished = [(run, results[run.folder]) for run in runs if "failed" not in results[run.folder]]
    if not finished:
        raise common.RunError("no run finished")
    common.save_figure(f"{out}-curves.png", common.curves_figure(finished, CURVES["all"]))
    if args.figure in CURVES:
        curves = common.curves_figure(finished, CURVES[args.figure])
        common.save_figure(f"{out}-figure{args.figure}.png", curves)
    for run, result in finished:
        if run.row["loss"] == "gram":
            common.save_figure(f"{run.folder}/figure8.png", figure_8(run.folder, result))


if __name__ == "__main__":
    common.run(main)
