"""The URL of a Redis server, cluster or group of sentinels. No message quotes a part of a URL.

    redis://[[USER]:PASSWORD@]HOST[:PORT][/DB][?OPTION=VALUE&…]     rediss:// the same, over TLS
    unix://[[USER]:PASSWORD@]/PATH/OF/SOCKET[?db=DB]
    redis+cluster://[[USER]:PASSWORD@]HOST[:PORT][,HOST[:PORT]…]    rediss+cluster:// over TLS
    redis+sentinel://[[USER]:PASSWORD@]HOST[:PORT][,HOST[:PORT]…]/SERVICE[/DB]

Options of redis-py that are not in `_OPTIONS` are refused, since the protocol relies on what the
worker sets: time-outs, retries, undecoded replies and their version.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

PORT = 6379
SENTINEL_PORT = 26379
Kind = Literal["server", "cluster", "sentinel"]

_KINDS: Mapping[str, Kind] = {"cluster": "cluster", "sentinel": "sentinel", "": "server"}
_SCHEMES = ("redis", "rediss", "unix", "redis+cluster", "rediss+cluster", "redis+sentinel", "rediss+sentinel")
_FORMS: Mapping[Kind, str] = {
    "server": "redis://[[USER]:PASSWORD@]HOST[:PORT][/DB]",
    "cluster": "redis+cluster://[[USER]:PASSWORD@]HOST[:PORT],HOST[:PORT]",
    "sentinel": "redis+sentinel://[[USER]:PASSWORD@]HOST[:PORT],HOST[:PORT]/SERVICE[/DB]",
}
_TLS_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_CHOICES: Mapping[str, Mapping[str, object]] = {
    "ssl_cert_reqs": {name: name for name in ("required", "optional", "none")},
    "ssl_check_hostname": _BOOLEANS,
    "ssl_min_version": {"tlsv1.2": "TLSv1_2", "tlsv1.3": "TLSv1_3"},
}
_TLS_OPTIONS = (*_TLS_FILES, "ssl_ca_path", "ssl_password", *_CHOICES)
_SENTINEL_OPTIONS = ("sentinel_username", "sentinel_password", "sentinel_password_file")
_OPTIONS = ("db", "client_name", "password_file", *_SENTINEL_OPTIONS, *_TLS_OPTIONS)


class Address(NamedTuple):
    """Host and port of one server; the port is 0 for the path of a Unix socket."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Login:
    """User name and password, or the file with the password, which each connection reads anew."""

    username: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    password_file: str = ""

    def merged(self, other: "Login") -> "Login":
        """Add `other`. Raises ValueError if both have a user name, or both a password."""
        if self.username and other.username:
            raise ValueError("the user name is given twice")
        if self._has_password and other._has_password:
            raise ValueError("the password is given twice; use one of the URL, password and password_file")
        username, password = self.username or other.username, self.password or other.password
        return Login(username or None, password or None, self.password_file or other.password_file)

    def read(self) -> tuple[str | None, str | None]:
        """The user name and the password, from the file if there is one.

        Raises ValueError for a file that cannot be read or is empty, in a sentence without secrets.
        """
        if not self.password_file:
            return self.username, self.password
        try:
            password = Path(self.password_file).expanduser().read_text("utf-8").rstrip("\r\n")
        except OSError as error:
            reason = str(error.strerror).lower()
            raise ValueError(f"password_file: cannot read {self.password_file}: {reason}") from None
        except UnicodeDecodeError:
            raise ValueError(f"password_file: {self.password_file} is not UTF-8") from None
        if not password:
            raise ValueError(f"password_file: {self.password_file} is empty; expected the password")
        return self.username, password

    @property
    def _has_password(self) -> bool:
        return bool(self.password or self.password_file)


