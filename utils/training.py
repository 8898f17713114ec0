"""The training loop of every program."""

import json
import platform
import resource
import time
from dataclasses import dataclass
from itertools import zip_longest

import torch
import torch.nn.functional as F
from tqdm import tqdm

from utils import checkpoint
from utils.cli import Stopped, UserError, warn
from utils.data import mix_seed
from utils.distributed import any_process, parallel, rank, same_buffers, share, total
from utils.records import Recorder, read_log
from utils.schedule import cosine, warmup_cosine
from utils.signals import StopRequest
from utils.statistics import (
    count_spikes,
    firing_rates,
    first_not_finite,
    neuron_layers,
    not_finite,
    thresholds,
)

LOWER = "go on from the last checkpoint with a lower --lr (--resume FILE)"


@dataclass
class Result:
    """Means over the samples of a pass: cross entropy, accuracies in percent; and its speed."""

    loss: float
    top1: float
    top5: float
    images_per_second: float

    def __str__(self):
        return f"loss {self.loss:.3f}, top-1 {self.top1:.2f}, top-5 {self.top5:.2f}"


class Metrics:
    """Sums of loss, hits and samples, kept on the device so that a step does not wait for the host.

    `earlier`: the sums of the first part of a pass that goes on here.
    """

    def __init__(self, device, earlier=None):
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)
        if earlier is not None and rank() == 0:
            self.sums += self.sums.new_tensor(earlier)  # in double precision, as they were
        self.start, self.earlier = time.perf_counter(), earlier[-1] if earlier else 0

    def add(self, loss, logits, labels):
        ranked = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        n = loss.new_full((), len(labels))
        batch = [loss.detach() * n, ranked[:, 0].sum(), ranked.sum(), n]
        self.sums += torch.stack([value.double() for value in batch])

    def result(self, everywhere=False):
        """Of this process, or of all."""
        *sums, n = (total(self.sums) if everywhere else self.sums).tolist()
        loss, top1, top5 = (value / max(n, 1) for value in sums)
        speed = (n - self.earlier) / (time.perf_counter() - self.start)
        return Result(loss, 100 * top1, 100 * top5, speed)


def batches(loader, device, title, metrics, first=0):
    """(images, labels) on the device; the progress bar is quiet unless on a terminal."""
    quiet = True if rank() else None
    with tqdm(total=len(loader.sampler), desc=title, unit="img", disable=quiet, leave=False) as bar:
        bar.update(first * loader.batch_size)
        for images, labels in loader:
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            if bar.update(len(labels)):  # true when the bar is redrawn: only then are the sums fetched
                bar.set_postfix_str(str(metrics.result()), refresh=False)


