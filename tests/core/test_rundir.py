from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest

from kafjax.core import paths, rundir
from kafjax.core.config import Config, changed, option
from kafjax.core.errors import UserError
from kafjax.core.rundir import (
    append_jsonl,
    open_run,
    read_json,
    read_jsonl,
    write_atomic,
    write_json,
    write_jsonl,
)

SEPARATORS = "one\u2028two\u2029three\u0085four\x0bfive\r\nsix"


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def fail(name: str, number: int):
    def call(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    return name, call


@pytest.mark.parametrize(
    "failing",
    [fail("replace", errno.EACCES), fail("fsync", errno.ENOSPC)],
    ids=["no rename", "disk full"],
)
def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, failing):
    path = tmp_path / "results.json"
    write_atomic(path, "old")
    monkeypatch.setattr(os, *failing)
    with pytest.raises(
        UserError,
        match=rf"cannot write {re.escape(str(path))}: (Permission denied|No space left on device)",
    ):
        write_atomic(path, "new" * 10_000)
    assert path.read_text() == "old"
    assert files(tmp_path) == ["results.json"]


def test_an_interrupt_while_writing_leaves_no_temporary_file(tmp_path, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    write_atomic(tmp_path / "a", "old")
    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "a", "new")
    assert files(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "old"


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX file size limits")
def test_a_disk_that_takes_half_a_file(tmp_path):
    """A real write that fails midway: the process may write no more than 4 KiB into a file."""
    path = tmp_path / "a"
    write_atomic(path, "old")
    code = """
import resource, signal, sys
from pathlib import Path
from kafjax.core.errors import UserError
from kafjax.core.rundir import append_jsonl, write_atomic
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
path = Path(sys.argv[1])
for write in (lambda: write_atomic(path, "x" * 10_000), lambda: append_jsonl(path.with_name("log"), {"text": "x" * 10_000})):
    try:
        write()
    except UserError as error:
        print(error)
"""
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.splitlines() == [
        f"cannot write {path}: File too large",
        f"cannot write {tmp_path / 'log'}: File too large",
    ]
    assert path.read_text() == "old"
    assert files(tmp_path) == ["a", "log"]
    # What was cut short is not in the way of what comes next.
    append_jsonl(tmp_path / "log", {"step": 1})
    assert read_jsonl(tmp_path / "log") == [{"step": 1}]


def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path / "runs").write_text("not a folder")
    for write in (lambda path: write_atomic(path, ""), lambda path: append_jsonl(path, {})):
        with pytest.raises(UserError, match=r"cannot write .*runs/x/config\.json"):
            write(tmp_path / "runs" / "x" / "config.json")


def test_bytes_and_missing_folders_are_written(tmp_path):
    write_atomic(tmp_path / "a" / "b" / "c.bin", b"\x00\xff")
    assert (tmp_path / "a" / "b" / "c.bin").read_bytes() == b"\x00\xff"


def test_json_comes_back_and_stays_readable(tmp_path):
    value = {"b": [1, 2.5, None, True], "a": {"é": SEPARATORS, "emoji": "🦊"}}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert list(json.loads(text)) == ["b", "a"]
    assert "🦊" in text
    assert text.endswith("}\n")


def test_broken_json_is_named_by_file_and_line(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"a": 1,\n "b": }')
    with pytest.raises(UserError, match=rf"{re.escape(str(path))}:2: not valid JSON"):
        read_json(path)
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(
        UserError, match=rf"{re.escape(str(path))}: not valid JSON \(no UTF-8 text\)"
    ):
        read_json(path)


def test_jsonl_comes_back_with_line_separators_inside_strings(tmp_path):
    rows = [{"text": SEPARATORS}, {}, {"n": 1, "nested": {"text": [SEPARATORS]}}]
    write_jsonl(tmp_path / "whole.jsonl", rows)
    for row in rows:
        append_jsonl(tmp_path / "grown.jsonl", row)
    assert read_jsonl(tmp_path / "whole.jsonl") == read_jsonl(tmp_path / "grown.jsonl") == rows
    # Others write them unescaped, which JSON allows.
    (tmp_path / "theirs.jsonl").write_bytes(
        b'\n{"text": "a\xe2\x80\xa8b\xc2\x85c"}\r\n   \n{"n": 2}'
    )
    assert read_jsonl(tmp_path / "theirs.jsonl") == [{"text": "a\u2028b\u0085c"}, {"n": 2}]


