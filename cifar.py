"""CIFAR-10 in Generative Ratio Matching Networks (ICLR 2020), Table 1: GRAM, GAN, MMD-net; DCGAN networks.

    python cifar.py --method gram --features FILE.pt2       under 2 minutes on an H200, an hour on a CPU core
    python cifar.py --method gram gram-eq9 gan mmdnet --seeds 3 --features FILE.pt2     side by side, 5 minutes

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

# critic: its widths. loss: the critic's and the generator's (common.gram_objective, mmd2, gan_critic, ...).
# joint: both gradients at the same weights (GRAM, Algorithm 1), else the critic steps first (GAN; GRAMFlow).
# lr: Adam's; 5e-5 is the paper's, 1e-4 GRAMFlow's, 1e-3 JuliaGRAM's for MMD-nets. fid: the paper's, Table 1.
METHODS = {
    "gram":      dict(critic=FULL, loss=("flow", "mmd2"), joint=True,  lr=1e-4, fid="24.85 ± 0.94"),
    "gram-eq9":  dict(critic=FULL, loss=("sum", "mmd2"),  joint=True,  lr=5e-5, fid="24.85 ± 0.94"),
    "gram-clip": dict(critic=FULL, loss=("clip", "mmd2"), joint=True,  lr=5e-5, fid="-"),
    "gan":       dict(critic=FULL, loss=("gan", "gan"),   joint=False, lr=1e-4, fid="26.82 ± 0.49"),
    "mmdnet":    dict(critic=None, loss=(None, "mmd"),    joint=False, lr=1e-3, fid="-"),
    "gram-weak": dict(critic=WEAK, loss=("flow", "mmd2"), joint=True,  lr=1e-4, fid="24.82 ± 0.62"),
    "gan-weak":  dict(critic=WEAK, loss=("gan", "gan"),   joint=False, lr=1e-4, fid="31.64 ± 2.10"),
}
COLUMNS = ("loss_f", "loss_g", "pearson", "mean_r")


def networks(row):
    """Generator, and critic or None, of a row of METHODS."""
    g = common.dcgan_generator(Z, GENERATOR, 3)
    out = 1 if row["loss"] == ("gan", "gan") else K
    return g, common.dcgan_critic(3, row["critic"], out) if row["critic"] else None


def train(method, seed, folder, settings, steps, device, images):
    """One run: a generator function that yields after each generator update and returns the run's result."""
    row = METHODS[method]
    form_f, form_g = row["loss"]
    torch.manual_seed(seed)
    g, f = (network and network.to(device) for network in networks(row))
    opt_g = common.adam(g, row["lr"], BETAS)
    opt_f = common.adam(f, row["lr"], BETAS) if f else None
    rng = torch.Generator(device).manual_seed(seed)
    log = common.Log(folder, COLUMNS, steps, device)
    sigma = torch.tensor(SIGMA, dtype=torch.float32, device=device)

    def compare(x, y):
        """What losses are made of: a GAN's logits, else Gram matrices of critic's outputs or pixels."""
        h_x, h_y = (f(x), f(y)) if f else (x.flatten(1), y.flatten(1))
        if form_f == "gan":
            return h_x, h_y
        return common.gram(lambda a, b: common.gaussian(a, b, sigma), h_x, h_y)

    def critic_loss(seen):
        """The critic's loss, and what its density ratio tells: Pearson divergence and mean."""
        if form_f == "gan":
            return common.gan_critic(*seen), None, None
        objective, r = common.gram_objective(*seen, form_f, RIDGE, LAMBDA)
        return -objective, common.pearson(r), r.mean()

    def generator_loss(seen):
        if form_g == "gan":
            return common.gan_generator(seen[1])
        return common.mmd(*seen) if form_g == "mmd" else common.mmd2(*seen)

    def update():
        x = common.draw_images(images, BATCH, rng)
        y = g(common.uniform_noise(BATCH, Z, rng))
        if row["joint"]:
            seen = compare(x, y)
            (loss_f, *ratio), loss_g = critic_loss(seen), generator_loss(seen)
            common.descend((opt_f, loss_f), (opt_g, loss_g))
        else:
            loss_f, *ratio = critic_loss(compare(x, y.detach())) if f else (None, None, None)
            if f:
                common.descend((opt_f, loss_f))
            loss_g = generator_loss(compare(x, y))
            common.descend((opt_g, loss_g))
        log.add(loss_f, loss_g, *ratio)

    @torch.no_grad()
    def sample(n):      # the same noise always; batch norm by the statistics of 500 (common.batch_norm)
        z = common.uniform_noise(n, Z, torch.Generator().manual_seed(0)).to(device)
        return torch.cat([common.to_bytes(g(part)) for part in z.split(500)]).cpu()

    state = dict(g=g, opt_g=opt_g, rng=rng, log=log) | (dict(f=f, opt_f=opt_f) if f else {})
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
    """The table of all runs beside the paper's: Frechet distance and KID, mean ± std over seeds."""
    rows, done = [], [result for result in results if isinstance(result, dict)]
    for method in dict.fromkeys(methods):
        own = [result for name, result in zip(methods, results) if name == method]
        failed = [f"seed {seed} {error}" for seed, error in enumerate(own) if not isinstance(error, dict)]
        scored = [result for result in own if isinstance(result, dict) and "fd" in result]
        updates = {f"{result['updates']:,}" for result in own if isinstance(result, dict)}
        finished = "; ".join([f"{len(own) - len(failed)} of {len(own)}", *failed])
        rows.append([method, " ".join(updates) or "-", finished,
                     common.spread([result["fd"] for result in scored]),
                     common.spread([1_000 * result["kid"] for result in scored]), METHODS[method]["fid"]])
    name = next((f"FD, {result['features']}" for result in done if "fd" in result), "not scored")
    head = ["method", "updates", "seeds finished", name, "1,000 KID", "FID in the paper"]
    return f"{SAMPLES:,} samples against {data}; mean ± std over seeds\n\n{common.table(head, rows)}"


def main(argv=None):
    args = common.flags(__doc__, METHODS, "gram", STEPS, images=True).parse_args(argv)
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
    text = report([method for method, *_ in runs], results, f"the {len(test):,} test images")
    with common.replacing(f"{args.out}/cifar.md") as file:
        file.write(f"`{command}`, {common.machine(device)['device']}\n\n{text}\n".encode())
    print(f"\n{text}")
    if all(isinstance(result, FloatingPointError) for result in results):
        sys.exit("no run finished")


if __name__ == "__main__":
    main()
