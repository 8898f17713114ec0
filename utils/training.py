"""The training loop of every program."""

import json
import platform
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm

from utils import checkpoint, statistics
from utils.cli import Stopped, UserError, few, require, warn
from utils.data import mix_seed
from utils.distributed import any_process, broadcast, parallel, rank, same_buffers, total
from utils.foreign import read_log
from utils.recipe import cosine, limit_steps, load_optimizer, make_optimizer, warmup_cosine
from utils.records import Recorder
from utils.signals import StopRequest

QUIET = 60  # seconds of an epoch after which a log, which has no progress bar, gets a line
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
    """Sums of loss, hits and samples, kept on the device; `earlier` ones of a pass that goes on here."""

    def __init__(self, device, earlier=None):
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)
        if earlier is not None and rank() == 0:
            self.sums += self.sums.new_tensor(earlier)  # in double precision, as they were
        self.start, self.earlier = time.perf_counter(), earlier[-1] if earlier else 0

    def add(self, loss, logits, labels):
        ranked = statistics.hits(logits, labels)
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


def train_steps(network, *, loader, optimizer, schedule, metrics, device, title, precision, first):
    """Train on the batches of an epoch from number `first` on; after each, yields how many are done."""
    network.train()
    model = getattr(network, "module", network)
    for step, (images, labels) in enumerate(batches(loader, device, title, metrics, first), start=first):
        torch.manual_seed(mix_seed(loader.dataset.seed, loader.sampler.epoch, step, rank(), 1))  # dropout's
        optimizer.zero_grad()  # before the forward pass, which then has their memory
        look = statistics.count_spikes(model) if schedule.last_epoch == 0 else nullcontext()
        with autocast(device, precision), look as counts:
            logits = network(images)
        loss = F.cross_entropy(logits, labels)
        finite = loss.detach().isfinite().to("cpu", non_blocking=True)  # while the device computes on
        fetched = torch.cuda.current_stream(loss.device).record_event() if loss.is_cuda else None
        loss.backward()
        if fetched is not None:
            fetched.synchronize()
        if met_by := any_process(0 if finite else rank() + 1):  # before the weights are spoilt
            layer = statistics.first_not_finite(model, images)
            where = f"iteration {step + 1} of {title}, first in {layer or 'the loss itself'}"
            raise UserError(broadcast(f"the loss is {loss.item()} at {where}; {LOWER}", met_by - 1))
        if counts is not None:
            warn_if_silent(network, statistics.firing_rates(counts))
        optimizer.step()
        schedule.step()
        metrics.add(loss, logits, labels)
        yield step + 1


@torch.no_grad()
def evaluate(model, loader, device, precision="fp32", stop=None):
    """One pass over the test set. -> Result, layer -> firing rate. Raises Stopped if `stop` met a signal."""
    model.eval()
    metrics, turns = Metrics(device), broadcast(len(loader), source=-1)  # the last process has the fewest
    with statistics.count_spikes(model) as counts:
        for turn, (images, labels) in enumerate(batches(loader, device, "test", metrics)):
            with autocast(device, precision):
                logits = model(images)
            metrics.add(F.cross_entropy(logits, labels), logits, labels)
            if stop is not None and turn < turns and (number := stop.signal()):  # which all ask alike
                raise Stopped(number)
    counts = {layer: total(pair) for layer, pair in counts.items()}
    return metrics.result(everywhere=True), statistics.firing_rates(counts)


def warn_if_silent(model, rates):
    """A network in which no spike gets through learns nothing, and nothing else would tell."""
    silent = [layer for layer, rate in rates.items() if not rate]
    first = next((p for p in model.parameters() if p.dim() > 1 and p.requires_grad), None)
    what = [f"no spike of the first batch in {few(silent)}"] if silent else []
    lost = first is not None and not first.grad.any()
    what += ["the gradient of the first batch is exactly zero at the first layer"] * lost
    if what:
        hint = "say --Vth auto, or lower --Vth or --alpha, or raise --timesteps, --delta_t or the batch size"
        warn(f"{'; '.join(what)}; {hint}")


