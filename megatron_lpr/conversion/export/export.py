"""Export: a stream of whole tensors becomes a stock Hugging Face checkpoint, or no folder at all.

Three sources share one writer: a Megatron distributed checkpoint (`export_checkpoint`), a HF checkpoint upcycled
offline (`upcycle_hf`), and parameters in memory (`export_model`). None of them needs a Megatron model or a GPU.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_lpr.checkpoint.provenance import read_provenance
from megatron_lpr.checkpoint.run_state import checkpoint_folder, read_run_state
from megatron_lpr.checkpoint.verification import refuse_damaged
from megatron_lpr.conversion.export.graft import grafted
from megatron_lpr.conversion.export.model_card import ModelCard, names_of
from megatron_lpr.conversion.export.sources import HFTensors, UpcycledSource, to_hf, trained_model
from megatron_lpr.conversion.record import ExportRecord, Made, digests, made_of, recipe_of
from megatron_lpr.conversion.verify.report import VerifyReport
from megatron_lpr.conversion.verify.verify import verify_export
from megatron_lpr.errors import UserError, warn
from megatron_lpr.families import Architecture, family_of, read_architecture
from megatron_lpr.families.expansion import (
    Expansion,
    check_upcycling,
    with_layers_kept_dense,
    with_shared_expert,
    zero_tensors,
)
from megatron_lpr.families.export_config import check_carried_over, export_config
from megatron_lpr.families.hf_config import read_config
from megatron_lpr.families.remarks import model_bytes, remarks
from megatron_lpr.files.new_folder import complete_folder, copy_companions
from megatron_lpr.files.output_place import check_place, check_vacant
from megatron_lpr.files.safetensors_io import ShardedWriter, torch_dtype
from megatron_lpr.recipe.fields import parse_size
from megatron_lpr.recipe.settings import ExportConfig
from megatron_lpr.reporting.progress import byte_progress

OnVerified = Callable[[VerifyReport], object]


def export_model(
    tensors: Iterable[tuple[str, torch.Tensor]],
    arch: Architecture,
    expansion: Expansion,
    *,
    base_dir: str | Path,
    out_dir: str | Path,
    settings: ExportConfig | None = None,
) -> Path:
    """Writes parameters in memory as the family's stock MoE class or, without experts, as its dense class again.

    tensors: (global Megatron name, whole tensor), each once, in any order. Layers are numbered globally;
        `...mlp.experts.local_experts.I...` counts I over all new experts, so it becomes expert `num_frozen +
        I`. The head of a model with tied embeddings is left out.
    base_dir: the dense model that training started from; its tokenizer and generation files are copied byte
    for byte. settings: with `auto` the dtype is that of the base model. Returns `out_dir`. UserError when it exists and
    is not empty, when the disk is full or when a tensor never came; then nothing is left behind.
    """
    settings = settings or ExportConfig()
    check_upcycling(arch, expansion)

    def stream() -> HFTensors:
        yield from to_hf(tensors, arch, num_frozen=expansion.num_frozen)
        yield from zero_tensors(arch, expansion.num_experts)

    made = _untrained(arch, expansion)
    card = ModelCard(**_told(base_dir, arch, made, settings), tells_router=False)
    return _Export(
        arch=arch,
        hf_dir=Path(base_dir),
        out_dir=Path(out_dir),
        made=made,
        card=card,
        shard_size=settings.max_shard_size,
    ).run(stream())


def upcycle_hf(
    base_dir: str | Path,
    out_dir: str | Path,
    expansion: Expansion,
    *,
    settings: ExportConfig | None = None,
    on_verified: OnVerified | None = None,
    command: str | None = None,
    progress: bool = False,
    dry_run: bool = False,
) -> Path:
    """Upcycles a HF checkpoint into the family's stock MoE class, tensor by tensor, without Megatron.

    The result computes what a dense model computes (for one that has experts already see expansion.py) and equals
    what `load_dense` followed by `export_model` writes. settings: with `auto` the dtype is the base's. on_verified:
    verify the folder before it appears, and hand over the report. dry_run: check everything that can be checked first,
    write nothing. UserError as `export_model`.
    """
    settings = settings or ExportConfig()
    arch = with_layers_kept_dense(read_architecture(base_dir), expansion.mlp_only_layers)
    arch = with_shared_expert(arch, settings.shared_expert_size)
    check_upcycling(arch, expansion)
    made = _untrained(arch, expansion)
    planned = _Export(
        arch=arch,
        hf_dir=Path(base_dir),
        out_dir=Path(out_dir),
        made=made,
        shard_size=settings.max_shard_size,
        card=ModelCard(**_told(base_dir, arch, made, settings), command=command),
        on_verified=on_verified,
        progress=progress,
    )
    source = UpcycledSource(base_dir, arch, expansion)
    return planned.run(source.stream(source.units), "upcycle", dry_run=dry_run)


def export_checkpoint(
    checkpoint: str | Path,
    out_dir: str | Path,
    *,
    base_dir: str | Path,
    load: str | None = None,
    settings: ExportConfig | None = None,
    checksums: bool = True,
    graft_delta: Sequence[str | Path] | None = None,
    on_verified: OnVerified | None = None,
    command: str | None = None,
    progress: bool = False,
    dry_run: bool = False,
) -> Path:
    """Writes a distributed checkpoint, or the newest of a run, as a stock HF model; needs no Megatron and no GPU.

    base_dir: the HF model that training started from. load: where the checkpoint of its model.load may be now, where
    `checkpoint` leaves something to it. graft_delta: (BASE, INSTRUCT), see graft.py; the export then has INSTRUCT's
    config, tokenizer and frozen tensors. settings: with `auto` the dtype is the one that was trained.
    checksums: compare the checkpoint's files with theirs first, and not only with their sizes.
    on_verified, dry_run: as of `upcycle_hf`. UserError as `export_model`, and when checkpoint and base do not belong
    together.
    """
    folder = checkpoint_folder(str(checkpoint))
    refuse_damaged(folder, contents=checksums, load=load)
    state, made = read_run_state(folder), made_of(folder)
    settings = settings or ExportConfig()
    if settings.dtype == "auto":
        settings = replace(settings, dtype=recipe_of(folder).model.dtype)
    model = trained_model(folder, made, base_dir=base_dir, shared_expert_size=settings.shared_expert_size, load=load)
    if graft_delta:
        model = grafted(model, made, graft_delta, base_dir=base_dir, dtype=settings.dtype)
    told = _told(base_dir, model.arch, made, settings) | (names_of(model.hf_dir, "instruct") if graft_delta else {})
    planned = _Export(
        arch=model.arch,
        hf_dir=model.hf_dir,
        out_dir=Path(out_dir),
        made=made,
        shard_size=settings.max_shard_size,
        card=ModelCard(**told, provenance=read_provenance(folder), command=command),
        on_verified=on_verified,
        progress=progress,
        reads=(folder, *(graft_delta or ())),
        step=state.step,
        grafted_on=Path(graft_delta[0]) if graft_delta else None,
    )
    return planned.run(model.source.stream(model.source.units), dry_run=dry_run)


@dataclass(frozen=True, kw_only=True)
class _Export:
    """What is written beside the tensors, and what the folder must be.

    hf_dir: the HF model whose config, tokenizer and frozen tensors the export has: the base, or the instruct model.
    reads: the other folders that are read.
    made: what was made of the base. step: of the checkpoint.
    grafted_on: the base of a grafted delta; `hf_dir` is its instruct model then.
    on_verified: the folder is verified before it appears, and this is given the report.
    """

    arch: Architecture
    hf_dir: Path
    out_dir: Path
    made: Made
    shard_size: str
    card: ModelCard
    on_verified: OnVerified | None = None
    reads: tuple[str | Path, ...] = ()
    step: int | None = None
    grafted_on: Path | None = None
    progress: bool = False

    def run(self, tensors: HFTensors, what: str = "export", *, dry_run: bool = False) -> Path:
        """Checks what can be known before the work, warns, and writes, unless it is a dry run. UserError."""
        experts, dtype = self.made.expansion.num_experts, self.card.dtype
        max_shard_bytes = parse_size(self.shard_size, "export.max_shard_size")
        check_carried_over(read_config(self.hf_dir), self.arch, self.hf_dir)
        check_place(self.out_dir, self.hf_dir, *self.reads, needed=model_bytes(self.arch, experts, dtype))
        check_vacant(self.out_dir)
        for sentence in remarks(self.arch, self.hf_dir, dtype=dtype, num_experts=experts):
            warn(sentence)
        if not dry_run:
            with complete_folder(self.out_dir) as folder:
                self._write_tensors(folder, tensors, what, max_shard_bytes)
                self._write_the_rest(folder)
        return self.out_dir

    def _write_tensors(self, folder: Path, tensors: HFTensors, what: str, max_shard_bytes: int) -> None:
        shapes = family_of(self.arch).shapes(self.arch, self.made.expansion.num_experts)
        writer = ShardedWriter(folder, shapes, dtype=torch_dtype(self.card.dtype), max_shard_bytes=max_shard_bytes)
        with byte_progress(what, sum(writer.sizes.values()), show=self.progress) as bar:
            for name, tensor in tensors:
                writer.write(name, tensor)
                bar.update(writer.sizes[name])
        writer.close()

    def _write_the_rest(self, folder: Path) -> None:
        """Config, companions, record and card; the last two say what verification found."""
        expansion, dtype = self.made.expansion, self.card.dtype
        base_config = read_config(self.hf_dir)
        config = export_config(
            self.arch, base_config, num_experts=expansion.num_experts, topk=expansion.topk, dtype=dtype
        )
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        copy_companions(self.hf_dir, folder)
        record = ExportRecord(
            made=self.made,
            dtype=dtype,
            step=self.step,
            base=digests(self.grafted_on or self.hf_dir),
            instruct=digests(self.hf_dir) if self.grafted_on else None,
        )
        record.write(folder)
        report = self._verify(folder, self.on_verified) if self.on_verified else None
        if report and report.frozen_sha256:
            replace(record, frozen_sha256=report.frozen_sha256).write(folder)
        card = replace(self.card, frozen_sha256=report.frozen_sha256 if report else None)
        (folder / "README.md").write_text(card.markdown(), encoding="utf-8")

    def _verify(self, folder: Path, on_verified: OnVerified) -> VerifyReport:
        report = verify_export(
            folder, self.hf_dir, checkpoint=self.made, grafted_on=self.grafted_on, progress=self.progress
        )
        on_verified(report)
        if not report.ok:
            wrong = "; ".join(f"{check.name}: {check.detail}" for check in report.checks if not check.ok)
            raise UserError(f"'{self.out_dir}' was not written, for it fails its own verification: {wrong}")
        return report


def _told(base_dir: str | Path, arch: Architecture, made: Made, settings: ExportConfig) -> dict[str, Any]:
    """What every card says."""
    return {
        **names_of(base_dir, "base", settings.base_model),
        "base_experts": arch.num_experts,
        "made": made,
        "dtype": arch.dtype if settings.dtype == "auto" else settings.dtype,
        "results": _results(settings.results),
    }


def _untrained(arch: Architecture, expansion: Expansion) -> Made:
    """What was made of the base; one that has experts already keeps its layers without."""
    return Made(expansion=replace(expansion, mlp_only_layers=arch.mlp_only_layers if expansion.num_experts else ()))


def _results(files: Sequence[str]) -> str | None:
    """The table of evaluation results for the card. UserError as `retention_table`."""
    if not files:
        return None
    from megatron_lpr.evaluation.retention import EvaluationResult, retention_table

    return retention_table([EvaluationResult.load(file) for file in files])
