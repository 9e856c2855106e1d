"""Frozen weights of FP8 layers: cast once in a run, where Megatron has every weight cast anew in each step.

Transformer Engine's linear layers multiply by what is FP8 already as it is. Of a frozen weight they need one byte for
the forward product, and a second one, the same values transposed, for the gradient of the layer's input: Transformer
Engine makes it where a backward pass first asks for it, and keeps it. Below the first router none ever does.

    fp8.frozen_weights: bf16    the weight, and beside it those bytes
    fp8.frozen_weights: fp8     those bytes alone; nothing gives the base's own values back

Both compute the same to the last bit. A sharded weight is whole for a moment only, and so is what it is cast to; with
`fp8` its rows are cast once, and gathered as bytes (fp8_rows.py).
"""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.utils import get_model_config, unwrap_model

from megatron_lpr.model.fp8_rows import hold_in_fp8
from megatron_lpr.platform.shards import is_sharded
from megatron_lpr.recipe.settings import Fp8Config


def cast_frozen_once(settings: Fp8Config, chunks: Sequence[torch.nn.Module]) -> None:
    """Have the frozen weights of this rank's chunks, filled and wrapped, cast as the recipe says; no other is touched.

    A weight is quantised whole: slice by slice each slice would change the scale of those before it.
    """
    if settings.recipe == "none":
        return
    if settings.frozen_weights == "fp8":
        for chunk in chunks:
            _quantise(unwrap_model(chunk))
        return
    for chunk in chunks:
        _cast_in_first_step(chunk)


@torch.no_grad()
def _quantise(model: Any) -> None:
    # held-out text is scored in bfloat16, with the values that FP8 has left
    warnings.filterwarnings("ignore", message="You are using quantized weights without quantized compute")
    for layer in model.decoder.layers:
        with get_fp8_context(get_model_config(model), layer.layer_number - 1):
            for module in _frozen(layer):
                _quantise_module(module)


def _quantise_module(module: Any) -> None:
    names = [name for name, _ in module.named_parameters(recurse=False) if name.startswith("weight")]
    module.init_fp8_metadata(num_gemms=len(names))  # which makes the quantizers, as a first forward pass would
    for name, quantizer in zip(names, module._get_weight_quantizers(), strict=True):
        if quantizer is None:  # it is in layers that stay in bfloat16
            continue
        weight, own = getattr(module, name), _by_rows(quantizer)
        if is_sharded(weight):
            hold_in_fp8(weight, own)
        else:
            setattr(module, name, _quantised(weight, own))


def _by_rows(quantizer: Any) -> Any:
    """A copy of a module's, which lays values out for the forward product."""
    from transformer_engine.pytorch.tensor.mxfp8_tensor import MXFP8Quantizer

    quantizer = quantizer.copy()
    quantizer.internal = False
    # 32 numbers of a column share another scale than those of a row, and the rows do not tell it
    quantizer.set_usage(rowwise=True, columnwise=isinstance(quantizer, MXFP8Quantizer))
    return quantizer


def _quantised(weight: torch.nn.Parameter, quantizer: Any) -> torch.nn.Parameter:
    quantised = torch.nn.Parameter(quantizer(weight.detach()), requires_grad=False)
    vars(quantised).update(vars(weight))  # Megatron's marks
    return quantised


def _cast_in_first_step(chunk: Any) -> None:
    """Leave frozen modules out when Megatron tells each, in a step's first micro-batch, that its weights are new."""
    kept = set()
    for module in _frozen(chunk):
        if any(is_sharded(parameter) for parameter in module.parameters(recurse=False)):
            module.disable_parameter_transpose_cache = True
        else:
            kept.add(module)
    chunk.modules_with_is_first_microbatch = [
        module for module in chunk.modules() if hasattr(module, "is_first_microbatch") and module not in kept
    ]


def _frozen(parent: torch.nn.Module) -> Iterable[Any]:
    """The linear modules of Transformer Engine in it of which nothing learns."""
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    for module in parent.modules():
        if isinstance(module, TransformerEngineBaseModule):
            parameters = dict(module.named_parameters(recurse=False))
            if any(name.startswith("weight") for name in parameters) and not any(
                parameter.requires_grad for parameter in parameters.values()
            ):
                yield module
