"""What a calibration keeps on disk: values made once, whatever stopped the run before."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import resource
import subprocess
import sys
import zlib
from contextlib import contextmanager

import pytest

from engine.calibrate.state import CalibrationState

SETTINGS = {"fingerprint": "f00", "prompts": "beef", "trace_tokens": 128}
VALUES = {
    "trace chat 1": {"token_ids": (5, 6, 257), "feature": [0.1, -1e-30, 1 / 3]},
    "flags chat": ["0110", "", "Ω\u2028\x85\n"],  # splitlines would cut a text at these
    "passes": ((1, 1.0), (5, 1.25)),
    "nothing": None,
}
READ_BACK = {
    "trace chat 1": {"token_ids": [5, 6, 257], "feature": [0.1, -1e-30, 1 / 3]},
    "flags chat": ["0110", "", "Ω\u2028\x85\n"],
    "passes": [[1, 1.0], [5, 1.25]],
    "nothing": None,
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "library.calibration"


@pytest.fixture(autouse=True)
def synced(monkeypatch):
    """Waiting for the disk takes milliseconds a value: only noted, by the size of the file."""
    sizes = []
    monkeypatch.setattr(os, "fsync", lambda file: sizes.append(os.fstat(file).st_size))
    return sizes


def never():
    raise AssertionError("made again")


def fill(state, values=None):
    """All values by name, and the names of those that had to be made."""
    made = []

    def make(name, value):
        made.append(name)
        return value

    got = {
        name: state.get(name, lambda name=name, value=value: make(name, value))
        for name, value in (values or VALUES).items()
    }
    return got, made


def written(path):
    """The bytes of a state that holds VALUES."""
    state = CalibrationState(path, SETTINGS)
    fill(state)
    state.close()
    return path.read_bytes()


def record(text):
    """A line as the state writes it."""
    return b"%08x %s\n" % (zlib.crc32(text), text)


def refused(path, settings=None):
    """The one line in which a state is refused."""
    with pytest.raises(ValueError) as caught:
        CalibrationState(path, settings or SETTINGS)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message


@contextmanager
def largest_file(size):
    """A disk that is full at `size` bytes of a file: a write is cut there, the next one fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_value_is_made_once(path):
    state = CalibrationState(path, SETTINGS)
    assert state.num_values == 0 and state.path == path
    _, made = fill(state)
    assert made == list(VALUES) and state.num_values == len(VALUES)
    for name in VALUES:
        state.get(name, never)
    state.close()
    again = CalibrationState(path, SETTINGS)
    assert again.num_values == len(VALUES)
    for name in VALUES:
        again.get(name, never)


def test_the_first_read_is_equal_to_all_later_ones(path):
    """A resumed run sees lists where tuples were written, so a first run must see them as well."""
    state = CalibrationState(path, SETTINGS)
    for _ in range(2):
        got, _ = fill(state)
        assert got == READ_BACK
        assert type(got["passes"]) is list and type(got["passes"][0]) is list
    state.close()
    got, made = fill(CalibrationState(path, SETTINGS))
    assert got == READ_BACK and made == []


def test_floats_keep_every_bit(path):
    numbers = [0.1 + 0.2, 5e-324, -0.0, 1e308, math.pi, math.inf]
    for _ in range(2):
        state = CalibrationState(path, SETTINGS)
        got = state.get("numbers", lambda: numbers)
        assert list(map(float.hex, got)) == list(map(float.hex, numbers))
        state.close()


def test_a_value_is_on_disk_before_the_next_one_is_made(path, synced):
    """A run that is killed, and never closes its file, has lost nothing that it knew."""
    state = CalibrationState(path, SETTINGS)

    def on_disk():
        return [json.loads(line[9:]).get("name") for line in path.read_bytes().splitlines()]

    state.get("a", lambda: 1)
    assert state.get("b", on_disk) == [None, "a"]
    assert on_disk() == [None, "a", "b"]
    data = path.read_bytes()
    assert synced == [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]


def test_what_fails_while_it_is_made_leaves_no_value(path):
    state = CalibrationState(path, SETTINGS)
    before = path.read_bytes()

    def stopped():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        state.get("a", stopped)
    assert path.read_bytes() == before and state.num_values == 0
    assert state.get("a", lambda: 1) == 1


def test_a_run_cut_at_any_byte_goes_on_with_the_whole_lines(path):
    data = written(path)
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        state = CalibrationState(path, SETTINGS)
        num_whole = max(data[:cut].count(b"\n") - 1, 0)  # the first line holds the settings
        assert state.num_values == num_whole, cut
        got, made = fill(state)
        state.close()
        assert got == READ_BACK and made == list(VALUES)[num_whole:], cut
        assert path.read_bytes() == data, cut


def test_what_is_left_of_a_cut_line_is_gone_at_once(path):
    """The next value may be shorter, or a second cut may come before it is written."""
    data = written(path)
    path.write_bytes(data + b'{"name": "long", "value": "' + b"x" * 200)
    state = CalibrationState(path, SETTINGS)
    assert path.read_bytes() == data
    state.get("short", lambda: 1)
    assert path.read_bytes() == data + record(b'{"name": "short", "value": 1}')


def test_other_settings_are_refused_by_name(path):
    data = written(path)
    for name in SETTINGS:
        message = refused(path, SETTINGS | {name: "other"})
        assert f"with another {name};" in message and "delete the file" in message
    both = refused(path, SETTINGS | {"trace_tokens": 64, "prompts": "x"})
    assert "with another prompts, trace_tokens;" in both
    # One setting more or less is a difference as well.
    assert "another device;" in refused(path, SETTINGS | {"device": "cpu"})
    assert "another prompts;" in refused(path, {"fingerprint": "f00", "trace_tokens": 128})
    assert path.read_bytes() == data


