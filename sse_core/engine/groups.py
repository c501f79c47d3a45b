"""Sort clients into groups that are sent the same bytes. All in here is the publisher thread's."""
from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from itertools import chain

from sse_core.engine.clients import Client, Subscription


class Group:
    """Clients that are sent the same bytes, because they asked for the same."""
    __slots__ = ("subscription", "current", "size", "sent_at")

    def __init__(self, subscription: Subscription) -> None:
        self.subscription = subscription
        self.current: dict[Client, None] = {}   # ordered set: the clients that have had every frame
        self.size = 0                           # of these, and of those that are not current
        self.sent_at = -math.inf                # when all current clients were last sent something


class Groups:
    """The groups of all clients, and which of them want an event."""

    def __init__(self) -> None:
        self._groups: dict[Subscription, Group] = {}
        # Most channels are one group's: without a dict for that, 32 take 7 KiB less
        self._by_channel: dict[str, Group | dict[Group, None]] = {}

    def __iter__(self) -> Iterator[Group]:
        return iter(self._groups.values())

    def join(self, client: Client) -> None:
        """Give a client its group."""
        subscription = client.subscription
        group = self._groups.setdefault(subscription, Group(subscription))
        client.subscription = group.subscription      # one copy for all
        if not group.size:
            for channel in subscription.channels:
                others = self._by_channel.setdefault(channel, group)
                if isinstance(others, dict):
                    others[group] = None
                elif others is not group:
                    self._by_channel[channel] = {others: None, group: None}
        group.size += 1

    def leave(self, client: Client) -> None:
        """Take a client out of its group, which goes with its last one."""
        group = self._groups[client.subscription]
        group.current.pop(client, None)
        group.size -= 1
        if group.size:
            return
        del self._groups[group.subscription]
        for channel in group.subscription.channels:
            others = self._by_channel[channel]
            if isinstance(others, dict) and len(others) > 1:
                del others[group]
            else:
                del self._by_channel[channel]

    def current_in_group_of(self, client: Client) -> dict[Client, None]:
        """Return the current clients of a client's group."""
        return self._groups[client.subscription].current

    def wanting(self, channels: Collection[str | None]) -> list[Group]:
        """Return every group that wants an event on any of the channels; no other is touched."""
        if None in channels:
            return list(self)
        subscription = (self._by_channel.get(channel, {}) for channel in channels if channel)
        return list(dict.fromkeys(chain.from_iterable(
            (groups,) if isinstance(groups, Group) else groups for groups in subscription)))
