"""The README.md of an exported model: what it is made of and what was done to it."""

from collections.abc import Iterator
from dataclasses import dataclass

import yaml

from megatron_lpr import __version__
from megatron_lpr.checkpoint.provenance import Provenance, Stage


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What a card says.

    base_experts: that the base had already. num_experts: 0 for a dense model. num_frozen: experts 0..n-1 that were
        never trained, with everything outside the experts; 0 where everything was trained.
    base, instruct: names for people; instruct is the model whose difference to the base was grafted on. base_id,
        instruct_id: theirs on the hub, which the header links to; None: unknown.
    results: table of evaluations, in Markdown. frozen_sha256: `frozen_digest` of the export. command: that wrote it.
    """

    base: str
    base_id: str | None = None
    base_experts: int = 0
    num_experts: int
    num_frozen: int
    topk: int
    dtype: str
    provenance: Provenance | None = None  # None: upcycled, not trained
    router_seed: int | None = None
    router_std: float | None = None
    instruct: str | None = None
    instruct_id: str | None = None
    results: str | None = None
    frozen_sha256: str | None = None
    command: str | None = None

    def markdown(self) -> str:
        """With the YAML header that model hubs read."""
        header = yaml.safe_dump(self._header(), sort_keys=False, allow_unicode=True).strip()
        what = "grafted" if self.instruct else "expanded"
        lines = ["---", header, "---", "", f"# {self.base}, {what}", "", *self._made_of()]
        if self.provenance:
            lines += self._languages(self.provenance)
            lines += [line for stage in self.provenance.stages for line in _stage(stage)]
        if self.results:
            lines += ["", "## Results", "", self.results]
        return "\n".join([*lines, *self._exported(), ""])

    def _header(self) -> dict[str, object]:
        known = [name for name in (self.base_id, self.instruct_id) if name]
        header: dict[str, object] = {
            **({"base_model": known[0] if len(known) == 1 else known} if known else {}),
            "library_name": "transformers",
            "tags": ["megatron_lpr", *(["moe"] if self.num_experts else [])],
        }
        if self.provenance:
            languages = [*self.provenance.languages("original"), *self.provenance.languages("expanded")]
            header |= {"language": languages} if languages else {}
        return header

    def _made_of(self) -> Iterator[str]:
        if not self.num_experts:
            trained = self.provenance and self.provenance.stages
            yield f"`{self.base}`, {'post-trained as a dense model' if trained else 'converted without training'}."
        else:
            before = f"The {self.base_experts} experts of every layer"
            grew = before if self.base_experts else "Every feed-forward network"
            yield (
                f"{grew} of `{self.base}` became {self.num_experts} experts with top-{self.topk} routing "
                f"(MoE-LPR, arXiv 2408.11396). {self._trained()}"
            )
            if self.router_seed is not None:
                yield ""
                yield f"The routers started from N(0, {self.router_std:g}) with seed {self.router_seed}."
        if self.instruct:
            yield ""
            yield (
                f"What instruction tuning changed in `{self.base}` was added at export (delta grafting, arXiv "
                f"2605.18083): `{self.instruct}` minus `{self.base}`, once to attention, embeddings and norms, and to "
                "every feed-forward network. The router has no such difference."
            )

    def _trained(self) -> str:
        if self.provenance is None or not self.provenance.stages:
            if self.base_experts:
                return "Nothing was trained yet: new experts are copies of expert 0."
            return "The new experts are copies of it and the router is random: the function is the base's."
        if not self.num_frozen:
            return "Everything was trained."
        which = "Expert 0 is" if self.num_frozen == 1 else f"Experts 0 to {self.num_frozen - 1} are"
        whose = f"those of `{self.base}`" if self.base_experts else "the original"
        new = self.num_experts - self.num_frozen
        return (
            f"{which} {whose}, never trained here, nor were attention, embeddings and norms. The {new} new experts and "
            "the router were post-trained."
        )

    def _languages(self, provenance: Provenance) -> Iterator[str]:
        for role, sentence in (("original", "already spoke"), ("expanded", "was expanded to")):
            if languages := provenance.languages(role):
                yield ""
                yield f"Languages it {sentence}: {', '.join(languages)}."

    def _exported(self) -> Iterator[str]:
        yield ""
        yield f"Exported by megatron_lpr {__version__} in {self.dtype}."
        if self.frozen_sha256:
            whose = self.instruct or self.base
            yield ""
            yield f"The frozen tensors equal those of `{whose}`; SHA-256 over all of them: `{self.frozen_sha256}`."
        if self.command:
            yield ""
            yield f"    {self.command}"


def _stage(stage: Stage) -> Iterator[str]:
    yield ""
    yield f"## {stage.name}"
    yield ""
    yield f"Trained `{stage.trainable}` for {stage.steps:,} steps ({stage.samples:,} samples) with {stage.objective}."
    if stage.losses:
        yield f"Losses of the last step: {', '.join(f'{name} {value:.4f}' for name, value in stage.losses.items())}."
    if not stage.corpora:
        return
    yield ""
    yield "| corpus | language | role | tokens | tokens of its language trained on | SHA-256 |"
    yield "|---|---|---|---:|---:|---|"
    for corpus in stage.corpora:
        trained_on = sum(stage.tokens_per_language.get(language, 0) for language in corpus.languages)
        yield (
            f"| {corpus.name} | {', '.join(corpus.languages)} | {corpus.role} | {corpus.tokens:,} | {trained_on:,} | "
            f"`{corpus.digest}` |"
        )
