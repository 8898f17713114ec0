"""What a run leaves behind: where its files lie, the log, the curves, TensorBoard."""

from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from utils.checkpoint import save, save_text
from utils.cli import require
from utils.distributed import broadcast, rank

TAKEN = ("_best", "_previous", ".run")  # the last of a name: files of another run may be called so
HEADER = "Learning Rate\tTrain Loss\tValid Loss\tTrain Acc.\tValid Acc.\n"


class RunFiles:
    """The files of a run: `<folder>/<stem>` and an ending."""

    def __init__(self, folder, stem, accuracy="acc"):
        self.folder, self.accuracy = Path(folder), accuracy  # the latter's name in the checkpoint
        self.checkpoint = self.folder / f"{stem}.pth"
        self.previous = self.folder / f"{stem}_previous.pth"
        self.best = self.folder / f"{stem}_best.pth"
        self.checkpoints = self.checkpoint, self.previous, self.best  # in the order in which a run goes on
        self.log = self.folder / f"{stem}.txt"
        self.curves = self.folder / f"{stem}.pdf"
        self.arguments = self.folder / f"{stem}.json"
        self.session = self.folder / f"{stem}.run.json"
        self.lock = self.folder / f".{stem}.lock"
        self.firing_rates = self.folder / f"{stem}_firing_rate.dict"
        self.tensorboard = self.folder / stem

    def age(self):
        """When the checkpoint was written, or None."""
        return self.checkpoint.stat().st_mtime_ns if self.checkpoint.exists() else None


@contextmanager
def locked(file, timeout=-1):
    """While open, others wait for this process; yields False if another has it after so many seconds."""
    with ExitStack() as stack:
        free = True
        try:
            stack.enter_context(FileLock(file, timeout=timeout))
        except Timeout:
            free = False
        except (OSError, NotImplementedError):  # a file system without locks: nobody can tell
            pass
        yield free


@contextmanager
def alone(files):
    """While open, no other run leaves these files, of all processes of this one; UserError if one does."""
    busy = f"{files.log.stem} is running already; wait for it, stop it or choose another --name"
    with locked(files.lock, timeout=0) if rank() == 0 else nullcontext(True) as free:
        require(broadcast(free), busy)
        yield


class Recorder:
    """Writes log, curves and TensorBoard's files from `first_epoch` on; `rows` so far, None at the start."""

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
            values = {"loss": result.loss, "top-1": result.top1, "top-5": result.top5}
            scalars |= {f"{what}/{split}": value for what, value in values.items()}
        scalars |= {f"Vth/{layer}": value for layer, value in thresholds.items()}
        scalars |= {f"firing rate/{layer}": value for layer, value in firing_rates.items()}
        for name, value in scalars.items():
            self.tensorboard.add_scalar(name, value, epoch)
        self.tensorboard.flush()


def draw_curves(rows, file, title):
    """Write loss and accuracy of the epochs in `rows`, as a PDF."""
    _, train_loss, test_loss, train_accuracy, test_accuracy = zip(*rows)
    figure = Figure(figsize=(10, 4))  # with margins of its own: an automatic layout takes twice the time
    margins = dict(left=0.07, right=0.98, bottom=0.12, top=0.9, wspace=0.2)
    loss, accuracy = figure.subplots(1, 2, gridspec_kw=margins)
    loss.set(ylabel="cross entropy")
    accuracy.set(ylabel="top-1 accuracy (%)")
    for axes, train, test in ((loss, train_loss, test_loss), (accuracy, train_accuracy, test_accuracy)):
        for values, label in ((train, "training"), (test, "test")):
            axes.plot(range(1, len(rows) + 1), values, marker="o" if len(rows) < 20 else None, label=label)
        axes.set(xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title, parse_math=False)
    figure.savefig(file, format="pdf")
