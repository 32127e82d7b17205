import os
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from fedtalora_flwr.data import Source, Split

REPO = Path(__file__).parents[2]


@pytest.fixture(autouse=True, scope="session")
def _private_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("hf-cache")


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The app's defaults by snake_case name; no data root in the environment."""
    monkeypatch.delenv("FEDTALORA_DATA", raising=False)
    with (REPO / "pyproject.toml").open("rb") as file:
        defaults = tomllib.load(file)["tool"]["flwr"]["app"]["config"]
    return {key.replace("-", "_"): value for key, value in defaults.items()}


def data_root(name: str) -> Path:
    """Where the real data stands; skips the test where it does not."""
    for root in (os.environ.get("FEDTALORA_DATA"), REPO.parent / "shared" / "data"):
        if root and (Path(root) / name).is_dir():
            return Path(root)
    pytest.skip(f"no {name} in $FEDTALORA_DATA or ../shared/data")


@pytest.fixture
def real_data() -> Callable[[str], Path]:
    return data_root


@pytest.fixture
def make_source() -> Callable[..., Source]:
    """A source whose inputs are texts that say where they come from: ``train 3``."""

    def make(train: list[int], test: list[int], *, names: str, groups: Any = ()) -> Source:
        def split(kind: str, labels: list[int]) -> Split:
            return Split(
                labels=np.array(labels, dtype=np.int64),
                read=lambda rows: [f"{kind} {row}" for row in rows],
            )

        return Source("made", "text", tuple(names), split("train", train), split("test", test), groups)

    return make


@pytest.fixture
def make_image() -> Callable[..., PIL.Image.Image]:
    def make(width: int, height: int, *, mode: str = "RGB", value: int = 0) -> PIL.Image.Image:
        grey = (np.arange(width * height).reshape(height, width) * 7 + value).astype(np.uint8)
        return PIL.Image.fromarray(grey).convert(mode)

    return make
