"""Languages inside documents: sentences, the user's tagger, and which tokens they cover."""

import bisect
import random
import shutil

import nltk.data
import numpy as np
import pytest
import sentencepiece
import tokenizers

from megatron_lpr.data.text.sentence_tagger import SentenceTagger, token_languages
from megatron_lpr.data.text.tokenize import load_tokenizer
from megatron_lpr.errors import UserError
from megatron_lpr.recipe.text_settings import SourceConfig

TEXT = "  The fox naps.  Árvíz, tükör!\nDr. Fox runs."


@pytest.fixture
def tagger_module(tmp_path, monkeypatch):
    """A module my_tagger in the working directory: a sentence with á or ü is Hungarian."""
    (tmp_path / "my_tagger.py").write_text(
        "def tag(sentence):\n    return 'hu' if set('áÁü') & set(sentence) else 'en'\n"
        "def broken(sentence):\n    raise KeyError(sentence)\n"
        "def strange(sentence):\n    return None\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.fixture
def punkt(tmp_path, monkeypatch):
    """NLTK data with one punkt model, `english`, that knows a single abbreviation."""
    folder = tmp_path / "nltk_data" / "tokenizers" / "punkt_tab" / "english"
    folder.mkdir(parents=True)
    for name, content in (
        ("abbrev_types.txt", "dr"),
        ("collocations.tab", ""),
        ("sent_starters.txt", ""),
        ("ortho_context.tab", ""),
    ):
        (folder / name).write_text(content)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk_data")])


def tagger(**more) -> SentenceTagger:
    source = {"name": "web", "language": "hu", "role": "expanded", "tagger": "my_tagger:tag"}
    return SentenceTagger(SourceConfig(**source | {"languages": {"hu": "expanded", "en": "original"}} | more))


def test_sentences(tagger_module, punkt):
    starts, languages, unknown = tagger().sentences(TEXT)
    assert unknown is None
    # The first sentence starts with the text, white space included; the abbreviation ends none.
    assert starts.tolist() == [0, TEXT.index("Árvíz"), TEXT.index("Dr.")]
    assert languages.tolist() == [1, 0, 1]


def test_without_splitting_the_tagger_gets_the_document(tagger_module):
    starts, languages, _ = tagger(sentence_splitter="none").sentences(TEXT)
    assert (starts.tolist(), languages.tolist()) == ([0], [0])


@pytest.mark.parametrize("kind", ["hf_tokenizer", "sp_tokenizer"])
def test_a_token_belongs_to_the_sentence_of_its_last_character(request, tagger_module, punkt, kind):
    tokenizer = load_tokenizer(request.getfixturevalue(kind))
    [(ids, ends)] = tokenizer.encode_with_ends([TEXT])
    assert [ids] == tokenizer.encode_batch([TEXT])
    starts, languages, _ = tagger().sentences(TEXT)
    tags = token_languages(ends, starts, languages)
    second, third = TEXT.index("Árvíz"), TEXT.index("Dr.")
    expected = [0 if second <= max(end - 1, 0) < third else 1 for end in ends]
    assert tags.tolist() == expected and {0, 1} == set(expected)
    assert ends == sorted(ends) and ends[-1] == len(TEXT)  # positions in characters, not bytes


def test_token_languages_by_hand():
    starts, languages = np.array([0, 6]), np.array([4, 2])
    # "Hello " + "World": tokens "Hello", " World" and, of zero width, a special one at the start.
    assert token_languages([0, 5, 11], starts, languages).tolist() == [4, 4, 2]
    # The space alone closes the sentence before it.
    assert token_languages([5, 6, 11], starts, languages).tolist() == [4, 4, 2]


@pytest.fixture(scope="module", params=["nmt_nfkc", "identity", "nfkc"])
def byte_fallback(request, tmp_path_factory):
    """A SentencePiece model that spells rare characters byte by byte, and normalises text by `request.param`."""
    folder = tmp_path_factory.mktemp("byte_fallback")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*"fox dog árvíz naps".split(), "½ 1⁄2 kg ㎏ ﬁn"] * 3),
        model_prefix=str(folder / "toy"),
        vocab_size=300,
        hard_vocab_limit=False,
        byte_fallback=True,
        model_type="bpe",
        normalization_rule_name=request.param,
        minloglevel=2,
    )
    return load_tokenizer(str(folder / "toy.model"))


