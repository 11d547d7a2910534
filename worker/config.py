"""Settings: command line over environment over TOML file over defaults, checked as a whole.

Frozen sections, each passed on alone; the one place that reads the environment. A variable is named like its key:
`WORKER_ENGINE__PREFILL_CHUNK=128`. Every key with a line of why stands in configs/default.toml.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from worker.errors import ConfigInvalid


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSection(_Section):
    """Which model is served and how its file is read."""

    path: str = ""
    name: str = ""
    context: int = Field(default=0, ge=0, le=1 << 24)
    phi3_window: bool = False


class EngineSection(_Section):
    """Where the model runs and how its work is cut."""

    backend: Literal["auto", "cpu", "gpu"] = "auto"
    prefill_chunk: int = Field(default=64, ge=16, le=4096)
    kv_type: Literal["f32", "f16"] = "f32"

    @field_validator("prefill_chunk")
    @classmethod
    def _whole_blocks(cls, chunk: int) -> int:
        if chunk % 16:
            raise ValueError("must be a multiple of 16, the tokens of a KV block")
        return chunk


def _default_cache() -> Path:
    """$XDG_CACHE_HOME/worker-orcd, by default ~/.cache/worker-orcd."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "worker-orcd"


class HubSection(_Section):
    """Where named models are kept."""

    cache: Path = Field(default_factory=_default_cache)


class Settings(BaseSettings):
    """All sections; made by `load_settings`."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", env_prefix="WORKER_", env_nested_delimiter="__", env_ignore_empty=True
    )

    model: ModelSection = ModelSection()
    engine: EngineSection = EngineSection()
    hub: HubSection = Field(default_factory=HubSection)

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
    """Settings from `file` (TOML), the environment and `flags` ({"engine.backend": "cpu"}; None leaves a key unset).

    Raises ConfigInvalid with one sentence for every mistake.
    """
    given: dict[str, dict[str, Any]] = {}
    for key, value in (flags or {}).items():
        section, _, name = key.partition(".")
        if value is not None:
            given.setdefault(section, {})[name] = value
    if file is not None and not file.is_file():
        raise ConfigInvalid(f"{file} is no file; expected a TOML file such as configs/default.toml")

    class FromFile(Settings):
        model_config = SettingsConfigDict(toml_file=file)

    try:
        return FromFile(**given)  # type: ignore[arg-type]
    except tomllib.TOMLDecodeError as error:
        raise ConfigInvalid(f"{file}: {error}; expected TOML") from None
    except ValidationError as error:
        mistakes = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}, not {e['input']!r}" for e in error.errors()]
        raise ConfigInvalid("; ".join(mistakes), {"mistakes": mistakes}) from None
