"""The server's configuration: a TOML file, then `LOWBIT_…` variables, then flags.

The later of these wins. Everything is validated once, at start; an unknown or bad
value is fatal and named.
"""

from __future__ import annotations

import os
import re
import ssl
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

PREFIX = "LOWBIT_"
CLIENT_VARIABLES = frozenset({"LOWBIT_ADDRESS", "LOWBIT_TOKEN", "LOWBIT_CA"})
"""Variables that the clients read; the server leaves them alone."""

_DEVICE = re.compile(r"cpu|cuda:\d{1,3}")
_LISTEN = re.compile(r"(?:[^:\[\]]+|\[[0-9a-fA-F:]+\]):\d{1,5}")
_PORTS = 65536
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")  # RFC 6750, section 2.1


class ConfigError(Exception):
    """The configuration cannot be used; the message names the value and its source."""


class Config(BaseSettings):
    """All that an operator can set."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        frozen=True,
        extra="forbid",
        validate_default=True,
        allow_inf_nan=False,
    )

    home: Path = Path("~/.local/share/lowbit")
    """Folder of the store: models, staging, database, worker sockets."""
    listen: str = "127.0.0.1:50151"
    """HOST:PORT of the public API; port 0 takes a free one and writes it to HOME/address."""
    tls_certificate: Path | None = None
    """Certificate of the server with its chain, PEM; None serves without TLS."""
    tls_key: Path | None = None
    """Its private key, PEM."""
    tls_client_ca: Path | None = None
    """Authority that signs certificates of clients, PEM; None asks clients for none."""
    tokens_file: Path | None = None
    """Bearer tokens that are accepted, one a line; None asks for none."""
    devices: Annotated[tuple[str, ...], NoDecode] = ("cpu",)
    """Devices, one pool each: "cpu" or "cuda:N"."""
    workers_per_device: int = Field(default=1, ge=1, le=64)
    threads_per_worker: int = Field(default=0, ge=0, le=1024)
    """Compute threads of a worker; 0 shares the machine's cores among the workers."""
    import_roots: Annotated[tuple[Path, ...], NoDecode] = ()
    """Folders from which models and texts may be read."""
    scripted_models: bool = False
    """Allows models of the scripted engine, which makes tokens by script (for tests)."""

    max_admitted_requests: int = Field(default=256, ge=1, le=65536)
    """Requests that run or wait at one time; the next one is refused. Each output counts."""
    max_running_requests: int = Field(default=32, ge=1, le=1024)
    """Requests that one model runs at one time in one worker. Each output counts."""
    kv_cache_bytes: int = Field(default=2 << 30, ge=0)
    """KV cache of one model in one worker, bytes; 0 takes half of what its device has free once the
    weights are in place."""
    stream_buffer_tokens: int = Field(default=1024, ge=16, le=1 << 20)
    """Tokens of each output that a slow reader may lag behind before its stream is failed."""
    max_message_bytes: int = Field(default=16 << 20, ge=1 << 16, le=1 << 30)
    """Largest request message, bytes."""

    max_running_jobs: int = Field(default=1, ge=1, le=64)
    """Jobs that run at one time on each device, and imports that do besides."""
    max_queued_jobs: int = Field(default=100, ge=1, le=100_000)
    """Jobs that wait at one time, for all devices; the next one is refused."""
    evaluation_cache_bytes: int = Field(default=4 << 30, ge=0)
    """What evaluations may keep of the models that others are compared with, bytes on disk."""
    gptqmodel_python: Path | None = None
    """Python of an environment with gptqmodel and lowbit-server, for architectures that our own
    GPTQ and AWQ do not know; None refuses these."""

    worker_start_timeout_s: float = Field(default=120.0, gt=0)
    worker_ping_interval_s: float = Field(default=2.0, gt=0)
    worker_hang_timeout_s: float = Field(default=60.0, gt=0)
    """A worker whose step loop gives no sign of life for this long is restarted."""
    drain_grace_s: float = Field(default=30.0, ge=0)
    """How long running streams may go on after SIGTERM."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @field_validator("devices", mode="before")
    @classmethod
    def _split_devices(cls, value: object) -> object:
        return value.split(",") if isinstance(value, str) else value

    @field_validator("import_roots", mode="before")
    @classmethod
    def _split_roots(cls, value: object) -> object:
        return (
            [part for part in value.split(os.pathsep) if part] if isinstance(value, str) else value
        )

    @field_validator("devices")
    @classmethod
    def _check_devices(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for device in value:
            if _DEVICE.fullmatch(device) is None:
                message = f"{device!r} is not a device; allowed: cpu, cuda:N"
                raise ValueError(message)
        if not value or len(set(value)) != len(value):
            message = "name at least one device, and each only once"
            raise ValueError(message)
        return value

    @field_validator("listen")
    @classmethod
    def _check_listen(cls, value: str) -> str:
        if _LISTEN.fullmatch(value) is None or int(value.rsplit(":", 1)[1]) >= _PORTS:
            message = f"{value!r} is not HOST:PORT"
            raise ValueError(message)
        return value

    @field_validator("home")
    @classmethod
    def _resolve_home(cls, value: Path) -> Path:
        return value.expanduser().resolve()

    @field_validator("import_roots")
    @classmethod
    def _resolve_roots(cls, value: tuple[Path, ...]) -> tuple[Path, ...]:
        roots = tuple(root.expanduser().resolve() for root in value)
        for root in roots:
            if not root.is_dir():
                message = f"{root} is not a folder"
                raise ValueError(message)
        return roots

    @model_validator(mode="after")
    def _check_tls(self) -> Self:
        if bool(self.tls_certificate) != bool(self.tls_key):
            message = "tls_certificate and tls_key go together"
            raise ValueError(message)
        if self.tls_client_ca and not self.tls_certificate:
            message = "tls_client_ca needs tls_certificate and tls_key"
            raise ValueError(message)
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            if self.tls_certificate:
                context.load_cert_chain(self.tls_certificate, self.tls_key)
            if self.tls_client_ca:
                context.load_verify_locations(self.tls_client_ca)
        except OSError as error:  # ssl's own error is one of these
            message = f"the files of tls_… cannot be used together: {error}"
            raise ValueError(message) from error
        return self

    @field_validator("tokens_file")
    @classmethod
    def _check_tokens(cls, value: Path | None) -> Path | None:
        if value is not None:
            try:
                read_tokens(value)
            except OSError as error:
                message = f"{value} cannot be read: {error.strerror}"
                raise ValueError(message) from error
        return value

    @field_validator("gptqmodel_python")
    @classmethod
    def _check_python(cls, value: Path | None) -> Path | None:
        # Not resolved: a virtual environment's Python is a link, and known by its place.
        if value is not None and not os.access(value, os.X_OK):
            message = f"{value} is no program"
            raise ValueError(message)
        return value and value.absolute()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - part of the signature
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - part of the signature
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Order the sources: flags, then variables, then the file."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)


def read_tokens(file: Path) -> tuple[str, ...]:
    """Return the bearer tokens of a file: one a line, empty lines and # comments left out.

    Raises ValueError for a file without any, and for a token that no header can carry.
    """
    lines = (line.strip() for line in file.read_text().splitlines())
    tokens = tuple(line for line in lines if line and not line.startswith("#"))
    if not tokens:
        message = f"{file} holds no token"
        raise ValueError(message)
    for number, token in enumerate(tokens, start=1):
        if _TOKEN.fullmatch(token) is None:
            message = f"token {number} of {file} has characters that a bearer token cannot have"
            raise ValueError(message)
    return tokens


def load_config(file: Path | None, flags: Mapping[str, Any]) -> Config:
    """Return the configuration; raise ConfigError when any of it cannot be used.

    `flags` holds the values given on the command line, by field name.
    """
    if file is not None and not file.is_file():
        message = f"configuration file {file} does not exist"
        raise ConfigError(message)
    known = {PREFIX + name.upper() for name in Config.model_fields} | CLIENT_VARIABLES
    if unknown := sorted(
        name for name in os.environ if name.startswith(PREFIX) and name not in known
    ):
        message = f"unknown variable {unknown[0]}; known: {', '.join(sorted(known))}"
        raise ConfigError(message)

    class _Config(Config):
        model_config = SettingsConfigDict(toml_file=file)

    try:
        return _Config(**flags)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        message = f"{name}: {first['msg']}"
        raise ConfigError(message) from error
    except ValueError as error:  # the file is no TOML
        message = f"configuration file {file}: {error}"
        raise ConfigError(message) from error
