"""Keeps Python on this machine: Python imports a module of this name when it starts, from the folders of PYTHONPATH.

The tests' own process imports it too, so that neither a test nor a program that it starts reaches another machine.
"""

import ipaddress
import socket


_ALLOWED = {None, "", "localhost", socket.gethostname()}


def is_here(host):
    if isinstance(host, bytes):
        host = host.decode()
    if host in _ALLOWED:
        return True
    try:
        address = ipaddress.ip_address(str(host).partition("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def guard(call, host_of):
    def guarded(*args, **kwargs):
        if not is_here(host := host_of(args)):
            raise OSError(f"no test may reach {host}")
        return call(*args, **kwargs)

    guarded.__name__ = call.__name__
    return guarded


def host_of_connection(args):
    connection, address = args[0], args[-1]
    return address[0] if connection.family in (socket.AF_INET, socket.AF_INET6) else None


if not getattr(socket, "stays_here", False):
    socket.stays_here = True
    for name in ("connect", "connect_ex", "sendto"):
        setattr(socket.socket, name, guard(getattr(socket.socket, name), host_of_connection))
    for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex"):
        setattr(socket, name, guard(getattr(socket, name), lambda args: args[0]))
