"""mnist.py through its command line, small; the LeNet; the gradient-constrained MMD as a training loss."""
import json
import os
import shutil

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import common
import mnist
from conftest import Features, by_hand, dense, export, kept, same, says

SMALL = dict(STEPS=3, BATCH=8, SAMPLES=20, BOOTSTRAP=20, ENCODE=2, ENCODE_BATCH=7, CODES=20, ADAPT_EVERY=2,
             ADAPT=(2, 2, *mnist.ADAPT[2:]), LENET_EPOCHS=1, LENET_BATCH=20, PANELS=(1, 3, 4),
             SHOWN=10, LOG_EVERY=2, TRACE_EVERY=2, GRID_EVERY=4, SAVE_EVERY=2,
             TABLES={"demystifying": (30, mnist.TABLES["demystifying"][1], 2)})


def small_nets(nets):
    """A description of networks with widths of 4 to 12, but for what an image asks for."""
    small = dict(nets, z=8)
    for key in ("g", "f", "pooled"):
        small |= {key: (12, *[8] * (len(nets[key]) - 1))} if key in nets else {}
    if "encoder" in nets:
        return small | dict(mlp=(12, 8), encoder=(784, 12, 8))
    return small | dict(mlp=(12, 784)) if "mlp" in nets else small


FULL = mnist.METHODS
METHODS = {name: dict(row, nets=small_nets(row["nets"]), steps=min(row["steps"], 1),
                      **({"batch": 9} if "batch" in row else {})) for name, row in FULL.items()}
EVERY = {name: getattr(mnist, name) for name in vars(mnist) if name.endswith("_EVERY")}
FULL_PANELS, FULL_TABLES = mnist.PANELS, mnist.TABLES


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """mnist.py with small constants, a small data set of stripes, and a folder of its own to work in."""
    for name, value in SMALL.items():
        monkeypatch.setattr(mnist, name, value)
    monkeypatch.setattr(mnist, "METHODS", METHODS)
    monkeypatch.chdir(tmp_path)
    os.mkdir("data")
    rng = np.random.default_rng(0)
    for split, n in (("train", 60), ("test", 30)):
        labels = np.arange(n, dtype=np.uint8) % 10
        images = rng.integers(0, 60, (n, 1, 28, 28), np.uint8)
        for label, image in zip(labels, images):
            image[0, 2 * label + 2:2 * label + 6] += 180        # a bright stripe, lower for a larger label
        np.save(f"data/mnist-{split}.npy", images)
        np.save(f"data/mnist-{split}-labels.npy", labels)


def run(*flags):
    mnist.main(["--device", "cpu", *map(str, flags)])


def arrays(split):
    return torch.from_numpy(np.load(f"data/mnist-{split}.npy"))


# ---- every row --------------------------------------------------------------------------------------------


def test_every_row(capsys):
    run("--method", *METHODS, "--steps", 4)
    printed = capsys.readouterr().out
    accuracy = torch.load("data/features-lenet.pth", weights_only=True)["accuracy"]
    assert f"classifies {accuracy:.2%} of MNIST's test images rightly" in printed
    assert f"lenet, {accuracy:.2%} accuracy; 20 samples against mnist-test, 30 images" in printed
    for method, row in METHODS.items():
        folder, gram = f"runs/mnist-{method}-s0", row["distance"] == "gram"
        assert sorted(os.listdir(folder)) == [
            "checkpoint.pt", "common.py", *["figure8.png"] * gram, "log.csv", "mnist.py", "result.json",
            "samples-1.png", "samples-3.png", "samples-4.png", "samples.npy"]
        samples = np.load(f"{folder}/samples.npy")
        assert samples.shape == (20, 1, 28, 28) and samples.dtype == np.uint8 and samples.std() > 1
        _, tensors, log = kept(folder)
        assert log["step"] == ([1, 2, 3, 4] if gram else [2, 4]) and np.isfinite(log["loss_g"]).all()
        assert np.isfinite(log["mean_r"]).all() == gram
        assert np.isfinite(log["loss_f"]).all() == (row["critic"] > 0 or "encode" in row)
        result = json.load(open(f"{folder}/result.json"))
        assert (result["method"], result["updates"], result["features"]) == (method, 4, "lenet")
        assert result["accuracy"] == accuracy and min(result["fd"], result["isc"]) > 0
        taken = {name: {float(t) for path, t in tensors.items() if path[0] == name and path[-1] == "step"}
                 for name in ("opt_g", "opt_f")}
        critic = {2.0} if "encode" in row else {4.0} if row["critic"] else set()
        assert taken == {"opt_g": {4.0}, "opt_f": critic}, method
    digits = [f"runs/mnist-{name}-s0/figure8.png" for name in ("gram", "gram-clip", "gram-swap")]
    assert printed.splitlines()[-4:] == ["runs/mnist-curves.png", *digits] and "9.11, 4.206, .005" in printed


