"""The golden figures and the rules by which their weights and inputs were drawn."""

import hashlib
import json
from math import prod
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parent


def neuron_cases():
    """case name -> dict of settings and arrays."""
    arrays = np.load(FOLDER / "neurons_f64.npz")
    meta = json.loads(str(arrays["meta"]))
    parts = ("x", "y", "gy", "gx", "rep")
    return {case: dict(entry, **{p: arrays[f"{case}_{p}"] for p in parts}) for case, entry in meta.items()}


def network_cases(file="cifar_models.json"):
    """`<model>|case<i>` -> dict of settings and figures."""
    return json.loads((FOLDER / file).read_text())


def generator(seed):
    return np.random.Generator(np.random.PCG64(seed))


def fill(model, seed):
    """Overwrite every entry of the state-dict but Vth and num_batches_tracked by a function of its name."""
    for name, entry in model.state_dict().items():
        *_, owner, kind = name.split(".")
        if kind in ("num_batches_tracked", "Vth"):
            continue
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        v = generator(int.from_bytes(digest[:8], "little")).standard_normal(tuple(entry.shape))
        if kind == "running_var":
            v = abs(v) * 0.2 + 0.9
        elif kind == "running_mean":
            v = 0.1 * v
        elif v.ndim >= 2:
            v = v * np.sqrt(2 / prod(v.shape[1:]))
        elif "bn" in owner or kind == "weight":
            v = 1 + 0.1 * v if kind == "weight" else 0.1 * v
        else:
            v = 0.05 * v
        entry.copy_(torch.from_numpy(np.asarray(v)))


def batch(name, case):
    """The input and labels of a network case."""
    shape, classes = case["x_shape"], case["num_classes"]
    if case["input"] == "poisson":
        r = generator(2000 + int(name.rpartition("case")[2]))
        x = r.poisson(0.6, shape).astype(np.float64)
    else:
        r = generator(1000 + case["seed"])
        x = r.standard_normal(shape)
    return torch.from_numpy(x), torch.from_numpy(r.integers(0, classes, shape[0]))
