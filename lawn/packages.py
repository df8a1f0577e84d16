"""Optional packages."""

from importlib.util import find_spec

from lawn.errors import ConfigError


def is_installed(package: str) -> bool:
    """A folder of that name is no package: wandb leaves one wherever it has run."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


def check_installed(package: str, wanted: str, source: str) -> None:
    """Raise ConfigError if a package is not installed.

    Args:
        package: its name in imports.
        wanted: what needs it, such as "optim=adamp".
        source: what pip installs it from.
    """
    if not is_installed(package):
        raise ConfigError(f"{wanted}: the package {package} is not installed; pip install {source}")
