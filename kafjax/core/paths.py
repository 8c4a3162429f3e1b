"""Files of this machine and objects of buckets, by the few operations that all writers share.

    folder = as_path("gs://bucket/runs")      or s3://, or a folder of this machine
    write(folder / "a" / "config.json", b"{}")
    create(folder / "a" / "lease", b"mine")   True for one of all processes that try

A bucket has no rename that is atomic and no append, but an object appears whole or not at all, and
can be written on the condition that it is still the one that was read. So on a bucket

- `write` puts one object, and `create` and `swap` put it on a condition (Google's
  `ifGenerationMatch`, S3's `If-None-Match` and `If-Match`);
- rows that are appended wait in memory and are uploaded together (`append`, `flush`): every few
  seconds, before anything else is written, and when the process ends;
- of several objects, the one that makes an artifact complete is written last.

Addresses are paths of etils over fsspec (gcsfs, s3fs), whose cache of listings is off: other
machines write there. Folders do not exist there, and need not be made.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.util
import json
import logging
import os
import re
import shutil
import tempfile
import threading
import uuid
from collections.abc import Generator
from pathlib import Path
from typing import Any, cast

from kafjax.core.errors import UserError

FLUSH_SECONDS = 5.0
REACH_SECONDS = 20.0  # that a bucket has to answer at first
_PACKAGES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}


def as_path(text: Path | str) -> Path:
    """Returns the path of a folder or file. Of an address, tries first whether its bucket answers.

    Raises:
      UserError: another kind of address, a package that is not installed, or a bucket that does not
        answer or refuses.
    """
    if not is_address(text):
        return Path(text)
    scheme = str(text).partition("://")[0]
    if scheme not in _PACKAGES:
        raise UserError(
            f"'{str(text)[:100]}': {scheme}:// is not read or written here; gs://, s3:// and folders are"
        )
    package, extra = _PACKAGES[scheme]
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{scheme}:// needs {package}: pip install 'kafjax[{extra}]'")
    bucket = str(text).partition("://")[2].partition("/")[0]
    if not bucket:
        raise UserError(f"'{str(text)[:100]}' names no bucket")
    _reach(scheme, bucket)
    from etils import epath  # not needed, and not imported, for folders of this machine

    return cast(Path, epath.Path(str(text)))


def is_address(path: Path | str) -> bool:
    """True for an address such as `gs://bucket/runs`."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", str(path)) is not None


def refuse_address(path: Path | str, what: str) -> None:
    """Raises `UserError` for an address, where only a folder of this machine will do: `what` says
    why, and what to do."""
    first = Path(path).parts[:1]
    # pathlib makes `gs:/bucket` of an address that was not opened by `as_path`
    if is_address(path) or (first and len(first[0]) > 2 and first[0].endswith(":")):
        address = path if is_address(path) else str(path).replace(":/", "://", 1)
        raise UserError(f"'{address}' is an address: {what}")


def absolute(path: Path) -> Path:
    """Returns the path from the root; an address is one."""
    return path if is_address(path) else path.absolute()


def make_folder(path: Path) -> None:
    """Makes a folder and its parents; nothing in a bucket. Raises `OSError`."""
    if not is_address(path):
        path.mkdir(parents=True, exist_ok=True)


def temporary_beside(path: Path) -> Path:
    """Returns the name of a temporary file or folder beside `path`: hidden, and unique across
    processes, containers and hosts."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def write(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all. Raises `OSError`; the old file is then as it was."""
    if is_address(path):
        flush()
        with telling(path):
            _fs(path).pipe_file(str(path), data)
        return
    temporary = temporary_beside(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path) -> bytes:
    """Reads a file, with the rows of this process that wait. Raises `OSError`."""
    if not is_address(path):
        return path.read_bytes()
    _rows.flush(str(path))
    with telling(path):
        return cast(bytes, _fs(path).cat_file(str(path)))


def exists(path: Path) -> bool:
    """True if there is a file or folder. Raises `OSError` where that cannot be known."""
    with telling(path):
        return path.exists()


def size(path: Path) -> int:
    """Returns the bytes of a file. Raises `OSError`."""
    if not is_address(path):
        return path.stat().st_size
    _rows.flush(str(path))
    with telling(path):
        return int(_fs(path).info(str(path))["size"])


