"""What two scripts or more share: mathematics first, then networks, data, scores, running, keeping, figures.

Notation, the same in all files
    x ~ p   data [N, D]                    f   critic R^D -> R^K, a network or none
    y ~ q   samples y = g(z) [M, D]        g   generator, z its noise
    k       kernel, sigma its bandwidth    r   density ratio, one value a point
    K_xx, K_xy, K_yy   Gram matrices of f(x) and f(y): stacks [S, N, M], a slice for each bandwidth

Where each equation stands ("GRAM": Generative Ratio Matching Networks, ICLR 2020)
    gaussian         k(x, y) = exp(-|x - y|^2 / 2 sigma^2)       Li et al. 2017, section 3
    gram             K_xx, K_xy, K_yy from one evaluation of k   GRAM, Algorithm 1
    mmd2             squared MMD, biased or unbiased             GRAM, eq. 2, 10; Gretton et al. 2012, eq. 3
    mmd              its square root, with a slope at 0          JuliaGRAM 44159b2
    density_ratio    r = K_qq^-1 K_qp 1                          GRAM, eq. 8
    pearson          mean((r - 1)^2)                             GRAM, eq. 7
    gram_objective   what GRAM's critic maximises, four forms    GRAM, eq. 9, footnote 3; JuliaGRAM; GRAMFlow
    gan_critic, gan_generator                                    Goodfellow et al. 2014
    frechet_distance, kid                                        Heusel et al. 2017; Binkowski et al. 2018

In four sentences. A kernel compares two sets of points through the Gram matrices of all their pairs: the
squared MMD is the mean of K_xx plus the mean of K_yy minus twice the mean of K_xy, zero if and only if p = q.
In the space of images no fixed kernel sees enough, so a critic f maps them to R^K first. An adversarial
critic maximises the very MMD that the generator minimises, which is a saddle point. GRAM's critic maximises
another quantity, the divergence between p and q that the density ratio in its space shows, so that matching
them there matches them everywhere.
"""
import argparse
import csv
import glob
import itertools
import json
import logging
import math
import os
import shlex
import sys
import tempfile
import time
from contextlib import contextmanager, suppress

import numpy as np
import torch
import torch.export.passes
import torchvision
from torch import nn
from torch.nn import functional as F
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

# ------------------------------------------------------------------------------------------------------------
# Kernels
# ------------------------------------------------------------------------------------------------------------


def squared_distances(x, y):
    """|x_i - y_j|^2 for all pairs, never negative: [N, D] and [M, D] to [N, M].

    |x|^2 + |y|^2 - 2 x.y takes one matrix product in place of N M D differences, but cancels far from the
    origin. Distances do not change when both sets are moved, so their common mean is taken off first.
    """
    centre = torch.cat([x, y]).mean(0).detach()
    x, y = x - centre, y - centre
    return (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T).clamp(min=0)


def gaussian(x, y, sigma):
    """Gaussian kernels exp(-|x_i - y_j|^2 / 2 sigma^2), a slice for each bandwidth (Li et al. 2017, sec. 3).

    x [N, D], y [M, D], sigma [S] in the units of x; returns [S, N, M]. The usual mixture is their sum.
    """
    return torch.exp(squared_distances(x, y) * (-0.5 / sigma.square())[:, None, None])


def gram(kernel, x, y):
    """The three Gram matrices of two sets, from one evaluation of a kernel on both (GRAM, Algorithm 1).

    kernel(a, b) -> [S, len(a), len(b)]; x [N, D], y [M, D].
    Returns K_xx [S, N, N], K_xy [S, N, M], K_yy [S, M, M].
    """
    both, sizes = torch.cat([x, y]), [len(x), len(y)]
    rows_x, rows_y = kernel(both, both).split(sizes, -2)        # split, not slices: fewer kernels backwards
    K_xx, K_xy = rows_x.split(sizes, -1)
    _, K_yy = rows_y.split(sizes, -1)
    return K_xx, K_xy, K_yy


# ------------------------------------------------------------------------------------------------------------
# Maximum mean discrepancy
# ------------------------------------------------------------------------------------------------------------


def mmd2(K_xx, K_xy, K_yy, unbiased=False):
    """Squared MMD under the sum of the kernels in the stack: a scalar.

    K_xx [S, N, N], K_xy [S, N, M], K_yy [S, M, M]. Biased (GRAM, eq. 2 and 10): means over all pairs, never
    negative but for rounding. Unbiased (Gretton et al. 2012, eq. 3): no point is paired with itself, and the
    mean over draws is zero if p = q.
    """
    def within(K):
        if not unbiased:
            return K.mean((-2, -1))
        n = K.shape[-1]
        return (K.sum((-2, -1)) - K.diagonal(dim1=-2, dim2=-1).sum(-1)) / (n * (n - 1))

    return (within(K_xx) + within(K_yy) - 2 * K_xy.mean((-2, -1))).sum()


