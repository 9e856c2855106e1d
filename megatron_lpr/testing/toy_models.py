"""A toy of everything: random dense model, corpora of invented words, and recipes that train on them in seconds."""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from megatron_lpr.families import family_of, read_architecture
from megatron_lpr.files.safetensors_io import torch_dtype

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 257,  # the bytes and <eos>
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 0,
}
# Language codes that ISO 639 reserves for local use, and the letters that their words are made of.
LETTERS = {"qaa": "áéíőűzsgyk", "qab": "thewindco", "qac": "lñquimar"}


def write_toy_model(folder: str | Path, *, dtype: str = "float32", seed: int = 0, **config: Any) -> Path:
    """Write a random model with a byte-level tokenizer: a dense Llama, but for the config.json fields in `config`.

    Matrices have the standard deviation 1/sqrt(inputs), so that logits are of order one.
    """
    folder = Path(folder)
    folder.mkdir(parents=True)
    fields = CONFIG | {"dtype": dtype, "torch_dtype": dtype} | config
    (folder / "config.json").write_text(json.dumps(fields, indent=1), encoding="utf-8")
    write_toy_tokenizer(folder)
    arch = read_architecture(folder)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    zeros = family_of(arch).zero_shapes(arch, arch.num_experts)
    for name, shape in family_of(arch).shapes(arch, arch.num_experts).items():
        values = torch.randn(shape, generator=generator)
        if name in zeros:
            values.zero_()
        elif len(shape) == 1:
            values = 1 + 0.1 * values
        else:
            values /= shape[1] ** 0.5
        tensors[name] = values.to(torch_dtype(dtype))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_toy_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer without merges: <eos> is 0, bytes are 1 to 256."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<eos>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def write_toy_text(file: str | Path, language: str, *, documents: int = 40, seed: int = 0) -> Path:
    """JSONL documents of 5 to 40 invented words in one of the languages of `LETTERS`."""
    generator = random.Random(f"{language} {seed}")
    words = ["".join(generator.choices(LETTERS[language], k=generator.randint(2, 7))) for _ in range(50)]
    texts = (" ".join(generator.choices(words, k=generator.randint(5, 40))) for _ in range(documents))
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return Path(file)


def write_toy_project(root: str | Path, **model: Any) -> dict[str, Path]:
    """Write a base model, text and recipes under `root`; `model` goes to `write_toy_model`.

    Returns the recipe files by name: upcycle, stage1, stage2 and the baselines dense, moe_full and
    review_without_lpr. `upcycle` also describes the corpora for `preprocess`.
    """
    root = Path(root)
    write_toy_model(root / "base", **model)
    for language in ("qaa", "qab"):
        write_toy_text(root / f"text/{language}.jsonl", language)
    for language in LETTERS:
        write_toy_text(root / f"text/{language}.heldout.jsonl", language, documents=5, seed=1)
    return {name: write_recipe(root / f"{name}.yaml", tree) for name, tree in toy_recipes(root).items()}


def write_recipe(file: str | Path, tree: Mapping[str, Any]) -> Path:
    """Write a recipe tree as YAML."""
    Path(file).write_text(yaml.safe_dump(dict(tree), sort_keys=False, allow_unicode=True), encoding="utf-8")
    return Path(file)


def toy_recipes(root: Path) -> dict[str, dict[str, Any]]:
    """The recipe trees of `write_toy_project`: the whole method and its baselines, seconds each."""

    def text(language: str, suffix: str = "") -> dict[str, Any]:
        role = "expanded" if language == "qaa" else "original"
        files = str(root / f"text/{language}{suffix}.jsonl")
        return {"name": language, "language": language, "role": role, "files": files}

    common: dict[str, dict[str, Any]] = {
        "model": {"base": str(root / "base"), "num_experts": 3, "topk": 2, "router_init_std": 0.1},
        "data": {"manifest": str(root / "data/manifest.yaml"), "seq_length": 32},
        "preprocess": {"output": str(root / "data"), "corpora": [text("qaa"), text("qab")]},
        "evaluation": {"window": 32, "corpora": [text(language, ".heldout") for language in LETTERS]},
    }
    batch = {"steps": 6, "global_batch_size": 4, "micro_batch_size": 2}
    review = {"expanded": 0.5, "original": 0.5}

    def recipe(name: str, load: str | None = None, mixture: dict | None = None, **sections: Any) -> dict[str, Any]:
        tree = {"name": name, "output": str(root / name), **common, **sections}
        if load:
            tree["model"] = common["model"] | {"load": str(root / load)}
        if mixture:
            # a review as long as stage 1
            tree["data"] = common["data"] | {"mixture": mixture, "replay": {"max_share": 1.0}}
        return tree

    new_experts = {"trainable": "new_experts_and_routers"} | batch
    routers = {"trainable": "routers"} | batch
    everything = {"trainable": "all"} | batch
    adam = {"lr": 1e-2, "min_lr": 1e-3, "warmup_steps": 1}
    return {
        "upcycle": recipe("upcycle"),
        "stage1": recipe("stage1", "upcycle", train=new_experts, optimizer=adam, balance={"coeff": 0.02}),
        "stage2": recipe("stage2", "stage1", review, train=routers, optimizer=adam, lpr={"coeff": 0.1}),
        "dense": recipe("dense", train=everything, optimizer=adam)
        | {"model": {"base": str(root / "base"), "num_experts": 0}},
        "moe_full": recipe("moe_full", "upcycle", train=everything, optimizer=adam, balance={"coeff": 0.02}),
        "review_without_lpr": recipe("review_without_lpr", "stage1", review, train=routers, optimizer=adam),
    }
