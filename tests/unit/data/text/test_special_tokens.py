"""What opens a document, what control tokens in a text are, and how both come into corpora and the manifest."""

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
import yaml
from preprocessing import preprocess
from tokenizers import AddedToken, pre_tokenizers, processors

from megatron_lpr._replay_sampler import LanguageRuns
from megatron_lpr.data.corpus.indexed import IndexedCorpus
from megatron_lpr.data.corpus.manifest import Manifest
from megatron_lpr.data.text.special_tokens import SpecialTokens
from megatron_lpr.data.text.tokenize import load_tokenizer
from megatron_lpr.errors import UserError
from megatron_lpr.recipe.text_settings import SourceConfig

PAD, EOD = 0, 1  # of the tokenizer of these tests; <pad> plays the BOS token
TEXTS = ["the lazy dog", "árvíz", "fox <eod> dog", "a fox"]
LANGUAGE_OF = dict(zip(TEXTS, ["hu", "en", "hu", "en"], strict=True))
OPENS = processors.TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", PAD)])
BOTH_ENDS = processors.TemplateProcessing(single="<pad> $A <eod>", special_tokens=[("<pad>", PAD), ("<eod>", EOD)])
SILENT = processors.ByteLevel(trim_offsets=False)
TWO = processors.TemplateProcessing(single="<pad> <eod> $A", special_tokens=[("<pad>", PAD), ("<eod>", EOD)])


@pytest.fixture
def edited(hf_tokenizer, tmp_path):
    """edited(post_processor, **settings of tokenizer_config.json) -> folder of a tokenizer"""

    def write(post_processor, **settings) -> str:
        folder = tmp_path / "tokenizer"
        shutil.copytree(hf_tokenizer, folder, dirs_exist_ok=True)
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        if post_processor is not None:
            tokenizer.post_processor = post_processor
        tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
        tokenizer.save(str(folder / "tokenizer.json"))
        config = {"eos_token": "<eod>", "tokenizer_class": "PreTrainedTokenizerFast"} | settings
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return str(folder)

    return write


def bos_of(folder: str, bos: str = "auto") -> int | None:
    return load_tokenizer(folder, special=SpecialTokens(bos=bos)).bos_id


@pytest.mark.parametrize(
    "post_processor, settings, expected",
    [
        (OPENS, {"bos_token": "<pad>"}, PAD),
        (processors.Sequence([SILENT, OPENS]), {"bos_token": "<pad>"}, PAD),  # as Llama 3
        (BOTH_ENDS, {}, PAD),
        (SILENT, {"bos_token": "<pad>"}, None),  # as SmolLM2
        (SILENT, {"bos_token": None, "add_bos_token": False}, None),  # as Qwen
        (None, {"bos_token": "<pad>"}, None),
    ],
)
def test_auto_is_what_transformers_puts_before_a_text(edited, post_processor, settings, expected):
    from transformers import AutoTokenizer

    folder = edited(post_processor, **settings)
    assert bos_of(folder) == expected
    ids, plain = AutoTokenizer.from_pretrained(folder)("fox").input_ids, load_tokenizer(folder).encode_batch(["fox"])[0]
    opening = [] if expected is None else [expected]
    assert ids[: len(opening) + len(plain)] == [*opening, *plain]
    assert bos_of(folder, "false") is None


def test_a_setting_counts_where_the_post_processor_is_silent(edited):
    # a LlamaTokenizerFast of transformers 4 builds its post-processor from this
    assert bos_of(edited(SILENT, bos_token={"content": "<pad>"}, add_bos_token=True)) == PAD
    assert bos_of(edited(SILENT, bos_token="<pad>"), "true") == PAD
    assert bos_of(edited(OPENS), "true") == PAD


def test_sentencepiece_opens_documents_as_llama_does(sp_tokenizer, tmp_path):
    shutil.copy(sp_tokenizer, tmp_path)
    config = tmp_path / "tokenizer_config.json"
    assert (bos_of(str(tmp_path)), bos_of(str(tmp_path), "false")) == (1, None)
    config.write_text('{"add_bos_token": false}')
    assert (bos_of(str(tmp_path)), bos_of(str(tmp_path), "true")) == (None, 1)
    config.write_text('{"add_bos_token": true}')
    assert bos_of(str(tmp_path)) == 1


