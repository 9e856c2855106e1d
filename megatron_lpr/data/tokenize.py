"""One face for the two kinds of tokenizer files: Hugging Face's tokenizer.json and SentencePiece's .model."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import sentencepiece
import tokenizers

from megatron_lpr.errors import UserError

_REMEMBERED_WORDS = 1 << 18
Engine = Literal["tokenizers", "fastokens"]


class Tokenizer(Protocol):
    """Text to token ids, on all cores.

    Attributes:
        name: name of the tokenizer's folder or file.
        vocab_size: one more than the largest token id.
        eod_id: the token that ends a document.
        sha256: of the tokenizer's file, hexadecimal.
    """

    name: str
    vocab_size: int
    eod_id: int
    sha256: str

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some tokens, special tokens included."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> Sequence[Sequence[int]]:
        """Token ids of each text, without special tokens."""
        ...

    def encode_with_ends(self, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """Token ids of each text, and for each token the position in the text after its last character."""
        ...


def load_tokenizer(path: str, *, threads: int | None = None, engine: Engine = "tokenizers") -> Tokenizer:
    """Opens a folder with a tokenizer.json or one SentencePiece .model, or such a file itself.

    Args:
        threads: of SentencePiece and fastokens, all cores without it; Hugging Face's library reads
            TOKENIZERS_PARALLELISM.
        engine: what reads a tokenizer.json.

    Raises:
        UserError: there is none, it cannot be read, or it has no end-of-document token.
    """
    place = Path(path)
    if place.is_file():
        file = place
    elif place.is_dir():
        models = sorted(place.glob("*.model"))
        candidates = [
            place / "tokenizer.json",
            place / "tokenizer.model",
            *(models if len(models) == 1 else []),
        ]
        file = next((candidate for candidate in candidates if candidate.is_file()), None)
        if file is None:
            raise UserError(f"no tokenizer in {path}: expected tokenizer.json or a SentencePiece .model file")
    else:
        raise UserError(f"no tokenizer at {path}: there is no such folder or file")
    threads = threads or len(os.sched_getaffinity(0))
    if engine == "fastokens":
        from megatron_lpr.data.fast_tokenizer import FastHFTokenizer

        if file.suffix == ".model":
            raise UserError(f"preprocess.engine: fastokens reads a tokenizer.json, not {file}")
        return FastHFTokenizer(file, threads)
    return SentencePieceTokenizer(file, threads) if file.suffix == ".model" else HFTokenizer(file)


class HFTokenizer:
    """A tokenizer.json; the end-of-document token is the folder's `eos_token`."""

    def __init__(self, file: Path):
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
        self.vocab_size = max(self._tokenizer.get_vocab().values()) + 1
        self.eod_id = self._find_eod(file.parent)
        self.sha256 = _sha256(file)

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_with_ends(self, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [(encoding.ids, [end for _, end in encoding.offsets]) for encoding in encodings]

    def _find_eod(self, folder: Path) -> int:
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            token = _read_json(folder / name).get("eos_token")
            token = token.get("content") if isinstance(token, dict) else token
            if token is not None:
                token_id = self._tokenizer.token_to_id(token)
                if token_id is None:
                    raise UserError(f"eos_token '{token}' of {folder / name} is not in the tokenizer's vocabulary")
                return token_id
        raise UserError(f"{folder} names no end-of-document token: set eos_token in its tokenizer_config.json")


class SentencePieceTokenizer:
    """A SentencePiece .model; the end-of-document token is its end-of-sentence piece."""

    def __init__(self, file: Path, threads: int):
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
        self.sha256 = _sha256(file)

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode(list(ids))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._processor.encode(list(texts), num_threads=self._threads)

    def encode_with_ends(self, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        encodings = (self._processor.encode(text, return_type="offset_mapping") for text in texts)
        return [(encoding["ids"], [end for _, end in encoding["offsets"]]) for encoding in encodings]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
