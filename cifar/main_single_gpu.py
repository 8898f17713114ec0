"""Train a spiking network on small images with one process, on a GPU or a CPU.

python -u cifar/main_single_gpu.py --preset quickstart
python -u cifar/main_single_gpu.py --dataset cifar10 --model preresnet.resnet18_lif
python -u cifar/main_single_gpu.py --dataset cifar10 --model preresnet.resnet18_if --Vth 6 --alpha 0.5
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cifar.program import main
from utils.cli import run_program

if __name__ == "__main__":
    run_program(lambda argv: main(argv, __doc__, lr=0.1))