def test_a_token_that_is_not_there(edited, tmp_path):
    def refused(message: str, folder: str, bos: str = "auto"):
        with pytest.raises(UserError, match=message):
            bos_of(folder, bos)

    refused("preprocess.bos: true, but the tokenizer in .* has no bos_token", edited(SILENT), "true")
    refused("says add_bos_token: true, but .*; set preprocess.bos: false", edited(None, add_bos_token=True))
    refused("bos_token '<s>' of .* is not in the tokenizer's vocabulary", edited(SILENT, bos_token="<s>"), "true")
    refused("puts 2 tokens before a text", edited(TWO))
    assert bos_of(edited(TWO, bos_token="<pad>"), "true") == PAD
    refused("add_bos_token must be true or false, not 'yes'", edited(SILENT, add_bos_token="yes"))
    refused("eos_token must be a token", edited(SILENT, eos_token=3))
    refused("eos_token must be a token", edited(SILENT, eos_token={"special": True}))
    folder = edited(SILENT)
    Path(folder, "tokenizer_config.json").write_text("[1, 2]")
    refused("tokenizer_config.json must hold a JSON object, not list", folder)


def test_control_tokens_in_a_text_are_text(edited):
    folder = edited(OPENS)
    text = load_tokenizer(folder)
    parsed = load_tokenizer(folder, special=SpecialTokens(parse=True))
    [ids], [parsed_ids] = text.encode_batch(["<pad>fox<eod> "]), parsed.encode_batch(["<pad>fox<eod> "])
    assert not {PAD, EOD} & set(ids) and parsed_ids[0] == PAD and EOD in parsed_ids
    assert text.decode(ids) == parsed.decode(parsed_ids) == "<pad>fox<eod> "
    assert [i for i, _ in text.encode_with_ends(["a<eod>"])] == text.encode_batch(["a<eod>"])
    # added tokens that are not special are text that has a token, in both
    assert text.encode_batch(["<think>"]) == parsed.encode_batch(["<think>"]) and len(text.encode_batch(["<think>"])[0])
    # nothing changes for text without them
    assert text.encode_batch(TEXTS[:2]) == parsed.encode_batch(TEXTS[:2])


