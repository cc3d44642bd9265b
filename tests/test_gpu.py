"""What only a GPU can show: captured updates, streams, generators inside graphs. Skipped without one."""
from functools import partial

import pytest
import torch

import celeba
import cifar
import common
import imagenet
import mnist
import ring2d
from conftest import inception_weights, tensors

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
SCRIPTS = cifar, mnist, celeba, imagenet


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Deterministic convolutions, so that equal means equal to the last bit; few samples, many tests."""
    common.setup("cuda")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    every = dict(SAMPLES=dict(cuda=100), BOOTSTRAP=100, ENCODE=4, LOG_EVERY=1, SAVE_EVERY=3, ADAPT_EVERY=1,
                 CODES=50, ADAPT=(1, 2, -1.0, 1e-6), KEEP=10)
    for script in SCRIPTS:
        for name, value in every.items():
            monkeypatch.setattr(script, name, value, raising=False)
    torch.manual_seed(0)


def images_of(n, *shape):
    rng = torch.Generator("cuda").manual_seed(1)
    return torch.randint(256, (n, *(shape or (3, 32, 32))), dtype=torch.uint8, device="cuda", generator=rng)


def start(text, folder, steps=6, seed=0, script=cifar, images=None):
    """The generator of a run on random images, with pixels for features if its rates adapt."""
    folder.mkdir(exist_ok=True)
    cuda, methods, size = torch.device("cuda"), script.METHODS, []
    side = {"mnist": 28, "cifar": 32, "imagenet": 64, "celeba": 178}[script.__name__]
    if script is celeba:
        methods, size = (methods["celeba64"], [64]) if "gram" in text else (methods["celeba160"], [160])
    name, row = common.find_row(text, methods, script.DEFAULTS, script.NAMES)
    images = images_of(1_000, 1 if script is mnist else 3, side, side) if images is None else images
    network = reference = None
    if row["decay"]:
        network = common.Features(lambda x: x[..., :28, :28].flatten(1).float() / 255, "pixels", "0", cuda)
        features, _ = network(images[:200])
        mean, root = common.gaussian_fit(features)
        reference = dict(features=features, mean=mean, root=root, name="", key=[1])
    return {str(folder): script.train(name, row, seed, str(folder), steps, cuda, images, *size, network,
                                      reference)}


def weights(folder):
    kept = torch.load(folder / "checkpoint.pt", weights_only=True, map_location="cpu")
    return {p: t for p, t in tensors(kept["state"]).items() if p[0] in ("g", "f", "players", "average")}


def same(a, b):
    return a.keys() == b.keys() and len(a) > 4 and all(torch.equal(a[p], b[p]) for p in a)


@pytest.mark.parametrize("script, text", [      # each loss, penalty, kind of network, optimizer and schedule
    *((cifar, name) for name in (
        "gram", "gram-eq9", "gan", "mmdnet", "mmdgan", "mmd-rqdot+nets=dcgan16",
        "mmd-dist+batch=16", "cramer+batch=16+slope=columns", "wgan-gp+nets=dcgan16", "gamn", "gamn-mmd",
        "gamn-l1", "gmmn-ae+batch=100", "wgan", "smmd", "sn-smmd", "sobolev",
        "gram+decay=0.5")),
    *((mnist, name) for name in ("gram", "gcmmd+batch=16", "mmd-rbf")),
    *((celeba, name) for name in ("gram", "mmd-rqdot+batch=4")),
    *((imagenet, name) for name in ("sn-smmd+batch=8", "sn-smmd+batch=8+precision=bf16"))])
def test_captured_equals_eager_from_the_first_update(script, text, tmp_path, monkeypatch):
    """Three ordinary updates, then replays."""
    common.interleave(start(text, tmp_path / "captured", script=script))
    monkeypatch.setattr(common, "capture", lambda update, rng: update)
    common.interleave(start(text, tmp_path / "eager", script=script))
    a, b = common.read_log(tmp_path / "captured"), common.read_log(tmp_path / "eager")
    assert len(a) == 6 and a["loss_g"].tolist() == b["loss_g"].tolist() and len(set(a["loss_g"])) > 3
    assert same(weights(tmp_path / "captured"), weights(tmp_path / "eager"))
    assert a["lr_g"].tolist() == pytest.approx(b["lr_g"].tolist(), nan_ok=True)


def test_ratios_of_many_matrices_are_captured():
    """36 of 200x200: the gradient of eq. 9 at points drawn after the capture, against float64 on a CPU."""
    x, y = (torch.zeros(36, 200, 2, device="cuda", requires_grad=True) for _ in range(2))
    gradient, rng = torch.zeros(2, 36, 200, 2, device="cuda"), torch.Generator("cuda")

    def of(x, y):
        K_all = common.gram(partial(common.gaussian, sigma=x.new_ones(1)), x, y)
        objective, _ = common.gram_objective(*K_all, "sum", 1e-3, 1.0)
        return torch.stack(torch.autograd.grad(objective.sum(), (x, y)))

    call = common.capture(lambda: gradient.copy_(of(x, y)), rng)
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(5):
            with torch.no_grad():
                x.normal_(), y.normal_()
            call()
    torch.cuda.synchronize()
    exact = of(*(t.detach().cpu().double().requires_grad_() for t in (x, y)))
    assert float((gradient.cpu() - exact).norm() / exact.norm()) < 2e-3


@pytest.mark.parametrize("method", ["gram", "gan", "mmdgan", "gamn"])
def test_a_stack_captured_equals_eager(method, tmp_path, monkeypatch):
    for name, value in dict(POINTS=100, LOG_EVERY=2, TRACE_EVERY=1, SAVE_EVERY=4).items():
        monkeypatch.setattr(ring2d, name, value)
    name, row = common.find_row(method, ring2d.METHODS, ring2d.DEFAULTS, ring2d.NAMES)
    figure = "gamn" if method == "gamn" else "2"

    def weights_of(folder):
        folder.mkdir()
        run = ring2d.train(name, row, [0], str(folder), 6, torch.device("cuda"), figure)
        common.interleave({str(folder): run})
        return weights(folder)

    captured = weights_of(tmp_path / "captured")
    monkeypatch.setattr(common, "capture", lambda update, rng: update)
    assert same(captured, weights_of(tmp_path / "eager"))


def test_side_by_side_equals_alone(tmp_path):
    for seed in range(3):
        common.interleave(start("gram", tmp_path / f"alone{seed}", 80, seed))
    runs = [start("gram", tmp_path / f"side{seed}", 80, seed) for seed in range(3)]
    common.interleave(runs[0] | runs[1] | runs[2])
    for seed in range(3):
        assert same(weights(tmp_path / f"alone{seed}"), weights(tmp_path / f"side{seed}"))
    assert not same(weights(tmp_path / "side0"), weights(tmp_path / "side1"))


@pytest.mark.parametrize("method", ["gram", "gram+decay=0.5"])
def test_resumed_equals_uninterrupted(method, tmp_path):
    common.interleave(start(method, tmp_path / "whole", 9))
    common.interleave(start(method, tmp_path / "parts", 6))
    common.interleave(start(method, tmp_path / "parts", 9))
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_milliseconds_are_those_of_a_run_alone(tmp_path):
    [result] = common.interleave(start("gram", tmp_path / "gram", 60)).values()
    assert 0.3 < result["milliseconds"] < 30


def test_learning_rate_changes_without_a_new_capture():
    """The rate is a tensor: filling it with 0 stops the weights of a captured update."""
    network = common.mlp(4, 8, 1).to("cuda")
    optimizer, rng = common.optimizer(network, "adam", 1e-2, (0.5, 0.9)), torch.Generator("cuda")
    call = common.capture(lambda: common.descend(
        (optimizer, network(common.normal_noise(16, 4, rng)).square().mean())), rng)
    with torch.cuda.stream(torch.cuda.Stream()):
        seen = []
        for i in range(8):
            if i == 6:
                common.rates(optimizer)[0].fill_(0)
            call()
            seen.append(network[0].weight.clone())
    torch.cuda.synchronize()
    assert not torch.equal(seen[4], seen[5]) and torch.equal(seen[5], seen[7])


def test_a_loaded_learning_rate_is_on_the_gpu(tmp_path):
    network = common.mlp(4, 8, 1).to("cuda")
    state = dict(network=network, optimizer=common.optimizer(network, "adam", 1e-2, (0.5, 0.9)))
    common.save(str(tmp_path), 1, state, {})
    assert common.load(str(tmp_path), state, {}) == 1 and common.rates(state["optimizer"])[0].is_cuda


def test_network_precision():
    """Convolutions in TF32, matrix products in full float32: 1e-3 against 1e-6 relative error."""
    a = torch.randn(256, 256, device="cuda")
    exact = a.double() @ a.double()
    assert (a @ a - exact).abs().max() / exact.abs().max() < 1e-6
    assert torch.backends.cudnn.conv.fp32_precision == "tf32"


@pytest.mark.parametrize("text", ["mmd-rqdot+nets=dcgan16", "cramer+nets=dcgan16", "swgan", "sn-smmd", "gamn",
                                  "mmdgan"])
def test_losses_and_gradients_equal_the_cpu_s(text, monkeypatch):
    """In full float32: layouts, both sets in one pass, slopes differentiated twice."""
    monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee")
    (_, row), found = cifar.row_of(text), []
    x, y = torch.rand(2, 8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    a = torch.rand(8, generator=torch.Generator().manual_seed(1))
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        _, f, decoder = (network and network.to(device) for network in cifar.networks(row))
        f.eval()                    # no power iteration
        for p in f.parameters():
            p.data.mul_(1 if text == "gamn" else 4)         # far enough from 0 for a loss
        with monkeypatch.context() as patch:
            patch.setattr(torch, "rand", lambda *args, **kwargs: a.to(device))
            loss = cifar.critic_loss(row, f, decoder, cifar.kernels(device)[row["kernel"]], x.to(device),
                                     y.to(device), None)
        found.append([loss, *torch.autograd.grad(loss, list(f.parameters()), allow_unused=True)])
    (loss, *wanted), (other, *gradients) = found
    assert float(other.detach()) == pytest.approx(float(loss.detach()), rel=1e-2)
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
    for score in (lambda x, y: common.frechet_distance(*map(common.gaussian_fit, (x, y))),
                  lambda x, y: common.frechet_distance(*map(common.gaussian_fit, (x[:50], y[:50]))),
                  lambda x, y: common.kid(x, y, 5, 500)[0], lambda x, y: common.inception_score(x)[0]):
        assert score(x.cuda(), y.cuda()) == pytest.approx(score(x, y), rel=1e-9)


def test_batches_of_a_mapped_array_equal_those_on_the_gpu(tmp_path):
    """Copied into the fixed input of captured updates."""
    images = images_of(300, 3, 64, 64)
    for name, on in (("gpu", images), ("host", images.cpu())):
        common.interleave(start("sn-gan+decay=0+batch=8", tmp_path / name, 12, script=imagenet, images=on))
    assert same(weights(tmp_path / "gpu"), weights(tmp_path / "host"))


def test_a_set_that_fits_goes_to_the_gpu(monkeypatch):
    images = images_of(10).cpu()
    assert common.to_device(images, torch.device("cuda")).is_cuda
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * images.nbytes - 1, 10 ** 9))
    assert common.to_device(images, torch.device("cuda")) is images
