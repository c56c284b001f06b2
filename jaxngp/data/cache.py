"""Where downloads, the built-in scene and unpacked captures are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """$JAXNGP_CACHE, else jaxngp in the user's cache directory."""
    if own := os.environ.get("JAXNGP_CACHE"):
        return expand(own)
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return expand(base) / "jaxngp"


def expand(path: str) -> Path:
    """`path` with its ~ replaced; as it stands where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)
