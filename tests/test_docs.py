"""The read-me and the docs: code runs, commands are understood, links lead somewhere, lines are short."""

import ast
import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch

import cifar.program
import imagenet.main
import reproduce
from models import LIFNeuron, registry
from utils import events, recorder

ROOT = Path(__file__).parents[1]
PAGES = {str(path.relative_to(ROOT)): path for path in [*ROOT.glob("*.md"), *ROOT.glob("[!.]*/*.md")]}


def blocks(page, language):
    """The code blocks of a page."""
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page].read_text(), re.DOTALL)


@pytest.fixture
def run_page(monkeypatch, tmp_path, capsys):
    """Run a page's Python, block after block; -> (the names that it defines, what it printed)."""
    monkeypatch.chdir(ROOT)  # as the pages say
    monkeypatch.setattr(registry, "NETWORKS", dict(registry.NETWORKS))  # which a page adds to

    def run(page):
        script = tmp_path / "page.py"
        script.write_text("\n".join(blocks(page, "python")))
        return runpy.run_path(str(script)), capsys.readouterr().out

    return run


def test_the_page_on_own_networks(run_page):
    names, printed = run_page("docs/own_network.md")
    losses = re.findall(r"(IF|LIF)Neuron: loss ([\d.]+) -> ([\d.]+)", printed)
    assert [kind for kind, *_ in losses] == ["IF", "LIF"]
    assert all(float(after) < 0.7 * float(before) for _, before, after in losses)
    differences = re.findall(r"(\w+): largest difference of the gradients: (\S+)", printed)
    assert [kind for kind, _ in differences] == ["LIF", "DecayLIF", "RestingIF"]
    assert all(float(difference) < 1e-9 for _, difference in differences)
    assert float(re.search(r"digits: ([\d.]+) %", printed)[1]) > 85
    assert "torch.Size([2, 10])" in printed and "torch.Size([32, 3])" in printed
    check_neurons(names["DecayLIF"], names["RestingIF"])


def check_neurons(decay_lif, resting_if):
    """Spikes and gradients worked out on paper."""
    layer = decay_lif(timesteps=4, Vth=1.0, alpha=1.0, decay=0.5)
    currents = torch.tensor([[0.75], [0.75], [0.0], [1.0]], requires_grad=True)
    spikes = layer(currents)  # U: .75 1.125* .0625 1.03125*
    assert spikes.flatten().tolist() == [0, 1, 0, 1]
    spikes[3].sum().backward()  # whose weight is 8/15 of all; 0 <= wrate(x) = .683 <= Vth passes
    assert currents.grad.flatten().tolist() == pytest.approx([8 / 15] * 4)
    layer = resting_if(timesteps=4, Vth=1.0, alpha=1.0)
    currents = torch.full((4, 1), 1.5, requires_grad=True)
    spikes = layer(currents)  # U: 1.5* 2 (rests) 3.5* 4 (rests): more comes than it can fire off
    assert spikes.flatten().tolist() == [1, 0, 1, 0]
    spikes.sum().backward()
    assert not currents.grad.any() and layer.Vth.grad == 2  # the output is Vth * (1 + 1)


def test_the_page_for_newcomers_from_other_code(run_page):
    _, printed = run_page("docs/coming_from.md")
    assert "torch.Size([8, 16])" in printed and "1.5000" in printed  # Vth/delta_t = 0.3/0.2


def test_the_read_me(run_page):
    names, _ = run_page("README.md")
    assert names["network"].timesteps == 5 and isinstance(names["network"].relu1, LIFNeuron)


def test_every_page_with_python_is_run():
    """But for one, which loads networks that come trained: their tests do."""
    run = {"README.md", "docs/coming_from.md", "docs/own_network.md"}
    assert {page for page in PAGES if blocks(page, "python")} <= run | {"checkpoint/README.md"}


def understand_reproduce(argv):
    options, flags = reproduce.get_parser().parse_known_args(argv)
    if options.task == "run":
        reproduce.plan(options.row, 1, flags)
    else:
        assert not flags


def flags_in_help(main, argv):
    """Each flag is one of `--help`'s."""
    with pytest.raises(SystemExit):
        main(["--help"])
    return {word for word in argv if word.startswith("--")}


PROGRAMS = {
    "cifar/main_single_gpu.py": lambda argv: cifar.program.get_parser().parse(argv),
    "cifar/main_multiple_gpus.py": lambda argv: cifar.program.get_parser(processes=True).parse(argv),
    "imagenet/main.py": lambda argv: imagenet.main.get_parser().parse(argv),
    "reproduce.py": understand_reproduce,
}
MODULES = {"utils.events": events.draw, "utils.recorder": recorder.main}
COMMANDS = [
    (page, line)
    for page in PAGES
    for block in blocks(page, "bash")
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith("#")
]


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_commands_are_understood(page, line, capsys):
    for command in line.split(" && "):
        words = shlex.split(command, comments=True)
        scripts = [word for word in words if word.endswith(".py")]
        modules = [word for word in words if word in MODULES]
        if scripts and scripts[0] in PROGRAMS:
            assert (ROOT / scripts[0]).is_file()
            PROGRAMS[scripts[0]](words[words.index(scripts[0]) + 1 :])
        elif modules:
            flags = flags_in_help(MODULES[modules[0]], words)
            assert flags <= set(re.findall(r"--\w+", capsys.readouterr().out))
        elif scripts:
            assert (ROOT / scripts[0]).is_file()
        else:
            known = command.startswith(("pip install -r requirements.txt", "python -m pytest"))
            assert known or (ROOT / words[0]).is_file(), f"{page}: {command}"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", PAGES[page].read_text())
    missing = [link for link in links if ":" not in link and not (PAGES[page].parent / link).exists()]
    assert missing == []


def test_the_read_me_is_short():
    text = PAGES["README.md"].read_text()
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL).splitlines()
    assert len(text.splitlines()) <= 170 and max(map(len, prose)) <= 120


def test_each_equation_is_where_the_table_says():
    """`name` and file:line of every row: a definition of that name begins at that line."""
    rows = re.findall(r"\| `([\w.]+)` \| \[([\w/]+\.py):(\d+)\]", PAGES["docs/equations.md"].read_text())
    assert len(rows) >= 15
    found = {(name, file, int(line)) for name, file, line in rows}
    assert found == {(name, file, line_of(ROOT / file, name)) for name, file, _ in found}


def line_of(file, name):
    """Where the function, class or method `name` is defined in the file."""
    node = ast.parse(file.read_text())
    for part in name.split("."):
        kinds = (ast.FunctionDef, ast.ClassDef)
        node = next(child for child in node.body if isinstance(child, kinds) and child.name == part)
    return node.lineno
