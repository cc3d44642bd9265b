"""Networks: shapes, the parameter counts that the paper's tables imply, batch norm, initialisation."""
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import celeba
import cifar
import common
import imagenet
import mnist
from conftest import says


def count(network):
    return sum(p.numel() for p in network.parameters()) if network else 0


BATCH, LAYER = "BatchNorm2d", "LayerNorm"


@pytest.mark.parametrize("name, norms, last", [
    ("gram", 3 * [BATCH], "Tanh"), ("weak", 3 * [BATCH], "Tanh"), ("li", ["", BATCH, BATCH], "Tanh"),
    ("gamn", ["", LAYER, LAYER], "Tanh"), ("wgan", ["", BATCH, BATCH], "Tanh"), ("wgan-gp", 3 * [""], "Tanh"),
    ("dcgan", 4 * [""], "Sigmoid"), ("dcgan16", 4 * [""], "Sigmoid"), ("sngan", 7 * [""], "Sigmoid")])
def test_layers_are_in_the_papers_order(name, norms, last):
    with torch.device("meta"):
        g, f, _ = cifar.networks(cifar.DEFAULTS | dict(nets=name, critic=1, loss="mmd"))
    ups = ["ConvTranspose2d"] * 3 + ["Conv2d"] if name == "sngan" else ["ConvTranspose2d"] * len(norms)
    kinds_g, kinds_f = ([type(layer).__name__ for layer in network] for network in (g, f))
    assert kinds_g == ["Linear", "Unflatten", *(kind for up in ups for kind in (BATCH, "ReLU", up)), last]
    downs = [kind for norm in norms for kind in ("Conv2d", norm, "LeakyReLU") if kind]
    assert kinds_f == [*downs, "Flatten", "Linear"]
    assert {layer.negative_slope for layer in f if isinstance(layer, nn.LeakyReLU)} == {0.2}
    assert all(layer.num_groups == 1 for layer in f if isinstance(layer, nn.GroupNorm))     # all of an image


@pytest.mark.parametrize("size, times, sizes", [(28, 4, [28, 14, 7, 4, 2]), (28, 3, [28, 14, 7, 4]),
                                                (9, 2, [9, 5, 3]), (32, 3, [32, 16, 8, 4])])
def test_odd_sizes_are_halved_and_rounded_up(size, times, sizes):
    """In the critic, and in the generator the other way round, at every layer."""
    widths, seen = (4,) * times, []
    g = common.dcgan_generator(8, widths, 1, kernel=5, size=size)
    f = common.dcgan_critic(1, widths, 2, kernel=5, norms=(None,), size=size)
    for layer in (*g, *f):
        if isinstance(layer, (nn.ConvTranspose2d, nn.Conv2d)):
            layer.register_forward_hook(lambda layer, x, y: seen.append(y.shape[-1]))
    assert f(g(torch.rand(3, 8))).shape == (3, 2)
    assert seen == [*reversed(sizes[:-1]), *sizes[1:]]


def test_pooled_critic():
    """GRAM's Table 3: 28 to 14, 7 and 3 by convolution, batch norm, ReLU, the largest of 2x2."""
    torch.manual_seed(0)
    f, x = mnist.pooled_critic((4, 5, 6), 3), torch.rand(7, 1, 28, 28)
    w, h = list(f.parameters()), x
    for i in (0, 3, 6):
        h = nn.functional.conv2d(h, w[i], padding=1)
        var, mean = torch.var_mean(h, (0, 2, 3), correction=0, keepdim=True)
        h = (h - mean) / (var + 1e-5).sqrt()
        h = nn.functional.max_pool2d(h.relu(), 2)
    assert h.shape == (7, 6, 3, 3)
    assert torch.allclose(f(x), h.flatten(1) @ w[9].T + w[10], atol=1e-5)


CRITICS = {
    "5x5, odd sizes": (lambda: common.dcgan_critic(3, (4, 6), 2, 5, (None,), 7), 7),
    "4x4, layer norm": (lambda: common.dcgan_critic(3, (4, 6, 8), 3, 4, (None, common.LayerNorm), 8), 8),
    "seven layers": (lambda: cifar.sngan_critic(3, 1, 2), 32),
    "residual": (lambda: imagenet.residual_critic(3, (4, 5, 6), 2, 8), 8),
    "spectral": (lambda: common.spectral(common.dcgan_critic(3, (4, 6), 1, 4, (None,), 8), True), 8),
    "points": (lambda: common.Layers(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 2)), None)}