def autocast(device, precision):
    """With precision "bf16", spikes and the convolutions that take them are in bfloat16; all else stays."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")


class Watch:
    """Whether a loss is finite, fetched while the device computes on: no step waits for it."""

    def __init__(self, loss):
        finite = loss.detach().isfinite()
        self.arrived = None
        if loss.is_cuda:
            self.finite = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(finite, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()
        else:
            self.finite = finite

    def tripped(self):
        if self.arrived:
            self.arrived.synchronize()
        return not self.finite.item()


def train_steps(model, loader, optimizer, schedule, device, title, metrics, *, precision="fp32", first=0):
    """Train on the batches of an epoch from number `first` on; after each, yields how many are done."""
    model.train()
    for step, (images, labels) in enumerate(batches(loader, device, title, metrics, first), start=first):
        torch.manual_seed(mix_seed(loader.dataset.seed, loader.sampler.epoch, step, rank(), 1))  # dropout's
        with autocast(device, precision):
            logits = model(images)
        loss = F.cross_entropy(logits, labels)
        watch = Watch(loss)
        optimizer.zero_grad()
        loss.backward()
        if met_by := any_process(rank() + 1 if watch.tripped() else 0):  # before the weights are spoilt
            layer = first_not_finite(getattr(model, "module", model), images) or "the loss itself"
            text = f"the loss is {loss.item()} at iteration {step + 1} of {title}, first in {layer}; {LOWER}"
            raise UserError(share(text, met_by - 1))
        if schedule.last_epoch == 0:
            warn_if_silent(model)
        optimizer.step()
        schedule.step()
        metrics.add(loss, logits, labels)
        yield step + 1


@torch.no_grad()
def evaluate(model, loader, device, precision="fp32", stop=None):
    """One pass over the test set, without gradients. -> Result, layer -> firing rate

    Raises Stopped when the StopRequest `stop` has met a signal.
    """
    model.eval()
    metrics = Metrics(device)
    with count_spikes(model) as counts:
        # As many turns in every process, so that all ask for signals alike, whether or not a batch is left.
        turns = share(len(loader))  # rank 0 has the most
        for _, batch in zip_longest(range(turns), batches(loader, device, "test", metrics)):
            if batch is not None:
                images, labels = batch
                with autocast(device, precision):
                    logits = model(images)
                metrics.add(F.cross_entropy(logits, labels), logits, labels)
            if stop is not None and (number := stop.signal()):
                raise Stopped(number)
    counts = {layer: total(pair) for layer, pair in counts.items()}
    return metrics.result(everywhere=True), firing_rates(counts)


def warn_if_silent(model):
    """A network in which no spike gets through learns nothing, and nothing else would tell."""
    first = next(parameter for parameter in model.parameters() if parameter.dim() > 1)
    if not first.grad.any():
        hint = "lower --Vth or --alpha, or raise --timesteps, --delta_t or the batch size"
        warn(f"the gradient of the first batch is exactly zero at the first layer; {hint}")


def warn_of_layers(model, rates, known):
    """Name, once each, the layers that never fired and those whose threshold sits at its lower bound."""
    neurons = dict(neuron_layers(model))
    silent = [layer for layer in neurons if not rates[layer]]
    low = [layer for layer, neuron in neurons.items() if neuron.Vth <= neuron.Vth_bound]
    for what, layers in (("no spike on the test set", silent), ("a threshold at --Vth_bound", low)):
        layers = [layer for layer in layers if (what, layer) not in known]
        if layers:
            warn(f"{what}: {', '.join(layers)}")
            known.update((what, layer) for layer in layers)


def peak_memory(device):
    """The most memory that this process has had, in MB (2^20 bytes): a GPU's tensors, or all on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