def test_the_table_and_the_figure(capsys, monkeypatch):
    """Table 3 has more samples and its own number of updates; Figure 6 draws losses and KID."""
    drawn, real = [], common.curves_figure
    monkeypatch.setattr(common, "curves_figure", lambda *args: drawn.append(args) or real(*args))
    run("--table", "demystifying")
    printed, rows = capsys.readouterr().out, SMALL["TABLES"]["demystifying"][1].split()
    assert "the training images, scored likewise: score of its logits " in printed and "KID×1,000 " in printed
    assert "30 samples against" in printed
    results = [json.load(open(f"runs/mnist-{name}-s0/result.json")) for name in rows]
    assert len(rows) == 6 and all((r["samples"], r["updates"]) == (30, 2) for r in results)
    assert all("fd_bootstrap" in result for result in results)
    assert {"fd", "kid", "isc"} <= {column for column, _ in drawn[0][1]}
    run("--figure", "gcmmd", "--steps", 2)
    assert os.path.getsize("runs/mnist-figuregcmmd.png") > 10_000
    assert [column for column, _ in drawn[-1][1]] == ["loss_g", "kid"]
    assert [name for (name, *_), _ in drawn[-1][0]] == ["smmd", "sn-smmd", "gcmmd", "sn-gcmmd"]
    assert FULL_TABLES["demystifying"][::2] == (100_000, 20_000)


def test_what_happens_every_so_often_happens_at_a_row_of_the_log():
    for name in ("GRID_EVERY", "SAVE_EVERY", "ADAPT_EVERY"):
        assert EVERY[name] % EVERY["LOG_EVERY"] == 0
    assert EVERY["LOG_EVERY"] % EVERY["TRACE_EVERY"] == 0
    assert FULL_PANELS == (100, 250, 500, 750, 1_000, 2_000, 3_000, 4_000, 5_000)


def test_rates_adapt_by_the_lenet():
    run("--method", "mmd-rqdot-16", "sn-gcmmd", "--steps", 6)
    for method, decay in (("mmd-rqdot-16", 0.5), ("sn-gcmmd", 0.8)):
        log = common.read_log(f"runs/mnist-{method}-s0")
        assert np.isfinite(log["p"]).tolist() == [False, False, True] and FULL[method]["decay"] == decay
        assert log["lr_g"].tolist() == [1e-4] * 3


def test_rates_of_another_lenet():
    run("--method", "mmd-rqdot-16", "--steps", 2)
    other = torch.load("data/features-lenet.pth", weights_only=True)
    next(iter(other["weights"].values())).mul_(2)
    torch.save(other, "data/features-lenet.pth")
    with says("runs/mnist-mmd-rqdot-16-s0/checkpoint.pt: found rates", "go on with that network", "--out"):
        run("--method", "mmd-rqdot-16", "--steps", 4, "--resume")


def test_updates_of_seeds_that_differ(capsys):
    run("--method", "gmmn", "--steps", 4)
    run("--method", "gmmn", "--steps", 2, "--seeds", 2, "--resume")
    assert "| gmmn   | 2 to 4  | 2 of 2 " in capsys.readouterr().out


def test_other_runs_go_on_while_an_autoencoder_is_trained(capsys):
    steps = []
    run = common.encode(lambda: steps.append(1), 250, "runs/x")
    taken = [len(steps) for _ in run]
    assert taken == [1, 101, 201] and len(steps) == 250 and "runs/x" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["gram", "gmmn-ae", "mmd-dist-16", "sn-gcmmd"])
def test_resumed_equals_uninterrupted(method):
    run("--method", method, "--steps", 8, "--out", "whole")
    run("--method", method, "--steps", 4, "--out", "parts")
    run("--method", method, "--steps", 8, "--out", "parts", "--resume")
    assert same(f"whole/mnist-{method}-s0", f"parts/mnist-{method}-s0")


