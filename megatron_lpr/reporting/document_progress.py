"""The progress line of preprocessing, on stderr."""

import sys
import time


class Progress:
    """Shows share done, documents, tokens, tokens per second and time left.

    What an earlier run did counts in the share, not in the rate or the time left. A terminal's line is rewritten every
    second; a log file gets a line every ten.
    """

    def __init__(self, name: str):
        self._name = name
        self._start = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._next = self._start + (1 if self._terminal else 10)
        self._line = ""
        self._kept = (0.0, 0)

    def keep(self, done: float, tokens: int) -> None:
        """Takes the share done and the tokens so far; all of them were there before."""
        self._kept = (done, tokens)

    def update(self, done: float, documents: int, tokens: int) -> None:
        """Takes the share done, in [0, 1], and the counts so far."""
        now = time.monotonic()
        seconds = max(now - self._start, 1e-9)
        kept, kept_tokens = self._kept
        left = 0.0 if done >= 1 else seconds * (1 - done) / (done - kept) if done > kept else float("inf")
        self._line = (
            f"{self._name}: {done:4.0%} | {documents:,} documents | {tokens:,} tokens | "
            f"{(tokens - kept_tokens) / seconds:,.0f} tokens/s | {_duration(left)} left"
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


def _duration(seconds: float) -> str:
    if seconds == float("inf"):
        return "? s"
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    return f"{hours} h {minutes % 60:02} min" if hours else f"{minutes} min" if minutes >= 2 else f"{seconds:.0f} s"
