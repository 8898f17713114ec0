"""The CIFAR program as a user meets it: files, resuming, repeatability, and one line for every mistake."""

import json
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from filelock import FileLock
from torchvision.datasets import ImageFolder

import utils.program
import utils.training
from cifar.program import get_parser, main
from models import create_model
from utils.cli import UserError, run_program
from utils.program import build_model
from utils.recipe import limit_steps
from utils.statistics import published_name

ROOT = Path(__file__).parents[2]
SMALL = "--model preresnet.resnet20_lif --timesteps 2 --Vth 0.3 --alpha 0.3 --delta_t 0.2"
SMALL += " --train-batch 4 --warmup 2"
STEM = "preresnet.resnet20_lif"


def start(argv):
    run_program(lambda argv: main(argv, "test", lr=0.1), argv)


@pytest.fixture
def small(images, tmp_path):
    """Run the program on a few images with a small network; -> the folder of the run's files."""

    def run(flags="", seed=1, out="out"):
        fixed = (
            f"--dataset imagefolder --path {images} --checkpoint {tmp_path / out} --manualSeed {seed} {SMALL}"
        )
        start(shlex.split(f"{fixed} --epochs 2 --workers 0 --device cpu {flags}"))
        return tmp_path / out / "imagefolder"

    return run


def weights(folder, file=f"{STEM}.pth"):
    return torch.load(folder / file, weights_only=True)["state_dict"]


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_a_run_leaves_the_published_files(small, capsys):
    folder = small("--name _a")
    stem = STEM + "_a"
    expected = {
        f"{stem}{ending}" for ending in (".pth", "_best.pth", "_previous.pth", ".txt", ".pdf", ".json", "")
    }
    assert {path.name for path in folder.iterdir()} == expected | {f".{stem}.lock"}
    header, *rows = (folder / f"{stem}.txt").read_text().split("\n")
    assert header == "Learning Rate\tTrain Loss\tValid Loss\tTrain Acc.\tValid Acc."
    assert len(rows) == 3 and rows[2] == ""  # every line ends in a newline
    for row, lr in zip(rows, ("0.100000", "0.050000")):  # the cosine's value, warm-up apart
        assert re.fullmatch(lr + r"(\t\d+\.\d{6}){4}", row)
    saved = torch.load(folder / f"{stem}.pth", weights_only=True)
    assert saved.keys() >= {"epoch", "state_dict", "acc", "best_acc", "optimizer"}
    assert saved["epoch"] == 2 and saved["best_acc"] >= saved["acc"]
    assert float(rows[1].split("\t")[4]) == pytest.approx(saved["acc"], abs=1e-6)
    assert (folder / f"{stem}.pdf").read_bytes().startswith(b"%PDF")
    assert json.loads((folder / f"{stem}.json").read_text())["Vth"] == 0.3
    printed = capsys.readouterr().out
    assert "data: imagefolder, 10 training, 6 test, 2 classes" in printed
    assert all(str(folder / name) in printed for name in expected - {f"{stem}_previous.pth"})


def test_tensorboard_holds_curves_thresholds_and_firing_rates(small):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = small()
    events = EventAccumulator(str(folder / STEM))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert tags > {"loss/train", "loss/test", "top-1/train", "top-1/test", "top-5/test", "learning rate"}
    assert tags > {"images per second", "Vth/layer1[0].relu1", "firing rate/layer1[0].relu1", "Vth/relu3"}
    assert (
        len([tag for tag in tags if tag.startswith("Vth/")]) == 2 * 9 + 3
    )  # nine blocks, and three at the end
    assert [event.step for event in events.Scalars("loss/test")] == [0, 1]


def test_same_seed_same_weights_whatever_the_workers(small):
    first = weights(small(out="a"))
    assert same(first, weights(small("--workers 2", out="b")))
    assert not same(first, weights(small(seed=2, out="c")))


