"""The log by itself: what is damaged is noticed wherever it is, what is torn opens to its longest whole part."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seqfraud.errors import RunError
from serve.index import Folded
from serve.log import HEADER_BYTES, SYSTEM_DISK, BadFrameError, Disk, Frame, Log, link, walk
from serve.recovery import inspect, recover

RAM = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
SMALL = 330
"""Bytes of a segment in most tests: three or four frames."""

relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@contextmanager
def log_in(
    folder: Path, folded: Folded | None = None, disk: Disk = SYSTEM_DISK, segment_bytes: int = SMALL
) -> Iterator[Log]:
    found = recover(folder, folded)
    log = Log(folder, found.segments, found.end, 0, disk, segment_bytes)
    try:
        yield log
    finally:
        log.close()


def payload(n: int) -> bytes:
    return bytes([n % 256]) * (20 + 7 * n % 31)


def fill(folder: Path, count: int = 12, segment_bytes: int = SMALL) -> list[Frame]:
    """Frames that take 1, 2 or no numbers."""
    with log_in(folder, segment_bytes=segment_bytes) as log:
        for n in range(count):
            log.append((1, 2, 0)[n % 3], payload(n))
        return list(log.frames(0))


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.log"))


def at(frame: Frame) -> Folded:
    """An index that is folded up to a frame, which it does not hold yet."""
    return Folded(frame.seq, frame.position, b"", 1)


# ---- whole


def test_frames_come_back_in_order_and_one_by_one_across_segments(tmp_path):
    frames = fill(tmp_path)
    assert [frame.payload for frame in frames] == [payload(n) for n in range(12)]
    assert [(frame.seq, frame.taken) for frame in frames[:5]] == [(1, 1), (2, 2), (4, 0), (4, 1), (5, 2)]
    assert len(files(tmp_path)) == 4
    with log_in(tmp_path) as log:
        assert log.written.seq == 13
        for i, frame in enumerate(frames):
            assert log.read(frame.position) == frame
            assert list(log.frames(frame.position)) == frames[i:]
            assert log.head_before(frame.end) == frame.head
        assert list(log.frames(log.written.position)) == []
        for seq in range(1, 14):
            begin = log.position_before(seq)
            assert begin in [log.segment_at(frame.position).position for frame in frames]
            assert all(frame.seq < seq or frame.position >= begin for frame in frames)
    assert [file.name for file in files(tmp_path)][:2] == ["000000000000001.log", "000000000000005.log"]


def test_a_frame_larger_than_the_first_read_comes_back(tmp_path):
    large = os.urandom(100_000)
    with log_in(tmp_path) as log:
        assert log.read(log.append(1, large)).payload == large
        assert log.read(log.append(1, b"")).payload == b""


def test_it_goes_on_where_it_ended_as_if_it_had_not(tmp_path):
    (tmp_path / "once").mkdir()
    (tmp_path / "again").mkdir()
    fill(tmp_path / "once")
    for n in range(12):
        with log_in(tmp_path / "again") as log:
            log.append((1, 2, 0)[n % 3], payload(n))
    for one, other in zip(files(tmp_path / "once"), files(tmp_path / "again"), strict=True):
        assert (one.name, one.read_bytes()) == (other.name, other.read_bytes())


def test_notes_alone_begin_no_segment_of_a_name_that_is_there(tmp_path):
    with log_in(tmp_path) as log:
        for n in range(30):
            log.append(0, payload(n))
        log.append(1, b"x")
        log.append(1, b"y")
    assert [file.name for file in files(tmp_path)] == ["000000000000001.log", "000000000000002.log"]


# ---- torn and damaged


@relaxed
@given(st.data())
def test_a_last_file_cut_anywhere_opens_to_its_longest_whole_part(data):
    with tempfile.TemporaryDirectory(dir=RAM) as name:
        folder = Path(name)
        frames = fill(folder)
        last = files(folder)[-1]
        whole = last.read_bytes()
        begin = inspect(folder, None).segments[-1].position
        length = data.draw(st.integers(0, len(whole)))
        junk = data.draw(st.sampled_from([b"", b"\x00", bytes(300), b"\xf5\xffSQ", b"\xf5\xffSQ\x05\x00\x00\x00"]))
        last.write_bytes(whole[:length] + junk)
        kept = [frame for frame in frames if frame.end <= begin + length]
        ends = {HEADER_BYTES, *(frame.end - begin for frame in frames if frame.position > begin)}
        with log_in(folder) as log:
            assert list(log.frames(0)) == kept
            for frame in frames[len(kept) :]:
                log.append(frame.taken, frame.payload)
            assert list(log.frames(0)) == frames, "as if it had never been longer"
        assert files(folder)[-1].read_bytes() == whole
        cut = list(folder.glob("cut-*"))
        assert bool(cut) == bool(length not in ends or junk)
        if cut:
            begin_of_cut = int(cut[0].name.rpartition("-")[2])
            assert cut[0].read_bytes() == (whole[:length] + junk)[begin_of_cut:], "kept aside"


@relaxed
@given(st.data())
def test_any_changed_byte_is_noticed(data):
    with tempfile.TemporaryDirectory(dir=RAM) as name:
        folder = Path(name)
        frames = fill(folder)
        names = files(folder)
        file = data.draw(st.sampled_from(names))
        content = bytearray(file.read_bytes())
        where = data.draw(st.integers(0, len(content) - 1))
        content[where] ^= data.draw(st.integers(1, 255))
        file.write_bytes(content)
        damage = inspect(folder, None).damage
        assert damage is not None
        begin = sum(f.stat().st_size for f in names[: names.index(file)])
        whole = [frame for frame in frames if frame.end <= begin + where]
        assert damage.last_seq == sum(frame.taken for frame in whole)
        if file != names[-1]:
            assert damage.followed
            with pytest.raises(RunError, match="the journal is damaged"), log_in(folder):
                pass
            assert file.read_bytes() == content, "left as it is"
        elif not damage.followed:
            with log_in(folder) as log:
                assert list(log.frames(0)) == whole


def test_damage_is_told_with_file_offset_last_record_and_the_way_out(tmp_path):
    folder = tmp_path / "journal"
    folder.mkdir()
    frames = fill(folder)
    file = files(folder)[1]
    content = bytearray(file.read_bytes())
    content[HEADER_BYTES + 25] ^= 1
    file.write_bytes(content)
    with pytest.raises(RunError) as caught, log_in(folder):
        pass
    assert str(caught.value) == (
        f"the journal is damaged: {file}, byte {HEADER_BYTES}, after record {frames[4].seq - 1}: the checksum of a record "
        f"is wrong; restore the file from a copy, or give up the records from there on with: "
        f"seqfraud repair {tmp_path} --cut"
    )


def test_a_changed_frame_with_a_right_checksum_is_noticed_by_the_digest_of_its_file(tmp_path):
    """The story: a CRC over bytes and their own CRC does not depend on the bytes.

    With plain CRCs for links the digest of a sealed segment passed any frame with a right link of its own.
    """
    frames = fill(tmp_path)
    file = files(tmp_path)[0]
    content = bytearray(file.read_bytes())
    begin, end = frames[0].position, frames[0].end
    content[begin + 25] ^= 1
    before = bytes(content[begin - 36 : begin - 4])
    content[end - 4 : end] = link(bytes(content[begin : end - 4]), before).to_bytes(4, "little")
    file.write_bytes(content)
    assert next(walk(bytes(content), begin, 1)).payload != frames[0].payload, "it passes alone"
    damage = inspect(tmp_path, None).damage
    assert damage is not None
    assert "one is missing or not as it was" in damage.reason


@pytest.mark.parametrize("change", ["left out", "twice", "swapped"])
def test_frames_in_another_order_are_noticed(tmp_path, change):
    frames = fill(tmp_path, segment_bytes=10_000)
    (file,) = files(tmp_path)
    content = file.read_bytes()
    a, b, c = (content[frames[i].position : frames[i].end] for i in (3, 4, 5))
    other = {"left out": a + c, "twice": a + a + b + c, "swapped": b + a + c}[change]
    file.write_bytes(content.replace(a + b + c, other))
    damage = inspect(tmp_path, None).damage
    assert damage is not None
    assert damage.last_seq <= frames[5].seq


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_missing_file_is_noticed(tmp_path, which):
    fill(tmp_path)
    names = files(tmp_path)
    names[which].unlink()
    with pytest.raises(RunError, match="one is missing or not as it was") as caught, log_in(tmp_path):
        pass
    assert names[which + 1].name in str(caught.value)


def test_a_missing_last_file_is_noticed_where_the_index_knows_of_it(tmp_path):
    frames = fill(tmp_path)
    last = files(tmp_path)[-1]
    folded = Folded(frames[-1].seq, frames[-1].position, b"", int(last.stem))
    last.unlink()
    with pytest.raises(RunError, match=f"{last.name}, byte 0, after record {int(last.stem) - 1}: the file is missing"):
        recover(tmp_path, folded)


def test_a_renamed_file_is_noticed(tmp_path):
    fill(tmp_path)
    files(tmp_path)[-1].rename(tmp_path / "000000000000999.log")
    with pytest.raises(RunError, match="it begins with record 11"), log_in(tmp_path, Folded(1, 10**9, b"", 1)):
        pass


def test_a_newer_format_is_refused_and_left_as_it_is(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("serve.log.VERSION", 3)
        fill(tmp_path)
    before = [file.read_bytes() for file in files(tmp_path)]
    with pytest.raises(RunError, match=r"000000000000001\.log: log format 3; this version reads format 2"):
        recover(tmp_path, None)
    assert [file.read_bytes() for file in files(tmp_path)] == before


def test_what_the_index_holds_was_synced_and_what_it_does_not_may_be_torn(tmp_path, caplog):
    """A power cut may leave later pages and lose earlier ones: whole records after a bad one are no damage there."""
    frames = fill(tmp_path)
    bad = frames[7]
    file = next(f for f in reversed(files(tmp_path)) if int(f.stem) <= bad.seq)
    content = bytearray(file.read_bytes())
    begin = next(s.position for s in inspect(tmp_path, None).segments if s.path == file)
    content[bad.position - begin + 6] ^= 1
    file.write_bytes(content)
    assert files(tmp_path)[-1] != file
    for folded in (None, at(frames[8]), at(frames[11])):
        with pytest.raises(RunError, match="the journal is damaged"), log_in(tmp_path, folded):
            pass
    shutil.copytree(tmp_path, tmp_path / "copy")
    for folder, folded in ((tmp_path, at(bad)), (tmp_path / "copy", at(frames[2]))):
        with log_in(folder, folded) as log:
            assert list(log.frames(0)) == frames[:7]
            assert log.written.seq == bad.seq
        assert sorted(f.name for f in folder.glob("cut-*")) == [
            f"cut-{file.stem}-{bad.position - begin}",
            "cut-000000000000011-0",
        ]
    assert f"byte {bad.position - begin}, after record {bad.seq - 1}" in caplog.text
    assert f"{frames[-1].end - bad.position} bytes are kept" in caplog.text


# ---- failing


class Faults:
    """A disk on which what is asked for fails."""

    def __init__(self) -> None:
        self.next: list[str] = []
        self.disk = Disk(self.write, self.truncate, self.sync)

    def _fails(self, what: str) -> bool:
        return bool(self.next) and self.next[0] == what and bool(self.next.pop(0))

    def write(self, descriptor: int, data: bytes) -> int:
        if self._fails("write"):
            raise OSError(errno.ENOSPC, "no space left on device")
        return os.write(descriptor, data[:9] if self._fails("short") else data)

    def truncate(self, descriptor: int, length: int) -> None:
        if self._fails("truncate"):
            raise OSError(errno.EIO, "I/O error")
        os.ftruncate(descriptor, length)

    def sync(self, descriptor: int) -> None:
        if self._fails("sync"):
            raise OSError(errno.EIO, "I/O error")
        os.fdatasync(descriptor)


@pytest.fixture
def faults() -> Faults:
    return Faults()


@pytest.mark.parametrize("fault", ["write", "short"])
def test_a_write_that_fails_leaves_everything_as_before(tmp_path, faults, fault):
    """Also that of a new file's header: every record is tried twice, and the bytes are those of a log without faults."""
    (tmp_path / "control").mkdir()
    (tmp_path / "log").mkdir()
    frames = fill(tmp_path / "control")
    with log_in(tmp_path / "log", disk=faults.disk) as log:
        for n in range(12):
            before = log.written
            faults.next = [fault]
            with pytest.raises(OSError, match=r"no space left|9 of \d+ bytes|header"):
                log.append((1, 2, 0)[n % 3], payload(n))
            assert log.head == log.written == before
            log.append((1, 2, 0)[n % 3], payload(n))
        assert list(log.frames(0)) == frames
        assert not log.failed
    for one, other in zip(files(tmp_path / "control"), files(tmp_path / "log"), strict=True):
        assert (one.name, one.read_bytes()) == (other.name, other.read_bytes())


