"""Tokens that stand for no text: the one that opens a document, the one that ends it, and none inside.

Where a text may hold the very strings of such tokens (<|im_end|>, </s>), transformers parses them by default; here they
are text unless that is asked for.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from megatron_lpr.errors import UserError
from megatron_lpr.recipe.text_settings import Bos, PreprocessConfig

_CONFIG = "tokenizer_config.json"


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Attributes:
    bos: the token that opens a document; `auto` is what the tokenizer itself puts before a text, which may be nothing.
    parse: control tokens that are written out in a text become those tokens.
    """

    bos: Bos = "auto"
    parse: bool = False


AS_THE_TOKENIZER_DOES = SpecialTokens()


def special_tokens(settings: PreprocessConfig) -> SpecialTokens:
    """Those of a recipe: preprocessing, training and evaluation have the same ones."""
    return SpecialTokens(bos=settings.bos, parse=settings.parse_special_tokens)


def hf_eod(tokenizer: tokenizers.Tokenizer, folder: Path) -> int:
    """The folder's `eos_token`. UserError where it names none, or one that is not in the vocabulary."""
    token_id = _named(tokenizer, folder, "eos_token")
    if token_id is None:
        raise UserError(f"{folder} names no end-of-document token: set eos_token in its {_CONFIG}")
    return token_id


def hf_bos(tokenizer: tokenizers.Tokenizer, folder: Path, bos: Bos) -> int | None:
    """The token that opens a document, or None.

    `auto` is what tokenizer.json's post-processor puts before a text, as in transformers 5; where that puts nothing,
    the `bos_token` if tokenizer_config.json says add_bos_token: true, as in transformers 4.

    Raises:
        UserError: there is none and there should be one, or there are several.
    """
    if bos == "false":
        return None
    put = _tokens_before_a_text(tokenizer)
    if len(put) == 1:
        return put[0]
    if bos == "auto":
        if put:
            raise UserError(
                f"{folder}: its tokenizer puts {len(put)} tokens before a text, and a document can open with one: set "
                "preprocess.bos to true (its bos_token) or false"
            )
        if not _add_bos_token(folder):
            return None
    return _required(_named(tokenizer, folder, "bos_token"), folder, bos)


def sentencepiece_bos(processor: sentencepiece.SentencePieceProcessor, folder: Path, bos: Bos) -> int | None:
    """The same of a .model file; `auto` as in Meta's own code and transformers' LlamaTokenizer.

    They put the model's BOS piece before a text unless the tokenizer_config.json beside it says add_bos_token: false.

    Raises:
        UserError: the model has no such piece, and there should be one.
    """
    add = _add_bos_token(folder)
    if bos == "false" or (bos == "auto" and add is False):
        return None
    piece = processor.bos_id()
    if piece < 0 and bos == "auto" and add is None:
        return None
    return _required(piece if piece >= 0 else None, folder, bos)


def check_text_stays_text(tokenizer: tokenizers.Tokenizer, file: Path) -> None:
    """UserError where a control token comes out of a text although `tokenizer.encode_special_tokens` is set.

    A Unigram model, for one, may hold </s> among its pieces. The unknown token comes out of any text.
    """
    unknown = getattr(tokenizer.model, "unk_token", None) or next(_names(file.parent, "unk_token"), ("",))[0]
    control = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    control |= {name for key in ("eos_token", "bos_token") for name, _ in _names(file.parent, key)}
    for token in sorted(control - {unknown}):
        token_id = tokenizer.token_to_id(token)
        found = (tokenizer.encode(text, add_special_tokens=False).ids for text in (token, f"a{token}", f" {token}"))
        if any(token_id in ids for ids in found):
            raise UserError(
                f"{file} makes its control token of '{token}' in a text, though asked not to; where that is wanted, or "
                "your text has none, set preprocess.parse_special_tokens: true"
            )


def _tokens_before_a_text(tokenizer: tokenizers.Tokenizer) -> list[int]:
    text = "a"
    alone = tokenizer.encode(text, add_special_tokens=False).ids
    whole = tokenizer.encode(text, add_special_tokens=True).ids
    starts = range(len(whole) - len(alone) + 1) if alone else range(0)
    return next((whole[:start] for start in starts if whole[start : start + len(alone)] == alone), [])


def _required(token_id: int | None, folder: Path, bos: Bos) -> int:
    if token_id is None:
        why = "preprocess.bos: true" if bos == "true" else f"{folder / _CONFIG} says add_bos_token: true"
        raise UserError(f"{why}, but the tokenizer in {folder} has no bos_token; set preprocess.bos: false")
    return token_id


def _named(tokenizer: tokenizers.Tokenizer, folder: Path, key: str) -> int | None:
    for token, file in _names(folder, key):
        token_id = tokenizer.token_to_id(token)
        if token_id is None:
            raise UserError(f"{key} '{token}' of {file} is not in the tokenizer's vocabulary")
        return token_id
    return None


def _names(folder: Path, key: str) -> Iterator[tuple[str, Path]]:
    """What the files of a tokenizer call `key`, the most authoritative first, with the file."""
    for file in (folder / _CONFIG, folder / "special_tokens_map.json"):
        token = _read_object(file).get(key)
        token = token.get("content", "") if isinstance(token, dict) else token
        if token is None:
            continue
        if not isinstance(token, str) or not token:
            raise UserError(f"{file}: {key} must be a token, or an object whose content is one, not {token!r}")
        yield token, file


def _add_bos_token(folder: Path) -> bool | None:
    value = _read_object(folder / _CONFIG).get("add_bos_token")
    if value is not None and not isinstance(value, bool):
        raise UserError(f"{folder / _CONFIG}: add_bos_token must be true or false, not {value!r}")
    return value


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content