def mmd(K_xx, K_xy, K_yy):
    """Biased MMD, not squared: sqrt(mmd2 + 1e-6), whose gradient is finite where the two sets are equal.

    The first released GRAM code has this 1e-6 (JuliaGRAM 44159b2); in later code the slope at 0 is infinite.
    """
    return (mmd2(K_xx, K_xy, K_yy).clamp(min=0) + 1e-6).sqrt()


# ------------------------------------------------------------------------------------------------------------
# Density ratios, and GRAM's critic
# ------------------------------------------------------------------------------------------------------------


def density_ratio(K_qq, K_qp, ridge):
    """Density ratio r = p / q at the points of q by kernel mean matching, mean over bandwidths (GRAM, eq. 8).

    K_qq [S, M, M], K_qp [S, M, N]; returns r [M], the solution of (K_qq + ridge I) r = (M / N) K_qp 1:
    weights on the points of q that give it the kernel mean of p. One batched solve serves all bandwidths. The
    paper prints no M / N (it has M = N) and no ridge, but without one r is noise in float32: JuliaGRAM adds
    1e-3 (src/kmm.jl), GRAMFlow nothing. r may be negative, and vanishes at bandwidths far below distances.
    """
    M, N = K_qp.shape[-2:]
    A = K_qq + ridge * torch.eye(M, dtype=K_qq.dtype, device=K_qq.device)
    b = K_qp.sum(-1, keepdim=True) * (M / N)                            # [S, M, 1]
    return torch.linalg.solve_ex(A, b).result.squeeze(-1).mean(0)      # solve() would wait for the GPU


def pearson(r):
    """Estimate mean((r - 1)^2) of the Pearson divergence from r = p / q at samples of q (GRAM, eq. 7).

    Where r was fitted to the same points this is no lower bound: the estimator's variance raises it too. From
    r = q / p at data it estimates the divergence with p and q exchanged.
    """
    return (r - 1).square().mean()


def gram_objective(K_xx, K_xy, K_yy, form, ridge, lam):
    """What GRAM's critic maximises, and the ratio that it is made of: (scalar, r).

    form    objective                   r             source
    sum     pearson(r) + lam sum(r)     p / q at y    GRAM, eq. 9, lam = 1; JuliaGRAM since 7e6da00
    mean    pearson(r) + lam mean(r)    p / q at y    JuliaGRAM 441596b, the "camera ready" code
    clip    pearson(max(r, 0))          p / q at y    GRAM, footnote 3; JuliaGRAM 44159b2
    flow    mean(r)                     q / p at x    GRAMFlow.ipynb, the authors' code for CIFAR-10

    E_q[p / q] = E_p[q / p] = 1 for EVERY critic: sum(r) and mean(r) estimate a constant and are no
    divergence. They teach the critic only through what the finite sample, the ridge and the supports do to
    the estimate. How far mean(r) is from 1 tells how far that goes: where all of K_xy is 0 so is r, which is
    the dead end of "clip", since its gradient is 0 there too. Raises ValueError for another form.
    """
    if form == "flow":
        r = density_ratio(K_xx, K_xy, ridge)        # the notebook's denominator block is the data
        return r.mean(), r
    r = density_ratio(K_yy, K_xy.mT, ridge)
    if form == "sum":
        return pearson(r) + lam * r.sum(), r
    if form == "mean":
        return pearson(r) + lam * r.mean(), r
    if form == "clip":
        r = r.clamp(min=0)
        return pearson(r), r
    raise ValueError(f"form {form!r}: expected sum, mean, clip or flow")


# ------------------------------------------------------------------------------------------------------------
# GAN
# ------------------------------------------------------------------------------------------------------------


def gan_critic(d_x, d_y):
    """A discriminator's loss, the mean of -log s(d_x) plus the mean of -log(1 - s(d_y)): a scalar.

    Logits d_x [N, 1] of data and d_y [M, 1] of samples, s the logistic function. Goodfellow et al. 2014,
    eq. 1; JuliaGRAM takes half of it, which Adam does not notice.
    """
    return F.softplus(-d_x).mean() + F.softplus(d_y).mean()


def gan_generator(d_y):
    """A generator's non-saturating loss, the mean of -log s(d_y): a scalar.

    Logits d_y [M, 1] of samples, s the logistic function (Goodfellow et al. 2014, section 3).
    """
    return F.softplus(-d_y).mean()


# ------------------------------------------------------------------------------------------------------------
# Distances between sets of features, in float64
# ------------------------------------------------------------------------------------------------------------


