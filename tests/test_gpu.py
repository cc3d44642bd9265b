"""What only a GPU can show: captured updates, streams, generators inside graphs. Skipped without one."""
import pytest
import torch

import celeba
import cifar
import common
import imagenet
import mnist
import ring2d
from conftest import SWEPT, image_shape, inception_weights

SCRIPTS = cifar, mnist, celeba, imagenet
MILLISECONDS = common.milliseconds
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Deterministic convolutions, so that equal means equal to the last bit."""
    common.setup("cuda")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    failing = 1, 2, -1.0, 1e-6      # every second test halves a rate
    every = dict(SAMPLES=100, BOOTSTRAP=100, ENCODE=4, LOG_EVERY=1, SAVE_EVERY=3, ADAPT_EVERY=1, CODES=50,
                 ADAPT=failing, KEEP=10)
    for script in SCRIPTS:
        for name, value in every.items():
            monkeypatch.setattr(script, name, value, raising=hasattr(script, name))
    monkeypatch.setattr(common, "milliseconds", lambda *args: None)
    torch.manual_seed(0)


def images_of(n, *shape):
    return torch.randint(256, (n, *(shape or (3, 32, 32))), dtype=torch.uint8, device="cuda")


def pixels(images):
    """Features: a corner of the image, of 32x32 at the most."""
    return images[..., :32, :32].flatten(1).float() / 255, None


pixels.name, pixels.key, pixels.accuracy = "pixels", "0", None


def run(method, folder, steps=6, seed=0, script=cifar):
    folder.mkdir(exist_ok=True)
    torch.manual_seed(1)
    data, judge = images_of(1_000, *image_shape(script, method)), None
    if "decay" in script.METHODS[method]:
        x, _ = common.extract(pixels, data, torch.device("cuda"))
        judge = common.Judge(pixels, x, "", torch.device("cuda"))
    return script.train(method, seed, str(folder), {}, steps, torch.device("cuda"), data, 100, judge)


def weights(folder):
    kept = torch.load(folder / "checkpoint.pt", weights_only=True, map_location="cpu")
    return {p: t for p, t in common.tensors(kept["state"]).items() if p[0] in ("g", "game", "sampler")}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[p], b[p]) for p in a)


@pytest.mark.parametrize("script, method", [      # of penalties by columns one is enough
    (script, name) for script in SCRIPTS for name in script.METHODS
    if name not in SWEPT and not name.endswith("-columns") or name == "mmd-rqdot-16-columns"])
def test_captured_equals_eager_from_the_first_update(script, method, tmp_path, monkeypatch):
    common.interleave([run(method, tmp_path / "captured", script=script)])
    monkeypatch.setattr(common, "capture", lambda update, state: update)
    common.interleave([run(method, tmp_path / "eager", script=script)])
    a, b = common.read_log(tmp_path / "captured"), common.read_log(tmp_path / "eager")
    assert a["loss_g"][0] == b["loss_g"][0] and len(a["loss_g"]) == 6
    assert same(weights(tmp_path / "captured"), weights(tmp_path / "eager"))
    assert a["lr_g"].tolist() == b["lr_g"].tolist() or "decay" not in script.METHODS[method]


def test_ratios_of_many_matrices_are_captured():
    """36 of 200x200: the gradient of eq. 9 at points drawn after the capture, against float64 on a CPU."""
    x, y = (torch.zeros(36, 200, 2, device="cuda", requires_grad=True) for _ in range(2))
    gradient, rng = torch.zeros(2, 36, 200, 2, device="cuda"), torch.Generator("cuda")

    def of(x, y):
        sigma = x.new_ones(1)
        K_all = common.gram(lambda a, b: common.gaussian(a, b, sigma), x, y)
        objective, _ = common.gram_objective(*K_all, "sum", 1e-3, 1.0)
        return torch.stack(torch.autograd.grad(objective.sum(), (x, y)))

    def steps():
        replay = common.capture(lambda: gradient.copy_(of(x, y)), dict(rng=rng))
        with torch.no_grad():
            x.normal_(), y.normal_()
        replay()
        yield

    common.interleave([steps()])
    exact = of(*(t.detach().cpu().double().requires_grad_() for t in (x, y)))
    assert float((gradient.cpu() - exact).norm() / exact.norm()) < 2e-3


@pytest.mark.parametrize("method", ["gram", "gan", "mmdgan", "gamn"])
def test_a_stack_captured_equals_eager(method, tmp_path, monkeypatch):
    for name, value in dict(POINTS=100, LOG_EVERY=2, TRACE_EVERY=1, SAVE_EVERY=4).items():
        monkeypatch.setattr(ring2d, name, value)
    members = ring2d.cells("gamn" if method == "gamn" else "2", [0, 1])[:4]

    def weights_of(folder):
        folder.mkdir()
        torch.manual_seed(0)
        common.interleave([ring2d.train(method, members, str(folder), {}, 4, torch.device("cuda"))])
        return weights(folder)

    captured = weights_of(tmp_path / "captured")
    monkeypatch.setattr(common, "capture", lambda update, state: update)
    assert same(captured, weights_of(tmp_path / "eager"))


def test_side_by_side_equals_alone(tmp_path):
    for seed in range(3):
        common.interleave([run("gram", tmp_path / f"alone{seed}", 40, seed)])
    common.interleave([run("gram", tmp_path / f"side{seed}", 40, seed) for seed in range(3)])
    for seed in range(3):
        assert same(weights(tmp_path / f"alone{seed}"), weights(tmp_path / f"side{seed}"))
    assert not same(weights(tmp_path / "side0"), weights(tmp_path / "side1"))


@pytest.mark.parametrize("method", ["gram", "gram-adaptive"])
def test_resumed_equals_uninterrupted(method, tmp_path):
    common.interleave([run(method, tmp_path / "whole", 6)])
    common.interleave([run(method, tmp_path / "parts", 3)])
    common.interleave([run(method, tmp_path / "parts", 6)])
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


@pytest.mark.parametrize("method", ["gram", "mmdgan", "sn-smmd"])
def test_timing_leaves_no_trace(method, tmp_path, monkeypatch):
    common.interleave([run(method, tmp_path / "plain")])
    monkeypatch.setattr(common, "milliseconds", MILLISECONDS)
    [result] = common.interleave([run(method, tmp_path / "timed")])
    assert same(weights(tmp_path / "plain"), weights(tmp_path / "timed"))
    assert 0 < result["milliseconds"] < 1_000 and 0 < result["MiB"] < 20_000


def test_learning_rate_changes_without_a_new_capture():
    """The rate is a tensor: filling it with 0 stops the weights of a captured update."""
    network = common.mlp(4, 8, 1).to("cuda")
    optimizer, rng = common.optimizer(network, (1e-2, 0.5, 0.9)), torch.Generator("cuda").manual_seed(0)

    def update():
        common.descend((optimizer, network(common.normal_noise(16, 4, rng)).square().mean()))

    def steps():
        replay = common.capture(update, dict(network=network, optimizer=optimizer, rng=rng))
        start = network[0].weight.clone()
        replay()
        moved = network[0].weight.clone()
        optimizer.param_groups[0]["lr"].fill_(0)
        replay()
        stopped = network[0].weight.clone()
        yield
        return start, moved, stopped

    [(start, moved, stopped)] = common.interleave([steps()])
    assert not torch.equal(start, moved) and torch.equal(moved, stopped)


def test_a_loaded_learning_rate_is_on_the_gpu(tmp_path):
    network = common.mlp(4, 8, 1).to("cuda")
    state = dict(network=network, optimizer=common.optimizer(network, (1e-2, 0.5, 0.9)))
    common.save(tmp_path, 1, state, {})
    assert common.load(tmp_path, state, {}) == 1
    assert state["optimizer"].param_groups[0]["lr"].is_cuda


def test_network_precision():
    """Convolutions in TF32, matrix products in full float32: 1e-3 against 1e-6 relative error."""
    a = torch.randn(256, 256, device="cuda")
    error = (a @ a - (a.double() @ a.double())).abs().max() / (a.double() @ a.double()).abs().max()
    assert error < 1e-6
    assert torch.backends.cudnn.conv.fp32_precision == "tf32"


@pytest.mark.parametrize("method", ["mmd-rqdot-16", "cramer-16", "swgan", "sn-smmd", "gamn", "mmdgan"])
def test_losses_and_gradients_equal_the_cpu_s(method, monkeypatch):
    """In full float32: layouts, both sets in one pass, slopes differentiated twice."""
    monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee")
    row, found = cifar.METHODS[method], []
    x, y = torch.rand(2, 8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    a = torch.rand(8, generator=torch.Generator().manual_seed(1))
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        _, f, decoder = (network and network.to(device) for network in cifar.networks(row))
        f.eval()                    # no power iteration
        for p in f.parameters():
            p.data.mul_(1 if method == "gamn" else 4)       # far enough from 0 for a loss
        kernel = common.kernels(cifar.SIGMA, cifar.RBF, cifar.ALPHA, device).get(row.get("kernel"))
        game = common.Game(row, f, decoder, kernel, None).to(device)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "rand", lambda *args, **kwargs: a.to(device))
            loss = game.critic(x.to(device), y.to(device))
        found.append([loss, *torch.autograd.grad(loss, list(f.parameters()), allow_unused=True)])
    (loss, *wanted), (other, *gradients) = found
    assert float(other) == pytest.approx(float(loss), rel=1e-2)
    largest = max(float(u.abs().max()) for u in wanted if u is not None)
    for u, v in zip(wanted, gradients):
        assert (u is None) == (v is None)
        assert u is None or float((u - v.cpu()).abs().max()) <= 1e-2 * largest


def test_fid_inception_equals_the_cpu():
    """cuDNN's convolution, bias and ReLU in one kernel: in full float32, and in TF32 nearly so."""
    network, images = common.FidInception(inception_weights()), images_of(8)
    expected = network(images.cpu())
    network.to("cuda")
    for precision, tolerance in (("ieee", 1e-5), ("tf32", 1e-2)):
        torch.backends.cudnn.conv.fp32_precision = precision
        for found, wanted in zip(network(images), expected):
            assert float((found.cpu() - wanted).abs().max()) < tolerance * float(wanted.abs().max())


