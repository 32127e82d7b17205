"""What leaves a node of an error."""

import logging
import re
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

log = logging.getLogger("fedtalora.client")

# A path up to its last separator; the names of folders may hold blanks and commas.
_FOLDERS = re.compile(r"""[^\s/\\'"(;]*[/\\](?:(?:[^/\\'"(;:\n]|:(?! ))*[/\\])*""")

P = ParamSpec("P")
R = TypeVar("R")


class ClientError(RuntimeError):
    """What leaves the node of an error: no path, no data."""


def redacted(handler: Callable[P, R]) -> Callable[P, R]:
    """Log an error in full on the node, and raise it with a text that may travel.

    Flower sends an exception's text to the server. Our own errors keep theirs, less the folders in it; of any
    other only the type is told.
    """

    @wraps(handler)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return handler(*args, **kwargs)
        except ValueError as error:
            log.exception("refused a message")
            own = type(error).__module__.startswith("fedtalora_flwr.")
            text = _FOLDERS.sub("", str(error))
            raise ClientError(text if own else f"{type(error).__name__}, see the node's log") from None
        except Exception as error:
            log.exception("failed on a message")
            raise ClientError(f"{type(error).__name__}, see the node's log") from None

    return guarded
