"""Data: toy sets, batches, arrays from torchvision and from folders of image files, against plain numpy."""
import fcntl
import os
import shutil
import threading
import time

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import common
from conftest import says


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def test_ring_and_mixture():
    centres = common.ring_centres(8, 2.0)
    angle = -np.pi / 2 + np.arange(8) * np.pi / 4           # the first at the bottom, the third on the right
    assert np.allclose(centres, 2 * np.stack([np.cos(angle), np.sin(angle)], 1), atol=1e-6)
    x = common.draw_mixture(centres, 0.2, 40_000, rng())
    assert torch.equal(x, common.draw_mixture(centres, 0.2, 40_000, rng()))
    nearest = torch.cdist(x, centres).argmin(1)
    assert (torch.bincount(nearest) / 40_000 - 1 / 8).abs().max() < 0.01
    apart = x - centres[nearest]
    assert apart.std(0).tolist() == pytest.approx([0.2, 0.2], rel=0.02) and apart.mean(0).abs().max() < 0.005
    assert float(common.mode_masses(x, centres, 0.2).sum()) == pytest.approx(1 - np.exp(-4.5), abs=0.002)


def test_mode_masses_by_hand():
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [20.0, 0.0], [30.0, 0.0]])
    far = [[np.nan, 0.0], [np.inf, 0.0], [0.0, -np.inf], [0.0, np.nan], [15.0, 0.0]]
    y = torch.tensor([[0.0, 0.2]] * 60 + [[10.0, 0.29]] * 30 + [[10.0, 0.31]] * 4 + [[20.0, 0.0]] + far)
    assert common.mode_masses(y, centres, 0.1).tolist() == pytest.approx([0.6, 0.3, 0.01, 0])
    assert common.mode_masses(y * np.nan, centres, 0.1).tolist() == [0, 0, 0, 0]


def test_batches_are_drawn_by_the_generator(tmp_path):
    """In memory and from a mapped file; a generator's state is all that resuming takes."""
    np.save(tmp_path / "images.npy", noise(50, 3, 4, 4))
    images, index = torch.tensor(noise(50, 3, 4, 4)), torch.randint(50, (3, 16), generator=rng(3))
    for kind in (images, common.read_images(f"{tmp_path}/images.npy")):
        drawn, copied, resumed, x = rng(3), rng(3), rng(9), torch.zeros(16, 3, 4, 4)
        place = x.data_ptr()
        for rows in index:
            resumed.set_state(copied.get_state())
            common.copy_batch(kind, copied, x)
            y = common.draw_images(kind, 16, drawn)
            assert y.dtype == torch.float32 and torch.equal(y, images[rows].float())
            assert torch.equal(x, y) and x.data_ptr() == place
        common.copy_batch(kind, resumed, x.zero_())
        assert torch.equal(x, y) and y.min() < 5 and y.max() > 250


def test_flips_and_crops_by_hand():
    """Each pixel says where it was: crops lie everywhere with equal chances, each image has its own."""
    n, height, width, side = 600, 7, 5, 3
    images = (torch.arange(height)[:, None] * 10 + torch.arange(width)).expand(n, 2, -1, -1).clone().float()
    images[:, 1] += 100
    images += 200 * torch.arange(n)[:, None, None, None]
    found = common.crop_images(images, side, rng())
    corner = (found[:, 0, 0, 0] - 200 * torch.arange(n)).long()
    top, left = corner // 10, corner % 10
    for i in range(n):
        assert torch.equal(found[i], images[i, :, top[i]:top[i] + side, left[i]:left[i] + side])
    places = torch.bincount(top * 3 + left, minlength=15)
    assert len(places) == 15 and places.min() > 20 and places.max() < 65
    assert not torch.equal(found, common.crop_images(images, side, rng(1)))
    assert torch.equal(common.crop_images(images, side), common.crop_images(images, side))
    assert torch.equal(common.crop_images(images[:, :, :5], 5, rng()), images[:, :, :5])
    flipped = common.flip_images(images, rng())
    hit = (flipped != images)[:, :1, :1, :1]
    assert 250 < int(hit.sum()) < 350 and torch.equal(flipped, images.flip(3).where(hit, images))


def test_samples_are_rounded_and_drawn_in_parts():
    values, n = torch.tensor([-0.1, 0.0, 0.49 / 255, 0.51 / 255, 254.6 / 255, 1.2]), []
    found = common.draw_samples(lambda z: n.append(len(z)) or values.expand(len(z), 6), torch.ones(1_200, 2))
    assert found.dtype == torch.uint8 and sum(n) == 1_200 and 100 < min(n) and max(n) <= 500
    assert found.tolist() == [[0, 0, 0, 1, 255, 255]] * 1_200


