"""The URL of a server: what it may contain, and that no message quotes a part of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.errors import ConfigInvalid
from worker.jobs.client import Client
from worker.redis_url import RedisUrl


def refusal_of(url: str) -> str:
    """The message with which a URL is refused; empty if it is accepted."""
    try:
        RedisUrl.parse(url)
    except ValueError as error:
        shown = type(error) is ValueError and (error.__context__ is None or error.__suppress_context__)
        return str(error) if shown else "a message of the library, which may quote the URL"
    return ""


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://", "redis://localhost:6379 db 0 user None password None"),
        ("redis://h", "redis://h:6379 db 0 user None password None"),
        (" REDIS://h/ \n", "redis://h:6379 db 0 user None password None"),
        ("redis://h:1/2", "redis://h:1 db 2 user None password None"),
        ("redis://h?db=3", "redis://h:6379 db 3 user None password None"),
        ("redis://:p%23%2F%3F%40s@h", "redis://h:6379 db 0 user None password p#/?@s"),
        ("redis://u:p:a@h", "redis://h:6379 db 0 user u password p:a"),
        ("redis://u:p@a@h", "redis://h:6379 db 0 user u password p@a"),
        ("redis://u%40x:p@[::1]:7", "redis://[::1]:7 db 0 user u@x password p"),
        ("rediss://h/1", "rediss://h:6379 db 1 user None password None"),
        ("unix:///run/redis.sock?db=4", "unix:///run/redis.sock db 4 user None password None"),
        ("redis+cluster://h", "redis+cluster://h:6379 db 0 user None password None"),
        ("REDISS+cluster://u:p@h:1,[::1]:2,h3/0", "rediss+cluster://h:1,[::1]:2,h3:6379 db 0 user u password p"),
        ("redis+cluster://u:a,b@c@[::1],h", "redis+cluster://[::1]:6379,h:6379 db 0 user u password a,b@c"),
        ("redis+sentinel://h/main", "redis+sentinel://h:26379/main db 0 user None password None"),
        ("redis+sentinel://:p@h1:1,h2/main/3", "redis+sentinel://h1:1,h2:26379/main db 3 user None password p"),
        ("unix://u:p@/run/redis.sock", "unix:///run/redis.sock db 0 user u password p"),
    ],
)
def test_the_parts_of_a_url(url: str, expected: str) -> None:
    parsed = RedisUrl.parse(url)
    assert f"{parsed} db {parsed.db} user {parsed.login.username} password {parsed.login.password}" == expected


def test_options_of_tls() -> None:
    options = "ssl_ca_certs=/a.pem&ssl_cert_reqs=none&ssl_check_hostname=False&ssl_min_version=TLSv1.3&client_name=w"
    parsed = RedisUrl.parse(f"rediss://h?{options}")
    assert parsed.client_name == "w"
    assert parsed.tls == {
        "ssl_ca_certs": "/a.pem",
        "ssl_cert_reqs": "none",
        "ssl_check_hostname": False,
        "ssl_min_version": "TLSv1_3",
    }


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("h:6379", "must begin with redis://"),
        ("http://h", "must begin with redis://"),
        ("redis://h/notadb", "the database must be one number"),
        ("redis://h/-1", "the database must be one number"),
        ("redis://h/١", "the database must be one number"),
        ("redis://h/1/2", "the database must be one number"),
        ("redis://h/1?db=2", "the database must be one number"),
        ("redis://h:0", "the host or the port is not valid"),
        ("redis://h:65536", "the host or the port is not valid"),
        ("redis://h:port", "the host or the port is not valid"),
        ("redis://a..b", "the host or the port is not valid"),
        ("redis://[::1", "is not a valid URL"),
        ("redis://h?db", "is not a valid URL"),
        ("redis://h?nonsense=1", "the option nonsense is not supported"),
        ("redis://h?db=1&db=1", "has the same option twice"),
        ("redis://h?client_name=a%20b", "the option client_name"),
        ("redis://h?ssl_cert_reqs=none", "the option ssl_cert_reqs needs rediss://"),
        ("rediss://h?ssl_cert_reqs=maybe", "the option ssl_cert_reqs must be one of required, optional, none"),
        ("redis://:pa#ss@h", "special character in the wrong place"),
        ("redis://:pa/ss@h", "special character in the wrong place"),
        ("redis://:pa?ss@h", "percent-encoded, such as %23 for #"),
        ("redis://h/0#", "special character in the wrong place"),
        ("redis+cluster://h,", "the host or the port is not valid; expected redis+cluster://"),
        ("redis+cluster://,h", "the host or the port is not valid; expected redis+cluster://"),
        ("redis+cluster://h,h2:x", "the host or the port is not valid"),
        ("redis+cluster://h/1", "the database of a cluster must be 0"),
        ("redis+cluster://:pa/ss@h,h2", "special character in the wrong place"),
        ("redis+cluster://h?ssl_cert_reqs=none", "the option ssl_cert_reqs needs rediss+cluster://"),
        ("redis+sentinel://h,h2", "the name of the service is missing or not valid; expected redis+sentinel://"),
        ("redis+sentinel://h/main/x", "the database must be one number"),
        ("redis://h?sentinel_username=u", "the option sentinel_username needs redis+sentinel://"),
        ("redis://:p@h?password_file=/p", "the password is given twice"),
        ("redis+sentinel://h/main?sentinel_password=p&sentinel_password_file=/p", "the password is given twice"),
        ("unix+cluster://h", "must begin with redis://"),
        ("redis://:s3cret@h1:1,h2:2", "several hosts need redis+cluster:// or redis+sentinel://"),
        ("redis://h a", "white space"),
        ("redis://:%ff@h", "not UTF-8"),
        ("unix://run/redis.sock", "three slashes"),
        ("unix://", "three slashes"),
    ],
)
def test_a_wrong_url_is_one_sentence(url: str, words: str) -> None:
    assert words in refusal_of(url)


@pytest.mark.parametrize(
    "option",
    [
        *("decode_responses=true", "decode_responses=false", "protocol=3", "socket_timeout=1", "retry=1", "timeout=1"),
        *("max_connections=2", "health_check_interval=1", "retry_on_timeout=true", "encoding=latin-1"),
        *("socket_connect_timeout=1", "password=s3cret", "username=s3cret", "host=s3cret", "ssl_ciphers=x"),
    ],
)
def test_options_that_the_worker_sets_itself_are_refused_by_name(option: str) -> None:
    name = option.partition("=")[0]
    with pytest.raises(ConfigInvalid, match=rf"^redis\.url: the option {name} is not supported; ") as caught:
        Client.from_url(f"redis://h?{option}")
    assert "s3cret" not in str(caught.value)


def test_a_plus_in_an_option_stands_for_itself() -> None:
    parsed = RedisUrl.parse("redis+sentinel://h/main?password_file=/a+b%2Bc%20d&sentinel_password=p+q")
    assert (parsed.login.password_file, parsed.sentinel_login.password) == ("/a+b+c d", "p+q")


@pytest.mark.parametrize("option", ["ssl_ca_certs", "ssl_certfile", "ssl_keyfile"])
def test_a_missing_file_of_tls_is_named(option: str) -> None:
    with pytest.raises(ConfigInvalid, match=rf"^redis\.url: {option}: there is no file /missing/ca\.pem$"):
        Client.from_url(f"rediss://h?{option}=/missing/ca.pem")


SPECIAL = st.text(st.sampled_from("#/?@:[]%&=+ \\\"'<>{}|^`~!$()*,;.-_é字\t\n℀２"), max_size=6)


@given(before=SPECIAL, between=SPECIAL, after=SPECIAL, raw=st.booleans(), user=st.sampled_from(["", "us3rname"]))
def test_no_part_of_a_password_is_in_any_message(before: str, between: str, after: str, raw: bool, user: str) -> None:
    password = f"{before}s3cr{between}3ttt{after}"
    login = f"{user}:{password if raw else quote(password, safe='')}"
    check_secrecy(f"redis://{login}@host:6379/0", None if raw else password)
    check_secrecy(f"redis+cluster://{login}@host:6379,other", None if raw else password)
    check_secrecy(f"redis+sentinel://{login}@host:6379,other/main", None if raw else password)


def check_secrecy(url: str, password: str | None) -> None:
    """`password` is that of the URL if it is encoded as it should be."""
    shown = refusal_of(url)
    if not shown:
        parsed = RedisUrl.parse(url)
        assert parsed.addresses[0] == ("host", 6379)
        assert password is None or parsed.login.password == password
        shown = f"{parsed} {parsed!r} {parsed.login} {replace(parsed, db=1)}"
    assert password is None or not shown.startswith(("is not", "has a", "contains"))
    for part in ("s3cr", "3ttt", "us3rname"):
        assert part not in shown


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot read {path}: no such file or directory"),
        (b"", "{path} is empty; expected the password"),
        (b"\n", "{path} is empty; expected the password"),
        (b"s3cret\xff", "{path} is not UTF-8"),
    ],
)
def test_a_password_file_that_is_no_password_is_named(content: bytes | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "password"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigInvalid) as caught:
        Client.from_url(f"redis://h?password_file={path}")
    assert caught.value.message == f"redis.url: password_file: {words.format(path=path)}"


def test_the_end_of_the_line_is_no_part_of_the_password(tmp_path: Path) -> None:
    (tmp_path / "p").write_text(" pass word \r\n")
    assert RedisUrl.parse(f"redis://u@h?password_file={tmp_path}/p").login.read() == ("u", " pass word ")


@given(st.text(max_size=40))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    for scheme in ("redis://", "rediss://", "unix://", "redis+cluster://", "rediss+sentinel://"):
        assert "may quote" not in refusal_of(scheme + text)
