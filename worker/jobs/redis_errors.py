"""Exceptions of redis-py as those of `Streams`, by the code that begins the server's error reply.

| cause | exception |
| --- | --- |
| no reply: connection refused or lost, time-out | Disconnected; the call may have taken effect |
| a temporary state (`_BUSY`) | Disconnected with `reply`; the call had no effect |
| password, user, rights, TLS (`_ACCESS`) | ServerRefused; if `waiting`, Disconnected |
| anything else | ServerRefused |

A server in a state of `_BUSY` refuses a command, and a script at its first write, before execution.
Texts differ between servers and versions. Only those behind the code ERR are compared (`_PLAIN`).
"""

import os
import re
import ssl
from collections.abc import Iterator

from redis import exceptions

from worker.errors import ServerRefused
from worker.jobs.redis_commands import keys_of
from worker.jobs.redis_resp import Command
from worker.jobs.streams import Disconnected

_CLUSTER = "it is a node of a cluster; use a URL that begins with redis+cluster://"
_BUSY = {
    "BUSY": "a script has been running for seconds",
    "CLUSTERDOWN": "its cluster is down",
    "LOADING": "it is loading its data",
    "MASTERDOWN": "it is a replica without its primary",
    "MAXCLIENTS": "its maximum number of clients is reached",
    "MISCONF": "it cannot write its data to disk",
    "NOREPLICAS": "too few replicas are connected",
    "NOSCRIPT": "its scripts were flushed",
    "OOM": "its memory limit is reached",
    "READONLY": "it is a read-only replica",
    "TRYAGAIN": "its cluster is moving keys",
    "UNBLOCKED": "its role has changed",
}
_RIGHTS = "deploy/redis/users.acl has the rights of each role"
_ACCESS = {
    "NOAUTH": "it requires a password; pass one in the URL, redis://:PASSWORD@HOST",
    "NOPASSWORD": "the URL has a password and the server has none",
    "NOPERM": f"the user lacks a right; {_RIGHTS}",
    "TLS": "see the options of TLS in docs/operations.md",
    "WRONGPASS": "the user name or the password is wrong, or the user is disabled",
}
_PERMANENT = {
    "ASK": _CLUSTER,
    "CLUSTER": _CLUSTER,
    "CROSSSLOT": _CLUSTER,
    "DB": "it has no database of that number; name another at the end of the URL, such as /0",
    "MOVED": _CLUSTER,
    "NOCLUSTER": "it is not a node of a cluster; use a URL that begins with redis://",
    "NOSENTINEL": "it is no Sentinel; use redis://HOST for a server, or the sentinels' ports, by default 26379",
    "NOSERVICE": "the sentinels monitor no service of the name in the URL",
}
_PLAIN = {
    "max number of clients": "MAXCLIENTS",
    "in cluster mode": "CLUSTER",
    "cluster support disabled": "NOCLUSTER",
    "No such master": "NOSERVICE",
    "unknown command 'SENTINEL'": "NOSENTINEL",
    "invalid username-password pair": "WRONGPASS",  # redis-py 6 removes the code of these in front of the text
    "Authentication required": "NOAUTH",
    "has no permissions": "NOPERM",
    "is loading the dataset": "LOADING",
    "DB index": "DB",
    "without any password": "NOPASSWORD",
    "no password is set": "NOPASSWORD",
    "Protocol error: unauthenticated": "NOAUTH",  # the reply to more than 10 arguments, or to a large one
    "invalid password": "WRONGPASS",
    "ACL failure in script": "NOPERM",
    "The user executing the script": "NOPERM",  # cannot run a command, or access a key
    "BUSYGROUP": "BUSYGROUP",  # some servers put ERR before these
    "NOGROUP": "NOGROUP",
}
"""Parts of texts behind the code ERR, and the code by which such a reply is named here."""

_TLS_ALERTS = {
    "SSLV3_ALERT_HANDSHAKE_FAILURE": "the server accepts no parameters of ours; it may require a client certificate",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "it requires a client certificate: ssl_certfile and ssl_keyfile",
    "TLSV1_ALERT_UNKNOWN_CA": "it does not accept the client certificate",
}
"""Reasons that the server gives."""

_WRAPPED = re.compile(r"(?:Error running script|Transaction discarded|Command #).*?(?:: ?-?|\(['\"])([A-Z]{2,}) ", re.S)
"""Another reply inside: of a script before Redis 7, of EXEC, of redis-py's pipeline."""

_TYPES = {"X": "stream", "H": "hash", "Z": "sorted set"}
"""Types of keys by the first letter of their commands."""


_KNOWN = frozenset(("", "WRONGTYPE", *_BUSY, *_ACCESS, *_PERMANENT))
_REPLIES = (exceptions.ResponseError, exceptions.AuthenticationError, exceptions.BusyLoadingError)


