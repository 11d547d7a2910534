"""Settings: command line over environment over TOML file over defaults, checked as a whole.

Frozen sections, each passed on alone. Only this module reads the environment. A variable is named
like its key: `WORKER_ENGINE__PREFILL_CHUNK=128`. configs/default.toml lists all keys.
"""

import os
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from worker.errors import ConfigInvalid
from worker.queue_order import QUEUE_NAME, QueueOrder
from worker.redis_url import Login, RedisUrl


def _default_cache() -> Path:
    """$XDG_CACHE_HOME/worker-orcd, by default ~/.cache/worker-orcd."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "worker-orcd"


def _default_kernel_cache() -> Path:
    return _default_cache() / "kernels"


def _folder(default: Callable[[], Path]) -> BeforeValidator:
    """A path in which ~ is the home folder; an empty string is the default."""

    def chosen(given: object) -> object:
        if given == "":
            return default()
        return Path(given).expanduser() if isinstance(given, str) else given

    return BeforeValidator(chosen)


_KV_MEMORY_FORM = 'must be "auto", bytes such as 8GiB or 1073741824 (0 or at least 1MiB), or a share such as 0.9'
_UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


def _parse_kv_memory(value: object) -> object:
    """Parse `engine.kv_memory`: "auto", an int of bytes or a float above 0 and up to 1."""
    if isinstance(value, str) and value != "auto":
        if match := re.fullmatch(r"([0-9]+) ?(|[KMGT]iB)", value):
            value = int(match[1]) * _UNITS[match[2]]
        elif re.fullmatch(r"[0-9]*\.[0-9]+", value):
            value = float(value)
    is_bytes = isinstance(value, int) and not isinstance(value, bool) and (value == 0 or value >= 1 << 20)
    if value == "auto" or is_bytes or (isinstance(value, float) and 0 < value <= 1):
        return value
    raise ValueError(_KV_MEMORY_FORM)


KvMemory = Annotated[Literal["auto"] | int | float, BeforeValidator(_parse_kv_memory)]
"""Limit of the KV pool: bytes (int), or a share of the memory that weights leave (float)."""


_OTLP_FORM = "must be a URL of OTLP over HTTP such as http://127.0.0.1:4318"


def _otlp_url(given: str) -> str:
    """Check the base URL of an OTLP/HTTP endpoint; raises ValueError without quoting it."""
    try:
        url = urlsplit(given)
        is_valid = url.scheme in ("http", "https") and url.port != 0 and not url.query and not url.fragment
        is_valid = is_valid and given.isprintable() and " " not in given  # urlsplit removes line breaks
        is_valid = is_valid and re.fullmatch(r"[\w.:%-]+", url.hostname or "") is not None
    except ValueError:
        is_valid = False
    if given and not is_valid:
        raise ValueError(_OTLP_FORM)
    return given


def otlp_endpoint_variable() -> str:
    """The endpoint of OTEL_EXPORTER_OTLP_ENDPOINT; empty if OTEL_SDK_DISABLED is true.

    Other programs read the variable too, so only the commands that trace check it. Raises
    ValueError, with its name, if it is no URL of OTLP over HTTP.
    """
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return ""
    try:
        return _otlp_url(os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "").strip())
    except ValueError as error:
        raise ValueError(f"OTEL_EXPORTER_OTLP_ENDPOINT {error}") from None


_OTEL_LIMIT = re.compile(r"OTEL_.*_LIMIT")
_OTEL_NUMBER = re.compile(r"OTEL_(BSP_.*|METRIC_EXPORT_(INTERVAL|TIMEOUT)|EXPORTER_OTLP_((TRACES|METRICS)_)?TIMEOUT)")
_OTEL_MAX = 2**31 - 1
_MAX_QUEUE, _MAX_BATCH = "OTEL_BSP_MAX_QUEUE_SIZE", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE"
_EXEMPLARS = ("always_on", "always_off", "trace_based")


def check_otel_variables() -> None:
    """Check the variables with which OpenTelemetry's SDK or its threads would fail.

    Raises ValueError, with the name of the variable.
    """
    given = {name: text for name, value in os.environ.items() if (text := value.strip())}
    for name, text in given.items():
        if _OTEL_LIMIT.fullmatch(name) and not (re.fullmatch("[0-9]+", text) and int(text[:11]) <= _OTEL_MAX):
            raise ValueError(f"{name} must be a whole number from 0 to {_OTEL_MAX}")
        number = text if re.fullmatch(r"[0-9]+(\.[0-9]+)?", text) else "0"
        if _OTEL_NUMBER.fullmatch(name) and not 0 < float(number) <= _OTEL_MAX:
            raise ValueError(f"{name} must be a number above 0 and up to {_OTEL_MAX}")
    queue, batch = (given.get(name, default) for name, default in ((_MAX_QUEUE, "2048"), (_MAX_BATCH, "512")))
    if float(batch) > float(queue):
        raise ValueError(f"{_MAX_BATCH}, {batch}, must be at most {_MAX_QUEUE}, {queue}")
    if given.get("OTEL_METRICS_EXEMPLAR_FILTER", _EXEMPLARS[0]).lower() not in _EXEMPLARS:
        raise ValueError(f"OTEL_METRICS_EXEMPLAR_FILTER must be one of {', '.join(_EXEMPLARS)}")


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSection(_Section):
    """Which model is served and how its file is read."""

    path: str = ""
    name: str = ""
    context: int = Field(default=0, ge=0, le=1 << 24)
    sliding_window: Literal["auto", "file"] = "auto"


class EngineSection(_Section):
    """Where the model runs and how its work is cut."""

    backend: Literal["auto", "cpu", "gpu"] = "auto"
    max_running: int = Field(default=1, ge=1, le=256)
    prefill_chunk: int = Field(default=0, ge=0, le=4096)
    prefix_cache: bool = True
    speculation: Literal["off", "ngram"] = "off"
    kv_memory: KvMemory = "auto"
    kv_type: Literal["f32", "f16", "q8"] = "f32"
    kernel_cache: Annotated[Path, _folder(_default_kernel_cache)] = Field(default_factory=_default_kernel_cache)

    @field_validator("prefill_chunk")
    @classmethod
    def _whole_blocks(cls, chunk: int) -> int:
        if chunk % 16:
            raise ValueError("must be a multiple of 16, the tokens of a KV block")
        return chunk


class HubSection(_Section):
    """Where named models are kept."""

    cache: Annotated[Path, _folder(_default_cache)] = Field(default_factory=_default_cache)


class RedisSection(_Section):
    """Which server and queues jobs come from."""

    url: str = Field(default="redis://127.0.0.1:6379/0", repr=False)
    username: str = Field(default="", repr=False)
    password: SecretStr = SecretStr("")
    password_file: str = ""
    sentinel_username: str = Field(default="", repr=False)
    sentinel_password: SecretStr = SecretStr("")
    sentinel_password_file: str = ""
    queue: str = Field(default="default", pattern=f"^{QUEUE_NAME}$")
    queues: tuple[str, ...] = ()
    queue_bound: int = Field(default=10_000, ge=1)
    patience_s: float = Field(default=30.0, gt=0)

    @property
    def server(self) -> RedisUrl:
        """The URL with the user names and passwords that have settings of their own."""
        password, sentinel = self.password.get_secret_value(), self.sentinel_password.get_secret_value()
        login = Login(self.username, password).merged(Login(password_file=self.password_file))
        of_sentinels = Login(self.sentinel_username, sentinel).merged(Login(password_file=self.sentinel_password_file))
        return RedisUrl.parse(self.url).with_logins(login, of_sentinels)

    @property
    def served(self) -> tuple[str, ...]:
        """The queues that a worker serves, in the form of `queues`."""
        return self.queues or (f"{self.queue}:1",)

    @field_validator("queues")
    @classmethod
    def _ordered(cls, queues: tuple[str, ...]) -> tuple[str, ...]:
        if queues:
            QueueOrder(queues)
        return queues

    @field_validator("url")
    @classmethod
    def _parsable(cls, url: str) -> str:
        RedisUrl.parse(url)
        return url

    @model_validator(mode="after")
    def _one_login(self) -> Self:
        self.server  # noqa: B018  # raises ValueError
        return self

    @field_serializer("url")
    def _without_login(self, url: str) -> str:
        return str(RedisUrl.parse(url))

    @field_serializer("username", "sentinel_username")
    def _masked(self, username: str) -> str:
        return str(SecretStr(username))


class LeaseSection(_Section):
    """Who may work on a job, for how long, and when it is given up."""

    lease_s: float = Field(default=4.0, gt=0)
    renew_s: float = Field(default=1.0, gt=0)
    scan_s: float = Field(default=0.5, gt=0)
    retention_s: float = Field(default=24 * 3600.0, gt=0)
    unsettled_s: float = Field(default=7 * 24 * 3600.0, gt=0)
    max_attempts: int = Field(default=3, ge=1)
    max_deliveries: int = Field(default=20, ge=1)

    @model_validator(mode="after")
    def _room_to_renew(self) -> Self:
        if self.renew_s * 2 > self.lease_s:
            raise ValueError(f"renew_s must be at most half of lease_s, {self.lease_s / 2:g}")
        return self


class ServiceSection(_Section):
    """How a worker goes about its jobs."""

    name: str = Field(default="", pattern=r"^[A-Za-z0-9\-_.]{0,64}$")
    grace_s: float = Field(default=30.0, ge=0)
    inference_timeout_s: float = Field(default=300.0, gt=0)
    stall_s: float = Field(default=20.0, gt=0)
    max_payload_bytes: int = Field(default=8 * 2**20, ge=1024)
    flush_ms: float = Field(default=15.0, ge=10, le=20)
    flush_tokens: int = Field(default=16, ge=1, le=16)
    metrics_ms: float = Field(default=500.0, ge=250, le=1000)
    heartbeat_s: float = Field(default=5.0, gt=0, le=10)
    vram_s: float = Field(default=3.0, gt=0)
    queue_s: float = Field(default=3.0, gt=0)
    residency_s: float = Field(default=60.0, gt=0)


class HttpSection(_Section):
    """Where health and metrics are served."""

    host: str = "127.0.0.1"
    port: int = Field(default=9108, ge=0, le=65535)


class GatewaySection(_Section):
    """Where the HTTP gateway listens, whom it serves, and its limits."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    api_keys: str = ""
    max_body_bytes: int = Field(default=8 * 2**20, ge=1024)
    keep_alive_s: float = Field(default=15.0, gt=0)
    registry_s: float = Field(default=1.0, gt=0)
    no_worker_s: float = Field(default=30.0, gt=0)
    models: tuple[str, ...] = ()
    deadline_s: float = Field(default=0.0, ge=0)
    grace_s: float = Field(default=300.0, ge=0)
    response_retention_s: float = Field(default=24 * 3600.0, gt=0)
    file_retention_s: float = Field(default=7 * 24 * 3600.0, ge=2 * 24 * 3600)
    max_file_bytes: int = Field(default=100 * 2**20, ge=1024)
    batch_concurrency: int = Field(default=64, ge=1, le=1024)
    batch_lease_s: float = Field(default=15.0, gt=0)


