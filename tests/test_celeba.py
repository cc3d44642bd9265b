"""celeba.py and imagenet.py through their command lines, small: every row, resuming, sets, bad input."""
import json
import os
import re
import threading

import numpy as np
import pytest
import torch

import celeba
import common
import imagenet
from conftest import export, kept, same, says

SMALL = dict(BATCH=8, SAMPLES=20, FINAL=25, KEEP=5, CODES=20, LOG_EVERY=2, GRID_EVERY=4, SAVE_EVERY=2,
             ADAPT_EVERY=2, ADAPT=(2, 2, *celeba.ADAPT[2:]))
FULL = {script: script.METHODS for script in (celeba, imagenet)}
FULL_EVERY = {script: {name: value for name, value in vars(script).items() if name.endswith("_EVERY")}
              for script in FULL}


def small_nets(nets):
    """A description of networks with widths of 6 and 4, for images of 32x32."""
    small = dict(nets, z=8, **{key: (6, *[4] * (len(nets[key]) - 1)) for key in "gf"})
    return small | dict(start={5: 1, 4: 2}[nets["start"]]) if "start" in nets else small


METHODS = {script: {name: dict(row, nets=small_nets(row["nets"]), steps=min(row["steps"], 1))
                    for name, row in rows.items()} for script, rows in FULL.items()}


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """Both scripts with small constants and networks, arrays of 36x36 and 32x32, a folder of their own."""
    for script in FULL:
        for name, value in SMALL.items():
            monkeypatch.setattr(script, name, value)
        monkeypatch.setattr(script, "METHODS", METHODS[script])
    for name, value in dict(BURST=2, BURST_UNTIL=1,
                            SETS={name: dict(row, size=32) for name, row in celeba.SETS.items()}).items():
        monkeypatch.setattr(celeba, name, value)
    monkeypatch.setattr(imagenet, "SIZE", 32)
    monkeypatch.setattr(common, "FOLDERS", {name: (36 if side == 178 else 32, *rest)
                                            for name, (side, *rest) in common.FOLDERS.items()})
    monkeypatch.chdir(tmp_path)
    os.mkdir("data")
    rng = np.random.default_rng(0)
    for name, (side, *_) in common.FOLDERS.items():
        for split, n in (("train", 60), ("val" if name == "imagenet64" else "test", 30)):
            np.save(f"data/{name}-{split}.npy", rng.integers(0, 256, (n, 3, side, side), np.uint8))


def run(script, *flags):
    script.main(["--device", "cpu", *map(str, flags)])


# ---- every row --------------------------------------------------------------------------------------------

RUNS = [(imagenet, None, [*FULL[imagenet]]), *(
    (celeba, part, [name.removeprefix(f"{part}-") for name in FULL[celeba]
                    if FULL[celeba][name]["set"] == part]) for part in celeba.SETS)]


