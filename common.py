"""What two scripts or more share: mathematics first, then networks, data, scores, running, keeping, figures.

Notation, the same in all files
    x ~ p   data [N, D]                    f   critic R^D -> R^K, a network or none
    y ~ q   samples y = g(z) [M, D]        g   generator, z its noise
    k       kernel, sigma its bandwidth    r   density ratio, one value a point
    h       features f(x) [N, K]           J   Jacobians of f at points [N, K, D]
    K_xx, K_xy, K_yy   Gram matrices of f(x) and f(y): stacks [S, N, M], a slice for each bandwidth
    [..., N, D]        any leading dimensions: the mathematics serves a stack of models as it serves one

A kernel compares two sets of points through the Gram matrices of all their pairs: the squared MMD is the
mean of K_xx plus that of K_yy minus twice that of K_xy; with a Gaussian kernel it is 0 if and only if p = q.
No fixed kernel sees enough of images, so a critic f maps them to R^K first. An adversarial critic maximises
the very MMD that the generator minimises, which is a saddle point. GRAM's critic maximises another quantity,
the divergence between p and q that the density ratio in its space shows.

"GRAM" is Generative Ratio Matching Networks, ICLR 2020; "Demystifying MMD GANs" Binkowski et al., ICLR 2018;
"GAMN" Generative Adversarial Mapping Networks, 2017; "Scaled MMD" On gradient regularizers for MMD GANs,
NeurIPS 2018. GRAM is three functions: gram, gram_objective (eq. 9), mmd2 (eq. 10).
"""
import argparse
import copy
import datetime
import difflib
import gc
import glob
import hashlib
import io
import itertools
import json
import logging
import math
import os
import shlex
import signal
import sys
import textwrap
import time
import warnings
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial

# A notebook's commands inherit the name of its backend, but not its package, without which the import fails.
BACKEND = "matplotlib" not in sys.modules and os.environ.pop("MPLBACKEND", "")

import matplotlib
import numpy as np
import torch
import torch.export.passes
import torch.fx
import torchvision
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.models.inception import BasicConv2d
from torchvision.transforms.functional import center_crop, pil_to_tensor, resize

if BACKEND:
    with suppress(ValueError):
        matplotlib.rcParams["backend"] = os.environ["MPLBACKEND"] = BACKEND
with suppress(ImportError):         # not on Windows
    import fcntl

# ---- Kernels -----------------------------------------------------------------------------------------------

def squared_distances(x, y):
    """|x_i - y_j|^2 for all pairs, never negative: [..., N, D] and [..., M, D] to [..., N, M].

    |x|^2 + |y|^2 - 2 x.y takes one matrix product, but in float32 it is wrong by 1e-7 |x|^2, which can exceed
    the ridge of density_ratio. So it is summed in float64 and rounded once.
    """
    x_2, y_2 = (t.double().square().sum(-1, keepdim=True) for t in (x, y))
    a = torch.cat([-2 * x.double(), x_2, torch.ones_like(x_2)], -1)
    b = torch.cat([y.double(), torch.ones_like(y_2), y_2], -1)
    return (a @ b.mT).to(x.dtype).clamp(min=0)


def gaussian(x, y, sigma):
    """Gaussian kernels exp(-|x_i - y_j|^2 / 2 sigma^2), a slice for each bandwidth (Li et al. 2017, sec. 3).

    x [..., N, D], y [..., M, D], sigma [S] in the units of x; returns [..., S, N, M]. The usual mixture is
    their sum.
    """
    return torch.exp(squared_distances(x, y)[..., None, :, :] * (-0.5 / sigma.square())[:, None, None])


def rational_quadratic(x, y, alpha):
    """Rational quadratic kernels (1 + |x_i - y_j|^2 / 2 alpha)^-alpha, a slice for each alpha.

    x [..., N, D], y [..., M, D], alpha [S]; returns [..., S, N, M] (Binkowski et al. 2018, eq. 6).
    """
    d_2, alpha = squared_distances(x, y)[..., None, :, :], alpha[:, None, None]
    return (1 + d_2 / (2 * alpha)) ** -alpha


def dot(x, y):
    """Linear kernel x_i.y_j, [..., N, D] and [..., M, D] to [..., 1, N, M]: its MMD compares means."""
    return (x @ y.mT).unsqueeze(-3)


def euclidean(x):
    """|x|, [..., D] to [...], all of whose derivatives at 0 are 0: torch's second ones there are NaN."""
    squares = x.square().sum(-1)
    zero = squares == 0
    return squares.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)


def distance(x, y):
    """Distance kernel (|x_i| + |y_j| - |x_i - y_j|) / 2, [..., N, D] and [..., M, D] to [..., 1, N, M].

    Its squared MMD is the energy distance (Binkowski et al. 2018, eq. 7, 8; its code lacks the half).
    """
    between, to_x, to_y = euclidean(x[..., :, None, :] - y[..., None, :, :]), euclidean(x), euclidean(y)
    return ((to_x[..., :, None] + to_y[..., None, :] - between) / 2).unsqueeze(-3)


def cubic(x, y):
    """KID's kernel (x_i.y_j / D + 1)^3 (Binkowski et al. 2018, section 4): [N, D], [M, D] to [N, M]."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def gram(kernel, x, y):
    """The three Gram matrices of two sets, from one evaluation of a kernel on both (GRAM, Algorithm 1).

    x [..., N, D], y [..., M, D]; kernel from two sets of sizes n and m to [..., S, n, m]. Returns K_xx
    [..., S, N, N], K_xy [..., S, N, M], K_yy [..., S, M, M]. The origin is the mean of all points, as float32
    has few digits far from it (Binkowski et al. 2018, footnote 19); no MMD depends on it, but KID's kernel.
    """
    pooled, sizes = torch.cat([x, y], -2), [x.shape[-2], y.shape[-2]]
    pooled = pooled - pooled.mean(-2, keepdim=True).detach()
    rows_x, rows_y = kernel(pooled, pooled).split(sizes, -2)    # split, not slices: fewer launches backwards
    K_xx, K_xy = rows_x.split(sizes, -1)
    _, K_yy = rows_y.split(sizes, -1)
    return K_xx, K_xy, K_yy


# ---- Maximum mean discrepancy ------------------------------------------------------------------------------

def mmd2(K_xx, K_xy, K_yy, unbiased=False):
    """Squared MMD under the sum of the kernels in the stack: [...].

    K_xx [..., S, N, N], K_xy [..., S, N, M], K_yy [..., S, M, M]. Biased (GRAM, eq. 2 and 10): means over all
    pairs, never negative but for rounding. Unbiased (Gretton et al. 2012, eq. 3): no point is paired with
    itself, and the mean over draws is zero if p = q.
    """
    def within(K):
        if not unbiased:
            return K.mean((-2, -1))
        n = K.shape[-1]
        return (K.sum((-2, -1)) - K.diagonal(dim1=-2, dim2=-1).sum(-1)) / (n * (n - 1))

    return (within(K_xx) + within(K_yy) - 2 * K_xy.mean((-2, -1))).sum(-1)


def mmd(K_xx, K_xy, K_yy):
    """Biased MMD, not squared: sqrt(mmd2 + 1e-6), whose gradient is finite where the two sets are equal.

    JuliaGRAM 44159b2 has this 1e-6; in later code the slope at 0 is infinite.
    """
    return (mmd2(K_xx, K_xy, K_yy).clamp(min=0) + 1e-6).sqrt()


def as_points(least, *sets):
    """Tensors, arrays or lists [N, D] of `least` points or more, in float64, around the last two's median."""
    sets = [s.detach().double() if torch.is_tensor(s) else torch.tensor(np.asarray(s, float)) for s in sets]
    if not all(s.ndim == 2 and len(s) >= least and s.shape[1:] == sets[0].shape[1:] and s.isfinite().all()
               for s in sets):
        shapes = ", ".join(str(list(s.shape)) for s in sets)
        raise ValueError(f"found {shapes}, expected [N, D] of one D, {least} or more points, all finite")
    median = torch.cat(sets[-2:]).median(0).values          # far from a far point there are few digits
    return [s - median for s in sets]


def two_sample_test(x, y, kernel=None, permutations=1000, seed=0):
    """Squared unbiased MMD of x [N, D] and y [M, D], and the p-value of "they have one law": two floats.

    x, y: as as_points takes them; kernel: as in gram, without it Gaussian, its bandwidth the median of the
    positive distances between pooled points. p is (1 + the number of permutations of the pooled points whose
    MMD is as large or larger) / (1 + permutations), from one Gram matrix (Gretton et al. 2012, section 5).
    """
    x, y = as_points(2, x, y)
    pooled, N, M, rng = torch.cat([x, y]), len(x), len(y), torch.Generator().manual_seed(seed)
    if kernel is None:
        pooled = pooled / (pooled.abs().max() or 1)
        apart = torch.pdist(pooled)
        median = apart[apart > 0].median() if apart.any() else apart.new_ones(())
        kernel = partial(gaussian, sigma=median[None])
    K = kernel(pooled, pooled).sum(0).fill_diagonal_(0)
    if not K.isfinite().all():
        raise ValueError("found a kernel that is not finite at these points, expected points nearer to 1")
    in_x = (torch.arange(N + M) < N).double().to(K)                 # 1 for points of x, 0 for those of y
    orders = [in_x, *(in_x[torch.randperm(N + M, generator=rng)] for _ in range(permutations))]
    Z = torch.stack(orders)                                         # [1 + permutations, N + M]
    K_xx, K_x = ((Z @ K) * Z).sum(1), Z @ K.sum(1)
    K_xy, K_yy = K_x - K_xx, K.sum() - 2 * K_x + K_xx
    squared = K_xx / (N * (N - 1)) + K_yy / (M * (M - 1)) - 2 * K_xy / (N * M)
    as_large = squared >= squared[0] - 1e-12 * K.abs().max()        # but for rounding; the first is its own 1
    return float(squared[0]), float(as_large.double().mean())


# ---- Density ratios, and GRAM's critic ---------------------------------------------------------------------

def density_ratio(K_qq, K_qp, ridge):
    """Density ratio r = p / q at q's points: density_ratio(K_yy, K_xy.mT, ridge) of gram's (GRAM, eq. 8).

    K_qq [..., S, M, M], K_qp [..., S, M, N], a row for each point of q; returns r [..., M], the mean over
    bandwidths, by kernel mean matching: (K_qq + ridge I) r = (M / N) K_qp 1; NaN where that matrix is not
    positive definite. The paper prints no M / N (it has M = N) and no ridge: JuliaGRAM adds 1e-3
    (src/kmm.jl), GRAMFlow nothing. With one, r are the values at y of the function w that minimises
    mean(w(y)^2) / 2 - mean(w(x)) + ridge / (2 M) |w|^2 (KuLSIF; Kanamori et al. 2012), and mean(r^2) is at
    most M / (4 ridge) if k(x, x) = 1.

    Solved in float64, since the condition number reaches M / ridge. P = A^-1 and r_0 = P b are constants, and
    r = r_0 + P (b - A r_0) has the first derivative of the solution, dr = P (db - dA r).
    """
    M, N = K_qp.shape[-2:]
    eye = torch.eye(M, dtype=torch.float64, device=K_qq.device)
    A = K_qq.double() + ridge * eye
    b = K_qp.double().sum(-1, keepdim=True) * (M / N)                   # [..., S, M, 1]
    with torch.no_grad():
        L, info = torch.linalg.cholesky_ex(A)       # solve_ex of many matrices fails in a CUDA graph
        L_inverse = torch.linalg.solve_triangular(L, eye.expand_as(L), upper=False)
        P = (L_inverse.mT @ L_inverse).where(info[..., None, None] == 0, torch.nan)
        r_0 = P @ b
    return (r_0 + P @ (b - A @ r_0)).squeeze(-1).mean(-2).to(K_qq.dtype)


def ratio_at(points, x, y, sigma, ridge):
    """Density ratio p / q of x ~ p to y ~ q at other points, by density_ratio's function w: [T] in float64.

    points [T, D], x [N, D], y [M, D]: as as_points takes them; Gaussian kernels of bandwidth sigma, a number
    or several, whose ratios are averaged. w minimises what density_ratio says, so ridge w(t) = (M / N) sum_j
    k(t, x_j) - sum_i r_i k(t, y_i) with r_i = w(y_i). It can be negative, and is 0 far from all points. Its
    error depends on ridge, from 1e-6 on; one that is right for M points is twice that for 2 M.
    """
    (t, x, y), found = as_points(1, points, x, y), []
    sigma = torch.as_tensor(sigma, dtype=torch.float64, device=x.device).reshape(-1, 1)
    if not (1e-6 <= ridge < math.inf and len(sigma) and all(0 < s < math.inf for s in sigma)):
        raise ValueError(f"ridge {ridge}, sigma {sigma.tolist()}: expected 1e-6 or more, and more than 0")
    for s in sigma:
        r = density_ratio(gaussian(y, y, s), gaussian(y, x, s), ridge)
        found.append((gaussian(t, x, s)[0].mean(1) * len(y) - gaussian(t, y, s)[0] @ r) / ridge)
    return torch.stack(found).mean(0)


def condition(K, ridge):
    """The largest condition number of K + ridge I, which density_ratio inverts, over kernels K [S, N, N]."""
    values = torch.linalg.eigvalsh(K.double().cpu()) + ridge
    return float((values[:, -1] / values[:, 0]).max())


