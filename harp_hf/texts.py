"""Texts of others, such as names of tasks and messages of libraries, made safe to show."""

from __future__ import annotations

import os
import re

_REDACTED = "(a token)"
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
# Who logs in where, before the host of an address, and what is asked for with it.
# A user alone is no secret but on the web, as in ssh://git@host and abfs://container@account.
_LOGIN = re.compile(r"(?i)(?:(?<=http://)|(?<=https://)|(?<=://)(?=[^/@:\s]*:))[^/\s]+(?=@)")
_QUERY = re.compile(
    r"(?i)([?&](?:amp;)?(?:[\w.-]*(?:token|secret|passw(?:or)?d|signature|credential|(?:api|access|secret)[_-]?key(?:[_-]?id)?|sig)"
    r"|key|auth)=)(?!\(a token)[^&#\s'\"]+"
)
_SECRET = re.compile(r"(^|_)(api_key|secret|password)$|^(hub_|hf_|push_to_hub_|use_auth_|auth_|access_)?token$")
_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
# A shorter one is a placeholder.
_SHORTEST_TOKEN = 8
# Characters of one sentence.
_LONGEST = 1000


def is_secret(name: str) -> bool:
    """Whether a setting of this name holds an access token or a password."""
    return bool(_SECRET.search(name))


def without_tokens(text: str) -> str:
    """`text` without access tokens: those of the Hub, the one in the environment, and those in addresses."""
    for name in _VARIABLES:
        token = os.environ.get(name, "")
        if len(token) >= _SHORTEST_TOKEN:
            text = text.replace(token, _REDACTED)
    return _TOKEN.sub(_REDACTED, _LOGIN.sub(_REDACTED, _QUERY.sub(rf"\1{_REDACTED}", text)))


def printable(text: str) -> str:
    """`text` on one line, without what moves the cursor of a terminal or turns the direction of writing."""
    # The joiner makes one emoji of several.
    return "".join(c if c.isprintable() or c == "\u200d" else " " if c.isspace() else "\ufffd" for c in text)


def sentence(text: str) -> str:
    """`text` as one printable line without tokens; of a long one, its beginning and its end."""
    text = without_tokens(text)
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST * 2 // 3]} ... {text[-_LONGEST // 3 :]}"
    return printable(text)
