"""The errors of `harp_hf`: each message is one sentence that says what is wrong, where, and what to do."""

import textwrap

from .texts import sentence


class HarpError(ValueError):
    """Base class of every error that `harp_hf` raises on purpose.

    The message may quote what was passed: it becomes one printable line without access tokens.
    """

    def __init__(self, message: str) -> None:
        super().__init__(sentence(message))


class ConfigError(HarpError):
    """A setting has a value that cannot be used."""


class DataError(HarpError):
    """The pool, the proxy set, the features or the null scores cannot be used as they are."""


class RunDirError(HarpError):
    """The run directory cannot be read or written, or belongs to another run."""


class MissingExtraError(HarpError):
    """A package that belongs to an extra is not installed."""


class FinetuneError(HarpError):
    """One leaf could not be finetuned; it is recorded as failed and the run goes on."""


def reason(error: BaseException) -> str:
    """What another library's error says, on one line and without a full stop, for the end of a sentence of ours."""
    return textwrap.shorten(str(error).strip() or type(error).__name__, 240, placeholder=" ...").rstrip(".: ")
