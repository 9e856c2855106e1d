"""What benchmarks/train_step.py times: shapes of known models, methods, precisions; and a plan for each that needs
neither a download nor a base on the disk: random corpora, and a config.json without weights.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lpr.checkpoint.same_run import base_identity
from megatron_lpr.data.corpus.indexed import IndexedWriter, token_dtype
from megatron_lpr.data.corpus.manifest import Corpus, Manifest, TokenizerRecord
from megatron_lpr.data.sampler.replay_sampler import ReplaySampler
from megatron_lpr.families import read_architecture
from megatron_lpr.recipe.checks import check_machine, check_recipe
from megatron_lpr.recipe.reading import load_recipe
from megatron_lpr.recipe.settings import Recipe
from megatron_lpr.training.plan import Plan

_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "mlp_bias": False}
_QWEN = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False}
METHODS: dict[str, dict[str, Any]] = {
    "stage1": {"train": {"trainable": "new_experts_and_routers"}, "balance": {"coeff": 0.02}},
    "stage2": {
        "train": {"trainable": "routers"},
        "lpr": {"coeff": 0.1},
        "data": {"mixture": {"expanded": 0.5, "original": 0.5}},
    },
    "moe_full": {"train": {"trainable": "all"}, "balance": {"coeff": 0.02}},
    "dense": {"train": {"trainable": "all"}, "model": {"num_experts": 0}},
}
FP8 = ("tensorwise", "blockwise", "mxfp8")
PRECISIONS = ("fp32", "bf16", *FP8)
DOCUMENTS, CORPUS_TOKENS = 1024, 1 << 20


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model's config.json, and how many of its layers one 80 GB GPU (or two CPU cores) can train all of.

    whole: layers of the model itself.
    """

    config: dict[str, Any]
    whole: int
    layers: int
    layers_on_cpu: int
    experts: int
    topk: int = 2

    def vocabulary(self, layers: int) -> int:
        """Cut as the layers are, so that the output layer weighs what it weighs in the whole model."""
        return max(1, round(self.config["vocab_size"] * layers / self.whole / 128)) * 128


def _config(family: dict, hidden: int, ffn: int, heads: int, groups: int, vocab: int, **fields: Any) -> dict[str, Any]:
    return family | {
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 8192,
        "torch_dtype": "bfloat16",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "tie_word_embeddings": False,
        **fields,
    }


_SMOLLM = _config(_LLAMA, 576, 1536, 9, 3, 49152, tie_word_embeddings=True)
SHAPES = {
    # SmolLM2-135M
    "135M": Shape(config=_SMOLLM, whole=30, layers=30, layers_on_cpu=4, experts=6),
    # Qwen1.5-1.8B, the paper's
    "1.8B": Shape(config=_config(_QWEN, 2048, 5504, 16, 16, 151936), whole=24, layers=10, layers_on_cpu=1, experts=6),
    # Llama 3 8B
    "8B": Shape(config=_config(_LLAMA, 4096, 14336, 32, 8, 128256), whole=32, layers=4, layers_on_cpu=1, experts=3),
    # many small experts: SmolLM2-135M with an FFN of 128 channels, 8 of 64 experts for each token
    "small-experts": Shape(
        config=_SMOLLM | {"intermediate_size": 128}, whole=30, layers=30, layers_on_cpu=4, experts=64, topk=8
    ),
    # of a test
    "tiny": Shape(config=_config(_LLAMA, 32, 48, 4, 2, 256), whole=2, layers=2, layers_on_cpu=2, experts=4),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table. A step has `samples` of `seq_length` tokens, `micro_batch` of them at once."""

    shape: str
    method: str
    precision: str
    layers: int
    vocabulary: int
    experts: int
    spec: str = "auto"
    samples: int = 32
    micro_batch: int = 8
    seq_length: int = 1024
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.shape}-{self.method}-{self.precision}"

    @property
    def tokens(self) -> int:
        return self.samples * self.seq_length


def recipe_of(case: Case, folder: Path) -> Recipe:
    shape = SHAPES[case.shape]
    tree: dict[str, Any] = {
        "name": case.name,
        "output": str(folder / "none"),
        "model": {
            "base": str(folder / f"{case.shape}-{case.layers}-{case.vocabulary}"),
            "num_experts": case.experts,
            "topk": shape.topk,
            "dtype": "float32" if case.precision == "fp32" else "bfloat16",
            "spec": case.spec,
        },
        "data": {"manifest": "none", "seq_length": case.seq_length},
        "train": {"steps": 1000, "global_batch_size": case.samples, "micro_batch_size": case.micro_batch},
    }
    if case.precision in FP8:
        tree["fp8"] = {"recipe": case.precision}
    for section, settings in METHODS[case.method].items():
        tree[section] = tree.get(section, {}) | settings
    return load_recipe(None, case.overrides, under=tree)


def write_base(case: Case, recipe: Recipe) -> Path:
    """The base that the recipe names: a config.json without weights."""
    base = Path(recipe.model.base)
    base.mkdir(exist_ok=True)
    size = {"num_hidden_layers": case.layers, "vocab_size": case.vocabulary}
    (base / "config.json").write_text(json.dumps(SHAPES[case.shape].config | size))
    return base


class RandomPlan(Plan):
    """A plan whose base has no files that a checkpoint could name."""

    frozen_is_base = False  # type: ignore[assignment]


def plan_of(case: Case, folder: Path) -> RandomPlan:
    """A checked plan; what it reads is written into `folder`, unless it is there.

    Raises:
        UserError: the case cannot be trained here.
    """
    recipe = recipe_of(case, folder)
    assert recipe.data is not None and recipe.train is not None
    arch = read_architecture(write_base(case, recipe))
    check_recipe(recipe, arch, 1)
    check_machine(recipe)
    manifest = _manifest(folder / f"corpora-{arch.vocab_size}", arch.vocab_size)
    return RandomPlan(
        recipe=recipe,
        arch=arch,
        manifest=manifest,
        sampler=ReplaySampler.of(manifest, recipe.data, recipe.train.seed),
        world_size=1,
        source=None,
        resume=None,
        state=None,
        base=base_identity(recipe.model.base, arch),
    )


@functools.cache
def _manifest(folder: Path, vocab_size: int) -> Manifest:
    """Two corpora of documents of random tokens, one of each role."""
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    corpora = []
    for language, role in (("qaa", "expanded"), ("qab", "original")):
        prefix = str(folder / language)
        writer = IndexedWriter(prefix, vocab_size)
        tokens = generator.integers(1, vocab_size, CORPUS_TOKENS).astype(token_dtype(vocab_size))
        writer.add_documents(tokens, np.full(DOCUMENTS, CORPUS_TOKENS // DOCUMENTS))
        writer.close()
        assert writer.digest is not None
        corpora.append(
            Corpus(
                name=language,
                prefix=prefix,
                language=language,
                role=role,
                documents=DOCUMENTS,
                tokens=CORPUS_TOKENS,
                digest=writer.digest,
                index_digest="0" * 64,
                spot_digests={},
            )
        )
    tokenizer = TokenizerRecord(
        name="random", vocab_size=vocab_size, sha256="0" * 64, eod_id=0, parse_special_tokens=True
    )
    return Manifest(path=str(folder / "manifest.yaml"), tokenizer=tokenizer, corpora=tuple(corpora))
