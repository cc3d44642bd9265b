"""Arrays from folders of images: every bad image, splits, another crop, too little disk, kill -9."""
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple

import numpy as np
import pytest
import torch
from PIL import Image

import common
from conftest import says, wait_for

ROOT = os.path.dirname(os.path.abspath(common.__file__))
LONG, SHORT = 218, 178


def photograph(seed, width=SHORT, height=LONG, channels=3):
    """A smooth picture, so that a JPEG of it is close to it: uint8 [height, width, channels]."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))[..., :channels].squeeze()


def jpeg(path, seed, **size):
    Image.fromarray(photograph(seed, **size)).save(path, "JPEG", quality=95)
    return path


@pytest.fixture
def celeba(tmp_path, monkeypatch):
    """A folder of seven faces, 000001.jpg and on, in a folder of its own to work in."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data" / "celeba" / "img_align_celeba"
    folder.mkdir(parents=True)
    for i in range(1, 8):
        jpeg(folder / f"{i:06d}.jpg", i)
    return folder


def load(name="celeba178", *splits):
    return common.load_folders(name, splits or ("train",), "data")


# ---- images -----------------------------------------------------------------------------------------------


def test_central_squares_and_antialiasing(tmp_path):
    png = tmp_path / "a.png"
    picture = np.random.default_rng(0).integers(0, 256, (218, 178, 3), np.uint8)
    Image.fromarray(picture).save(png)
    assert np.array_equal(common.central_square(png, 178), picture[20:198].transpose(2, 0, 1))
    picture = picture[:120, :90]
    Image.fromarray(picture).save(png)
    found = common.central_square(png, 30).astype(float)
    weights = np.maximum(0, 1 - np.abs(np.arange(90) + 0.5 - 3 * (np.arange(30)[:, None] + 0.5)) / 3)
    weights /= weights.sum(1, keepdims=True)            # a triangle over twice three pixels
    wanted = np.einsum("iy,jx,yxc->cij", weights, weights, picture[15:105].astype(float))
    assert np.abs(found - wanted).max() <= 1.5          # of the square alone, also at its border
    stripes = np.tile(np.array([0, 255], np.uint8)[None, :, None], (128, 64, 3))
    Image.fromarray(stripes).save(png)                  # finer than the result can show: grey, no pattern
    assert np.abs(common.central_square(png, 32)[:, :, 2:-2].astype(int) - 127).max() <= 2


def write_odd(folder):
    """Images of every mode, that are to be read, and what they have to look like."""
    picture = photograph(1)
    grey = np.asarray(Image.fromarray(picture).convert("L"))
    Image.fromarray(grey).save(folder / "000011.jpg", quality=95)
    Image.fromarray(picture).convert("CMYK").save(folder / "000012.jpg", quality=98)
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "000013.png")
    Image.fromarray(picture).convert("RGBA").save(folder / "000014.png")
    Image.fromarray(picture).quantize(256).save(folder / "000015.png")
    rgb, square = picture[20:198].transpose(2, 0, 1), np.broadcast_to(grey[20:198], (3, 178, 178))
    return [square, rgb, square, rgb, rgb]


def test_grey_cmyk_16_bit_transparent_and_palette_images(celeba):
    wanted = write_odd(celeba)
    assert Image.open(celeba / "000012.jpg").mode == "CMYK"
    assert Image.open(celeba / "000013.png").mode.startswith("I")
    [images] = load()
    assert images.shape == (12, 3, 178, 178)
    for found, picture in zip(images[7:].numpy().astype(int), wanted):
        assert np.abs(found - picture).mean() < 6
    assert np.array_equal(images[9], wanted[2])         # 16 bits: exact, not cut off at 255


