"""Prompts whose answers are over, chunk by chunk, for a next prompt that begins the same.

A tree: a node is a whole chunk of a prompt behind the chunks above it, so what two prompts begin with is kept once, and
both stay. Only whole chunks, because an answer must not depend on earlier requests (``prefix_chunks.py``). The chunk
that was not used for the longest time goes first, of those that nothing stands behind.

Kept chunks live in the room of the key-value cache that running answers do not use *yet*:

    bytes that running answers take now + bytes of kept chunks <= the room

An answer that grows pushes them out, so they keep nobody waiting. An answer that begins with kept chunks copies them;
where there is no room for both it takes them away, layer by layer, and gives them back when it is over.

All on the engine's thread. Memory: as above, and one layer's keys and values while chunks are copied.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

from conmoe_edge.offload.generation.cache_room import Room
from conmoe_edge.offload.generation.prefix_chunks import (
    Form,
    HeldChunk,
    PromptChunk,
    Tensors,
    ends_needed,
    forget_layer,
    standing_at,
)
from conmoe_edge.offload.generation.prompt_files import DamagedPrompt, PromptFiles
from conmoe_edge.offload.generation.sequence import CachedTokens


@dataclass(eq=False, slots=True)
class _Node:
    """A kept chunk: its tokens, what it takes of the room, when it was last used."""

    tokens: tuple[int, ...]
    chunk: HeldChunk
    cost: int
    parent: _Node | None
    used: int
    children: dict[tuple[int, ...], _Node] = field(default_factory=dict)


class KeptPrompts:
    """The kept chunks of one model."""

    def __init__(self, room: Room, size: int, files: PromptFiles | None = None) -> None:
        """``room``: of the key-value cache; ``size``: tokens of a chunk; ``files``: what is kept over restarts."""
        self._room = room
        self._size = size
        self.files = files
        self._first: dict[tuple[int, ...], _Node] = {}
        self._clock = 0
        self.nbytes = 0
        self.hits = 0
        self.misses = 0

    def __len__(self) -> int:
        """Prompts: chunks that nothing stands behind."""
        return sum(not one.children for one in self._nodes())

    @property
    def chunks(self) -> int:
        """How many are kept."""
        return sum(1 for _ in self._nodes())

    def wanted_ends(self, tokens: Sequence[int], form: Form | None) -> Callable[[int], bool]:
        """Behind which chunks of ``tokens`` a cache should be able to stand later. Behind any; but a state is as large
        as hundreds of tokens, so with one: behind the last, and behind the one where another prompt went on otherwise.
        """
        if form is None or all(one.kind != "state" for one in form):
            return lambda index: True
        last, parted = len(tokens) // self._size, len(self._path(tokens))
        needed = ends_needed(form, self._size)
        return lambda index: last - needed <= index < last or parted - needed <= index < parted

    def begin(
        self,
        cached: CachedTokens,
        tokens: Sequence[int],
        form: Form | None,
        running: Sequence[CachedTokens],
        using: int,
    ) -> None:
        """Let ``cached``, which holds nothing, hold the longest beginning of ``tokens`` that is known.

        Args:
            cached: of an answer whose room is reserved.
            tokens: its prompt.
            form: of the model's cache; ``None`` where nothing can be used again.
            running: caches of the answers that are being made.
            using: bytes of the room that these take now.
        """
        if form is None or len(tokens) <= self._size:
            return
        path = self._path(tokens)
        path = path[: standing_at([one.chunk for one in path], form, self._size)]
        self._touch(path)
        chunks: Sequence[PromptChunk] = [one.chunk for one in path]
        for one in running:
            lent = [one.chunk_at(i) for i in range(one.reusable(tokens) // self._size)]
            lent = lent[: standing_at(lent, form, self._size)]
            if len(lent) > len(chunks):
                path, chunks = [], lent
        if self.files is not None:
            chunks = self.files.further(chunks, tokens, form)
        while chunks:
            cost = self._room.nbytes(self._room.tokens(len(chunks) * self._size))
            beside = self.make_way(using + cost, path)
            try:
                cached.start_behind(chunks, tokens, form, move=not beside)
                break
            except DamagedPrompt as error:
                if not beside:
                    break
                chunks = chunks[: error.index]
                chunks = chunks[: standing_at(chunks, form, self._size)]
            finally:
                if not beside and path:  # also where some layers only have moved
                    self._remove(path[0])
        self.hits += bool(cached.held)
        self.misses += not cached.held

    def end(self, cached: CachedTokens, using: int) -> None:
        """Keep the whole chunks of a prompt whose answer is over, as far as there is room; ``cached`` holds nothing
        afterwards. ``using``: as of ``begin``, without this answer.
        """
        form = cached.form
        if form is None or not cached.whole:
            cached.forget()
            return
        tokens = cached.held[: cached.whole]
        path = self._path([*tokens, 0])
        self._touch(path)
        self._add_ends(path, cached, form, using)
        new = [cached.chunk_at(i) for i in range(len(path), cached.whole // self._size)]
        costs = [self._size if self._room.counts_tokens else one.nbytes for one in new]
        left = self._room.total - using - sum(one.cost for one in path)
        while sum(costs) > left:
            del new[-1], costs[-1]
        standing = standing_at([*(one.chunk for one in path), *new], form, self._size) - len(path)
        del new[max(0, standing) :], costs[max(0, standing) :]
        if new:
            self.make_way(using + sum(costs), path)
            self._insert(path, tokens, costs, _taken(cached, form, new))
        cached.forget()

    def make_way(self, using: int, beside: Collection[_Node] = ()) -> bool:
        """Push out chunks until running answers have ``using`` bytes; False where that would take those of ``beside``,
        which stay.
        """
        if using + self.nbytes <= self._room.total:
            return True
        leaves = sorted(
            (one for one in self._nodes() if not one.children and one not in beside),
            key=lambda one: one.used,
        )
        while using + self.nbytes > self._room.total:
            if not leaves:
                return False
            gone = leaves.pop(0)
            self._remove(gone)
            parent = gone.parent
            if parent is not None and not parent.children and parent not in beside:
                place = next(
                    (i for i, one in enumerate(leaves) if one.used > parent.used), len(leaves)
                )
                leaves.insert(place, parent)
        return True

    def drop_all(self) -> bool:
        """Let go of everything; whether there was anything."""
        anything = bool(self._first)
        self._first.clear()
        self.nbytes = 0
        return anything

    def _insert(
        self,
        path: list[_Node],
        tokens: Sequence[int],
        costs: Sequence[int],
        chunks: Sequence[HeldChunk],
    ) -> None:
        """Put ``chunks`` of ``tokens`` behind ``path``."""
        parent = path[-1] if path else None
        for i, (cost, chunk) in enumerate(zip(costs, chunks, strict=True), len(path)):
            own = tuple(tokens[i * self._size : (i + 1) * self._size])
            node = _Node(own, chunk, cost, parent, self._clock)
            (self._first if parent is None else parent.children)[own] = node
            self.nbytes += cost
            parent = node

    def _add_ends(
        self, path: Sequence[_Node], cached: CachedTokens, form: Form, using: int
    ) -> None:
        """To kept chunks that have none, where ``cached`` has them and there is room."""
        for node, ends in zip(path, cached.ends, strict=False):
            if node.chunk.has_ends or ends is None:
                continue
            cost = 0 if self._room.counts_tokens else ends.nbytes
            if not self.make_way(using + cost, path):
                return
            layers = [
                rows if one.kind == "rows" else end
                for one, rows, end in zip(form, node.chunk.layers, ends.layers, strict=True)
            ]
            node.chunk = HeldChunk(layers, True)
            node.cost += cost
            self.nbytes += cost

    def _path(self, tokens: Sequence[int]) -> list[_Node]:
        """The kept chunks that ``tokens`` begin with; at least one token is left to compute."""
        found: list[_Node] = []
        level = self._first
        for start in range(0, len(tokens) - self._size, self._size):
            node = level.get(tuple(tokens[start : start + self._size]))
            if node is None:
                break
            found.append(node)
            level = node.children
        return found

    def _touch(self, path: Sequence[_Node]) -> None:
        self._clock += 1
        for one in path:
            one.used = self._clock

    def _remove(self, node: _Node) -> None:
        """Let go of a chunk and of all that stand behind it."""
        del (self._first if node.parent is None else node.parent.children)[node.tokens]
        self.nbytes -= sum(one.cost for one in _below(node))

    def _nodes(self) -> Iterator[_Node]:
        for one in self._first.values():
            yield from _below(one)


def _below(node: _Node) -> Iterator[_Node]:
    """``node`` and all behind it."""
    left = [node]
    while left:
        one = left.pop()
        yield one
        left += one.children.values()


def _taken(cached: CachedTokens, form: Form, chunks: Sequence[HeldChunk]) -> list[HeldChunk]:
    """Copies of ``chunks``, which lie in ``cached``; that lets go of each layer once it is copied."""
    cache = cached.give_away()
    copies: list[list[Tensors | None]] = [[] for _ in chunks]
    for index, one in enumerate(form):
        for copy, chunk in zip(copies, chunks, strict=True):
            layer = chunk.layers[index]
            if layer is not None and one.kind == "rows":
                layer = tuple(held.clone() for held in layer)
            copy.append(layer)
            chunk.drop(index)
        if one.kind == "rows":
            forget_layer(cache, index)
    return [HeldChunk(layers, chunk.has_ends) for layers, chunk in zip(copies, chunks, strict=True)]
