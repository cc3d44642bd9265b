"""The image scripts through their command lines, small: rows, first updates, scores, resuming, bad input."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import celeba
import cifar
import common
import imagenet
import mnist
from conftest import export, kept, same, says

ROOT = os.path.dirname(os.path.abspath(common.__file__))
SMALL = dict(SAMPLES=20, FINAL=20, KEEP=10, BOOTSTRAP=20, LOG_EVERY=2, SCORE_EVERY=4, SAVE_EVERY=2, BURST=2,
             BURST_UNTIL=1, CODES=20, ADAPT_EVERY=2, ADAPT=(1, 1, -1.0, 1e-6), ENCODE=2, LENET_EPOCHS=1,
             LENET_BATCH=20, SHOWN=10, PANELS=(2, 4))
ROWS = ["gram+batch=9", "gan+batch=9", "mmdnet+batch=9", "mmdgan+batch=9", "cramer+critic=4", "gamn",
        "gamn-l1", "mmd-rqdot+nets=dcgan16+slope=columns", "gmmn-ae+batch=9", "wgan", "sn-smmd", "sobolev",
        "sn-gan"]


def narrow(nets):
    """A description of networks with widths of 8 or so."""
    small = dict(nets, z=8, **{key: (12, *[8] * (len(nets[key]) - 1)) for key in ("g", "f") if key in nets})
    small |= dict(width=4) if "width" in nets else {}
    if "mlp" in nets:
        small["mlp"] = (12, 8) if "encoder" in nets else (12, nets["mlp"][-1])
        small |= dict(encoder=(nets["encoder"][0], 12, 8)) if "encoder" in nets else {}
    return small | (dict(pooled=(4, 4, 4)) if "pooled" in nets else {})


def offline(*args, **kwargs):
    raise urllib.error.URLError("no network")


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """The scripts with small constants and networks, few images, and a folder of their own to work in."""
    for script in (cifar, mnist, celeba, imagenet):
        for name, value in SMALL.items():
            if hasattr(script, name):
                monkeypatch.setattr(script, name, value)
        monkeypatch.setattr(script, "NETS", {key: narrow(nets) for key, nets in script.NETS.items()})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    rng = np.random.default_rng(0)
    os.mkdir("data")
    for name, shape in (("cifar10", (3, 32, 32)), ("mnist", (1, 28, 28)), ("celeba64", (3, 64, 64)),
                        ("imagenet64", (3, 64, 64)), ("celeba178", (3, 178, 178)), ("lsun64", (3, 64, 64))):
        for split, n in (("train", 60), ("test", 30), ("val", 30)):
            np.save(f"data/{name}-{split}.npy", rng.integers(0, 256, (n, *shape), np.uint8))
            np.save(f"data/{name}-{split}-labels.npy", rng.integers(0, 10, n).astype(np.uint8))


def run(script, *flags, features=True):
    given = ["--features", export("features-tiny.pt2")] if features else []
    script.main(["--device", "cpu", *given, *map(str, flags)])


def result(folder):
    return json.load(open(f"runs/{folder}/result.json"))


def steps_of(folder, name):
    """How many steps an optimizer has made."""
    found = kept(f"runs/{folder}")[1].items()
    return {float(t) for path, t in found if path[0] == name and path[-1] == "step"}


# ---- rows -------------------------------------------------------------------------------------------------


def test_rows_of_cifar(capsys):
    run(cifar, "--method", *ROWS, "--steps", 4)
    printed = capsys.readouterr().out
    for text in ROWS:
        name, row = cifar.row_of(text)
        folder, f = f"runs/cifar-{name}-s0", row["critic"] or "ae" in name
        assert sorted(os.listdir(folder)) == [
            "checkpoint.pt", "cifar.py", "common.py", "log.csv", "result.json", "samples-4.png",
            "samples.npy", *(["singular-4.npz"] if f else [])]
        assert np.load(f"{folder}/samples.npy").std() > 1
        log, found = common.read_log(folder), result(folder[5:])
        assert log["step"].tolist() == [2, 4] and np.isfinite(log["loss_g"]).all()
        assert np.isfinite(log["mean_r"]).all() == (row["loss"] == "gram")
        assert (found["method"], found["updates"], found["samples"]) == (name, 4, 20) and found["fd"] >= 0
        assert found["row"] == json.loads(json.dumps(row)) and found["command"].startswith("python ")
        critic = 5 * 4 if row["critic_steps"] == 5 and not row["burst"] else 4 * row["critic_steps"]
        critic = {"gram": 4, "mmdgan": 2 + 3 * 5, "gmmn-ae": 2}.get(text.split("+")[0], critic)
        assert steps_of(folder[5:], "opt_g") == {4.0}
        assert steps_of(folder[5:], "opt_f") == ({float(critic)} if f else set()), name
        torch.manual_seed(0)
        for key, network in zip(("g", "players.f", "players.decoder"), cifar.networks(row)):
            for weight, p in network.named_parameters() if network else ():
                first, *rest = key.split(".")
                moved = kept(folder)[1][first, ".".join([*rest, weight])]
                assert not torch.equal(moved, p) or "mmd" in row["loss"] or len(p) == 1, (name, weight)
    assert "26.82 ± 0.49" not in printed and "| gan+batch=9 " in printed
    assert os.path.exists("runs/cifar-curves.png")


@pytest.mark.parametrize("script, flags, folder", [
    (mnist, ["gram", "gcmmd+batch=8"], "mnist-gcmmd+batch=8"),
    (imagenet, ["sn-smmd+batch=4"], "imagenet-sn-smmd+batch=4"),
    (celeba, ["sn-smmd+batch=4"], "celeba-celeba160-sn-smmd+batch=4"),
    (celeba, ["gram", "--set", "celeba64"], "celeba-celeba64-gram"),
    (celeba, ["cramer+critic=4", "--set", "lsun"], "celeba-lsun-cramer+critic=4")])
def test_rows_of_the_others(script, flags, folder):
    run(script, "--steps", 4, "--method", *flags)
    found, log = result(f"{folder}-s0"), common.read_log(f"runs/{folder}-s0")
    assert found["fd"] >= 0 and np.isfinite(log["loss_g"]).all()
    assert steps_of(f"{folder}-s0", "opt_g") == {4.0}
    if found["row"]["decay"]:           # each test of the rates fails
        assert log["lr_g"][-1] == pytest.approx(found["row"]["lr"] * found["row"]["decay"])
    if script is mnist:
        assert os.path.exists("runs/mnist-gram-s0/figure8.png")


# ---- first updates ----------------------------------------------------------------------------------------


def images_seen(script, monkeypatch, text, set_=None):
    """What critic and generator of a run's first update are given."""
    seen, both = [], common.both
    monkeypatch.setattr(common, "both", lambda f, x, y, *rest: seen.append((x, y)) or both(f, x, y, *rest))
    flags = ["--set", set_] if set_ else []
    run(script, "--method", text, "--steps", 1, *flags, features=False)
    return seen


