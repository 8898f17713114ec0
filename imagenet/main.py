"""Train on ImageNet in three stages: an ANN, its activations to thresholds, an SNN that starts from both.

    python imagenet/main.py --arch preresnet_ann.resnet18 --data ./data/imagenet --name model_ann
        --optimizer SGD --wd 1e-4 --batch-size 256 --lr 0.1
    python imagenet/main.py --arch preresnet_cal_Vth.resnet18 --data ./data/imagenet --pre_train model_ann.pth
        --calculate_Vth resnet18_Vth
    python imagenet/main.py --dist-url tcp://127.0.0.1:20500 --dist-backend nccl --multiprocessing-distributed
        --world-size 1 --rank 0 --arch preresnet_snn.resnet18_if --data ./data/imagenet
        --pre_train model_ann.pth --load_Vth resnet18_Vth.dict

Also under torchrun. Several machines: --world-size M --rank 0 to M-1, with one --dist-url tcp://HOST:PORT.
"""

import math
import os
import re
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.utils.data import Subset

from models import IFNeuron, LIFNeuron, create_model, fit_thresholds, list_models
from models.engines import ENGINES
from models.layers import BACKWARDS
from models.registry import NETWORKS
from models.thresholds import fit_to_activations
from utils import checkpoint, distributed, foreign
from utils.cli import Parser, choose_device, explained, number, read_presets, require, run_program
from utils.data import loader, unaugmented
from utils.program import add_flags, count, load, natural, run
from utils.records import RunFiles
from utils.statistics import threshold_name
from utils.thresholds import calibrate

SCRIPT, SEED_FLAG = "imagenet/main.py", "--seed"
(ROWS,) = read_presets(Path(__file__).with_name("presets.md"))
MODELS = list_models("imagenet")
# How the processes of a run were started; some of these flags differ between them.
LAUNCHING = ("multiprocessing_distributed", "cpu_processes", "world_size", "rank", "gpu")
LAUNCHING += ("local_rank", "dist_url")


def get_parser():
    """The published flags with their defaults, and ours."""
    parser = Parser(ROWS, description=__doc__)
    add = parser.group("data")
    add("--data", dest="path", may_change=True, help="folder with train/<class>/ and val/<class>/")
    add("-b", "--batch-size", dest="train_batch", type=count, help="of all processes together; 1 or more")
    add("--image_size", type=number(int, 32), default=224, help="pixels of the side; 32 or more")
    add = parser.group("from an ANN to an SNN")
    add("--load_Vth", default="", metavar="FILE", may_change=True, help="thresholds to start from")
    add("--calculate_Vth", default="", metavar="NAME", help="write thresholds from --pre_train to NAME.dict")
    add("--calibrate_batches", type=count, default=5, help="batches for --calculate_Vth, 1 or more")
    text = "images for --calculate_Vth (the official code: val)"
    add("--calibrate_split", choices=("train", "val"), default="train", help=text)
    text = "quantile: 0.999 of the activations lie below it; error: spikes within --timesteps fit them best"
    add("--calibrate_by", choices=("quantile", "error"), default="quantile", help=text)
    text = "neurons for which --calibrate_by error chooses, with --alpha (lif: --tau, --delta_t)"
    add("--calibrate_neuron", choices=("if", "lif"), default="if", help=text)
    add = parser.group("processes", may_change=True)
    text = "start the processes of this machine: one for each GPU, or --cpu_processes without one"
    add("--multiprocessing-distributed", action="store_true", help=text)
    add("--world-size", type=int, default=-1, help="number of machines")
    add("--rank", type=int, default=-1, help="number of this machine, from 0")
    text = "where the processes meet: tcp://HOST:PORT or env://"
    add("--dist-url", default="tcp://224.66.41.62:23456", help=text)
    add("--dist-backend", choices=("nccl", "gloo"), default="nccl", help="without GPUs always gloo")
    add("--gpu", type=natural, help="use this GPU alone, counted from 0")
    add("--local_rank", "--local-rank", type=int, help="set by torch.distributed.launch")
    add("--cpu_processes", type=count, default=2, help="processes on a machine without GPUs, 1 or more")
    defaults = dict(path="./data/imagenet", model="preresnet_snn.resnet18_if", train_batch=144, epochs=90)
    defaults |= dict(lr=0.001, warmup=5000, warmup_within_first_epoch=True, weight_decay=0.0)
    defaults |= dict(optimizer="adam", save_every=1000, print_freq=1000, dataset="imagenet")
    names = dict(models=MODELS, model_flags=["-a", "--arch"], seed_flag=SEED_FLAG)
    names |= dict(backwards=BACKWARDS, engines=ENGINES)
    add_flags(parser, **names, neurons=NETWORKS[defaults["model"]].defaults, **defaults)
    return parser


def run_files(args):
    """Where the run with these arguments leaves its files."""
    return RunFiles(Path(args.checkpoint, "imagenet"), args.name or args.model, accuracy="acc1")


