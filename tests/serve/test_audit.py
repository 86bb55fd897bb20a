"""`seqfraud verify --state`: a past that is not what was written is noticed, wherever and however it was changed."""

import json
import logging
import shutil
import struct
import tempfile
import threading
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqfraud.cli import main
from seqfraud.errors import ConfigError, RunError
from serve.audit import Claim, audit, parse_head
from serve.journal import ActionRecord, Journal, LabelRecord, TransactionRecord
from serve.log import BEGINNING, HEADER_BYTES, MARKER, Frame, link, next_head, segment_name, walk, write_header
from serve.recovery import inspect
from serve.service import Service

Frames = list[Frame]
START = 1_600_000_000_000
ROW = {"id": "t1", "user": "ann", "time": START, "amount": 20.0, "kind": "food", "merchant": "m1", "device": "d1"}


def fill(state: Path, count: int = 20) -> list[str]:
    """Records of every kind in several files, closed; the heads after some of them."""
    journal = Journal(state, segment_bytes=600)
    journal.set_meta("fields", "a,b")
    heads = []
    while (seq := journal.last_seq + 1) <= count:
        if seq % 4 == 0:
            journal.append_labels([LabelRecord(seq + i, f"t{seq}", True, 1, 2, "api", "key-1") for i in range(2)])
        elif seq % 4 == 3:
            journal.append_action(ActionRecord(seq, "rule", 1, "key-1", b"{}"))
        else:
            journal.append_transaction(
                TransactionRecord(seq, f"t{seq}", "ann", seq, b"c", b'{"a":1}', bytes(8), b"{}", "b")
            )
        heads.append(journal.head)
    journal.close()
    return heads


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state folder that was filled; to be copied."""
    state = tmp_path_factory.mktemp("written")
    fill(state)
    return state


def read(state: Path) -> Frames:
    frames: Frames = []
    for path, seq, begin in inspect(state / "journal", None).segments:
        frames += walk(path.read_bytes(), HEADER_BYTES, seq, begin)
    return frames


def write(state: Path, frames: Frames, per_file: int = 4) -> None:
    """Frames with the heads they say, and with right numbers, checksums and digests everywhere."""
    shutil.rmtree(state / "journal")
    (state / "journal").mkdir()
    end, seq = BEGINNING, 1
    for begin in range(0, len(frames), per_file):
        data, at = write_header(end)
        for frame in frames[begin : begin + per_file]:
            body = struct.pack("<4sIQI", MARKER, len(frame.payload), seq, frame.taken) + frame.payload + frame.head
            data += body + link(body, at.head).to_bytes(4, "little")
            seq += frame.taken
            at = at._replace(head=frame.head)
        (state / "journal" / segment_name(end.seq)).write_bytes(data)
        end = end._replace(position=end.position + len(data), seq=seq, head=at.head, digest=zlib.crc32(data))


def chained(frames: Frames) -> Frames:
    """The same with right heads: what somebody who may write everything can make."""
    out, seq, head = [], 1, BEGINNING.head
    for frame in frames:
        head = next_head(head, seq, frame.taken, frame.payload)
        seq += frame.taken
        out.append(frame._replace(head=head))
    return out


def without_claims(state: Path) -> None:
    for name in ("journal.sqlite", "journal.sqlite-wal", "journal.sqlite-shm"):
        (state / name).unlink(missing_ok=True)


def first_record(frames: Frames, at: int) -> int:
    """Number of the first record of a frame, or of the next that has one."""
    return 1 + sum(frame.taken for frame in frames[:at])


# ---- whole


def test_what_was_written_is_whole_and_its_heads_are_on_it(written):
    frames = read(written)
    found = audit(written)
    assert (found.first_bad, found.reason, found.agrees) == (None, "", ["journal.sqlite"])
    assert (found.records, found.files) == (21, len(list((written / "journal").glob("*.log"))))
    assert found.files > 2
    assert found.head == f"21:{frames[-1].head.hex()}"
    assert chained(frames) == frames
    noted = [parse_head(f"{frame.seq + frame.taken - 1}:{frame.head.hex()}") for frame in frames]
    assert len(audit(written, noted).agrees) == len(noted) + 1
    assert audit(written, [parse_head(f"0:{bytes(32).hex()}")]).first_bad is None, "before the first record"


def test_the_journal_says_its_head(tmp_path):
    heads = fill(tmp_path)
    assert audit(tmp_path, [parse_head(head) for head in heads]).first_bad is None
    assert audit(tmp_path).head == heads[-1]
    journal = Journal(tmp_path)
    assert journal.head == heads[-1], "and goes on from there"
    with journal.group():
        journal.append_action(ActionRecord(22, "rule", 1, "key-1", b"{}"))
        assert journal.head == heads[-1], "nothing is stored yet"
    last = journal.head
    journal.close()
    assert audit(tmp_path).head == last != heads[-1]


# ---- changed


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_changed_byte_is_noticed_with_the_record_it_is_in(written, data):
    with tempfile.TemporaryDirectory() as name:
        state = Path(name) / "state"
        shutil.copytree(written, state)
        if data.draw(st.booleans()):
            without_claims(state)
        frames = read(state)
        file = data.draw(st.sampled_from(sorted((state / "journal").glob("*.log"))))
        content = bytearray(file.read_bytes())
        where = data.draw(st.integers(0, len(content) - 1))
        content[where] ^= data.draw(st.integers(1, 255))
        file.write_bytes(content)
        begin = next(s.position for s in inspect(written / "journal", None).segments if s.path.name == file.name)
        found = audit(state)
        assert found.first_bad == 1 + sum(frame.taken for frame in frames if frame.end <= begin + where)
        assert f"{file.name}, byte" in found.reason


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_record_changed_left_out_put_in_or_moved_is_noticed_though_every_checksum_is_right(written, data):
    """What the checksums of a start cannot tell: somebody who knows the format wrote them anew, the heads not."""
    with tempfile.TemporaryDirectory() as name:
        state = Path(name) / "state"
        shutil.copytree(written, state)
        without_claims(state)
        frames = read(state)
        at = data.draw(st.integers(0, len(frames) - 1))
        how = data.draw(st.sampled_from(["changed", "left out", "twice", "swapped", "other numbers"]))
        changed = list(frames)
        if how == "changed":
            payload = bytearray(frames[at].payload)
            payload[data.draw(st.integers(0, len(payload) - 1))] ^= data.draw(st.integers(1, 255))
            changed[at] = frames[at]._replace(payload=bytes(payload))
        elif how == "left out":
            del changed[at]
        elif how == "twice":
            changed.insert(at, frames[at])
        elif how == "swapped":
            other = data.draw(st.integers(0, len(frames) - 1).filter(lambda i: i != at))
            changed[at], changed[other] = frames[other], frames[at]
            at = min(at, other)
        else:
            changed[at] = frames[at]._replace(taken=frames[at].taken + 1)
        write(state, changed)
        assert inspect(state / "journal", None).damage is None, "the checksums are right"
        found = audit(state)
        if how == "left out" and at == len(frames) - 1:
            assert found.first_bad is None, "only who knows of it can miss the newest"
            assert audit(state, [Claim("noted", 21, frames[-1].head.hex())]).first_bad == first_record(frames, at)
            return
        bad = at + 1 if how == "twice" else at
        assert found.first_bad == first_record(changed, bad)
        assert "the head of the chain does not follow" in found.reason


def test_who_writes_the_whole_chain_anew_is_caught_by_a_head_that_was_noted_before(written, tmp_path):
    state = tmp_path / "state"
    shutil.copytree(written, state)
    frames = read(state)
    noted = [Claim(f"noted {f.seq}", f.seq + f.taken - 1, f.head.hex()) for f in frames if f.taken]
    changed = [*frames[:6], frames[6]._replace(payload=b"another"), *frames[7:]]
    write(state, chained(changed))
    last = frames[6].seq - 1
    assert audit(state, noted[:5]).first_bad == last + 1, "the index knows the head at the end"
    without_claims(state)
    assert audit(state).first_bad is None, "nobody who does not know better can tell"
    assert audit(state, [n for n in noted if n.seq <= last]).first_bad is None
    found = audit(state, noted)
    assert (found.first_bad, found.records) == (last + 1, 21)
    assert f"between {last + 1} and {frames[6].seq} on" in found.reason


def test_records_taken_off_the_end_are_missed_by_the_snapshots_and_the_index(cards, tmp_path):
    with Service(cards, tmp_path) as service:
        for n in range(5):
            service.score(json.dumps({**ROW, "id": n}).encode())
    frames = read(tmp_path)
    write(tmp_path, frames[:-2], per_file=100)
    found = audit(tmp_path)
    assert (found.first_bad, found.records) == (4, 3)
    assert found.reason == "the log ends with record 3, and snapshot-000000000000005.bin knows of record 5"
    (tmp_path / "snapshot-000000000000005.bin").unlink()
    assert audit(tmp_path).reason == "the log ends with record 3, and journal.sqlite knows of record 5"


def test_the_past_of_another_snapshot_is_noticed(cards, tmp_path):
    for name, amount in (("one", 1.0), ("other", 2.0)):
        with Service(cards, tmp_path / name, clock=lambda: 1000) as service:
            service.score(json.dumps({**ROW, "amount": amount}).encode())
    (snapshot,) = (tmp_path / "other").glob("snapshot-*.bin")
    shutil.copy(snapshot, tmp_path / "one")
    assert audit(tmp_path / "one").reason.startswith(f"by {snapshot.name} the chain had another head at record 1")


# ---- a service


def test_a_service_logs_its_heads_and_they_are_on_the_chain(cards, tmp_path, caplog):
    caplog.set_level(logging.INFO, "serve.service")
    for _ in range(2):
        with Service(cards, tmp_path) as service:
            service.act("rule", "key-1", b"{}")
            service.snapshot()
            service.act("rule", "key-1", b"{}")
    said = [m.removeprefix("journal head ").partition(" at ") for m in caplog.messages if m.startswith("journal head ")]
    assert [(head.partition(":")[0], when) for head, _, when in said] == [
        ("0", "the start"), ("1", "a snapshot"), ("2", "a snapshot"), ("2", "the end"),
        ("2", "the start"), ("3", "a snapshot"), ("4", "a snapshot"), ("4", "the end"),
    ]  # fmt: skip
    found = audit(tmp_path, [parse_head(head) for head, *_ in said])
    assert found.first_bad is None
    assert len(found.agrees) == len(said) + 3, "the index and two snapshots too"


def test_a_running_service_is_not_disturbed_and_not_mistaken_for_damage(cards, tmp_path):
    stop = threading.Event()
    failed: list[BaseException] = []

    def post() -> None:
        number = 0
        try:
            while not stop.is_set():
                number += 1
                service.score(json.dumps({**ROW, "id": number, "user": f"u{number % 9}"}).encode())
        except BaseException as error:
            failed.append(error)

    with Service(cards, tmp_path) as service:
        posting = threading.Thread(target=post)
        posting.start()
        noted = []
        while service.journal.last_seq < 40 and not failed:
            noted.append(service.journal.head)
            found = audit(tmp_path, [parse_head(head) for head in noted])
            assert (found.first_bad, found.reason) == (None, "")
        stop.set()
        posting.join()
        assert not failed
        assert len(noted) > 1


# ---- the command


def verify(capsys: pytest.CaptureFixture[str], *args: Any) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["verify", *map(str, args)])
    return (code, *capsys.readouterr())


def test_the_command_says_the_head_or_the_first_bad_record(written, tmp_path, capsys):
    state = tmp_path / "state"
    shutil.copytree(written, state)
    frames = read(state)
    head = f"21:{frames[-1].head.hex()}"
    code, out, err = verify(capsys, "--state", state, "--head", head, "--head", f"1:{frames[1].head.hex().upper()}")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        f"{state}: 21 records in {len(list((state / 'journal').glob('*.log')))} files are as they were written",
        "on the chain: --head 1, --head 21, journal.sqlite",
        f"head {head}",
    ]
    content = bytearray((file := sorted((state / "journal").glob("*.log"))[1]).read_bytes())
    content[HEADER_BYTES + 30] ^= 1
    file.write_bytes(content)
    first = int(file.stem)
    words = f"{file.name}, byte {HEADER_BYTES}: the checksum of a record is wrong"
    code, out, err = verify(capsys, "--state", state)
    assert (code, out, err) == (1, "", f"error: {state}: record {first} is not as it was written: {words}\n")
    code, out, err = verify(capsys, "--state", state, "--json")
    assert code == 1
    found = json.loads(out)
    assert (found["whole"], found["first_bad"], found["reason"]) == (False, first, words)
    assert found["records"] == first - 1


@pytest.mark.parametrize(
    "head", ["", "5", "5:", "5:abc", "x:" + "0" * 64, "-1:" + "0" * 64, "5:" + "0" * 63 + "g", "5:" + "0" * 66]
)
def test_what_is_no_head_is_refused(head):
    with pytest.raises(ConfigError, match="expected SEQ:HASH with 64 hexadecimal digits"):
        parse_head(head)


def test_what_cannot_be_verified_is_refused_in_one_line(tmp_path, capsys):
    for args, words in [
        ([], "expected a bundle, or --state"),
        (["bundle", "--state", tmp_path], "expected a bundle, or --state"),
        (["bundle", "--head", "1:00"], "expected a bundle, or --state"),
        (["--state", tmp_path], "there is no journal here"),
    ]:
        code, out, err = verify(capsys, *args)
        assert (code, out) == (2, "")
        assert words in err


def test_a_log_from_before_the_chain_is_refused_and_left_as_it_is(tmp_path):
    (tmp_path / "journal").mkdir()
    file = tmp_path / "journal" / segment_name(1)
    front = struct.pack("<8sIQQII", b"seqfraud", 1, 1, 0, 0, 0)
    content = front + link(front, bytes(4)).to_bytes(4, "little")
    file.write_bytes(content)
    for attempt in (lambda: audit(tmp_path), lambda: Journal(tmp_path)):
        with pytest.raises(RunError, match="log format 1, from before its records were chained"):
            attempt()
    assert file.read_bytes() == content