def test_a_write_that_cannot_be_taken_back_is_the_last(tmp_path, faults):
    with log_in(tmp_path, disk=faults.disk) as log:
        log.append(1, b"a")
        faults.next = ["short", "truncate"]
        with pytest.raises(OSError, match="9 of"):
            log.append(1, b"b")
        assert "could not be taken back" in log.failed
        for attempt in (lambda: log.append(1, b"c"), log.begin_group):
            with pytest.raises(OSError, match="could not be taken back"):
                attempt()
    with log_in(tmp_path) as log:
        assert [frame.payload for frame in log.frames(0)] == [b"a"]


def test_a_sync_that_fails_is_the_last(tmp_path, faults):
    with log_in(tmp_path, disk=faults.disk) as log:
        log.append(1, b"a")
        faults.next = ["sync"]
        with pytest.raises(OSError, match="I/O error"):
            log.sync()
        with pytest.raises(OSError, match="could not be synced"):
            log.append(1, b"b")


@pytest.mark.parametrize("fault", ["write", "short", None])
def test_a_group_is_written_at_once_or_not_at_all(tmp_path, faults, fault):
    with log_in(tmp_path, disk=faults.disk) as log:
        log.append(1, b"a")
        before = log.written
        log.begin_group()
        positions = [log.append(1, payload(n)) for n in range(20)]
        assert log.written == before
        assert log.head.seq == before.seq + 20
        if fault:
            faults.next = [fault]
            with pytest.raises(OSError, match=r"no space|9 of"):
                log.end_group()
            assert log.head == log.written == before
        else:
            log.end_group()
            assert [log.read(position).payload for position in positions] == [payload(n) for n in range(20)]
        log.append(1, b"z")
    with log_in(tmp_path) as log:
        held = [] if fault else [payload(n) for n in range(20)]
        assert [frame.payload for frame in log.frames(0)] == [b"a", *held, b"z"]


def test_a_file_that_got_shorter_while_it_is_open_is_noticed(tmp_path):
    frames = fill(tmp_path, segment_bytes=10_000)
    with log_in(tmp_path, segment_bytes=10_000) as log:
        os.truncate(files(tmp_path)[0], frames[5].end - 1)
        with pytest.raises(BadFrameError, match="were written"):
            list(log.frames(0))
        with pytest.raises(BadFrameError, match="ends in the middle"):
            log.read(frames[5].position)
        with pytest.raises(BadFrameError, match="ends before"):
            log.read(frames[7].position)
        assert log.read(frames[4].position) == frames[4]


def test_a_sync_covers_the_files_that_were_sealed_since_the_last(tmp_path):
    synced: list[str] = []

    def sync(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)

    with log_in(tmp_path, disk=Disk(sync=sync)) as log:
        for n in range(12):
            log.append(1, payload(n))
        assert log.sync() == log.written
        assert synced == [file.name for file in files(tmp_path)]
        synced.clear()
        log.append(1, b"")
        log.sync()
        assert synced == [files(tmp_path)[-1].name]
