"""The engine: many requests answered at once by a fixed number of slots, each as if it were alone.

    submit -> waiting -> a slot and pages are free -> prefill, chunk by chunk -> decode, some tokens at a time -> done

One thread does all of it. In a round it begins what waits, reads some chunks of prompts, and writes some tokens of
every answer; so long prompts never stop the answers of others for longer than a tenth of a second, or one chunk.

What an answer is does not depend on what else is answered. A row of a call never looks at another row; a chunk begins
at a multiple of its size, whatever was known of the prompt before; keys of answers, which decode has written, are not
handed on to later prompts. What is left is the number of rows of a call, by which a compiler chooses how to compute
matrix products. Calls of several sizes are compiled, but only those are used whose results are the same bits, which the
engine tries when it starts (`row_sizes="equal"`).
"""

from __future__ import annotations

import atexit
import itertools
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vflax.constants import IMAGE_TOKEN_ID
from vflax.errors import UserError
from vflax.generate.pages import Pages, Store
from vflax.generate.processor import Processor
from vflax.generate.programs import Weights, Written
from vflax.generate.request import Closed, Finish, OnDelta, Prompt, PromptTooLong, Sampling, Stats, Token
from vflax.generate.run import OnLogits, Run
from vflax.generate.runner import Runner
from vflax.generate.sizes import EngineSettings
from vflax.models.llava import LlavaConfig

log = logging.getLogger(__name__)

# Prompts are read for about so long before answers go on.
_READ_SECONDS = 0.1
# A round of decode should take about so long: long enough that the host's work between calls does not count, short
# enough that nobody sees tokens come in portions, or waits for a slot.
_ROUND_SECONDS = 0.05


class _Ticket:
    """See vflax.generate.request.Ticket."""

    def __init__(self, engine: Engine, run: Run) -> None:
        self._engine, self._run = engine, run

    @property
    def prompt_tokens(self) -> int:
        return self._run.prompt_tokens

    @property
    def cached_tokens(self) -> int:
        return self._run.cached_tokens

    def cancel(self) -> None:
        self._engine._cancel(self._run)


