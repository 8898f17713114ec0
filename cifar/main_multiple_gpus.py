"""Train a spiking network on small images with several processes, one for each GPU, or on CPUs.

    python -u -m torch.distributed.launch --nproc_per_node 4 cifar/main_multiple_gpus.py --dataset cifar10
    torchrun --nproc_per_node 4 --max-restarts 3 cifar/main_multiple_gpus.py --resume auto ...

On several machines the same on each, with torchrun's --nnodes 2 --rdzv_backend c10d --rdzv_endpoint HOST:PORT
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cifar.program import main
from utils.cli import run_program

if __name__ == "__main__":
    run_program(lambda argv: main(argv, __doc__, lr=0.05, processes=True))
