"""The chat page in a browser, against a server whose answers are written beforehand."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests import chromium
from tests.serve.chat_page import MESSAGE, Watched, ask, begin, png, texts, upload
from tests.serve.page_server import Answer, PageServer, serving
from vflax.serve.page_files import FOLDER

HOSTILE = (
    "<script>window.hacked = 1</script>\n\nand <img src=x onerror='window.hacked = 2'> <b style='color:red'>b</b>\n\n"
    "<iframe src='javascript:parent.hacked = 3'></iframe> [a](javascript:window.hacked=4) <svg onload='hacked=5'>"
)


def sent_images(message: dict[str, Any]) -> list[bytes]:
    """The bytes of the pictures in a message of a request."""
    urls = [part["image_url"]["url"] for part in message["content"] if part["type"] == "image_url"]
    assert all(re.match(r"data:image/\w+;base64,", url) for url in urls)
    return [base64.b64decode(url.partition(",")[2]) for url in urls]


def sent_text(message: dict[str, Any]) -> str:
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


@pytest.fixture(scope="module")
def page_server() -> Iterator[PageServer]:
    with serving() as server:
        yield server


@pytest.fixture
def server(page_server: PageServer) -> Iterator[PageServer]:
    page_server.reset()
    yield page_server
    page_server.release.set()


@pytest.fixture(scope="module")
def browser(page_server: PageServer) -> Iterator[Watched]:
    with chromium.opened() as found:
        yield Watched(found, page_server.url)


@pytest.fixture
def watched(browser: Watched, server: PageServer) -> Iterator[Watched]:
    yield browser
    assert browser.end() == []


@pytest.fixture
def page(watched: Watched) -> Any:
    return watched.usual_page()


def tool(page: Any, name: str, nth: int = -1) -> None:
    page.locator(f".turn [aria-label='{name}']").nth(nth).click()


def write_clipboard(page: Any, data: bytes) -> None:
    """Pastes a picture where the cursor is."""
    page.evaluate(
        """data => {
            const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
            const clipboardData = new DataTransfer();
            clipboardData.items.add(new File([bytes], "a.png", { type: "image/png" }));
            const event = new ClipboardEvent("paste", { clipboardData, bubbles: true, cancelable: true });
            document.activeElement.dispatchEvent(event);
        }""",
        base64.b64encode(data).decode(),
    )


# ---------------------------------------------------------------------------------------------------------
# Without a browser


def test_the_wheel_holds_every_file_of_the_page() -> None:
    import tomllib

    root = FOLDER.parents[2]
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"][
        "vflax"
    ]
    packed = {path for pattern in patterns for path in (root / "vflax").glob(pattern)}
    assert {path for path in FOLDER.rglob("*") if path.is_file()} <= packed


def test_vendored_files_are_those_of_the_table_beside_them() -> None:
    folder = FOLDER / "vendor"
    rows = re.findall(
        r"^\| (\S+) \| .* \| ([0-9a-f]{64}) \|$", (folder / "README.md").read_text(), re.MULTILINE
    )
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    del found["README.md"]
    assert dict(rows) == found


def test_the_examples_are_held_out_pictures_of_the_mini_dataset() -> None:
    from sklearn.datasets import load_digits

    from data_pipeline.mini.plan import make_plan
    from data_pipeline.mini.render import render

    digits = load_digits()
    items = {item.id: item for item in make_plan(digits.target) if item.split == "test"}
    ink = np.minimum(digits.images * 16, 255).astype(np.uint8)
    examples = json.loads((FOLDER / "examples" / "examples.json").read_text())
    assert 4 <= len(examples) <= 6
    for example in examples:
        item = items[example["sample"]]
        assert item.human.replace("<image>", "").strip() == example["question"]
        drawn = np.asarray(render(item.scene, random.Random(item.image), ink), np.int16)
        kept = np.asarray(Image.open(FOLDER / "examples" / example["picture"]).convert("RGB"), np.int16)
        # Another Pillow may round an edge otherwise.
        assert np.abs(drawn - kept).mean() < 2, example["picture"]


def test_no_file_of_the_page_names_another_host() -> None:
    own = [path for path in FOLDER.iterdir() if path.suffix in (".html", ".js", ".css")]
    assert len(own) > 10
    for path in own:
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|@import|\beval\(|new Function|innerHTML =", text), path.name


def test_nothing_in_the_document_is_inline() -> None:
    text = (FOLDER / "index.html").read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", text)


# ---------------------------------------------------------------------------------------------------------
# Questions and answers


def test_a_picture_is_uploaded_and_the_answer_is_seen_as_it_is_written(page: Any, server: PageServer) -> None:
    server.answers.append(Answer(["It is ", "a **red** ", "square."], hold=2))
    begin(page, "What is this?", upload())
    page.wait_for_selector(".turn.model strong:has-text('red')")
    assert texts(page) == ["What is this?", "It is a red"]
    assert page.is_visible("#foot .stop") and not page.is_visible("#foot .send")
    server.release.set()
    page.wait_for_selector(".facts")
    assert texts(page)[1] == "It is a red square."
    assert page.locator(".turn.user .picture img").evaluate("node => node.naturalWidth") == 9


def test_the_request_holds_the_picture_before_the_question(page: Any, server: PageServer) -> None:
    ask(page, "What is this?", upload(data=png("blue")))
    (asked,) = server.asked
    (message,) = asked.body["messages"]
    assert [part["type"] for part in message["content"]] == ["image_url", "text"]
    assert sent_images(message) == [png("blue")] and sent_text(message) == "What is this?"
    assert asked.body["model"] == "tiny-chat" and asked.body["stream"] is True
    assert asked.body["stream_options"] == {"include_usage": True} and asked.key is None


def test_pictures_can_be_added_at_any_turn_and_earlier_turns_are_sent_again(
    page: Any, server: PageServer
) -> None:
    ask(page, "one")
    ask(page, "two", upload("a.png", png("red")), upload("b.png", png("green")))
    messages = server.asked[1].body["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert messages[1]["content"] == "It is a **red** circle."
    assert sent_images(messages[2]) == [png("red"), png("green")]


def test_tokens_and_their_pace_are_told(page: Any) -> None:
    ask(page, "hello")
    assert re.fullmatch(r"3 tokens · [\d.]+ tokens/s", page.inner_text(".facts"))


def test_a_picture_is_removed_before_sending(page: Any, server: PageServer) -> None:
    page.set_input_files(
        "#foot input[type=file]", [upload("a.png", png("red")), upload("b.png", png("green"))]
    )
    page.wait_for_selector(".thumbs li:nth-child(2)")
    page.click("[aria-label='Remove picture 1']")
    ask(page, "which")
    assert sent_images(server.asked[0].body["messages"][0]) == [png("green")]


def test_a_large_picture_is_made_smaller(page: Any, server: PageServer) -> None:
    ask(page, "big", upload(data=png(size=(400, 100))))
    (data,) = sent_images(server.asked[0].body["messages"][0])
    width, height = Image.open(io.BytesIO(data)).size
    assert width * height <= 10_000 and width / height == pytest.approx(4, rel=0.05)


def test_a_photo_is_sent_upright_and_without_where_it_was_taken(page: Any, server: PageServer) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned to the right
    buffer = io.BytesIO()
    Image.new("RGB", (80, 40), "red").save(buffer, "JPEG", exif=exif)
    ask(page, "photo", upload("p.jpg", buffer.getvalue(), "image/jpeg"))
    (data,) = sent_images(server.asked[0].body["messages"][0])
    image = Image.open(io.BytesIO(data))
    assert image.size == (40, 80) and not image.getexif()


def test_a_message_that_is_sent_while_its_picture_is_read_waits_for_it(page: Any, server: PageServer) -> None:
    page.evaluate(
        """() => {
            const real = window.createImageBitmap;
            window.createImageBitmap = async (...all) => {
                await new Promise((go) => (window.go = go));
                return real(...all);
            };
        }"""
    )
    page.set_input_files("#foot input[type=file]", upload())
    page.wait_for_selector("#foot .draft.reading")
    page.fill(MESSAGE, "what")
    page.press(MESSAGE, "Enter")
    assert page.locator(".turn").count() == 0
    page.evaluate("window.go()")
    page.wait_for_selector(".facts")
    assert sent_images(server.asked[0].body["messages"][0]) == [png()]


def test_what_is_no_picture_is_refused_in_words(page: Any) -> None:
    page.set_input_files("#foot input[type=file]", upload("notes.png", b"no picture"))
    page.wait_for_selector(".notice:has-text('“notes.png” is not a picture')")
    assert page.locator(".thumbs img").count() == 0


def test_more_pictures_than_the_server_takes_are_refused_in_words(page: Any) -> None:
    page.set_input_files("#foot input[type=file]", [upload(f"{n}.png") for n in range(5)])
    page.wait_for_selector(".notice:has-text('at most 4 pictures')")
    assert page.locator(".thumbs img").count() == 4


def test_a_picture_is_pasted(page: Any, server: PageServer) -> None:
    page.focus(MESSAGE)
    write_clipboard(page, png("green"))
    page.wait_for_selector(".thumbs img")
    ask(page, "pasted")
    assert sent_images(server.asked[0].body["messages"][0]) == [png("green")]


def test_pictures_are_dropped(page: Any, server: PageServer) -> None:
    transfer = page.evaluate_handle(
        """data => {
            const transfer = new DataTransfer();
            const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
            for (const name of ["a", "b"]) transfer.items.add(new File([bytes], name, { type: "image/png" }));
            return transfer;
        }""",
        base64.b64encode(png("blue")).decode(),
    )
    page.dispatch_event("#welcome", "dragenter", {"dataTransfer": transfer})
    assert page.is_visible("#drop")
    page.dispatch_event("#welcome", "drop", {"dataTransfer": transfer})
    page.wait_for_selector(".thumbs li:nth-child(2)")
    assert not page.is_visible("#drop")
    ask(page, "dropped")
    assert sent_images(server.asked[0].body["messages"][0]) == [png("blue")] * 2


def test_an_example_is_asked(page: Any, server: PageServer) -> None:
    page.click("#examples button:has-text('Which word do you see?')")
    page.wait_for_selector(".thumbs img")
    page.press(MESSAGE, "Enter")
    page.wait_for_selector(".facts")
    (message,) = server.asked[0].body["messages"]
    assert sent_text(message) == "Which word do you see?"
    assert sent_images(message) == [(FOLDER / "examples" / "word.png").read_bytes()]
    assert not page.is_visible("#welcome")


# ---------------------------------------------------------------------------------------------------------
# Stop, regenerate, edit, copy


def test_stop_ends_the_request_and_keeps_the_text_so_far(page: Any, server: PageServer) -> None:
    server.answers.append(Answer(["One ", "two ", "three"], hold=2))
    begin(page, "count")
    page.wait_for_selector(".turn.model:has-text('One two')")
    page.click("#foot .stop")
    page.wait_for_selector(".facts:has-text('Stopped')")
    assert texts(page)[1] == "One two"
    assert server.left.wait(15)


def test_a_conversation_goes_on_after_a_stop(page: Any, server: PageServer) -> None:
    server.answers.append(Answer(["One"], hold=0))
    begin(page, "first")
    page.wait_for_selector(".body.waiting")
    assert server.taken.wait(15)  # a request that is stopped on its way leaves its answer to the next one
    page.keyboard.press("Escape")
    page.wait_for_selector(".facts:has-text('Stopped')")
    ask(page, "second")
    (message,) = server.asked[1].body["messages"]
    assert (
        sent_text(message) == "firstsecond"
    )  # no answer stands between them, and users take turns with models


def test_regenerate_asks_again_and_replaces_the_answer(page: Any, server: PageServer) -> None:
    server.answers += [Answer(["old"]), Answer(["new"])]
    ask(page, "hello")
    tool(page, "Regenerate answer")
    page.wait_for_selector(".turn.model:has-text('new') .facts")
    assert texts(page) == ["hello", "new"]
    assert server.asked[0].body["messages"] == server.asked[1].body["messages"]


def test_an_answer_stays_where_another_one_fails_before_its_first_word(
    page: Any, server: PageServer, watched: Watched
) -> None:
    watched.expected = "status of 500"
    server.answers += [Answer(["old"]), Answer(status=500)]
    ask(page, "hello")
    tool(page, "Regenerate answer")
    page.wait_for_selector(".problem:has-text('could not answer')")
    assert texts(page) == ["hello", "old"]


def test_an_edited_message_is_where_the_conversation_goes_on(page: Any, server: PageServer) -> None:
    ask(page, "one", upload())
    ask(page, "two")
    tool(page, "Edit message", 0)
    assert "removes 3 messages" in page.inner_text(".editor .note")
    page.fill(".editor textarea", "three")
    page.press(".editor textarea", "Enter")
    page.wait_for_selector(".turn.model:last-child .facts")
    assert texts(page) == ["three", "It is a red circle."]
    (message,) = server.asked[2].body["messages"]
    assert sent_text(message) == "three" and sent_images(message) == [png()]


def test_an_edit_that_is_cancelled_changes_nothing(page: Any) -> None:
    ask(page, "one")
    tool(page, "Edit message")
    page.fill(".editor textarea", "two")
    page.press(".editor textarea", "Escape")
    assert texts(page) == ["one", "It is a red circle."] and page.locator(".editor").count() == 0


def test_an_answer_is_copied_as_it_was_written(watched: Watched) -> None:
    page = watched.page(permissions=["clipboard-read", "clipboard-write"])
    ask(page, "hello")
    tool(page, "Copy answer")
    page.wait_for_selector("[title='Copied']")
    assert page.evaluate("navigator.clipboard.readText()") == "It is a **red** circle."


def test_an_answer_is_copied_on_plain_http_from_another_machine_too(watched: Watched) -> None:
    """Where browsers have no navigator.clipboard."""
    page = watched.page(permissions=["clipboard-read", "clipboard-write"])
    page.evaluate(
        "window.kept = navigator.clipboard; Object.defineProperty(navigator, 'clipboard', { value: undefined })"
    )
    ask(page, "hello")
    tool(page, "Copy answer")
    page.wait_for_selector("[title='Copied']")
    assert page.evaluate("window.kept.readText()") == "It is a **red** circle."


def test_code_is_copied_from_its_block(watched: Watched, server: PageServer) -> None:
    server.answers.append(Answer(["Code:\n\n```python\n", "if a < b:\n    c()\n", "```\n"]))
    page = watched.page(permissions=["clipboard-read", "clipboard-write"])
    ask(page, "code")
    assert page.inner_text(".code .bar span") == "python"
    page.click("[data-copy=code]")
    page.wait_for_selector("[title='Copied']")
    assert page.evaluate("navigator.clipboard.readText()") == "if a < b:\n    c()"


# ---------------------------------------------------------------------------------------------------------
# Answers as they are shown


def test_an_answer_drawn_piece_by_piece_is_the_answer_drawn_whole(page: Any) -> None:
    """Before `finish` draws it anew; and no complete block is drawn a second time."""
    text = "# A\n\n- a\n- b\n\n  c\n\n1. one\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n```js\nx\n\ny\n```\n\n"
    text += "> q\n\nend *e*\nline"
    found = page.evaluate(
        """async text => {
            const { Growing, render } = await import("/page/markdown.js");
            const frame = () => new Promise((done) => requestAnimationFrame(done));
            const grown = document.body.appendChild(document.createElement("div"));
            const whole = document.createElement("div");
            whole.append(render(text));
            let last, stayed = 0;
            const growing = new Growing(grown, () => {});
            for (let n = 1; n <= text.length; n += 3) {
                growing.show(text.slice(0, n));
                await frame();
                stayed += last !== undefined && grown.firstChild === last;
                last = grown.firstChild;
            }
            for (let n = 0; n < 600 && grown.innerHTML !== whole.innerHTML; n += 1) await frame();
            const result = [grown.innerHTML, whole.innerHTML, stayed];
            grown.remove();
            return result;
        }""",
        text,
    )
    assert found[0] == found[1] and "<table>" in found[0]
    assert found[2] > 20  # the heading's node is the same one from the second block on


def test_the_page_follows_an_answer_unless_it_was_scrolled_away(page: Any, server: PageServer) -> None:
    lines = [f"{n}\n\n" for n in range(80)]
    server.answers.append(Answer(lines, hold=60))
    begin(page, "count")
    page.wait_for_selector(".turn.model p:has-text('59')")
    box = "const box = document.querySelector('#scroll'); "
    assert (
        page.evaluate(f"() => {{ {box} return box.scrollHeight - box.scrollTop - box.clientHeight; }}") < 48
    )
    page.evaluate(f"() => {{ {box} box.scrollTop = 0; }}")
    page.wait_for_selector("#to-end")
    server.release.set()
    page.wait_for_selector(".turn.model p:has-text('79')")
    page.wait_for_selector(".facts")
    assert page.evaluate(f"() => {{ {box} return box.scrollTop; }}") == 0
    page.click("#to-end")
    page.wait_for_selector("#to-end", state="hidden")


def test_a_link_whose_address_comes_last_is_one_in_the_end(page: Any, server: PageServer) -> None:
    server.answers.append(Answer(["See [it][1].\n\n", "More.\n\n", "[1]: https://example.com/a\n"]))
    ask(page, "where")
    assert page.get_attribute(".body a", "href") == "https://example.com/a"


def test_scripts_in_an_answer_are_text(page: Any, server: PageServer) -> None:
    server.answers.append(Answer([HOSTILE]))
    ask(page, "attack")
    assert page.evaluate("window.hacked") is None
    assert page.locator(".body").locator("script, img, iframe, svg[onload], [style], [onerror]").count() == 0
    assert page.locator(".body a[href]").count() == 0
    assert "<script>window.hacked = 1</script>" in page.inner_text(".body")


def test_scripts_in_a_question_are_text(page: Any) -> None:
    ask(page, HOSTILE)
    assert page.evaluate("window.hacked") is None
    assert page.inner_text(".turn.user .text") == HOSTILE
    assert "<script>" in page.inner_text("#list")


def test_a_picture_of_another_host_is_a_link_and_not_loaded(page: Any, server: PageServer) -> None:
    server.answers.append(
        Answer(["![cat](https://example.com/cat.png) and [more](https://example.com/more)"])
    )
    ask(page, "show me")  # `watched` fails the test where something is asked of another host
    links = page.locator(".body a")
    assert [link.inner_text() for link in links.all()] == ["cat", "more"]
    for link in links.all():
        assert link.get_attribute("target") == "_blank"
        assert {"noopener", "noreferrer"} <= set(str(link.get_attribute("rel")).split())
    assert page.locator(".body img").count() == 0


# ---------------------------------------------------------------------------------------------------------
# Kept in the browser


def test_a_reload_finds_the_conversation_and_its_picture(page: Any, server: PageServer) -> None:
    ask(page, "What is this?", upload())
    page.fill(MESSAGE, "not sent")
    page.reload()
    page.wait_for_selector("body[data-ready]")
    assert texts(page) == ["What is this?", "It is a red circle."]
    assert page.locator(".picture img").evaluate("node => node.decode().then(() => node.naturalWidth)") == 9
    assert page.input_value(MESSAGE) == "not sent"
    ask(page, "And now?")
    assert sent_images(server.asked[1].body["messages"][0]) == [png()]


def test_a_reload_finds_an_answer_that_was_being_written(page: Any, server: PageServer) -> None:
    server.answers.append(Answer(["One ", "two ", "three"], hold=2))
    begin(page, "count")
    page.wait_for_selector(".turn.model:has-text('One two')")
    page.reload()
    page.wait_for_selector("body[data-ready]")
    page.wait_for_selector(".facts:has-text('Stopped')")
    assert texts(page)[0] == "count" and texts(page)[1] in ("", "One", "One two")
    ask(page, "go on")


def test_a_growing_answer_is_saved_before_it_ends(page: Any, server: PageServer) -> None:
    """As a tab that crashes leaves it: nothing was told to save."""
    server.answers.append(Answer([*["word "] * 4, "last"], hold=4))
    page.evaluate("window.performance.now = ((t) => () => (t += 1000))(0)")  # each piece comes a second later
    begin(page, "count")
    text, state = page.evaluate(
        """async () => {
            const read = () => new Promise((done) => {
                const opened = indexedDB.open("vflax-chat");
                opened.onsuccess = () => {
                    const all = opened.result.transaction("conversations").objectStore("conversations").getAll();
                    all.onsuccess = () => { opened.result.close(); done(all.result[0]?.turns.at(-1)); };
                };
            });
            let turn;
            for (let frames = 0; frames < 600 && !turn?.text?.includes("word word"); frames += 1) {
                turn = await read();
                await new Promise((done) => requestAnimationFrame(done));
            }
            return [turn.text, turn.state];
        }"""
    )
    assert text.startswith("word word") and state == "writing"


def test_several_conversations_are_kept_apart(page: Any, server: PageServer) -> None:
    ask(page, "first question")
    page.click("#new")
    page.wait_for_selector("#welcome:not([hidden])")
    ask(page, "second question")
    assert page.locator("#list a").all_inner_texts() == ["second question", "first question"]
    page.click("#list a:has-text('first question')")
    page.wait_for_selector(".turn:has-text('first question')")
    assert texts(page) == ["first question", "It is a red circle."]
    assert len(server.asked[1].body["messages"]) == 1


def test_an_answer_goes_on_while_another_conversation_is_open(page: Any, server: PageServer) -> None:
    server.answers.append(Answer(["One ", "two"], hold=1))
    begin(page, "first")
    page.wait_for_selector(".turn.model:has-text('One')")
    page.click("#new")
    ask(page, "second")
    assert texts(page) == ["second", "It is a red circle."]
    page.click("#list a.busy")
    page.wait_for_selector(".turn.model:has-text('One')")
    server.release.set()
    page.wait_for_selector(".facts")
    assert texts(page) == ["first", "One two"]


def test_a_conversation_is_renamed(page: Any) -> None:
    ask(page, "hello")
    page.hover("#list li")
    page.click("#list [aria-label='Rename “hello”']")
    page.fill("#question-field", "Circles")
    page.press("#question-field", "Enter")
    page.wait_for_selector("#list a:has-text('Circles')")
    page.reload()
    page.wait_for_selector("#title:has-text('Circles')")


def test_a_conversation_is_deleted_with_its_pictures(page: Any) -> None:
    ask(page, "hello", upload())
    page.hover("#list li")
    page.click("#list [aria-label='Delete “hello”']")
    page.click("#question-yes")
    page.wait_for_selector("#welcome:not([hidden])")
    page.wait_for_selector("#list:empty", state="attached")
    count = """() => new Promise((done) => {
        const opened = indexedDB.open("vflax-chat");
        opened.onsuccess = () => {
            const all = opened.result.transaction("pictures").objectStore("pictures").count();
            all.onsuccess = () => { opened.result.close(); done(all.result); };
        };
    })"""
    assert page.evaluate(count) == 0


def test_a_conversation_is_exported_and_imported(page: Any, server: PageServer, tmp_path: Path) -> None:
    ask(page, "hello", upload())
    with page.expect_download() as download:
        page.click("#export")
    path = tmp_path / "chat.json"
    download.value.save_as(path)
    assert download.value.suggested_filename == "hello.json"
    page.set_input_files("#import-file", path)
    page.wait_for_function("() => document.querySelectorAll('#list a').length === 2")
    page.wait_for_selector("#list li:first-child a[aria-current]")
    assert texts(page) == ["hello", "It is a red circle."]
    ask(page, "again")
    assert sent_images(server.asked[1].body["messages"][0]) == [png()]


@pytest.mark.parametrize(
    "content", ["{", '{"format": "vflax-chat-1", "title": "a", "turns": [{"role": "x"}]}']
)
def test_a_file_that_is_no_conversation_is_refused_in_words(page: Any, content: str) -> None:
    page.set_input_files("#import-file", upload("a.json", content.encode(), "application/json"))
    page.wait_for_selector(".notice:has-text('“a.json” is not a conversation')")
    assert page.locator("#list a").count() == 0


def test_a_second_tab_sees_what_the_first_one_writes(watched: Watched, server: PageServer) -> None:
    context = watched.context()
    first = watched.page(context)
    ask(first, "one")
    second = watched.page(context, "#" + first.url.partition("#")[2])
    assert texts(second) == texts(first)
    ask(first, "two")
    second.wait_for_selector(".turn:nth-child(4) .facts")
    assert texts(second) == texts(first)


def test_a_second_tab_does_not_write_over_the_first(watched: Watched, server: PageServer) -> None:
    """Both answer at a time: the conversation has one of them, a copy of it the other."""
    context = watched.context()
    first = watched.page(context)
    ask(first, "one", upload())
    second = watched.page(context, "#" + first.url.partition("#")[2])
    for page in (first, second):  # neither hears of the other
        page.evaluate("BroadcastChannel.prototype.postMessage = () => {}")
    ask(first, "of the first")
    ask(second, "of the second")
    second.wait_for_selector(".notice:has-text('goes on as a copy')")
    second.reload()
    second.wait_for_selector("#list li:nth-child(2)")
    assert second.locator("#list a").all_inner_texts() == ["one (copy)", "one"]
    assert texts(second)[2] == "of the second" and second.locator(".picture img").count() == 1
    second.click("#list a >> text=/^one$/")
    second.wait_for_selector(".turn:has-text('of the first')")
    assert second.locator(".picture img").count() == 1


def test_a_second_tab_waits_for_the_answer_of_the_first(watched: Watched, server: PageServer) -> None:
    context = watched.context()
    first = watched.page(context)
    server.answers.append(Answer(["One ", "two"], hold=1))
    begin(first, "count")
    first.wait_for_selector(".turn.model:has-text('One')")
    second = watched.page(context, "#" + first.url.partition("#")[2])
    second.fill(MESSAGE, "me too")
    second.press(MESSAGE, "Enter")
    second.wait_for_selector(".notice:has-text('in another tab')")
    assert len(server.asked) == 1 and second.input_value(MESSAGE) == "me too"
    server.release.set()
    second.wait_for_selector(".turn.model:has-text('One two') .facts")


# ---------------------------------------------------------------------------------------------------------
# Parameters, colours, keys, phones


def test_parameters_reach_the_request_and_are_kept(page: Any, server: PageServer) -> None:
    wanted = {
        "temperature": 0.7, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.1, "max_tokens": 64, "seed": 7,
    }  # fmt: skip
    page.click("#open-settings")
    assert page.get_attribute("#set-temperature", "placeholder") == "0.2"
    for name, value in wanted.items():
        page.fill(f"#set-{name}", str(value))
    page.fill("#set-system", "Be brief.")
    page.keyboard.press("Escape")
    page.reload()
    page.wait_for_selector("body[data-ready]")
    ask(page, "hello")
    body = server.asked[0].body
    assert {name: body[name] for name in wanted} == wanted
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}


def test_what_is_not_set_or_out_of_range_is_left_to_the_server(page: Any, server: PageServer) -> None:
    page.click("#open-settings")
    page.fill("#set-temperature", "3")
    assert page.locator("#set-temperature:invalid").count() == 1
    page.fill("#set-seed", "7")
    page.keyboard.press("Escape")
    ask(page, "hello")
    assert set(server.asked[0].body) == {"model", "messages", "stream", "stream_options", "seed"}


def test_the_page_is_dark_where_the_system_is_and_the_switch_is_kept(watched: Watched) -> None:
    page = watched.page(color_scheme="dark")
    back = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(back)
    page.click("#theme")
    light = page.evaluate(back)
    assert (dark, light) == ("rgb(23, 24, 27)", "rgb(255, 255, 255)")
    page.reload()
    page.wait_for_selector("body[data-ready]")
    assert page.evaluate(back) == light


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_background(watched: Watched, server: PageServer, scheme: str) -> None:
    """4.5 to 1, as WCAG AA wants it."""
    watched.expected = "status of 500"
    page = watched.page(color_scheme=scheme)
    server.answers += [Answer(["a [link](https://example.com) `code`\n\n> quote\n"]), Answer(status=500)]
    ask(page, "hello")
    ask(page, "again")
    ratios = page.evaluate(
        """() => {
            const channels = (text) => text.match(/[\\d.]+/g).map(Number);
            const luminance = (rgb) => rgb.slice(0, 3).map((c) => c / 255)
                .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
                .reduce((sum, c, n) => sum + c * [0.2126, 0.7152, 0.0722][n], 0);
            const back = (node) => {
                for (; node; node = node.parentElement) {
                    const found = channels(getComputedStyle(node).backgroundColor);
                    if (found[3] !== 0) return found;
                }
            };
            const shown = "a, p, span, button, h1, .text, code, blockquote, textarea, .icon";
            return [...document.querySelectorAll(shown)].filter((node) => node.checkVisibility() && !node.disabled)
                .filter((node) => !node.closest(":disabled")).map((node) => {
                    const pair = [luminance(channels(getComputedStyle(node).color)), luminance(back(node))];
                    return [(Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05), node.outerHTML.slice(0, 80)];
                });
        }"""
    )
    assert len(ratios) > 20
    assert [one for one in ratios if one[0] < 4.5] == []


def test_the_page_is_used_by_keyboard_alone(page: Any, server: PageServer) -> None:
    press, write = page.keyboard.press, page.keyboard.type
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Message"
    write("one")
    press("Shift+Enter")
    write("line two")
    press("Enter")
    page.wait_for_selector(".facts")
    assert texts(page)[0] == "one\nline two"
    server.answers.append(Answer(["long"], hold=1))
    press("Alt+r")
    page.wait_for_selector(".turn.model:has-text('long')")
    press("Escape")
    page.wait_for_selector(".facts:has-text('Stopped')")
    press("ArrowUp")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Edited message"
    press("Control+a")
    write("two")
    press("Enter")
    page.wait_for_selector(".turn.model:has-text('circle') .facts")
    assert texts(page)[0] == "two"
    press("Alt+n")
    page.wait_for_selector("#welcome:not([hidden])")
    press("Alt+l")
    press("Tab")
    press("Enter")
    page.wait_for_selector(".turn:has-text('two')")


def test_tab_reaches_every_control_and_shows_where_it_is(page: Any) -> None:
    ask(page, "hello")
    page.evaluate("document.activeElement.blur()")
    seen: list[str] = []
    for _ in range(40):
        page.keyboard.press("Tab")
        name, outline = page.evaluate(
            """() => {
                const node = document.activeElement;
                const ring = getComputedStyle(node.closest(".draft textarea") ? node.parentElement : node);
                if (node === document.body) return ["BODY", ""];
                return [node.getAttribute("aria-label") || node.textContent.trim(),
                        node.matches("textarea") ? ring.borderColor : ring.outlineStyle + ring.opacity];
            }"""
        )
        if seen and name == seen[0]:
            break
        assert name in ("Message", "BODY") or outline == "solid1", name
        seen.append(name)
    wanted = [
        "Skip to the message box", "New chat", "hello", "Rename “hello”", "Delete “hello”", "Import", "Help",
        "Export this conversation", "Dark colours", "Parameters", "Copy message", "Edit message", "Copy answer",
        "Regenerate answer", "Message", "Add pictures", "Send",
    ]  # fmt: skip
    seen = [name for name in seen if name != "BODY"]  # where the browser's own controls would be
    start = seen.index(wanted[0])
    assert seen[start:] + seen[:start] == wanted


def test_the_help_lists_every_shortcut(page: Any) -> None:
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("?")
    listed = set(page.locator("#help[open] td:first-child").all_inner_texts())
    keys = re.findall(r"Key([A-Z])\b", (FOLDER / "shortcuts.js").read_text())
    assert {f"Alt {key}" for key in keys} < listed
    page.keyboard.press("Escape")
    assert page.locator("#help[open]").count() == 0


def test_a_finished_answer_is_read_aloud_once(page: Any, server: PageServer) -> None:
    server.answers.append(Answer(["One ", "two"], hold=1))
    begin(page, "count")
    page.wait_for_selector(".turn.model:has-text('One')")
    assert page.text_content("[role=status]") == "The answer is being written."
    server.release.set()
    page.wait_for_selector("[role=status]:has-text('Answer: One two')", state="attached")


def test_the_page_fits_a_phone(watched: Watched, server: PageServer) -> None:
    page = watched.page(viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True)
    wide = "| a | b | c | d | e | f |\n|---|---|---|---|---|---|\n|" + " longer words |" * 6
    server.answers.append(Answer([f"{'x' * 300}\n\n```\n{'y ' * 200}\n```\n\n{wide}\n\n$$ {'z' * 90} $$"]))
    page.fill(MESSAGE, "q" * 200)
    page.tap("#foot .send")
    page.wait_for_selector(".facts")
    for node in ("document.documentElement", "document.querySelector('#scroll')"):
        assert page.evaluate(f"{node}.scrollWidth - {node}.clientWidth") == 0
    assert not page.is_visible("#side")
    page.tap("#open-list")
    page.wait_for_selector("#side >> text=Import")
    page.tap("#list a")
    page.wait_for_selector("#side", state="hidden")


def test_the_message_box_grows_with_its_text(page: Any) -> None:
    height = lambda: page.locator(MESSAGE).bounding_box()["height"]  # noqa: E731
    low = height()
    page.fill(MESSAGE, "\n".join(["line"] * 5))
    assert height() > 2.5 * low
    page.fill(MESSAGE, "\n".join(["line"] * 100))
    assert height() <= 320  # 40 % of the window


# ---------------------------------------------------------------------------------------------------------
# Errors


def test_a_busy_server_is_asked_again_after_the_time_it_says(
    page: Any, server: PageServer, watched: Watched
) -> None:
    watched.expected = "status of 429"
    server.answers.append(Answer(status=429, message="the queue is full", headers={"Retry-After": "3600"}))
    begin(page, "hello")
    retry = page.locator(".problem button")
    retry.wait_for()
    assert re.fullmatch(r"Try again in 3[56]\d\d s", retry.inner_text()) and retry.is_disabled()
    page.evaluate("() => { const now = Date.now; Date.now = () => now() + 3_600_000; }")
    retry.click()  # as soon as it is enabled
    page.wait_for_selector(".facts")
    assert texts(page) == ["hello", "It is a red circle."] and page.locator(".problem").count() == 0


def test_a_server_that_wants_a_key_gets_the_one_that_is_typed(
    page: Any, server: PageServer, watched: Watched
) -> None:
    watched.expected = "status of 401"
    server.answers.append(Answer(status=401, message="an API key is needed", code="invalid_api_key"))
    begin(page, "hello")
    page.wait_for_selector("#question[open]")
    assert page.get_attribute("#question-field", "type") == "password"
    page.fill("#question-field", "secret-1")
    page.press("#question-field", "Enter")
    page.wait_for_selector(".facts")
    assert [asked.key for asked in server.asked] == [None, "Bearer secret-1"]
    page.reload()
    page.wait_for_selector("body[data-ready]")
    ask(page, "again")
    assert server.asked[2].key == "Bearer secret-1"


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            Answer(
                status=400,
                message="messages: the prompt is 2100 tokens and the model takes 2048",
                param="messages",
                code="context_length_exceeded",
            ),
            r"too long for the model. The prompt is 2100 tokens and the model takes 2048. Start a new",
        ),
        (Answer(status=413, message="more than 8 bytes"), "too large for this server. More than 8 bytes."),
        (Answer(status=503, message="the server is shutting down"), "takes no questions now"),
        (Answer(["One"], hold=1, end="error", message="the deadline has passed"), "The deadline has passed."),
        (Answer(["One"], hold=1, end="drop"), "connection was lost before the answer was complete"),
    ],
)
def test_an_error_is_told_in_plain_words_with_a_retry(
    page: Any, server: PageServer, watched: Watched, answer: Answer, words: str
) -> None:
    watched.expected = r"status of|ERR_INCOMPLETE_CHUNKED_ENCODING|ERR_CONNECTION"
    server.answers.append(answer)
    begin(page, "hello")
    if answer.status == 200:
        page.wait_for_selector(".turn.model:has-text('One')")
        server.release.set()
    page.wait_for_selector(".problem")
    assert re.search(words, page.inner_text(".problem p"))
    if answer.status == 200:
        assert texts(page)[1] == "One"  # what has come stays
    page.click(".problem button")
    page.wait_for_selector(".facts")
    assert texts(page) == ["hello", "It is a red circle."]


def test_being_offline_is_told_and_tried_again(page: Any, watched: Watched) -> None:
    watched.expected = "ERR_INTERNET_DISCONNECTED"
    page.context.set_offline(True)
    begin(page, "hello")
    page.wait_for_selector(".problem:has-text('You are offline')")
    page.context.set_offline(False)
    page.click(".problem button")
    page.wait_for_selector(".facts")


def test_a_request_larger_than_the_server_takes_is_not_sent(watched: Watched, server: PageServer) -> None:
    server.config["max_request_bytes"] = 1000
    page = watched.page()
    begin(page, "x" * 2000)
    page.wait_for_selector(".problem:has-text('this server takes 0.0 MB')")
    assert server.asked == []


def test_an_answer_that_was_cut_says_so(page: Any, server: PageServer) -> None:
    server.answers.append(Answer(finish="length"))
    ask(page, "hello")
    assert "Ended at the most tokens allowed" in page.inner_text(".facts")
