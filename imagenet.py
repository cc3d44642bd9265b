"""ImageNet at 64x64: Scaled MMD, Table 1b, networks of ten layers, on one GPU or several.

    python imagenet.py --method sn-smmd                             on one GPU, 64 images of either kind
    torchrun --nproc-per-node=3 imagenet.py --method sn-smmd        on three, as the paper: its FID is 36.6
    python imagenet.py --method smmd sn-gan gram --resume           go on with three others, side by side

Images are those of data/imagenet/train and val (ILSVRC2012), from which arrays are built once (16.4 GB).
150,000 updates of sn-smmd take 4.5 hours on one H200. Scores of fewer than 50,000 samples are no scores of
the paper. A run goes to runs/imagenet-METHOD-sSEED/: samples-UPDATE.png, samples.npy, log.csv, checkpoint.pt,
result.json; the curves of all runs of a command are runs/imagenet-curves.png.
"""
from contextlib import closing

import torch
from torch.nn.utils import parametrize

import common

SIZE = 64                   # of central squares, resized with antialiasing (the released code has none)
STEPS = 150_000             # Scaled MMD, section 4
BATCH = 64                  # of data and of samples, on each GPU; the mean of an MMD a GPU is the loss
SIGMA = (1, 2, 4, 8, 16)    # bandwidths of gram, which is ours here, as in cifar.py
LAMBDA = 1.0                # GRAM, eq. 9
AVERAGE = 3                 # samples come from averaged weights of the generator, those of update t count as
                            # t^3; the average and the data's contrast are ours: see cifar.py
ADAPT_EVERY, CODES = 2_000, 2_048       # of rates that adapt by so many samples: Scaled MMD, section 4;
ADAPT = (10, 3, 0.1, 1e-6)              # window, patience, level, floor: mbinkowski/MMD-GAN, scorer.py
SAMPLES = 10_000            # to score during training
FINAL = 50_000              # to score at the end, as Scaled MMD
KEEP = 5_000                # of them in samples.npy
BOOTSTRAP, RESAMPLINGS = 50_000, 10     # of the distance, if so many are scored
LOG_EVERY = 200
GRID_EVERY = 10_000         # and, with a feature network, scores
SAVE_EVERY = 5_000          # a multiple of LOG_EVERY: what is saved has been seen to be finite

# common.residual_generator and residual_critic name the sources; unit: pixels are in [0, 1], not [-1, 1]
RESNET = dict(g=(1024, 512, 256, 128, 64), f=(64, 128, 256, 512, 1024), start=4, residual=True, z=128,
              noise="uniform", kernel=3, norms=("none",), unit=True)

# distance and the weights of its terms: common.Game says, but for gram. critic: its outputs. steps: of the
# critic to one of the generator; gram moves both at once. adam: rate, betas. spectral: its gains. decay: of
# rates that adapt to KID. paper: Inception score, FID, KID of its table; its SN-GAN is Miyato et al.'s, of
# 250,000 updates. gram has cifar.py's form, ridge and betas, none of them tried on ImageNet.
SCALED = dict(nets=RESNET, kernel="unit", critic=1, steps=5, adam=(2e-4, 0.5, 0.9), decay=0.8, scale=10.0)
METHODS = {
    "sn-smmd": dict(SCALED, distance="smmd", spectral="learned", paper="10.91, 36.6, .035"),
    "sn-smmd-bf16": dict(SCALED, nets=dict(RESNET, bfloat16=True), distance="smmd", spectral="learned"),
    "smmd":    dict(SCALED, distance="smmd"),
    "sn-gan":  dict(SCALED, distance="gan", spectral="fixed", paper="11.16, 47.5, .044"),
    "gram":    dict(nets=RESNET, distance="gram", kernel="li", critic=128, steps=0, adam=(2e-4, 0.5, 0.999),
                    form="swap", ridge=1.0),
}

CURVES = {"all": [(name, "update") for name in ("fd", "kid", "loss_g", "spread")]}


def networks(row):
    """Generator and critic of a row of METHODS, and None, as it has no decoder."""
    return common.image_networks(row["nets"], row, 3, SIZE)


