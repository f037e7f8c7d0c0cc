"""AdapterPool: named adapters on disk, in host memory and in the decoder's slots, least recently used first out."""

from __future__ import annotations

import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Sequence
from pathlib import Path

from lorafit.errors import UsageError
from lorafit.methods.lora import GroupedAdapters
from lorafit.runs import LAST
from lorafit.serve.adapters.source import AdapterVersion, ServedBase, Weights, open_adapter

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,127}")


class AdapterPool:
    """Hold the registered adapters. A request pins the version that it began with.

    A pinned version stays in host memory; one that running answers use stays in its slot.

    Names are registered from any thread; slots are placed by the decoder's thread alone.
    """

    def __init__(
        self,
        base: ServedBase,
        grouped: GroupedAdapters,
        *,
        roots: Sequence[Path],
        host_adapters: int,
        reserved: Sequence[str],
    ) -> None:
        self.base, self.grouped = base, grouped
        self.roots = tuple(root.resolve() for root in roots)
        self.reserved = frozenset(reserved)
        self._host_limit = max(1, host_adapters)
        self._lock = threading.RLock()
        self._names: dict[str, AdapterVersion] = {}
        self._host: OrderedDict[str, Weights] = OrderedDict()
        self._slots: OrderedDict[str, int] = OrderedDict()
        self._free = list(range(1, grouped.slots - 1))
        self._pins: Counter[str] = Counter()
        self._in_use: Counter[str] = Counter()

    @property
    def proof_slot(self) -> int:
        """Return the slot that no request uses."""
        return self.grouped.slots - 1

    def names(self) -> dict[str, AdapterVersion]:
        """Return the registered adapters by name."""
        with self._lock:
            return dict(self._names)

    def is_resident(self, version: AdapterVersion) -> bool:
        """Return True if the version is in a slot or in host memory."""
        with self._lock:
            return version.identity in self._slots or version.identity in self._host

    def open(self, name: str, path: Path, checkpoint: str = LAST) -> AdapterVersion:
        """Check the adapter in `path` and read it into host memory, unregistered. See `open_adapter` for errors."""
        self._check_name(name)
        version, weights = open_adapter(name, path, self.base, self.grouped.model, self.roots, checkpoint)
        self._keep(version, weights)
        return version

    def register(self, version: AdapterVersion, *, replace: bool = False) -> None:
        """Give `version` its name. Raises UsageError for a name in use, unless `replace`."""
        with self._lock:
            if version.name in self._names and not replace:
                fix = "unload it first, or send load_inplace"
                raise UsageError(f"the adapter {version.name} is already loaded", where="lora_name", fix=fix)
            self._names[version.name] = version

    def unregister(self, name: str) -> AdapterVersion:
        """Take the name away. Running requests keep their version. Raises UsageError for an unknown name."""
        with self._lock:
            if name not in self._names:
                raise UsageError(f"no adapter of this name is loaded ({name[:128]})", where="lora_name")
            return self._names.pop(name)

    def pin(self, name: str) -> AdapterVersion | None:
        """Return the version of `name` and keep its weights until `unpin`; None for an unknown name."""
        with self._lock:
            version = self._names.get(name)
            if version is not None:
                self._pins[version.identity] += 1
            return version

    def unpin(self, version: AdapterVersion) -> None:
        """Undo one `pin`."""
        with self._lock:
            self._pins[version.identity] -= 1
            if self._pins[version.identity] <= 0:
                del self._pins[version.identity]

    def weights(self, version: AdapterVersion) -> Weights:
        """Return the weights, from host memory or from disk. Raises AdapterError if the files have changed."""
        with self._lock:
            if version.identity in self._host:
                self._host.move_to_end(version.identity)
                return self._host[version.identity]
        weights = version.read(self.grouped.model)
        self._keep(version, weights)
        return weights

    def fetch(self, version: AdapterVersion) -> None:
        """Read the version into host memory, unless it is resident."""
        if not self.is_resident(version):
            self.weights(version)

    def place(self, version: AdapterVersion) -> int | None:
        """Return the slot of `version`, evicting an unused adapter if needed; None while all are in use.

        The slot is in use until `release`. Raises AdapterError if the files have changed.

        Only the decoder's thread calls it, between two steps.
        """
        with self._lock:
            if version.identity in self._slots:
                self._slots.move_to_end(version.identity)
                self._in_use[version.identity] += 1
                return self._slots[version.identity]
            slot = self._free.pop() if self._free else self._evict()
        if slot is None:
            return None
        try:
            self.grouped.put(slot, self.weights(version), version.scale)
        except BaseException:
            self._free.append(slot)
            raise
        with self._lock:
            self._slots[version.identity] = slot
            self._in_use[version.identity] += 1
        return slot

    def release(self, version: AdapterVersion) -> None:
        """Undo one `place`. The adapter stays in its slot until the room is needed."""
        with self._lock:
            self._in_use[version.identity] -= 1

    def forget_slots(self) -> None:
        """Empty all slots, after a crash of the decoder."""
        with self._lock:
            self._slots.clear()
            self._in_use.clear()
            self._free = list(range(1, self.grouped.slots - 1))

    def _keep(self, version: AdapterVersion, weights: Weights) -> None:
        with self._lock:
            self._host[version.identity] = weights
            self._host.move_to_end(version.identity)
            # a pinned version stays, since its files may have been replaced meanwhile
            unpinned = [
                identity for identity in self._host if not self._pins[identity] and identity != version.identity
            ]
            for identity in unpinned[: max(0, len(self._host) - self._host_limit)]:
                del self._host[identity]

    def _evict(self) -> int | None:
        for identity in self._slots:
            if self._in_use[identity] <= 0:
                del self._in_use[identity]
                return self._slots.pop(identity)
        return None

    def _check_name(self, name: str) -> None:
        if not NAME.fullmatch(name):
            raise UsageError("an adapter's name has letters, digits and . _ : / @ -", where="lora_name")
        if name in self.reserved:
            raise UsageError(f"{name} is the name of the base", where="lora_name", fix="choose another name")
