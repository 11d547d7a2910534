"""Settings: flags over environment over file over defaults, and one clear message a mistake."""

from __future__ import annotations

import re
import tomllib
import traceback
from pathlib import Path

import pytest

from worker.config import Settings, load_settings
from worker.errors import ConfigInvalid

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    import os

    for name in [name for name in os.environ if name.startswith("WORKER_")]:
        monkeypatch.delenv(name)


def test_the_default_file_holds_every_key_with_its_default():
    assert load_settings(CONFIGS / "default.toml").model_dump() == load_settings().model_dump()
    written = tomllib.loads((CONFIGS / "default.toml").read_text())
    expected = {section: set(type(getattr(load_settings(), section)).model_fields) for section in Settings.model_fields}
    assert {section: set(keys) for section, keys in written.items()} == expected


def test_every_key_of_the_default_file_says_why():
    for line in (CONFIGS / "default.toml").read_text().splitlines():
        if "=" in line.partition("#")[0]:
            assert len(line.partition("#")[2]) > 10, line


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.name)
def test_every_file_that_comes_along_is_valid(path):
    assert load_settings(path)


def test_flags_win_over_environment_over_file_over_defaults(tmp_path, monkeypatch):
    file = tmp_path / "worker.toml"
    file.write_text('[service]\ngrace_s = 1\nstall_s = 2\nname = "file"\n[http]\nport = 1\n')
    monkeypatch.setenv("WORKER_SERVICE__STALL_S", "3")
    monkeypatch.setenv("WORKER_SERVICE__NAME", "environment")
    settings = load_settings(file, {"service.name": "flag", "http.port": None})
    assert (settings.service.grace_s, settings.service.stall_s, settings.service.name) == (1, 3, "flag")
    assert (settings.http.port, settings.service.metrics_ms) == (1, 500)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("auto", "auto"),
        ("8GiB", 8 << 30),
        ("512 MiB", 512 << 20),
        ("1073741824", 1 << 30),
        (1 << 20, 1 << 20),
        (0, 0),
        ("0.9", 0.9),
        (0.5, 0.5),
        ("1.0", 1.0),
    ],
)
def test_kv_memory_is_bytes_or_a_share(value, expected):
    parsed = load_settings(flags={"engine.kv_memory": value}).engine.kv_memory
    assert (parsed, type(parsed)) == (expected, type(expected))


def test_kv_memory_is_read_from_the_environment_too(monkeypatch):
    monkeypatch.setenv("WORKER_ENGINE__KV_MEMORY", "0")
    assert load_settings().engine.kv_memory == 0


@pytest.mark.parametrize("key", ["uri", "URL2"])
def test_an_unknown_redis_key_is_refused_without_its_value(monkeypatch, key):
    monkeypatch.setenv(f"WORKER_REDIS__{key}", "redis://user:s3cret@host")
    with pytest.raises(ConfigInvalid) as caught:
        load_settings()
    assert "s3cret" not in str(caught.value)
    assert "s3cret" not in str(caught.value.details)


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("WORKER_REDIS_URL", "redis://:s3cret@h", "expected WORKER_REDIS__URL"),
        ("worker_redis_url", "redis://:s3cret@h", "expected WORKER_REDIS__URL"),
        ("WORKER_REDIS_URI", "redis://:s3cret@h", "expected WORKER_REDIS__URI"),
        ("WORKER_ENGINE_BACKEND", "cpu", "expected WORKER_ENGINE__BACKEND"),
        ("WORKER_SERVICE_MAX_PAYLOAD_BYTES", "1024", "expected WORKER_SERVICE__MAX_PAYLOAD_BYTES"),
        ("WORKER_HTTP_PORT", "9108", "expected WORKER_HTTP__PORT"),
        ("WORKER_REDIS", "redis://:s3cret@h", "expected WORKER_REDIS__KEY"),
        ("WORKER_MODEL", "smollm2", "expected WORKER_MODEL__KEY"),
        ("WORKER_REDIX__URL", "redis://:s3cret@h", "there is no such section; expected one of model, engine"),
        ("WORKER_REDIS__URI", "redis://:s3cret@h", "redis.uri: there is no such setting; expected one of url, "),
        ("WORKER_REDIS__URL__X", "redis://:s3cret@h", "redis.url: must be text"),
        ("WORKER_MODEL", '{"path": "s3cret"', "WORKER_SECTION__KEY"),
        ("WORKER_REDIS__URL", "redis://:s3#cret@h", "redis.url: has a special character"),
    ],
)
def test_a_wrong_variable_is_reported_by_name_without_its_value(monkeypatch, variable, value, words):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigInvalid) as caught:
        load_settings()
    assert words in caught.value.message
    assert variable in caught.value.message or value.startswith("{") or variable.endswith("__X")
    shown = f"{caught.value!r} {caught.value.details} {''.join(traceback.format_exception(caught.value))}"
    assert not [secret for secret in ("s3cret", "s3#", "cret@") if secret in shown]


