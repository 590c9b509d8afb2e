"""What leaves, and the random rows that are measured beside them, are called in files and sentences."""

from __future__ import annotations

# Stands where a leaf is named for random rows of the pool, which are measured as a control.
CONTROL = -1


def leaf_name(leaf: int) -> str:
    """What a leaf is called: "leaf 12", or "random rows" if it is the control."""
    return "random rows" if leaf == CONTROL else f"leaf {leaf}"


def measurement_file(leaf: int, seed: int) -> str:
    """Name of the file of one measurement in the run directory."""
    return f"measurements/{'random' if leaf == CONTROL else leaf}-{seed}.npz"
