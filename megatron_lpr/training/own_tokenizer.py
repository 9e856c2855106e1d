"""The tokenizer of a run is its base model's, and its corpora were made with the same."""

from megatron_lpr.data.corpus.manifest import Manifest
from megatron_lpr.data.corpus.tokenizer_record import check_trained_alike, record_of
from megatron_lpr.data.text.special_tokens import special_tokens
from megatron_lpr.data.text.tokenize import Tokenizer, load_tokenizer
from megatron_lpr.errors import UserError
from megatron_lpr.families import Architecture
from megatron_lpr.recipe.settings import Recipe


def checked_tokenizer(recipe: Recipe, arch: Architecture, manifest: Manifest) -> Tokenizer:
    """The base's; UserError unless the corpora were made with the same, and the model has a row for each token."""
    assert recipe.data is not None
    folder, tokenizer = recipe.model.base, manifest.tokenizer
    base = load_tokenizer(folder, special=special_tokens(recipe.preprocess))
    if tokenizer.sha256 != base.sha256:
        raise UserError(
            f"data.manifest: {recipe.data.manifest} was made with a tokenizer of another vocabulary "
            f"({tokenizer.vocab_size} tokens, sha256 {tokenizer.sha256[:12]}) than the model's in {folder} "
            f"({base.vocab_size} tokens, sha256 {base.sha256[:12]}); preprocess the corpora with the model's tokenizer"
        )
    if base.vocab_size > arch.vocab_size:
        raise UserError(
            f"model.base: the tokenizer in {folder} has {base.vocab_size} tokens, but the model embeds "
            f"{arch.vocab_size} (vocab_size in its config.json); put the model's own tokenizer files there"
        )
    check_trained_alike(f"data.manifest: {recipe.data.manifest}", tokenizer, record_of(base))
    return base