def slow_positions(processor, text: str) -> list[int]:
    """Position of each token's last character: the shortest beginning of the text that has the token's last byte."""
    # "x" keeps white space at the end of a beginning
    beginnings = [processor.normalize(text[:end] + "x")[:-1].encode() for end in range(len(text) + 1)]
    encoding = processor.encode(text, return_type="offset_mapping")
    positions, read, end = [], b"", 0
    for token, piece in zip(encoding["ids"], encoding["pieces"], strict=True):
        read += bytes([int(piece[3:5], 16)]) if processor.is_byte(token) else piece.encode()
        while not beginnings[end].startswith(read):
            end += 1
        positions.append(max(end - 1, 0))
    return positions


def test_tokens_of_a_part_of_a_character(byte_fallback):
    """Bytes of a character, letters that normalisation makes of one: all of them are in its sentence."""
    generator = random.Random(5)
    letters = [*"abfox日𓀀½ﬁ㎏ｆá", "e\u0301", "fox", " dog", " ", "<0x41>"]
    tokens = 0
    for _ in range(300):
        text, starts = "", []
        for _ in range(generator.randrange(1, 6)):
            starts.append(len(text))
            text += "".join(generator.choices(letters, k=generator.randrange(1, 12))).strip() + "x"
            text += generator.choice([" ", "\n", "  ", ". ", ""])
        [(ids, ends)] = byte_fallback.encode_with_ends([text])
        starts, languages = np.array(starts), np.arange(len(starts))
        positions = slow_positions(byte_fallback._processor, text)
        slow = [bisect.bisect_right(starts, position) - 1 for position in positions]
        assert token_languages(ends, starts, languages).tolist() == slow, (text, starts, ends)
        assert ends == sorted(ends)
        tokens += len(ids)
    assert tokens > 5000


def test_parts_of_a_character_of_a_tokenizer_json(hf_tokenizer, tmp_path):
    shutil.copytree(hf_tokenizer, tmp_path, dirs_exist_ok=True)
    edited = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    edited.normalizer = tokenizers.normalizers.NFKC()
    edited.save(str(tmp_path / "tokenizer.json"))
    [(ids, ends)] = load_tokenizer(str(tmp_path)).encode_with_ends(["fox ½日"])
    # "1⁄2" is five bytes, the character behind it three; the space before may be in one token with the first
    assert len(ids) == len(ends) and ends[-3:] == [6] * 3 and ends[-7:-3] == [5] * 4 and 5 not in ends[:-8]


def test_unknown_codes_are_told(tagger_module):
    for name, code in (("my_tagger:tag", "'hu'"), ("my_tagger:strange", "None")):
        only_english = tagger(tagger=name, sentence_splitter="none", languages={"en": "original"})
        assert only_english.sentences("Árvíz")[2] == code


def test_mistakes_are_named(tagger_module, punkt):
    def refused(message: str, **more):
        with pytest.raises(UserError, match=message):
            tagger(**more)

    refused("write it as module:function", tagger="my_tagger.tag")
    refused("importing nowhere fails: ModuleNotFoundError", tagger="nowhere:tag")
    refused("my_tagger has no function number", tagger="my_tagger:number")
    refused("needs NLTK's punkt_tab data for 'hungarian'.*nltk.downloader.*sentence_splitter: none",
            sentence_model="hungarian")  # fmt: skip
    refused("is no name of a punkt model", sentence_model="../english")
    with pytest.raises(UserError, match="my_tagger:broken failed on 'The fox naps.*KeyError"):
        tagger(tagger="my_tagger:broken").sentences("The fox naps. And runs.")