def frechet_distance(a, b):
    """Frechet distance of the Gaussians fitted to two sets of features, [N, D] and [M, D]; a float.

    |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^1/2) (Heusel et al. 2017). For any factors S = F^T F the last
    trace is the nuclear norm of F_a F_b^T, so no root of a matrix that is not symmetric has to be taken: F
    is the root of S up to a rotation, or the centred features where N < D. Biased: compare at equal N only.
    """
    def moments(x):
        x = x.double()
        mean = x.mean(0)
        centred = (x - mean) / (len(x) - 1) ** 0.5
        if len(x) < x.shape[1]:
            return mean, centred
        values, vectors = torch.linalg.eigh(centred.T @ centred)
        return mean, values.clamp(min=0).sqrt()[:, None] * vectors.T

    (m_a, F_a), (m_b, F_b) = moments(a), moments(b)
    overlap = torch.linalg.svdvals(F_a @ F_b.T).sum()
    return float((m_a - m_b).square().sum() + F_a.square().sum() + F_b.square().sum() - 2 * overlap)


def kid(a, b, subsets=100, size=1000, seed=0):
    """KID of two sets of features [N, D] and [M, D]: unbiased squared MMD under (a.b / D + 1)^3; (mean, std).

    Mean and std over random subsets, drawn without replacement, of `size` or as many as the smaller set has;
    the std is of one subset, not of the mean. Unbiased, so never clamped (Binkowski et al. 2018, sec. 4).
    """
    a, b = a.double(), b.double()
    size, rng = min(size, len(a), len(b)), torch.Generator().manual_seed(seed)

    def cubic(u, v):
        return (u @ v.T / u.shape[1] + 1) ** 3

    values = []
    for _ in range(subsets):
        u, v = (s[torch.randperm(len(s), generator=rng)[:size].to(s.device)] for s in (a, b))
        values.append(mmd2(cubic(u, u), cubic(u, v), cubic(v, v), unbiased=True))
    values = torch.stack(values)
    return float(values.mean()), float(values.std(correction=0))


# ------------------------------------------------------------------------------------------------------------
# Networks
# ------------------------------------------------------------------------------------------------------------


def mlp(*sizes):
    """Linear layers of the given sizes with ReLU between them: [N, sizes[0]] to [N, sizes[-1]]."""
    layers = []
    for a, b in zip(sizes, sizes[1:]):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def batch_norm(channels):
    """Batch norm by the statistics of the batch at hand, in training and in sampling alike.

    So do the released image codes: GRAMFlow never updates its averages, OctoberChang and mbinkowski sample in
    training mode. A sample depends on its batch, then: draw hundreds at a time.
    """
    return nn.BatchNorm2d(channels, track_running_stats=False)


def dcgan_init(network):
    """The network with weights N(0, 0.02^2), those of convolutions cut off at 2 std, biases 0 (GRAMFlow)."""
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.trunc_normal_(layer.weight, std=0.02, a=-0.04, b=0.04)
        elif isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.02)
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)) and layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return network


def dcgan_generator(noise, widths, channels):
    """DCGAN generator: [N, noise] to images [N, channels, 32, 32] in [-1, 1].

    GRAM, Table 5, with widths (128, 64, 32): a linear layer to 4x4, then transposed convolutions of 4x4 and
    stride 2, batch norm and ReLU in front of each, tanh behind the last. In front of a batch norm a bias does
    nothing.
    """
    layers = [nn.Linear(noise, widths[0] * 16), nn.Unflatten(1, (widths[0], 4, 4))]
    for a, b in zip(widths, widths[1:]):
        layers += [batch_norm(a), nn.ReLU(inplace=True), nn.ConvTranspose2d(a, b, 4, 2, 1, bias=False)]
    layers += [batch_norm(b), nn.ReLU(inplace=True), nn.ConvTranspose2d(b, channels, 4, 2, 1), nn.Tanh()]
    return dcgan_init(nn.Sequential(*layers))


def dcgan_critic(channels, widths, out):
    """DCGAN critic: images [N, channels, 32, 32] to [N, out].

    GRAM, Tables 6 and 7, with widths (32, 64, 128) and (32, 32, 64): convolutions of 4x4 and stride 2, each
    with batch norm and LeakyReLU 0.2, then a linear layer. The paper says that the critic has batch norm, not
    where; GRAMFlow has none behind the first convolution.
    """
    layers = []
    for a, b in zip([channels, *widths], widths):
        layers += [nn.Conv2d(a, b, 4, 2, 1, bias=False), batch_norm(b), nn.LeakyReLU(0.2, inplace=True)]
    return dcgan_init(nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * 16, out)))


def count(network):
    """Number of a network's parameters, 0 for None."""
    return sum(p.numel() for p in network.parameters()) if network else 0


# ------------------------------------------------------------------------------------------------------------
# Data: all that is random comes from a run's own torch.Generator, on its device
# ------------------------------------------------------------------------------------------------------------


def uniform_noise(n, dim, rng):
    """Noise z ~ U[-1, 1]^dim: [n, dim]."""
    return torch.rand(n, dim, generator=rng, device=rng.device) * 2 - 1


def normal_noise(n, dim, rng):
    """Noise z ~ N(0, I): [n, dim]."""
    return torch.randn(n, dim, generator=rng, device=rng.device)