@dataclass(frozen=True, slots=True)
class RedisUrl:
    """The addresses of a server, and what is sent and checked when a connection opens."""

    scheme: str
    """As in the URL: redis, rediss or unix, or one of the first two with +cluster or +sentinel."""
    addresses: tuple[Address, ...]
    """Of the server; of some nodes of the cluster; of the sentinels. Empty for a Unix socket."""
    path: str = ""
    """Of the socket; empty unless the scheme is unix."""
    service: str = ""
    """The name under which sentinels monitor the server."""
    db: int = 0
    client_name: str | None = None
    login: Login = Login()
    sentinel_login: Login = Login()
    tls: Mapping[str, object] = field(default_factory=dict, repr=False)
    """Options of redis-py's SSLConnection, `ssl_min_version` as the name in `ssl.TLSVersion`."""

    def __str__(self) -> str:
        """The URL without secrets, for messages."""
        if self.scheme == "unix":
            return f"unix://{self.path}"
        service = f"/{self.service}" if self.service else ""
        return f"{self.scheme}://{','.join(map(str, self.addresses))}{service}"

    @property
    def kind(self) -> Kind:
        """What the addresses belong to."""
        return _KINDS[self.scheme.partition("+")[2]]

    @property
    def transport(self) -> str:
        """How to connect: redis (TCP), rediss (TLS) or unix."""
        return self.scheme.partition("+")[0]

    @classmethod
    def parse(cls, url: str) -> "RedisUrl":
        """Parse and check a URL. Raises ValueError with a sentence that is safe to print."""
        url = url.strip()
        scheme = url.partition("://")[0].lower()
        if scheme not in _SCHEMES or "://" not in url:
            several = "redis+cluster://, rediss+cluster://, redis+sentinel:// or rediss+sentinel://"
            raise ValueError(f"must begin with redis://, rediss:// or unix://, or with {several}")
        kind = _KINDS[scheme.partition("+")[2]]
        form = f"expected {_FORMS[kind]}, with special characters in the password percent-encoded, such as %23 for #"
        parts, others, options = _split(url, kind, form)
        tls = {name: _choice(name, value) for name, value in options.items() if name in _TLS_OPTIONS}
        if tls and not scheme.startswith("rediss"):
            raise ValueError(f"the option {next(iter(tls))} needs {scheme.replace('redis', 'rediss')}://")
        path, service, db = _path_service_db(parts, kind, options)
        login = Login(_decoded(parts.username, form), _decoded(parts.password, form))
        return cls(
            scheme,
            _addresses(parts, others, kind, form),
            path,
            service,
            db,
            options.get("client_name"),
            login.merged(Login(password_file=options.get("password_file", ""))),
            _sentinel_login(options, kind),
            tls,
        )

    def with_logins(self, login: Login, sentinel_login: Login) -> "RedisUrl":
        """Add user name and password from elsewhere. Raises ValueError if the URL has them too."""
        merged = replace(self, login=self.login.merged(login))
        if any((sentinel_login.username, sentinel_login._has_password)) and self.kind != "sentinel":
            raise ValueError("a user name or password of sentinels needs redis+sentinel://")
        return replace(merged, sentinel_login=self.sentinel_login.merged(sentinel_login))

    def check_files(self) -> None:
        """Raise ValueError if a file of the TLS options or a password file cannot be read."""
        for name in _TLS_FILES:
            path = self.tls.get(name)
            if path is not None and not Path(str(path)).is_file():
                raise ValueError(f"{name}: there is no file {path}")
        self.login.read()
        self.sentinel_login.read()


def _split(url: str, kind: Kind, form: str) -> tuple[SplitResult, list[str], dict[str, str]]:
    """Split a URL into its parts with the first address, the other addresses, and the options.

    A raw #, / or ? in the password leaves an @ behind the host, and is refused.
    """
    if re.search(r"[\s\x00-\x1f\x7f]", url):
        raise ValueError(f"contains white space or a control character; {form}")
    scheme, _, rest = url.partition("://")
    end = re.search("[/?#]|$", rest)
    assert end is not None, "the pattern matches the end of the text"
    userinfo, at, addresses = rest[: end.start()].rpartition("@")
    first, *others = [addresses] if kind == "server" else addresses.split(",")
    try:
        parts = urlsplit(f"{scheme}://{userinfo}{at}{first}{rest[end.start() :]}")
        query = parts.query.replace("+", "%2B")  # it stands for itself, in passwords and names of files
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query), errors="strict")
    except ValueError:  # its text quotes the URL
        raise ValueError(f"is not a valid URL; {form}") from None
    if parts.fragment or url.endswith("#") or "@" in parts.path + parts.query:
        raise ValueError(f"has a special character in the wrong place; {form}")
    for name, _ in pairs:
        if name not in _OPTIONS:
            shown = f"the option {name}" if re.fullmatch(r"\w{1,40}", name) else "an option"
            raise ValueError(f"{shown} is not supported; expected no other than {', '.join(_OPTIONS)}")
    options = dict(pairs)
    if len(options) < len(pairs):
        raise ValueError("has the same option twice")
    if not re.fullmatch(r"[!-~]*", options.get("client_name", "")):
        raise ValueError("the option client_name must consist of printable ASCII characters without spaces")
    return parts, others, options


