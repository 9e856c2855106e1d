"""How many tokens the output layer takes at once (output_layer.py); without Megatron, for plans reckon with it too."""

CHUNK_BYTES = 1 << 28  # of a chunk's logits in fp32; a product of less would no longer keep a GPU busy


def rows_at_once(tokens: int, columns: int, chunk_bytes: int = CHUNK_BYTES) -> int:
    """All `tokens` where their logits over `columns` of the vocabulary are one chunk, else those of one, 1 at least."""
    a_row = 4 * columns
    return tokens if a_row * tokens <= chunk_bytes else max(1, chunk_bytes // a_row)