def create(path: Path, data: bytes) -> bool:
    """Makes a file that is not there. False if it is: of many processes that try, one makes it.

    Raises `OSError`.
    """
    if is_address(path):
        return swap(path, None, data)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return False
    with open(fd, "wb") as file:
        file.write(data)
    return True


def version(path: Path) -> str | None:
    """Returns what `swap` knows an object by; None if there is none. Raises `OSError`."""
    try:
        with telling(path):
            found = _fs(path).info(str(path))
    except FileNotFoundError:
        return None
    return str(found["generation"] if str(path).startswith("gs:") else found["ETag"])


def swap(path: Path, expected: str | None, data: bytes) -> bool:
    """Replaces the object of a bucket that has the version `expected`, or makes one that is not
    there. False if another process was faster. Raises `OSError`."""
    bucket, _, key = str(path).partition("://")[2].partition("/")
    fs = _fs(path)
    with telling(path):
        try:
            if str(path).startswith("gs:"):
                body, kind = _multipart(key, data)
                fs.call(
                    "POST",
                    f"{fs._location}/upload/storage/v1/b/{bucket}/o",
                    uploadType="multipart",
                    ifGenerationMatch=expected or "0",
                    headers={"Content-Type": kind},
                    data=body,
                )
            else:
                condition = {"IfNoneMatch": "*"} if expected is None else {"IfMatch": expected}
                fs.call_s3("put_object", Bucket=bucket, Key=key, Body=data, **condition)
        except Exception as error:
            gone = expected is not None and isinstance(error, FileNotFoundError)
            if gone or _is_unmet(error):
                return False
            raise
    return True


def delete(path: Path) -> None:
    """Deletes a file, or a folder with what is in it; nothing if there is none. Raises `OSError`
    for what cannot be deleted in a bucket."""
    if not is_address(path):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        return
    fs = _fs(path)
    with telling(path), contextlib.suppress(FileNotFoundError):
        fs.rm(str(path), recursive=True)


def move(folder: Path, target: Path) -> None:
    """Gives a folder another name, beside it or not; in a bucket, object by object. Raises
    `OSError`."""
    if not is_address(folder):
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(target)
        return
    names = files_under(folder)
    with telling(folder):
        for name in sorted(names):
            _fs(folder).cp_file(f"{folder}/{name}", f"{target}/{name}")
    delete(folder)


def upload(file: Path, path: Path) -> None:
    """Copies a file of this machine to `path`. Raises `OSError`."""
    with telling(path):
        _fs(path).put_file(str(file), str(path))


def download(path: Path, file: Path) -> None:
    """Copies an object to a file of this machine. Raises `OSError`."""
    with telling(path):
        _fs(path).get_file(str(path), str(file))


def files_under(path: Path) -> set[str]:
    """Lists the names of all objects below the folder `path` of a bucket, from there on. Raises
    `OSError`."""
    with telling(path):
        found = _fs(path).find(str(path))
    below = f"{str(path).partition('://')[2]}/"
    return {name.removeprefix(below) for name in found if name.startswith(below)}


@contextlib.contextmanager
def local(path: Path) -> Generator[Path]:
    """Yields a file of this machine: the one at `path`, or a copy that is deleted afterwards.

    Raises `OSError`.
    """
    if not is_address(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="kafjax-") as folder:
        copy = Path(folder) / path.name
        download(path, copy)
        yield copy


def append(path: Path, line: bytes) -> None:
    """Adds a line to an object. It waits in memory until `flush`, or for `FLUSH_SECONDS`."""
    _rows.append(path, line)


def flush() -> None:
    """Uploads the lines that wait. Raises `OSError`."""
    _rows.flush()


@contextlib.contextmanager
def telling(path: Path) -> Generator[None]:
    """Raises as `OSError` whatever the clients of buckets raise, in one line."""
    try:
        yield
    except (OSError, UserError):
        raise
    except Exception as error:
        raise OSError(_reason(error)) from error


def _fs(path: Path) -> Any:
    return _filesystem(str(path).partition("://")[0])


@functools.cache
def _filesystem(scheme: str) -> Any:
    # etils looks for TensorFlow's own reader otherwise
    os.environ["EPATH_USE_TF"] = "false"
    import fsspec.config

    names = {"gs": ("gs", "gcs"), "s3": ("s3",)}[scheme]
    for name in names:
        fsspec.config.conf.setdefault(name, {}).setdefault("use_listings_cache", False)
    # they log each try; what fails in the end is told by whoever asked
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    from etils.epath import backend

    return backend.fsspec_backend.fs(f"{scheme}://bucket")


