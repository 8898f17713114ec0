"""Five training steps of the processes that a launcher starts; rank 0 saves every state to argv[1]."""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from models import create_model  # noqa: E402
from models.synchronized import synchronize  # noqa: E402
from utils import distributed  # noqa: E402


def train(name, backward, frozen):
    """5 steps on the same 8 images a step, however many processes share them. -> the final state"""
    torch.manual_seed(0)
    settings = dict(Vth=1.0, alpha=0.2) if name.endswith("_if") else dict(Vth=0.3, alpha=0.3, delta_t=0.2)
    model = create_model(name, num_classes=5, timesteps=3, backward=backward, **settings)
    for parameter in model.parameters():  # else the currents of silent channels are 0, the end of the clamp
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    model(torch.randn(8, 3, 32, 32))  # running statistics to freeze
    if distributed.world_size() > 1 and not frozen:
        synchronize(model)
    network = distributed.parallel(model, torch.device("cpu")).train(not frozen)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9)
    rank, world = distributed.rank(), distributed.world_size()
    for _ in range(5):
        images, labels = torch.randn(8, 3, 32, 32), torch.randint(5, (8,))
        loss = F.cross_entropy(network(images[rank::world]), labels[rank::world])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {key: value.double() for key, value in model.state_dict().items()}


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    distributed.join(torch.device("cpu"))
    cases = [
        (f"preresnet.resnet20_{kind}", backward, frozen)
        for kind in ("if", "lif")
        for backward in ("unrolled", "collapsed")
        for frozen in (False, True)
    ]
    states = {" ".join(map(str, case)): train(*case) for case in cases}
    if distributed.rank() == 0:
        torch.save(states, sys.argv[1])
