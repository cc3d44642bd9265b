"""Running and keeping: turns, signals, optimizers, rates that adapt, logs, checkpoints, folders, flags."""
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch

import common
from conftest import says

ROOT, SIGNALS = os.path.dirname(common.__file__), (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def small(folder, seed=0):
    """The state of a small run, and its update."""
    torch.manual_seed(seed)
    network, rng = common.mlp(4, 8, 1), torch.Generator().manual_seed(seed)
    opt = common.optimizer(network, "adam", 1e-2, (0.5, 0.9))
    log = common.Log(str(folder), ("loss",), 6, torch.device("cpu"))

    def update():
        loss = network(common.normal_noise(16, 4, rng)).square().mean()
        common.descend((opt, loss))
        log.add(loss=loss)
    return dict(network=network, opt=opt, rng=rng, log=log), update


def together(folder, **runs):
    """The results of runs by their names, and of their files."""
    found = common.interleave({f"{folder}/{name}": run for name, run in runs.items()}, "python x.py")
    kept = {name: json.loads((folder / name / "result.json").read_text()) for name in runs}
    assert kept == {name: found[f"{folder}/{name}"] | dict(command="python x.py") for name in runs}
    return kept


def test_runs_take_turns(tmp_path):
    """50 updates in a row come first, of which the last 20 are timed."""
    turns = []

    def run(name, n):
        for i in range(n):
            turns.append(name)
            time.sleep(0.02 if i < 30 else 0.001 if i < 50 else 0)
            yield
        return dict(updates=n)
    results = together(tmp_path, a=run("a", 53), b=run("b", 51), c=run("c", 2))
    assert turns == ["a"] * 50 + ["b"] * 50 + ["c"] * 2 + ["a", "b", "a", "a"]
    assert [results[name]["updates"] for name in "abc"] == [53, 51, 2]
    assert all(1 <= results[name]["milliseconds"] < 15 for name in "ab") and together(tmp_path) == {}


def test_a_run_that_fails_ends_alone(tmp_path, capsys):
    def run(fails=None):
        yield
        if fails:
            raise fails
        return dict(done=True)
    full = OSError(28, "No space left", "log.csv")
    results = together(tmp_path, a=run(), b=run(common.RunError("diverged at 2")), c=run(full), d=run())
    assert results["a"]["done"] and results["b"]["failed"] == "diverged at 2" and results["d"]["done"]
    assert results["c"]["failed"] == str(full)
    assert "b: diverged" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="a mistake"):        # a defect is not the user's
        common.run(lambda: together(tmp_path, d=run(RuntimeError("a mistake")), e=run()))
    assert not os.path.exists(tmp_path / "e")


@pytest.mark.parametrize("number, at", [(SIGNALS[0], 7), *((number, 60) for number in SIGNALS)])
def test_a_signal_has_every_run_save(number, at, tmp_path, capfd):
    """Those that go on are asked once, at their next yields, wherever the signal came."""
    saved, before = [], [signal.getsignal(n) for n in SIGNALS]

    def run(me, n):
        for step in range(1, n + 1):
            if me == "b" and step == at:
                os.kill(os.getpid(), number)
            if (yield):
                saved.append((me, step))
        return {}
    with pytest.raises(KeyboardInterrupt):
        together(tmp_path, a=run("a", 90), b=run("b", 90), c=run("c", 3), d=run("d", 90))
    assert [me for me, _ in saved if me != "c"] == ["a", "b", "d"] and dict(saved)["b"] in (at, at + 1), saved
    assert capfd.readouterr().err.count("stopping") == 1 and [signal.getsignal(n) for n in SIGNALS] == before
    assert together(tmp_path, e=run("e", 60)) and dict(saved).keys() <= set("abcd")


