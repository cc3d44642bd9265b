"""The image scripts through their command lines, with small networks, few small images, small constants."""
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.nn import functional as F

import celeba
import cifar
import common
import imagenet
import mnist
import ring2d
from conftest import Features, by_hand, export, kept, narrow, same, says

ROOT = os.path.dirname(os.path.abspath(common.__file__))
SMALL = dict(SAMPLES=dict(cpu=20), KEEP=20, BOOTSTRAP=20, RESAMPLINGS=2, LOG_EVERY=2, SCORE_EVERY=4, CODES=20,
             SAVE_EVERY=2, BURST=3, BURST_UNTIL=1, BURST_EVERY=3, ADAPT_EVERY=2, ADAPT=(1, 1, -1.0, 1e-6),
             ENCODE=3, LENET_EPOCHS=1, LENET_BATCH=20, SHOWN=10, PANELS=(2, 4), TRACE_UNTIL=1, TRACE_EVERY=4,
             SIZE=32, ESTIMATES=3, KID_N=(5, 10), FID_N=(5, 10), CENSORED=4, CENSORED_M=(20, 40))
ARRAYS = {"cifar10": (3, 32), "mnist": (1, 28), "celeba64": (3, 32), "imagenet64": (3, 32), "lsun64": (3, 32),
          "celeba178": (3, 36)}         # channels, side
FULL, SET, OFFLINE = cifar.NETS, "--set", Mock(side_effect=urllib.error.URLError("no network"))
ROWS = [        # a script and what it trains side by side: each loss, penalty, kind of networks, optimizer
    (cifar, ["gram+batch=9", "gan+batch=9", "gan+nets=weak+lr=1e30+batch=9", "gamn-mmd+batch=9",
             "mmdnet+batch=9+average=0+contrast=0", "mmdgan+batch=9+autoencoder=7", "gamn-l1+batch=9",
             "gmmn-ae+batch=9", "wgan+batch=9", "cramer+critic=4+batch=9", "sn-swgan+batch=9",
             "mmd-rqdot+nets=dcgan16+slope=columns+batch=9", "sobolev+batch=9", "sn-gan+batch=9"]),
    (mnist, ["gram+batch=9", "gcmmd+batch=9", "wgan+batch=9"]), (imagenet, ["sn-smmd+batch=9", "gram"]),
    (celeba, ["sn-smmd+batch=9", SET, "celeba160"]), (celeba, ["cramer+critic=4+batch=9", SET, "lsun"]),
    (celeba, ["mmdgan+batch=9", "gram+batch=9", SET, "celeba64"])]


def shrink(patch, folder):
    """The scripts with small constants and networks, in a folder with few images."""
    for script in (cifar, mnist, celeba, imagenet):
        for name, value in SMALL.items():
            patch.setattr(script, name, value, raising=False)
        patch.setattr(script, "NETS", {key: narrow(nets) for key, nets in script.NETS.items()})
    patch.setattr(celeba, "SETS", {key: own | dict(side=ARRAYS[own["array"]][1], size=32)
                                   for key, own in celeba.SETS.items()})
    patch.setattr(torch.hub, "load_state_dict_from_url", OFFLINE)
    patch.chdir(folder)
    rng = np.random.default_rng(0)
    os.makedirs("data", exist_ok=True)
    for name, (channels, side) in ARRAYS.items():
        for split, n in (("train", 60), ("test", 30), ("val", 30)):
            images = rng.integers(0, 256, (n, channels, side, side), np.uint8)
            images[:, 1:] //= 2         # channels of other means, which the contrast gives to samples
            np.save(f"data/{name}-{split}.npy", images)
            np.save(f"data/{name}-{split}-labels.npy", rng.integers(0, 10, n).astype(np.uint8))


@pytest.fixture(autouse=True)
def patch(monkeypatch, tmp_path):
    shrink(monkeypatch, tmp_path)
    return monkeypatch


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return export(tmp_path_factory.mktemp("network") / "tiny.pt2")


def run(script, network, method, *given):
    named = ["--features", network] if network else []
    script.main(["--device", "cpu", *named, "--method", *method.split(), *map(str, given)])


def result(folder):
    return json.load(open(f"{folder}/result.json"))


def spy(patch, where, name, keep):
    """A list of what keep(*arguments) gives at each call of a function."""
    found, call = [], getattr(where, name)
    patch.setattr(where, name, lambda *given, **named: found.append(keep(*given)) or call(*given, **named))
    return found


def built(script, row):
    """New networks of a row: generator, critic, decoder."""
    torch.manual_seed(0)
    return (*script.networks(row, *[32] * (script is celeba)), None)[:3]


