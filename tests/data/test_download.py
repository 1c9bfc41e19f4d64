"""Against a server on this machine that cuts connections, redirects, and lies."""

from __future__ import annotations

import hashlib
import http.server
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from robomimic_file import LENGTHS, write

from dopr_lightning.cli import main
from dopr_lightning.data.download import download
from dopr_lightning.data.robomimic import Robomimic, published
from dopr_lightning.errors import UserError

CONTENT = bytes(range(256)) * 20_000  # 5 MB
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server:
    """What it serves, and how."""

    def __init__(self) -> None:
        self.content = CONTENT
        self.status = 200
        self.cut_after: int | None = None  # bytes of the next answer
        self.ranges = True
        self.raw: bytes | None = None  # in place of any answer
        self.announced: str | None = None  # SHA-256, said while redirecting, as the Hugging Face hub does
        self.asked: list[tuple[str, str | None]] = []
        self.url = ""


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.asked.append((self.path, self.headers["Range"]))
            if state.announced is not None and self.path == "/file.hdf5":
                self.send_response(302)
                self.send_header("X-Linked-ETag", f'"{state.announced}"')
                self.send_header("Location", "/elsewhere")
                self.end_headers()
                return
            if state.raw is not None:
                self.wfile.write(state.raw)
                return
            if state.status != 200:
                self.send_error(state.status)
                return
            start, whole = 0, len(state.content)
            if state.ranges and self.headers["Range"]:
                start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1])
                self.send_response(416 if start >= whole else 206)
                self.send_header("Content-Range", f"bytes {'*' if start >= whole else start}/{whole}")
            else:
                self.send_response(200)
            body = state.content[start:]
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            cut, state.cut_after = state.cut_after, None
            self.wfile.write(body[:cut])

        def log_message(self, format: str, *args: Any) -> None:
            """Keep the test's output clean."""

    serving = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    state.url = f"http://127.0.0.1:{serving.server_port}/file.hdf5"
    yield state
    serving.shutdown()
    serving.server_close()


