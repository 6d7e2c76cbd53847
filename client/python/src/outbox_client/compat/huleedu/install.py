"""install: services that import huleedu_service_libs.outbox get this layer, unchanged."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

THEIRS = "huleedu_service_libs.outbox"
OURS = "outbox_client.compat.huleedu"
SUBMODULES = ("di", "manager", "models", "monitoring", "protocols", "relay", "repository")


class AlreadyImportedError(ImportError):
    """The library that is to be replaced was imported before: some code has its classes already."""


def install(name: str = THEIRS) -> None:
    """Puts this layer in the place of another package, for imports from now on.

    Call it before anything imports that package: as the first statement of the service, or from a package that takes
    the old one's place and holds nothing but ``from outbox_client.compat.huleedu import install; install(__name__)``.
    Every name is the same object under both paths. Calling it again does nothing. Raises AlreadyImportedError if it
    comes too late.
    """
    ours = importlib.import_module(OURS)
    there = sys.modules.get(name)
    if there is ours:
        return
    # A package that installs the layer in its own place is being imported just now: that is not too late.
    if there is not None and not _initializing(there):
        raise AlreadyImportedError(f"{name} is imported already; call install() before that")
    parent = _parent(name)
    sys.modules[name] = ours
    for part in SUBMODULES:
        sys.modules[f"{name}.{part}"] = importlib.import_module(f"{OURS}.{part}")
    if parent is not None:
        setattr(parent, name.rpartition(".")[2], ours)


def _initializing(module: ModuleType) -> bool:
    return bool(getattr(module.__spec__, "_initializing", False))


def _parent(name: str) -> ModuleType | None:
    """The package that holds it; an empty one when it is not installed, so that imports below it are found."""
    above = name.rpartition(".")[0]
    if not above:
        return None
    if above not in sys.modules and importlib.util.find_spec(above) is None:
        empty = ModuleType(above, "Made by outbox_client: the package itself is not installed.")
        empty.__path__ = []
        sys.modules[above] = empty
    return importlib.import_module(above)


__all__ = ["AlreadyImportedError", "install"]
