"""Data and scores: what is drawn, what is loaded, and what is said of files that are not right."""
import hashlib
import os
import time

import numpy as np
import pytest
import torch

import common
from conftest import Features, export, inception_weights, says


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- drawing ----------------------------------------------------------------------------------------------


def test_noise():
    z = common.uniform_noise(10_000, 3, rng())
    assert z.shape == (10_000, 3) and z.min() >= -1 and z.max() <= 1
    assert abs(float(z.mean())) < 0.02 and float(z.var()) == pytest.approx(1 / 3, abs=0.01)
    assert float(common.normal_noise(10_000, 3, rng()).std()) == pytest.approx(1, abs=0.02)
    assert torch.equal(z, common.uniform_noise(10_000, 3, rng())) and not torch.equal(
        z, common.uniform_noise(10_000, 3, rng(1)))


def test_images_are_drawn_whole_and_scaled():
    images = torch.arange(10, dtype=torch.uint8)[:, None, None, None].expand(10, 3, 2, 2) * 28
    drawn = common.draw_images(images, 500, rng())
    assert drawn.shape == (500, 3, 2, 2) and drawn.dtype == torch.float32
    assert set((drawn[:, 0, 0, 0] * 127.5 + 127.5).round().int().tolist()) == set(range(0, 256, 28))
    assert (drawn == drawn[:, :1, :1, :1]).all()
    every = torch.arange(256, dtype=torch.uint8).view(-1, 1, 1, 1)
    assert torch.equal(common.to_bytes(every.float() / 127.5 - 1), every)
    assert common.to_bytes(torch.tensor([-2.0, 2.0])).tolist() == [0, 255]


def test_images_are_mirrored_or_not():
    x = torch.arange(400 * 3 * 2 * 4.0).view(400, 3, 2, 4)
    flipped = common.flip_images(x, rng())
    mirrored = [not torch.equal(a, b) for a, b in zip(flipped, x)]
    assert 150 < sum(mirrored) < 250
    for a, b, other in zip(flipped, x, mirrored):
        assert not other or a.tolist() == [[row[::-1] for row in channel] for channel in b.tolist()]


def test_ring_and_its_modes():
    centres = common.ring_centres(8, 2.0)
    assert torch.allclose(centres[0], torch.tensor([0.0, -2.0]), atol=1e-6)
    assert torch.allclose(centres[2], torch.tensor([2.0, 0.0]), atol=1e-6)
    x = common.draw_mixture(centres, 0.2, 40_000, rng())
    masses = common.mode_masses(x, centres, 0.2)
    assert masses.shape == (8,) and float(masses.sum()) == pytest.approx(1 - np.exp(-4.5), abs=0.002)
    assert float((masses - masses.mean()).abs().max()) < 0.01
    nearest = torch.cdist(x, centres).argmin(1)
    assert (torch.bincount(nearest) / 40_000 - 1 / 8).abs().max() < 0.01
    assert float((x - centres[nearest]).std()) == pytest.approx(0.2, rel=0.02)


def test_mode_masses_by_hand():
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [20.0, 0.0], [30.0, 0.0]])
    y = torch.tensor([[0.0, 0.2]] * 60 + [[10.0, 0.29]] * 30 + [[10.0, 0.31]] * 4 + [[20.0, 0.0]] * 1
                     + [[float("nan"), 0.0]] * 3 + [[float("inf"), 0.0]] * 2)
    assert common.mode_masses(y, centres, 0.1).tolist() == pytest.approx([0.6, 0.3, 0.01, 0])
    assert common.mode_masses(y * float("nan"), centres, 0.1).tolist() == [0, 0, 0, 0]


def test_grid_and_swiss_roll():
    grid = common.grid_centres(5, 2)
    assert sorted(map(tuple, grid.tolist())) == [(x, y) for x in (-4, -2, 0, 2, 4) for y in (-4, -2, 0, 2, 4)]
    roll = common.swiss_roll_centres(2_000)
    radius = roll.norm(dim=1)
    assert 1.5 * np.pi <= float(radius.min()) and float(radius.max()) <= 4.5 * np.pi
    angle = torch.atan2(roll[:, 1], roll[:, 0])
    assert torch.allclose((angle - radius).cos(), torch.ones(2_000), atol=1e-4)  # radius = angle, mod 2 pi
    assert float((radius.sort().values.diff()).max()) == pytest.approx(3 * np.pi / 2_000, rel=0.01)


# ---- image files ------------------------------------------------------------------------------------------