def pearson(r):
    """Estimate mean((r - 1)^2) of the Pearson divergence from r = p / q at samples of q (GRAM, eq. 7).

    r [..., N], returns [...]. Fitted to the same points it is no lower bound: a critic raises it by spreading
    its features over many bandwidths (results/rings.md). r = q / p at data: p and q are exchanged.
    """
    return (r - 1).square().mean(-1)


FORMS = ("sum", "mean", "clip", "square", "swap", "flow")      # of gram_objective
AT_DATA = ("swap", "flow")      # those whose ratio stands at the data: they invert K_xx


def gram_objective(K_xx, K_xy, K_yy, form, ridge, lam):
    """What GRAM's critic maximises, and the ratio that it is made of: ([...], r).

    form    objective                   r             source
    sum     pearson(r) + lam sum(r)     p / q at y    GRAM, eq. 9, lam = 1; JuliaGRAM since 7e6da00
    mean    pearson(r) + lam mean(r)    p / q at y    JuliaGRAM 441596b, the "camera ready" code
    clip    pearson(max(r, 0))          p / q at y    GRAM, footnote 3; JuliaGRAM 44159b2
    square  mean(r^2) - 1               p / q at y    GRAM's slides; it is pearson(r) if mean(r) = 1
    swap    pearson(r) + lam sum(r)     q / p at x    GRAM, eq. 9 with p and q exchanged; ours, for images
    flow    mean(r)                     q / p at x    GRAMFlow.ipynb, the authors' code for CIFAR-10

    E_q[p / q] = E_p[q / p] = 1 for EVERY critic: sum(r) and mean(r) estimate a constant. They teach through
    what the finite sample does to the estimate: the mean of r at y is near 0 where x is far from y, above 1
    where x is in the middle of y. So "sum" and "mean" spread the samples around the data, and the generator
    draws them together; "swap" and "flow" spread the data around the samples, and the generator spreads them.
    pearson(r) can be raised by variance. Where K_xy is 0 so is r, the dead end of "clip". Raises ValueError.
    """
    r = density_ratio(K_xx, K_xy, ridge) if form in AT_DATA else density_ratio(K_yy, K_xy.mT, ridge)
    r = r.clamp(min=0) if form == "clip" else r
    match form:
        case "sum" | "swap": objective = pearson(r) + lam * r.sum(-1)
        case "mean": objective = pearson(r) + lam * r.mean(-1)
        case "clip": objective = pearson(r)
        case "square": objective = r.square().mean(-1) - 1
        case "flow": objective = r.mean(-1)
        case _: raise ValueError(f"form {form!r}: expected {', '.join(FORMS)}")
    return objective, r


# ---- GAN ---------------------------------------------------------------------------------------------------

def gan_critic(d_x, d_y):
    """A discriminator's loss, mean(-log s(d_x)) + mean(-log(1 - s(d_y))), s the logistic function: [...].

    Logits d_x [..., N, 1] of data, d_y [..., M, 1] of samples (Goodfellow et al. 2014, eq. 1; JuliaGRAM takes
    half of it).
    """
    return F.softplus(-d_x).mean((-2, -1)) + F.softplus(d_y).mean((-2, -1))


def gan_generator(d_y):
    """A generator's non-saturating loss, mean(-log s(d_y)), s the logistic function: [...].

    Logits d_y [..., M, 1] of samples (Goodfellow et al. 2014, section 3).
    """
    return F.softplus(-d_y).mean((-2, -1))


# ---- Adversarial critics -----------------------------------------------------------------------------------
# The critic maximises the distance that the generator minimises, so something has to hold it: clipped
# weights, an autoencoder, a penalty on its slope or on its weights.

def witness(kernel, t, x, y):
    """The MMD's witness mean_j k(t, x_j) - mean_j k(t, y_j), summed over kernels, at points t: [..., T].

    kernel as in gram; t [..., T, D], x [..., N, D], y [..., M, D]. Up to a factor and a constant it is the
    best critic in the kernel's space (Gretton et al. 2012, section 2.3; Scaled MMD, below eq. 1).
    """
    pooled = torch.cat([x, y], -2)
    centre = pooled.mean(-2, keepdim=True).detach()             # see gram
    K_x, K_y = kernel(t - centre, pooled - centre).split([x.shape[-2], y.shape[-2]], -1)
    return (K_x.mean(-1) - K_y.mean(-1)).sum(-2)


def wasserstein(f_x, f_y):
    """The mean of f over data minus its mean over samples, [..., N, 1] and [..., M, 1] to [...].

    Wasserstein's distance, if f is the best 1-Lipschitz function (Arjovsky et al. 2017, eq. 2).
    """
    return f_x.mean((-2, -1)) - f_y.mean((-2, -1))


def cramer_witness(t, y):
    """E |t - y| - |t| at points t [..., T, D] for samples y [..., M, D]: [..., T].

    Binkowski et al. 2018, eq. 9. Up to a constant it is -2 E k(t, y) with the distance kernel k.
    """
    to_y = euclidean(y).mean(-1, keepdim=True)
    return to_y - 2 * distance(t, y).squeeze(-3).mean(-1)


def cramer(h_x, h_y):
    """What the Cramer GAN's critic maximises, E f(x) - E f(y) with f = cramer_witness: [...].

    h_x [..., N, D] of data, h_y [..., M, D] of samples; no sample is its own y. This is minus eq. 10 of
    Binkowski et al. 2018. Its generator minimises the energy distance, mmd2 under `distance`.
    """
    M = h_y.shape[-2]
    apart = euclidean(h_y[..., :, None, :] - h_y[..., None, :, :]).sum((-2, -1))
    own = apart / (M * (M - 1)) - euclidean(h_y).mean(-1)
    return cramer_witness(h_x, h_y).mean(-1) - own


def feasible_set(h_x, h_y):
    """Li et al.'s feasible set reduction, mean over outputs of min(E f(x) - E f(y), 0): [..., N, K] to [...].

    The critic's objective and the generator's loss both have it with a plus (Li et al. 2017, section 3;
    OctoberChang/MMD-GAN, mmd_gan.py). JuliaGRAM's ring code has x and y exchanged.
    """
    return (h_x.mean(-2) - h_y.mean(-2)).clamp(max=0).mean(-1)


def reconstruction(x, x_hat):
    """Mean squared error of an autoencoder, the mean over points and coordinates: [..., N, D] to [...].

    It keeps MMD-GAN's critic injective, at data and at samples (Li et al. 2017, section 3).
    """
    return (x - x_hat).square().mean((-2, -1))


@torch.no_grad()
def clip_weights(network, bound):
    """Clip all weights of a network to [-bound, bound], in place (Arjovsky et al. 2017, Algorithm 1)."""
    for p in network.parameters():
        p.clamp_(-bound, bound)


def jacobian(h, back):
    """Jacobians [N, K, D] of f at the first N points of pullback(f, points), where f is h [N, K]."""
    outputs = torch.eye(h.shape[1], dtype=h.dtype, device=h.device)
    return torch.stack([back(u.expand_as(h), slice(len(h))).flatten(1) for u in outputs], 1)


AXES = {"image": (-3, -2, -1), "columns": -2, "pixels": -3}     # of gradient_penalty, by the names rows use


def gradient_penalty(slope, axis=-1):
    """(|grad s| - 1)^2, whose mean over points between data and samples the critic minimises.

    slope: grad s at a x + (1 - a) y, a ~ U[0, 1] one a point: [..., D] of points, [..., C, H, W] of images. s
    is f itself (WGAN-GP, Gulrajani et al. 2017, eq. 3), the sum of its outputs (GAMN, eq. 7, with the sign
    that would raise it), or the witness (Demystifying MMD GANs, section 2.2).

    axis: of the norm. In released code it is -2, columns, in mbinkowski/MMD-GAN, gan/core/model.py, and -3,
    pixels, in Scaled-MMD-GAN: an image of n such lines, each with a slope of 1, has a slope of sqrt(n).
    """
    return (torch.linalg.vector_norm(slope, dim=axis) - 1).square()


def activation_penalty(outputs):
    """Sum over a critic's layers of the mean square of their outputs, over data plus over samples: a scalar.

    outputs: of pullback, [2 N, ...] (Binkowski et al. 2018, footnote 19; mbinkowski/MMD-GAN, model.py).
    """
    return 2 * sum(h.square().mean() for h in outputs)


def weight_penalty(network, kind):
    """Sum of absolute values, l1, or squares, l2, of norms' weights, l2-all of all (GAMN, eq. 9, eq. 8)."""
    norms = nn.LayerNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d
    layers = network.modules() if kind == "l2-all" else (m for m in network.modules() if isinstance(m, norms))
    weights = [p for layer in layers for p in layer.parameters(recurse=False)]
    return sum(p.abs().sum() if kind == "l1" else p.square().sum() for p in weights)


# ---- Scaled MMD: the critic's slope in closed form. k(x, y) = exp(-|f(x) - f(y)|^2 / 2) throughout --------

def smmd2(mmd2, J, coefficient, constant=1.0):
    """Squared scaled MMD, mmd2 / (constant + coefficient E|grad f(x)|^2): [...]; mmd2 under unit_gaussian.

    J [..., N, K, D]: Jacobians of f at data. Section 4 has 1 and 10, Proposition 5 lam + k(x, x) and 1.
    """
    return mmd2 / (constant + coefficient * J.square().sum((-2, -1)).mean(-1))


def swgan(f_x, f_y, J, coefficient):
    """wasserstein(f_x, f_y) / sqrt(1 + coefficient (E f(x)^2 + E|grad f(x)|^2)): [...].

    The scaled MMD with a linear kernel, not squared (Scaled MMD, section 4, with 10, and appendix C). f_x
    [..., N, 1] and J [..., N, 1, D], values and Jacobians at data; f_y [..., M, 1] values at samples.
    """
    squares = f_x.square().sum(-1) + J.square().sum((-2, -1))
    return wasserstein(f_x, f_y) / (1 + coefficient * squares.mean(-1)).sqrt()


def sobolev(f_x, f_y, J, multiplier, rho):
    """What the Sobolev GAN's critic maximises, and how far E|grad f(x)|^2 is above 1, Omega: ([...], [...]).

    wasserstein - multiplier Omega - rho / 2 Omega^2; the multiplier grows by rho Omega at each step (Mroueh
    et al. 2018, Algorithm 1, mu = P as in Scaled MMD, section 4; the released code has mu = (P + Q) / 2 and
    never moves it). Arguments as in swgan.
    """
    omega = J.square().sum((-2, -1)).mean(-1) - 1
    return wasserstein(f_x, f_y) - multiplier * omega - rho / 2 * omega.square(), omega


class Gain(nn.Module):
    """A weight times a number that is learned, 1 at first."""

    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(()))

    def forward(self, weight):
        return self.gamma * weight


def spectral(network, learned):
    """The network with W = gamma W / |W| for its layers' weights as [out, in kh kw], |W| the spectral norm.

    gamma is 1, or learned, one a layer (Miyato et al. 2018; Scaled MMD, section 3.2). Each use of a weight in
    training is a power iteration, but for parametrize.cached().
    """
    for layer in list(network.modules()):
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.utils.parametrizations.spectral_norm(layer)
            if learned:
                parametrize.register_parametrization(layer, "weight", Gain())
    return network


@torch.no_grad()
def singular_values(network):
    """The singular values of each layer's weight, [out, in kh kw] as a matrix (Scaled MMD, Figures 2b, 7)."""
    training = network.training
    network.eval()              # no power iteration of a spectral norm
    found = [torch.linalg.svdvals(layer.weight.flatten(1)).cpu() for layer in network.modules()
             if isinstance(layer, (nn.Conv2d, nn.Linear))]
    network.train(training)
    return found


def unit_gaussian(x, y):
    """The kernel of this section, [..., N, D] and [..., M, D] to [..., 1, N, M]."""
    return gaussian(x, y, x.new_ones(1))


def kernel_jet(a, b):
    """The unit Gaussian kernel k with its first derivatives: a [..., N, K], b [..., M, K], see below.

    Returns [..., N, 1 + K, M, 1 + K]: entry [n, 0, m, 0] is k(a_n, b_m), [n, i, m, 0] its derivative in
    coordinate i of a_n, [n, 0, m, j] in coordinate j of b_m, [n, i, m, j] in both.
    """
    w = a[..., :, None, :] - b[..., None, :, :]                                         # [..., N, M, K]
    k = (-0.5 * w.square().sum(-1)).exp()
    one, identity = torch.ones_like(w[..., :1]), torch.eye(w.shape[-1], dtype=w.dtype, device=w.device)
    mixed = F.pad(identity, (1, 0, 1, 0))                                               # 0 for k itself
    in_a, in_b = torch.cat([one, -w], -1), torch.cat([one, w], -1)                      # [..., N, M, 1 + K]
    jet = k[..., None, None] * (in_a[..., :, None] * in_b[..., None, :] + mixed)
    return jet.transpose(-3, -2)


