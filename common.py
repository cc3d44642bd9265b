"""What two scripts or more share: mathematics first, then networks, data, scores, running, keeping, figures.

Notation, the same in all files
    x ~ p   data [N, D]                    f   critic R^D -> R^K, a network or none
    y ~ q   samples y = g(z) [M, D]        g   generator, z its noise
    k       kernel, sigma its bandwidth    r   density ratio, one value a point
    h       features f(x) [N, K]           J   Jacobians of f at points [N, K, D]
    K_xx, K_xy, K_yy   Gram matrices of f(x) and f(y): stacks [S, N, M], a slice for each bandwidth
    [..., N, D]        any leading dimensions: the mathematics serves a Stack of models as it serves one

In four sentences. A kernel compares two sets of points through the Gram matrices of all their pairs: the
squared MMD is the mean of K_xx plus the mean of K_yy minus twice the mean of K_xy; with a Gaussian kernel and
all of p and q it is zero if and only if p = q.
In the space of images no fixed kernel sees enough, so a critic f maps them to R^K first. An adversarial
critic maximises the very MMD that the generator minimises, which is a saddle point. GRAM's critic maximises
another quantity, the divergence between p and q that the density ratio in its space shows, so that matching
them there matches them everywhere.

Where each equation stands ("GRAM": Generative Ratio Matching Networks, ICLR 2020; "GAMN": Generative
Adversarial Mapping Networks, 2017; "Scaled MMD": On gradient regularizers for MMD GANs, NeurIPS 2018)
    gaussian         k(x, y) = exp(-|x - y|^2 / 2 sigma^2)       Li et al. 2017, section 3
    rational_quadratic, dot, distance   kernels                  Demystifying MMD GANs, eq. 6, 8, section 5
    gram             K_xx, K_xy, K_yy from one evaluation of k   GRAM, Algorithm 1
    mmd2             squared MMD, biased or unbiased             GRAM, eq. 2, 10; Gretton et al. 2012, eq. 3
    mmd              its square root, with a slope at 0          JuliaGRAM 44159b2
    density_ratio    r = K_qq^-1 K_qp 1                          GRAM, eq. 8
    pearson          mean((r - 1)^2)                             GRAM, eq. 7
    gram_objective   what GRAM's critic maximises, five forms    GRAM, eq. 9, footnote 3; JuliaGRAM; GRAMFlow
    gan_critic, gan_generator                                    Goodfellow et al. 2014
    witness          the MMD's best critic                       Gretton et al. 2012, section 2.3
    wasserstein, clip_weights                                    Arjovsky et al. 2017, eq. 2, Algorithm 1
    feasible_set, reconstruction                                 Li et al. 2017, section 3
    with_dropout     of GMMN+AE's encoder                        Li et al. 2015, section 4
    cramer, cramer_witness                                       Demystifying MMD GANs, eq. 10, 9
    gradient_penalty                                             Gulrajani et al. 2017, eq. 3; GAMN, eq. 7
    activation_penalty   of all the critic's layers              Demystifying MMD GANs, footnote 19
    l1, l2           on norm_weights or on all weights           GAMN, eq. 9, 8
    smmd2, smmd2_section_4, swgan                                Scaled MMD, Proposition 5; section 4
    spectral         W = gamma W / |W|                           Scaled MMD, section 3.2
    sobolev          the Sobolev GAN's critic                    Mroueh et al. 2018, Algorithm 1
    gradient_constrained_mmd2   exact, and its critic            Scaled MMD, Propositions 3, 4
    sobolev_critic                                               Scaled MMD, appendix B
    frechet_distance, kid, inception_score   of features         Heusel et al. 2017; Demystifying MMD GANs
    similarity, relative_similarity   the three-sample test      Bounliphone et al. 2016
"""
import argparse
import copy
import datetime
import errno
import gc
import glob
import hashlib
import io
import itertools
import json
import logging
import math
import multiprocessing
import os
import select
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from functools import partial

import matplotlib
import numpy as np
import torch
import torch.export.passes
import torch.fx
import torchvision
from matplotlib.figure import Figure
from PIL import Image
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.inception import BasicConv2d
from torchvision.transforms.functional import gaussian_blur, pil_to_tensor

try:
    import fcntl
except ImportError:         # on Windows
    fcntl = None

# ------------------------------------------------------------------------------------------------------------
# Kernels
# ------------------------------------------------------------------------------------------------------------


def squared_distances(x, y):
    """|x_i - y_j|^2 for all pairs, never negative: [..., N, D] and [..., M, D] to [..., N, M].

    |x|^2 + |y|^2 - 2 x.y takes one matrix product in place of N M D differences, but cancels: in float32 it
    is wrong by 1e-7 |x|^2, which can exceed the ridge of density_ratio and leave a Gram matrix that is not
    positive. So it is summed in float64 and rounded once.
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

    x [..., N, D], y [..., M, D], alpha [S]; returns [..., S, N, M]. Each is a mixture of Gaussians of all
    bandwidths, so that no distance is too long for it (Binkowski et al. 2018, eq. 6).
    """
    d_2, alpha = squared_distances(x, y)[..., None, :, :], alpha[:, None, None]
    return (1 + d_2 / (2 * alpha)) ** -alpha


def dot(x, y):
    """Linear kernel x_i.y_j, [..., N, D] and [..., M, D] to [..., 1, N, M]: its MMD compares means."""
    return (x @ y.mT).unsqueeze(-3)


def euclidean(x):
    """|x|, [..., D] to [...], all of whose derivatives at 0 are taken as 0.

    torch's second derivatives there are NaN, and a penalty on slopes meets them: rounded to TF32, a point
    close to x in the interval between y and x is x itself.
    """
    squares = x.square().sum(-1)
    zero = squares == 0
    return squares.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)


def distance(x, y):
    """Distance kernel (|x_i| + |y_j| - |x_i - y_j|) / 2, [..., N, D] and [..., M, D] to [..., 1, N, M].

    Its squared MMD is the energy distance (Binkowski et al. 2018, eq. 7 and 8 with z_0 = 0; mbinkowski/
    MMD-GAN, gan/core/mmd.py, lacks the half).
    """
    between, to_x, to_y = euclidean(x[..., :, None, :] - y[..., None, :, :]), euclidean(x), euclidean(y)
    return ((to_x[..., :, None] + to_y[..., None, :] - between) / 2).unsqueeze(-3)


def cubic(x, y):
    """KID's kernel (x_i.y_j / D + 1)^3 (Binkowski et al. 2018, section 4): [N, D], [M, D] to [N, M]."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def origin(points):
    """The mean of points [..., N, D] as a constant [..., 1, D], to be subtracted from all that a kernel sees.

    No MMD depends on the origin, not even the dot kernel's, and so nothing keeps a critic's features near it.
    But float32 has few digits left for differences of points that are far from it (Binkowski et al. 2018,
    footnote 19).
    """
    return points.mean(-2, keepdim=True).detach()


def kernels(sigma, rbf, alpha, device=None, dtype=torch.float32):
    """The kernels that a row of METHODS names, functions from [..., N, D] and [..., M, D] to [..., S, N, M].

    sigma, rbf: bandwidths of the Gaussians "li" and "rbf", the latter the variances of "gmmn"; alpha: of "rq"
    and "rq*", tuples.
    """
    sigma, rbf, alpha = (torch.tensor(v, dtype=dtype, device=device) for v in (sigma, rbf, alpha))
    rq = partial(rational_quadratic, alpha=alpha)
    return {"li": partial(gaussian, sigma=sigma), "rbf": partial(gaussian, sigma=rbf),
            "gmmn": partial(gaussian, sigma=rbf.sqrt()), "rq": rq, "dot": dot,
            "rq*": lambda x, y: torch.cat([rq(x, y), dot(x, y)], -3),
            "distance": distance, "unit": unit_gaussian}


def gram(kernel, x, y):
    """The three Gram matrices of two sets, from one evaluation of a kernel on both (GRAM, Algorithm 1).

    x [..., N, D], y [..., M, D]; kernel from two sets of sizes n and m to [..., S, n, m]; the origin is the
    mean of the pooled sets. Returns K_xx [..., S, N, N], K_xy [..., S, N, M], K_yy [..., S, M, M].
    """
    pooled, sizes = torch.cat([x, y], -2), [x.shape[-2], y.shape[-2]]
    pooled = pooled - origin(pooled)
    rows_x, rows_y = kernel(pooled, pooled).split(sizes, -2)    # split, not slices: fewer launches backwards
    K_xx, K_xy = rows_x.split(sizes, -1)
    _, K_yy = rows_y.split(sizes, -1)
    return K_xx, K_xy, K_yy


# ------------------------------------------------------------------------------------------------------------
# Maximum mean discrepancy
# ------------------------------------------------------------------------------------------------------------


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

    The first released GRAM code has this 1e-6 (JuliaGRAM 44159b2); in later code the slope at 0 is infinite.
    """
    return (mmd2(K_xx, K_xy, K_yy).clamp(min=0) + 1e-6).sqrt()


# ------------------------------------------------------------------------------------------------------------
# Density ratios, and GRAM's critic
# ------------------------------------------------------------------------------------------------------------


