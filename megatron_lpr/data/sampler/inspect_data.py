"""What a training recipe reads, for people: the data plan as a tree, and the documents of one step."""

from collections.abc import Iterator

from megatron_lpr.data.corpus.indexed import IndexedCorpus
from megatron_lpr.data.corpus.manifest import ROLES, Manifest
from megatron_lpr.data.sampler.replay_sampler import BatchCounts, Pick, ReplaySampler
from megatron_lpr.data.sampler.subset import short_windows
from megatron_lpr.data.text.tokenize import Tokenizer, load_tokenizer
from megatron_lpr.errors import UserError
from megatron_lpr.recipe.settings import Recipe

_SHOWN_TOKENS = 40
_SHOWN_CHARACTERS = 80


def data_plan(recipe: Recipe, steps: int | None = None) -> str:
    """Tokens (positions with a label), share and epochs of every role, language and corpus in the first `steps`.

    Raises:
        UserError: the recipe trains nothing, `steps` is below 1, or the data is at fault.
    """
    sampler = _sampler(recipe)
    steps = recipe.train.steps if steps is None else steps
    if steps < 1:
        raise UserError(f"--steps: {steps}; at least 1")
    samples = steps * recipe.train.global_batch_size
    manifest, counts = sampler.manifest, sampler.count(0, samples)
    head = [
        f"{manifest.path}  digest {manifest.digest[:12]}, tokenizer {manifest.tokenizer.name}",
        f"{steps:,} steps x {recipe.train.global_batch_size:,} samples x {sampler.seq_length:,} positions: "
        f"{samples:,} samples, {counts.tokens:,} tokens; windows: {recipe.data.windows}, seed {sampler.seed}",
    ]
    warnings = (f"warning: {sentence}" for sentence in short_windows(manifest, sampler))
    return "\n".join([*head, *_mixtures(recipe, sampler), *_table(_tree(sampler, samples, counts)), *warnings])


def _sampler(recipe: Recipe) -> ReplaySampler:
    if recipe.data is None or recipe.train is None:
        raise UserError("inspect-data: the recipe describes no training run (it needs the sections data and train)")
    return ReplaySampler.of(Manifest.load(recipe.data.manifest), recipe.data, recipe.train.seed, document_ids=True)


def _mixtures(recipe: Recipe, sampler: ReplaySampler) -> Iterator[str]:
    yield "mixtures"
    for number, mixture in enumerate(sampler.mixtures):
        shares = ", ".join(
            f"{corpus.name} {_percent(share)}"
            for corpus, share in zip(sampler.manifest.corpora, mixture.shares, strict=True)
            if share
        )
        step = mixture.first_sample // recipe.train.global_batch_size + 1
        branch = _branch(number, len(sampler.mixtures))
        yield f"{branch}from sample {mixture.first_sample:,} (step {step:,}): {shares}"


def _tree(sampler: ReplaySampler, samples: int, counts: BatchCounts) -> Iterator[tuple[str, ...]]:
    manifest = sampler.manifest
    per_language, total = counts.tokens_per_language, max(counts.tokens, 1)
    read = sampler.samples_before(samples)
    yield "data", "tokens", "share", "samples", "epochs", "tokens in an epoch"
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
                epochs = f"{read[i] / sampler.num_windows(i):.3f}"
                yield name, "", "", f"{read[i]:,}", epochs, f"{sampler.num_tokens(i):,}"


def _table(tree: Iterator[tuple[str, ...]]) -> Iterator[str]:
    """Rows of cells as aligned lines."""
    rows = list(tree)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for name, *cells in rows:
        aligned = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        yield "  ".join([name.ljust(widths[0]), *aligned]).rstrip()


def _branch(number: int, of: int) -> str:
    return "└─ " if number + 1 == of else "├─ "


def _percent(share: float) -> str:
    return f"{float(share):.4%}" if 0 < share < 0.001 or 0.999 < share < 1 else f"{float(share):.1%}"


def step_documents(recipe: Recipe, step: int) -> str:
    """The samples of optimizer step `step` (the first is 1), and how each of their documents begins there.

    Raises:
        UserError: as `data_plan`, or no such step.
    """
    sampler = _sampler(recipe)
    if not 1 <= step <= recipe.train.steps:
        raise UserError(f"--step: {step} of {recipe.train.steps:,} steps; choose 1 to {recipe.train.steps:,}")
    samples = recipe.train.global_batch_size
    first = (step - 1) * samples
    tokenizer, note = _tokenizer(recipe, sampler.manifest)
    lines = [f"step {step:,}: samples {first:,} to {first + samples - 1:,}{note}"]
    files: dict[int, IndexedCorpus] = {}
    for k in range(first, first + samples):
        pick = sampler.pick(k)
        corpus = sampler.manifest.corpora[pick.corpus]
        files.setdefault(pick.corpus, IndexedCorpus(corpus.prefix))
        where = f"{corpus.name} ({corpus.language}, {corpus.role}), epoch {pick.epoch}, window {pick.window:,}"
        lines.append(f"sample {k:,}: {where}")
        lines += _documents(sampler, pick, files[pick.corpus], tokenizer)
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
