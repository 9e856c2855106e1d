"""A tokenizer.json read by fastokens: the same tokens as Hugging Face's library, several times as fast.

It is another implementation, so it is not taken at its word: of every so many batches one is tokenised by both.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_lpr.data.text.special_tokens import SpecialTokens
from megatron_lpr.data.text.tokenize import HFTokenizer
from megatron_lpr.errors import UserError

_CHECK_EVERY = 64
_REMEDY = "use preprocess.engine: tokenizers"


class FastHFTokenizer(HFTokenizer):
    """Hugging Face's tokenizer for everything but `encode_batch`, whose ids are uint32 arrays.

    Args:
        threads: of `encode_batch`; the first tokenizer of a process decides.

    Raises:
        UserError: fastokens is missing or cannot read the tokenizer, or, while encoding, cannot encode a text or
            differs from Hugging Face's library.
    """

    def __init__(self, file: Path, threads: int, special: SpecialTokens):
        super().__init__(file, special)
        os.environ["RAYON_NUM_THREADS"] = str(threads)
        try:
            import fastokens
        except ImportError:
            raise UserError(
                f"preprocess.engine: fastokens is not installed; pip install 'megatron-lpr[fast]', or {_REMEDY}"
            ) from None
        try:
            self._fast = fastokens.Tokenizer.from_file(str(file))
        except Exception as error:
            raise UserError(f"fastokens cannot read {file} ({error}); {_REMEDY}") from error
        self._fast.no_truncation()
        self._fast.no_padding()
        self._batches = 0

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        try:
            data, bounds = self._fast.encode_batch_flat(
                list(texts), add_special_tokens=False, split_special_tokens=not self.parses_special_tokens
            )
        except ValueError as error:
            raise UserError(f"fastokens cannot tokenise this text ({error}); {_REMEDY}") from error
        ids = np.split(np.frombuffer(data, "<u4"), np.frombuffer(bounds, "<u8")[1:-1].astype(np.int64))
        if self._batches % _CHECK_EVERY == 0:
            for text, fast, reference in zip(texts, ids, super().encode_batch(texts), strict=True):
                if not np.array_equal(fast, reference):
                    raise UserError(f"fastokens and Hugging Face's tokenizer differ on {text[:60]!r}; {_REMEDY}")
        self._batches += 1
        return ids