def draw(script, state, row, key, seed, like=None):
    """20 samples of a seed's noise, in [0, 255], with brightness and contrast of images if there are any."""
    nets, (g, _, decoder) = script.NETS[row["nets"]], built(script, row)
    for module, key, start in ((g, key, "network." * (key == "average")), (decoder, "players", "decoder.")):
        if module:
            module.load_state_dict({path[1].removeprefix(start): t for path, t in state.items()
                                    if path[0] == key and path[1].startswith(start)})
    g = nn.Sequential(g, decoder) if "encoder" in nets else g
    with torch.no_grad():
        y = g(nets["noise"](20, nets["z"], torch.Generator().manual_seed(seed))).numpy()
    y = y if "unit" in nets or script in (mnist, imagenet) else (y + 1) / 2
    if like is not None:
        like, axes = like / 255, dict(axis=(0, 2, 3), keepdims=True)
        std = np.sqrt(like.var(**axes).mean() / y.var(**axes).mean())
        y = std * (y - y.mean(**axes)) + like.mean(**axes)
    return 255 * y.clip(0, 1)


@pytest.mark.parametrize("script, rows", ROWS)
def test_rows(script, rows, network, capsys):
    """Files, table, log, steps of each player, weights and samples after four updates, side by side."""
    run(script, None if script is mnist else network, " ".join(rows), "--steps", 4)
    printed, stem, large = capsys.readouterr().out, script.__name__, script is celeba
    assert os.path.getsize(f"runs/{stem}-curves.png") > 10_000
    stem, methods = (f"celeba-{rows[-1]}", celeba.METHODS[rows[-1]]) if large else (stem, script.METHODS)
    for text in rows[:-2] if large else rows:
        name, row = common.find_row(text, methods, script.DEFAULTS, script.NAMES)
        folder, found = f"runs/{stem}-{name}-s0", result(f"runs/{stem}-{name}-s0")
        [line] = [line for line in printed.splitlines() if line.startswith(f"| {name} ")]
        if row["lr"] == 1e30:
            assert "diverged at update" in found["failed"] and "| 0 of 1; seed 0 diverged" in line
            continue
        (step, state, log), gram, ae = kept(folder), row["loss"] == "gram", row["nets"] == "gmmn-ae"
        f, digits = bool(row["critic"]) or ae, script is mnist
        assert sorted(os.listdir(folder)) == sorted([
            "checkpoint.pt", "common.py", "log.csv", "result.json", "samples-4.png", "samples.npy",
            f"{script.__name__}.py", *["singular-4.npz"] * (f and script in (cifar, celeba)),
            *["samples-2.png"] * digits, *["figure8.png"] * (digits and gram)])
        assert step == 4 and log["step"] == ([1, 2, 4] if digits and gram else [2, 4])
        assert list(log) == ["step", *script.COLUMNS, *script.READINGS]
        assert {key for key in log if np.isfinite(log[key]).all()} - {"condition"} == {
            "step", "loss_g", *["loss_f"] * bool(row["critic"]), *["spread"] * f,
            *["pearson", "mean_r"] * gram, *["lr_g"] * bool(row["decay"])}
        for loss, estimate, r in zip(log["loss_f"], log["pearson"], log["mean_r"]) if gram else ():
            assert -loss == pytest.approx(estimate + row["batch"] * r, rel=1e-4)
        last = np.isfinite([log[key][at] for key, at in (("condition", -1), ("fd", 0), ("fd", -1))])
        assert last.tolist() == [gram, False, True]
        assert (found["method"], found["seed"], found["updates"], found["samples"]) == (name, 0, 4, 20)
        assert found["row"] == json.loads(json.dumps(row)) and " ".join(rows) in found["command"]
        networks = zip(("generator", "critic", "decoder"), built(script, row))
        assert found["parameters"] == {part: sum(map(torch.numel, module.parameters()))
                                       for part, module in networks if module}
        assert found["features"] == ("lenet" if digits else "tiny") and "fd_bootstrap" in found
        assert f"{found['fd']:.1f}" in line and "| 1 of 1 " in line
        critic = 3 + 5 + 5 + 3 if row.get("burst") else 4 if gram else 3 * ae or 4 * row["critic_steps"]
        for key, n in (("opt_g", 4), ("opt_f", critic)):
            assert {int(t) for path, t in state.items() if path[0] == key and path[-1] == "step"} == {n} - {0}
        assert any(path[-1] == "square_avg" for path in state) == (row.get("opt") == "rmsprop")
        lr, lr_g = ((row["decay"] or 1) * rate for rate in (row["lr"], row["lr_g"] or row["lr"]))
        rates = {path[0]: float(t) for path, t in state.items() if path[-1] == "lr"}        # cut at update 4
        assert rates == pytest.approx(dict(opt_g=lr_g) | (dict(opt_f=lr) if f else {}))
        assert not row["decay"] or log["lr_g"][-1] == pytest.approx(lr_g) and np.isfinite(log["p"][-1])
        if row.get("clip"):
            assert all(t.abs().max() <= 0.01 for path, t in state.items() if path[1].startswith("f."))
        still, parts = [], ("g.", "f." if script is imagenet else "players.f.", "players.decoder.")
        for part, module in zip(parts, built(script, row)):
            for weight, p in module.named_parameters() if module else ():
                still += [weight] * torch.equal(state[tuple(f"{part}{weight}".split(".", 1))], p)
        seen = row["loss"] == "gan" or row.get("activation") or ae      # no other loss sees f's last bias
        assert len(still) <= (f and not seen) and all(weight.endswith("bias") for weight in still), still
        name = celeba.SETS[rows[-1]]["array"] if large else "cifar10" if script is cifar else "imagenet64"
        like, average = None, row.get("average")
        if row.get("contrast"):
            like = torch.from_numpy(np.load(f"data/{name}-train.npy"))
            like = (like if script is cifar else common.crop_images(like[::3], 32)).numpy()
        y = draw(script, state, row, "average" if average else "g", 0, like)
        assert abs(np.load(f"{folder}/samples.npy") - y).max() < 0.6
        assert state["average", "t"] == 4 if average else ("average", "t") not in state
        if not digits and name != "celeba178":      # whose reference is of crops
            against = f"data/{name}-{'val' if script is imagenet else 'test'}.npy"
            again = common.score_files(f"{folder}/samples.npy", against, network, "cpu")
            assert {key: found[key] for key in again} == pytest.approx(again) and found["fd"] > 0


