"""A row of the paper with something else in the place of our neurons: peer_run.py and levels.py say what."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import reproduce  # noqa: E402
from utils import checkpoint, program, results  # noqa: E402
from utils.cli import choose_device  # noqa: E402
from utils.records import alone  # noqa: E402


def run_row(script, description, argv, *, suffix, neurons, create_model, fit_thresholds):
    """Train the row that the command line names, under its own name plus `suffix`.

    neurons(args) -> what the tables call them. The functions are what `utils.program.run` takes for ours.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("row", choices=reproduce.cifar.ROWS, metavar="ROW", help="of `reproduce.py list`")
    parser.add_argument("--seed", type=program.count, default=1)
    options, flags = parser.parse_known_args(argv)
    _, args, _ = reproduce.plan(options.row, options.seed, flags)
    args.name, args.neurons = args.name + suffix, neurons(args)
    files = reproduce.cifar.run_files(args)
    results.compare_sources(files, args)
    checkpoint.make_folder(files.folder)
    command = ["python", f"benchmarks/{Path(script).name}", *(sys.argv[1:] if argv is None else argv)]
    how = dict(device=choose_device(args.device), fixed=reproduce.cifar.get_parser().fixed)
    with alone(files):
        results.add_session(files.session, args.device, command)
    how |= dict(create_model=create_model, fit_thresholds=fit_thresholds)
    program.run(args, files=files, transfer=True, **how)