@pytest.mark.parametrize("name", CRITICS)
def test_slopes_written_out_are_pytorchs(name):
    """Features, slopes, and what both give weights and points, of a scalar whose gradient depends on h."""
    torch.manual_seed(0)
    f, size = CRITICS[name][0]().double(), CRITICS[name][1]
    for p in f.parameters():
        p.data.add_(torch.randn_like(p) / 5)
    x = torch.randn(6, *((3, size, size) if size else (5,)), dtype=torch.float64).requires_grad_()
    weights, at, found, outputs = [x, *f.parameters()], slice(1, 4), [], []

    def scalar(h):
        return (h.sin() * torch.arange(1, 1 + h.shape[1])).sum()
    with nn.utils.parametrize.cached():
        for written in (True, False):
            if written:
                h, back = common.pullback(f, x, outputs)
                slope = back(torch.func.grad(scalar)(h[at]), at)
            else:
                h = f(x)
                slope = torch.autograd.grad(scalar(h[at]), x, create_graph=True)[0][at]
            loss = (slope.flatten(1).norm(dim=1) - 1).square().mean() + h.square().mean()
            found.append([h, slope, *torch.autograd.grad(loss, weights, retain_graph=True)])
        J = torch.stack([torch.autograd.grad(h_k.sum(), x, retain_graph=True)[0] for h_k in h.T], 1)
        jacobian = common.jacobian(*common.pullback(f, x))
        torch.testing.assert_close(jacobian, J.flatten(2), rtol=1e-12, atol=1e-13)
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    leaky = sum(isinstance(layer, nn.LeakyReLU) for layer in f)
    assert len(outputs) == leaky + 1 and torch.equal(outputs[-1], found[0][0])


@pytest.mark.parametrize("name", ["smmd", "mmd-rqdot+nets=dcgan16", "gamn"])
def test_slopes_in_float32(name):
    """Full networks: the penalty's gradient is PyTorch's in float64 to 1e-5, as is PyTorch's in float32."""
    torch.manual_seed(0)
    f, x, found = cifar.networks(cifar.row_of(name)[1])[1], torch.rand(3, 3, 32, 32), []
    for dtype in (torch.float32, torch.float64):
        f, t = f.to(dtype), x.to(dtype).requires_grad_()
        ways = [torch.autograd.grad(f(t).sum(), t, create_graph=True)[0]]
        h, back = common.pullback(f, t)
        ways += [back(torch.ones_like(h), slice(None))]
        for slope in ways:
            weights = [p for p in f.parameters() if p.ndim > 1]
            gradient = torch.autograd.grad(slope.square().sum().sqrt(), weights)
            found.append(torch.cat([g.flatten() for g in gradient]).double())
    assert torch.allclose(found[2], found[3], rtol=1e-9, atol=1e-12 * float(found[2].abs().max()))
    assert all((u - found[2]).norm() / found[2].norm() < 1e-5 for u in found[:2])


def test_no_slope_through_a_batch_norm():
    with says("BatchNorm2d: found in a critic whose slope is held"):
        common.pullback(common.dcgan_critic(3, (4, 8), 5, size=8), torch.rand(2, 3, 8, 8))


def test_batch_norm_has_no_memory():
    """Samples are the same before and after another batch, and in training and evaluation mode."""
    g, z = common.dcgan_generator(16, (32, 16, 8), 3), torch.randn(20, 16)
    before, _ = g(z), g(torch.randn(50, 16) * 3)
    assert torch.equal(g(z), before) and torch.equal(g.eval()(z), before)