@pytest.mark.parametrize("script, part, methods", RUNS)
def test_every_row(script, part, methods, capsys):
    run(script, "--method", *methods, "--steps", 4, "--features", export("features-tiny.pt2"),
        *(["--set", part] if part else []))
    printed, stem = capsys.readouterr().out, script.__name__
    prefix = f"{part}-" if part in ("celeba64", "lsun") else ""
    for method in (prefix + name for name in methods):
        row, folder = METHODS[script][method], f"runs/{stem}-{method}-s0"
        assert sorted(os.listdir(folder)) == sorted([
            "checkpoint.pt", f"{stem}.py", "common.py", "log.csv", "result.json", "samples-4.png",
            "samples.npy", *(["singular-4.npz"] if script is celeba else [])])
        samples = np.load(f"{folder}/samples.npy")
        assert samples.shape == (5, 3, 32, 32) and samples.dtype == np.uint8 and samples.std() > 1
        step, tensors, log = kept(folder)
        assert step == 4 and log["step"] == [2, 4]
        assert np.isfinite(log["loss_g"]).all() and np.isfinite(log["loss_f"]).all()
        assert np.isfinite(log["mean_r"]).all() == (row["distance"] == "gram")
        assert np.isfinite(log["lr_g"]).all() == ("decay" in row)
        result = json.load(open(f"{folder}/result.json"))
        assert (result["updates"], result["samples"]) == (4, 25) and 0 <= result["waiting"] < 1
        taken = {name: {float(t) for path, t in tensors.items() if path[0] == name and path[-1] == "step"}
                 for name in ("opt_g", "opt_f")}
        assert taken == {"opt_g": {4.0}, "opt_f": {5.0 if "burst" in row else 4.0}}, method
        batches = 4 + (0 if row["steps"] == 0 else 5 if "burst" in row else 4)
        assert int(tensors["batches", "taken"]) == batches
        torch.manual_seed(0)
        for name, network in zip(("g", "game.f"), script.networks(row)):
            name, *rest = name.split(".")
            moved = [not torch.equal(tensors[name, ".".join([*rest, key])], p)
                     for key, p in network.named_parameters()]
            tiny = row["distance"] in ("mmd2", "smmd")          # of widths so small it may round to 0
            assert sum(moved) > (1 if tiny else len(moved) / 2), (method, name)
    assert printed.splitlines()[-1] == f"runs/{stem}-curves.png"
    reference = {"celeba160": "celeba178-test-32", "lsun": "lsun64-test", None: "imagenet64-val"}
    assert f"25 samples against {reference.get(part, 'celeba64-test')}, 30 images" in printed
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_the_rows_of_the_papers():
    """What the tables name, with the weights that their text gives; and with the released code's penalty."""
    rows = {name: row for name, row in FULL[celeba].items() if not name.endswith("-columns")}
    assert set(FULL[celeba]) - set(rows) == {
        f"{name}-columns" for name, row in rows.items() if row.get("penalty") and "gamn" not in name}
    assert {name for name, row in rows.items() if row["set"] == "celeba160"} == {
        "mmd-rqdot", "cramer", "wgan-gp", "smmd", "sn-smmd", "sn-smmd-bf16", "swgan", "sn-swgan",
        "sn-gan", "sobolev"}
    assert {name for name, row in rows.items() if row["set"] == "celeba64"} == {
        f"celeba64-{name}" for name in ("gram", "gan", "mmdgan", "mmdgan-conv")}
    assert {name.removeprefix("lsun-") for name, row in rows.items() if row["set"] == "lsun"} == {
        f"{name}{width}" for name in ("mmd-rqdot", "mmd-dist", "cramer", "wgan-gp") for width in ("", "-16")
    } | {"gamn", "wgan", "gamn-wgan-gp"}
    assert set(FULL[imagenet]) == {"sn-smmd", "sn-smmd-bf16", "smmd", "sn-gan", "gram"}
    assert (rows["smmd"]["scale"], rows["sn-smmd"]["scale"], rows["sn-swgan"]["scale"]) == (0.1, 10, 10)
    assert all(row["adam"][0] == 2e-4 for row in FULL[imagenet].values())
    for name, row in (*rows.items(), *FULL[imagenet].items()):
        paper = 0.8 if row["nets"]["z"] == 128 else 0.5
        if "decay" in row:
            assert row["decay"] == paper and row["steps"] == 5 and row["adam"][1:] == (0.5, 0.9), name
    assert imagenet.STEPS == celeba.STEPS == 150_000
    for every in FULL_EVERY.values():
        assert not any(value % every["LOG_EVERY"] for name, value in every.items() if name != "BURST_EVERY")


@pytest.mark.parametrize("script, method", [        # but for bfloat16's, which "meta" does not know
    (script, name) for script in FULL for name, row in FULL[script].items() if "bfloat16" not in row["nets"]])
def test_networks_of_every_row_fit(script, method, monkeypatch):
    """At full size, without memory: from noise to images and to the critic's outputs."""
    monkeypatch.undo()
    row = FULL[script][method]
    with torch.device("meta"), monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils.parametrizations, "spectral_norm", lambda layer: layer)
        g, f, decoder = script.networks(dict(row) if row.get("spectral") != "learned" else
                                        {key: value for key, value in row.items() if key != "spectral"})
        size = imagenet.SIZE if script is imagenet else celeba.SETS[row["set"]]["size"]
        y = g(torch.empty(2, row["nets"]["z"]))
        assert y.shape == (2, 3, size, size) and f(y).shape == (2, row["critic"])
        assert decoder is None or decoder(f(y)).shape == y.shape


def test_first_batch_is_a_crop_mirrored_or_not(monkeypatch):
    """What the first update sees: crops of the images that index 0 names, in [0, 1], mirrored or not."""
    seen, real = [], common.Game.critic
    monkeypatch.setattr(common.Game, "critic", lambda self, x, y: seen.append(x) or real(self, x, y))
    run(celeba, "--method", "wgan-gp", "--steps", 1, "--features", export("features-tiny.pt2"))
    images = np.load("data/celeba178-train.npy")
    chosen = images[np.random.default_rng([0, 0, 0]).integers(60, size=8)] / 255
    mirrored = 0
    for x, image in zip(seen[0].numpy(), chosen):
        views = {(top, left, flip): image[:, top:top + 32, left:left + 32][:, :, ::-1 if flip else 1]
                 for top in range(5) for left in range(5) for flip in (False, True)}
        fits = [key for key, view in views.items() if np.abs(view - x).max() < 1e-6]
        assert len(fits) == 1
        mirrored += fits[0][2]
    assert 0 < mirrored < 8


