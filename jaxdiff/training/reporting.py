"""What a run tells while it goes: a progress bar or plain lines, metrics.jsonl, TensorBoard event files."""

import json
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import TracebackType

import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm


class Reporter:
    """Writes the metrics of one run; a context manager.

    What a former run wrote after `start`, the step that this one goes on from, is cut off, so that the files tell of
    every step once.
    """

    def __init__(self, workdir: str | Path, start: int, total: int, tensorboard: bool = True):
        """Open the files of a run that begins after step `start` of `total`."""
        self.path = Path(workdir) / "metrics.jsonl"
        _cut(self.path, start)
        self.file = self.path.open("a", buffering=1)
        self.events = None
        if tensorboard:
            self.events = SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=start + 1 if start else None)
        self.start, self.total = start, total
        self.clock, self.clock_step = time.perf_counter(), start
        self.began = time.perf_counter()
        self.bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True) if sys.stderr.isatty() else None

    def __enter__(self) -> "Reporter":
        """Enter."""
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close all files."""
        if self.bar is not None:
            self.bar.close()
        if self.events is not None:
            self.events.close()
        self.file.close()

    def rate(self, step: int) -> float:
        """Steps per second since the last call of `restart_clock`."""
        return (step - self.clock_step) / max(time.perf_counter() - self.clock, 1e-9)

    def restart_clock(self, step: int) -> None:
        """Leave what was done beside training out of the rate."""
        self.clock, self.clock_step = time.perf_counter(), step

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Write numbers of a step to metrics.jsonl and to TensorBoard."""
        seconds = round(time.perf_counter() - self.began, 3)
        self.file.write(json.dumps({"step": step, **values, "seconds": seconds}) + "\n")
        if self.events is not None:
            for name, value in values.items():
                self.events.add_scalar(name, value, step)

    def progress(self, step: int, loss: float, images_per_second: float) -> None:
        """Show how far the run is, how fast it goes and when it will end."""
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{loss:.4f}", images_per_s=f"{images_per_second:.0f}", refresh=False)
            self.bar.update(step - self.bar.n)
            return
        left = timedelta(seconds=round((self.total - step) / max(self.rate(step), 1e-9)))
        print(f"step {step}/{self.total}  loss {loss:.4f}  {images_per_second:.0f} images/s  ETA {left}", flush=True)

    def say(self, text: str) -> None:
        """Print a line beside the progress."""
        tqdm.write(text, file=sys.stderr) if self.bar is not None else print(text, flush=True)

    def picture(self, step: int, grid: np.ndarray) -> None:
        """Show a picture uint8 [H, W] or [H, W, 3] in TensorBoard."""
        if self.events is not None:
            self.events.add_image("samples", grid, step, dataformats="HW" if grid.ndim == 2 else "HWC")


def _cut(path: Path, start: int) -> None:
    """Keep the lines of steps up to `start`; a line that was only half written is after it."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            step = json.loads(line)["step"]
        except ValueError:
            break
        if step > start:
            break
        kept.append(line + "\n")
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text("".join(kept))
    unfinished.replace(path)
