"""Which weights of a network belong to which neuron: a row of a convolution's or a linear layer's weight."""
from __future__ import annotations

from torch import Tensor, nn

from data.errors import expect

KINDS = ("auto", "convolutions", "all")
SHORTCUTS = ("shortcut", "downsample")  # their names here and in torchvision: they carry other neurons' outputs
ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
Convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def neuron_weights(model: nn.Module, num_classes: int, kinds: str = "auto") -> dict[str, Tensor]:
    """Weight by parameter name, each (neurons, ...): row i holds the incoming weights of neuron i.

    Left out: shortcuts, and the last layer where its neurons are the classes. kinds: convolutions alone, all
    (linear layers too, attention's projections among them), or auto: convolutions where these are at least half of
    the layers, else all. Raises InputError where nothing is left.
    """
    expect(kinds in KINDS, "kinds", f"one of {', '.join(KINDS)}", kinds)
    layers = _layers(model)
    if layers and len(list(layers.values())[-1][0]) == num_classes:
        layers.popitem()
    layers = {name: layer for name, layer in layers.items() if not set(name.split(".")) & set(SHORTCUTS)}
    convolutions = {name: weight for name, (weight, convolution) in layers.items() if convolution}
    if kinds == "convolutions" or (kinds == "auto" and 2 * len(convolutions) >= len(layers)):
        expect(convolutions, "model", "convolutions other than shortcuts and the last layer", "none")
        return convolutions
    expect(layers, "model", "layers other than shortcuts and the last one", "none")
    return {name: weight for name, (weight, _) in layers.items()}


def _layers(model: nn.Module) -> dict[str, tuple[Tensor, bool]]:
    """(weight, is it a convolution) of every layer, in the order of the modules; a shared weight once."""
    owned = {name: parameter for name, parameter in model.named_parameters() if parameter.is_floating_point()}
    found = {}
    for name, module in model.named_modules():
        kinds = ("weight",) if isinstance(module, (*Convolution, nn.Linear)) else ()
        kinds = ATTENTION if isinstance(module, nn.MultiheadAttention) else kinds
        for kind in kinds:
            key = f"{name}.{kind}".lstrip(".")
            if key in owned:
                found[key] = (owned[key], isinstance(module, Convolution))
    return found