def test_resume_auto_goes_on_as_if_nothing_had_happened(small, monkeypatch, capsys):
    whole = small(out="whole")
    train_steps, calls = utils.training.train_steps, []

    def die_in_the_second_epoch(*args, **settings):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train_steps(*args, **settings)

    monkeypatch.setattr(utils.training, "train_steps", die_in_the_second_epoch)
    with pytest.raises(SystemExit) as end:
        small("--resume auto", out="broken")  # nothing there yet: a fresh start
    assert end.value.code == 130
    monkeypatch.undo()
    folder = small("--resume auto", out="broken")
    assert same(weights(whole), weights(folder))
    assert (folder / f"{STEM}.txt").read_text() == (whole / f"{STEM}.txt").read_text()
    capsys.readouterr()
    log = (folder / f"{STEM}.txt").read_text().splitlines(keepends=True)
    (folder / f"{STEM}.txt").write_text("".join(log[:-1]))  # as if killed behind its last checkpoint
    small("--resume auto", out="broken")
    assert "nothing left to train: 2 of 2 epochs are done" in capsys.readouterr().out
    assert (folder / f"{STEM}.txt").read_text() == (whole / f"{STEM}.txt").read_text()


def test_resume_auto_ignores_the_checkpoint_of_an_overwritten_run(small, monkeypatch, capsys):
    first = small()

    def die(*args, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(utils.training, "train_steps", die)
    with pytest.raises(SystemExit):
        small()  # a start without --resume, killed before its first checkpoint
    monkeypatch.undo()
    small("--resume auto")
    assert "starting afresh" in capsys.readouterr().out
    assert len((first / f"{STEM}.txt").read_text().splitlines()) == 3


def test_evaluate_counts_spikes_and_leaves_the_log_alone(small, capsys):
    folder = small()
    log = (folder / f"{STEM}.txt").read_text()
    small(f"--evaluate --rate_stat 1 --resume {STEM}.pth")  # looked up in the run's folder
    assert (folder / f"{STEM}.txt").read_text() == log
    accuracy = float(log.splitlines()[-1].split("\t")[4])
    printed = capsys.readouterr().out
    assert f"top-1 {accuracy:.2f} %" in printed
    rates = torch.load(folder / f"{STEM}_firing_rate.dict", weights_only=True)
    assert {"relu1", "relu2", "relu3", "layer1[0].relu1", "layer3[2].relu2"} < rates.keys()
    assert len(rates) == 21 and all(type(rate) is float and 0 <= rate <= 1 for rate in rates.values())
    assert all(f"{layer:20} {100 * rate:6.2f} %" in printed for layer, rate in rates.items())


@pytest.mark.parametrize("prefix", ["", "module."])
def test_an_official_checkpoint_loads(prefix, small, tmp_path, capsys):
    """The official format: none of our arguments, keys with or without `module.`, tensor figures."""
    torch.manual_seed(5)
    model = create_model(STEM, num_classes=2, timesteps=2)
    state = {prefix + key: value for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=5e-4)
    official = dict(epoch=1, state_dict=state, acc=torch.tensor(40.0), best_acc=torch.tensor(50.0))
    torch.save(dict(official, optimizer=optimizer.state_dict()), tmp_path / "official.pth")
    folder = small(f"--resume {tmp_path / 'official.pth'}")
    assert "1 epochs, best top-1 50.00 %" in capsys.readouterr().out
    assert torch.load(folder / f"{STEM}.pth", weights_only=True)["epoch"] == 2
    assert len((folder / f"{STEM}.txt").read_text().splitlines()) == 2  # header and the epoch that was run
    assert (folder / f"{STEM}_best.pth").exists()  # the best epoch of this run


def test_an_official_run_in_place_keeps_its_rows(small, capsys):
    """The newest official checkpoint and its log, where the official code left them."""
    folder = small("--epochs 1")
    saved = torch.load(folder / f"{STEM}.pth", weights_only=True)
    torch.save(
        {key: saved[key] for key in ("epoch", "state_dict", "acc", "best_acc", "optimizer")},
        folder / f"{STEM}.pth",
    )
    first = (folder / f"{STEM}.txt").read_text()
    small(f"--resume {STEM}.pth")
    log = (folder / f"{STEM}.txt").read_text()
    assert log.startswith(first) and len(log.splitlines()) == 3


def test_settings_that_differ_from_the_checkpoint_are_reported(small, capsys):
    folder = small("--epochs 1")
    small(f"--evaluate --resume {STEM}.pth --timesteps 3")
    assert "was trained with timesteps 2, now 3" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        small(f"--evaluate --resume {folder / STEM}.pth --model preresnet.resnet20_if")
    assert "checkpoint of preresnet.resnet20_lif" in end.value.code


def test_a_resumed_run_keeps_its_seed(small):
    """Zero too, and without the flag; the first epoch of one is that of two, since the cosine starts at 1."""
    whole = small(seed=0, out="whole")
    folder = small("--epochs 1", seed=0)
    arguments = json.loads((folder / f"{STEM}.json").read_text())
    again = " ".join(f"--{key} {arguments[key]}" for key in ("dataset", "path", "checkpoint"))
    start(shlex.split(f"{again} {SMALL} --epochs 2 --workers 0 --device cpu --resume {STEM}.pth"))
    assert same(weights(whole), weights(folder))


WAYS = ["--model preresnet.resnet20_ann", "--optimizer Adam --nesterov", "--nesterov", "--backward unrolled"]
WAYS += ["--backward rate --precision bf16", "--precision bf16 --model preresnet.resnet20_ann"]


@pytest.mark.parametrize("flags", WAYS)
def test_other_ways_to_train(flags, small):
    folder = small(flags + " --epochs 1")
    rows = next(folder.glob("*.txt")).read_text().splitlines()
    assert len(rows) == 2 and np.isfinite([float(field) for field in rows[1].split()]).all()


def test_collapsed_and_unrolled_train_the_same(small):
    collapsed, unrolled = (small(f"--epochs 1 --backward {b}", out=b) for b in ("collapsed", "unrolled"))
    key = "bn2.weight"  # float32: an early spike that flips by rounding moves the others
    torch.testing.assert_close(weights(collapsed)[key], weights(unrolled)[key], rtol=0.05, atol=0.05)
    assert json.loads((collapsed / f"{STEM}.json").read_text())["backward"] == "collapsed"


def test_without_a_compiler_the_plain_loop_runs(small, monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fail)
    assert (small("--epochs 1 --compile") / f"{STEM}.pth").is_file()
    line = capsys.readouterr().err.splitlines()[0]
    assert line.startswith("warning: --compile is left out") and "no C++ compiler" in line


LAYERS = [f"layer{stage}[{block}].relu{i}" for stage in (1, 2, 3) for block in (0, 1, 2) for i in (1, 2)]
LAYERS += ["relu1", "relu2", "relu3"]


def test_silent_network_is_reported(small, capsys):
    small("--epochs 1 --Vth 500")
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    first = "no spike of the first batch in layer1[0].relu1, layer1[0].relu2, layer1[1].relu1 and 18 more; "
    assert first + "the gradient" in warnings[0] and "say --Vth auto" in warnings[0]
    (later,) = warnings[1:]
    assert "no spike on the test set" in later and "--Vth auto" in later and later.endswith(", ".join(LAYERS))


def test_a_silent_last_layer_is_named_though_gradients_pass(small, capsys):
    """IF lets a gradient pass where a current's rate is exactly 0: that alone would hide the silence."""
    small("--model preresnet.resnet20_if --epochs 1 --Vth 5 --alpha 0.5")
    (first,) = [line for line in capsys.readouterr().err.splitlines() if "first batch" in line]
    assert "relu2, relu3; say --Vth auto" in first


MISTAKES = {
    "--model resnet18": "mean preresnet.resnet18_ann or preresnet.resnet18_if or preresnet.resnet18_lif?",
    "--model preresnet.resnet20if": "did you mean preresnet.resnet20_if or",
    "--dataset svhn": "imagefolder",
    "--preset fast": "quickstart",
    "--preset quickstrat": "did you mean quickstart?",
    "--optimizer rmsprop": "sgd",
    "--timesteps 0": "--timesteps",
    "--Vth 0": "--Vth",
    "--Vth nan": "--Vth",
    "--alpha 1.5": "--alpha",
    "--alpha 0": "--alpha",
    "--tau 0": "--tau",
    "--delta_t -1": "--delta_t",
    "--Vth 0.1 --Vth_bound 0.2": "--Vth_bound",
    "--train-batch 0": "--train-batch",
    "--test-batch -3": "--test-batch",
    "--epochs 0": "--epochs",
    "--workers -1": "--workers",
    "--lr inf": "--lr",
    "--nesterov --momentum 0": "--momentum",
    "--path {tmp}/nowhere": "{tmp}/nowhere",
    "--path {tmp}/empty": "{tmp}/empty",
    "--path {tmp}/differing": "green",
    "--path {tmp}/unreadable": "bad.png",
    "--path {tmp}/unreadable --workers 1": "bad.png",
    "--dataset cifar10": "cifar-10-python.tar.gz",
    "--dataset cifar100": "cifar-100-python.tar.gz",
    "--resume nothing.pth": "nothing.pth",
    "--resume {tmp}/truncated.pth": "truncated.pth",
    "--resume {tmp}/flipped.pth": "flipped.pth",
    "--resume {tmp}/text.pth": "text.pth",
    "--resume {tmp}/other.pth": "holds no state_dict",
    "--resume {tmp}/deeper.pth": "layer1.3",
    "--resume {tmp}/classes.pth": "bn2.bias is [5] instead of [2]",
    "--checkpoint {tmp}/file/below": "--checkpoint",
    "--name a/b": "--name",
    "--name 'a\tb'": "--name: characters in it that no line can show",
    "--path '{tmp}/\u202eempty'": "--path: characters in it that no line can show",
    "--device cuda": "--device",
    "--device tpu": "--device",
    "--model preresnet.resnet20_ann --train-batch 1": "batch size",
    "--no-such-flag 1": "--no-such-flag",
    "--model vgg.vgg11_lif": "event frames",
    "--dataset CIFAR10DVS": "event frames",
    "--dataset CIFAR10DVS --model vgg.vgg11_lif": "airplane.zip",
    "--manualSeed 99999999999999999999": "--manualSeed",
    "--evaluate --rate_stat 1 --checkpoint {tmp}/file/below": "--checkpoint",
    "--evaluate --rate_stat 1 --model preresnet.resnet20_ann": "ANN",
    "--evaluate --resume auto": "train first",
    "--name a_best": "ending",
    "--name a.run": "ending",
}


def make_mistakes(images, tmp):
    for name in ("empty", "differing", "unreadable"):
        for split in ("train", "test"):
            (tmp / name / split).mkdir(parents=True)
    for name in ("differing", "unreadable"):
        for path in images.glob("*/*/*.png"):
            folder = tmp / name / path.parent.relative_to(images)
            folder.mkdir(exist_ok=True)
            (folder / path.name).write_bytes(path.read_bytes())
    (tmp / "differing" / "test" / "red").rename(tmp / "differing" / "test" / "green")
    (tmp / "unreadable" / "train" / "red" / "bad.png").write_bytes(b"not an image")
    (tmp / "file").touch()
    for name, model, classes in (("deeper", "preresnet.resnet32_lif", 2), ("classes", STEM, 5)):
        state = create_model(model, num_classes=classes).state_dict()
        torch.save(dict(epoch=1, state_dict=state, acc=1.0, best_acc=1.0), tmp / f"{name}.pth")
    whole = bytearray((tmp / "classes.pth").read_bytes())
    (tmp / "truncated.pth").write_bytes(whole[: len(whole) // 2])
    whole[len(whole) // 2] ^= 1
    (tmp / "flipped.pth").write_bytes(whole)
    (tmp / "text.pth").write_text("hello")
    torch.save({"weights": 1}, tmp / "other.pth")


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


@pytest.mark.parametrize("flags", MISTAKES)
def test_a_mistake_gets_one_line(flags, small, images, tmp_path, no_network, monkeypatch, capsys):
    make_mistakes(images, tmp_path)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    mended, named = (text.replace("{tmp}", str(tmp_path)) for text in (flags, MISTAKES[flags]))
    with pytest.raises(SystemExit) as end:
        small(mended)
    message = end.value.code if isinstance(end.value.code, str) else capsys.readouterr().err
    assert end.value.code not in (0, None)
    assert message.startswith("error: ") and len(message.strip().splitlines()) == 1 and named in message
    if "unreadable" not in flags:  # found out when training has begun
        assert not (tmp_path / "out").exists()


def published_commands():
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    return re.findall(
        r"^(?:.*&& )?(?:python|torchrun) .*?(cifar/main_\w+\.py .*?)(?: #.*)?$", text, re.MULTILINE
    )


def test_the_read_me_gives_the_published_commands():
    commands = " | ".join(published_commands())
    for flags in ("--model preresnet.resnet18_lif --timesteps 5 --lr 0.05 --Vth 0.6", "--dataset cifar100"):
        assert flags in commands
    assert "main_multiple_gpus" in commands and "CIFAR10DVS" in commands and len(published_commands()) >= 12


@pytest.mark.parametrize("command", published_commands())
def test_commands_of_the_read_me_are_understood(command):
    script, *argv = shlex.split(command)
    assert (ROOT / script).is_file()
    args = get_parser("test", lr=0.1, processes="multiple" in script).parse(argv)
    model = build_model(args, 10, "cpu", create_model)
    assert sum(p.numel() for p in model.parameters()) > 0


def test_published_defaults():
    args = vars(get_parser("test", lr=0.1).parse([]))
    published = dict(dataset="cifar10", path="./data", workers=4, model="preresnet.resnet18_if", name="")
    published |= dict(timesteps=20, Vth=0.3, tau=1.0, delta_t=0.05, alpha=0.3, train_Vth=1, Vth_bound=0.0005)
    published |= dict(
        rate_stat=0, epochs=200, start_epoch=0, train_batch=128, test_batch=50, lr=0.1, warmup=400
    )
    published |= dict(
        momentum=0.9, nesterov=False, weight_decay=5e-4, optimizer="sgd", checkpoint="./checkpoint"
    )
    published |= dict(resume="", manualSeed=None, evaluate=False, pin_memory=False)
    assert {key: args[key] for key in published} == published


def test_a_resumed_run_may_change_where_and_how_not_what():
    parser = get_parser("test", lr=0.1, processes=True)
    free = "path test_batch local_rank name manualSeed checkpoint resume save_every print_freq evaluate"
    free += " rate_stat show_Vth workers pin_memory device engine compile deterministic preset"
    free += " warmup_within_first_epoch pre_train"
    assert set(vars(parser.parse([]))) - set(parser.fixed) == set(free.split())


def test_help_has_groups_and_leaves_the_presets_to_the_desk(capsys):
    with pytest.raises(SystemExit):
        get_parser("test", lr=0.1).parse(["--help"])
    printed = capsys.readouterr().out
    groups = re.findall(r"^(\w[\w ]*)[^:\n]*:$", printed, re.MULTILINE)
    assert [g.split()[0] for g in groups] == ["options", "data", "network", "recipe", "run", "engine"]
    assert "reproduce.py list" in " ".join(printed.split()) and "latency-if-t5" not in printed
    assert "(default: 20)" in printed and "(default: None)" not in printed
    assert re.search(r"--save_every N .*?\(default: 0\)", printed, re.DOTALL)


def test_command_line_before_preset_before_default():
    args = get_parser("test", lr=0.1).parse(["--preset", "quickstart", "--epochs", "3"])
    assert (args.epochs, args.model, args.momentum) == (3, "preresnet.resnet20_if", 0.9)


def test_runs_by_path_from_anywhere(images, tmp_path):
    """The published form: the script's path, no installation, any working directory."""
    script = str(ROOT / "cifar" / "main_single_gpu.py")
    flags = f"--dataset imagefolder --path images {SMALL} --epochs 1 --workers 1 --device cpu"
    command = [sys.executable, "-u", script, *shlex.split(flags)]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "checkpoint" / "imagefolder" / f"{STEM}_best.pth").is_file()
    assert "epoch 1/1: loss" in ended.stdout and "\r" not in ended.stderr  # no progress bar off a terminal


def test_fitted_thresholds_are_recorded_and_not_fitted_again(small, monkeypatch, capsys):
    folder = small("--Vth auto --train_Vth 0 --epochs 1 --show_Vth")
    assert re.search(r"^thresholds: \S+ to \S+, fitted to 10 training images$", capsys.readouterr().out, re.M)
    fitted = json.loads((folder / f"{STEM}.json").read_text())["fitted_Vth"]
    saved = {name: value.item() for name, value in weights(folder).items() if name.endswith("Vth")}
    assert len(fitted) == len(saved) == 21 and len(set(saved.values())) > 10
    assert sorted(fitted.values()) == pytest.approx(sorted(saved.values()))

    def again(*_, **__):
        raise AssertionError("fitted again")

    monkeypatch.setattr("cifar.program.fit_thresholds", again)
    small(f"--Vth auto --train_Vth 0 --epochs 2 --resume {folder / STEM}.pth")
    assert json.loads((folder / f"{STEM}.json").read_text())["fitted_Vth"] == fitted
    assert {name: value.item() for name, value in weights(folder).items() if name.endswith("Vth")} == saved
    content = torch.load(folder / f"{STEM}.pth", weights_only=True)
    for wrong in ("0.1", {"relu1": "0.1"}, {"relu1": -1.0}, {"relu1": float("nan")}):
        content["args"]["fitted_Vth"] = wrong
        torch.save(content, folder / "wrong.pth")
        with pytest.raises(SystemExit, match="fitted_Vth of the checkpoint are no thresholds"):
            small(f"--Vth auto --train_Vth 0 --epochs 3 --resume {folder / 'wrong.pth'}")


def test_a_step_changes_fitted_thresholds_by_two_percent_at_most(small):
    for flags, limited in (("--Vth auto", True), ("--Vth 1", False)):
        folder = small(f"{flags} --optimizer adam --lr 0.1 --epochs 1")
        fitted = json.loads((folder / f"{STEM}.json").read_text()).get("fitted_Vth") or defaultdict(lambda: 1)
        content = torch.load(folder / f"{STEM}.pth", weights_only=True)
        steps = int(content["optimizer"]["state"][0]["step"])
        saved = {name.removesuffix(".Vth"): v for name, v in content["state_dict"].items() if "Vth" in name}
        ratios = [value.item() / fitted[published_name(name)] for name, value in saved.items()]
        assert steps >= 1 and len(ratios) == 21
        inside = [0.98**steps - 1e-5 < ratio < 1.02**steps + 1e-5 for ratio in ratios]
        assert all(inside) if limited else not any(inside)  # Adam's first step has the size of lr
        assert not limited or any(abs(ratio - 0.98**steps) < 1e-5 for ratio in ratios)


def test_training_leaves_half_of_a_fitted_threshold():
    """Pushed down without end by 2 % a step, from 0.08 and 0.4, fitted were 0.1 and 0.4: to 0.05 and 0.2."""
    thresholds = {name: torch.nn.Parameter(torch.tensor(Vth)) for name, Vth in (("a", 0.08), ("b", 0.4))}
    optimizer = torch.optim.SGD(thresholds.values(), 1.0)
    limit_steps(optimizer, thresholds, dict(a=0.1, b=0.4))
    for _ in range(60):
        for Vth in thresholds.values():
            Vth.grad = torch.ones(())
        optimizer.step()
    assert [Vth.item() for Vth in thresholds.values()] == pytest.approx([0.05, 0.2])


def test_data_of_other_class_names_are_named(small, images, capsys):
    """Labels are numbers in the order of the names, which another name may change."""
    small("--epochs 1")
    small("--resume auto --evaluate")
    assert "class names" not in capsys.readouterr().err
    for split in ("train", "test"):
        (images / split / "blue").rename(images / split / "violet")
    small("--resume auto --evaluate")
    assert "trained on other class names than those here: blue, now red" in capsys.readouterr().err


def test_thresholds_of_other_neurons_are_named(small, capsys):
    """IF and LIF have state-dicts of the same names."""
    start = f"--pre_train {small('--epochs 1') / STEM}.pth --evaluate"
    capsys.readouterr()
    for flags, said in {
        f"{start} --model preresnet.resnet20_if": f"model {STEM}, now preresnet.resnet20_if; --Vth auto",
        f"{start} --delta_t 0.1": "delta_t 0.2, now 0.1; --Vth auto fits others",
        f"{start} --delta_t 0.1 --Vth auto": "",
        f"{start} --timesteps 3": "",
    }.items():
        small(flags)
        warning = capsys.readouterr().err
        assert said in warning and ("has thresholds for" in warning) == bool(said)


def test_starts_from_the_weights_of_an_ann(small, tmp_path):
    torch.manual_seed(0)
    ann = create_model("preresnet.resnet20_ann", num_classes=2).state_dict()
    torch.save({"state_dict": ann}, tmp_path / "ann.pth")
    state = weights(small(f"--pre_train {tmp_path}/ann.pth --Vth auto --lr 1e-30 --epochs 1"))
    learned = [key for key in ann if key.endswith(("weight", "bias"))]
    assert len(learned) > 60 and all((state[key] - ann[key]).abs().max() < 1e-20 for key in learned)


def test_two_runs_of_one_name_are_refused(small):
    folder = small("--epochs 1")
    before = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    with FileLock(folder / f".{STEM}.lock"), pytest.raises(SystemExit) as end:
        small("--epochs 2")
    assert f"{STEM} is running already" in end.value.code
    assert {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()} == before


def test_a_run_that_went_on_meanwhile_is_not_overwritten(small, monkeypatch):
    file, build = small("--epochs 1") / f"{STEM}.pth", utils.program.build_model

    def build_while_another_run_saves(*args):
        file.write_bytes(file.read_bytes())
        return build(*args)

    monkeypatch.setattr(utils.program, "build_model", build_while_another_run_saves)
    with pytest.raises(SystemExit) as end:
        small(f"--resume {STEM}.pth")
    assert f"{file} was written by another run while this one started" in end.value.code


def test_a_run_goes_on_whatever_the_language_of_its_folders(small, images, capsys):
    photographs = images.with_name("写真\u3000集 \u200c\U0001f468\u200d\U0001f52c")  # spaces, joiners
    photographs.symlink_to(images)
    for resume in ("", "--resume auto"):
        small(f"--epochs 1 --path '{photographs}' {resume}")
    printed = capsys.readouterr()
    assert "resumed from" in printed.out and "afresh" not in printed.out and "damaged" not in printed.err


def test_names_of_classes_may_be_numpys(small, monkeypatch):
    find = ImageFolder.find_classes

    def find_classes(*args):
        names, numbers = find(*args)
        return list(np.array(names)), numbers

    monkeypatch.setattr(ImageFolder, "find_classes", find_classes)
    folder = small("--epochs 1")
    assert torch.load(folder / f"{STEM}.pth", weights_only=True)["classes"] == ["blue", "red"]


def test_settings_that_make_no_network_get_one_line():
    args = get_parser("", lr=0.1).parse([])
    args.alpha = 2.0  # the parser would not take it, but a file may hold it
    with pytest.raises(UserError, match=r"no network preresnet.resnet18_if .*alpha must lie in \(0, 1\]"):
        build_model(args, 10, torch.device("cpu"), create_model)


def test_a_run_says_from_which_other_it_went_on(small):
    first = small("--epochs 1") / f"{STEM}.pth"
    small(f"--resume {first}", out="other")
    folder = small(f"--resume {STEM}.pth --epochs 3", out="other")
    assert json.loads((folder / f"{STEM}.json").read_text())["went_on_from"] == str(first)
    itself = folder / ".." / folder.name / f"{STEM}.pth"  # the run's own, by another name
    small(f"--resume {itself} --epochs 4", out="other")
    assert json.loads((folder / f"{STEM}.json").read_text())["went_on_from"] == str(first)
    assert json.loads((first.parent / f"{STEM}.json").read_text()).get("went_on_from") is None
