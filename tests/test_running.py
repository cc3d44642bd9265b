"""Running and keeping: state put back, coroutines, logs, checkpoints, files that are whole or not there."""
import errno
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import common
from conftest import says

ROOT = os.path.dirname(os.path.abspath(common.__file__))


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- what capture() rests on, as far as a CPU shows it ----------------------------------------------------


def small_run():
    torch.manual_seed(0)
    network, generator = common.mlp(4, 8, 1), rng()
    optimizer = common.optimizer(network, (1e-2, 0.5, 0.9))

    def update():
        common.descend((optimizer, network(common.normal_noise(16, 4, generator)).square().mean()))
    return dict(network=network, optimizer=optimizer, rng=generator), update


def values(state):
    return {path: tensor.clone() for path, tensor in common.tensors(common.state_dicts(state)).items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[path], b[path]) for path in a)


def test_warm_up_updates_are_undone_in_place():
    """As in capture(): three updates, all state put back, then the first update that counts."""
    state, update = small_run()
    weight = state["network"][0].weight
    with common.restoring(state):
        for _ in range(3):
            update()
        moment = state["optimizer"].state[weight]["exp_avg"]
        assert moment.abs().max() > 0
    assert moment.abs().max() == 0 and state["optimizer"].state[weight]["step"] == 0
    assert state["optimizer"].state[weight]["exp_avg"] is moment and state["network"][0].weight is weight
    other, other_update = small_run()
    update(), other_update()
    assert equal(values(state), values(other))


def test_state_after_some_updates_is_put_back_too():
    state, update = small_run()
    update()
    before = values(state)
    with common.restoring(state):
        update()
        assert not equal(values(state), before)
    assert equal(values(state), before)


def test_capture_leaves_an_update_on_a_cpu_alone():
    state, update = small_run()
    before = values(state)
    assert common.capture(update, state) is update and equal(values(state), before)
    assert state["optimizer"].defaults["capturable"] is False      # Adam refuses it on a CPU


def test_tensors_are_the_live_ones():
    state, update = small_run()
    update()
    found = common.tensors(common.state_dicts(state))
    assert found["network", "0.weight"].data_ptr() == state["network"][0].weight.data_ptr()
    moments = state["optimizer"].state[state["network"][0].weight]
    assert found["optimizer", "state", 0, "exp_avg"] is moments["exp_avg"]


# ---- interleave -------------------------------------------------------------------------------------------


def test_interleave_takes_turns_and_returns_results():
    turns = []

    def run(name, n):
        for i in range(n):
            turns.append(name + str(i))
            yield
        return name

    assert common.interleave([run("a", 3), run("b", 1), run("c", 2)]) == ["a", "b", "c"]
    assert turns == ["a0", "b0", "c0", "a1", "c1", "a2"]
    assert common.interleave([]) == []


def test_ctrl_c_has_all_runs_save(capsys):
    """Every run that goes on is told once, at the same update; a second Ctrl-C interrupts at once."""
    saved, before = [], signal.signal(signal.SIGINT, signal.default_int_handler)

    def run(name, n, interrupts=()):
        for step in range(1, n + 1):
            if step in interrupts:
                os.kill(os.getpid(), signal.SIGINT)
            if (yield):
                saved.append((name, step))
        return name

    with pytest.raises(KeyboardInterrupt):
        common.interleave([run("a", 9), run("b", 9, interrupts=[3]), run("c", 2), run("d", 9)])
    assert saved == [("a", 3), ("b", 3), ("d", 3)] and "stopping" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(KeyboardInterrupt):
        common.interleave([run("e", 9, interrupts=[3, 4]), run("f", 9)])
    assert saved[3:] == [("e", 3)]                              # f was not asked any more
    assert common.interleave([run("g", 3, interrupts=[3])]) == ["g"]        # all had ended
    signal.signal(signal.SIGINT, before)


