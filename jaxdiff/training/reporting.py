"""What a run tells while it goes: a progress bar or plain lines, metrics.jsonl, TensorBoard event files."""

import json
import math
import sys
import time
from datetime import timedelta
from types import TracebackType

import numpy as np
from etils import epath
from tensorboardX import SummaryWriter
from tqdm import tqdm

from jaxdiff.hosts import is_leader


class Reporter:
    """Writes the metrics of one run; a context manager. Of several hosts the first alone writes and speaks.

    What a former run wrote after `start`, the step that this one goes on from, is cut off, so that the files tell of
    every step once.
    """

    def __init__(self, workdir: epath.PathLike, start: int, total: int, tensorboard: bool = True):
        """Open the files of a run that begins after step `start` of `total`."""
        self.start, self.total = start, total
        self.clock, self.clock_step = time.perf_counter(), start
        self.began = time.perf_counter()
        self.speaks = is_leader()
        self.lines = self.events = self.bar = None
        if not self.speaks:
            return
        self.lines = Lines(epath.Path(workdir) / "metrics.jsonl", start)
        if tensorboard:
            self.events = SummaryWriter(f"{workdir}/tensorboard", purge_step=start + 1 if start else None)
        if sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True)

    def __enter__(self) -> "Reporter":
        """Enter."""
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close all files."""
        for each in (self.bar, self.events, self.lines):
            if each is not None:
                each.close()

    def rate(self, step: int) -> float:
        """Steps per second since the last call of `restart_clock`."""
        return (step - self.clock_step) / max(time.perf_counter() - self.clock, 1e-9)

    def restart_clock(self, step: int) -> None:
        """Leave what was done beside training out of the rate."""
        self.clock, self.clock_step = time.perf_counter(), step

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Write numbers of a step to metrics.jsonl and to TensorBoard."""
        if self.lines is not None:
            seconds = round(time.perf_counter() - self.began, 3)
            self.lines.write(json.dumps({"step": step, **values, "seconds": seconds}))
        if self.events is not None:
            for name, value in values.items():
                self.events.add_scalar(name, value, step)

    def progress(self, step: int, loss: float | None, images_per_second: float) -> None:
        """Show how far the run is, how fast it goes and when it will end; a loss of None is one of no update at all."""
        loss = math.nan if loss is None else loss
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{loss:.4f}", images_per_s=f"{images_per_second:.0f}", refresh=False)
            self.bar.update(step - self.bar.n)
        if self.bar is not None or not self.speaks:
            return
        left = timedelta(seconds=round((self.total - step) / max(self.rate(step), 1e-9)))
        print(f"step {step}/{self.total}  loss {loss:.4f}  {images_per_second:.0f} images/s  ETA {left}", flush=True)

    def say(self, text: str) -> None:
        """Print a line beside the progress."""
        if self.bar is not None:
            tqdm.write(text, file=sys.stderr)
        elif self.speaks:
            print(text, flush=True)

    def picture(self, step: int, grid: np.ndarray) -> None:
        """Show a picture uint8 [H, W] or [H, W, 3] in TensorBoard."""
        if self.events is not None:
            self.events.add_image("samples", grid, step, dataformats="HW" if grid.ndim == 2 else "HWC")


class Lines:
    """A file of JSON lines, one a step, cut after a step and then added to; each line is on disk once it is written."""

    def __init__(self, path: epath.Path, start: int):
        """Keep the lines of steps up to `start`; a line that was only half written is after it."""
        self.path, kept = path, []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                step = json.loads(line)["step"]
            except ValueError:
                break
            if step > start:
                break
            kept.append(line + "\n")
        self.text = "".join(kept)
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text(self.text)
        unfinished.replace(path)
        # objects on gs:// and the like can not be added to: there the whole file is written each time
        self.file = None if "://" in str(path) else open(path, "a", buffering=1)  # noqa: SIM115

    def write(self, line: str) -> None:
        """Add a line."""
        if self.file is not None:
            self.file.write(line + "\n")
            return
        self.text += line + "\n"
        self.path.write_text(self.text)

    def close(self) -> None:
        """Close."""
        if self.file is not None:
            self.file.close()
