"""What is verified follows from the checkpoint and from the export's record, whatever recipe is typed."""

import json
import shutil

import pytest
from tiny_models import rewrite, rewrite_config
from toy_run import toy_parameters, write_run

from megatron_lpr import cli
from megatron_lpr.conversion.export.export import export_checkpoint, upcycle_hf
from megatron_lpr.conversion.record import Made, made_of, read_record
from megatron_lpr.conversion.verify.verify import verify_export
from megatron_lpr.errors import UserError
from megatron_lpr.families.expansion import Expansion
from megatron_lpr.recipe.settings import ExportConfig
from megatron_lpr.testing.toy_models import write_recipe, write_toy_model

TRAIN = {"steps": 4}
FROZEN = "model.layers.1.block_sparse_moe.experts.0.w1.weight"


@pytest.fixture(scope="module")
def made_here(tmp_path_factory):
    """A base, a run with routers trained, and its export, verified."""
    root = tmp_path_factory.mktemp("made")
    base = write_toy_model(root / "base")
    write_run(base, root / "run", recipe={"name": "stage2", "train": TRAIN | {"trainable": "routers"}})
    export_checkpoint(root / "run", root / "out", base_dir=base, on_verified=lambda report: None)
    return root


@pytest.fixture
def copy(made_here, tmp_path):
    return shutil.copytree(made_here / "out", tmp_path / "copy")


def recipe_file(made_here, folder, trainable="routers", **model):
    tree = {
        "name": "typed", "output": str(folder / "none"), "train": TRAIN | {"trainable": trainable},
        "model": {"base": str(made_here / "base"), "num_experts": 3} | model,
    }  # fmt: skip
    return write_recipe(folder / "typed.yaml", tree)


def verify(made_here, export, tmp_path, capsys, *options, **recipe):
    """Exit status, and what was printed."""
    typed = ["--recipe", str(recipe_file(made_here, tmp_path, **recipe))]
    status = cli.main(["verify", str(export), *typed, *map(str, options)])
    printed = capsys.readouterr()
    told = [line for line in printed.err.splitlines() if line and not line.startswith("verify: ")]  # the progress bar
    assert "Traceback" not in printed.err and len(told) == (1 if status else 0)
    return status, printed.out


def damage_frozen(export):
    return rewrite(export, lambda tensors: tensors[FROZEN][3, 5].mul_(2))


def test_the_record_of_an_export(made_here):
    record = read_record(made_here / "out")
    assert record.made == Made(expansion=Expansion(num_experts=3), trainable="routers", dtype="float32")
    assert record.made == made_of(made_here / "run/checkpoints/step_00000004")
    assert (record.step, record.dtype, record.instruct) == (4, "float32", None)
    assert {"config.json", "tokenizer.json"} <= record.base.keys() and len(record.frozen_sha256) == 64
    assert record.versions.keys() >= {"megatron_lpr", "torch"}


def test_it_does_not_matter_when_the_export_was_made(made_here, tmp_path):
    export_checkpoint(made_here / "run", tmp_path / "out", base_dir=made_here / "base", on_verified=lambda report: None)
    name = "megatron_lpr.json"
    assert (tmp_path / "out" / name).read_bytes() == (made_here / "out" / name).read_bytes()


@pytest.mark.parametrize("trainable", ["routers", "new_experts_and_routers", "all"])
@pytest.mark.parametrize("with_checkpoint", [False, True])
def test_a_damaged_frozen_expert_fails_whichever_recipe_is_typed(
    made_here, copy, tmp_path, capsys, trainable, with_checkpoint
):
    options = ["--checkpoint", made_here / "run", "--no-logits"] if with_checkpoint else []
    status, printed = verify(made_here, damage_frozen(copy), tmp_path, capsys, *options, trainable=trainable)
    assert status == 2 and "FAIL  frozen tensors 20 of 21" in printed
    assert ("FAIL  checkpoint" in printed) == with_checkpoint


def test_another_recipe_is_told(made_here, copy, tmp_path, capsys):
    status, printed = verify(made_here, copy, tmp_path, capsys, trainable="all", topk=1)
    assert status == 2 and "FAIL  record" in printed
    assert "topk is 2 in the export's megatron_lpr.json, 1 in the recipe" in printed
    options = ["--checkpoint", made_here / "run", "--no-logits"]
    status, printed = verify(made_here, copy, tmp_path, capsys, *options, trainable="all", topk=1)
    assert status == 0 and "topk is 2 in the checkpoint, 1 in the recipe, which does not count" in printed
    assert verify(made_here, copy, tmp_path, capsys, trainable="new_experts_and_routers")[0] == 0


@pytest.mark.parametrize("topk", [1, 3])
def test_another_top_k_fails(made_here, copy, tmp_path, capsys, topk):
    rewrite_config(copy, num_experts_per_tok=topk)
    status, printed = verify(made_here, copy, tmp_path, capsys)
    assert status == 2 and f"FAIL  config         num_experts_per_tok = {topk} (not 2)" in printed


def change_record(export, **fields):
    path = export / "megatron_lpr.json"
    tree = json.loads(path.read_text())
    tree["made"] |= fields
    path.write_text(json.dumps(tree))
    return export