def density_ratio(K_qq, K_qp, ridge):
    """Density ratio r = p / q at the points of q by kernel mean matching, mean over bandwidths (GRAM, eq. 8).

    K_qq [..., S, M, M], K_qp [..., S, M, N]; returns r [..., M], which solves (K_qq + ridge I) r =
    (M / N) K_qp 1. The paper prints no M / N (it has M = N) and no ridge: JuliaGRAM adds 1e-3 (src/kmm.jl),
    GRAMFlow nothing. With one, r are the values at y of the function w in the kernel's space that minimises
    mean(w(y)^2) / 2 - mean(w(x)) + ridge / (2 M) |w|^2 (KuLSIF; Kanamori et al. 2012). r may be negative; it
    is NaN where K_qq + ridge I is not positive definite. Whatever p and q are, mean(r^2) is at most
    M / (4 ridge) if k(x, x) = 1: (M / N) K_qp 1 are values of M times a function of norm 1 or less, and
    k / (k + ridge)^2 <= 1 / (4 ridge) for each eigenvalue k of K_qq.

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


def condition(K, ridge):
    """The largest condition number of K + ridge I, what density_ratio inverts, over kernels K [S, N, N]."""
    values = torch.linalg.eigvalsh(K.double().cpu()) + ridge
    return float((values[:, -1] / values[:, 0]).max())


def pearson(r):
    """Estimate mean((r - 1)^2) of the Pearson divergence from r = p / q at samples of q (GRAM, eq. 7).

    r [..., N], returns [...]. Fitted to the same points it is no lower bound: it has the error of the fit,
    which a critic raises by spreading its features over many bandwidths. On the ring it climbs to 14, and to
    10 between two batches of data (results/ring2d-pearson.md). From r = q / p at data it estimates the
    divergence with p and q exchanged.
    """
    return (r - 1).square().mean(-1)


AT_DATA = ("swap", "flow")      # the forms of gram_objective whose ratio stands at the data: they invert K_xx


def gram_objective(K_xx, K_xy, K_yy, form, ridge, lam):
    """What GRAM's critic maximises, and the ratio that it is made of: ([...], r).

    form    objective                   r             source
    sum     pearson(r) + lam sum(r)     p / q at y    GRAM, eq. 9, lam = 1; JuliaGRAM since 7e6da00
    mean    pearson(r) + lam mean(r)    p / q at y    JuliaGRAM 441596b, the "camera ready" code
    clip    pearson(max(r, 0))          p / q at y    GRAM, footnote 3; JuliaGRAM 44159b2
    swap    pearson(r) + lam sum(r)     q / p at x    GRAM, eq. 9 with p and q exchanged; ours, for images
    flow    mean(r)                     q / p at x    GRAMFlow.ipynb, the authors' code for CIFAR-10

    E_q[p / q] = E_p[q / p] = 1 for EVERY critic: sum(r) and mean(r) estimate a constant and are no
    divergence. They teach the critic through what the finite sample does to the estimate. The mean of r at y
    is the mean over x of the ridge regression that is to be 1 at all of y: near 0 where x is far from y, and
    above 1 where x is in the middle of y. So "sum" and "mean" spread the samples around the data and draw the
    data together, which the generator then follows; "swap" and "flow" spread the data around the
    samples, never far from them, and the generator has to spread its samples. pearson(r) can always be raised
    by variance (density_ratio has the bound). Where all of K_xy is 0 so is r, the dead end of "clip", whose
    gradient is 0 there too. Raises ValueError for another form.
    """
    if form in AT_DATA:
        r = density_ratio(K_xx, K_xy, ridge)        # the notebook's denominator block is the data
    else:
        r = density_ratio(K_yy, K_xy.mT, ridge)
    if form in ("sum", "swap"):
        return pearson(r) + lam * r.sum(-1), r
    if form == "mean":
        return pearson(r) + lam * r.mean(-1), r
    if form == "clip":
        r = r.clamp(min=0)
        return pearson(r), r
    if form == "flow":
        return r.mean(-1), r
    raise ValueError(f"form {form!r}: expected sum, mean, clip, swap or flow")


# ------------------------------------------------------------------------------------------------------------
# GAN
# ------------------------------------------------------------------------------------------------------------


def gan_critic(d_x, d_y):
    """A discriminator's loss, the mean of -log s(d_x) plus the mean of -log(1 - s(d_y)): [...].

    Logits d_x [..., N, 1] of data and d_y [..., M, 1] of samples, s the logistic function. Goodfellow et al.
    2014, eq. 1; JuliaGRAM takes half of it, which Adam does not notice.
    """
    return F.softplus(-d_x).mean((-2, -1)) + F.softplus(d_y).mean((-2, -1))


def gan_generator(d_y):
    """A generator's non-saturating loss, the mean of -log s(d_y): [...].

    Logits d_y [..., M, 1] of samples, s the logistic function (Goodfellow et al. 2014, section 3).
    """
    return F.softplus(-d_y).mean((-2, -1))


# ------------------------------------------------------------------------------------------------------------
# Adversarial critics: MMD-GAN, GAMN, WGAN. The critic maximises the distance that the generator minimises, so
# something has to hold it: clipped weights, an autoencoder, a penalty on its slope or on its weights
# ------------------------------------------------------------------------------------------------------------


def witness(kernel, t, x, y):
    """The MMD's witness mean_j k(t, x_j) - mean_j k(t, y_j), summed over kernels, at points t: [..., T].

    kernel as in gram; t [..., T, D], x [..., N, D], y [..., M, D]; up to a constant, which the origin moves.
    Up to a factor the best critic in the kernel's space (Gretton et al. 2012, section 2.3; Scaled MMD, below
    eq. 1).
    """
    pooled = torch.cat([x, y], -2)
    centre = origin(pooled)
    K_x, K_y = kernel(t - centre, pooled - centre).split([x.shape[-2], y.shape[-2]], -1)
    return (K_x.mean(-1) - K_y.mean(-1)).sum(-2)


def wasserstein(f_x, f_y):
    """The mean of f over data minus its mean over samples, [..., N, 1] and [..., M, 1] to [...].

    Wasserstein's distance, if f is the best of the 1-Lipschitz functions (Arjovsky et al. 2017, eq. 2).
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
    Binkowski et al. 2018, E |y - y'| + E |x| - E |y| - E |x - y|, their account of Bellemare et al. 2017,
    Algorithm 1. Its generator minimises the energy distance, mmd2 under `distance`.
    """
    M = h_y.shape[-2]
    apart = euclidean(h_y[..., :, None, :] - h_y[..., None, :, :]).sum((-2, -1))
    own = apart / (M * (M - 1)) - euclidean(h_y).mean(-1)
    return cramer_witness(h_x, h_y).mean(-1) - own


def feasible_set(h_x, h_y):
    """Li et al.'s feasible set reduction, mean over outputs of min(E f(x) - E f(y), 0): [..., N, K] to [...].

    Zero where the critic is on average larger on data than on samples, negative elsewhere: the critic's
    objective and the generator's loss both have it with a plus (Li et al. 2017, section 3; OctoberChang/
    MMD-GAN, mmd_gan.py). JuliaGRAM's ring code has x and y exchanged, the same up to the sign of the output.
    """
    return (h_x.mean(-2) - h_y.mean(-2)).clamp(max=0).mean(-1)


def reconstruction(x, x_hat):
    """Mean squared error of an autoencoder, the mean over points and coordinates: [..., N, D] to [...].

    MMD-GAN subtracts it from the critic's objective, at data and at samples, to keep the critic injective (Li
    et al. 2017, section 3).
    """
    return (x - x_hat).square().mean((-2, -1))


def with_dropout(network, x, shares, rng):
    """network(x), a Sequential, with dropout of these shares of its linear layers' inputs, one a layer.

    As nn.Dropout, which takes no rng, a torch.Generator (Li et al. 2015, section 4; yujiali/gmmn, train.py:
    0.2 of the pixels, 0.5 of the hidden layer).
    """
    shares = iter(shares)
    for layer in network:
        if isinstance(layer, nn.Linear):
            share = next(shares)
            x = x * (torch.rand(x.shape, generator=rng, device=x.device) >= share) / (1 - share)
        x = layer(x)
    return x


@torch.no_grad()
def clip_weights(network, bound):
    """Clip all weights of a network to [-bound, bound], in place (Arjovsky et al. 2017, Algorithm 1)."""
    for p in network.parameters():
        p.clamp_(-bound, bound)


def jacobian(f, x):
    """f at points, and its Jacobians there, differentiable in f's weights: h [..., N, K], J [..., N, K, D].

    f from [..., N, *shape] to [..., N, K], each point by itself (so no batch norm in f), D the product of
    shape. One backward pass for each of the K outputs.
    """
    x = x.detach().requires_grad_()
    h = f(x)
    rows = [torch.autograd.grad(h_k.sum(), x, create_graph=True)[0] for h_k in h.unbind(-1)]
    return h, torch.stack([row.flatten(h.ndim - 1) for row in rows], -2)


AXES = {"gradient": None, "columns": -2, "pixels": -3}      # of gradient_penalty, by the names that rows use


def gradient_penalty(s, x, y, a, axis=None):
    """mean((|grad s| - 1)^2) at points between data and samples: [...]; subtract it from what f maximises.

    x and y [..., N, *shape]; a ~ U[0, 1], [..., N], one a point, at a x + (1 - a) y. s from points to
    [..., N]: f itself (WGAN-GP, Gulrajani et al. 2017, eq. 3), the sum of its outputs (GAMN, eq. 7), or the
    witness (Demystifying MMD GANs, section 3). The norm is that of the whole point, as in all papers; GAMN's
    eq. 7 to 10 print the penalty with the sign that would raise it. At a gradient of 0 its slope is 0, not
    NaN.

    axis: of images [C, H, W]; each line along it has a norm of its own, the mean is over all lines too. So it
    is in released code: -2, columns, in mbinkowski/MMD-GAN, gan/core/model.py; -3, pixels, in Scaled-MMD-GAN.
    An image of n lines, each with a slope of 1, has a slope of sqrt(n): where the distance is in proportion
    to the slope (dot, distance, Wasserstein's) this is about the paper's penalty with 1 / sqrt(n) of the
    weight.
    """
    A = a.reshape(a.shape + (1,) * (x.ndim - a.ndim))
    between = A * x + (1 - A) * y
    _, J = jacobian(lambda t: s(t).unsqueeze(-1), between)
    if axis is not None:
        J = J.view(between.shape).movedim(axis, -1).flatten(a.ndim, -2)
    return (torch.linalg.vector_norm(J, dim=-1) - 1).square().mean((-2, -1))


def activation_penalty(outputs):
    """Sum over a critic's layers of the mean square of their outputs, over data plus over samples: a scalar.

    outputs: a list of [2 N, ...], of both. It keeps features small where a loss of distances alone does not
    care (Binkowski et al. 2018, footnote 19; mbinkowski/MMD-GAN, gan/core/model.py).
    """
    return 2 * sum(h.square().mean() for h in outputs)


def norm_weights(network):
    """The parameters of a network's normalisation layers, on which GAMN puts its L1 and L2 penalties."""
    kinds = nn.LayerNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d
    return [p for layer in network.modules() if isinstance(layer, kinds) for p in layer.parameters()]


def l1(weights):
    """Sum of the absolute values of a list of tensors: a scalar (GAMN, eq. 9 on norm_weights)."""
    return sum(w.abs().sum() for w in weights)


def l2(weights):
    """Sum of the squares of a list of tensors: a scalar (GAMN, eq. 8 on norm_weights; classical: on all)."""
    return sum(w.square().sum() for w in weights)


# ------------------------------------------------------------------------------------------------------------
# Scaled MMD: the critic's slope, held in closed form. k(x, y) = exp(-|f(x) - f(y)|^2 / 2) throughout
# ------------------------------------------------------------------------------------------------------------


def smmd2(mmd2, J, lam):
    """Squared scaled MMD, mmd2 / (lam + k(x, x) + E|grad f(x)|^2): [...] (Scaled MMD, Proposition 5, eq. 11).

    mmd2 [...] under the unit Gaussian kernel, for which k(x, x) = 1; J [..., N, K, D] Jacobians of f at data.
    """
    return mmd2 / (lam + 1 + J.square().sum((-2, -1)).mean(-1))


def smmd2_section_4(mmd2, J, coefficient):
    """mmd2 / (1 + coefficient E|grad f(x)|^2): [...], the form of section 4, with 10, which drops k(x, x)."""
    return mmd2 / (1 + coefficient * J.square().sum((-2, -1)).mean(-1))


def swgan(f_x, f_y, J, coefficient):
    """wasserstein(f_x, f_y) / sqrt(1 + coefficient (E f(x)^2 + E|grad f(x)|^2)): [...].

    The scaled MMD with a linear kernel, not squared (Scaled MMD, section 4, with 10, and appendix C). f_x
    [..., N, 1] and J [..., N, 1, D], values and Jacobians at data; f_y [..., M, 1] values at samples.
    """
    squares = f_x.square().sum(-1) + J.square().sum((-2, -1))
    return wasserstein(f_x, f_y) / (1 + coefficient * squares.mean(-1)).sqrt()


def sobolev(f_x, f_y, J, multiplier, rho):
    """What the Sobolev GAN's critic maximises, and how far E|grad f(x)|^2 is above 1, Omega: ([...], [...]).

    wasserstein - multiplier Omega - rho / 2 Omega^2; the multiplier of the constraint grows by rho Omega at
    each step (Mroueh et al. 2018, Algorithm 1, with mu = P as in Scaled MMD, section 4; the released code has
    mu = (P + Q) / 2 and never moves the multiplier). Arguments as in swgan.
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
    """The network with W = gamma W / |W| for the weights of its layers, |W| the largest singular value.

    Convolutions as matrices [out, in kh kw]. gamma is 1, or learned, one a layer (Miyato et al. 2018; Scaled
    MMD, section 3.2). |W| is followed by one power iteration each time that a weight is used in training:
    inside of torch.nn.utils.parametrize.cached() that is once.
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
    found = [torch.linalg.svdvals(layer.weight.flatten(1)) for layer in network.modules()
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
    the function from features h_t [..., T, K] to the critic's values [..., T], whose gradient under mu is
    held.

    With delta = [eta; grad eta], eta the witness, at the points of mu, G their M (1 + D) Gram matrix of
    values and derivatives, and c = M lam, the paper has the square (MMD^2 - delta^T (G + c I)^-1 delta) /
    lam. But k, a kernel of features f(x), has its derivatives through f: delta = B a and G = B A B^T, where a
    and A are the same in the K-dimensional space of features, and B is block diagonal with blocks 1 and
    J_m^T. As B^T (B A B^T + c I)^-1 B = (W A + c I)^-1 W with W = B^T B, a block 1 and J_m J_m^T for each
    point, the M (1 + D) system is one of M (1 + K), without any approximation or root. The paper's incomplete
    Cholesky took days on MNIST; its statement of Proposition 4 lacks the 1 / M of mu, its proof has it.
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


def sobolev_critic(p, q, mu, spacing):
    """The Sobolev critic on a grid, [n, n]: its squared gradient has the mean 1 under mu, its border is 0.

    p, q and mu are densities at the grid's nodes, [n, n] in float64. Up to its scale f solves
    -div(mu grad f) = p - q with f = 0 at the border (Mroueh et al. 2018; Scaled MMD, appendix B), here by
    finite differences, with mu between two nodes their mean.
    """
    n = len(p)
    node = torch.arange(n * n).view(n, n)
    flow = torch.zeros(n * n, n * n, dtype=p.dtype)
    for i, j, a, b in ((node[1:], node[:-1], mu[1:], mu[:-1]),
                       (node[:, 1:], node[:, :-1], mu[:, 1:], mu[:, :-1])):
        i, j, between = i.flatten(), j.flatten(), ((a + b) / 2).flatten()
        for row, column, sign in ((i, i, 1), (j, j, 1), (i, j, -1), (j, i, -1)):
            flow.index_put_((row, column), sign * between, accumulate=True)
    inner = node[1:-1, 1:-1].flatten()
    f = torch.zeros_like(p)
    flow = flow[inner][:, inner]
    f[1:-1, 1:-1] = torch.linalg.solve(flow, (p - q).flatten()[inner] * spacing ** 2).view(n - 2, n - 2)
    inside = f.flatten()[inner]
    return f / (inside @ flow @ inside).sqrt()      # the integral of mu |grad f|^2


# ------------------------------------------------------------------------------------------------------------
# One row, one method: the losses of critic and generator that a row of a script's METHODS puts together
# ------------------------------------------------------------------------------------------------------------

SLOPED = ("smmd", "swgan", "gcmmd")     # distances that need the critic's slope at the data; of sobolev,
                                        # the critic's objective alone does


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


class Game(nn.Module):
    """A row's critic, and the losses of both players for distances other than GRAM's; a Stack's are [B].

    row["distance"]   the generator minimises             the critic maximises
    mmd               mmd, biased and not squared         the same
    mmd2              mmd2, unbiased                      the same
    wasserstein       wasserstein                         the same
    smmd, swgan       smmd2_section_4, swgan              the same
    gcmmd             gradient_constrained_mmd2           the same
    cramer            mmd2, unbiased                      cramer
    sobolev           wasserstein                         sobolev
    gan               gan_generator                       -gan_critic

    row may have also
    penalty           (kind, weight): one of AXES, gradient_penalty, or l1, l2 of norm_weights, l2-all of all
                      weights
    activation        weight of activation_penalty
    autoencoder       weight of reconstruction by the decoder, at data and at samples
    feasible          weight of feasible_set, which the generator's loss has too
    scale, lam, rho   coefficient of smmd and swgan; of gcmmd, whose mu are the data; of sobolev
    data_mmd          the generator's loss has the mmd of the points themselves
    encode            samples are codes, f and decoder an autoencoder of the data, whose cross-entropy alone,
                      with_dropout of these shares in f, is the critic's loss (GMMN+AE)

    f, decoder: networks or None; without f the points are the features. kernel: as in gram, or None. rng: for
    the points of the gradient penalty and for dropout. Buffers: multiplier, sobolev's; loss, where a script
    keeps the last.
    """

    def __init__(self, row, f, decoder, kernel, rng):
        super().__init__()
        self.row, self.f, self.decoder, self.kernel = row, f, decoder, kernel
        self.rng, self.kind = rng, row["distance"]
        self.register_buffer("multiplier", torch.zeros(()))
        self.register_buffer("loss", torch.zeros(()))

    def features(self, x, y, outputs=None, sloped=SLOPED):
        """f at data and samples, and its Jacobians at the data for sloped distances, otherwise None."""
        f = self.f
        if f is None or "encode" in self.row:
            return f(x) if f else self.points(x), self.points(y), None
        if self.kind in sloped:
            h_x, J = jacobian(f, x)
            return h_x, f(y), J
        return *both(f, x, y, outputs), None

    @staticmethod
    def points(x):
        """Images [N, C, H, W] as points [N, C H W]; points as they are."""
        return x.flatten(-3) if x.ndim > 3 else x

    def distance(self, h_x, h_y, J=None):
        if self.kind in ("wasserstein", "sobolev"):
            return wasserstein(h_x, h_y)
        if self.kind == "swgan":
            return swgan(h_x, h_y, J, self.row["scale"])
        if self.kind == "gcmmd":
            return gradient_constrained_mmd2(h_x, h_y, h_x, J, self.row["lam"])[0]
        K = gram(self.kernel, h_x, h_y)
        if self.kind == "mmd":
            return mmd(*K)
        squared = mmd2(*K, unbiased=True)
        return smmd2_section_4(squared, J, self.row["scale"]) if self.kind == "smmd" else squared

    def penalty(self, x, y, h_x, h_y):
        def best(h):        # the function of a point whose slope is held
            if self.kind == "cramer":
                return cramer_witness(h, h_y)
            return witness(self.kernel, h, h_x, h_y) if self.kind == "mmd2" else h.sum(-1)

        kind, weight = self.row["penalty"]
        if kind in AXES:
            a = torch.rand(h_x.shape[:-1], generator=self.rng, device=x.device)
            return weight * gradient_penalty(lambda t: best(self.f(t)), x, y, a, AXES[kind])
        norm, weights = {"l1": (l1, norm_weights(self.f)), "l2": (l2, norm_weights(self.f)),
                         "l2-all": (l2, self.f.parameters())}[kind]
        return weight / h_x[..., 0, 0].numel() * norm(weights)      # that of all of a Stack, shared out

    def critic(self, x, y):
        """The critic's loss at data x and samples y, both [..., N, *shape]: [...]."""
        row, outputs = self.row, []
        if "encode" in row:
            return F.binary_cross_entropy(self.decoder(with_dropout(self.f, x, row["encode"], self.rng)), x)
        h_x, h_y, J = self.features(x, y, outputs if "activation" in row else None, (*SLOPED, "sobolev"))
        if self.kind == "gan":
            loss = gan_critic(h_x, h_y)
        elif self.kind == "cramer":
            loss = -cramer(h_x, h_y)
        elif self.kind == "sobolev":
            objective, omega = sobolev(h_x, h_y, J, self.multiplier.clone(), row["rho"])
            loss = -objective
            self.multiplier.add_(row["rho"] * omega.detach())
        else:
            loss = -self.distance(h_x, h_y, J)
        if "penalty" in row:
            loss = loss + self.penalty(x, y, h_x, h_y)
        if "activation" in row:
            loss = loss + row["activation"] * activation_penalty(outputs)
        if "feasible" in row:
            loss = loss - row["feasible"] * feasible_set(h_x, h_y)
        if "autoencoder" in row:
            x_hat, y_hat = both(self.decoder, h_x, h_y)
            loss = loss + row["autoencoder"] * (reconstruction(self.points(x), self.points(x_hat))
                                                + reconstruction(self.points(y), self.points(y_hat)))
        return loss

    def generator(self, x, y):
        """The generator's loss at data x and samples y, [...], and their features h_x and h_y."""
        row = self.row
        with frozen(self.f):
            h_x, h_y, J = self.features(x, y)
        loss = gan_generator(h_y) if self.kind == "gan" else self.distance(h_x, h_y, J)
        if "feasible" in row:
            loss = loss + row["feasible"] * feasible_set(h_x, h_y)
        if "data_mmd" in row:
            loss = loss + mmd(*gram(self.kernel, self.points(x), self.points(y)))
        return loss, h_x, h_y


# ------------------------------------------------------------------------------------------------------------
# Distances between sets of features, in float64
# ------------------------------------------------------------------------------------------------------------


def covariance_root(covariance):
    """A root F of a covariance F^T F, [D, D] to [D, D]; its negative eigenvalues, of rounding, become 0."""
    values, vectors = torch.linalg.eigh(covariance)
    return values.clamp(min=0).sqrt()[:, None] * vectors.T


def gaussian_fit(x, device=None):
    """Mean [D] of features [N, D] and a root F of their covariance F^T F, [R, D], both in float64.

    F is the covariance's own root up to a rotation, or the centred features where N <= D: of so low a rank
    the smallest eigenvalues would be nothing but rounding. Computed on device, part by part.
    """
    if len(x) <= x.shape[1]:
        x = x.to(device).double()
        return x.mean(0), (x - x.mean(0)) / (len(x) - 1) ** 0.5
    centre, total, square = x[:4096].to(device).double().mean(0), 0, 0
    for part in x.split(4096):
        part = part.to(device).double() - centre
        total, square = total + part.sum(0), square + part.T @ part
    shift = total / len(x)
    return centre + shift, covariance_root((square - len(x) * shift.outer(shift)) / (len(x) - 1))


def frechet_distance(a, b):
    """Frechet distance of two Gaussians, each (mean, root) as gaussian_fit returns them; a float.

    |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^1/2) (Heusel et al. 2017). For any roots S = F^T F the last
    trace is the nuclear norm of F_a F_b^T, so no root of a matrix that is not symmetric has to be taken.
    Biased: compare at equal N only.
    """
    (m_a, F_a), (m_b, F_b) = a, b
    driver = "gesvd" if F_a.is_cuda else None       # its default, Jacobi's, takes 1.6 times as long there
    overlap = torch.linalg.svdvals(F_a @ F_b.T, driver=driver).sum()
    return float((m_a - m_b).square().sum() + F_a.square().sum() + F_b.square().sum() - 2 * overlap)


def bootstrap_frechet_distance(x, fit, resamplings=10, device=None):
    """Mean and std of frechet_distance() of as many features drawn with replacement from x [N, D] to fit.

    The protocol of Binkowski et al. 2018, section 5. Of N draws with replacement 63 % differ, so this is
    biased upward beyond the distance itself: compare it with scores of the same protocol only.
    """
    rng = torch.Generator().manual_seed(0)
    draws = (take(x, torch.randint(len(x), (len(x),), generator=rng)) for _ in range(resamplings))
    values = [frechet_distance(gaussian_fit(draw, device), fit) for draw in draws]
    return float(np.mean(values)), float(np.std(values))


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
    return found * s, covariance_root(joint * s.outer(s))


def kid(a, b, subsets=100, size=1000, seed=0, device=None):
    """KID of two sets of features [N, D] and [M, D]: unbiased squared MMD under (a.b / D + 1)^3; (mean, std).

    Mean and std over random subsets, drawn without replacement, of `size` or as many as the smaller set has;
    the std is of one subset, not of the mean. Unbiased, so never clamped (Binkowski et al. 2018, sec. 4).
    Computed on device, subset by subset.
    """
    size, rng = min(size, len(a), len(b)), torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        u, v = (take(s, torch.randperm(len(s), generator=rng)[:size]).to(device).double() for s in (a, b))
        values.append(mmd2(cubic(u, u), cubic(u, v), cubic(v, v), unbiased=True))
    values = torch.stack(values)
    return float(values.mean()), float(values.std(correction=0))


def take(x, index, out=None):
    """x[index] of a tensor and int64 indices [n], into out if it is given.

    On a CPU by NumPy, in one thread. PyTorch's many wait for one another where a second process has the
    cores: on two of them 6 to 14 times as long as alone, where this takes as long as alone.
    """
    if x.is_cuda:
        return torch.index_select(x, 0, index.to(x.device), out=out)
    out = x.new_empty(len(index), *x.shape[1:]) if out is None else out
    np.take(x.numpy(), index.numpy(), 0, out.numpy(), "clip")       # clip: straight into out
    return out


def similarity(K_xy, K_yy):
    """A sample's squared MMD to x but for x's own part, and what comparing it needs: (u, variance, rows).

    K_xy and K_yy [m, m] in float64, points paired by index. u: the mean over i != j of h_ij = k(y_i, y_j) -
    k(x_i, y_j) - k(x_j, y_i), a U-statistic. variance: the unbiased estimate of its variance,
    (4 (m - 2) zeta_1 + 2 zeta_2) / (m (m - 1)), zeta_1 = E h_12 h_13 - E h_12 h_34, zeta_2 = E h_12^2 -
    E h_12 h_34 (Hoeffding 1948). rows [m]: the mean of k(x_i, y_j) over j.
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
    """p-value of "the new sample is no nearer to x than the old", of two similarity() to the same x; a float.

    The test of Bounliphone et al. 2016: u_old - u_new is normal with the variance var_old + var_new - (8 / m)
    cov_x(E k(x, y_old), E k(x, y_new)), as the samples meet in x only. No floor stands under that variance;
    where its estimate is not positive nothing is known, and p is 1 / 2.
    """
    (u_old, var_old, rows_old), (u_new, var_new, rows_new) = old, new
    covariance = ((rows_old - rows_old.mean()) * (rows_new - rows_new.mean())).sum() / (len(rows_old) - 1)
    variance = float(var_old + var_new - 2 * 4 / len(rows_old) * covariance)
    return 0.5 * math.erfc(float(u_old - u_new) / math.sqrt(2 * variance)) if variance > 0 else 0.5


def inception_score(logits, splits=10, seed=0, device=None):
    """Inception score exp(E KL(p(label | image) | p(label))) of logits [N, C]: mean and std over the splits.

    The images are put in a random order first, as torch-fidelity does it (Salimans et al. 2016, section 4).
    """
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed))
    values = []
    for part in take(logits, order).tensor_split(min(splits, len(logits))):
        part = part.to(device).double().log_softmax(1)
        marginal = part.logsumexp(0) - math.log(len(part))
        values.append((part.exp() * (part - marginal)).sum(1).mean().exp())
    values = torch.stack(values)
    return float(values.mean()), float(values.std(correction=0))


# ------------------------------------------------------------------------------------------------------------
# Networks
# ------------------------------------------------------------------------------------------------------------


def mlp(*sizes, norm=None):
    """Linear layers of the given sizes with ReLU between them: [N, sizes[0]] to [N, sizes[-1]].

    norm: from a width to the layer in front of each ReLU, for example nn.LayerNorm.
    """
    layers = [nn.Linear(sizes[0], sizes[1])]
    for a, b in zip(sizes[1:], sizes[2:]):
        layers += [*([norm(a)] if norm else []), nn.ReLU(), nn.Linear(a, b)]
    return nn.Sequential(*layers)


@contextmanager
def in_bfloat16(network, x):
    """Yields x in bfloat16, for a block in which products are bfloat16's too, by autocast.

    The network's weights stay as they are.
    """
    with parametrize.cached():
        for layer in network.modules():
            getattr(layer, "weight", None)      # a spectral norm is found out here, in float32
        with torch.autocast(x.device.type, torch.bfloat16):
            yield x.bfloat16()


class Layers(nn.Sequential):
    """Layers one after another; of several sets at once, each batch norm by the statistics of every set.

    [N S, ...] for S sets, as torch.stack(sets, 1).flatten(0, 1) puts them. outputs: a list to which those of
    the LeakyReLUs and of the last layer are added, or None. mixed: whether all layers but the last with
    weights are in_bfloat16; what comes in and goes out is of one type.
    """

    mixed = False

    def forward(self, x, sets=1, outputs=None):
        layers, kind = list(self), x.dtype
        last = max(i for i, layer in enumerate(layers) if [*layer.parameters()])
        with in_bfloat16(self, x) if self.mixed else nullcontext(x) as x:
            for layer in layers[:last]:
                if sets > 1 and isinstance(layer, nn.BatchNorm2d):  # the sets' channels side by side: no copy
                    n, c, *size = x.shape
                    weight, bias = layer.weight.repeat(sets), layer.bias.repeat(sets)
                    x = x.view(n // sets, sets * c, *size)
                    x = F.batch_norm(x, None, None, weight, bias, True, eps=layer.eps).view(n, c, *size)
                else:
                    x = layer(x)
                if outputs is not None and isinstance(layer, nn.LeakyReLU):
                    outputs.append(x.to(kind))
        x = x.to(kind)
        for layer in layers[last:]:
            x = layer(x)
        if outputs is not None:
            outputs.append(x)
        return x


def both(f, x, y, outputs=None):
    """f(x) and f(y), of Layers in one pass, which takes half of the kernels: x and y have one shape.

    outputs: as Layers take it, of Layers only.
    """
    if not isinstance(f, Layers):
        assert outputs is None, "found a network that is no common.Layers, whose outputs cannot be kept"
        return f(x), f(y)
    return f(torch.stack([x, y], 1).flatten(0, 1), 2, outputs).unflatten(0, (-1, 2)).unbind(1)


class Convolution(torch.autograd.Function):
    """F.conv2d without a bias whose gradient in x is a transposed convolution of its own.

    So the gradient's own gradient is the library's for transposed convolutions. PyTorch's for convolutions
    takes filters as large as the image where a critic's slope is held. Under create_graph x alone has a
    gradient.
    """

    @staticmethod
    def forward(ctx, x, weight, stride, padding):
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight, None, stride, padding)

    @staticmethod
    def backward(ctx, slope):
        (x, weight), (s, p) = ctx.saved_tensors, (ctx.stride, ctx.padding)
        to_x = to_weight = None
        if ctx.needs_input_grad[0]:
            rest = [(n + 2 * q - k) % t for n, k, t, q in zip(x.shape[2:], weight.shape[2:], s, p)]
            to_x = F.conv_transpose2d(slope, weight, None, s, p, rest)
        if ctx.needs_input_grad[1] and not torch.is_grad_enabled():
            to_weight = torch.nn.grad.conv2d_weight(x, weight.shape, slope, s, p)
        return to_x, to_weight, None, None


class Conv2d(nn.Conv2d):
    """torch's by Convolution, whose notes hold: a square kernel, stride, padding; in its input's type."""

    def __init__(self, channels, out, kernel, stride=1, padding=0, bias=True):
        super().__init__(channels, out, kernel, stride, padding, bias=bias)

    def filters(self):
        """What the input is convolved with."""
        return self.weight

    def forward(self, x):
        y = Convolution.apply(x, self.filters().to(x.dtype), self.stride, self.padding)
        return y if self.bias is None else y + self.bias.to(x.dtype)[:, None, None]


class ConvMeanPool(Conv2d):
    """A convolution of 3x3, then the mean of each 2x2, as one of 4x4 and stride 2: 4/9 of the products.

    The 4x4 is the mean of the 3x3 at four places; weights, spectral norms and checkpoints have the 3x3.
    """

    def __init__(self, channels, out):
        super().__init__(channels, out, 3, 2, 1)

    def filters(self):
        return F.avg_pool2d(self.weight, 2, 1, 1)


class UpsampleConv(nn.Conv2d):
    """Nearest neighbours to twice the size, then a convolution of 3x3, as a transposed one of 4x4, stride 2.

    That is 4/9 of the products: of the nine pixels that a filter sees four are different.
    """

    def __init__(self, channels, out, bias=True):
        super().__init__(channels, out, 3, 1, 1, bias=bias)

    def forward(self, x):
        filters = 4 * F.avg_pool2d(self.weight.flip(-2, -1), 2, 1, 1)
        return F.conv_transpose2d(x, filters.transpose(0, 1), self.bias, 2, 1)


class Stack(nn.Module):
    """Networks of one form as one, whose matrix products are batched: [B, N, in] to [B, N, out].

    Narrower members are padded with zeros to the widest. Hidden units of theirs that are not there have
    weights 0, output 0 and gradient 0 under ReLU, so they stay absent (but LayerNorm would count them); their
    inputs that are not there have to be 0 as well. Parameters have their names under `network`, [B, ...].
    """

    def __init__(self, networks):
        super().__init__()
        self.network = copy.deepcopy(networks[0])
        for name, layer in self.network.named_modules():
            for key in [key for key, _ in layer.named_parameters(recurse=False)]:
                own = [getattr(network.get_submodule(name), key).detach() for network in networks]
                padded = torch.zeros(len(own), *(max(sizes) for sizes in zip(*(p.shape for p in own))))
                for slot, p in zip(padded, own):
                    slot[tuple(slice(size) for size in p.shape)] = p
                setattr(layer, key, nn.Parameter(padded))

    def forward(self, x):
        def member(weights, x):
            return torch.func.functional_call(self.network, weights, (x,))
        return torch.vmap(member)(dict(self.network.named_parameters()), x)


def batch_norm(channels):
    """Batch norm by the statistics of the batch at hand, in training and in sampling alike.

    So do the released image codes: GRAMFlow never updates its averages, OctoberChang and mbinkowski sample in
    training mode. A sample depends on its batch, then: draw hundreds at a time.
    """
    return nn.BatchNorm2d(channels, track_running_stats=False)


def halved(size, times):
    """Sizes of an image through convolutions of stride 2, from its own on: 28 to [28, 14, 7, 4, 2] by 4."""
    return [math.ceil(size / 2 ** i) for i in range(times + 1)]


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

    As GroupNorm(1, channels), which leaves the layout channels_last on a GPU; this one returns it.
    """

    def __init__(self, channels):
        super().__init__(1, channels)

    def forward(self, x):
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, x.shape[1:], eps=self.eps)
        return (x * self.weight + self.bias).permute(0, 3, 1, 2)


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
    *sizes, start = halved(size, len(widths))
    layers = [nn.Linear(noise, widths[0] * start ** 2), nn.Unflatten(1, (widths[0], start, start))]
    for i, (a, b, after) in enumerate(zip(widths, [*widths[1:], channels], reversed(sizes)), 1):
        rest = (after + kernel) % 2         # 1 more row than the transposed convolution alone would give
        layers += [batch_norm(a), nn.ReLU(inplace=True),
                   nn.ConvTranspose2d(a, b, kernel, 2, (kernel - 1) // 2, rest, bias=i == len(widths))]
    return dcgan_init(Layers(*layers, last()))


def dcgan_critic(channels, widths, out, kernel=4, norms=(batch_norm, batch_norm), size=32):
    """DCGAN critic: images [N, channels, size, size] to [N, out].

    Convolutions of stride 2, each with a norm and LeakyReLU 0.2, then a linear layer. norms: those behind the
    first convolutions, the last of them behind all further ones, None for none. Sizes are halved and rounded
    up; where one is odd the kernel has to be.

    widths                kernel  norms               source
    (32, 64, 128)         4       batch, batch        GRAM, Table 6; (32, 32, 64) Table 7
    (64, 128, 256)        4       None, batch         Li et al. 2017; their last convolution, of all
                                                      4x4 pixels, is the linear layer
    (128, 256, 512)       5       None, layer         GAMN; WGAN with batch norm; (64, 128, 256) for 28x28
    (64, 128, 256, 512)   5       None, None          Binkowski et al. 2018; (16, 32, 64, 128) the small one

    GRAM's paper says that the critic has batch norm, not where; GRAMFlow has none behind the first
    convolution. With it there the critic cannot see contrast: the class Contrast says what follows.
    """
    layers, conv = [], nn.Conv2d if batch_norm in norms else Conv2d     # with batch norm no slope is held
    for i, (a, b) in enumerate(zip([channels, *widths], widths)):
        norm = norms[min(i, len(norms) - 1)]
        layers += [conv(a, b, kernel, 2, (kernel - 1) // 2, bias=norm is None),
                   *([norm(b)] if norm else []), nn.LeakyReLU(0.2, inplace=True)]
    pixels = halved(size, len(widths))[-1] ** 2
    return dcgan_init(Layers(*layers, nn.Flatten(), nn.Linear(widths[-1] * pixels, out)))


def pooled_critic(channels, widths, out, size=28):
    """Critic of GRAM's Table 3, of widths (16, 32, 32): images [N, channels, size, size] to [N, out].

    Convolutions of 3x3, each with batch norm, ReLU and the largest of each 2x2, then a linear layer.
    """
    layers = []
    for a, b in zip([channels, *widths], widths):
        layers += [nn.Conv2d(a, b, 3, 1, 1, bias=False), batch_norm(b), nn.ReLU(inplace=True),
                   nn.MaxPool2d(2)]
    pixels = (size // 2 ** len(widths)) ** 2
    return Layers(*layers, nn.Flatten(), nn.Linear(widths[-1] * pixels, out))


def sngan_generator(noise, channels, width=64):
    """Generator of SN-GAN: [N, noise] to images [N, channels, 32, 32] in [0, 1].

    A linear layer to 8 width at 4x4, three transposed convolutions of 4x4 and stride 2, batch norm and ReLU
    in front of all, a convolution of 3x3 (Miyato et al. 2018, Table 3; Scaled-MMD-GAN has 5x5 and sigmoid).
    """
    widths = [8 * width, 4 * width, 2 * width, width]
    layers = [nn.Linear(noise, widths[0] * 16), nn.Unflatten(1, (widths[0], 4, 4))]
    for a, b in zip(widths, widths[1:]):
        layers += [batch_norm(a), nn.ReLU(inplace=True), nn.ConvTranspose2d(a, b, 4, 2, 1, bias=False)]
    layers += [batch_norm(width), nn.ReLU(inplace=True), nn.Conv2d(width, channels, 3, 1, 1), nn.Sigmoid()]
    return dcgan_init(Layers(*layers))


def sngan_critic(channels, out, width=64):
    """Critic of SN-GAN: images [N, channels, 32, 32] to [N, out].

    Seven convolutions without norms, 3x3 of stride 1 and 4x4 of stride 2 in turn, widths doubled with each
    pair, LeakyReLU 0.2, and a linear layer (Scaled MMD, section 4; Miyato et al. 2018, Table 3, have 0.1).
    """
    layers, before = [], channels
    for i, after in enumerate(width * m for m in (1, 2, 2, 4, 4, 8, 8)):
        shape = (4, 2, 1) if i % 2 else (3, 1, 1)
        layers += [Conv2d(before, after, *shape), nn.LeakyReLU(0.2, inplace=True)]
        before = after
    return dcgan_init(Layers(*layers, nn.Flatten(), nn.Linear(before * 16, out)))


class Residual(nn.Module):
    """Images [N, a, H, W] to [N, b, ...] at twice or half of H and W: two convolutions of 3x3, a shortcut.

    up: norm, ReLU, nearest neighbours, convolution to b, norm, ReLU, convolution; beside it a convolution of
    1x1 and the neighbours. Otherwise ReLU, convolution of a to a, ReLU, convolution to b, mean of each 2x2;
    beside it the mean and a convolution of 1x1. The 1x1 stands where images are small: on either side of the
    resizing it is the same function. No bias stands in front of a norm (Gulrajani et al. 2017, gan_64x64.py).

    Weights of 3x3 are uniform with variance 4 / (fan_in + fan_out) where there is a norm, as there; without
    one, as in Scaled-MMD-GAN, and in the shortcut, with half of that (Glorot).
    """

    def __init__(self, a, b, up, norm=None):
        super().__init__()
        if up:
            convs = UpsampleConv(a, b, bias=norm is None), nn.Conv2d(b, b, 3, 1, 1)
            self.shortcut = nn.Sequential(nn.Conv2d(a, b, 1), nn.Upsample(scale_factor=2))
        else:                           # a critic's, whose slope may be held
            convs = Conv2d(a, a, 3, 1, 1, bias=norm is None), ConvMeanPool(a, b)
            self.shortcut = nn.Sequential(nn.AvgPool2d(2), Conv2d(a, b, 1))
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

    widths                     size  start  source
    (1024, 512, 256, 128, 64)  160   5      Binkowski et al. 2018, footnote 17 (mbinkowski/MMD-GAN,
                                            architecture.py); Scaled MMD, section 4, says the same, but
                                            its code has no batch norm in the blocks
    (1024, 512, 256, 128, 64)  64    4      Scaled MMD, section 4 (MichaelArbel/Scaled-MMD-GAN)

    Raises ValueError if the sizes do not fit.
    """
    reached = start * 2 ** (len(widths) - 1)
    if size not in (reached, 2 * reached):
        raise ValueError(f"found a size of {size}, expected {reached} or {2 * reached}")
    end = (nn.Conv2d(widths[-1], channels, 3, 1, 1) if size == reached else
           nn.ConvTranspose2d(widths[-1], channels, 5, 2, 2, 1))
    outer = dcgan_init(nn.ModuleList([nn.Linear(noise, widths[0] * start ** 2), end]))
    blocks = [Residual(a, b, True, batch_norm) for a, b in zip(widths, widths[1:])]
    return Layers(outer[0], nn.Unflatten(1, (widths[0], start, start)), *blocks,
                  batch_norm(widths[-1]), nn.ReLU(), end, last())


def residual_critic(channels, widths, out, size=64):
    """Critic of ten layers: images [N, channels, size, size] to [N, out], without norms.

    A convolution of 3x3 to widths[0], LeakyReLU 0.2, a Residual at half the size to each further width,
    LeakyReLU, the sum over all pixels, a linear layer. (64, 128, 256, 512, 1024) at 64x64: Scaled MMD,
    section 4 (MichaelArbel/Scaled-MMD-GAN).
    """
    outer = dcgan_init(nn.ModuleList([Conv2d(channels, widths[0], 3, 1, 1), nn.Linear(widths[-1], out)]))
    blocks = [Residual(a, b, False) for a, b in zip(widths, widths[1:])]
    total = nn.AvgPool2d(size // 2 ** len(blocks), divisor_override=1)
    return Layers(outer[0], nn.LeakyReLU(0.2), *blocks, nn.LeakyReLU(0.2), total, nn.Flatten(), outer[1])


def image_networks(nets, row, channels, size):
    """Generator, critic and decoder of a row, None for what it has not, from a description of its networks.

    nets has z, the generator's inputs, kernel, norms, and one of
    g, f              widths of dcgan_generator and dcgan_critic, or
                      with start those of residual_generator, with residual those of residual_critic
    width             of sngan_generator and sngan_critic
    mlp, pooled       widths of a generator of linear layers, and of pooled_critic
    mlp, encoder      with encode in the row: of a generator of codes, and of an autoencoder of linear layers
    and may have
    unit              pixels are in [0, 1] instead of [-1, 1]
    bfloat16          generator and critic are Layers in it

    norms: each none, batch or layer. row: critic, its outputs; spectral, learned or fixed; autoencoder and
    encode, as in Game.
    """
    shape, z, out = (channels, size, size), nets["z"], row["critic"]
    last, kernel = nn.Sigmoid if "unit" in nets else nn.Tanh, nets["kernel"]
    if "mlp" in nets:
        to_image = [last(), nn.Unflatten(1, shape)]
        if "encode" not in row:
            g = nn.Sequential(mlp(z, *nets["mlp"]), *to_image)
            return g, pooled_critic(channels, nets["pooled"], out, size) if out else None, None
        f = nn.Sequential(nn.Flatten(), *mlp(*nets["encoder"]), nn.Sigmoid())
        decoder = nn.Sequential(mlp(*reversed(nets["encoder"])), *to_image)
        return nn.Sequential(mlp(z, *nets["mlp"]), nn.Sigmoid()), f, decoder
    if "width" in nets:
        g, f = sngan_generator(z, channels, nets["width"]), sngan_critic(channels, out, nets["width"])
    else:
        kinds = dict(none=None, batch=batch_norm, layer=LayerNorm)
        norms = [kinds[name] for name in nets["norms"]]
        if "start" in nets:
            g = residual_generator(z, nets["g"], channels, last, size, nets["start"])
        else:
            g = dcgan_generator(z, nets["g"], channels, kernel, last, size)
        if "residual" in nets:
            f = residual_critic(channels, nets["f"], out, size)
        else:
            f = dcgan_critic(channels, nets["f"], out, kernel, norms, size) if out else None
    if f and not any(isinstance(layer, nn.BatchNorm2d) for layer in f):
        f.to(memory_format=torch.channels_last)     # the faster layout, but for the reshaping of Layers
    if "spectral" in row:
        spectral(f, row["spectral"] == "learned")
    if "bfloat16" in nets:
        g.mixed = f.mixed = True
    decoder = dcgan_generator(out, nets["g"], channels, kernel, last, size) if "autoencoder" in row else None
    return g, f, decoder


class Signed(nn.Module):
    """Pixels in [0, 1] to [-1, 1]."""

    def forward(self, y):
        return 2 * y - 1


class Average(nn.Module):
    """A network, as `network`, with an average of the weights p that another one had at each follow().

    m <- m + w (p - m), w = (eta + 1) / (eta + t) at the t-th call: the weights of call t count as t^eta, and
    the average is 1 / (eta + 2) of the run behind, however long it is (polynomial-decay averaging; Shamir and
    Zhang, Stochastic Gradient Descent for Non-smooth Optimization, ICML 2013).
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
    """A batch of samples y [N, C, H, W] with the brightness and contrast of the images that it was fit() to.

    std (y - mean(y)) / std(y) + mean: a mean for each channel, one std around them for all. These C + 1
    numbers are what a critic with batch norm behind its first convolution cannot see, if it normalises data
    and samples apart: f(a y + b_c) = f(y) for every a > 0, and for every b_c but for the images' border. So
    its generator is free in them, and drifts. As in batch_norm, the statistics of y are those of the batch.
    """

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("std", torch.ones(()))

    def fit(self, images):
        """Take the numbers from images, uint8 [N, C, H, W], in the units of draw_images; returns itself."""
        counts = torch.stack([torch.bincount(c.flatten(), minlength=256) for c in images.unbind(1)])
        share = counts.double().cpu() / counts[0].sum().cpu()       # of each of 256 values, [C, 256]
        values = torch.arange(256).double() / 127.5 - 1
        mean = share @ values
        self.mean.copy_(mean[:, None, None])
        self.std.copy_((share @ values.square() - mean.square()).mean().sqrt())
        return self

    def forward(self, y):
        y = y - y.mean((0, 2, 3), keepdim=True)
        return self.std / y.square().mean().sqrt().clamp(min=1e-6) * y + self.mean


class Sampler(nn.Sequential):
    """What a run's samples are drawn with: its generator's averaged weights, and the contrast of the data.

    nets: z, noise and unit of image_networks; eta: of Average; decoder: of a generator of codes. From noise
    [N, z] to images [N, channels, H, W] in [-1, 1]. With eta and channels None: its generator as it is.
    """

    def __init__(self, g, nets, eta=None, channels=None, decoder=None):
        super().__init__(Average(g, eta) if eta is not None else g, *([decoder] if decoder else []),
                         *([Signed()] if "unit" in nets else []), *([Contrast(channels)] if channels else []))
        self.z, self.draw_noise = nets["z"], dict(normal=normal_noise, uniform=uniform_noise)[nets["noise"]]

    def fit(self, images):
        """Take the contrast from images, uint8 [N, channels, H, W]; returns itself."""
        self[-1].fit(images)
        return self

    def noise(self, n, rng):
        """Noise [n, z] from rng, on its device."""
        return self.draw_noise(n, self.z, rng)

    def follow(self, g):
        """Take in the generator's weights after an update."""
        self[0].follow(g)

    @torch.no_grad()
    def draw(self, n, seed=0):
        """n images, uint8 on the CPU, of a seed's noise; at most 500 at a time (see batch_norm)."""
        z = self.noise(n, torch.Generator().manual_seed(seed)).to(next(self.parameters()).device)
        return torch.cat([to_bytes(self(part)).cpu() for part in z.split(500)])


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
    return images[index] / 127.5 - 1


def flip_images(x, rng):
    """Images [n, C, H, W], each mirrored left to right with probability 1/2."""
    mirrored = torch.rand(len(x), 1, 1, 1, generator=rng, device=rng.device) < 0.5
    return x.flip(3).where(mirrored, x)


def crop_images(x, side, rng=None):
    """Of each of the images [n, C, H, W] a square of that side, anywhere in it: [n, C, side, side].

    Without rng the same squares at each call, as scores and a contrast need them.
    """
    n, _, height, width = x.shape
    if height == width == side:
        return x
    rng = rng or torch.Generator().manual_seed(0)       # on the CPU: the same wherever x is
    within = torch.arange(side, device=x.device)
    corners = (torch.randint(m - side + 1, (n, 1), generator=rng, device=rng.device) for m in (height, width))
    rows, columns = (corner.to(x.device) + within for corner in corners)
    image, channel = torch.arange(n, device=x.device), torch.arange(x.shape[1], device=x.device)
    return x[image[:, None, None, None], channel[:, None, None], rows[:, None, :, None],
             columns[:, None, None, :]]


def evenly(images, n):
    """n of the images [N, ...], from the first on, all as far apart: those of a folder are in order."""
    return take(images, torch.arange(n) * len(images) // n)


def on_device(images, device):
    """Images, uint8 [N, C, H, W], on a GPU if they take no more than half of what is free there, and says so.

    Else as they are: Batches gathers from them.
    """
    if device.type != "cuda":
        return images
    free, _ = torch.cuda.mem_get_info(device)
    fits = images.nbytes <= free / 2
    where = "on the GPU" if fits else f"gathered from the file, as {free / 1e9:.1f} GB are free on the GPU"
    print(f"{len(images):,} images, {images.nbytes / 1e9:.2f} GB: {where}", flush=True)
    return images.to(device) if fits else images


class Batches:
    """Batches of n images, drawn with replacement, for the fixed input x [n, C, H, W] of an update.

    images: uint8 [N, C, H, W], on the device, or a map of a file that is too large for it: then threads
    gather the next batches into pinned memory ahead of need. fill() puts the next one into x; call it before
    each update, outside of what is captured. Batch number k is a function of (seed, rank, k), so that both
    ways give the same, and a state of one number, `taken`, is enough to go on from. waited: seconds in which
    fill() waited for a thread, and the GPU for nothing else. rank: ranks()'s by default. ahead: how many
    batches are gathered ahead, 0 for none.
    """

    def __init__(self, images, n, seed, device, rank=None, ahead=None):
        self.images, self.n, self.waited = images, n, 0.0
        self.key = [seed, ranks()[0] if rank is None else rank]
        self.taken = torch.zeros((), dtype=torch.int64)
        self.x = take(images, self.index(0)).to(device)         # for updates before the first fill()
        self.cuda = cuda = self.x.is_cuda
        self.ahead = (8 if cuda and not images.is_cuda else 0) if ahead is None else ahead
        slots = range(self.ahead + 1 if self.ahead else 0)      # one more: what is copied stays as it is
        self.slots = [torch.empty(self.x.shape, dtype=torch.uint8, pin_memory=cuda) for _ in slots]
        self.copied = [torch.cuda.Event(blocking=True) if cuda else None for _ in slots]
        own = (torch.cuda.set_device, (self.x.device,)) if cuda else ()
        self.pool = ThreadPoolExecutor(self.ahead, "batches", *own) if self.ahead else None
        self.coming = {}

    def state_dict(self):
        return {"taken": self.taken, "images": len(self.images)}

    def load_state_dict(self, kept):
        """Go on from a state_dict(); raises ValueError if it is of another number of images."""
        found = kept.get("images", len(self.images))
        if found != len(self.images):
            raise ValueError(f"found a run on {found:,} images, expected {len(self.images):,}: of another "
                             "array; put that one back, or begin another run with --out")
        self.taken.copy_(kept["taken"])

    def index(self, k):
        """Which images batch number k has, int64 [n]."""
        return torch.from_numpy(np.random.default_rng([*self.key, k]).integers(len(self.images), size=self.n))

    def gather(self, k):
        """Batch number k in its slot, once the batch that had it has been copied; a thread's work."""
        slot = k % len(self.slots)
        if self.copied[slot]:
            self.copied[slot].synchronize()
        return take(self.images, self.index(k), self.slots[slot])

    def fill(self):
        """Put the next batch into x."""
        k = int(self.taken)
        self.taken += 1
        if not self.ahead:
            index = self.index(k)
            if self.cuda:               # from pinned memory, as any other copy waits for the GPU
                index = index.pin_memory().to(self.x.device, non_blocking=True)
            take(self.images, index, self.x)
            return
        wanted = range(k, k + self.ahead)
        for other in set(self.coming).difference(wanted):       # the state has been put back
            self.coming.pop(other).result()
        for soon in wanted:
            if soon not in self.coming:
                self.coming[soon] = self.pool.submit(self.gather, soon)
        batch = self.coming.pop(k)
        if not batch.done():
            if self.cuda:               # until then the GPU has work, and nothing waits for a thread
                torch.cuda.current_stream().synchronize()
            began = time.perf_counter()
            batch.result()
            self.waited += time.perf_counter() - began
        self.x.copy_(batch.result(), non_blocking=True)
        if self.cuda:
            self.copied[k % len(self.slots)].record()

    def close(self):
        """End the threads."""
        if self.pool:
            self.pool.shutdown(cancel_futures=True)


def to_bytes(y):
    """Images in [-1, 1] to uint8 of the same shape."""
    return ((y + 1) * 127.5).round().clamp(0, 255).byte()


def ring_centres(modes, radius):
    """Centres of a ring's modes, [modes, 2], the first at the bottom (MLToolkit, src/Datasets/ring.jl)."""
    angle = 2 * math.pi * torch.arange(modes) / modes - math.pi / 2
    return radius * torch.stack([angle.cos(), angle.sin()], 1)


def grid_centres(side, spacing):
    """Centres of a square of side x side modes around the origin, [side^2, 2] (improved_wgan_training)."""
    line = spacing * (torch.arange(side) - (side - 1) / 2)
    return torch.cartesian_prod(line, line)


def swiss_roll_centres(n):
    """n points along the Swiss roll t (cos t, sin t), t uniform in [1.5 pi, 4.5 pi]: [n, 2] (scikit-learn).

    For a mixture of so many Gaussians that their steps are far below the noise is the roll itself.
    """
    t = 1.5 * math.pi * (1 + 2 * (torch.arange(n) + 0.5) / n)
    return torch.stack([t * t.cos(), t * t.sin()], 1)


def draw_mixture(centres, std, n, rng):
    """n points [n, D] of an equal mixture of Gaussians N(centre, std^2 I), centres [modes, D]."""
    mode = torch.randint(len(centres), (n,), generator=rng, device=rng.device)
    return centres[mode] + std * normal_noise(n, centres.shape[1], rng)


def mode_masses(y, centres, std):
    """The share of all samples that is within 3 std of a mode and nearest to it: [modes], in [0, 1].

    y [N, D], centres [modes, D]. A sample that is not finite is near no mode.
    """
    distance, mode = torch.cdist(y.nan_to_num(torch.inf), centres).min(1)
    return torch.bincount(mode[distance < 3 * std], minlength=len(centres)) / len(y)


SETS = {
    "mnist":   (torchvision.datasets.MNIST, (1, 28, 28)),
    "cifar10": (torchvision.datasets.CIFAR10, (3, 32, 32)),
}


def load_images(name, split, folder, least=1):
    """The images of FOLDER/NAME-SPLIT.npy as a uint8 tensor [N, C, H, W] that maps the file.

    name: a key of SETS; split: "train" or "test". A missing file is built from torchvision's download, with
    its labels in FOLDER/NAME-SPLIT-labels.npy, uint8 [N]. Exits with a message if that fails or the file is
    no such array of so many images at the least.
    """
    path, (source, shape) = f"{folder}/{name}-{split}.npy", SETS[name]
    if not os.path.exists(path):
        print(f"{path} is not there: torchvision downloads {name}", flush=True)
        make_folder(folder)
        try:
            data = source(f"{folder}/torchvision", train=split == "train", download=True)
        except (OSError, RuntimeError) as error:
            with suppress(OSError):                     # what is empty goes
                for below, *_ in os.walk(f"{folder}/torchvision", topdown=False):
                    os.rmdir(below)
            wanted = f"uint8 array [N, {', '.join(map(str, shape))}]"
            sys.exit(f"{path}: not there, and torchvision cannot download {name} ({first_line(error)})\n"
                     f"go online, put a {wanted} there, or name its folder with --data")
        images = np.asarray(data.data)                          # [N, H, W] or [N, H, W, C]
        images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
        with replacing(f"{folder}/{name}-{split}-labels.npy") as file:
            np.save(file, np.asarray(data.targets, np.uint8))
        with replacing(path) as file:
            np.save(file, np.ascontiguousarray(images))
    images = read_array(path, shape)
    if len(images) < least:
        sys.exit(f"{path}: found {len(images)} images, expected {least:,} or more")
    return images


def load_labels(name, split, folder, n):
    """The labels of n images of load_images, int64 [n], from FOLDER/NAME-SPLIT-labels.npy, built with them.

    Exits with a message if the file is not there or holds no such array.
    """
    path = f"{folder}/{name}-{split}-labels.npy"
    wanted = (f"expected uint8 [{n}] of 0 to 9; put it there, or delete the images beside it to have "
              "torchvision fetch both")
    try:
        labels = np.load(path)
    except (OSError, ValueError, EOFError) as error:
        sys.exit(f"{path}: cannot be read ({first_line(error)}); {wanted}")
    if labels.dtype != np.uint8 or labels.shape != (n,):
        sys.exit(f"{path}: found {labels.dtype} {list(labels.shape)}, {wanted}")
    if labels.max(initial=0) > 9:
        sys.exit(f"{path}: found a {labels.max()}, {wanted}")
    return torch.from_numpy(labels).long()


FOLDERS = {     # of load_folders: side of the images, where they are below --data, what brings them there
    "celeba178":  (178, "celeba/img_align_celeba", "unpack CelebA's img_align_celeba.zip there"),
    "celeba64":   (64, "celeba/img_align_celeba", "unpack CelebA's img_align_celeba.zip there"),
    "lsun64":     (64, "lsun", "export the images of LSUN's bedroom_train there"),
    "imagenet64": (64, "imagenet", "put ILSVRC2012's train and val there"),
}
CELEBA = dict(train=(1, 162_770), val=(162_771, 182_637), test=(182_638, 202_599))      # file numbers of its
                                                                # standard split, list_eval_partition.txt
HELD_OUT = 25_000           # images of LSUN to score against, as many as Demystifying MMD GANs, section 5
CHUNK = 256                 # images that a worker builds at a time: what a kill may lose of its work
HEAD = 128                  # bytes in front of the numbers in an .npy file of four dimensions
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def central_square(path, side):
    """An image file's central square, uint8 [3, side, side], by an antialiased bilinear filter.

    Grey, CMYK, palette and 16-bit images become RGB of 8 bits. Raises an exception where it is no whole image
    or smaller than that.
    """
    with Image.open(path) as image:
        image.load()
        n = min(image.size)
        if n < side:
            raise ValueError(f"{image.width}x{image.height}, expected {side}x{side} or more")
        if image.mode.startswith("I"):      # 16 bits, which PIL's conversion would cut off at 255
            grey = (np.asarray(image, np.int64) + 128) // 257
            image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
        left, top = (image.width - n) // 2, (image.height - n) // 2
        image = image if image.mode == "RGB" else image.convert("RGB")      # which would copy it
        if n == side:
            return np.asarray(image)[top:top + n, left:left + n].transpose(2, 0, 1)
        square = pil_to_tensor(image.crop((left, top, left + n, top + n)))
    # a quarter of the time of PIL's filter, from which it differs by 1 at most
    return F.interpolate(square[None], (side, side), mode="bilinear", antialias=True)[0].numpy()


def folder_files(name, split, data):
    """The paths of the images of a split of FOLDERS, in order; exits with a message if there is no folder.

    celeba*: by CELEBA's numbers, other names are left out and said; lsun64: each tenth image is "test", of
    many images each n-th, so that HELD_OUT remain, and the others are "train"; imagenet64: a folder a split.
    """
    _, below, brings = FOLDERS[name]
    folder = f"{data}/{below}/{split}" if name == "imagenet64" else f"{data}/{below}"
    if name.startswith("celeba") and not os.path.isdir(folder):
        print(f"{folder} is not there: torchvision downloads CelebA", flush=True)
        root = f"{data}/celeba.tmp"
        shutil.rmtree(root, ignore_errors=True)         # of a kill
        try:
            make_folder(root)
            torchvision.datasets.CelebA(root, download=True)
            os.makedirs(os.path.dirname(folder), exist_ok=True)
            os.rename(f"{root}/{below}", folder)        # whole or not there
        except Exception as error:          # whatever its hosts and its unpacking come to
            sys.exit(f"{folder}: not there, and torchvision cannot download it ({first_line(error)})\n"
                     f"{brings}, or name another folder with --data")
        finally:
            shutil.rmtree(root, ignore_errors=True)
    if not os.path.isdir(folder):
        sys.exit(f"{folder}: not there; {brings}, or name another folder with --data")
    files = sorted(f"{at}/{file}" for at, _, names in os.walk(folder, followlinks=True) for file in names
                   if file.lower().endswith(SUFFIXES))
    if not files:
        sys.exit(f"{folder}: found no images ({', '.join(SUFFIXES)}); {brings}")
    if name.startswith("celeba"):
        stems = [os.path.splitext(os.path.basename(file))[0] for file in files]
        number = {file: int(stem) if stem.isdecimal() else 0 for file, stem in zip(files, stems)}
        (first, last), (_, whole) = CELEBA[split], CELEBA["test"]
        odd = [os.path.basename(file) for file in files if not 1 <= number[file] <= whole]
        if odd and split == "train":
            print(f"{folder}: left out {len(odd):,} images whose names are no numbers from 1 to {whole:,}, "
                  f"{odd[0]} the first")
        one = {number[file]: file for file in files}            # of one number, if there are several
        return [one[k] for k in sorted(one) if first <= k <= last]
    if name == "lsun64":
        each = max(10, len(files) // HELD_OUT)
        return [file for i, file in enumerate(files) if (i % each == 0) == (split == "test")]
    return files


def load_folders(name, splits, data):
    """For each of the splits the images of DATA/NAME-SPLIT.npy, as read_array maps them, or None for none.

    name: a key of FOLDERS; the first split must have images. What is not there is built by build_array, after
    a look at the disk's free space. Exits with a message if that fails, or if an array is of another size, or
    DATA/NAME-SPLIT.json says that its images were made in another way.
    """
    paths = [f"{data}/{name}-{split}.npy" for split in splits]
    if ranks()[0] == 0 and not all(map(os.path.exists, paths)):     # the other processes wait
        with alone_in(data):
            build_missing(name, splits, paths, data)
    together("barrier")
    return [read_built(path, name, split) if os.path.exists(path) else None
            for path, split in zip(paths, splits)]


def read_built(path, name, split):
    """An array of load_folders; says whether it has but a part of CelebA's split."""
    side, about = FOLDERS[name][0], path.removesuffix("npy") + "json"
    how, wanted = read_json(about).get("images"), made(side)
    if os.path.exists(about) and how != wanted:
        sys.exit(f"{path}: {about} says that its images were made as {how!r}, expected {wanted!r}; "
                 "delete both to have them built anew, or name another folder with --data")
    images = read_array(path, (3, side, side), "r")
    if name.startswith("celeba"):
        first, last = CELEBA[split]
        whole = last - first + 1
        if len(images) < whole:
            print(f"{path}: {len(images):,} of CelebA's {whole:,} images; if the folder has more by now, "
                  "delete it to have it built anew", flush=True)
    return images


@contextmanager
def alone_in(folder):
    """Have other commands wait that come here with the same folder; a kill lets go of it.

    The folder is made if need be, and goes again if nothing has come into it.
    """
    there = os.path.isdir(folder)
    make_folder(folder)
    held = os.open(folder, os.O_RDONLY) if fcntl else None
    try:
        with suppress(OSError, AttributeError):     # of a file system, or of Windows, without locks
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"{folder}: waiting for another command, which builds an array there", flush=True)
                fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        if fcntl:
            os.close(held)
        if not there:
            with suppress(OSError):
                os.rmdir(folder)            # if it is empty


def build_missing(name, splits, paths, data):
    """What load_folders builds: of the paths of the splits those that are not there."""
    side, below, brings = FOLDERS[name]
    missing = {}
    for path, split in zip(paths, splits):
        if not os.path.exists(path):        # without the folder the first array is enough
            needs = path == paths[0] or os.path.isdir(f"{data}/{below}")
            missing[path] = folder_files(name, split, data) if needs else []
    if paths[0] in missing and len(missing[paths[0]]) < 2:
        names = "named 000001.jpg and on; " if name.startswith("celeba") else ""
        sys.exit(f"{data}/{below}: found {len(missing[paths[0]])} images of {splits[0]}, expected 2 or more; "
                 f"{names}{brings}")
    if any(missing.values()):
        begun = sum(os.stat(tmp).st_blocks * 512 for path in missing if os.path.exists(tmp := f"{path}.tmp"))
        needed = sum(map(len, missing.values())) * 3 * side ** 2 - begun
        free = shutil.disk_usage(data).free
        if needed > free:
            sys.exit(f"{', '.join(missing)}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free; "
                     "make room, or name another folder with --data")
    for path, files in missing.items():
        if len(files) > 1:
            build_array(path, files, side)
        else:
            print(f"{path}: not built, {data}/{below} has {len(files)} images of that split")


def made(side):
    """How the images of an array of FOLDERS are made, as the file beside it says it."""
    return f"central square, {side}x{side}, bilinear, antialiased"


def build_rows(tmp, files, side, chunks, taken, parent):
    """A worker of build_array: take the next of the chunks, write its rows, note it, until none is left."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # Ctrl-C is the parent's, which ends its workers,
    signal.signal(signal.SIGTERM, signal.SIG_DFL)       # in a way that stop_when_told() must not hear
    signal.set_wakeup_fd(-1)
    torch.set_num_threads(1)                            # each core has a worker
    warnings.simplefilter("ignore")
    size, rows = 3 * side ** 2, np.empty((CHUNK, 3, side, side), np.uint8)
    with open(tmp, "r+b") as data, open(f"{tmp}.done", "ab", 0) as done:
        while os.getppid() == parent:                   # a parent that was killed says nothing
            with taken.get_lock():
                taken.value += 1
                turn = taken.value - 1
            if turn >= len(chunks):
                return
            start = chunks[turn] * CHUNK
            part, bad = files[start:start + CHUNK], {}
            for row, file in enumerate(part):
                try:
                    rows[row] = central_square(file, side)
                except Exception as error:              # whatever its decoder stumbles over
                    bad[start + row] = first_line(error)
            data.seek(HEAD + start * size)
            data.write(rows[:len(part)])
            data.flush()                                # raises where the disk is full
            done.write(b"\n" + json.dumps([chunks[turn], bad]).encode())     # one write: whole or not there


def builder(*given):
    """build_rows in a process of its own, whose exit code says what the disk would not do, for its parent."""
    try:
        build_rows(*given)
    except OSError as error:
        sys.exit(error.errno)


def cores():
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def build_array(path, files, side):
    """Build PATH, uint8 [N, 3, side, side], from image files by central_square, a worker process a core.

    Progress is printed. It is built as PATH.tmp and renamed when whole; after a kill the same call goes on
    with what PATH.tmp.done says has been built, but for chunks with images that could not be read. Those are
    left out, the last ones taking their places, and are named at the end and in the .json beside it. Exits
    with a message if a worker dies or fewer than two images can be read.
    """
    tmp, n, size = f"{path}.tmp", len(files), 3 * side ** 2
    folder = f"{os.path.dirname(path)}/"
    below = [file.removeprefix(folder) for file in files]       # the same however --data is spelled
    key = hashlib.sha256(json.dumps([below, side, CHUNK]).encode()).hexdigest()

    def noted():
        """The chunks that have been built, each with its images that cannot be read."""
        with open(f"{tmp}.done") as file:
            first, *lines = file.read().split("\n")
        if first != key:
            return None
        found = {}
        for line in lines:
            with suppress(ValueError):          # cut off, or the disk was full
                chunk, bad = json.loads(line)
                found[chunk] = {int(row): why for row, why in bad.items()}
        return found

    def images(chunks):
        return sum(min(CHUNK, n - chunk * CHUNK) for chunk in chunks)

    built = noted() if os.path.exists(tmp) and os.path.exists(f"{tmp}.done") else None
    if built is None:
        with open(f"{tmp}.done", "w") as file:      # first: it must never speak of an earlier PATH.tmp
            file.write(key)
        with open(tmp, "wb") as file:
            file.truncate(HEAD + n * size)
        built = {}
    built = {chunk: bad for chunk, bad in built.items() if not bad}
    left = [chunk for chunk in range(-(-n // CHUNK)) if chunk not in built]
    kind = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"     # fork: no new imports
    context = multiprocessing.get_context(kind)
    taken = context.Value("q", 0)
    given = (tmp, files, side, left, taken, os.getpid())
    workers = [context.Process(target=builder, args=given, daemon=True)
               for _ in range(min(cores(), len(left)))]
    before, began, shown = images(built), time.perf_counter(), time.perf_counter()
    print(f"{path}: built once, {n:,} images by {len(workers)} processes"
          + (f", {before:,} of them from before" if before else ""), flush=True)
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        next((worker for worker in workers if worker.is_alive()), workers[0]).join(0.2)
        if time.perf_counter() - shown > 5:
            shown, now = time.perf_counter(), images(noted())
            rate = (now - before) / (shown - began)
            minutes, seconds = divmod(round((n - now) / rate) if rate else 0, 60)
            print(f"{path}: {now:,} of {n:,} images, {rate:,.0f} images/s, {minutes}:{seconds:02} left",
                  flush=True)
    built, rate = noted(), (n - before) / (time.perf_counter() - began)
    if images(built) < n:
        codes = sorted({worker.exitcode for worker in workers if worker.exitcode})
        why = [os.strerror(code) if code > 1 else f"exit code {code}" for code in codes]
        sys.exit(f"{path}: a process that builds it has ended ({', '.join(why)}), {images(built):,} of {n:,} "
                 "images are built; the same command goes on with the others")
    bad = {row: why for chunk in built.values() for row, why in chunk.items()}
    good = n - len(bad)
    for row in sorted(bad)[:20]:
        print(f"{files[row]}: {bad[row]}")
    if bad:
        print(f"{path}: {len(bad):,} of {n:,} images cannot be read"
              + (", the first 20 of them above, all in the .json beside it" if len(bad) > 20 else ""))
    if good < 2:
        os.remove(tmp)
        os.remove(f"{tmp}.done")
        sys.exit(f"{path}: found {good} images that can be read, expected 2 or more; bring others")
    rows = np.memmap(tmp, np.uint8, "r+", HEAD, (n, size))
    for hole, row in zip((row for row in sorted(bad) if row < good),
                         (row for row in range(good, n) if row not in bad)):
        rows[hole] = rows[row]          # copied, not moved: the same again after a kill
    with open(tmp, "r+b") as file:
        head = dict(descr="|u1", fortran_order=False, shape=(good, 3, side, side))
        np.lib.format.write_array_header_1_0(file, head)
        assert file.tell() == HEAD, f"found a header of {file.tell()} bytes, expected {HEAD}"
    write_json(path.removesuffix("npy") + "json",
               {"images": made(side), "files": n, "left out": {files[row]: bad[row] for row in sorted(bad)}})
    os.replace(tmp, path)
    os.truncate(path, HEAD + good * size)
    os.remove(f"{tmp}.done")
    print(f"{path}: {good:,} images, {good * size / 1e9:.2f} GB, {rate:,.0f} images/s", flush=True)


def read_array(path, shape, mode="c"):
    """The uint8 array [N, *shape] of an .npy file, None for any size, as a tensor that maps the file.

    mode: "c", writable without any change of the file, or "r", which takes no memory of its own however large
    the file is. Exits with a message if the file holds no such array.
    """
    wanted = f"expected uint8 [N, {', '.join(str(s or 'any') for s in shape)}] with N of 2 or more"
    try:
        array = np.lib.format.open_memmap(path, mode)
    except (OSError, ValueError, EOFError) as error:
        sys.exit(f"{path}: no whole .npy file ({first_line(error)}), {wanted}; "
                 "copy it again, or delete it to have it built anew")
    fits = array.ndim == 4 and len(array) > 1 and all(s in (None, n) for s, n in zip(shape, array.shape[1:]))
    if array.dtype != np.uint8 or not fits:
        sys.exit(f"{path}: found {array.dtype} {list(array.shape)}, {wanted}")
    with warnings.catch_warnings():     # "r": that nothing must be written there
        warnings.simplefilter("ignore")
        return torch.from_numpy(array)


def image_files(path):
    """The files of a path's images: itself, or a folder's .png and .jpg files; exits if it is not there."""
    if not os.path.exists(path):
        sys.exit(f"{path}: not there; expected an .npy file or a folder of .png and .jpg files")
    suffixes = (".png", ".jpg", ".jpeg")
    inside = (name for name in glob.glob(f"{glob.escape(path)}/*") if name.lower().endswith(suffixes))
    return sorted(inside) if os.path.isdir(path) else [path]


def read_images(path):
    """Images to score as a uint8 tensor [N, C, H, W], C 1 or 3.

    path: an .npy file of such an array, or a folder of .png and .jpg files of one size; exits with a message
    if neither.
    """
    files = image_files(path)
    if not os.path.isdir(path):
        images = read_array(path, (None, None, None))
        if images.shape[1] not in (1, 3):
            sys.exit(f"{path}: found {list(images.shape)}, expected [N, 1, H, W] or [N, 3, H, W]")
        return images
    images = []
    for name in files:
        try:
            images.append(pil_to_tensor(torchvision.datasets.folder.default_loader(name)))
        except Exception as error:              # whatever its decoder stumbles over
            sys.exit(f"{name}: no whole image ({first_line(error)}); replace or remove it")
    sizes = sorted({tuple(image.shape[1:]) for image in images})
    if len(images) < 2 or len(sizes) > 1:
        sys.exit(f"{path}: found {len(images)} .png and .jpg files, sizes {sizes}, expected two of one size")
    return torch.stack(images)


# ------------------------------------------------------------------------------------------------------------
# Scores: a feature network, and the distances between its features
# ------------------------------------------------------------------------------------------------------------


INCEPTION = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
             "pt_inception-2015-12-05-6726825d.pth")        # FID's network, in torchvision's keys
FID_KEY, FID_NAME = "6726825d", "inception-2015-12-05"      # its SHA-256's start, what scores call it
SCORE_PRECISION = "ieee"    # of feature networks' convolutions on a GPU; "tf32" is faster: see README.md


def tf_resize(x, size):
    """Images [..., H, W] to [..., size, size] as TensorFlow 1's bilinear resize does it, FID's.

    Pixel i of the result stands at i H / size, without the half pixel of later conventions and without
    antialiasing: a product with a matrix of at most two weights a row on either side.
    """
    def weights(n):
        at = torch.arange(size, device=x.device) * (n / size)
        low, rows = at.long(), torch.arange(size, device=x.device)
        matrix = torch.zeros(size, n, device=x.device)
        matrix[rows, low] = 1 - (at - low)
        matrix[rows, (low + 1).clamp(max=n - 1)] += at - low
        return matrix

    return weights(x.shape[-2]) @ x @ weights(x.shape[-1]).T


class ConvReLU(nn.Module):
    """torchvision's BasicConv2d without its batch norm, which is folded into the convolution.

    On a GPU cuDNN does convolution, bias and ReLU in one kernel. average: a mean over 3x3 windows, padding
    left out, stands before the ReLU. It commutes with the 1x1 convolution that torchvision has behind it,
    and sees fewer channels here.
    """

    def __init__(self, basic, average):
        super().__init__()
        self.conv, self.average = fuse_conv_bn_eval(basic.conv, basic.bn), average

    def forward(self, x):
        conv = self.conv
        if self.average:
            return F.avg_pool2d(conv(x), 3, 1, 1, count_include_pad=False).relu_()
        if x.is_cuda and torch.version.cuda:
            return torch.cudnn_convolution_relu(x, conv.weight, conv.bias, conv.stride, conv.padding,
                                                conv.dilation, conv.groups)
        return conv(x).relu_()


class FidInception(nn.Module):
    """The Inception network of FID and of the Inception score, by its state dict in torchvision's keys.

    uint8 images [N, 3, H, W] to features [N, 2048] and to logits without bias [N, 1008]. It is torchvision's
    with averages that leave the padding out (Mixed_5b to 5d, 6b to 6e, 7b) and a maximum for one of them
    (Mixed_7c), as TensorFlow's of 2015-12-05 has it (pytorch-fid, inception.py).
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
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        for name, block in list(network.named_modules()):
            if isinstance(block, BasicConv2d):
                average = name.endswith("branch_pool") and name != "Mixed_7c.branch_pool"
                network.set_submodule(name, ConvReLU(block, average))
        self.network = torch.fx.GraphModule(network, graph)

    @torch.no_grad()
    def forward(self, images):
        found = self.network((tf_resize(images.float(), 299) - 128) / 128)
        return found, found @ self.classes.T


def load_features(path, device):
    """A feature network: a function from uint8 [N, 3, H, W] to features [N, D] and logits [N, C] or None.

    path: None for FidInception, fetched if need be; a .pth file of its weights; or a torch.export file (.pt2)
    that returns features, or a tuple of features and logits. Its attributes: feature_function's. Raises
    OSError if FidInception cannot be fetched, and exits with a message if the file holds no such network.
    """
    file = path or f"{torch.hub.get_dir()}/checkpoints/{os.path.basename(INCEPTION)}"
    wanted = ("expected weights of FID's Inception network (.pth) or a torch.export file (.pt2) of a network "
              "from uint8 [N, 3, H, W] to features [N, D]")
    logging.disable(logging.WARNING)                # torch.export logs the traceback of what it raises
    try:
        if path and not path.endswith(".pth"):
            program = torch.export.passes.move_to_device_pass(torch.export.load(path), str(device))
            network = program.module()
        else:
            plain = device.type == "cuda" and SCORE_PRECISION == "ieee"     # which layout is the faster one
            layout = torch.contiguous_format if plain else torch.channels_last
            weights = (torch.load(path, map_location="cpu", weights_only=True) if path else
                       torch.hub.load_state_dict_from_url(INCEPTION, map_location="cpu", check_hash=True,
                                                          weights_only=True))
            network = FidInception(weights).to(device, memory_format=layout)
    except Exception as error:                      # whatever its reader stumbles over
        if path:
            sys.exit(f"{path}: cannot be loaded ({first_line(error)}); {wanted}")
        if os.path.exists(file):
            raise OSError(f"{file}: cannot be loaded ({first_line(error)}); delete it to have it fetched "
                          "anew, or name another network with --features FILE") from error
        raise OSError(f"{INCEPTION}: cannot be fetched ({first_line(error)}); put it there: {file}, or name "
                      "it, or another network, with --features FILE") from error
    finally:
        logging.disable(logging.NOTSET)
    return feature_function(network, file, wanted, 32, device)


def feature_function(network, file, wanted, size, device):
    """A network as load_features returns it, tried on a few images of that size; the file is its weights'.

    The attribute `width` is D, `name` what its scores are called by (FID_NAME for the published weights and
    no others), `key` the start of its file's SHA-256, `accuracy` None or the share of test images that it
    classifies rightly. Exits with a message if the network is none, which ends with the text wanted; the
    function raises RuntimeError where the network fails.
    """
    conv = torch.backends.cudnn.conv

    @torch.no_grad()
    def features(images):
        before, conv.fp32_precision = conv.fp32_precision, SCORE_PRECISION
        try:
            out = network(images)
        except Exception as error:
            raise RuntimeError(f"{file}: fails on uint8 {list(images.shape)} ({first_line(error)}); {wanted}")
        finally:
            conv.fp32_precision = before
        return (out, None) if torch.is_tensor(out) else (*out, None)[:2]

    for n in (2, 3):            # a network exported without a dynamic batch takes one of them only
        images = torch.arange(n * 3 * size ** 2, dtype=torch.int32).byte().view(n, 3, size, size)
        try:
            found, _ = features(images.to(device))
        except RuntimeError as error:
            sys.exit(str(error))
        if not torch.is_tensor(found) or found.ndim != 2 or len(found) != n:
            shape = list(found.shape) if torch.is_tensor(found) else type(found).__name__
            sys.exit(f"{file}: found features {shape} of {n} images; {wanted}")
        if not found.isfinite().all():
            sys.exit(f"{file}: features of {n} images are not finite; {wanted}")
    with open(file, "rb") as weights:
        features.key = hashlib.sha256(weights.read()).hexdigest()[:8]
    stem = os.path.splitext(os.path.basename(file))[0].removeprefix("features-")
    features.name, features.width = FID_NAME if features.key == FID_KEY else stem, found.shape[1]
    features.accuracy = None
    return features


class LeNet(nn.Module):
    """The network that stands for Inception on MNIST (Demystifying MMD GANs, section 4): a LeNet.

    Grey uint8 images [N, C, 28, 28], all channels alike, to features [N, 512], behind their ReLU, and logits
    [N, 10]. Of TensorFlow's MNIST tutorial (tensorflow/models, tutorials/image/mnist/convolutional.py); the
    paper's weights are not released.
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


def train_lenet(images, labels, epochs, batch, rate):
    """A LeNet trained on uint8 images [N, 1, 28, 28] with labels int64 [N], seed 0.

    By Adam, whose rate rises to the given one and falls; the tutorial has momentum, dropout and 10 epochs.
    """
    torch.manual_seed(0)
    network = LeNet().to(images.device)
    optimizer, n = torch.optim.Adam(network.parameters()), len(images) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * n)
    for step in range(epochs * n):
        if step % n == 0:
            order = torch.randperm(len(images)).to(images.device)
        index = order[step % n * batch:][:batch]
        loss = F.cross_entropy(network(images[index])[1], labels[index])
        descend((optimizer, loss))
        schedule.step()
    return network


def load_lenet(folder, device, epochs, batch, rate):
    """The LeNet of FOLDER/features-lenet.pth as load_features returns a network, with its accuracy.

    If it is not there it is trained on MNIST's training images by train_lenet, and kept. Its accuracy is the
    share of MNIST's test images that it classifies rightly. Exits with a message if the file holds no LeNet.
    """
    path = f"{folder}/features-lenet.pth"
    if not os.path.exists(path):
        images, test = (load_images("mnist", split, folder, least).to(device)
                        for split, least in (("train", batch), ("test", 1)))
        labels, wanted = (load_labels("mnist", split, folder, n).to(device)
                          for split, n in (("train", len(images)), ("test", len(test))))
        make_folder(folder)         # before the training, if it cannot be written
        print(f"{path}: built once, by {epochs} epochs of {len(images):,} images", flush=True)
        network = train_lenet(images, labels, epochs, batch, rate)
        with torch.no_grad():
            found = torch.cat([network(part)[1].argmax(1) for part in test.split(1_000)])
        accuracy = (found == wanted).double().mean().item()
        with replacing(path) as file:
            torch.save(dict(weights=network.cpu().state_dict(), accuracy=accuracy), file)
    again = "delete it to have it trained anew"
    try:
        kept, network = torch.load(path, map_location=device, weights_only=True), LeNet().to(device)
        network.load_state_dict(kept["weights"])
        accuracy = float(kept["accuracy"])
    except Exception as error:                      # whatever its reader stumbles over
        sys.exit(f"{path}: no LeNet ({first_line(error)}); {again}")
    features = feature_function(network.eval(), path, again, 28, device)
    features.accuracy = accuracy
    print(f"{path}: classifies {accuracy:.2%} of MNIST's test images rightly")
    return features


def extract(features, images, device):
    """Features [N, D] and logits [N, C] or None of uint8 images [N, C, H, W], on the CPU.

    Images of one channel are taken for grey ones.
    """
    at_once = 250 if device.type == "cuda" else 10          # on a CPU 250 take most of it for new pages
    parts = images.tensor_split(math.ceil(len(images) / at_once))   # nearly equal, never one image alone
    found = [[out if out is None else out.float().cpu()
              for out in features(part.to(device).expand(-1, 3, -1, -1))] for part in parts]
    found, logits = zip(*found)
    return torch.cat(found), None if logits[0] is None else torch.cat(logits)


def reference_statistics(path, features, device, side=None):
    """What scoring against a path's images needs: features [M, D], gaussian_fit's mean and root, and a name.

    path: as read_images takes it; side: that of crop_images' squares, if those are to be scored against. The
    dict is computed once and kept beside the images, in PATH-NETWORK-KEY.pt or PATH-SIDE-NETWORK-KEY.pt, for
    as long as the images' files and SCORE_PRECISION stay as they are. Exits with a message if that file holds
    something else, or if the network fails.
    """
    stem = path.rstrip("/").removesuffix(".npy") + (f"-{side}" if side else "")
    kept, statistics = f"{stem}-{features.name}-{features.key}.pt", None
    files = [(os.path.basename(name), os.path.getsize(name), os.stat(name).st_mtime_ns)
             for name in image_files(path)]
    how = [SCORE_PRECISION, files] + ["anywhere"] * bool(side)
    source = hashlib.sha256(json.dumps(how).encode()).hexdigest()
    if os.path.exists(kept):
        try:
            statistics = torch.load(kept, map_location="cpu", weights_only=True, mmap=True)
            widths = {statistics[key].shape[-1] for key in ("features", "mean", "root")}
        except Exception as error:              # whatever its reader stumbles over
            sys.exit(f"{kept}: no whole statistics ({first_line(error)}); delete it to have it built anew")
        if widths != {features.width}:
            sys.exit(f"{kept}: found statistics of {sorted(widths)} features, expected {features.width}; "
                     "delete it to have it built anew")
    if statistics is None or statistics.get("source") != source:
        print(f"{kept}: built once, from the features of {path}", flush=True)
        try:
            images = read_images(path)
            found, _ = extract(features, crop_images(images, side) if side else images, device)
        except RuntimeError as error:
            sys.exit(str(error))
        mean, root = gaussian_fit(found, device)
        statistics = dict(features=found, mean=mean.cpu(), root=root.cpu(), source=source)
        try:
            with replacing(kept) as file:
                torch.save(statistics, file)
        except OSError as error:
            print(f"{kept}: not kept ({first_line(error)})")
    return dict(statistics, mean=statistics["mean"].to(device), root=statistics["root"].to(device),
                name=f"{os.path.basename(stem)}, {len(statistics['features']):,} images")


class Judge:
    """A feature network and the features of the images that it scores against.

    network: of load_features; features [M, D]; name: of those images; fit: gaussian_fit of the features.
    """

    def __init__(self, network, features, name, device, fit=None):
        self.network, self.features, self.name, self.device = network, features, name, device
        self.fit = fit or gaussian_fit(features, device)

    def codes(self, images):
        """Features [N, D] of uint8 images [N, C, H, W], on the device."""
        return extract(self.network, images, self.device)[0].to(self.device)

    def score(self, images, resampled=0, resamplings=10):
        """Scores of uint8 images [N, C, H, W] as a dict.

        fd: Frechet distance, FID if the network is FID's. kid, kid_std: KID, its std over subsets. isc,
        isc_std: Inception score, its std over splits, where the network has logits. features: the network's
        name; accuracy: its own, if it is known. samples: N. reference: the judge's name. Of resampled images
        or more, if not 0: fd_bootstrap, fd_bootstrap_std, bootstrap_frechet_distance of the first so many,
        and bootstrap_samples, how many. Raises RuntimeError where the network fails.
        """
        device = self.device
        found, logits = extract(self.network, images, device)
        scores = dict(fd=frechet_distance(gaussian_fit(found, device), self.fit))
        scores["kid"], scores["kid_std"] = kid(found, self.features, device=device)
        if logits is not None:
            scores["isc"], scores["isc_std"] = inception_score(logits, device=device)
        if 0 < resampled <= len(found):
            scores["fd_bootstrap"], scores["fd_bootstrap_std"] = bootstrap_frechet_distance(
                found[:resampled], self.fit, resamplings, device=device)
            scores["bootstrap_samples"] = resampled
        if self.network.accuracy is not None:
            scores["accuracy"] = self.network.accuracy
        return dict(scores, features=self.network.name, samples=len(found), reference=self.name)


def open_features(path, device, needed=None):
    """The network of load_features, None where FID's cannot be fetched, and in processes but the first.

    needed: what cannot do without, a name for the message that it exits with. Otherwise it says where the
    network was looked for: samples can be scored later.
    """
    if ranks()[0]:
        return None
    try:
        return load_features(path, device)
    except OSError as error:
        if needed:
            sys.exit(f"{needed} needs a feature network, to score or to adapt its rates by. {error}")
        print(error)
        return None


def open_judge(features, reference, device, needed=None, side=None):
    """The Judge of a network and reference_statistics, or None without a network.

    features: a network, or what open_features takes with needed; reference, side: of reference_statistics.
    """
    network = features if callable(features) else open_features(features, device, needed)
    if network is None:
        return None
    kept = reference_statistics(reference, network, device, side)
    return Judge(network, kept["features"], kept["name"], device, (kept["mean"], kept["root"]))


def score_files(images, reference, features=None, device=None):
    """Scores of paths: images and reference as read_images takes them, features as load_features does."""
    judge = open_judge(features, reference, setup(device), needed="score_files")
    try:
        return judge.score(read_images(images))
    except RuntimeError as error:
        sys.exit(str(error))


# ------------------------------------------------------------------------------------------------------------
# Running: an update is one CUDA graph, a run is a coroutine
# ------------------------------------------------------------------------------------------------------------


def setup(device):
    """The torch.device that --device names, None: cuda where there is one; exits with a message if it fails.

    Sets the precision: TF32 in convolutions, full float32 in matrix products, so in Gram matrices.
    """
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError(f"a device of type {device.type}")
        if device.index is not None:
            torch.cuda.set_device(device)       # streams, and so captures, are those of this one
    except (RuntimeError, AssertionError) as error:
        sys.exit(f"--device {name}: PyTorch {torch.__version__} cannot use it ({first_line(error)})\n"
                 "expected cpu, or cuda on a machine with a CUDA GPU")
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    return device


def ranks():
    """Which process this is and of how many that torchrun has started for one run: (0, 1) without it."""
    there = distributed.is_available() and distributed.is_initialized()
    return (distributed.get_rank(), distributed.get_world_size()) if there else (0, 1)


def speaks():
    """Whether this process says what all find wrong: the only one or torchrun's first, also before join()."""
    return os.environ.get("RANK", "0") == "0"


def own_seed(seed):
    """The seed of this process' noise in a run of that seed: the same without torchrun."""
    return seed + 1_000_003 * ranks()[0]


def join(device):
    """Join the processes that torchrun has started, if it has started several, before setup().

    device: of --device; each process takes a GPU of its own, or all of them the CPU. Each has networks of
    the same weights, other noise and other data; descend() takes the mean of their gradients, so that a loss
    is the mean of losses of one batch each (the block estimator of Scaled MMD, section 4). Processes but the
    first print and write nothing. Ends with a message if there are too few GPUs or device has a number, and
    when torchrun ends this process, which it does once another one has ended, or has ended itself.
    """
    number = int(os.environ.get("WORLD_SIZE", 1))
    if number == 1 or "RANK" not in os.environ:
        return
    rank, local, before = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"]), []
    if device not in (None, "cpu", "cuda"):
        sys.exit(f"--device {device}: expected cpu or cuda, as each process takes a GPU of its own")
    cuda = torch.cuda.is_available() and device != "cpu"
    if cuda:
        here, wanted = torch.cuda.device_count(), int(os.environ["LOCAL_WORLD_SIZE"])
        if wanted > here:
            sys.exit(f"torchrun --nproc-per-node: found {wanted} processes, expected {here} or fewer, as "
                     "each takes a GPU of its own")
        torch.cuda.set_device(local)
    stop_when_told(rank, before)
    # The first process may build arrays or score for long, and torchrun sees to it that all end with one.
    distributed.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(days=1),
                                   device_id=torch.device("cuda", local) if cuda else None)
    processes = [None] * number
    together("all_gather_object", processes, os.getpid())
    before += processes[:rank]
    if rank:
        sys.stdout = open(os.devnull, "w")


def stop_when_told(rank, before):
    """End this process on torchrun's SIGTERM or after torchrun's end, even while it waits for a GPU.

    The first one that is left says so; before: where the processes of lower rank are going to be listed.
    """
    (told, tell), parent = os.pipe(), os.getppid()
    os.set_blocking(tell, False)
    signal.signal(signal.SIGTERM, lambda *_: None)      # so that it is written to the pipe
    signal.set_wakeup_fd(tell)

    def left(process):
        with suppress(ProcessLookupError):
            os.kill(process, 0)         # asks, does nothing
            return True

    def wait():
        try:
            while os.getppid() == parent:
                if select.select([told], [], [], 1)[0] and os.read(told, 1)[0] == signal.SIGTERM:
                    break
            if len(before) == rank and not any(map(left, before)):
                print("stopped, as torchrun or one of its processes has ended: a message above says why; "
                      "without one, the same command goes on with --resume", file=sys.stderr, flush=True)
        finally:
            os._exit(1)         # also where nobody reads what is printed any more
    threading.Thread(target=wait, daemon=True).start()


def together(collective, *args):
    """Call a collective function of torch.distributed by its name, if there are several processes."""
    if ranks()[1] == 1:
        return
    try:
        getattr(distributed, collective)(*args)
    except RuntimeError:        # another process has ended: torchrun will end this one, see join()
        time.sleep(60)
        raise


def averaged(*tensors):
    """The means of tensors of one type over all processes, by one collective; of one process as they are.

    On GPUs NCCL's, which can be captured in a CUDA graph as any kernel can.
    """
    number = ranks()[1]
    if number == 1:
        return tensors
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
    together("all_reduce", flat)
    parts = (flat / number).split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors)]


def share_rates(*optimizers):
    """Give the learning rates of the first process to all: it alone judges whether they adapt."""
    if ranks()[1] == 1:
        return
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        rate = torch.tensor(float(group["lr"]), dtype=torch.float64, device=group["params"][0].device)
        together("broadcast", rate, 0)
        set_rate(group, float(rate))


def set_rate(group, lr):
    """Set the learning rate of an optimizer's group, in place if it is a tensor."""
    group["lr"] = group["lr"].fill_(lr) if torch.is_tensor(group["lr"]) else lr


def first_line(error):
    """The first line of an exception's text, for messages."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:120]


def optimizer(network, adam=None, rmsprop=None):
    """torch.optim.Adam of (rate, beta_1, beta_2) or RMSprop of a rate, whichever a row of METHODS names.

    On a GPU fit for a CUDA graph, its rate a tensor that is changed by fill_ only.
    """
    device = next(network.parameters()).device
    cuda = device.type == "cuda"
    lr, *betas = adam or (rmsprop,)
    lr = torch.tensor(lr, device=device) if cuda else lr
    if adam:
        return torch.optim.Adam(network.parameters(), lr, tuple(betas), fused=cuda, capturable=cuda)
    return torch.optim.RMSprop(network.parameters(), lr, capturable=cuda)


class Scorer:
    """A run's samples and their scores, which its log and its result have.

    judge: a Judge, or None for no scores; sampler, folder: the run's; resampled, resamplings: of Judge.score.
    """

    def __init__(self, judge, sampler, folder, resampled, resamplings):
        self.judge, self.sampler, self.folder = judge, sampler, folder
        self.resampled, self.resamplings, self.last = resampled, resamplings, {}

    def score(self, n):
        """The scores of n samples as Judge.score has them; none without a judge, or if its network fails."""
        if self.judge:
            images, self.last = self.sampler.draw(n), {}
            try:
                self.last = self.judge.score(images, self.resampled, self.resamplings)
            except RuntimeError as error:
                print(f"{self.folder}: not scored: {error}")
        return self.last

    def keep(self, n, written=None):
        """Write n samples, or so many, to FOLDER/samples.npy; return scores of n, if need be anew."""
        with replacing(f"{self.folder}/samples.npy") as file:
            np.save(file, self.sampler.draw(written or n).numpy())
        return self.last if self.last.get("samples") == n else self.score(n)


class AdaptiveRate:
    """Learning rates that fall when a model gets no nearer to the data (Binkowski et al. 2018, section 4.1).

    x: features [m, D] of training images; key: which network's, the state of another raises ValueError.
    step(y), with those of as many samples, is one evaluation: it puts y to the test against the model of
    `window` evaluations before and returns the p-value, None without such a model. p > level is a failure;
    `patience` of them in a row multiply all rates of the optimizers by decay, but not below floor. As in
    mbinkowski/MMD-GAN (gan/utils/scorer.py) a success moves the window on by one evaluation, a failure leaves
    the old model where it is, and a cut keeps the last `patience` models, the present one among them, so that
    the next test comes when the window is full again. Samples of different models must be independent. Of
    each model row sums are kept and no features (similarity).
    """

    def __init__(self, optimizers, x, key, decay, window, patience, level, floor):
        self.optimizers, self.x, self.key = optimizers, x.double(), key
        self.window, self.patience = window, patience
        self.decay, self.level, self.floor = decay, level, floor
        self.models, self.failures = [], 0

    def state_dict(self):
        return {"models": self.models, "failures": self.failures, "key": self.key}

    def load_state_dict(self, kept):
        if kept["key"] != self.key:
            raise ValueError(f"found rates that adapt to the features of network {kept['key']}, expected "
                             f"{self.key}; go on with that network, or name another folder with --out")
        self.models = [tuple(part.to(self.x.device) for part in model) for model in kept["models"]]
        self.failures = kept["failures"]

    def step(self, y):
        y = y.double()
        now = similarity(cubic(self.x, y), cubic(y, y))
        if len(self.models) < self.window:
            self.models.append(now)
            return None
        p = relative_similarity(self.models[0], now)
        self.failures = self.failures + 1 if p > self.level else 0
        if not self.failures:
            self.models = [*self.models[1:], now]
        if self.failures == self.patience:
            self.models, self.failures = [*self.models, now][-self.patience:], 0
            for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
                set_rate(group, max(float(group["lr"]) * self.decay, self.floor))
        return p


def descend(*players):
    """One step of each (optimizer, loss), every gradient taken before any step (GRAM, Algorithm 1).

    A loss is a scalar, or a Stack's, [B], whose members do not meet. Of several processes that torchrun has
    started the gradients are averaged: a step is the same in all.
    """
    weights = [[p for group in optimizer.param_groups for p in group["params"]] for optimizer, _ in players]
    gradients = [torch.autograd.grad(loss.sum(), w, retain_graph=True)
                 for (_, loss), w in zip(players, weights)]
    for (optimizer, _), w, gradient in zip(players, weights, gradients):
        for p, p_gradient in zip(w, averaged(*gradient)):
            fits = p_gradient.stride() == p.stride()    # not a Stack's, transposed, which fused Adam refuses
            p.grad = p_gradient if fits else torch.empty_like(p).copy_(p_gradient)
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


@contextmanager
def tuning():
    """cuDNN tries all its algorithms for each convolution that it meets here first, and keeps the fastest."""
    torch.cuda.synchronize()        # with nothing beside it
    cudnn = torch.backends.cudnn
    before, (cudnn.benchmark, cudnn.benchmark_limit) = (cudnn.benchmark, cudnn.benchmark_limit), (True, 0)
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.benchmark_limit = before


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
        with tuning():
            for _ in range(3):      # real updates, which set up libraries and the optimizers' state
                update()
        # A stream of its own: graphs captured on one stream share a workspace, and side by side turn to NaN.
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
            update()
    return graph.replay


def milliseconds(cycle, state, device, times=20):
    """Milliseconds of cycle() on a GPU, by so many after a first, state put back as by capture(); else None.

    What other runs have begun is waited for: call it before a run's first yield, where none goes on.
    """
    if device.type != "cuda":
        return None
    with restoring(state):
        cycle()
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(times):
            cycle()
        torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - began) / times


def measure(cycle, state, device, before):
    """What result.json has of a run's cost: milliseconds of cycle(), MiB of GPU memory less those before."""
    return dict(milliseconds=milliseconds(cycle, state, device), MiB=gpu_memory(device, before))


def gpu_memory(device, before=0):
    """MiB of a GPU's memory, less those before, that are in use or held by CUDA graphs; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device) / 2 ** 20 - before


def interleave(runs):
    """Advance generators in turn, each on a CUDA stream of its own, and return the list of what they return.

    A run that raises FloatingPointError ends alone and has the error for its result. On Ctrl-C all that go on
    are sent True, so that they save what they have, and KeyboardInterrupt comes when they have.
    """
    cuda = torch.cuda.is_initialized()
    streams = [torch.cuda.Stream() if cuda else None for _ in runs]
    if cuda:
        torch.cuda.synchronize()        # the streams are about to read what this one has written
    results, active, stop = [None] * len(runs), list(range(len(runs))), None
    with stopping() as told:
        while active:
            for i in list(active):
                try:
                    with torch.cuda.stream(streams[i]):
                        runs[i].send(stop)
                    continue
                except StopIteration as end:
                    results[i] = end.value
                except FloatingPointError as error:
                    results[i] = error.with_traceback(None)     # which would hold all of the run
                active.remove(i)
            if stop and active:
                raise KeyboardInterrupt
            stop = told.is_set() or None        # a generator is begun with None
    return results


def encode(ascend, steps, folder):
    """Train a run's autoencoder by so many calls of ascend, before its generator's updates.

    A generator that yields every hundred, so that runs side by side go on; a checkpoint of it there is none.
    """
    print(f"{folder}: its autoencoder takes {steps:,} steps first", flush=True)
    for n in range(steps):
        ascend()
        if n % 100 == 0:
            yield


@contextmanager
def stopping():
    """An event that the first Ctrl-C in the block sets; of several processes none, torchrun ends them."""
    told, usual = threading.Event(), signal.default_int_handler

    def tell(*_):
        print("\nstopping, after the next update; Ctrl-C again: at once", file=sys.stderr, flush=True)
        signal.signal(signal.SIGINT, usual)
        told.set()

    main = threading.current_thread() is threading.main_thread()
    asked = main and ranks()[1] == 1 and signal.getsignal(signal.SIGINT) is usual
    if asked:
        signal.signal(signal.SIGINT, tell)
    try:
        yield told
    finally:
        if asked:
            signal.signal(signal.SIGINT, usual)


# ------------------------------------------------------------------------------------------------------------
# Keeping: folders, checkpoints, logs
# ------------------------------------------------------------------------------------------------------------


@contextmanager
def replacing(path):
    """A binary file that takes path's place when the block ends well; else path stays as it was.

    Of several processes that torchrun has started the first one alone writes it.
    """
    if ranks()[0]:
        yield io.BytesIO()
        return
    try:
        with open(f"{path}.tmp", "wb") as file:
            yield file
        os.replace(f"{path}.tmp", path)
    except BaseException as error:
        if isinstance(error, OSError):
            error.filename = error.filename or path     # which a write does not name
        if os.path.exists(f"{path}.tmp"):
            os.remove(f"{path}.tmp")
        raise


def write_json(path, value):
    """Write a value as JSON."""
    with replacing(path) as file:
        file.write((json.dumps(value, indent=1) + "\n").encode())


def read_json(path):
    """The dict in a JSON file, an empty one if it is not there or holds none."""
    kept = {}
    with suppress(OSError, ValueError):
        with open(path) as file:
            kept = json.load(file)
    return kept if isinstance(kept, dict) else {}


def read_result(folder, *keys):
    """The values of keys in FOLDER/result.json as a dict, None for what is not there."""
    kept = read_json(f"{folder}/result.json")
    return {key: kept.get(key) for key in keys}


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


Run = namedtuple("Run", "method seed folder settings")      # of open_runs


def open_runs(out, script, namespace, methods, seeds, resume, device, figure=None):
    """Print a script's constants and make ready its runs' folders OUT/SCRIPT-METHOD-sSEED, sources copied in.

    script, namespace: the script's file and globals(), with METHODS; methods, seeds, resume: its flags.
    figure: the name of one for which all seeds of a method are one run, OUT/SCRIPT-figureNAME-METHOD.
    Returns a Run for each, its settings being what its checkpoint has to agree with, all of its row but paper
    and every: one that does not exits with a message. Without resume an earlier run's folder is kept as
    FOLDER-old-N. seed is a list of them all for a figure.
    """
    given = constants(namespace)
    show(**given, **machine(device))
    # The sources are read before their folder, if they stand in one, is put aside.
    runs, sources = [], {os.path.basename(path): open(path, "rb").read() for path in (script, __file__)}
    start = f"{out}/{os.path.basename(script).removesuffix('.py')}"
    groups = [list(range(seeds))] if figure else range(seeds)
    for method, seed in itertools.product(dict.fromkeys(methods), groups):
        folder = f"{start}-figure{figure}-{method}" if figure else f"{start}-{method}-s{seed}"
        row = {k: v for k, v in namespace["METHODS"][method].items() if k not in ("paper", "every")}
        settings = dict(given, method=method, row=row, seed=seed, device=device.type)
        if ranks()[1] > 1:
            settings["processes"] = ranks()[1]
        runs.append(Run(method, seed, folder, json.loads(json.dumps(settings))))
    if resume:
        for _, _, folder, settings in runs:
            kept = read_checkpoint(folder, settings)
            done = "no checkpoint, begins" if kept is None else "goes on"
            print(f"{folder}: {done} at update {kept['step'] if kept else 0:,}")
    if ranks()[0] == 0:
        for _, _, folder, _ in runs:
            make_folder(folder)
            if os.path.exists(f"{folder}/checkpoint.pt") and not resume:
                old = next(o for n in itertools.count(1) if not os.path.exists(o := f"{folder}-old-{n}"))
                os.rename(folder, old)
                os.mkdir(folder)
                print(f"{folder} held an earlier run, which is now {old}; --resume would have gone on "
                      "with it")
            for name, text in sources.items():
                with replacing(f"{folder}/{name}") as file:
                    file.write(text)
    together("barrier")
    return runs


def save(folder, step, state, settings):
    """Write FOLDER/checkpoint.pt: a run's step, its state as in state_dicts, and its settings.

    Of several processes each has its own generators' states there, a list under "generators". The checkpoint
    before stays if state["log"] has taken in what is not finite.
    """
    if "log" in state and not state["log"].sums.isfinite().all():
        return
    kept = {"step": step, "settings": settings, "state": state_dicts(state)}
    rank, number = ranks()
    if number > 1:
        own = {name: s.get_state() for name, s in state.items() if isinstance(s, torch.Generator)}
        kept["generators"] = [None] * number
        together("all_gather_object", kept["generators"], own)
    if rank == 0:
        with replacing(f"{folder}/checkpoint.pt") as file:
            torch.save(kept, file)


def read_checkpoint(folder, settings):
    """FOLDER/checkpoint.pt as a dict or None; exits with a message if damaged or of other settings."""
    path = f"{folder}/checkpoint.pt"
    if not os.path.exists(path):
        return None
    try:
        kept = torch.load(path, map_location="cpu", weights_only=True)
        step, made, wanted = kept["step"], {"processes": 1} | kept["settings"], {"processes": 1} | settings
    except Exception as error:
        sys.exit(f"{path}: no whole checkpoint ({first_line(error)}); delete it to begin this run anew")
    for key in sorted(made.keys() | wanted.keys()):
        if made.get(key) != wanted.get(key):
            back = "set it back" if key != "processes" else f"use torchrun --nproc-per-node={made[key]}"
            sys.exit(f"{path}: found a run of {step:,} updates with {key} = {made.get(key)}, expected "
                     f"{wanted.get(key)}; {back}, or name another folder with --out")
    return kept


def load(folder, state, settings):
    """Bring a run's state to FOLDER/checkpoint.pt and return its step, 0 if absent; always before capture().

    An optimizer's load_state_dict swaps the tensors that a graph has burnt in. Exits as read_checkpoint does,
    and with a message if a state does not fit.
    """
    kept = read_checkpoint(folder, settings)
    if kept is None:
        return 0
    own = kept["state"]
    if "generators" in kept:
        own |= kept["generators"][ranks()[0]]
    for name, s in state.items():
        try:
            (s.set_state if isinstance(s, torch.Generator) else s.load_state_dict)(own[name])
        except ValueError as error:
            sys.exit(f"{folder}/checkpoint.pt: {error}")
        if isinstance(s, torch.optim.Optimizer):
            for group in s.param_groups:
                if torch.is_tensor(group["lr"]):        # loaded to the CPU, and left there by load_state_dict
                    group["lr"] = group["lr"].to(group["params"][0].device)
    return kept["step"]


class Log:
    """Means of a run's scalars over intervals: for each a row of FOLDER/log.csv and of the terminal.

    columns: names of the scalars that add() takes; steps: updates of the run in all, for the time left. They
    are summed on the device, inside the captured update, so a row costs one synchronisation. A row of the
    terminal has the means since the last one there, over as many rows of the file as there were. readings:
    names of what is not a mean, but read off when a row is written.
    """

    def __init__(self, folder, columns, steps, device, readings=()):
        self.path, self.name = f"{folder}/log.csv", os.path.basename(folder)
        self.columns, self.steps, self.readings = columns, steps, readings
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
        rows = [",".join(["step", *self.columns, *self.readings, "seconds"])]
        if step and os.path.exists(self.path):
            with open(self.path) as file:
                whole = [row for row in file.read().splitlines()[1:] if row.count(",") == rows[0].count(",")]
            rows += [row for row in whole if int(row.split(",")[0]) <= step]
        with replacing(self.path) as file:
            file.write("".join(row + "\n" for row in rows).encode())
        self.clock, self.shown = time.perf_counter(), (step, time.perf_counter())

    def add(self, *values):
        """Take in the scalars of an update, None for one that the method has not; no synchronisation.

        Of a Stack's values, [B], it takes the mean of the finite ones: NaN when all have diverged.
        """
        def scalar(v):
            return self.zero if v is None else v.where(v.isfinite(), torch.nan).nanmean() if v.ndim else v

        self.given = [value is not None for value in values]
        self.sums += torch.stack([scalar(v).detach() for v in values] + [self.one])

    def row(self, step, readings=dict, shown=True):
        """Write the means since the last row, and what readings() gives.

        Raises FloatingPointError before that if a mean is not finite.
        """
        sums, now = np.array(averaged(self.sums)[0].tolist()), time.perf_counter()
        self.sums.zero_()
        self.unshown += sums
        self.seconds, self.clock = self.seconds + now - self.clock, now
        means = self.means(sums)
        for name, mean in zip(self.columns, means):
            if mean is not None and not math.isfinite(mean):
                raise FloatingPointError(f"diverged at update {step:,}: {name} is {mean}")
        found = readings()
        read = [found.get(name) for name in self.readings]
        with open(os.devnull if ranks()[0] else self.path, "a") as file:
            values = ["" if value is None else repr(value) for value in [*means, *read]]
            file.write(",".join([str(step), *values, f"{self.seconds:.2f}"]) + "\n")
        if shown:
            values = [*self.means(self.unshown), *read]
            cells = [f"{'-' if value is None else format(value, '.4g'):>11}" for value in values]
            rate = (step - self.shown[0]) / (now - self.shown[1])
            minutes, left = divmod(round((self.steps - step) / rate), 60)
            print(f"{self.name:<20}{step:>9,}{''.join(cells)}{rate:>11.1f}{minutes:>8}:{left:02}", flush=True)
            self.unshown[:], self.shown = 0, (step, now)

    def means(self, sums):
        """Means, as floats, from sums whose last one counts; None for a scalar that the method has not."""
        return [float(total / sums[-1]) if given else None for total, given in zip(sums, self.given)]


COLUMNS = ("loss_f", "loss_g", "pearson", "mean_r", "spread")   # of the log of a run of images; spread:
                                                                # variance of f(x) over that of f(y)
READINGS = ("condition", "fd", "kid", "isc", "p", "lr_g")       # condition: of the matrix the ratio inverts


def log_head(columns):
    """The head of the rows that Log prints."""
    return f"{'run':<20}{'update':>9}{''.join(f'{c:>11}' for c in columns)}{'updates/s':>11}{'min left':>11}"


def read_log(folder):
    """FOLDER/log.csv as an array with a field for each column, NaN where the method has no such scalar."""
    return np.genfromtxt(f"{folder}/log.csv", delimiter=",", names=True, ndmin=1)


# ------------------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------------------


def flags(doc, methods, default, steps, images):
    """The parser of a script's flags; a script adds its own to it.

    doc: its docstring; methods: its METHODS, default a list of them; steps: its updates; images: with --data,
    --features, a text: what network is the default. A default or steps of None is the figure's, for the
    script to set.
    """
    def standing(value):
        return f"(default {value})" if value else "(default: the figure's)"

    def positive(text):
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number of 1 or more")
        return int(text)

    def folder(text):
        return text or "."

    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(
        2, f"{parser.prog}: {message}; --help explains the flags\n" if speaks() else None)
    add = parser.add_argument
    add("--method", nargs="+", default=default, choices=list(methods), metavar="NAME",
        help=f"one or more of {', '.join(methods)} {standing(default and ' '.join(default))}")
    add("--seeds", type=positive, default=1, metavar="N",
        help=f"train with seeds 0 to N-1 {standing(steps and 1)}")
    add("--steps", type=positive, default=steps, metavar="N",
        help=f"generator updates {standing(steps and format(steps, ','))}")
    add("--out", type=folder, default="runs", metavar="DIR", help="folder for the runs (default runs)")
    add("--resume", action="store_true", help="go on from the checkpoints of the runs")
    add("--device", metavar="NAME", help="cpu or cuda (default cuda where there is one)")
    if images:
        add("--data", type=folder, default="data", metavar="DIR", help="folder of the arrays (default data)")
        network = images if isinstance(images, str) else "that one, fetched"
        add("--features", metavar="FILE", help="network to score with: a torch.export file (.pt2) from uint8 "
                                               "[N, 3, H, W] to features [N, D], or a copy (.pth) of the "
                                               f"weights of FID's Inception network (default {network})")
    return parser


def parse(parser, argv, figures, tables):
    """The flags of an image script, --figure and --table among them; samples as its table has them, or None.

    figures: {name: defaults of other flags}; tables: {name: (samples, methods as one text)}, or with its
    updates for a third. What is trained already for a figure or a table is not trained again: resume is set.
    """
    parser.set_defaults(figure=None, table=None, samples=None)
    if figures:
        parser.add_argument("--figure", choices=list(figures), metavar="NAME", help=(
            f"draw {', '.join(figures)}; what has been trained for it is not trained again"))
    if tables:
        parser.add_argument("--table", choices=list(tables), metavar="NAME", help=(
            f"train and score the methods of a paper's table: {', '.join(tables)}; likewise"))
    args = parser.parse_args(argv)
    if args.table and args.figure:
        parser.error(f"found --table {args.table} and --figure {args.figure}, expected one of the two")
    if args.table:
        samples, methods, *steps = tables[args.table]
        parser.set_defaults(samples=samples, method=methods.split(), steps=steps[0] if steps else args.steps)
    if args.figure:
        parser.set_defaults(**figures[args.figure])
    args = parser.parse_args(argv)
    args.resume = args.resume or bool(args.figure or args.table)
    return args


def train_runs(script, namespace, args, argv, device, begin):
    """Train the runs that the flags ask for side by side, with all that is printed and kept; [(run, result)].

    script, namespace: its file and globals(), with METHODS, networks() and what draw_figures takes; args: of
    parse(argv); begin: from a run of open_runs to its generator. Returns those that finished, after the table
    of their scores and the figures, and exits with a message if there are none.
    """
    without = [method for method in args.method if not namespace["METHODS"][method]["critic"]]
    if args.figure == "singular" and without:
        sys.exit(f"--figure singular: found {' '.join(without)}, expected rows that have a critic")
    runs = open_runs(args.out, script, namespace, args.method, args.seeds, args.resume, device)
    for method in dict.fromkeys(args.method):
        g, f, decoder = namespace["networks"](namespace["METHODS"][method])
        print(f"{method}: generator of {count(g):,} parameters, critic of {count(f):,}, "
              f"decoder of {count(decoder):,}")
    print(log_head(COLUMNS + READINGS))
    typed = command(script, argv)
    results = train_all(runs, begin, typed)
    finished = list(ended(runs, results))
    for run, result in finished:
        print(f"{run.folder}: {result['updates']:,} updates, {', '.join(sorted(os.listdir(run.folder)))}")
    if not all("fd" in result for _, result in finished):
        print(f"to score the samples: {typed}{'' if args.resume else ' --resume'}"
              f"{'' if args.features else ' --features FILE'}")
    print(f"\n{score_table(runs, results, namespace['METHODS'])}\n")
    if not finished:
        sys.exit("no run finished")
    if ranks()[0] == 0:
        draw_figures(script, namespace, args, finished)
    return finished


def draw_figures(script, namespace, args, finished):
    """Save OUT/SCRIPT-curves.png and, of --figure NAME, OUT/SCRIPT-figureNAME.png.

    namespace: with CURVES {name: panels of curves_figure}, "all" and what else is a figure's name, and
    SWEEPS {name: panels of sweep_figure}, if there are any. "singular" is singular_figure's. A figure of
    another name is the script's own.
    """
    curves, sweeps = namespace["CURVES"], namespace.get("SWEEPS", {})
    pictures = {"-curves": curves_figure(finished, curves["all"])}
    if args.figure in curves:
        pictures[f"-figure{args.figure}"] = curves_figure(finished, curves[args.figure])
    if args.figure in sweeps:
        pictures[f"-figure{args.figure}"] = sweep_figure(finished, sweeps[args.figure])
    if args.figure == "singular":
        pictures["-figuresingular"] = singular_figure(finished)
    for name, picture in pictures.items():
        save_figure(f"{args.out}/{os.path.basename(script).removesuffix('.py')}{name}.png", picture)


def run(main):
    """Call a script's main(); Ctrl-C ends it in words, those of the first process if there are several."""
    sys.stdout.reconfigure(errors="backslashreplace")       # names of files may be of any bytes
    try:
        main()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        sys.exit(f"{error.filename or 'the disk'}: {os.strerror(error.errno)}; make room, and with --resume "
                 "the same command goes on from the last checkpoints, if there are any")
    except KeyboardInterrupt:
        if ranks()[0] == 0:
            print("\nstopped; with --resume the same command goes on from the last checkpoints, if there are "
                  "any", file=sys.stderr)
        sys.exit(130)
    except SystemExit as end:       # a message is that of the first process, unless that has none
        if isinstance(end.code, str) and not speaks():
            time.sleep(10)              # torchrun ends this process meanwhile
        raise
    if ranks()[1] > 1:
        gc.collect()                # captured graphs, which hold what is destroyed here
        distributed.destroy_process_group()


def train_all(runs, begin, command):
    """Train runs of open_runs side by side, each begun by begin(run), as interleave does; their results.

    What a run returns is in FOLDER/result.json, with the command, as soon as that run has ended.
    """
    def kept(run):
        result = yield from begin(run)
        write_json(f"{run.folder}/result.json", dict(result, command=command))
        return result

    if ranks()[1] == 1:
        return interleave([kept(run) for run in runs])
    return [interleave([kept(run)])[0] for run in runs]     # collectives come in the same order everywhere


def ended(runs, results):
    """Yields (run, result) of each run that ended well, in order; says how the others ended.

    runs: of open_runs; results: of train_all, dicts or FloatingPointErrors.
    """
    for run, result in zip(runs, results):
        if isinstance(result, FloatingPointError):
            print(f"{run.folder}: {result}")
        else:
            yield run, result


def command(script, argv):
    """The command line of a script as a user types it; argv as main() got it."""
    number = ranks()[1]
    start = ["python"] if number == 1 else ["torchrun", f"--nproc-per-node={number}"]
    return shlex.join([*start, os.path.basename(script), *(sys.argv[1:] if argv is None else argv)])


def machine(device):
    """What a result was made on, a dict: GPU or CPU, and the version of PyTorch."""
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} threads"
    return {"device": name, "torch": torch.__version__}


def show(**settings):
    """Print names and values in two columns."""
    cells = [f"{name:<12} {value}" for name, value in settings.items()]
    left, right = cells[:(len(cells) + 1) // 2], cells[(len(cells) + 1) // 2:]
    for a, b in itertools.zip_longest(left, right, fillvalue=""):
        print(f"{a:<{max(map(len, left)) + 4}}{b}".rstrip())


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


# ------------------------------------------------------------------------------------------------------------
# Figures
# ------------------------------------------------------------------------------------------------------------


def save_grid(path, images, columns=16):
    """Write images, uint8 [N, C, H, W], as one PNG with so many in a row."""
    with replacing(path) as file:
        torchvision.utils.save_image(images.cpu() / 255, file, "PNG", nrow=columns, padding=1)


def save_figure(path, figure):
    """Write a matplotlib figure as a PNG into a folder that is made if need be, and print its path."""
    make_folder(os.path.dirname(path))
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


def scatter_figure(panels, columns, title):
    """A matplotlib figure of scatter_panel's, from a list of (x, y, title), so many in a row."""
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(2.5 * columns, 2.6 * rows + 0.4), layout="constrained")
    for place, panel in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, place)
        scatter_panel(axes, *panel)
    figure.axes[0].legend(fontsize=7, markerscale=3)
    figure.suptitle(title, fontsize=11)
    return figure


def curve_panel(axes, steps, curves):
    """A panel of curves {label: array} over updates, with a log axis if no value is 0 or less."""
    for label, values in curves.items():
        axes.plot(steps, values, label=label, linewidth=1)
    if all((values > 0).all() for values in curves.values()):
        axes.set_yscale("log")
    axes.set_xlabel("update", fontsize=8)
    axes.tick_params(labelsize=7)


TITLES = dict(fd="Fréchet distance to the test images", kid="KID", mean_r="mean of r",
              isc="Inception score, by the feature network's logits", loss_g="generator's loss",
              condition="condition number of K + ridge I", spread="variance of f(x) over variance of f(y)")
LOGARITHMIC = ("fd", "mean_r", "condition", "spread")       # others can be negative, or vary little


def curves_figure(finished, panels):
    """Panels, pairs (column, over), of what finished runs have logged: a line a seed, all alike of a method.

    finished: pairs of a run of open_runs and its result; columns of TITLES. over: "update", or "second", of a
    run alone on the GPU, from its result's milliseconds an update; on a CPU of all runs of the command.
    """
    methods = list(dict.fromkeys(method for (method, *_), _ in finished))
    logs = [read_log(folder) for (_, _, folder, _), _ in finished]
    panels = [panel for panel in panels if any(np.isfinite(log[panel[0]]).any() for log in logs)] or panels
    columns = 2 if len(panels) == 4 else min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5.5 * columns, 3.25 * rows), layout="constrained")
    labels = {}                         # one line for each method
    for i, (column, over) in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, i)
        for ((method, *_), result), log in zip(finished, logs):
            there = np.isfinite(log[column])
            x = log["step"] if over == "update" else log["seconds"]
            if over == "second" and result["milliseconds"]:
                x = log["step"] * result["milliseconds"] / 1e3
            if there.any():
                place = methods.index(method)
                [labels[method]] = axes.plot(x[there], log[column][there], color=f"C{place}", linewidth=1,
                                             linestyle=("-", "--", ":", "-.")[place // 10 % 4],
                                             marker="." if there.sum() < 20 else None)
                axes.set_yscale("log" if column in LOGARITHMIC else "linear")
        axes.set_title(TITLES[column], fontsize=9)
        axes.set_xlabel(over, fontsize=8)
        axes.tick_params(labelsize=7, which="both")
    if labels:
        figure.legend(labels.values(), labels, loc="outside lower center", fontsize=8, ncols=3 * columns)
    return figure


def released(methods, axes):
    """Rows with a gradient penalty once more, as NAME-AXIS, with the norm that the released code has.

    methods: {name: row}; axes {row["nets"]: name in AXES, columns or pixels}.
    """
    return {f"{name}-{axis}": dict(row, penalty=(axis, row["penalty"][1])) for name, row in methods.items()
            if row.get("penalty", [None])[0] == "gradient" and (axis := axes.get(row["nets"]))}


def activated(methods, *names):
    """Rows once more, as NAME-activation, with rq*'s penalties (Demystifying MMD GANs, footnote 19).

    methods: {name: row}. Ours: the paper has them with rq* alone; of other kernels they hold the critic, too.
    """
    return {f"{name}-activation": dict(methods[name], penalty=("gradient", 1.0), activation=1.0, paper="-")
            for name in names}


def swept(row, axis, value):
    """A row of METHODS at a value of an axis: "learning rate", of its optimizers, "batch size" or "K"."""
    rates = {key: value if key == "rmsprop" else (value, *row[key][1:])
             for key in ("adam", "adam_g", "rmsprop") if key in row}
    changed = {"learning rate": rates, "batch size": dict(batch=value), "K": dict(critic=value)}[axis]
    return dict(row, paper="-") | changed


def sweep_figure(finished, panels):
    """Frechet distances of finished runs over a number that their rows vary (GRAM, Figure 5).

    finished: as in curves_figure; panels {axis: {row: number}}, a line for the rows of a name up to its last
    "-", through the means over seeds.
    """
    figure = Figure(figsize=(5 * len(panels), 3.5), layout="constrained")
    for axes, (axis, places) in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels.items()):
        lines = {}
        for (method, *_), result in finished:
            if method in places and "fd" in result:
                line = lines.setdefault(method.rpartition("-")[0], {})
                line.setdefault(places[method], []).append(result["fd"])
        for name, line in lines.items():
            at = sorted(line)
            [drawn] = axes.plot(at, [np.mean(line[place]) for place in at], label=name)
            axes.scatter(*zip(*((place, fd) for place in at for fd in line[place])), s=12,
                         color=drawn.get_color())
        axes.set_xscale("log", base=2)
        ticks = sorted(set(places.values()))
        axes.set_xticks(ticks, [f"{value:g}" for value in ticks])
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.set_xlabel(axis)
        axes.set_ylabel("Fréchet distance")
        axes.legend(fontsize=7)
    return figure