def test_images_go_to_a_gpu_if_they_take_half_of_it(monkeypatch):
    class Images:
        nbytes, to = 100, lambda self, device: device

    images, gpu = Images(), torch.device("cuda")
    assert common.to_device(images, torch.device("cpu")) is images
    for free, wanted in ((200, gpu), (199, images)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (free, 10 ** 9))
        assert common.to_device(images, gpu) is wanted


@pytest.mark.parametrize("kind, name, split, shape", [("CIFAR10", "cifar10", "test", (6, 32, 32, 3)),
                                                      ("MNIST", "mnist", "train", (6, 28, 28))])
def test_arrays_are_built_from_torchvision(kind, name, split, shape, tmp_path, monkeypatch):
    """A download that fails leaves nothing; what is there is mapped and not built again."""
    def init(self, root, train=True, download=False):
        if failure:
            raise failure
        assert download and train == (split == "train")
        self.data, self.targets = torch.tensor(pixels) if kind == "MNIST" else pixels, [0, 1, 2, 3, 4, 9]

    pixels = noise(*shape)
    monkeypatch.setattr(getattr(torchvision.datasets, kind), "__init__", init)
    for failure in (OSError("no route to host"), RuntimeError("Error downloading")):
        with pytest.raises(OSError, match=f"{name}-{split}.npy.*{failure}.*--data"):
            common.load_images(name, split, str(tmp_path))
        assert os.listdir(tmp_path) == []
    failure = None
    images = common.load_images(name, split, str(tmp_path))
    assert np.array_equal(images, pixels[:, None] if kind == "MNIST" else pixels.transpose(0, 3, 1, 2))
    assert np.load(tmp_path / f"{name}-{split}-labels.npy").tolist() == [0, 1, 2, 3, 4, 9]
    assert sorted(os.listdir(tmp_path)) == [f"{name}-{split}-labels.npy", f"{name}-{split}.npy"]
    failure = OSError("not again")
    again = common.load_images(name, split, str(tmp_path))
    np.load(tmp_path / f"{name}-{split}.npy", mmap_mode="r+")[2] += 1
    assert torch.equal(again, images) and again[2, 0, 0, 0] != pixels[2].flat[0]


def test_files_that_are_no_images(tmp_path):
    path = tmp_path / "set.npy"
    for shape in ((4, 8, 8, 3), (4, 192), (1, 3, 8, 8), (4, 2, 8, 8), (4, 3, 8, 8)):
        array = noise(*shape).astype(np.float32 if shape == (4, 3, 8, 8) else np.uint8)
        np.save(path, array)
        with pytest.raises(ValueError) as error:
            common.read_images(str(path))
        assert f"{path}: found {array.dtype} {list(array.shape)}, expected" in str(error.value)
    np.save(path, noise(4, 3, 8, 8))
    whole = path.read_bytes()
    np.savez(tmp_path / "several.npz", a=array, b=array)
    several = (tmp_path / "several.npz").read_bytes()
    for content in (whole[:500], whole[:50], b"", b"no array at all", several, several[:9]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="set.npy: found no .npy array .*deleted"):
            common.read_images(str(path))
    path.write_bytes(whole.replace(b"8)", b"8 "))            # of the header
    for name, said in (("set.npy", "no .npy array"), ("nothing.npy", "No such file")):
        with says(name, said):
            common.read_images(f"{tmp_path}/{name}")


def test_every_kind_of_image_file_becomes_rgb(tmp_path):
    small = Image.fromarray(noise(4, 4, 3))
    rgb = small.resize((30, 40), Image.Resampling.BICUBIC)      # smooth: a JPEG or a palette is close to it
    picture, grey = np.asarray(rgb), rgb.convert("L")
    grey.save(tmp_path / "8.png"), rgb.quantize(256).save(tmp_path / "palette.png")
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 256 + 128).save(tmp_path / "16.png")
    rgb.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=98)
    Image.fromarray(np.dstack([picture, noise(40, 30)])).save(tmp_path / "alpha.png")
    rgb.getexif()[274] = 6              # to be turned to the right
    (tilted := rgb.rotate(90, expand=True)).save(tmp_path / "tilted.png", exif=rgb.getexif())
    assert {Image.open(path).mode[0] for path in tmp_path.iterdir()} == set("LIPCR")
    assert tilted.size == (40, 30)
    found = {path.name: np.asarray(common.open_image(str(path))).astype(int) for path in tmp_path.iterdir()}
    assert np.array_equal(found["8.png"], np.dstack([np.asarray(grey)] * 3))
    assert np.abs(found["16.png"] - found["8.png"]).max() <= 1 and np.array_equal(found["alpha.png"], picture)
    assert np.array_equal(found["tilted.png"], picture)
    (tmp_path / "half.png").write_bytes((tmp_path / "8.png").read_bytes()[:-40])
    with says(f"{tmp_path}/half.png: cannot be read ("):
        common.open_image(tmp_path / "half.png")
    assert all(np.abs(found[name] - picture).mean() < 6 for name in ("palette.png", "cmyk.jpg"))


