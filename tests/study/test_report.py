"""Pages of studies: what stands in them, in a browser too."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from tests import chromium
from tests.study.results import ODD, files, made
from vflax.errors import UserError
from vflax.study import plots, report
from vflax.study.grid import Arm, Claim, Difference, Metric


def wrote(folder: Path, result: dict[str, Any]) -> tuple[str, str]:
    """report.md and report.html, without its pictures."""
    report.write(result, folder)
    page = (folder / "report.html").read_text()
    return (folder / "report.md").read_text(), re.sub(r"base64,[^\"]+", "", page)


# --- a study's page ---------------------------------------------------------------------------------------------------


def test_a_report_has_every_claim_with_its_numbers_and_verdict(tmp_path: Path):
    text, page = wrote(tmp_path, made())
    assert "9 of 9 cells are finished, 3 arms x 3 seeds, 15 min 00 s of training." in text
    [claim] = [line for line in text.splitlines() if "Many tasks beat few." in line]
    assert claim == (
        r"| ✓ **shows it** | Many tasks beat few. (\[VF\] Table 3) | mme: 34 tasks above 8 tasks | "
        r"+50.0 (+50.0 to +50.0) | \< 0.001 | \< 0.001 | the whole interval lies on the claim's side |"
    )
    verdicts = re.findall(r"^\| . \*\*([^*]+)\*\*", text, re.M)
    assert verdicts == ["shows it", "shows it", "does not show it", "cannot", "cannot"]
    rows = re.findall(
        r"<tr><td><span class=\"chip (\w+)\">. ([^<]+)</span></td><td class=\"said\">([^<]+)<", page
    )
    assert [row[1] for row in rows] == verdicts
    assert [row[0] for row in rows] == ["right", "right", "partly", "missing", "missing"]
    assert [row[2] for row in rows] == [claim["text"] for claim in made()["claims"]]
    assert "<small>+50.0 to +50.0</small>" in page
    assert "a judge" in page
    for said in (
        "The miniature draws its own tasks.",
        "Few tasks or many?",
        "Not measured here: LLaVA-Bench.",
    ):
        assert said in text
        assert said in page


def test_a_report_has_means_intervals_seeds_and_the_papers_numbers_beside(tmp_path: Path):
    text, page = wrote(tmp_path, made())
    [arm] = [line for line in text.splitlines() if line.startswith("| 34 tasks | 502")]
    assert arm == "| 34 tasks | 502.0 ± 2.5 | 1,314.3 | 71.0 ± 2.5 | 0.4007 ± 0.0014 |"
    assert "| MME format, points (higher is better) | the paper: MME (Table 3) |" in text
    assert "| held-out loss, nats (lower is better) |" in text
    assert "| 34 tasks | 3 | 503.0 | 72.0 | 0.4010 |" in text
    assert '<td class="n">502.0 <span class="soft">± 2.5</span></td><td class="n paper">1,314.3</td>' in page
    assert page.count('<td class="n">503.0</td>') == 1


def test_a_metric_has_a_plot_and_one_that_nobody_measured_has_none(tmp_path: Path):
    text, page = wrote(tmp_path, made())
    assert {path.name for path in tmp_path.glob("*.png")} == {"mme.png", "pope.png", "loss.png"}
    assert re.findall(r"!\[.*\]\((.*)\)", text) == ["mme.png", "pope.png", "loss.png"]
    assert "![POPE format, F1 in %: 0 tasks 71.0 (68.5 to 73.5); 8 tasks" in text
    assert re.findall(r'<figure( class="paired")? tabindex', page) == [' class="paired"', "", ""]


def test_the_page_asks_no_one_for_anything(tmp_path: Path):
    report.write(made(), tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert re.findall(r"(?:src|href)=\"(\w+:)", page) == ["data:", "data:", "data:", "data:"]
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")


def test_the_same_result_makes_the_same_bytes(tmp_path: Path):
    for name in ("one", "two"):
        report.write(made(), tmp_path / name / "small")
        report.write_index(tmp_path / name)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    report.write(made(), tmp_path / "one" / "small")
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert json.loads((tmp_path / "one" / "small" / "result.json").read_text()) == made()


@pytest.mark.parametrize("lost", [1, 5, 8, 9])
def test_an_unfinished_study_has_a_page_that_says_so(tmp_path: Path, lost: int):
    text, page = wrote(tmp_path, made(lost=lost))
    assert f"{9 - lost} of 9 cells are finished" in text
    assert f'<p class="note">{9 - lost} of 9 cells are finished' in page
    assert text.count("… **unfinished**") == 4
    assert len(list(tmp_path.glob("*.png"))) == (3 if lost < 9 else 0)
    assert "1 of 3 seeds" in text or lost not in (5, 8)


def test_one_seed_has_no_interval(tmp_path: Path):
    text, _ = wrote(tmp_path, made(seeds=(7,)))
    assert "| 34 tasks | 507.0 | 1,314.3 |" in text
    assert "±" not in text
    assert text.count("one seed says nothing of chance: give more seeds") == 3


def test_a_verdict_that_may_be_chance_among_all_tests_says_so(tmp_path: Path):
    result = made()
    result["claims"][0] |= {"p": 0.02, "p_holm": 0.06}
    text, page = wrote(tmp_path / "small", result)
    assert len(re.findall("may well be chance", text)) == 1
    report.write_index(tmp_path)
    for told in (page, (tmp_path / "studies.md").read_text(), (tmp_path / "index.html").read_text()):
        assert "of these verdicts 1 may be chance among so many tests (p, Holm)" in told
    assert "| 0.060 | ✓ **shows it** |" in (tmp_path / "studies.md").read_text()


def test_a_floor_is_told_and_drawn(tmp_path: Path):
    with_floor = (Metric("pope", "POPE format, F1 in %", ("pope",), floor=66.0),)
    low = made(metrics=with_floor, claims=())
    text, page = wrote(tmp_path, low)
    for told in (text, page):
        assert "higher is better; 66: one same answer to everything" in told
    without = made(metrics=(Metric("pope", "POPE format, F1 in %", ("pope",)),), claims=())
    assert drawn(low, 0).tobytes() != drawn(without, 0).tobytes()


def test_an_arm_whose_seeds_share_a_run_says_so(tmp_path: Path):
    result = made()
    result["metrics"][0]["arms"]["0 tasks"] |= {"n": 1, "low": None, "high": None}
    text, _ = wrote(tmp_path, result)
    assert re.search(r"^\| 0 tasks \| [\d.]+ \(1 run for all seeds\) \|", text, re.M)


def test_odd_names_stay_text(tmp_path: Path):
    arms = (Arm(ODD), Arm("other"), Arm("third"))
    metrics = (Metric("a b", ODD, ("mme",), paper={ODD: 1.0}, paper_label=ODD), Metric("a/b", "two", ("pope",)),
               Metric("$", "three", ("loss",)))  # fmt: skip
    claims = (Claim(ODD, ODD, Difference("a b", ODD, "other")),)
    result = made(
        arms=arms,
        metrics=metrics,
        claims=claims,
        title=ODD,
        question=ODD,
        axis=ODD,
        notes=(ODD,),
        variant=ODD,
    )
    text, page = wrote(tmp_path, result)
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert r"a\|b \<script\>alert(1)\</script\> \$x_1\$ " in text
    assert {path.name for path in tmp_path.glob("*.png")} == {"a_b.png", "a_b-2.png", "metric.png"}
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in tables} == {8, 6}


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/.*: cannot be written"):
        report.write(made(), tmp_path / "file")


# --- plots ------------------------------------------------------------------------------------------------------------


def drawn(result: dict[str, Any], metric: int = 0) -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(plots.png(result, result["metrics"][metric])))


def test_the_papers_numbers_have_a_panel_of_their_own():
    result = made()
    assert drawn(result, 1).size == (1120, 680)
    assert drawn(result, 0).size == (1840, 680)


def test_every_seed_is_in_the_plot():
    """Each is a ring of a colour that nothing else has."""

    def rings(result: dict[str, Any]) -> int:
        picture = drawn(result, 1).convert("RGB")
        return sum(picture.getpixel((x, y)) == (127, 140, 150) for x in range(1120) for y in range(60, 680))

    equal = made(seeds=tuple(range(1, 13, 3)))  # whose values of POPE are all the same
    assert {value for value in equal["metrics"][1]["arms"]["8 tasks"]["values"].values()} == {72.0}
    one = made(seeds=(1,))
    assert rings(equal) > 2.5 * rings(one) > 0


@pytest.mark.parametrize(
    "arms",
    [
        (Arm("one"), Arm("two"), Arm("a name of many words that is to be wrapped")),
        (Arm("0", 0), Arm("1,000", 1000), Arm("1,000,000", 1_000_000)),
        (Arm("a curve's", 0.001), Arm("other", 0.002), Arm("one without a number")),
    ],
    ids=["names", "numbers", "both"],
)
def test_arms_of_any_kind_are_drawn(arms: tuple[Arm, ...]):
    result = made(arms=arms, claims=())
    assert len(drawn(result, 0).convert("RGB").getcolors(1 << 16)) > 10


# --- all studies ------------------------------------------------------------------------------------------------------


def test_the_index_has_all_claims_and_leads_to_each_study(tmp_path: Path):
    report.write(made("one"), tmp_path / "one")
    report.write(made("two", lost=9), tmp_path / "two")
    report.write_index(tmp_path)
    text, page = (tmp_path / "studies.md").read_text(), (tmp_path / "index.html").read_text()
    assert "10 claims: 2 ✓ shows it, 1 ≈ does not show it, 3 ? cannot, 4 … unfinished." in text
    assert len(re.findall(r"^\| \[one\]\(#one\) \|", text, re.M)) == 5
    assert re.findall(r"!\[.*\]\((.*)\)", text) == ["one/mme.png", "one/pope.png", "one/loss.png"]
    assert re.findall(r"href=\"([^\"#:]+)\"", page) == ["one/report.html", "two/report.html"]
    assert page.count('<a href="#two">two</a>') == 5 + 1
    assert set(re.findall(r'id="(\w+)"', page)) == {"one", "two"}
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (tmp_path / link).is_file(), link


def test_the_index_draws_a_plot_that_is_lost(tmp_path: Path):
    report.write(made("one"), tmp_path / "one")
    report.write_index(tmp_path)
    before = (tmp_path / "index.html").read_bytes()
    (tmp_path / "one" / "mme.png").unlink()
    report.write_index(tmp_path)
    assert (tmp_path / "index.html").read_bytes() == before


@pytest.mark.parametrize("text", ["{", "[]", '{"study": "one"}', '{"claims": []}'])
def test_a_broken_result_is_named_with_its_remedy(tmp_path: Path, text: str):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "result.json").write_text(text)
    with pytest.raises(UserError, match=r"one/result\.json: not a study's result .* --report-only"):
        report.write_index(tmp_path)


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A WORKDIR of two studies."""
    work = tmp_path_factory.mktemp("work")
    for name in ("one", "a_study_of_a_longer_name"):
        report.write(made(name), work / name)
    report.write_index(work)
    return work


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium.opened() as found:
        yield found


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_pages_fit_and_their_pictures_are_seen(browser: Any, site: Path, width: int, scheme: str):
    for file in ("one/report.html", "index.html"):
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        problems: list[str] = []
        page.on("console", lambda message, problems=problems: problems.append(message.text))
        page.goto((site / file).as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.evaluate("[...document.images].every(image => image.naturalWidth > 1000)")
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
        assert dark == (scheme == "dark")
        page.close()
        assert problems == []


def test_each_seed_is_folded_away_until_it_is_asked_for_and_printed_anyway(browser: Any, site: Path):
    page = browser.new_page()
    page.goto((site / "one" / "report.html").as_uri())
    cell = page.get_by_role("cell", name="503.0", exact=True)
    assert not cell.is_visible()
    page.focus("summary")
    page.keyboard.press("Enter")
    assert cell.is_visible()
    page.keyboard.press("Enter")
    page.set_viewport_size({"width": 720, "height": 1000})  # A4
    page.emulate_media(media="print", color_scheme="dark")
    assert cell.is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == 720
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    page.close()