@pytest.mark.parametrize("script, text, name, low", [
    (cifar, "gram", "cifar10", -1), (cifar, "wgan-gp+nets=dcgan16", "cifar10", 0), (mnist, "gan", "mnist", 0),
    (cifar, "gan+mirror=0", "cifar10", -1), (imagenet, "gram", "imagenet64", 0),
    (celeba, "gram --set celeba64", "celeba64", -1), (celeba, "wgan-gp --set lsun", "lsun64", 0),
    (celeba, "wgan-gp --set celeba160", "celeba178", 0)])
def test_pixels_of_data_and_samples(script, text, name, low, patch):
    """Data in the range of the generator's last layer: crops of the images, mirrored or not."""
    pairs = spy(patch, common, "both", lambda f, x, y, *rest: (x, y.detach()))
    if "wgan-gp" in text:               # at data, samples and between
        slopes = spy(patch, common, "pullback", lambda f, t, *rest: isinstance(f, common.Layers) and
                     t[:2 * len(t) // 3].chunk(2))
    run(script, None, text, "--steps", 1)
    pairs += [pair for pair in slopes if pair] if "wgan-gp" in text else []
    data = torch.from_numpy(np.load(f"data/{name}-train.npy")).double() / 255 * (1 - low) + low
    places = set()
    for x, y in pairs:
        assert x.shape == y.shape and low <= y.min() < low + 0.7 and y.max() <= 1
        crops = data.unfold(2, x.shape[2], 1).unfold(3, x.shape[3], 1).movedim(1, 3).flatten(0, 2)
        apart = [torch.cdist(x.double().flatten(1), t.flatten(1)).min(1) for t in (crops, crops.flip(3))]
        plain, mirrored = (values < 1e-4 for values, _ in apart)
        assert (plain | mirrored).all() and len(apart[0][1][plain].unique()) > 10
        places.add(tuple((torch.where(plain, apart[0][1], apart[1][1]) % (len(crops) // 60)).tolist()))
        flips = script in (cifar, celeba) and "mirror" not in text
        assert 0.15 < mirrored.double().mean() < 0.85 if flips else plain.all()
    assert len(pairs) == {"gram": 1, "gan": 2}.get(text.split()[0].split("+")[0], 6)
    assert len(places) == (6 if name == "celeba178" else 1)     # of the crops


@pytest.mark.parametrize("text", ["gram+batch=16", "gan+batch=16", "mmdgan+batch=16"])
def test_first_update_of_cifar_by_hand(text):
    """Who draws what, when; losses from plain formulas in float64; torch.optim's steps, and clipping."""
    run(cifar, None, text, "--steps", 1)
    row, (_, state, log) = cifar.row_of(text)[1], kept(f"runs/cifar-{text}-s0")
    images, rng = torch.from_numpy(np.load("data/cifar10-train.npy")), torch.Generator().manual_seed(0)
    g, f, decoder = built(cifar, row)
    players, rates = nn.ModuleList([f, *[decoder] * bool(decoder)]), (row["lr"], row["lr_g"] or row["lr"])
    weights = [list(network.double().parameters()) for network in (players, g)]
    opt = [torch.optim.RMSprop(w, lr) if row["clip"] else torch.optim.Adam(w, lr, (0.5, 0.999))
           for w, lr in zip(weights, rates)]

    def batch():
        x = images[torch.randint(60, (16,), generator=rng)].double()
        x = torch.where(torch.rand(16, 1, 1, 1, generator=rng) < 0.5, x.flip(3), x) / 127.5 - 1
        return x, g((torch.rand(16, 8, generator=rng) * 2 - 1).double())

    (x, y), losses = batch(), []
    if row["loss"] == "gram":           # both gradients, then both steps
        distances = torch.cdist(h := torch.cat([f(x), f(y)]), h)
        K = torch.stack([torch.exp(-distances ** 2 / (2 * s * s)) for s in (1, 2, 4, 8, 16)])
        r = torch.linalg.solve(K[:, :16, :16] + torch.eye(16), K[:, :16, 16:].sum(2, keepdim=True)).mean(0)
        sign = torch.tensor([1.0] * 16 + [-1.0] * 16).double() / 16
        losses = [-((r - 1) ** 2).mean() - r.sum(), (sign @ K @ sign).sum()]
        losses[0].backward(inputs=weights[0], retain_graph=True)
        losses[1].backward(inputs=weights[1])
        opt[0].step(), opt[1].step()
    for who in () if losses else (0, 0, 0, 1) if row["burst"] else (0, 1):      # the critic first
        losses.append(by_hand(row, f, decoder, x, y if who else y.detach(), None)[who])
        opt[who].zero_grad()
        losses[-1].backward(inputs=weights[who])
        opt[who].step()
        if row["clip"]:
            f.load_state_dict({key: t.clamp(-0.01, 0.01) for key, t in f.state_dict().items()})
        x, y = batch()
    losses = [float(loss.detach()) for loss in losses]
    assert log["loss_f"] == pytest.approx([np.mean(losses[:-1])], rel=1e-3)
    assert log["loss_g"] == pytest.approx([losses[-1]], rel=1e-2)
    for who, key in enumerate(["opt_f", "opt_g"][:1 if row["clip"] else 2]):    # MMD-GAN's loss_g is noise
        largest = max(float(p.grad.abs().max()) for p in weights[who])
        ours = [t for path, t in state.items() if path[0] == ("players", "g")[who] and "mult" not in path[1]]
        for i, (p, found) in enumerate(zip(weights[who], ours, strict=True)):
            for what in {"exp_avg", "exp_avg_sq", "square_avg"} & opt[who].state[p].keys():
                error = (state[key, "state", i, what] - opt[who].state[p][what]).abs().max()
                assert error < 0.02 * largest ** (1 if what == "exp_avg" else 2), (key, i, what)
            clear = p.grad.abs() > 1e-3 * largest       # Adam's first step is a sign, which else may differ
            assert row["clip"] or (found - p)[clear].abs().sum() <= 0.2 * rates[who] * clear.sum(), (key, i)


@pytest.mark.parametrize("script", [cifar, mnist])
def test_the_autoencoder_of_gmmn(script, patch):
    """It trains with a batch of 100 and dropout, before the generator; then it stays, without dropout."""
    calls = spy(patch, script, "critic_loss", lambda row, f, d, k, x, *rest: (len(x), f.training))
    after = spy(patch, script, "generator_loss", lambda row, f, k, x, y: (len(x), f.training, len(calls)))
    run(script, None, "gmmn-ae+batch=9", "--steps", 2)
    assert calls == 3 * [(100, True)] and after == 2 * [(9, False, 3)]


@pytest.mark.parametrize("script", [cifar, mnist, celeba, imagenet])
def test_rates_that_adapt_and_spectral_norms(script, network, patch, capsys):
    """Tests are of fresh samples of the generator as it is; one power iteration a step of a player."""
    text = "sn-smmd+lr=0.01+batch=4"
    folder = f"{'celeba-celeba160' if script is celeba else script.__name__}-{text}-s0"
    tested = spy(patch, common.AdaptiveRate, "step", lambda self, y: y)
    z = spy(patch, common, "draw_samples", lambda f, z: z)
    norms = spy(patch, nn.utils.parametrizations._SpectralNorm, "forward", lambda self, w: self.training)
    calls = spy(patch, script, "critic_loss", lambda *given: 1)
    after = spy(patch, script, "generator_loss", lambda *given: len(calls))
    run(script, network, text, "--steps", 4)
    state, total = kept(f"runs/{folder}")[1], sum(norms)
    assert total == sum(path[-1].endswith("._u") for path in state) * (4 * 6 + 4)   # 4: as critics are built
    fresh = [torch.rand(20, 8, generator=torch.Generator().manual_seed(step)) * 2 - 1 for step in (2, 4)]
    assert after == [5, 10, 15, 20] and all(any(torch.equal(a, b) for b in z) for a in fresh)
    assert len(tested) == 2
    y = torch.from_numpy(draw(script, state, result(f"runs/{folder}")["row"], "g", 4)).round()
    assert (tested[1] - Features("plain")(y.expand(-1, 3, -1, -1))).abs().max() < 1e-3
    if script is not mnist:
        run(script, None, text, "--steps", 2, "--out", "without")
        assert "without a feature network its learning rates stay as they are" in capsys.readouterr().out
        assert result(f"without/{folder}")["updates"] == 2 == len(tested)


@pytest.mark.parametrize("script, text", [
    (cifar, "gram+decay=0.5+batch=9"), (cifar, "mmdgan+batch=9"), (cifar, "gmmn-ae+batch=9"),
    (cifar, "sobolev+batch=4"), (mnist, "gram+batch=9"), (imagenet, "sn-smmd+batch=4"),
    (celeba, "sn-smmd+batch=4")])
def test_resumed_equals_uninterrupted(script, text, network, capsys, patch):
    patch.setattr(script, "SCORE_EVERY", 2)
    for steps, out in ((6, "together"), (2, "parts"), (6, "parts")):
        run(script, network, text, "--steps", steps, "--out", out, "--resume")
    [name] = [name for name in os.listdir("together") if name.endswith("-s0")]
    assert same(f"together/{name}", f"parts/{name}") and "goes on at update 2" in capsys.readouterr().out
    assert np.array_equal(*(np.load(f"{out}/{name}/samples.npy") for out in ("together", "parts")))


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_ends_goes_on(end, patch):
    """A small one is killed; a copied script with common.py alone beside it is stopped, and says so."""
    killed, text, paths = end == signal.SIGKILL, "mmdnet+batch=4", [ROOT, os.path.join(ROOT, "tests")]
    driver = (f"import sys; sys.path[:0] = {paths!r}; import cifar, common, pytest, test_scripts; "
              "test_scripts.shrink(pytest.MonkeyPatch(), '.'); common.run(cifar.main)")
    given = ["-c", driver] if killed else ["cifar.py"]
    for name in () if killed else ("cifar.py", "common.py"):
        shutil.copy(f"{ROOT}/{name}", ".")
        patch.setattr(cifar, "NETS", FULL), patch.setattr(cifar, "LOG_EVERY", 200)
    folder, env = f"runs/cifar-{text}-s0", dict(TORCH_HOME="none", https_proxy="http://127.0.0.1:9")
    child = subprocess.Popen([sys.executable, *given, "--device", "cpu", "--method", text], text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | env)
    while not os.path.exists(f"{folder}/{'checkpoint.pt' if killed else 'log.csv'}"):
        assert child.poll() is None, child.communicate()[1]
        time.sleep(0.02)
    time.sleep(0.1)
    child.send_signal(end)
    printed, said = child.communicate()
    if not killed:
        assert child.returncode == 143 and "Traceback" not in said
        assert "samples are kept, not scored" in printed
        assert said.splitlines()[-1] == "cifar.py: stopped; the same command goes on with --resume"
    step = kept(folder)[0]
    for out in ("runs", "together"):
        run(cifar, None, text, "--steps", step + 3, "--resume", "--out", out)
    assert same(folder, folder.replace("runs", "together"))


def test_what_fails_ends_one_run(network, patch, capsys):
    """A feature network in the middle; a weight that is not finite, which never gets to a checkpoint."""
    run(cifar, network, "gan+batch=9", "--steps", 1, "--out", "else")       # keeps the reference
    calls = []

    def fails(self, images, call=common.Features.__call__):
        calls.append(1)
        if len(calls) == 1:
            raise common.RunError("no more")
        return call(self, images)

    patch.setattr(common.Features, "__call__", fails)
    run(cifar, network, "gan+batch=9 mmdnet+batch=9", "--steps", 4)
    assert "| 0 of 1; seed 0 no more" in capsys.readouterr().out
    assert result("runs/cifar-mmdnet+batch=9-s0")["updates"] == 4
    patch.setattr(cifar, "LOG_EVERY", 100)
    with says("no run finished"):
        run(cifar, None, "gan+lr=1e30+lr_g=1e30", "--steps", 4)
    assert "a weight is not finite" in result(folder := "runs/cifar-gan+lr=1e+30+lr_g=1e+30-s0")["failed"]
    assert not os.path.exists(f"{folder}/checkpoint.pt")


def test_figures_and_tables_of_cifar(network, patch, capsys):
    """Rows are trained once, without a network; then scored; each figure draws what they have kept."""
    saved, save, figures = {}, common.save_figure, ("5", "scores", "singular", "neighbours", "samples")
    patch.setattr(common, "save_figure", lambda path, f: (saved.update({path[17:-4]: f}), save(path, f)))
    rows, given = ["gram+batch=9", "gram+batch=16", "gan+batch=9"], ["--device", "cpu", "--features", network]
    patch.setattr(cifar, "SWEEPS", {"5": {"batch size": ("batch", (9, 16))}})
    patch.setattr(cifar, "FIGURES", cifar.FIGURES | {
        key: dict(method=rows[:3 if key == "5" else 2], steps=2) for key in figures})
    patch.setattr(cifar, "TABLES", {"gram": (30, dict.fromkeys(rows, "")), "gamn": (30, {"gan+batch=8": ""})})
    patch.setattr(cifar, "PAPER", dict.fromkeys(rows, "5.13, 26.82"))
    run(cifar, None, " ".join(rows), "--steps", 2)
    assert "not scored" in capsys.readouterr().out and "fd" not in result("runs/cifar-gan+batch=9-s0")
    with patch.context() as patched:
        patched.setattr(common, "descend", None)                # nothing is trained again
        for figure in figures:
            cifar.main([*given, "--figure", figure])
        cifar.main([*given, "--table", "gram", "--steps", "2"])
    assert capsys.readouterr().out.count(" | 26.82 ") == 3 + 4 * 2 + 3 and set(figures) < set(saved)
    assert len(saved["samples"].axes) == 2 and "gan+batch=9" not in saved["samples"].axes[0].get_title()
    patch.setattr(cifar, "SCORE_EVERY", 1), patch.setattr(cifar, "LOG_EVERY", 1)
    cifar.main([*given, "--table", "gamn", "--steps", "2"])
    best = common.read_log("runs/cifar-gan+batch=8-s0")["isc"].max()
    assert "its best in training" in (text := capsys.readouterr().out) and f" {best:.2f} " in text
    folder = "runs/cifar-gan+batch=9-s0"
    assert result(folder)["samples"] == len(np.load(f"{folder}/samples.npy")) == 30
    gram, gan = saved["5"].axes[0].lines
    assert list(gram.get_xdata()) == [9, 16] and list(gan.get_xdata()) == [9] and gan.get_ydata()[0] > 0
    patch.setattr(cifar, "DISTURBANCES", {kind: levels[:2] for kind, levels in cifar.DISTURBANCES.items()})
    for figure, said in (("bias", "KID of training and test images"), ("noise", "contamination")):
        cifar.main([*given, "--figure", figure])
        assert said in capsys.readouterr().out and figure in saved


def test_figures_and_tables_of_the_others(network, patch, capsys):
    """A table of celeba's names its set; mnist's scores the training images, too."""
    patch.setattr(celeba, "TABLES", {"gram": ("celeba64", 30, {"gan": "30.97 ± 5.32", "gram": "27.04"})})
    patch.setattr(mnist, "TABLES", {"demystifying": (30, 2, {"mmd-dot": "8.86, 6.245, .006"})})
    patch.setattr(mnist, "FIGURES", {"gcmmd": dict(method=["gcmmd+batch=4"], steps=2)})
    again = [(celeba, "--figure scores --method sn-gan --steps 1"), (mnist, "--figure gcmmd")]
    for script, given in [(celeba, "--table gram --steps 1"), (mnist, "--table demystifying"), again[1],
                          (celeba, "--figure singular --method sn-gan --steps 1")]:
        script.main(["--device", "cpu", "--features", network, *given.split()])
    patch.setattr(common, "descend", None)                      # nothing is trained again
    for script, given in again:
        script.main(["--device", "cpu", "--features", network, *given.split()])
    printed, made = capsys.readouterr().out, set(os.listdir("runs"))
    assert all(text in printed for text in ("30.97 ± 5.32", "30 training images themselves", "6.245 "))
    assert {"celeba-figurescores.png", "celeba-figuresingular.png", "mnist-figuregcmmd.png"} < made


def test_lenet(patch, capsys):
    """Trained once, kept with the data if it can be; the tutorial's network by hand; labels are checked."""
    device, images = torch.device("cpu"), torch.from_numpy(np.load("data/mnist-test.npy"))
    with patch.context() as patched:
        patched.setattr(common, "save_tensors", Mock(side_effect=OSError(30, "Read-only file system")))
        assert mnist.load_lenet("data", device).name == "lenet"
    assert "cannot be kept" in capsys.readouterr().out
    first, made = mnist.load_lenet("data", device), os.path.getmtime(path := "data/features-lenet.pth")
    again = mnist.load_lenet("data", device)
    assert os.path.getmtime(path) == made and capsys.readouterr().out.count("trained once") == 1
    w, x = list(first.network.parameters()), images / 255 - 0.5
    for at in (0, 2):
        x = F.max_pool2d(F.conv2d(x, w[at], w[at + 1], padding=2).relu(), 2)
    features = F.linear(x.flatten(1), w[4], w[5]).relu()
    for one, other, ours in zip(first(images), again(images), (features, F.linear(features, w[6], w[7]))):
        assert torch.equal(one, other) and torch.allclose(one, ours, atol=1e-5)
    os.remove(path)
    for labels in (np.zeros(7, np.uint8), np.full(60, 10, np.uint8), np.zeros(60, np.int64)):
        np.save("data/mnist-train-labels.npy", labels)
        with says("mnist-train-labels.npy", "expected uint8 up to 9, 60 of them"):
            mnist.load_lenet("data", device)


def test_bad_input(network, patch):
    for script, text, said in ((cifar, "gramm", "gram?"), (mnist, "smd", "smmd"), (celeba, "gram", "'gram'"),
                               (imagenet, "gan", "sn-gan"), (cifar, "gram+critc=8", "critic?")):
        with says(said, f"--method {text}"):
            run(script, None, text)
    for said, *rows in (
            ("expected a critic of 1 output or more", (cifar, "gram+nets=gmmn"), (mnist, "gram+nets=gmmn"),
             (cifar, "mmdnet+spectral=fixed"), (celeba, "sn-smmd+critic=0"), (imagenet, "gram+critic=0"),
             (ring2d, "gan+critic=0")),
            (": expected ", (cifar, "gram+autoencoder=8"), (celeba, "sn-smmd+critic_steps=0"),
             (mnist, "gan+form=sum"), (imagenet, "gram+form="), (ring2d, "gram+critic_steps=1")),
            ("expected a critic without batch norm", (cifar, "smmd+nets=weak"), (mnist, "smmd+nets=gram"),
             (celeba, "mmd-rqdot+nets=gram"))):
        for script, text in rows:
            with says("critic_steps=", said):
                run(script, None, text)
    with says("--figure bias needs a feature network", "--features"):
        run(cifar, None, "gram", "--figure", "bias")
    for script, text in ((cifar, "gan"), (mnist, "gram"), (imagenet, "gram"), (celeba, "gan --set celeba64")):
        with says("nosuch.pt2", "cannot be loaded"):
            run(script, "nosuch.pt2", text)
        run(script, network, text, "--steps", 1)
        with patch.context() as patched, says("checkpoint.pt", "LAMBDA = 1", "expected 9", "--out"):
            patched.setitem(script.CONSTANTS, "LAMBDA", 9)
            run(script, network, text, "--resume")
    shutil.rmtree("data")
    for name in ("MNIST", "CIFAR10"):
        patch.setattr(torchvision.datasets, name, OFFLINE)
    patch.setattr(torchvision.datasets, "CelebA", OFFLINE)
    for script, said in ((cifar, "cifar10-train"), (mnist, "mnist-train"), (celeba, "img_align_celeba"),
                         (imagenet, "imagenet/train")):
        with says(said, "--data"):
            script.main(["--device", "cpu"])
    command = [sys.executable, f"{ROOT}/imagenet.py", "--method", "no"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and done.stderr.startswith("imagenet.py: ")


@pytest.mark.parametrize("script", [cifar, mnist, celeba, imagenet])
def test_help(script, capsys):
    with pytest.raises(SystemExit) as end:
        script.main(["--help"])
    text, sets = capsys.readouterr().out, script.METHODS.values() if script is celeba else [script.METHODS]
    flags = ("--method --seeds --steps --out --resume --device --data --features "
             + "--table --figure " * (script is not imagenet) + "--set" * (script is celeba)).split()
    assert end.value.code == 0 and len(text.splitlines()) <= 70
    assert all(f" {name}" in text for names in (flags, *sets) for name in names)


def test_draw(patch, capsys):
    """From any checkpoint, and from the part of one that results/ has, the samples that the run kept."""
    for text in ("gram+batch=9", "gmmn-ae+batch=9", "sn-gan+batch=9+average=0+contrast=0"):
        run(cifar, None, text, "--steps", 2)
        name = cifar.row_of(text)[0]
        kept_at, samples = f"runs/cifar-{name}-s0/checkpoint.pt", np.load(f"runs/cifar-{name}-s0/samples.npy")
        cifar.main(["--device", "cpu", "--draw", kept_at])
        assert not os.path.exists("runs/cifar-draw.npy") and os.path.getsize("runs/cifar-draw.png") > 10_000
        with patch.context() as patched:
            patched.setattr(common, "load_images", None)                # no data are needed
            cifar.main(["--device", "cpu", "--draw", kept_at, "--samples", "20"])
            assert np.load("runs/cifar-draw.npy").shape == samples.shape
            cifar.main(["--device", "cpu", "--draw", kept_at, "--samples", "200"])
        assert abs(np.load("runs/cifar-draw.npy")[:20].astype(int) - samples).mean() < 60
        os.remove("runs/cifar-draw.npy")
    whole = torch.load(kept_at, weights_only=True)
    state = dict(average=whole["state"]["average"])
    torch.save(dict(step=2, settings=whole["settings"], state=state, about="x of y"), "part.pt")
    cifar.main(["--device", "cpu", "--draw", "part.pt"])
    assert "part.pt: 2 updates of x of y" in capsys.readouterr().out
    open("bad.pt", "w").write("no")
    for path in ("bad.pt", "nosuch.pt"):
        with says(path, "found no checkpoint of cifar.py", "expected runs/"):
            cifar.main(["--device", "cpu", "--draw", path])


def test_own_images(network, patch, capsys):
    """A folder of any images: a tenth is held out, the set is in names, few images are refused in a line."""
    rng = np.random.default_rng(0)
    os.makedirs("my photos/below")
    for i in range(40):
        size = rng.integers(10, 90, 2)
        mode, end = [("RGB", "png"), ("L", "jpg"), ("P", "gif"), ("RGB", "webp")][i % 4]
        image = Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).convert(mode)
        image.save(f"my photos/{'below/' * (i % 2)}{i}.{end}")
    open("my photos/list.txt", "w").write("no image")
    patch.setattr(celeba, "OWN", dict(celeba.OWN, side=32, size=32))
    run(celeba, network, "smmd+batch=9 gram+batch=9", SET, "my photos", "--steps", 2, "--samples", 30)
    [array] = [name for name in os.listdir("data") if name.startswith("my photos-") and "train" in name]
    stem, path = array.removesuffix("-train.npy"), os.path.realpath("my photos")
    assert stem == f"my photos-{hashlib.sha256(path.encode()).hexdigest()[:8]}"
    assert [len(np.load(f"data/{stem}-{split}.npy")) for split in ("train", "test")] == [36, 4]
    found = result(f"runs/celeba-{stem}-gram+batch=9-s0")
    assert found["samples"] == 30 and found["reference"].endswith("4 images") and found["fd"] > 0
    assert "the paper's" not in capsys.readouterr().out
    for n, wanted in ((2, 1), (3, 2), (4, 2), (30, 3), (500_000, 25_000)):
        assert len(celeba.tenth_files(list(range(n)), "test")) in (wanted, wanted + 1)
    with says("found 36 images to train on, expected 64 or more", "+batch=N"):
        run(celeba, network, "gram", SET, "my photos")
    with says("--set nosuch", "celeba64", "folder"):
        run(celeba, network, "gram", SET, "nosuch")
    with says("--table gram", "expected celeba64"):
        run(celeba, network, "gram", SET, "lsun", "--table", "gram")


def test_rates_without_a_network_and_numbers_of_samples(network, capsys):
    run(cifar, None, "smmd+batch=9 gan+batch=9", "--steps", 2)
    assert result("runs/cifar-smmd+batch=9-s0")["rates"] == "constant: no feature network"
    assert "rates" not in result("runs/cifar-gan+batch=9-s0")
    printed = capsys.readouterr().out
    assert "its learning rates stay as they are" in printed and "--resume --features FILE" in printed
    run(cifar, network, "gan+batch=9", "--steps", 2, "--resume", "--samples", 25)       # scored afterwards
    run(cifar, None, "gan+batch=9", "--steps", 2, "--resume", "--samples", 25)          # and still scored
    assert result("runs/cifar-gan+batch=9-s0")["fd"] > 0
    run(cifar, None, "gan+batch=9", "--steps", 3, "--resume", "--out", "runs")          # but not further on
    assert "fd" not in result("runs/cifar-gan+batch=9-s0")
    run(cifar, network, "gan+batch=9", "--steps", 3, "--resume", "--samples", 25)
    found, printed = result("runs/cifar-gan+batch=9-s0"), capsys.readouterr().out
    assert found["samples"] == len(np.load("runs/cifar-gan+batch=9-s0/samples.npy")) == 25
    assert "25 samples, tiny, against cifar10-test, 30 images" in printed
    assert "logit score (not IS)" in printed


def test_the_last_table():
    """No empty column; a name for each network's numbers; the paper's three numbers under their names."""
    runs = [common.Run("gram", {}, seed, f"f{seed}") for seed in (0, 1)]
    found = dict(updates=7, features=common.FID_NAME, samples=5, reference="r", fd=20.0, kid=0.02, isc=3.0)
    results = {"f0": found, "f1": found | dict(fd=22.0)}
    head, _, line = common.score_table(runs, results, {"gram": "5.54, 24.85 ± 0.94"}).splitlines()[2:]
    assert [cell.strip() for cell in head.split("|")[1:-1]] == [
        "method", "updates", "seeds", "FID", "KID", "Inception score", "the paper's FID",
        "the paper's Inception score"]
    assert [cell.strip() for cell in line.split("|")[1:-1]] == [
        "gram", "7", "2 of 2", "21.0 ± 1.4", "0.0200 ± 0.0000", "3.00 ± 0.00", "24.85 ± 0.94", "5.54"]
    results = {"f0": dict(failed="diverged"), "f1": found | dict(features="lite", kid=None)}
    head, _, line = common.score_table(runs, results, {}).splitlines()[2:]
    assert "Fréchet distance" in head and "logit score (not IS)" in head and "KID" not in head
    assert "1 of 2; seed 0 diverged" in line and "paper" not in head


@pytest.mark.parametrize("script", [cifar, mnist])
def test_an_autoencoder_that_is_stopped_goes_on(script, patch):
    """A signal in the steps before the first update: saved with the run beside it, the same in the end."""
    def stopping(*given):
        calls.append(0)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return descend(*given)

    calls, descend, text, name = [], common.descend, "gmmn-ae+batch=9 gmmn+batch=9", script.__name__
    mnist.load_lenet("data", torch.device("cpu"))       # descends, too
    with patch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(common, "descend", stopping)
        run(script, None, text, "--steps", 4, "--out", "two")
    files = [f"two/{name}-{row}-s0/checkpoint.pt" for row in text.split()]
    assert [torch.load(file, weights_only=True)["step"] for file in files] == [-1, 1]
    for out in ("one", "two"):
        run(script, None, text, "--steps", 4, "--out", out, "--resume")
    assert all(same(f"one/{name}-{row}-s0", f"two/{name}-{row}-s0") for row in text.split())


def test_features_that_are_not_finite_name_the_file(tmp_path):
    network = export(tmp_path / "nan.pt2", "nan")
    for i in range(3):
        Image.fromarray(np.full((32, 32, 3), 90, np.uint8)).save(f"{i}.png")
    with says("features or logits of", "0.png are not"):
        common.score_files("data/cifar10-test.npy", os.getcwd(), network, "cpu")
    assert not [name for name in os.listdir("..") if name.endswith("-nan.pt")]
