"""The new experts of a rank as Transformer Engine's grouped products, where their weights may be frozen."""

from typing import Any


def frozen_aware(linear: type) -> type:
    """One of Megatron's grouped linear layers, which casts the gradient of its output for no product that is not made.

    The gradient of the input reads it by rows, that of the weights by columns. Transformer Engine's Linear leaves the
    columns out where the weight is frozen, its GroupedLinear does not.
    """

    class FrozenAware(linear):
        def _get_quantizers(self) -> Any:
            quantizers = super()._get_quantizers()
            if not any(parameter.requires_grad for parameter in self.parameters(recurse=False)):
                *_, of_output_gradients = quantizers
                for quantizer in filter(None, of_output_gradients):
                    quantizer.set_usage(columnwise=False)
            return quantizers

    return FrozenAware