def save_singular_values(folder, step, critic):
    """Write FOLDER/singular-STEP.npz, the singular values of each layer of a critic."""
    with replacing(f"{folder}/singular-{step}.npz") as file:
        np.savez(file, *(values.cpu() for values in singular_values(critic)))


def singular_figure(finished):
    """Singular values of critics' layers over their largest, early and late (Scaled MMD, Figures 2b and 7).

    finished: as in curves_figure, of runs that save_singular_values(); a panel for each layer and method,
    whose first seed it shows.
    """
    kept = {}
    for (method, _, folder, _), _ in finished:
        if method in kept:
            continue
        for path in glob.glob(f"{glob.escape(folder)}/singular-*.npz"):
            step = int(os.path.basename(path)[len("singular-"):-len(".npz")])
            with np.load(path) as layers:       # but for a layer of one output
                values = [layers[name] for name in layers.files]
                kept.setdefault(method, {})[step] = [v for v in values if len(v) > 1]
    depth = max(len(layers) for steps in kept.values() for layers in steps.values())
    figure = Figure(figsize=(2.4 * depth, 2.4 * len(kept)), layout="constrained")
    grid = figure.subplots(len(kept), depth, squeeze=False, sharey=True)
    for row, (method, steps) in zip(grid, kept.items()):
        for i, axes in enumerate(row):
            for place, step in enumerate(sorted(steps)):
                axes.plot(steps[step][i] / steps[step][i].max(), label=f"{step:,}",
                          color=matplotlib.colormaps["viridis"](place / max(len(steps) - 1, 1)))
            axes.set_yscale("log")
            axes.set_title(f"{method}, layer {i + 1}", fontsize=8)
            axes.tick_params(which="both", labelsize=6)
        row[0].legend(title="update", fontsize=6, title_fontsize=6)
    return figure