def write(folder, array, name="cifar10-train"):
    np.save(folder / f"{name}.npy", array)
    return str(folder / f"{name}.npy")


def test_images_are_mapped(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (5, 3, 32, 32), np.uint8)
    path = write(tmp_path, array)
    assert np.array_equal(common.load_images("cifar10", "train", str(tmp_path)).numpy(), array)
    common.load_images("cifar10", "train", str(tmp_path)).zero_()
    assert np.array_equal(np.load(path), array)     # the file stays as it is


@pytest.mark.parametrize("array, found", [
    (np.zeros((4, 3, 32, 32), np.float32), "found float32 [4, 3, 32, 32]"),
    (np.zeros((4, 32, 32, 3), np.uint8), "found uint8 [4, 32, 32, 3]"),
    (np.zeros((4, 3 * 32 * 32), np.uint8), "found uint8 [4, 3072]"),
    (np.zeros((1, 3, 32, 32), np.uint8), "found uint8 [1, 3, 32, 32]"),
])
def test_wrong_arrays(tmp_path, array, found):
    write(tmp_path, array)
    with says("cifar10-train.npy", found, "expected uint8 [N, 3, 32, 32]"):
        common.load_images("cifar10", "train", str(tmp_path))


def test_broken_arrays(tmp_path):
    path = write(tmp_path, np.zeros((4, 3, 32, 32), np.uint8))
    np.savez(tmp_path / "several.npz", a=np.zeros(3), b=np.zeros(3))
    several = (tmp_path / "several.npz").read_bytes()
    for content in (open(path, "rb").read()[:5000], b"", b"no array at all", several):
        open(path, "wb").write(content)
        with says("cifar10-train.npy", "no whole .npy file", "copy it again"):
            common.load_images("cifar10", "train", str(tmp_path))


class FakeSet:
    """What torchvision's MNIST and CIFAR10 look like once downloaded."""

    def __init__(self, root, train, download):
        assert download
        self.data = torch.arange(6 * 28 * 28).view(6, 28, 28).to(torch.uint8) if "mnist" in root else \
            np.arange(6 * 32 * 32 * 3).reshape(6, 32, 32, 3).astype(np.uint8)
        self.targets = [0, 1, 2, 3, 4, int(train)]


def test_arrays_are_built_from_torchvision(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "SETS", {name: (FakeSet, shape) for name, (_, shape) in common.SETS.items()})
    cifar = common.load_images("cifar10", "test", str(tmp_path / "a"))
    assert torch.equal(cifar, torch.tensor(FakeSet("", False, True).data).permute(0, 3, 1, 2))
    assert np.load(tmp_path / "a" / "cifar10-test-labels.npy").tolist() == [0, 1, 2, 3, 4, 0]
    assert common.load_images("mnist", "train", str(tmp_path / "mnist")).shape == (6, 1, 28, 28)
    assert sorted(os.listdir(tmp_path / "a")) == ["cifar10-test-labels.npy", "cifar10-test.npy"]
    monkeypatch.setattr(common, "SETS", {})         # and now they are there, nothing is downloaded
    monkeypatch.setattr(common, "SETS", {"cifar10": (None, (3, 32, 32))})
    assert torch.equal(common.load_images("cifar10", "test", str(tmp_path / "a")), cifar)


def test_download_that_fails(tmp_path, monkeypatch):
    def offline(root, train, download):
        os.makedirs(f"{root}/MNIST/raw")        # as torchvision does
        raise OSError("no route to host")
    monkeypatch.setattr(common, "SETS", {"cifar10": (offline, (3, 32, 32))})
    with says("cifar10-train.npy", "no route to host", "--data"):
        common.load_images("cifar10", "train", str(tmp_path / "data"))
    assert os.listdir(tmp_path / "data") == []


