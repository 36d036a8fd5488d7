"""Gradient checkpointing (arXiv 1604.06174) of transformers' models. Nothing of vLLM here."""

from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def recompute_layers(model: PreTrainedModel) -> None:
    """Keep only the inputs of decoder layers for the backward pass, and compute the layers again there.

    The model stays in eval mode. Raises ValueError for a model whose code cannot do it.
    """
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.training = True  # it looks at its own flag; the modules inside stay in eval mode
