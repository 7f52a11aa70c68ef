"""A progress bar on stderr: redrawn in place on a terminal, a line at each quarter elsewhere (files, notebooks, CI)."""

import sys
import time

WIDTH = 32


class Progress:
    """``with Progress("forward", 8) as bar: ... bar.step()``. Leaves nothing behind on a terminal, not even when interrupted."""

    def __init__(self, label, total, stream=None):
        self.label, self.total, self.done = label, total, 0
        self.stream = sys.stderr if stream is None else stream
        self.redraw = self.stream.isatty()
        self.start = time.monotonic()

    def __enter__(self):
        if self.redraw:
            self._draw()
        return self

    def step(self):
        self.done += 1
        if self.redraw:
            self._draw()
        elif self.done * 4 // self.total > (self.done - 1) * 4 // self.total:
            print(f"{self.label:<9} {100 * self.done // self.total:3d} %", file=self.stream, flush=True)

    def _draw(self):
        filled = WIDTH * self.done // self.total
        spent = time.monotonic() - self.start
        left = f"{spent / self.done * (self.total - self.done):4.0f} s left" if self.done else ""
        bar = "#" * filled + "-" * (WIDTH - filled)
        print(f"\r{self.label:<9} [{bar}] {self.done}/{self.total} {left:<12}", end="", file=self.stream, flush=True)

    def __exit__(self, *exception):
        if self.redraw:
            print("\r" + " " * (WIDTH + 40) + "\r", end="", file=self.stream, flush=True)
