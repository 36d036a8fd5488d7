"""Trained versions under their addresses: what was trained once need not be trained again."""

from collections import OrderedDict
from collections.abc import Iterable

from vllm_longctx.trainer.trainer import State


class VersionCache:
    """In host memory, up to a limit. The least recently used goes first.

    limit: Bytes of all states together. 0 keeps none.
    """

    def __init__(self, limit: int = 0):
        self.limit = limit
        self._states: OrderedDict[bytes, State] = OrderedDict()
        self._bytes = 0

    def get(self, address: bytes | None) -> State | None:
        """None for what is not kept, and for no address."""
        state = None if address is None else self._states.get(address)
        if state is not None and address is not None:
            self._states.move_to_end(address)
        return state

    def use(self, addresses: Iterable[bytes]) -> None:
        """What of them is kept counts as used now, the last of them most recently."""
        for address in addresses:
            self.get(address)

    def put(self, address: bytes, state: State, uses: Iterable[bytes]) -> list[bytes]:
        """Keep a state that is not kept yet, with `uses` as in `use`.

        Returns the addresses of what had to go for it, or its own if there is no room.
        """
        if state.nbytes > self.limit:
            return [address]
        self._states[address] = state
        self._bytes += state.nbytes
        self.use(uses)
        gone = []
        while self._bytes > self.limit:
            oldest, left = self._states.popitem(last=False)
            self._bytes -= left.nbytes
            gone.append(oldest)
        return gone
