"""A client's bases: the last one in memory, the last few on its own disk.

A deployed client is a new process for every message, so the base must outlive it. A file is named by its
content's SHA-256, which is checked when it is read: a damaged one is as good as none, and the server is asked.
The clients of one machine share the folder, for what they hold is the same.
"""

import logging
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fedtalora_flwr.config.whole import whole_file
from fedtalora_flwr.residual.version import ZERO, Patch, ResidualVersion

log = logging.getLogger("fedtalora.client")

_KEPT = 2  # files that stay whatever their size: the newest base, and the one before for a server that was killed
_ABANDONED = 3600.0  # seconds after which a half-written file has no writer any more


class VersionMissing(ValueError):
    """The server's base cannot be reached from what is held.

    Parameters
    ----------
    text
        Why.
    held
        Digests that the server may start from instead; none asks for the whole base.
    """

    def __init__(self, text: str, *, held: list[str]) -> None:
        super().__init__(text)
        self.held = held


class VersionStore:
    """The bases that a client holds.

    Parameters
    ----------
    folder
        Made when the first base is written. A folder that cannot be written is told in the log, and the client
        goes on with what can be read there, or without one.
    limit_bytes
        Files above it are removed, the longest unused first, down to two.
    """

    def __init__(self, folder: Path, *, limit_bytes: int) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes
        self._last = ZERO

    def digests(self) -> list[str]:
        """List what is held, in memory and on disk."""
        return sorted({ZERO.digest, self._last.digest, *(path.stem for path, _ in self._files())})

    def reach(self, patch: Patch) -> ResidualVersion:
        """Reach the server's base from the nearest one held, and keep it.

        Raises
        ------
        VersionMissing
            If no base held is on the chain, or what it leads to is not the server's base.
        """
        start = next((base for digest in reversed(patch.chain) if (base := self._find(digest))), None)
        if start is not None and start.digest == patch.target:
            self._last = start
            return start
        if start is None and (patch.steps or not patch.dense):
            wanted = ", ".join(digest[:12] for digest in patch.chain)
            # Only what is in memory is sure: an older file may be damaged too, and the server is asked but once.
            raise VersionMissing(f"holds none of the bases {wanted}", held=[ZERO.digest, self._last.digest])
        base = patch.applied_to(start or ZERO)
        if base.digest != patch.target:
            self._forget(start or ZERO)
            raise VersionMissing(f"came to base {base.digest[:12]}, the server is at {patch.target[:12]}", held=[])
        self._last = base
        self._write(base)
        return base

    def reach_all(self, patches: Iterable[Patch]) -> dict[str, ResidualVersion]:
        """Reach several bases, by digest, however few of them the store can keep.

        Raises
        ------
        VersionMissing
            If one cannot be reached. It asks for all of them whole: reaching some may have pushed out others.
        """
        reached: dict[str, ResidualVersion] = {}
        for patch in patches:
            try:
                reached[patch.target] = reached.get(patch.target) or self.reach(patch)
            except VersionMissing as missing:
                raise VersionMissing(str(missing), held=[]) from missing
        return reached

    def _find(self, digest: str) -> ResidualVersion | None:
        for base in (self._last, ZERO):
            if base.digest == digest:
                return base
        path = self._path(digest)
        try:
            base = ResidualVersion(load_file(path))
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError) as error:
            log.warning("%s cannot be read: %s", path, error)
            _discard(path)
            return None
        if base.digest != digest:
            log.warning("%s is damaged", path)
            _discard(path)
            return None
        with suppress(OSError):  # another client may have removed it meanwhile, or it is not ours to write
            os.utime(path)
        return base

    def _write(self, base: ResidualVersion) -> None:
        path = self._path(base.digest)
        if path.exists():
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with whole_file(path, flush=False) as part:  # a torn file is found out by its hash
                save_file({name: value.contiguous() for name, value in base.residual.items()}, part)
            self._make_room()
        except (OSError, SafetensorError) as error:
            log.warning("the base is not kept on disk, a restarted client will ask for it whole: %s", error)

    def _make_room(self) -> None:
        used = 0
        for index, (path, size) in enumerate(self._files()):
            used += size
            if index >= _KEPT and used > self.limit_bytes:
                path.unlink(missing_ok=True)
        for part in self.folder.glob(".*.part"):
            with suppress(OSError):
                if time.time() - part.stat().st_mtime > _ABANDONED:
                    part.unlink()

    def _forget(self, base: ResidualVersion) -> None:
        self._last = ZERO
        _discard(self._path(base.digest))

    def _files(self) -> list[tuple[Path, int]]:
        """List the files and their sizes, the last used first; another client may remove one meanwhile."""
        found = []
        for path in self.folder.glob("*.safetensors"):
            with suppress(OSError):  # or a link that leads nowhere
                found.append((path, path.stat()))
        found.sort(key=lambda entry: -entry[1].st_mtime_ns)
        return [(path, facts.st_size) for path, facts in found]

    def _path(self, digest: str) -> Path:
        return self.folder / f"{digest}.safetensors"


def _discard(path: Path) -> None:
    """Remove a file that is of no use, where that can be."""
    with suppress(OSError):
        path.unlink()
