"""Networks: shapes, the parameter counts that the paper's tables imply, batch norm, initialisation."""
import pytest
import torch
from torch import nn

import common
from common import count


def test_generator_of_table_5():
    g = common.dcgan_generator(128, (128, 64, 32), 3)
    y = g(torch.rand(4, 128) * 2 - 1)
    assert y.shape == (4, 3, 32, 32) and y.abs().max() <= 1
    linear, filters, norms = 128 * 2048 + 2048, 16 * (128 * 64 + 64 * 32 + 32 * 3), 2 * (128 + 64 + 32)
    assert count(g) == linear + filters + norms + 3         # 3: the biases of the last layer
    kinds = [type(layer).__name__ for layer in g]
    assert kinds[:2] == ["Linear", "Unflatten"] and kinds[-2:] == ["ConvTranspose2d", "Tanh"]
    assert kinds[2:-1] == ["BatchNorm2d", "ReLU", "ConvTranspose2d"] * 3


def test_critics_of_tables_6_and_7():
    x = torch.rand(4, 3, 32, 32)
    for widths, out in (((32, 64, 128), 128), ((32, 32, 64), 128), ((32, 64, 128), 1)):
        f = common.dcgan_critic(3, widths, out)
        assert f(x).shape == (4, out)
        filters = 16 * sum(a * b for a, b in zip((3, *widths), widths))
        assert count(f) == filters + 2 * sum(widths) + widths[-1] * 16 * out + out
        kinds = [type(layer).__name__ for layer in f]
        assert kinds == ["Conv2d", "BatchNorm2d", "LeakyReLU"] * 3 + ["Flatten", "Linear"]
    assert f[2].negative_slope == 0.2


def test_networks_of_the_other_papers():
    """Each once at full size, with the parameters that its source implies."""
    z, x = torch.rand(2, 128), torch.rand(2, 3, 32, 32)
    g = common.dcgan_generator(128, (512, 256, 128, 64), 3, kernel=5, last=nn.Sigmoid)
    assert g(z).shape == x.shape and 0 <= g(z).min() and g(z).max() <= 1
    filters = 25 * (512 * 256 + 256 * 128 + 128 * 64 + 64 * 3)
    assert count(g) == 129 * 2048 + filters + 2 * (512 + 256 + 128 + 64) + 3
    f = common.dcgan_critic(3, (16, 32, 64, 128), 16, kernel=5, norms=(None, None))
    assert f(x).shape == (2, 16)
    assert count(f) == 25 * (3 * 16 + 16 * 32 + 32 * 64 + 64 * 128) + 240 + (128 * 4 + 1) * 16
    f = common.dcgan_critic(3, (128, 256, 512), 10, kernel=5, norms=(None, common.layer_norm))
    assert f(x).shape == (2, 10)
    assert [type(layer).__name__ for layer in f][:6] == ["Conv2d", "LeakyReLU", "Conv2d", "GroupNorm",
                                                         "LeakyReLU", "Conv2d"]
    f = common.dcgan_critic(3, (64, 128, 256), 128, norms=(None, common.batch_norm))
    assert count(f) == 16 * (3 * 64 + 64 * 128 + 128 * 256) + 64 + 2 * (128 + 256) + 4097 * 128
    g, f = common.sngan_generator(128, 3), common.sngan_critic(3, 1)
    assert g(z).shape == x.shape and 0 <= g(z).min() and g(z).max() <= 1 and f(x).shape == (2, 1)
    assert sum(isinstance(layer, nn.Conv2d) for layer in f) == 7
    widths = (3, 64, 128, 128, 256, 256, 512, 512)
    filters = sum((16 if i % 2 else 9) * a * b + b for i, (a, b) in enumerate(zip(widths, widths[1:])))
    assert count(f) == filters + 8193


@pytest.mark.parametrize("size, times, sizes", [(28, 4, [28, 14, 7, 4, 2]), (28, 3, [28, 14, 7, 4]),
                                                (9, 2, [9, 5, 3]), (32, 3, [32, 16, 8, 4])])
def test_odd_sizes_are_halved_and_rounded_up(size, times, sizes):
    """In the critic, and in the generator the other way round, at every layer."""
    assert common.halved(size, times) == sizes
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
    f, x = common.pooled_critic(1, (4, 5, 6), 3), torch.rand(7, 1, 28, 28)
    w, h = list(f.parameters()), x
    for i in (0, 3, 6):
        h = nn.functional.conv2d(h, w[i], padding=1)
        var, mean = torch.var_mean(h, (0, 2, 3), correction=0, keepdim=True)
        h = (h - mean) / (var + 1e-5).sqrt()
        h = nn.functional.max_pool2d(h.relu(), 2)
    assert h.shape == (7, 6, 3, 3)
    assert torch.allclose(f(x), h.flatten(1) @ w[9].T + w[10], atol=1e-5)