def shown_scores(features):
    """{key of Judge.score: (its name, scale, digits)} where it is shown, by a feature network's name."""
    fid = features == FID_NAME
    return dict(isc=("Inception score" if fid else "score of its logits", 1, 2),
                fd=("FID" if fid else "Fréchet distance", 1, 1),
                kid=("KID×1,000", 1_000, 1), fd_bootstrap=("bootstrap, biased upward", 1, 1))


def score_table(runs, results, methods):
    """The scores of runs as text, mean ± std over seeds, beside the paper's in their rows of methods.

    runs: of open_runs; results: of train_all, with the keys of Judge.score.
    """
    scored = next((result for result in results if isinstance(result, dict) and "features" in result), None)
    shown, rows = shown_scores(scored and scored["features"]), []
    for method in dict.fromkeys(method for method, *_ in runs):
        own = [result for (name, *_), result in zip(runs, results) if name == method]
        done = [result for result in own if isinstance(result, dict)]
        failed = [f"seed {seed} {end}" for seed, end in enumerate(own) if isinstance(end, FloatingPointError)]
        finished = "; ".join([f"{len(done)} of {len(own)}", *failed])
        updates = sorted({end(result["updates"] for result in done) for end in (min, max)} if done else ())
        cells = [method, " to ".join(f"{n:,}" for n in updates) or "-", finished]
        for key, (_, scale, digits) in shown.items():
            cells.append(mean_std([scale * result[key] for result in done if key in result], digits))
        alone = [[result[key] for result in done if result.get(key)] for key in ("milliseconds", "MiB")]
        cells += [f"{np.mean(own):.{digits}f}" if own else "-" for own, digits in zip(alone, (2, 0))]
        rows.append([*cells, methods[method].get("paper", "-")])
    head = ["method", "updates", "seeds finished", *(name for name, *_ in shown.values()),
            "ms an update alone", "MiB", "the paper: Inception score, FID, KID"]
    what = "not scored"
    if scored:
        right = f", {scored['accuracy']:.2%} accuracy" if "accuracy" in scored else ""
        what = f"{scored['features']}{right}; {scored['samples']:,} samples against {scored['reference']}"
    return f"{what}; mean ± std over seeds\n\n{table(head, rows)}"


