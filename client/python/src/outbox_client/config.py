"""How a client is configured: by arguments, or by environment variables."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from outbox_client.alarm import Alarm

DEFAULT_DATABASE = "default"
"""The name of a source's database when it has only one."""


class ConfigError(ValueError):
    """A setting is missing or cannot be used. The message names it."""


@dataclass(frozen=True)
class TLS:
    """Transport security. Empty values: the system's CAs and no client certificate."""

    ca: bytes | None = None
    """CAs (PEM) that the server's certificate must come from."""
    cert: bytes | None = None
    """Client certificate (PEM)."""
    key: bytes | None = field(default=None, repr=False)
    """Its key (PEM)."""
    server_name: str = ""
    """The name that the server's certificate must carry, when it is not the address's."""


@dataclass(frozen=True)
class Config:
    """Configures a client. address and source are required. Times are seconds."""

    address: str
    """The platform's address in gRPC's syntax, for example "outbox.example.com:7070" or "dns:///outbox:7070"."""
    source: str
    """The name under which the service is registered."""
    instance: str = ""
    """Names this process in the platform's logs. Default: host name and process id."""

    tls: TLS | None = None
    """Transport security. Default: with the system's CAs."""
    plaintext: bool = False
    """Switches transport security off. tls must be None then."""
    token: Callable[[], str] | str | None = field(default=None, repr=False)
    """The bearer token, or a function that returns it. It is called for every stream and unary call: it should cache, and not block."""

    unary: bool = False
    """Make one gRPC call per call instead of using a session. The platform cannot ask such a client."""
    sessions: int = 1
    """The number of streams, 1 to 16. One is enough."""
    max_in_flight: int = 1024
    """Calls that wait for an answer, Commits in the background not counted."""
    fail_when_full: bool = False
    """Calls beyond max_in_flight fail at once with ExhaustedError. Default: they wait for their turn until their deadline."""
    max_pending_commits: int = 16384
    """Commits and Aborts that are not acknowledged. What comes beyond is not sent; the platform finds these out by asking."""

    call_timeout: float = 5.0
    """Bounds every call that has no limit of its own."""
    prepare_timeout: float = 1.0
    """Bounds Prepare, which holds the row locks of the caller's transaction."""
    connect_timeout: float = 3.0
    """Bounds one attempt to open a session."""
    max_reconnect_delay: float = 2.0
    """Bounds the pause between two attempts to open a session."""
    check_timeout: float = 3.0
    """Bounds the work for one check-back question."""
    close_timeout: float = 2.0
    """How long close waits for answers that are still due."""
    disable_retries: bool = False
    """Makes every call a single attempt. Commits in the background are not affected."""

    on_alarm: Callable[[Alarm], None] | None = None
    """Called for what a person should look at. It must not block."""

    def __post_init__(self) -> None:
        if not self.address:
            raise ConfigError("address is empty (OUTBOX_ADDRESS)")
        if not self.source:
            raise ConfigError("source is empty (OUTBOX_SOURCE)")
        if len(self.source.encode()) > 255:
            raise ConfigError(f"source has {len(self.source.encode())} bytes, more than 255")
        if self.plaintext and self.tls is not None:
            raise ConfigError("plaintext and tls are both set")
        if not 1 <= self.sessions <= 16:
            raise ConfigError(f"sessions is {self.sessions}, not between 1 and 16")
        for name in ("max_in_flight", "max_pending_commits"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, less than 1")
        for name in TIMES:
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, not a time in seconds")

    @classmethod
    def from_env(
        cls, environ: Mapping[str, str] | None = None, *, prefix: str = "OUTBOX_", **settings: object
    ) -> Config:
        """Reads the configuration from environment variables; settings given here go before them.

        OUTBOX_ADDRESS (default 127.0.0.1:7070), OUTBOX_SOURCE, OUTBOX_TLS, OUTBOX_TLS_CA, OUTBOX_TLS_CERT, OUTBOX_TLS_KEY (files),
        OUTBOX_TOKEN or OUTBOX_TOKEN_FILE, as for the commands of `outbox`; and OUTBOX_CLIENT_ followed by the name of any
        other setting with a number, a time such as "500ms" or "2s", or true and false. Raises ConfigError.
        """
        env = os.environ if environ is None else environ
        found: dict[str, object] = {
            "address": env.get(prefix + "ADDRESS", "127.0.0.1:7070"),
            "source": env.get(prefix + "SOURCE", ""),
        }
        tls = _tls_from_env(env, prefix)
        found.update(tls=tls, plaintext=tls is None)
        token_file = env.get(prefix + "TOKEN_FILE")
        if token_file:
            found["token"] = _TokenFile(token_file)
        elif env.get(prefix + "TOKEN"):
            found["token"] = env[prefix + "TOKEN"]
        for name, kind in OTHERS.items():
            text = env.get(f"{prefix}CLIENT_{name.upper()}")
            if text:
                found[name] = _parse(f"{prefix}CLIENT_{name.upper()}", text, kind)
        found.update(settings)
        if "tls" in settings and settings["tls"] is not None and "plaintext" not in settings:
            found["plaintext"] = False
        if settings.get("plaintext") and "tls" not in settings:
            found["tls"] = None
        return cls(**found)  # type: ignore[arg-type]

    def instance_name(self) -> str:
        """Returns the name of this process: instance, or host name and process id."""
        return self.instance or f"{socket.gethostname()}/{os.getpid()}"

    def bearer(self) -> str | None:
        """Returns the token to send now."""
        return self.token() if callable(self.token) else self.token


TIMES = ("call_timeout", "prepare_timeout", "connect_timeout", "max_reconnect_delay", "check_timeout", "close_timeout")
OTHERS: Mapping[str, type] = {
    "instance": str,
    "unary": bool,
    "sessions": int,
    "max_in_flight": int,
    "fail_when_full": bool,
    "max_pending_commits": int,
    "disable_retries": bool,
    **dict.fromkeys(TIMES, float),
}


class _TokenFile:
    """Reads the token anew for every call, so that it may be rotated."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)

    def __call__(self) -> str:
        return self._path.read_text().strip()


def _tls_from_env(env: Mapping[str, str], prefix: str) -> TLS | None:
    files: dict[str, bytes] = {}
    for name in ("ca", "cert", "key"):
        variable = f"{prefix}TLS_{name.upper()}"
        path = env.get(variable)
        if path:
            try:
                files[name] = Path(path).read_bytes()
            except OSError as e:
                raise ConfigError(f"{variable}: {e}") from e
    wanted = _parse(prefix + "TLS", env.get(prefix + "TLS") or "false", bool)
    return TLS(files.get("ca"), files.get("cert"), files.get("key")) if files or wanted else None


_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def _parse(name: str, text: str, kind: type) -> object:
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if kind is float:
            for unit, factor in _UNITS.items():
                if text.endswith(unit) and text[: -len(unit)].replace(".", "", 1).isdigit():
                    return float(text[: -len(unit)]) * factor
        return kind(text)
    except (KeyError, ValueError):
        raise ConfigError(f"{name} is {text!r}, not a {_KINDS[kind]}") from None


_KINDS = {bool: 'truth value ("true" or "false")', int: "number", float: 'time such as "500ms" or "2s"', str: "text"}
