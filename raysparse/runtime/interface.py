"""The network interface over which ranks on several machines talk: the one that Ray uses. Plain Python: a doctor sends it to any node.

gloo would look up the host name, which many systems answer with 127.0.1.1: no rank on another machine can be reached by that.
"""

import os
import socket
import struct
import sys

VARIABLE = "GLOO_SOCKET_IFNAME"
SIOCGIFADDR = 0x8915
"""Asks Linux for the address of an interface."""


def interface_of(address: str) -> str | None:
    """The interface of this machine that has an IPv4 address; None where none has, or this is not Linux."""
    if sys.platform != "linux":
        return None
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(asked.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # it has no address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def use_interface(address: str) -> None:
    """Have gloo use the interface of an address of this machine, unless somebody chose one, or none has it."""
    if (name := interface_of(address)) is not None:
        os.environ.setdefault(VARIABLE, name)