def draw_images(images, n, rng):
    """n images drawn with replacement: uint8 [N, C, H, W] to float32 [n, C, H, W] in [-1, 1]."""
    index = torch.randint(len(images), (n,), generator=rng, device=rng.device)
    return images[index].float() / 127.5 - 1


def to_bytes(y):
    """Images in [-1, 1] to uint8 of the same shape."""
    return ((y + 1) * 127.5).round().clamp(0, 255).byte()


def ring_centres(modes, radius):
    """Centres of a ring's modes, [modes, 2], the first at the bottom (MLToolkit, src/Datasets/ring.jl)."""
    angle = 2 * math.pi * torch.arange(modes) / modes - math.pi / 2
    return radius * torch.stack([angle.cos(), angle.sin()], 1)


def draw_mixture(centres, std, n, rng):
    """n points [n, D] of an equal mixture of Gaussians N(centre, std^2 I), centres [modes, D]."""
    mode = torch.randint(len(centres), (n,), generator=rng, device=rng.device)
    return centres[mode] + std * normal_noise(n, centres.shape[1], rng)


def mode_coverage(y, centres, std, least=0.02):
    """Modes covered, an int, and the share of samples within 3 std of a mode, a float.

    y [N, D], centres [modes, D]. Covered means that the share `least` of all samples or more is within 3 std.
    """
    distance, mode = torch.cdist(y, centres).min(1)
    near = distance < 3 * std
    hits = torch.bincount(mode[near], minlength=len(centres)) / len(y)
    return int((hits >= least).sum()), float(near.float().mean())


SETS = {
    "mnist":   (torchvision.datasets.MNIST, (1, 28, 28)),
    "cifar10": (torchvision.datasets.CIFAR10, (3, 32, 32)),
}


def load_images(name, split, folder):
    """The images of FOLDER/NAME-SPLIT.npy as a uint8 tensor [N, C, H, W] that maps the file.

    name: a key of SETS; split: "train" or "test". A missing file is built from torchvision's download, with
    its labels in FOLDER/NAME-SPLIT-labels.npy, uint8 [N]. Exits with a message if that fails or the file is
    no such array.
    """
    path, (source, shape) = f"{folder}/{name}-{split}.npy", SETS[name]
    if not os.path.exists(path):
        print(f"{path} is not there: torchvision downloads {name}", flush=True)
        make_folder(folder)
        try:
            data = source(f"{folder}/torchvision", train=split == "train", download=True)
        except (OSError, RuntimeError) as error:
            with suppress(OSError):
                os.rmdir(f"{folder}/torchvision")       # if it is empty
            wanted = f"uint8 array [N, {', '.join(map(str, shape))}]"
            sys.exit(f"{path}: not there, and torchvision cannot download {name} ({first_line(error)})\n"
                     f"go online, put a {wanted} there, or name its folder with --data")
        images = np.asarray(data.data)                          # [N, H, W] or [N, H, W, C]
        images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
        with replacing(f"{folder}/{name}-{split}-labels.npy") as file:
            np.save(file, np.asarray(data.targets, np.uint8))
        with replacing(path) as file:
            np.save(file, np.ascontiguousarray(images))
    return read_array(path, shape)


def read_array(path, shape=(3, None, None)):
    """The uint8 array [N, *shape] of an .npy file, None for any size, as a tensor that maps the file.

    Exits with a message if the file holds no such array.
    """
    wanted = f"expected uint8 [N, {', '.join(str(s or 'any') for s in shape)}] with N of 2 or more"
    try:
        array = np.lib.format.open_memmap(path, "c")    # c: writable for torch, and the file stays as it is
    except (OSError, ValueError, EOFError) as error:
        sys.exit(f"{path}: no whole .npy file ({first_line(error)}), {wanted}; "
                 "copy it again, or delete it to have it built anew")
    fits = array.ndim == 4 and len(array) > 1 and all(s in (None, n) for s, n in zip(shape, array.shape[1:]))
    if array.dtype != np.uint8 or not fits:
        sys.exit(f"{path}: found {array.dtype} {list(array.shape)}, {wanted}")
    return torch.from_numpy(array)


def read_images(path):
    """Images to score as a uint8 tensor [N, 3, H, W].

    path: an .npy file of such an array, or a folder of .png and .jpg files of one size; exits with a message
    if neither.
    """
    if not os.path.isdir(path):
        return read_array(path)
    names = sorted(n for n in glob.glob(f"{path}/*") if n.lower().endswith((".png", ".jpg", ".jpeg")))
    images = []
    for name in names:
        try:
            images.append(pil_to_tensor(torchvision.datasets.folder.default_loader(name)))
        except OSError as error:
            sys.exit(f"{name}: no whole image ({first_line(error)}); replace or remove it")
    sizes = sorted({tuple(image.shape[1:]) for image in images})
    if len(images) < 2 or len(sizes) > 1:
        sys.exit(f"{path}: found {len(images)} .png and .jpg files, sizes {sizes}, expected two of one size")
    return torch.stack(images)