@pytest.mark.parametrize(
    "variable",
    [
        *("WORKER_SERVICE_HOST", "WORKER_SERVICE_PORT", "WORKER_SERVICE_PORT_HTTP", "WORKER_PORT", "WORKER_ID"),
        *("WORKER_PORT_9108_TCP_ADDR", "WORKER_HTTP_PORT", "WORKER_HTTP_PORT_9108_TCP", "WORKER_HTTP_SERVICE_HOST"),
    ],
)
def test_variables_of_kubernetes_and_of_others_are_ignored(monkeypatch, variable):
    monkeypatch.setenv(variable, "tcp://10.0.0.1:9108")
    assert load_settings()


def test_a_password_is_in_no_representation():
    settings = load_settings(flags={"redis.url": "redis://us3r:s3cret@h"})
    assert "s3cret" not in f"{settings!r} {settings} {settings.redis!r}"


@pytest.mark.parametrize("toml", ['url = "redis://:s3cret@h"', '[http]\nurl = "redis://:s3cret@h"', 'redis = "s3cret"'])
def test_a_url_in_the_wrong_place_of_a_file_is_not_printed(tmp_path, toml):
    (tmp_path / "worker.toml").write_text(toml)
    with pytest.raises(ConfigInvalid) as caught:
        load_settings(tmp_path / "worker.toml")
    assert "s3cret" not in f"{caught.value} {caught.value.details}"


def test_a_file_that_is_not_utf_8_is_named(tmp_path):
    (tmp_path / "worker.toml").write_bytes(b'[log]\nlevel = "\xff"')
    with pytest.raises(ConfigInvalid, match="worker"):
        load_settings(tmp_path / "worker.toml")


WRONG = [
    "\udc80",
    "x",
    "1.5",
    "-7",
    "nan",
    "inf",
    "9" * 5000,
    "",
    "a b",
    1.5,
    -7,
    float("nan"),
    2**70,
    True,
    [],
    {},
    None,
]


def mistake(key, value):
    """The message about a value; empty if it is accepted."""
    try:
        load_settings(flags={key: value})
    except ConfigInvalid as error:
        return error.message
    return ""


@pytest.mark.parametrize("section", Settings.model_fields)
def test_no_mistake_is_in_the_words_of_pydantic(section):
    for key in type(getattr(load_settings(), section)).model_fields:
        for value in WRONG:
            message = mistake(f"{section}.{key}", value)
            assert "Input should" not in message
            assert "valid " not in message
            assert not message or message.startswith((f"{section}.{key}: ", f"{section}: "))


def test_an_empty_variable_counts_as_none(monkeypatch):
    monkeypatch.setenv("WORKER_HTTP__PORT", "")
    assert load_settings().http.port == 9108


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("redis.url", "http://user:secret@host", "redis.url: must begin with redis://, rediss:// or unix://"),
        ("redis.queue", "a b", "redis.queue: "),
        ("lease.lease_s", 1.0, "lease: renew_s must be at most half of lease_s, 0.5"),
        ("engine.max_running", 0, "engine.max_running: must be at least 1, not 0"),
        ("engine.max_running", 257, "engine.max_running: must be at most 256, not 257"),
        ("service.flush_ms", 30, "service.flush_ms: "),
        ("service.metrics_ms", 100, "service.metrics_ms: "),
        ("service.grace_s", "soon", "service.grace_s: "),
        ("http.port", 70000, "http.port: "),
        ("log.level", "loud", "log.level: "),
        ("engine.backend", "tpu", "engine.backend: "),
        ("engine.kv_memory", "8GB", "engine.kv_memory: must be "),
        ("engine.kv_memory", "most", "engine.kv_memory: must be "),
        ("engine.kv_memory", "1.5", "engine.kv_memory: must be "),
        ("engine.kv_memory", "1", "engine.kv_memory: must be "),
        ("engine.kv_memory", 4096, "engine.kv_memory: must be "),
        ("engine.kv_memory", "٣GiB", "engine.kv_memory: must be "),
        ("engine.kv_memory", -1, "engine.kv_memory: must be "),
        ("engine.kv_memory", True, "engine.kv_memory: must be "),
        ("model.sliding_window", "on", "model.sliding_window: "),
        ("service.gracefulness", 1, "service.gracefulness: "),
    ],
)
def test_every_mistake_is_one_message_that_names_its_key(key, value, expected):
    with pytest.raises(ConfigInvalid) as caught:
        load_settings(flags={key: value})
    assert caught.value.message.startswith(expected)
    assert len(caught.value.details["mistakes"]) == 1
    assert "secret" not in caught.value.message
    assert "Value error" not in caught.value.message


