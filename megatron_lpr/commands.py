"""What the subcommands do. Everything that a user can get wrong is checked before Megatron is imported."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import yaml

from megatron_lpr.conversion.load.upcycle import check_checkpoint
from megatron_lpr.errors import UserError, warn
from megatron_lpr.families import Architecture, read_architecture
from megatron_lpr.families.hf_config import read_config
from megatron_lpr.families.origins import with_layers_kept_dense
from megatron_lpr.files.safetensors_io import SafetensorsReader
from megatron_lpr.platform import Ranks, megatron, same_on_all_ranks, together
from megatron_lpr.recipe.reading import to_tree
from megatron_lpr.recipe.settings import Recipe


def preprocess(recipe: Recipe, *, dry_run: bool = False, overwrite: bool = False) -> None:
    """Tokenise the recipe's corpora into Megatron .bin/.idx files and a manifest."""
    from megatron_lpr.data.preprocess.preprocess import check
    from megatron_lpr.data.preprocess.preprocess import preprocess as run

    settings = recipe.preprocess
    if not settings.corpora:
        raise UserError("preprocess.corpora: empty; name at least one corpus")
    if settings.workers < 0:
        raise UserError(f"preprocess.workers: {settings.workers}; give a number of processes, or 0 for one per core")
    if settings.max_document_bytes < 0:
        raise UserError(f"preprocess.max_document_bytes: {settings.max_document_bytes}; give bytes, or 0: no limit")
    if settings.output is None:
        raise UserError("preprocess.output: missing; name the folder for the .bin/.idx files and manifest.yaml")
    if settings.tokenizer is None and not recipe.model.base:
        raise UserError("preprocess.tokenizer: missing; name a tokenizer folder, or that of the model as model.base")
    if settings.tokenizer is None and not Path(recipe.model.base).is_dir():
        raise UserError(f"model.base: {recipe.model.base}: no such folder, and preprocess.tokenizer is not set")
    complete = dataclasses.replace(settings, tokenizer=settings.tokenizer or recipe.model.base)
    if dry_run:
        check(complete)
        print(yaml.safe_dump(to_tree(settings), sort_keys=False, allow_unicode=True), end="")
        return
    manifest = run(complete, overwrite=overwrite)
    for corpus in manifest.corpora:
        size = f"{corpus.documents:,} documents, {corpus.tokens:,} tokens"
        size += f", languages {', '.join(corpus.languages)}" if corpus.languages else ""
        print(f"{corpus.name}: {corpus.language} ({corpus.role}), {size}")
    bos = manifest.tokenizer.bos_id
    print(f"manifest: {manifest.path}" + ("" if bos is None else f"; documents open with the BOS token {bos}"))


def inspect_data(recipe: Recipe, *, steps: int | None = None, step: int | None = None, dry_run: bool = False) -> None:
    """Print the data plan of a training recipe, or the documents of one step; writes nothing, dry or not."""
    from megatron_lpr.data.sampler.inspect_data import data_plan, step_documents

    print(data_plan(recipe, steps) if step is None else step_documents(recipe, step))


def verify_data(path: str, *, workers: int = 0, record: bool = False) -> None:
    """Read every file of every corpus of a manifest, and compare it with its digests."""
    from megatron_lpr.data.corpus import verify_data as data
    from megatron_lpr.data.corpus.manifest import Manifest

    if workers < 0:
        raise UserError(f"--workers: {workers}; give a number of files to read at once, or 0 for one per core")
    manifest = Manifest.load(data.find_manifest(path), check_files=False)
    failed = []
    for file, complaint in data.verify_data(manifest, workers=workers or len(os.sched_getaffinity(0)), show=True):
        print(f"{file}: {complaint or 'ok'}", flush=True)
        if complaint:
            failed.append(file)
    if failed:
        raise UserError(f"{manifest.path}: {len(failed)} of its files are not what was written: {', '.join(failed)}")
    unpinned = [corpus.name for corpus in manifest.corpora if corpus.index_digest is None]
    if record and data.record(manifest):
        print(f"{manifest.path}: added the checksums that it lacked")
    elif unpinned:
        print(f"the indexes of {', '.join(unpinned)} fit their tokens; the manifest has no digest of them (--record)")


