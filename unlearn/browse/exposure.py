"""Who may see the page: this machine's user, unless nothing that it shows is restricted."""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence

from medforget_dataset.agreement import is_loopback
from medforget_dataset.errors import UserError


LOOPBACK = "127.0.0.1"
FIRST_PORT, PORTS = 7860, 100
_WHY = "is restricted (derived from data under a data use agreement) and stays on this machine"


def check_exposure(restricted: Sequence[str], *, host: str, share: bool, on_space: bool = False) -> None:
    """
    Refuse to show restricted things to other machines.

    Args:
        restricted (`Sequence[str]`):
            What is restricted of what the page shows: names of a dataset, a run or checkpoints.
        host (`str`):
            Address to serve at.
        share (`bool`):
            Whether a public address was asked for.
        on_space (`bool`, *optional*, defaults to `False`):
            Whether this runs on the Hub.

    Raises:
        UserError: Something is restricted, and others could see it.
    """
    if not restricted:
        return
    if on_space:
        raise UserError(f"{restricted[0]}: {_WHY}; a Space cannot show it")
    if share:
        raise UserError(f"--share: {restricted[0]} {_WHY}; leave --share out")
    if not is_this_machine(host):
        raise UserError(f"--host {host}: {restricted[0]} {_WHY}; leave --host out")


def is_this_machine(host: str) -> bool:
    """
    Whether only this machine can reach an address.

    >>> [is_this_machine(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "ward-pc")]
    [True, True, True, False, False]
    """
    return is_loopback(f"http://[{host}]" if ":" in host else f"http://{host}")


def free_port(host: str, port: int | None) -> int:
    """
    The port to serve at: the one asked for, or the first free one from 7860 on.

    Raises:
        UserError: The port is taken, is none, or needs rights; the host is no address of this machine; or none of a
            hundred ports is free.
    """
    if port is not None:
        if not 1 <= port <= 65535:
            raise UserError(f"--port {port}: must be between 1 and 65535")
        if problem := _problem(host, port):
            raise UserError(f"--port {port}: {problem}; leave --port out to take the next free one")
        return port
    tried = range(FIRST_PORT, FIRST_PORT + PORTS)
    for candidate in tried:
        if not _problem(host, candidate):
            return candidate
    raise UserError(f"no port between {tried[0]} and {tried[-1]} is free on {host}; give --port")


def _problem(host: str, port: int) -> str:
    """Why a port cannot be used; empty if it can."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host {host}: not an address of this machine ({error})") from error
    with socket.socket(family, kind, protocol) as trial:
        # As the server binds: a port that a closed connection still holds is free.
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(address)
        except PermissionError:
            return "not allowed to this user"
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise UserError(f"--host {host}: not an address of this machine") from error
            return "taken by another program"
    return ""
