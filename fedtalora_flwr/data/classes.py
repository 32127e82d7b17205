"""Classes that nodes name themselves: one list of all names, which grows at its end and never moves a row."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from fedtalora_flwr.data.source import DataError
from fedtalora_flwr.data.stream import cut

MOST_CLASSES = 50_000  # of a run: each has a row in the head, on every node and in every message
# Characters that show nothing, as Unicode's Default_Ignorable_Code_Point, as far as Python calls them printable.
_UNSEEN = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")


class TooFewClasses(DataError):
    """The nodes that have been heard so far hold fewer classes than there are tasks."""


@dataclass(frozen=True)
class HeldClass:
    """What a node says that it holds of one class.

    Parameters
    ----------
    task
        Name of the task's folder; empty where the node has one folder a class and no tasks.
    name
        The class's name.
    num_train, num_test
        Examples to train on, and those held out to test on.
    """

    task: str
    name: str
    num_train: int
    num_test: int


@dataclass(frozen=True)
class ClassList:
    """The classes known so far, and the task or tasks that bring each.

    Parameters
    ----------
    names
        Name of each class, by its row in the head; empty for a class of which the reader knows no more than that.
    tasks
        Sorted rows by task id.
    task_names
        Name of each task's folder, by task id; none where the nodes have no task folders.
    """

    names: tuple[str, ...] = ()
    tasks: tuple[tuple[int, ...], ...] = ()
    task_names: tuple[str, ...] = ()

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self.names) if name}

    @cached_property
    def _task_ids(self) -> dict[str, int]:
        return {name: task_id for task_id, name in enumerate(self.task_names) if name}

    def seen(self, task_id: int) -> list[int]:
        """List the rows of a task and all before it, sorted."""
        return sorted({row for task in self.tasks[: task_id + 1] for row in task})

    def place(self, task: str, name: str) -> tuple[int, int] | None:
        """Give task id and row of a class in a node's folder, or None where the list does not have it there."""
        row = self._rows.get(name)
        if row is None:
            return None
        task_id = self._task_ids.get(task) if task else next((t for t, rows in enumerate(self.tasks) if row in rows), 0)
        return None if task_id is None or row not in self.tasks[task_id] else (task_id, row)

    def only(self, held: Iterable[HeldClass]) -> "ClassList":
        """Leave out the names that a node has not said itself; rows and tasks stay."""
        held = list(held)
        names, task_names = {one.name for one in held}, {one.task for one in held}
        return ClassList(
            names=tuple(name if name in names else "" for name in self.names),
            tasks=self.tasks,
            task_names=tuple(name if name in task_names else "" for name in self.task_names),
        )

    def grown(self, held: Iterable[HeldClass], *, next_task: int, num_tasks: int, seed: int | None) -> "ClassList":
        """Take in the classes that nodes hold; what is known already stays where it is.

        Task folders are put in order of their names, numbers in them by size, those that come later behind; a new
        class joins the task of its folder, unless that has begun. Without task folders the first classes are cut
        into `num_tasks`, and a new one joins the next task.

        Parameters
        ----------
        held
            What all nodes say.
        next_task
            The first task that has not begun; `num_tasks` if all have.
        num_tasks
            Tasks of the run.
        seed
            Of the order in which classes without task folders are cut; None: by name.

        Raises
        ------
        DataError
            If two names differ only by case, space or spelling in Unicode, some nodes have task folders and others
            none, the classes do not fit the number of tasks, or there are more than `MOST_CLASSES`.
        """
        folders = sorted({(one.task, one.name) for one in held})
        names = [*self.names, *(name for _, name in folders)]
        require_distinct(names)
        require_distinct([*self.task_names, *(task for task, _ in folders)], what="task")
        if len(set(names)) > MOST_CLASSES:
            raise DataError(f"the nodes name {len(set(names))} classes, a run has at most {MOST_CLASSES}")
        if not folders:
            return self
        tasks = {task for task, _ in folders}
        if ("" in tasks and len(tasks) > 1) or (self.names and ("" in tasks) == bool(self.task_names)):
            raise DataError("some nodes have one folder a class, others one folder a task; give all the same layout")
        if "" in tasks:
            return self._with_classes([name for _, name in folders], next_task, num_tasks, seed)
        return self._with_tasks(folders, next_task, num_tasks)

    def _with_classes(self, names: Sequence[str], next_task: int, num_tasks: int, seed: int | None) -> "ClassList":
        new = [name for name in names if name not in self._rows]
        if not self.names:
            if len(new) < num_tasks:
                raise TooFewClasses(
                    f"the nodes hold {len(new)} classes, too few for num-tasks {num_tasks}; lower num-tasks"
                )
            first = cut([(row,) for row in range(len(new))], num_tasks=num_tasks, seed=seed)
            return replace(self, names=tuple(new), tasks=tuple(tuple(sorted(rows)) for rows in first))
        if next_task >= num_tasks:
            return self
        rows = tuple(range(len(self.names), len(self.names) + len(new)))
        tasks = [task + rows if task_id == next_task else task for task_id, task in enumerate(self.tasks)]
        return replace(self, names=(*self.names, *new), tasks=tuple(tasks))

    def _with_tasks(self, folders: Sequence[tuple[str, str]], next_task: int, num_tasks: int) -> "ClassList":
        new_tasks = {task for task, _ in folders} - set(self.task_names)
        task_names = (*self.task_names, *sorted(new_tasks, key=_by_number))
        if len(task_names) > num_tasks:
            raise DataError(
                f"the nodes hold {len(task_names)} task folders ({', '.join(task_names)}), num-tasks is {num_tasks}; "
                "set num-tasks to how many there will be"
            )
        row_of = {name: row for row, name in enumerate(self.names)}
        tasks = [set(rows) for rows in self.tasks] + [set[int]() for _ in range(num_tasks - len(self.tasks))]
        task_ids = {name: task_id for task_id, name in enumerate(task_names)}
        for task_id, name in sorted((task_ids[task], name) for task, name in folders):
            if task_id < next_task:
                continue
            tasks[task_id].add(row_of.setdefault(name, len(row_of)))
        return ClassList(tuple(row_of), tuple(tuple(sorted(rows)) for rows in tasks), task_names)


def require_distinct(names: Iterable[str], *, where: str = "the nodes", what: str = "class") -> None:
    """Refuse names that people take for one and the same; letters of two scripts that look alike are not found.

    Raises
    ------
    DataError
        If two names differ only by case, space, characters that show nothing, or by how Unicode spells a letter: an
        accent may be part of it or a character of its own, and a Mac's files have the one, others mostly the other.
    """
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(as_read(name), name)
        if other != name:
            raise DataError(
                f"{where} name a {what} {other!r} and a {what} {name!r}, which differ only by case, space or spelling "
                "in Unicode; give both the same name"
            )


def as_read(name: str) -> str:
    """Give one text for all names that people read alike."""
    shown = _UNSEEN.sub("", unicodedata.normalize("NFKC", name))
    return " ".join(unicodedata.normalize("NFKC", shown.casefold()).split())


def _by_number(name: str) -> list[tuple[int, str]]:
    """Sort ``task-2`` before ``task-10``; a number of any length, which a node may name, goes by its digits."""
    parts = ((part, part.lstrip("0")) for part in re.split(r"(\d+)", name))
    return [(len(digits), digits) if part.isdecimal() else (-1, part) for part, digits in parts]