def upcycle(recipe: Recipe, *, dry_run: bool = False) -> None:
    """Write the upcycled model as a checkpoint (step 0)."""
    if not recipe.model.num_experts:
        raise UserError("model.num_experts: 0; upcycling needs at least 2 experts")
    import_hf(recipe, dry_run=dry_run)


def import_hf(recipe: Recipe, *, dry_run: bool = False) -> None:
    """Write a Hugging Face model, upcycled or as it is, as a checkpoint (step 0), each rank straight from its files."""
    from megatron_lpr.checkpoint.run_folder import run_folder

    recipe = dataclasses.replace(recipe, data=None, train=None)
    arch, base = together(lambda: _check_import(recipe))
    experts = f"{recipe.model.num_experts} experts per layer" if recipe.model.num_experts else "dense"
    if dry_run:
        print(f"would convert {recipe.model.base} into {recipe.output}: {experts}")
        return
    with run_folder(recipe.output, resume=None), megatron() as ranks:
        from megatron_lpr.checkpoint import checkpointing
        from megatron_lpr.checkpoint.run_state import RunState
        from megatron_lpr.conversion.load.weights import fill_weights
        from megatron_lpr.model.builder import build_model, init_model_parallel
        from megatron_lpr.reporting.progress import byte_progress

        init_model_parallel(recipe.parallel)
        chunks = build_model(recipe, arch)
        total = sum(parameter.nbytes for chunk in chunks for parameter in chunk.parameters())
        with byte_progress("convert", total, show=ranks.rank == 0) as bar:
            fill_weights(recipe, arch, chunks, None, progress=bar.update)
        state = RunState(step=0, consumed_samples=0, has_optimizer=False, recipe=to_tree(recipe), base=base)
        folder = checkpointing.save(recipe.output, state, chunks)
        if ranks.rank == 0:
            print(f"converted {recipe.model.base}: {experts}, saved {folder}")


def _check_import(recipe: Recipe) -> tuple[Architecture, dict[str, Any]]:
    """What can be known before the work: UserError, and warnings; the architecture to build, the base's identity."""
    from megatron_lpr.checkpoint.run_state import find_checkpoint
    from megatron_lpr.checkpoint.same_run import base_identity
    from megatron_lpr.families.remarks import base_remarks
    from megatron_lpr.families.sizes import model_bytes
    from megatron_lpr.files.output_place import check_place
    from megatron_lpr.recipe.checks import check_recipe

    model, ranks = recipe.model, Ranks.from_environment()
    arch = with_layers_kept_dense(read_architecture(model.base), model.mlp_only_layers)
    check_recipe(recipe, arch, ranks.world_size)
    check_checkpoint(SafetensorsReader(model.base), arch)
    check_place(recipe.output, model.base, needed=model_bytes(arch, model.num_experts, model.dtype))
    if find_checkpoint(recipe.output):
        raise UserError(f"output: {recipe.output} already holds a checkpoint; choose another folder")
    for sentence in base_remarks(arch, model.base, dtype=model.dtype) if ranks.rank == 0 else ():
        warn(sentence)
    return arch, base_identity(model.base, arch)


def train(recipe: Recipe, *, dry_run: bool = False) -> None:
    """Run a training recipe: post-pretraining, review or a baseline; resumes where an earlier run stopped."""
    from megatron_lpr.checkpoint.run_folder import run_folder
    from megatron_lpr.training.plan import describe, plan_training

    ranks = Ranks.from_environment()
    plan = together(lambda: plan_training(recipe, ranks.world_size))
    same_on_all_ranks("the checkpoint to go on from", str(plan.resume))
    if ranks.rank == 0:
        print(describe(plan), flush=True)
    if dry_run or plan.finished:
        return
    with run_folder(recipe.output, plan.resume), megatron():
        from megatron_lpr.training.train import Trainer

        Trainer(plan).run()