class Run:
    """A run of training, from its start or from `resumed` on, a checkpoint that lay at `source`.

    A checkpoint's `epoch` counts the epochs that are done, `iteration` the steps of the next one; all that is
    random is drawn from (seed, epoch, step or sample), so that these two numbers are the state of every
    random generator.
    """

    def __init__(self, model, optimizer, train_loader, test_loader, args, files, resumed, source, device):
        self.model, self.optimizer, self.args, self.files, self.device = model, optimizer, args, files, device
        self.train_loader, self.test_loader, self.steps = train_loader, test_loader, len(train_loader)
        self.epoch, self.step, self.sums = args.start_epoch, 0, None  # of the epoch that is under way
        self.best_acc, self.rows = -1.0, None  # the first epoch makes this run's first best
        self.known = set()  # what has been warned of
        if resumed:
            self.epoch, self.step, self.sums = resumed["epoch"], resumed["iteration"], resumed.get("sums")
            self.rows = resumed.get("log", [])
            if source in (files.checkpoint, files.previous, files.best):
                self.best_acc = resumed["best_acc"]
                if "log" not in resumed and files.log.exists():  # an official run has its rows there alone
                    self.rows = read_log(files.log)[: self.epoch]
        if self.step > self.steps:
            text = f"{source}: {self.step} iterations into an epoch of {self.steps}; give it the same data"
            raise UserError(text)

    def train(self):
        """Train to the last epoch. Raises Stopped, with a checkpoint written, when a signal asks for it."""
        args = self.args
        if self.epoch >= args.epochs:
            print(f"nothing left to train: {self.epoch} of {args.epochs} epochs are done")
            return
        self.recorder = None
        if rank() == 0:  # which alone writes
            self.files.create()
            arguments = json.dumps(vars(args), indent=2, sort_keys=True) + "\n"
            checkpoint.save_text(arguments, self.files.arguments)
            self.recorder = Recorder(self.files, self.epoch, self.rows)
        self.network = parallel(self.model, self.device)
        curve = dict(lr=args.lr, epochs=args.epochs, steps_per_epoch=self.steps, warmup=args.warmup)
        curve |= dict(first_step=self.epoch * self.steps + self.step, within=args.warmup_within_first_epoch)
        self.schedule = warmup_cosine(self.optimizer, **curve)
        with StopRequest() as stop:
            for epoch in range(self.epoch, args.epochs):
                self.epoch, began = epoch, time.perf_counter()
                metrics = self.train_epoch(stop)
                train = metrics.result(everywhere=True)
                same_buffers(self.model)
                try:
                    test, rates = evaluate(self.model, self.test_loader, self.device, args.precision, stop)
                except Stopped:
                    self.save_within(metrics)
                    raise
                best = test.top1 > self.best_acc
                self.best_acc, self.step = max(self.best_acc, test.top1), 0
                if self.recorder is not None:
                    self.record(train, test, rates, best, time.perf_counter() - began)

    def train_epoch(self, stop):
        """Train on what is left of the epoch, with a checkpoint after every --save_every steps. -> Metrics"""
        args, title = self.args, f"epoch {self.epoch + 1}/{self.args.epochs}"
        self.train_loader.sampler.start(self.epoch, self.step * self.train_loader.batch_size)
        metrics = Metrics(self.device, self.sums if self.step else None)
        parts = self.network, self.train_loader, self.optimizer, self.schedule, self.device, title, metrics
        for step in train_steps(*parts, precision=args.precision, first=self.step):
            self.step, number = step, stop.signal()
            if number or (args.save_every and step % args.save_every == 0):
                self.save_within(metrics)
            if number:
                raise Stopped(number)
            if args.print_freq and step % args.print_freq == 0:
                print(f"{title}, iteration {step}/{self.steps}: {metrics.result()}", flush=True)
        return metrics

    def record(self, train, test, rates, best, seconds):
        """Log and save an epoch. `seconds`: with the test; of the rest, if it went on from a checkpoint."""
        warn_of_layers(self.model, rates, self.known)
        lr, done = self.args.lr * cosine(self.epoch, self.args.epochs), self.epoch + 1
        layers = dict(thresholds=thresholds(self.model), firing_rates=rates)
        costs = {"seconds an epoch": seconds, "peak memory (MB)": peak_memory(self.device)}
        self.recorder.add(self.epoch, lr=lr, train=train, test=test, **layers, costs=costs)
        if best:  # first, so that a run killed between the two writes its best again when it is resumed
            self.save(self.files.best, done, test.top1)
        self.save(self.files.checkpoint, done, test.top1)
        self.recorder.write()
        print(
            f"epoch {done}/{self.args.epochs}: loss {train.loss:.4f} train, {test.loss:.4f} test; "
            f"top-1 {train.top1:.2f} % train, {test.top1:.2f} % test (best {self.best_acc:.2f}); "
            f"{train.images_per_second:.0f} images/s",
            flush=True,
        )

    def save_within(self, metrics):
        """A checkpoint of the epoch that is under way."""
        sums = total(metrics.sums).tolist()
        if self.recorder is not None:
            top1 = self.recorder.rows[-1][-1] if self.recorder.rows else -1.0
            self.save(self.files.checkpoint, self.epoch, top1, iteration=self.step, sums=sums)

    def save(self, file, epoch, top1, **within):
        """Write a checkpoint, to `files.checkpoint` or `files.best`; of the former the one before is kept."""
        if spoilt := not_finite(self.model.state_dict()):  # the loss need not tell: a NaN makes no spike
            when = f"iteration {within.get('iteration', self.steps)} of epoch {self.epoch + 1}"
            # Its gradient has spoilt the layers below: the last is where it began.
            raise UserError(f"{spoilt[-1]} is not finite after {when}/{self.args.epochs}; {LOWER}")
        state = dict(epoch=epoch, iteration=0, state_dict=self.model.state_dict(), log=self.recorder.rows)
        state |= {self.files.accuracy: top1, f"best_{self.files.accuracy}": self.best_acc} | within
        state |= dict(arch=self.args.model, optimizer=self.optimizer.state_dict(), args=vars(self.args))
        state |= dict(versions=dict(torch=str(torch.__version__), python=platform.python_version()))
        checkpoint.save(state, file, self.files.previous if file == self.files.checkpoint else None)