def test_folders_of_images(tmp_path):
    images = torch.randint(256, (3, 3, 20, 24), generator=rng(), dtype=torch.uint8)
    for i, image in enumerate(images):
        common.save_grid(f"{tmp_path}/{i}.png", image[None], 1)
    read = common.read_images(str(tmp_path))
    assert torch.equal(read, images)
    common.save_grid(f"{tmp_path}/4.png", images[:1, :, :9], 1)
    with says("found 4 .png and .jpg files", "(9, 24), (20, 24)"):
        common.read_images(str(tmp_path))
    whole = (tmp_path / "0.png").read_bytes()
    for broken in (whole[:200], whole[:11] + b"\1" + whole[12:]):       # cut off; a chunk of a wrong length
        (tmp_path / "4.png").write_bytes(broken)
        with says("4.png", "no whole image"):
            common.read_images(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with says("found 0 .png and .jpg files"):
        common.read_images(str(tmp_path / "empty"))
    with says("nothing.npy: not there"):
        common.read_images(str(tmp_path / "nothing.npy"))


# ---- feature networks -------------------------------------------------------------------------------------


def test_features_and_scores(tmp_path, monkeypatch):
    cpu = torch.device("cpu")
    images = torch.randint(256, (501, 3, 32, 32), generator=rng(), dtype=torch.uint8)
    np.save(tmp_path / "samples.npy", images.numpy())
    for kind in ("plain", "tuple"):
        features = common.load_features(export(tmp_path / f"features-{kind}.pt2", kind), cpu)
        assert features.name == kind
        found, logits = common.extract(features, images, cpu)           # in parts, none of one image
        assert torch.allclose(found, Features("plain")(images))
        assert logits is None if kind == "plain" else torch.allclose(logits, found[:, :3])
    judge = common.open_judge(str(tmp_path / "features-tuple.pt2"), str(tmp_path / "samples.npy"), cpu)
    scored = judge.score(images, 400)
    fit = common.gaussian_fit(found)
    assert abs(scored["fd"]) < 1e-9 and scored["kid"] < 0
    assert scored["fd_bootstrap"] == pytest.approx(common.bootstrap_frechet_distance(found[:400], fit)[0])
    assert (scored["isc"], scored["isc_std"]) == common.inception_score(logits)
    assert (scored["features"], scored["samples"]) == ("tuple", 501)
    assert scored["reference"] == "samples, 501 images"
    assert scored["bootstrap_samples"] == 400
    assert "fd_bootstrap" not in judge.score(images, 502)
    plain = str(tmp_path / "features-plain.pt2")
    found = common.score_files(str(tmp_path / "samples.npy"), str(tmp_path / "samples.npy"), plain, "cpu")
    assert found["fd"] == scored["fd"] and "isc" not in found


def test_reference_statistics_are_computed_once(tmp_path, monkeypatch):
    cpu, path = torch.device("cpu"), str(tmp_path / "set-test.npy")
    images = torch.randint(256, (9, 3, 32, 32), generator=rng(), dtype=torch.uint8)
    np.save(path, images.numpy())
    features = common.load_features(export(tmp_path / "features-net.pt2"), cpu)
    first = common.reference_statistics(path, features, cpu)
    kept = [name for name in os.listdir(tmp_path) if name.endswith(".pt")]
    digest = hashlib.sha256((tmp_path / "features-net.pt2").read_bytes()).hexdigest()[:8]
    assert kept == [f"set-test-net-{digest}.pt"]
    with monkeypatch.context() as patch:
        patch.setattr(common, "extract", None)
        again = common.reference_statistics(path, features, cpu)
    assert first.pop("name") == again.pop("name") == "set-test, 9 images"
    assert first.pop("source") == again.pop("source")
    assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)
    wrong = f"{tmp_path}/set-test-net-{digest}.pt"
    torch.save({key: value[..., :4] for key, value in first.items()}, wrong)
    with says(wrong, "found statistics of [4] features, expected 6", "delete it"):
        common.reference_statistics(path, features, cpu)
    with open(wrong, "wb") as file:
        file.write(b"half")
    with says(wrong, "no whole statistics", "delete it"):
        common.reference_statistics(path, features, cpu)
    os.remove(wrong)
    for n, age in ((5, 1000), (4, 0)):                          # another file, older or newer
        common.reference_statistics(path, features, cpu)
        np.save(path, images[:n].numpy())
        os.utime(path, (time.time() - age,) * 2)
        assert len(common.reference_statistics(path, features, cpu)["features"]) == n
    monkeypatch.setattr(common, "SCORE_PRECISION", "tf32")      # another precision
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(common, "extract", None)
        common.reference_statistics(path, features, cpu)
    for folder, n in (("a.train[1]", 3), ("a.test", 2)):        # folders whose names have a point
        os.mkdir(tmp_path / folder)
        for i in range(n):
            common.save_grid(f"{tmp_path}/{folder}/{i}.png", images[i:i + 1], 1)
        assert len(common.reference_statistics(f"{tmp_path}/{folder}/", features, cpu)["features"]) == n
    with says("nothing: not there", "a folder"):
        common.reference_statistics(f"{tmp_path}/nothing", features, cpu)
    path = str(tmp_path / "closed" / "set.npy")
    os.mkdir(tmp_path / "closed")
    np.save(path, images.numpy())
    monkeypatch.setattr(common, "replacing", closed)
    assert torch.equal(common.reference_statistics(path, features, cpu)["mean"], first["mean"])