@functools.cache
def _reach(scheme: str, bucket: str) -> None:
    """Asks a bucket for one name, in a thread, since clients go on trying for minutes."""
    outcome: list[Exception | None] = []

    def ask() -> None:
        try:
            fs = _filesystem(scheme)
            if scheme == "gs":
                fs.call("GET", "b/{}/o", bucket, maxResults=1, json_out=True)
            else:
                fs.call_s3("list_objects_v2", Bucket=bucket, MaxKeys=1)
            outcome.append(None)
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(REACH_SECONDS)
    log_in = {
        "gs": "gcloud auth application-default login",
        "s3": "aws configure, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    }[scheme]
    if not outcome:
        raise UserError(
            f"{scheme}://{bucket} does not answer within {REACH_SECONDS:g} s; "
            f"look at the network, and if credentials are missing: {log_in}"
        )
    if outcome[0] is not None:
        raise UserError(
            f"cannot open {scheme}://{bucket} ({_reason(outcome[0])}); "
            f"if credentials are missing: {log_in}"
        )


def _multipart(key: str, data: bytes) -> tuple[bytes, str]:
    """Returns the body of an upload with its object's name, and its content type."""
    mark = uuid.uuid4().hex
    parts = (
        ("application/json; charset=UTF-8", json.dumps({"name": key}).encode()),
        ("application/octet-stream", data),
    )
    body = b"".join(
        f"--{mark}\r\nContent-Type: {kind}\r\n\r\n".encode() + part + b"\r\n"
        for kind, part in parts
    )
    return body + f"--{mark}--".encode(), f'multipart/related; boundary="{mark}"'


def _is_unmet(error: BaseException) -> bool:
    """True for the answer to a condition that does not hold."""
    if isinstance(error, FileExistsError):
        return True
    told = [error, error.__cause__]
    codes = {str(getattr(one, "code", "")) for one in told}
    codes |= {
        str(getattr(one, "response", {}).get("Error", {}).get("Code", ""))
        for one in told
        if isinstance(getattr(one, "response", None), dict)
    }
    unmet = {"412", "409", "PreconditionFailed", "ConditionalRequestConflict"}
    return bool(codes & unmet) or "PreconditionFailed" in str(error) or "412" in str(error)[:40]


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


class _Rows:
    """Objects that this process appends to: what they hold, and whether that is uploaded."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._guard, self._uploading = threading.Lock(), threading.Lock()
        self._held: dict[str, bytearray] = {}
        self._waiting: set[str] = set()
        self._thread: threading.Thread | None = None

    def append(self, path: Path, line: bytes) -> None:
        if str(path) not in self._held:  # one thread of one process appends to an object
            self._held[str(path)] = bytearray(_whole_lines(path))
        with self._guard:
            self._held[str(path)] += line
            self._waiting.add(str(path))
            if self._thread is None:
                self._thread = threading.Thread(target=self._keep_uploading, daemon=True)
                self._thread.start()
                atexit.register(self._at_exit)

    def flush(self, only: str | None = None) -> None:
        with self._uploading:  # a row may be added meanwhile, but no older upload ends last
            with self._guard:
                names = self._waiting if only is None else self._waiting & {only}
                contents = {name: bytes(self._held[name]) for name in sorted(names)}
                self._waiting -= names
            for name, content in contents.items():
                path = as_path(name)
                try:
                    with telling(path):
                        _fs(path).pipe_file(name, content)
                except OSError:
                    with self._guard:
                        self._waiting |= contents.keys()
                    raise

    def forget(self, folder: Path) -> None:
        """Drops what is held of a folder that this process writes no more."""
        self.flush()
        with self._guard:
            for name in [name for name in self._held if name.startswith(f"{folder}/")]:
                del self._held[name]

    def _keep_uploading(self) -> None:
        while not self._ended.wait(FLUSH_SECONDS):
            with contextlib.suppress(OSError):  # told of by the next writer that waits for it
                self.flush()

    def _at_exit(self) -> None:
        with contextlib.suppress(OSError):
            self.flush()


def forget(folder: Path) -> None:
    """Uploads what waits, and holds the rows of `folder` no more: others may write there now."""
    _rows.forget(folder)


def _whole_lines(path: Path) -> bytes:
    try:
        data = read(path)
    except FileNotFoundError:
        return b""
    return data[: data.rfind(b"\n") + 1]


_rows = _Rows()