def test_images_that_cannot_be_read_are_named_and_left_out(celeba, capsys):
    whole = (celeba / "000001.jpg").read_bytes()
    (celeba / "000003.jpg").write_bytes(whole[:len(whole) // 2])
    (celeba / "000005.jpg").write_bytes(b"no image")
    (celeba / "000009.jpg").write_bytes(b"")
    jpeg(celeba / "000010.jpg", 1, width=100, height=120)
    jpeg(celeba / "face.jpg", 1), jpeg(celeba / "202600.jpg", 1), jpeg(celeba / "000000.jpg", 1)
    (celeba / "notes.txt").write_text("")
    [images] = load()
    printed = capsys.readouterr().out
    assert "left out 3 images whose names are no numbers from 1 to 202,599" in printed
    assert "celeba178-train.npy: 5 of CelebA's 162,770 images" in printed
    assert "4 of 9 images cannot be read" in printed and "100x120, expected 178x178 or more" in printed
    told = json.load(open("data/celeba178-train.json"))["left out"]
    assert [os.path.basename(file)[:-4] for file in told] == ["000003", "000005", "000009", "000010"]
    assert all(file in printed for file in told) and "truncated" in next(iter(told.values()))
    numbers = [1, 2, 6, 4, 7]                           # the last ones take the places of those left out
    assert images.shape == (5, 3, 178, 178)
    for found, number in zip(images.numpy(), numbers):
        assert np.array_equal(found, common.central_square(celeba / f"{number:06d}.jpg", 178))
    array = np.load("data/celeba178-train.npy")
    assert array.dtype == np.uint8 and array.shape == (5, 3, 178, 178)
    assert os.path.getsize("data/celeba178-train.npy") == 128 + array.size
    assert sorted(os.listdir("data")) == ["celeba", "celeba178-train.json", "celeba178-train.npy"]


def test_an_array_that_is_there_needs_no_folder(celeba, capsys):
    first = load()[0].clone()
    celeba.rename("elsewhere")
    capsys.readouterr()
    assert (load()[0] == first).all()
    assert capsys.readouterr().out.startswith("data/celeba178-train.npy: 7 of CelebA's 162,770 images")
    os.remove("data/celeba178-train.json")
    assert (load()[0] == first).all()                   # an array of the user's own


# ---- splits -----------------------------------------------------------------------------------------------


def test_celeba_s_standard_split(celeba):
    for number in (162_770, 162_771, 182_637, 182_638, 202_599):
        (celeba / f"{number}.jpg").write_bytes(b"")
    stems = {split: [os.path.basename(file)[:-4] for file in common.folder_files("celeba178", split, "data")]
             for split in ("train", "val", "test")}
    assert stems == {"train": [f"{i:06d}" for i in range(1, 8)] + ["162770"], "val": ["162771", "182637"],
                     "test": ["182638", "202599"]}
    (celeba / "9.jpg").write_bytes(b""), (celeba / "10.jpg").write_bytes(b""), (celeba / "again").mkdir()
    (celeba / "again" / "9.jpg").write_bytes(b"")
    files = common.folder_files("celeba178", "train", "data")       # by number, not by name, one of each
    assert [int(os.path.basename(file)[:-4]) for file in files] == [*range(1, 8), 9, 10, 162_770]


def test_a_split_without_images(celeba, capsys):
    train, test = load("celeba64", "train", "test")
    assert train.shape == (7, 3, 64, 64) and test is None
    assert "celeba64-test.npy: not built" in capsys.readouterr().out
    found = common.central_square(celeba / "000004.jpg", 64)
    assert np.array_equal(train[3], found)


def test_without_the_folder_one_array_is_enough(celeba, capsys):
    [train] = load("celeba64", "train")
    shutil.rmtree("data/celeba")
    again, test = load("celeba64", "train", "test")
    assert torch.equal(again, train) and test is None
    assert "celeba64-test.npy: not built" in capsys.readouterr().out


def test_bedrooms_and_imagenet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(25):
        folder = f"data/lsun/{i % 3}"
        os.makedirs(folder, exist_ok=True)
        jpeg(f"{folder}/{i:02}.webp" if i == 4 else f"{folder}/{i:02}.jpg", i, width=90, height=64)
    train, test = load("lsun64", "train", "test")
    assert train.shape == (22, 3, 64, 64) and test.shape == (3, 3, 64, 64)
    monkeypatch.setattr(common, "HELD_OUT", 2)
    parts = [common.folder_files("lsun64", split, "data") for split in ("train", "test")]
    assert len(parts[1]) == 3 and not set(parts[0]) & set(parts[1]) and sum(map(len, parts)) == 25
    for split, n in (("train", 4), ("val", 2)):
        for i in range(n):
            os.makedirs(f"data/imagenet/{split}/n{i % 2}", exist_ok=True)
            jpeg(f"data/imagenet/{split}/n{i % 2}/{i}.JPEG", i, width=100, height=80)
    assert [len(images) for images in load("imagenet64", "train", "val")] == [4, 2]


# ---- bad input, bad days ----------------------------------------------------------------------------------


def test_folders_without_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def offline(*args, **kwargs):
        raise RuntimeError("no route to host")
    monkeypatch.setattr(common.torchvision.datasets, "CelebA", offline)
    with says("celeba/img_align_celeba: not there", "no route to host", "img_align_celeba.zip", "--data"):
        load()
    with says("data/imagenet/train: not there", "put ILSVRC2012's train and val there"):
        load("imagenet64")
    os.makedirs("data/lsun")
    open("data/lsun/readme.txt", "w").close()
    with says("data/lsun: found no images (.jpg", "bedroom_train"):
        load("lsun64")
    assert not [name for name in os.listdir("data") if ".npy" in name]
    open("data/lsun/1.jpg", "w").close(), open("data/lsun/2.jpg", "w").close()
    with says("data/lsun: found 1 images of train, expected 2 or more"):        # the other one is held out
        load("lsun64")
    open("data/lsun/3.jpg", "w").close()
    with says("lsun64-train.npy: found 0 images that can be read, expected 2 or more"):
        load("lsun64")
    assert os.listdir("data") == ["lsun"]


def test_names_that_are_no_numbers(celeba, capsys):
    for i in range(2, 8):
        (celeba / f"{i:06d}.jpg").rename(celeba / f"face{i}.jpg")
    with says("img_align_celeba: found 1 images of train, expected 2 or more; named 000001.jpg and on"):
        load()
    assert os.listdir("data") == ["celeba"]


def test_one_image_is_no_split(celeba, capsys):
    jpeg(celeba / "202599.jpg", 1)
    assert load("celeba178", "train", "test")[1] is None
    assert "celeba178-test.npy: not built, data/celeba/img_align_celeba has 1 im" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_a_damaged_description_of_an_array(celeba, text):
    load()
    open("data/celeba178-train.json", "w").write(text)
    with says("data/celeba178-train.json says", "made as None, expected 'central square", "delete both"):
        load()


def test_what_could_not_be_read_is_tried_again(celeba):
    for i in range(2, 8):
        (celeba / f"{i:06d}.jpg").write_bytes(b"no image")
    with says("found 1 images that can be read"):
        load()
    for i in range(2, 8):
        jpeg(celeba / f"{i:06d}.jpg", i)
    assert len(load()[0]) == 7


def test_a_download_is_whole_or_not_there(tmp_path, monkeypatch):
    def partial(root, download):
        os.makedirs(f"{root}/celeba/img_align_celeba")
        for i in (1, 2, 3, 202_598, 202_599):
            jpeg(f"{root}/celeba/img_align_celeba/{i:06d}.jpg", i)
        if broken:
            raise OSError("no space")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common.torchvision.datasets, "CelebA", partial)
    broken = True
    with says("celeba/img_align_celeba: not there", "no space"):
        load()
    assert os.listdir() == []
    broken = False
    os.makedirs("data/celeba.tmp/celeba/img_align_celeba")      # of a kill
    assert [len(images) for images in load("celeba178", "train", "test")] == [3, 2]
    assert os.listdir("data/celeba") == ["img_align_celeba"] and not os.path.exists("data/celeba.tmp")


def test_too_little_disk(celeba, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(common.shutil, "disk_usage", lambda path: usage(9, 9, 7 * 3 * 178 ** 2 - 1))
    with says("celeba178-train.npy", "0.0 GB are needed", "0.0 GB are free", "--data"):
        load()
    assert os.listdir("data") == ["celeba"]
    monkeypatch.setattr(common.shutil, "disk_usage", lambda path: usage(9, 9, 7 * 3 * 178 ** 2))
    assert load()[0].shape == (7, 3, 178, 178)


def test_arrays_of_another_size_or_crop(celeba):
    load()
    told = json.load(open("data/celeba178-train.json"))
    json.dump(dict(told, images="upper left corner"), open("data/celeba178-train.json", "w"))
    with says("celeba178-train.npy", "upper left corner", "expected 'central square, 178x178", "delete both"):
        load()
    os.remove("data/celeba178-train.json")
    np.save("data/celeba178-train.npy", np.zeros((4, 3, 160, 160), np.uint8))
    with says("celeba178-train.npy", "found uint8 [4, 3, 160, 160], expected uint8 [N, 3, 178, 178]"):
        load()


BUILD = """import os, sys, time
sys.path.insert(0, {root!r})
import common
common.CHUNK, square = 2, common.central_square
def slowly(path, side):
    os.write(1, f"{{path}}\\n".encode())     # whole lines of two processes
    time.sleep(0.1)
    return square(path, side)
common.central_square = slowly
common.load_folders("celeba178", ("train",), "data")
"""


def test_kill_9_while_the_array_is_built(celeba):
    """The same call goes on with what was built; nothing is built twice, no worker is left behind."""
    for i in range(8, 26):
        jpeg(celeba / f"{i:06d}.jpg", i)
    (celeba / "000002.jpg").write_bytes(b"no image")
    typed = [sys.executable, "-c", BUILD.format(root=ROOT)]
    script = subprocess.Popen(typed, stdout=subprocess.PIPE, text=True)
    noted = "data/celeba178-train.npy.tmp.done"
    wait_for(lambda: os.path.exists(noted) and len(open(noted).readlines()) >= 4)
    script.send_signal(signal.SIGKILL)
    script.stdout.read()                # ends when the last worker has ended
    script.wait()
    chunks = dict(map(json.loads, open(noted).read().split("\n")[1:]))
    assert 3 <= len(chunks) < 13 and not os.path.exists("data/celeba178-train.npy")
    done = {chunk for chunk, bad in chunks.items() if not bad}      # what could not be read is tried again
    with open(noted, "a") as file:
        file.write("\n[12, {")          # what a full disk may leave
    typed[-1] = typed[-1].replace('"data"', '"./data"')
    again = subprocess.run(typed, stdout=subprocess.PIPE, text=True)
    read = [line for line in again.stdout.splitlines() if line.endswith(".jpg")]
    assert len(read) == 25 - sum(min(2, 25 - 2 * chunk) for chunk in done)
    assert f"{25 - len(read)} of them from before" in again.stdout and "000002.jpg: " in again.stdout
    images = np.load("data/celeba178-train.npy")
    numbers = [1, 25, *range(3, 25)]
    assert len(images) == 24
    for found, number in zip(images, numbers):
        assert np.array_equal(found, common.central_square(celeba / f"{number:06d}.jpg", 178))
    assert sorted(os.listdir("data")) == ["celeba", "celeba178-train.json", "celeba178-train.npy"]


def test_two_commands_build_one_array(celeba):
    """They wait for a third, then one for the other."""
    for i in range(8, 26):
        jpeg(celeba / f"{i:06d}.jpg", i)
    typed, waits = [sys.executable, "-c", BUILD.format(root=ROOT)], "data: waiting for another command, which"
    with common.alone_in("data"):
        scripts = [subprocess.Popen(typed, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        assert all(script.stdout.readline() == f"{waits} builds an array there\n" for script in scripts)
    printed = sorted((script.communicate()[0] for script in scripts), key=len)
    assert [script.returncode for script in scripts] == [0, 0]
    assert len(printed[0].splitlines()) == 1
    assert sum(line.endswith(".jpg") for line in printed[1].splitlines()) == 25
    for found, number in zip(np.load("data/celeba178-train.npy"), range(1, 26), strict=True):
        assert np.array_equal(found, common.central_square(celeba / f"{number:06d}.jpg", 178))


def test_the_first_command_is_alone_in_a_folder_that_it_makes(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    for name, kept in (("empty", False), ("filled", True)):
        folder = tmp_path / name
        with common.alone_in(str(folder)):
            other = os.open(folder, os.O_RDONLY)
            with pytest.raises(BlockingIOError):
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if kept:
                (folder / "file").touch()
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(other)
        assert folder.is_dir() == kept


class Full(io.FileIO):
    """A file on a disk that has room for two images and a half."""
    room = int(2.5 * 3 * 178 ** 2)

    def write(self, data):
        if not self.room:
            raise OSError(28, "No space left on device")
        n = super().write(memoryview(data).cast("B")[:self.room])
        self.room -= n
        return n


def test_a_full_disk_leaves_no_image_half_written(celeba, monkeypatch):
    """A raw file writes what fits and says nothing."""
    def on_full(path, mode="r", buffering=-1, **how):
        if mode != "r+b" or not path.endswith(".npy.tmp"):
            return open(path, mode, buffering, **how)
        raw = Full(path, mode)
        return io.BufferedRandom(raw) if buffering else raw
    monkeypatch.setattr(common, "CHUNK", 1)
    monkeypatch.setattr(common.os, "sched_getaffinity", lambda pid: {0}, raising=False)
    with monkeypatch.context() as patch, says("celeba178-train.npy", "ended (No space left", "2 of 7"):
        patch.setattr(common, "open", on_full, raising=False)
        load()
    [images] = load()
    for found, number in zip(images.numpy(), range(1, 8)):
        assert np.array_equal(found, common.central_square(celeba / f"{number:06d}.jpg", 178))


def test_a_half_built_array_of_other_files_is_begun_anew(celeba, monkeypatch):
    monkeypatch.setattr(common, "build_rows", lambda *args: os._exit(1))
    with says("celeba178-train.npy", "ended (exit code 1)", "0 of 7 images", "the same command goes on"):
        load()
    monkeypatch.undo()
    os.chdir(celeba.parent.parent.parent)
    with open("data/celeba178-train.npy.tmp.done", "a") as file:
        file.write("\n[0, {}]")         # of seven images
    jpeg(celeba / "000008.jpg", 8)
    [images] = load()
    assert len(images) == 8 and all(image.any() for image in images.numpy())


def test_progress(celeba, capsys, monkeypatch):
    monkeypatch.setattr(common, "CHUNK", 1)
    clock = iter(range(0, 10 ** 6, 3))
    monkeypatch.setattr(common.time, "perf_counter", lambda: next(clock))
    square = common.central_square
    monkeypatch.setattr(common, "central_square", lambda *args: time.sleep(0.3) or square(*args))
    load()
    printed = capsys.readouterr().out
    assert "built once, 7 images by" in printed and " images/s, " in printed and " left" in printed
    assert printed.startswith("data/celeba178-train.npy: ")
