"""The README.md of an exported model: what it is made of and what was done to it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_lpr import __version__
from megatron_lpr.checkpoint.provenance import Provenance, Stage
from megatron_lpr.conversion.record import Made
from megatron_lpr.errors import UserError
from megatron_lpr.families.hf_config import read_config

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CACHE_FOLDER = re.compile(r"models--(.+?)--(.+)")


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What a card says.

    base_experts: that the base had already. made: what was made of it.
    base, instruct: names for people; instruct is the model whose difference to the base was grafted on. base_id,
        instruct_id: theirs on the hub, which the header links to; None: unknown.
    tells_router: whether it is known how the routers started.
    results: table of evaluations, in Markdown. frozen_sha256: of all frozen tensors. command: that wrote it.
    """

    base: str
    base_id: str | None = None
    base_experts: int = 0
    made: Made
    dtype: str
    provenance: Provenance | None = None  # None: upcycled, not trained
    tells_router: bool = True
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
            "tags": ["megatron_lpr", *(["moe"] if self.made.expansion.num_experts else [])],
        }
        if self.provenance:
            languages = [*self.provenance.languages("original"), *self.provenance.languages("expanded")]
            header |= {"language": languages} if languages else {}
        return header

    def _made_of(self) -> Iterator[str]:
        expansion = self.made.expansion
        if not expansion.num_experts:
            trained = self.provenance and self.provenance.stages
            yield f"`{self.base}`, {'post-trained as a dense model' if trained else 'converted without training'}."
        else:
            before = f"The {self.base_experts} experts of every layer"
            grew = before if self.base_experts else "Every feed-forward network"
            yield (
                f"{grew} of `{self.base}` became {expansion.num_experts} experts with top-{expansion.topk} routing "
                f"(MoE-LPR, arXiv 2408.11396). {self._trained()}"
            )
            if self.tells_router:
                yield ""
                yield f"The routers started from N(0, {expansion.router_std:g}) with seed {expansion.router_seed}."
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
        num_frozen = self.made.untouched
        if not num_frozen:
            return "Everything was trained."
        which = "Expert 0 is" if num_frozen == 1 else f"Experts 0 to {num_frozen - 1} are"
        whose = f"those of `{self.base}`" if self.base_experts else "the original"
        new = self.made.expansion.num_experts - num_frozen
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


def check_hub_id(name: str, field: str) -> str:
    """UserError unless `name` can be a hub id."""
    if not _HUB_ID.fullmatch(name):
        raise UserError(f"{field}: '{name}' is no hub id; write it as organisation/name")
    return name


def hub_id(hf_dir: str | Path) -> str | None:
    """`organisation/name`, of the hub's own cache or as config.json says where the model came from; None: unknown."""
    folder = Path(hf_dir).resolve()
    for parent in (folder, *folder.parents):
        if cached := _CACHE_FOLDER.fullmatch(parent.name):
            return f"{cached[1]}/{cached[2]}"
    name = read_config(hf_dir).get("_name_or_path")
    return name if isinstance(name, str) and _HUB_ID.fullmatch(name) and not Path(name).exists() else None


def names_of(hf_dir: str | Path, role: str, given: str | None = None) -> dict[str, str | None]:
    """What the card calls a model: its id on the hub, where that is known, and a name for people."""
    name = check_hub_id(given, "export.base_model") if given else hub_id(hf_dir)
    return {role: name or Path(hf_dir).resolve().name, f"{role}_id": name}
