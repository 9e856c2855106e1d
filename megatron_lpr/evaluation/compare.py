"""Results of several models side by side, whatever was measured."""

from collections.abc import Sequence
from pathlib import Path

from megatron_lpr.errors import UserError
from megatron_lpr.evaluation.retention import EvaluationResult, retention_table
from megatron_lpr.evaluation.tasks import TaskResult, is_task_result, task_table


def comparison(files: Sequence[str | Path]) -> str:
    """The table of result files, the base model's first: of bits per byte, or of tasks.

    Raises:
        UserError: a file that is no result, or some of one kind and some of the other.
    """
    of_tasks = [file for file in files if is_task_result(file)]
    if not of_tasks:
        return retention_table([EvaluationResult.load(file) for file in files])
    if len(of_tasks) < len(files):
        other = next(file for file in files if file not in of_tasks)
        raise UserError(
            f"evaluation result {of_tasks[0]} is of tasks and {other} of bits per byte: compare those of one kind"
        )
    return task_table([TaskResult.load(file) for file in files])
