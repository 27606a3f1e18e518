"""The page for raters in a browser, worked by keyboard, from the first pair to the aggregate."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import chromium
from tests.preference.question_files import lines, named, write_set
from vflax.preference.__main__ import main

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
PAIRS, REPEATS = 8, 3


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of eight pairs, three of them twice; question 0 and an answer to it are hostile."""
    folder = write_set(tmp_path_factory.mktemp("raters") / "set", PAIRS)
    rows = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    lines(folder / "questions.jsonl", [{**rows[0], "text": HOSTILE}, *rows[1:]])
    short = [{"question_id": n, "text": HOSTILE if n == 0 else f"A dog {n}."} for n in range(PAIRS)]
    lines(folder / "short.jsonl", short)
    shown = (f"--images={folder / 'images'}", f"--out={folder / 'page.html'}", f"--repeats={REPEATS}")
    assert main(["page", *named(folder), *shown]) == 0
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium.opened() as found:
        yield found


@pytest.fixture
def opened(browser: Any, site: Path) -> Iterator[Callable[..., Any]]:
    with chromium.pages_of(browser, site / "page.html", offline=True) as found:
        yield found


def begin(page: Any, name: str) -> Any:
    page.keyboard.type(name)  # the field has the focus
    page.keyboard.press("Enter")
    page.wait_for_selector("#rating:not([hidden])")
    return page


def place(page: Any) -> str:
    return page.inner_text("#place")


def seen(page: Any) -> list[list[str]]:
    """Question and both answers of all pairs, in the order of the rater, each answered by a tie."""
    return page.evaluate("""() => {
      const found = [];
      while (!document.getElementById("rating").hidden) {
        found.push(["question", "first", "second"].map((id) => document.getElementById(id).textContent));
        document.dispatchEvent(new KeyboardEvent("keydown", { key: "3" }));
      }
      return found;
    }""")


def saved(page: Any, path: Path, button: str) -> dict[str, Any]:
    with page.expect_download() as download:
        page.click(button)
    download.value.save_as(path)
    assert download.value.suggested_filename.startswith("ratings-")
    return json.loads(path.read_text())


