"""Limits by themselves: the rate of a client, and what settings may say."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from vflax.errors import UserError
from vflax.serve import limits, settings
from vflax.serve.errors import ApiError
from vflax.serve.limits import RateLimit


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_bucket_holds_a_minutes_requests_and_fills_evenly() -> None:
    clock = Clock()
    limit = RateLimit(6, clock)
    for _ in range(6):
        limit.take("a")
    with pytest.raises(ApiError) as error:
        limit.take("a")
    assert error.value.headers["retry-after"] == "10"
    clock.now += 10
    limit.take("a")
    with pytest.raises(ApiError):
        limit.take("a")
    clock.now += 1e6
    for _ in range(6):
        limit.take("a")


def test_clients_have_buckets_of_their_own_of_which_only_so_many_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "_MOST_CLIENTS", 3)
    limit = RateLimit(1, Clock())
    for client in "abcd":
        limit.take(client)
    assert list(limit._full_at) == ["b", "c", "d"]
    with pytest.raises(ApiError):
        limit.take("d")


def read(*argv: str, **environment: str) -> settings.Settings:
    parser = argparse.ArgumentParser()
    settings.add_server_flags(parser)
    return settings.from_flags(parser.parse_args(argv), environment)


def test_flags_without_values_give_the_defaults() -> None:
    assert read() == settings.Settings()


def test_each_setting_has_a_flag_that_reaches_it() -> None:
    found = read(
        "--model-name=a", "--model-name=b", "--default-temperature=0", "--default-top-p=0.5", "--default-max-tokens=7",
        "--protect-metrics", "--max-body-bytes=1000", "--max-buffered-bytes=2000", "--max-images=0",
        "--max-image-bytes=3", "--max-image-pixels=4", "--image-workers=5", "--allow-remote-images",
        "--fetch-timeout=6.5", "--max-choices=7", "--max-queue=0", "--rate-limit=9", "--max-connections=10",
        "--deadline=11", "--header-timeout=12", "--body-timeout=13", "--write-timeout=14", "--drain-timeout=0",
        "--cors-origin=https://a.example", "--trusted-proxy=10.0.0.1", "--no-page",
    )  # fmt: skip
    assert found == settings.Settings(
        model_names=("a", "b"), default_temperature=0, default_top_p=0.5, default_max_tokens=7, protect_metrics=True,
        max_body_bytes=1000, max_buffered_bytes=2000, max_images=0, max_image_bytes=3, max_image_pixels=4,
        image_workers=5, allow_remote_images=True, fetch_timeout=6.5, max_choices=7, max_queue=0, rate_limit=9,
        max_connections=10, deadline=11, header_timeout=12, body_timeout=13, write_timeout=14, drain_timeout=0,
        cors_origins=("https://a.example",), trusted_proxies=("10.0.0.1",), page=False,
    )  # fmt: skip


def test_keys_come_from_flags_a_file_and_the_environment(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# of the house\nthree\n\n four \n")
    found = read("--api-key=one", f"--api-keys-file={tmp_path / 'keys'}", VFLAX_API_KEYS="two, five")
    assert found.api_keys == ("one", "two", "five", "three", "four")


def test_a_file_of_keys_that_holds_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# none\n")
    with pytest.raises(UserError, match="keys: holds no key"):
        read(f"--api-keys-file={tmp_path / 'keys'}")
    with pytest.raises(UserError, match="nowhere: cannot be read"):
        read(f"--api-keys-file={tmp_path / 'nowhere'}")
    with pytest.raises(UserError, match="--api-key: is empty"):
        read("--api-key=")


@pytest.mark.parametrize(
    ("values", "flag"),
    [
        ({"max_queue": -1}, "--max-queue=-1"),
        ({"deadline": 0}, "--deadline=0"),
        ({"deadline": float("nan")}, "--deadline=nan"),
        ({"default_temperature": 2.5}, "--default-temperature=2.5"),
        ({"default_top_p": 1.5}, "--default-top-p=1.5"),
        ({"max_image_pixels": 10**9}, "--max-image-pixels=1000000000"),
        ({"max_buffered_bytes": 5}, "--max-buffered-bytes=5"),
    ],
)
def test_a_setting_out_of_its_range_is_named(values: dict[str, Any], flag: str) -> None:
    with pytest.raises(UserError, match=flag):
        settings.Settings(**values)
