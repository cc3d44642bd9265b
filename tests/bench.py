"""Milliseconds per update of cifar.py's methods on the present device: eager, captured, side by side.

    python tests/bench.py                                 all methods, six runs side by side
    python tests/bench.py --method gram --side 2 4 8 16   how far side by side carries
    python tests/bench.py --method gram --profile         the kernels of an update

All in one process, so that the ratios hold. "kernels" is the sum of the GPU kernels' own times, the floor of
a run alone, "number" how many they are. The images are random: an update's time does not depend on them.
"""
import argparse
import os
import sys
import tempfile
import time

import torch

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


def main():
    global WARM, UPDATES
    names, raw = list(cifar.METHODS), argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--method", nargs="+", default=names, choices=names, metavar="NAME", help="(all)")
    parser.add_argument("--side", nargs="+", type=int, default=[6], metavar="K", help="side by side (6)")
    parser.add_argument("--device", metavar="NAME", help="cpu or cuda (default cuda where there is one)")
    parser.add_argument("--profile", action="store_true", help="list the kernels of an update")
    args = parser.parse_args()
    device = common.setup(args.device)
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