def train(method, seed, folder, settings, steps, device, images, samples=FINAL, judge=None):
    """One run: a generator that yields when ready and after each update, and returns its result.

    It is sent whether to save. images: of the GPU, or of a map, see common.on_device; samples: how many
    to score at the end, by common.Judge, if there is one.
    """
    row = METHODS[method]
    nets, batch = row["nets"], BATCH
    before = common.gpu_memory(device)
    torch.manual_seed(seed)
    g, f = (network.to(device) for network in networks(row)[:2])
    some = common.evenly(images, CODES)
    sampler = common.Sampler(g, nets, AVERAGE, 3).fit(some).to(device)
    rng = torch.Generator(device).manual_seed(common.own_seed(seed))
    kernel = common.kernels(SIGMA, (), (), device).get(row["kernel"])
    game = common.Game(row, f, None, kernel, rng).to(device)
    opt_g, opt_f = common.optimizer(g, row["adam"]), common.optimizer(game, row["adam"])
    batches = common.Batches(images, batch, seed, device)
    scorer = common.Scorer(judge, sampler, folder, BOOTSTRAP, RESAMPLINGS)
    log = common.Log(folder, common.COLUMNS, steps, device, common.READINGS)
    state = dict(g=g, opt_g=opt_g, game=game, opt_f=opt_f, sampler=sampler, rng=rng, batches=batches, log=log)
    K_ratio = torch.zeros(len(SIGMA), batch, batch, device=device)      # what the last ratio has inverted

    def draw():
        return batches.x / 255, g(sampler.noise(batch, rng))

    def ascend():
        x, y = torch.no_grad()(draw)()
        with parametrize.cached():      # so that a spectral norm is iterated once
            loss = game.critic(x, y)
            common.descend((opt_f, loss))
        game.loss.copy_(loss.detach())

    def update():
        x, y = draw()
        if row["distance"] == "gram":   # Algorithm 1, simultaneous: one K, both gradients, both steps
            h_x, h_y = common.both(f, x, y)
            K_all = K_xx, _, K_yy = common.gram(kernel, h_x, h_y)
            objective, r = common.gram_objective(*K_all, row["form"], row["ridge"], LAMBDA)
            loss_g = common.mmd2(*K_all)
            common.descend((opt_f, -objective), (opt_g, loss_g))
            K_ratio.copy_(K_xx.detach() if row["form"] in common.AT_DATA else K_yy.detach())
            means = -objective, loss_g, common.pearson(r), r.mean()
        else:
            with parametrize.cached():
                loss_g, h_x, h_y = game.generator(x, y)
                common.descend((opt_g, loss_g))
            means = game.loss, loss_g, None, None
        log.add(*means, h_x.var(0).sum() / h_y.var(0).sum())
        sampler.follow(g)

    def cycle(n):
        for _ in range(n):
            batches.fill()
            ascend()
        batches.fill()
        update()

    def readings(step):
        found = dict(condition=common.condition(K_ratio, row["ridge"])) if "ridge" in row else {}
        if step % GRID_EVERY == 0 or step == steps:
            found |= scorer.score(SAMPLES)
        if "decay" in row and step % ADAPT_EVERY == 0:
            if "adaptive" in state:
                now = common.Sampler(g, nets).draw(CODES, step)
                found["p"] = state["adaptive"].step(judge.codes(now))
            common.share_rates(opt_g, opt_f)
            found["lr_g"] = float(opt_g.param_groups[0]["lr"])
        return found

    if judge and "decay" in row:
        x, key = judge.codes(some), judge.network.key
        state["adaptive"] = common.AdaptiveRate([opt_g, opt_f], x, key, row["decay"], *ADAPT)
    step = common.load(folder, state, settings)
    speed = common.read_result(folder, "milliseconds", "MiB", "waiting")
    begun = step, log.seconds
    if step < steps:
        update = common.capture(update, state)
        if row["steps"]:
            ascend = common.capture(ascend, state)
        speed = common.measure(lambda: cycle(row["steps"]), state, device, before)
        batches.waited = 0.0
    with closing(batches):              # its threads end with the run
        yield                           # when all runs are ready, the clock starts
        log.start(step)
        while step < steps:
            cycle(row["steps"])
            step += 1
            if step % LOG_EVERY == 0 or step == steps:
                log.row(step, lambda: readings(step))
            if step % GRID_EVERY == 0 or step == steps:
                common.save_grid(f"{folder}/samples-{step}.png", sampler.draw(64), 8)
            if (yield) or step % SAVE_EVERY == 0 or step == steps:
                common.save(folder, step, state, settings)

    if step > begun[0]:                 # the share of the time in which it waited for images
        speed["waiting"] = batches.waited / (log.seconds - begun[1])
    return dict(method=method, seed=seed, updates=step, seconds=log.seconds, **speed,
                **common.machine(device), **scorer.keep(samples, KEEP))


def main(argv=None):
    args = common.parse(common.flags(__doc__, METHODS, ["sn-smmd"], STEPS, images=True), argv, {}, {})
    common.join(args.device)
    device = common.setup(args.device)
    adaptive = next((method for method in args.method if "decay" in METHODS[method]), None)
    network = common.open_features(args.features, device, adaptive)
    images, _ = common.load_folders("imagenet64", ("train", "val"), args.data)
    images = common.on_device(images, device)
    judge = network and common.open_judge(network, f"{args.data}/imagenet64-val.npy", device)
    common.train_runs(__file__, globals(), args, argv, device,
                      lambda run: train(*run, args.steps, device, images, FINAL, judge))


if __name__ == "__main__":
    common.run(main)
