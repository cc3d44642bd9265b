"""Several processes: gradients are the mean over blocks, training, a process that dies, resuming.

torchrun starts this file itself, see the end of it.
"""
import json
import os
import select
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]
import celeba  # noqa: E402
import common  # noqa: E402
from conftest import export, kept, says, wait_for  # noqa: E402
from test_celeba import METHODS, SMALL  # noqa: E402

ROWS = ("sn-smmd", "mmd-rqdot", "sobolev", "celeba64-gram", "celeba64-mmdgan")
RUN = "celeba-sn-smmd-s0"
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
ENVIRONMENT = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")


def block(method, number):
    """Gradients of critic and generator, averaged over processes, from a block of data and noise: float64."""
    row, rng = METHODS[celeba][method], torch.Generator().manual_seed(number)
    torch.manual_seed(0)
    networks = common.image_networks(row["nets"], row, 3, 32)
    g, f, decoder = (network and network.double() for network in networks)
    for p in f.parameters():
        p.data.mul_(4)              # far enough from 0 for a loss
    critic = torch.nn.ModuleList([network for network in (f, decoder) if network])
    kernel = common.kernels((1, 2), (), (1, 2), dtype=torch.float64).get(row["kernel"])
    x = torch.rand(6, 3, 32, 32, generator=rng, dtype=torch.float64)
    y = g(torch.rand(6, 8, generator=rng, dtype=torch.float64))
    opt_f, opt_g = (torch.optim.SGD(network.parameters(), 0.0) for network in (critic, g))
    if row["distance"] == "gram":
        K_all = common.gram(kernel, *common.both(f, x, y))
        objective, _ = common.gram_objective(*K_all, row["form"], row["ridge"], 1.0)
        common.descend((opt_f, -objective), (opt_g, common.mmd2(*K_all)))
    else:
        game = common.Game(row, f.eval(), decoder, kernel, rng).double()
        common.descend((opt_f, game.critic(x, y.detach())))
        common.descend((opt_g, game.generator(x, y)[0]))
    return [p.grad for network in (critic, g) for p in network.parameters()]


