"""The house rules on size: what a newcomer has to read stays short."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("cifar", "imagenet", "models", "utils")
FILES = [*ROOT.glob("*.py"), *[path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]]
LINES = {str(path.relative_to(ROOT)): path.read_text().splitlines() for path in FILES}


def test_no_file_is_over_280_lines_and_all_together_not_over_6037():
    assert {"reproduce.py", "models/neurons.py", "utils/training.py", "imagenet/main.py"} <= LINES.keys()
    assert {name: len(lines) for name, lines in LINES.items() if len(lines) > 280} == {}
    assert sum(map(len, LINES.values())) <= 6037


def test_no_function_is_over_50_lines():
    long = {}
    for name, lines in LINES.items():
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 50:
                long[f"{name}: {node.name}"] = node.end_lineno - node.lineno + 1
    assert long == {}


def test_the_checks_of_foreign_files_are_one_room():
    assert len(LINES["utils/foreign.py"]) <= 120


def test_no_decision_goes_by_the_name_of_a_model():
    """A network's entry in the registry says what it is."""
    by_name = re.compile(r"(starts|ends)with\([^)]*(preresnet|vgg|_if|_lif|_ann|_snn)")
    paths = [*FILES, *(ROOT / "benchmarks").glob("*.py")]
    assert [str(path) for path in paths if by_name.search(path.read_text())] == []