def closed(path):
    raise PermissionError(13, "Permission denied", path)


def test_grey_images_are_scored(tmp_path):
    grey = torch.randint(256, (9, 1, 32, 32), generator=rng(), dtype=torch.uint8)
    features = export(tmp_path / "net.pt2")
    for name, channels in (("grey", 1), ("two", 2), ("rgb", 3)):
        np.save(tmp_path / f"{name}.npy", grey.expand(-1, channels, -1, -1).numpy())
    a, b = (common.score_files(f"{tmp_path}/{name}.npy", f"{tmp_path}/rgb.npy", features, "cpu")
            for name in ("grey", "rgb"))
    assert a == b and abs(a["fd"]) < 1e-12
    with says("two.npy", "found [9, 2, 32, 32]", "[N, 1, H, W]"):
        common.read_images(f"{tmp_path}/two.npy")
    np.save(tmp_path / "small.npy", grey[..., :28].numpy())
    with says("net.pt2: fails on uint8 [9, 3, 32, 28]", "[N, D]"):
        common.score_files(f"{tmp_path}/small.npy", f"{tmp_path}/rgb.npy", features, "cpu")


def test_only_the_published_weights_are_called_fid(tmp_path, monkeypatch):
    path = str(tmp_path / "pt_inception-2015-12-05-6726825d.pth")
    weights = inception_weights()
    torch.save({key: value for key, value in weights.items() if "num_batches" not in key}, path)
    features = common.load_features(path, torch.device("cpu"))
    assert features.name != common.FID_NAME and features.width == 2048
    with monkeypatch.context() as patch:
        patch.setattr(common, "FID_KEY", features.key)
        assert common.load_features(path, torch.device("cpu")).name == common.FID_NAME
    weights.pop("Mixed_7c.branch_pool.conv.weight")
    torch.save(weights, path)
    with says(path, "cannot be loaded", "Inception"):
        common.load_features(path, torch.device("cpu"))


def test_fid_inception_that_cannot_be_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *a, **k: closed("there"))
    wanted = "fid_weights/pt_inception-2015.*cannot be fetched.*put it there: .*checkpoints/pt_inception.*pth"
    with pytest.raises(OSError, match=wanted):
        common.load_features(None, torch.device("cpu"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / os.path.basename(common.INCEPTION)).write_bytes(b"half")
    with pytest.raises(OSError, match="checkpoints/pt_inception.*cannot be loaded.*delete it"):
        common.load_features(None, torch.device("cpu"))


def test_files_that_are_no_feature_network(tmp_path):
    cpu = torch.device("cpu")
    with says("rank.pt2", "[2, 6, 1, 1]", "[N, D]"):
        common.load_features(export(tmp_path / "rank.pt2", "image"), cpu)
    with says("nan.pt2", "not finite"):
        common.load_features(export(tmp_path / "nan.pt2", "nan"), cpu)
    with says("two.pt2", "fails on uint8 [3, 3, 32, 32]"):
        common.load_features(export(tmp_path / "two.pt2", "plain", dynamic=False), cpu)
    torch.save({"weights": torch.zeros(3)}, tmp_path / "weights.pt2")
    (tmp_path / "text.pt2").write_text("no archive")
    with says("dict.pt2", "found features", "[N, D]"):
        common.load_features(export(tmp_path / "dict.pt2", "dict"), cpu)
    for name in ("weights.pt2", "text.pt2", "missing.pt2"):
        with says(name, "cannot be loaded", "torch.export file"):
            common.load_features(str(tmp_path / name), cpu)


def test_scores_leave_the_precision_of_networks_alone(tmp_path):
    common.setup("cpu")
    common.load_features(export(tmp_path / "net.pt2"), torch.device("cpu"))
    assert torch.backends.cudnn.conv.fp32_precision == "tf32"


def test_grid(tmp_path):
    images = torch.randint(256, (5, 3, 4, 4), generator=rng(), dtype=torch.uint8)
    common.save_grid(f"{tmp_path}/grid.png", images, columns=3)
    (tmp_path / "copy.png").write_bytes((tmp_path / "grid.png").read_bytes())
    grid = common.read_images(str(tmp_path))[0]
    assert grid.shape == (3, 2 * 5 + 1, 3 * 5 + 1) and torch.equal(grid[:, 6:10, 6:10], images[4])
    assert sorted(os.listdir(tmp_path)) == ["copy.png", "grid.png"]
