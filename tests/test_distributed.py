"""Several processes: torchrun starts this file in two on a CPU, once; what they do is at its end."""
import os
import signal
import subprocess
import sys
from contextlib import suppress

import numpy as np
import pytest
import torch

import common
from conftest import says, tensors

STEPS, EVERY, SIGNAL = 130, 30, 65


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    env = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", PYTHONPATH=os.pathsep.join(sys.path))
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=99)
    assert done.returncode == 0, done.stderr
    files = "0.pt", "1.pt", "whole-0/checkpoint.pt", "parts/checkpoint.pt"
    return folder, done.stdout, *(torch.load(folder / name, weights_only=True) for name in files)


def test_gradients_are_the_mean_over_processes(several):
    found = [kept["gradients"] for kept in several[2:4]]
    wanted = [torch.autograd.grad(loss(state), list(state["f"].parameters())) for state in map(block, (0, 1))]
    assert not torch.allclose(wanted[0][0], wanted[1][0], rtol=0.01)
    for own, other, a, b in zip(*found, *wanted, strict=True):
        assert torch.equal(own, other) and torch.allclose(own, (a + b) / 2, rtol=1e-5, atol=1e-7)


def test_two_processes_train_one_run(several):
    """The same weights, other noise, a log of means; the first alone writes and prints; runs do not mix."""
    folder, printed, *kept, checkpoint, _ = several
    for own in kept:
        assert [name for name, _ in own["seen"]][:2 * STEPS] == ["whole"] * STEPS + ["second"] * STEPS
        assert all(torch.equal(own["f"][name], weights) for name, weights in checkpoint["state"]["f"].items())
    assert not torch.equal(*(own["rng"] for own in checkpoint["generators"]))
    assert sorted(os.listdir(folder)) == ["0.pt", "1.pt", "parts", "second-0", "whole-0"]
    log = common.read_log(folder / "whole-0")
    assert printed.count("whole-0 ") == len(log["step"]) == 5 and "whole-1" not in printed
    losses = np.array([[value for _, value in own["seen"][:STEPS]] for own in kept])
    means = [part.mean() for part in np.split(losses.mean(0), log["step"][:-1].astype(int))]
    assert np.abs(losses[0] - losses[1]).min() > 0 and np.allclose(log["loss"], means, rtol=1e-5)


def test_both_stop_at_one_update_and_go_on(several):
    """A signal to one of them. Resuming is bit for bit, but for the log's row at hand, which is rounded."""
    folder, _, a, b, *checkpoints = several
    assert a["saved"] == b["saved"] == [STEPS, STEPS, a["saved"][2], STEPS]
    assert SIGNAL <= a["saved"][2] < STEPS and a["saved"][2] % EVERY
    whole, parts = map(tensors, checkpoints)
    assert len(whole) == len(parts) > 16 and all(torch.equal(parts[at], value) for at, value in whole.items())
    assert np.allclose(*(common.read_log(folder / name)["loss"] for name in ("whole-0", "parts")), rtol=1e-5)


def test_devices_of_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")           # left behind by another program: not looked at
    common.join(None)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a"), monkeypatch.setenv("LOCAL_RANK", "")
    common.join(None)
    monkeypatch.setenv("RANK", "1"), monkeypatch.setenv("LOCAL_RANK", "1")
    with says("this script trains on one GPU"):
        common.setup("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with says("found 1 GPUs", "--device cpu"):
        common.join("cuda")


def block(number, folder=""):
    torch.manual_seed(0)
    f, rng = common.mlp(4, 8, 1), torch.Generator().manual_seed(number)
    log = common.Log(folder, ("loss",), STEPS, torch.device("cpu"))
    return dict(f=f, opt=common.optimizer(f, "adam", 1e-2, (0.5, 0.9)), rng=rng, log=log)


def loss(state):
    return state["f"](common.normal_noise(16, 4, state["rng"])).square().mean()


def train(folder, kept):
    state = block(common.ranks()[0], folder)
    step = common.load(folder, state, {})
    state["log"].start(step)
    while step < STEPS:
        value, step = loss(state), step + 1
        common.descend((state["opt"], value))
        state["log"].add(loss=value)
        kept["seen"].append((folder.split("-")[0], float(value)))
        if step == SIGNAL and folder == "parts" and common.ranks()[0] == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if step % EVERY == 0 or step == STEPS:
            state["log"].row(step)
        if (yield) or step == STEPS:
            common.save(folder, step, state, {})
            kept["saved"].append(step), kept.update(f=state["f"].state_dict())
    return {}


def main():
    common.join("cpu")
    common.AGREE = 0                    # at every update
    rank, kept, state = common.ranks()[0], dict(seen=[], saved=[]), block(common.ranks()[0])
    common.descend((state["opt"], loss(state)))
    kept["gradients"] = [p.grad for p in state["f"].parameters()]
    for names in ([f"whole-{rank}", f"second-{rank}"], ["parts"], ["parts"]):
        with suppress(KeyboardInterrupt):
            common.run_folders(names, __file__, True)
            common.interleave({name: train(name, kept) for name in names})
    torch.save(kept, f"{rank}.pt")


if __name__ == "__main__":
    common.run(main)