class Run:
    """A run of training: `epoch` counts the epochs that are done, `step` the steps of the next one.

    All that is random is drawn from (seed, epoch, step or sample): they are the state of every generator.
    """

    def __init__(self, *, args, files, device, model, train_loader, test_loader):
        self.args, self.files, self.device, self.model = args, files, device, model
        self.train_loader, self.test_loader, self.steps = train_loader, test_loader, len(train_loader)
        smallest = len(train_loader.sampler) % train_loader.batch_size or train_loader.batch_size
        lonely = "batch norm cannot work on one image at one time step; use another batch size"
        require(smallest * model.timesteps > 1, lonely)
        recipe = {name: getattr(args, name) for name in ("lr", "momentum", "weight_decay", "nesterov")}
        self.optimizer = make_optimizer(args.optimizer, model.parameters(), **recipe)
        self.epoch, self.step, self.sums = args.start_epoch, 0, None
        self.best_acc, self.rows = -1.0, None  # the first epoch makes this run's first best
        self.recorder, self.warned = None, set()  # the recorder is rank 0's, which alone writes

    def go_on(self, resumed, source):
        """Take over the state of a checkpoint that lay at `source`."""
        if "optimizer" in resumed:
            load_optimizer(self.optimizer, resumed["optimizer"], source)
        self.epoch, self.step, self.rows = resumed["epoch"], resumed["iteration"], resumed.get("log", [])
        far = f"{source}: {self.step} iterations into an epoch of {self.steps}; give it the same data"
        require(self.step <= self.steps, far)
        self.sums = resumed.get("sums") if self.step else None
        if source in self.files.checkpoints:
            self.best_acc = resumed["best_acc"]
            if "log" not in resumed and self.files.log.exists():  # an official run has its rows there alone
                self.rows = read_log(self.files.log)[: self.epoch]

    def train(self):
        """Train to the last epoch. Raises Stopped, with a checkpoint written, when a signal asks for it."""
        args = self.args
        if self.epoch >= args.epochs:
            print(f"nothing left to train: {self.epoch} of {args.epochs} epochs are done")
            log = self.files.log  # which lacks the last row of a run killed behind its checkpoint
            if rank() == 0 and args.resume == "auto" and self.rows and len(read_log(log)) < self.epoch:
                Recorder(self.files, self.epoch, self.rows)
            return
        if rank() == 0:
            checkpoint.make_folder(self.files.tensorboard)
            arguments = json.dumps(vars(args), indent=2, sort_keys=True) + "\n"
            checkpoint.save_text(arguments, self.files.arguments)
            self.recorder = Recorder(self.files, self.epoch, self.rows)
        self.network = parallel(self.model, self.device)
        curve = dict(lr=args.lr, epochs=args.epochs, steps_per_epoch=self.steps, warmup=args.warmup)
        curve |= dict(first_step=self.epoch * self.steps + self.step, within=args.warmup_within_first_epoch)
        self.schedule = warmup_cosine(self.optimizer, **curve)
        if args.Vth == "auto":
            neurons, fitted = statistics.neuron_layers(self.model), getattr(args, "fitted_Vth", None)
            thresholds = {layer: neuron.Vth for layer, neuron in neurons if neuron.Vth.requires_grad}
            limit_steps(self.optimizer, thresholds, fitted or {})
        with StopRequest() as stop:
            while self.epoch < args.epochs:
                self.run_epoch(stop)

    def run_epoch(self, stop):
        """Train on what is left of the epoch, test, and record both."""
        began, metrics = time.perf_counter(), Metrics(self.device, self.sums)
        try:
            train = self.train_epoch(metrics, stop)
            same_buffers(self.model)
            test, rates = evaluate(self.model, self.test_loader, self.device, self.args.precision, stop)
        except Stopped:
            self.save_within(metrics)
            raise
        best, self.best_acc = test.top1 > self.best_acc, max(self.best_acc, test.top1)
        self.epoch, self.step, self.sums = self.epoch + 1, 0, None
        if self.recorder is not None:
            self.record(train, test, rates, best, time.perf_counter() - began)

    def train_epoch(self, metrics, stop):
        """Train on what is left of the epoch, with a checkpoint after every --save_every steps. -> Result"""
        args, title = self.args, f"epoch {self.epoch + 1}/{self.args.epochs}"
        self.train_loader.sampler.start(self.epoch, self.step * self.train_loader.batch_size)
        parts = dict(loader=self.train_loader, optimizer=self.optimizer, schedule=self.schedule)
        how = dict(device=self.device, title=title, precision=args.precision, first=self.step)
        steps = train_steps(self.network, metrics=metrics, **parts, **how)
        said = time.perf_counter()
        for self.step in steps:
            if number := stop.signal():
                raise Stopped(number)
            if args.save_every and self.step % args.save_every == 0:
                self.save_within(metrics)
            due = args.print_freq and self.step % args.print_freq == 0
            if due or not sys.stderr.isatty() and time.perf_counter() - said > QUIET:
                print(f"{title}, iteration {self.step}/{self.steps}: {metrics.result()}", flush=True)
                said = time.perf_counter()
        return metrics.result(everywhere=True)

    def record(self, train, test, rates, best, seconds):
        """Log and save the epoch that is done. `seconds`: of what was left of it, with the test."""
        args, epoch, neurons = self.args, self.epoch - 1, dict(statistics.neuron_layers(self.model))
        silent = [layer for layer in neurons if not rates[layer]]
        low = [layer for layer, neuron in neurons.items() if neuron.Vth <= neuron.Vth_bound]
        hints = "a lower --lr may help", "--Vth auto fits thresholds to the data"
        silence = f"no spike on the test set ({hints[args.Vth != 'auto']})"
        for what, layers in ((silence, silent), ("a threshold at --Vth_bound", low)):
            if new := [layer for layer in layers if (what, layer) not in self.warned]:
                warn(f"{what}: {', '.join(new)}")
            self.warned |= {(what, layer) for layer in new}
        found = dict(thresholds={name: n.Vth.item() for name, n in neurons.items()}, firing_rates=rates)
        costs = {"seconds an epoch": seconds} | statistics.peak_memory(self.device)
        lr = args.lr * cosine(epoch, args.epochs)
        self.recorder.add(epoch, lr=lr, train=train, test=test, **found, costs=costs)
        if best:  # first, so that a run killed between the two writes its best again when it is resumed
            self.save(self.files.best, test.top1)
        self.save(self.files.checkpoint, test.top1)
        self.recorder.write()
        print(
            f"epoch {self.epoch}/{args.epochs}: loss {train.loss:.4f} train, {test.loss:.4f} test; "
            f"top-1 {train.top1:.2f} % train, {test.top1:.2f} % test (best {self.best_acc:.2f}); "
            f"{train.images_per_second:.0f} images/s",
            flush=True,
        )

    def save_within(self, metrics):
        """A checkpoint of the epoch that is under way."""
        sums = total(metrics.sums).tolist()
        if self.recorder is not None:
            top1 = self.recorder.rows[-1][-1] if self.recorder.rows else -1.0
            self.save(self.files.checkpoint, top1, sums=sums)

    def save(self, file, top1, **within):
        """Write a checkpoint, to `files.checkpoint` or `files.best`; of the former the one before is kept."""
        weights, accuracy = self.model.state_dict(), self.files.accuracy
        if spoilt := statistics.not_finite(weights):  # the loss need not tell: a NaN makes no spike
            epoch, step = (self.epoch + 1, self.step) if self.step else (self.epoch, self.steps)
            when = f"iteration {step} of epoch {epoch}/{self.args.epochs}"
            # Its gradient has spoilt the layers below: the last is where it began.
            raise UserError(f"{spoilt[-1]} is not finite after {when}; {LOWER}")
        state = dict(epoch=self.epoch, iteration=self.step, state_dict=weights, log=self.recorder.rows)
        state |= {accuracy: top1, f"best_{accuracy}": self.best_acc} | within
        state |= dict(arch=self.args.model, optimizer=self.optimizer.state_dict(), args=vars(self.args))
        if (classes := getattr(self.train_loader.dataset.dataset, "classes", None)) is not None:
            state["classes"] = [str(name) for name in classes]
        state |= dict(versions=dict(torch=str(torch.__version__), python=platform.python_version()))
        checkpoint.save(state, file, self.files.previous if file == self.files.checkpoint else None)
