"""The export of a checkpoint does not depend on the layout that wrote it, and is what one process has in memory."""

import pytest
from layouts import recipe_of, write_source

from megatron_lpr.conversion.export.export import export_checkpoint, export_model
from megatron_lpr.families.expansion import Expansion
from megatron_lpr.platform import leave_layout
from megatron_lpr.testing.toy_models import write_toy_model

LAYOUTS = {
    "data": {},
    "tp2": {"tensor": 2},
    "pp4": {"pipeline": 4},
    "pp2_vpp2": {"pipeline": 2, "virtual_pipeline": 2},
    "ep4": {"expert": 4},
    "etp2": {"expert_tensor": 2},
    "tp2_pp2_ep2": {"tensor": 2, "pipeline": 2, "expert": 2},
    "tp4_ep2_etp2": {"tensor": 4, "expert": 2, "expert_tensor": 2},
}


def rewrite(root, models):
    """On each rank: load the checkpoint of every model at every layout and write it again."""
    from megatron_lpr.platform import megatron

    with megatron():
        for model in models:
            for name, parallel in LAYOUTS.items():
                rewrite_one(root / model / "base", root / model / "source", root / model / name, parallel)
                leave_layout()


def rewrite_one(base, source, out, parallel):
    from megatron_lpr.checkpoint.run_state import checkpoint_folder, read_run_state
    from megatron_lpr.checkpoint.save import save_checkpoint
    from megatron_lpr.families import read_architecture
    from megatron_lpr.model.builder import build_model, init_model_parallel
    from megatron_lpr.model.load.weights import fill_weights

    recipe, arch = recipe_of(base, "stage1", out, {"parallel": parallel}), read_architecture(base)
    init_model_parallel(recipe.parallel)
    chunks = build_model(recipe, arch)
    fill_weights(recipe, arch, chunks, checkpoint_folder(source))
    save_checkpoint(str(out), read_run_state(checkpoint_folder(source)), chunks)


MODELS = {"untied": False, "tied": True}


@pytest.fixture(scope="module")
def root(on_ranks, tmp_path_factory):
    """Of each model: base, checkpoints by layout, and the export that one process wrote from its memory."""
    from megatron_lpr.platform import megatron

    root = tmp_path_factory.mktemp("written")
    for model, tied in MODELS.items():
        # 300 tokens: with tensor parallelism the vocabulary is padded to other sizes
        base = write_toy_model(
            root / model / "base", num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, vocab_size=300,
            tie_word_embeddings=tied,
        )  # fmt: skip
        with megatron():
            source = write_source(base, root / model / "source")
            leave_layout()
            in_memory(base, source, root / model / "expected")
    on_ranks(rewrite, 4, root, list(MODELS))
    return root


def in_memory(base, source, out):
    from megatron_lpr.evaluation.megatron_model import MegatronModel

    model = MegatronModel.of_checkpoint(recipe_of(base, "stage1", out, {}), str(source))
    parameters = model.module.named_parameters()
    return export_model(parameters, model.arch, Expansion(num_experts=5, num_frozen=1), base_dir=base, out_dir=out)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_export_is_the_same_to_the_byte(root, model, name, tmp_path):
    out = export_checkpoint(root / model / name, tmp_path / "out", base_dir=root / model / "base")
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (out / file).read_bytes() == (root / model / "expected" / file).read_bytes(), file
