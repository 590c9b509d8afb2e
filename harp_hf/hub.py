"""Pushes a selection to the Hub: first the rows, then the card merged into the one that is there, with figures."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import datasets
from huggingface_hub import CommitOperationAdd, DatasetCard, HfApi, get_token, hf_hub_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from . import __version__
from .card import TAGS, describe, dump, escape, figures, hub_name, merge_text, model_name, read_run, recipe
from .errors import ConfigError, HarpError, reason

if TYPE_CHECKING:
    from .result import HarpResult

# What every error of the connection derives from, in whichever HTTP library huggingface_hub uses.
_HTTPError = HfHubHTTPError.__bases__[0]
_LICENCE = ("license", "license_name", "license_link")


def push(
    result: HarpResult,
    repo_id: str,
    variant: str | None = None,
    budget: int | None = None,
    *,
    private: bool = True,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    dataset_name: str | None = None,
) -> str:
    """Push the selection of a result to the Hub as a dataset, with a card filled by the run.

    The rows become the split "train" of the default configuration. On a card that is there already, its metadata and
    all text outside the section between the two `harp-hf` comments stay; our tags are added, and a licence is only
    set where there is none. The settings (`harp.yaml`) go with it, and the figures of the report (`result/*.png` of
    the run directory) where the choice is the run's own, which they show, in either variant. A push that broke off is
    simply made again.

    Args:
        result: What a run knows.
        repo_id: Name of the dataset, with its namespace unless that is your own.
        variant: `"harp-c"` or `"harp-e"`; default as in the run's configuration, like `budget`.
        budget: At most that many rows.
        private: Whether a new dataset is private. One that is there already stays as it is, and where it is public
            nothing is pushed unless this is `False`.
        token: Access token with write permission. Default: the one you are logged in with.
        revision: Branch to push to; it is made where it is not there.
        commit_message: First line of the commits.
        dataset_name: Name of the pool on the Hub, where the run was given it as an object.

    Returns:
        `str`: Where the dataset is.

    Raises:
        HarpError: Nothing can be selected, there is no token, the token does not suffice, `repo_id` cannot be a name,
            or the connection broke.
    """
    result = result.choosing(variant, budget)
    rows = result.select()
    config, manifest = read_run(result.path)
    token = _checked_token(token)
    message = commit_message or f"Upload {len(rows)} rows selected by {result.choice.variant.upper()}"
    api = HfApi(token=token, library_name="harp-hf", library_version=__version__)
    with _one_sentence(repo_id, revision, token, "the rows were pushed"):
        repo_id = _full_name(api, repo_id)
        _refuse_to_publish(api, repo_id, private)
        source, licence = _look_up(api, hub_name(dataset_name or config.get("dataset_name")))
        with _few_warnings():
            pushed = rows.push_to_hub(
                repo_id, split="train", private=private, token=token, revision=revision, commit_message=message
            )
    with _one_sentence(repo_id, revision, token, "the card was pushed, after the rows"):
        there = hf_hub_download(repo_id, "README.md", repo_type="dataset", revision=pushed.oid, token=token)
        card = DatasetCard.load(there)
    licences = ", ".join(map(str, _several(licence.get("license"))))
    ours = describe(result, rows, repo_id, source=source or dataset_name, licence=licences, revision=revision)
    _merge_data(card.data, source, licence, hub_name(model_name(config, manifest)))
    card.text = merge_text(card.text, ours)
    files = {"README.md": str(card), "harp.yaml": dump(recipe(result, config)) + "\n"}
    # Row texts and settings may hold the very token that is in use.
    for name, text in files.items():
        files[name] = text.replace(token, "(a token)").replace(escape(token), "(a token)")
    additions = [CommitOperationAdd(name, text.encode()) for name, text in files.items()]
    additions += [CommitOperationAdd(f"figures/{path.name}", path) for path in figures(result)]
    with _one_sentence(repo_id, revision, token, "the card was pushed, after the rows"):
        api.create_commit(
            repo_id, additions, commit_message=f"{message}: card", repo_type="dataset", revision=revision,
            parent_commit=pushed.oid,
        )  # fmt: skip
    return f"{api.endpoint}/datasets/{repo_id}" + (f"/tree/{quote(revision)}" if revision else "")


def _checked_token(token: str | None) -> str:
    token = token or get_token()
    if not token:
        raise ConfigError(
            "Pushing to the Hub needs a token: log in with `hf auth login`, set HF_TOKEN, or pass it as `token`."
        )
    if not re.fullmatch(r"[!-~]+", token):
        raise ConfigError("The Hub token has white space or characters that no token has.")
    return token


def _full_name(api: HfApi, repo_id: str) -> str:
    validate_repo_id(repo_id)
    if "/" not in repo_id:
        return f"{api.whoami()['name']}/{repo_id}"
    return repo_id


def _refuse_to_publish(api: HfApi, repo_id: str, private: bool) -> None:
    try:
        public = not api.dataset_info(repo_id).private
    except RepositoryNotFoundError:
        return
    if private and public:
        raise ConfigError(f"The dataset {repo_id} on the Hub is public: pass private=False to push to it.")


def _look_up(api: HfApi, source: str | None) -> tuple[str | None, dict[str, Any]]:
    """Name and licence of the pool on the Hub; nothing where it is not there for us."""
    if source is None:
        return None, {}
    try:
        card = api.dataset_info(source).card_data
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403, 404):
            return None, {}
        raise
    known = card.to_dict() if card is not None else {}
    return source, {name: known[name] for name in _LICENCE if known.get(name)}


def _merge_data(data: Any, source: str | None, licence: dict[str, Any], model: str | None) -> None:
    for name, values in (("tags", TAGS), ("source_datasets", [source]), ("base_model", [model])):
        known = _several(data.get(name))
        if added := [value for value in values if value and value not in known]:
            data[name] = known + added
    if not data.get("license"):
        for name, value in licence.items():
            data[name] = value[0] if isinstance(value, list) and len(value) == 1 else value


def _several(value: Any) -> list[Any]:
    """What a card gives as a list, as one thing alone, or not at all."""
    return value if isinstance(value, list) else [value] if value else []


@contextmanager
def _few_warnings() -> Iterator[None]:
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity_error()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)


@contextmanager
def _one_sentence(repo_id: str, revision: str | None, token: str, doing: str) -> Iterator[None]:
    """Turn whatever the libraries underneath raise into one [`HarpError`]."""
    try:
        yield
    except HarpError:
        raise
    except Exception as error:  # they raise HTTP errors, and RuntimeError or ValueError around those
        sentence = _explain(error, repo_id, revision, doing).replace(token, "(the token)")
        # Without the cause: the traceback of a refused request may show its headers.
        raise HarpError(sentence) from None


def _explain(error: BaseException, repo_id: str, revision: str | None, doing: str) -> str:
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    for kind in chain:
        if isinstance(kind, HFValidationError):
            return f"{repo_id!r} cannot be the name of a dataset on the Hub: use 'namespace/name'."
        if isinstance(kind, OfflineModeIsEnabled):
            return "The Hub cannot be reached in offline mode: unset HF_HUB_OFFLINE."
        if isinstance(kind, RevisionNotFoundError):
            return f"The dataset {repo_id} on the Hub has no revision {revision!r}."
        if isinstance(kind, HfHubHTTPError):
            return _explain_status(kind, repo_id, doing)
        if isinstance(kind, _HTTPError):
            return (
                f"The connection to the Hub broke while {doing} to {repo_id} ({reason(kind)}): "
                "push again, which does no harm."
            )
    return f"Something went wrong while {doing} to {repo_id}: {reason(error)}."


def _explain_status(error: HfHubHTTPError, repo_id: str, doing: str) -> str:
    status = error.response.status_code
    if status == 401:
        return "The Hub does not accept the token: make a new one with write permission, and log in with it."
    if status == 403:
        return f"The token may not write to {repo_id} on the Hub: it needs write permission for that namespace."
    if status == 404:
        return f"The dataset {repo_id} is not on the Hub, or the token may not see it."
    if status in (409, 412):
        return f"Somebody else changed {repo_id} on the Hub while {doing}: push again."
    return f"The Hub answered {status} while {doing} to {repo_id}: {reason(error)}."
