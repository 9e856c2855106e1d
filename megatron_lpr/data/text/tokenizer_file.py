"""Which file of a model's folder is its tokenizer."""

from pathlib import Path

from megatron_lpr.errors import UserError
from megatron_lpr.files.unexpanded import refuse_unexpanded


def tokenizer_file(path: Path) -> Path:
    """In a folder, or `path` itself where it is a file. UserError: there is none."""
    if path.is_file():
        return path
    if not path.is_dir():
        refuse_unexpanded(path)
        raise UserError(f"no tokenizer at {path}: there is no such folder or file")
    models = sorted(path.glob("*.model"))
    candidates = [path / "tokenizer.json", path / "tokenizer.model", *(models if len(models) == 1 else [])]
    for file in candidates:
        if file.is_file():
            return file
    raise UserError(f"no tokenizer in {path}: expected tokenizer.json or a SentencePiece .model file")
