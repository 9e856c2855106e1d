"""What a training recipe reads, for people: the data plan as a tree, and the documents of one step."""

from collections import Counter
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import TypedDict

from megatron_lpr.data.corpus.indexed import IndexedCorpus
from megatron_lpr.data.corpus.manifest import ROLES, Manifest
from megatron_lpr.data.sampler.mixture import Subset, subsets
from megatron_lpr.data.sampler.replay_sampler import BatchCounts, Pick, ReplaySampler
from megatron_lpr.data.text.tokenize import Tokenizer, load_tokenizer
from megatron_lpr.errors import UserError
from megatron_lpr.recipe.fields import MOST_SAMPLES
from megatron_lpr.recipe.settings import DataConfig, Recipe, ReplayConfig, TrainConfig

_FILLED = 0.8  # a larger share of labelled positions is worth no word
_MOST_EPOCHS = 4  # text that is read more often teaches less each time (arXiv 2305.16264)
_SHOWN_CORPORA = 3
_SHOWN_TOKENS = 40
_SHOWN_CHARACTERS = 80


def data_plan(recipe: Recipe, steps: int | None = None) -> str:
    """Tokens (positions with a label), share and epochs of every role, language and corpus in the first `steps`.

    Raises:
        UserError: the recipe trains nothing, no run has so many `steps`, or the data is at fault.
    """
    train, data = _sections(recipe)
    sampler = _sampler(train, data)
    steps = train.steps if steps is None else steps
    most = MOST_SAMPLES // train.global_batch_size
    if not 1 <= steps <= most:
        raise UserError(f"--steps: {steps}; at least 1, at most {most}")
    samples = steps * train.global_batch_size
    manifest, counts = sampler.manifest, sampler.count(0, samples)
    head = [
        f"{manifest.path}  digest {manifest.digest[:12]}, tokenizer {manifest.tokenizer.name}",
        f"{steps:,} steps x {train.global_batch_size:,} samples x {sampler.seq_length:,} positions: "
        f"{samples:,} samples, {counts.tokens:,} tokens; windows: {data.windows}, seed {sampler.seed}",
    ]
    told = (*short_windows(manifest, sampler), *repeated(train, sampler), *without_effect(train, data, sampler))
    warnings = (f"warning: {sentence}" for sentence in told)
    return "\n".join([*head, *_mixtures(train, sampler), *_table(_tree(sampler, samples, counts)), *warnings])


def unshuffled(manifest: Manifest, replay: ReplayConfig) -> list[str]:
    """A warning for each corpus of which a subset is read and whose documents we did not shuffle."""
    return [
        f"corpus '{corpus.name}' was not written by megatron-lpr preprocess: its subset is a run of consecutive "
        "documents, a random one only if the corpus is shuffled"
        for corpus, part in zip(manifest.corpora, subsets(manifest, replay), strict=True)
        if part != Subset() and corpus.source is None
    ]


def without_effect(train: TrainConfig, data: DataConfig, sampler: ReplaySampler) -> Iterator[str]:
    """A warning for each mixture that the run ends before, and for each limit of replay that limits nothing."""
    samples = train.steps * train.global_batch_size
    for number, entry in enumerate(data.schedule):
        if entry.from_sample >= samples:
            yield (
                f"data.schedule[{number}]: has no effect: it takes over at sample {entry.from_sample:,}, and the run "
                f"ends before ({samples:,} samples: train.steps x train.global_batch_size)"
            )
    if not (data.replay.documents or data.replay.tokens):
        return
    counts = zip(sampler.manifest.corpora, sampler.samples_before(samples), strict=True)
    read = [corpus for corpus, count in counts if count]
    for field, limits in (("documents", data.replay.documents), ("tokens", data.replay.tokens)):
        for key, wanted in limits.items():
            there: Counter[str] = Counter()  # documents of each language that the limit is for
            for corpus in read:
                if key in (corpus.role, corpus.language):
                    there[corpus.language] += corpus.documents
            if not there:
                yield f"data.replay.{field}.{key}: has no effect: the run reads nothing of it (data.mixture)"
            elif field == "documents" and wanted > max(there.values()):
                has = ", ".join(f"{language} has {documents:,}" for language, documents in there.items())
                yield f"data.replay.documents.{key}: {wanted:,}, more than there are, so that all are read ({has})"