def test_another_process(tmp_path):
    """It is refused a folder that this one holds; SIGHUP stays ignored; a second signal ends it at once."""
    common.run_folders([str(tmp_path)], __file__, True)
    code = f"""if True:
        import os, signal, common
        def run():
            yield
            for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM, signal.SIGTERM):
                os.kill(os.getpid(), number)
                print(number, flush=True)
        try:
            common.run(lambda: common.run_folders([{str(tmp_path)!r}], common.__file__, True))
        except SystemExit as end:
            print("code", end.code)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)            # as nohup does
        common.interleave({{"b": run()}})"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.count("another command trains there") == 1 and "Traceback" not in done.stderr
    assert done.stdout.split() == ["code", "1", "1", "1", "15"] and done.returncode == -signal.SIGTERM


def test_rates_are_changed_in_place():
    network = torch.nn.Linear(1, 1, bias=False)
    opts = [common.optimizer(network, kind, lr, (0.5, 0.9)) for kind, lr in (("adam", 0.1), ("rmsprop", 0.2))]
    assert [float(rate) for rate in common.rates(*opts)] == pytest.approx([0.1, 0.2])
    before = network.weight.item()
    for opt, rate in zip(opts, common.rates(*opts)):
        common.descend((opt, network.weight.sum()))
        assert network.weight.item() < before
        rate.fill_(0)
        before = network.weight.item()
        common.descend((opt, network.weight.sum()))
        assert network.weight.item() == before


def test_rates_that_adapt(tmp_path):
    """The rule, played on how far models are from the data; checkpoints on the way change nothing."""
    rng, window, patience, level, floor = np.random.default_rng(0), 3, 2, 0.1, 1e-3
    x = torch.tensor(rng.normal(size=(200, 4)))

    def make():
        state, _ = small(tmp_path)
        state["a"] = common.AdaptiveRate([state["opt"]], x, 0.5, window, patience, level, floor)
        return state
    state, models, failures, rate, cuts = make(), [], 0, 1e-2, 0
    for i, far in enumerate([*(0.3 * (rng.permutation(40) % 7)), *[3.0] * 15]):
        p = state["a"].step(torch.tensor(rng.normal(far, size=(200, 4))))
        if len(models) < window:
            models.append(far)
            assert p is None
        else:
            assert abs(far - models[0]) < 0.4 or (p > level) == (far > models[0])
            failures = failures + 1 if p > level else 0
            models = models if failures else [*models[1:], far]
            if failures == patience:
                models, failures, rate, cuts = [*models, far][-patience:], 0, max(rate / 2, floor), cuts + 1
        assert float(common.rates(state["opt"])[0]) == pytest.approx(rate, rel=1e-6)
        if i % 3 == 0:
            common.save(str(tmp_path), 1, state, {})
            state = make()
            common.load(str(tmp_path), state, {})
    assert cuts > 4 and rate == floor


def test_log(tmp_path, capsys, monkeypatch):
    path, now = tmp_path / "log.csv", 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    log = common.Log(str(tmp_path), ("loss_f", "loss_g", "none"), 62, torch.device("cpu"), ("fd", "kid"))
    log.start(0)
    for name, value in (("f", 1.0), ("f", 3.0), ("f", 8.0), ("g", 5.0), ("g", [1.0, np.nan, 5.0])):
        log.add(**{f"loss_{name}": torch.tensor(value)})
    now += 4
    log.row(2, lambda: dict(fd=7.5))
    assert capsys.readouterr().out.split()[1:] == "2 4 4 - 7.5 - 0.5 2:00".split()
    for step in (3, 4, 5):
        now += 1
        log.add(loss_f=torch.tensor(float(step)), loss_g=torch.tensor(1.0))
        log.row(step, shown=step == 5)
    assert capsys.readouterr().out.split()[1:] == "5 5 1 - - - 1.0 0:57".split()
    wanted = ["step,loss_f,loss_g,none,fd,kid,seconds", "2,4.0,4.0,,7.5,,4.00", "3,3.0,1.0,,,,5.00",
              "4,4.0,1.0,,,,6.00", "5,5.0,1.0,,,,7.00"]
    for bad in (np.nan, np.inf):
        log.add(loss_f=torch.tensor(1.0), loss_g=torch.tensor(bad))
        log.add(loss_g=torch.tensor(1.0))
        with pytest.raises(common.RunError, match=f"diverged at update 6: loss_g is {bad}"):
            log.row(6, lambda: 1 / 0)
    assert path.read_text().splitlines() == wanted
    path.write_text(path.read_text() + "3,2")       # what a kill in the middle of a row leaves
    for step, n in ((3, 3), (0, 1)):
        log.start(step)
        assert path.read_text().splitlines() == wanted[:n] and os.listdir(tmp_path) == ["log.csv"]
    path.write_text(old := "\n".join(wanted).replace(",", ";"))      # by a spreadsheet
    log.start(9)
    assert path.read_text().splitlines() == wanted[:1] and (tmp_path / "log.csv.old").read_text() == old


def test_checkpoints_that_do_not_fit(tmp_path):
    """Of other settings, networks, images or features; but scores and rates that adapt may begin later."""
    state, _ = small(tmp_path)
    settings = dict(seed=0, BATCH=64, images=[9, 99], features="a", reference=[8])
    common.save(str(tmp_path), 1_200, state, settings)
    whole, more = (tmp_path / "checkpoint.pt").read_bytes(), dict(state, more=state["network"])
    for content, own, changed, said in [
            (whole, state, dict(seed=1), "1,200 updates with seed = 0, expected 1; "),
            (whole, state, dict(BATCH=32), "BATCH = 64, expected 32; "),
            (whole, state, dict(C=1), "C = None, expected 1; "), (whole, more, {}, "more "),
            (whole, state, dict(images=[9, 98]), "images = [9, 99], expected [9, 98]; "),
            (whole, state, dict(features="b"), "features = a, expected b; "),
            (whole, state, dict(reference=[7]), "reference = [8], expected [7]; "),
            (whole, dict(state, network=common.mlp(4, 9, 1)), {}, "network "),
            *((part, state, {}, "delete it") for part in (whole[:len(whole) // 2], b"", b"no checkpoint"))]:
        (tmp_path / "checkpoint.pt").write_bytes(content)
        with says(f"{tmp_path}/checkpoint.pt: ", said, "--out" if content == whole else "anew"):
            common.load(str(tmp_path), own, settings | changed)
    (tmp_path / "checkpoint.pt").write_bytes(whole)
    assert common.load(str(tmp_path), state, settings | dict(features=None, reference=None)) == 1_200
    adaptive = common.AdaptiveRate([state["opt"]], torch.ones(9, 2), 0.5, 3, 2, 0.1, 1e-3)
    assert common.load(str(tmp_path), adapts := state | dict(adaptive=adaptive), settings) == 1_200
    common.save(str(tmp_path), 3, adapts, settings)
    with says("rates that adapt", "--features"):
        common.load(str(tmp_path), state, settings | dict(features=None))


def test_a_file_is_replaced_or_not_there(tmp_path):
    path = f"{tmp_path}/below/kept.txt"
    with common.replacing(path) as file:
        file.write(b"first")
    for failure in (RuntimeError(), KeyboardInterrupt(), OSError(28, "No space left on device")):
        with pytest.raises(type(failure)) as error, common.replacing(path) as file:
            file.write(b"second")
            raise failure
        assert open(path, "rb").read() == b"first" and os.listdir(tmp_path / "below") == ["kept.txt"]
    assert path in str(error.value) and "No space" in str(error.value)
    with says(path), common.replacing(f"{path}/deeper"):
        pass


def test_run_folders(tmp_path, capsys):
    """Sources are copied; what is not gone on with is put aside, once all are locked; temporary files go."""
    folder, other, script = f"{tmp_path}/out/run", f"{tmp_path}/out/other", tmp_path / "script.py"
    for n, (resume, kept) in enumerate([(False, "log.csv"), (True, "checkpoint.pt"), (False, "checkpoint.pt"),
                                        (True, "notes.tmp.txt")]):
        script.write_text(f"version {n}")
        common.run_folders([other, folder], str(script), resume)
        said = capsys.readouterr().out
        assert said.count("held an earlier run") == (n in (1, 2)) and ("--resume" in said) == (n == 2)
        with open(f"{folder}/{kept}", "x") as file:
            file.write(str(n))
    for name in ("a.png.7.tmp", "training.7.tmp.gif"):              # as a kill leaves them
        open(f"{folder}/{name}", "w").close()
    common.run_folders([folder], f"{folder}/script.py", True)       # a copied script, in place
    for end, texts in (("", {"checkpoint.pt": "2", "notes.tmp.txt": "3"}), ("-old-1", {"log.csv": "0"}),
                       ("-old-2", {"checkpoint.pt": "1"})):
        found = {file: open(f"{folder}{end}/{file}").read() for file in os.listdir(f"{folder}{end}")}
        assert found.pop("common.py") == open(common.__file__).read()
        assert found.pop("script.py").startswith("version") and found == texts, end
    assert sorted(os.listdir(tmp_path / "out")) == ["other", "run", "run-old-1", "run-old-2"]


def test_flags(capsys):
    parser = common.flags("doc", {"gram": {}, "gan": {}}, "gram", 500, images=True)
    none = dict.fromkeys("method steps device features samples".split())
    assert vars(parser.parse_args([])) == dict(none, resume=False, out="runs", data="data", seeds=range(1))
    args = parser.parse_args("--method gan gram+critic=8 --seeds 3 --steps 7".split())
    assert (args.method, list(args.seeds), args.steps) == (["gan", "gram+critic=8"], [0, 1, 2], 7)
    assert list(parser.parse_args(["--seeds", "5:8"]).seeds) == [5, 6, 7]
    rings = common.flags("doc", {"gram": {}}, "gram", 1, images=False)
    for wrong in ("--seed=3", "--meth=gan", "--seeds=x", "--steps=x", "--method", "--data=x",
                  "--device=abacus", "--seeds=5:5", "--seeds=-3:2", f"--steps={10 ** 20}"):
        with pytest.raises(SystemExit):
            rings.parse_args([wrong])
        assert wrong.split("=")[0] in capsys.readouterr().err


def test_errors_become_a_line_and_a_code(tmp_path, capsys):
    def main():
        raise error
    errors = ValueError("found a"), OSError(28, "Full", "f.pt"), common.RunError("none"), KeyboardInterrupt()
    for error, code, said in zip(errors, (1, 1, 1, 130), ("found a", "f.pt", "none", "--resume")):
        with pytest.raises(SystemExit) as end:
            common.run(main)
        [line] = capsys.readouterr().err.splitlines()
        assert end.value.code == code and said in line
    def stopped():                                  # where nothing trains: what it builds leaves nothing
        with common.replacing(path):
            signal.raise_signal(signal.SIGTERM)
    before, path = signal.getsignal(signal.SIGTERM), f"{tmp_path}/array.npy"
    with pytest.raises(SystemExit) as end:
        common.run(stopped)
    assert end.value.code == 128 + signal.SIGTERM and capsys.readouterr().err.count("\n") == 1
    assert os.listdir(tmp_path) == [] and signal.getsignal(signal.SIGTERM) == before
    with pytest.raises(ZeroDivisionError):          # a defect is not the user's
        common.run(lambda: 1 / 0)
    if not torch.cuda.is_available():
        with says("--device cuda", "expected cpu"):
            common.setup("cuda")


def test_output_that_nobody_reads(capsys):
    """A pipe without a reader, a closed stream, none at all: what is written is lost, nothing is raised."""
    reader, writer = os.pipe()
    os.close(reader)
    pipe, closed = open(writer, "w"), open(os.devnull, "w")
    closed.close()
    for stream in (pipe, closed, None):
        for _ in range(2):
            print("lost", file=common.Terminal(stream), flush=True)
    pipe.close()                                    # what was left in its buffer goes nowhere
    print("caf\u00e9 \udcff", file=common.Terminal(sys.stdout))
    assert "caf\u00e9" in capsys.readouterr().out and common.Terminal(sys.stdout).encoding


def test_a_backend_that_is_not_there():
    """A command in a notebook inherits its kernel's; one that is there is kept."""
    code = "import os, common; common.Figure().subplots(); print(os.environ.get('MPLBACKEND'))"
    for name, kept in (("no such", "None"), ("svg", "svg")):
        env = dict(os.environ, MPLBACKEND=name)
        said = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=env, text=True)
        assert said.split() == [kept]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_disk_that_is_full(tmp_path, monkeypatch):
    """One OSError that names the file, and the file before stays."""
    common.save_tensors(path := f"{tmp_path}/a.pt", dict(x=torch.ones(3)))
    full = partial(open, "/dev/full", buffering=0)
    monkeypatch.setattr(common, "open", lambda path, mode: full(mode=mode), raising=False)
    with says("No space left", path):
        common.save_tensors(path, dict(x=torch.zeros(99_999)))
    assert os.listdir(tmp_path) == ["a.pt"] and torch.load(path)["x"].sum() == 3