def test_the_whole_file(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "new" / "file.hdf5"
    moves: list[tuple[int, int | None]] = []
    assert download(server.url, target, SHA256, lambda *move: moves.append(move)) == SHA256
    assert target.read_bytes() == CONTENT
    assert moves[-1] == (len(CONTENT), len(CONTENT))
    assert [one for one, _ in moves] == sorted(one for one, _ in moves)
    assert list(target.parent.iterdir()) == [target]


def test_an_interrupted_download_goes_on(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "file.hdf5"
    target.write_bytes(b"what was there")
    server.cut_after = 2_000_000
    with pytest.raises(UserError, match=r"ended after 2000000 of 5120000 bytes.*2 MB are kept; run it again to go on"):
        download(server.url, target)
    assert target.read_bytes() == b"what was there"
    moves: list[tuple[int, int | None]] = []
    download(server.url, target, SHA256, lambda *move: moves.append(move))
    assert server.asked[-1] == ("/file.hdf5", "bytes=2000000-")
    assert moves[0][0] > 2_000_000
    assert moves[-1] == (len(CONTENT), len(CONTENT))
    assert target.read_bytes() == CONTENT
    assert list(tmp_path.iterdir()) == [target]


def test_two_at_once_do_not_write_into_one_file(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "file.hdf5"
    begun, other_done = threading.Event(), threading.Event()

    def dawdle(*_: Any) -> None:
        """Long enough for another call to end, did it not wait for this one."""
        if not begun.is_set():
            begun.set()
            other_done.wait(1)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(download, server.url, target, SHA256, dawdle)
        assert begun.wait(30)
        other = pool.submit(download, server.url, target, SHA256)
        other.add_done_callback(lambda _: other_done.set())
        assert [first.result(), other.result()] == [SHA256, SHA256]
    assert target.read_bytes() == CONTENT
    assert list(tmp_path.iterdir()) == [target]
    assert len(server.asked) == 1


def test_who_waits_for_a_download_that_fails_goes_on_with_it(server: Server, tmp_path: Path) -> None:
    server.cut_after = 2_000_000
    begun = threading.Event()

    def dawdle(*_: Any) -> None:
        if not begun.is_set():
            begun.set()
            time.sleep(0.3)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(download, server.url, tmp_path / "file.hdf5", SHA256, dawdle)
        assert begun.wait(30)
        other = pool.submit(download, server.url, tmp_path / "file.hdf5", SHA256)
        with pytest.raises(UserError, match="2 MB are kept"):
            first.result()
        assert other.result() == SHA256
    assert server.asked == [("/file.hdf5", None), ("/file.hdf5", "bytes=2000000-")]


def test_a_server_that_cannot_go_on_starts_again(server: Server, tmp_path: Path) -> None:
    server.ranges, server.cut_after = False, 1000
    with pytest.raises(UserError, match="run it again"):
        download(server.url, tmp_path / "file.hdf5")
    assert download(server.url, tmp_path / "file.hdf5") == SHA256
    assert (tmp_path / "file.hdf5").read_bytes() == CONTENT


def test_an_interruption_after_the_last_byte(server: Server, tmp_path: Path) -> None:
    """Everything is there, but for being put in place."""
    server.content = CONTENT[:1000]
    server.cut_after = 999
    with pytest.raises(UserError, match="ended after 999 of 1000"):
        download(server.url, tmp_path / "file.hdf5")
    (partial,) = tmp_path.glob("*.partial")
    partial.write_bytes(CONTENT[:1000])
    download(server.url, tmp_path / "file.hdf5")
    assert (tmp_path / "file.hdf5").read_bytes() == CONTENT[:1000]


def test_what_is_more_than_the_file_is_no_beginning_of_it(server: Server, tmp_path: Path) -> None:
    """The file was replaced by a shorter one."""
    server.cut_after = 2000
    with pytest.raises(UserError, match="run it again"):
        download(server.url, tmp_path / "file.hdf5")
    server.content = CONTENT[1:1000]
    download(server.url, tmp_path / "file.hdf5")
    assert [range for _, range in server.asked] == [None, "bytes=2000-", None]
    assert (tmp_path / "file.hdf5").read_bytes() == CONTENT[1:1000]


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"


@pytest.mark.parametrize(("raw", "said"), [(b"nonsense\r\n\r\n", "BadStatusLine"), (CHUNKED, "IncompleteRead")])
def test_an_answer_that_is_not_http(raw: bytes, said: str, server: Server, tmp_path: Path) -> None:
    server.raw = raw
    with pytest.raises(UserError, match=rf"failed \({said}.*run it again to go on") as caught:
        download(server.url, tmp_path / "file.hdf5")
    assert "\n" not in str(caught.value)


def test_the_beginning_of_another_file_is_not_gone_on_with(server: Server, tmp_path: Path) -> None:
    server.cut_after = 1000
    with pytest.raises(UserError):
        download(server.url + "?other", tmp_path / "file.hdf5")
    download(server.url, tmp_path / "file.hdf5", SHA256)
    assert server.asked[-1] == ("/file.hdf5", None)


@pytest.mark.parametrize("announced", [False, True])
def test_a_wrong_file_is_thrown_away(server: Server, tmp_path: Path, announced: bool) -> None:
    target = tmp_path / "file.hdf5"
    target.write_bytes(b"what was there")
    server.content = CONTENT[::-1]
    server.announced = SHA256 if announced else None
    with pytest.raises(UserError, match=f"not {SHA256}"):
        download(server.url, target, None if announced else SHA256)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"what was there"]


def test_an_announced_digest_that_fits(server: Server, tmp_path: Path) -> None:
    """Kept over a redirect, as is the range."""
    server.announced, server.cut_after = SHA256, 1000
    for _ in range(2):
        try:
            download(server.url, tmp_path / "file.hdf5")
        except UserError:
            continue
    assert server.asked[-1] == ("/elsewhere", "bytes=1000-")
    assert (tmp_path / "file.hdf5").read_bytes() == CONTENT


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/file.hdf5", None])
def test_no_file_and_no_server(server: Server, tmp_path: Path, url: str | None) -> None:
    server.status = 404
    with pytest.raises(UserError, match="refused" if url else "404") as caught:
        download(url or server.url, tmp_path / "file.hdf5")
    assert (url or server.url) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_robomimic_from_the_command_line(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Into the place where the source looks; a page in place of a file goes nowhere."""
    monkeypatch.setenv("DOPR_HOME", str(tmp_path / "home"))
    asked = published.URL.partition("/v1.5/")[2]
    assert asked == "{task}/{dataset_type}/low_dim_v15.hdf5"
    monkeypatch.setattr(published, "URL", f"{server.url}?{asked}")
    arguments = ["demos", "robomimic", "--task", "square", "--type", "mh"]

    server.content = b"<html>sign in</html>"
    assert main(arguments) == 2
    assert "low_dim_v15.hdf5: damaged, or not HDF5" in capsys.readouterr().err
    with pytest.raises(UserError, match="no such file"):
        Robomimic(task="square", dataset_type="mh").load()

    server.content = write(tmp_path / "served.hdf5").read_bytes()
    assert main(arguments) == 0
    assert server.asked[-1][0] == "/file.hdf5?square/mh/low_dim_v15.hdf5"
    out, err = capsys.readouterr()
    assert out.startswith(f"square mh low_dim: {len(LENGTHS)} demonstrations, in {tmp_path / 'home'}")
    assert "square mh low_dim ━" in err
    assert Robomimic(task="square", dataset_type="mh").load().num_episodes == len(LENGTHS)

    for wrong, words in (("tool_hang", "no 'mh' demonstrations of task 'tool_hang'"), ("door", "task 'door'")):
        assert main(["demos", "robomimic", "--task", wrong, "--type", "mh"]) == 2
        assert words in capsys.readouterr().err
    assert main(["demos", "robomimic", "--task", "lift", "--type", "scripted"]) == 2
    assert "run: dopr demos lift --scripted 50" in capsys.readouterr().err
