"""`seqfraud repair`: what is wrong with a journal, and giving up what cannot be had back."""

from pathlib import Path

from seqfraud.errors import RunError
from serve.index import open_index, remove_index
from serve.recovery import cut as cut_log
from serve.recovery import inspect
from serve.service import lock_folder


def repair(state: Path, cut: bool) -> tuple[bool, str]:
    """Whether the journal of a state folder is whole (now), and what there is to say about it.

    With `cut` everything from the first bad record on is moved aside, snapshots of later records and the index are
    removed. Raises RunError where there is no journal, it is of a newer format, or another process uses it.
    """
    folder, index_path = state / "journal", state / "journal.sqlite"
    if not folder.is_dir():
        raise RunError(f"{state}: there is no journal here")
    lock = lock_folder(state)
    try:
        index = open_index(index_path)
        folded = None if index is None else index.folded
        if index is not None:
            index.close()
        found = inspect(folder, folded)
        damage, last = found.damage, found.end.seq - 1
        if damage is None:
            return True, f"{folder} is whole: {last:,} records in {len(found.segments)} files"
        if not cut:
            tail = (
                "the next start cuts it" if damage.is_torn_tail(folded) else "seqfraud repair STATE --cut gives it up"
            )
            return False, f"{damage}; {tail}"
        kept = cut_log(damage) if damage.file.exists() else []
        remove_index(index_path)
        for snapshot in state.glob("snapshot-*.bin"):
            if snapshot.stem > f"snapshot-{last:015d}":
                snapshot.unlink()
        names = ", ".join(file.name for file in kept) or "nothing"
        return True, f"{damage}\ncut after record {last:,}; kept aside: {names}"
    finally:
        lock.release()
