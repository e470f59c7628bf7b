"""What a data use agreement forbids: restricted text and images stay on this machine.

PhysioNet counts sending credentialed data to an online service as sharing it with a third party (statement of
2025-09-24 on the responsible use of language models), so only a model on this machine may read them, unless the user
names who agreed to more.
"""

from __future__ import annotations

import ipaddress
from typing import Any
from urllib.parse import urlsplit

from .errors import UserError


RESTRICTED_NOTICE = "Restricted: derived from data under a data use agreement; must not be shared."


def says_it_is_free(record: Any) -> bool:
    """
    Whether a record states that nothing of it derives from data under an agreement; one that is silent may.

    >>> says_it_is_free({"restricted": False}), says_it_is_free({})
    (True, False)
    """
    return isinstance(record, dict) and record.get("restricted") is False


def is_loopback(url: str) -> bool:
    """Whether an address is this machine. Names are not looked up: only `localhost` is known to be.

    Example:
        >>> is_loopback("http://127.0.0.1:8000/v1"), is_loopback("https://api.example.org/v1")
        (True, False)
    """
    try:
        host = urlsplit(url).hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_endpoint(
    url: str, *, restricted: bool, complies: str, flags: tuple[str, str] = ("--endpoint", "--endpoint-complies")
) -> None:
    """Refuse an endpoint to which restricted text must not go. Nothing is sent and no name is looked up.

    Args:
        url (`str`): The endpoint.
        restricted (`bool`): Whether the text that would be sent stands under an agreement.
        complies (`str`): Who agreed, under what terms, that it may go there; empty if nobody did.
        flags (`tuple[str, str]`, *optional*): What the user gives `url` and `complies` by.

    Raises:
        UserError: The text is restricted, the endpoint is not this machine, and nobody agreed.
    """
    if restricted and not is_loopback(url) and not complies.strip():
        raise UserError(
            f"{flags[0]} {url}: is not this machine, and the corpus is restricted: its text must not leave; serve a "
            f'model on 127.0.0.1, or state {flags[1]} "who agreed, under what terms"'
        )


def check_sharing(
    what: str,
    *,
    restricted: bool,
    target: str,
    endpoint: str = "",
    complies: str = "",
    public: bool = False,
) -> None:
    """Refuse to publish something that is restricted.

    Args:
        what (`str`): The dataset or checkpoint.
        restricted (`bool`): Whether it derives from data under an agreement.
        target (`str`): Where it would go, as the user named it.
        endpoint (`str`, *optional*): Address of the Hub; nothing is sent and no name is looked up.
        complies (`str`, *optional*): Who agreed, under what terms, that it may go there; empty if nobody did.
        public (`bool`, *optional*, defaults to `False`): Whether everybody is to see it, to which nobody can agree.

    Raises:
        UserError: It is restricted, and would be public, or the Hub is not on this machine and nobody agreed.
    """
    if not restricted:
        return
    says = f"{what} is restricted (derived from data under a data use agreement)"
    if public:
        raise UserError(f"{target}: {says} and cannot be published: leave out what would make it public")
    if not is_loopback(endpoint) and not complies.strip():
        raise UserError(
            f"{target}: {says} and cannot be published; to a private repository of a Hub that the agreement allows, "
            '`medforget push … --endpoint-complies "who agreed, under what terms"` sends it'
        )
