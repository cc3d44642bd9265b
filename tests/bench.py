"""Milliseconds per update of a script's rows on the present device, and what scoring takes.

    python tests/bench.py --script celeba --method sn-smmd+precision=bf16 smmd
    python tests/bench.py --method gram --side 1 4 --way captured eager --profile       side by side; its kernels
    python tests/bench.py metrics --images 50000    FID, KID, Inception score; torch-fidelity's, if installed
    python tests/bench.py tf32 --features FILE      what TF32 does to scores of CIFAR-10, blurred or not
    python tests/bench.py ratio                     GRAM's density ratio and its gradient
    python tests/bench.py input --images 50000      celeba.py's sn-smmd, images mapped and on the GPU
    python tests/bench.py build --data FOLDER       an array of 64x64 from a folder of images

An update has all of its critic's steps, but no bursts; its limit is that of a H200's TF32 or bfloat16, dense. Without
FILE weights are random."""
import argparse
import importlib.util
import itertools
import tempfile
import time

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from conftest import inception_weights      # which also makes the scripts known

import celeba, cifar, common  # noqa: E401

PEAK = dict(tf32=495, bf16=989)             # TFLOP/s
WARM = 5            # updates of a run before those that are timed: a graph is recorded at the fourth
QUIET = dict.fromkeys("LOG_EVERY SCORE_EVERY SAVE_EVERY BURST_EVERY TRACE_EVERY".split(), 10 ** 9) | dict(
    BURST_UNTIL=1, TRACE_UNTIL=0, PANELS=(), ENCODE=1)


def now():
    torch.cuda.synchronize() if torch.cuda.is_initialized() else None
    return time.perf_counter()


def timed(script, row, args, device, images, *size, side=1, way="compiled", profiler=None):
    """Milliseconds per update of so many runs of a row, each on a CUDA stream of its own, and the first's seconds.

    way: compiled, as --steps 10000 does it; captured, without torch.compile; or eager, without a graph either.
    """
    vars(script).update(QUIET | dict(COMPILE=0 if way == "compiled" else 10 ** 10))
    capture, common.capture = common.capture, (lambda update, rng: update) if way == "eager" else common.capture
    with tempfile.TemporaryDirectory() as out:
        runs, start = [(torch.cuda.Stream() if str(device) == "cuda" else None, script.train(
            "run", row, i, f"{out}/{i}", 10 ** 9, device, images, *size)) for i in range(side)], now()
        first, then = [run for run in runs for _ in range(WARM)], runs * args.updates
        for i, (stream, run) in enumerate(first + then):
            if i == len(first):
                began = now()
                profiler and profiler.__enter__()
            with torch.cuda.stream(stream):
                next(run)
            seconds = now() - start if i == 0 else seconds
        took, common.capture = now() - began, capture
    profiler and profiler.__exit__(None, None, None)
    return 1e3 * took / len(then), seconds


def methods(args, device):
    script, faces = importlib.import_module(args.script), celeba.SETS[args.set]
    table, size = (script.METHODS[args.set], [faces["size"]]) if script is celeba else (script.METHODS, [])
    side = dict(mnist=28, cifar=32, imagenet=64, celeba=faces["side"])[args.script]
    images = torch.randint(256, (5_000, 1 if side == 28 else 3, side, side), dtype=torch.uint8).to(device)
    alone = argparse.Namespace(updates=1)
    for text in args.method or table:
        name, row = common.find_row(text, table, script.DEFAULTS, script.NAMES)
        own = device, images, *size
        flops = FlopCounterMode(display=False)
        flops.mod_tracker.__enter__ = flops.mod_tracker.__exit__ = lambda *_: None      # it has no autograd.grad
        timed(script, row, alone, *own, way="eager", profiler=flops)
        for way, k in itertools.product(args.way, args.side):
            torch.cuda.reset_peak_memory_stats() if images.is_cuda else None
            ms, seconds = timed(script, row, args, *own, side=k, way=way)
            rate = flops.get_total_flops() / ms / 1e9                                   # TFLOP/s
            share = rate / PEAK[row.get("precision", "tf32")]
            line = f"{name}, {way}, {k} at once: {ms:.2f} ms, {rate:.0f} TFLOP/s, {share:.0%} of the limit; "
            line += f"first update after {seconds:.0f} s"
            if images.is_cuda:
                line += f"; {torch.cuda.max_memory_allocated() / 2 ** 20:,.0f} MiB"
                timed(script, row, alone, *own, way=way, profiler=(p := torch.profiler.profile()))
                kernels = [e for e in p.events() if e.device_type == torch.autograd.DeviceType.CUDA]
                line += f"; {len(kernels):,} kernels of {sum(e.device_time for e in kernels) / 1e3:.2f} ms"
                if args.profile:
                    print(p.key_averages().table("self_device_time_total", row_limit=25))
            print(line, flush=True)