def main(argv=None):
    """Train, evaluate or calibrate as the flags say. Raises UserError."""
    parser = get_parser()
    args = parser.parse(argv)
    gpu, found = args.gpu, torch.cuda.device_count()
    require(gpu is None or gpu < found, f"--gpu {gpu}: this machine has {found} CUDA devices; leave it out")
    device = choose_device(args.device if gpu is None else f"cuda:{gpu}")
    several = (args.multiprocessing_distributed or args.world_size > 1) and not args.calculate_Vth
    if several and "LOCAL_RANK" not in os.environ:
        launch(sys.argv[1:] if argv is None else argv, args, device)
        return
    device, args.test_batch = distributed.join(device, args.dist_backend), args.train_batch
    for name in LAUNCHING:
        delattr(args, name)
    files = run_files(args)
    twice = args.load_Vth and args.Vth == "auto"
    require(not twice, "--load_Vth and --Vth auto both choose the thresholds; leave one out")
    if args.calculate_Vth:
        calculate_thresholds(args, files.folder, device)
        return
    own = dict(create_model=create_model, fit_thresholds=fit_thresholds)
    run(args, files=files, device=device, fixed=parser.fixed, **own)
    distributed.leave()


def launch(argv, args, device):
    """Start this machine's processes, each with these flags, through torchrun's engine."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    machines, machine, url, env = args.world_size, args.rank, args.dist_url, os.environ
    if url == "env://":
        with explained(lambda why: f"WORLD_SIZE, RANK: {why}", ValueError):
            machines, machine = int(env.get("WORLD_SIZE", machines)), int(env.get("RANK", machine))
        url = f"tcp://{env.get('MASTER_ADDR', '127.0.0.1')}:{env.get('MASTER_PORT', 29500)}"
    given, address = "--dist-url" in " ".join(argv), re.fullmatch(r"tcp://(.+):(\d{1,5})", url, re.ASCII)
    valid = address and 0 < int(address[2]) < 2**16
    require(valid, f"--dist-url {args.dist_url} must be tcp://HOST:PORT or env://")
    several = f"--rank 0 to {machines - 1} and --dist-url tcp://HOST:PORT"
    known = machines <= 1 or 0 <= machine < machines and given
    require(known, f"--world-size {machines} needs {several}")
    require(machines > 1 or machine <= 0, f"--rank {machine} needs a --world-size above it")
    processes = torch.cuda.device_count() if device.type == "cuda" else args.cpu_processes
    where = ["--standalone"]
    if given:
        where = ["--nnodes", str(max(machines, 1)), "--node_rank", str(max(machine, 0))]
        where += ["--master_addr", address[1], "--master_port", address[2]]
    where += ["--nproc_per_node", str(processes if args.multiprocessing_distributed else 1)]
    if hasattr(signal, "SIGUSR1"):
        where += ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
    if device.type == "cpu":  # where a step may take long, and nobody waits for a process that has died
        env.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "3600")  # seconds until SIGKILL follows a signal
    hint = "try another --dist-url"
    try:
        with explained(lambda why: f"the processes cannot meet at {url} ({why}); {hint}", RuntimeError):
            torchrun([*where, str(Path(__file__).resolve()), *argv])
    except ChildFailedError as error:
        sys.exit(error.get_first_failure()[1].exitcode)
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval)


def calculate_thresholds(args, folder, device):
    """Write the thresholds of an ANN's activations, and print them."""
    require(args.pre_train, "--calculate_Vth needs the weights of an ANN: --pre_train FILE")
    fit = f"--calculate_Vth needs an ANN: --arch preresnet_cal_Vth.*, not {args.model}"
    require(NETWORKS[args.model].kind == "ann", fit)
    require("/" not in args.calculate_Vth, f"--calculate_Vth {args.calculate_Vth} must not contain a slash")
    data, path = load(args), checkpoint.find(args.pre_train, folder)
    print(f"data: imagenet, {data}")
    checkpoint.make_folder(folder)
    model = create_model(args.model, num_classes=data.classes).to(device)
    checkpoint.load_weights(model, foreign.load(path)["state_dict"], path)
    images, order = data.test, torch.arange(len(data.test))
    if args.calibrate_split == "train":
        images = unaugmented(data)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.manualSeed or 0))
    chosen = order[: args.calibrate_batches * args.train_batch].tolist()
    batches = loader(Subset(images, chosen), args.train_batch, args.workers, False)
    batches = (batch.to(device) for batch, _ in batches)
    if args.calibrate_by == "error":
        thresholds = least_error(args, model, batches)
    else:
        thresholds = calibrate(model, batches, len(chosen))
    for name, value in thresholds.items():
        print(f"{name:24} {value:10.4f}")
    dead = ", ".join(name for name, value in thresholds.items() if not 0 < value < math.inf)
    require(not dead, f"no threshold file: {path} gives no positive number for {dead}")
    file = folder / f"{args.calculate_Vth.removesuffix('.dict')}.dict"
    if distributed.rank() == 0:
        checkpoint.save(thresholds, file)
    print(f"thresholds of {len(chosen)} images of {args.calibrate_split}: {file}")


def least_error(args, model, batches):
    """Layer -> the value at which spikes represent the ANN's activations best, as a threshold file has it."""
    settings = dict(timesteps=args.timesteps, alpha=args.alpha)
    neuron, unit = IFNeuron(**settings), 1.0
    if args.calibrate_neuron == "lif":  # such a layer will start at the value times delta_t
        neuron, unit = LIFNeuron(tau=args.tau, delta_t=args.delta_t, **settings), args.delta_t
    fits = fit_to_activations(model.eval(), batches, neuron)
    values = {name: fit.fitted.Vth / unit if fit.alive else 0.0 for name, fit in fits.items()}
    return {threshold_name(name): torch.tensor(value) for name, value in values.items()}


if __name__ == "__main__":
    run_program(main)