def torchrun(*args, check=True):
    """This file in two processes on the CPU."""
    done = subprocess.run([*LAUNCH, *map(str, args)], capture_output=True, text=True, timeout=120,
                          env=ENVIRONMENT)
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder where two processes have built arrays, trained for 8 updates and taken gradients."""
    folder = tmp_path_factory.mktemp("several")
    before = os.getcwd()
    os.chdir(folder)
    os.makedirs("data/celeba/img_align_celeba")
    rng = np.random.default_rng(0)
    for number in (*range(1, 61), *range(182_638, 182_668)):
        picture = Image.fromarray(rng.integers(0, 256, (40, 36, 3), np.uint8))
        picture.save(f"data/celeba/img_align_celeba/{number:06d}.jpg")
    export("features-tiny.pt2")
    done = torchrun("gradients", "--steps", 8, "--out", "whole", "--method", "sn-smmd", "sobolev")
    (folder / "printed").write_text(done.stdout)
    yield folder
    os.chdir(before)


def test_gradients_are_the_mean_of_those_of_both_blocks(folder):
    """Each block has its own MMD, scale, penalty and batch norm statistics."""
    found = [torch.load(f"gradients-{rank}.pt", weights_only=True) for rank in (0, 1)]
    for method in ROWS:
        blocks = [block(method, number) for number in (0, 1)]
        norm = sum(float((a + b).square().sum()) for a, b in zip(*blocks)) ** 0.5 / 2
        apart = sum(float((a - b).square().sum()) for a, b in zip(*blocks)) ** 0.5
        assert apart > 0.01 * norm > 0, method
        for own, other, a, b in zip(found[0][method], found[1][method], *blocks):
            assert torch.equal(own, other)
            assert float((own - (a + b) / 2).norm()) <= 1e-5 * max(float((a + b).norm()) / 2, 1e-9 * norm)


def test_two_processes_train_one_run(folder):
    """One log, the same weights and moments, other noise and data, the rates of the first."""
    printed = (folder / "printed").read_text()
    assert printed.count("built once, 60 images") == 1 and printed.count("built once, 30 images") == 1
    assert printed.count("updates/s") == 1 and printed.count(f"\n{RUN} ") == 4
    assert sorted(os.listdir(f"whole/{RUN}")) == [
        "celeba.py", "checkpoint.pt", "common.py", "log.csv", "result.json", "samples-4.png", "samples-8.png",
        "samples.npy", "singular-4.npz", "singular-8.npz"]
    for run in (RUN, "celeba-sobolev-s0"):
        a, b = (common.tensors(torch.load(f"rank{rank}-{run}.pt", weights_only=True)) for rank in (0, 1))
        alone = {path for path in a if path[0] in ("rng", "log", "adaptive", "x") or path[-1] == "loss"}
        assert a.keys() - alone == b.keys() - alone and len(a) > 100
        for path in a.keys() - alone:
            assert torch.equal(a[path], b[path]), path
        assert not torch.equal(a["rng",], b["rng",]) and not torch.equal(a["x",], b["x",])
        assert a["batches", "taken"] == 16
    assert float(a["game", "multiplier"]) == pytest.approx(8 * 1e-6 * -0.5, rel=1e-3)
    result = json.load(open(f"whole/{RUN}/result.json"))
    assert result["samples"] == 25
    assert result["command"].startswith("torchrun --nproc-per-node=2 celeba.py --device cpu ")
    log = common.read_log(f"whole/{RUN}")       # the third model fails, and the window has to fill anew
    assert np.isfinite(log["p"]).tolist() == [False, False, True, False]
    assert log["lr_g"] == pytest.approx([1e-4, 1e-4, 8e-5, 8e-5])
    a, b = (np.array(json.load(open(f"means-{rank}.json"))[RUN])[:, :2] for rank in (0, 1))
    assert np.abs(a - b).min() > 1e-3 * np.abs(a).max()         # the log has the means of both
    assert np.allclose((a + b) / 2, np.stack([log["loss_f"], log["loss_g"]], 1), rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_dies_ends_the_others_and_resuming_goes_on(folder, rank):
    began = time.time()
    done = torchrun(f"die{rank}", "--steps", 8, "--out", "parts", check=False)
    assert done.returncode and time.time() - began < 60
    words = [line for line in done.stderr.splitlines() if line.startswith("stopped")]
    assert len(words) == 1 and "--resume" in words[0]
    step, *_ = kept(f"parts/{RUN}")
    assert step == 4
    torchrun("train", "--steps", 8, "--out", "parts", "--resume")
    whole, parts = (torch.load(f"{out}/{RUN}/checkpoint.pt", weights_only=True) for out in ("whole", "parts"))
    assert len(whole["generators"]) == 2 and whole["settings"]["processes"] == 2
    for key in ("generators", "state"):
        a, b = common.tensors(whole[key]), common.tensors(parts[key])
        assert a.keys() == b.keys() and all(torch.equal(a[path], b[path]) for path in a)
    a, b = (common.read_log(f"{out}/{RUN}") for out in ("whole", "parts"))
    names = set(a.dtype.names) - {"seconds"}
    assert all(np.array_equal(a[name], b[name], equal_nan=True) for name in names)


@pytest.mark.parametrize("method, said", [
    ("nosuch", "invalid choice: 'nosuch'"), ("gram", "found rows of none")])
def test_what_all_processes_find_wrong_is_said_once(folder, method, said):
    done = torchrun("train", "--steps", 8, "--out", "never", "--method", method, check=False)
    assert done.returncode and done.stderr.count(said) == 1 and not os.path.exists("never")


def test_processes_end_when_torchrun_is_killed(folder):
    given = [*LAUNCH, "train", "--steps", "100000", "--out", "killed"]
    with open("killed.txt", "w") as words:
        agent = subprocess.Popen(given, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=words)
    wait_for(lambda: os.path.exists(f"killed/{RUN}/log.csv"))
    agent.kill()
    agent.wait()
    wait_for(lambda: "stopped" in open("killed.txt").read())
    time.sleep(2)
    size = os.path.getsize(f"killed/{RUN}/log.csv")
    time.sleep(1)
    assert os.path.getsize(f"killed/{RUN}/log.csv") == size
    assert open("killed.txt").read().count("stopped, as torchrun") == 1


def test_a_process_ends_with_its_parent_though_nobody_reads_its_words():
    child = (f"import sys, time; sys.path.insert(0, {ROOT!r}); import common; common.stop_when_told(0, []); "
             "print('ready', flush=True); time.sleep(1000)")
    command = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    parent = subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert parent.stdout.readline() == b"ready\n"
    parent.stderr.close()
    parent.kill()
    parent.wait()
    assert select.select([parent.stdout], [], [], 30)[0] and parent.stdout.read() == b""      # it has ended


def test_a_gpu_s_number_is_refused(monkeypatch):
    for name, value in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=2).items():
        monkeypatch.setenv(name, str(value))
    with says("--device cuda:1: expected cpu or cuda"):
        common.join("cuda:1")


def test_a_checkpoint_of_two_processes_is_refused_by_one(folder, monkeypatch):
    small(monkeypatch.setattr)
    with says("checkpoint.pt", "processes = 2, expected 1; use torchrun --nproc-per-node=2"):
        celeba.main(["--device", "cpu", "--features", "features-tiny.pt2", "--out", "whole", "--resume"])


def test_one_process_of_torchrun_is_as_without_it(folder, monkeypatch):
    small(monkeypatch.setattr)
    given = ["--device", "cpu", "--features", "features-tiny.pt2", "--steps", "2", "--method", "sn-gan"]
    celeba.main([*given, "--out", "without"])
    for name, value in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1).items():
        monkeypatch.setenv(name, str(value))
    celeba.main([*given, "--out", "with"])
    a, b = (kept(f"{out}/celeba-sn-gan-s0") for out in ("without", "with"))
    assert str(a[2]) == str(b[2]) and all(torch.equal(a[1][path], b[1][path]) for path in a[1])
    assert common.ranks() == (0, 1) and common.averaged(torch.ones(2))[0].tolist() == [1, 1]


def small(put):
    """celeba.py as test_celeba.py has it, each test of the rates failing."""
    failing = 2, 1, -1.0, 1e-6
    for name, value in dict(SMALL, ADAPT=failing, METHODS=METHODS[celeba],
                            SETS={name: dict(row, size=32) for name, row in celeba.SETS.items()}).items():
        put(celeba, name, value)
    put(common, "FOLDERS", {"celeba178": (36, *common.FOLDERS["celeba178"][1:])})


def process(what, *flags):
    """One of the processes that torchrun starts."""
    small(setattr)
    rank, save, row, out = int(os.environ["RANK"]), common.save, common.Log.row, flags[3]
    sobolev, means = common.sobolev, {}

    def save_own(folder, step, state, settings):
        save(folder, step, state, settings)
        if out == "whole":
            seen = dict(common.state_dicts(state), x=state["batches"].x)
            torch.save(seen, f"rank{rank}-{os.path.basename(folder)}.pt")

    def die(self, step, *args):
        if what == f"die{rank}" and step == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        means.setdefault(self.name, []).append((self.sums / self.sums[-1]).tolist())
        row(self, step, *args)

    def apart(*args):           # Sobolev's constraint, which in so small networks is the same for all data
        objective, omega = sobolev(*args)
        return objective, omega + rank

    common.save, common.Log.row, common.sobolev = save_own, die, apart
    celeba.main(["--device", "cpu", "--features", "features-tiny.pt2", *flags])
    common.sobolev = sobolev
    if out == "whole":
        json.dump(means, open(f"means-{rank}.json", "w"))
    if what == "gradients":
        torch.save({method: block(method, rank) for method in ROWS}, f"gradients-{rank}.pt")


if __name__ == "__main__":
    common.run(lambda: process(*sys.argv[1:]))
