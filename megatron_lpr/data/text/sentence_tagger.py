"""Languages inside a document that mixes them: NLTK divides it into sentences, the user's function names each one's.

A token belongs to the sentence in which its last character lies, white space to the sentence before it: the token
" The" opens its own sentence, a line break closes the one before.
"""

import importlib
import os
import sys
from collections.abc import Callable, Sequence

import numpy as np

from megatron_lpr.errors import UserError
from megatron_lpr.recipe.text_settings import SourceConfig


class SentenceTagger:
    """Calls the user's tagger on each sentence of a corpus that has one.

    Raises:
        UserError: no such module or function, or no data for the sentence splitter.
    """

    def __init__(self, source: SourceConfig):
        assert source.tagger is not None
        self._name = source.tagger
        self._tag = _load_function(source.tagger)
        self._punkt = _load_punkt(source.sentence_model) if source.sentence_splitter == "nltk" else None
        self._number = {language: number for number, language in enumerate(source.languages)}

    def sentences(self, text: str) -> tuple[np.ndarray, np.ndarray, str | None]:
        """Starts int64 [S] (the first is 0) and languages int64 [S] of the sentences, and a code that is none.

        A language is a position in `languages`. Where the tagger returns anything else, the third value is that, as
        repr writes it, and the languages are not to be used.

        Raises:
            UserError: the tagger raised.
        """
        spans = list(self._punkt.span_tokenize(text)) if self._punkt is not None else []
        spans = spans or [(0, len(text))]
        languages = np.zeros(len(spans), np.int64)
        for index, (start, end) in enumerate(spans):
            try:
                code = self._tag(text[start:end])
            except Exception as error:
                what = f"{type(error).__name__}: {error}"
                raise UserError(f"tagger {self._name} failed on {text[start:end][:60]!r}: {what}") from error
            if not isinstance(code, str) or code not in self._number:
                return np.zeros(1, np.int64), languages[:1], repr(code)
            languages[index] = self._number[code]
        starts = np.array([start for start, _ in spans], np.int64)
        starts[0] = 0
        return starts, languages, None


def token_languages(ends: Sequence[int], starts: np.ndarray, languages: np.ndarray) -> np.ndarray:
    """Language [n] of each token of a document, from `ends` [n], the positions after the tokens' last characters."""
    last = np.maximum(np.asarray(ends, np.int64) - 1, 0)
    return languages[np.searchsorted(starts, last, side="right") - 1]


def _load_function(name: str) -> Callable[[str], str]:
    module_name, colon, function_name = name.partition(":")
    if not colon or not module_name or not function_name:
        raise UserError(f"tagger '{name}': write it as module:function, as my_tagger:language_of")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a console script does not look where the user works
    try:
        function = getattr(importlib.import_module(module_name), function_name, None)
    except Exception as error:
        raise UserError(f"tagger '{name}': importing {module_name} fails: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise UserError(f"tagger '{name}': {module_name} has no function {function_name}")
    return function


def _load_punkt(model: str):
    from nltk.tokenize.punkt import PunktTokenizer

    try:
        return PunktTokenizer(model)
    except LookupError:
        raise UserError(
            f"sentence splitting needs NLTK's punkt_tab data for '{model}', which is not there: get it with "
            "'python -m nltk.downloader punkt_tab', or unpack punkt_tab into a folder that NLTK_DATA names as "
            "tokenizers/punkt_tab; or do without splitting by sentence_splitter: none"
        ) from None
    except ValueError as error:
        raise UserError(f"sentence_model: '{model}' is no name of a punkt model, as english: {error}") from None
