"""Corpora that mix languages: from a field, from a tagger, into the sidecar and the manifest."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from preprocessing import preprocess

from megatron_lpr._replay_sampler import LanguageRuns
from megatron_lpr.data.corpus.indexed import IndexedCorpus
from megatron_lpr.data.corpus.manifest import Manifest
from megatron_lpr.data.preprocess import make_corpus
from megatron_lpr.data.text.tokenize import load_tokenizer
from megatron_lpr.errors import UserError
from megatron_lpr.recipe.text_settings import SourceConfig

LANGUAGES = {"hu": "expanded", "en": "original", "el": "expanded"}
LINES = [
    json.dumps({"text": f"{language} fox {number} " * (1 + number % 3), "lang": language}).encode()
    for number in range(90)
    for language in [("hu", "en", "en")[number % 3]]
]


@pytest.fixture
def run(hf_tokenizer, tmp_path):
    def run(path: str, output: str = "out", *, options=None, **source) -> Manifest:
        corpus = {"name": "web", "files": (path,), "language": "hu", "role": "expanded"}
        source = corpus | {"languages": LANGUAGES} | source
        return preprocess(
            [SourceConfig(**source)],
            tokenizer=hf_tokenizer,
            output=str(tmp_path / output),
            **options or {},
        )

    return run


@pytest.fixture
def tagger_module(tmp_path, monkeypatch):
    """corpus_tagger:tag says en of text with "fox", or with "?" something unheard of, and hu of anything else."""
    code = "def tag(s):\n    return 'xx' if '?' in s else 'en' if 'fox' in s else 'hu'\n"
    (tmp_path / "corpus_tagger.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))


def tags(manifest: Manifest) -> list[list[str]]:
    """Languages of the tokens of each document, read back from the sidecar."""
    [entry] = manifest.corpora
    corpus = IndexedCorpus(entry.prefix)
    runs = LanguageRuns(entry.prefix, num_tokens=corpus.num_tokens, num_languages=len(entry.languages))
    runs.check()
    names = list(entry.languages)
    bounds = corpus.boundaries(0, len(corpus))
    return [[names[n] for n in runs.of_tokens(int(a), int(b - a))] for a, b in zip(bounds, bounds[1:], strict=False)]


@pytest.mark.slow
def test_from_a_field(run, write_text, hf_tokenizer, tmp_path, monkeypatch):
    path = write_text("a.jsonl", LINES)
    manifest = run(path, language_field="lang")
    [entry] = manifest.corpora
    assert Manifest.load(manifest.path) == manifest
    assert (entry.languages, list(entry.languages)) == (LANGUAGES, list(LANGUAGES))
    assert entry.language_digest == hashlib.sha256(Path(f"{entry.prefix}.lang").read_bytes()).hexdigest()

    tokenizer, corpus = load_tokenizer(hf_tokenizer), IndexedCorpus(entry.prefix)
    language_of = {
        (*tokenizer.encode_batch([json.loads(line)["text"]])[0], tokenizer.eod_id): json.loads(line)["lang"]
        for line in LINES
    }
    documents = [tuple(corpus.document(index).tolist()) for index in range(len(corpus))]
    # The end-of-document token is in the language of the text before it.
    assert tags(manifest) == [[language_of[document]] * len(document) for document in documents]
    # Neighbouring documents of one language are one run.
    order = [language_of[document] for document in documents]
    changes = 1 + sum(a != b for a, b in zip(order, order[1:], strict=False))
    assert len(LanguageRuns(entry.prefix, num_tokens=entry.tokens, num_languages=3)) == changes

    for constant in ("BLOCK_BYTES", "_LEAST_BLOCK_BYTES", "BUCKET_BYTES"):
        monkeypatch.setattr(make_corpus, constant, 500)
    again = run(path, "again", language_field="lang", options={"workers": 2})
    for suffix in (".bin", ".idx", ".lang"):
        assert Path(again.corpora[0].prefix + suffix).read_bytes() == Path(entry.prefix + suffix).read_bytes()


@pytest.mark.parametrize("kind", ["hf_tokenizer", "sp_tokenizer"])
def test_from_a_tagger(request, write_text, tagger_module, tmp_path, kind):
    texts = ["the fox naps", "árvíz", "the lazy dog", "fox"] * 5
    tokenizer_dir = request.getfixturevalue(kind)
    source = SourceConfig(
        name="web", files=(write_text("a.jsonl", texts),), language="hu", role="expanded", languages=LANGUAGES,
        tagger="corpus_tagger:tag", sentence_splitter="none",
    )  # fmt: skip
    manifest = preprocess([source], tokenizer=tokenizer_dir, output=str(tmp_path / "out"))
    tokenizer, corpus = load_tokenizer(tokenizer_dir), IndexedCorpus(manifest.corpora[0].prefix)
    opening = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    foxes = {(*opening, *ids, tokenizer.eod_id) for ids in tokenizer.encode_batch([texts[0], texts[3]])}
    expected = [
        [("en" if tuple(document) in foxes else "hu")] * len(document)
        for document in (corpus.document(index).tolist() for index in range(len(corpus)))
    ]
    assert tags(manifest) == expected


def test_sentences_inside_documents(run, write_text, tagger_module, tmp_path, monkeypatch):
    import nltk.data

    folder = tmp_path / "nltk_data" / "tokenizers" / "punkt_tab" / "english"
    folder.mkdir(parents=True)
    for name in ("abbrev_types.txt", "collocations.tab", "sent_starters.txt", "ortho_context.tab"):
        (folder / name).write_text("")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk_data")])
    manifest = run(write_text("a.jsonl", ["The fox naps. Árvíz jön. A fox runs."]), tagger="corpus_tagger:tag")
    [document] = tags(manifest)
    changes = [a for a, b in zip(document, [*document[1:], None], strict=True) if a != b]
    assert changes == ["en", "hu", "en"]
    monkeypatch.setattr(nltk.data, "path", [])
    with pytest.raises(UserError, match="needs NLTK's punkt_tab data for 'english'"):
        run(write_text("a.jsonl", ["fox"]), "elsewhere", tagger="corpus_tagger:tag")
    assert not (tmp_path / "elsewhere").exists()


def test_unknown_languages_are_bad_lines(run, write_text, tagger_module):
    lines = [*LINES[:5], b'{"text": "fox", "lang": "xx"}', b'{"text": "fox"}', b'{"text": "fox", "lang": 3}']
    path = write_text("a.jsonl", lines)
    with pytest.raises(UserError, match="a.jsonl:6: unknown language code 'xx'; correct it"):
        run(path, language_field="lang")
    skip = {"options": {"on_bad_line": "skip"}}
    corpus = run(path, language_field="lang", **skip).corpora[0]
    assert (corpus.documents, corpus.source.skipped_lines) == (5, 3)
    tagged = {"tagger": "corpus_tagger:tag", "sentence_splitter": "none"}
    path = write_text("b.jsonl", ["fox", "dog?", "dog", b"{"])
    with pytest.raises(UserError, match="b.jsonl:2: unknown language code 'xx' from the tagger"):
        run(path, "tagged", **tagged)
    assert run(path, "tagged", **tagged, **skip).corpora[0].source.skipped_lines == 2


def test_roles_and_names_may_change_the_way_of_reading_may_not(run, write_text):
    path = write_text("a.jsonl", LINES)
    first = run(path, language_field="lang")
    changed = run(path, language_field="lang", languages=LANGUAGES | {"el": "original"})
    assert changed.corpora[0].languages["el"] == "original"
    assert changed.corpora[0].language_digest == first.corpora[0].language_digest
    assert Manifest.load(changed.path).digest != first.digest
    with pytest.raises(UserError, match="made from other text, in another way"):
        run(path, language_field="lang", languages=dict(reversed(LANGUAGES.items())))
    with pytest.raises(UserError, match="made from other text, in another way"):
        run(path, languages={})
    plain = run(path, languages={}, options={"overwrite": True})
    assert plain.corpora[0].languages is None and not Path(f"{plain.corpora[0].prefix}.lang").exists()


def test_settings_that_contradict_each_other(run, write_text, tagger_module, tmp_path):
    path = write_text("a.jsonl", LINES)
    (tmp_path / "a.txt").write_text("fox")

    def refused(message: str, path: str = path, **source):
        with pytest.raises(UserError, match=message):
            run(path, **source)
        assert not (tmp_path / "out").exists()

    refused("lists languages, but neither a language_field nor a tagger")
    refused("both a language_field and a tagger", language_field="lang", tagger="corpus_tagger:tag")
    refused("list them with their roles", language_field="lang", languages={})
    refused("no effect without a tagger", language_field="lang", sentence_splitter="none")
    refused("unknown role 'new'", language_field="lang", languages={"en": "new"})
    refused("language 'hu' is expanded in .* and original", language_field="lang", languages={"hu": "original"})
    refused("which has no fields", str(tmp_path / "a.txt"), language_field="lang")
    refused("sample_by, which has an effect on plain text only", language_field="lang", sample_by="line")
    refused("corpus_tagger has no function tagg", tagger="corpus_tagger:tagg", sentence_splitter="none")


@pytest.mark.parametrize(
    "damage, message",
    [
        ({"language_digest": None}, "languages and language_digest belong together"),
        ({"language_digest": "00"}, "language_digest must be the SHA-256 of its .lang file"),
        ({"languages": ["hu"]}, "languages must be a mapping of strings|languages must map"),
        ({"languages": {}}, "must name 1 to 65536 languages"),
        ({"languages": {"hu": "expanded", "en": "orig"}}, "unknown role 'orig'"),
    ],
)
def test_entries_of_the_manifest_are_checked(run, write_text, damage, message):
    import yaml

    path = run(write_text("a.jsonl", LINES), language_field="lang").path
    content = yaml.safe_load(Path(path).read_text())
    content["corpora"][0] |= damage
    content["corpora"][0] = {key: value for key, value in content["corpora"][0].items() if value is not None}
    Path(path).write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(UserError, match=message):
        Manifest.load(path)


def test_a_manifest_knows_a_corrupt_sidecar(run, write_text):
    manifest = run(write_text("a.jsonl", LINES), language_field="lang")
    sidecar = Path(f"{manifest.corpora[0].prefix}.lang")
    sidecar.write_bytes(sidecar.read_bytes()[:-1])
    with pytest.raises(UserError, match="web.lang has the wrong size"):
        Manifest.load(manifest.path)
    assert np.all(np.array(tags(run(write_text("a.jsonl", LINES), language_field="lang")), dtype=object) != "")
