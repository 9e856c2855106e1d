"""Our own models as models to evaluate."""

import dataclasses

import pytest
import torch
from harness import scramble, upcycle_base

from megatron_lpr.data.text.tokenize import load_tokenizer
from megatron_lpr.evaluation.windows import tokenized
from megatron_lpr.recipe.reading import from_tree
from megatron_lpr.recipe.settings import Recipe
from megatron_lpr.recipe.text_settings import EvaluationConfig, EvaluationCorpus


def test_routing_statistics_are_those_of_the_text_alone(megatron, toy_base):
    """Nothing behind the end of the text counts, wherever windows end; with seventeen tokens in windows of 64 too."""
    from megatron_lpr.evaluation.megatron_model import MegatronModel
    from megatron_lpr.model.builder import routers
    from megatron_lpr.model.router_stats import TOKENS

    tree = {"name": "x", "output": "none", "model": {"base": str(toy_base), "num_experts": 3, "topk": 1}}
    model = MegatronModel(from_tree(Recipe, tree, where="test"), upcycle_base)
    scramble(model.module)
    model.collect_routing(1)
    corpus = EvaluationCorpus(name="x", files=("x",), language="qaa", role="expanded")
    text = tokenized(load_tokenizer(str(toy_base)), corpus, ["seventeen letters"])
    slots = []
    for router in routers(model.module):
        router.register_forward_hook(lambda module, inputs, output: slots.append(output[1].sum(0)))

    def score(window: int, batch: int = 1):
        slots.clear()
        settings = EvaluationConfig(window=window, batch=batch)
        model.recipe = dataclasses.replace(model.recipe, evaluation=settings)
        (nats,) = model.nats([text])
        counted = [router.stats.sums_LC[0, TOKENS].item() for router in routers(model.module)]
        return nats, counted, model.frozen_shares()[0].tolist()

    nats, counted, shares = score(18)  # the end-of-document token that opens the stream, and the letters
    assert shares == pytest.approx([(layer[0] / 18).item() for layer in slots])
    assert torch.stack(slots).sum(-1).tolist() == [18, 18]
    assert score(64) == (pytest.approx(nats), counted, pytest.approx(shares))
    for window in (7, 17):
        assert score(window, batch=2)[1] == counted == [18, 18]


def test_texts_that_share_passes_cost_and_route_as_they_do_alone(megatron, toy_base):
    from megatron_lpr.evaluation.megatron_model import MegatronModel

    tree = {"name": "x", "output": "none", "model": {"base": str(toy_base), "num_experts": 3, "topk": 1}}
    model = MegatronModel(from_tree(Recipe, tree, where="test"), upcycle_base)
    scramble(model.module)
    tokenizer = load_tokenizer(str(toy_base))
    corpus = EvaluationCorpus(name="x", files=("x",), language="qaa", role="expanded")
    texts = [tokenized(tokenizer, corpus, [words]) for words in ("a", "several windows of 8", "zzzzzzz", "short")]

    def found(texts, batch):
        model.recipe = dataclasses.replace(model.recipe, evaluation=EvaluationConfig(window=8, batch=batch))
        model.collect_routing(len(texts))
        nats = model.nats(texts)
        return nats, [shares.tolist() for shares in model.frozen_shares()]

    alone = [found([text], 1) for text in texts]
    assert len({str(shares) for _, shares in alone}) == len(texts)
    for batch in (1, 3, 100):
        nats, shares = found(texts, batch)
        assert nats == [pytest.approx(one, rel=1e-6) for (one,), _ in alone]
        assert shares == [pytest.approx(one, rel=1e-12) for _, (one,) in alone]
