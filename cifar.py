"""CIFAR-10 in Generative Ratio Matching Networks (ICLR 2020), Table 1: GRAM, GAN, MMD-net; DCGAN networks.

    python cifar.py --method gram --features FILE.pt2       under 2 minutes on an H200, an hour on a CPU core
    python cifar.py --method gram gram-eq9 gan mmdnet --seeds 3 --features FILE.pt2    side by side, 5 minutes

Expect a Frechet distance of 47 ± 3 from gram on EfficientNet-Lite0 features (FID has others; see README.md).
A run goes to runs/cifar-METHOD-sSEED/: samples-UPDATE.png, samples.npy, log.csv, checkpoint.pt, result.json.
"""
import sys

import numpy as np
import torch

import common

STEPS = 60_000              # the paper does not say; GRAMFlow 200 epochs, which are 156,000
BATCH = 64                  # of data and of samples, section 4
Z = 128                     # U[-1, 1]^128, GRAMFlow; Table 5
GENERATOR = (128, 64, 32)   # widths, Table 5
FULL = (32, 64, 128)        # widths of the critic, Table 6
WEAK = (32, 32, 64)         # widths of the critic, Table 7
K = 128                     # the critic's dimension, that of the noise, section 4
SIGMA = (1, 2, 4, 8, 16)    # bandwidths of Li et al. 2017, as section 4 says; GRAMFlow takes them for squares
BETAS = (0.5, 0.999)        # Adam, GRAMFlow
RIDGE = 1e-3                # JuliaGRAM, src/kmm.jl; neither in the paper nor in GRAMFlow
LAMBDA = 1.0                # eq. 9
SAMPLES = 10_000            # to keep and to score
LOG_EVERY = 200
GRID_EVERY = 10_000
SAVE_EVERY = 5_000          # a multiple of LOG_EVERY: what is saved has been seen to be finite

# critic: its widths. form: what it maximises (common.gram_objective, or a GAN's objective). lr: Adam's; 5e-5
# is the paper's, 1e-4 GRAMFlow's, 1e-3 JuliaGRAM's for MMD-nets.
METHODS = {
    "gram":      dict(critic=FULL, form="flow", lr=1e-4),
    "gram-eq9":  dict(critic=FULL, form="sum",  lr=5e-5),
    "gram-clip": dict(critic=FULL, form="clip", lr=5e-5),
    "gan":       dict(critic=FULL, form="gan",  lr=1e-4),
    "mmdnet":    dict(critic=None, form=None,   lr=1e-3),
    "gram-weak": dict(critic=WEAK, form="flow", lr=1e-4),
    "gan-weak":  dict(critic=WEAK, form="gan",  lr=1e-4),
}
PAPER = {"gram": "24.85 ± 0.94", "gram-eq9": "24.85 ± 0.94", "gan": "26.82 ± 0.49",     # FID, Table 1
         "gram-weak": "24.82 ± 0.62", "gan-weak": "31.64 ± 2.10"}
COLUMNS = ("loss_f", "loss_g", "pearson", "mean_r")


def networks(row):
    """Generator, and critic or None, of a row of METHODS."""
    g = common.dcgan_generator(Z, GENERATOR, 3)
    out = 1 if row["form"] == "gan" else K
    return g, common.dcgan_critic(3, row["critic"], out) if row["critic"] else None


