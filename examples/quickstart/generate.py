"""What the base model and an export say to the same words, side by side, in the new language and in old ones.

    python examples/quickstart/generate.py BASE EXPORT [--prompt "A program" ...]

Stock transformers, nothing of this project: the export is an ordinary Hugging Face folder. The likeliest token is taken
at each place, so that the answers are the same each time.
"""

import argparse
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

PROMPTS = ("A program segítségével", "The Debian operating system", "El sistema operativo")
TOKENS = 24


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="folder of the base model")
    parser.add_argument("export", help="folder that megatron-lpr export has written")
    parser.add_argument(
        "--prompt", action="append", help="words to go on from; several times (default: the quickstart's)"
    )
    parser.add_argument("--tokens", type=int, default=TOKENS, metavar="N", help="of an answer (default: %(default)s)")
    options = parser.parse_args()
    models = {"base": options.base, "export": options.export}
    for folder in models.values():
        if not (Path(folder) / "config.json").is_file():
            sys.exit(f"generate: {folder} is no folder of a Hugging Face model: it has no config.json")
    if options.tokens < 1:
        sys.exit(f"generate: --tokens {options.tokens}: at least 1")
    print(side_by_side(models, options.prompt or PROMPTS, options.tokens))
    return 0


def side_by_side(models: Mapping[str, str | Path], prompts: Iterable[str] = PROMPTS, tokens: int = TOKENS) -> str:
    """Markdown: each prompt, and under it how each model goes on.

    Args:
        models: folders by the names that the text calls them, as {"base": ..., "export": ...}.
        tokens: of each answer at most.
    """
    prompts = list(prompts)
    answers = {name: continuations(folder, prompts, tokens) for name, folder in models.items()}
    lines = []
    for number, prompt in enumerate(prompts):
        lines.append(f"* **{prompt}** …")
        lines += [f"  * {name}: {found[number]}" for name, found in answers.items()]
    return "\n".join(lines)


def continuations(folder: str | Path, prompts: Iterable[str], tokens: int) -> list[str]:
    """What a model says next to each prompt, on one line each."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of loading, which leaves a line of hundreds of bars where nobody watches
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    found = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        generated = model.generate(
            **inputs,
            max_new_tokens=tokens,
            do_sample=False,
            repetition_penalty=1.3,
            pad_token_id=tokenizer.eos_token_id,
        )
        new = generated[0, inputs["input_ids"].shape[1] :]
        found.append(" ".join(tokenizer.decode(new, skip_special_tokens=True).split()))
    return found


if __name__ == "__main__":
    sys.exit(main())
