"""What one side cannot use, and how it says so."""

import re

from flwr.app import Error
from flwr.common.constant import ErrorCode

import fedtalora_flwr

_QUOTED = re.compile(r"<class '[^']*'>:<'(.*)'>", re.DOTALL)  # an exception as Flower writes it


class WireError(ValueError):
    """A message that the other side cannot use; the text is safe to send."""


def check_library(build: str, *, whose: str) -> None:
    """Refuse to work with another version of this library, or other code under the same number.

    Raises
    ------
    WireError
        If `build` is not ours.
    """
    if build != (ours := fedtalora_flwr.build()):
        raise WireError(f"the {whose} runs fedtalora {build}, this side {ours}; install the same commit on both")


def node_is_gone(error: Error) -> bool:
    """Tell whether an error comes from the server's own side, for a node that is no longer connected."""
    return error.code == ErrorCode.NODE_UNAVAILABLE


def error_text(error: Error) -> str:
    """Give what a client's error says, without the trace and quotes that Flower and Ray put around its text."""
    reason = error.reason or f"error {error.code}"
    quoted = _QUOTED.fullmatch(reason)
    return (quoted[1] if quoted else reason).rpartition("ClientAppException occurred. Message: ")[2].strip()