def test_image_files(tmp_path):
    """Nested folders, links to folders and files, a loop of links, suffixes of any case."""
    inside, outside = tmp_path / "set", tmp_path / "outside"
    (inside / "b" / "deep").mkdir(parents=True), (inside / "a.b[1]").mkdir(), outside.mkdir()
    files = ["a.b[1]/x.tif", "b/1.png", "b/deep/0.webp", "b/deep/10.Jpg", "z.JPEG"]
    (inside / ".hidden").mkdir()
    for name in (*files, "b/notes.txt", "b/png", "../outside/o.jpg", "b/._1.png", ".hidden/1.png"):
        (inside / name).touch()
    (inside / "file.png").symlink_to(outside / "o.jpg"), (outside / "also").symlink_to(outside)
    (inside / "link").symlink_to(outside), (inside / "b" / "again").symlink_to(inside)
    files = sorted([*files, "file.png", "link/o.jpg"])
    assert common.image_files(str(inside)) == [f"{inside}/{name}" for name in files]


def test_a_folder_of_images_is_read(tmp_path, monkeypatch):
    """Part by part: no more files are opened than the parts so far have."""
    opened, read = [], common.open_image
    monkeypatch.setattr(common, "open_image", lambda path: opened.append(path) or read(path))
    pictures = noise(3, 20, 24, 3)
    (tmp_path / "below" / "a").mkdir(parents=True)
    for name, picture in zip(("2.png", "below/b.png", "below/a/c.png"), pictures):
        Image.fromarray(picture).save(tmp_path / name)
    files = common.read_images(tmp_path)
    for n, sizes in ((2, [2, 1]), (3, [3]), (99, [3])):
        parts = common.parts_of(files, n)
        first = next(parts)
        assert len(opened) == sizes[0]
        parts = [first, *parts]
        opened.clear()
        assert [len(part) for part in parts] == sizes
        assert np.array_equal(torch.cat(parts), pictures[[0, 2, 1]].transpose(0, 3, 1, 2))
    Image.fromarray(pictures[0, :9]).save(tmp_path / "small.png")
    with says(" of 24x20, ", f"{tmp_path}/small.png of 24x9", "expected one size"):
        list(common.parts_of(common.read_images(tmp_path), 2))
    with says(f"{tmp_path}/below/a: found 1 images, expected 2 or more"):
        common.read_images(tmp_path / "below" / "a")


@pytest.fixture
def folder(tmp_path):
    """Seven images of 60x50."""
    (tmp_path / "set").mkdir()
    for i in range(7):
        Image.fromarray(noise(60, 50, 3, seed=i)).save(tmp_path / "set" / f"{i}.png")
    return tmp_path / "set"


def square(i):
    return noise(60, 50, 3, seed=i)[5:55]


def test_squares_against_pil(folder, tmp_path):
    """The central square and no more of an image, by a triangle over two of the new pixels: no aliasing."""
    images = common.load_folder(f"{tmp_path}/of-10.npy", str(folder), 10).numpy()
    for i, image in enumerate(images.astype(int)):
        wanted = np.asarray(Image.fromarray(square(i)).resize((10, 10), Image.Resampling.BILINEAR))
        assert np.abs(image - wanted.transpose(2, 0, 1)).max() <= 2
    images = common.load_folder(f"{tmp_path}/of-50.npy", str(folder), 50).numpy()
    assert np.array_equal(images.transpose(0, 2, 3, 1), [square(i) for i in range(7)])