def test_settings_are_compared_as_they_are_read(path):
    for _ in range(2):
        CalibrationState(path, {"domains": ("a", "b")}).close()
    assert "another domains" in refused(path, {"domains": ("b", "a")})


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{",
        b"[1]",
        b"7",
        b'"text"',
        b"\xff",
        b'{"name": "a"}',
        b'{"value": 1}',
        b'{"name": ["a"], "value": 1}',
        b'{"set": {}}',
        b"[" * 100_000,
    ],
    ids=lambda line: line[:20],
)
@pytest.mark.parametrize("at", [0, 1, 2, 4])
def test_a_line_that_is_no_record_is_refused_by_its_number(path, line, at):
    lines = written(path).splitlines()
    lines[at] = line
    data = b"\n".join(lines) + b"\n"
    path.write_bytes(data)
    assert f"line {at + 1} is not of a calibration" in refused(path)
    assert path.read_bytes() == data


@pytest.mark.parametrize("is_whole", [True, False], ids=["bare", "with a checksum"])
def test_what_is_no_record_is_refused_with_a_right_checksum_too(path, is_whole):
    for text in (b"", b"{", b"[1]", b'{"name": "a"}', b"[" * 100_000):
        path.write_bytes(written(path) + (text + b"\n" if is_whole else record(text)))
        assert "is not of a calibration" in refused(path)
        path.unlink()


def test_a_changed_byte_is_noticed(path):
    """A text where a number was, or another number: nobody can tell later."""
    data = written(path)
    for old, new in ((b"1.25", b'"25"'), (b"1.25", b"7.25"), (b'"0110"', b'"0100"'), (b"5", b"x")):
        assert old in data
        path.write_bytes(data.replace(old, new))
        assert "damaged; delete the file" in refused(path)
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        if at < len(data) - 1:  # the last newline: a line that was cut
            refused(path)


HOLD = """
import sys
from pathlib import Path
from engine.calibrate.state import CalibrationState
state = CalibrationState(Path(sys.argv[1]), {"fingerprint": "f00"})
state.get("a", lambda: 1)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_calibration_is_told_who_has_the_file(path):
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        data = path.read_bytes()
        for settings in ({"fingerprint": "f00"}, SETTINGS):
            message = refused(path, settings)
            assert f"another calibration (process {holder.pid}) is at work" in message
            assert path.read_bytes() == data
        holder.kill()  # the lock goes with its process, however that ends
        holder.wait()
        state = CalibrationState(path, {"fingerprint": "f00"})
        assert state.get("a", never) == 1
        state.close()


def test_a_file_that_was_removed_meanwhile_is_made_anew(path, monkeypatch):
    """By the calibration that had it, between the moments of opening and of locking."""
    lock, gone = fcntl.lockf, []

    def late(file, how):
        if not gone:
            path.unlink()
            gone.append(file)
        lock(file, how)

    monkeypatch.setattr(fcntl, "lockf", late)
    state = CalibrationState(path, SETTINGS)
    state.get("a", lambda: 1)
    state.close()
    assert gone and CalibrationState(path, SETTINGS).get("a", never) == 1


def test_settings_stand_in_the_first_line_only(path):
    header = written(path).splitlines(keepends=True)[0]
    path.write_bytes(header * 2)
    assert "line 2 is not of a calibration" in refused(path)


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "folder").mkdir()
    assert "cannot be written: Is a directory" in refused(tmp_path / "folder")
    assert "cannot be written: No such file" in refused(tmp_path / "none" / "x.calibration")
    os.mkfifo(tmp_path / "pipe")
    assert "is no regular file" in refused(tmp_path / "pipe")
    (tmp_path / "file").write_text("")
    assert "cannot be written: Not a directory" in refused(tmp_path / "file" / "x.calibration")


def test_a_file_that_may_not_be_written_is_named(path, monkeypatch):
    """By a patch, as the file modes do not bind root."""
    written(path)

    def forbidden(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", forbidden)
    assert "cannot be written: Permission denied" in refused(path)


def test_a_disk_full_at_any_byte_keeps_what_was_there(path):
    data = written(path)
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    for size in range(ends[0], len(data)):
        path.unlink()
        state = CalibrationState(path, SETTINGS)
        # Only the disk is small: it must not matter to what pytest writes.
        with pytest.raises(ValueError) as caught, largest_file(size):
            fill(state)
        message = str(caught.value)
        assert message.startswith(f"{path}: cannot be written: File too large; make room")
        assert "\n" not in message
        with largest_file(size):
            state.close()  # what could not be written fails once more, and no one needs it
        num_whole = sum(end <= size for end in ends) - 1
        again = CalibrationState(path, SETTINGS)
        assert again.num_values == num_whole, size
        got, made = fill(again)
        again.close()
        assert got == READ_BACK and made == list(VALUES)[num_whole:], size
        assert path.read_bytes() == data


def test_a_full_disk_is_reported_where_the_file_begins(path):
    for size in (0, 10):
        path.unlink(missing_ok=True)
        with largest_file(size):
            assert "cannot be written: File too large" in refused(path)
        state = CalibrationState(path, SETTINGS)
        assert state.num_values == 0
        state.close()


def test_a_disk_that_fails_only_when_it_is_flushed(path, monkeypatch):
    """Network and delayed allocation report a full disk late: at fsync."""
    state = CalibrationState(path, SETTINGS)

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match="No space left on device; make room"):
        state.get("a", lambda: 1)
    assert state.num_values == 0
    state.close()
