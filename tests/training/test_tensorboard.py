from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training.resume import Epoch
from training.tensorboard import logged


def test_scalars_of_every_epoch(tmp_path: Path) -> None:
    calls: list[int] = []
    with logged(tmp_path / "events", lambda epoch, *_: calls.append(epoch)) as progress:
        progress(0, 0.5, 10, None)
        progress(0, 1.0, 20, Epoch(1, 0.5, 0.25, 1000.0, 2.0))
        progress(1, 1.0, 20, Epoch(2, 0.375, 0.75, 1000.0, 2.0))
    assert calls == [0, 0, 1]
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.5), (2, 0.375)]
    assert [e.value for e in events.Scalars("validation_average_precision")] == [0.25, 0.75]


def test_the_fits_of_a_selection_do_not_mix(tmp_path: Path) -> None:
    """Every fit starts at epoch 1 again."""
    with logged(tmp_path / "events", lambda *_: None) as progress:
        for epoch, loss in ((1, 4.0), (2, 3.0), (1, 5.0), (2, 2.0), (1, 1.0)):
            progress(epoch - 1, 1.0, 20, Epoch(epoch, loss, 0.25, 1000.0, 2.0))
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    losses = {tag: [e.value for e in events.Scalars(tag)] for tag in ("loss", "without_1/loss", "without_2/loss")}
    assert losses == {"loss": [4.0, 3.0], "without_1/loss": [5.0, 2.0], "without_2/loss": [1.0]}


def test_nothing_is_written_where_not_asked_for(tmp_path: Path) -> None:
    def shown(*_: object) -> None: ...

    with logged(None, shown) as progress:
        assert progress is shown
    assert list(tmp_path.iterdir()) == []
