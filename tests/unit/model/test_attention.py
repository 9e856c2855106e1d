"""SDPACoreAttention against a softmax over an explicit mask, whole and in context-parallel parts.

Shapes: S positions, B sequences, N heads, G key/value groups, D head size.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

BATCH, HEADS, GROUPS, SIZE = 2, 4, 2, 8


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    """query, key, value and the gradient of the output; 24 positions."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(24, BATCH, *shape, generator=generator, dtype=torch.float64)

    made = {"query": draw(HEADS, SIZE), "key": draw(GROUPS, SIZE), "value": draw(GROUPS, SIZE)}
    for tensor in made.values():
        tensor.requires_grad_()
    return made | {"grad": draw(HEADS * SIZE)}


def explicit_attention(
    query: Tensor, key: Tensor, value: Tensor, *, window: int = 1000, documents_BS: Tensor | None = None
) -> Tensor:
    """Head by head, over all scores; a query sees `window` positions, its own included, of its own document."""
    length, heads = len(query), []
    distance_SS = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    hidden_BSS = ((distance_SS < 0) | (distance_SS >= window)).expand(BATCH, -1, -1)
    if documents_BS is not None:
        hidden_BSS = hidden_BSS | (documents_BS[:, None, :] != documents_BS[:, :, None])
    for head in range(HEADS):
        group = head // (HEADS // GROUPS)
        scores_BSS = torch.einsum("sbd,tbd->bst", query[:, :, head], key[:, :, group]) / SIZE**0.5
        weights_BSS = scores_BSS.masked_fill(hidden_BSS, -torch.inf).softmax(-1)
        heads.append(torch.einsum("bst,tbd->sbd", weights_BSS, value[:, :, group]))
    return torch.cat(heads, dim=-1)


def gradients(output: Tensor, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(output, [tensors[name] for name in ("query", "key", "value")], tensors["grad"])


def in_parts(
    tensors: dict[str, Tensor],
    size: int,
    monkeypatch,
    *,
    window_size: tuple[int, int] | None = None,
    documents_BS: Tensor | None = None,
) -> Tensor:
    """The outputs of `size` context-parallel ranks, one after the other in this process, at their positions."""
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_lpr.model import attention

    chunks = torch.arange(24).chunk(2 * size)
    positions = [torch.cat([chunks[rank], chunks[2 * size - 1 - rank]]) for rank in range(size)]
    both = torch.cat([tensors["key"], tensors["value"]], dim=-1)
    monkeypatch.setattr(
        attention,
        "gather_from_sequence_parallel_region",
        lambda local, group: torch.cat([both[own] for own in positions]),
    )
    output = torch.zeros_like(tensors["grad"])
    for rank, own in enumerate(positions if size > 1 else [torch.arange(24)]):
        group = SimpleNamespace(size=lambda: size, rank=lambda rank=rank: rank)
        core = attention.SDPACoreAttention(
            SimpleNamespace(attention_dropout=0.0, window_size=window_size),
            layer_number=1,
            attn_mask_type=AttnMaskType.causal,
            attention_type="self",
            pg_collection=SimpleNamespace(cp=group),
        )
        local = (tensors[name][own] for name in ("query", "key", "value"))
        output = output.index_add(0, own, core(*local, documents_BK=documents_BS))
    return output


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_parts_make_the_whole(megatron, monkeypatch, tensors, size):
    expected = explicit_attention(tensors["query"], tensors["key"], tensors["value"])
    output = in_parts(tensors, size, monkeypatch)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    for got, want in zip(gradients(output, tensors), gradients(expected, tensors), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("window", [1, 2, 5, 23, 24, 30])
@pytest.mark.parametrize("apart", [False, True])
def test_a_window(megatron, monkeypatch, tensors, size, window, apart):
    """Megatron's window_size counts the positions to the left."""
    seen = {"documents_BS": documents() if apart else None}
    expected = explicit_attention(tensors["query"], tensors["key"], tensors["value"], window=window, **seen)
    output = in_parts(tensors, size, monkeypatch, window_size=(window - 1, 0), **seen)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    for got, want in zip(gradients(output, tensors), gradients(expected, tensors), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def documents() -> Tensor:
    """Document numbers [B, S], int32."""
    lengths = [[5, 1, 10, 8], [12, 12]]
    return torch.stack([torch.repeat_interleave(torch.arange(len(n)), torch.tensor(n)) for n in lengths]).int()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_documents_are_kept_apart(megatron, monkeypatch, tensors, size):
    expected = explicit_attention(tensors["query"], tensors["key"], tensors["value"], documents_BS=documents())
    output = in_parts(tensors, size, monkeypatch, documents_BS=documents())
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    for got, want in zip(gradients(output, tensors), gradients(expected, tensors), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2])
def test_layers_share_the_mask_of_documents(megatron, monkeypatch, tensors, size):
    """It has as many numbers as the scores of one head, and each layer keeps it for the backward pass."""
    from megatron_lpr.model import attention

    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.ndim == 4 and tensor.shape[:2] == (BATCH, 1):
            kept[tensor.data_ptr()] = tensor
        return tensor

    of_micro_batch = documents()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = [in_parts(tensors, size, monkeypatch, documents_BS=of_micro_batch) for _ in range(3)]
    assert torch.equal(outputs[0], outputs[2])
    lengths = {1: [(24, 24)], 2: [(6, 6), (6, 24), (6, 12), (6, 18)]}[size]
    assert sorted(mask.shape[2:] for mask in kept.values()) == sorted(lengths)
    assert of_micro_batch in attention._masks
    del of_micro_batch
    assert not attention._masks


def test_a_rank_reads_no_key_behind_its_last_query(megatron, monkeypatch, tensors):
    """Each chunk of queries gets the keys up to its own end, not a masked whole."""
    from megatron_lpr.model.attention import SDPACoreAttention

    read, attend = [], SDPACoreAttention._attend

    def record(self, query, key, value, documents):
        read.append((len(query), len(key), len(value)))
        return attend(self, query, key, value, documents)

    monkeypatch.setattr(SDPACoreAttention, "_attend", record)
    in_parts(tensors, 2, monkeypatch)
    assert read == [(6, 6, 6), (6, 24, 24), (6, 12, 12), (6, 18, 18)]
