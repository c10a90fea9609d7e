"""Where bytes are gathered before they are written: page-aligned, as writing around the page cache wants.

Stages are used again, because a fresh one has to be faulted in, page by page.
"""

import mmap

BLOCK = 4096
STAGE_BYTES = 512 * 1024
_MOST_IDLE = 64

_idle: list[mmap.mmap] = []


class Stage:
    """A buffer that is filled from `begin` on: the place, in its block, of the file's next byte."""

    def __init__(self, begin: int = 0) -> None:
        try:
            # Safe from several threads: each of these is one step.
            self._memory = _idle.pop()
        except IndexError:
            self._memory = mmap.mmap(-1, STAGE_BYTES)
        self.view = memoryview(self._memory)
        self.begin = self.end = begin

    @property
    def full(self) -> bool:
        """Whether nothing more goes in."""
        return self.end == STAGE_BYTES

    def put(self, data: memoryview) -> memoryview:
        """Copy in what fits; what doesn't."""
        count = min(data.nbytes, STAGE_BYTES - self.end)
        self.view[self.end : self.end + count] = data[:count]
        self.end += count
        return data[count:]

    def release(self) -> None:
        """Give the buffer back; it may not be used afterwards."""
        self.view.release()
        if len(_idle) < _MOST_IDLE:
            _idle.append(self._memory)
        else:
            self._memory.close()
