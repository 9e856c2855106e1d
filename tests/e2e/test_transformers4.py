"""transformers 4.57 reads every export as transformers 5 does: the same logits from the same folders.

It needs an interpreter of its own: `make venv-transformers4`, or MEGATRON_LPR_TRANSFORMERS4_PYTHON names one.
"""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from rank_shapes import empty_parameters
from tiny_models import TINY, rewrite, save_tiny, stock_logits, tokens_BS, train_a_little
from transformers import AutoModelForCausalLM

from megatron_lpr.conversion.export.export import export_model, upcycle_hf
from megatron_lpr.families import read_architecture
from megatron_lpr.families.expansion import Expansion
from megatron_lpr.files.safetensors_io import SafetensorsReader
from megatron_lpr.model.load.upcycle import load_dense
from megatron_lpr.recipe.settings import ExportConfig

ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(os.environ.get("MEGATRON_LPR_TRANSFORMERS4_PYTHON", ROOT / ".venv-transformers4/bin/python"))
QWEN_OPTIONS = {
    "layers_without_experts": ("qwen3", {"mlp_only_layers": (1,)}, None),
    "no_shared_expert": ("qwen2", {}, 0),
}
# Seed-OSS' heads do not make up the hidden size; a Qwen2-MoE of transformers 4 insists on that, and export says so.
NAMES = [name for name in TINY if name != "seed_oss"]
NAMES += [*QWEN_OPTIONS, "llama_other_llama3_dense", "qwen2_dense", "qwen3_dense"]

pytestmark = pytest.mark.skipif(not PYTHON.is_file(), reason=f"no transformers 4 at {PYTHON}: make venv-transformers4")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Exports by name, with experts that differ; and one of a dense model."""
    root = tmp_path_factory.mktemp("exports")
    bases = {name: save_tiny(name, root / f"{name}_base") for name in TINY}
    options = {name: (name, {}, None) for name in NAMES if name in TINY} | QWEN_OPTIONS
    exports = {
        name: rewrite(
            upcycle_hf(
                bases[base],
                root / name,
                Expansion(num_experts=4, **chosen),
                settings=ExportConfig(shared_expert_size=shared_expert_size),
            ),
            train_a_little,
        )
        for name, (base, chosen, shared_expert_size) in options.items()
    }
    for name in ("llama_other_llama3", "qwen2", "qwen3"):
        exports[f"{name}_dense"] = dense_again(bases[name], root / f"{name}_dense")
    return exports


def dense_again(base, out):
    """What training a dense model and exporting it does to the folder, without the training."""
    arch = read_architecture(base)
    parameters = empty_parameters(arch, layers=arch.num_layers, num_frozen=0, num_experts=0)
    load_dense(parameters.items(), SafetensorsReader(base), arch)
    return export_model(parameters.items(), arch, Expansion(), base_dir=base, out_dir=out)


@pytest.fixture(scope="module")
def version_4(folders, tmp_path_factory):
    """Logits by name; one process, since importing costs most."""
    scratch = tmp_path_factory.mktemp("transformers4")
    torch.save(tokens_BS(), scratch / "tokens.pt")
    script = Path(__file__).parents[1] / "helpers" / "transformers4_logits.py"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    arguments = [PYTHON, script, scratch / "tokens.pt", scratch / "logits.pt", *folders.values()]
    done = subprocess.run(list(map(str, arguments)), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(zip(folders, torch.load(scratch / "logits.pt"), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_same_logits_as_transformers_5(folders, version_4, name):
    if name == "no_shared_expert":  # its absent tensors of no elements are reported as missing
        with torch.no_grad():
            expected = AutoModelForCausalLM.from_pretrained(folders[name]).eval()(tokens_BS()).logits
    else:
        expected = stock_logits(folders[name])
    torch.testing.assert_close(version_4[name], expected, rtol=0, atol=1e-5)
