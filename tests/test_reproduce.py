"""The reproduction desk: every row is there and trains, runs go on and are not repeated, table and report."""

import json
import os
import re
import shlex
import shutil
import signal
import time
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import nn

import imagenet.main
import reproduce
from cifar import predict
from cifar.program import get_parser
from models import create_model
from tests.forks import ended, fork
from utils.cli import run_program
from utils.program import build_model
from utils.report import fan_out
from utils.thresholds import calibrate

ROOT = Path(__file__).parents[1]

# As reported: name and figure, table by table.
PAPER = """\
main-cifar10-if 95.24 ± 0.17 | main-cifar10-lif 95.40 ± 0.15 | main-cifar10-ann 95.41
main-cifar100-if 78.20 ± 0.13 | main-cifar100-lif 78.50 ± 0.12 | main-cifar100-ann 78.12
main-dvscifar10-if 75.03 ± 0.39 | main-dvscifar10-lif 77.27 ± 0.24
main-imagenet-ann - | main-imagenet-calibrate - | main-imagenet-snn 67.74
latency-if-t20 95.24 | latency-lif-t20 95.40 | latency-if-t15 94.85 | latency-lif-t15 95.39
latency-if-t10 94.69 | latency-lif-t10 94.47 | latency-if-t5 94.48 | latency-lif-t5 94.42
depth-if-20 92.67 | depth-lif-20 92.82 | depth-if-32 93.73 | depth-lif-32 93.74 | depth-if-44 93.74
depth-lif-44 93.99 | depth-if-56 94.15 | depth-lif-56 94.03 | depth-if-110 94.61 | depth-lif-110 94.60
ablation-trained-vth6-alpha0.5 95.24 | ablation-fixed-vth6-alpha1 90.21
ablation-fixed-vth6-alpha0.5 90.45 ± 1.84 | ablation-fixed-vth2-alpha0.5 90.47 ± 0.12
ablation-trained-vth6-alpha1 92.88 ± 0.25"""
FIGURES = dict(cell.strip().split(" ", 1) for cell in PAPER.replace("\n", "|").split("|"))


def test_list_shows_every_row(tmp_path, capsys):
    reproduce.main(["list", "--checkpoint", str(tmp_path)])
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    for row, figure in FIGURES.items():
        assert re.match(rf"{row} +{figure} +[\d.e+-]+ +[\d.e+-]+  -$", lines[row])
    assert reproduce.ROWS.keys() == FIGURES.keys()


# Images for training, and the shape of a batch of one for a single time step.
DATA = {"cifar10": (50_000, (1, 3, 32, 32)), "cifar100": (50_000, (1, 3, 32, 32))}
DATA |= {"CIFAR10DVS": (9_000, (1, 1, 2, 48, 48)), "imagenet": (1_281_167, (1, 3, 224, 224))}


@cache
def macs(model, shape):
    """Multiply-accumulates of one image through the network at one time step, layer by layer."""
    network, total = create_model(model, timesteps=1, backward="unrolled").eval(), []

    def count(layer, inputs, output):
        total.append(fan_out(layer, inputs[0], output).sum().item())

    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_hook(count)
    with torch.no_grad():
        network(torch.zeros(shape))
    return sum(total)


def test_costs_are_those_of_the_networks():
    for row, preset in reproduce.ROWS.items():
        args = reproduce.PROGRAMS[row].get_parser().parse(["--preset", row])
        training, shape = DATA[args.dataset]
        images = args.calibrate_batches * args.train_batch if "calibrate" in row else args.epochs * training
        steps = args.timesteps if args.model.endswith(("_if", "_lif")) else 1
        assert float(preset.cost) == pytest.approx(macs(args.model, shape) * images * steps / 1e15, rel=0.005)


# 200 epochs of 50,000 images, T=20; ResNet-18 has 0.56 G multiply-accumulates with the borders' padding.
def test_cost():
    costs = {row: float(preset.cost) for row, preset in reproduce.ROWS.items()}
    assert costs["main-cifar10-lif"] == pytest.approx(0.56e9 * 20 * 200 * 50000 / 1e15, rel=0.2)
    assert costs["main-imagenet-ann"] == pytest.approx(1.82e9 * 90 * 1281167 / 1e15, rel=0.2)


