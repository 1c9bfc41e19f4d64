"""A large file from the web: with progress, going on where an interrupted download stopped, checked."""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from email.message import Message
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

from dopr_lightning.errors import UserError

log = logging.getLogger(__name__)

_CHUNK = 1 << 20
_TIMEOUT = 60.0  # seconds without a byte


def download(
    url: str,
    target: Path,
    sha256: str | None = None,
    progress: Callable[[int, int | None], None] | None = None,
    otherwise: str = "",
) -> str:
    """Fetch a file; it appears under its name when it is complete and sound.

    What an interrupted call has fetched stays beside the target, in a file named after it and the URL, and the next
    call asks the server for the rest. Of calls at the same time, also in other processes, one fetches, and the others
    wait for what it gets.

    Args:
        url: Where from.
        target: The file. What was there stays until then.
        sha256: What it must be. Where none is known, what the server announces in ``X-Linked-ETag``, as the Hugging
            Face hub does for large files.
        progress: Called with bytes so far and in all, the latter ``None`` if the server does not say.
        otherwise: What else can be done, for errors; by default to put the file there oneself.

    Returns:
        The file's SHA-256.

    Raises:
        UserError: The download failed; running it again goes on. Or the file is not what it must be; then what was
            fetched is gone.
    """
    otherwise = otherwise or f"put the file there yourself: {target}"
    target.parent.mkdir(parents=True, exist_ok=True)
    # Another file's beginning must not be taken for this one's.
    partial = target.with_name(f"{target.name}.{hashlib.sha256(url.encode()).hexdigest()[:8]}.partial")
    with _alone(partial, target) as fetched_elsewhere:
        if fetched_elsewhere:
            return file_sha256(target)
        try:
            announced = _fetch(url, partial, progress)
        # URLError, a timeout, a connection reset, a full disk; an answer that breaks off, or is not HTTP's.
        except (OSError, http.client.HTTPException) as error:
            have = _size(partial)
            kept = f", {have / 1e6:.0f} MB are kept" if have else ""
            reason = error if isinstance(error, OSError) else repr(error)  # whose text is the server's, lines and all
            raise UserError(
                f"the download of {url} failed ({reason}){kept}; run it again to go on, or {otherwise}"
            ) from error
        found = file_sha256(partial)
        expected = sha256 or announced
        if expected is not None and found != expected:
            partial.unlink()
            raise UserError(f"{url} gave a file with SHA-256 {found}, not {expected}; run it again, or {otherwise}")
        os.replace(partial, target)
        return found


@contextmanager
def _alone(partial: Path, target: Path) -> Iterator[bool]:
    """Keep other calls from ``partial``; yields whether one put ``target`` in place while this one waited for it."""
    before = _stamp(target)
    lock = FileLock(partial.with_suffix(".lock"))
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        log.warning("%s is being downloaded already; waiting for that", target)
        held = lock.acquire()
    with held:
        try:
            yield _stamp(target) not in (None, before)
        finally:
            with suppress(OSError):  # Windows removes nothing that is open
                Path(lock.lock_file).unlink()  # who waits for it then waits for the next one's


def _stamp(path: Path) -> tuple[int, int] | None:
    """What another file in its place would have otherwise."""
    if not path.exists():
        return None
    there = path.stat()
    return there.st_ino, there.st_mtime_ns


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def file_sha256(path: Path) -> str:
    """The digest of a file, by which checkpoints know what they were trained on."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch(url: str, partial: Path, progress: Callable[[int, int | None], None] | None) -> str | None:
    """Append to ``partial`` what it lacks; the SHA-256 that the server announces."""
    redirects = _Redirects()
    have = _size(partial)
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.build_opener(redirects).open(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have == _length(error.headers):  # nothing is left to fetch
            return redirects.sha256
        if error.code == 416 and have:  # too much to be a beginning of the file
            partial.unlink()
            return _fetch(url, partial, progress)
        raise
    with response:
        resumed = response.status == 206
        total = _length(response.headers)
        have = have if resumed else 0
        with partial.open("ab" if resumed else "wb") as file:
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                have += len(chunk)
                if progress is not None:
                    progress(have, total)
        if total is not None and have < total:
            raise OSError(f"the connection ended after {have} of {total} bytes")
        return redirects.sha256 or _sha256(response.headers)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, and keeps the digest announced on the way."""

    sha256: str | None = None

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> urllib.request.Request | None:
        self.sha256 = _sha256(headers) or self.sha256
        return super().redirect_request(req, fp, code, msg, headers, newurl)  # type: ignore[arg-type]


def _sha256(headers: Message) -> str | None:
    found = re.fullmatch(r'"?([0-9a-f]{64})"?', headers.get("X-Linked-ETag", ""))
    return found[1] if found else None


def _length(headers: Message) -> int | None:
    """Of the whole file, also where a part of it was asked for."""
    whole = re.fullmatch(r"bytes .*/(\d+)", headers.get("Content-Range", ""))
    if whole:
        return int(whole[1])
    length = headers.get("Content-Length")
    return None if length is None else int(length)
