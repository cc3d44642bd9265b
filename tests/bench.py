"""Milliseconds per update of a script's methods on the present device, and what scoring takes.

    python tests/bench.py                                 all methods of cifar.py, each alone
    python tests/bench.py --script imagenet               of another script
    python tests/bench.py --method gram mmdgan --eager    and without CUDA graphs
    python tests/bench.py --method gram --side 2 4 8 16   how far side by side carries
    python tests/bench.py --method gram --profile         the kernels of an update
    python tests/bench.py metrics                         FID, KID, Inception score of 50,000 images, and
                                                          torch-fidelity's beside them if it is installed
    python tests/bench.py tf32 --features FILE            what TF32 does to scores of CIFAR-10's images
    python tests/bench.py ratio                           GRAM's density ratio and its gradient
    python tests/bench.py gcmmd                           the gradient-constrained MMD on MNIST, exact and by
                                                          the paper's incomplete Cholesky
    python tests/bench.py critic                          why critics of MMDs come apart: six of mnist.py
                                                          alone, each two minutes on a CPU core
    python tests/bench.py input --images 162770           celeba.py's sn-smmd with its images on the GPU, in
                                                          the page cache and on disk, of a file in --data
    python tests/bench.py build --set imagenet64          an array from its folder, and its bare decoding

Each in one process, so that the ratios hold. An update is the generator's with all of its critic's steps, but
for MMD-GAN's bursts. "kernels" is the sum of the GPU kernels' own times, the floor of a run alone, "number"
how many they are. Updates and metrics are timed on random images, on which they do not depend; without FILE
the network is FID's with random weights.
"""
import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from contextlib import nullcontext

import numpy as np
import torch
from PIL import Image
from torch.utils.benchmark import Timer

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import celeba
import cifar
import common
import imagenet
import mnist
from conftest import image_shape, inception_weights

WARM, UPDATES = 5, 100
SCRIPTS = {script.__name__: script for script in (cifar, mnist, celeba, imagenet)}


def milliseconds(script, methods, device, eager=False, profile=None):
    """Milliseconds per update of runs of the given methods, advanced side by side, and MiB of GPU memory."""
    shape, began = image_shape(script, methods[0]), []
    images = torch.randint(256, (5_000, *shape), dtype=torch.uint8, device=device)

    def sync():
        if device.type == "cuda":
            torch.cuda.synchronize()

    def watched(run):
        for i, _ in zip(range(1, WARM + UPDATES + 1), run):
            if i == WARM:
                sync()
                began.append(time.perf_counter())
                if profile:
                    profile.start()
            yield

    capture = common.capture
    common.capture = (lambda update, state: update) if eager else capture
    try:
        with tempfile.TemporaryDirectory() as folder:
            runs = [watched(script.train(method, seed, folder, {}, 10 ** 6, device, images))
                    for seed, method in enumerate(methods)]
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            base = torch.cuda.memory_reserved() if device.type == "cuda" else 0
            common.interleave(runs)
            sync()
            if profile:
                profile.stop()
            took = time.perf_counter() - began[-1]      # all runs pass update WARM in the same round
    finally:
        common.capture = capture
    peak = (torch.cuda.max_memory_reserved() - base) / 2 ** 20 if device.type == "cuda" else 0
    return 1e3 * took / UPDATES / len(methods), peak


def kernels(script, method, device):
    """Kernels of an update as a list of (milliseconds, calls, name), the longest first."""
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
    milliseconds(script, [method], device, profile=profile)
    found = [(e.self_device_time_total, e.count, e.key) for e in profile.key_averages()]
    return sorted(((us / 1e3 / UPDATES, n / UPDATES, name) for us, n, name in found if us > 0), reverse=True)


