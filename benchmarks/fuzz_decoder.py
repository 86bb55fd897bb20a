"""Coverage-guided fuzz of the decoder with atheris; a process of its own, started by `python -m benchmarks.fuzz`.

    python -m benchmarks.fuzz_decoder OUT BUNDLE... -- [libFuzzer's options]

The first byte of an input chooses a bundle, limits and what is decoded; the rest is the body. Only a RequestError may leave
the decoder. An accepted transaction must come out of its record as it went in, under the tightest limits too, and a
reference finds no name in its body twice. Counts are written to OUT after every 10,000 inputs: libFuzzer does not return.
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["serve.decoding", "seqfraud.canonical"]):
    from serve.decoding import InputSettings, Limits, TransactionDecoder, decode_labels

from seqfraud.bundle import open_bundle
from seqfraud.config import Duration, Instant
from seqfraud.errors import RequestError
from serve.records import TransactionRecord

NOW = 1_700_000_000_000
DEFAULT = InputSettings()
LOOSE = InputSettings(
    earliest=Instant(-(10**15)),
    latest_ahead=Duration(10**15),
    longest_text=10**6,
    control_characters=True,
    numbers_as_text=True,
)
TIGHT = InputSettings(earliest=Instant(NOW), latest_ahead=Duration(0), longest_text=1)
EVERY = 10_000


class Target:
    """What libFuzzer calls."""

    def __init__(self, out: Path, bundles: list[Path]) -> None:
        self._out = out
        self.counts: Counter[str] = Counter()
        self._limits = [Limits(settings, now=lambda: NOW) for settings in (DEFAULT, LOOSE)]
        manifests = [open_bundle(path).manifest for path in bundles]
        self._pairs = [
            (TransactionDecoder(manifest, limits), TransactionDecoder(manifest, Limits(TIGHT, now=lambda: 0)))
            for manifest in manifests
            for limits in self._limits
        ]

    def __call__(self, data: bytes) -> None:
        """One input. Raises what must not be raised."""
        self.counts["generated"] += 1
        if data:
            self._decode(data[0], data[1:])
        if self.counts["generated"] % EVERY == 0:
            self._out.write_text(json.dumps(self.counts))

    def _decode(self, choice: int, body: bytes) -> None:
        decoder, tight = self._pairs[choice % len(self._pairs)]
        kind = choice // len(self._pairs) % 8
        if kind == 0:
            self._count(lambda: decode_labels(body, self._limits[choice % 2]))
        elif kind == 1:
            for item in self._count(lambda: decoder.decode_batch(body)) or []:
                self._one(decoder, tight, bytes(item))
        else:
            self._one(decoder, tight, body)

    def _one(self, decoder: TransactionDecoder, tight: TransactionDecoder, body: bytes) -> None:
        taken = self._count(lambda: decoder.decode(body))
        if taken is None:
            return
        json.loads(body, object_pairs_hook=_each_once)
        record = TransactionRecord(1, taken.id, taken.user, taken.time, taken.content, taken.raw, b"", b"", "")
        for reader in (decoder, tight):
            if repr(reader.decode_stored(record)) != repr(taken):
                raise AssertionError(f"{taken} came out of its record as {reader.decode_stored(record)}")

    def _count(self, decode: Any) -> Any:
        try:
            got = decode()
        except RequestError as error:
            self.counts[f"refused {error.status}"] += 1
            json.dumps(error.message).encode("ascii")
            if len(error.message) > 400:
                raise AssertionError("a message that repeats too much") from error
            return None
        self.counts["accepted"] += 1
        return got


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise AssertionError("a name stands twice in what was accepted")
    return content


if __name__ == "__main__":
    ours, options = sys.argv[1 : sys.argv.index("--")], sys.argv[sys.argv.index("--") + 1 :]
    atheris.Setup([sys.argv[0], *options], Target(Path(ours[0]), [Path(bundle) for bundle in ours[1:]]))
    atheris.Fuzz()
