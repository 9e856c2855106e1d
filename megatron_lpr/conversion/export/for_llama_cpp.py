"""A Qwen2-MoE export under the names with which llama.cpp computes it.

llama.cpp's `qwen2moe` takes the gates of the top k as they are, whatever `norm_topk_prob` says, and an export's sum to
one; and it divides by the shared expert's gate, which is zero. Its `llama`, which Mixtral becomes, renormalises gates,
and adds biases to q, k and v where a file has them. So the tensors go under Mixtral's names, biases with them, and the
shared expert stays out.
"""

import json
from dataclasses import replace
from pathlib import Path

from megatron_lpr.errors import UserError
from megatron_lpr.families import FAMILIES, Architecture, read_architecture
from megatron_lpr.families.export_config import export_config
from megatron_lpr.families.hf_config import read_config
from megatron_lpr.families.remarks import model_bytes
from megatron_lpr.files.new_folder import complete_folder, copy_companions
from megatron_lpr.files.output_place import check_place, check_vacant
from megatron_lpr.files.safetensors_io import SafetensorsReader, ShardedWriter, torch_dtype

QWEN2, MIXTRAL = FAMILIES["qwen2"], FAMILIES["mistral"]
WITH_BIASES = replace(QWEN2, moe=MIXTRAL.moe)
CARD = """A Qwen2-MoE model under Mixtral's names, for llama.cpp's convert_hf_to_gguf.py and nothing else.

transformers would load it without the biases of q, k and v.
"""


def write_for_llama_cpp(export: str | Path, out_dir: str | Path, *, dry_run: bool = False) -> Path:
    """Writes the folder for convert_hf_to_gguf.py. UserError for a model that needs none, or cannot be one."""
    arch = read_architecture(export)
    source = SafetensorsReader(export)
    _check(arch, source)
    shapes = WITH_BIASES.shapes(arch, arch.num_experts)
    # both tables name the same weights in the same order; what is zero comes last, and only in Qwen2-MoE
    names = dict(zip(shapes, QWEN2.shapes(arch, arch.num_experts), strict=False))
    check_place(out_dir, export, needed=model_bytes(arch, arch.num_experts, arch.dtype))
    check_vacant(out_dir)
    if dry_run:
        return Path(out_dir)
    with complete_folder(out_dir) as folder:
        writer = ShardedWriter(folder, shapes, dtype=torch_dtype(arch.dtype), max_shard_bytes=4 * 10**9)
        for name, own in names.items():
            writer.write(name, source.slice(own))
        writer.close()
        as_mixtral = replace(arch, family=MIXTRAL.name)
        config = export_config(
            as_mixtral, read_config(export), num_experts=arch.num_experts, topk=arch.topk, dtype=arch.dtype
        )
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        copy_companions(export, folder)
        (folder / "README.md").write_text(CARD, encoding="utf-8")
    return Path(out_dir)


def _check(arch: Architecture, source: SafetensorsReader) -> None:
    if arch.family != QWEN2.name or not arch.num_experts:
        raise UserError(f"'{source.folder}' is no Qwen2MoeForCausalLM: give it to convert_hf_to_gguf.py as it is")
    if arch.mlp_only_layers:
        raise UserError(
            f"'{source.folder}' has layers without experts ({', '.join(map(str, arch.mlp_only_layers))}), which "
            "llama.cpp has no place for: serve it with vLLM or transformers"
        )
    for name in QWEN2.zero_shapes(arch, arch.num_experts):
        # a shared expert is nothing as soon as one of its products is
        if name.endswith("down_proj.weight") and source.get(name).any():
            raise UserError(f"'{source.folder}' has a shared expert that is not zero ({name}): it is no export")