def metrics(device, n):
    """Seconds that the parts of scoring n images take, against n others whose statistics are kept or not."""
    def timed(what, work, images=None, warm=None):
        (warm or work)()                                    # libraries set up, workspaces allocated
        began = time.perf_counter()
        found = work()                                      # ends in numbers or on the CPU: no need to wait
        took = time.perf_counter() - began
        rows.append([what, f"{took:.2f}", f"{images / took:,.0f}" if images else ""])
        return found

    try:
        import torch_fidelity
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        torch_fidelity = print("torch-fidelity is not installed")

    rows, scores = [], []
    images, others = torch.randint(256, (2, n, 3, 32, 32), dtype=torch.uint8)
    some = images[:2_000]
    with tempfile.TemporaryDirectory() as folder:
        weights = f"{folder}/inception.pth"
        torch.save(inception_weights(), weights)
        peer = torch_fidelity and FeatureExtractorInceptionV3(
            "peer", ["2048", "logits_unbiased"], feature_extractor_weights_path=weights).to(device)
        for precision in ("tf32", "ieee"):
            common.SCORE_PRECISION = torch.backends.cudnn.conv.fp32_precision = precision
            features = common.load_features(weights, device)
            found, logits = timed(f"network, {precision}",
                                  lambda: common.extract(features, images, device), n,
                                  warm=lambda: common.extract(features, some, device))
            for batch in (64, 500) if peer else ():
                timed(f"torch-fidelity's, {precision}, batch {batch}", lambda: [
                    [out.cpu() for out in peer(part.to(device))] for part in some.split(batch)], len(some))
            x, _ = common.extract(features, others, device)
            judge = common.Judge(features, x, "others", device)
            ours = timed(f"score(), {precision}, statistics kept", lambda: judge.score(images), n,
                         warm=lambda: judge.score(some))
            scores.append([precision, ours["fd"], ours["kid"], ours["isc"]])
            if peer:
                theirs = timed(f"torch-fidelity, {precision}, both sets, batch 500",
                               lambda: torch_fidelity.calculate_metrics(
                                   input1=Images(images), input2=Images(others), isc=True, fid=True, kid=True,
                                   cuda=device.type == "cuda", batch_size=500, cache=False, verbose=False,
                                   feature_extractor_weights_path=weights, kid_subset_size=min(1000, n)),
                               n, warm=lambda: None)
                scores.append([f"torch-fidelity, {precision}", *(theirs[key] for key in (
                    "frechet_inception_distance", "kernel_inception_distance_mean", "inception_score_mean"))])
    fit = timed("mean and root of the covariance", lambda: common.gaussian_fit(found, device))
    timed("FID of two fits", lambda: common.frechet_distance(fit, judge.fit))
    timed("KID, 100 subsets of 1,000", lambda: common.kid(found, x, device=device))
    timed("Inception score", lambda: common.inception_score(logits, device=device))
    timed("bootstrap of FID, 10 resamplings",
          lambda: common.bootstrap_frechet_distance(found, judge.fit, device=device))
    print(f"{', '.join(common.machine(device).values())}, random weights, {n:,} images")
    print(common.table(["", "seconds", "images/s"], rows))
    print(common.table(["", "fd", "kid", "isc"], [[name, *(f"{value:.8g}" for value in found)]
                                                  for name, *found in scores]))


def tf32(device, path, data):
    """Scores of 10,000 training images, disturbed or not, against the test images in both precisions."""
    train, test = (common.load_images("cifar10", split, data) for split in ("train", "test"))
    train, rng = train[:10_000], torch.Generator().manual_seed(0)
    disturbances = ("Gaussian blur", 1), ("Gaussian noise", 0.25), ("salt and pepper", 0.1)
    sets = {"none": train} | {f"{kind} {alpha}": common.disturb(train, kind, alpha, rng, None)
                              for kind, alpha in disturbances}
    with tempfile.TemporaryDirectory() as folder:
        if path is None:
            path = f"{folder}/random.pth"
            torch.save(inception_weights(), path)
        found = []
        for common.SCORE_PRECISION in ("ieee", "tf32"):
            features = common.load_features(path, device)
            judge = common.Judge(features, common.extract(features, test, device)[0], "test images", device)
            found.append([judge.score(images) for images in sets.values()])
    print(f"{', '.join(common.machine(device).values())}, {features.name}")
    print(common.table(["disturbance", "fd", "in TF32", "KID×1,000", "in TF32"], [
        [name, *(f"{scale * row[key]:.7g}" for key, scale in (("fd", 1), ("kid", 1e3)) for row in (a, b))]
        for name, a, b in zip(sets, *found)]))