class Engine:
    """A model on a mesh that answers requests; see `vflax.generate.request.Answering`."""

    def __init__(
        self,
        processor: Processor,
        config: LlavaConfig,
        weights: Weights,
        mesh: Mesh,
        dtype: Any,
        settings: EngineSettings,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Allocate, compile, and start the thread.

        Args:
            processor: of the model.
            config: the model.
            weights: from `vflax.generate.weights.load_weights`.
            mesh: what they lie on.
            dtype: of what is computed, and of the cache unless that has 8 bits.
            settings: sizes.
            say: is told in a line what was compiled.

        Raises:
            UserError: for settings that are impossible.
        """
        began = time.perf_counter()
        self.processor = processor
        self._runner = Runner(config, weights, mesh, dtype, settings, processor.stops)
        self.layout = layout = self._runner.layout
        with jax.set_mesh(mesh):
            self.row_sizes = self._runner.start(settings.row_sizes)
            self._chunks = max(1, int(_READ_SECONDS / self._runner.chunk_seconds()))
        # Prompts are read in whole chunks, so what is left over of the cache is of no use to a single one.
        room = (layout.pages - 1) * layout.page // layout.chunk * layout.chunk
        self.max_length = min(layout.max_length, room)
        say(
            f"{self.compiled} programs compiled in {time.perf_counter() - began:.1f} s. "
            f"{layout.shards * layout.slots} slots of at most {self.max_length:,} tokens, a cache of "
            f"{layout.shards * (layout.pages - 1) * layout.page:,}; "
            f"{' or '.join(map(str, self.row_sizes))} rows at a time"
        )
        self._pages = [Pages(layout.pages) for _ in range(layout.shards)]
        self._store = Store(layout.store)
        self._table = np.zeros((layout.shards, layout.slots + 1, layout.table), np.int32)
        self._free = [list(range(layout.slots - 1, -1, -1)) for _ in range(layout.shards)]
        # A request is in one of these at a time: incoming, waiting, reading (its prompt), running.
        self._incoming: deque[Run] = deque()
        self._waiting: deque[Run] = deque()
        self._reading: list[deque[Run]] = [deque() for _ in range(layout.shards)]
        self._running: list[dict[int, Run]] = [{} for _ in range(layout.shards)]
        # Held to change what `stats` and other threads look at.
        self._lock = threading.Condition()
        self._closing: str | None = None  # "drain" or "now"
        self._broken = False
        self._counts: Counter[str] = Counter()
        self._finished: Counter[str] = Counter()
        self._step_seconds = _ROUND_SECONDS  # of one decoding step of one call, about
        self._thread = threading.Thread(target=self._loop, args=(mesh,), name="vflax-engine", daemon=True)
        self._thread.start()
        # A thread that computes while the interpreter goes away brings the process down.
        atexit.register(self.close)

    # --- from other threads -----------------------------------------------------------------------------------------

    @property
    def compiled(self) -> int:
        """How many programs were compiled so far; all of them when the engine starts, none later."""
        return self._runner.compiled

    def submit(
        self, prompt: Prompt, sampling: Sampling, on_delta: OnDelta, on_logits: OnLogits | None = None
    ) -> _Ticket:
        """See `vflax.generate.request.Answering`.

        Args:
            prompt: what to answer.
            sampling: how.
            on_delta: is given the answer's pieces.
            on_logits: is given the logits that each token is chosen from; then tokens are written one by one.

        Raises:
            PromptTooLong, Closed: see there.
            UserError: a prompt without tokens, that ends with an image, or whose images do not fit its places.
        """
        self._check(prompt)
        length = len(prompt.ids)
        most = sampling.max_tokens or max(1, self.max_length - length)
        if length + most > self.max_length:
            raise PromptTooLong(
                f"the prompt is {length:,} tokens with its {len(prompt.images)} images, and the answer may have "
                f"{most:,}: together more than the {self.max_length:,} that there is room for",
                length,
                self.max_length,
            )
        run = Run(prompt, sampling, most, self.processor, self.layout.chunk, on_delta, on_logits)
        with self._lock:
            if self._closing or self._broken:
                raise Closed("the engine is closed" if self._closing else "the engine broke; see its log")
            self._incoming.append(run)
            self._lock.notify()
        return _Ticket(self, run)

    def stats(self) -> Stats:
        """See `vflax.generate.request.Answering`."""
        with self._lock:
            layout, counts = self.layout, self._counts
            slots, pages = layout.shards * layout.slots, layout.shards * (layout.pages - 1)
            return Stats(
                slots=slots,
                running=slots - sum(map(len, self._free)),
                waiting=len(self._incoming) + len(self._waiting),
                pages=pages,
                pages_used=pages - sum(own.available for own in self._pages),
                pages_cached=sum(own.cached for own in self._pages),
                prompt_tokens=counts["prompt"],
                cached_tokens=counts["cached"],
                answer_tokens=counts["answer"],
                images=counts["images"],
                cached_images=counts["cached images"],
                finished=dict(self._finished),
            )

    def close(self, *, drain: bool = False, timeout: float | None = None) -> None:
        """See `vflax.generate.request.Answering`."""
        with self._lock:
            self._closing = "drain" if drain else "now"
            self._lock.notify()
        self._thread.join(timeout)
        atexit.unregister(self.close)
        if drain and self._thread.is_alive():
            self.close()

    def _cancel(self, run: Run) -> None:
        with self._lock:
            run.cancelled = True
            self._lock.notify()

    def _check(self, prompt: Prompt) -> None:
        places, wanted = int(np.sum(prompt.ids == IMAGE_TOKEN_ID)), self.processor.image_tokens
        if not len(prompt.ids):
            raise UserError("the prompt has no tokens")
        if places != len(prompt.images) * wanted:
            raise UserError(
                f"the prompt has {places} image tokens, but its {len(prompt.images)} images have {wanted} each"
            )
        if prompt.ids[-1] == IMAGE_TOKEN_ID:
            raise UserError("the prompt ends with an image: text must follow it")

    # --- the thread -------------------------------------------------------------------------------------------------

    def _loop(self, mesh: Mesh) -> None:
        finish: Finish = "cancelled"
        try:
            with jax.set_mesh(mesh):
                while self._wait():
                    for run in [run for run in self._all() if run.cancelled]:
                        self._end(run, "cancelled")
                    self._begin()
                    for _ in range(self._chunks):
                        if not self._read():
                            break
                    self._write()
        except BaseException:
            log.exception("the engine broke: all its requests fail, and it takes no more")
            finish = "failed"
        with self._lock:
            self._broken = finish == "failed"
            self._waiting += self._incoming
            self._incoming.clear()
        for run in self._all():
            self._end(run, finish)

    def _wait(self) -> bool:
        """Until there is something to do; False: there will be nothing more."""
        with self._lock:
            while True:
                self._waiting += self._incoming
                self._incoming.clear()
                busy = bool(self._waiting) or any(self._reading) or any(self._running)
                if self._closing == "now" or (self._closing and not busy):
                    return False
                if busy:
                    return True
                self._lock.wait()

    def _all(self) -> list[Run]:
        """All that were taken and have not ended."""
        running = [list(own.values()) for own in self._running]
        return [*self._waiting, *itertools.chain(*self._reading), *itertools.chain(*running)]

    def _end(self, run: Run, finish: Finish) -> None:
        """A request ends without further tokens."""
        self._leave(run, finish)
        run.end(finish)

    def _leave(self, run: Run, finish: Finish) -> None:
        """Take a request out, wherever it is."""
        with self._lock:
            self._finished[finish] += 1
            if run.slot < 0:
                self._waiting.remove(run)
                return
            if run in self._reading[run.shard]:
                self._reading[run.shard].remove(run)
            self._running[run.shard].pop(run.slot, None)
            self._table[run.shard, run.slot] = 0
            self._free[run.shard].append(run.slot)
            pages = self._pages[run.shard]
            pages.give(run.pages[len(run.held) * self._chunk_pages :])
            for key in reversed(run.held):  # the end of a prompt is forgotten before its beginning
                pages.let_go(key)

    # --- waiting ----------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Slots and pages for what waits, first come first served."""
        with self._lock:
            while self._waiting and self._seat(self._waiting[0]):
                self._waiting.popleft()

    def _seat(self, run: Run) -> bool:
        """A slot, and pages up to the longest answer, on the shard that knows most of the prompt."""
        free = [shard for shard, slots in enumerate(self._free) if slots]
        for shard in sorted(free, key=lambda z: (-self._pages[z].known(run.keys), -self._pages[z].available)):
            pages = self._pages[shard]
            held = list(run.keys[: pages.known(run.keys)])
            known = [page for key in held for page in pages.hold(key) or ()]
            own = pages.take(self._pages_of(run) - len(known))
            if own is None:
                for key in reversed(held):
                    pages.let_go(key)
                continue
            run.shard, run.slot = shard, self._free[shard].pop()
            run.pages, run.held, run.chunk = [*known, *own], held, len(held)
            self._table[shard, run.slot, : len(run.pages)] = run.pages
            self._reading[shard].append(run)
            self._counts["prompt"] += run.prompt_tokens
            self._note_cached(run, len(held))
            return True
        return False

    @property
    def _chunk_pages(self) -> int:
        return self.layout.chunk // self.layout.page

    def _pages_of(self, run: Run) -> int:
        """Pages for all that prefill writes, in whole chunks, and for all tokens that decode reads."""
        read = run.prompt_tokens - 1
        chunks = -(-read // self.layout.chunk) * self.layout.chunk
        return -(-max(chunks, read + run.most) // self.layout.page)

    def _note_cached(self, run: Run, chunks: int) -> None:
        run.cached_tokens += chunks * self.layout.chunk
        self._counts["cached"] += chunks * self.layout.chunk

    # --- prompts ----------------------------------------------------------------------------------------------------

    def _read(self) -> bool:
        """One chunk of the first prompt of each shard; prompts that were read begin to be answered.

        Returns:
            whether there was something to read.
        """
        layout = self.layout
        ids = np.zeros((layout.shards, layout.chunk), np.int32)
        features = np.full((layout.shards, layout.chunk), -1, np.int32)
        table = np.zeros((layout.shards, layout.table), np.int32)
        start = np.zeros(layout.shards, np.int32)
        read = []
        for shard, queue in enumerate(self._reading):
            while queue and self._is_read(queue[0]):
                self._answer(queue.popleft())
            if queue:
                run = queue[0]
                own, picture, feature = run.next_chunk()
                ids[shard, : len(own)] = own
                features[shard, : len(own)] = self._features(run, picture, feature)
                table[shard] = self._table[shard, run.slot]
                start[shard] = run.chunk * layout.chunk
                read.append(run)
        if not read:
            return False
        self._runner.prefill(ids, features, table, start)
        for run in read:
            self._publish(run)
            run.chunk += 1
            if self._is_read(run):
                self._answer(self._reading[run.shard].popleft())
        return True

    def _is_read(self, run: Run) -> bool:
        """Whether a prompt is read but for its last token; chunks that others have read meanwhile are taken over."""
        pages, size = self._pages[run.shard], self._chunk_pages
        with self._lock:
            while run.chunk < len(run.keys) and len(run.held) == run.chunk:
                theirs = pages.hold(run.keys[run.chunk])
                if theirs is None:
                    break
                place = slice(run.chunk * size, (run.chunk + 1) * size)
                pages.give(run.pages[place])
                run.pages[place] = theirs
                self._table[run.shard, run.slot, place] = theirs
                run.held.append(run.keys[run.chunk])
                run.chunk += 1
                self._note_cached(run, 1)
        return run.is_read

    def _features(self, run: Run, picture: np.ndarray, feature: np.ndarray) -> np.ndarray:
        """Where the features of a chunk's image tokens lie in the store, which has them after this; -1 for text."""
        needed = sorted({int(number) for number in picture if number >= 0})
        places = np.zeros(len(run.pictures) + 1, np.int32)
        for number in needed:
            held = self._store.hold(run.pictures[number])
            assert held is not None  # the store has room for all pictures of all chunks of a call
            places[number], known = held
            if not known:
                self._runner.encode(run.prompt.images[number], int(places[number]))
            if not known or number not in run.looked_at:  # a picture reaches over several chunks
                with self._lock:
                    self._counts["cached images" if known else "images"] += 1
            run.looked_at.add(number)
        for number in needed:
            self._store.let_go(run.pictures[number])
        return np.where(picture >= 0, places[picture] * self.processor.image_tokens + feature, -1)

    def _publish(self, run: Run) -> None:
        """Let others have the chunk that was read just now, if it is a whole one."""
        if run.chunk < len(run.keys) and len(run.held) == run.chunk:
            place = slice(run.chunk * self._chunk_pages, (run.chunk + 1) * self._chunk_pages)
            with self._lock:
                if self._pages[run.shard].publish(run.keys[run.chunk], run.pages[place]):
                    run.held.append(run.keys[run.chunk])

    def _answer(self, run: Run) -> None:
        self._runner.admit(run.shard, run.slot, run.prompt.ids, run.sampling, run.most)
        self._running[run.shard][run.slot] = run

    # --- answers ----------------------------------------------------------------------------------------------------

    def _write(self) -> None:
        """Some tokens of every answer, in as many calls as the rows need."""
        queues = [sorted(own) for own in self._running]
        most = max(map(len, queues))
        if not most:
            return
        began = time.perf_counter()
        size = next((size for size in self.row_sizes if size >= most), self.row_sizes[-1])
        rounds = -(-most // size)
        one_by_one = any(run.on_logits for own in self._running for run in own.values())
        wanted = int(_ROUND_SECONDS / self._step_seconds / rounds)
        first = any(not run.written for own in self._running for run in own.values())
        steps = 1 if one_by_one else self._runner.steps(wanted, first)
        calls = []
        for number in range(rounds):
            chosen = [queue[number * size : (number + 1) * size] for queue in queues]
            calls.append((chosen, self._runner.decode(self._table.copy(), chosen, size, steps)))
        for chosen, written in calls:
            self._deliver(chosen, written)
        taken = (time.perf_counter() - began) / steps / rounds
        self._step_seconds += 0.2 * (taken - self._step_seconds)

    def _deliver(self, chosen: Sequence[Sequence[int]], written: Written) -> None:
        """Hand tokens to their owners; end what has ended."""
        runs = [
            (shard, row, self._running[shard][slot])
            for shard, slots in enumerate(chosen)
            for row, slot in enumerate(slots)
        ]
        tokens = np.asarray(written.tokens)
        chances = logits = None
        if any(run.sampling.logprobs is not None for *_, run in runs):
            chances = jax.tree.map(np.asarray, written.logprobs)
        if any(run.on_logits for *_, run in runs):
            logits = np.asarray(written.logits)
        for shard, row, run in runs:
            if run.on_logits is not None and logits is not None:
                run.on_logits(logits[shard, row])
            ids = [token for token in tokens[shard, row].tolist() if token >= 0]
            if run.sampling.logprobs is None or chances is None:
                new = [Token(token) for token in ids]
            else:
                own = jax.tree.map(lambda x, at=(shard, row): x[at].tolist(), chances)
                number = run.sampling.logprobs
                new = [
                    Token(token, chosen, tuple(zip(names[:number], top[:number], strict=True)))
                    for token, chosen, top, names in zip(ids, own.chosen, own.top, own.ids, strict=False)
                ]
            finish, count = run.grow(new)
            with self._lock:
                self._counts["answer"] += count
            if finish:
                self._leave(run, finish)
