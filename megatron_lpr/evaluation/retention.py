"""What was learned and what was kept: results of several models on the same text, side by side.

Retention of an original language is 100 * bits_base / bits_model, in percent, over all bytes of its corpora.
Bits per byte are a cost, so the base stands on top: 100 is a language as good as before, below 100 one that
was partly forgotten. It reads like the "share of original kept" of arXiv 2408.11396, whose scores grow with
quality.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron_lpr.errors import UserError
from megatron_lpr.evaluation.perplexity import CorpusScore
from megatron_lpr.evaluation.result_file import read_result
from megatron_lpr.files import durable
from megatron_lpr.files.json_lines import without_controls
from megatron_lpr.files.output_place import check_file


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """All scores of one model; `window` is the context it was given, in tokens.

    How its tokenizer reads text is None where a result is from before that was recorded. tokenizer: SHA-256 of its
    file. bos_id: what documents open with; None too where nothing does. parse_special_tokens: of control tokens that
    are written out in a text. routing: share of routing slots in frozen experts, layer by layer, on each corpus; empty
    of what has no experts, or is no checkpoint of ours.
    """

    model: str
    window: int
    corpora: tuple[CorpusScore, ...]
    tokenizer: str | None = None
    bos_id: int | None = None
    parse_special_tokens: bool | None = None
    routing: dict[str, list[float]] = field(default_factory=dict)

    def __str__(self) -> str:
        scores = ", ".join(f"{score.name} {score.bits_per_byte:.3f}" for score in self.corpora)
        return f"{self.model}: {scores} bits per byte"

    def save(self, path: str | Path) -> None:
        """Write the result as JSON, and its routing, where it has any, to `_routing_file(path)`.

        Raises:
            UserError: as `check_file`.
        """
        check_file(path)
        path, tree = Path(path), asdict(self)
        routing = tree.pop("routing")
        path.parent.mkdir(parents=True, exist_ok=True)
        _routing_file(path).unlink(missing_ok=True)  # of an earlier result: never beside this one, nor for a moment
        durable.write_text(path, json.dumps(tree, indent=2, ensure_ascii=False) + "\n")
        if routing:
            durable.write_text(_routing_file(path), json.dumps(routing))

    @classmethod
    def load(cls, path: str | Path) -> "EvaluationResult":
        """Read a result that `save` wrote.

        Raises:
            UserError: no such file, or another kind of file.
        """
        return dataclasses.replace(read_result(cls, path), routing=_read_routing(Path(path)))


def _routing_file(out: Path) -> Path:
    """Where the routing of a result lies beside it."""
    return out.with_suffix(".routing.json")


def _read_routing(out: Path) -> dict[str, list[float]]:
    """`EvaluationResult.routing` of the result in `out`."""
    file = _routing_file(out)
    found = read_result(dict[str, list[float]], file) if os.path.lexists(file) else {}
    if empty := [name for name, shares in found.items() if not shares]:
        raise UserError(f"evaluation result {file}: has no layers of {empty[0]}; evaluate again")
    return found


def retention(base: EvaluationResult, model: EvaluationResult) -> dict[str, float]:
    """Percent kept of each original language, `100 * bits_base / bits_model`, in the order of the corpora.

    Raises:
        UserError: the two results are not from the same text and window.
    """
    check_comparable([base, model])
    return kept(base.corpora, model.corpora)


def kept(base: Sequence[CorpusScore], model: Sequence[CorpusScore]) -> dict[str, float]:
    """`retention` of scores on the same texts."""
    before, after = bits_per_language(base), bits_per_language(model)
    original = dict.fromkeys(score.language for score in base if score.role == "original")
    return {language: 100 * before[language] / after[language] for language in original}


def bits_per_language(scores: Iterable[CorpusScore]) -> dict[str, float]:
    """Bits per byte of each language over all its corpora, in their order."""
    sums: dict[str, tuple[float, int]] = {}
    for score in scores:
        bits, size = sums.get(score.language, (0.0, 0))
        sums[score.language] = bits + score.bits_per_byte * score.bytes, size + score.bytes
    return {language: bits / size for language, (bits, size) in sums.items()}


def retention_table(results: Sequence[EvaluationResult]) -> str:
    """`retention_rows` as a Markdown table, aligned to be read as plain text too, and what it says below it."""
    return f"{markdown(retention_rows(results), left_columns=3)}\n\n{retention_note(results)}"


def retention_rows(results: Sequence[EvaluationResult]) -> list[list[str]]:
    """A table whose first row is the header.

    The first result is the base. Every corpus has its bits per byte under each model, then, per later model,
    what came of it: for an original language the retention, for an expanded one the change in bits per byte.

    Raises:
        UserError: results that are not from the same text and window.
    """
    check_comparable(results)
    base, *later = results
    header = ["held-out text", "language", "role", *(result.model for result in results)]
    rows = [header + [f"{result.model} vs {base.model}" for result in later]]
    for index, corpus in enumerate(base.corpora):
        bits = [result.corpora[index].bits_per_byte for result in results]
        row = [corpus.name, corpus.language, corpus.role, *(f"{value:.3f}" for value in bits)]
        rows.append(row + [_verdict(corpus.role, bits[0], value) for value in bits[1:]])
    return rows


def retention_note(results: Sequence[EvaluationResult]) -> str:
    """The unit, and what is kept of each original language."""
    base, *later = results
    percentages = [f"{result.model}: {_percentages(retention(base, result))}" for result in later]
    note = "Bits per UTF-8 byte, lower is better."
    if percentages and retention(base, base):
        note += " Original languages kept (base bits / model bits): " + "; ".join(percentages) + "."
    return note


def _verdict(role: str, base: float, model: float) -> str:
    return f"{100 * base / model:.1f}% kept" if role == "original" else f"{model - base:+.3f}"


def _percentages(of_languages: Mapping[str, float]) -> str:
    return ", ".join(f"{language} {percent:.1f}%" for language, percent in of_languages.items())


def check_comparable(results: Sequence[EvaluationResult]) -> None:
    """UserError where results are not from the same text, read alike, and the same window."""
    if not results:
        raise UserError("no evaluation results to compare: run `megatron-lpr evaluate` on each model first")

    def measured(result: EvaluationResult) -> tuple:
        return result.window, [(c.name, c.language, c.role, c.bytes) for c in result.corpora]

    for result in results[1:]:
        if measured(result) != measured(results[0]):
            raise UserError(
                f"results of {results[0].model} and {result.model} are not from the same text and window: "
                "evaluate both with the same evaluation section"
            )
        same_tokenizer = None in (result.tokenizer, results[0].tokenizer) or result.tokenizer == results[0].tokenizer
        if same_tokenizer and result.bos_id != results[0].bos_id:
            raise UserError(
                f"results of {results[0].model} and {result.model} are not from documents that open alike (BOS token "
                f"{results[0].bos_id} and {result.bos_id}): evaluate both with the same preprocess.bos"
            )
        parsed = {results[0].parse_special_tokens, result.parse_special_tokens}
        if same_tokenizer and parsed == {True, False}:
            raise UserError(
                f"results of {results[0].model} and {result.model} are not from text that was read alike (what looks "
                "like a control token is one for one of them, text for the other): evaluate both with the same "
                "preprocess.parse_special_tokens"
            )


def markdown(rows: Sequence[Sequence[str]], left_columns: int) -> str:
    """A table whose first row is the header, aligned to be read as plain text too."""
    rows = [[without_controls(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]

    def line(cells: Sequence[str]) -> str:
        left = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
        right = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        return "| " + " | ".join(left[:left_columns] + right[left_columns:]) + " |"

    rule = ["-" * width for width in widths[:left_columns]]
    rule += ["-" * (width - 1) + ":" for width in widths[left_columns:]]
    return "\n".join(map(line, [rows[0], rule, *rows[1:]]))