def _addresses(parts: SplitResult, others: list[str], kind: Kind, form: str) -> tuple[Address, ...]:
    if parts.scheme == "unix":
        if parts.hostname or not parts.path.strip("/"):
            raise ValueError("expected unix:///PATH of a socket, with three slashes")
        return ()
    if "," in parts.netloc.rpartition("@")[2]:
        raise ValueError("several hosts need redis+cluster:// or redis+sentinel://")
    default = SENTINEL_PORT if kind == "sentinel" else PORT
    try:
        found = [parts, *(urlsplit(f"//{other}") for other in others)]
        nameless = len(found) > 1 and not all(each.hostname for each in found)
        if nameless or any(each.path or each.username is not None for each in found[1:]):
            raise ValueError
        addresses = [
            Address(each.hostname or "localhost", default if each.port is None else each.port) for each in found
        ]
        for address in addresses:
            address.host.encode("idna")
    except ValueError:  # its text quotes the port or the host; UnicodeError is a ValueError
        addresses = [Address("", 0)]
    if not all(0 < address.port < 65536 for address in addresses):
        raise ValueError(f"the host or the port is not valid; {form}")
    return tuple(dict.fromkeys(addresses))


def _path_service_db(parts: SplitResult, kind: Kind, options: Mapping[str, str]) -> tuple[str, str, int]:
    """The socket's path, the sentinels' service, and the database."""
    numbers = [options["db"]] if "db" in options else []
    path, service = parts.path.strip("/"), ""
    if kind == "sentinel":
        service, _, path = path.partition("/")
        if not re.fullmatch(r"[A-Za-z0-9._-]+", service):
            raise ValueError(f"the name of the service is missing or not valid; expected {_FORMS[kind]}")
    if parts.scheme != "unix" and path:
        numbers.append(path)
    if len(set(numbers)) > 1 or not all(re.fullmatch(r"[0-9]{1,9}", number) for number in numbers):
        raise ValueError("the database must be one number, as in redis://HOST/0")
    db = int(numbers[0]) if numbers else 0
    if kind == "cluster" and db:
        raise ValueError("the database of a cluster must be 0")
    try:
        return unquote(parts.path, errors="strict") if parts.scheme == "unix" else "", service, db
    except UnicodeDecodeError:
        raise ValueError("the path is not UTF-8 after %XX is decoded") from None


def _sentinel_login(options: Mapping[str, str], kind: Kind) -> Login:
    given = next((name for name in _SENTINEL_OPTIONS if name in options), None)
    if given and kind != "sentinel":
        raise ValueError(f"the option {given} needs redis+sentinel://")
    username, password, password_file = (options.get(name) for name in _SENTINEL_OPTIONS)
    return Login(username, password).merged(Login(password_file=password_file or ""))


def _choice(name: str, value: str) -> object:
    if name not in _CHOICES:
        return value
    if value.lower() not in _CHOICES[name]:
        raise ValueError(f"the option {name} must be one of {', '.join(_CHOICES[name])}")
    return _CHOICES[name][value.lower()]


def _decoded(text: str | None, form: str) -> str | None:
    try:
        return unquote(text, errors="strict") if text else None
    except UnicodeDecodeError:
        raise ValueError(f"is not UTF-8 after %XX is decoded; {form}") from None