class TracingSection(_Section):
    """Where spans and GenAI metrics are sent."""

    endpoint: Annotated[str, AfterValidator(_otlp_url)] = Field(default="", repr=False)


class LogSection(_Section):
    """How much is logged, and in which form."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "json", "console"] = "auto"


class Settings(BaseSettings):
    """All sections; made by `load_settings`."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", env_prefix="WORKER_", env_nested_delimiter="__", env_ignore_empty=True
    )

    model: ModelSection = ModelSection()
    engine: EngineSection = Field(default_factory=EngineSection)
    hub: HubSection = Field(default_factory=HubSection)
    redis: RedisSection = RedisSection()
    lease: LeaseSection = LeaseSection()
    service: ServiceSection = ServiceSection()
    http: HttpSection = HttpSection()
    gateway: GatewaySection = GatewaySection()
    tracing: TracingSection = TracingSection()
    log: LogSection = LogSection()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags over environment over file: the first source that names a key wins."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)


def load_settings(file: Path | None = None, flags: Mapping[str, Any] | None = None) -> Settings:
    """Settings from `file` (TOML), environment and `flags` ({"engine.backend": "cpu"}).

    Raises ConfigInvalid with one sentence for every mistake.
    """
    given: dict[str, dict[str, Any]] = {}
    for key, value in (flags or {}).items():
        section, _, name = key.partition(".")
        if value is not None:
            given.setdefault(section, {})[name] = value
    if file is not None and not file.is_file():
        raise ConfigInvalid(f"{file} is no file; expected a TOML file such as configs/default.toml")

    if misnamed := _misnamed_variables():
        raise ConfigInvalid("; ".join(misnamed), {"mistakes": misnamed})

    class FromFile(Settings):
        model_config = SettingsConfigDict(toml_file=file)

    try:
        return FromFile(**given)  # type: ignore[arg-type]
    except OSError as error:
        raise ConfigInvalid(f"{file} cannot be read: {str(error.strerror).lower()}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigInvalid(f"{file}: {error}; expected TOML") from None
    except SettingsError:  # its cause quotes the value
        raise ConfigInvalid("a variable such as WORKER_ENGINE is not JSON; expected WORKER_SECTION__KEY") from None
    except ValidationError as error:
        mistakes = [_mistake(each) for each in error.errors()]
        raise ConfigInvalid("; ".join(mistakes), {"mistakes": mistakes}) from None


def _keys(section: str) -> list[str]:
    """The keys of a section; empty if there is no such section."""
    field = Settings.model_fields.get(section)
    return list(field.annotation.model_fields) if field and field.annotation else []


_SERVICE_LINK = re.compile(r"(.*_)?(SERVICE_HOST|SERVICE_PORT(_.*)?|PORT(_[0-9]+_.*)?)")
"""Variables that Kubernetes and Docker set for a service whose name begins with `worker`."""


def _misnamed_variables() -> list[str]:
    """One sentence for each environment variable that looks like a setting and is none."""
    found = []
    for variable, value in os.environ.items():
        prefix, _, rest = variable.upper().partition("WORKER_")
        section, _, key = rest.partition("_")
        section, key = section.lower(), key.lower()
        if prefix or not value or ((key not in _keys(section) or "://" in value) and _SERVICE_LINK.fullmatch(rest)):
            continue
        expected = f"expected WORKER_{section.upper()}__{key.strip('_').upper() or 'KEY'}"
        if "__" in rest and not _keys(rest.partition("__")[0].lower()):
            found.append(f"{variable}: there is no such section; expected one of {', '.join(Settings.model_fields)}")
        elif "__" not in rest and _keys(section) and (key or not value.startswith("{")):
            found.append(f"{variable}: is not a setting; {expected}, with two underscores before the key")
    return found


_CONSTRAINTS = {
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "finite_number": "must be a finite number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "greater_than": "must be above {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "must be a smaller number",
    "int_type": "must be a whole number",
    "less_than_equal": "must be at most {le:g}",
    "literal_error": "must be {expected}",
    "model_type": "must be a section with keys",
    "path_type": "must be a path",
    "string_pattern_mismatch": "must match {pattern}",
    "string_type": "must be text",
    "value_error": "{error}",
}


def _mistake(error: ErrorDetails) -> str:
    """One sentence, without the value if that may contain a password."""
    location, given = [str(part) for part in error["loc"]], error["input"]
    where, words = ".".join(location), _CONSTRAINTS.get(error["type"], "has a wrong value")
    is_secret = location[0] in ("redis", "tracing") or (isinstance(given, str) and "://" in given)
    if error["type"] == "extra_forbidden":
        keys = _keys(location[0]) if len(location) > 1 else Settings.model_fields
        sentence = f"{where}: there is no such setting; expected one of {', '.join(keys)}"
    elif is_secret or isinstance(given, dict):
        sentence = f"{where}: {words.format(**error.get('ctx', {}))}"
    else:
        sentence = f"{where}: {words.format(**error.get('ctx', {}))}, not {given!r}"
    variable = "WORKER_" + "__".join(location).upper()
    is_set = any(name.upper() == variable and value == given for name, value in os.environ.items())
    return f"{sentence} (in {variable})" if is_set else sentence
