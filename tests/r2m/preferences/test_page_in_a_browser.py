"""The page of `r2m label` as people meet it: the command, a browser, a keyboard."""

import json
import re
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait
from small_run import write_config

from r2m.preferences import queue
from r2m.runs.folder import read_metrics

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        None in (BROWSER, DRIVER), reason="no chromium with chromedriver: apt-get install chromium chromium-driver"
    ),
]

HOSTILE = (
    "<img src=x onerror='window.hit=1'><script>window.hit=1</script>\n```html\n</code><svg onload=hit=1>\n```\nend"
)


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,800"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def folder(tmp_path):
    queue.ask(
        tmp_path,
        [
            {"id": f"1-{i}", "round": 1, "prompt": f"prompt {i}", "first": "a", "second": "b", "reward": 0.9}
            for i in range(12)
        ],
    )
    return tmp_path


@contextmanager
def serving(folder, port=0, file_limit=None):
    """`r2m label` on a folder; yields its process and its address. file_limit: bytes that no file may exceed."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

    command = [sys.executable, "-m", "r2m.cli", "label", str(folder), "--port", str(port)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=limit if file_limit else None)
    try:
        line = process.stderr.readline()
        address = re.search(r"http://\S+", line)
        assert address, line + process.stderr.read()
        yield process, address[0]
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def until(browser, condition, seconds=10):
    return WebDriverWait(browser, seconds, poll_frequency=0.05).until(lambda _: condition())


def text(browser, id):
    return browser.find_element(By.ID, id).get_property("textContent")


def press(browser, *keys):
    """A key and the server's answer to it, one after another."""
    for key in keys:
        until(browser, lambda: browser.find_element(By.ID, "undo").is_enabled())
        browser.switch_to.active_element.send_keys(key)
        until(browser, lambda: browser.find_element(By.ID, "undo").is_enabled())


def open_page(browser, address):
    browser.get(address)
    until(browser, lambda: text(browser, "prompt"))


def labels(folder):
    return list(queue.answers(folder).values())


def test_ten_pairs_by_the_keyboard(browser, folder):
    with serving(folder) as (_, address):
        open_page(browser, address)
        assert text(browser, "counts") == "12 pairs wait"
        name = browser.find_element(By.ID, "name")
        name.clear()
        name.send_keys("tess", Keys.ARROW_LEFT, "\t")  # what is typed there is no answer
        press(browser, Keys.ARROW_LEFT, Keys.ARROW_RIGHT, "t", "S", *[Keys.ARROW_LEFT] * 6)
        assert len(labels(folder)) == 10 and text(browser, "status") == "Saved: A is better."
        press(browser, "u", "u")
        assert len(labels(folder)) == 8 and "Taken back" in text(browser, "status")
        assert text(browser, "prompt") == "prompt 8"
        assert browser.switch_to.active_element.get_attribute("id") == "prompt-title"
        for _ in range(4):  # from there by tab alone: prompt, A, B, and then the first button
            browser.switch_to.active_element.send_keys("\t")
        press(browser, Keys.ENTER)
        assert len(labels(folder)) == 9
    rows = [json.loads(line) for line in (folder / queue.ANSWERS).read_text().splitlines()]
    assert {row["by"] for row in rows} == {"tess"}
    given = [row for row in rows if not row.get("undo")]
    better = [{"first": 1, "second": 0}[row["left"]] for row in given]
    assert [row["label"] for row in given[:5]] == [better[0], 1 - better[1], 0.5, None, better[4]]
    first = sum(label == 1 for label in labels(folder))
    assert f"agreed with {round(100 * (first + 0.5) / 8)} % of 8 answers" in text(browser, "counts")


def test_texts_of_a_model_are_shown_as_text(browser, folder):
    messages = [{"role": "user", "content": HOSTILE}, {"role": "<b>x</b>", "content": [{"type": HOSTILE}]}]
    texts = {"prompt": messages, "first": HOSTILE, "second": f"{HOSTILE} {HOSTILE}"}
    queue.ask(folder, [{"id": "2-0", "round": 2, "reward": 0.5} | texts])
    with serving(folder) as (_, address):
        browser.get_log("browser")
        open_page(browser, address)
        assert HOSTILE in text(browser, "prompt") and "<b>x</b>" in text(browser, "prompt")
        assert {text(browser, "left"), text(browser, "right")} == {HOSTILE, texts["second"]}
        tags = browser.execute_script("return [...document.querySelectorAll('#pair *')].map(x => x.tagName)")
        assert set(tags) == {"SECTION", "DIV", "H2", "SPAN", "CODE"}
        assert browser.execute_script("return window.hit") is None
        assert browser.get_log("browser") == []


def test_tabs_have_different_pairs_and_keep_them(browser, folder):
    with serving(folder) as (_, address):
        open_page(browser, address)
        first, left = text(browser, "prompt"), text(browser, "left")
        here = browser.current_window_handle
        browser.switch_to.new_window("tab")
        open_page(browser, address)
        second = text(browser, "prompt")
        browser.close()
        browser.switch_to.window(here)
        browser.refresh()
        until(browser, lambda: text(browser, "prompt"))
        assert (text(browser, "prompt"), text(browser, "left")) == (first, left) and second != first


def test_a_pair_that_somebody_else_has_answered_is_passed_over(browser, folder):
    with serving(folder) as (_, address):
        open_page(browser, address)
        queue.answer(folder, "1-0", 1, by="other", left="first")
        press(browser, "t")
        until(browser, lambda: text(browser, "prompt") == "prompt 1")
        assert "answered already" in text(browser, "status") and labels(folder) == [1]