def test_what_cannot_be_read_is_named_and_left_out(folder, tmp_path, capsys):
    (folder / "2.png").write_bytes((folder / "1.png").read_bytes()[:5_000])
    (folder / "4.png").write_bytes(b"no image"), (folder / "8.jpg").touch(), (folder / "notes.txt").touch()
    Image.fromarray(noise(49, 80, 3)).save(folder / "7.png")
    path = f"{tmp_path}/below/set.npy"
    images = common.load_folder(path, str(folder), 50).numpy()
    lines = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    wanted = [f"{folder}/{name}" for name in ("2.png", "4.png", "8.jpg")]
    assert [line.split(":")[0] for line in lines] == wanted and len(images) == 6        # 7.png is enlarged
    assert np.array_equal(images[:5].transpose(0, 2, 3, 1), [square(i) for i in (0, 1, 3, 5, 6)])
    assert np.array_equal(np.load(path), images) and os.path.getsize(path) == 128 + images.nbytes
    assert os.listdir(tmp_path / "below") == ["set.npy"]


def test_order_split_and_a_second_call(folder, tmp_path):
    """Several batches of the loader, in the order of the files; the second call maps and needs no folder."""
    for i in range(19):
        (folder / f"c{i:02}").mkdir()
        for j in range(30):
            Image.new("RGB", (4, 4), (i, j, 7)).save(folder / f"c{i:02}" / f"{j:02}.png")
    path, seen = f"{tmp_path}/set.npy", []
    images = common.load_folder(path, str(folder), 4, lambda files: seen.extend(files) or
                                [file for file in files if "/c" in file and not file.endswith("/05.png")])
    assert seen == sorted(seen) and len(seen) == 7 + 19 * 30
    assert images[:, :, 3, 3].tolist() == [[i, j, 7] for i in range(19) for j in range(30) if j != 5]
    shutil.rmtree(folder)
    again = common.load_folder(path, str(folder), 4)
    np.load(path, mmap_mode="r+")[3] += 1
    assert torch.equal(again, images) and again[3, 0, 0, 0] == 1


def test_a_build_that_fails_leaves_no_array(folder, tmp_path, monkeypatch):
    path, iterate = f"{tmp_path}/set.npy", torch.utils.data.DataLoader.__iter__

    def interrupted(self):
        yield next(iterate(self))
        raise failure

    for failure in (KeyboardInterrupt(), OSError(28, "No space left on device")):
        with monkeypatch.context() as patch, pytest.raises(type(failure)) as error:
            patch.setattr(torch.utils.data.DataLoader, "__iter__", interrupted)
            common.load_folder(path, str(folder), 25)
        assert os.listdir(tmp_path) == ["set"]
    assert path in str(error.value)
    for split, side, n in ((lambda files: files[:1], 25, 1), (lambda files: [], 25, 0)):
        with pytest.raises(ValueError, match=f"{folder}: found {n} images .*{path}.*--data"):
            common.load_folder(path, str(folder), side, split)
    assert os.listdir(tmp_path) == ["set"]
    with open(f"{path}.tmp", "wb") as file:                     # as a kill leaves it
        np.save(file, noise(9, 3, 25, 25))
    images = common.load_folder(path, str(folder), 25)
    assert len(images) == 7 and sorted(os.listdir(tmp_path)) == ["set", "set.npy"]


def test_a_second_command_waits_for_a_build(folder, tmp_path, capfd):
    """Of the same array it then takes the first one's, of another it builds its own."""
    held = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    path, other = f"{tmp_path}/set.npy", noise(3, 3, 25, 25)
    first = threading.Timer(0.3, lambda: (np.save(path, other), os.close(held)))
    first.start()
    assert np.array_equal(common.load_folder(path, str(folder), 25), other)
    assert len(common.load_folder(f"{tmp_path}/own.npy", str(folder), 25)) == 7
    said = capfd.readouterr().out
    assert said.count("this one waits") == said.count("built once") == 1
    assert not common.locked.get(str(tmp_path))


def test_an_array_whose_folder_has_changed_is_named(folder, tmp_path, capsys):
    path = f"{tmp_path}/set.npy"
    for changed in (False, False, True):
        if changed:
            os.utime(folder, (time.time() + 9, time.time() + 9))
        common.load_folder(path, str(folder), 25)
        assert ("has changed since" in capsys.readouterr().out) is changed


def test_a_fingerprint_tells_images_apart():
    images = torch.from_numpy(noise(3_000, 3, 4, 4))
    found = common.fingerprint(images)
    assert found[0] == 3_000 and found == common.fingerprint(images.clone())
    assert found != common.fingerprint(images.flip(0))
