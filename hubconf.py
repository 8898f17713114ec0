"""Entry points of torch.hub: `torch.hub.load(REPOSITORY, "create_model", "preresnet.resnet18_lif")`.

REPOSITORY is `owner/name` on GitHub or, with source="local", a folder. `list_models` gives the names.
"""

from models import IFNeuron, LIFNeuron, create_model, list_models

dependencies = ["torch"]
__all__ = ["IFNeuron", "LIFNeuron", "create_model", "list_models"]
