"""What is asked of a warm process and what it answers; both travel as pickles.

A pickle can run any code when it is read. Here both ends are processes of one user on one machine, and the socket
between them is in a folder that no other user may enter: whoever could put a pickle there could run the code anyway.
"""

import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Task:
    """A function by its name, so that the one who asks need not import it, and what it is called with."""

    module: str
    function: str
    arguments: tuple[Any, ...]

    def run(self) -> Any:
        """Import the function, call it in this process, and return what it returns."""
        return getattr(importlib.import_module(self.module), self.function)(*self.arguments)


@dataclass(frozen=True)
class Outcome:
    """What a task came to: the value that it returned, or the exception that it raised."""

    value: Any = None
    error: Exception | None = None

    def get(self) -> Any:
        """Return or raise as the function did."""
        if self.error is not None:
            raise self.error
        return self.value
