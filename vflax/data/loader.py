"""Rows to host batches, in threads, with a position that is one integer."""

from __future__ import annotations

import grain

from vflax.data.rows import Row, RowSource


class _HostOrder:
    """RowSource in the order in which Grain deals rows to hosts.

    Grain gives host h of n the elements h, h + n, h + 2n, ... of a step. For host h to hold a run of the rows of each
    micro-batch, so that the hosts' parts one after another are the micro-batch, element k * n + h is row
    h * part + k % part of micro-batch k // part, `part` being the rows that a host has of one.
    """

    def __init__(self, rows: RowSource, process_count: int, accumulation: int) -> None:
        self._rows, self._count = rows, process_count
        self._micro = rows.rows_per_step // accumulation
        self._part = self._micro // process_count

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        step, element = divmod(index, self._rows.rows_per_step)
        k, host = divmod(element, self._count)
        micro, row = divmod(k, self._part)
        return self._rows[step * self._rows.rows_per_step + micro * self._micro + host * self._part + row]


class Loader:
    """Iterator over this host's part of each step: {name: numpy [rows_per_step / process_count, ...]}.

    A host's batch is its part of each micro-batch, one after another; the hosts' parts of a micro-batch, concatenated
    in their order, are its rows in theirs. What is learned does not depend on hosts or threads. Errors in a thread
    come out of `next`, naming the sample (RowSource).

    Args:
        rows: every row of the run.
        process_index: which host this is.
        process_count: how many there are; times accumulation it divides rows.rows_per_step.
        threads: how many batches are made at once and held ready.
        accumulation: micro-batches per step.
    """

    def __init__(
        self, rows: RowSource, *, process_index: int, process_count: int, threads: int, accumulation: int = 1
    ) -> None:
        if rows.rows_per_step % (process_count * accumulation):
            raise ValueError(
                f"{rows.rows_per_step} rows per step do not divide among {process_count} processes and "
                f"{accumulation} accumulation steps"
            )
        self._rows = rows
        ds = grain.MapDataset.source(_HostOrder(rows, process_count, accumulation))
        elastic = grain.experimental.ElasticIterator(
            ds,
            rows.rows_per_step,
            grain.sharding.ShardOptions(process_index, process_count),
            # Grain's unit is a whole batch here; its default buffer of 500 would be gigabytes.
            read_options=grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, 1)),
        )
        self._iterator = iter(elastic)
        self._step = 0

    @property
    def step(self) -> int:
        """The step whose batch `next` gives."""
        return self._step

    def seek(self, step: int) -> None:
        """Go to a step, 0 being the first; costs nothing but the batches that were prepared."""
        if not 0 <= step <= self._rows.total_steps:
            raise ValueError(f"step {step} of {self._rows.total_steps}")
        self._iterator.set_state({"global_next_index": step * self._rows.rows_per_step})
        self._step = step

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Row:
        batch = next(self._iterator)
        self._step += 1
        return batch

    def close(self) -> None:
        """Stop the threads."""
        self._iterator.close()