# ---- GRAM's Figure 8 --------------------------------------------------------------------------------------


def test_first_update_of_gram_is_the_papers():
    """Eq. 8, 9 and 10 with the bandwidths of B.4, pixels in [0, 1], both steps from the same weights."""
    run("--steps", 1)
    _, tensors, log = kept("runs/mnist-gram-s0")
    torch.manual_seed(0)
    g, f, _ = mnist.networks(METHODS["gram"])
    rng = torch.Generator().manual_seed(0)
    x = arrays("train")[torch.randint(60, (9,), generator=rng)].float() / 255
    y = g(torch.rand(9, 8, generator=rng) * 2 - 1)
    f_x, f_y = f(x), f(y)

    def K(a, b, sigma):
        return (-(a[:, None] - b).square().sum(-1) / (2 * sigma ** 2)).exp()

    loss_g, ratios = 0, []
    for sigma in (0.1, 1, 10, 100):
        K_yy, K_yx, K_xx = K(f_y, f_y, sigma), K(f_y, f_x, sigma), K(f_x, f_x, sigma)
        ratios.append(torch.linalg.solve(K_yy + 1e-3 * torch.eye(9), K_yx.sum(1)))
        loss_g = loss_g + K_xx.mean() + K_yy.mean() - 2 * K_yx.mean()
    r = torch.stack(ratios).mean(0)
    loss_f = -(r - 1).square().mean() - r.sum()
    for name, value in (("loss_f", loss_f), ("loss_g", loss_g), ("pearson", (r - 1).square().mean()),
                        ("mean_r", r.mean())):
        assert log[name] == [pytest.approx(float(value.detach()), rel=1e-3)], name
    for name, network, loss in (("g", g, loss_g), ("game", nn.ModuleDict(dict(f=f)), loss_f)):
        gradients = torch.autograd.grad(loss, network.parameters(), retain_graph=True)
        for (key, weight), slope in zip(network.named_parameters(), gradients):
            moved = (tensors[name, key] - weight).detach()      # Adam's first step: the slope's sign
            clear = slope.abs() > 1e-3 * slope.abs().max()
            if key != "f.13.bias":      # the critic's last: it moves all outputs alike
                assert torch.allclose(moved[clear], -1e-3 * slope.sign()[clear], atol=2e-4), (name, key)


def test_panels_and_traces_of_figure_8(monkeypatch):
    """Data above samples at the updates that it names; each of the first 100 updates, then every tenth."""
    monkeypatch.setattr(mnist, "TRACE_EVERY", 10)
    monkeypatch.setattr(mnist, "LOG_EVERY", 60)
    monkeypatch.setattr(mnist, "GRID_EVERY", 1_000)
    monkeypatch.setattr(mnist, "PANELS", (2, 101, 120, 500))
    shown, curves, read, panel = [], [], mnist.image.imread, common.curve_panel
    monkeypatch.setattr(mnist.image, "imread", lambda path: shown.append(path) or read(path))
    monkeypatch.setattr(common, "curve_panel", lambda *args: curves.append(args[1:]) or panel(*args))
    run("--steps", 125)
    folder = "runs/mnist-gram-s0"
    assert shown == [f"{folder}/samples-{step}.png" for step in (2, 101, 120)]
    os.rename(shown[1], "put-aside.png")
    mnist.figure_8(folder, dict(updates=125, method="gram"))
    assert shown[3:] == [shown[0], shown[2]]            # a picture that is not there any more has no panel
    curves[2:] = []
    log = common.read_log(folder)
    assert log["step"].tolist() == [*range(1, 101), 110, 120, 125]
    (early, first), (late, second) = curves
    assert early.tolist() == [*range(1, 101)] and late.tolist() == [100, 110, 120, 125]
    for part, rows in ((first, slice(100)), (second, slice(99, None))):
        assert [key.split(", ")[1] for key in part] == ["eq. 10", "eq. 7"]
        for name, values in zip(("loss_g", "pearson"), part.values()):
            assert values.tolist() == log[name][rows].tolist()
    picture = (255 * read(f"{folder}/samples-2.png")).round()[..., 0]
    for i, image in enumerate(arrays("train")[:10, 0]):
        assert np.array_equal(picture[1:29, 29 * i + 1:29 * i + 29], image)
    assert picture.shape == (2 * 29 + 1, 10 * 29 + 1) and picture[30:].std() > 1
    assert os.path.getsize(f"{folder}/figure8.png") > 10_000


