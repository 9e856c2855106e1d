"""What benchmarks/method.py found, as Markdown and JSON: gain in the new languages, and what was kept of the others."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from method_arms import BASE, REPLAYED, VALIDATION, Arm, Settings

from megatron_lpr.evaluation.gain import arms as points
from megatron_lpr.evaluation.perplexity import CorpusScore
from megatron_lpr.evaluation.retention import EvaluationResult
from megatron_lpr.reporting.gain_plot import plot_retention_against_gain

TRAINED_DOMAIN = "lohelp."
KINDS = (
    "new languages, trained domain",
    "new languages, another domain",
    "replayed languages, replayed domain",
    "replayed languages, another domain",
    "never replayed, trained domain",
    "never replayed, another domain",
)


def kind_of(corpus: CorpusScore) -> str:
    at_home = corpus.name.startswith(TRAINED_DOMAIN)
    if corpus.role == "expanded":
        return KINDS[0] if at_home else KINDS[1]
    if corpus.language in REPLAYED:
        return KINDS[2] if at_home else KINDS[3]
    return KINDS[4] if at_home else KINDS[5]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """What is known of an arm: scores of its corpora, and what training it cost."""

    arm: Arm
    result: EvaluationResult
    cost: Mapping[str, float]

    def bits(self, *, validation: bool) -> dict[str, CorpusScore]:
        """By the corpus' name, of validation text or of the table's."""
        found = {
            corpus.name: corpus for corpus in self.result.corpora if corpus.name.endswith(VALIDATION) == validation
        }
        return {name.removesuffix(VALIDATION): corpus for name, corpus in found.items()}

    def summary(self, base: "Found", *, validation: bool) -> dict[str, float]:
        """In percent, per kind of text: bits less than the base has of new languages, base by model of the others."""
        before, after = base.bits(validation=validation), self.bits(validation=validation)
        shares: dict[str, list[float]] = {}
        for name, corpus in after.items():
            ratio = before[name].bits_per_byte / corpus.bits_per_byte
            share = 1 - 1 / ratio if corpus.role == "expanded" else ratio
            shares.setdefault(kind_of(corpus), []).append(100 * share)
        return {kind: mean(shares[kind]) for kind in KINDS if kind in shares}


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def summary_table(found: Sequence[Found], base: Found, *, validation: bool) -> str:
    kinds = list(base.summary(base, validation=validation))
    heads = ["arm", *(("gain, " if kind in KINDS[:2] else "kept, ") + kind for kind in kinds)]
    rows = []
    for one in found:
        summary = one.summary(base, validation=validation)
        rows.append([one.arm.name, *(f"{summary[kind]:.1f}%" for kind in kinds)])
    return table(heads, rows)


def corpus_table(found: Sequence[Found], base: Found) -> str:
    """Bits per byte of every corpus; of a language that the base knows, also how much of it was kept."""
    rows, before = [], base.bits(validation=False)
    for name, corpus in sorted(before.items(), key=lambda item: (KINDS.index(kind_of(item[1])), item[0])):
        cells = []
        for one in found:
            bits = one.bits(validation=False)[name].bits_per_byte
            kept = "" if corpus.role == "expanded" or one is base else f" ({100 * corpus.bits_per_byte / bits:.1f}%)"
            cells.append(f"{bits:.3f}{kept}")
        rows.append([f"{name}, {kind_of(corpus)}", *cells])
    return table(["held-out text", *(one.arm.name for one in found)], rows)


def cost_table(found: Sequence[Found]) -> str:
    shown: dict[str, Callable[[Mapping[str, float]], str]] = {
        "tokens": lambda cost: f"{cost['tokens']:,.0f}",
        "TFLOP": lambda cost: f"{cost['flops'] / 1e12:,.0f}",
        "seconds": lambda cost: f"{cost['seconds']:,.0f}",
        "peak memory, GB": lambda cost: f"{cost['peak_bytes'] / 1e9:.1f}",
        "parameters that learn": lambda cost: f"{cost['trained_parameters']:,.0f}",
        "trained state, MB": lambda cost: f"{cost['trained_bytes'] / 1e6:,.1f}",
    }
    rows = [[one.arm.name, *(show(one.cost) for show in shown.values())] for one in found if one.cost]
    return table(["arm", *shown], rows)


def pictures(found: Mapping[str, Found], out: Path) -> None:
    """Retention against gain on the text of the tables: the comparison, and what its settings reach."""
    main = [name for name, one in found.items() if one.arm.group == "main" and " seed " not in name and name != BASE]
    curves = {
        "dense, lr": _family(found, "dense", "dense lr"),
        "LoRA, lr": _family(found, "LoRA", "LoRA lr"),
        "stage 1, lr": _family(found, "stage 1", "stage 1 lr"),
        "review, gamma": _family(found, "review", "review gamma"),
        "review, lr": _family(found, "", "review router_lr"),
    }
    base = _on_table_text(found[BASE], BASE)
    replayed = [language for language in REPLAYED if any(corpus.language == language for corpus in base.corpora)]
    drawn = {"comparison": points([base, *(_on_table_text(found[name], name) for name in main)], replayed=replayed)[1:]}
    drawn["settings"] = [
        arm
        for curve, names in curves.items()
        for arm in points(
            [base, *(_on_table_text(found[name], name) for name in names)], replayed=replayed, curve=curve
        )
        if arm.curve
    ]
    for picture, shown in drawn.items():
        if shown:
            plot_retention_against_gain(shown, out / f"{picture}.png")


def _family(found: Mapping[str, Found], first: str, others: str) -> list[str]:
    """An arm and those that vary one of its settings, from the least gain to the most."""
    names = [name for name in found if name == first or name.startswith(others)]
    return sorted(names, key=lambda name: found[name].summary(found[BASE], validation=False)[KINDS[0]])


def _on_table_text(one: Found, name: str) -> EvaluationResult:
    corpora = tuple(one.bits(validation=False).values())
    return dataclasses.replace(one.result, model=name, corpora=corpora, routing={})


def tables(arms: Mapping[str, Arm], settings: Settings, out: Path) -> str:
    """Of the arms that are finished; writes results.json and tables.md into `out` too."""
    found = {}
    for name, arm in arms.items():
        folder = out / arm.folder
        if (folder / "result.json").exists():
            file = folder / "cost.json"  # an arm that was stopped when it had just trained has none
            cost = json.loads(file.read_text()) if file.exists() else {}
            found[name] = Found(arm=arm, result=EvaluationResult.load(folder / "result.json"), cost=cost)
    if BASE not in found:
        return "no results: the base was not scored"
    base, every = found[BASE], list(found.values())
    comparison = [one for one in every if one.arm.group == "main"]
    parts = ["## On the text of the tables", summary_table(every, base, validation=False)]
    if base.bits(validation=True):
        parts += ["## On validation text", summary_table(every, base, validation=True)]
    parts += ["## Bits per byte", corpus_table(comparison, base), "## Cost", cost_table(every)]
    pictures(found, out)
    text = "\n\n".join(parts)
    (out / "tables.md").write_text(text + "\n", encoding="utf-8")
    tree = {
        "environment": json.loads((out / arms[BASE].folder / "environment.json").read_text()),
        "settings": dataclasses.asdict(settings),
        "arms": {name: _tree(one, base) for name, one in found.items()},
    }
    (out / "results.json").write_text(json.dumps(tree, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return text


def _tree(one: Found, base: Found) -> dict[str, Any]:
    return {
        "group": one.arm.group,
        "cost": one.cost,
        "summary": one.summary(base, validation=False),
        "bits_per_byte": {corpus.name: corpus.bits_per_byte for corpus in one.result.corpora},
        "frozen_share": {name: mean(shares) for name, shares in one.result.routing.items()},
    }
