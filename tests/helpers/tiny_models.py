"""Tiny random models of every family, saved by transformers itself."""

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Constants with which the channels of a head of 16 lie in all three ranges: kept, blended and stretched.
OTHER_LLAMA3_SCALING = {**LLAMA3_SCALING, "factor": 4.0, "low_freq_factor": 2.0, "original_max_position_embeddings": 64}
# class, fields; every family has a variant that needs each thing its table says
TINY = {
    "llama": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "llama_tied_llama3_head_dim": (
        "Llama",
        {"head_dim": 16, "tie_word_embeddings": True, "rope_parameters": {**LLAMA3_SCALING, "rope_theta": 1e5}},
    ),
    "llama_other_llama3": (
        "Llama",
        {"head_dim": 16, "rope_parameters": {**OTHER_LLAMA3_SCALING, "rope_theta": 1e4}},
    ),
    "llama_linear_rope": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    ),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 8}),
    "mistral_window": ("Mistral", {"sliding_window": 7}),
    "qwen2": ("Qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2_tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": (
        "Qwen3",
        {"head_dim": 16, "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
    "phi3": ("Phi3", {"head_dim": 16, "sliding_window": 9, "pad_token_id": None}),
    "ernie4_5": ("Ernie4_5", {"head_dim": 16}),
    "helium": ("Helium", {"head_dim": 8, "pad_token_id": None}),
    "olmo2": ("Olmo2", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "seed_oss": ("SeedOss", {"head_dim": 16}),
}


def save_tiny(name: str, folder: Path, dtype: torch.dtype = torch.float32, **fields) -> Path:
    """Random weights, norms and biases included, and a tokenizer file of arbitrary bytes."""
    family, own = TINY[name]
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **own, **fields})
    torch.manual_seed(sum(map(ord, name)))
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.2 if parameter.ndim > 1 else 1.0))
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(b'{"not": "parsed"}  \n')
    return folder


def load_apart(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a single-file checkpoint; a Phi-3's cut where its own code cuts what they compute."""
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    for name in [name for name in tensors if name.endswith("qkv_proj.weight")]:
        sizes = [config[heads] * config["head_dim"] for heads in ("num_attention_heads", *["num_key_value_heads"] * 2)]
        for letter, part in zip("qkv", tensors.pop(name).split(sizes), strict=True):
            tensors[name.replace("qkv_proj", f"{letter}_proj")] = part
    for name in [name for name in tensors if name.endswith("gate_up_proj.weight")]:
        for which, part in zip(("gate", "up"), tensors.pop(name).chunk(2), strict=True):
            tensors[name.replace("gate_up", which)] = part
    return tensors


def rewrite(folder: Path, change) -> Path:
    """Change the tensors of a single-file checkpoint in place; `change` gets them by name."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def rewrite_config(folder: Path, **fields) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return folder


def train_a_little(tensors: dict[str, torch.Tensor], num_frozen: int = 1) -> None:
    """Experts as training leaves them: new ones of their own, and routers with clear opinions."""
    generator = torch.Generator().manual_seed(0)
    for name in sorted(tensors):
        noise = torch.randn(tensors[name].shape, generator=generator)
        if ".experts." in name and int(name.split(".experts.")[1].split(".")[0]) >= num_frozen:
            tensors[name] = (tensors[name] + noise * 0.1).to(tensors[name].dtype)
        elif name.endswith((".mlp.gate.weight", ".block_sparse_moe.gate.weight")):
            tensors[name] = (noise * 0.5).to(tensors[name].dtype)


def tokens_BS(length: int = 40) -> torch.Tensor:
    return torch.randint(60, (2, length), generator=torch.Generator().manual_seed(0))


def load_strictly(folder: Path) -> torch.nn.Module:
    """The stock class in fp32; every key must be there, and no other."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


@torch.no_grad()
def stock_logits(folder: Path, tokens: torch.Tensor | None = None) -> torch.Tensor:
    return load_strictly(folder)(tokens_BS() if tokens is None else tokens).logits
