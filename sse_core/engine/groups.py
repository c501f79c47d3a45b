"""Sort clients into groups that are sent the same bytes, and join these bytes.

    new frames  ->  each group that asked for their channels, with one batch for all its clients

A thousand clients that asked for the same channels are one group. An event costs nothing for groups
that did not ask for its channel: they are not looked at.

All in here belongs to the publisher thread.
"""
from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from itertools import chain

from sse_core.engine.clients import Client, Subscription
from sse_core.engine.log import Batch, Frame

# Bytes of joined batches that are kept at a time, for the next group that wants the same.
MAX_JOINED = 4 << 20

# Bytes that a frame takes in a batch beside its own, at most.
BATCH_COST = 200


class Group:
    """The clients with one subscription."""

    # Without a dict of attributes, a client in a group of its own takes less memory.
    __slots__ = ("subscription", "current", "size", "sent_at")

    def __init__(self, subscription: Subscription) -> None:
        self.subscription = subscription

        # The clients that have had every frame. An ordered set: the values mean nothing.
        self.current: dict[Client, None] = {}

        # How many clients it has, current or not.
        self.size = 0

        # When all current clients were last sent something, on the monotonic clock.
        self.sent_at = -math.inf


class Groups:
    """The groups of all clients, and which of them want an event."""

    def __init__(self) -> None:
        self._groups: dict[Subscription, Group] = {}

        # By channel, its only group or an ordered set of its groups. Most channels are one group's,
        # and a client of 32 takes 7 KiB less without a dict for each.
        self._by_channel: dict[str, Group | dict[Group, None]] = {}

    def __iter__(self) -> Iterator[Group]:
        """Iterate over all groups."""
        return iter(self._groups.values())

    def join(self, client: Client) -> None:
        """Add a client to its group, which begins with its first one.

        The client is not current yet.
        """
        subscription = client.subscription
        group = self._groups.setdefault(subscription, Group(subscription))
        # One copy serves all of the group.
        client.subscription = group.subscription
        if not group.size:
            for channel in subscription.channels:
                others = self._by_channel.setdefault(channel, group)
                if isinstance(others, dict):
                    others[group] = None
                elif others is not group:
                    self._by_channel[channel] = {others: None, group: None}
        group.size += 1

    def leave(self, client: Client) -> None:
        """Remove a client from its group, which goes with its last one."""
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
        """Return the current clients of a client's group, for the caller to change."""
        return self._groups[client.subscription].current

    def batches(self, run: Sequence[Frame]) -> Iterator[tuple[Group, Batch]]:
        """Yield every group that wants some of these frames, with a batch of those.

        Groups that want the same of them share one batch: what counts are not all channels of a
        subscription, but those in this run. With thousands of different subscriptions the batches
        are let go whenever they exceed MAX_JOINED, and joined anew if they are wanted again.

        Clients may leave meanwhile.
        """
        # The frames on each channel, in order.
        by_channel: dict[str | None, list[Frame]] = {}
        for frame in run:
            by_channel.setdefault(frame.channel, []).append(frame)
        named = frozenset(channel for channel in by_channel if channel)

        # By what is wanted of this run; and the memory that they take, in bytes.
        batches: dict[Subscription, Batch] = {}
        joined = 0
        for group in self.wanting(by_channel):
            channels = group.subscription.channels & named if named else named
            key = Subscription(channels, group.subscription.chunked)
            if key not in batches:
                if joined > MAX_JOINED:
                    batches, joined = {}, 0
                # Sorted by their numbers, the frames are in the order of the log again.
                wanted = [by_channel.get(channel, ()) for channel in (None, *channels)]
                batches[key] = batch = Batch(sorted(chain.from_iterable(wanted)), key.chunked)
                joined += len(batch.data) + BATCH_COST * (1 + len(batch.frames))
            yield group, batches[key]

    def wanting(self, channels: Collection[str | None]) -> list[Group]:
        """Return every group that wants an event on any of these channels.

        None stands for an event without a channel, which all groups want.
        """
        if None in channels:
            return list(self)
        found = (self._by_channel.get(channel, {}) for channel in channels if channel)
        return list(dict.fromkeys(chain.from_iterable(
            (groups,) if isinstance(groups, Group) else groups for groups in found)))
