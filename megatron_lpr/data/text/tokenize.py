"""One face for the two kinds of tokenizer files: Hugging Face's tokenizer.json and SentencePiece's .model."""

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import sentencepiece
import tokenizers

from megatron_lpr.data.text.special_tokens import (
    AS_THE_TOKENIZER_DOES,
    SpecialTokens,
    check_text_stays_text,
    hf_bos,
    hf_eod,
    sentencepiece_bos,
)
from megatron_lpr.data.text.tokenizer_file import tokenizer_file
from megatron_lpr.errors import UserError
from megatron_lpr.files.cores import usable_cores
from megatron_lpr.files.digest import file_sha256
from megatron_lpr.recipe.text_settings import Engine

_REMEMBERED_WORDS = 1 << 18
_CHECK_EVERY = 64
_REMEDY = "use preprocess.engine: tokenizers"
TokenIds = Sequence[int] | np.ndarray


class Tokenizer(Protocol):
    """Text to token ids, on all cores.

    Attributes:
        name: name of the tokenizer's folder or file.
        vocab_size: one more than the largest token id.
        eod_id: the token that ends a document.
        bos_id: the token that opens a document; None: there is none.
        parses_special_tokens: control tokens that are written out in a text become those tokens.
        sha256: of the tokenizer's file, hexadecimal.
    """

    name: str
    vocab_size: int
    eod_id: int
    bos_id: int | None
    parses_special_tokens: bool
    sha256: str

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some tokens, special tokens included."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> Sequence[TokenIds]:
        """Token ids of each text, without the tokens that open and end a document."""
        ...

    def encode_with_ends(self, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """Token ids of each text, and for each token the position in the text after its last character.

        That is the last one that the token stands for, be it only in part: one byte of its UTF-8, one letter of the
        several that Unicode normalisation makes of it.
        """
        ...


def load_tokenizer(
    path: str,
    *,
    threads: int | None = None,
    engine: Engine = "tokenizers",
    special: SpecialTokens = AS_THE_TOKENIZER_DOES,
) -> Tokenizer:
    """Opens a folder with a tokenizer.json or one SentencePiece .model, or such a file itself.

    Args:
        threads: of SentencePiece and fastokens, all cores without it; Hugging Face's library reads
            TOKENIZERS_PARALLELISM.
        engine: what reads a tokenizer.json.
        special: whether a token opens a document, and what control tokens inside a text are.

    Raises:
        UserError: there is none, it cannot be read, it has no end-of-document token, or not the special tokens that
            are asked for.
    """
    file = tokenizer_file(Path(path))
    threads = threads or usable_cores()
    if engine == "fastokens":
        if file.suffix == ".model":
            raise UserError(f"preprocess.engine: fastokens reads a tokenizer.json, not {file}")
        return FastHFTokenizer(file, threads, special)
    if file.suffix == ".model":
        return SentencePieceTokenizer(file, threads, special)
    return HFTokenizer(file, special)


class HFTokenizer:
    """A tokenizer.json; the end-of-document token is the folder's `eos_token`.

    Added tokens that are not marked as special, as runs of spaces are in some vocabularies, are text and stay tokens.
    """

    def __init__(self, file: Path, special: SpecialTokens):
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception for every malformed file
            raise UserError(f"{file} is not a Hugging Face tokenizer: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # The library remembers 10,000 words and then no more; a corpus has many times as many. A fifth faster.
        resize_cache = getattr(self._tokenizer.model, "_resize_cache", None)
        if resize_cache is not None:
            resize_cache(_REMEMBERED_WORDS)
        self.name = file.resolve().parent.name
        self.vocab_size = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        if not self.vocab_size:
            raise UserError(f"{file} has no tokens")
        self.eod_id = hf_eod(self._tokenizer, file.parent)
        self.bos_id = hf_bos(self._tokenizer, file.parent, special.bos)
        self.parses_special_tokens = special.parse
        self.sha256 = file_sha256(file)
        self._tokenizer.encode_special_tokens = not special.parse
        if not special.parse:
            check_text_stays_text(self._tokenizer, file)

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def encode_batch(self, texts: Sequence[str]) -> Sequence[TokenIds]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_with_ends(self, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [(encoding.ids, [end for _, end in encoding.offsets]) for encoding in encodings]


class FastHFTokenizer(HFTokenizer):
    """A tokenizer.json read by fastokens: the same tokens, several times as fast; `encode_batch` returns uint32 arrays.

    It is another implementation, so it is not taken at its word: of every so many batches one is tokenised by both.

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


class SentencePieceTokenizer:
    """A SentencePiece .model; the end-of-document token is its end-of-sentence piece.

    Its control pieces never match text.
    """

    def __init__(self, file: Path, threads: int, special: SpecialTokens):
        if special.parse:
            raise UserError(f"preprocess.parse_special_tokens: true: SentencePiece cannot do it; remove it ({file})")
        self._threads = threads
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.Load(str(file))
        except (OSError, RuntimeError) as error:
            raise UserError(f"{file} is not a SentencePiece model: {error}") from error
        self.name = file.name
        self.vocab_size = self._processor.vocab_size()
        self.eod_id = self._processor.eos_id()
        if self.eod_id < 0:
            raise UserError(f"{file} has no end-of-sentence piece to end documents with")
        self.bos_id = sentencepiece_bos(self._processor, file.parent, special.bos)
        self.parses_special_tokens = False
        self.sha256 = file_sha256(file)

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode(list(ids))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._processor.encode(list(texts), num_threads=self._threads)

    def encode_with_ends(self, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        encodings = (self._processor.encode(text, return_type="offset_mapping") for text in texts)
        return [(encoding["ids"], self._ends(text, encoding)) for text, encoding in zip(texts, encodings, strict=True)]

    def _ends(self, text: str, encoding: dict[str, Any]) -> list[int]:
        """SentencePiece's own ends lie before a character of which a token has a part, unless it has the last one."""
        ids = np.asarray(encoding["ids"], np.int64)
        lengths = self._piece_bytes[ids]
        for index in np.flatnonzero(ids == self._processor.unk_id()):
            lengths[index] = len(encoding["pieces"][index].encode())
        normalized, origins = self._processor.normalize(text, with_offsets=True)
        data = np.frombuffer(normalized.encode(), np.uint8)
        assert lengths.sum() == len(data), "the pieces are the normalised text"
        character_of_byte = np.cumsum((data & 0xC0) != 0x80) - 1
        last = np.asarray(origins)[character_of_byte[np.cumsum(lengths) - 1]]
        ends = np.array([end for _, end in encoding["offsets"]], np.int64)
        return np.maximum(ends, last + 1).tolist()

    @cached_property
    def _piece_bytes(self) -> np.ndarray:
        """Bytes of normalised text that each token stands for, int64 [vocab_size]; a byte-fallback piece is one."""
        processor = self._processor
        return np.array(
            [1 if processor.is_byte(i) else len(processor.id_to_piece(i).encode()) for i in range(self.vocab_size)],
            np.int64,
        )