def code_of(error: exceptions.RedisError) -> str:
    """The code of the server's error reply, such as READONLY; empty if there was no reply."""
    text = str(error)
    if match := _WRAPPED.match(text):
        return match[1]
    code = getattr(error, "status_code", None) or ""  # of redis-py 7
    if not code and isinstance(error, _REPLIES):
        first = re.match(r"-?([A-Z]{2,})(?: |$)", text)
        code = first[1] if first else "ERR"
    if code == "UNBLOCKED" and "stream key no longer exists" in text:
        return "NOGROUP"  # as of Redis 7.2: the queue that was waited for is deleted
    if code not in _KNOWN:  # ERR, or with redis-py 6 the first word behind it
        return next((named for part, named in _PLAIN.items() if part in text), code)
    return code


def translate(
    error: exceptions.RedisError, server: str, *, waiting: bool = False, replied: bool = False
) -> Disconnected | ServerRefused:
    """The exception to raise for `error`. Its message names the cause, and holds no secret.

    `waiting`: refused access is temporary too, since an operator may restore it. `replied`: the
    server has replied as a Redis server before, so bytes that are no reply were damaged on the way.
    """
    tls = next((each for each in _causes(error) if isinstance(each, ssl.SSLError)), None)
    if tls is not None and not isinstance(tls, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        code, why = "TLS", f"TLS failed ({_tls_reason(tls)}); {_ACCESS['TLS']}"
    elif code := code_of(error):
        why = f"{_explanation(code, error)} ({code})"
    elif isinstance(error, exceptions.ConnectionError | exceptions.TimeoutError) or (
        replied and isinstance(error, exceptions.InvalidResponse)
    ):
        hint = _tls_hint(error) if server.startswith("rediss") else ""
        where = getattr(error, "where", "")
        lost = Disconnected(f"cannot reach {server} ({where}{': ' if where else ''}{_lost_reason(error)}{hint})")
        lost.node = where if where.startswith("node") else ""
        lost.is_local = str(error).startswith("password_file")
        return lost
    else:
        code, why = "PROTOCOL", "it does not reply as a Redis server does"
    if code in _BUSY or (waiting and code in _ACCESS):
        return Disconnected(f"{server} refuses for now: {why}", code)
    return ServerRefused(f"{server} refuses: {why}", {"reply": code})


def _explanation(code: str, error: exceptions.RedisError) -> str:
    """Why the server refused: a fixed sentence, or its own text without the command's arguments."""
    inner = re.fullmatch(r"Command # .* caused error: \(['\"](.*)['\"],\)", str(error), re.S)
    own = (inner[1] if inner else str(error)).partition(", with args")[0].rstrip(".")
    own = own.removeprefix("ERR ").removeprefix(f"{code} ")
    if code == "NOPERM":
        return _missing_right(own, getattr(error, "command", ()))
    if code == "WRONGTYPE":
        command = getattr(error, "command", ())
        keys = " or ".join(keys_of(command)) or "a key that the worker uses"
        needed = _TYPES.get(str(command[0])[0]) if command else None
        return f"{keys} holds a value of another type{f' than a {needed}' if needed else ''}; delete or rename the key"
    return _BUSY.get(code) or _ACCESS.get(code) or _PERMANENT.get(code) or own


def _missing_right(own: str, command: Command) -> str:
    """Name the command and the keys that are refused; the user's name, in `own`, is not shown."""
    keys, name = keys_of(command), str(command[0]).lower() if command else ""
    if refused := re.search("no right to run '([^']+)' on '([^']*)'", own):  # of `lua/rights.lua`
        name, keys = refused[1], list(filter(None, [refused[2]]))
    elif refused := re.search("run the '([^']+)'|command '([^']+)'", own):
        name = refused[1] or refused[2]
    elif keys and " key" in own:
        return f"the user may not access {' or '.join(keys)} ({name}); {_RIGHTS}"
    on = f" on {' and '.join(keys)}" if keys else ""
    return f"the user lacks the right to run '{name}'{on}; {_RIGHTS}" if name else _ACCESS["NOPERM"]


def _lost_reason(error: exceptions.RedisError) -> str:
    """The operating system's reason, such as `connection refused`, or else the error's text."""
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLError):
            return "connection closed during the TLS handshake"
        if isinstance(cause, OSError) and cause.errno:
            return (os.strerror(cause.errno) if cause.errno > 0 else str(cause.strerror)).lower()
        if isinstance(cause, OSError) and (number := re.search(r"\[Errno (\d+)\]", str(cause))):  # of several addresses
            return os.strerror(int(number[1])).lower()
    if isinstance(error, exceptions.TimeoutError):
        return "no reply in time"
    text = str(error).removeprefix("Error UNKNOWN while writing to socket. ").rstrip(".")
    return text if text.startswith("password_file") else text.lower()  # it has a path


def _tls_hint(error: exceptions.RedisError) -> str:
    """What may be wrong with TLS, if a connection was closed before any reply."""
    if "connecting" in str(error):
        return "; does its port expect TLS?"
    closed = re.search("closed|reset", _lost_reason(error))
    return "; does it require a client certificate?" if closed and getattr(error, "is_first", False) else ""


def _tls_reason(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate not accepted: {error.verify_message.rstrip('.')}"
    reason = error.reason or "unknown reason"
    return _TLS_ALERTS.get(reason, reason.lower().replace("_", " "))


def _causes(error: BaseException) -> Iterator[BaseException]:
    while (cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__)) is not None:
        yield cause
        error = cause
