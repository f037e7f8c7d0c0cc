"""FairQueue: waiting requests of several tenants, served in proportion to their priorities.

The tenant with the fewest tokens served per unit of priority is next (virtual token counter, arXiv:2401.00588).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """Hold waiting items by tenant. It is not thread-safe."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[Item]] = {}
        self._served: dict[str, float] = {}
        self._floor = 0.0

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def put(self, tenant: str, item: Item) -> None:
        """Append `item`. A tenant that waited for nothing does not keep the share that it left unused."""
        queue = self._waiting.setdefault(tenant, deque())
        if not queue:
            self._served[tenant] = max(self._served.get(tenant, 0.0), self._floor)
        queue.append(item)

    def heads(self) -> Iterator[tuple[str, Item]]:
        """Yield the first item of each tenant, the tenant that is next first."""
        for tenant in sorted((name for name, queue in self._waiting.items() if queue), key=self._order):
            yield tenant, self._waiting[tenant][0]

    def admitted(self, tenant: str) -> None:
        """Note that an item of `tenant` was served: tenants that come later begin no lower."""
        self._floor = max(self._floor, self._served[tenant])

    def remove(self, tenant: str, item: Item) -> bool:
        """Remove `item`; False if it does not wait."""
        try:
            self._waiting.get(tenant, deque()).remove(item)
        except ValueError:
            return False
        return True

    def take_if(self, is_wanted: Callable[[Item], bool]) -> list[Item]:
        """Remove and return the items that are wanted, wherever they wait."""
        taken = [item for queue in self._waiting.values() for item in queue if is_wanted(item)]
        for tenant, queue in self._waiting.items() if taken else ():
            self._waiting[tenant] = deque(item for item in queue if not is_wanted(item))
        return taken

    def drain(self) -> list[Item]:
        """Remove and return all items."""
        items = [item for queue in self._waiting.values() for item in queue]
        self._waiting.clear()
        return items

    def charge(self, tenant: str, tokens: float, priority: float) -> None:
        """Count `tokens` as served to `tenant`."""
        self._served[tenant] = self._served.get(tenant, self._floor) + tokens / priority

    def _order(self, tenant: str) -> tuple[float, str]:
        return self._served[tenant], tenant
