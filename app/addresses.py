"""Which addresses a webhook may go to: public ones, by whatever way they are written."""

from __future__ import annotations

import asyncio
import ipaddress
import socket

from app.pools import Pool

_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
_MAPPED = ipaddress.IPv6Network("::ffff:0:0/96")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_SIX_TO_FOUR = ipaddress.IPv6Network("2002::/16")
_RELAYS = ipaddress.IPv4Network("192.88.99.0/24")  # of 6to4: whoever is nearest answers


class AddressRefused(Exception):
    """The host of a webhook resolves to an address that is not public."""


def is_public(text: str) -> bool:
    """Whether an address is one of the public internet. Raises ValueError for no address.

    An IPv6 address that stands for an IPv4 one (mapped, NAT64, 6to4) is judged by that one; of
    the rest only global unicast is public, so nothing passes because a list forgot it.
    """
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv4Address):
        return address.is_global and not address.is_multicast and address not in _RELAYS
    if address in _MAPPED or address in _NAT64:
        return is_public(str(ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)))
    if address in _SIX_TO_FOUR:
        return is_public(str(ipaddress.IPv4Address(int(address) >> 80 & 0xFFFF_FFFF)))
    return address in _GLOBAL_UNICAST and address.is_global


async def checked_address(
    host: str, port: int, *, private_too: bool, lookups: Pool | None = None
) -> str:
    """An address of the host. Raises AddressRefused if any of them is not public, OSError.

    lookups: threads for names, whose owners decide how long that takes.
    """
    if lookups is None:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    else:
        found = await lookups.run(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]) for entry in found]
    for address in addresses:
        if not private_too and not is_public(address):
            raise AddressRefused(f"{host} is {address}, which is not a public address")
    return addresses[0]