def test_all_mistakes_are_reported_at_once(tmp_path, monkeypatch):
    file = tmp_path / "worker.toml"
    file.write_text('[log]\nlevel = "loud"\n')
    monkeypatch.setenv("WORKER_HTTP__PORT", "many")
    with pytest.raises(ConfigInvalid) as caught:
        load_settings(file, {"service.stall_s": -1})
    assert {mistake.partition(":")[0] for mistake in caught.value.details["mistakes"]} == {
        *("log.level", "http.port", "service.stall_s"),
    }


def test_a_file_that_is_missing_or_no_toml_is_named(tmp_path):
    with pytest.raises(ConfigInvalid, match="missing"):
        load_settings(tmp_path / "missing.toml")
    (tmp_path / "bad.toml").write_text("[log\n")
    with pytest.raises(ConfigInvalid, match="bad"):
        load_settings(tmp_path / "bad.toml")


def test_paths_may_begin_with_the_home_folder():
    assert load_settings(flags={"hub.cache": "~/models"}).hub.cache == Path("~/models").expanduser()


def test_user_name_and_password_have_settings_of_their_own(tmp_path, monkeypatch):
    (tmp_path / "password").write_text("s3cret\n")
    monkeypatch.setenv("WORKER_REDIS__USERNAME", "us3r")
    monkeypatch.setenv("WORKER_REDIS__PASSWORD_FILE", str(tmp_path / "password"))
    assert load_settings().redis.server.login.read() == ("us3r", "s3cret")
    monkeypatch.delenv("WORKER_REDIS__PASSWORD_FILE")
    monkeypatch.setenv("WORKER_REDIS__PASSWORD", "s3cret2")
    assert load_settings().redis.server.login.read() == ("us3r", "s3cret2")
    monkeypatch.setenv("WORKER_REDIS__URL", "redis+sentinel://h/main?sentinel_username=us3r")
    monkeypatch.setenv("WORKER_REDIS__SENTINEL_PASSWORD", "s3cret3")
    assert load_settings().redis.server.sentinel_login.read() == ("us3r", "s3cret3")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"url": "redis://:s3cret@h", "password": "s3cret"}, "redis: the password is given twice"),
        ({"password": "s3cret", "password_file": "/p"}, "redis: the password is given twice"),
        ({"url": "redis://us3r@h", "username": "us3r"}, "redis: the user name is given twice"),
        ({"sentinel_password": "s3cret"}, "redis: a user name or password of sentinels needs redis+sentinel://"),
    ],
)
def test_a_login_that_contradicts_another_is_one_sentence(settings, words):
    with pytest.raises(ConfigInvalid) as caught:
        load_settings(flags={f"redis.{name}": value for name, value in settings.items()})
    assert caught.value.message.startswith(words)
    assert not re.search("s3cret|us3r", f"{caught.value} {caught.value.details}")


def test_no_form_of_the_settings_shows_a_secret():
    url = "rediss+sentinel://us3r:s3cret@h/main?sentinel_username=us3r&sentinel_password=s3cret&ssl_password=s3cret"
    for flags in (
        {"redis.url": url},
        {"redis.username": "us3r", "redis.password": "s3cret"},
        {"redis.url": "redis+sentinel://h/m", "redis.sentinel_username": "us3r", "redis.sentinel_password": "s3cret"},
    ):
        settings = load_settings(flags=flags)
        section = settings.redis
        shown = f"{settings!r} {settings} {section!r} {section.server!r} {section.server} {section.server.login}"
        shown += f"{settings.model_dump()} {settings.model_dump_json()} {section.server.sentinel_login!r}"
        assert not re.search("s3cret|us3r", shown), shown
