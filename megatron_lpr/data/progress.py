"""The progress line of preprocessing, on stderr."""

import sys
import time


class Progress:
    """Shows share done, documents, tokens, documents per second and time left.

    A terminal's line is rewritten every second; a log file gets a line every ten.
    """

    def __init__(self, name: str):
        self._name = name
        self._start = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._next = self._start + (1 if self._terminal else 10)
        self._line = ""

    def update(self, done: float, documents: int, tokens: int) -> None:
        """Takes the share done, in [0, 1], and the counts so far."""
        now = time.monotonic()
        seconds = max(now - self._start, 1e-9)
        left = seconds / done - seconds if done > 0 else float("inf")
        self._line = (
            f"{self._name}: {done:4.0%} | {documents:,} documents | {tokens:,} tokens | "
            f"{documents / seconds:,.0f} docs/s | {left:,.0f} s left"
        )
        if now >= self._next:
            self._show()
            self._next = now + (1 if self._terminal else 10)

    def close(self) -> None:
        """Shows the last state."""
        if self._line:
            self._show()
            if self._terminal:
                sys.stderr.write("\n")

    def _show(self) -> None:
        sys.stderr.write(f"\r{self._line}\x1b[K" if self._terminal else f"{self._line}\n")
        sys.stderr.flush()
