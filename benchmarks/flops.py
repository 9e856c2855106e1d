"""What freezing saves: operations of one training step, per method, for the architecture of a Hugging Face folder.

    python benchmarks/flops.py MODEL [--num-experts 3] [--frozen-share 0.33]

The closed form of `megatron_lpr.training.cost`, which the tests compare with PyTorch's counter.
"""

import argparse

from megatron_lpr.families import read_architecture
from megatron_lpr.recipe.settings import ModelConfig
from megatron_lpr.training.cost import step_flops

METHODS = {
    "stage 1": ("new_experts_and_routers", True),
    "stage 2": ("routers", True),
    "moe_full": ("all", True),
    "dense": ("all", False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder with config.json")
    parser.add_argument("--num-experts", type=int, default=3)
    parser.add_argument("--frozen-share", type=float, default=1 / 3, help="share of routing slots in the frozen expert")
    options = parser.parse_args()
    arch, tokens = read_architecture(options.model), 1024
    results = {}
    for method, (trainable, experts) in METHODS.items():
        model = ModelConfig(base=options.model, num_experts=options.num_experts if experts else 0)
        slots = [round(options.frozen_share * tokens * model.topk)] * arch.num_layers
        results[method] = step_flops(
            arch, model, trainable, tokens=tokens, frozen_slots=slots, vocab_size=arch.vocab_size
        )
    whole = results["moe_full"].total
    print("MFLOP per token, matrix products of weights\n")
    print("| method   | forward | input gradients | weight gradients |  total | of moe_full |")
    print("| -------- | ------: | --------------: | ---------------: | -----: | ----------: |")
    for method, flops in results.items():
        parts = [n / tokens / 1e6 for n in (flops.forward, flops.input_gradients, flops.weight_gradients, flops.total)]
        print(
            f"| {method:8} | {parts[0]:7.1f} | {parts[1]:15.1f} | {parts[2]:16.1f} | {parts[3]:6.1f} "
            f"| {100 * flops.total / whole:10.0f}% |"
        )


if __name__ == "__main__":
    main()