# ------------------------------------------------------------------------------------------------------------
# Scores: a feature network, and the distances between its features
# ------------------------------------------------------------------------------------------------------------


def load_features(path, device):
    """A feature network from a torch.export file: a function from uint8 [N, 3, H, W] to float32 [N, D].

    The program returns the features, or a tuple that begins with them. The attribute `name` is what its
    scores are called by: the file's name. Exits with a message if the file holds no such network.
    """
    wanted = "expected a torch.export file (.pt2) of a network from uint8 [N, 3, H, W] to features [N, D]"
    logging.disable(logging.WARNING)                # torch.export logs the traceback of what it raises
    try:
        program = torch.export.passes.move_to_device_pass(torch.export.load(path), str(device))
        network = program.module()
    except Exception as error:                      # whatever its reader stumbles over
        sys.exit(f"{path}: cannot be loaded ({first_line(error)}); {wanted}")
    finally:
        logging.disable(logging.NOTSET)

    @torch.no_grad()
    def features(images):
        before, torch.backends.cudnn.conv.fp32_precision = torch.backends.cudnn.conv.fp32_precision, "ieee"
        try:
            out = network(images)
        finally:
            torch.backends.cudnn.conv.fp32_precision = before
        return out if torch.is_tensor(out) else out[0]

    for n in (2, 3):            # a network exported without a dynamic batch takes one of them only
        images = torch.arange(n * 3072, dtype=torch.int32).byte().view(n, 3, 32, 32)
        try:
            found = features(images.to(device))
            finite = bool(found.isfinite().all())
        except Exception as error:
            sys.exit(f"{path}: fails on {n} images, uint8 [{n}, 3, 32, 32] ({first_line(error)}); {wanted}")
        if found.ndim != 2 or len(found) != n or not finite:
            sys.exit(f"{path}: features of {n} images have the shape {list(found.shape)} and are "
                     f"{'' if finite else 'not '}finite; {wanted}")
    features.name = os.path.basename(path).removesuffix(".pt2").removeprefix("features-")
    return features


def extract(features, images, device, batch=250):
    """Features [N, D] of uint8 images [N, 3, H, W], in float32 without TF32."""
    parts = images.tensor_split(math.ceil(len(images) / batch))      # nearly equal, never one image alone
    return torch.cat([features(part.to(device)) for part in parts])


def score(images, reference, features, device):
    """Distances of uint8 images [N, 3, H, W] to a reference's features [M, D], as a dict.

    fd: Frechet distance. kid, kid_std: KID, its std over subsets. features: the network's name. samples: N.
    reference: M.
    """
    found = extract(features, images, device)
    kid_mean, kid_std = kid(found, reference)
    return dict(fd=frechet_distance(found, reference), kid=kid_mean, kid_std=kid_std, features=features.name,
                samples=len(images), reference=len(reference))


def score_files(images, reference, features, device=None):
    """score() of paths: images and reference as read_images takes them, features a torch.export file."""
    device = setup(device)
    network = load_features(features, device)
    return score(read_images(images), extract(network, read_images(reference), device), network, device)


# ------------------------------------------------------------------------------------------------------------
# Running: an update is one CUDA graph, a run is a coroutine
# ------------------------------------------------------------------------------------------------------------


def setup(device):
    """The torch.device that --device names, None: cuda where there is one; exits with a message if it fails.

    Says the precision out loud: TF32 in convolutions, full float32 in matrix products, so in Gram matrices.
    """
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError(f"a device of type {device.type}")
    except (RuntimeError, AssertionError) as error:
        sys.exit(f"--device {name}: PyTorch {torch.__version__} cannot use it ({first_line(error)})\n"
                 "expected cpu, or cuda on a machine with a CUDA GPU")
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    return device


def first_line(error):
    """The first line of an exception's text, for messages."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:120]


def adam(network, lr, betas):
    """torch.optim.Adam; on a GPU fit for a CUDA graph, its rate a tensor that is changed by fill_ only."""
    device = next(network.parameters()).device
    cuda = device.type == "cuda"
    lr = torch.tensor(lr, device=device) if cuda else lr
    return torch.optim.Adam(network.parameters(), lr, betas, fused=cuda, capturable=cuda)


def descend(*players):
    """One step of each (optimizer, loss), every gradient taken before any step (GRAM, Algorithm 1)."""
    weights = [[p for group in optimizer.param_groups for p in group["params"]] for optimizer, _ in players]
    gradients = [torch.autograd.grad(loss, w, retain_graph=True) for (_, loss), w in zip(players, weights)]
    for (optimizer, _), w, gradient in zip(players, weights, gradients):
        for p, p_gradient in zip(w, gradient):
            p.grad = p_gradient
        optimizer.step()


def state_dicts(state):
    """A run's state {name: module, optimizer, Log or torch.Generator} as nested dicts of live tensors."""
    return {k: s.get_state() if isinstance(s, torch.Generator) else s.state_dict() for k, s in state.items()}


