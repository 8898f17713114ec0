"""What is said of thresholds, from figures made up by hand."""

import re
from types import SimpleNamespace

import pytest

from utils.thresholds import few, warn_of_thresholds


def fit(given, fitted, alive=True):
    """Of a layer with these representation errors."""
    return SimpleNamespace(
        given=SimpleNamespace(error=given), fitted=SimpleNamespace(error=fitted), alive=alive
    )


FITS = {
    "good": fit(0.3, 0.1),
    "coarse": fit(0.6, 0.2),
    "hard": fit(0.6, 0.4),  # no threshold would halve its error
    "silent": fit(1.0, 0.1),
    "dead": fit(1.0, 1.0, alive=False),
    "unwanted": fit(0.0, 0.0, alive=False),  # no current above 0: nothing is lost
}


@pytest.mark.parametrize(
    ("applied", "named"),
    [(False, "2 of 6 layers .*: coarse, silent; --Vth auto"), (True, ": dead, unwanted$")],
)
def test_layers_that_a_threshold_would_help_are_named(applied, named, capsys):
    warn_of_thresholds(FITS, applied)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(named, line)


def test_nothing_is_said_of_layers_that_do_well(capsys):
    for applied in (False, True):
        warn_of_thresholds({"good": FITS["good"], "hard": FITS["hard"]}, applied)
    assert capsys.readouterr().err == ""


def test_three_names_and_how_many_more():
    assert few(["a", "b", "c"]) == "a, b, c" and few(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"
