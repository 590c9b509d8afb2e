"""Choose finetuning data for language models with HARP (Hierarchical Active Region Pruning, arXiv:2606.07690)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .config import HarpConfig
    from .errors import HarpError
    from .result import HarpResult
    from .saved import load_result
    from .selection import measure, select

_EXPORTS = {
    "HarpConfig": "config",
    "HarpError": "errors",
    "HarpResult": "result",
    "load_result": "saved",
    "measure": "selection",
    "select": "selection",
}

__all__ = ["HarpConfig", "HarpError", "HarpResult", "load_result", "measure", "select"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
