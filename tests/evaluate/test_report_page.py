"""report.html in a browser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import chromium
from tests.evaluate.run_folder import picture, question, verdict, write_task
from vflax.evaluate import report
from vflax.evaluate.question import Picture

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>\u2028 \ud800"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 4,000 questions: 0 is hostile, 1 missing, 2 unparsed with a broken picture; every fourth else is wrong."""
    out = tmp_path_factory.mktemp("run")
    rows = [
        verdict(f"q{n}", "yes" if n % 2 else "no", "yes" if n % 4 in (1, 2, 3) else "no",
                groups={"split": f"s{n % 3}"})
        for n in range(4000)
    ]  # fmt: skip
    rows[0] = verdict("q0", "no", HOSTILE, parsed=None, why=HOSTILE, groups={HOSTILE: HOSTILE, "split": "s0"})
    rows[1] = verdict("q1", "yes", None, groups={"split": "s1"})
    rows[2] = verdict("q2", "no", "long " * 2000, parsed=None, groups={"split": "s2"})
    write_task(
        out, "pope", rows, groups={HOSTILE: {HOSTILE: {"n": 1, "f1": 50.0}}}, printed={HOSTILE: HOSTILE}
    )
    labels = [f"label {n}" for n in range(30)]
    counts = [[int(row == column) for column in range(31)] for row in range(30)]
    write_task(
        out,
        "cf",
        [verdict("c1", "0", "0")],
        manifest={"confusion": {"set": {"labels": labels, "counts": counts}}},
    )
    own = [question(f"q{n}", picture(f"{n}.png")) for n in range(4000) if n != 2]
    own.append(question("q2", Picture("broken", lambda: b"")))
    report.write(out, {"pope": own, "cf": []}, {"pope": {f"q{n}": f"Is it {n}?" for n in range(4000)}})
    return out / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium.opened() as found:
        yield found


@pytest.fixture
def opened(browser: Any, site: Path) -> Iterator[Callable[..., Any]]:
    with chromium.pages_of(browser, site) as found:

        def open_it(width: int = 1280, **context: Any) -> Any:
            page = found(width, **context)
            page.locator("#pope .filters").scroll_into_view_if_needed()
            page.wait_for_selector("#pope .sample")
            return page

        yield open_it


@pytest.fixture
def page(opened: Callable[..., Any]) -> Any:
    return opened()


def keys(page: Any) -> list[str]:
    return [text.split(" · ")[0] for text in page.locator("#pope .sample .soft:first-child").all_inner_texts()
            if text.startswith("q")]  # fmt: skip


def found(page: Any) -> str:
    return page.inner_text("#pope .found")


def test_four_thousand_questions_are_turned_over_page_by_page(page: Any) -> None:
    assert found(page) == "4,000 of 4,000"
    assert keys(page) == [f"q{n}" for n in range(24)]
    page.click("#pope .pages [data-step='1']")
    assert keys(page) == [f"q{n}" for n in range(24, 48)]
    assert page.inner_text("#pope .pages .soft") == "25 to 48 of 4,000"


@pytest.mark.parametrize(
    ("outcome", "first"), [("right", "q3"), ("wrong", "q6"), ("unparsed", "q0"), ("missing", "q1")]
)
def test_questions_are_chosen_by_how_they_ended(outcome: str, first: str, page: Any) -> None:
    page.click(f"#pope [data-outcome={outcome}]")
    assert keys(page)[0] == first
    assert page.locator("#pope .sample").count() == page.locator(f"#pope .sample.{outcome}").count()


def test_questions_are_chosen_by_group_and_words(page: Any) -> None:
    page.select_option("#pope select", label="s1")
    assert keys(page)[:3] == ["q1", "q4", "q7"]
    page.fill("#pope input", "IS IT 100")
    assert keys(page) == ["q100", "q1000", "q1003", "q1006", "q1009"]
    page.fill("#pope input", "no such words")
    assert found(page) == "0 of 4,000"
    assert page.inner_text("#pope .samples") == "There is no such question."


def test_a_cell_of_the_table_chooses_its_questions(page: Any) -> None:
    page.click("#pope [data-answer=no][data-read=yes]")
    assert keys(page)[:2] == ["q6", "q10"]
    page.click("#pope .chosen")
    assert found(page) == "4,000 of 4,000"


def test_a_question_is_read_whole_and_the_keys_go_on(page: Any) -> None:
    page.click("#pope [data-outcome=unparsed]")
    page.keyboard.press("j")
    assert page.inner_text("dialog .key-of") == "q0"
    page.keyboard.press("ArrowRight")
    shown = dict(zip(page.locator("dt").all_inner_texts(), page.locator("dd").all_inner_texts(), strict=True))
    assert shown["asked"] == "Is it 2?"
    assert shown["said"].strip() == ("long " * 2000).strip()
    assert (shown["right answer"], shown["read as"], shown["score"]) == ("no", "(unparsed)", "0")
    assert page.inner_text("dialog .left-out") == "cannot be decoded"
    page.keyboard.press("k")
    assert page.inner_text("dialog .key-of") == "q0"
    page.keyboard.press("Escape")
    assert page.locator("dialog[open]").count() == 0
    page.keyboard.press("/")
    page.keyboard.type("j")
    assert page.input_value("#pope input") == "j"


def test_the_keys_turn_the_page_behind(page: Any) -> None:
    page.locator("#pope .sample").nth(23).click()
    page.keyboard.press("j")
    page.keyboard.press("Escape")
    assert keys(page)[0] == "q24"


def test_hostile_text_stays_text(page: Any) -> None:
    page.locator("#pope .sample").first.click()
    assert HOSTILE.split("\u2028")[0] in page.inner_text("dialog dl")
    for summary in page.locator("summary").all():
        summary.evaluate("node => { node.parentNode.open = true }")
    assert page.evaluate("window.hacked") is None
    assert page.locator("img[src=x]").count() == 0


def test_a_picture_is_shown(page: Any) -> None:
    image = page.locator("#pope .sample img").first
    image.evaluate("node => node.decode()")
    assert image.evaluate("node => node.naturalWidth") == 8


def test_a_link_leads_to_its_task_though_lists_above_are_not_filled_yet(browser: Any, site: Path) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 1600})
    page.goto(f"{site.as_uri()}#cf")
    page.wait_for_selector("#cf .sample")
    page.wait_for_timeout(300)
    assert 0 <= page.locator("#cf h2").bounding_box()["y"] < 1600
    page.close()


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits(width: int, scheme: str, opened: Callable[..., Any]) -> None:
    page = opened(width, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    page.locator("#pope .sample").first.click()
    box = page.locator("dialog").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
    back, text = (
        page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("backgroundColor", "color")
    )
    assert (brightness(back) > brightness(text)) == (scheme == "light")


def brightness(colour: str) -> int:
    """Of rgb(r, g, b)."""
    return sum(map(int, colour.strip("rgb()").split(", ")))