def test_pairs_are_rated_by_keyboard_and_aggregated(
    opened: Callable[..., Any], site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two raters who like the longer answer, one by figures and one by arrows."""
    for name, first, second in (("Anna", "1", "2"), ("Ben", "ArrowLeft", "ArrowRight")):
        page = begin(opened(accept_downloads=True), name)
        while page.locator("#rating").is_visible():
            lengths = [len(page.inner_text(f"#{side}")) for side in ("first", "second")]
            page.keyboard.press(first if lengths[0] > lengths[1] else second)
        result = saved(page, tmp_path / f"{name}.json", "#end .save")
        assert (result["rater"], len(result["ratings"])) == (name, PAIRS + REPEATS)
    files = [str(tmp_path / f"{name}.json") for name in ("Anna", "Ben")]
    key = f"--key={site / 'page.key.json'}"
    assert main(["aggregate", *files, key, f"--out={tmp_path / 'out'}"]) == 0
    found = json.loads((tmp_path / "out" / "aggregate.json").read_text())
    assert (found["models"], found["wins_a"], found["wins_b"]) == ({"a": "short", "b": "chatty"}, 0, PAIRS)
    assert {own["consistent"] for own in found["raters"].values()} == {REPEATS}
    assert found["agreement"]["share"] == 1


def test_a_choice_is_taken_back(opened: Callable[..., Any], tmp_path: Path) -> None:
    page = begin(opened(accept_downloads=True), "Anna")
    assert page.is_disabled("#undo")
    before = page.inner_text("#question"), page.inner_text("#first")
    page.keyboard.press("1")
    assert place(page) == f"2 of {PAIRS + REPEATS}"
    page.keyboard.press("Backspace")
    assert (page.inner_text("#question"), page.inner_text("#first")) == before
    page.keyboard.press("ArrowDown")
    page.keyboard.press("2")
    page.keyboard.press("u")
    found = saved(page, tmp_path / "a.json", "#rating .save")
    assert [rating["choice"] for rating in found["ratings"]] == ["tie"]


def test_the_last_choice_is_taken_back_from_the_end(opened: Callable[..., Any]) -> None:
    page = begin(opened(), "Anna")
    seen(page)
    assert page.is_visible("#end") and place(page) == f"{PAIRS + REPEATS} of {PAIRS + REPEATS} answered"
    page.keyboard.press("u")
    assert page.is_visible("#rating") and place(page) == f"{PAIRS + REPEATS} of {PAIRS + REPEATS}"


def test_a_closed_page_goes_on_where_it_was_under_the_same_name_only(opened: Callable[..., Any]) -> None:
    page = begin(opened(), "Anna")
    for _ in range(3):
        page.keyboard.press("1")
    at = page.inner_text("#question"), page.inner_text("#first")
    page.reload()
    begin(page, "Anna")
    assert place(page) == f"4 of {PAIRS + REPEATS}"
    assert (page.inner_text("#question"), page.inner_text("#first")) == at
    page.reload()
    begin(page, "Ben")
    assert place(page) == f"1 of {PAIRS + REPEATS}"


def test_the_order_is_the_raters_own_and_always_the_same(opened: Callable[..., Any]) -> None:
    anna, again, ben = (seen(begin(opened(), name)) for name in ("Anna", "Anna", "Ben"))
    assert anna == again != ben
    assert sorted(anna) == sorted(ben)


def test_what_comes_twice_stands_apart(opened: Callable[..., Any]) -> None:
    """As far as five pairs, or to the end where there are not as many left."""
    found = [question for question, *_ in seen(begin(opened(), "Carol"))]
    twice = {question for question in found if found.count(question) == 2}
    assert len(twice) == REPEATS
    for question in twice:
        first, again = (n for n, other in enumerate(found) if other == question)
        assert again - first > 5 or first + 5 >= PAIRS


def test_keys_with_a_modifier_and_keys_held_down_choose_nothing(opened: Callable[..., Any]) -> None:
    page = begin(opened(), "Anna")
    page.keyboard.press("Control+3")
    page.keyboard.press("x")
    page.keyboard.down("1")
    page.keyboard.down("1")  # as a key that is held repeats
    assert place(page) == f"2 of {PAIRS + REPEATS}"


def test_buttons_do_what_keys_do_and_have_names(opened: Callable[..., Any]) -> None:
    page = begin(opened(), "Anna")
    for name in ("Answer 1 is better", "Answer 2 is better", "No difference"):
        page.get_by_role("button", name=name).click()
    assert place(page) == f"4 of {PAIRS + REPEATS}"
    assert page.get_by_role("progressbar", name="answered").get_attribute("value") == "3"
    assert page.get_by_role("img", name="The picture that the question is about").is_visible()
    assert page.get_by_role("region", name="Answer 1").is_visible()
    page.reload()
    assert page.get_by_label("Your name, or a word that stands for you").is_visible()


def test_a_picture_is_shown(opened: Callable[..., Any]) -> None:
    page = begin(opened(), "Anna")
    page.locator("#picture").evaluate("node => node.decode()")
    assert page.locator("#picture").evaluate("node => node.naturalWidth") == 24


def test_hostile_text_stays_text(opened: Callable[..., Any]) -> None:
    page = begin(opened(), "<img src=x>")
    [shown, *_] = [texts for texts in seen(page) if texts[0] == HOSTILE]
    assert HOSTILE in shown[1:]
    assert page.evaluate("window.hacked") is None
    assert page.locator("img[src=x]").count() == 0


def test_without_storage_the_page_works_and_says_so(opened: Callable[..., Any]) -> None:
    page = opened()
    assert page.is_hidden("#unkept")
    page.add_init_script(
        "Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError') }"
    )
    page.reload()
    assert page.is_visible("#unkept")
    begin(page, "Anna")
    page.keyboard.press("1")
    assert place(page) == f"2 of {PAIRS + REPEATS}"


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits(width: int, scheme: str, opened: Callable[..., Any]) -> None:
    page = begin(opened(width, color_scheme=scheme), "Anna")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    boxes = [page.locator(f"#{side}").bounding_box() for side in ("first", "second")]
    assert (boxes[0]["y"] == boxes[1]["y"]) == (width > 1000)
    bar = page.locator("#choices").bounding_box()
    assert bar["y"] + bar["height"] <= 800
    back, text = (
        page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("backgroundColor", "color")
    )
    assert (brightness(back) > brightness(text)) == (scheme == "light")


def brightness(colour: str) -> int:
    """Of rgb(r, g, b)."""
    return sum(map(int, colour.strip("rgb()").split(", ")))


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_of_style_fits_and_asks_for_nothing(
    width: int, browser: Any, site: Path, tmp_path: Path
) -> None:
    assert main(["style", *named(site), f"--out={tmp_path}"]) == 0
    errors: list[str] = []
    page = browser.new_page(viewport={"width": width, "height": 800})
    chromium.watch(page, errors)
    page.goto((tmp_path / "style.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.locator("img.plot").evaluate_all("nodes => nodes.every((node) => node.naturalWidth > 500)")
    assert page.evaluate("window.hacked") is None
    page.close()
    assert errors == []
