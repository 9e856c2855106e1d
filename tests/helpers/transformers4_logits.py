"""Run by another interpreter, which has transformers 4: logits of model folders, each loaded without a gap.

python transformers4_logits.py TOKENS.pt OUT.pt FOLDER...
"""

import sys

import torch
import transformers

assert transformers.__version__.startswith("4."), transformers.__version__
tokens_file, out, *folders = sys.argv[1:]
tokens, logits = torch.load(tokens_file), []
for folder in folders:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, torch_dtype=torch.float32, output_loading_info=True
    )
    # a shared expert of width 0 has no tensors in the file, and none that could be wrong
    missing = [name for name in info["missing_keys"] if model.get_parameter(name).numel()]
    assert not missing and not info["unexpected_keys"] and not info["mismatched_keys"], (folder, info)
    with torch.no_grad():
        logits.append(model.eval()(tokens).logits)
torch.save(logits, out)
