"""What HARP is compared with: one selector a file, all with one Protocol, none imported before it is used.

```python
from harp_hf.baselines import selector
from harp_hf.baselines.problem import open_problem
from harp_hf.inputs import read_inputs

problem = open_problem(read_inputs(pool, proxy, model, args), args)
rows = selector("rds").rank(problem, budget=1_000).rows
```
"""

from __future__ import annotations

import importlib
from typing import Any

from ..errors import ConfigError
from .selector import Cost, Problem, Ranking, Selector

# Name on the command line: module and class.
SELECTORS: dict[str, tuple[str, str]] = {
    "random": ("random", "Random"),
    "rds": ("rds", "RDS"),
    "k-center": ("k_center", "KCenter"),
    "facility-location": ("facility_location", "FacilityLocation"),
    "dsir": ("dsir", "DSIR"),
    "less": ("less", "LESS"),
    "exhaustive": ("ablations", "Exhaustive"),
    "top-phi": ("ablations", "TopPhi"),
    "measured-only": ("ablations", "MeasuredOnly"),
    "even-rows": ("ablations", "EvenRows"),
    "datamodels": ("datamodels", "Datamodels"),
    "shapley": ("shapley", "Shapley"),
}

# Those that start from HARP's own measurements.
MEASURED = ("exhaustive", "top-phi", "measured-only", "even-rows")

__all__ = ["MEASURED", "SELECTORS", "Cost", "Problem", "Ranking", "Selector", "selector"]


def selector(name: str, **options: Any) -> Selector:
    """The selector of that name.

    Args:
        name: One of [`SELECTORS`].
        options: Fields of the selector's class.

    Raises:
        ConfigError: There is no such selector, or it has no such option.
    """
    if name not in SELECTORS:
        raise ConfigError(f"There is no selector {name!r}; the selectors are {', '.join(SELECTORS)}.")
    module, kind = SELECTORS[name]
    made = getattr(importlib.import_module(f".{module}", __name__), kind)
    for option in options:
        if option not in made.__dataclass_fields__:
            known = ", ".join(made.__dataclass_fields__) or "none"
            raise ConfigError(f"The selector {name!r} has no option {option!r}; its options are {known}.")
    return made(**options)