@pytest.mark.parametrize("script, method", [(celeba, "sn-smmd"), (celeba, "celeba64-mmdgan"),
                                            (imagenet, "gram")])
def test_resumed_equals_uninterrupted(script, method):
    given = ("--method", method, "--features", export("features-tiny.pt2"))
    run(script, *given, "--steps", 8, "--out", "whole")
    run(script, *given, "--steps", 4, "--out", "parts")
    run(script, *given, "--steps", 8, "--out", "parts", "--resume")
    name = f"{script.__name__}-{method}-s0"
    assert same(f"whole/{name}", f"parts/{name}")


def test_batches_gathered_ahead_train_the_same(monkeypatch):
    given = ("--method", "sn-gan", "--features", export("features-tiny.pt2"), "--steps", 4)
    run(imagenet, *given, "--out", "direct")
    batches = common.Batches
    monkeypatch.setattr(common, "Batches", lambda *args: batches(*args, ahead=3))
    run(imagenet, *given, "--out", "ahead")
    assert same("direct/imagenet-sn-gan-s0", "ahead/imagenet-sn-gan-s0")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_threads_end_with_a_run_that_diverges(monkeypatch):
    batches, made = common.Batches, []
    monkeypatch.setattr(common, "Batches", lambda *args: made.append(batches(*args, ahead=3)) or made[-1])
    monkeypatch.setattr(common, "gan_generator", lambda d_y: d_y.mean() * float("nan"))
    with says("no run finished"):
        run(celeba, "--method", "sn-gan", "--steps", 4, "--features", export("features-tiny.pt2"))
    assert len(made) == 1 and made[0].coming
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_figures_and_tables(capsys):
    run(celeba, "--figure", "singular", "--steps", 4, "--features", export("features-tiny.pt2"))
    assert os.path.getsize("runs/celeba-figuresingular.png") > 10_000
    run(celeba, "--table", "gram", "--method", "celeba64-gan", "--steps", 2, "--features",
        "features-tiny.pt2")
    assert "10,000 samples against celeba64-test" in capsys.readouterr().out


# ---- bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, said", [
    (["--set", "lsun", "--method", "sn-smmd"], "found rows of celeba160, expected those of lsun"),
    (["--method", "gram"], "found rows of none (gram)"),
    (["--method", "sn-smmd", "lsun-gamn"], "found rows of celeba160, lsun, expected those of one set"),
])
def test_rows_of_another_set(flags, said):
    with says("--method", said):
        run(celeba, *flags)


def test_each_set_has_a_first_row(capsys):
    for part, row in (("celeba64", "celeba64-gram"), ("lsun", "lsun-mmd-rqdot")):
        run(celeba, "--set", part, "--steps", 1, "--features", export("features-tiny.pt2"))
        assert os.path.isdir(f"runs/celeba-{row}-s0")
    assert re.search(r"celeba64-gram +\| 1 ", capsys.readouterr().out)


def test_no_images(monkeypatch):
    for script, array in ((celeba, "celeba178"), (imagenet, "imagenet64")):
        os.remove(f"data/{array}-train.npy")
        monkeypatch.setattr(common.torchvision.datasets, "CelebA", lambda *args, **kwargs: 1 / 0)
        with says("data/" + {"celeba178": "celeba/img_align_celeba", "imagenet64": "imagenet/train"}[array],
                  "not there", "--data"):
            run(script, "--features", export("features-tiny.pt2"))


def test_rates_need_a_feature_network(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(SystemExit, match="sn-smmd needs a feature network"):
        run(imagenet)


@pytest.mark.parametrize("script", [celeba, imagenet])
def test_help_explains_every_flag(script, capsys):
    with pytest.raises(SystemExit) as end:
        script.main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and script.__doc__.splitlines()[0] in text
    for flag in ("--method", "--seeds", "--steps", "--out", "--resume", "--device", "--data", "--features"):
        assert flag in text
    assert ("--set" in text) == ("--table" in text) == ("--figure" in text) == (script is celeba)
