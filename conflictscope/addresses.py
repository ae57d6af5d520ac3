"""Which network addresses can be reached from elsewhere."""

from __future__ import annotations

import ipaddress


def is_local(host: str) -> bool:
    """Say whether an address is this machine's own, so that no other reaches it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