@pytest.mark.parametrize("script, text, set_, low", [
    (cifar, "gram", None, -1), (cifar, "wgan-gp+nets=dcgan16", None, 0), (mnist, "gram", None, 0),
    (imagenet, "gram", None, 0), (celeba, "gram", "celeba64", -1), (celeba, "wgan-gp", "lsun", 0),
    (celeba, "wgan-gp", "celeba160", 0)])
def test_pixels_of_data_and_samples(script, text, set_, low, monkeypatch):
    """Data in the range of the generator's last layer, crops of the images, mirrored or not."""
    (x, y), *_ = images_seen(script, monkeypatch, text, set_)
    assert low <= float(x.min()) < low + 0.01 * (1 - low) and 1 - 0.01 * (1 - low) < float(x.max()) <= 1
    assert low <= float(y.detach().min()) and float(y.detach().max()) <= 1 and x.shape == y.shape
    name = {"cifar": "cifar10", "mnist": "mnist", "imagenet": "imagenet64"}.get(script.__name__)
    name = name or {"celeba160": "celeba178", "celeba64": "celeba64", "lsun": "lsun64"}[set_]
    data = torch.from_numpy(np.load(f"data/{name}-train.npy")).float() / 255
    x = (x - low) / (1 - low)
    for image in x[:4]:
        side, places = image.shape[-1], []
        for flipped in (image, image.flip(2)):
            for top in range(data.shape[2] - side + 1):
                for left in range(data.shape[3] - side + 1):
                    gap = (data[:, :, top, left:left + 8] - flipped[:, 0, :8]).abs().amax((1, 2))
                    places += [i for i in range(len(data)) if gap[i] < 1e-5]
        assert places


