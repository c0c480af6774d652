"""A browser uses the page: it searches, asks, and sees heatmaps; what others wrote stays text; no file gets out."""

from __future__ import annotations

import re
import shutil
import socket
import urllib.error
import urllib.request

import psutil
import pytest

from albef_ds.__main__ import main
from albef_ds.data.images import ImageError
from albef_ds.inference.page import Hands, build_page
from tests.inference.conftest import draw

HOSTILE = '<img src=x onerror="document.title=1">.png'  # a file's name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    draw("red", "circle").save(folder / HOSTILE)
    draw("blue", "square").save(folder / "blue.png")
    (folder / "broken.png").write_bytes(b"nothing")
    return folder


@pytest.fixture(scope="module")
def address(models, folder):
    pytest.importorskip("gradio", reason="gradio is not installed (pip install 'albef_ds[page]')")
    page, launch = build_page(models["pretraining"], folder, models["vqa"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page.launch(**launch, server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, quiet=True)
    yield f"http://127.0.0.1:{port}"
    page.close()


@pytest.fixture
def browser(address):
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with driver.sync_playwright() as playwright:
        installed = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
        try:
            started = playwright.chromium.launch(executable_path=installed, args=["--no-sandbox"])
        except driver.Error as error:
            pytest.skip(f"no browser can be started (playwright install chromium): {str(error).splitlines()[0]}")
        tab = started.new_page()
        tab.set_default_timeout(120_000)  # a busy machine takes its time
        tab.asked = []
        tab.on("request", lambda request: tab.asked.append(request.url))
        tab.goto(address)
        yield tab
        started.close()


def value(tab, element: str) -> str:
    return tab.input_value(f"#{element} :is(input, textarea)")


def fill(tab, element: str, text: str) -> None:
    tab.fill(f"#{element} :is(input, textarea)", text)


def choose(tab, where: str, name: str) -> None:
    tab.click(f"#{where}-image input")
    tab.get_by_role("option", name=name, exact=True).click()


def wait_until_it_holds(tab, element: str, text: str) -> str:
    field = f"document.querySelector('#{element} :is(input, textarea)')"
    tab.wait_for_function(f"{field}.value.includes({text!r})", timeout=120_000)
    return value(tab, element)


def test_search_by_text_and_by_an_uploaded_image(browser, address, readable, pictures):
    fill(browser, "search-text", "a red circle")
    browser.click("#search-button")
    browser.wait_for_selector("#search-found img", timeout=120_000)
    assert wait_until_it_holds(browser, "search-said", "images") == "2 of 2 images"
    # The file's name is text on the page, not an element of it.
    assert HOSTILE in browser.inner_text("#search-found") and "blue.png" in browser.inner_text("#search-found")
    assert browser.title() == "albef_ds" and browser.locator('img[src="x"]').count() == 0

    fill(browser, "search-text", "")
    browser.set_input_files("input[type=file] >> nth=0", pictures / "broken.jpg")
    browser.wait_for_selector("text=broken.jpg")
    browser.click("#search-button")
    browser.wait_for_function(
        "document.querySelector('#search-said :is(input, textarea)').value.includes('not an image')"
    )
    assert {url.split("/")[2] for url in browser.asked if url.startswith("http")} == {address.split("/")[2]}


def test_ask(browser):
    browser.get_by_role("tab", name="Ask").click()
    fill(browser, "ask-text", "what is left of the circle")
    browser.click("#ask-button")
    assert wait_until_it_holds(browser, "ask-said", "Choose") == "Choose an image, or upload one."
    choose(browser, "ask", HOSTILE)
    browser.click("#ask-button")
    wait_until_it_holds(browser, "ask-said", "%")
    assert re.fullmatch(r"(.*\(\d+\.\d%\)\n?){3}", value(browser, "ask-said"))
    assert browser.title() == "albef_ds"


def test_heatmaps_by_word(browser):
    browser.get_by_role("tab", name="Words").click()
    choose(browser, "words", "blue.png")
    fill(browser, "words-text", "<b>two</b> circle")
    browser.click("#words-button")
    browser.wait_for_selector("#words-maps img", timeout=120_000)
    wait_until_it_holds(browser, "words-said", "score")
    said = browser.inner_text("#words-maps")
    assert "the whole text" in said and "circle" in said
    assert browser.locator("#words-maps b").count() == 0


def test_no_file_gets_out(address, folder):
    for path in (folder / "blue.png", folder / "broken.png", "/etc/hostname", "setup.py"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{address}/gradio_api/file={path}", timeout=10)
        assert refused.value.code in (403, 404)


def test_served_by_the_command_it_listens_on_this_machine_alone(models, folder, monkeypatch):
    """The real server, on the host that the command has where none is given; it ends at once instead of staying."""
    gradio = pytest.importorskip("gradio", reason="gradio is not installed (pip install 'albef_ds[page]')")
    monkeypatch.setattr("albef_ds.inference.commands._load", lambda args: models["retrieval"])
    launch, pages, found = gradio.Blocks.launch, [], set()

    def launch_and_look(page, **how):
        before = listening_addresses()
        pages.append(page)
        launch(page, **how, prevent_thread_lock=True, quiet=True)
        found.update(listening_addresses() - before)

    monkeypatch.setattr(gradio.Blocks, "launch", launch_and_look)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    try:
        assert main(["serve", "a model", "--images", str(folder), "--port", str(port)]) == 0
    finally:
        for page in pages:
            page.close()
    assert found == {("127.0.0.1", port)}


def listening_addresses() -> set[tuple[str, int]]:
    """Address and port of all that this process listens on."""
    connections = psutil.Process().net_connections("inet")
    return {(c.laddr.ip, c.laddr.port) for c in connections if c.status == psutil.CONN_LISTEN}


def test_a_page_without_a_model_that_answers_says_what_it_needs(models, folder):
    pytest.importorskip("gradio", reason="gradio is not installed (pip install 'albef_ds[page]')")
    page, launch = build_page(models["retrieval"], folder)
    texts = [block.value for block in page.blocks.values() if type(block).__name__ == "Textbox"]
    assert any("What answers questions is a VQA checkpoint" in str(text) for text in texts)
    assert launch["share"] is False and launch["allowed_paths"] == [] and page.analytics_enabled is False
    page, _ = build_page(models["vqa"], folder)
    texts = [str(block.value) for block in page.blocks.values() if type(block).__name__ == "Textbox"]
    assert any("What searches is" in text for text in texts) and not any("answers questions" in t for t in texts)


# -- without a browser -------------------------------------------------------------------------------------------------


def test_a_name_leads_to_an_image_of_the_folder_alone(models, folder, tmp_path):
    hands = Hands.build(models["pretraining"], folder, models["vqa"])
    assert sorted(hands.names) == sorted(["blue.png", HOSTILE])
    outside = tmp_path / "outside.png"
    draw("red", "circle").save(outside)
    for name in (str(outside), "../blue.png", "broken.png", None):
        assert hands.words(name, None, "a circle") == ([], "Choose an image, or upload one.")
    panels, said = hands.words("blue.png", None, "a circle")
    assert [word for _, word in panels] == ["the whole text", "a", "circle"] and "score" in said


def test_faults_are_told_and_empty_questions_asked_back(models, folder, pictures):
    hands = Hands.build(models["pretraining"], folder, models["vqa"])
    assert hands.answer("blue.png", None, "  ") == (None, "Write a question.")
    assert "not an image" in hands.search("", str(pictures / "broken.jpg"), 3)[1]
    assert len(hands.search("", str(pictures / "a.png"), 1)[0]) == 1


def test_a_folder_that_is_none(models, tmp_path):
    with pytest.raises(ImageError, match="no such folder"):
        Hands.build(models["retrieval"], tmp_path / "x", models["retrieval"])
