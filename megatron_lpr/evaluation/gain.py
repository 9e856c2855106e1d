"""Retention against gain: evaluation results as points of one picture, and as a table with the same numbers."""

from collections.abc import Mapping, Sequence

import numpy as np

from megatron_lpr.errors import UserError
from megatron_lpr.evaluation.retention import EvaluationResult, check_comparable, markdown
from megatron_lpr.reporting.gain_plot import Arm


def arms(results: Sequence[EvaluationResult], *, replayed: Sequence[str] = (), curve: str | None = None) -> list[Arm]:
    """Each result as an arm, the base first, which has gained nothing and kept everything.

    Gain is 100 * (1 - bits_model / bits_base), the mean over the texts in expanded languages; retention of a text in
    an original language 100 * bits_base / bits_model.

    Args:
        results: of several models on the same text, the base's first.
        replayed: original languages that review read: a series of their own, beside those that were never replayed.
        curve: joins all arms but the base by a line.

    Raises:
        UserError: results that are not from the same text and window, no text in an expanded or in an original
            language, or a replayed language that is no original one.
    """
    check_comparable(results)
    base = results[0]
    for role in ("original", "expanded"):
        if all(score.role != role for score in base.corpora):
            raise UserError(
                f"the results of {base.model} have no text in an {role} language: gain and retention need both"
            )
    known = list(dict.fromkeys(score.language for score in base.corpora if score.role == "original"))
    for language in replayed:
        if language not in known:
            raise UserError(
                f"--replayed {language}: the results have no original text in it; they have {', '.join(known)}"
            )
    series = _series(known, replayed)
    return [_arm(base, result, series, curve if result is not base else None) for result in results]


def gain_table(results: Sequence[EvaluationResult], *, replayed: Sequence[str] = ()) -> str:
    """A Markdown table of a column per model, the base's first: bits per byte of each text, and in brackets what became
    of it; below, the means that are the points of the picture.

    Raises:
        UserError: as `arms`.
    """
    columns, base = arms(results, replayed=replayed), results[0]
    rows = [["held-out text", "role", *(arm.name for arm in columns)]]
    for place, before in enumerate(base.corpora):
        role = before.role
        if role == "original" and replayed:
            role = "replayed" if before.language in replayed else "never replayed"
        bits = [result.corpora[place].bits_per_byte for result in results]
        cells = [f"{after:.3f} ({_change(before.role, bits[0], after)})" for after in bits[1:]]
        rows.append([before.name, role, f"{bits[0]:.3f}", *cells])
    rows.append(["**mean gain**", "expanded", "", *(f"**{arm.gain:.1f}%**" for arm in columns[1:])])
    for series in columns[0].kept:
        means = [f"**{arm.mean(series):.1f}%**" for arm in columns[1:]]
        rows.append(["**mean kept**", series, "", *means])
    told = "in brackets the change in an expanded language, what is kept of an original one (base bits / model bits)"
    return f"{markdown(rows, left_columns=2)}\n\nBits per UTF-8 byte, lower is better; {told}."


def _change(role: str, before: float, after: float) -> str:
    return f"{100 * before / after:.1f}%" if role == "original" else f"{100 * (after / before - 1):+.1f}%"


def _series(known: Sequence[str], replayed: Sequence[str]) -> Mapping[str, str]:
    """The series that each original language is in."""
    if not replayed:
        return dict.fromkeys(known, f"original languages ({', '.join(known)})")
    never = [language for language in known if language not in replayed]
    names = dict.fromkeys(replayed, f"replayed ({', '.join(replayed)})")
    return names | dict.fromkeys(never, f"never replayed ({', '.join(never)})")


def _arm(base: EvaluationResult, result: EvaluationResult, series: Mapping[str, str], curve: str | None) -> Arm:
    gains: list[float] = []
    kept: dict[str, dict[str, float]] = {name: {} for name in series.values()}
    for before, after in zip(base.corpora, result.corpora, strict=True):
        if before.role == "original":
            kept[series[before.language]][before.name] = 100 * before.bits_per_byte / after.bits_per_byte
        else:
            gains.append(100 * (1 - after.bits_per_byte / before.bits_per_byte))
    return Arm(name=result.model, gain=float(np.mean(gains)), kept=kept, curve=curve)
