"""TensorBoard's event files of a fit, where asked for."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from seqfraud.errors import ConfigError
from training.loop import Progress
from training.resume import Epoch


@contextmanager
def logged(folder: Path | None, shown: Progress) -> Iterator[Progress]:
    """`shown`, and with a folder also a scalar per figure and epoch there. Raises ConfigError without TensorBoard."""
    if folder is None:
        yield shown
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError("--tensorboard needs a package: pip install 'seqfraud[tensorboard]'") from error
    with SummaryWriter(str(folder)) as writer:
        last, fits = 0, 0

        def progress(epoch: int, share: float, events: int, report: Epoch | None) -> None:
            nonlocal last, fits
            shown(epoch, share, events, report)
            if report is not None:
                fits += report.epoch <= last  # the next fit of --select
                last = report.epoch
                for name, value in asdict(report).items():
                    if name != "epoch":
                        writer.add_scalar(f"without_{fits}/{name}" if fits else name, value, report.epoch)

        yield progress
