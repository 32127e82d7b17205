"""The accuracy matrix of a stream of tasks, kept as counts until the last division.

With c_ij correct of n_ij test examples of task j's classes, measured after training task i (j <= i):

    a_ij = c_ij / n_ij                         accuracy on task j after task i
    A_i  = sum_{j<=i} c_ij / sum_{j<=i} n_ij   accuracy over all classes seen so far
    F_AA = A_T,   AIA = mean_i A_i
    F    = mean_{j<T} (max_{i<T} a_ij - a_Tj)

where T is the last task that was trained: a run may stop early. All tasks share one set of logits.

References
----------
Fed-TaLoRA, arXiv 2505.12318, section on evaluation (F_AA, AIA); Chaudhry et al., ECCV 2018, arXiv 1801.10112
(forgetting).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, eq=False)
class TaskMatrix:
    """Count correct answers on each task's test data after each task.

    Parameters
    ----------
    correct
        (T, T) int64; row i: after training task i, column j <= i: correct answers on task j's test data.
    total
        (T, T) int64; examples that were judged; 0 where nothing was measured.

    Raises
    ------
    ValueError
        If the two are not square and of one shape, hold counts above the diagonal, or more correct answers
        than examples.
    """

    correct: NDArray[np.int64]  # (T, T)
    total: NDArray[np.int64]  # (T, T)

    def __post_init__(self) -> None:
        for name in ("correct", "total"):
            counts = np.array(getattr(self, name), dtype=np.int64)
            counts.setflags(write=False)
            object.__setattr__(self, name, counts)
        shape = self.total.shape
        if len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0 or self.correct.shape != shape:
            raise ValueError(f"correct and total must both be (T, T) with T >= 1, got {self.correct.shape} and {shape}")
        if (self.correct < 0).any() or (self.correct > self.total).any():
            i, j = np.argwhere((self.correct < 0) | (self.correct > self.total))[0]
            raise ValueError(
                f"correct must be in [0, total]; after task {i}, on task {j}: "
                f"{self.correct[i, j]} correct of {self.total[i, j]}"
            )
        if np.triu(self.total, k=1).any():
            i, j = np.argwhere(np.triu(self.total, k=1))[0]
            raise ValueError(f"task {j} was not seen yet after task {i}, but total[{i}, {j}] is not 0")

    @classmethod
    def empty(cls, num_tasks: int) -> "TaskMatrix":
        """Make a matrix of `num_tasks` tasks in which nothing is measured yet."""
        return cls(*np.zeros((2, num_tasks, num_tasks), dtype=np.int64))

    @property
    def num_tasks(self) -> int:
        """Return T, the number of tasks of the stream, trained or not."""
        return len(self.total)

    def with_row(self, task_id: int, correct: ArrayLike, total: ArrayLike) -> "TaskMatrix":
        """Return a matrix in which row `task_id` holds these counts.

        Parameters
        ----------
        task_id
            0-based task that was trained last.
        correct, total
            Counts of the tasks 0..task_id, shape (task_id + 1,), or of all tasks, shape (T,), with zeros
            past `task_id`.

        Raises
        ------
        ValueError
            If the task does not exist, or the counts have another length or are impossible.
        """
        if not 0 <= task_id < self.num_tasks:
            raise ValueError(f"task_id must be in [0, {self.num_tasks - 1}], got {task_id}")
        rows = []
        for name, matrix, given in (("correct", self.correct, correct), ("total", self.total, total)):
            counts = np.asarray(given, dtype=np.int64)
            if counts.shape not in ((task_id + 1,), (self.num_tasks,)):
                raise ValueError(
                    f"{name} of row {task_id} must hold {task_id + 1} counts (tasks 0..{task_id}) or "
                    f"{self.num_tasks} (all tasks), got shape {counts.shape}"
                )
            updated = matrix.copy()
            updated[task_id] = np.pad(counts, (0, self.num_tasks - len(counts)))
            rows.append(updated)
        return TaskMatrix(*rows)

    def accuracy(self) -> NDArray[np.float64]:
        """Return a_ij in [0, 1], shape (T, T), NaN where nothing was measured."""
        accuracy = np.full(self.total.shape, np.nan)
        np.divide(self.correct, self.total, out=accuracy, where=self.total > 0)
        return accuracy

    def last_task(self) -> int | None:
        """Return the 0-based task whose row was measured last, or None."""
        measured = np.flatnonzero(self.total.sum(axis=1))
        return int(measured[-1]) if len(measured) else None

    def accuracy_seen(self) -> tuple[float | None, ...]:
        """Return A_1..A_T in [0, 1], None for a task after which nothing was measured."""
        correct, total = self.correct.sum(axis=1), self.total.sum(axis=1)
        return tuple(float(c / n) if n else None for c, n in zip(correct, total, strict=True))

    def faa(self) -> float | None:
        """Return the final average accuracy: A after the last task that was trained."""
        last = self.last_task()
        return None if last is None else self.accuracy_seen()[last]

    def aia(self) -> float | None:
        """Return the average incremental accuracy: the mean of the measured A_i."""
        seen = [a for a in self.accuracy_seen() if a is not None]
        return sum(seen) / len(seen) if seen else None

    def forgetting(self) -> float | None:
        """Return by how much the tasks before the last fell from their best, on average.

        It is 0.0 after one task, negative where later tasks helped earlier ones, and None where no earlier
        task was measured both before and at the end.
        """
        last = self.last_task()
        if last is None or last == 0:
            return None if last is None else 0.0
        accuracy = self.accuracy()
        before, final = accuracy[:last, :last], accuracy[last, :last]
        best = np.where(np.isnan(before), -np.inf, before).max(axis=0)
        both = np.isfinite(best) & ~np.isnan(final)
        return float((best - final)[both].mean()) if both.any() else None

    def summary(self) -> dict[str, Any]:
        """Return what the run folder's metrics.json says of accuracy; null where nothing was measured."""
        return {
            "accuracy_matrix": [[None if np.isnan(a) else float(a) for a in row] for row in self.accuracy()],
            "accuracy_seen": list(self.accuracy_seen()),
            "faa": self.faa(),
            "aia": self.aia(),
            "forgetting": self.forgetting(),
        }

    def to_json(self) -> dict[str, list[list[int]]]:
        """Return the counts as plain lists, for a checkpoint."""
        return {"correct": self.correct.tolist(), "total": self.total.tolist()}

    @classmethod
    def from_json(cls, counts: Mapping[str, Sequence[Sequence[int]]]) -> "TaskMatrix":
        """Read back what `to_json` gave.

        Raises
        ------
        ValueError
            If a field is missing or the counts are impossible.
        """
        missing = {"correct", "total"} - set(counts)
        if missing:
            raise ValueError(f"a task matrix needs 'correct' and 'total', got no {sorted(missing)[0]!r}")
        return cls(np.array(counts["correct"]), np.array(counts["total"]))
