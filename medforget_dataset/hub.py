"""Publishing on the Hub: what goes up is private first, and what is restricted stays so."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id

from .agreement import check_sharing
from .errors import UserError
from .writer import RECORD, changed_file, read_record


Content = Path | bytes
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Made by the Hub itself in every repository.
_HUBS_OWN = ".gitattributes"


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
    sent: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    private: bool = True


def dataset_upload(folder: Path) -> Upload:
    """
    The files of a dataset folder, exactly as they were built.

    Args:
        folder (`Path`):
            A folder written by [`~medforget_dataset.build`].

    Raises:
        UserError: The folder is not a MedForget dataset, a file is not as it was built, or it breaks an invariant.
    """
    from .validate import validate

    record = read_record(folder)
    for name in record["files"]:
        if problem := changed_file(folder, name, record):
            raise UserError(f"{problem}; build the dataset again")
    if problems := validate(folder):
        more = f" and {len(problems) - 1} more" if problems[1:] else ""
        raise UserError(f"{problems[0]}{more}; see `medforget validate {folder}`, and build the dataset again")
    files = {name: folder / name for name in (RECORD, *record["files"])}
    return Upload("dataset", files, is_restricted_dataset(folder))


def is_restricted_dataset(folder: Path) -> bool:
    """Whether a dataset folder is restricted. The mark stands in the record and in every row; one is enough."""
    record = read_record(folder)
    return record["restricted"] or any(_has_restricted_rows(folder / name) for name in record["files"])


def _has_restricted_rows(file: Path) -> bool:
    if file.suffix != ".parquet" or not file.is_file():
        return False
    return any(pq.read_table(file, columns=["restricted"])["restricted"].to_pylist())


def push_dataset(
    folder: Path, repo_id: str, *, public: bool = False, replace: bool = False, complies: str = ""
) -> Published:
    """
    Upload a dataset folder as it was built to a private repository.

    Args:
        folder (`Path`):
            A folder written by [`~medforget_dataset.build`].
        repo_id (`str`):
            `ORG/NAME` on the Hub; made if it is not there, private.
        public (`bool`), replace (`bool`), complies (`str`):
            As in [`publish`].

    Returns:
        [`Published`]: What was sent.

    Raises:
        UserError: As [`dataset_upload`] and [`publish`].
    """
    check_allowed(str(folder), repo_id, restricted=is_restricted_dataset(folder), public=public, complies=complies)
    upload = dataset_upload(folder)
    return publish(upload, repo_id, what=str(folder), public=public, replace=replace, complies=complies)


def check_name(repo_id: str) -> None:
    """
    Refuse what cannot be the name of a repository of ours.

    Raises:
        UserError: It has no organisation, or characters that the Hub does not take.
    """
    if repo_id.count("/") != 1:
        raise UserError(f"{repo_id}: give ORG/NAME, an organisation or user on the Hub and the repository's name")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"{repo_id}: not a name that the Hub takes: {_first_line(error)}") from error


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
    api = _prepare(upload, repo_id, what=what, public=public, complies=complies, token=token)
    with _telling(repo_id):
        private, there, head = _open(api, upload, repo_id, public=public)
        sent, removed = _differences(upload, there)
        _check_replaceable(upload, repo_id, sent, removed, there, replace=replace)
        if sent or removed:
            _commit(api, upload, repo_id, sent, removed, head, complies)
        if public and private:
            api.update_repo_settings(repo_id, repo_type=upload.kind, private=False)
            private = False
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
    api = _prepare(upload, repo_id, what=what, public=public, token=token)
    with _telling(repo_id):
        _, there, _ = _open(api, upload, repo_id, public=public)
        if there:
            raise UserError(
                f"{repo_id}: holds {_some(there)} already; choose another name, or push the finished checkpoint with "
                "`medforget push model --replace`"
            )


def is_hub_id(path: str) -> bool:
    """
    Whether a checkpoint's or dataset's name can only mean a repository on the Hub.

    >>> is_hub_id("lingshu-medical-mllm/Lingshu-7B"), is_hub_id("./runs/vanilla")
    (True, False)
    """
    folder = Path(path)
    return not path.startswith(".") and bool(_HUB_ID.fullmatch(path)) and not folder.parent.is_dir()


def hub_file(repo_id: str, name: str) -> Path | None:
    """
    A small file of a model on the Hub, from the cache if there is no network.

    Args:
        repo_id (`str`):
            Hub id; of anything else there is no file.
        name (`str`):
            Path in the repository.
    """
    if not is_hub_id(repo_id):
        return None
    try:
        return Path(hf_hub_download(repo_id, name))
    except (HfHubHTTPError, OSError, ValueError):  # who loads it next says what is wrong with the repository
        return None


def _prepare(
    upload: Upload, repo_id: str, *, what: str, public: bool, complies: str = "", token: str | None = None
) -> HfApi:
    check_allowed(what, repo_id, restricted=upload.restricted, public=public, complies=complies)
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{repo_id}: HF_HUB_OFFLINE is set, so that nothing can be sent; unset it")
    if not (token := token or get_token()):
        raise UserError(f"{repo_id}: no Hub token; run `hf auth login`, or set HF_TOKEN to one that may write")
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
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == there.blob_id  # as git names it


def _check_replaceable(
    upload: Upload, repo_id: str, sent: list[str], removed: list[str], there: dict[str, RepoFile], *, replace: bool
) -> None:
    """What an interrupted push has left is gone on with; only something else is not."""
    others = [name for name in sent if name in there and name not in upload.describing] + removed
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
    """Inside the context, what the Hub or the network says is one line that says what to do."""
    try:
        yield
    except UserError:
        raise
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status == 401:
            raise UserError(f"{repo_id}: the Hub does not accept the token; run `hf auth login` again") from error
        if status in (403, 404):
            organisation = repo_id.partition("/")[0]
            raise UserError(
                f"{repo_id}: the token may not write there; it needs write access to {organisation}"
            ) from error
        raise UserError(f"{repo_id}: the Hub answered {_first_line(error)}") from error
    except Exception as error:  # whatever a network does, of an HTTP library that differs by version
        raise UserError(
            f"{repo_id}: the connection failed ({_first_line(error)}); run the same command again, what was sent is "
            "not sent twice"
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
