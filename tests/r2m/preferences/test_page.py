"""The page of `r2m label` without a browser: who gets which pair, what is written, who may ask."""

import json
import re
import socket
import statistics
import sys
import time

import pytest
from filelock import FileLock
from starlette.testclient import TestClient
from typer.testing import CliRunner

from r2m.cli import app
from r2m.commands.label import label
from r2m.preferences import queue
from r2m.preferences.page import pairs as pairs_module
from r2m.preferences.page.pairs import Pairs, Refused
from r2m.preferences.page.server import HEADERS, application

ADDRESS = "http://127.0.0.1:8765"


def question(round, number, reward=0.9, **texts):
    texts = {"prompt": f"prompt {round}-{number}", "first": "one", "second": "two"} | texts
    return {"id": f"{round}-{number}", "round": round, "reward": reward} | texts


@pytest.fixture
def folder(tmp_path):
    queue.ask(tmp_path, [question(1, 0), question(1, 1), question(2, 0), question(2, 1, reward=0.1)])
    (tmp_path / "metrics.jsonl").write_text('{"round": 1}\n{"round": 2}\n{"round": 3')
    return tmp_path


@pytest.fixture
def client(folder):
    return TestClient(application(Pairs(folder, 5)), base_url=ADDRESS)


def rows(folder):
    return [json.loads(line) for line in (folder / queue.ANSWERS).read_text().splitlines()]


def post(client, path, **fields):
    return client.post(f"/api/{path}", json={"holder": "tab", "by": "ann"} | fields)


# ---- which pair ----


def test_the_newest_round_comes_first_and_people_get_different_pairs(folder):
    pairs = Pairs(folder)
    assert [pairs.next(holder)["id"] for holder in ("a", "b", "c", "a", "b")] == ["2-0", "2-1", "1-0", "2-0", "2-1"]
    queue.ask(folder, [question(3, 0)])
    assert [pairs.next(holder)["id"] for holder in ("a", "d", "e")] == ["2-0", "3-0", "1-1"]
    assert pairs.next("f") is None


def test_a_pair_left_open_is_given_to_others_later_and_the_first_answer_counts(folder, monkeypatch):
    pairs = Pairs(folder)
    monkeypatch.setattr(pairs_module, "LEASE", 0)
    assert [pairs.next(holder)["id"] for holder in ("a", "b")] == ["2-0", "2-0"]
    pairs.answer("2-0", "tie", left="first", by="bob")
    with pytest.raises(Refused, match="answered already"):
        pairs.answer("2-0", "skip", left="first", by="ann")
    assert queue.answers(folder)["2-0"] == 0.5


def test_which_response_is_on_the_left_is_drawn_and_does_not_change(folder):
    first, second = Pairs(folder), Pairs(folder)  # the second: of a server that was started again
    shown = [first.next(f"tab {i}") for i in range(3)]
    assert shown == [second.next(f"tab {i}") for i in range(3)]
    assert all({pair["left"], pair["right"]} == {"one", "two"} and "reward" not in pair for pair in shown)
    assert {"one": "first", "two": "second"}[shown[0]["left"]] == shown[0]["left_is"]
    orders = [first._shown("1-0", f"tab {i}")["left_is"] for i in range(400)]
    assert 150 < orders.count("first") < 250


@pytest.mark.parametrize(
    ("choice", "left", "label"),
    [
        ("left", "first", 1),
        ("left", "second", 0),
        ("right", "first", 0),
        ("tie", "second", 0.5),
        ("skip", "first", None),
    ],
)
def test_an_answer_says_whether_the_first_is_better(client, folder, choice, left, label):
    assert post(client, "answer", id="2-0", choice=choice, left=left).json()["pair"]["id"] == "2-1"
    (row,) = rows(folder)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", row.pop("time"))
    assert row == {"id": "2-0", "label": label, "by": "ann", "left": left}


def test_counts(client, folder):
    for id, choice in (("2-0", "left"), ("2-1", "left"), ("1-0", "tie"), ("1-1", "skip")):
        state = post(client, "answer", id=id, choice=choice, left="first").json()
    assert state["pair"] is None
    counts = {"waiting": 0, "answered": 3, "agreed": 0.5, "round": 2, "rounds": 5}
    assert state["counts"] == client.get("/api/counts").json()["counts"] == counts


def test_a_name_takes_back_its_own_answers_one_after_another(client, folder):
    for id, by in (("2-0", "ann"), ("2-1", "ann"), ("1-0", "bob")):
        post(client, "answer", id=id, choice="left", left="first", by=by)
    assert [post(client, "undo").json()["pair"]["id"] for _ in range(2)] == ["2-1", "2-0"]
    assert post(client, "pair").json()["pair"]["id"] == "2-0"
    assert post(client, "pair", holder="other").json()["pair"]["id"] == "2-1"
    response = post(client, "undo")
    assert (response.status_code, response.json()["error"]) == (409, "there is no answer by ann to take back")
    assert list(queue.answers(folder)) == ["1-0"]


def test_what_the_run_has_taken_cannot_be_taken_back_and_does_not_wait(client, folder):
    post(client, "answer", id="2-0", choice="left", left="first")
    queue.append(folder / queue.LABELS, [{"id": "2-0", "label": 1}, {"id": "1-0", "label": None}, {"label": 1}])
    response = post(client, "undo")
    assert response.status_code == 409 and "has learned from your last answer" in response.json()["error"]
    assert client.get("/api/counts").json()["counts"]["waiting"] == 2
    assert post(client, "answer", id="1-0", choice="left", left="first").status_code == 409