def repeated(train: TrainConfig, sampler: ReplaySampler) -> list[str]:
    """A warning where a run reads the same text again and again; routers alone, of a review, learn little by heart."""
    if train.trainable == "routers":
        return []
    passes = sampler.epochs_before(train.steps * train.global_batch_size)
    names = (corpus.name for corpus in sampler.manifest.corpora)
    epochs = {name: its for name, its in zip(names, passes, strict=True) if its > _MOST_EPOCHS}
    if not epochs:
        return []
    most = sorted(epochs, key=lambda name: epochs[name], reverse=True)[:_SHOWN_CORPORA]
    named = ", ".join(f"'{name}' {epochs[name]:,.1f} times" for name in most)
    others = f" and {len(epochs) - len(most):,} more" if len(epochs) > len(most) else ""
    return [
        f"the run reads {named}{others}: text that is read more than {_MOST_EPOCHS} times teaches less each time; add "
        "text, lower the corpus' weight (data.schedule), or shorten train.steps"
    ]


def short_windows(manifest: Manifest, sampler: ReplaySampler) -> list[str]:
    """A warning for each corpus that is read and fills its windows badly, because it, or its documents, are too short.

    Where a sample is one document the share is an upper bound: documents longer than the window lose their rest.
    """
    sentences = []
    for i, corpus in enumerate(manifest.corpora):
        if not any(mixture.shares[i] for mixture in sampler.mixtures):
            continue
        windows, tokens = sampler.num_windows(i), sampler.num_tokens(i)
        of_documents = sampler.windows == "document"
        share = (tokens - (windows if of_documents else 1)) / (windows * sampler.seq_length)
        if share < _FILLED:
            what = f"{windows:,} documents" if of_documents else f"{windows:,} window{'s' if windows > 1 else ''}"
            way_out = "choose data.windows: packed" if of_documents else "join it with another corpus"
            percent = f"{'at most ' if of_documents else ''}{share:.1%}"
            sentences.append(
                f"corpus '{corpus.name}': {percent} of the positions of its samples have a label ({tokens:,} tokens in "
                f"{what} of {sampler.seq_length:,} positions); {way_out}, or a smaller data.seq_length"
            )
    return sentences


def _sections(recipe: Recipe) -> tuple[TrainConfig, DataConfig]:
    if recipe.data is None or recipe.train is None:
        raise UserError("inspect-data: the recipe describes no training run (it needs the sections data and train)")
    return recipe.train, recipe.data


def _sampler(train: TrainConfig, data: DataConfig) -> ReplaySampler:
    return ReplaySampler.of(Manifest.load(data.manifest), data, train.seed, document_ids=True)


def _mixtures(train: TrainConfig, sampler: ReplaySampler) -> Iterator[str]:
    yield "mixtures"
    for number, mixture in enumerate(sampler.mixtures):
        shares = ", ".join(
            f"{corpus.name} {_percent(share)}"
            for corpus, share in zip(sampler.manifest.corpora, mixture.shares, strict=True)
            if share
        )
        step = mixture.first_sample // train.global_batch_size + 1
        branch = _branch(number, len(sampler.mixtures))
        yield f"{branch}from sample {mixture.first_sample:,} (step {step:,}): {shares}"


def _tree(sampler: ReplaySampler, samples: int, counts: BatchCounts) -> Iterator[tuple[str, ...]]:
    manifest = sampler.manifest
    per_language, total = counts.tokens_per_language, max(counts.tokens, 1)
    read, epochs = sampler.samples_before(samples), sampler.epochs_before(samples)
    # of a document an epoch of such samples has the first positions alone
    there = "tokens of the documents" if sampler.windows == "document" else "tokens in an epoch"
    yield "data", "tokens", "share", "samples", "epochs", there
    for role in ROLES:
        languages = [language for language, its in manifest.language_roles.items() if its == role]
        tokens = sum(per_language[language] for language in languages)
        yield role, f"{tokens:,}", _percent(tokens / total), "", "", ""
        for number, language in enumerate(languages):
            branch = _branch(number, len(languages))
            share = _percent(per_language[language] / total)
            yield branch + language, f"{per_language[language]:,}", share, "", "", ""
            stem = "   " if number + 1 == len(languages) else "│  "
            corpora = [i for i, corpus in enumerate(manifest.corpora) if corpus.language == language]
            for place, i in enumerate(corpora):
                corpus = manifest.corpora[i]
                mixed = f" ({', '.join(corpus.languages)})" if corpus.languages else ""
                name = f"{stem}{_branch(place, len(corpora))}{corpus.name}{mixed}"
                yield name, "", "", f"{read[i]:,}", f"{epochs[i]:.3f}", f"{sampler.num_tokens(i):,}"