def gradient_constrained_mmd2(h_x, h_y, h_m, J, lam):
    """Squared gradient-constrained MMD, exact, and its critic (Scaled MMD, Propositions 3 and 4).

    h_x [..., N, K], h_y [..., M', K] features of data and samples; h_m [..., M, K] and J [..., M, K, D]
    features and Jacobians at the points of mu, which are the data in the paper. Returns the square [...] and
    the function from features h_t [..., T, K] to the values [..., T] of the critic that is so held.

    With delta = [eta; grad eta], eta the witness, at the points of mu, G their M (1 + D) Gram matrix of
    values and derivatives, and c = M lam, the paper has the square (MMD^2 - delta^T (G + c I)^-1 delta) /
    lam. k has its derivatives through f: delta = B a and G = B A B^T, where a and A are the same in the
    K-dimensional space of features, and B is block diagonal with blocks 1 and J_m^T. As
    B^T (B A B^T + c I)^-1 B = (W A + c I)^-1 W with W = B^T B, the M (1 + D) system is one of M (1 + K),
    without any approximation. Proposition 4 lacks the 1 / M of mu, its proof has it.
    """
    M = h_m.shape[-2]
    A = kernel_jet(h_m, h_m).flatten(-2)                                    # [..., M, 1 + K, M (1 + K)]
    a = (kernel_jet(h_m, h_x)[..., 0].mean(-1)
         - kernel_jet(h_m, h_y)[..., 0].mean(-1))                           # [..., M, 1 + K]
    W = F.pad(J @ J.mT, (1, 0, 1, 0))                                       # [..., M, 1 + K, 1 + K]
    W[..., 0, 0] = 1
    WA, Wa = (W @ A).flatten(-3, -2), (W @ a[..., None]).flatten(-3, -2)
    identity = torch.eye(WA.shape[-1], dtype=WA.dtype, device=WA.device)
    u = torch.linalg.solve_ex(WA + M * lam * identity, Wa).result           # [..., M (1 + K), 1]

    def critic(h_t):
        eta = witness(unit_gaussian, h_t, h_x, h_y)
        return (eta - (kernel_jet(h_m, h_t)[..., 0].flatten(-3, -2) * u).sum(-2)) / lam

    return (mmd2(*gram(unit_gaussian, h_x, h_y)) - (a.flatten(-2) * u.squeeze(-1)).sum(-1)) / lam, critic


@contextmanager
def frozen(network):
    """What the block computes has no gradient in a network's weights; the network may be None."""
    weights = [p for p in network.parameters() if p.requires_grad] if network else []
    for p in weights:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in weights:
            p.requires_grad_(True)


# ---- Distances between sets of features, in float64 --------------------------------------------------------

def covariance_root(covariance):
    """A root F of a covariance F^T F, [D, D] to [D, D]; its negative eigenvalues, of rounding, become 0."""
    values, vectors = torch.linalg.eigh(covariance)
    return values.clamp(min=0).sqrt()[:, None] * vectors.T


def gaussian_fit(x):
    """Mean [D] of features [N, D] and a root F of their covariance F^T F, [R, D], both in float64.

    F is the covariance's own root up to a rotation, or the centred features where N <= D.
    """
    if len(x) <= x.shape[1]:
        x = x.double()
        return x.mean(0), (x - x.mean(0)) / (len(x) - 1) ** 0.5
    centre, total, square = x[:4096].double().mean(0), 0, 0
    for part in x.split(4096):
        part = part.double() - centre
        total, square = total + part.sum(0), square + part.T @ part
    shift = total / len(x)
    return centre + shift, covariance_root((square - len(x) * shift.outer(shift)) / (len(x) - 1))


def frechet_distance(a, b):
    """Frechet distance of two Gaussians, each (mean, root) as gaussian_fit returns them; a float.

    |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^1/2) (Heusel et al. 2017). For any roots S = F^T F the last
    trace is the nuclear norm of F_a F_b^T. Biased: compare at equal N only.
    """
    (m_a, F_a), (m_b, F_b) = a, b
    driver = "gesvd" if F_a.is_cuda else None       # its default, Jacobi's, takes 1.6 times as long there
    overlap = torch.linalg.svdvals(F_a @ F_b.T, driver=driver).sum()
    return float((m_a - m_b).square().sum() + F_a.square().sum() + F_b.square().sum() - 2 * overlap)


def bootstrap(x, statistic, resamplings=10):
    """Mean and std of statistic() of as many points as x [N, D] has, drawn from it with replacement.

    The protocol of Binkowski et al. 2018, section 5; of N draws 63 % differ, so that distances are too large.
    """
    rng = torch.Generator().manual_seed(0)
    draws = (take(x, torch.randint(len(x), (len(x),), generator=rng)) for _ in range(resamplings))
    values = [statistic(draw) for draw in draws]
    return float(np.mean(values)), float(np.std(values))


def kid(a, b, subsets=100, size=1000, seed=0):
    """KID of two sets of features [N, D] and [M, D]: unbiased squared MMD under (a.b / D + 1)^3; (mean, std).

    Mean and std over random subsets, drawn without replacement, of `size` or as many as the smaller set has;
    the std is of one subset, not of the mean, and None where subsets are all of a set. Unbiased, so never
    clamped (Binkowski et al. 2018, section 4).
    """
    size, rng = min(size, len(a), len(b)), torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets if size < max(len(a), len(b)) else 1):
        u, v = (take(s, torch.randperm(len(s), generator=rng)[:size]).double() for s in (a, b))
        values.append(mmd2(cubic(u, u), cubic(u, v), cubic(v, v), unbiased=True))
    values = torch.stack(values)
    return float(values.mean()), float(values.std(correction=0)) if size < min(len(a), len(b)) else None


def similarity(K_xy, K_yy):
    """A sample's squared MMD to x but for x's own part, and what comparing it needs: (u, variance, rows).

    K_xy and K_yy [m, m] in float64, points paired by index. u: the mean over i != j of h_ij = k(y_i, y_j) -
    k(x_i, y_j) - k(x_j, y_i). variance: the unbiased estimate of its variance, (4 (m - 2) zeta_1 + 2 zeta_2)
    / (m (m - 1)), zeta_1 = E h_12 h_13 - E h_12 h_34, zeta_2 = E h_12^2 - E h_12 h_34 (Hoeffding 1948). rows
    [m]: the mean of k(x_i, y_j) over j.
    """
    m = len(K_xy)
    h = (K_yy - K_xy - K_xy.T).fill_diagonal_(0)
    total, squares, rows = h.sum(), h.square().sum(), h.sum(1).square().sum()
    pairs, triples = m * (m - 1), m * (m - 1) * (m - 2)
    h_12_13 = (rows - squares) / triples
    h_12_34 = (total.square() - 4 * rows + 2 * squares) / (triples * (m - 3))
    variance = (4 * (m - 2) * (h_12_13 - h_12_34) + 2 * (squares / pairs - h_12_34)) / pairs
    return total / pairs, variance, K_xy.mean(1)


def relative_similarity(old, new):
    """The three-sample test: p-value of "the new sample is no nearer to x than the old", of two similarity().

    Bounliphone et al. 2016: u_old - u_new is normal with the variance var_old + var_new - (8 / m)
    cov_x(E k(x, y_old), E k(x, y_new)). Where its estimate is not positive nothing is known, and p is 1 / 2.
    """
    (u_old, var_old, rows_old), (u_new, var_new, rows_new) = old, new
    covariance = ((rows_old - rows_old.mean()) * (rows_new - rows_new.mean())).sum() / (len(rows_old) - 1)
    variance = float(var_old + var_new - 2 * 4 / len(rows_old) * covariance)
    return 0.5 * math.erfc(float(u_old - u_new) / math.sqrt(2 * variance)) if variance > 0 else 0.5


