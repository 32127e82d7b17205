"""What of a folder cannot be used: a line for each file, all of them at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from fedtalora_flwr.data.images import decode_image
from fedtalora_flwr.data.source import DataError

_LONGEST = 350  # characters of those that are named: of what a node says, the server keeps 500


@dataclass(frozen=True)
class Fault:
    """A file that cannot be used.

    Parameters
    ----------
    file
        Its path below the folder that was read.
    reason
        Why, as the end of a sentence that begins with the file.
    """

    file: Path
    reason: str

    @property
    def called(self) -> str:
        """Name the file and the folders of its task and class; without slashes, for no path leaves a node.

        Bytes that are no UTF-8 are spelled out, for no message could hold them.
        """
        *folders, name = (part.encode(errors="backslashreplace").decode() for part in self.file.parts)
        return f"{name} ({', '.join(folders)})" if folders else name

    def __str__(self) -> str:
        return f"{self.called} {self.reason}"


def image_fault(file: Path, *, root: Path) -> Fault | None:
    """Decode an image below a folder, and say what is wrong with it; what was decoded before is taken from memory."""
    below = file.relative_to(root)
    try:
        status = file.stat()
        reason = _undecodable(file, status.st_size, status.st_mtime_ns)
    except OSError as error:
        reason = f"cannot be opened ({error.strerror}); give this user the right to read it, or remove it"
    return Fault(below, reason) if reason else None


@lru_cache(maxsize=1_000_000)
def _undecodable(file: Path, size: int, _changed_ns: int) -> str:
    if not size:
        return "holds no byte; replace or remove it"
    try:
        decode_image(file, where="")
    except DataError as error:
        return str(error).strip()
    return ""


def refusal(faults: Sequence[Fault]) -> str:
    """Say that files cannot be used, as the message of an error."""
    several = f"{len(faults)} files cannot be used: " if len(faults) > 1 else ""
    return several + _some([str(fault) for fault in faults])


def left_out(faults: Sequence[Fault]) -> tuple[str, ...]:
    """Say in a remark which files are left out; none where there are none."""
    if not faults:
        return ()
    files = "1 file is" if len(faults) == 1 else f"{len(faults)} files are"
    return (f"{files} left out, which cannot be read: {_some([fault.called for fault in faults])}",)


def _some(texts: Sequence[str]) -> str:
    """List as many as there is room for, and say how many more there are."""
    shown = [texts[0]]
    for text in texts[1:]:
        if sum(map(len, shown)) + len(text) > _LONGEST:
            break
        shown.append(text)
    more = len(texts) - len(shown)
    return "; ".join(shown) + (f"; and {more} more, which fedtalora check names" if more else "")