def test_scores_equal_the_cpu():
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(5_000, 64, generator=rng).relu(), torch.randn(5_000, 64, generator=rng)
    for score in (lambda *d: common.frechet_distance(*(common.gaussian_fit(s, *d) for s in (x, y))),
                  lambda *d: common.frechet_distance(*(common.gaussian_fit(s[:50], *d) for s in (x, y))),
                  lambda *d: common.kid(x, y, 5, 500, 0, *d)[0],
                  lambda *d: common.inception_score(x, 10, 0, *d)[0]):
        assert score("cuda") == pytest.approx(score(), rel=1e-9)


def test_disturbed_images_stay_on_the_gpu():
    others = images_of(9).cpu()
    for kind, levels in common.DISTURBANCES.items():
        found = common.disturb(images_of(8), kind, levels[-1], torch.Generator("cuda"), others)
        assert found.is_cuda and found.shape == (8, 3, 32, 32)


def test_batches_gathered_ahead_equal_those_on_the_gpu(tmp_path, monkeypatch):
    """Copied into the fixed input of captured updates while others are gathered; also after the timing."""
    monkeypatch.setattr(common, "milliseconds", MILLISECONDS)
    common.interleave([run("sn-smmd", tmp_path / "direct", 20, script=imagenet)])
    images = images_of

    def on_the_cpu(*args):
        return images(*args).cpu()
    monkeypatch.setitem(globals(), "images_of", on_the_cpu)
    [result] = common.interleave([run("sn-smmd", tmp_path / "ahead", 20, script=imagenet)])
    assert same(weights(tmp_path / "direct"), weights(tmp_path / "ahead"))
    assert 0 <= result["waiting"] < 1


def test_a_set_that_fits_goes_to_the_gpu(monkeypatch, capsys):
    images = images_of(10).cpu()
    assert common.on_device(images, torch.device("cuda")).is_cuda and "on the GPU" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * images.nbytes - 1, 10 ** 9))
    assert common.on_device(images, torch.device("cuda")) is images
    assert "gathered from the file" in capsys.readouterr().out
