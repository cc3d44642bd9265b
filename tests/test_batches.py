"""Batches ahead of need, crops and flips by hand-made images."""
import threading
import time

import numpy as np
import pytest
import torch

import common


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def numbered(n, side=2):
    """n images, the i-th of them all i."""
    return torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 3, side, side).contiguous()


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def taken(batches, n):
    found = []
    for _ in range(n):
        batches.fill()
        assert (batches.x == batches.x[:, :1, :1, :1]).all()
        found.append(batches.x[:, 0, 0, 0].tolist())
    return found


def test_threads_give_the_batches_of_the_direct_path():
    """From a map of a file as well; after the state is put back, or loaded; they end when closed."""
    images, cpu = numbered(200), torch.device("cpu")
    direct = common.Batches(images, 16, 3, cpu)
    ahead = common.Batches(images, 16, 3, cpu, ahead=3)
    first = taken(direct, 12)
    assert taken(ahead, 12) == first and threads() and direct.waited == 0
    state = dict(batches=ahead)
    with common.restoring(state):
        assert taken(ahead, 2) == taken(direct, 2)
    again = taken(ahead, 4)
    direct.load_state_dict({"taken": torch.tensor(12)})
    assert again == taken(direct, 4) and int(ahead.taken) == 16
    ahead.load_state_dict({"taken": torch.tensor(0)})
    assert taken(ahead, 12) == first
    ahead.close(), direct.close()
    assert not threads()


def test_a_run_goes_on_with_its_own_images():
    state = common.Batches(numbered(20), 4, 0, torch.device("cpu")).state_dict()
    with pytest.raises(ValueError, match="found a run on 20 images, expected 19: "):
        common.Batches(numbered(19), 4, 0, torch.device("cpu")).load_state_dict(state)


def test_a_slow_disk_changes_nothing(monkeypatch):
    images, cpu = numbered(100), torch.device("cpu")
    wanted = taken(common.Batches(images, 8, 0, cpu), 20)
    select, real = common.take, threading.get_ident()

    def slow(*args, **kwargs):
        if threading.get_ident() != real:
            time.sleep(float(np.random.default_rng().uniform(0, 0.01)))
        return select(*args, **kwargs)
    monkeypatch.setattr(common, "take", slow)
    ahead = common.Batches(images, 8, 0, cpu, ahead=5)
    assert taken(ahead, 20) == wanted
    ahead.close()


@pytest.mark.parametrize("gather, update, least, most", [(0.0, 0.01, 0, 0.1), (0.04, 0.001, 0.8, 1),
                                                          (0.02, 0.015, 0.1, 0.4)])
def test_what_waits_for_a_thread(gather, update, least, most, monkeypatch):
    """A GPU's work, here by a clock, is one queue: time in which it has work is no waiting."""
    end, select = [time.perf_counter()], common.take

    class Stream:
        def synchronize(self):
            time.sleep(max(0.0, end[0] - time.perf_counter()))

    class Event:                            # of the copy, behind all that was asked for before
        at = 0.0

        def record(self):
            self.at = max(end[0], time.perf_counter())
            end[0] = self.at + update

        def synchronize(self):
            time.sleep(max(0.0, self.at - time.perf_counter()))

    def slow(*args, **kwargs):
        time.sleep(gather)
        return select(*args, **kwargs)

    ahead = common.Batches(numbered(50), 8, 0, torch.device("cpu"), ahead=1)
    ahead.copied, ahead.cuda = [Event() for _ in ahead.copied], True
    monkeypatch.setattr(common, "take", slow)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    began = time.perf_counter()
    for _ in range(60):
        ahead.fill()
    share = ahead.waited / (max(end[0], time.perf_counter()) - began)
    ahead.close()
    assert least <= share <= most, share


def test_errors_of_a_thread_are_raised():
    ahead = common.Batches(numbered(10), 4, 0, torch.device("cpu"), ahead=2)
    ahead.images = None
    with pytest.raises(TypeError):
        ahead.fill()
    ahead.close()


def test_batches_differ_and_are_uniform():
    images, cpu = numbered(200), torch.device("cpu")
    found = {(seed, rank): taken(common.Batches(images, 50, seed, cpu, rank), 40)
             for seed in (0, 1) for rank in (0, 1)}
    every = [tuple(batch) for batches in found.values() for batch in batches]
    assert len(set(every)) == 160
    counts = np.bincount(np.array(found[0, 0] + found[1, 1]).ravel(), minlength=200)
    assert counts.sum() == 4000 and counts.min() > 3 and counts.max() < 45 and 10 < counts.var() < 32


def test_where_images_go(capsys):
    images = numbered(3)
    assert common.on_device(images, torch.device("cpu")) is images and capsys.readouterr().out == ""


def test_crops_by_hand():
    """Each pixel says where it was: crops are squares, everywhere, uniformly, of one image each."""
    n, height, width, side = 600, 7, 5, 3
    images = (torch.arange(height)[:, None] * 10 + torch.arange(width)).expand(n, 2, -1, -1).clone()
    images[:, 1] += 100
    images += 200 * torch.arange(n)[:, None, None, None]
    found = common.crop_images(images, side, rng())
    assert found.shape == (n, 2, side, side)
    corner = found[:, 0, 0, 0] - 200 * torch.arange(n)
    top, left = corner // 10, corner % 10
    for i in range(n):
        assert torch.equal(found[i], images[i, :, top[i]:top[i] + side, left[i]:left[i] + side])
    assert sorted(set(top.tolist())) == [0, 1, 2, 3, 4] and sorted(set(left.tolist())) == [0, 1, 2]
    places = torch.bincount(top * 3 + left, minlength=15)
    assert places.min() > 20 and places.max() < 65
    assert not torch.equal(found, common.crop_images(images, side, rng(1)))
    square = images[:, :, :5]
    assert common.crop_images(square, 5, rng()) is square
    assert torch.equal(common.crop_images(images, side), common.crop_images(images, side))


def test_take(tmp_path):
    """Rows by their numbers, of tensors and of a file's map, anew or into what is given."""
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (20, 3, 4, 4), np.uint8))
    index = torch.tensor([7, 0, 19, 7])
    for x in (torch.randn(20, 5), common.read_array(str(tmp_path / "images.npy"), (3, 4, 4), "r")):
        out = x.new_zeros(4, *x.shape[1:])
        assert torch.equal(common.take(x, index), x[index])
        assert common.take(x, index, out) is out and torch.equal(out, x[index])