def neighbours_figure(samples, images, judge):
    """Samples [N, C, H, W], each above its five nearest images in pixels and features (GRAM, Figure 4)."""
    spaces = {name: [s.to(judge.device).flatten(1).float() if name == "pixels" else judge.codes(s)
                     for s in (samples, images)] for name in ("pixels", "features")}
    figure = Figure(figsize=(0.5 * len(samples), 6.5), layout="constrained")
    for axes, (name, (a, b)) in zip(figure.subplots(2), spaces.items()):
        nearest = torch.cdist(a, b).topk(5, largest=False).indices.T
        shown = torch.cat([samples[None].to(images.device), images[nearest.to(images.device)]]).flatten(0, 1)
        grid = torchvision.utils.make_grid(shown.cpu(), len(samples), padding=1)
        axes.imshow(grid.permute(1, 2, 0).numpy())
        axes.set_title(f"nearest in {name}", fontsize=9)
        axes.axis("off")
    return figure


def bias_figure(images, judge, kid_n, fid_n, dimension, m, estimates):
    """Mean and std of so many estimates over their number of points: what is biased, and what that does.

    KID and Frechet distance from kid_n and fid_n of the images and of the judge's, which have one law: only
    KID is 0 in the mean. FIDs from m points of two censored normals: their estimates are in the wrong order.
    Binkowski et al. 2018, Figure 1 (drawn with replacement, so that KID's mean is the biased squared MMD of
    the two sets themselves, a little above 0) and appendix D.2: P1 = ReLU(N(0, I)),
    P2 = ReLU(N(1, 0.8 Sigma + 0.2 I)), Q = ReLU(N(1, I)), which is known exactly, Sigma = (4 / d) C C^T, C of
    standard normals.
    """
    device = judge.device
    x, y = judge.codes(images), judge.features.to(device)
    rng = torch.Generator(device).manual_seed(0)

    def draw(s, n):
        return s[torch.randint(len(s), (n,), generator=rng, device=device)]

    def panel(axes, name, sizes, truth, estimate):
        values = np.array([[estimate(n) for _ in range(estimates)] for n in sizes])
        line = axes.errorbar(sizes, values.mean(1), values.std(1), marker=".", capsize=2, label=name)[0]
        axes.axhline(truth, color=line.get_color(), linestyle=":", linewidth=1)
        axes.set_xlabel("number of points; dotted: from infinitely many")
        axes.legend(fontsize=8)
        print(f"{name}, {estimates} estimates; dotted: {truth:.1f}")
        for n, row in zip(sizes, values):
            print(f"{n:>9,}{row.mean():>12.5g} ± {row.std():.2g}", flush=True)

    figure = Figure(figsize=(11, 3.5), layout="constrained")
    figure.suptitle(f"{judge.network.name}; draws with replacement from {len(x):,} training images, "
                    f"{judge.name}", fontsize=9)
    print(figure.get_suptitle())
    first, second, third = figure.subplots(1, 3)
    panel(first, "KID of training and test images", kid_n, 0,
          lambda n: kid(draw(x, n), draw(y, n), subsets=1, size=n)[0])
    panel(second, "Fréchet distance of the same", fid_n, 0,
          lambda n: frechet_distance(gaussian_fit(draw(x, n)), gaussian_fit(draw(y, n))))
    zero = torch.zeros(dimension, dtype=torch.float64, device=device)
    one, C = torch.ones_like(zero), torch.randn(dimension, dimension, generator=rng, device=device).double()
    eye = one.diag()
    q = censored_fit(one, eye)
    for name, mean, covariance in (("P1", zero, eye), ("P2", one, 3.2 / dimension * C @ C.T + 0.2 * eye)):
        root, shift = torch.linalg.cholesky(covariance).float(), mean.float()
        panel(third, f"FID of {name} and Q", m, frechet_distance(censored_fit(mean, covariance), q),
              lambda n: frechet_distance(
                  gaussian_fit((normal_noise(n, dimension, rng) @ root.T + shift).relu()), q))
    return figure


