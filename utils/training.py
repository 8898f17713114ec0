"""The training loop of every program."""

import json
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm

from utils import checkpoint
from utils.cli import UserError, warn
from utils.data import mix_seed
from utils.distributed import parallel, rank, same_buffers, total
from utils.records import Recorder, read_log
from utils.schedule import cosine, warmup_cosine
from utils.statistics import count_spikes, firing_rates, thresholds


@dataclass
class Result:
    """Means over the samples of a pass: cross entropy, accuracies in percent; and its speed."""

    loss: float
    top1: float
    top5: float
    images_per_second: float


class Metrics:
    """Sums of loss, hits and samples, kept on the device so that a step does not wait for the host."""

    def __init__(self, device):
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)
        self.start = time.perf_counter()

    def add(self, loss, logits, labels):
        ranked = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        n = loss.new_full((), len(labels))
        batch = [loss.detach() * n, ranked[:, 0].sum(), ranked.sum(), n]
        self.sums += torch.stack([value.double() for value in batch])

    def result(self, everywhere=False):
        """Of this process, or of all."""
        *sums, n = (total(self.sums) if everywhere else self.sums).tolist()
        loss, top1, top5 = (value / n for value in sums)
        return Result(loss, 100 * top1, 100 * top5, n / (time.perf_counter() - self.start))


def batches(loader, device, title):
    """(bar, images, labels), the latter on the device; the progress bar is quiet unless on a terminal."""
    quiet = True if rank() else None
    with tqdm(total=len(loader.sampler), desc=title, unit="img", disable=quiet, leave=False) as bar:
        for images, labels in loader:
            yield bar, images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def show(bar, metrics, n):
    if bar.update(n):  # true when the bar is redrawn: only then are the sums fetched
        result = metrics.result()
        bar.set_postfix_str(
            f"loss {result.loss:.3f}, top-1 {result.top1:.2f}, top-5 {result.top5:.2f}", refresh=False
        )


def autocast(device, precision):
    """With precision "bf16", spikes and the convolutions that take them are in bfloat16; all else stays."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")


def train_epoch(model, loader, optimizer, schedule, device, title, precision="fp32"):
    """One pass over the training set, one optimizer and schedule step a batch. -> Result"""
    model.train()
    metrics = Metrics(device)
    for bar, images, labels in batches(loader, device, title):
        with autocast(device, precision):
            logits = model(images)
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        if schedule.last_epoch == 0:
            warn_if_silent(model)
        optimizer.step()
        schedule.step()
        metrics.add(loss, logits, labels)
        show(bar, metrics, len(labels))
    return metrics.result(everywhere=True)


@torch.no_grad()
def evaluate(model, loader, device, precision="fp32"):
    """One pass over the test set, without gradients. -> Result, layer -> firing rate"""
    model.eval()
    metrics = Metrics(device)
    with count_spikes(model) as counts:
        for bar, images, labels in batches(loader, device, "test"):
            with autocast(device, precision):
                logits = model(images)
            metrics.add(F.cross_entropy(logits, labels), logits, labels)
            show(bar, metrics, len(labels))
    counts = {layer: total(pair) for layer, pair in counts.items()}
    return metrics.result(everywhere=True), firing_rates(counts)


def warn_if_silent(model):
    """A network in which no spike gets through learns nothing, and nothing else would tell."""
    first = next(parameter for parameter in model.parameters() if parameter.dim() > 1)
    if not first.grad.any():
        hint = "lower --Vth or --alpha, or raise --timesteps, --delta_t or --train-batch"
        warn(f"the gradient of the first batch is exactly zero at the first layer; {hint}")


def make_optimizer(name, parameters, *, lr, momentum, weight_decay, nesterov=False):
    """ "sgd" or "adam"; thresholds get the learning rate and weight decay of the weights."""
    if name == "adam":
        return torch.optim.Adam(parameters, lr, betas=(0.9, 0.999), weight_decay=weight_decay)
    return torch.optim.SGD(parameters, lr, momentum, weight_decay=weight_decay, nesterov=nesterov)


def load_optimizer(optimizer, state, path):
    """Take over the state of a checkpoint's optimizer, but not its learning rate; refuse another kind's."""
    settings = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    try:
        if state["param_groups"][0].keys().isdisjoint(settings.keys() & {"momentum", "betas"}):
            raise ValueError("it belongs to another --optimizer")
        optimizer.load_state_dict(state)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"the optimizer state in {path} does not fit: {error}") from None
    for group in optimizer.param_groups:
        group.update(settings)


def fit(model, optimizer, train_loader, test_loader, args, files, resumed, source, device):
    """Train on from `resumed` (a checkpoint that lay at `source`, or None); log and save every epoch."""
    first_epoch = resumed["epoch"] if resumed else args.start_epoch
    own = source in (files.checkpoint, files.best)
    best_acc = resumed["best_acc"] if own else -1.0  # so that this run's first epoch makes its first best
    if first_epoch >= args.epochs:
        print(f"nothing left to train: {first_epoch} of {args.epochs} epochs are done")
        return
    rows = resumed.get("log", []) if resumed else None
    official = own and "log" not in resumed  # which keeps its rows in the file alone
    if official and files.log.exists():
        rows = read_log(files.log)[:first_epoch]
    recorder = None  # only rank 0 writes
    if rank() == 0:
        files.create()
        checkpoint.save_text(json.dumps(vars(args), indent=2, sort_keys=True) + "\n", files.arguments)
        recorder = Recorder(files, first_epoch, rows)
    network = parallel(model, device)
    steps = len(train_loader)
    curve = dict(lr=args.lr, epochs=args.epochs, steps_per_epoch=steps, warmup=args.warmup)
    schedule = warmup_cosine(optimizer, **curve, first_step=first_epoch * steps)
    for epoch in range(first_epoch, args.epochs):
        torch.manual_seed(mix_seed(args.manualSeed, epoch, rank(), 1))  # dropout too goes by (seed, epoch)
        train_loader.sampler.set_epoch(epoch)
        title = f"epoch {epoch + 1}/{args.epochs}"
        train = train_epoch(network, train_loader, optimizer, schedule, device, title, args.precision)
        same_buffers(model)
        test, rates = evaluate(model, test_loader, device, args.precision)
        best = test.top1 > best_acc
        best_acc = max(best_acc, test.top1)
        if recorder is None:
            continue
        lr = args.lr * cosine(epoch, args.epochs)
        recorder.add(epoch, lr=lr, train=train, test=test, thresholds=thresholds(model), firing_rates=rates)
        state = dict(epoch=epoch + 1, state_dict=model.state_dict(), acc=test.top1, best_acc=best_acc)
        state |= dict(optimizer=optimizer.state_dict(), args=vars(args), log=recorder.rows)
        if best:  # first, so that a run killed between the two writes its best again when it is resumed
            checkpoint.save(state, files.best)
        checkpoint.save(state, files.checkpoint)
        recorder.write()
        print(
            f"epoch {epoch + 1}/{args.epochs}: loss {train.loss:.4f} train, {test.loss:.4f} test; "
            f"top-1 {train.top1:.2f} % train, {test.top1:.2f} % test (best {best_acc:.2f}); "
            f"{train.images_per_second:.0f} images/s",
            flush=True,
        )
