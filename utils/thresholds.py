"""The thresholds a run starts with: fitted to its data, or from the activations of an ANN (section 5.1)."""

import torch
from torch import nn

from utils import distributed, foreign
from utils.cli import few, require, warn
from utils.data import mix_seed, unaugmented
from utils.statistics import neuron_layers, published_name, threshold_name

IMAGES, BATCHES = 256, 8  # to fit to, at most
LOST = 0.5  # of what a layer should represent: above it a threshold is worth a word


def start_thresholds(model, fit_thresholds, data, args, resumed, device):
    """With --Vth auto fit the thresholds, unless the checkpoint `resumed` holds them.

    `fit_thresholds` is that of `models`. All processes look at the same images, in batches of the size of
    their share, and start at the thresholds of rank 0. What was fitted is kept in `args`, which the files of
    the run record. With --show_Vth prints the table, and warns of layers that the thresholds do not suit.
    """
    if not any(neuron_layers(model)):
        return
    known = resumed is not None and any(key.endswith("Vth") for key in resumed["state_dict"])
    if known and args.Vth == "auto":
        args.fitted_Vth = resumed["args"].get("fitted_Vth")
        fitted = args.fitted_Vth or {}
        sound = isinstance(fitted, dict) and all(0 < foreign.number(Vth) < 1e30 for Vth in fitted.values())
        require(sound, "the fitted_Vth of the checkpoint are no thresholds; give another file")
    apply = args.Vth == "auto" and not known
    if not (apply or args.show_Vth):
        return
    size = args.train_batch // distributed.world_size()
    batches = some_batches(data, IMAGES, size, args.manualSeed, device)
    fits = fit_thresholds(model, batches, apply=apply)
    fits = {published_name(layer): fit for layer, fit in fits.items()}
    if apply:
        args.fitted_Vth = distributed.broadcast({layer: fit.fitted.Vth for layer, fit in fits.items()})
        for layer, neuron in neuron_layers(model):
            neuron.Vth.data.fill_(args.fitted_Vth[layer])
        values, images = args.fitted_Vth.values(), sum(map(len, batches))
        print(f"thresholds: {min(values):.3g} to {max(values):.3g}, fitted to {images} training images")
    if args.show_Vth:
        print("\n".join(table(fits, apply)))
    warn_of_thresholds(fits, apply)


def some_batches(data, n, size, seed, device):
    """At most n training images without augmentation, drawn by `seed`: tensors of `size` of them or more."""
    images = unaugmented(data)
    n = min(n, len(images), BATCHES * size)
    generator = torch.Generator().manual_seed(mix_seed(seed) >> 1)
    chosen = torch.randperm(len(images), generator=generator)[:n]
    parts = chosen.tensor_split(max(1, n // size))  # none smaller: batch norm needs them
    return [torch.stack([torch.as_tensor(images[i][0]) for i in part.tolist()]).to(device) for part in parts]


def table(fits, applied):
    """The lines of a table of LayerFits; of thresholds that were not fitted, with what would be."""
    figures = f"{'Vth':>10} {'error %':>8} {'fires %':>8}"
    lines = [f"{'layer':20} {figures}" + ("" if applied else f"  auto:{figures[6:]}")]
    for layer, fit in fits.items():
        shown = [fit.fitted] if applied else [fit.given, fit.fitted]
        cells = [f"{f.Vth:10.4g} {100 * f.error:8.1f} {100 * f.rate:8.1f}" for f in shown]
        lines.append(" ".join([f"{layer:20}", *cells]))
    return lines


def warn_of_thresholds(fits, applied):
    """Name the layers that no threshold makes fire, or that lose much that one of their own would not."""
    dead = [layer for layer, fit in fits.items() if not fit.alive]
    poor = [layer for layer, fit in fits.items() if fit.given.error > max(LOST, 2 * fit.fitted.error)]
    if applied and dead:
        warn(f"no threshold of at least --Vth_bound makes these layers fire: {few(dead)}")
    if poor and not applied:
        what = f"{len(poor)} of {len(fits)} layers lose more than half of what their currents represent"
        warn(f"{what}: {few(poor)}; --Vth auto starts every layer at a threshold that fits the data")


def compare_neurons(args, model, content, path):
    """Warn if --pre_train has brought thresholds of other neurons than those of the flags."""
    settings = [("model", "alpha", *neuron.time_constants) for _, neuron in neuron_layers(model)][:1]
    chosen = args.Vth == "auto" or getattr(args, "load_Vth", "")  # then they are not what counts
    if chosen or not settings or not any(key.endswith("Vth") for key in content["state_dict"]):
        return
    earlier, now = content["args"] if isinstance(content.get("args"), dict) else {}, vars(args)
    known = [name for name in settings[0] if name in earlier and foreign.is_plain(earlier[name])]
    if differing := [name for name in known if earlier[name] != now[name]]:
        text = "; ".join(f"{name} {str(earlier[name])[:60]}, now {now[name]}" for name in differing)
        warn(f"{path} has thresholds for {text}; --Vth auto fits others")


@torch.no_grad()
def calibrate(model, batches, samples, fraction=0.999):
    """Layer -> the value that `fraction` of a ReLU's outputs lie below: element int(fraction*n) of n, sorted.

    Exact, for any split of the `samples` images into batches: as their number is known beforehand, so is how
    many of the largest values can matter; no more (one in a thousand) are kept while the batches stream by.
    """
    largest, names = {}, {module: threshold_name(name) for name, module in model.named_modules()}

    def keep(module, inputs):
        if not isinstance(module, nn.ReLU):
            return
        name, values = names[module], inputs[0].relu().flatten()
        n = values.numel() // len(inputs[0]) * samples
        count = n - int(fraction * n)
        values = torch.cat([largest.get(name, values[:0]), values])
        largest[name] = values.topk(min(count, len(values))).values

    model.eval()
    with nn.modules.module.register_module_forward_pre_hook(keep):
        for images in batches:
            model(images)
    return {name: values[-1].cpu().clone() for name, values in largest.items()}


def load_thresholds(model, path):
    """Start every neuron layer at the value of a threshold file: an IF at it, a LIF at it times delta_t."""
    neurons = {threshold_name(name): neuron for name, neuron in neuron_layers(model)}
    require(neurons, f"an ANN takes no thresholds, such as those in {path}; choose an SNN")
    for name, value in foreign.read_thresholds(path, list(neurons)).items():
        neurons[name].Vth.data.fill_(value * getattr(neurons[name], "delta_t", 1))
