"""Milliseconds per update of cifar.py's methods on the present device: eager, captured, side by side.

    python tests/bench.py                                 all methods, six runs side by side
    python tests/bench.py --method gram --side 2 4 8 16   how far side by side carries
    python tests/bench.py --method gram --profile         the kernels of an update
    python tests/bench.py metrics                         FID, KID, Inception score of 50,000 images, and
                                                          torch-fidelity's beside them if it is installed

All in one process, so that the ratios hold. "kernels" is the sum of the GPU kernels' own times, the floor of
a run alone, "number" how many they are. The images are random: an update's time does not depend on them.
"""
import argparse
import os
import sys
import tempfile
import time

import torch
import torchvision

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import cifar
import common

WARM, UPDATES = 30, 200


def milliseconds(methods, device, images, eager=False, profile=None):
    """Milliseconds per update of runs of the given methods, advanced side by side, and MiB of GPU memory."""
    began = []

    def sync():
        if device.type == "cuda":
            torch.cuda.synchronize()

    def watched(run):
        for i, _ in zip(range(WARM + UPDATES), run):
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
            runs = [watched(cifar.train(method, seed, folder, {}, 10 ** 6, device, images))
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


def kernels(method, device, images):
    """Kernels of an update as a list of (milliseconds, calls, name), the longest first."""
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
    milliseconds([method], device, images, profile=profile)
    found = [(e.self_device_time_total, e.count, e.key) for e in profile.key_averages()]
    return sorted(((us / 1e3 / UPDATES, n / UPDATES, name) for us, n, name in found if us > 0), reverse=True)


def inception(path):
    """Write random weights for FID's network, of a scale that keeps all of its layers alive."""
    torch.manual_seed(0)
    network = torchvision.models.Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight)
    torch.save(network.state_dict(), path)


def metrics(device, n):
    """Seconds that the parts of scoring n images take, against n others whose statistics are kept or not."""
    def timed(what, work):
        work() if device.type == "cuda" else None           # libraries set up, workspaces allocated
        began = time.perf_counter()
        found = work()                                      # ends in numbers or on the CPU: no need to wait
        rows.append([what, f"{time.perf_counter() - began:.2f}"])
        return found

    rows = []
    images, others = torch.randint(256, (2, n, 3, 32, 32), dtype=torch.uint8)
    with tempfile.TemporaryDirectory() as folder:
        weights = f"{folder}/inception.pth"
        inception(weights)
        features = common.load_features(weights, device)
        found, logits = timed(f"network, {n:,} images", lambda: common.extract(features, images, device))
        x, _ = common.extract(features, others, device)
        reference = dict(zip(("mean", "root"), common.gaussian_fit(x, device)), features=x)
        fit = timed("mean and root of the covariance", lambda: common.gaussian_fit(found, device))
        timed("FID of two fits", lambda: common.frechet_distance(fit, (reference["mean"], reference["root"])))
        timed("KID, 100 subsets of 1,000", lambda: common.kid(found, x, device=device))
        timed("Inception score", lambda: common.inception_score(logits, device=device))
        timed("bootstrap of FID, 10 resamplings", lambda: common.bootstrap_frechet_distance(
            found, (reference["mean"], reference["root"]), device=device))
        ours = timed("all of score(), statistics kept",
                     lambda: common.score(images, reference, features, device))
        try:
            import torch_fidelity
        except ImportError:
            print("torch-fidelity is not installed")
        else:
            flags = dict(isc=True, fid=True, kid=True, cuda=device.type == "cuda", batch_size=500,
                         cache=False, verbose=False, feature_extractor_weights_path=weights,
                         kid_subset_size=min(1000, n), kid_subsets=100)
            theirs = timed("torch-fidelity, both sets", lambda: torch_fidelity.calculate_metrics(
                input1=Images(images), input2=Images(others), **flags))
            for key, name in (("fd", "frechet_inception_distance"), ("kid", "kernel_inception_distance_mean"),
                              ("isc", "inception_score_mean")):
                rows.append([f"{key}: ours {ours[key]:.8g}, torch-fidelity {theirs[name]:.8g}", ""])
    print(common.table([f"{common.machine(device)}, random weights", "seconds"], rows))


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
    names, raw = list(cifar.METHODS), argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("what", nargs="?", default="methods", choices=["methods", "metrics"],
                        help="(methods)")
    parser.add_argument("--images", type=int, default=50_000, metavar="N", help="of metrics (50,000)")
    parser.add_argument("--method", nargs="+", default=names, choices=names, metavar="NAME", help="(all)")
    parser.add_argument("--side", nargs="+", type=int, default=[6], metavar="K", help="side by side (6)")
    parser.add_argument("--device", metavar="NAME", help="cpu or cuda (default cuda where there is one)")
    parser.add_argument("--profile", action="store_true", help="list the kernels of an update")
    args = parser.parse_args()
    device = common.setup(args.device)
    if args.what == "metrics":
        return metrics(device, args.images)
    cifar.LOG_EVERY = cifar.GRID_EVERY = cifar.SAVE_EVERY = 10 ** 9
    if device.type == "cpu":
        WARM, UPDATES = 2, 6
    images = torch.randint(256, (50_000, 3, 32, 32), dtype=torch.uint8).to(device)
    print(f"{common.machine(device)}, batch {cifar.BATCH}, milliseconds per update, mean of {UPDATES}")
    rows = []
    for method in args.method:
        eager, _ = milliseconds([method], device, images, eager=True)
        alone, memory = milliseconds([method], device, images)
        floor = kernels(method, device, images) if device.type == "cuda" else []
        row = [method, f"{eager:.2f}", f"{alone:.2f}", f"{eager / alone:.1f}x",
               f"{sum(k[0] for k in floor):.2f}", f"{sum(k[1] for k in floor):.0f}"]
        for k in args.side:
            side, _ = milliseconds([method] * k, device, images)
            row += [f"{side:.2f}", f"{alone / side:.1f}x"]
        rows.append([*row, f"{memory:.0f}"])
        if args.profile:
            for ms, calls, name in floor[:25]:
                print(f"{ms * 1e3:9.1f} us {calls:7.1f} x  {name[:100]}")
    sides = [cell for k in args.side for cell in (f"{k} side by side", "throughput")]
    print(common.table(["method", "eager", "captured", "gain", "kernels", "number", *sides, "MiB"], rows))


if __name__ == "__main__":
    main()
