"""Results of several models side by side, whatever was measured."""

from collections.abc import Sequence
from pathlib import Path

from megatron_lpr.errors import UserError
from megatron_lpr.evaluation.retention import EvaluationResult, markdown, retention_note, retention_rows
from megatron_lpr.evaluation.tasks import TaskResult, is_task_result, task_note, task_rows


def comparison(files: Sequence[str | Path]) -> str:
    """The Markdown table of result files, the base model's first, and what it says below it."""
    rows, note = compared(files)
    return f"{markdown(rows, left_columns=3)}\n\n{note}"


def compared(files: Sequence[str | Path]) -> tuple[list[list[str]], str]:
    """The rows of the table, the header first, and the note: of bits per byte, or of tasks.

    Raises:
        UserError: a file that is no result, or some of one kind and some of the other.
    """
    of_tasks = [file for file in files if is_task_result(file)]
    if not of_tasks:
        results = [EvaluationResult.load(file) for file in files]
        return retention_rows(results), retention_note(results)
    if len(of_tasks) < len(files):
        other = next(file for file in files if file not in of_tasks)
        raise UserError(
            f"evaluation result {of_tasks[0]} is of tasks and {other} of bits per byte: compare those of one kind"
        )
    scores = [TaskResult.load(file) for file in files]
    return task_rows(scores), task_note(scores)