def _table(tree: Iterator[tuple[str, ...]]) -> Iterator[str]:
    """Rows of cells as aligned lines."""
    rows = list(tree)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for name, *cells in rows:
        aligned = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        yield "  ".join([name.ljust(widths[0]), *aligned]).rstrip()


def _branch(number: int, of: int) -> str:
    return "└─ " if number + 1 == of else "├─ "


def _percent(share: float | Fraction) -> str:
    return f"{float(share):.4%}" if 0 < share < 0.001 or 0.999 < share < 1 else f"{float(share):.1%}"


class DocumentPlace(TypedDict):
    """A piece of a document that a sample of a run holds."""

    sample: int
    corpus: str
    document: int  # in the corpus, from 0 on
    first_token: int  # in the corpus
    tokens: int


def documents_of(manifest: Manifest, data: DataConfig, seed: int, samples: Iterable[int]) -> list[DocumentPlace]:
    """What samples of a run hold, in their order.

    Raises:
        UserError: a corpus cannot be read.
    """
    sampler = ReplaySampler.of(manifest, data, seed, document_ids=True)
    return [
        DocumentPlace(
            sample=k, corpus=manifest.corpora[pick.corpus].name, document=document, first_token=first, tokens=count
        )
        for k in samples
        for pick in [sampler.pick(k)]
        for document, first, count in sampler.documents(pick)
    ]


def step_documents(recipe: Recipe, step: int) -> str:
    """The samples of optimizer step `step` (the first is 1), and how each of their documents begins there.

    Raises:
        UserError: as `data_plan`, or no such step.
    """
    train, data = _sections(recipe)
    sampler = _sampler(train, data)
    if not 1 <= step <= train.steps:
        raise UserError(f"--step: {step} of {train.steps:,} steps; choose 1 to {train.steps:,}")
    samples = train.global_batch_size
    first = (step - 1) * samples
    tokenizer, note = _tokenizer(recipe, sampler.manifest)
    lines = [f"step {step:,}: samples {first:,} to {first + samples - 1:,}{note}"]
    for k in range(first, first + samples):
        pick = sampler.pick(k)
        corpus = sampler.manifest.corpora[pick.corpus]
        where = f"{corpus.name} ({corpus.language}, {corpus.role}), epoch {pick.epoch}, window {pick.window:,}"
        lines.append(f"sample {k:,}: {where}")
        lines += _documents(sampler, pick, IndexedCorpus(corpus.prefix), tokenizer)  # a step may read of thousands
    return "\n".join(lines)


def _documents(sampler: ReplaySampler, pick: Pick, corpus: IndexedCorpus, tokenizer: Tokenizer | None) -> Iterator[str]:
    for document, first, count in sampler.documents(pick):
        ids = corpus.tokens[first : first + min(count, _SHOWN_TOKENS)].tolist()
        text = " ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(ids)
        text = " ".join(text.split())
        shown = text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"
        yield f"  document {document:,}, tokens {first:,} to {first + count - 1:,}: {shown}"


def _tokenizer(recipe: Recipe, manifest: Manifest) -> tuple[Tokenizer | None, str]:
    """The tokenizer that wrote the corpora, or None and why token ids are shown instead of text."""
    path = recipe.preprocess.tokenizer or recipe.model.base
    try:
        tokenizer = load_tokenizer(path)
    except UserError as error:
        return None, f" (token ids: {error})"
    if tokenizer.sha256 != manifest.tokenizer.sha256:
        return None, f" (token ids: {path} is not the tokenizer that wrote the corpora)"
    return tokenizer, ""