def test_samples_are_of_the_generator_as_it_is():
    run("--steps", 2)
    _, tensors, _ = kept("runs/mnist-gram-s0")
    g = mnist.networks(METHODS["gram"])[0]
    g.load_state_dict({path[1]: t for path, t in tensors.items() if path[0] == "g"})
    y = g(torch.rand(20, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    assert np.abs(np.load("runs/mnist-gram-s0/samples.npy") - 255 * y.detach().numpy()).max() < 0.51


# ---- losses -----------------------------------------------------------------------------------------------

PLAYED = [name for name, row in METHODS.items() if row["distance"] not in ("gram", "gcmmd") and row["critic"]
          and "encode" not in row]


@pytest.mark.parametrize("method", PLAYED)
def test_losses_of_every_row(method):
    """In float64 and on 28x28 the losses of common.Game are those of the formulas written out."""
    row, a = METHODS[method], torch.rand(8, generator=torch.Generator().manual_seed(5)).double()
    torch.manual_seed(0)
    _, f, _ = mnist.networks(row)
    for p in f.parameters():
        p.data.mul_(8)              # far enough from 0 that no loss vanishes
    f = f.double().eval()
    x, y = torch.rand(2, 8, 1, 28, 28, generator=torch.Generator().manual_seed(1)).double()
    kernels = common.kernels(mnist.SIGMA, mnist.RBF, mnist.ALPHA, dtype=torch.float64)
    game = common.Game(row, f, None, kernels.get(row.get("kernel")), None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda *args, **kwargs: a)
        found = game.critic(x, 0.5 * y), game.generator(x, 0.5 * y)[0]
    for loss, wanted in zip(found, by_hand(row, f, None, x, 0.5 * y, a)):
        assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-9)


def test_gmmn_ae_s_losses():
    """The autoencoder's is the cross-entropy, its dropout that of the row; codes of the data have none."""
    torch.manual_seed(0)
    row, (g, f, decoder) = METHODS["gmmn-ae"], mnist.networks(METHODS["gmmn-ae"])
    x = torch.rand(9, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    kernel = common.kernels(mnist.SIGMA, mnist.RBF, mnist.ALPHA)["unit"]
    game = common.Game(row, f, decoder, kernel, torch.Generator().manual_seed(2))
    rng = torch.Generator().manual_seed(2)
    kept = [(torch.rand(9, n, generator=rng) >= p).float() / (1 - p) for n, p in ((784, 0.2), (12, 0.5))]
    hidden = (f[1].weight @ (x.flatten(1) * kept[0]).T).T + f[1].bias
    code = ((hidden.clamp(min=0) * kept[1]) @ f[3].weight.T + f[3].bias).sigmoid()
    x_hat = decoder(code)
    entropy = -(x * x_hat.log() + (1 - x) * (1 - x_hat).log()).mean()
    y = g(torch.rand(9, 8) * 2 - 1)
    assert row["encode"] == (0.2, 0.5) and float(game.critic(x, y)) == pytest.approx(float(entropy), rel=1e-5)
    found, h_x, h_y = game.generator(x, y)
    assert torch.equal(h_x, f(x)) and torch.equal(h_y, y)
    (-found).backward()
    assert all(p.grad is None for p in f.parameters()) and all(p.grad is not None for p in g.parameters())


def test_gmmn_has_variances():
    """Its loss of images is the root of the biased squared MMD, exp(-d^2 / 2 s) with s of 2 to 80."""
    x, y = torch.rand(2, 7, 1, 28, 28, generator=torch.Generator().manual_seed(1)).double()
    kernel = common.kernels(mnist.SIGMA, mnist.RBF, mnist.ALPHA, dtype=torch.float64)["gmmn"]
    found, h_x, _ = common.Game(METHODS["gmmn"], None, None, kernel, None).generator(x, y)
    assert torch.equal(h_x, x.view(7, 784))
    mean = [np.mean([np.exp(-float((u - v).square().sum()) / (2 * s)) for u in a for v in b])
            for s in (2, 5, 10, 20, 40, 80) for a, b in ((x, x), (y, y), (x, y))]
    squared = sum(mean[::3]) + sum(mean[1::3]) - 2 * sum(mean[2::3])
    assert float(found) == pytest.approx((squared + 1e-6) ** 0.5, rel=1e-9)


def small_critic():
    """A critic of 8x8 images in float64, and the same from PyTorch's own layers, of one point at a time."""
    torch.manual_seed(0)
    f = common.dcgan_critic(1, (3, 4), 1, 5, (None,), 8).double()
    plain = [nn.Conv2d(1, 3, 5, 2, 2), nn.LeakyReLU(0.2), nn.Conv2d(3, 4, 5, 2, 2), nn.LeakyReLU(0.2),
             nn.Flatten(), nn.Linear(16, 1)]
    plain = nn.Sequential(*plain).double()
    for p in f.parameters():
        p.data.mul_(20)             # far from 0, where the kernel is nearly 1
    plain.load_state_dict(f.state_dict())
    return f, plain, lambda t: plain(t.view(1, 1, 8, 8))[0]


@pytest.mark.parametrize("row", [METHODS["gcmmd"], METHODS["sn-gcmmd"]])
def test_gcmmd_in_training_equals_the_dense_system(row):
    """Losses of critic and generator and their gradients against Proposition 4 in the space of pixels."""
    f, plain, at = small_critic()
    x, y = torch.rand(2, 4, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y.requires_grad_()
    game = common.Game(row, f, None, common.unit_gaussian, None)
    wanted = dense(at, x.flatten(1), y.flatten(1), x.flatten(1), 1.0)
    assert float(wanted.detach()) > 1e-3
    loss_f, (loss_g, h_x, h_y) = game.critic(x, y), game.generator(x, y)
    assert float(loss_f.detach()) == pytest.approx(-float(wanted.detach()), rel=1e-9)
    assert float(loss_g.detach()) == pytest.approx(float(wanted.detach()), rel=1e-9)
    assert torch.equal(h_x, f(x)) and torch.equal(h_y, f(y))
    weights = torch.autograd.grad(wanted, [*plain.parameters(), y])
    found = *torch.autograd.grad(loss_f.neg(), list(f.parameters())), *torch.autograd.grad(loss_g, y)
    for u, v in zip(found, weights):
        assert torch.allclose(u, v, rtol=1e-7, atol=1e-9 * float(v.abs().max() + 1e-3))


def test_blocks_of_the_system_equal_autograd_s():
    """B A B^T of gradient_constrained_mmd2's docstring holds K, G and H, derivatives in pixels."""
    f, _, at = small_critic()
    x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    h, J = common.jacobian(f, x)
    A = common.kernel_jet(h, h).detach()                                    # [3, 2, 3, 2]
    for n, u in enumerate(x.flatten(1)):
        for m, v in enumerate(x.flatten(1)):
            def k(u, v):
                return (-(at(u) - at(v)).square().sum() / 2).exp()

            in_u = torch.func.jacrev(k)
            J_u, J_v = J[n].detach(), J[m].detach()                         # [1, 64]
            assert torch.allclose(A[n, 0, m, 0], k(u, v))
            assert torch.allclose(A[n, 1:, m, 0] @ J_u, in_u(u, v))
            assert torch.allclose(J_u.T @ A[n, 1:, m, 1:] @ J_v, torch.func.jacrev(in_u, 1)(u, v), atol=1e-12)
            assert torch.allclose(A[n, 0, m, 1:] @ J_v, torch.func.jacrev(k, 1)(u, v))


def test_gcmmd_in_float32_at_full_size():
    """128 unknowns for a batch of 64; value and gradient close to those of float64 on the networks in use."""
    torch.manual_seed(0)
    _, f, _ = mnist.networks(FULL["gcmmd"])
    for p in f.parameters():
        p.data.mul_(2)
    x, y = torch.rand(2, 64, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    unknowns, solve, found = [], torch.linalg.solve_ex, []
    weights = list(f.parameters())[:-1]         # but for the last bias, which moves all features alike
    for dtype in (torch.float32, torch.float64):
        game = common.Game(FULL["gcmmd"], f.to(dtype), None, common.unit_gaussian, None)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.linalg, "solve_ex", lambda A, b: unknowns.append(A.shape) or solve(A, b))
            loss = game.critic(x.to(dtype), (x + 0.5 * y).to(dtype))
        found.append([loss.detach(), *torch.autograd.grad(loss, weights)])
    assert unknowns == [(128, 128)] * 2
    for u, v in zip(*found):
        assert float((u - v).norm()) < 2e-3 * float(v.norm())


# ---- the LeNet --------------------------------------------------------------------------------------------


def lenet():
    return common.load_lenet("data", torch.device("cpu"), 6, 20, 2e-3)


def test_lenet_is_trained_once_and_kept(monkeypatch, capsys):
    first = lenet()
    assert first.accuracy > 0.9 and (first.name, first.width) == ("lenet", 512)
    assert f"classifies {first.accuracy:.2%}" in capsys.readouterr().out
    found, logits = first(arrays("test").expand(-1, 3, -1, -1))
    wanted = torch.from_numpy(np.load("data/mnist-test-labels.npy"))
    assert (logits.argmax(1) == wanted).double().mean() == first.accuracy
    with monkeypatch.context() as patch:
        patch.setattr(common, "train_lenet", None)
        again = lenet()
    assert (again.accuracy, again.key) == (first.accuracy, first.key)
    assert all(torch.equal(a, b) for a, b in zip(again(arrays("test")), (found, logits)))
    assert sorted(name for name in os.listdir("data") if "mnist" not in name) == ["features-lenet.pth"]
    shutil.move("data/features-lenet.pth", "before.pth")
    torch.rand(5)                       # whatever has been drawn before
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(lenet()(arrays("test")), (found, logits)))


def test_every_epoch_of_the_lenet_has_every_image_once(monkeypatch):
    seen, forward = [], common.LeNet.forward
    monkeypatch.setattr(common.LeNet, "forward",
                        lambda self, x: seen.append(x[:, 0, 0, 0].tolist()) or forward(self, x))
    images = arrays("train")
    images[:, 0, 0, 0] = torch.arange(60)
    common.train_lenet(images, torch.arange(60) % 10, 2, 20, 1e-3)
    first, second = sum(seen[:3], []), sum(seen[3:], [])
    assert sorted(first) == sorted(second) == [*range(60)] and first != second and len(seen) == 6


def test_lenet_by_hand():
    """The tutorial's network: pixels in [-1/2, 1/2], 5x5 filters, pools of 2x2, features behind the ReLU."""
    torch.manual_seed(0)
    network, images = common.LeNet(), arrays("test")[:3]
    w = list(network.parameters())
    assert [tuple(p.shape) for p in w[::2]] == [(32, 1, 5, 5), (64, 32, 5, 5), (512, 3136), (10, 512)]
    h = F.max_pool2d(F.conv2d(images / 255 - 0.5, w[0], w[1], padding=2).relu(), 2)
    h = F.max_pool2d(F.conv2d(h, w[2], w[3], padding=2).relu(), 2)
    h = (h.flatten(1) @ w[4].T + w[5]).relu()
    for found, wanted in zip(network(images.expand(-1, 3, -1, -1)), (h, h @ w[6].T + w[7])):
        assert torch.allclose(found, wanted, atol=1e-5)


def test_scores_of_one_channel():
    network = lenet()
    judge = common.open_judge(network, "data/mnist-test.npy", torch.device("cpu"))
    images = arrays("train")
    scores = judge.score(images, 50)
    with torch.no_grad():
        (x, logits), (y, _) = (network(part.repeat(1, 3, 1, 1)) for part in (images, arrays("test")))
    fit = common.gaussian_fit(y)
    assert scores["fd"] == pytest.approx(common.frechet_distance(common.gaussian_fit(x), fit), rel=1e-5)
    assert scores["kid"] == pytest.approx(common.kid(x, y)[0], abs=1e-5)
    assert scores["isc"] == pytest.approx(common.inception_score(logits)[0], rel=1e-5)
    assert scores["accuracy"] == network.accuracy and scores["bootstrap_samples"] == 50
    assert 1 < scores["isc"] <= 10 and judge.score(255 - images)["fd"] > 2 * scores["fd"]
    assert judge.codes(images).shape == (60, 512)


def test_another_network_may_judge(capsys):
    """One that --features names; no LeNet is trained then, and no accuracy printed."""
    batch, height, width = (torch.export.Dim(name, min=2) for name in ("batch", "height", "width"))
    program = torch.export.export(Features("tuple"), (torch.zeros(2, 3, 30, 32, dtype=torch.uint8),),
                                  dynamic_shapes=({0: batch, 2: height, 3: width},))
    torch.export.save(program, "features-any.pt2")
    run("--features", "features-any.pt2", "--steps", 2)
    printed = capsys.readouterr().out
    assert "any; 20 samples against mnist-test" in printed and "accuracy" not in printed
    assert not os.path.exists("data/features-lenet.pth")
    with says("features-tiny.pt2: fails on uint8 [10, 3, 28, 28]"):
        run("--features", export("features-tiny.pt2"), "--steps", 2)


def test_bad_input(monkeypatch):
    with open("data/features-lenet.pth", "wb") as file:
        file.write(b"half")
    with says("data/features-lenet.pth: no LeNet", "delete it to have it trained anew"):
        run("--steps", 2)
    torch.save(dict(weights=nn.Linear(2, 3).state_dict(), accuracy=1.0), "data/features-lenet.pth")
    with says("data/features-lenet.pth: no LeNet"):
        run("--steps", 2)
    os.remove("data/features-lenet.pth")
    np.save("data/mnist-train-labels.npy", np.zeros((60, 1), np.uint8))
    with says("data/mnist-train-labels.npy", "found uint8 [60, 1]", "expected uint8 [60]"):
        run("--steps", 2)
    np.save("data/mnist-train-labels.npy", np.full(60, 10, np.uint8))
    with says("data/mnist-train-labels.npy", "found a 10", "of 0 to 9"):
        run("--steps", 2)
    np.save("data/mnist-train-labels.npy", np.zeros(59, np.uint8))
    with says("found uint8 [59]", "expected uint8 [60]"):
        run("--steps", 2)
    os.remove("data/mnist-train-labels.npy")
    with says("data/mnist-train-labels.npy", "cannot be read", "torchvision"):
        run("--steps", 2)
    monkeypatch.setattr(mnist, "LENET_BATCH", 61)
    with says("found 60 images, expected 61"):
        run("--method", "gmmn")
    with pytest.raises(SystemExit, match="2"):
        run("--table", "demystifying", "--figure", "gcmmd")
    monkeypatch.setattr(mnist, "CODES", 61)
    with says("found 60 images, expected 61"):
        run("--method", "mmd-dot-16")
    assert os.listdir() == ["data"]


def test_networks_at_full_size():
    """Shapes, and the numbers of parameters that the sources imply."""
    torch.manual_seed(0)
    x, counts = torch.rand(2, 1, 28, 28), {}
    for method in ("gram", "mmd-rqdot-16", "gmmn", "gamn", "smmd"):
        row = FULL[method]
        g, f, _ = mnist.networks(row)
        y = g(torch.rand(2, row["nets"]["z"]))
        assert y.shape == x.shape and 0 <= y.min() and y.max() <= 1
        assert f is None or f(x).shape == (2, row["critic"])
        counts[method] = common.count(g), common.count(f)

    def mlp(*sizes):
        return sum((a + 1) * b for a, b in zip(sizes, sizes[1:]))

    table_3 = 9 * (16 + 16 * 32 + 32 * 32) + 2 * (16 + 32 + 32) + 289 * 100
    assert counts["gram"] == (mlp(100, 600, 600, 800, 784), table_3)
    assert counts["gmmn"] == (mlp(10, 64, 256, 256, 1024, 784), 0)
    deconvolutions = 25 * (512 * 256 + 256 * 128 + 128 * 64 + 64) + 2 * (512 + 256 + 128 + 64) + 1
    critics = [25 * (f + 2 * f * f + 8 * f * f + 32 * f * f) + 15 * f + (8 * f * 4 + 1) * out
               for f, out in ((16, 16), (64, 1))]
    assert counts["mmd-rqdot-16"] == (101 * 512 * 4 + deconvolutions, critics[0])
    assert counts["smmd"] == (129 * 512 * 4 + deconvolutions, critics[1])
    assert counts["gamn"][0] == 129 * 256 * 16 + 25 * (256 * 128 + 128 * 64 + 64) + 2 * (256 + 128 + 64) + 1
    kinds = [type(layer).__name__ for layer in mnist.networks(FULL["gram"])[1]]
    assert kinds == ["Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d"] * 3 + ["Flatten", "Linear"]
