"""A run's settings: what they are, what makes a value impossible, where they come from, and the plug-ins they name."""

from fedtalora_flwr.config.run_config import (
    MAY_CHANGE_ON_RESUME,
    ConfigError,
    RunConfig,
    Scalar,
    kebab,
    parse_assignment,
    snake,
    unknown_key,
)

__all__ = [
    "MAY_CHANGE_ON_RESUME",
    "ConfigError",
    "RunConfig",
    "Scalar",
    "kebab",
    "parse_assignment",
    "snake",
    "unknown_key",
]
