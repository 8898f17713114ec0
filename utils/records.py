"""What a run leaves behind: where its files lie, the log, the curves, TensorBoard."""

from functools import partial
from pathlib import Path

from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from utils.checkpoint import is_row, make_folder, save, save_text
from utils.cli import UserError

HEADER = "Learning Rate\tTrain Loss\tValid Loss\tTrain Acc.\tValid Acc.\n"


class RunFiles:
    """The files of a run: `<folder>/<stem>` and an ending."""

    def __init__(self, folder, stem, accuracy="acc"):
        self.folder, self.accuracy = Path(folder), accuracy  # the latter's name in the checkpoint
        self.checkpoint = self.folder / f"{stem}.pth"
        self.previous = self.folder / f"{stem}_previous.pth"
        self.best = self.folder / f"{stem}_best.pth"
        self.log = self.folder / f"{stem}.txt"
        self.curves = self.folder / f"{stem}.pdf"
        self.arguments = self.folder / f"{stem}.json"
        self.session = self.folder / f"{stem}.run.json"
        self.firing_rates = self.folder / f"{stem}_firing_rate.dict"
        self.tensorboard = self.folder / stem

    def create(self):
        """Make the folders, or raise UserError where nothing can be written."""
        make_folder(self.tensorboard)


class Recorder:
    """Writes the log, the curves and TensorBoard's files of a run that starts or goes on at `first_epoch`.

    `rows` are the log's so far, from the checkpoint that the run goes on from; None for a fresh start.
    """

    def __init__(self, files, first_epoch, rows):
        self.files, self.rows = files, list(rows or [])
        if rows is None:
            for old in files.tensorboard.glob("events.out.tfevents.*"):
                old.unlink()
        self.tensorboard = SummaryWriter(files.tensorboard, purge_step=first_epoch)
        self.write()

    def write(self):
        """Bring the log and the curves up to date."""
        rows = ["\t".join(f"{value:.6f}" for value in row) + "\n" for row in self.rows]
        save_text(HEADER + "".join(rows), self.files.log)
        if self.rows:
            save(self.rows, self.files.curves, write=partial(draw_curves, title=self.files.curves.stem))

    def add(self, epoch, *, lr, train, test, thresholds, firing_rates, costs=None):
        """Take in an epoch: `train` and `test` are Results, the next two map layer, `costs` what -> value."""
        self.rows.append([lr, train.loss, test.loss, train.top1, test.top1])
        scalars = {"learning rate": lr, "images per second": train.images_per_second} | (costs or {})
        for split, result in (("train", train), ("test", test)):
            scalars |= {
                f"loss/{split}": result.loss,
                f"top-1/{split}": result.top1,
                f"top-5/{split}": result.top5,
            }
        scalars |= {f"Vth/{layer}": value for layer, value in thresholds.items()}
        scalars |= {f"firing rate/{layer}": value for layer, value in firing_rates.items()}
        for name, value in scalars.items():
            self.tensorboard.add_scalar(name, value, epoch)
        self.tensorboard.flush()


def read_log(path):
    """The rows of a log: [learning rate, training loss, test loss, training accuracy, test accuracy]."""
    try:
        rows = [[float(field) for field in line.split()] for line in path.read_text().splitlines()[1:]]
        if not all(is_row(row, 5) for row in rows):
            raise ValueError("a row without 5 numbers")
    except (OSError, ValueError) as error:
        raise UserError(f"the log {path} is damaged ({error}); mend it or move it away") from None
    return rows


def draw_curves(rows, file, title):
    """Write loss and accuracy of the epochs in `rows`, as a PDF."""
    _, train_loss, test_loss, train_accuracy, test_accuracy = zip(*rows)
    epochs = range(1, len(rows) + 1)
    marker = "o" if len(rows) < 20 else None
    figure = Figure(figsize=(10, 4))  # with margins of its own: an automatic layout takes twice the time
    margins = dict(left=0.07, right=0.98, bottom=0.12, top=0.9, wspace=0.2)
    left, right = figure.subplots(1, 2, gridspec_kw=margins)
    for axes, train, test, label in (
        (left, train_loss, test_loss, "cross entropy"),
        (right, train_accuracy, test_accuracy, "top-1 accuracy (%)"),
    ):
        axes.plot(epochs, train, marker=marker, label="training")
        axes.plot(epochs, test, marker=marker, label="test")
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    figure.savefig(file, format="pdf")
