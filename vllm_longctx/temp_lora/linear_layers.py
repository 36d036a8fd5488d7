"""The linear layers of a Hugging Face model that may have adapters."""

from torch import nn
from transformers import PreTrainedModel

# What the name of a linear layer has that is in an expert, or decides between experts. vLLM computes all
# experts of a layer in one kernel, and takes adapters of them in another form.
EXPERTS, ROUTERS = "expert", ("gate", "router")


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of the model's decoder layers, and its name. Raises ValueError if it has none."""
    number = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == number:
            return name, module
    raise ValueError(f"{type(model).__name__} has no list of its {number} decoder layers")


def linear_layers(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """The (in, out) features of every linear layer in the model's decoder layers, by its name.

    Without those of experts and routers. Embeddings and the output layer are in no decoder layer.
    """
    parent, layers = decoder_layers(model)
    return {
        f"{parent}.{name}": (module.in_features, module.out_features)
        for name, module in layers.named_modules()
        if isinstance(module, nn.Linear) and not _routes(name)
    }


def experts(model: PreTrainedModel) -> list[str]:
    """Names of the modules in the model's decoder layers that are or hold experts."""
    parent, layers = decoder_layers(model)
    names = [name for name, _ in layers.named_modules() if EXPERTS in name]
    return [f"{parent}.{name}" for name in names if EXPERTS not in name.rpartition(".")[0]]


def _routes(name: str) -> bool:
    return EXPERTS in name or not set(ROUTERS).isdisjoint(name.split("."))


def target_modules(model: PreTrainedModel, names: set[str]) -> list[str]:
    """Names of the layers for peft: the last parts of theirs, if no other module's name ends like that."""
    last = {name.rpartition(".")[2] for name in names}
    same = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in last}
    return sorted(last if same == names else names)