SCORES = {"fd": 1, "kid": 1, "isc": -1}     # and the sign with which less is better
DISTURBANCES = {"Gaussian noise": (0, 0.25, 0.5, 0.75), "Gaussian blur": (0, 1, 2, 4),     # as in TTUR's code
                "black rectangles": (0, 0.25, 0.5, 0.75), "swirl": (0, 1, 2, 4),
                "salt and pepper": (0, 0.1, 0.2, 0.3), "contamination": (0, 0.25, 0.5, 0.75, 1)}


def disturb(images, kind, alpha, rng, others):
    """uint8 images [N, C, H, W] with a disturbance of DISTURBANCES at level alpha; rng on their device.

    Binkowski et al. 2018, appendix E, as Heusel et al. 2017, appendix A1, have them (bioinf-jku/TTUR,
    FIDvsINC/fidutils.py, turns swirls either way and leaves a border of 3 pixels): alpha is the weight of
    noise over [0, 255]; a Gaussian filter's std in pixels; the side of five black rectangles over the
    image's; the strength of a swirl about the centre of extent 25 pixels; the share of pixels that turn black
    or white; the share of images replaced by others [M, C, H, W].
    """
    n, _, height, width = images.shape

    def uniform(*shape):
        return torch.rand(shape, generator=rng, device=images.device)

    if kind == "Gaussian noise":        # its extremes, over all images, become black and white
        noise = torch.randn(images.shape, generator=rng, device=images.device)
        low, high = noise.aminmax()
        return ((1 - alpha) * images + alpha * 255 * (noise - low) / (high - low)).round().byte()
    if kind == "Gaussian blur":
        return gaussian_blur(images, 8 * alpha + 1, alpha) if alpha else images
    if kind == "black rectangles":
        side = round(alpha * height)
        rows, columns = (torch.arange(m, device=images.device) for m in (height, width))
        for _ in range(5):
            top, left = ((uniform(n, 1) * (m - side + 1)).long() for m in (height, width))
            inside = [(at >= edge) & (at < edge + side) for at, edge in ((rows, top), (columns, left))]
            images = images.masked_fill((inside[0][:, :, None] & inside[1][:, None, :])[:, None], 0)
        return images
    if kind == "swirl":
        y, x = (torch.arange(m, device=images.device) - (m - 1) / 2 for m in (height, width))
        radius = torch.hypot(x, y[:, None])
        angle = torch.atan2(y[:, None], x) + alpha * torch.exp(-5 * radius / (math.log(2) * 25))
        at = torch.stack([radius * angle.cos() * 2 / (width - 1),
                          radius * angle.sin() * 2 / (height - 1)], -1).expand(n, -1, -1, -1)
        found = F.grid_sample(images.float(), at, padding_mode="border", align_corners=True)
        return found.round().byte()
    if kind == "salt and pepper":
        hit, salt = uniform(n, 1, height, width) < alpha, uniform(n, 1, height, width) < 0.5
        return torch.where(hit, salt * images.new_tensor(255), images)
    if kind == "contamination":
        index = torch.randint(len(others), (n,), generator=rng, device=images.device)
        taken = others[index.to(others.device)].to(images.device)
        hit = torch.arange(n, device=images.device) < alpha * n
        return torch.where(hit[:, None, None, None], taken, images)
    raise ValueError(f"found the disturbance {kind!r}, expected one of {', '.join(DISTURBANCES)}")


