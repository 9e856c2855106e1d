"""Benchmarks by lm-evaluation-harness: what an export, or any Hugging Face model, scores, and what was kept."""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_lpr.data.text.special_tokens import special_tokens
from megatron_lpr.data.text.tokenize import load_tokenizer
from megatron_lpr.errors import UserError, warn
from megatron_lpr.evaluation.result_file import read_result
from megatron_lpr.evaluation.retention import markdown
from megatron_lpr.evaluation.task_names import BENCHMARKS, Task, tasks_of
from megatron_lpr.files import durable
from megatron_lpr.files.output_place import check_file
from megatron_lpr.platform import device
from megatron_lpr.recipe.settings import Recipe


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """A model's score in one task; more is better."""

    benchmark: str
    language: str
    role: str
    name: str  # of the task in the harness
    metric: str
    shots: int
    score: float


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """All scores of one model; `bos` whether a token opened each prompt."""

    model: str
    tasks: tuple[TaskScore, ...]
    bos: bool

    def save(self, path: str | Path) -> None:
        """Write the result as JSON. UserError as `check_file`."""
        check_file(path)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        durable.write_text(Path(path), json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "TaskResult":
        """Read a result that `save` wrote. UserError where it is none."""
        return read_result(cls, path, "megatron-lpr evaluate --tasks")


def is_task_result(path: str | Path) -> bool:
    """Whether a file says that it is a `TaskResult`."""
    try:
        tree = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(tree, dict) and "tasks" in tree


def check_tasks(benchmarks: Sequence[str], recipe: Recipe) -> list[Task]:
    """The tasks in the languages of a recipe's held-out corpora; warns of those that the harness does not have.

    Raises:
        UserError: the package is not installed; as `tasks_of`; the recipe names no languages.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--tasks: needs lm-evaluation-harness: pip install 'megatron-lpr[harness]', or leave it out")
    from lm_eval.tasks import TaskManager

    languages = {corpus.language: corpus.role for corpus in recipe.evaluation.corpora}
    if not languages:
        raise UserError("evaluation.corpora: empty; --tasks takes languages and their roles from there")
    found, missing = tasks_of(benchmarks, languages, set(TaskManager().all_tasks))
    if missing:
        warn(f"--tasks: lm-evaluation-harness does not have {', '.join(missing)}; left out")
    return found


def run_tasks(folder: str | Path, tasks: Sequence[Task], recipe: Recipe, name: str) -> TaskResult:
    """Have the harness score the model in a folder; it fetches its data sets from the hub, or from their cache.

    Raises:
        UserError: a data set, the model or its tokenizer, which cannot be loaded.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    bos_id = load_tokenizer(str(folder), special=special_tokens(recipe.preprocess)).bos_id
    model = HFLM(
        pretrained=str(folder),
        device=str(device()),
        dtype=recipe.model.dtype,
        batch_size=recipe.evaluation.batch,
        add_bos_token=bos_id is not None,  # its own default is another one in each version
    )
    scores = []
    for task in tasks:
        benchmark = BENCHMARKS[task.benchmark]
        try:
            found = lm_eval.simple_evaluate(
                model=model, tasks=[task.name], num_fewshot=benchmark.shots, log_samples=False, bootstrap_iters=0
            )
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"--tasks: lm-evaluation-harness cannot run {task.name} ({type(error).__name__}: {reason}); it fetches "
                "its data sets from the hub, so call it once where there is a network, or leave the benchmark out"
            ) from error
        score = _score(found["results"][task.name], benchmark.metric)
        scores.append(TaskScore(**asdict(task), metric=benchmark.metric, shots=benchmark.shots, score=score))
    return TaskResult(model=name, tasks=tuple(scores), bos=bos_id is not None)


def task_table(results: Sequence[TaskResult]) -> str:
    """`task_rows` as a Markdown table, and what it says below it."""
    return f"{markdown(task_rows(results), left_columns=3)}\n\n{task_note(results)}"


def task_rows(results: Sequence[TaskResult]) -> list[list[str]]:
    """A table whose first row is the header, the base model's result first: scores, and what became of each language.

    Of an original language the share of the base's score that was kept, of an expanded one the difference.

    Raises:
        UserError: results of other tasks, or of prompts that opened otherwise.
    """
    base, *later = results
    rows = [["task", "language", "role", *(r.model for r in results), *(f"{r.model} vs {base.model}" for r in later)]]
    for result in later:
        if [_what(score) for score in result.tasks] != [_what(score) for score in base.tasks]:
            raise UserError(
                f"results of {base.model} and {result.model} are not of the same tasks: evaluate both with the same "
                "--tasks and languages"
            )
        if base.bos != result.bos:
            raise UserError(
                f"results of {base.model} and {result.model} are of prompts that open otherwise, one with a BOS token "
                "and one without: evaluate both with the same preprocess.bos"
            )
    for of_task in zip(*(result.tasks for result in results), strict=True):
        first, *others = of_task
        row = [first.name, first.language, first.role, *(f"{score.score:.3f}" for score in of_task)]
        rows.append(row + [_verdict(first, score) for score in others])
    return rows


def task_note(results: Sequence[TaskResult]) -> str:
    return f"Higher is better: {_metrics(results[0])}."


def _what(score: TaskScore) -> tuple:
    return score.name, score.language, score.role, score.metric, score.shots


def _verdict(base: TaskScore, model: TaskScore) -> str:
    if base.role == "original" and base.score:
        return f"{100 * model.score / base.score:.1f}% kept"
    return f"{model.score - base.score:+.3f}"


def _metrics(result: TaskResult) -> str:
    used = dict.fromkeys((score.benchmark, score.metric, score.shots) for score in result.tasks)
    return ", ".join(f"{benchmark} {metric}, {shots}-shot" for benchmark, metric, shots in used)


def _score(found: Mapping[str, float], metric: str) -> float:
    """The harness names a metric with the filter that its answers went through; without one it is `none`."""
    return next(float(value) for key, value in found.items() if key.split(",")[0] == metric)