def published(text, *flags):
    """The published command with these flags, among those in `text`."""
    commands = re.findall(
        r"^ *python (?:-u )?(?:cifar/main_single_gpu|imagenet/main)\.py (.*)$", text, re.MULTILINE
    )
    return next(shlex.split(c) for c in commands if all(f" {flag} " in f" {c} " for flag in flags))


RESNET, VGG = "--model preresnet.resnet18", "--model vgg.vgg11"
PUBLISHED = {
    f"main-{d}-{n}": (f"{RESNET}_{n}", f"--dataset {d}")
    for d in ("cifar10", "cifar100")
    for n in ("if", "lif")
}
PUBLISHED |= {f"main-dvscifar10-{n}": (f"{VGG}_{n}", "--dataset CIFAR10DVS") for n in ("if", "lif")}
PUBLISHED |= {f"latency-{n}-t5": (f"{RESNET}_{n}", "--timesteps 5") for n in ("if", "lif")}


@pytest.mark.parametrize("row", PUBLISHED)
def test_a_row_is_its_published_command(row):
    argv = published((ROOT / "README.md").read_text(), *PUBLISHED[row])
    parser = get_parser("", lr=0.1)
    told, preset = (vars(parser.parse(a)) for a in (argv, ["--preset", row]))
    assert {name: told[name] for name in parser.fixed} == {name: preset[name] for name in parser.fixed}


def test_the_chain_is_the_published_one():
    text = imagenet.main.__doc__.replace("\n        ", " ")
    for row, arch in (("ann", "ann.resnet18"), ("calibrate", "cal_Vth.resnet18"), ("snn", "snn.resnet18_if")):
        lines = re.findall(rf"python imagenet/main.py (.*--arch preresnet_{arch} .*)", text)
        argv = (["--preset", f"main-imagenet-{row}"], shlex.split(lines[0]))
        parser = imagenet.main.get_parser()
        preset, told = (vars(parser.parse(a)) for a in argv)
        differ = {key for key in parser.fixed if told[key] != preset[key]}
        assert differ <= {"calculate_Vth"}  # whose name is free


@pytest.mark.parametrize("flags", [[], ["--data", "tiny", "--image_size", "64", "--batch-size", "256"]])
def test_the_stages_of_the_chain_find_each_other(flags):
    ann, thresholds, snn = (
        reproduce.plan(f"main-imagenet-{stage}", 2, flags) for stage in ("ann", "calibrate", "snn")
    )
    assert thresholds[1].pre_train == snn[1].pre_train == ann[2].checkpoint.name
    assert snn[1].load_Vth == thresholds[1].calculate_Vth + ".dict"
    assert "_s2" in snn[1].load_Vth and ("tiny" in snn[1].load_Vth) == bool(flags)


@pytest.mark.parametrize("row", dict.fromkeys(reproduce.FIRST.values()))  # the others have equal settings
def test_a_preset_builds_and_trains_a_step(row):
    torch.manual_seed(0)
    args = reproduce.PROGRAMS[row].get_parser().parse(["--preset", row])
    args.timesteps = min(args.timesteps, 2)
    model = build_model(args, 4, "cpu", create_model)
    x = torch.rand(2, args.timesteps, 2, 48, 48) if "vgg" in args.model else torch.randn(2, 3, 32, 32)
    if row == "main-imagenet-calibrate":
        assert all(value > 0 for value in calibrate(model, [x], 2).values())
        return
    loss = F.cross_entropy(model(x), torch.tensor([0, 3]))
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())
    has_thresholds = any(name.endswith("Vth") for name, _ in model.named_parameters())
    assert has_thresholds == (bool(args.train_Vth) and args.model.endswith(("_if", "_lif")))


def test_no_name_of_a_run_ends_like_a_file_of_another():
    for path in ("x_best", "x_previous", "x.run"):
        name = reproduce.name_of("latency-lif-t5", 1, ["--dataset", "imagefolder", "--path", path])
        assert not name.endswith(path)


