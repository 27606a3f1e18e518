"""vflax/data/loader.py: the same batches for any number of hosts and threads, from any step."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import numpy as np
import pytest

from data_pipeline.tfds_writer import write_dataset
from vflax.data.lengths import measure
from vflax.data.loader import Loader
from vflax.data.mixture import Mixture, SourceSpec
from vflax.data.packing import PackPlan
from vflax.data.rows import Row, RowSource
from vflax.data.source import open_source
from vflax.errors import UserError

NAMES = {"ids", "labels", "segments", "positions", "images"}


def row_source(path, format, multiple: int = 4, epochs: int = 2) -> RowSource:
    source = open_source(path, "train")
    lengths = measure(source, format, show_progress=False)
    mixture = Mixture([SourceSpec(str(path))], [source.tasks], [lengths.kept], seed=0)
    plan = PackPlan(
        lengths.tokens,
        lengths.images,
        lengths.supervised,
        samples=10,
        max_length=256,
        slots=3,
        packing=True,
        seed=0,
    )
    total = plan.total_steps(epochs=epochs)
    return RowSource([source], mixture, plan, format, total_steps=total, rows_multiple=multiple)


@pytest.fixture(scope="module")
def rows(dataset, row_format) -> RowSource:
    return row_source(dataset, row_format, epochs=3)


@pytest.fixture(scope="module")
def global_batches(rows) -> list[dict[str, np.ndarray]]:
    """Every step, put together from single rows without the loader."""
    per_step = rows.rows_per_step
    return [
        {name: np.stack([rows[step * per_step + i][name] for i in range(per_step)]) for name in NAMES}
        for step in range(rows.total_steps)
    ]


def assert_equal(got: list[dict], wanted: list[dict]) -> None:
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        assert set(a) == set(b) == NAMES
        for name in NAMES:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name])


def take(
    rows: RowSource, index: int, count: int, start: int = 0, threads: int = 2, accumulation: int = 1
) -> list[dict]:
    loader = Loader(
        rows, process_index=index, process_count=count, threads=threads, accumulation=accumulation
    )
    loader.seek(start)
    try:
        return list(loader)
    finally:
        loader.close()


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_the_batches_of_the_hosts_one_after_another_are_the_global_batch(rows, global_batches, hosts):
    assert rows.total_steps > 8
    parts = [take(rows, index, hosts) for index in range(hosts)]
    joined = [{name: np.concatenate([p[name] for p in step]) for name in NAMES} for step in zip(*parts)]  # noqa: B905
    assert_equal(joined, global_batches)
    assert parts[0][0]["ids"].shape == (rows.rows_per_step // hosts, 256)


def test_a_micro_batch_has_the_same_rows_on_any_number_of_hosts(rows, global_batches):
    assert rows.rows_per_step % 4 == 0
    parts = [take(rows, index, 2, accumulation=2) for index in range(2)]

    def micro(batch: dict, name: str) -> np.ndarray:
        return batch[name].reshape(2, -1, *batch[name].shape[1:])  # [A, B_local, ...]

    joined = [
        {name: np.concatenate([micro(p, name) for p in step], axis=1) for name in NAMES}
        for step in zip(*parts, strict=True)
    ]
    assert_equal(joined, [{name: micro(batch, name) for name in NAMES} for batch in global_batches])


@pytest.mark.parametrize("threads", [0, 1, 8])
def test_threads_change_nothing(rows, global_batches, threads):
    assert_equal(take(rows, 0, 1, threads=threads), global_batches)


@pytest.mark.parametrize("start", [1, 7])
def test_a_seek_continues_as_if_it_had_run_that_far(rows, global_batches, start):
    assert_equal(take(rows, 0, 1, start), global_batches[start:])


def test_a_seek_in_the_middle_forgets_what_was_prefetched(rows, global_batches):
    loader = Loader(rows, process_index=0, process_count=1, threads=2)
    next(loader), next(loader)
    assert loader.step == 2
    loader.seek(6)
    assert_equal([next(loader)], [global_batches[6]])
    loader.seek(0)
    assert_equal([next(loader)], [global_batches[0]])
    assert loader.step == 1
    loader.close()


def test_a_seek_does_not_read_what_lies_before_it(rows):
    asked: list[int] = []

    class Recording(RowSource):
        def __getitem__(self, index: int) -> Row:
            asked.append(index)
            return super().__getitem__(index)

    recording = Recording.__new__(Recording)
    recording.__dict__.update(rows.__dict__)
    last = rows.total_steps - 1
    assert_equal(take(recording, 0, 1, start=last), take(rows, 0, 1, start=last))
    assert sorted(asked) == list(range(last * rows.rows_per_step, rows.total_steps * rows.rows_per_step))


def test_the_run_ends_after_its_last_step(rows):
    loader = Loader(rows, process_index=0, process_count=1, threads=2)
    loader.seek(rows.total_steps)
    with pytest.raises(StopIteration):
        next(loader)
    for outside in (-1, rows.total_steps + 1):
        with pytest.raises(ValueError):
            loader.seek(outside)
    loader.close()


def test_hosts_that_do_not_divide_the_rows_are_refused(rows):
    with pytest.raises(ValueError, match="do not divide among 3"):
        Loader(rows, process_index=0, process_count=3, threads=1)


@pytest.mark.parametrize("threads", [0, 4])
def test_an_error_in_a_thread_reaches_the_caller_and_names_the_sample(
    tmp_path, row_format, make_example, threads
):
    examples = [make_example(i) for i in range(30)]
    examples[17]["images"] = [b"not a picture"]
    write_dataset(tmp_path / "bad", {"train": examples})
    rows = row_source(tmp_path / "bad", row_format)
    loader = Loader(rows, process_index=0, process_count=1, threads=threads)
    with pytest.raises(UserError, match=r"sample 's17' .*/bad, split train\): image 0: not an image"):
        for _ in range(rows.total_steps):
            next(loader)
    loader.close()


def test_a_program_that_forgets_to_close_ends_at_once_and_silently(tmp_path, dataset, tokenizer):
    """Threads that outlive the program would hang a pod at its end."""
    tokenizer.save(tmp_path / "tokenizer")
    program = f"""
        from types import SimpleNamespace
        from vflax.data.pipeline import build_data
        from vflax.images import ImageRules
        from vflax.tokenizer import load_tokenizer
        source = SimpleNamespace(path={str(dataset)!r}, split="train", weight=1.0, count=0, cap=0,
                                 include=(), exclude=(), strict=True)
        config = SimpleNamespace(
            sources=(source,), eval_split="test", order="mixed", tasks=0, budget=0,
            spread="samples", packing=True, max_length=256, slots=3,
            supervised=0, max_problem_share=0.0,
            max_duplicate_share=0.0, duplicate_distance=4, threads=4)
        data = build_data(
            config, str, tokenizer=load_tokenizer({str(tmp_path / "tokenizer")!r}), template="vicuna_v1",
            position="front", rules=ImageRules("pad", 8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), num_image_tokens=4,
            samples=4, rows_multiple=1, seed=0, epochs=50, steps=0, process_index=0, process_count=1,
            show_progress=False)
        print(next(data.loader())["ids"].shape[1])
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stdout.strip(), ended.stderr) == (0, "256", "")
