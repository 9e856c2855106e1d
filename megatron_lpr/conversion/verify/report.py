"""What verification found: one line per check."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from megatron_lpr.errors import UserError

_NAMED_IN_REPORT = 5


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at: its name, whether it holds, and what was found."""

    name: str
    ok: bool
    detail: str

    def __str__(self) -> str:
        return f"{'ok  ' if self.ok else 'FAIL'}  {self.name:14} {self.detail}"


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """All checks of one export. `str(report)` is one line per check; `ok` is the exit status.

    frozen_sha256: of all frozen tensors as they are in the export (`digest_of_digests`); empty where none is frozen.
    """

    checks: tuple[Check, ...]
    frozen_sha256: str = ""

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    def __str__(self) -> str:
        return "\n".join(map(str, self.checks))


def check(name: str, look: Callable[[], list[str]], fine: str) -> Check:
    """What `look` finds wrong, or `fine`. What it cannot even read, a UserError, is wrong too."""
    try:
        problems = look()
    except UserError as error:
        problems = [str(error)]
    return Check(name=name, ok=not problems, detail="; ".join(problems) or fine)


def listed(names: Iterable[str]) -> str:
    """The first few, and how many more."""
    names = list(names)
    more = f" and {len(names) - _NAMED_IN_REPORT} more" if len(names) > _NAMED_IN_REPORT else ""
    return ", ".join(names[:_NAMED_IN_REPORT]) + more