@pytest.mark.parametrize(
    ("row", "flags", "name"),
    [
        ("main-imagenet-ann", "--data data/imagenet/", "main-imagenet-ann_s1"),
        ("main-imagenet-ann", "--pre_train x.pth", "main-imagenet-ann_s1_pre_train-x.pth"),
        ("main-dvscifar10-lif", "--path /elsewhere/CIFAR10DVS", "main-dvscifar10-lif_s1"),
        ("main-dvscifar10-lif", "--path data/synthetic", "main-dvscifar10-lif_s1_path-synthetic"),
        ("main-cifar10-if", "--path /elsewhere", "main-cifar10-if_s1"),  # whose files are checked
        (
            "main-cifar10-if",
            "--dataset imagefolder --path .",
            "main-cifar10-if_s1_dataset-imagefolder_path-here",
        ),
    ],
)
def test_a_path_is_known_by_its_last_part(row, flags, name, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert reproduce.name_of(row, 1, flags.split()) == name


def flags(images, tmp_path, epochs):
    text = (
        f"--dataset imagefolder --path {images} --checkpoint {tmp_path}/out --epochs {epochs} --timesteps 2"
    )
    return shlex.split(f"{text} --Vth 0.3 --delta_t 0.2 --train-batch 4 --workers 0 --device cpu")


def test_a_killed_run_goes_on_and_a_finished_one_is_not_repeated(images, tmp_path, capfd):
    argv = ["run", "depth-lif-20", *flags(images, tmp_path, epochs=3)]
    printed = tmp_path / "printed"
    desk = fork(lambda: run_program(reproduce.main, argv), printed)
    deadline = time.monotonic() + 60
    while not (printed.exists() and "epoch 1/3" in printed.read_text()):
        assert time.monotonic() < deadline, printed.read_text()
        time.sleep(0.01)
    with pytest.raises(SystemExit) as end:
        run_program(reproduce.main, argv)
    assert "is running already" in end.value.code
    os.kill(desk, signal.SIGTERM)
    assert ended(desk) == 128 + signal.SIGTERM
    folder = tmp_path / "out" / "imagefolder"
    (log,) = folder.glob("*_depth-lif-20_s1_*.txt")
    assert 2 <= len(log.read_text().splitlines()) < 4
    reproduce.main(argv)
    assert "resumed from" in capfd.readouterr().out
    assert len(log.read_text().splitlines()) == 4
    sessions = json.loads(log.with_suffix(".run.json").read_text())
    assert len(sessions) == 2 and sessions[0]["started"] <= sessions[1]["started"]
    assert all(session.keys() >= {"hardware", "torch", "commit", "command"} for session in sessions)
    before = time.time()
    reproduce.main(argv)
    assert "seed 1, is finished" in capfd.readouterr().out
    assert log.stat().st_mtime < before and len(list(folder.glob("*.txt"))) == 1
    for name, start in {"c.png": b"\x89PNG", "c.pdf": b"%PDF"}.items():
        reproduce.main(["curves", "lif-20_s1", "-c", str(tmp_path / "out"), "--out", str(tmp_path / name)])
        assert (tmp_path / name).read_bytes().startswith(start)
    shutil.copytree(images, tmp_path / "other" / images.name)
    other = tmp_path / "other" / images.name
    capfd.readouterr()
    reproduce.main(["run", "depth-lif-20", *flags(other, tmp_path, epochs=3)])
    assert f"began on {images}, not {other}: unless it is the same" in capfd.readouterr().err
    whole = log.read_text()
    log.write_text("".join(whole.splitlines(keepends=True)[:-1]))  # as if killed behind its last checkpoint
    reproduce.main(argv)
    assert log.read_text() == whole
    page = write_table(tmp_path)
    accuracy = float(log.read_text().split()[-1])
    cells = next(line for line in page.splitlines() if "epochs 3 instead of 200" in line).split(" | ")
    assert (
        cells[:2] == ["| preresnet.resnet20_lif, T=2, Vth 0.3, alpha 0.3", f"{accuracy:.2f}"]
        and cells[6] == "depth-lif-20"
    )
    assert "| depth-lif-20 | 92.82 | - |" in page


def test_processes_that_a_row_starts_may_lock_its_files(images, tmp_path, monkeypatch):
    started = []

    def torchrun(argv):  # whose first process asks for the run's lock
        (lock,) = tmp_path.rglob(".*.lock")
        with FileLock(lock, timeout=0):
            started.append(argv)

    monkeypatch.setattr("torch.distributed.run.main", torchrun)
    (images / "test").rename(images / "val")
    row = f"run main-imagenet-ann --data {images} -c {tmp_path} --device cpu --cpu_processes 2"
    reproduce.main([*row.split(), "--multiprocessing-distributed"])
    assert len(started) == 1 and "--multiprocessing-distributed" in started[0]


def write_table(tmp_path):
    reproduce.main(["table", "--checkpoint", str(tmp_path / "out"), "--out", str(tmp_path / "R.md")])
    return (tmp_path / "R.md").read_text()


def leave(folder, row, seed, accuracies, **changes):
    """The files of a finished run of a CIFAR row, without its checkpoint."""
    args = vars(get_parser("", lr=0.1).parse(["--preset", row, "--manualSeed", str(seed)])) | changes
    stem = folder / args["dataset"] / f"{args['model']}_{row}_s{seed}_{len(changes)}"
    stem.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{stem}.json").write_text(json.dumps(args))
    rows = [f"0.1\t1.0\t1.0\t50.0\t{accuracy}\n" for accuracy in accuracies]
    Path(f"{stem}.txt").write_text("header\n" + "".join(rows))


def test_table_keeps_departing_and_unfinished_runs_apart(tmp_path, capsys):
    out = tmp_path / "out"
    leave(out, "main-cifar10-if", 1, [90.0] * 198 + [96.0, 94.0])
    leave(out, "latency-if-t20", 2, [90.0] * 199 + [95.0])  # the same settings: the same row
    leave(out, "main-cifar10-if", 3, [10.0, 20.0], epochs=2)
    leave(out, "main-cifar10-if", 4, [11.0] * 200, dataset="imagefolder", path="data/jpeg", warmup=9)
    leave(out, "main-cifar10-if", 5, [12.0] * 37)
    leave(out, "main-cifar10-if", 6, [13.0] * 200, pre_train="out/ann.pth")
    leave(out, "main-cifar10-if", 7, [14.0] * 200, went_on_from="out/if.pth")
    ran, how, full = write_table(tmp_path).split("\n## ")[1:]
    # Means of 94 and 95, and of 96 and 95; standard deviations sqrt(1/2).
    figures = "94.50 ± 0.71 (94.00, 95.00) | 95.50 ± 0.71 (96.00, 95.00) | 2 | 200 | cifar10 |"
    assert f"| preresnet.resnet18_if, T=20, Vth 6.0, alpha 0.5 | {figures} main-cifar10-if | nothing |" in ran
    for row, error in (
        ("main-cifar10-if", " ± 0.17"),
        ("latency-if-t20", ""),
        ("ablation-trained-vth6-alpha0.5", ""),
    ):
        assert f"| {row} | 95.24{error} | {figures}\n" in full
    assert "| main-cifar10-lif | 95.40 ± 0.15 | - |" in full
    rows = [line.strip("| ").split(" | ") for line in ran.splitlines() if "T=20, Vth 6.0" in line]
    assert [(row[-1], row[1], row[5]) for row in rows if row[-1] != "nothing"] == [
        (
            "dataset imagefolder instead of cifar10; path jpeg instead of ./data; warmup 9 instead of 400",
            "11.00",
            "imagefolder (jpeg)",
        ),
        ("epochs 2 instead of 200", "20.00", "cifar10"),
        ("pre_train ann.pth instead of none", "13.00", "cifar10"),
        ("stopped after 37 of 200 epochs", "12.00", "cifar10"),
        ("went_on_from if.pth instead of none", "14.00", "cifar10"),
    ]
    assert how.count(" | main-cifar10-if | ") == 6
    reproduce.main(["list", "--checkpoint", str(out)])
    assert "94.50 ± 0.71 (94.00, 95.00) (n=2) | " in capsys.readouterr().out


def test_a_run_that_the_table_leaves_out_is_named(tmp_path, capsys):
    leave(tmp_path / "out", "main-cifar10-if", 1, [95.0] * 200)
    leave(tmp_path / "out", "latency-if-t20", 1, [90.0] * 200)  # the same settings and seed
    table, said = write_table(tmp_path), capsys.readouterr().err
    shown = "90.00" if "90.00" in table else "95.00"
    left = dict(zip(("95.00", "90.00"), ("latency-if-t20", "main-cifar10-if")))[shown]
    assert f"{left}_s1_0 is left out" in said and f"| {shown} | {shown} | 1 |" in table


def test_curves_show_runs_of_one_name_in_two_folders(tmp_path, monkeypatch):
    for row in ("main-cifar10-if", "main-cifar100-if"):
        leave(tmp_path, row, 1, [50.0])
    for file in tmp_path.glob("*/*_s1_0.*"):
        file.rename(file.with_name("preresnet.resnet18_if" + file.suffix))
    drawn, plot = [], reproduce.curves.plot
    monkeypatch.setattr(reproduce.curves, "plot", lambda outcomes: drawn.extend(outcomes) or plot(outcomes))
    reproduce.main(["curves", "--checkpoint", str(tmp_path), "--out", str(tmp_path / "curves.png")])
    assert sorted(outcome.args["dataset"] for outcome in drawn) == ["cifar10", "cifar100"]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_days_are_those_of_the_read_mes_steps():
    """200 epochs of 50,000 images: by the table's seconds for 8 images, of LIF and of the ANN."""
    page = (reproduce.results.ROOT / "README.md").read_text()
    for cost, line, T in ((96.4, "**the default", 20), (4.82, "an ANN of the same", 1)):
        (row,) = [row for row in page.splitlines() if row.startswith(f"| {line}")]
        seconds = float(row.split("|")[4])  # at T=20, which an ANN does not have
        expected = 200 * 50_000 / 8 * seconds / 86400
        assert reproduce.results.days(cost, T) == pytest.approx(expected, rel=0.05)


NETWORKS = ["preresnet.resnet20_if", "preresnet.resnet20_lif"]
NETWORKS += ["preresnet_snn.resnet18_if", "preresnet_snn.resnet18_lif"]


@pytest.mark.parametrize("name", NETWORKS)
def test_report_of_each_program_and_neuron(name, images, tmp_path, capsys):
    (images / "val").symlink_to(images / "test")
    torch.manual_seed(0)
    settings = dict(timesteps=2, Vth=0.5, alpha=0.5, tau=1.0, delta_t=0.2, Vth_bound=0.001)
    ann = name.replace("_snn", "_ann").rpartition("_")[0] + ("" if "_snn" in name else "_ann")
    state, weights = (create_model(n, num_classes=2, **settings).state_dict() for n in (name, ann))
    args = dict(
        model=name, path=str(images), **settings, **({} if "_snn" in name else {"dataset": "imagefolder"})
    )
    args |= dict(image_size=32) if "_snn" in name else {}
    args["engine"] = "of another machine"  # which this one may not have
    torch.save(dict(epoch=3, state_dict=state, args=args), tmp_path / "x.pth")
    torch.save(dict(state_dict=weights), tmp_path / "ann.pth")
    argv = ["report", str(tmp_path / "x.pth"), "--timesteps", "4", "--limit", "5", "--ann", "ann.pth"]
    argv += ["--bits", "32"]
    if "_snn" in name:
        model = create_model(ann, num_classes=2)
        names = calibrate(model, [torch.randn(4, 3, 32, 32)], 4)
        torch.save(dict.fromkeys(names, 2.0), tmp_path / "t.dict")  # an untrained ANN's could be 0
        argv += ["--thresholds", "t.dict"]
    reproduce.main(argv)
    page = (tmp_path / "x_report.md").read_text()
    assert "5 test images" in page and "3 epochs" in page
    table = {
        row.split(" | ")[0].strip("| "): row.split(" | ") for row in page.splitlines() if row.startswith("| ")
    }
    assert {"2", "4"} < table.keys()
    assert table["32"][1] == table["as trained"][1] and table["32"][2] == "+0.00 |"
    assert "exact\nquantisation scheme is not known" in page
    layers = {layer for layer in table if "relu" in layer}
    assert layers == {re.sub(r"\.(\d)\.", r"[\1].", key[:-4]) for key in state if key.endswith(".Vth")}
    assert ("after conversion" in page) == ("_snn" in name)
    assert (tmp_path / "x_report.png").read_bytes().startswith(b"\x89PNG")


MISTAKES = {
    "run depth-lif-21": "depth-lif-20",
    "run": "ROW",
    "run depth-lif-20 --seeds 0": "--seeds",
    "run depth-lif-20 --name x": "--name",
    "run depth-lif-20 --manualSeed=4": "--manualSeed",
    "run depth-lif-20 --no-such-flag": "--no-such-flag",
    "list --row x": "--row",
    "report {tmp}/nothing.pth": "nothing.pth",
    "report {tmp}/text.pth": "text.pth",
    "report {tmp}/official.pth": "settings",
    "report {tmp}/ann.pth": "ANN",
    "report {tmp}/snn.pth --thresholds x": "--ann",
    "report {tmp}/snn.pth --bits 1": "--bits",
    "curves nothing --checkpoint {tmp}": "nothing",
    "curves --checkpoint {tmp}": "start one by `run`",
    "curves --checkpoint results --out {tmp}/curves.txt": ".svg",
    "publish {tmp}/snn.pth x": "--trained_on",
    "publish {tmp}/snn.pth x --trained_on y": "best_acc",
    "report {tmp}/snn.pth --path {tmp}/nowhere": "nowhere",
    "report {tmp}/unknown.pth": "unknown data set nowhere",
    "table --checkpoint {tmp}/out": "x.json is damaged",
}


@pytest.mark.parametrize("flags", MISTAKES)
def test_a_mistake_gets_one_line(flags, tmp_path, capsys):
    (tmp_path / "text.pth").write_text("hello")
    torch.save(dict(epoch=1, state_dict={}), tmp_path / "official.pth")
    for kind in ("ann", "snn"):
        args = dict(model=f"preresnet.resnet20_{kind.replace('snn', 'if')}", dataset="imagefolder")
        torch.save(dict(epoch=1, state_dict={}, args=args), tmp_path / f"{kind}.pth")
    args = dict(args, dataset="nowhere", timesteps=2)
    torch.save(dict(epoch=1, state_dict={}, args=args), tmp_path / "unknown.pth")
    (tmp_path / "out" / "cifar10").mkdir(parents=True)
    (tmp_path / "out" / "cifar10" / "x.json").write_text('["no arguments"]')
    with pytest.raises(SystemExit) as end:
        run_program(reproduce.main, shlex.split(flags.replace("{tmp}", str(tmp_path))))
    message = end.value.code if isinstance(end.value.code, str) else capsys.readouterr().err
    assert end.value.code not in (0, None)
    assert (
        message.startswith("error: ")
        and len(message.strip().splitlines()) == 1
        and MISTAKES[flags] in message
    )


def commands(script):
    """The commands of the read-me and the docs that start this script."""
    text = "\n".join(
        path.read_text() for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md"))
    )
    return re.findall(
        rf"^(?:.*&& )?python (?:-u )?{script} (.*?)(?: #.*)?$", text.replace("\\\n", " "), re.MULTILINE
    )


def test_commands_in_the_docs_are_understood():
    assert len(commands("reproduce.py")) >= 4
    for command in commands("reproduce.py"):
        options, rest = reproduce.get_parser().parse_known_args(shlex.split(command))
        if options.task == "run":
            reproduce.plan(options.row, 1, rest)
        else:
            assert not rest
    for command in commands("cifar/predict.py"):
        predict.get_parser().parse_args(shlex.split(command))
    for command in commands("imagenet/main.py"):
        imagenet.main.get_parser().parse(shlex.split(command))


def test_the_page_of_results_is_that_of_the_records(tmp_path):
    (tmp_path / reproduce.CURVES).parent.mkdir()
    (tmp_path / reproduce.CURVES).touch()
    reproduce.main(["table", "--checkpoint", str(ROOT / "results"), "--out", str(tmp_path / "RESULTS.md")])
    assert (tmp_path / "RESULTS.md").read_text() == (ROOT / "RESULTS.md").read_text()