@pytest.mark.parametrize("fields", [{"topk": 1}, {"trainable": "all"}, {"num_frozen_experts": 2}])
def test_a_record_that_was_changed_with_the_export_fails(made_here, copy, tmp_path, capsys, fields):
    if "topk" in fields:
        rewrite_config(copy, num_experts_per_tok=1)
    change_record(damage_frozen(copy), **fields)
    status, printed = verify(made_here, copy, tmp_path, capsys)
    assert status == 2 and "FAIL  record" in printed
    options = ["--checkpoint", made_here / "run", "--no-logits"]
    status, printed = verify(made_here, copy, tmp_path, capsys, *options)
    assert status == 2 and "FAIL  record" in printed and "FAIL  frozen tensors" in printed


def test_an_export_without_a_record(made_here, copy, tmp_path, capsys):
    (copy / "megatron_lpr.json").unlink()
    status, printed = verify(made_here, copy, tmp_path, capsys)
    assert status == 0 and "no megatron_lpr.json: what is frozen, and top-k, are taken from the recipe" in printed
    status, printed = verify(
        made_here, damage_frozen(copy), tmp_path, capsys, "--checkpoint", made_here / "run", "--no-logits",
        trainable="all",
    )  # fmt: skip
    assert status == 2 and "the checkpoint says what was done" in printed and "FAIL  frozen tensors" in printed


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "made": {"topk": 2}}'])
def test_a_record_that_is_none(made_here, copy, content):
    (copy / "megatron_lpr.json").write_text(content)
    with pytest.raises(UserError, match="megatron_lpr.json' is no record of an export"):
        verify_export(copy, made_here / "base")


def test_frozen_tensors_of_another_version_of_the_base(made_here, copy, tmp_path):
    """The base and the export changed alike: the tensors are equal, and not what was exported."""
    base = rewrite(shutil.copytree(made_here / "base", tmp_path / "base"), lambda t: t["model.norm.weight"].mul_(2))
    rewrite(copy, lambda tensors: tensors["model.norm.weight"].mul_(2))
    report = verify_export(copy, base)
    assert not report.ok and "the frozen tensors are not those that were exported" in str(report)


def test_routers_trained_after_everything_was(made_here, tmp_path):
    """A stage that trains routers starts from one that trained everything: nothing is frozen."""
    base = made_here / "base"
    parameters = {name: tensor * 1.5 for name, tensor in toy_parameters(base).items()}
    full = {"name": "moe_full", "train": TRAIN | {"trainable": "all"}}
    write_run(base, tmp_path / "full", parameters=parameters, recipe=full)
    model = {"base": str(base), "num_experts": 3, "load": str(tmp_path / "full")}
    review = {"name": "review", "model": model, "train": TRAIN | {"trainable": "routers"}}
    write_run(base, tmp_path / "review", parameters=parameters, recipe=review)
    reports = []
    out = export_checkpoint(tmp_path / "review", tmp_path / "out", base_dir=base, on_verified=reports.append)
    assert reports[0].ok and read_record(out).made.trainable == "all"
    assert "Everything was trained." in (out / "README.md").read_text()


def test_other_numbers_are_asked_for(made_here, tmp_path):
    out = upcycle_hf(made_here / "base", tmp_path / "out", Expansion(num_experts=4, num_frozen=2))
    assert read_record(out).made == Made(expansion=Expansion(num_experts=4, num_frozen=2))
    assert verify_export(out, made_here / "base").ok
    assert verify_export(out, made_here / "base", num_frozen=2).ok
    assert "2 experts are frozen in the export's" in str(verify_export(out, made_here / "base", num_frozen=1))


def test_settings_of_the_export_reach_the_record(made_here, tmp_path):
    settings = ExportConfig(dtype="bfloat16")
    out = export_checkpoint(made_here / "run", tmp_path / "out", base_dir=made_here / "base", settings=settings)
    assert read_record(out).dtype == "bfloat16" and read_record(out).frozen_sha256 is None
    assert verify_export(out, made_here / "base").ok


def failed(report):
    return {check.name for check in report.checks if not check.ok}


def test_frozen_tensors_of_a_run_in_another_dtype_are_rounded_to_it(made_here, tmp_path):
    """A base in float32, trained in bfloat16, exported in float32."""
    base = made_here / "base"
    out = upcycle_hf(base, tmp_path / "out", Expansion(num_experts=3))
    (out / "megatron_lpr.json").unlink()
    rewrite(out, lambda tensors: tensors.update({name: t.bfloat16().float() for name, t in tensors.items()}))
    made = {dtype: Made(expansion=Expansion(num_experts=3), dtype=dtype) for dtype in ("bfloat16", "float32", None)}
    for dtype, wrong in (("bfloat16", set()), ("float32", {"frozen tensors"}), (None, {"frozen tensors"})):
        assert failed(verify_export(out, base, checkpoint=made[dtype])) == wrong
    # where it is grafted they are the instruct model's, which nobody has trained
    grafted = verify_export(out, base, checkpoint=made["bfloat16"], grafted_on=base)
    assert failed(grafted) == {"frozen tensors"}


@pytest.mark.parametrize("change", ["one more", "one less"])
def test_a_base_with_other_files_than_the_export_was_made_of(made_here, copy, tmp_path, change):
    base = shutil.copytree(made_here / "base", tmp_path / "base")
    if change == "one more":
        (base / "generation_config.json").write_text("{}")
    else:
        (base / "tokenizer.json").unlink()
    name = "generation_config.json" if change == "one more" else "tokenizer.json"
    assert f"not the model that the export was made with: {name} differ" in str(verify_export(copy, base))