def noise_figure(images, others, judge):
    """Scores of images under DISTURBANCES, each scaled to [0, 1] (Binkowski et al. 2018, appendix E)."""
    rng = torch.Generator(images.device).manual_seed(0)
    figure = Figure(figsize=(11, 6), layout="constrained")
    figure.suptitle(f"{judge.network.name}; {len(images):,} images against {judge.name}", fontsize=9)
    print(figure.get_suptitle())
    clean = judge.score(images)
    for axes, (kind, levels) in zip(figure.subplots(2, 3).flat, DISTURBANCES.items()):
        found = []
        for alpha in levels:
            scores = judge.score(disturb(images, kind, alpha, rng, others)) if alpha else clean
            shown = (f"{key} {scores[key]:<10.5g}" for key in SCORES if key in scores)
            print(f"{kind:<20}{alpha:<6}", *shown, flush=True)
            found.append(scores)
        for key, sign in SCORES.items():
            if key not in clean:
                continue
            values = sign * np.array([scores[key] for scores in found])
            low, high = values.min(), values.max()
            axes.plot(levels, (values - low) / (high - low), marker=".",
                      label=f"{'-' if sign < 0 else ''}{key}: {low:.4g} to {high:.4g}")
        axes.set_title(kind, fontsize=9)
        axes.legend(fontsize=7)
    return figure