def test_first_update_of_gram_by_hand():
    """Simultaneous play: one batch, eq. 9 with p and q exchanged and the MMD, one step of Adam for each."""
    run(cifar, "--method", "gram+batch=16", "--steps", 1, features=False)
    name, row = cifar.row_of("gram+batch=16")
    _, tensors, _ = kept(f"runs/cifar-{name}-s0")
    images = torch.from_numpy(np.load("data/cifar10-train.npy"))
    torch.manual_seed(0)
    g, f, _ = cifar.networks(row)
    rng = torch.Generator().manual_seed(0)
    x = images[torch.randint(60, (16,), generator=rng)].float()
    x = torch.where(torch.rand(16, 1, 1, 1, generator=rng) < 0.5, x.flip(3), x) / 127.5 - 1
    h_x, h_y = f(x), f(g(torch.rand(16, 8, generator=rng) * 2 - 1))

    def k(u, v):
        d = torch.cdist(u.double(), v.double()) ** 2
        return torch.stack([torch.exp(-d / (2 * s * s)) for s in (1, 2, 4, 8, 16)])

    r = torch.linalg.solve(k(h_x, h_x) + torch.eye(16), k(h_x, h_y).sum(2, keepdim=True)).squeeze(2).mean(0)
    loss_f = -((r - 1) ** 2).mean() - r.sum()
    loss_g = (k(h_x, h_x).mean((1, 2)) + k(h_y, h_y).mean((1, 2)) - 2 * k(h_x, h_y).mean((1, 2))).sum()
    gradients = [torch.autograd.grad(loss, list(n.parameters()), retain_graph=True)
                 for n, loss in ((f, loss_f), (g, loss_g))]
    for key, gradient in zip(("opt_f", "opt_g"), gradients):
        largest = max(float(slope.abs().max()) for slope in gradient)
        for i, slope in enumerate(gradient):
            first, second = (tensors[key, "state", i, what] for what in ("exp_avg", "exp_avg_sq"))
            assert float((first - 0.5 * slope).abs().max()) < 1e-3 * largest, (key, i)
            assert float((second - 0.001 * slope ** 2).abs().max()) < 1e-5 * largest ** 2


def test_the_critic_plays_first_and_is_clipped(monkeypatch):
    """MMD-GAN: BURST steps of the critic on samples of the old generator, then one of the generator."""
    calls = []
    for what in ("critic_loss", "generator_loss"):
        def watched(row, *given, call=getattr(cifar, what), what=what):
            calls.append(what)
            return call(row, *given)
        monkeypatch.setattr(cifar, what, watched)
    run(cifar, "--method", "mmdgan+batch=9", "--steps", 2, features=False)
    assert calls == ["critic_loss"] * 2 + ["generator_loss"] + ["critic_loss"] * 5 + ["generator_loss"]
    weights = {path: t for path, t in kept("runs/cifar-mmdgan+batch=9-s0")[1].items() if path[0] == "players"}
    assert all(t.abs().max() <= 0.01 for path, t in weights.items() if path[1].startswith("f."))
    assert any(t.abs().max() > 0.011 for path, t in weights.items() if path[1].startswith("decoder."))


@pytest.mark.parametrize("script", [cifar, mnist])
def test_the_autoencoder_of_gmmn(script, monkeypatch):
    """It trains with a batch of 100 and dropout, before the generator; then it stays, without dropout."""
    seen, loss = [], script.critic_loss
    monkeypatch.setattr(script, "critic_loss", lambda row, f, d, k, x, *rest: seen.append(
        (len(x), f.training)) or loss(row, f, d, k, x, *rest))
    generator = script.generator_loss
    monkeypatch.setattr(script, "generator_loss", lambda row, f, *rest: seen.append(f.training)
                        or generator(row, f, *rest))
    run(script, "--method", "gmmn-ae+batch=9", "--steps", 2, features=False)
    assert seen == [(100, True)] * 2 + [False] * 2


@pytest.mark.parametrize("script, text, flags", [
    (cifar, "sn-smmd+batch=4", []), (mnist, "sn-smmd+batch=4", []), (celeba, "sn-smmd+batch=4", [])])
