"""Is what a manifest says of its tokenizer still so? The corpora of a manifest are all made alike, and read alike."""

from megatron_lpr.data.corpus.manifest import TokenizerRecord
from megatron_lpr.data.text.tokenize import Tokenizer
from megatron_lpr.errors import UserError
from megatron_lpr.recipe.text_settings import PreprocessConfig


def record_of(tokenizer: Tokenizer) -> TokenizerRecord:
    """What a manifest keeps of a tokenizer."""
    return TokenizerRecord(
        name=tokenizer.name,
        vocab_size=tokenizer.vocab_size,
        sha256=tokenizer.sha256,
        eod_id=tokenizer.eod_id,
        bos_id=tokenizer.bos_id,
        parse_special_tokens=tokenizer.parses_special_tokens,
    )


def check_same_tokenizer(path: str, there: TokenizerRecord, here: TokenizerRecord) -> None:
    """Raises UserError where corpora made `here` would differ in kind from those that the manifest at `path` has."""
    other = "choose another output folder"
    if (there.vocab_size, there.sha256) != (here.vocab_size, here.sha256):
        raise UserError(f"{path} holds corpora of another tokenizer ({there.name}, not {here.name}); {other}")
    if there.eod_id != here.eod_id:
        raise UserError(
            f"{path} holds corpora whose documents end with token {there.eod_id}, not {here.eod_id} (eos_token of the "
            f"tokenizer); {other}"
        )
    if there.bos_id != here.bos_id:
        raise UserError(f"{path} holds corpora {bos_difference(there, here)}; {_set_bos(there)}, or {other}")
    if there.parse_special_tokens != here.parse_special_tokens:
        was = "parsed into control tokens" if there.parse_special_tokens else "kept as text"
        raise UserError(
            f"{path} holds corpora whose special tokens, written out in a text, were {was}; set "
            f"preprocess.parse_special_tokens: {str(there.parse_special_tokens).lower()}, or {other}"
        )


def check_trained_alike(where: str, there: TokenizerRecord, base: TokenizerRecord) -> None:
    """UserError where the corpora of the manifest at `where` open or end otherwise than the `base` model has it."""
    again = "preprocess the corpora again"
    if there.eod_id != base.eod_id:
        raise UserError(
            f"{where} holds documents that end with token {there.eod_id}, but the eos_token of the model's tokenizer "
            f"is {base.eod_id}; {again}"
        )
    if there.bos_id != base.bos_id:
        raise UserError(f"{where} holds documents {bos_difference(there, base)}; {again}, or {_set_bos(there)}")


def read_otherwise(there: TokenizerRecord, settings: PreprocessConfig) -> list[str]:
    """A warning where evaluation will take control tokens in a text otherwise than the corpora were made."""
    made, evaluates = there.parse_special_tokens, settings.parse_special_tokens
    if made == evaluates:
        return []
    return [
        f"the corpora were made with parse_special_tokens: {str(made).lower()}, this recipe evaluates with "
        f"preprocess.parse_special_tokens: {str(evaluates).lower()}"
    ]


def bos_difference(there: TokenizerRecord, here: TokenizerRecord) -> str:
    """`that open ..., where ...`, of records that differ in the token that opens a document."""
    opens = "with no BOS token" if there.bos_id is None else f"with token {there.bos_id}"
    wanted = "no token" if here.bos_id is None else f"token {here.bos_id}"
    return f"that open {opens}, where the tokenizer and preprocess.bos put {wanted} before a text"


def _set_bos(there: TokenizerRecord) -> str:
    return f"set preprocess.bos: {'false' if there.bos_id is None else 'true'}"