def test_a_file_that_is_too_large_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(rundir, "MOST_JSON_BYTES", 10)
    (tmp_path / "x.json").write_text('{"a": 12345678}')
    with pytest.raises(UserError, match=r"x\.json is larger than the 0 MB"):
        read_json(tmp_path / "x.json")
    (tmp_path / "y.json").write_text('{"a": 1}')
    monkeypatch.setattr(rundir, "MOST_JSON_BYTES", 20_000_000_000)
    tracemalloc.start()
    assert read_json(tmp_path / "y.json") == {"a": 1}
    # and no memory is set aside for what might have been
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


@pytest.mark.parametrize(
    "tail",
    [b'{"step": 3, "lo', b'{"text": "\xe2\x80', b"{"],
    ids=["cut", "cut within a character", "one byte"],
)
def test_a_broken_tail_is_forgiven_only_when_asked(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\n{"step": 2}\n' + tail)
    assert read_jsonl(path, skip_broken_tail=True) == [{"step": 1}, {"step": 2}]
    with pytest.raises(UserError, match=rf"{re.escape(str(path))}:4: not valid JSON"):
        read_jsonl(path)
    # A resumed run goes on in the same file: what was cut short goes, what stood before stays.
    append_jsonl(path, {"step": 3})
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}, {"step": 3}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}\n{"a": \n{"a": 3}\n', r":2: not valid JSON"),
        ('{"a": 1}\n{"a": 2\n\n', r":2: not valid JSON"),
        ('{"a": 1}\n\n[1]\n{}\n', r":3: expected a JSON object, got list"),
        ("null", r":1: expected a JSON object, got NoneType"),
    ],
)
def test_a_broken_line_is_named_by_number_even_where_a_tail_is_forgiven(tmp_path, text, message):
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    for skip in (False, True):
        with pytest.raises(UserError, match=re.escape(str(path)) + message):
            read_jsonl(path, skip_broken_tail=skip)


@dataclasses.dataclass(frozen=True)
class Experiment(Config):
    model: str = option("gemma3-270m", "Model.")
    sizes: tuple[int, ...] = option((1, 2), "Sizes.")
    lr: float = option(1e-4, "Rate.")
    mesh: str = option("auto", "Devices.", identity=False)
    name: str | None = option(None, "Folder.", record=False)


CONFIG, ALSO = Experiment(), {"corpus_hash": "abc"}


def opened(root: Path, config: Experiment = CONFIG, name: str | None = "first", also: dict = ALSO):
    return open_run(root, name, config, prefix="x", also=also)


def test_a_run_is_opened_again_by_the_same_config_only(tmp_path):
    run = opened(tmp_path)
    run.log(step=1, loss=2.5)
    # says where and how, not what
    again = opened(tmp_path, changed(CONFIG, mesh="fsdp:8", name="first"))
    assert again == run
    again.log(step=2, loss=2.25)
    rows = read_jsonl(run.file("metrics.jsonl"))
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 2.5), (2, 2.25)]
    assert rows[0]["time"] <= rows[1]["time"]


@pytest.mark.parametrize(
    ("change", "also", "message"),
    [
        ({"lr": 2e-4}, ALSO, "lr=0.0001, not 0.0002"),
        ({"sizes": (1,)}, ALSO, r"sizes=\[1, 2\], not \[1\]"),
        ({}, {"corpus_hash": "other"}, "corpus_hash='abc', not 'other'"),
        ({}, {}, "corpus_hash='abc', not None"),
    ],
)
def test_another_config_is_refused_and_the_key_named(tmp_path, change, also, message):
    opened(tmp_path)
    with pytest.raises(
        UserError, match=f"{tmp_path / 'first'} holds a run with {message}; pick another --name"
    ):
        opened(tmp_path, changed(CONFIG, **change), also=also)
    expected = {"model": "gemma3-270m", "sizes": [1, 2], "lr": 1e-4, "mesh": "auto", **ALSO}
    assert read_json(tmp_path / "first" / "config.json") == expected


def test_a_run_without_a_name_finds_its_folder_again_whatever_an_older_release_called_it(tmp_path):
    run = opened(tmp_path, name=None)
    assert re.fullmatch(r"x-[0-9a-f]{12}", run.path.name)
    assert (
        opened(tmp_path, name=None) == run
        and opened(tmp_path, changed(CONFIG, lr=1.0), name=None) != run
    )
    older = run.path.rename(tmp_path / "x-0123456789ab")  # its hash was of other keys
    stored = read_json(older / "config.json")
    write_json(
        older / "config.json",
        {key: value for key, value in stored.items() if key not in ("mesh", "sizes")},
    )
    assert opened(tmp_path, name=None).path == older
    assert opened(tmp_path, changed(CONFIG, sizes=(3,)), name=None).path != older