def test_tests_of_the_rates_and_spectral_norms(script, text, flags, monkeypatch):
    """Fresh samples of the generator as it is at each test; one power iteration a step of a player."""
    seen, step = [], common.AdaptiveRate.step
    monkeypatch.setattr(common.AdaptiveRate, "step", lambda self, y: seen.append(y) or step(self, y))
    norms, forward = [], nn.utils.parametrizations._SpectralNorm.forward
    monkeypatch.setattr(nn.utils.parametrizations._SpectralNorm, "forward",
                        lambda self, w: (norms.append(1) if self.training else 0) or forward(self, w))
    noise = []
    for kind in ("uniform_noise", "normal_noise"):
        draw = getattr(common, kind)

        def watched(n, dim, rng, draw=draw):
            noise.append((n, rng.initial_seed()))
            return draw(n, dim, rng)
        monkeypatch.setattr(common, kind, watched)
    monkeypatch.setattr(script, "NETS", {key: dict(nets, noise=lambda *given: common.uniform_noise(*given))
                                         for key, nets in script.NETS.items()})
    run(script, "--method", text, "--steps", 4, *flags)
    assert len(seen) == 2 and {(20, 2), (20, 4)} <= set(noise)
    folder = next(name for name in os.listdir("runs") if os.path.isdir(f"runs/{name}"))
    layers = sum(path[-1].endswith("._u") for path in kept(f"runs/{folder}")[1])
    assert len(norms) == layers * (4 * 6 + 4)           # 4: as two critics are built
    if script is cifar:
        run(script, "--method", text, "--steps", 2, "--out", "without", *flags, features=False)
        assert json.load(open(f"without/{folder}/result.json"))["updates"] == 2


def test_samples_are_of_averaged_weights_with_the_contrast_of_the_data():
    run(cifar, "--method", "gram+batch=9", "gram+average=0+contrast=0+batch=9", "--steps", 4, features=False)
    images = np.load("data/cifar10-train.npy") / 255
    for name, adjusted in (("gram+batch=9", True), ("gram+batch=9+average=0+contrast=0", False)):
        y = np.load(f"runs/cifar-{name}-s0/samples.npy") / 255
        assert (abs(y.std() - images.std()) < 0.1) == adjusted
        state = {path: t for path, t in kept(f"runs/cifar-{name}-s0")[1].items()}
        assert (("average", "network.0.weight") in state) == adjusted
        if adjusted:
            assert float(state["average", "t"]) == 4
            assert not torch.equal(state["average", "network.0.weight"], state["g", "0.weight"])


# ---- going on ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script, text, flags", [
    (cifar, "gram+decay=0.5+batch=9", []), (cifar, "mmdgan+batch=9", []), (cifar, "gmmn-ae+batch=9", []),
    (cifar, "sobolev+batch=4", []), (mnist, "gram+batch=9", []), (imagenet, "sn-smmd+batch=4", []),
    (celeba, "sn-smmd+batch=4", ["--set", "celeba160"])])
