"""Trained versions under their addresses: what was trained once need not be trained again."""

from collections import OrderedDict
from collections.abc import Sequence

from vllm_longctx.trainer.trainer import State
from vllm_longctx.trainer.version_files import VersionFiles


class VersionCache:
    """In host memory, up to a limit, and on disk if it is given one. The least recently used goes first.

    On disk are versions that their text still needs (`use`): when they leave the memory, or before.

    limit: Bytes of all states in memory together. 0 keeps none.
    files: The disk's part.
    """

    def __init__(self, limit: int = 0, files: VersionFiles | None = None):
        self.limit, self.files = limit, files
        self._states: OrderedDict[bytes, State] = OrderedDict()
        self._bytes = 0
        self._uses: dict[int, Sequence[bytes]] = {}  # by text
        self._gone: list[bytes] = []

    def get(self, address: bytes | None) -> State | None:
        """None for what is not kept, and for no address."""
        if address is None:
            return None
        state = self._states.get(address)
        if state is not None:
            self._states.move_to_end(address)
            return state
        state = None if self.files is None else self.files.get(address)
        if state is not None and state.nbytes <= self.limit:
            self._add(address, state)
            self._make_room()
        return state

    def use(self, text: int, addresses: Sequence[bytes]) -> None:
        """What a text needs from now on counts as used now, the last most recently. text: Its number."""
        self._uses[text] = addresses
        for address in addresses:
            if address in self._states:
                self._states.move_to_end(address)

    def put(self, address: bytes, state: State, text: int, uses: Sequence[bytes]) -> list[bytes]:
        """Keep a state that is not kept yet. text, uses: As of `use`.

        Returns the addresses of what had to go since the last call, its own if there is no room.
        """
        if state.nbytes > self.limit:
            self._gone.append(address)
        else:
            self._add(address, state)
            self.use(text, uses)
            self._make_room()
        gone, self._gone = self._gone, []
        return gone

    def forget(self, address: bytes, reason: str) -> None:
        """Of a version that cannot be used."""
        state = self._states.pop(address, None)
        self._bytes -= 0 if state is None else state.nbytes
        if self.files is not None:
            self.files.remove(address, reason)

    def write_next(self) -> bool:
        """Write the most recently used version to disk that ought to be there. False if none was written."""
        for address, state in reversed(self._states.items()):
            if self._belongs_on_disk(address):
                return self.files is not None and self.files.put(address, state)
        return False

    def holds(self, address: bytes) -> bool:
        return address in self._states or (self.files is not None and self.files.has(address))

    def _add(self, address: bytes, state: State) -> None:
        self._states[address] = state
        self._bytes += state.nbytes

    def _make_room(self) -> None:
        while self._bytes > self.limit:
            oldest, state = self._states.popitem(last=False)
            self._bytes -= state.nbytes
            if self.files is not None and self._belongs_on_disk(oldest):
                self.files.put(oldest, state)
            if not self.holds(oldest):
                self._gone.append(oldest)
            ended = [text for text, uses in self._uses.items() if self._states.keys().isdisjoint(uses)]
            for text in ended:
                del self._uses[text]

    def _belongs_on_disk(self, address: bytes) -> bool:
        if self.files is None or self.files.has(address):
            return False
        return any(address in uses for uses in self._uses.values())
