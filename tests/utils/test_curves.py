"""The lines of the picture against the figures that went in."""

import json

from torch.utils.tensorboard import SummaryWriter

from utils.curves import plot
from utils.results import Outcome


def leave(folder, stem, accuracies, seconds, **settings):
    """The files of a run, which took so many seconds an epoch."""
    args = dict(model="preresnet.resnet20_if", timesteps=5, Vth="auto", manualSeed=3, epochs=9) | settings
    args |= dict(alpha=0.5, train_Vth=1)
    (folder / f"{stem}.json").write_text(json.dumps(args))
    rows = [f"0.1\t1.0\t1.0\t50.0\t{accuracy}\n" for accuracy in accuracies]
    (folder / f"{stem}.txt").write_text("header\n" + "".join(rows))
    with SummaryWriter(folder / stem) as writer:
        for epoch, value in enumerate(seconds):
            writer.add_scalar("seconds an epoch", value, epoch)
    return Outcome(folder / f"{stem}.json")


def test_accuracy_stands_over_epochs_and_summed_hours(tmp_path):
    ours = leave(tmp_path, "a", [30.0, 50.0, 60.0], [3600, 1800, 1800])
    peer = leave(tmp_path, "b", [31.0, 49.0], [7200, 7200], neurons="spikingjelly")
    second = leave(tmp_path, "d", [32.0], [3600], manualSeed=4)
    untimed = leave(tmp_path, "c", [10.0, 11.0], [60], model="preresnet.resnet20_ann")
    figure = plot([ours, peer, untimed, second])
    epochs, time = ([line.get_xydata().tolist() for line in axes.lines] for axes in figure.axes)
    assert epochs == [[[1, 30], [2, 50], [3, 60]], [[1, 32]], [[1, 31], [2, 49]], [[1, 10], [2, 11]]]
    assert time == [[[1, 30], [1.5, 50], [2, 60]], [[1, 32]], [[2, 31], [4, 49]]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "preresnet.resnet20_if, T=5, Vth auto, alpha 0.5: 60.00 % (seed 3), 32.00 % (seed 4)",
        "preresnet.resnet20_if, T=5, Vth auto, alpha 0.5, neurons of spikingjelly: 49.00 % (seed 3)",
        "preresnet.resnet20_ann: 11.00 % (seed 3)",
    ]
    colours = [line.get_color() for line in figure.axes[0].lines]
    assert colours[0] == colours[1] and len(set(colours)) == 3