def tensors(tree, path=()):
    """All tensors in nested dicts and lists, by their paths."""
    if torch.is_tensor(tree):
        return {path: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return {p: t for key, value in items for p, t in tensors(value, (*path, key)).items()}


@contextmanager
def restoring(state):
    """Give every tensor of a run's state its value back, in place, when the block ends.

    What the block created becomes 0: moments and step counts of an optimizer that made its first step there.
    """
    before = {path: tensor.clone() for path, tensor in tensors(state_dicts(state)).items()}
    yield
    for path, tensor in tensors(state_dicts(state)).items():
        if isinstance(state[path[0]], torch.Generator):
            state[path[0]].set_state(before[path])
        elif path in before:
            tensor.copy_(before[path])
        else:
            tensor.zero_()


def capture(update, state):
    """update() as a function that replays it as one CUDA graph; on a CPU update itself.

    state: {name: module, optimizer, Log or torch.Generator}, all that update() changes; the first replay is
    the update that update() would have been. update() draws from these generators only, branches on no
    tensor, copies nothing to the host and always has the same shapes. Capture after load(), and under
    interleave, which sets the stream that the graph is captured and replayed on.
    """
    generators = [s for s in state.values() if isinstance(s, torch.Generator)]
    if all(generator.device.type == "cpu" for generator in generators):
        return update
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    with restoring(state):
        for _ in range(3):      # real updates, which set up libraries and the optimizers' state
            update()
        # A stream of its own: graphs captured on one stream share a workspace, and side by side turn to NaN.
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
            update()
    return graph.replay


def interleave(runs):
    """Advance generators in turn, each on a CUDA stream of its own, and return the list of what they return.

    A run that raises FloatingPointError ends alone and has the error for its result.
    """
    cuda = torch.cuda.is_initialized()
    streams = [torch.cuda.Stream() if cuda else None for _ in runs]
    if cuda:
        torch.cuda.synchronize()        # the streams are about to read what this one has written
    results, active = [None] * len(runs), list(range(len(runs)))
    while active:
        for i in list(active):
            try:
                with torch.cuda.stream(streams[i]):
                    next(runs[i])
                continue
            except StopIteration as end:
                results[i] = end.value
            except FloatingPointError as error:
                results[i] = error
            active.remove(i)
    return results


# ------------------------------------------------------------------------------------------------------------
# Keeping: folders, checkpoints, logs
# ------------------------------------------------------------------------------------------------------------


@contextmanager
def replacing(path):
    """A binary file that takes path's place when the block ends well; else path stays as it was."""
    try:
        with open(f"{path}.tmp", "wb") as file:
            yield file
        os.replace(f"{path}.tmp", path)
    except BaseException:
        if os.path.exists(f"{path}.tmp"):
            os.remove(f"{path}.tmp")
        raise


def write_json(path, value):
    """Write a value as JSON."""
    with replacing(path) as file:
        file.write((json.dumps(value, indent=1) + "\n").encode())


def make_folder(path):
    """Make a folder if need be and see that it can be written; exits with a message if not."""
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        sys.exit(f"{path}: not a folder that can be written ({error.strerror}); name another one")


def constants(namespace):
    """The UPPER_CASE numbers, strings and tuples of a script's globals(), as JSON gives them back."""
    kept = {k: v for k, v in namespace.items() if k.isupper() and isinstance(v, (int, float, str, tuple))}
    return json.loads(json.dumps(kept))


def open_runs(out, script, namespace, methods, seeds, resume, device):
    """Print a script's constants and make ready its runs' folders OUT/SCRIPT-METHOD-sSEED, sources copied in.

    script, namespace: the script's file and globals(), with METHODS; methods, seeds, resume: its flags.
    Returns for each run (method, seed, folder, settings), the settings being what its checkpoint has to agree
    with: one that does not exits with a message. Without resume an earlier run's folder is kept as
    FOLDER-old-N.
    """
    given = constants(namespace)
    show(**given, **machine(device))
    sources = {os.path.basename(path): open(path, "rb").read() for path in (script, __file__)}
    runs = []
    for method, seed in itertools.product(dict.fromkeys(methods), range(seeds)):
        folder = f"{out}/{os.path.basename(script).removesuffix('.py')}-{method}-s{seed}"
        settings = dict(given, method=method, row=namespace["METHODS"][method], seed=seed, device=device.type)
        runs.append((method, seed, folder, json.loads(json.dumps(settings))))
    for _, _, folder, settings in runs if resume else ():
        kept = read_checkpoint(folder, settings)
        done = "no checkpoint, begins" if kept is None else "goes on"
        print(f"{folder}: {done} at update {kept['step'] if kept else 0:,}")
    for _, _, folder, _ in runs:
        make_folder(folder)
        if os.path.exists(f"{folder}/checkpoint.pt") and not resume:
            old = next(o for n in itertools.count(1) if not os.path.exists(o := f"{folder}-old-{n}"))
            os.rename(folder, old)
            os.mkdir(folder)
            print(f"{folder} held an earlier run, which is now {old}; --resume would have gone on with it")
        for name, text in sources.items():
            with replacing(f"{folder}/{name}") as file:
                file.write(text)
    return runs


def save(folder, step, state, settings):
    """Write FOLDER/checkpoint.pt: a run's step, its state as in state_dicts, and its settings."""
    with replacing(f"{folder}/checkpoint.pt") as file:
        torch.save({"step": step, "settings": settings, "state": state_dicts(state)}, file)


def read_checkpoint(folder, settings):
    """FOLDER/checkpoint.pt as a dict or None; exits with a message if damaged or of other settings."""
    path = f"{folder}/checkpoint.pt"
    if not os.path.exists(path):
        return None
    try:
        kept = torch.load(path, map_location="cpu", weights_only=True)
        step, made = kept["step"], kept["settings"]
    except Exception as error:
        sys.exit(f"{path}: no whole checkpoint ({first_line(error)}); delete it to begin this run anew")
    for key in sorted(made.keys() | settings.keys()):
        if made.get(key) != settings.get(key):
            sys.exit(f"{path}: found a run of {step:,} updates with {key} = {made.get(key)}, expected "
                     f"{settings.get(key)}; set it back, or name another folder with --out")
    return kept


def load(folder, state, settings):
    """Bring a run's state to FOLDER/checkpoint.pt and return its step, 0 if absent; always before capture().

    An optimizer's load_state_dict swaps the tensors that a graph has burnt in. Exits as read_checkpoint does.
    """
    kept = read_checkpoint(folder, settings)
    if kept is None:
        return 0
    for name, s in state.items():
        (s.set_state if isinstance(s, torch.Generator) else s.load_state_dict)(kept["state"][name])
        for group in s.param_groups if isinstance(s, torch.optim.Optimizer) else ():
            if torch.is_tensor(group["lr"]):            # loaded to the CPU, and left there by load_state_dict
                group["lr"] = group["lr"].to(group["params"][0].device)
    return kept["step"]


class Log:
    """Means of a run's scalars over intervals: for each a row of FOLDER/log.csv and of the terminal.

    columns: names of the scalars that add() takes; steps: updates of the run in all, for the time left. They
    are summed on the device, inside the captured update, so a row costs one synchronisation. A row of the
    terminal has the means since the last one there, over as many rows of the file as there were.
    """

    def __init__(self, folder, columns, steps, device):
        self.path, self.name = f"{folder}/log.csv", os.path.basename(folder)
        self.columns, self.steps = columns, steps
        self.sums = torch.zeros(len(columns) + 1, device=device)        # the last one counts the updates
        self.zero, self.one = torch.tensor([0.0, 1.0], device=device)
        self.given, self.seconds, self.unshown = [], 0.0, np.zeros(len(columns) + 1)

    def state_dict(self):
        return {"sums": self.sums, "seconds": self.seconds}

    def load_state_dict(self, kept):
        self.sums.copy_(kept["sums"])
        self.seconds = kept["seconds"]

    def start(self, step):
        """Start the clock at an update, and the file with the rows that it has up to there."""
        rows = [["step", *self.columns, "seconds"]]
        if step and os.path.exists(self.path):
            with open(self.path, newline="") as file:
                whole = [row for row in list(csv.reader(file))[1:] if len(row) == len(rows[0])]
            rows += [row for row in whole if int(row[0]) <= step]
        with replacing(self.path) as file:
            file.write("".join(",".join(row) + "\n" for row in rows).encode())
        self.clock, self.shown = time.perf_counter(), (step, time.perf_counter())

    def add(self, *values):
        """Take in the scalars of an update, None for one that the method has not; no synchronisation."""
        self.given = [value is not None for value in values]
        self.sums += torch.stack([self.zero if v is None else v.detach() for v in values] + [self.one])

    def row(self, step, shown=True):
        """Write the means since the last row; raises FloatingPointError if one is not finite."""
        sums, now = np.array(self.sums.tolist()), time.perf_counter()
        self.sums.zero_()
        self.unshown += sums
        self.seconds, self.clock = self.seconds + now - self.clock, now
        means = self.means(sums)
        for name, mean in zip(self.columns, means):
            if mean is not None and not math.isfinite(mean):
                raise FloatingPointError(f"diverged at update {step:,}: {name} is {mean}")
        with open(self.path, "a") as file:
            values = ["" if mean is None else repr(mean) for mean in means]
            file.write(",".join([str(step), *values, f"{self.seconds:.2f}"]) + "\n")
        if shown:
            means = self.means(self.unshown)
            cells = [f"{'-' if mean is None else format(mean, '.4g'):>11}" for mean in means]
            rate = (step - self.shown[0]) / (now - self.shown[1])
            minutes, left = divmod(round((self.steps - step) / rate), 60)
            print(f"{self.name:<20}{step:>9,}{''.join(cells)}{rate:>11.1f}{minutes:>8}:{left:02}", flush=True)
            self.unshown[:], self.shown = 0, (step, now)

    def means(self, sums):
        """Means, as floats, from sums whose last one counts; None for a scalar that the method has not."""
        return [float(total / sums[-1]) if given else None for total, given in zip(sums, self.given)]


def log_head(columns):
    """The head of the rows that Log prints."""
    return f"{'run':<20}{'update':>9}{''.join(f'{c:>11}' for c in columns)}{'updates/s':>11}{'min left':>11}"


def read_log(folder):
    """The columns of FOLDER/log.csv as {name: float array}, NaN where the method has no such scalar."""
    with open(f"{folder}/log.csv", newline="") as file:
        head, *rows = csv.reader(file)
    return {name: np.array([float(row[i] or "nan") for row in rows]) for i, name in enumerate(head)}


# ------------------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------------------


def flags(doc, methods, default, steps, images):
    """The parser of a script's flags; a script adds its own to it.

    doc: its docstring; methods: its METHODS, default one of them; steps: its updates; images: with --data,
    --features.
    """
    def positive(text):
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number of 1 or more")
        return int(text)

    def folder(text):
        return text or "."

    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}; --help explains the flags\n")
    add = parser.add_argument
    add("--method", nargs="+", default=[default], choices=list(methods), metavar="NAME",
        help=f"one or more of {', '.join(methods)} (default {default})")
    add("--seeds", type=positive, default=1, metavar="N", help="train with seeds 0 to N-1 (default 1)")
    add("--steps", type=positive, default=steps, metavar="N", help=f"generator updates (default {steps:,})")
    add("--out", type=folder, default="runs", metavar="DIR", help="folder for the runs (default runs)")
    add("--resume", action="store_true", help="go on from the checkpoints of the runs")
    add("--device", metavar="NAME", help="cpu or cuda (default cuda where there is one)")
    if images:
        add("--data", type=folder, default="data", metavar="DIR", help="folder of the arrays (default data)")
        add("--features", metavar="FILE", help="network to score with: a torch.export file (.pt2) from uint8 "
                                               "[N, 3, H, W] to features [N, D]")
    return parser