def test_initialisation():
    torch.manual_seed(0)
    for network in (common.dcgan_generator(128, (128, 64, 32), 3), common.dcgan_critic(3, (32, 64, 128), 99)):
        for layer in network:
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                assert layer.weight.abs().max() <= 0.04 and 0.016 < layer.weight.std() < 0.019   # cut off
            if isinstance(layer, nn.Linear):
                assert layer.weight.abs().max() > 0.06 and 0.0195 < layer.weight.std() < 0.0205
            if not isinstance(layer, nn.BatchNorm2d) and getattr(layer, "bias", None) is not None:
                assert layer.bias.abs().max() == 0


def test_average_by_hand():
    """After t calls the weight of p_s is w_s times what all later calls have left of it: close to s^eta."""
    network = nn.Linear(1, 1, bias=False)
    values = torch.randn(50).tolist()
    for eta in (0, 3):
        average = common.Average(network, eta)
        for value in values:
            network.weight.data.fill_(value)
            average.follow(network)
        weight = torch.ones(50, dtype=torch.float64)
        for j in range(eta):
            weight *= torch.arange(1, 51) + j                   # s (s + 1) ... (s + eta - 1)
        mean = (weight * torch.tensor(values)).sum() / weight.sum()
        assert average(torch.ones(1, 1)).item() == pytest.approx(float(mean), abs=1e-5)
        assert not average(torch.ones(1, 1)).requires_grad and network.weight.requires_grad


def test_contrast():
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(40, 200, (30, 3, 8, 8), dtype=torch.uint8, generator=rng)
    images[:, 1] //= 2
    contrast, x = common.Contrast(images), images.float() / 255
    mean = x.mean((0, 2, 3), keepdim=True)
    assert torch.allclose(contrast.mean, mean[0], atol=1e-6)
    assert contrast.std == pytest.approx(float((x - mean).square().mean().sqrt()))
    b = torch.tensor([-0.3, 0.1, 0.2]).view(3, 1, 1)
    assert torch.allclose(contrast(x), x, atol=1e-5) and torch.allclose(contrast(0.3 * x + b), x, atol=1e-5)
    assert contrast(torch.zeros(4, 3, 8, 8)).isfinite().all()


# ---- 160x160 and 64x64 ------------------------------------------------------------------------------------

WIDE = (1024, 512, 256, 128, 64)


def shapes(network, x):
    """The shapes of what each of a network's layers makes of x, without the batch."""
    with torch.no_grad():
        return [tuple((x := layer(x)).shape[1:]) for layer in network]


@pytest.mark.parametrize("size, start", [(160, 5), (64, 4)])
def test_residual_generator(size, start):
    """A linear layer, four blocks, a batch norm and a convolution."""
    g = common.residual_generator(128, WIDE, 3, nn.Sigmoid, size, start)
    sides = [start * 2 ** i for i in range(5)]
    assert shapes(g, torch.rand(2, 128) * 2 - 1) == [
        (1024 * start ** 2,), *((width, side, side) for width, side in zip(WIDE, sides)),
        *[(64, sides[-1], sides[-1])] * 2, *[(3, size, size)] * 2]


def test_residual_critic():
    f = imagenet.residual_critic(3, WIDE[::-1], 1)
    sides = [64, 32, 16, 8, 4]
    assert shapes(f, torch.rand(1, 3, 64, 64)) == [
        (64, 64, 64), *((w, side, side) for w, side in zip(WIDE[::-1], sides)), (1024, 4, 4), (1024, 1, 1),
        (1024,), (1,)]
    g = common.spectral(imagenet.residual_critic(3, (4, 8, 8, 8, 8), 1), True)
    assert [float(s[0]) for s in common.singular_values(g)] == [pytest.approx(1, abs=0.1)] * (1 + 4 * 3 + 1)
    assert sum(name.endswith("gamma") for name, _ in g.named_parameters()) == 14
    assert f[-3](torch.ones(1, 2, 4, 4)).flatten().tolist() == [16, 16]         # a sum, not a mean
    assert sum(isinstance(layer, nn.AvgPool2d) for layer in f.modules()) == 5 and f[1].negative_slope == 0.2


