"""docs/families.md: its code runs, and the family that it adds computes what transformers computes."""

import re
from pathlib import Path

import pytest
import torch
from tiny_models import SIZES, load_strictly, stock_logits, tokens_BS
from transformers import SeedOssConfig, SeedOssForCausalLM

from megatron_lpr.conversion.export.export import upcycle_hf
from megatron_lpr.conversion.verify.verify import verify_export
from megatron_lpr.families import FAMILIES
from megatron_lpr.families.expansion import Expansion

PAGE = Path(__file__).resolve().parents[3] / "docs/families.md"


@pytest.fixture
def seed_oss(monkeypatch):
    namespace = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(block, namespace)
    monkeypatch.setitem(FAMILIES, "seed_oss", namespace["SEED_OSS"])


def test_the_family_of_the_page(seed_oss, tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    torch.manual_seed(0)
    model = SeedOssForCausalLM(SeedOssConfig(**SIZES, head_dim=16))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 1.0)
    model.save_pretrained(base)
    upcycle_hf(base, out, Expansion(num_experts=3, router_std=1.0))
    assert type(load_strictly(out)).__name__ == "Qwen2MoeForCausalLM"
    torch.testing.assert_close(stock_logits(out), model.eval()(tokens_BS()).logits.detach(), rtol=0, atol=1e-5)
    assert verify_export(out, base).ok


def test_the_table_of_the_page_is_the_table_of_the_code():
    rows = re.findall(r"^\| `(\w+)` \| (\w+)[^|]*\| (\w*) *\| (\w+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert {name: (dense, out) for name, dense, _, out in rows} == {
        family.name: (family.dense.architecture, family.moe.architecture) for family in FAMILIES.values()
    }
    read_as = {}
    for family in FAMILIES.values():
        read_as.setdefault(family.moe.architecture, family.name)
    assert {again: name for name, _, again, _ in rows if again} == read_as
