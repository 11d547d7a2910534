"""The URL of a Redis server: its parts and options. No message quotes a part of a URL.

    redis://[[USER]:PASSWORD@]HOST[:PORT][/DB][?OPTION=VALUE&…]     rediss:// the same, over TLS
    unix://[[USER]:PASSWORD@]/PATH/OF/SOCKET[?db=DB]

Options of redis-py that are not in `_OPTIONS` are refused, since the protocol relies on what the
worker sets: time-outs, retries, undecoded replies and their version.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

PORT = 6379

_FORM = (
    "expected redis://[[USER]:PASSWORD@]HOST[:PORT][/DB], "
    "with special characters in the password percent-encoded, such as %23 for #"
)
_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_CHOICES: Mapping[str, Mapping[str, object]] = {
    "ssl_cert_reqs": {name: name for name in ("required", "optional", "none")},
    "ssl_check_hostname": _BOOLEANS,
    "ssl_min_version": {"tlsv1.2": "TLSv1_2", "tlsv1.3": "TLSv1_3"},
}
_TLS_OPTIONS = (*_FILES, "ssl_ca_path", "ssl_password", *_CHOICES)
_OPTIONS = ("db", "client_name", *_TLS_OPTIONS)


@dataclass(frozen=True, slots=True)
class RedisUrl:
    """A server's address, and what is sent and checked when a connection opens."""

    scheme: str
    host: str
    port: int
    path: str
    """Of the socket; empty unless the scheme is unix."""
    db: int
    client_name: str | None = None
    username: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    tls: Mapping[str, object] = field(default_factory=dict, repr=False)
    """Options of redis-py's SSLConnection, `ssl_min_version` as the name in `ssl.TLSVersion`."""

    def __str__(self) -> str:
        """The URL without secrets, for messages."""
        if self.scheme == "unix":
            return f"unix://{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"

    @classmethod
    def parse(cls, url: str) -> "RedisUrl":
        """Parse and check a URL. Raises ValueError with a sentence that is safe to print."""
        url = url.strip()
        if not url.lower().startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("must begin with redis://, rediss:// or unix://")
        parts, options = _split(url)
        host, port = _endpoint(parts)
        tls = {name: _choice(name, value) for name, value in options.items() if name in _TLS_OPTIONS}
        if tls and parts.scheme != "rediss":
            raise ValueError(f"the option {next(iter(tls))} needs rediss://")
        username, password = _decoded(parts.username), _decoded(parts.password)
        path, db = _path_and_db(parts, options)
        return cls(parts.scheme, host, port, path, db, options.get("client_name"), username, password, tls)

    def check_files(self) -> None:
        """Raise ValueError if a file of the TLS options cannot be read."""
        for name in _FILES:
            path = self.tls.get(name)
            if path is not None and not Path(str(path)).is_file():
                raise ValueError(f"{name}: there is no file {path}")


def _split(url: str) -> tuple[SplitResult, dict[str, str]]:
    """Split a URL. A raw #, / or ? in the password leaves an @ behind the host, and is refused."""
    if re.search(r"[\s\x00-\x1f\x7f]", url):
        raise ValueError(f"contains white space or a control character; {_FORM}")
    try:
        parts = urlsplit(url)
        pairs = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query), errors="strict")
    except ValueError:  # its text quotes the URL
        raise ValueError(f"is not a valid URL; {_FORM}") from None
    if parts.fragment or url.endswith("#") or "@" in parts.path + parts.query:
        raise ValueError(f"has a special character in the wrong place; {_FORM}")
    for name, _ in pairs:
        if name not in _OPTIONS:
            shown = f"the option {name}" if re.fullmatch(r"\w{1,40}", name) else "an option"
            raise ValueError(f"{shown} is not supported; expected no other than {', '.join(_OPTIONS)}")
    options = dict(pairs)
    if len(options) < len(pairs):
        raise ValueError("has the same option twice")
    if not re.fullmatch(r"[!-~]*", options.get("client_name", "")):
        raise ValueError("the option client_name must consist of printable ASCII characters without spaces")
    return parts, options


def _endpoint(parts: SplitResult) -> tuple[str, int]:
    if parts.scheme == "unix":
        if parts.hostname or not parts.path.strip("/"):
            raise ValueError("expected unix:///PATH of a socket, with three slashes")
        return "", PORT
    try:
        host, port = parts.hostname or "localhost", parts.port if parts.port is not None else PORT
        host.encode("idna")
    except ValueError:  # its text quotes the port or the host; UnicodeError is a ValueError
        port = 0
    if not 0 < port < 65536:
        raise ValueError(f"the host or the port is not valid; {_FORM}")
    return host, port


def _path_and_db(parts: SplitResult, options: Mapping[str, str]) -> tuple[str, int]:
    is_socket = parts.scheme == "unix"
    numbers = [options["db"]] if "db" in options else []
    if not is_socket and parts.path.strip("/"):
        numbers.append(parts.path.strip("/"))
    if len(set(numbers)) > 1 or not all(re.fullmatch(r"[0-9]{1,9}", number) for number in numbers):
        raise ValueError("the database must be one number, as in redis://HOST/0")
    return _decoded(parts.path) or "" if is_socket else "", int(numbers[0]) if numbers else 0


def _choice(name: str, value: str) -> object:
    if name not in _CHOICES:
        return value
    if value.lower() not in _CHOICES[name]:
        raise ValueError(f"the option {name} must be one of {', '.join(_CHOICES[name])}")
    return _CHOICES[name][value.lower()]


def _decoded(text: str | None) -> str | None:
    try:
        return unquote(text, errors="strict") if text else None
    except UnicodeDecodeError:
        raise ValueError(f"is not UTF-8 after %XX is decoded; {_FORM}") from None
