"""Where a checkpoint sends each token of a text: to which experts, in each layer, with which weight.

The forward passes are those of `evaluate` on the same text, so that the shares are the same too.

Shapes: S positions, B windows, T tokens, L MoE layers, E experts.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_lpr.checkpoint.own_recipe import with_experts_of
from megatron_lpr.checkpoint.verification import refuse_damaged
from megatron_lpr.data.text.documents import TextReader
from megatron_lpr.data.text.special_tokens import special_tokens
from megatron_lpr.data.text.tokenize import Tokenizer, load_tokenizer
from megatron_lpr.errors import UserError
from megatron_lpr.evaluation.evaluate import check_trained_alike
from megatron_lpr.evaluation.held_out import check_window
from megatron_lpr.evaluation.windows import Text, tokenized
from megatron_lpr.platform import megatron
from megatron_lpr.recipe.checks import architecture_of
from megatron_lpr.recipe.settings import ParallelConfig, Recipe
from megatron_lpr.recipe.text_settings import EvaluationCorpus
from megatron_lpr.reporting.routing_page import Piece, RoutedText

Documents = Mapping[str, Sequence[str]]  # documents of each text, by its name


@dataclass(frozen=True, kw_only=True)
class TokenRouting:
    """A checkpoint whose routing is asked for, in one process; nothing has been read."""

    recipe: Recipe
    folder: Path

    @property
    def layers(self) -> list[int]:
        """Numbers of the layers that have experts."""
        return architecture_of(self.recipe.model).moe_layers()

    def check(self) -> Tokenizer:
        """What can be wrong before a model is read; returns its tokenizer.

        Raises:
            UserError: the window is too long, or the tokenizer does other than in training.
        """
        check_window(self.recipe.evaluation, self.recipe.model.base)
        tokenizer = load_tokenizer(self.recipe.model.base, special=special_tokens(self.recipe.preprocess))
        check_trained_alike(self.recipe, self.folder, tokenizer)
        return tokenizer

    def run(self, texts: Documents) -> list[RoutedText]:
        """The routing of each text.

        Raises:
            UserError: as `check`; a damaged checkpoint; a text without characters.
        """
        tokenizer = self.check()
        streams = [_stream(tokenizer, name, documents) for name, documents in texts.items()]
        refuse_damaged(self.folder, contents=self.recipe.checkpoint.verify, load=self.recipe.model.load)
        with megatron():
            from megatron_lpr.evaluation.megatron_model import MegatronModel

            model = MegatronModel.of_checkpoint(self.recipe, str(self.folder))
            return [
                RoutedText(
                    name=name,
                    pieces=list(pieces(tokenizer, documents)),
                    **dict(zip(("weights_TLE", "chosen_TLE"), _routed(model, stream), strict=True)),
                )
                for (name, documents), stream in zip(texts.items(), streams, strict=True)
            ]


def plan_routing(checkpoint: Path, recipe: Recipe) -> TokenRouting:
    """`checkpoint` with the recipe that it brings.

    Raises:
        UserError: it has no routers.
    """
    recipe = dataclasses.replace(with_experts_of(recipe, checkpoint), parallel=ParallelConfig())
    if not recipe.model.num_experts:
        raise UserError(f"{checkpoint} holds a dense model, which routes nothing: give a checkpoint with experts")
    return TokenRouting(recipe=recipe, folder=checkpoint)


def read_texts(files: Sequence[str], prompts: Sequence[str]) -> dict[str, list[str]]:
    """The documents of each file, by its path, and each prompt.

    Raises:
        UserError: there are none; a file is missing, unreadable, without text, or twice there; an empty prompt.
    """
    if not files and not prompts:
        raise UserError("no text: name a file with --text FILE, or give words with --prompt")
    texts: dict[str, list[str]] = {}
    for file in files:
        reader = TextReader([file], "skip")
        documents = list(reader)
        for _, bad in reader.bad_lines.by_reason.values():
            raise UserError(f"--text {bad}; correct it, or leave it out")
        if not documents:
            raise UserError(f"--text {file}: no text in it")
        if file in texts:
            raise UserError(f"--text {file}: is there twice; name it once")
        texts[file] = documents
    for number, prompt in enumerate(prompts, start=1):
        if not prompt.strip():
            raise UserError("--prompt: is empty; give some words")
        texts[f"prompt {number}"] = [prompt]
    return texts


def pieces(tokenizer: Tokenizer, documents: Sequence[str]) -> Iterator[Piece]:
    """The tokens that a model reads of some documents, in order, with their text; the last one has none to predict.

    A token has the text since the end of the one before it. Where there is none, the two share a character, and are one
    piece.
    """
    place = 0
    opening = tokenizer.eod_id if tokenizer.bos_id is None else tokenizer.bos_id
    encodings = tokenizer.encode_with_ends(documents)
    for number, (document, (ids, ends)) in enumerate(zip(documents, encodings, strict=True)):
        if number and tokenizer.bos_id is not None:
            yield _control(tokenizer, tokenizer.eod_id, place)
            place += 1
        yield _control(tokenizer, opening, place)
        place += 1
        for first, last, text in _shared(document, ends):
            label = f"'{text}': token{'s' if last - first > 1 else ''} {', '.join(map(str, ids[first:last]))}"
            yield Piece(text=text, label=label, first=place + first, last=place + last)
        place += len(ids)


def _shared(document: str, ends: Sequence[int]) -> Iterator[tuple[int, int, str]]:
    """(first, last + 1, text) of runs of tokens that share a character, or of which all but the last have no text.

    Characters that no token stands for, as a normaliser may leave them out, are those of the next one or of the last.
    """
    first = begin = end = 0
    for token, (own_end, next_end) in enumerate(zip(ends, [*ends[1:], None], strict=False), start=1):
        end = max(end, own_end)
        if next_end is None:
            yield first, token, document[begin:]
        elif next_end > end > begin:
            yield first, token, document[begin:end]
            first, begin = token, end


def _control(tokenizer: Tokenizer, token: int, place: int) -> Piece:
    name = tokenizer.decode([token]) or f"token {token}"
    return Piece(text=name, label=f"{name}: control token {token}", first=place, last=place + 1, is_control=True)


def _stream(tokenizer: Tokenizer, name: str, documents: Sequence[str]) -> Text:
    corpus = EvaluationCorpus(name=name, files=(name,), language="", role="original")
    return tokenized(tokenizer, corpus, documents)


def _routed(model: Any, text: Text) -> tuple[np.ndarray, np.ndarray]:
    """Weights float32 and choice bool [T, L, E] of the tokens that the model reads."""
    from megatron_lpr.model.builder import routers

    found: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    handles = [
        router.register_forward_hook(partial(_keep, found.setdefault(router.layer_number, [])))
        for router in routers(*model.chunks)
    ]
    try:
        model.nats([text])
    finally:
        for handle in handles:
            handle.remove()
    tokens = len(text.stream) - 1  # what follows is padding
    layers = [[torch.cat(parts)[:tokens] for parts in zip(*found[number], strict=True)] for number in sorted(found)]
    weights, chosen = (torch.stack(parts, dim=1).numpy() for parts in zip(*layers, strict=True))
    return weights, chosen


def _keep(kept: list, router: torch.nn.Module, inputs: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Adds what a router says [S*B, E] in the order of the text, which is that of windows [B*S, E]."""
    positions, windows = inputs[0].shape[:2]
    probs, chosen = (part.view(positions, windows, -1).transpose(0, 1).flatten(0, 1).cpu() for part in output)
    kept.append((probs.float(), chosen.bool()))
