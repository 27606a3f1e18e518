"""data_pipeline/author review: a sheet that is solved blind, by keyboard, and whose export `accept` reads."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.author.__main__ import main
from data_pipeline.author.accept import read_review, record_path
from data_pipeline.author.review import drawn
from tests import chromium
from tests.data_pipeline import author_files
from tests.data_pipeline.author_files import checked, write_task
from vflax import images

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror=\\'window.hacked = 2\\'>{{{{ 7 }}}}"
SHEET = "ANIMALS+animal.html"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return author_files.pictures(tmp_path_factory.mktemp("data"))


@pytest.fixture
def file(tmp_path) -> Path:
    return write_task(tmp_path / "t.py", options="all_labels()")


def sheet(file: Path, data: Path) -> Path:
    assert main(["review", str(file), f"--data={data}", f"--out={file.parent / 'reviews'}"]) == 0
    return file.parent / "reviews" / SHEET


def samples(page: str) -> list[dict[str, Any]]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])["samples"]


# ---------------------------------------------------------------------------------------------------------
# The file


def test_a_sheet_has_twenty_samples_with_their_pictures_and_needs_nothing_else(file, data):
    page = sheet(file, data).read_text()
    found = samples(page)
    assert len({sample["id"] for sample in found}) == 20
    for sample in found:
        encoded = base64.b64decode(sample["picture"].removeprefix("data:image/png;base64,"))
        original = images.decode((data / sample["id"]).read_bytes())
        assert images.decode(encoded).tobytes() == original.tobytes()
        assert sample["answer"].endswith(sample["id"].split("/")[0])
    assert not re.search(r"https?:|src=\"(?!data:)|@import|url\(", page)


def test_both_reviewers_get_the_same_sheet_and_another_seed_gives_another(file, data, tmp_path):
    first = sheet(file, data).read_text()
    assert sheet(file, data).read_text() == first
    other = sheet(write_task(tmp_path / "t.py", options="all_labels()", seed="1"), data).read_text()
    assert [s["id"] for s in samples(first)] != [s["id"] for s in samples(other)]


def test_a_large_picture_is_made_smaller(tmp_path):
    data = author_files.pictures(tmp_path / "data")
    (data / "cat" / "00.png").write_bytes(author_files.png(1, (3000, 50)))
    file = write_task(tmp_path / "t.py", where="lambda r: r['label'] != 'owl'")
    picture = next(s["picture"] for s in samples(sheet(file, data).read_text()) if s["id"] == "cat/00.png")
    found = images.decode(base64.b64decode(picture.removeprefix("data:image/jpeg;base64,")))
    assert found.size == (1024, 17)


def test_no_sheet_is_written_of_a_task_with_faults(tmp_path, data, capsys):
    file = write_task(tmp_path / "t.py", output="'an animal'")
    assert main(["review", str(file), f"--data={data}", f"--out={tmp_path / 'reviews'}"]) == 1
    assert "no sheet is written" in capsys.readouterr().err and not (tmp_path / "reviews").exists()


# ---------------------------------------------------------------------------------------------------------
# In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium.opened() as opened:
        yield opened


@pytest.fixture
def context(browser) -> Iterator[Any]:
    opened = browser.new_context(viewport={"width": 1280, "height": 860}, accept_downloads=True)
    yield opened
    opened.close()


def opened(context, path: Path) -> Any:
    page = context.new_page()
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("console", lambda message: page.problems.append(message.text))
    page.on("request", lambda request: request.url.startswith("http") and page.problems.append(request.url))
    page.goto(path.as_uri())
    return page


def press(page, *keys: str) -> None:
    for key in keys:
        page.keyboard.press(key)


def begin(page, name: str) -> None:
    page.keyboard.type(name)
    press(page, "Enter")


def solve(page, path: Path, wrong: tuple[int, ...] = ()) -> Any:
    """All samples, by keyboard alone; gives the download."""
    for at, sample in enumerate(samples(path.read_text())):
        page.keyboard.type("a unicorn" if at in wrong else sample["answer"][1])  # the letter
        press(page, "Enter", *("n" if at in wrong else ""), *"yyy", "Enter")
    with page.expect_download() as download:
        press(page, "Enter")
    return download.value


def test_two_people_solve_a_sheet_by_keyboard_and_the_task_is_accepted(file, data, tmp_path, browser):
    path = sheet(file, data)
    paths = []
    for name, wrong in (("Ann Other", ()), ("Bo Third", (2, 7))):
        context = browser.new_context(accept_downloads=True)
        page = opened(context, path)
        begin(page, name)
        download = solve(page, path, wrong)
        paths.append(tmp_path / download.suggested_filename)
        download.save_as(paths[-1])
        assert page.problems == []
        context.close()
    assert [one.name for one in paths] == ["ANIMALS+animal.ann-other.json", "ANIMALS+animal.bo-third.json"]
    second = read_review(paths[1])
    assert [at for at, sample in enumerate(second.samples) if not sample["solved"]] == [2, 7]
    assert [sample["id"] for sample in second.samples] == [item.key for item in drawn(checked(file, data)[0])]
    assert main(["accept", str(file), *(f"--review={one}" for one in paths)]) == 0
    kept = json.loads(record_path(file).read_text())["tasks"]["ANIMALS+animal"]
    assert [one["solved"] for one in kept["reviewers"]] == [20, 18]


def test_keys_go_on_from_an_empty_box_and_escape_leaves_one(file, data, context):
    page = opened(context, sheet(file, data))
    begin(page, "Ann Other")
    press(page, "ArrowRight")
    assert page.get_by_alt_text("Picture of sample 2").is_visible()
    page.keyboard.type("cat")
    press(page, "ArrowLeft")  # in the text
    assert page.get_by_alt_text("Picture of sample 2").is_visible()
    press(page, "Escape", "ArrowLeft")
    assert page.get_by_alt_text("Picture of sample 1").is_visible()


def test_enter_goes_to_the_question_that_is_open(file, data, context):
    page = opened(context, sheet(file, data))
    begin(page, "Ann Other")
    page.keyboard.type("maybe")
    press(page, "Enter", "Enter")
    assert page.evaluate("document.activeElement.textContent") == "Yes"
    press(page, "e")
    assert page.locator("#table tbody tr").first.inner_text().split("\t")[1] == "maybe"


def test_the_key_is_not_shown_before_the_answer_and_the_answer_not_changed_after_it(file, data, context):
    path = sheet(file, data)
    page = opened(context, path)
    begin(page, "Ann Other")
    key = samples(path.read_text())[0]["answer"]
    assert not page.get_by_text("Key:").is_visible() and not page.locator("#questions").is_visible()
    page.keyboard.type("maybe")
    press(page, "y", "Enter")
    assert page.locator("#key").inner_text() == key and page.locator("#answer").input_value() == "maybey"
    page.keyboard.type("cat")
    assert page.locator("#answer").input_value() == "maybey"
    page.reload()
    begin(page, "Ann Other")
    assert page.locator("#key").inner_text() == key and not page.locator("#answer").is_editable()


def test_the_author_cannot_begin(file, data, context):
    page = opened(context, sheet(file, data))
    begin(page, " ann  AUTHOR")
    assert page.locator("#refused").inner_text() == "You wrote this task; somebody else has to review it."
    assert page.locator("#start").is_visible()


def test_an_answer_counts_by_letter_text_or_both_and_an_empty_one_never(file, data, context):
    path = sheet(file, data)
    page = opened(context, path)
    begin(page, "Ann Other")
    said = {}
    ways = ("{letter}", "({letter})", "{text}", " {TEXT}.", "{letter} {text}", "it", "")
    for way, sample in zip(ways, samples(path.read_text()), strict=False):
        key = sample["answer"]
        page.keyboard.type(way.format(letter=key[1], text=key[4:], TEXT=key[4:].upper()))
        press(page, "Enter")
        pressed = page.locator(".question").first.locator('button[aria-pressed="true"]')
        said[way] = pressed.inner_text() if pressed.count() else "not said"
        press(page, "ArrowRight")
    assert said == dict.fromkeys(ways, "Yes") | {"it": "not said", "": "No"}


def test_what_was_entered_is_there_again_after_a_reload_and_for_that_person_only(file, data, context):
    page = opened(context, sheet(file, data))
    begin(page, "Ann Other")
    press(page, "b", "Enter", "y", "y", "y", "y", "c")
    page.keyboard.type("a remark")
    press(page, "Enter", "Enter", "x")
    page.reload()
    begin(page, "Bo Third")
    assert page.locator("#answer").input_value() == ""
    page.reload()
    begin(page, "Ann Other")
    assert page.locator("#samples [aria-current=true]").inner_text() == "2"
    press(page, "Control+a", "Delete", "Enter", "ArrowLeft")
    assert page.locator("#comment").input_value() == "a remark"


def test_export_waits_for_all_samples(file, data, context):
    page = opened(context, sheet(file, data))
    begin(page, "Ann Other")
    press(page, "a", "Enter", "e")
    assert page.locator("#result").inner_text() == "20 of 20 samples are not done"
    assert page.locator("#export").is_disabled()
    press(page, "Enter")
    assert page.locator("#solve").is_visible()


def test_what_the_data_say_stays_text(tmp_path, data, context):
    fields = f"{{'q': lambda r: '{HOSTILE.replace('{{{{', '{{').replace('}}}}', '}}')} ' + r['file']}}"
    page = opened(context, sheet(write_task(tmp_path / "t.py", fields=fields, input="'{q}'"), data))
    begin(page, "Ann Other")
    assert "<script>window.hacked = 1</script>" in page.locator("#prompt").inner_text()
    press(page, "a", "Enter")
    assert page.evaluate("window.hacked") is None and page.problems == []


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_its_window_and_takes_the_systems_colours(file, data, browser, width, scheme):
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = opened(context, sheet(file, data))
    wide = "document.documentElement.scrollWidth"
    assert page.evaluate(wide) <= width
    begin(page, "Ann Other")
    press(page, "a", "Enter")
    assert page.evaluate(wide) <= width
    press(page, "e")
    assert page.evaluate(wide) <= width
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(23, 24, 27)"
    assert dark == (scheme == "dark")
    context.close()
