"""URLs of servers: well-formed, without secrets, and whether they are this machine."""

from __future__ import annotations

import ipaddress
import urllib.parse


def checked_url(url: str) -> str:
    """The URL without a trailing slash. ValueError unless it is http(s)://host..., free of user names, keys and queries."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{_without_secrets(parts)!r} is not an http:// or https:// URL")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError(
            f"{_without_secrets(parts)!r} carries a user name, key or query; "
            "put the key into the environment variable that the config names"
        )
    return url.rstrip("/")


def is_loopback(url: str) -> bool:
    """Whether the URL's host is this machine: localhost or a loopback address."""
    host = urllib.parse.urlsplit(url).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _without_secrets(parts: urllib.parse.SplitResult) -> str:
    return f"{parts.scheme}://{parts.hostname or ''}{parts.path}"