def evaluate(
    recipe: Recipe, *, name: str, out: str, checkpoint: str | None = None, hf: str | None = None, dry_run: bool = False
) -> None:
    """Bits per byte on the held-out corpora, of a checkpoint, a HF model, or (without either) the base model."""
    from megatron_lpr.checkpoint.run_state import checkpoint_folder
    from megatron_lpr.evaluation.evaluate import check, evaluate_model

    _single_process("evaluate")
    if checkpoint and hf:
        raise UserError("evaluate: give --checkpoint or --hf, not both")
    source = str(checkpoint_folder(checkpoint)) if checkpoint else None
    hf = hf or (None if source else recipe.model.base)
    if dry_run:
        check(recipe, out=Path(out), checkpoint=source, hf=hf)
        print(f"would evaluate {source or hf} on {', '.join(c.name for c in recipe.evaluation.corpora)} into {out}")
        return
    evaluate_model(recipe, name=name, out=Path(out), checkpoint=source, hf=hf)


def compare(files: list[str]) -> None:
    """Print the table of several evaluation results, the base model's first."""
    from megatron_lpr.evaluation.retention import EvaluationResult, retention_table

    print(retention_table([EvaluationResult.load(file) for file in files]))


def export(
    recipe: Recipe,
    *,
    checkpoint: str,
    out: str,
    graft_delta: list[str] | None = None,
    verify: bool = True,
    dry_run: bool = False,
    command_line: str | None = None,
) -> None:
    """Write a checkpoint as a stock Hugging Face model that has been checked against the base model."""
    from megatron_lpr.checkpoint.run_state import checkpoint_folder
    from megatron_lpr.conversion.export.export import export_checkpoint

    _single_process("export")
    source = checkpoint_folder(checkpoint)
    export_checkpoint(
        source,
        out,
        base_dir=recipe.model.base,
        settings=recipe.export,
        graft_delta=graft_delta,
        on_verified=print if verify else None,
        command=command_line,
        progress=True,
        dry_run=dry_run,
    )
    print(f"{'would export' if dry_run else 'exported'} {source} to {out}" + ("" if verify else "; not verified"))


def verify(
    recipe: Recipe,
    *,
    export_dir: str,
    checkpoint: str | None = None,
    graft_delta: list[str] | None = None,
    logits: bool = True,
    dry_run: bool = False,
) -> None:
    """Check an export: its files, names and frozen tensors against the base; tensors and logits against a checkpoint.

    What is frozen and how tokens are routed is the checkpoint's record or the export's, not what `recipe` says.
    """
    from megatron_lpr.checkpoint.run_state import checkpoint_folder
    from megatron_lpr.conversion.record import Made, made_of
    from megatron_lpr.conversion.verify.against_checkpoint import compare_with_checkpoint
    from megatron_lpr.conversion.verify.verify import verify_export

    base = recipe.model.base
    source = checkpoint_folder(checkpoint) if checkpoint else None
    with_logits = source is not None and logits and not graft_delta
    if with_logits:
        _single_process("verify --checkpoint")
        if not recipe.evaluation.corpora:
            raise UserError("evaluation.corpora: empty; comparing logits needs some held-out text, or --no-logits")
    if dry_run:
        read_config(export_dir), read_architecture(base)
        print(f"would verify {export_dir} against {base}" + (f" and {source}" if source else ""))
        return
    made = made_of(source) if source else None
    report = verify_export(
        export_dir,
        graft_delta[1] if graft_delta else base,
        checkpoint=made,
        recipe=Made.of_recipe(recipe),
        grafted_on=graft_delta[0] if graft_delta else None,
        progress=True,
    )
    print(report, flush=True)
    checks = [*report.checks]
    if source:
        checks.append(compare_with_checkpoint(source, made, export_dir, base, graft_delta=graft_delta))
        print(checks[-1], flush=True)
    if with_logits:
        with megatron():
            from megatron_lpr.conversion.verify.against_logits import compare_logits

            checks.append(compare_logits(recipe, str(source), export_dir))
        print(checks[-1])
    elif source:
        why = "no Megatron model has the delta that was grafted on" if graft_delta else "--no-logits"
        print(f"      logits         not compared: {why}")
    if not all(check.ok for check in checks):
        raise UserError(f"verify {export_dir}: failed (see above)")


def _single_process(command: str) -> None:
    world_size = Ranks.from_environment().world_size
    if world_size > 1:
        raise UserError(f"{command} runs in one process, not in {world_size}; it reads checkpoints of any layout")
