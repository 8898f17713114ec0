"""Neuron layers and networks trained with Differentiation on Spike Representation. Imports torch alone."""

from models.neurons import IFNeuron, LIFNeuron
from models.registry import create_model, list_models

__all__ = ["IFNeuron", "LIFNeuron", "create_model", "list_models"]
