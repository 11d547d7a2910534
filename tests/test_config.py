"""Settings: flags over environment over file over defaults, and one clear message a mistake."""

from __future__ import annotations

import tomllib
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


def test_an_empty_variable_counts_as_none(monkeypatch):
    monkeypatch.setenv("WORKER_HTTP__PORT", "")
    assert load_settings().http.port == 9108


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("redis.url", "http://user:secret@host", "redis.url: must begin with redis://, rediss:// or unix://"),
        ("redis.queue", "a b", "redis.queue: "),
        ("lease.lease_s", 1.0, "lease: renew_s must be at most half of lease_s, 0.5"),
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
