"""Sizes in bytes, as users write them."""

from megatron_lpr.errors import UserError

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_size(text: str) -> int:
    """Bytes of '500MB' or '4GB' (decimal units, as Hugging Face counts).

    Raises:
        UserError: neither a number nor a number with a unit.
    """
    unit = text[-2:].upper()
    number, factor = (text[:-2], _UNITS[unit]) if unit in _UNITS else (text, 1)
    try:
        size = int(float(number) * factor)
    except (ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise UserError(f"max_shard_size: '{text}' is no size; write it as 500MB or 4GB")
    return size
