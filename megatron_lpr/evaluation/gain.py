"""Retention against gain: evaluation results as points of one picture."""

from collections.abc import Mapping, Sequence

import numpy as np

from megatron_lpr.errors import UserError
from megatron_lpr.evaluation.retention import EvaluationResult, check_comparable
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