def ratio(device):
    """Milliseconds of density_ratio and its gradient in both Gram matrices, on a GPU as one CUDA graph."""
    rng, rows = torch.Generator(device).manual_seed(0), []
    for what, number, n, K in (("36 rings, Figure 2", 36, 200, 10), ("one ring", 1, 200, 2),
                               ("cifar.py, 5 bandwidths", 5, 64, 128)):
        points = torch.randn(number, 2 * n, K, generator=rng, device=device)
        pooled = common.gaussian(points, points, torch.full((1,), K ** 0.5, device=device))
        A, B = (part.clone().requires_grad_() for part in pooled[..., :n, :].split(n, -1))

        def update():
            r = common.density_ratio(A, B, 1e-3)
            return torch.autograd.grad(common.pearson(r).sum(), (A, B))

        with torch.cuda.stream(torch.cuda.Stream()) if device.type == "cuda" else nullcontext():
            timer = Timer("update()", globals=dict(update=common.capture(update, dict(rng=rng))))
            rows.append([what, f"{number} of {n}x{n}", f"{1e3 * timer.timeit(200).mean:.3f}"])
    print(", ".join(common.machine(device).values()))
    print(common.table(["Gram matrices of", "number and size", "ms"], rows))


def incomplete_cholesky(h_x, h_y, J, lam, eta=1e-3):
    """gradient_constrained_mmd2 of one feature by incomplete Cholesky (Scaled MMD, D.2), and its rank.

    The largest pivot comes first, and the last one is above eta of it.
    """
    A, M = common.kernel_jet(h_x, h_x), len(h_x)
    b = torch.cat([torch.ones_like(h_x), J[:, 0]], 1)               # [M, 1 + D]
    s = (torch.arange(b.shape[1]) > 0).long()                       # which derivative in feature space
    a = A[..., 0].mean(-1) - common.kernel_jet(h_x, h_y)[..., 0].mean(-1)
    delta, left, R = (b * a[:, s]).flatten(), b.detach().square().flatten(), []
    least = eta * left.max()
    while left.max() > least:
        i = int(left.argmax())
        m, c = divmod(i, b.shape[1])
        column = (b * A[:, s, m, s[c]] * b[m, c]).flatten()         # of the M (1 + D) matrix G
        if R:
            column = column - torch.stack([row[i] for row in R]) @ torch.stack(R)
        R.append(column / column[i].sqrt())
        left = left - R[-1].detach().square()
    R = torch.stack(R)
    inner = R @ R.T + M * lam * torch.eye(len(R), dtype=R.dtype)
    solved = (delta @ delta - R @ delta @ torch.linalg.solve(inner, R @ delta)) / (M * lam)
    return (common.mmd2(*common.gram(common.unit_gaussian, h_x, h_y)) - solved) / lam, len(R)


