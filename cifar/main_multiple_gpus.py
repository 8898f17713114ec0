"""Train a spiking network on small images with several processes, one for each GPU, or on CPUs.

    python -u -m torch.distributed.launch --nproc_per_node 4 cifar/main_multiple_gpus.py --path ./data
        --dataset cifar10 --model preresnet.resnet18_lif
    torchrun --nproc_per_node 4 --max-restarts 3 cifar/main_multiple_gpus.py --resume auto ...

Batch sizes are totals of all processes. Several machines: the same command on each, with torchrun's
--nnodes 2 --rdzv_backend c10d --rdzv_endpoint HOST:PORT
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cifar.program import main
from utils.cli import run_program

if __name__ == "__main__":
    run_program(lambda argv: main(argv, __doc__, lr=0.05, processes=True))