def test_what_is_not_finite_is_not_saved(tmp_path):
    """Ctrl-C comes between rows of the log: the last good checkpoint stays."""
    log = common.Log(str(tmp_path), ["loss"], 9, torch.device("cpu"))
    for step, loss in ((1, 0.5), (2, float("nan"))):
        log.add(torch.tensor(loss))
        common.save(str(tmp_path), step, dict(log=log), {})
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 1


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda *_: None])
def test_ctrl_c_is_left_to_who_has_it(handler):
    """As nohup and torchrun's processes have it."""
    def run():
        assert signal.getsignal(signal.SIGINT) is handler
        yield

    before = signal.signal(signal.SIGINT, handler)
    common.interleave([run()])
    assert signal.signal(signal.SIGINT, before) is handler


def test_a_run_that_diverges_ends_alone():
    def run(fails):
        yield
        if fails:
            raise FloatingPointError("diverged at update 2")
        yield
        return "done"

    first, second, third = common.interleave([run(False), run(True), run(False)])
    assert first == third == "done" and isinstance(second, FloatingPointError)
    with pytest.raises(ZeroDivisionError):      # a defect is no divergence

        def broken():
            yield 1 / 0
        common.interleave([broken()])


def test_ctrl_c_ends_with_a_word(capsys):
    def main():
        raise KeyboardInterrupt
    with pytest.raises(SystemExit) as end:
        common.run(main)
    assert end.value.code == 130 and "--resume" in capsys.readouterr().err


def test_a_full_disk_ends_with_a_word(tmp_path):
    def main():
        with common.replacing(f"{tmp_path}/checkpoint.pt"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with says("checkpoint.pt: No space left on device; make room", "--resume"):
        common.run(main)
    assert os.listdir(tmp_path) == []

    def broken():
        open(tmp_path / "missing")
    with pytest.raises(FileNotFoundError):      # a defect is not the user's
        common.run(broken)


def test_names_of_files_may_be_of_any_bytes():
    code = "import os, common; common.run(lambda: print(os.fsdecode(b'caf\\xe9.jpg')))"
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True,
                             env=dict(os.environ, PYTHONIOENCODING="utf-8:strict")).stdout
    assert printed.strip() == b"caf\\udce9.jpg"


# ---- files ------------------------------------------------------------------------------------------------


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "kept.txt"
    with common.replacing(path) as file:
        file.write(b"first")
    assert os.listdir(tmp_path) == ["kept.txt"]
    with pytest.raises(RuntimeError):
        with common.replacing(path) as file:
            file.write(b"sec")
            raise RuntimeError
    assert path.read_bytes() == b"first" and os.listdir(tmp_path) == ["kept.txt"]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with says(str(path), "name another"):
            common.make_folder(str(path))
    common.make_folder(str(tmp_path / "new" / "deep"))
    assert os.listdir(tmp_path / "new" / "deep") == []


def test_log(tmp_path, capsys):
    log = common.Log(str(tmp_path), ("loss_f", "loss_g"), 6, "cpu")
    log.start(0)
    for step, values in enumerate([(1.0, 2.0), (3.0, 6.0), (5.0, 5.0)], 1):
        log.add(*map(torch.tensor, values))
        if step != 1:
            log.row(step, shown=step == 2)
    read = common.read_log(tmp_path)
    assert {name: read[name].tolist() for name in ("step", "loss_f", "loss_g")} == {
        "step": [2, 3], "loss_f": [2, 5], "loss_g": [4, 5]}
    assert capsys.readouterr().out.split()[1:4] == ["2", "2", "4"]
    log.add(None, torch.tensor(1.0))
    log.row(4)
    assert np.isnan(common.read_log(tmp_path)["loss_f"][-1])
    assert capsys.readouterr().out.split()[1:4] == ["4", "-", "3"]     # both rows since the last shown
    log.add(torch.tensor(1.0), torch.tensor(float("inf")))
    log.add(torch.tensor(1.0), torch.tensor(1.0))
    with pytest.raises(FloatingPointError, match="diverged at update 6: loss_g is inf"):
        log.row(6)
    assert common.read_log(tmp_path)["step"].tolist() == [2, 3, 4]
    with open(tmp_path / "log.csv", "a") as file:
        file.write("1,2")       # what a kill in the middle of a row leaves
    log.start(3)                # rows after the checkpoint's update are dropped
    assert common.read_log(tmp_path)["step"].tolist() == [2, 3]