def test_new_pairs_appear_by_themselves(browser, tmp_path):
    (tmp_path / queue.QUESTIONS).touch()
    with serving(tmp_path) as (_, address):
        browser.get(address)
        until(browser, lambda: browser.find_element(By.ID, "none").is_displayed())
        queue.ask(tmp_path, [{"id": "1-0", "round": 1, "prompt": "new", "first": "a", "second": "b", "reward": 0.5}])
        until(browser, lambda: text(browser, "prompt") == "new")


def test_a_server_that_is_killed_and_started_again_loses_nothing(browser, folder):
    with serving(folder) as (process, address):
        open_page(browser, address)
        press(browser, "t", Keys.ARROW_LEFT)
        process.kill()
        process.wait()
        press(browser, "t")
        assert text(browser, "alert").startswith("Not saved: the server does not answer.")
        assert text(browser, "prompt") == "prompt 2" and len(labels(folder)) == 2
    with serving(folder, port=address.rstrip("/").rpartition(":")[2]):
        press(browser, "t")
        assert text(browser, "alert") == "" and len(labels(folder)) == 3
        press(browser, "u", "u")
        assert len(labels(folder)) == 1


def test_an_answer_that_the_disk_has_no_room_for_stays_on_the_screen(browser, folder):
    queue.answer(folder, "1-0", 1, by="x" * 2000, left="first")
    with serving(folder, file_limit=2100) as (_, address):
        open_page(browser, address)
        press(browser, "t")
        assert text(browser, "alert").startswith("Not saved:") and "answers.jsonl" in text(browser, "alert")
        assert text(browser, "prompt") == "prompt 1" and len(labels(folder)) == 1


def test_it_fits_a_phone(browser, folder):
    metrics = {"width": 390, "height": 800, "deviceScaleFactor": 2, "mobile": True}
    queue.ask(
        folder, [{"id": "2-0", "round": 2, "prompt": "x" * 900, "first": "y " * 900, "second": "z", "reward": 0.5}]
    )
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        with serving(folder) as (_, address):
            open_page(browser, address)
            assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
            boxes = [button.rect for button in browser.find_elements(By.TAG_NAME, "button")]
            assert all(box["height"] >= 44 and box["x"] >= 0 and box["x"] + box["width"] <= 390 for box in boxes)
            bottom = browser.execute_script(
                "return [...document.querySelectorAll('button')].map(x => x.getBoundingClientRect().bottom)"
            )
            assert max(bottom) <= 800  # in view, however long the texts
            left, right = (browser.find_element(By.ID, id).rect for id in ("left", "right"))
            assert left["y"] + left["height"] <= right["y"]
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_screen_reader_finds_names_and_what_changes(browser, folder):
    with serving(folder) as (_, address):
        open_page(browser, address)
        elements = browser.find_elements(By.CSS_SELECTOR, "[tabindex='0'], button, input")
        named = {element.accessible_name: element.aria_role for element in elements}
        assert named == {
            "Your name": "textbox", "Prompt, round 1": "region", "Response A": "region", "Response B": "region",
            "A is better ←": "button", "Tie T": "button", "B is better →": "button", "Skip S": "button",
            "Undo U": "button",
        }  # fmt: skip
        assert [browser.find_element(By.ID, id).aria_role for id in ("status", "alert")] == ["status", "alert"]


@contextmanager
def training(config, *arguments):
    """`r2m train`; yields its process."""
    command = [sys.executable, "-m", "r2m.cli", "train", "--config", str(config), *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_person_labels_while_a_run_trains_is_killed_and_goes_on(browser, tmp_path, reward_checkpoint):
    config, folder = write_config(tmp_path, reward_checkpoint), tmp_path / "out"
    keys = ["rounds=5", "generation.eos_token_ids=[1]", "preferences.labeller=queue", "preferences.per_round=2"]
    keys += ["preferences.wait=100", *(f'evaluation.{key}=""' for key in ("judge", "prompts", "pairs"))]

    def answer(*choices):
        """A pair each, as they are asked about."""
        for choice in choices:
            until(browser, browser.find_element(By.ID, "pair").is_displayed, seconds=100)
            press(browser, choice)

    with training(config, *keys) as run:
        until(browser, lambda: queue.questions(folder) or run.poll(), seconds=100)
        assert run.poll() is None, run.stderr.read()
        with serving(folder) as (_, address):
            open_page(browser, address)
            answer(Keys.ARROW_LEFT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT, Keys.ARROW_RIGHT)
            until(browser, lambda: len(queue.questions(folder)) == 6, seconds=100)
            run.kill()
            run.wait()
            press(browser, "u")
            assert text(browser, "alert").startswith("Not taken back: the run has learned from your last answer")
            answer("t", Keys.ARROW_LEFT)  # while nobody trains
            with training(config, *keys, "--resume") as again:
                answer("s", Keys.ARROW_LEFT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT)
                _, said = again.communicate(timeout=100)
                assert again.returncode == 0, said
            until(browser, lambda: "the run has ended" in text(browser, "counts"))
            shown = text(browser, "counts")
    asked, rows = queue.questions(folder), read_metrics(folder)
    taken, _ = queue.read(folder / queue.LABELS)
    assert [row["id"] for row in taken] == list(asked) == [f"{t}-{i}" for t in range(1, 6) for i in range(2)]
    assert {row["id"]: row["label"] for row in taken} == queue.answers(folder)
    assert [row["labels/given"] for row in rows] == [2, 2, 2, 1, 2] and "round 5 of 5" in shown
    agreement = [row["labels/agreement_so_far"] for row in rows]
    assert len(set(agreement)) > 1 and f"agreed with {round(100 * agreement[-1])} % of 9 answers" in shown