def test_a_model_that_makes_them_all_the_same_is_refused(tmp_path):
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((letter, -4.0) for letter in "▁a</s>")]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens(["</s>", "<unk>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>", "unk_token": "<unk>"}')
    with pytest.raises(UserError, match="makes its control token of '</s>' in a text"):
        load_tokenizer(str(tmp_path))
    assert load_tokenizer(str(tmp_path), special=SpecialTokens(parse=True)).eod_id == 1


def test_an_end_of_document_token_that_is_not_marked_as_special_is_refused(edited):
    with pytest.raises(UserError, match="makes its control token of '<think>' in a text"):
        load_tokenizer(edited(None, eos_token="<think>"))


def test_sentencepiece_never_parses(sp_tokenizer):
    tokenizer = load_tokenizer(sp_tokenizer)
    assert tokenizer.eod_id not in tokenizer.encode_batch(["a</s>"])[0] and not tokenizer.parses_special_tokens
    with pytest.raises(UserError, match="SentencePiece cannot do it"):
        load_tokenizer(sp_tokenizer, special=SpecialTokens(parse=True))


@pytest.fixture
def run(write_text, tmp_path):
    path = write_text("a.jsonl", TEXTS)

    def run(folder: str, name: str = "hu", *, output: str = "out", engine: str = "tokenizers", special=None, **source):
        corpus = {"name": name, "files": (path,), "language": "hu", "role": "expanded"} | source
        return preprocess(
            [SourceConfig(**corpus)],
            tokenizer=folder,
            output=str(tmp_path / output),
            engine=engine,
            **special or {},
        )

    return run


def documents(manifest: Manifest) -> list[list[int]]:
    corpus = IndexedCorpus(manifest.corpora[0].prefix)
    return [corpus.document(index).tolist() for index in range(len(corpus))]


@pytest.mark.parametrize("engine", ["tokenizers", "fastokens"])
def test_documents_open_with_it(run, edited, engine):
    if engine == "fastokens":
        pytest.importorskip("fastokens")
    folder = edited(OPENS)
    manifest = run(folder, engine=engine)
    expected = [[PAD, *ids, EOD] for ids in load_tokenizer(folder).encode_batch(TEXTS)]
    assert sorted(documents(manifest)) == sorted(expected)
    assert manifest.corpora[0].tokens == sum(map(len, expected))
    record = yaml.safe_load(Path(manifest.path).read_text())["tokenizer"]
    assert (record["bos_id"], record["parse_special_tokens"]) == (PAD, False)
    assert Manifest.load(manifest.path) == manifest
    without = run(folder, output="without", special={"bos": "false"})
    assert sorted(documents(without)) == sorted(document[1:] for document in expected)
    assert "bos_id" not in yaml.safe_load(Path(without.path).read_text())["tokenizer"]


def test_it_is_in_the_language_of_its_document(run, edited, write_text):
    lines = [json.dumps({"text": text, "lang": language}).encode() for text, language in LANGUAGE_OF.items()]
    manifest = run(
        edited(OPENS),
        files=(write_text("mixed.jsonl", lines),),
        languages={"hu": "expanded", "en": "original"},
        language_field="lang",
    )
    corpus = IndexedCorpus(manifest.corpora[0].prefix)
    runs = LanguageRuns(corpus.prefix, num_tokens=corpus.num_tokens, num_languages=2)
    bounds = corpus.boundaries(0, len(corpus))
    tags = [runs.of_tokens(int(a), int(b - a)) for a, b in zip(bounds, bounds[1:], strict=False)]
    assert {int(tag[0]) for tag in tags} == {0, 1}
    assert all(len(set(tag.tolist())) == 1 for tag in tags)


def test_the_corpora_of_a_manifest_are_made_alike(run, edited):
    folder = edited(OPENS, bos_token="<pad>")
    run(folder)
    assert len(run(folder, "more").corpora) == 2
    with pytest.raises(UserError, match="open with token 0, where .* put no token .*; set preprocess.bos: true, or"):
        run(folder, special={"bos": "false"})
    with pytest.raises(UserError, match="were kept as text; set preprocess.parse_special_tokens: false, or choose"):
        run(folder, "third", special={"parse_special_tokens": True})
    Path(folder, "tokenizer_config.json").write_text('{"eos_token": "<pad>"}')
    with pytest.raises(UserError, match="documents end with token 1, not 0"):
        run(folder)


def test_a_manifest_whose_control_tokens_were_parsed(run, edited):
    manifest = run(edited(OPENS), special={"bos": "false", "parse_special_tokens": True})
    with pytest.raises(UserError, match="open with no BOS token, where .*; set preprocess.bos: false"):
        run(edited(OPENS))
    with pytest.raises(UserError, match="were parsed into control tokens; set preprocess.parse_special_tokens: true"):
        run(edited(OPENS), special={"bos": "false"})
    assert run(edited(OPENS), special={"bos": "false", "parse_special_tokens": True}).corpora == manifest.corpora


@pytest.mark.parametrize(
    "field, value", [("bos_id", "one"), ("bos_id", True), ("bos_id", 1000), ("parse_special_tokens", 1)]
)
def test_the_manifest_s_record_is_checked(run, edited, field, value):
    path = run(edited(OPENS)).path
    content = yaml.safe_load(Path(path).read_text())
    content["tokenizer"][field] = value
    Path(path).write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=f"tokenizer: {field} must be"):
        Manifest.load(path)


def test_parts_of_an_interrupted_run_are_not_mixed(run, edited, capsys, monkeypatch):
    from megatron_lpr.data.preprocess import make_corpus

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    folder = edited(OPENS)
    with monkeypatch.context() as patch:
        patch.setattr(make_corpus, "_merge", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(folder)
    capsys.readouterr()
    manifest = run(folder, special={"bos": "false"})
    assert "made from something else; its parts are removed" in capsys.readouterr().err
    assert PAD not in {document[0] for document in documents(manifest)}
