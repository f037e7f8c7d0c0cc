"""tenants: who may ask, for which adapters, and how much."""

from __future__ import annotations

import hashlib
import hmac
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from lorafit.config.foreign_text import read_recipe
from lorafit.errors import UsageError

OWNER = "owner"
"""The tenant of the server's own key: everything is allowed, nothing is limited."""
SHORTEST_KEY = 16


def _header_text(key: str) -> str:
    if any(not "!" <= character <= "~" for character in key):
        raise ValueError("a key has letters, digits and signs of ASCII, and no spaces")
    return key


class TenantSettings(BaseModel):
    """Hold one tenant of tenants.yaml.

    Attributes:
        key: the secret that its requests carry, at least 16 characters of ASCII without spaces, as headers have them.
        adapters: names that it may use; "*" is all of them, the base included.
        requests_per_minute: most requests in a minute.
        tokens_per_minute: most tokens, prompts included, in a minute.
        concurrent: most requests at once.
        priority: share of the machine while others wait too.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    key: Annotated[str, Field(min_length=SHORTEST_KEY), AfterValidator(_header_text)]
    adapters: list[str] = Field(default_factory=lambda: ["*"])
    requests_per_minute: Annotated[int, Field(ge=1)] | None = None
    tokens_per_minute: Annotated[int, Field(ge=1)] | None = None
    concurrent: Annotated[int, Field(ge=1)] | None = None
    priority: Annotated[float, Field(gt=0, le=1000)] = 1.0


@dataclass
class _Bucket:
    """Hold a rate limit as a bucket that fills in a minute. The level may fall below zero."""

    most: float
    level: float
    filled_s: float

    def refill(self, now_s: float) -> None:
        self.level = min(self.most, self.level + (now_s - self.filled_s) * self.most / 60)
        self.filled_s = now_s

    def wait_s(self) -> float:
        return max(0.0, (1 - self.level) * 60 / self.most)


@dataclass(eq=False)
class Tenant:
    """Hold a tenant's limits and what it uses. It belongs to the server's event loop."""

    name: str
    settings: TenantSettings
    is_admin: bool = False
    running: int = 0
    _requests: _Bucket | None = field(default=None, init=False)
    _tokens: _Bucket | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        now = time.monotonic()
        for name, most in (
            ("_requests", self.settings.requests_per_minute),
            ("_tokens", self.settings.tokens_per_minute),
        ):
            setattr(self, name, _Bucket(most, most, now) if most else None)

    def may_use(self, model: str) -> bool:
        """Return True if the tenant may ask for `model`."""
        return self.is_admin or "*" in self.settings.adapters or model in self.settings.adapters

    def enter(self, answers: int = 1) -> float | None:
        """Count a request of `answers` answers. Returns None, or the seconds to wait if a limit is reached."""
        now = time.monotonic()
        if self.settings.concurrent is not None and self.running + answers > self.settings.concurrent:
            return 1.0
        buckets = [bucket for bucket in (self._requests, self._tokens) if bucket is not None]
        for bucket in buckets:
            bucket.refill(now)
        if wait := max((bucket.wait_s() for bucket in buckets), default=0.0):
            return math.ceil(wait)
        if self._requests is not None:
            self._requests.level -= 1
        self.running += answers
        return None

    def leave(self, answers: int, tokens: int) -> None:
        """Count the end of a request and the tokens that it used."""
        self.running -= answers
        if self._tokens is not None:
            self._tokens.level -= tokens


class Tenants:
    """Find the tenant of a key, in a time that does not depend on the key."""

    def __init__(self, tenants: Iterable[Tenant]) -> None:
        self._by_digest = [(_digest(tenant.settings.key), tenant) for tenant in tenants]

    @classmethod
    def of(cls, api_key: str, admin_key: str, file: Path | None = None) -> Tenants:
        """Return the owner, the admin and the tenants in `file`. Raises UsageError for keys used twice."""
        own = Tenant(OWNER, TenantSettings(key=api_key), is_admin=admin_key == api_key)
        admins = [] if admin_key == api_key else [Tenant("admin", TenantSettings(key=admin_key), is_admin=True)]
        others = [] if file is None else read_tenants(file)
        keys = [tenant.settings.key for tenant in (own, *admins, *others)]
        if len(set(keys)) < len(keys):
            raise UsageError("two tenants have the same key", where=str(file), fix="give each its own")
        return cls([own, *admins, *others])

    def find(self, key: str) -> Tenant | None:
        """Return the tenant of `key`, or None. Every key is compared."""
        digest, found = _digest(key), None
        for known, tenant in self._by_digest:
            if hmac.compare_digest(known, digest):
                found = tenant
        return found

    def all(self) -> list[Tenant]:
        """Return all tenants."""
        return [tenant for _, tenant in self._by_digest]


def read_tenants(file: Path) -> list[Tenant]:
    """Return the tenants in `file`: a mapping `tenants` from names to settings. Raises UsageError."""
    content: Any = read_recipe(file)
    entries = content.get("tenants") if isinstance(content, Mapping) else None
    if not isinstance(entries, Mapping) or not entries or not all(isinstance(name, str) for name in entries):
        raise UsageError("the file names no tenants", where=str(file), fix="write `tenants:` and a name with its key")
    made = []
    for name, fields in entries.items():
        if name in (OWNER, "admin"):
            raise UsageError(f"{name} is no name for a tenant", where=str(file), fix="choose another name")
        try:
            made.append(Tenant(str(name), TenantSettings.model_validate(fields)))
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join([str(name), *(str(part) for part in first["loc"])])
            raise UsageError(f"{place}: {first['msg']}", where=str(file), fix="see docs/guides/serve.md") from None
    return made


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