def test_a_server_that_is_started_again_goes_on(folder):
    before, after = Pairs(folder), Pairs(folder)
    shown = before.next("tab")
    before.answer(shown["id"], "left", left="first", by="ann")
    assert after.next("tab")["id"] != shown["id"]
    assert after.undo("tab", by="ann") == shown


# ---- what goes wrong ----


def test_an_answer_that_cannot_be_written_is_an_error_and_the_pair_waits(client, folder, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        response = post(client, "answer", id="2-0", choice="left", left="first")
    assert response.status_code == 507 and "No space left" in response.json()["error"]
    assert post(client, "answer", id="2-0", choice="left", left="first").status_code == 200
    assert len(rows(folder)) == 1


def test_a_damaged_file_is_said_on_the_page(client, folder):
    with (folder / queue.ANSWERS).open("a") as stream:
        stream.write("{\n")
    response = post(client, "pair")
    assert response.status_code == 500 and "answers.jsonl, line 1" in response.json()["error"]


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"choice": "up"}, "choice is 'up'; expected left or right or tie or skip"),
        ({"left": None}, "left is None; expected first or second"),
        ({"by": ""}, "by is ''; expected a text of 1 to 100 characters"),
        ({"by": "x" * 101}, "expected a text of 1 to 100 characters"),
        ({"id": 3}, "id is 3; expected a text"),
    ],
)
def test_a_wrong_field_is_named(client, fields, error):
    response = post(client, "answer", **{"id": "2-0", "choice": "left", "left": "first"} | fields)
    assert response.status_code == 400 and error in response.json()["error"]


def test_a_pair_of_another_run_is_refused(client, folder):
    response = post(client, "answer", id="9-9", choice="left", left="first")
    assert response.status_code == 409 and "9-9 was never asked" in response.json()["error"]
    assert not (folder / queue.ANSWERS).exists()


# ---- who may ask ----


def test_every_response_forbids_foreign_scripts(client):
    for path in ("/", "/page.js", "/page.css", "/api/counts", "/missing"):
        assert HEADERS["Content-Security-Policy"] == client.get(path).headers["content-security-policy"], path


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"origin": ADDRESS}, 200),
        ({"host": "localhost:9000"}, 200),  # through a tunnel
        ({"host": "[::1]:8765"}, 200),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "http://127.0.0.1:9999"}, 403),
        ({"origin": "null"}, 403),
        ({"host": "evil.example:8765"}, 403),  # a name that was pointed here
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site", "sec-fetch-mode": "navigate"}, 403),  # a form
        ({"content-type": "text/plain"}, 415),
    ],
)
def test_requests_of_other_sites_are_refused(client, headers, status):
    headers = {"content-type": "application/json"} | headers
    assert client.post("/api/pair", content='{"holder": "tab"}', headers=headers).status_code == status


def test_a_link_to_the_page_may_be_followed(client):
    assert client.get("/", headers={"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}).status_code == 200


def test_bound_elsewhere_the_page_asks_for_the_token(folder):
    client = TestClient(application(Pairs(folder), token="secret"), base_url="http://box:8765")
    assert client.get("/").status_code == 401 and 'name="token"' in client.get("/").text
    assert post(client, "pair").status_code == 401
    assert client.get("/?token=wrong").status_code == 401
    assert client.get("/api/counts", headers={"authorization": "Bearer wrong"}).status_code == 401
    assert client.get("/api/counts", headers={"authorization": "Bearer secret"}).status_code == 200
    response = client.get("/?token=secret", follow_redirects=False)
    assert response.headers["location"] == "/" and "HttpOnly" in response.headers["set-cookie"]
    assert post(client, "pair").status_code == 200  # by the cookie
    assert post(client, "pair", holder="x").request.headers["cookie"].startswith("r2m_label_")
    assert client.post("/api/pair", json={"holder": "x"}, headers={"origin": "http://evil.example"}).status_code == 403


# ---- the command ----


def test_a_folder_of_no_run_or_of_one_that_asks_nobody_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no config\.yaml"):
        label(tmp_path)
    (tmp_path / "config.yaml").write_text("rounds: 3\n")
    with pytest.raises(ValueError, match=r"preferences\.labeller is None, so the run asks no person; expected 'queue'"):
        label(tmp_path)


def test_a_port_or_folder_that_is_in_use_is_an_error(folder):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="expected a free port"):
        label(folder, port=taken.getsockname()[1])
    with FileLock(folder / ".label.lock"), pytest.raises(OSError, match="another r2m label has this folder"):
        label(folder, port=0)


def test_without_its_extra_the_command_names_it(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "r2m.commands.label")
    result = CliRunner().invoke(app, ["label", str(folder)])
    assert result.exit_code == 1 and "pip install 'r2m-kernels[label]'" in result.stderr


def test_it_answers_fast_with_ten_thousand_pairs(tmp_path):
    text = "word " * 100
    queue.ask(tmp_path, [question(i // 12 + 1, i, first=text, second=text) for i in range(10_000)])
    client = TestClient(application(Pairs(tmp_path)), base_url=ADDRESS)
    seconds = []
    for i in range(20):
        shown = post(client, "pair", holder=f"tab {i % 4}").json()["pair"]
        start = time.perf_counter()
        post(client, "answer", holder=f"tab {i % 4}", id=shown["id"], choice="left", left="first")
        seconds.append(time.perf_counter() - start)
    print(f"an answer and the next pair of 10,000: {1000 * statistics.median(seconds):.0f} ms")
    assert statistics.median(seconds) < 0.1