def metrics(args, device):
    sets = [torch.randint(256, (2, args.images, 3, 32, 32), dtype=torch.uint8)]
    if args.what == "tf32":
        train, test = (common.load_images("cifar10", split, args.data) for split in ("train", "test"))
        sets = [(cifar.disturb(train[:10_000], "Gaussian blur", std, None, None), test) for std in (0, 1)]
    torch.save(inception_weights(), weights := f"{args.out}/random.pth")
    for (images, others), common.SCORE_PRECISION in itertools.product(sets, ("ieee", "tf32")):
        network = common.load_features(args.features or weights, device)
        features, _ = network(others)
        (mean, root), began = common.gaussian_fit(features), now()
        found = common.scores(network, images, dict(features=features, mean=mean, root=root, name="others"))
        print(f"{common.SCORE_PRECISION}, {now() - began:.2f} s:", found, flush=True)
    if args.what == "metrics" and importlib.util.find_spec("torch_fidelity"):
        from torch_fidelity import calculate_metrics
        (a, b), began = (torch.utils.data.Subset(s, range(len(s))) for s in (images, others)), now()
        found = calculate_metrics(input1=a, input2=b, isc=True, fid=True, kid=True, cache=False,
                                  cuda=str(device) == "cuda", kid_subset_size=min(1_000, len(a)),
                                  feature_extractor_weights_path=weights)
        print(f"torch-fidelity, features of both sets, {now() - began:.2f} s:", found)


def ratio(args, device):
    rng, width = torch.Generator(device).manual_seed(0), torch.full((1,), 10.0, device=device)
    for number, n in ((36, 200), (1, 200), (5, 64)):            # Figure 2, a ring, cifar.py
        x, y = torch.randn(2, number, n, 100, generator=rng, device=device)
        A, B = (common.gaussian(y, points, width).requires_grad_() for points in (y, x))
        with torch.cuda.stream(torch.cuda.Stream() if device.type == "cuda" else None):
            update = common.capture(lambda: torch.autograd.grad(
                common.pearson(common.density_ratio(A, B, 1e-3)).sum(), (A, B)), rng)
            for i in range(WARM + args.updates):
                began = now() if i <= WARM else began
                update()
            print(f"{number} of {n}x{n}: {1e3 * (now() - began) / args.updates:.3f} ms")


def mapped(args, device):
    np.save(path := f"{args.out}/images.npy", np.random.randint(0, 256, (args.images, 3, 178, 178), np.uint8))
    row, images = celeba.DEFAULTS | celeba.METHODS["celeba160"]["sn-smmd"], common.read_array(path)
    for where, images in (("mapped", images), ("on the device", images.to(device))):
        print(f"{where}: {timed(celeba, row, args, device, images, 160)[0]:.2f} ms an update")


def build(args, device):
    began, n = now(), len(common.load_folder(f"{args.out}/images.npy", args.data, 64))
    print(f"{n / (now() - began):,.0f} images a second")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    whats = dict(methods=methods, metrics=metrics, tf32=metrics, ratio=ratio, input=mapped, build=build)
    parser.add_argument("what", nargs="?", default="methods", choices=whats)
    words = dict(script="cifar", set="celeba160", data="data", features=None, device=None, method=[])
    for key, default in (words | dict(updates=100, images=50_000, side=[1])).items():
        parser.add_argument(f"--{key}", default=default, nargs="+" if isinstance(default, list) else None,
                            type=int if key in ("updates", "images", "side") else str)
    parser.add_argument("--way", nargs="+", default=["compiled"], choices=["compiled", "captured", "eager"])
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    print(", ".join(common.machine(device := common.setup(args.device)).values()))
    with tempfile.TemporaryDirectory() as args.out:
        whats[args.what](args, device)