def test_resumed_equals_uninterrupted(script, text, flags, capsys, monkeypatch):
    monkeypatch.setattr(script, "SCORE_EVERY", 2)
    for steps, out in ((6, "whole"), (2, "parts"), (6, "parts")):
        run(script, "--method", text, "--steps", steps, "--out", out, "--resume", *flags)
    folder = next(name for name in os.listdir("whole") if os.path.isdir(f"whole/{name}"))
    assert same(f"whole/{folder}", f"parts/{folder}") and "goes on at update 2" in capsys.readouterr().out


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
def test_stopped_and_resumed(ending):
    """A real process; the uninterrupted run has the same weights, bit for bit."""
    paths = [ROOT, os.path.join(ROOT, "tests")]
    driver = (f"import sys; sys.path[:0] = {paths!r}; import cifar, common, torch\n"
              "from test_images import SMALL, narrow\n"
              "for name, value in SMALL.items(): hasattr(cifar, name) and setattr(cifar, name, value)\n"
              "cifar.NETS = {key: narrow(nets) for key, nets in cifar.NETS.items()}\n"
              "torch.set_num_threads(1); common.run(cifar.main)")
    given = [sys.executable, "-c", driver, "--device", "cpu", "--method", "gram+batch=9", "--features",
             export("features-tiny.pt2"), "--steps"]
    process = subprocess.Popen([*given, "100000"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               text=True)
    path = "runs/cifar-gram+batch=9-s0/checkpoint.pt"
    while not os.path.exists(path):
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(ending)
    said, code = process.communicate()[1], process.wait()
    if ending == signal.SIGTERM:
        assert code == 143 and "the same command goes on with --resume" in said and "Traceback" not in said
    step = torch.load(path, weights_only=True)["step"]
    run(cifar, "--method", "gram+batch=9", "--steps", step + 3, "--resume")
    run(cifar, "--method", "gram+batch=9", "--steps", step + 3, "--out", "whole")
    assert same("runs/cifar-gram+batch=9-s0", "whole/cifar-gram+batch=9-s0")


def test_a_run_that_diverges_and_a_network_that_fails_end_alone(monkeypatch, capsys):
    run(cifar, "--method", "gan+batch=9+lr=1e30", "gan+batch=9", "--steps", 4)
    printed = capsys.readouterr().out
    assert "diverged at update" in printed and result("cifar-gan+batch=9-s0")["updates"] == 4
    assert "failed" in result("cifar-gan+lr=1e+30+lr_g=0+batch=9-s0")
    assert "| 0 of 1; seed 0 diverged" in printed
    calls, call = [], common.Features.__call__

    def fails(self, images):
        calls.append(1)
        if len(calls) == 1:
            raise common.RunError("no more")
        return call(self, images)
    run(cifar, "--method", "gan+batch=9", "--steps", 1, "--out", "else")        # builds the reference
    monkeypatch.setattr(common.Features, "__call__", fails)
    run(cifar, "--method", "gan+batch=9", "mmdnet+batch=9", "--steps", 4, "--out", "fails")
    ends = [json.load(open(f"fails/cifar-{name}+batch=9-s0/result.json")) for name in ("gan", "mmdnet")]
    assert sorted("failed" in end for end in ends) == [False, True]


def test_a_weight_that_is_not_finite_is_not_kept(monkeypatch):
    descend = common.descend

    def spoilt(*players):
        descend(*players)
        weight = players[1][0].param_groups[0]["params"][0]
        if players[1][0].state[weight]["step"] == 4:
            weight.data.fill_(torch.nan)
    monkeypatch.setattr(common, "descend", spoilt)
    with says("no run finished"):
        run(cifar, "--method", "gram+batch=9", "--steps", 4, features=False)
    step, tensors, _ = kept("runs/cifar-gram+batch=9-s0")
    assert step == 2 and all(t.isfinite().all() for t in tensors.values() if t.is_floating_point())


# ---- scores, tables, figures ------------------------------------------------------------------------------


def test_scores_are_those_of_the_samples(capsys):
    run(cifar, "--method", "gan+batch=9", "--steps", 2, features=False)
    assert "not scored" in capsys.readouterr().out and "fd" not in result("cifar-gan+batch=9-s0")
    before = kept("runs/cifar-gan+batch=9-s0")
    run(cifar, "--method", "gan+batch=9", "--steps", 2, "--resume")
    found = result("cifar-gan+batch=9-s0")
    again = common.score_files("runs/cifar-gan+batch=9-s0/samples.npy", "data/cifar10-test.npy",
                               "features-tiny.pt2", "cpu")
    assert found["fd"] == pytest.approx(again["fd"]) and found["kid"] == pytest.approx(again["kid"])
    assert torch.equal(before[1]["g", "0.weight"], kept("runs/cifar-gan+batch=9-s0")[1]["g", "0.weight"])


@pytest.mark.parametrize("script, flags, made", [
    (cifar, ["--figure", "scores", "--method", "gan+batch=9"], "cifar-figurescores.png"),
    (cifar, ["--figure", "singular", "--method", "gan+batch=9"], "cifar-figuresingular.png"),
    (cifar, ["--figure", "neighbours", "--method", "gan+batch=9"], "cifar-figureneighbours.png"),
    (cifar, ["--figure", "5", "--method", "gram+batch=16", "gram+batch=32"], "cifar-figure5.png"),
    (mnist, ["--figure", "gcmmd", "--method", "gcmmd+batch=4"], "mnist-figuregcmmd.png"),
    (celeba, ["--figure", "scores", "--method", "sn-gan+batch=4"], "celeba-figurescores.png")])
def test_figures(script, flags, made, capsys):
    run(script, "--steps", 2, *flags)
    assert os.path.exists(f"runs/{made}"), os.listdir("runs")
    capsys.readouterr()
    run(script, "--steps", 2, *flags)
    assert "goes on at update 2" in capsys.readouterr().out      # nothing is trained again


def test_figures_of_the_scores(monkeypatch, capsys):
    few = {kind: levels[:2] for kind, levels in cifar.DISTURBANCES.items()}
    for name, value in dict(ESTIMATES=3, KID_N=(5, 10), FID_N=(5, 10), CENSORED=4, CENSORED_M=(20, 40),
                            DISTURBANCES=few).items():
        monkeypatch.setattr(cifar, name, value)
    for figure in ("bias", "noise"):
        run(cifar, "--figure", figure)
    printed = capsys.readouterr().out
    assert "KID of training and test images" in printed and "contamination" in printed


def test_tables(monkeypatch, capsys):
    monkeypatch.setattr(cifar, "TABLES", {"gram": (30, {"gan+batch=9": "5.13, 26.82 ± 0.49"})})
    monkeypatch.setattr(cifar, "PAPER", {"gan+batch=9": "5.13, 26.82 ± 0.49"})
    run(cifar, "--table", "gram", "--steps", 2)
    assert "5.13, 26.82 ± 0.49" in capsys.readouterr().out and result("cifar-gan+batch=9-s0")["samples"] == 30


# ---- bad input --------------------------------------------------------------------------------------------


def test_bad_input():
    with says("gramm", "did you mean gram?"):
        cifar.main(["--method", "gramm"])
    with says("critc", "did you mean critic?"):
        cifar.main(["--method", "gram+critc=8"])
    with says("expected +critic"):
        run(cifar, "--method", "gram+critic=0", features=False)
    with says("nosuch.pt2", "cannot be loaded"):
        cifar.main(["--device", "cpu", "--features", "nosuch.pt2"])
    with says("--figure bias needs a feature network"):
        run(cifar, "--figure", "bias", features=False)
    run(cifar, "--method", "gan+batch=9", "--steps", 1, features=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cifar.CONSTANTS, "BURST", 9)
        with says("checkpoint.pt", "BURST = ", "expected 9", "--out"):
            run(cifar, "--method", "gan+batch=9", "--steps", 2, "--resume", features=False)
    shutil.rmtree("data")
    with says("cifar10-train.npy", "--data"), pytest.MonkeyPatch.context() as patch:
        patch.setitem(common.SETS, "cifar10", offline)
        cifar.main(["--device", "cpu"])
    with says("img_align_celeba"):
        celeba.main(["--device", "cpu"])


def test_a_copied_script_runs_and_says_errors_in_a_line(tmp_path):
    for name in ("cifar.py", "common.py"):
        shutil.copy(f"{ROOT}/{name}", tmp_path)
    nowhere = dict(TORCH_HOME="none", http_proxy="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9")
    given = ["cifar.py", "--device", "cpu", "--steps", "2", "--method", "mmdnet+batch=4"]
    done = subprocess.run([sys.executable, *given], capture_output=True, text=True,
                          env=dict(os.environ, OMP_NUM_THREADS="1", **nowhere))
    assert done.returncode == 0 and "not scored" in done.stdout, done.stderr
    done = subprocess.run([sys.executable, "cifar.py", "--method", "nosuch"], capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("cifar.py: --method")


@pytest.mark.parametrize("script", [cifar, mnist, celeba, imagenet])
def test_help(script, capsys):
    with pytest.raises(SystemExit) as end:
        script.main(["--help"])
    text = capsys.readouterr().out
    rows = [name for rows in script.METHODS.values() for name in rows] if script is celeba else script.METHODS
    assert end.value.code == 0 and len(text.splitlines()) <= 70 and all(name in text for name in rows)


def test_lenet_is_trained_once():
    first = mnist.load_lenet("data", torch.device("cpu"))
    made = os.path.getmtime("data/features-lenet.pth")
    again = mnist.load_lenet("data", torch.device("cpu"))
    images = torch.from_numpy(np.load("data/mnist-test.npy"))
    assert os.path.getmtime("data/features-lenet.pth") == made
    assert all(torch.equal(a, b) for a, b in zip(first(images), again(images)))
    np.save("data/mnist-train-labels.npy", np.zeros(7, np.uint8))
    os.remove("data/features-lenet.pth")
    with says("labels"):
        mnist.load_lenet("data", torch.device("cpu"))


def test_splits_of_folders():
    files = [f"x/{n:06d}.jpg" for n in (1, 162_770, 162_771, 182_638, 202_599, 202_600)] + ["x/odd.jpg"]
    for name in files:
        os.makedirs("data/celeba/img_align_celeba", exist_ok=True)
        Image.new("RGB", (178, 218)).save(f"data/celeba/img_align_celeba/{os.path.basename(name)}")
    for split in ("train", "test"):
        os.remove(f"data/celeba178-{split}.npy")
    images, path = celeba.load_set("celeba160", "data")
    assert len(images) == 2 and np.load(path).shape == (2, 3, 178, 178)