def run(main):
    """Call a script's main(); Ctrl-C ends it in words."""
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped; with --resume the same command goes on from the last checkpoints, if there are any",
              file=sys.stderr)
        sys.exit(130)


def command(script, argv):
    """The command line of a script as a user types it; argv as main() got it."""
    return shlex.join(["python", os.path.basename(script), *(sys.argv[1:] if argv is None else argv)])


def machine(device):
    """What a result was made on, a dict: GPU or CPU, and the version of PyTorch."""
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} threads"
    return {"device": name, "torch": torch.__version__}


def show(**settings):
    """Print names and values in two columns."""
    cells = [f"{name:<12}{value}" for name, value in settings.items()]
    left, right = cells[:(len(cells) + 1) // 2], cells[(len(cells) + 1) // 2:]
    for a, b in itertools.zip_longest(left, right, fillvalue=""):
        print(f"{a:<{max(map(len, left)) + 4}}{b}".rstrip())


def table(head, rows):
    """A Markdown table with aligned columns as text: head a list of names, rows lists of as many strings."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths)) + " |" for line in lines)


def spread(values):
    """Mean ± standard deviation of values over seeds as text; the value of one, - of none."""
    if len(values) < 2:
        return f"{values[0]:.1f}" if values else "-"
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"


# ------------------------------------------------------------------------------------------------------------
# Figures
# ------------------------------------------------------------------------------------------------------------


def save_grid(path, images, columns=16):
    """Write images, uint8 [N, C, H, W], as one PNG with so many in a row."""
    grid = torchvision.utils.make_grid(images.cpu(), columns, padding=1)
    with replacing(path) as file:
        to_pil_image(grid).save(file, "PNG")


def save_figure(path, figure):
    """Write a matplotlib figure as a PNG."""
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=110)


def scatter_panel(axes, x, y, title):
    """A panel with data x in blue and samples y in orange, arrays [N, 2], to one scale."""
    for points, colour, label in ((x, "tab:blue", "data"), (y, "tab:orange", "samples")):
        axes.scatter(points[:, 0], points[:, 1], s=4, color=colour, alpha=0.5, linewidths=0, label=label)
    axes.set_title(title, fontsize=9)
    axes.set_aspect("equal", adjustable="datalim")
    axes.tick_params(labelsize=7)


def curve_panel(axes, steps, curves):
    """A panel of curves {label: array} over updates, with a log axis for the values."""
    for label, values in curves.items():
        axes.plot(steps, values, label=label, linewidth=1)
    axes.set_yscale("log")
    axes.set_xlabel("update", fontsize=8)
    axes.tick_params(labelsize=7)
