"""Neuron layers and networks trained with Differentiation on Spike Representation. Needs torch alone."""

from models.neurons import IFNeuron, LIFNeuron
from models.registry import create_model, list_models
from models.thresholds import fit_thresholds

__all__ = ["IFNeuron", "LIFNeuron", "create_model", "fit_thresholds", "list_models"]
