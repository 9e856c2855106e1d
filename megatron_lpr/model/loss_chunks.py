"""How many tokens the output layer takes at once (output_layer.py); without Megatron, for plans reckon with it too."""

# Of a chunk's logits in fp32. A GPU's 132 multiprocessors want 2,000 rows in the product with which the gradient goes
# back to the hidden states, which has few columns; that is a gigabyte over a vocabulary of 128,000.
CHUNK_BYTES = 1 << 30


def rows_at_once(tokens: int, columns: int, chunk_bytes: int = CHUNK_BYTES) -> int:
    """All `tokens` where their logits over `columns` of the vocabulary are one chunk, else those of one, 1 at least."""
    a_row = 4 * columns
    return tokens if a_row * tokens <= chunk_bytes else max(1, chunk_bytes // a_row)