def inception_score(logits, splits=None, seed=0):
    """Inception score exp(E KL(p(label | image) | p(label))) of logits [N, C]: mean and std over the splits.

    In a random order, as torch-fidelity has them (Salimans et al. 2016, section 4). splits: 10, fewer where
    they would have less than 100 images, whose number bounds the score; the std of one split is None.
    """
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed))
    values = []
    for part in take(logits, order).tensor_split(splits or max(1, min(10, len(logits) // 100))):
        part = part.double().log_softmax(1)
        marginal = part.logsumexp(0) - math.log(len(part))
        values.append((part.exp() * (part - marginal)).sum(1).mean().exp())
    values = torch.stack(values)
    return float(values.mean()), float(values.std(correction=0)) if len(values) > 1 else None


# ---- Networks ----------------------------------------------------------------------------------------------

def mlp(*sizes, norm=None):
    """Linear layers of the given sizes with ReLU between them; norm: from a width to what is before each."""
    layers = [nn.Linear(sizes[0], sizes[1])]
    for a, b in zip(sizes[1:], sizes[2:]):
        layers += [*([norm(a)] if norm else []), nn.ReLU(), nn.Linear(a, b)]
    return nn.Sequential(*layers)


class Layers(nn.Sequential):
    """Layers one after another; of several sets at once, each batch norm by the statistics of every set.

    [N S, ...] for S sets, as torch.stack(sets, 1).flatten(0, 1) puts them. bfloat16: whether all layers but
    the last compute in it.
    """

    bfloat16 = False

    def precision(self, x):
        for layer in self.modules() if self.bfloat16 else ():
            if parametrize.is_parametrized(layer):
                layer.weight                    # spectral norms are found in float32, and cached
        return torch.autocast(x.device.type, torch.bfloat16, enabled=self.bfloat16)

    def forward(self, x, sets=1):
        *layers, last = self
        with self.precision(x):
            for layer in layers:
                if sets > 1 and isinstance(layer, nn.BatchNorm2d):  # the sets' channels side by side: no copy
                    n, c, *size = x.shape
                    weight, bias = layer.weight.repeat(sets), layer.bias.repeat(sets)
                    x = x.view(n // sets, sets * c, *size)
                    x = F.batch_norm(x, None, None, weight, bias, True, eps=layer.eps).view(n, c, *size)
                else:
                    x = layer(x)
        return last(x.float() if self.bfloat16 else x)


def both(f, x, y):
    """f(x) and f(y), of Layers in one pass, which takes half of the kernels: x and y have one shape.

    Without f the points themselves, images [..., C, H, W] as [..., C H W].
    """
    if f is None:
        return (x.flatten(-3), y.flatten(-3)) if x.ndim > 3 else (x, y)
    if not isinstance(f, Layers):
        return f(x), f(y)
    return f(torch.stack([x, y], 1).flatten(0, 1), 2).unflatten(0, (-1, 2)).unbind(1)


def pullback(layer, x, outputs=None):
    """layer(x) = h, and the walk back through it: from u, the gradient of a scalar in h, to that in x.

    layer: Layers, or one of theirs; x [N, ...]. back(u, at) takes u [n, ...] at the points `at`, a slice. A
    slope that is differentiated again by PyTorch costs a second pass through both directions. Written out it
    is one more network of the same weights: of a linear map its transpose, of (Leaky)ReLU a mask, which is
    constant almost everywhere, so that its own derivative is 0. An ordinary backward pass then has every
    derivative in the weights. u may depend on h. outputs: a list to which h of each LeakyReLU and of the last
    layer are added. Raises ValueError for other layers, as batch norm, through which points meet.
    """
    match layer:
        case Layers():
            *body, last = layer
            with layer.precision(x):
                h, back_body = pullback(nn.Sequential(*body), x, outputs)
            h, back_last = pullback(last, h.float() if layer.bfloat16 else h)
            if outputs is not None:
                outputs.append(h)

            def back(u, at):
                u = back_last(u, at)
                with layer.precision(u):
                    return back_body(u, at).to(x.dtype)
        case nn.Sequential():
            h, backs = x, []
            for part in layer:
                h, back = pullback(part, h, outputs)
                backs.append(back)

            def back(u, at):
                for back in reversed(backs):
                    u = back(u, at)
                return u
        case Residual():
            (a, back_a), (b, back_b) = pullback(layer.shortcut, x), pullback(layer.change, x)
            h = a + b

            def back(u, at):
                return back_a(u, at) + back_b(u, at)
        case nn.Conv2d():
            W = layer.filters() if isinstance(layer, ConvMeanPool) else layer.weight
            stride, padding = layer.stride, layer.padding
            h = F.conv2d(x, W, layer.bias, stride, padding)
            rest = [(n + 2 * q - k) % t for n, k, t, q in zip(x.shape[2:], W.shape[2:], stride, padding)]

            def back(u, at):
                return F.conv_transpose2d(u, W, None, stride, padding, rest)
        case nn.Linear():
            W = layer.weight
            h = F.linear(x, W, layer.bias)

            def back(u, at):
                return u @ W
        case nn.LeakyReLU() | nn.ReLU():
            least = getattr(layer, "negative_slope", 0)
            h = F.leaky_relu(x, least) if least else x.relu()
            mask = torch.where(h > 0, h.new_ones(()), least)
            if least and outputs is not None:
                outputs.append(h)

            def back(u, at):
                return u * mask[at]
        case nn.AvgPool2d():
            h, k = layer(x), layer.kernel_size

            def back(u, at):
                return F.interpolate(u, scale_factor=k) / (layer.divisor_override or k * k)
        case nn.Flatten():
            h = x.flatten(1)

            def back(u, at):
                return u.unflatten(1, x.shape[1:])
        case LayerNorm():
            (n, r), of = layer.normalised(x), dict(dim=(1, 2, 3), keepdim=True)
            h = n * layer.weight[:, None, None] + layer.bias[:, None, None]

            def back(u, at):
                u = u * layer.weight[:, None, None]
                return r[at] * (u - u.mean(**of) - n[at] * (u * n[at]).mean(**of))
        case _:
            raise ValueError(f"{type(layer).__name__}: found in a critic whose slope is held, expected "
                             "convolutions, linear layers, (Leaky)ReLU, mean pooling, layer norm")
    return h, back


class ConvMeanPool(nn.Conv2d):
    """A convolution of 3x3, then the mean of each 2x2, as one of 4x4 and stride 2: 4/9 of the products.

    The 4x4 is the mean of the 3x3 at four places; weights and spectral norms have the 3x3.
    """

    def __init__(self, channels, out):
        super().__init__(channels, out, 3, 2, 1)

    def filters(self):
        return F.avg_pool2d(self.weight, 2, 1, 1)

    def forward(self, x):
        return F.conv2d(x, self.filters(), self.bias, 2, 1)


class UpsampleConv(nn.Conv2d):
    """Nearest neighbours, then a convolution of 3x3, as a transposed one of 4x4: 4/9 of the products."""

    def __init__(self, channels, out, bias=True):
        super().__init__(channels, out, 3, 1, 1, bias=bias)

    def forward(self, x):
        filters = 4 * F.avg_pool2d(self.weight.flip(-2, -1), 2, 1, 1)
        return F.conv_transpose2d(x, filters.transpose(0, 1), self.bias, 2, 1)


def batch_norm(channels):
    """Batch norm by the statistics of the batch at hand, also in sampling: draw hundreds at a time."""
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


class LayerNorm(nn.GroupNorm):
    """Layer norm of images: over all of an image, with a scale and a shift for each channel.

    As a formula, since torch.compile has no other for images whose channels come last.
    """

    def __init__(self, channels):
        super().__init__(1, channels)

    def normalised(self, x):
        """(x - mean) / std and 1 / std of images x [N, C, H, W], in the weights' precision."""
        variance, mean = torch.var_mean(x.to(self.weight.dtype), (1, 2, 3), correction=0, keepdim=True)
        r = (variance + self.eps).rsqrt()
        return (x - mean) * r, r

    def forward(self, x):
        return self.normalised(x)[0] * self.weight[:, None, None] + self.bias[:, None, None]


def dcgan_generator(noise, widths, channels, kernel=4, last=nn.Tanh, size=32):
    """DCGAN generator: [N, noise] to images [N, channels, size, size] in [-1, 1], or [0, 1] by nn.Sigmoid.

    A linear layer to size / 2^n, rounded up, then n transposed convolutions of stride 2, batch norm and ReLU
    in front of each. In front of a batch norm a bias does nothing. Where a size is odd the kernel has to be.

    widths                kernel  last     source
    (128, 64, 32)         4       Tanh     GRAM, Table 5
    (256, 128, 64)        4       Tanh     Li et al. 2017 (OctoberChang/MMD-GAN, base_module.py)
    (512, 256, 128)       5       Tanh     GAMN, WGAN: Gulrajani et al. 2017 (igul222, gan_cifar.py)
    (512, 256, 128, 64)   5       Sigmoid  Binkowski et al. 2018 (mbinkowski/MMD-GAN, architecture.py)
    (256, 128, 64)        5       Sigmoid  for 28x28: Gulrajani et al. 2017 (igul222, gan_mnist.py)
    """
    *sizes, start = (math.ceil(size / 2 ** i) for i in range(len(widths) + 1))      # 28, 14, 7, 4, 2
    layers = [nn.Linear(noise, widths[0] * start ** 2), nn.Unflatten(1, (widths[0], start, start))]
    for i, (a, b, after) in enumerate(zip(widths, [*widths[1:], channels], reversed(sizes)), 1):
        rest = (after + kernel) % 2         # 1 more row than the transposed convolution alone would give
        layers += [batch_norm(a), nn.ReLU(inplace=True),
                   nn.ConvTranspose2d(a, b, kernel, 2, (kernel - 1) // 2, rest, bias=i == len(widths))]
    return dcgan_init(Layers(*layers, last()))


def dcgan_critic(channels, widths, out, kernel=4, norms=(batch_norm, batch_norm), size=32):
    """DCGAN critic: images [N, channels, size, size] to [N, out].

    Convolutions of stride 2, each with a norm and LeakyReLU 0.2, then a linear layer. norms: those behind the
    first convolutions, the last of them behind all further ones, None for none. Odd sizes need an odd kernel.

    widths                kernel  norms               source
    (32, 64, 128)         4       batch, batch        GRAM, Table 6; (32, 32, 64) Table 7
    (64, 128, 256)        4       None, batch         Li et al. 2017; their last convolution, of all
                                                      4x4 pixels, is the linear layer
    (128, 256, 512)       5       None, layer         GAMN; WGAN with batch norm; (64, 128, 256) for 28x28
    (64, 128, 256, 512)   5       None, None          Binkowski et al. 2018; (16, 32, 64, 128) the small one

    GRAM's paper does not say where its critic has batch norm; GRAMFlow has none behind the first convolution.
    """
    layers = []
    for i, (a, b) in enumerate(zip([channels, *widths], widths)):
        norm = norms[min(i, len(norms) - 1)]
        layers += [nn.Conv2d(a, b, kernel, 2, (kernel - 1) // 2, bias=norm is None),
                   *([norm(b)] if norm else []), nn.LeakyReLU(0.2, inplace=True)]
    pixels = math.ceil(size / 2 ** len(widths)) ** 2
    return dcgan_init(Layers(*layers, nn.Flatten(), nn.Linear(widths[-1] * pixels, out)))


class Residual(nn.Module):
    """Images [N, a, H, W] to [N, b, ...] at twice or half of H and W: two convolutions of 3x3, a shortcut.

    up: norm, ReLU, nearest neighbours, convolution to b, norm, ReLU, convolution; beside it a convolution of
    1x1 and the neighbours. Otherwise ReLU, convolution of a to a, ReLU, convolution to b, mean of each 2x2;
    beside it the mean and a convolution of 1x1 (Gulrajani et al. 2017, gan_64x64.py). Weights are Glorot's,
    as in Scaled-MMD-GAN, those of 3x3 with a norm of twice that variance, as in that file.
    """

    def __init__(self, a, b, up, norm=None):
        super().__init__()
        if up:
            convs = UpsampleConv(a, b, bias=norm is None), nn.Conv2d(b, b, 3, 1, 1)
            self.shortcut = nn.Sequential(nn.Conv2d(a, b, 1), nn.Upsample(scale_factor=2))
        else:
            convs = nn.Conv2d(a, a, 3, 1, 1, bias=norm is None), ConvMeanPool(a, b)
            self.shortcut = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(a, b, 1))
        self.change = nn.Sequential(*(layer for conv in convs for layer in (
            *([norm(conv.in_channels)] if norm else []), nn.ReLU(), conv)))
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                wide = norm and layer.kernel_size == (3, 3)
                nn.init.xavier_uniform_(layer.weight, math.sqrt(2) if wide else 1)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, x):
        return self.shortcut(x) + self.change(x)


def residual_generator(noise, widths, channels, last=nn.Tanh, size=64, start=4):
    """Generator of ten layers: [N, noise] to images [N, channels, size, size], in [-1, 1] by Tanh.

    A linear layer to widths[0] at start x start, a Residual to each further width, batch norm, ReLU, and a
    convolution of 3x3 where that is the size already, a transposed one of 5x5 and stride 2 where it is half.

    (1024, 512, 256, 128, 64) at 160x160 with start 5: Binkowski et al. 2018, footnote 17 (mbinkowski/MMD-GAN,
    architecture.py); at 64x64 with start 4: Scaled MMD, section 4 (MichaelArbel/Scaled-MMD-GAN).
    """
    reached = start * 2 ** (len(widths) - 1)
    end = (nn.Conv2d(widths[-1], channels, 3, 1, 1) if size == reached else
           nn.ConvTranspose2d(widths[-1], channels, 5, 2, 2, 1))
    outer = dcgan_init(nn.ModuleList([nn.Linear(noise, widths[0] * start ** 2), end]))
    blocks = [Residual(a, b, True, batch_norm) for a, b in zip(widths, widths[1:])]
    return Layers(outer[0], nn.Unflatten(1, (widths[0], start, start)), *blocks,
                  batch_norm(widths[-1]), nn.ReLU(), end, last())


class Average(nn.Module):
    """A network, as `network`, with an average of the weights p that another one had at each follow().

    m <- m + w (p - m), w = (eta + 1) / (eta + t) at the t-th call: the weights of call t count as t^eta
    (polynomial-decay averaging, Shamir and Zhang, ICML 2013).
    """

    def __init__(self, network, eta):
        super().__init__()
        self.network, self.eta = copy.deepcopy(network).requires_grad_(False), eta
        self.register_buffer("t", torch.zeros((), device=next(network.parameters()).device))

    def forward(self, z):
        return self.network(z)

    @torch.no_grad()
    def follow(self, network):
        self.t += 1
        w = (self.eta + 1) / (self.eta + self.t)
        for mean, p in zip(self.network.parameters(), network.parameters()):
            mean.lerp_(p, w)


class Contrast(nn.Module):
    """Samples y [N, C, H, W] in [0, 1] with the brightness and contrast of images, uint8 [M, C, H, W].

    std (y - mean(y)) / std(y) + mean: a mean for each channel, one std for all. A critic with batch norm of
    data and samples apart behind its first convolution cannot see these C + 1 numbers: its generator drifts.
    """

    def __init__(self, images):
        super().__init__()
        n = images[:, 0].numel()
        mean, square = (sum((part.double() / 255).pow(k).sum((0, 2, 3)) for part in images.split(5_000)) / n
                        for k in (1, 2))
        self.register_buffer("mean", mean.float()[:, None, None])
        self.register_buffer("std", (square - mean.square()).mean().sqrt().float())

    def forward(self, y):
        y = y - y.mean((0, 2, 3), keepdim=True)
        return self.std / y.square().mean().sqrt().clamp(min=1e-6) * y + self.mean


# ---- Data: all that is random comes from a run's own torch.Generator ---------------------------------------

def uniform_noise(n, dim, rng):
    """Noise z ~ U[-1, 1]^dim: [n, dim]."""
    return torch.rand(n, dim, generator=rng, device=rng.device) * 2 - 1


def normal_noise(n, dim, rng):
    """Noise z ~ N(0, I): [n, dim]."""
    return torch.randn(n, dim, generator=rng, device=rng.device)


def ring_centres(modes, radius):
    """Centres of a ring's modes, [modes, 2], the first at the bottom (MLToolkit, src/Datasets/ring.jl)."""
    angle = 2 * math.pi * torch.arange(modes) / modes - math.pi / 2
    return radius * torch.stack([angle.cos(), angle.sin()], 1)


def draw_mixture(centres, std, n, rng):
    """n points [n, D] of an equal mixture of Gaussians N(centre, std^2 I), centres [modes, D]."""
    mode = torch.randint(len(centres), (n,), generator=rng, device=rng.device)
    return centres[mode] + std * normal_noise(n, centres.shape[1], rng)


def mode_masses(y, centres, std):
    """The share of the samples y [N, D] within 3 std of a mode and nearest to it: [modes]; NaN has none."""
    distance, mode = torch.cdist(y.nan_to_num(torch.inf), centres).min(1)
    return torch.bincount(mode[distance < 3 * std], minlength=len(centres)).double() / len(y)


def draw_images(images, n, rng):
    """n images drawn with replacement: uint8 [N, C, H, W] to float32 [n, C, H, W] in [0, 255]."""
    return images[torch.randint(len(images), (n,), generator=rng, device=rng.device)].float()


def copy_batch(images, rng, x):
    """Fill x [n, C, H, W], an input of a captured update, with images, uint8 [N, C, H, W]; rng is on the CPU.

    Images of a mapped file are gathered while the GPU is at work.
    """
    index = torch.randint(len(images), (len(x),), generator=rng)
    if images.is_cuda:                  # a copy from other than pinned memory waits for the GPU
        torch.index_select(images, 0, index.pin_memory().to(x.device, non_blocking=True), out=x)
    else:
        x.copy_(take(images, index).pin_memory() if x.is_cuda else take(images, index), non_blocking=True)


def flip_images(x, rng):
    """Images [n, C, H, W], each mirrored left to right with probability 1/2."""
    mirrored = torch.rand(len(x), 1, 1, 1, generator=rng, device=rng.device) < 0.5
    return x.flip(3).where(mirrored, x)


def crop_images(x, side, rng=None):
    """A square of that side somewhere in each of the images [n, C, H, W], without rng at fixed places."""
    n, _, height, width = x.shape
    rng = rng or torch.Generator().manual_seed(0)       # on the CPU: the same wherever x is
    top, left = (torch.randint(m - side + 1, (n, 1), generator=rng, device=rng.device).to(x.device)
                 for m in (height, width))
    image, within = torch.arange(n, device=x.device)[:, None, None], torch.arange(side, device=x.device)
    return x.movedim(1, 3)[image, (top + within)[:, :, None], (left + within)[:, None]].movedim(3, 1)


@torch.no_grad()
def draw_samples(network, z):
    """Samples of noise z [n, Z] as uint8 on the CPU, 500 at a time (see batch_norm); network: to [0, 1]."""
    return torch.cat([(255 * network(part)).round().clamp(0, 255).byte().cpu() for part in z.split(500)])


def take(x, index):
    """x[index]; on a CPU by NumPy: PyTorch's threads take 6 to 14 times as long beside a second process."""
    return x[index.to(x.device)] if x.is_cuda else torch.from_numpy(np.take(x.numpy(), index.numpy(), 0))


def progress(what, parts, total, size=len):
    """Yield the parts; every five seconds, later less often, print how many are done and the time left."""
    done, began, said = 0, time.perf_counter(), time.perf_counter()
    for part in parts:
        yield part
        done, now = done + size(part), time.perf_counter()
        if now - said > max(5, (now - began) / 20):
            said, rate = now, done / (now - began)
            left = (total - done) / rate
            print(f"{what}: {done:,} of {total:,}, {rate:,.0f}/s, {left:,.0f} s left", flush=True)


def load_images(name, split, folder):
    """The images of FOLDER/NAME-SPLIT.npy, uint8 [N, C, H, W], of name "mnist" or "cifar10".

    A missing file is built from torchvision's download, with its labels in FOLDER/NAME-SPLIT-labels.npy.
    """
    path, make = f"{folder}/{name}-{split}.npy", getattr(torchvision.datasets, name.upper())
    with building(path) as needed:
        if needed:
            print(f"{path} is not there: torchvision downloads {name}", flush=True)
            try:
                data = make(f"{folder}/torchvision", train=split == "train", download=True)
            except (OSError, RuntimeError) as error:
                raise OSError(f"{path}: not there, and torchvision cannot download it ({first_line(error)}); "
                              "put uint8 [N, C, H, W] there, or name its folder with --data") from error
            images = np.asarray(data.data)                          # [N, H, W] or [N, H, W, C]
            images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
            for end, array in (("-labels", np.uint8(data.targets)), ("", np.ascontiguousarray(images))):
                with replacing(f"{folder}/{name}-{split}{end}.npy") as file:
                    np.save(file, array)
    return read_array(path)


@contextmanager
def building(path):
    """Whether the caller has to build a file, in the block; other commands that would build there wait."""
    if os.path.exists(path):
        yield False
        return
    os.makedirs(folder := os.path.dirname(path) or ".", exist_ok=True)
    lock(folder, wait=True)
    for part in glob.glob(f"{glob.escape(path)}*.tmp"):         # of a build that was killed
        os.remove(part)
    try:
        yield not os.path.exists(path)
    finally:
        unlock(folder)


def read_array(path):
    """The images of an .npy file, uint8 [N, C, H, W], as a tensor that maps it."""
    try:
        array = np.lib.format.open_memmap(path, mode="c")      # what is written stays in memory
    except OSError:
        raise
    except Exception as error:                  # whatever its reader stumbles over
        raise ValueError(f"{path}: found no .npy array ({error}), expected one of uint8 [N, 1 or 3, H, W]; a "
                         "script's own is built again when it is deleted") from error
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1] not in (1, 3) or len(array) < 2:
        raise ValueError(f"{path}: found {array.dtype} {list(array.shape)}, expected uint8 [N, 1 or 3, H, W]")
    return torch.from_numpy(array)


def open_image(path):
    """An image file, upright, as RGB of PIL; grey, CMYK, palettes, alpha and 16 bits become RGB of 8 bits."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):      # 16 bits, which PIL's conversion would cut off at 255
                grey = (np.asarray(image, np.int64) + 128) // 257
                image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
            return image.convert("RGB")
    except Exception as error:                  # whatever its decoder stumbles over
        raise OSError(f"{path}: cannot be read ({first_line(error)})") from error


def image_files(folder):
    """The image files in a folder and below, sorted, but hidden ones; each real folder is visited once."""
    files, seen, ends = [], set(), (*IMG_EXTENSIONS, ".gif", ".avif")
    for at, below, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(at)) in seen:
            below.clear()
            continue
        seen.add(real)
        below[:] = sorted(name for name in below if name[0] != ".")
        files += [f"{at}/{name}" for name in names if name.lower().endswith(ends) and name[0] != "."]
    return sorted(files)


def squares(files, side):
    """The central squares of image files, uint8 [n, 3, side, side], and why others could not be read."""
    found, errors = [torch.zeros(0, 3, side, side, dtype=torch.uint8)], []
    for file in files:
        try:
            image = open_image(file)
            square = pil_to_tensor(center_crop(image, min(image.size)))
            found.append(resize(square, [side, side], antialias=True)[None])
        except OSError as error:
            errors.append(f"{error}; left out")
    return torch.cat(found), errors


def load_folder(path, folder, side, split=None):
    """The images below a folder as the array PATH, uint8 [N, 3, side, side], mapped; built once.

    split: takes the list of image files and returns those wanted. Images that cannot be read are left out and
    named. Of several processes the first one builds, the others wait. Raises OSError or ValueError.
    """
    if ranks()[0] == 0:
        with building(path) as needed:
            if needed:
                build_array(path, folder, (split or list)(image_files(folder)), side)
            elif os.path.isdir(folder):
                changed = max(os.stat(at).st_mtime for at, _, _ in os.walk(folder))
                if changed > os.path.getmtime(path):
                    print(f"{path}: {folder} has changed since; delete it to have it built again")
    if ranks()[1] > 1:
        distributed.barrier()
    return read_array(path)


def build_array(path, folder, files, side):
    """Write the central squares of image files of a folder as the array PATH, by a process a core."""
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    batches = torch.utils.data.DataLoader(files, 256, num_workers=workers, worker_init_fn=unlock_all,
                                          collate_fn=partial(squares, side=side))
    print(f"{path}: built once from {len(files):,} images of {folder} by {workers} processes", flush=True)
    n, head = 0, dict(descr="|u1", fortran_order=False, shape=(len(files), 3, side, side))
    with replacing(path) as file:
        np.lib.format.write_array_header_1_0(file, head)
        for found, errors in progress(path, batches, len(files), lambda batch: sum(map(len, batch))):
            print("".join(f"{error}\n" for error in errors), end="", flush=True)
            file.write(found.numpy())
            n += len(found)
        if n < 2:
            raise ValueError(f"{folder}: found {n} images for {path}, expected 2 or more; put them there, or "
                             "name another folder with --data")
        file.seek(0)                    # numpy leaves room in the header for another number
        np.lib.format.write_array_header_1_0(file, head | dict(shape=(n, 3, side, side)))


def fingerprint(images):
    """A checkpoint's record of its images, uint8 [N, C, H, W]: N, and a sum over a thousand of them."""
    return [len(images), int(images[::max(1, len(images) // 1_000)].sum())]


def to_device(images, device):
    """Images, uint8 [N, C, H, W], on a GPU if they take half of what is free there or less."""
    fits = device.type == "cuda" and images.nbytes <= torch.cuda.mem_get_info(device)[0] / 2
    return images.to(device) if fits else images


def read_images(path):
    """Images to score: uint8 [N, C, H, W] of an .npy file, or the image files, of one size, in a folder."""
    path = os.fspath(path)
    if not os.path.isdir(path):
        return read_array(path)
    if len(files := image_files(path)) < 2:
        raise ValueError(f"{path}: found {len(files)} images, expected 2 or more")
    return files


def parts_of(images, n):
    """Nearly equal parts, one at a time, of images, a tensor or files of one size: uint8 [<= n, C, H, W]."""
    number = math.ceil(len(images) / n)
    if torch.is_tensor(images):
        yield from images.tensor_split(number)
        return
    sizes = {}                          # and a file of each
    with ThreadPoolExecutor() as pool:
        for files in np.array_split(images, number):
            part = [pil_to_tensor(image) for image in pool.map(open_image, files.tolist())]
            sizes |= {tuple(image.shape[1:]): file for image, file in zip(part, files)}
            if len(sizes) > 1:
                (a, first), (b, other), *_ = sizes.items()
                raise OSError(f"found {first} of {a[1]}x{a[0]}, {other} of {b[1]}x{b[0]}, expected one size")
            yield torch.stack(part)


# ---- Scores: a feature network, and the distances between its features -------------------------------------

INCEPTION = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
             "pt_inception-2015-12-05-6726825d.pth")        # FID's network, in torchvision's keys
FID_KEY, FID_NAME = "6726825d", "inception-2015-12-05"      # its SHA-256's start, what scores call it
SCORE_PRECISION = "ieee"    # of feature networks' convolutions on a GPU; "tf32" is faster: results/metrics.md


def first_line(error):
    """The first line of an exception's text, or its name if it has none, for messages."""
    return str(error).strip().split("\n")[0] or type(error).__name__


class RunError(RuntimeError):
    """An error that ends one run and no other: a mean that is not finite, a feature network that fails."""


def tf_resize(x, size):
    """Images [..., H, W] to [..., size, size] as TensorFlow 1's bilinear resize does it, FID's.

    Pixel i stands at i H / size, without half a pixel and without antialiasing.
    """
    def weights(n):
        rows, at = torch.arange(size, device=x.device), torch.arange(size, device=x.device) * (n / size)
        low, matrix = at.long(), torch.zeros(size, n, device=x.device)
        matrix[rows, low] = 1 - (at - low)
        matrix[rows, (low + 1).clamp(max=n - 1)] += at - low
        return matrix

    return weights(x.shape[-2]) @ x @ weights(x.shape[-1]).T


class ConvReLU(nn.Module):
    """torchvision's BasicConv2d as one kernel of cuDNN, which saves 17 % of a score's time."""

    def __init__(self, basic):
        super().__init__()
        self.conv = fuse_conv_bn_eval(basic.conv, basic.bn)

    def forward(self, x):
        c = self.conv
        if x.is_cuda:
            return torch.cudnn_convolution_relu(x, c.weight, c.bias, c.stride, c.padding, c.dilation, 1)
        return c(x).relu_()


class FidInception(nn.Module):
    """The Inception network of FID and of the Inception score, by its state dict in torchvision's keys.

    uint8 images [N, 3, H, W] to features [N, 2048] and to logits without bias [N, 1008]. It is torchvision's
    with two changes: mean pooling does not count the padding, and Mixed_7c has max pooling, as TensorFlow's
    network of 2015-12-05 (pytorch-fid, inception.py).
    """

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, BasicConv2d) or super().is_leaf_module(module, name)

    def __init__(self, state_dict):
        super().__init__()
        network = torchvision.models.Inception3(num_classes=1008, aux_logits=False, init_weights=False)
        network.load_state_dict(state_dict)
        self.register_buffer("classes", network.fc.weight.detach())
        network.fc, graph = nn.Identity(), self.Tracer().trace(network.eval())
        *averages, last = (node for node in graph.nodes if node.target is F.avg_pool2d)
        last.target = F.max_pool2d
        for node in averages:
            node.kwargs = dict(node.kwargs, count_include_pad=False)
        for name, block in list(network.named_modules()):
            if isinstance(block, BasicConv2d):
                network.set_submodule(name, ConvReLU(block))
        self.network = torch.fx.GraphModule(network, graph)

    @torch.no_grad()
    def forward(self, images):
        found = self.network((tf_resize(images.float(), 299) - 128) / 128)
        return found, found @ self.classes.T


class Features:
    """A feature network on a device: images, as of read_images, to features [N, D], logits [N, L] or None.

    network: from uint8 [n, 3, H, W] to features or a tuple of both; name: what scores call it; key: of its
    file. Raises RunError where the network fails or a feature is not finite.
    """

    def __init__(self, network, name, key, device):
        self.network, self.name, self.key, self.device = network, name, key, device

    @torch.no_grad()
    def __call__(self, images):
        found, done, before = [], 0, torch.backends.cudnn.conv.fp32_precision
        at_once = 250 if self.device.type == "cuda" else 10             # faster than 250 on a CPU
        try:
            torch.backends.cudnn.conv.fp32_precision = SCORE_PRECISION
            for part in progress(f"features of {self.name}", parts_of(images, at_once), len(images)):
                out = self.network(part.to(self.device).expand(-1, 3, -1, -1))
                out = [out] if torch.is_tensor(out) else list(out)[:2]
                if not all(o.ndim == 2 and len(o) == len(part) and o.is_floating_point() for o in out):
                    raise ValueError(f"found {[list(o.shape) for o in out]} of {len(part)}, expected [N, D]")
                found = found or [o.new_empty(len(images), o.shape[1], dtype=torch.float32) for o in out]
                for kept, o in zip(found, out, strict=True):
                    kept[done:done + len(part)] = o
                done += len(part)
        except OSError:                             # an image file
            raise
        except Exception as error:                  # whatever the network stumbles over
            raise RunError(f"{self.name} fails on {len(images):,} images: {first_line(error)}") from error
        finally:
            torch.backends.cudnn.conv.fp32_precision = before
        bad = sum(o.isfinite().logical_not().any(1) for o in found).nonzero()
        if len(bad):
            first = f"image {int(bad[0])}" if torch.is_tensor(images) else images[bad[0]]
            raise RunError(f"{self.name}: features or logits of {first} are not finite")
        return found[0], found[1] if len(found) > 1 else None


def load_features(path, device):
    """The Features of a file: weights of FID's network (.pth), or a torch.export file (.pt2).

    path None: FID's network, fetched. None where it cannot be, and on all ranks but 0, which scores.
    """
    path = path and os.fspath(path)
    file = path or f"{torch.hub.get_dir()}/checkpoints/{os.path.basename(INCEPTION)}"
    if ranks()[0]:
        return None
    logging.disable(logging.WARNING)                # torch.export logs the traceback of what it raises
    try:
        if path and not path.endswith(".pth"):
            network = torch.export.passes.move_to_device_pass(torch.export.load(path), str(device)).module()
        else:
            if path is None:
                torch.hub.load_state_dict_from_url(INCEPTION, check_hash=True, weights_only=True)
            network = FidInception(torch.load(file, map_location="cpu", weights_only=True)).to(device)
        with open(file, "rb") as content:
            key = hashlib.sha256(content.read()).hexdigest()[:8]
    except Exception as error:                      # whatever its reader stumbles over
        if path or os.path.exists(file):            # perhaps half a download
            raise ValueError(f"{file}: cannot be loaded ({first_line(error)}); expected weights of FID's "
                             "network (.pth; fetched if deleted) or a torch.export file (.pt2)") from error
        print(f"FID's network cannot be fetched ({first_line(error)}): samples are kept, not scored.\n"
              f"To score, name another one with --features FILE, or copy {INCEPTION}\nto {file}", flush=True)
        return None
    finally:
        logging.disable(logging.NOTSET)
    stem = os.path.splitext(os.path.basename(file))[0].removeprefix("features-")
    stem = f"not-{stem}" if stem == FID_NAME else stem
    return Features(network, FID_NAME if key == FID_KEY else stem, key, device)


def load_reference(path, network, side=None):
    """What to score against, a dict: features [M, D] of images, gaussian_fit's mean and root, a name, a key.

    path: as read_images takes it; side: of crop_images' squares, if those are the reference. Kept beside the
    images, as long as their files stay as they are; key: what a checkpoint knows them by. None without a
    network.
    """
    if network is None:
        return None
    path = os.fspath(path)
    stem = path.rstrip("/").removesuffix(".npy") + (f"-{side}" if side else "")
    kept, found = f"{stem}-{network.name}-{network.key}.pt", {}
    files = [(file, os.stat(file)) for file in (image_files(path) if os.path.isdir(path) else [path])]
    source = repr([(os.path.basename(file), stat.st_size, stat.st_mtime_ns) for file, stat in files])
    source = hashlib.sha256(f"{SCORE_PRECISION} {source}".encode()).hexdigest()
    with suppress(Exception):           # not there, or damaged: built again
        found = dict(torch.load(kept, map_location=network.device, weights_only=True))
    if found.get("source") != source or not {"features", "mean", "root", "key"} < found.keys():
        print(f"{kept}: built once, from the features of {path}", flush=True)
        images = read_images(path)
        features, _ = network(crop_images(images, side) if side else images)
        mean, root = gaussian_fit(features)
        key = fingerprint(images) if torch.is_tensor(images) else [len(images)]
        found = dict(features=features, mean=mean, root=root, source=source, key=key)
        with suppress(OSError):                     # kept where it can be
            save_tensors(kept, found)
    return dict(found, name=f"{os.path.basename(stem)}, {len(found['features']):,} images")


def scores(network, images, reference, enough=0, resamplings=10):
    """Scores of uint8 images [N, C, H, W] by Features against load_reference's images, as a dict.

    fd: Frechet distance, FID if the network is FID's; kid, kid_std; isc, isc_std: Inception score, where the
    network has logits; features: the network's name; samples: N; reference: the name of the others. Of
    `enough` images or more, if not 0, by bootstrap() of the first so many: fd_bootstrap, fd_bootstrap_std,
    isc_bootstrap, isc_bootstrap_std. Raises RunError.
    """
    found, logits = network(images)
    fit, kept = (reference["mean"], reference["root"]), dict(features=network.name, samples=len(found))
    kept |= dict(reference=reference["name"], fd=frechet_distance(gaussian_fit(found), fit))
    kept["kid"], kept["kid_std"] = kid(found, reference["features"])
    if logits is not None:
        kept["isc"], kept["isc_std"] = inception_score(logits)
    if 0 < enough <= len(found):
        for key, x, statistic in (("fd", found, lambda x: frechet_distance(gaussian_fit(x), fit)),
                                  ("isc", logits, lambda x: inception_score(x, 1)[0])):
            if x is not None:
                values = bootstrap(x[:enough], statistic, resamplings)
                kept[f"{key}_bootstrap"], kept[f"{key}_bootstrap_std"] = values
    return kept


def score_files(images, reference, features=None, device=None):
    """scores() of paths: images and reference as read_images takes them, features as load_features does."""
    network = load_features(features, setup(device))
    if network is None:
        raise OSError("score_files: no feature network; name one with features=FILE")
    return scores(network, read_images(images), load_reference(reference, network))


# ---- Running: an update is one CUDA graph, a run is a coroutine --------------------------------------------

def setup(device):
    """The torch.device that --device names, None: cuda where there is one. Raises ValueError.

    Sets the precision: TF32 in convolutions, full float32 in matrix products.
    """
    if ranks()[1] == 1 and torchrun() and os.environ["WORLD_SIZE"] != "1":
        raise ValueError("torchrun: this script trains on one GPU; start it with python")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device cuda: torch {torch.__version__} finds no CUDA GPU; expected cpu")
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def ranks():
    """Which process this is and of how many that torchrun has started for one run: (0, 1) without it."""
    there = distributed.is_available() and distributed.is_initialized()
    return (distributed.get_rank(), distributed.get_world_size()) if there else (0, 1)


def torchrun():
    """Whether torchrun has started this process: its variables alone may be left behind."""
    there = all(os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    return there and distributed.is_available() and distributed.is_torchelastic_launched()


def join(device):
    """Join the processes that torchrun has started, if it has started several, before setup().

    device: of --device. Each rank has a GPU of its own, or all share the CPU; noise and data are its own;
    descend() takes the mean of their gradients (Scaled MMD, section 4). The first alone prints and writes.
    """
    if not torchrun():
        return
    local, cuda = int(os.environ["LOCAL_RANK"]), torch.cuda.is_available() and device != "cpu"
    if cuda and local >= torch.cuda.device_count():
        raise ValueError(f"torchrun: found {torch.cuda.device_count()} GPUs, expected one for each process, "
                         "or --device cpu")
    if cuda:
        torch.cuda.set_device(local)
    # The first process may build an array or score for long while the others wait.
    distributed.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(days=1),
                                   device_id=torch.device("cuda", local) if cuda else None)
    if distributed.get_rank():
        sys.stdout = open(os.devnull, "w")


def averaged(*tensors):
    """The means of tensors of one type over all processes, by one collective, which a CUDA graph can hold."""
    number = ranks()[1]
    if number == 1:
        return tensors
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
    distributed.all_reduce(flat)
    parts = (flat / number).split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors)]


def optimizer(network, opt, lr, beta):
    """torch.optim's Adam of (lr, beta), or RMSprop of lr, by opt, "adam" or "rmsprop", for a network.

    On a GPU fit for a CUDA graph. The rate is a tensor, so that fill_ changes it there, too.
    """
    weights = list(network.parameters())
    cuda = weights[0].is_cuda
    lr = torch.tensor(lr, dtype=None if cuda else torch.float64, device=weights[0].device)
    if opt == "rmsprop":
        return torch.optim.RMSprop(weights, lr, capturable=cuda)
    return torch.optim.Adam(weights, lr, beta, fused=cuda, capturable=cuda)


def descend(*players):
    """One step of each (optimizer, loss), every gradient taken before any step (GRAM, Algorithm 1).

    A loss is a scalar, or [B] of a stack of independent models. Gradients are averaged over the processes
    that torchrun has started, so that their steps are the same.
    """
    weights = [[p for group in optimizer.param_groups for p in group["params"]] for optimizer, _ in players]
    last = len(players) - 1             # torch.compile does not allow it
    gradients = [torch.autograd.grad(loss.sum(), w, retain_graph=i < last)
                 for i, ((_, loss), w) in enumerate(zip(players, weights))]
    for (optimizer, _), w, gradient in zip(players, weights, gradients):
        for p, p_gradient in zip(w, averaged(*gradient)):
            fits = p_gradient.stride() == p.stride()    # not a stack's, transposed, which fused Adam refuses
            p.grad = p_gradient if fits else torch.empty_like(p).copy_(p_gradient)
        optimizer.step()


def rates(*optimizers):
    """The learning rates of optimizers, tensors to be changed by fill_."""
    return [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]


class AdaptiveRate:
    """Learning rates that fall when a model gets no nearer to the data (Binkowski et al. 2018, section 4.1).

    x: features [m, D] of training images. step(y), with those of as many new samples, tests y against the
    model of `window` steps before and returns the p-value, None without such a model. p > level is a failure;
    `patience` of them in a row multiply the rates by decay, not below floor. As in mbinkowski/MMD-GAN
    (gan/utils/scorer.py) a success drops the oldest model and adds the present one, a failure changes
    nothing, and after a cut the last `patience` models remain, the present one among them.
    """

    def __init__(self, optimizers, x, decay, window, patience, level, floor):
        self.optimizers, self.x, self.decay = optimizers, x.double(), decay
        self.window, self.patience, self.level, self.floor = window, patience, level, floor
        self.models, self.failures = [], 0

    def state_dict(self):
        return {"models": self.models, "failures": self.failures}

    def load_state_dict(self, kept):
        self.models = [tuple(part.to(self.x.device) for part in model) for model in kept["models"]]
        self.failures = kept["failures"]

    def step(self, y):
        now = similarity(cubic(self.x, y.double()), cubic(y.double(), y.double()))
        if len(self.models) < self.window:
            self.models.append(now)
            return None
        p = relative_similarity(self.models[0], now)
        self.failures = self.failures + 1 if p > self.level else 0
        if not self.failures:
            self.models = [*self.models[1:], now]
        if self.failures == self.patience:
            self.models, self.failures = [*self.models, now][-self.patience:], 0
            for lr in rates(*self.optimizers):
                lr.fill_(max(float(lr) * self.decay, self.floor))
        return p


def capture(update, rng):
    """update() as a function that replays it as one CUDA graph; on a CPU update itself.

    Three calls are ordinary updates, in which cuDNN tries all its algorithms; the fourth is recorded, and
    replayed from then on. update() draws from rng alone, branches on no tensor and copies nothing to or from
    the host. Call it after load() and under interleave: graphs of one stream, side by side, turn to NaN.
    """
    if rng.device.type == "cpu":
        return update
    graph, calls, cudnn = torch.cuda.CUDAGraph(), 0, torch.backends.cudnn
    graph.register_generator_state(rng)

    def call():
        nonlocal calls
        calls += 1
        if calls <= 3:
            torch.cuda.synchronize()        # cuDNN times its algorithms: nothing else may run
            cudnn.benchmark, cudnn.benchmark_limit = True, 0
            update()
            torch.cuda.synchronize()
            cudnn.benchmark = False
            return
        if calls == 4:
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream(),
                                  capture_error_mode="thread_local"):
                update()
        graph.replay()

    return call


def compiled(function, wanted):
    """function by torch.compile, if wanted; as it is, which a line says, where that fails.

    Not for what draws numbers.
    """
    if not wanted:
        return function
    torch._dynamo.config.recompile_limit = 1_000        # runs side by side share the code, but not the row
    warnings.filterwarnings("ignore", module=r"torch\._inductor")   # that TF32 in matrix products is off
    fast = torch.compile(function, fullgraph=True, dynamic=False)

    def call(*args):
        nonlocal fast
        try:
            return fast(*args)
        except Exception as error:                      # whatever its compilers stumble over
            if fast is function:
                raise
            print(f"torch.compile: {first_line(error)}; slower, without it", flush=True)
            fast = function
        return function(*args)
    return call


signals = []                # received: the runs stop at their next yield
FIRST, TIMED = 50, 20       # updates in a run's first turn, and how many of these, the last ones, are timed
AGREE = 5_000               # ms after which several processes ask again whether one got a signal


@contextmanager
def catching(training):
    """The first SIGINT, SIGTERM or SIGHUP in the block goes to `signals`; a second one ends the process.

    In training the runs save then; elsewhere it raises KeyboardInterrupt.
    """
    def note(number, _):
        if signals:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        signals.append(number)
        if not training:
            raise KeyboardInterrupt
        with suppress(OSError):             # where nobody reads it any more
            os.write(2, b"\nstopping after the next update; a second signal: at once\n" * (ranks()[0] == 0))

    signals.clear()
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    numbers = [n for n in numbers if signal.getsignal(n) is not signal.SIG_IGN]     # as SIGHUP is under nohup
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def interleave(runs, command=""):
    """Advance generators {folder: train(...)} in turn, each on a CUDA stream of its own; {folder: result}.

    A run yields after each update, is sent whether to save and stop, and returns a dict, which goes to
    FOLDER/result.json with the command and the milliseconds of an update: a mean over updates 31 to 50, while
    no other run is active. A run that raises RunError or OSError ends alone. After a signal all are sent
    True, and KeyboardInterrupt comes when they have saved. Of several processes the runs come one by one, and
    all stop at one update.
    """
    several, cuda = ranks()[1] > 1, torch.cuda.is_initialized()
    there = "cuda" if cuda else "cpu"
    if several and len(runs) > 1:               # collectives come in the same order everywhere
        return {k: v for folder, run in runs.items() for k, v in interleave({folder: run}, command).items()}
    streams = {folder: torch.cuda.Stream() if cuda else None for folder in runs}
    active, results, took, turn, every, stop = dict(runs), {}, {}, 0, 1, False

    def now():
        if cuda:
            torch.cuda.synchronize()            # the next stream reads what this one wrote
        return time.perf_counter()

    def advance(folder, run):
        if turn > 0:
            run.send(stop)
            return
        began = now()
        for i in range(FIRST):
            began = now() if i == FIRST - TIMED else began
            run.send(None if i == 0 else stop)
            if any_asked() if several else signals:
                return
        took[folder] = 1e3 * (now() - began) / TIMED

    def any_asked():                            # any of several processes, to stop
        mine = torch.tensor(float(len(signals)), device=there)
        return bool(averaged(mine)[0] > 0)

    with catching(training=True):
        while active:
            if not several:
                stop = bool(signals)
            elif turn % every == 0:             # every five seconds or so
                with torch.cuda.stream(*streams.values()):
                    stop = any_asked()
            for folder, run in list(active.items()):
                try:
                    with torch.cuda.stream(streams[folder]):
                        advance(folder, run)
                    continue
                except StopIteration as end:
                    results[folder] = end.value
                except (RunError, OSError) as error:
                    if several:                             # perhaps of one process alone
                        raise
                    results[folder] = dict(failed=str(error))
                    print(f"{folder}: {error}", flush=True)
                del active[folder]
                path = f"{folder}/result.json"
                if folder not in took and os.path.exists(path):         # finished before
                    with suppress(ValueError, AttributeError), open(path) as file:
                        old = json.load(file)
                        if old.get("updates") == results[folder].get("updates"):
                            took[folder] = old.get("milliseconds")
                            results[folder] = ({} if "fd" in results[folder] else old) | results[folder]
                results[folder] |= dict(milliseconds=took.get(folder), command=command)
                with replacing(path) as file:
                    file.write(json.dumps(results[folder], indent=1).encode())
            turn += 1
            if several and any(took.values()) and every == 1:           # the same in all processes
                every = max(1, int(AGREE / averaged(torch.tensor(*took.values(), device=there))[0]))
            if stop and active:
                raise KeyboardInterrupt
        if several and any_asked():             # in the last updates, before the next of several runs
            raise KeyboardInterrupt
    return results


# ---- Keeping: folders, checkpoints, logs -------------------------------------------------------------------

@contextmanager
def replacing(path):
    """A binary file that takes path's place when the block ends well; else path stays as it was.

    Its folder is made if need be. Of several processes the first one alone writes it.
    """
    if ranks()[0]:
        yield io.BytesIO()
        return
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    part = f"{path}.{os.getpid()}.tmp"          # two commands may write one file, such as statistics
    try:
        with open(part, "wb") as file:
            yield file
        os.replace(part, path)
    except BaseException as error:
        if isinstance(error, OSError) and not error.filename:       # a write does not name it
            error.filename = path
        with suppress(OSError):
            os.remove(part)
        raise


def save_tensors(path, tree):
    """torch.save() by replacing(); by way of memory, as a full disk is to be an OSError."""
    torch.save(tree, buffer := io.BytesIO())
    with replacing(path) as file:
        file.write(buffer.getbuffer())


Run = namedtuple("Run", "name row seed folder")         # name: with its modifiers, see find_row
locked = {}                                             # folders that this process holds until it ends


def unlock(folder):
    """Hold a folder no longer."""
    with suppress(KeyError):
        os.close(locked.pop(folder))


def unlock_all(_):
    """Hold nothing, in a worker, which may outlive its parent."""
    for folder in list(locked):
        unlock(folder)


def lock(folder, wait=False):
    """Hold a folder, if its file system has locks; if another process does, wait or raise ValueError."""
    if "fcntl" not in globals():
        return
    unlock(folder)
    locked[folder] = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(locked[folder], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            raise ValueError(f"{folder}: another command trains there; wait, or name another --out")
        print(f"{folder}: another command builds a file there; this one waits", flush=True)
        fcntl.flock(locked[folder], fcntl.LOCK_EX)
    except OSError:
        print(f"{folder}: its file system has no locks; do not train there twice at once")


def run_folders(folders, script, resume):
    """Make the folders of runs, lock them, copy a script and this file there.

    One that holds a log or a checkpoint is put aside as FOLDER-old-N, never written over, unless resume is
    True and it has a checkpoint to go on from.
    """
    if ranks()[0] == 0:         # the sources may stand in that very folder
        sources = {os.path.basename(path): open(path, "rb").read() for path in (script, __file__)}
        there = [folder for folder in folders if os.path.isdir(folder)]
        for folder in there:            # all of them, before the first is put aside
            lock(folder)
        for folder in folders:
            begun, kept = (os.path.exists(f"{folder}/{name}") for name in ("log.csv", "checkpoint.pt"))
            if (begun or kept) and not (resume and kept):
                old = next(old for n in itertools.count(1) if not os.path.exists(old := f"{folder}-old-{n}"))
                os.rename(folder, old)
                there.remove(folder)
                print(f"{folder} held an earlier run, which is now {old}"
                      + "; --resume would have gone on with it" * kept)
            os.makedirs(folder, exist_ok=True)
            if folder not in there:
                lock(folder)
            for part in glob.glob(f"{glob.escape(folder)}/*.[0-9]*.tmp*"):      # of a run that was killed
                os.remove(part)
            for name, text in sources.items():
                with replacing(f"{folder}/{name}") as file:
                    file.write(text)
    if ranks()[1] > 1:
        distributed.barrier()


def save(folder, step, state, settings, check=True):
    """Write FOLDER/checkpoint.pt: a run's step, its settings, and its state.

    state: {name: module, optimizer, torch.Generator or what has a state_dict}; each rank's generators.
    Raises RunError, and the checkpoint before stays, if a weight is not finite, unless check is False: in a
    stack some models may diverge.
    """
    weights = (p for s in state.values() if check and isinstance(s, nn.Module) for p in s.parameters())
    if not all(p.isfinite().all() for p in weights):
        raise RunError(f"diverged at update {step:,}: a weight is not finite")
    own = {name: s.get_state() for name, s in state.items() if isinstance(s, torch.Generator)}
    generators = [own] * ranks()[1]
    if ranks()[1] > 1:
        distributed.all_gather_object(generators, own)
    kept = {name: s.state_dict() for name, s in state.items() if name not in own}
    save_tensors(f"{folder}/checkpoint.pt",
                 dict(step=step, settings=settings, state=kept, generators=generators))


def load(folder, state, settings, start=0):
    """Bring a run's state to FOLDER/checkpoint.pt, before any captured call; its step, `start` if absent.

    Raises ValueError if it is damaged, of other settings, or does not fit.
    """
    path, settings = f"{folder}/checkpoint.pt", json.loads(json.dumps(settings))
    if not os.path.exists(path):
        return start
    try:
        kept = torch.load(path, map_location="cpu", weights_only=True)
        step, found = kept["step"], json.loads(json.dumps(kept["settings"]))
        parts, generators = dict(kept["state"]), kept["generators"]
    except Exception as error:              # whatever its reader stumbles over
        raise ValueError(f"{path}: cannot be read ({first_line(error)}); delete it to begin anew") from error
    for key in sorted(found.keys() | settings.keys()):
        later = key in ("features", "reference") and None in (found.get(key), settings.get(key))
        if found.get(key) != settings.get(key) and not later:
            raise ValueError(f"{path}: found a run of {step:,} updates with {key} = {found.get(key)}, "
                             f"expected {settings.get(key)}; set it back, or name another folder with --out")
    own = parts | generators[ranks()[0]]
    if "adaptive" in parts and "adaptive" not in state and ranks()[0] == 0:
        raise ValueError(f"{path}: found rates that adapt to a feature network, expected it by --features")
    for name, s in state.items():
        if name == "adaptive" and name not in own:
            print(f"{folder}: had no feature network; its rates adapt from here on")
            continue
        try:
            (s.set_state if isinstance(s, torch.Generator) else s.load_state_dict)(own[name])
        except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: {name} does not fit ({first_line(error)}); see --out") from error
        if isinstance(s, torch.optim.Optimizer):
            for group in s.param_groups:                # load_state_dict leaves them on the CPU
                group["lr"] = group["lr"].to(group["params"][0].device)
    print(f"{folder}: goes on at update {step:,}")
    return step


class Log:
    """Means of a run's scalars over intervals: for each a row of FOLDER/log.csv and of the terminal.

    columns: names of the scalars that add() takes, which are summed on the device; steps: updates of the run
    in all; readings: names of values that are computed when a row is written.
    """

    def __init__(self, folder, columns, steps, device, readings=()):
        self.path, self.name = f"{folder}/log.csv", os.path.basename(folder)
        self.columns, self.steps, self.readings = columns, steps, readings
        self.sums, self.zero = torch.zeros(2, len(columns), device=device), torch.zeros((), device=device)
        self.given, self.seconds = {}, 0.0
        self.clock = time.perf_counter()

    def state_dict(self):
        seconds = self.seconds + time.perf_counter() - self.clock
        return {"sums": averaged(self.sums)[0], "seconds": seconds}

    def load_state_dict(self, kept):
        self.sums.copy_(kept["sums"])
        self.seconds = kept["seconds"]

    def start(self, step):
        """Start the clock at an update, and the file with the rows that it has up to there."""
        rows = [",".join(["step", *self.columns, *self.readings, "seconds"])]
        if step and os.path.exists(self.path):
            with open(self.path, errors="replace") as file:
                found = file.read().splitlines()[1:]
            ours = [row for row in found
                    if row.count(",") == rows[0].count(",") and row.split(",")[0].isdecimal()]
            if len(ours) < len(found) - 1:          # than one that a kill has damaged
                os.replace(self.path, f"{self.path}.old")
                print(f"{self.path}: rows of another form are now in {self.path}.old")
            rows += [row for row in ours if int(row.split(",")[0]) <= step]
        with replacing(self.path) as file:
            file.write("".join(row + "\n" for row in rows).encode())
        self.clock, self.shown = time.perf_counter(), (step, time.perf_counter())

    def add(self, **values):
        """Take in scalars, by columns; no synchronisation. Of a stack's, [B], the mean of the finite ones."""
        names = tuple(values)
        if names not in self.given:             # in uncaptured updates: it copies from the host
            counts = [float(name in names) for name in self.columns]
            self.given[names] = torch.tensor(counts, device=self.zero.device)
        found = [values.get(name, self.zero).detach() for name in self.columns]
        found = [v.where(v.isfinite(), torch.nan).nanmean() if v.ndim else v for v in found]
        self.sums += torch.stack([torch.stack(found), self.given[names]])

    def row(self, step, readings=dict, shown=True):
        """Write the means since the last row, and what readings() gives; RunError if a mean is not finite."""
        sums, now = np.array(averaged(self.sums)[0].tolist()), time.perf_counter()
        self.sums.zero_()
        self.seconds, self.clock = self.seconds + now - self.clock, now
        means = [total / n if n else None for total, n in zip(*sums.tolist())]
        for name, mean in zip(self.columns, means):
            if mean is not None and not math.isfinite(mean):
                raise RunError(f"diverged at update {step:,}: {name} is {mean}")
        found = readings()
        read = [found.get(name) for name in self.readings]
        if ranks()[0] == 0:
            with open(self.path, "a") as file:
                values = ["" if value is None else repr(value) for value in [*means, *read]]
                file.write(",".join([str(step), *values, f"{self.seconds:.2f}"]) + "\n")
        if shown:
            cells = "".join(f"{'-' if v is None else format(v, '.4g'):>11}" for v in [*means, *read])
            rate = (step - self.shown[0]) / (now - self.shown[1])
            minutes, left = divmod(round((self.steps - step) / rate), 60)
            print(f"{self.name:<28}{step:>9,}{cells}{rate:>11.1f}{minutes:>8}:{left:02}", flush=True)
            self.shown = step, now


def log_head(columns, steps, device, samples=0, network=None, reference=None):
    """Two lines above the rows of Log: updates, device, and what scores are of; the columns."""
    of = "; not scored: the same command with --resume --features FILE does it later" if samples else ""
    of = f"; scores of {samples:,} samples by {network.name} against {reference['name']}" if network else of
    names = "".join(f"{column:>11}" for column in (*columns, "updates/s", "min left"))
    return (f"{steps:,} updates on {', PyTorch '.join(machine(device).values())}{of}\n"
            f"{'run':<28}{'update':>9}{names}")


def read_log(folder):
    """FOLDER/log.csv as an array with a field for each column, NaN where the method has no such scalar."""
    return np.genfromtxt(f"{folder}/log.csv", delimiter=",", names=True, ndmin=1)


# ---- Command line ------------------------------------------------------------------------------------------

def flags(doc, methods, method, steps, images):
    """The parser of a script's flags, to which it adds its own; those not given are None or False.

    doc: its docstring; methods: its METHODS; method, steps: defaults; images: the default of --features, a
    text, or "" for a script without images.
    """
    def seeds(text):
        first, colon, last = text.partition(":")
        found = range(int(first), int(last)) if colon else range(positive(first))
        if not found or not 0 <= found[0] < found[-1] + 1 < 2 ** 32:
            raise ValueError
        return found

    def positive(text, least=1):
        if not least <= int(text) < 2 ** 32:
            raise ValueError
        return int(text)

    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    names = textwrap.wrap(" ".join(methods), 100, break_on_hyphens=False)
    parser.epilog = "\n  ".join(["NAMEs, each with +KEY=VALUE of the script's DEFAULTS if need be:", *names])
    add, path = parser.add_argument, os.path.expanduser         # a shell leaves ~ in --out=~/DIR
    add("--method", nargs="+", metavar="NAME", help=f"rows to train side by side (default {method})")
    add("--seeds", type=seeds, default=range(1), metavar="N", help="3: 0, 1, 2; 5:8: 5, 6, 7 (default 1)")
    add("--steps", type=positive, metavar="N", help=f"generator updates (default {steps})")
    add("--out", type=path, default="runs", metavar="DIR", help="folder for the runs (default runs)")
    add("--resume", action="store_true", help="go on from the checkpoints of the runs")
    add("--device", choices=["cpu", "cuda"], help="(default cuda where there is one)")
    if images:
        add("--data", type=path, default="data", metavar="DIR", help="folder of the arrays (default data)")
        add("--samples", type=partial(positive, least=2), metavar="N",
            help="samples to score and to keep (default 10000; on a CPU 2000; of a table its paper's)")
        add("--features", type=path, metavar="FILE",
            help="network to score with: a torch.export file (.pt2) from uint8 [N, 3, H, W] to features "
                 f"[N, D], or weights (.pth) of FID's Inception network (default: {images})")
    return parser


def find_row(text, methods, defaults, names):
    """A row of METHODS by NAME+KEY=VALUE...: (its name, with those keys that change it, the row).

    methods: {name: what differs from defaults}; names: {key: values}, of keys whose values are names. Tuples
    by commas, 1 and 0 for True and False; +lr= sets both rates unless +lr_g= is given. Raises ValueError.
    """
    def known(what, word, words):
        if word not in words:
            close = "".join(f"; did you mean {near}?" for near in difflib.get_close_matches(word, words, 1))
            words = ", ".join(filter(None, words))
            raise ValueError(f"--method {text}: found {what} {word!r}, expected {words}{close}")

    (name, *changes), given = text.split("+"), {}
    known("the row", name, list(methods))
    row = defaults | methods[name]
    for key, _, value in (change.partition("=") for change in changes):
        known("the key", key, list(defaults))
        kind = type(defaults[key])
        if kind is str:
            known(key, value, names[key])
        try:
            given[key] = (tuple(float(part) for part in value.split(",")) if kind is tuple else
                          bool(("0", "1").index(value)) if kind is bool else kind(value))
            parts = given[key] if kind is tuple else [given[key]]
            most = 1 if key == "beta" else math.inf
            if (kind is tuple and len(parts) != len(defaults[key]) > 1
                    or kind is not str and not all((key == "batch") <= part < most for part in parts)):
                raise ValueError
        except ValueError:
            raise ValueError(f"--method {text}: found {value!r} for {key}, expected {kind.__name__}, as "
                             f"{written(defaults[key])}") from None
    if "lr" in given and "lr_g" in defaults:
        given = dict(lr_g=0.0) | given
    changed = [f"{key}={written(given[key])}" for key in defaults if given.get(key, row[key]) != row[key]]
    return "+".join([name, *changed]), row | given


def check_row(row, critic, batch_norm=False):
    """Raises ValueError if values of a row do not fit each other.

    critic, batch_norm: whether its networks have a critic, and a critic with batch norm.
    """
    loss, steps = row["loss"], row["critic_steps"]
    held = [key for key in "penalty weights activation autoencoder clip burst".split() if row.get(key)]
    keys = "nets", "loss", "form", "critic", "critic_steps", *held
    found = " ".join(f"{key}={written(row[key])}" for key in keys if key in row)
    if not critic and (loss != "mmd" or steps or row.get("spectral")):
        raise ValueError(f"{found}: expected a critic of 1 output or more")
    if (loss == "gram") != bool(row["form"]) or loss == "gram" and steps:
        raise ValueError(f"{found}: expected a form and critic_steps=0 of gram alone")
    if not steps and (held or loss not in ("gram", "mmd")):
        raise ValueError(f"{found}: expected critic_steps=1 or more")
    slope = loss in ("smmd", "swgan", "sobolev", "gcmmd") or row.get("penalty") and not row.get("weights")
    if batch_norm and (slope or row.get("activation")):
        raise ValueError(f"{found}: expected a critic without batch norm, through which points meet")


def written(value):
    """A value of a row as --method takes it."""
    parts = value if isinstance(value, tuple) else (value,)
    return ",".join(part if isinstance(part, str) else f"{part:.12g}" for part in parts)


class Terminal:
    """A stream that nobody may read any more: what cannot be written is lost, and nothing else."""

    def __init__(self, stream):
        self.stream = stream
        with suppress(AttributeError, ValueError):          # names of files may be of any bytes
            stream.reconfigure(errors="backslashreplace")

    def write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:                                     # or Python would try again at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        except (AttributeError, ValueError):                # None, or closed
            pass

    def flush(self):
        self.write("")

    def __getattr__(self, name):
        return getattr(self.stream, name)


def run(main):
    """Call a script's main(); what it raises becomes a line, of the first process alone, and an exit code."""
    sys.stdout, sys.stderr = Terminal(sys.stdout), Terminal(sys.stderr)
    try:
        with catching(training=False):
            main()
        if ranks()[1] > 1:
            gc.collect()            # captured graphs refer to the process group
            distributed.destroy_process_group()
        return
    except KeyboardInterrupt:
        error, code = "stopped; the same command goes on with --resume", 128 + (signals or [signal.SIGINT])[0]
    except (OSError, RunError, ValueError) as found:
        error, code = found, 1
    if ranks()[0] == 0:
        print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr)
    sys.exit(code)


def command(argv):
    """The command line as a user types it; argv as main() got it."""
    start = ["python"] if ranks()[1] == 1 else ["torchrun", f"--nproc-per-node={ranks()[1]}"]
    return shlex.join([*start, os.path.basename(sys.argv[0]), *(sys.argv[1:] if argv is None else argv)])


def machine(device):
    """What a result was made on, a dict: GPU or CPU, and the version of PyTorch."""
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} threads"
    name = f"{ranks()[1]} x {name}" if ranks()[1] > 1 else name
    return {"device": name, "torch": torch.__version__}


def parameters(*networks):
    """How many parameters generator, critic and decoder have, those that there are: a dict by these names."""
    return {what: sum(p.numel() for p in network.parameters())
            for what, network in zip(("generator", "critic", "decoder"), networks) if network}


def show(name, row, *networks):
    """Print a row, its keys that are on, and the parameters of generator, critic and decoder."""
    keys = " ".join(f"{key}={written(value)}" for key, value in row.items() if value not in (0, "", ()))
    counts = ", ".join(f"{what} {n:,}" for what, n in parameters(*networks).items())
    print(f"{name}: {keys}; parameters: {counts}", flush=True)


def table(head, rows):
    """A Markdown table with aligned columns as text: head a list of names, rows lists of as many strings."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths)) + " |" for line in lines)


def mean_std(values, digits=1):
    """Mean ± standard deviation of values over seeds as text; the value of one, - of none."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}" if values else "-"
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"


def score_table(runs, results, paper):
    """The scores of runs as text, mean ± std over seeds, beside the paper's, {name: "IS, FID, KID"}.

    results: of interleave, with the keys of scores(). A column that would be empty is left out.
    """
    scored = next((result for result in results.values() if "fd" in result), None)
    what, fid, rows = "not scored", scored and scored["features"] == FID_NAME, []
    if scored:
        what = f"{scored['samples']:,} samples, {scored['features']}, against {scored['reference']}"
    shown = dict(fd=("FID" if fid else "Fréchet distance", 1), fd_bootstrap=("bootstrap, biased upward", 1),
                 kid=("KID", 4), isc=("Inception score" if fid else "logit score (not IS)", 2),
                 isc_bootstrap=("its bootstrap", 2), isc_best=("its best in training", 2),
                 milliseconds=("ms an update alone", 2))
    for name in dict.fromkeys(run.name for run in runs):
        own = {run.seed: results[run.folder] for run in runs if run.name == name}
        done = [result for result in own.values() if "failed" not in result]
        failed = [f"seed {seed} {result['failed']}" for seed, result in own.items() if "failed" in result]
        cells = [mean_std([result[key] for result in done if result.get(key) is not None], digits)
                 for key, (_, digits) in shown.items()]
        isc, distance, kid, *_ = [*(paper.get(name, "") if scored else "").split(", "), "", "", ""]
        rows.append([name, f"{max((result['updates'] for result in done), default=0):,}",
                     "; ".join([f"{len(done)} of {len(own)}", *failed]), *cells,
                     *(cell or "-" for cell in (distance, kid, isc))])
    head = ["method", "updates", "seeds", *(name for name, _ in shown.values()),
            "the paper's FID", "the paper's KID", "the paper's Inception score"]
    full = [i for i, cells in enumerate(zip(*rows)) if set(cells) != {"-"}]
    return (f"{what}; mean ± std over seeds\n\n"
            + table([head[i] for i in full], [[row[i] for i in full] for row in rows]))


# ---- Figures -----------------------------------------------------------------------------------------------

def save_grid(path, images, columns=16):
    """Write images, uint8 [N, C, H, W], as one PNG with so many in a row."""
    with replacing(path) as file:
        torchvision.utils.save_image(images.cpu() / 255, file, "PNG", nrow=columns, padding=1)


def save_figure(path, figure):
    """Write a matplotlib figure as a PNG, and print its path."""
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=110)
    print(path)


def scatter_panel(axes, x, y, title):
    """A panel with data x in blue and samples y in orange, [N, 2], to one scale; of [N, 1], histograms."""
    for points, colour, label in ((x, "tab:blue", "data"), (y, "tab:orange", "samples")):
        if points.shape[1] == 1:
            points = points[np.isfinite(points)]
            axes.hist(points, 40, color=colour, alpha=0.5, label=label)
            continue
        axes.scatter(*points[:, :2].T, s=4, color=colour, alpha=0.5, linewidths=0, label=label)
        axes.set_aspect("equal", adjustable="datalim")
    axes.set_title(title, fontsize=9)
    axes.tick_params(labelsize=7)


TITLES = dict(fd="Fréchet distance to the test images", kid="KID", mean_r="mean of r",
              isc="Inception score, by the feature network's logits", loss_g="generator's loss",
              loss_f="critic's loss", condition="condition number of K + ridge I",
              spread="variance of f(x) over variance of f(y)")
LOGARITHMIC = ("fd", "mean_r", "condition", "spread")       # others can be negative, or vary little


def curves_figure(finished, panels):
    """Panels, pairs (column, over), of what finished runs have logged: a line a seed, a colour a method.

    finished: pairs of a Run and its result; columns of TITLES; over: "update", or "second" of a run alone.
    """
    methods, labels = list(dict.fromkeys(run.name for run, _ in finished)), {}
    logs = [read_log(run.folder) for run, _ in finished]
    panels = [panel for panel in panels if any(np.isfinite(log[panel[0]]).any() for log in logs)] or panels
    columns = 2 if len(panels) == 4 else min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5.5 * columns, 3.25 * rows), layout="constrained")
    for i, (column, over) in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, i)
        for (run, result), log in zip(finished, logs):
            there, place = np.isfinite(log[column]), methods.index(run.name)
            x = log["step"] * (1 if over == "update" else (result["milliseconds"] or math.nan) / 1e3)
            labels[run.name], = axes.plot(x[there], log[column][there], color=f"C{place}", linewidth=1,
                                          linestyle=("-", "--", ":", "-.")[place // 10 % 4],
                                          marker="." if there.sum() < 20 else None)
        axes.set_yscale("log" if column in LOGARITHMIC else "linear")
        axes.set_title(TITLES[column], fontsize=9)
        axes.set_xlabel(over, fontsize=8)
        axes.tick_params(labelsize=7, which="both")
    figure.legend(labels.values(), labels, loc="outside lower center", fontsize=8, ncols=3 * columns)
    return figure


def singular_figure(finished):
    """Singular values of critics' layers over their largest, early and late (Scaled MMD, Figures 2b and 7).

    finished: as in curves_figure; a panel for each layer and method, whose first seed it shows.
    """
    kept = {}
    for run, _ in reversed(finished):
        paths = glob.glob(f"{glob.escape(run.folder)}/singular-*.npz")
        kept[run.name] = {int(path.rpartition("-")[2][:-4]): [v for v in np.load(path).values() if len(v) > 1]
                          for path in paths}                # one output has one value
    depth = max((len(layers) for steps in kept.values() for layers in steps.values()), default=0)
    if not depth:
        raise ValueError("--figure singular: found no critic, expected rows that have one")
    figure = Figure(figsize=(2.4 * depth, 2.4 * len(kept)), layout="constrained")
    grid = figure.subplots(len(kept), depth, squeeze=False, sharey=True)
    for row, (method, steps) in zip(grid, reversed(kept.items())):
        for i, axes in enumerate(row):
            there = [(step, layers[i]) for step, layers in sorted(steps.items()) if i < len(layers)]
            for place, (step, values) in enumerate(there):
                axes.plot(values / values.max(), label=f"{step:,}",
                          color=matplotlib.colormaps["viridis"](place / max(len(steps) - 1, 1)))
            axes.set_yscale("log")
            axes.set_title(f"{method}, layer {i + 1}", fontsize=8)
            axes.tick_params(which="both", labelsize=6)
        row[0].legend(title="update", fontsize=6, title_fontsize=6)
    return figure