def test_checkpoints_hold_all_state(tmp_path):
    state, update = small_run()
    update(), common.save(tmp_path, 1, state, {"seed": 0})
    update()
    other, other_update = small_run()
    assert common.load(tmp_path, other, {"seed": 0}) == 1
    other_update()
    assert equal(values(state), values(other))
    assert common.load(tmp_path / "nowhere", other, {}) == 0


@pytest.mark.parametrize("settings, said", [
    ({"seed": 1, "BATCH": 64}, "seed = 0, expected 1"),
    ({"seed": 0, "BATCH": 32}, "BATCH = 64, expected 32"),
    ({"seed": 0}, "BATCH = 64, expected None"),
])
def test_checkpoints_of_other_settings_are_refused(tmp_path, settings, said):
    state, _ = small_run()
    common.save(tmp_path, 1200, state, {"seed": 0, "BATCH": 64})
    with says("checkpoint.pt", "1,200 updates", said, "--out"):
        common.load(tmp_path, state, settings)


def test_damaged_checkpoints_are_refused(tmp_path):
    state, _ = small_run()
    common.save(tmp_path, 1, state, {})
    whole = (tmp_path / "checkpoint.pt").read_bytes()
    for content in (whole[:len(whole) // 2], b"", b"no checkpoint"):
        (tmp_path / "checkpoint.pt").write_bytes(content)
        with says("checkpoint.pt", "no whole checkpoint", "delete it"):
            common.load(tmp_path, state, {})


def test_constants_are_the_upper_case_ones():
    given = {"BATCH": 64, "SIGMA": (1, 2.5), "NAME": "x", "METHODS": {}, "F": torch, "lower": 1}
    assert common.constants(given) == {"BATCH": 64, "SIGMA": [1, 2.5], "NAME": "x"}
    assert json.loads(json.dumps(common.constants(given))) == common.constants(given)


# ---- command line -----------------------------------------------------------------------------------------


def test_flags():
    parser = common.flags("doc", {"gram": 1, "gan": 2}, ["gram"], 500, images=True)
    args = parser.parse_args([])
    assert (args.method, args.seeds, args.steps, args.data, args.out) == (["gram"], 1, 500, "data", "runs")
    assert (args.resume, args.device, args.features) == (False, None, None)
    assert parser.parse_args(["--method", "gan", "gram", "--seeds", "3"]).method == ["gan", "gram"]
    for flag in ("--data", "--features"):
        with pytest.raises(SystemExit):
            common.flags("doc", {"gram": 1}, ["gram"], 1, images=False).parse_args([flag, "x"])


@pytest.mark.parametrize("wrong", [
    ["--seeds", "0"], ["--seeds", "-1"], ["--steps", "many"], ["--steps", "1.5"], ["--steps", ""],
    ["--method", "gramm"], ["--method"]])
def test_wrong_flags(wrong, capsys):
    with pytest.raises(SystemExit) as end:
        common.flags("doc", {"gram": 1}, "gram", 500, images=True).parse_args(wrong)
    assert end.value.code == 2 and wrong[0] in capsys.readouterr().err


def test_devices():
    assert common.setup("cpu").type == "cpu"
    for name in ("abacus", "meta", "cuda") if not torch.cuda.is_available() else ("abacus", "meta"):
        with says(f"--device {name}", "expected cpu, or cuda"):
            common.setup(name)


def test_tables_and_spreads():
    lines = common.table(["a", "long"], [["xyz", "1"]]).splitlines()
    assert lines == ["| a   | long |", "| --- | ---- |", "| xyz | 1    |"]
    assert common.mean_std([]) == "-" and common.mean_std([2.04]) == "2.0"
    assert common.mean_std([1.0, 2.0, 3.0]) == "2.0 ± 1.0"
