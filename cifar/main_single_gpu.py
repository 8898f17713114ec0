"""Train a spiking network on small images with one process, on a GPU or a CPU.

    python -u cifar/main_single_gpu.py --preset quickstart
    python -u cifar/main_single_gpu.py --path ./data --dataset cifar10 --model preresnet.resnet18_lif
    python -u cifar/main_single_gpu.py --path ./data --dataset cifar10 --model preresnet.resnet18_if
        --Vth 6 --alpha 0.5 --Vth_bound 0.01

For 5 time steps: --timesteps 5 --lr 0.05 and, for LIF, --Vth 0.6 --alpha 0.5 --Vth_bound 0.001 --delta_t 0.1
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cifar.program import main
from utils.cli import run_program

if __name__ == "__main__":
    run_program(lambda argv: main(argv, __doc__, lr=0.1))