def gcmmd(data, times=5):
    """Milliseconds of the loss and its gradient in features and slopes, by both ways, on a CPU in float64."""
    x, rows, row = common.load_images("mnist", "train", data)[:64].double() / 255, [], mnist.METHODS["gcmmd"]
    y = torch.rand(64, 1, 28, 28, generator=torch.Generator().manual_seed(1)).double()
    for scale in (1, 2, 3, 4, 6):
        torch.manual_seed(0)
        _, f, _ = mnist.networks(row)
        f.double()
        for p in f.parameters():
            p.data.mul_(scale)
        found = []
        for way in (lambda *at: (common.gradient_constrained_mmd2(*at[:2], at[0], at[2], row["lam"])[0], 128),
                    lambda *at: incomplete_cholesky(*at, row["lam"])):
            took = []
            for _ in range(times):
                h_x, J = common.jacobian(f, x)
                at = h_x, f(y), J
                began = time.perf_counter()
                loss, rank = way(*at)
                gradients = torch.autograd.grad(loss, at)
                took.append(1e3 * (time.perf_counter() - began))
            found.append((rank, sorted(took)[times // 2], torch.cat([g.flatten() for g in gradients])))
        (_, exact, g), (rank, cholesky, g_hat) = found
        error = (g_hat - g).norm() / g.norm()
        rows.append([f"{scale}", f"{exact:.1f}", f"{cholesky:.1f}", f"{rank}", f"{error:.1%}"])
    print(f"CPU, {torch.get_num_threads()} threads, PyTorch {torch.__version__}; batch of 64")
    head = ["critic's weights, times", "exact, ms", "Cholesky, ms", "its rank", "its gradient is off by"]
    print(common.table(head, rows))


def critic(methods, device, data, updates=800, held=500):
    """Train critics of mnist.py without a generator: digits are data, others, dimmed less and less, samples.

    A row has the critic's loss, and in brackets the MMD of so many images held out over its noise: what it is
    in the mean, biased, for a batch of samples that agree with the data.
    """
    images, rows = common.load_images("mnist", "train", data).to(device), []
    for method in methods:
        torch.manual_seed(0)
        row, rng = mnist.METHODS[method], torch.Generator(device).manual_seed(0)
        f = mnist.networks(row)[1].to(device)
        kernel = common.kernels(mnist.SIGMA, mnist.RBF, mnist.ALPHA, device)[row["kernel"]]
        game = common.Game(row, f, None, kernel, rng).to(device)
        opt, light, found = common.optimizer(game, row["adam"]), [], [method]

        def draw(n, c):
            x, y = ((common.draw_images(images, n, rng) + 1) / 2 for _ in range(2))
            return x, c * y

        for step in range(updates + 1):
            c = 1 - 0.5 * min(1, (1 - step / updates) / 0.75) ** 2
            loss = game.critic(*draw(mnist.BATCH, c))
            if step and step % (updates // 8) == 0:
                with torch.no_grad():
                    K_xx, _, K_yy = K_all = common.gram(kernel, *map(f, draw(held, c)))
                signal = common.mmd2(*K_all, unbiased=True)
                # of a set and itself: -2 / held times what a point's own pair exceeds the others' by
                own = -held / 2 * sum(common.mmd2(K, K, K, unbiased=True) for K in (K_xx, K_yy))
                noise = own / mnist.BATCH
                ratio = (signal.clamp(min=0) / noise).sqrt()
                light.append(f"{c:.2f}")
                found.append(f"{float(loss.detach()):.2f} ({float(ratio):.1f})")
            common.descend((opt, loss))
        rows.append(found)
    print(f"{', '.join(common.machine(device).values())}, mnist.py: a critic's loss (MMD over its noise) at "
          "samples so light")
    print(common.table(["method", *light], rows))


def waiting(device, n, data):
    """Milliseconds per update of sn-smmd at 160x160, and the share of them that it waits for images."""
    path, rng, rows = f"{data}/random178.npy", np.random.default_rng(0), []
    common.make_folder(data)
    array = np.lib.format.open_memmap(path, "w+", np.uint8, (n, 3, 178, 178))
    for part in range(0, n, 1_000):
        array[part:part + 1_000] = rng.integers(0, 256, array[part:part + 1_000].shape, np.uint8)
    array.flush()
    del array
    celeba.LOG_EVERY = celeba.GRID_EVERY = celeba.SAVE_EVERY = 10 ** 9
    for where in ("on disk", "in the page cache", "on the GPU"):
        if where == "on disk":          # before it is mapped: what is mapped stays
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        images = common.read_array(path, (3, 178, 178), "r")
        if where == "in the page cache":
            with open(path, "rb") as file:
                while file.read(1 << 26):
                    pass
        images = images.to(device) if where == "on the GPU" else images
        with tempfile.TemporaryDirectory() as folder:
            [found] = common.interleave([celeba.train("sn-smmd", 0, folder, {}, UPDATES, device, images, 1)])
        rows.append([where, f"{1e3 * found['seconds'] / UPDATES:.1f}", f"{found['waiting']:.2%}"])
    os.remove(path)
    print(f"{', '.join(common.machine(device).values())}, {n:,} images, {UPDATES} updates")
    print(common.table(["images", "ms an update", "waiting"], rows))


def decode(file):
    """An image file's pixels, for nothing."""
    with Image.open(file) as image:
        image.convert("RGB")


def build(name, data):
    """Images a second of decoding the files of a set of FOLDERS, and of building its array from them."""
    files, (side, *_) = common.folder_files(name, "train", data), common.FOLDERS[name]
    found = {}
    with multiprocessing.Pool(common.cores()) as pool:
        pool.map(decode, files)                         # read once, so that both find them in memory
        began = time.perf_counter()
        pool.map(decode, files)
        found["decoding"] = len(files) / (time.perf_counter() - began)
    with tempfile.TemporaryDirectory(dir=data) as folder:
        began = time.perf_counter()
        common.build_array(f"{folder}/{name}-train.npy", files, side)
        found["building"] = len(files) / (time.perf_counter() - began)
    share = found["building"] / found["decoding"]
    print(f"{common.cores()} cores, {len(files):,} images: " + ", ".join(
        f"{what} {rate:,.0f} images/s" for what, rate in found.items()) + f", {share:.0%} of it")


class Images(torch.utils.data.Dataset):
    """As torch-fidelity takes images: items, not tuples."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i]


def main():
    global WARM, UPDATES
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("what", nargs="?", default="methods", help="(methods)",
                        choices=["methods", "metrics", "tf32", "ratio", "gcmmd", "critic", "input", "build"])
    parser.add_argument("--images", type=int, default=50_000, metavar="N", help="of metrics, input (50,000)")
    parser.add_argument("--features", metavar="FILE", help="of tf32: a feature network, .pt2 or .pth")
    parser.add_argument("--data", default="data", metavar="DIR", help="of all but methods, metrics (data)")
    parser.add_argument("--set", default="celeba178", choices=list(common.FOLDERS), help="(celeba178)")
    parser.add_argument("--script", default="cifar", choices=list(SCRIPTS), help="(cifar)")
    parser.add_argument("--method", nargs="+", metavar="NAME", help="(all)")
    parser.add_argument("--eager", action="store_true", help="time updates that are not captured, too")
    parser.add_argument("--side", nargs="+", type=int, default=[], metavar="K", help="and K side by side")
    parser.add_argument("--device", metavar="NAME", help="cpu or cuda (default cuda where there is one)")
    parser.add_argument("--profile", action="store_true", help="list the kernels of an update")
    args = parser.parse_args()
    if args.what == "build":
        return build(args.set, args.data)
    device = common.setup(args.device)
    if args.what == "metrics":
        return metrics(device, args.images)
    if args.what == "tf32":
        return tf32(device, args.features, args.data)
    if args.what == "ratio":
        return ratio(device)
    if args.what == "gcmmd":
        return gcmmd(args.data)
    if args.what == "critic":
        kernels = ("mmd-dot-16", "mmd-rbf-16", "mmd-dist-16")
        both = [name for kernel in kernels for name in (kernel, f"{kernel}-activation")]
        return critic(args.method or both, device, args.data)
    if args.what == "input":
        return waiting(device, args.images, args.data)
    script = SCRIPTS[args.script]
    unknown = set(args.method or ()).difference(script.METHODS)
    if unknown:
        parser.error(f"--method: found {' '.join(sorted(unknown))}, expected rows of {args.script}.py")
    script.LOG_EVERY = script.GRID_EVERY = script.SAVE_EVERY = 10 ** 9
    script.BURST_UNTIL = script.ENCODE = 1
    if device.type == "cpu":
        WARM, UPDATES = 2, 6
    print(f"{', '.join(common.machine(device).values())}, {args.script}.py: milliseconds per update, mean of "
          f"{UPDATES}")
    head, rows = ["method", "MiB", "captured"], []
    head += ["eager", "gain"] * args.eager + ["kernels", "number"] * args.profile
    head += [cell for k in args.side for cell in (f"{k} side by side", "throughput")]
    for method in args.method or script.METHODS:
        alone, memory = milliseconds(script, [method], device)
        row = [method, f"{memory:.0f}", f"{alone:.2f}"]
        if args.eager:
            eager, _ = milliseconds(script, [method], device, eager=True)
            row += [f"{eager:.2f}", f"{eager / alone:.1f}x"]
        if args.profile:
            floor = kernels(script, method, device)
            row += [f"{sum(k[0] for k in floor):.2f}", f"{sum(k[1] for k in floor):.0f}"]
            for ms, calls, name in floor[:25]:
                print(f"{ms * 1e3:9.1f} us {calls:7.1f} x  {name[:100]}")
        for k in args.side:
            side, _ = milliseconds(script, [method] * k, device)
            row += [f"{side:.2f}", f"{alone / side:.1f}x"]
        rows.append(row)
        print(f"{' '.join(row)}", flush=True)
    print(common.table(head, rows))


if __name__ == "__main__":
    main()