def test_layer_norm_is_over_the_whole_image():
    x = torch.randn(4, 6, 5, 5)
    expected = nn.functional.layer_norm(x, x.shape[1:])
    assert torch.allclose(common.layer_norm(6)(x), expected, atol=1e-5)


def test_one_channel():
    assert common.dcgan_generator(16, (32, 16, 8), 1)(torch.rand(3, 16)).shape == (3, 1, 32, 32)
    assert common.dcgan_critic(1, (8, 16, 32), 5)(torch.rand(3, 1, 32, 32)).shape == (3, 5)


@pytest.mark.parametrize("norm", [None, common.batch_norm, common.layer_norm])
def test_both_sets_in_one_pass_equal_either_alone(norm):
    """Values, gradients of the weights, and of the samples, with batch norms that see each set apart."""
    torch.manual_seed(0)
    f = common.dcgan_critic(3, (4, 8), 5, norms=(norm, norm), size=8).double()
    assert isinstance(f[0], common.Conv2d) == (norm is not common.batch_norm)
    x, y = torch.rand(2, 6, 3, 8, 8, dtype=torch.float64)
    y = (3 * y - 1).requires_grad_()
    found, wanted = common.both(f, x, y), (f(x), f(y))
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    wheres = [y, *f.parameters()]
    for a, b in zip(*(torch.autograd.grad((h[0].square().sum() - h[1].sin().sum()), wheres)
                      for h in (found, wanted))):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kernel, stride, padding, size",
                         [(4, 2, 1, 8), (5, 2, 2, 8), (3, 1, 1, 5), (5, 2, 2, 7)])
def test_convolution_and_its_gradients_equal_pytorch_s(kernel, stride, padding, size):
    """First derivatives, and the slope's in the weights, which PyTorch takes another way."""
    torch.manual_seed(0)
    ours = common.Conv2d(3, 4, kernel, stride, padding).double()
    layer = torch.nn.Conv2d(3, 4, kernel, stride, padding).double()
    layer.load_state_dict(ours.state_dict())
    x, found = torch.rand(2, 3, size, size, dtype=torch.float64, requires_grad=True), []
    for conv in (ours, layer):
        y = conv(x).tanh()
        first = torch.autograd.grad(y.square().sum(), [x, *conv.parameters()], retain_graph=True)
        slope, = torch.autograd.grad(y.sum(), x, create_graph=True)
        found.append([y, *first, slope, *torch.autograd.grad(slope.square().sum(), [x, *conv.parameters()])])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_batch_norm_has_no_memory():
    """Samples are the same before and after another batch, and in training and evaluation mode."""
    g, z = common.dcgan_generator(16, (32, 16, 8), 3), torch.randn(20, 16)
    before = g(z)
    g(torch.randn(50, 16) * 3)
    assert torch.equal(g(z), before) and torch.equal(g.eval()(z), before)
    assert not any("running" in name for name in g.state_dict())


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
    contrast = common.Contrast(3).fit(images)
    x = images.float() / 127.5 - 1
    mean = x.mean((0, 2, 3), keepdim=True)
    assert torch.allclose(contrast.mean, mean[0], atol=1e-6)
    assert float(contrast.std) == pytest.approx(float((x - mean).square().mean().sqrt()))
    assert torch.allclose(contrast(x), x, atol=1e-5)
    b = torch.tensor([-0.3, 0.1, 0.2]).view(3, 1, 1)
    assert torch.allclose(contrast(0.3 * x + b), x, atol=1e-5)
    assert contrast(torch.zeros(4, 3, 8, 8)).isfinite().all()


def test_what_a_critic_cannot_see():
    """f(a x + b) = f(x) within a batch, but for the border (and batch norm's eps): what Contrast sets."""
    f = common.dcgan_critic(3, (32, 64, 128), 8).requires_grad_(False)
    f[0].weight *= 100
    f[0].padding = 0
    f[-1] = nn.LazyLinear(8)
    x = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)) - 0.5
    y, b = f(x), torch.tensor([-0.3, 0.1, 0.2]).view(3, 1, 1)
    assert torch.allclose(f(0.3 * x + b), y, atol=1e-3 * float(y.std()))
    assert float((f(x ** 3) - y).std()) > 0.1 * float(y.std())


def test_mlp():
    network = common.mlp(5, 7, 9, 2)
    assert network(torch.randn(3, 5)).shape == (3, 2)
    assert count(network) == 5 * 7 + 7 + 7 * 9 + 9 + 9 * 2 + 2
    assert [type(layer).__name__ for layer in network] == ["Linear", "ReLU", "Linear", "ReLU", "Linear"]