def by_functions(block, x, up):
    """A Residual from its weights, by functions of PyTorch, its shortcut in the papers' order."""
    w = dict(block.named_parameters())

    def norm(t, name):
        return nn.functional.batch_norm(t, None, None, w[f"{name}.weight"], w[f"{name}.bias"], training=True)

    def conv(t, name):
        weight = w[f"{name}.weight"]
        return nn.functional.conv2d(t, weight, w.get(f"{name}.bias"), padding=weight.shape[-1] // 2)

    def double(t):
        return t.repeat_interleave(2, 2).repeat_interleave(2, 3)

    def halve(t):
        return (t[:, :, ::2, ::2] + t[:, :, 1::2, ::2] + t[:, :, ::2, 1::2] + t[:, :, 1::2, 1::2]) / 4

    if up:
        h = norm(conv(double(norm(x, "change.0").relu()), "change.2"), "change.3").relu()
        return conv(h, "change.5") + conv(double(x), "shortcut.0")
    return halve(conv(conv(x.relu(), "change.1").relu(), "change.3")) + halve(conv(x, "shortcut.1"))


@pytest.mark.parametrize("up", [True, False])
def test_a_residual_block_is_its_formula(up):
    """Also where the resizing is part of a convolution: values, gradients."""
    torch.manual_seed(0)
    block, found = common.Residual(5, 7, up, common.batch_norm if up else None).double(), []
    for p in block.parameters():
        p.data.add_(torch.rand_like(p) / 5)
    x = torch.randn(3, 5, 6, 6, dtype=torch.float64, requires_grad=True)
    assert block(x).shape == ((3, 7, 12, 12) if up else (3, 7, 3, 3))
    for y in (block(x), by_functions(block, x, up)):
        found.append([y, *torch.autograd.grad(y.sin().sum(), [x, *block.parameters()], retain_graph=True)])
    for u, v in zip(*found):
        torch.testing.assert_close(u, v, rtol=1e-11, atol=1e-11)


def test_residual_initialisation():
    """Variance 4 / (fan_in + fan_out) with a norm, 2 / (fan_in + fan_out) without and in shortcuts."""
    torch.manual_seed(0)
    for up, norm, gain in ((True, common.batch_norm, 4), (False, None, 2)):
        block = common.Residual(64, 96, up, norm)
        for name, layer in block.named_modules():
            if isinstance(layer, nn.Conv2d):
                out, into, k, _ = layer.weight.shape
                variance = (2 if "shortcut" in name else gain) / ((out + into) * k * k)
                assert float(layer.weight.detach().var()) == pytest.approx(variance, rel=0.05)
                assert layer.weight.abs().max() <= (3 * variance) ** 0.5
                assert layer.bias is None or not layer.bias.any()


@pytest.mark.parametrize("size", [64, 160])
def test_bfloat16_is_near_float32(size, monkeypatch):
    """Values to two digits, slopes and gradients in direction; spectral norms are found in float32."""
    found, lower, iterate = [], [], parametrizations._SpectralNorm.forward
    monkeypatch.setattr(parametrizations._SpectralNorm, "forward", lambda self, weight: lower.append(
        torch.is_autocast_enabled("cpu")) or iterate(self, weight))
    for bfloat16 in (False, True):
        torch.manual_seed(0)
        g = common.residual_generator(8, (16, 12, 8, 8, 8), 3, nn.Sigmoid, size, 4 if size == 64 else 5)
        f = (imagenet.residual_critic(3, (8, 8, 8, 8, 8), 1) if size == 64 else
             common.dcgan_critic(3, (8, 8, 8, 8, 8), 1, 5, (None,), size))
        common.spectral(f, True)
        g.bfloat16 = f.bfloat16 = bfloat16
        x, y = torch.rand(4, 3, size, size), g(torch.rand(4, 8))
        with nn.utils.parametrize.cached():
            h, back = common.pullback(f, x)
            J = common.jacobian(h, back)
            loss = (h - f(y)).mean() / (1 + J.square().sum((1, 2)).mean()).sqrt()
            gradients = torch.autograd.grad(loss, [*g.parameters(), *f.parameters()], allow_unused=True)
        norms = torch.cat([value for name, value in f.named_buffers() if name.endswith("._u")])
        found.append([y, h, J, torch.cat([u.flatten() for u in gradients if u is not None]), norms])
    wanted, near = found
    assert {t.dtype for t in near} == {torch.float32}
    assert torch.equal(wanted[4], near[4]) and len(lower) > 12 and not any(lower)
    assert not torch.equal(near[1], near[1].bfloat16().float())
    assert all(1e-4 < (u - v).abs().max() / u.abs().max() < 2e-2 for u, v in zip(wanted[:2], near))
    assert all(nn.functional.cosine_similarity(u.flatten(), v.flatten(), 0) > 0.97
               for u, v in zip(wanted[2:4], near[2:4]))


# ---- NETS of the scripts ----------------------------------------------------------------------------------

# Noise, the parameters of generator and critic, and the critic's outputs
SIZES = {
    cifar: dict(gram=("uniform", 128, 430019, 428096, 128), weak=("uniform", 128, 430019, 182144, 128),
                li=("normal", 128, 1187715, 1183680, 128), dcgan=("uniform", 100, 4514371, 4339344, 16),
                dcgan16=("uniform", 100, 4514371, 278448, 16), gamn=("normal", 128, 5164163, 4189194, 10),
                wgan=("normal", 128, 5164163, 4115457, 1), sngan=("uniform", 128, 3812931, 5860865, 1),
                gram2=("uniform", 128, 1187715, 1183744, 128), gram4=("uniform", 128, 3686147, 3678080, 128),
                gram8=("uniform", 128, 12615171, 12598912, 128), plain4=("uniform", 128, 3686147, 2636673, 1),
                gmmn=("uniform", 10, 3495104, 0, 0)) | {
        "wgan-gp": ("normal", 128, 5164163, 4114689, 1), "gmmn-ae": ("uniform", 10, 379104, 3179552, 0)},
    mnist: dict(gram=("uniform", 100, 1529984, 43028, 100), dcgan=("uniform", 128, 4568513, 4305409, 1),
                dcgan16=("uniform", 100, 4511169, 277648, 16), gamn=("normal", 128, 1554881, 1067402, 10),
                wgan=("normal", 128, 1554881, 1030529, 1), gmmn=("uniform", 10, 1149904, 0, 0)) | {
        "wgan-gp": ("normal", 128, 1554881, 1030145, 1), "gmmn-ae": ("uniform", 10, 379104, 836640, 0)},
    celeba: dict(scaled=("uniform", 128, 13411651, 17440385, 1),
                 resnet=("uniform", 100, 12694851, 17824400, 16),
                 gram=("uniform", 128, 1219011, 1215040, 128), li=("normal", 64, 3289987, 3281792, 64),
                 dcgan=("uniform", 100, 5134915, 4437648, 16), dcgan16=("uniform", 100, 5134915, 303024, 16),
                 gamn=("normal", 128, 5364291, 4389386, 10), wgan=("normal", 128, 5364291, 4315649, 1)) | {
        "wgan-gp": ("normal", 128, 5364291, 4314753, 1)},
    imagenet: dict(scaled=("uniform", 128, 12219715, 10104257, 1))}


@pytest.mark.parametrize("script", SIZES, ids=lambda script: script.__name__)
def test_networks_at_full_size(script):
    """And every row has networks that check_row allows, as none has a slope through a batch norm."""
    side = {mnist: 28, cifar: 32}.get(script, 64)
    tables = script.METHODS.values() if script is celeba else [script.METHODS]
    assert SIZES[script].keys() == script.NETS.keys()
    for name, (law, z, g, f, out) in SIZES[script].items():
        size = [160 if name in ("scaled", "resnet") else 64] if script is celeba else []
        with torch.device("meta"):
            for row in (script.DEFAULTS | row for table in tables for row in table.values()):
                script.networks(row, *size) if row["nets"] == name else None
            built = script.networks(script.DEFAULTS | dict(nets=name, critic=out, loss="mmd"), *size)
            image = torch.rand(2, 1 if script is mnist else 3, *[*size, side][:1] * 2)
            assert name == "gmmn-ae" or shapes(built[0], torch.rand(2, z))[-1] == image.shape[1:], name
            assert not out or shapes(built[1], image)[-1] == (out,), name
        assert (count(built[0]), count(built[1])) == (g, f), name
        assert script.NETS[name]["noise"] is getattr(common, f"{law}_noise") and script.NETS[name]["z"] == z
