"""What leaves a node of an error."""

import logging
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from fedtalora_flwr.config import ConfigError
from fedtalora_flwr.wire import WireError

log = logging.getLogger("fedtalora.client")

# What these say comes from the run's settings and the node's config: no path of the data, nothing of what is in it.
_SAFE = (WireError, ConfigError)

P = ParamSpec("P")
R = TypeVar("R")


class ClientError(RuntimeError):
    """What leaves the node of an error: no path, no data."""


def discreet(handler: Callable[P, R]) -> Callable[P, R]:
    """Log an error in full on the node, and raise it with a text that may travel.

    Flower sends an exception's text to the server, and an error over data may hold a file's name or a row of it. So
    only its class is told, unless it is one of those that know nothing of the data.
    """

    @wraps(handler)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return handler(*args, **kwargs)
        except _SAFE as error:
            log.exception("refused a message")
            raise ClientError(f"{type(error).__name__}: {error}") from None
        except Exception as error:
            log.exception("failed on a message")
            raise ClientError(f"{type(error).__name__}, see the node's log") from None

    return guarded