def train(method, seed, folder, settings, steps, device, images):
    """One run: a generator function that yields after each generator update and returns the run's result."""
    row = METHODS[method]
    torch.manual_seed(seed)
    g, f = networks(row)
    g.to(device)
    opt_g = common.adam(g, row["lr"], BETAS)
    rng = torch.Generator(device).manual_seed(seed)
    log = common.Log(folder, COLUMNS, steps, device)
    state = dict(g=g, opt_g=opt_g, rng=rng, log=log)
    if f is not None:
        f.to(device)
        opt_f = common.adam(f, row["lr"], BETAS)
        state |= dict(f=f, opt_f=opt_f)
    sigma = torch.tensor(SIGMA, dtype=torch.float32, device=device)

    def gram(h_x, h_y):
        return common.gram(lambda a, b: common.gaussian(a, b, sigma), h_x, h_y)

    def update():
        x = common.draw_images(images, BATCH, rng)
        y = g(common.uniform_noise(BATCH, Z, rng))
        if f is None:                   # MMD-net: a fixed kernel on the pixels
            loss_g = common.mmd(*gram(x.flatten(1), y.flatten(1)))
            common.descend((opt_g, loss_g))
            log.add(None, loss_g, None, None)
        elif row["form"] == "gan":      # alternating: the generator sees the critic after its step
            loss_f = common.gan_critic(f(x), f(y.detach()))
            common.descend((opt_f, loss_f))
            loss_g = common.gan_generator(f(y))
            common.descend((opt_g, loss_g))
            log.add(loss_f, loss_g, None, None)
        else:                           # GRAM, Algorithm 1, simultaneous: one K, both gradients, both steps
            K_all = gram(f(x), f(y))
            objective, r = common.gram_objective(*K_all, row["form"], RIDGE, LAMBDA)
            loss_g = common.mmd2(*K_all)
            common.descend((opt_f, -objective), (opt_g, loss_g))
            log.add(-objective, loss_g, common.pearson(r), r.mean())

    @torch.no_grad()
    def sample(n):      # of the same noise always; batch norm by at most 500 at a time (common.batch_norm)
        z = common.uniform_noise(n, Z, torch.Generator().manual_seed(0)).to(device)
        return torch.cat([common.to_bytes(g(part)) for part in z.split(500)]).cpu()

    step = common.load(folder, state, settings)
    update = common.capture(update, state)
    log.start(step)
    while step < steps:
        update()
        step += 1
        if step % LOG_EVERY == 0 or step == steps:
            log.row(step)
        if step % GRID_EVERY == 0 or step == steps:
            common.save_grid(f"{folder}/samples-{step}.png", sample(128))
        if step % SAVE_EVERY == 0 or step == steps:
            common.save(folder, step, state, settings)
        yield

    with common.replacing(f"{folder}/samples.npy") as file:
        np.save(file, sample(SAMPLES).numpy())
    return dict(method=method, seed=seed, updates=step, seconds=log.seconds, **common.machine(device))


def report(methods, results, data):
    """The table of the runs, scores as mean ± std over seeds, beside the paper's."""
    rows = []
    for method in dict.fromkeys(methods):
        own = [result for name, result in zip(methods, results) if name == method]
        done = [result for result in own if isinstance(result, dict)]
        failed = [f"seed {seed} {end}" for seed, end in enumerate(own) if isinstance(end, FloatingPointError)]
        finished = "; ".join([f"{len(done)} of {len(own)}", *failed])
        row = [method, f"{done[0]['updates']:,}" if done else "-", finished]
        for key, scale in (("fd", 1), ("kid", 1_000)):
            row.append(common.spread([scale * result[key] for result in done if key in result]))
        rows.append([*row, PAPER.get(method, "-")])
    names = {result["features"] for result in results if isinstance(result, dict) and "features" in result}
    distance = f"FD, {names.pop()}" if names else "FD, not scored"
    head = ["method", "updates", "seeds finished", distance, "1,000 KID", "FID in the paper"]
    return f"{SAMPLES:,} samples against {data}; mean ± std over seeds\n\n{common.table(head, rows)}"


def main(argv=None):
    args = common.flags(__doc__, METHODS, ["gram"], STEPS, images=True).parse_args(argv)
    device = common.setup(args.device)
    features = common.load_features(args.features, device) if args.features else None
    images, test = (common.load_images("cifar10", split, args.data) for split in ("train", "test"))
    if len(images) < BATCH:
        sys.exit(f"{args.data}/cifar10-train.npy: found {len(images)} images, expected {BATCH} or more")
    runs = common.open_runs(args.out, __file__, globals(), args.method, args.seeds, args.resume, device)
    images = images.to(device)
    for method in dict.fromkeys(args.method):
        g, f = networks(METHODS[method])
        print(f"{method}: generator of {common.count(g):,} parameters, critic of {common.count(f):,}")
    print(common.log_head(COLUMNS))
    results = common.interleave([train(*run, args.steps, device, images) for run in runs])

    command = common.command(__file__, argv)
    reference = common.extract(features, test, device) if features else None
    for (_, _, folder, _), result in zip(runs, results):
        if isinstance(result, FloatingPointError):
            print(f"{folder}: {result}")
            continue
        if features:
            result |= common.score(common.read_images(f"{folder}/samples.npy"), reference, features, device)
        common.write_json(f"{folder}/result.json", dict(result, command=command))
        print(f"{folder}: {result['updates']:,} updates, grids, samples.npy, checkpoint.pt, result.json")
    if not features:
        print(f"to score the samples: {command}{'' if args.resume else ' --resume'} --features FILE.pt2")
    print(f"\n{report([method for method, *_ in runs], results, f'the {len(test):,} test images')}")
    if all(isinstance(result, FloatingPointError) for result in results):
        sys.exit("no run finished")


if __name__ == "__main__":
    common.run(main)
