"""The results file that a benchmark continues."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from harp_hf.errors import DataError, reason


def read_results(path: Path, settings: dict[str, Any] | None = None) -> dict[str, Any]:
    """What is in a results file, or its beginning, the `settings`, where there is none.

    Raises:
        DataError: The file is damaged or was made with other settings; without `settings`, also that it is missing.
    """
    settings = json.loads(json.dumps(settings))
    if settings is not None and not path.exists():
        return {"settings": settings}
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        before = known["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"The results file {path} cannot be read: {reason(error)}.") from error
    for name in sorted(before.keys() | settings.keys()) if settings is not None else ():
        if before.get(name) != settings.get(name):
            raise DataError(f"The results in {path} were made with another {name}: use another --results.")
    return known