@pytest.mark.parametrize(
    "name", ["", "..", "a" * 129, ".hidden", "a/b", "/etc", "a b", "a\n", "-x", "é"]
)
def test_a_name_that_is_no_plain_folder_name_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="not a plain folder name"):
        opened(tmp_path / "runs", name=name)
    assert files(tmp_path) == []


def test_the_environment_is_json_and_knows_this_interpreter(tmp_path, monkeypatch):
    environment = json.loads(json.dumps(rundir.environment()))
    assert environment["python"] == ".".join(map(str, sys.version_info[:3]))
    assert environment["packages"]["numpy"]
    monkeypatch.setenv("PATH", str(tmp_path))  # a machine without git
    assert rundir.environment()["git_sha"] is None


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "a number of thousands of digits"),
        ('{"a": NaN}', "NaN is no JSON number"),
        ('{"a": -Infinity}', "-Infinity is no JSON number"),
        (b"\xff\xfe{", "no UTF-8 text"),
        ("", "not valid JSON"),
    ],
)
def test_json_that_is_hostile_is_refused_in_one_line(tmp_path, content, told):
    path = tmp_path / "x.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=told):
        read_json(path)


def test_a_folder_or_a_missing_file_in_the_place_of_a_file_is_told(tmp_path):
    (tmp_path / "x.json").mkdir()
    for name, why in (("x.json", "Is a directory"), ("y.json", "No such file")):
        for read in (read_json, read_jsonl):
            with pytest.raises(UserError, match=f"cannot read .*{name}: {why}"):
                read(tmp_path / name)


@hypothesis.given(
    st.binary(max_size=200)
    | st.text('[]{}",:0123456789eE+-.NaNIinfty truefalsn\n', max_size=200).map(str.encode)
)
@hypothesis.settings(max_examples=300, derandomize=True, deadline=None)
def test_any_bytes_are_read_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(data)
    for read in (read_json, read_jsonl):
        try:
            read(path)
        except UserError as error:
            assert str(path) in str(error)


def test_what_is_no_number_is_null_in_a_log(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_jsonl(path, {"loss": float("nan"), "rates": [1.0, float("inf")], "name": "a\udcff"})
    assert b"NaN" not in path.read_bytes() and b"Infinity" not in path.read_bytes()
    assert read_jsonl(path)[0]["loss"] is None and read_jsonl(path)[0]["rates"] == [1.0, None]
    path.write_text('{"loss": NaN}\n')  # as older releases wrote
    assert read_jsonl(path) == [{"loss": None}]


def test_a_run_is_opened_by_one_process_at_a_time(tmp_path):
    run = opened(tmp_path)

    def other() -> str:
        command = [
            sys.executable,
            "-c",
            "import sys; from kafjax.core.lock import hold; hold(sys.argv[1])",
            str(run.path),
        ]
        return subprocess.run(
            command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60
        ).stderr

    assert f"first is being written by process {os.getpid()} on" in other()
    run.close()
    assert other() == ""
    assert files(tmp_path) == ["config.json", "first"]


def test_a_disk_that_takes_no_results_is_told_at_the_start(tmp_path, monkeypatch):
    def refuse(path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(paths, "write", refuse)
        with pytest.raises(UserError, match=r"cannot write .*first: No space left on device"):
            opened(tmp_path)
    usage = rundir.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(rundir.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(
        UserError, match=r"cannot write .*first: 0 MB are free on that disk, 1 MB are needed"
    ):
        opened(tmp_path)
    assert files(tmp_path) == ["first"]


@pytest.mark.skipif(
    not os.path.isdir("/proc"), reason="a folder that nobody may write to, even root"
)
def test_a_read_only_folder_is_told_at_the_start():
    with pytest.raises(UserError, match=r"cannot write /proc/first"):
        opened(Path("/proc"))


def test_a_name_that_is_no_utf_8_comes_back_as_it_was(tmp_path):
    value = {"corpus": os.fsdecode(b"caf\xe9")}
    write_json(tmp_path / "config.json", value)
    append_jsonl(tmp_path / "log.jsonl", value)
    assert read_json(tmp_path / "config.json") == read_jsonl(tmp_path / "log.jsonl")[0] == value
    assert b"caf\\udce9" in (tmp_path / "config.json").read_bytes()
