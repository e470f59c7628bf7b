"""Make a repository on the Hub hold what is given: private first, and what is restricted stays so."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_token,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils.sha import git_hash

from .agreement import check_sharing, is_loopback, says_it_is_free
from .errors import UserError
from .hub_files import CHECKPOINT_INFO
from .writer import RECORD


Content = Path | bytes
# Made by the Hub itself in every repository.
_HUBS_OWN = ".gitattributes"
# The client's HTTP library differs by version.
_NETWORK = ("httpx", "httpcore")


@dataclass(frozen=True)
class Upload:
    """
    What is to be in a repository, and nothing else.

    Args:
        kind (`"dataset"` or `"model"`):
            Kind of the repository.
        files (`Mapping[str, Path | bytes]`):
            Path in the repository to the file here, or its content.
        restricted (`bool`):
            Whether it derives from data under an agreement.
        describing (`frozenset[str]`, *optional*):
            Files that only say something about the others: they may be replaced without being asked for.
    """

    kind: Literal["dataset", "model"]
    files: Mapping[str, Content]
    restricted: bool
    describing: frozenset[str] = frozenset()

    def sizes(self) -> dict[str, int]:
        """Bytes of each file, by its path in the repository."""
        return {
            name: len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in sorted(self.files.items())
        }


@dataclass(frozen=True)
class Published:
    """
    What a push came to.

    Args:
        url (`str`):
            Address of the repository.
        sent (`list[str]`):
            Files that were sent, by their path in the repository; none if all were there already.
        removed (`list[str]`):
            Files that were there and are not any more.
        private (`bool`):
            Whether only its owners see it.
    """

    url: str
    sent: list[str]
    removed: list[str]
    private: bool


def check_name(repo_id: str, flag: str = "") -> None:
    """
    Refuse what cannot be the name of a repository of ours.

    Args:
        repo_id (`str`):
            The name.
        flag (`str`, *optional*):
            What it was given by, for the message.

    Raises:
        UserError: It has no organisation, or characters that the Hub does not take.
    """
    named = f"{flag} {repo_id}".strip()
    if repo_id.count("/") != 1:
        raise UserError(f"{named}: give ORG/NAME, an organisation or user on the Hub and the repository's name")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"{named}: not a name that the Hub takes: {_first_line(error)}") from error


def check_allowed(what: str, repo_id: str, *, restricted: bool, public: bool = False, complies: str = "") -> None:
    """
    Refuse a name that the Hub does not take, and restricted data where it must not go. Nothing is sent.

    Args:
        what (`str`), repo_id (`str`), public (`bool`), complies (`str`):
            As in [`publish`].
        restricted (`bool`):
            Whether it derives from data under an agreement.

    Raises:
        UserError: The name is wrong, or it is restricted, and would be public or leave this machine unasked.
    """
    check_name(repo_id)
    target = f"--public {repo_id}" if public else repo_id
    check_sharing(
        what, restricted=restricted, target=target, endpoint=constants.ENDPOINT, complies=complies, public=public
    )
    if restricted and is_loopback(constants.ENDPOINT) and not complies.strip() and _goes_through_a_proxy():
        raise UserError(
            f"{repo_id}: {what} is restricted, and HTTP_PROXY would take it off this machine; set NO_PROXY=127.0.0.1"
        )


def _goes_through_a_proxy() -> bool:
    address, proxies = urlsplit(constants.ENDPOINT), getproxies()
    return bool({address.scheme, "all"} & proxies.keys()) and not proxy_bypass(address.hostname or "")


def publish(
    upload: Upload,
    repo_id: str,
    *,
    what: str,
    public: bool = False,
    replace: bool = False,
    complies: str = "",
    token: str | None = None,
) -> Published:
    """
    Make a repository hold exactly what is given, in one commit.

    A repository that is not there is created private, and its state read back, before the first file is sent. What an
    earlier attempt has sent is not sent again, and where everything is there already nothing is.

    Args:
        upload ([`Upload`]):
            The files.
        repo_id (`str`):
            `ORG/NAME`.
        what (`str`):
            The folder, for messages.
        public (`bool`, *optional*, defaults to `False`):
            Let everybody see the repository, once it is complete.
        replace (`bool`, *optional*, defaults to `False`):
            Replace what the repository holds, if that is something else.
        complies (`str`, *optional*):
            Who agreed, under what terms, that restricted data may go to this Hub. It stands in the commit.
        token (`str`, *optional*):
            The Hub's token. Defaults to that of `hf auth login` or `HF_TOKEN`.

    Returns:
        [`Published`]: What was sent.

    Raises:
        UserError: The name is wrong, restricted files would be public or leave this machine, the repository holds
            something else or is public unasked, or the Hub refuses.
    """
    api = connect(what, repo_id, restricted=upload.restricted, public=public, complies=complies, token=token)
    with _telling(repo_id):
        private, there, head = _open(api, upload, repo_id, public=public)
        if public and private:
            _check_history(api, upload, repo_id)
        sent, removed = _differences(upload, there)
        _check_replaceable(upload, repo_id, sent, removed, there, replace=replace)
        if sent or removed:
            _commit(api, upload, repo_id, sent, removed, head, complies)
        if public and private:
            api.update_repo_settings(repo_id, repo_type=upload.kind, private=False)
        private = _state_after(api, upload, repo_id)
    prefix = "datasets/" if upload.kind == "dataset" else ""
    return Published(f"{api.endpoint}/{prefix}{repo_id}", sent, removed, private)


def reserve(upload: Upload, repo_id: str, *, what: str, public: bool = False, token: str | None = None) -> None:
    """
    Do all of [`publish`] that can be done before there are files: create the repository, private, or find out what
    will stand in the way, before hours of training.

    Args:
        upload ([`Upload`]):
            What is known of the files; none yet.
        repo_id (`str`), what (`str`), public (`bool`), token (`str`):
            As in [`publish`].

    Raises:
        UserError: As [`publish`]; a repository that holds files is refused.
    """
    api = connect(what, repo_id, restricted=upload.restricted, public=public, token=token)
    with _telling(repo_id):
        _, there, _ = _open(api, upload, repo_id, public=public)
        if there:
            raise UserError(
                f"{repo_id}: holds {_some(there)} already; choose another name, or push the finished checkpoint with "
                "`medforget push model --replace`"
            )


def connect(
    what: str,
    repo_id: str,
    *,
    restricted: bool,
    public: bool = False,
    complies: str = "",
    token: str | None = None,
) -> HfApi:
    """
    The Hub, if what is to go there may, and there is a token. Nothing is sent.

    Args:
        what (`str`), repo_id (`str`), restricted (`bool`), public (`bool`), complies (`str`), token (`str`):
            As in [`publish`] and [`check_allowed`].

    Raises:
        UserError: As [`check_allowed`], and if there is no token or the Hub is switched off.
    """
    check_allowed(what, repo_id, restricted=restricted, public=public, complies=complies)
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{repo_id}: HF_HUB_OFFLINE is set, so that nothing can be sent; unset it")
    if not (token := token or get_token()):
        raise UserError(f"{repo_id}: no Hub token; run `hf auth login`, or set HF_TOKEN to one that may write")
    if not token.isascii():
        raise UserError(f"{repo_id}: the Hub's token has a character that no token has; copy it again")
    return HfApi(token=token)


def _open(api: HfApi, upload: Upload, repo_id: str, *, public: bool) -> tuple[bool, dict[str, RepoFile], str]:
    """Whether the repository, which is made if it is not there, is private, the files in it, and its last commit."""
    try:
        state = api.repo_info(repo_id, repo_type=upload.kind)
    except RepositoryNotFoundError:
        api.create_repo(repo_id, repo_type=upload.kind, private=True, exist_ok=True)
        state = api.repo_info(repo_id, repo_type=upload.kind)
        if state.private is not True:
            raise UserError(f"{repo_id}: the Hub did not make it private; nothing was sent, delete it") from None
    if not state.private and upload.restricted:
        raise UserError(f"{repo_id}: is public, and what would go there is restricted; nothing was sent")
    if not state.private and not public:
        raise UserError(f"{repo_id}: is public; add --public to publish there, or make it private")
    tree = api.list_repo_tree(repo_id, recursive=True, repo_type=upload.kind, revision=state.sha)
    there = {entry.path: entry for entry in tree if isinstance(entry, RepoFile) and entry.path != _HUBS_OWN}
    return bool(state.private), there, str(state.sha)


def _check_history(api: HfApi, upload: Upload, repo_id: str) -> None:
    """A repository that becomes public shows all that it ever held: each commit must say that it is free."""
    refs = api.list_repo_refs(repo_id, repo_type=upload.kind, include_pull_requests=True)
    names = [ref.ref for ref in (*refs.branches, *refs.tags, *(refs.pull_requests or ()))]
    commits = {
        commit.commit_id
        for name in names
        for commit in api.list_repo_commits(repo_id, repo_type=upload.kind, revision=name)
    }
    for commit in sorted(commits):
        tree = api.list_repo_tree(repo_id, recursive=True, repo_type=upload.kind, revision=commit)
        held = {entry.path for entry in tree if isinstance(entry, RepoFile)} - {_HUBS_OWN}
        if held and not _says_it_is_free(api, repo_id, upload.kind, commit, held):
            raise UserError(
                f"{repo_id}: cannot be made public: its history holds what does not say that it is free of a data use "
                f"agreement (commit {commit[:7]}); push to another name"
            )


def _says_it_is_free(api: HfApi, repo_id: str, kind: str, commit: str, held: set[str]) -> bool:
    record = RECORD if kind == "dataset" else CHECKPOINT_INFO
    if record not in held:
        return False
    file = api.hf_hub_download(repo_id, record, repo_type=kind, revision=commit)
    try:
        return says_it_is_free(json.loads(Path(file).read_text(encoding="utf-8")))
    except ValueError:  # what cannot be read says nothing
        return False


def _state_after(api: HfApi, upload: Upload, repo_id: str) -> bool:
    """Whether the repository is private now; one that somebody opened meanwhile is closed if it is not free."""
    private = api.repo_info(repo_id, repo_type=upload.kind).private
    if upload.restricted and private is not True:
        api.update_repo_settings(repo_id, repo_type=upload.kind, private=True)
        raise UserError(
            f"{repo_id}: became public while restricted files were sent, and was made private again; see who did it, "
            "and delete it"
        )
    return bool(private)


def _differences(upload: Upload, there: dict[str, RepoFile]) -> tuple[list[str], list[str]]:
    """Files to send and files to remove."""
    sent = [
        name
        for name, content in sorted(upload.files.items())
        if name not in there or not _is_same(content, there[name])
    ]
    return sent, sorted(there.keys() - upload.files.keys())


def _is_same(content: Content, there: RepoFile) -> bool:
    if isinstance(content, Path):
        if content.stat().st_size != there.size:
            return False
        if there.lfs is not None:
            with open(content, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == there.lfs.sha256
        content = content.read_bytes()
    if there.lfs is not None:
        return hashlib.sha256(content).hexdigest() == there.lfs.sha256
    return git_hash(content) == there.blob_id


def _check_replaceable(
    upload: Upload, repo_id: str, sent: list[str], removed: list[str], there: dict[str, RepoFile], *, replace: bool
) -> None:
    """Files may be added to what is there; one that would change or go must be asked for, unless it only describes."""
    others = [name for name in (*sent, *removed) if name in there and name not in upload.describing]
    if others and not replace:
        raise UserError(
            f"{repo_id}: holds something else ({_some(others)}); choose another name, or add --replace to replace it"
        )


def _commit(
    api: HfApi, upload: Upload, repo_id: str, sent: list[str], removed: list[str], head: str, complies: str
) -> None:
    additions = [
        CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
        for name, content in upload.files.items()
        if name in set(sent)
    ]
    # The files first, which nobody can reach before the commit; then it is looked once more who could.
    api.preupload_lfs_files(repo_id, additions, repo_type=upload.kind)
    if upload.restricted and api.repo_info(repo_id, repo_type=upload.kind).private is not True:
        raise UserError(f"{repo_id}: became public meanwhile; nothing restricted was put there")
    api.create_commit(
        repo_id,
        [*additions, *(CommitOperationDelete(name) for name in removed)],
        repo_type=upload.kind,
        commit_message=f"Upload {upload.kind}",
        commit_description=f"Stated by who uploaded it: {complies}" if complies else None,
        # Nobody has put something else there since it was looked at.
        parent_commit=head,
    )


def _some(names: Any) -> str:
    first, *rest = sorted(names)
    return f"{first} and {len(rest)} more" if rest else first


@contextmanager
def _telling(repo_id: str) -> Iterator[None]:
    """Turn errors of the Hub and of the network into one line that says what to do."""
    try:
        yield
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status == 401:
            mend = "give HF_TOKEN another" if os.environ.get("HF_TOKEN") else "run `hf auth login` again"
            raise UserError(f"{repo_id}: the Hub does not accept the token; {mend}") from error
        if status in (403, 404):
            organisation = repo_id.partition("/")[0]
            raise UserError(
                f"{repo_id}: the token may not write there; it needs write access to {organisation}"
            ) from error
        if status in (409, 412):
            raise UserError(f"{repo_id}: was changed meanwhile; see what is there, then run the same again") from error
        raise UserError(f"{repo_id}: the Hub answered {_first_line(error)}") from error
    except Exception as error:
        # An upload's failure wraps that of the network, or of a file here.
        for cause in filter(None, (error, error.__cause__)):
            if isinstance(cause, OSError) and cause.filename:
                raise UserError(f"{cause.filename}: cannot be read ({cause.strerror})") from error
            if isinstance(cause, OSError) or type(cause).__module__.startswith(_NETWORK):
                raise UserError(
                    f"{repo_id}: the connection failed ({_first_line(error)}); run the same command again, what was "
                    "sent is not sent twice"
                ) from error
        raise


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
