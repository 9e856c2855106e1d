"""Parameters by their names in the model, whatever chunk and pipeline stage they lie in."""

from collections.abc import Iterable, Iterator

import torch
from megatron.core.utils import unwrap_model

_LAYERS = "decoder.layers."


def named_weights(chunks: Iterable[torch.nn.Module]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """This rank's parameters in the order of the forward pass, layers numbered as in the whole model, from 0."""
    for chunk in chunks:
        model = unwrap_model(chunk)
        first_layer = model.decoder.layers[0].layer_number - 1
        for name, parameter in model.named_parameters():
            yield _in_the_model(name, first_layer), parameter


def _in_the_model(name: str, first_layer: int) -> str:
    if not name.startswith(_LAYERS):
        return name
    layer, rest = name.removeprefix(_LAYERS).split(".", 1)
    return f"{_LAYERS}{int(layer) + first_layer}.{rest}"
