"""A process with one odd kind of memory, or to whose memory the kernel writes: those of odd_kinds and odd_writes.

GET /state   {"digest": of the memory, "check": what the kind has to say about itself}
Environment: PORT (8000), KIND (a name of either's KINDS).
"""

from __future__ import annotations

import os

from support.workloads import odd_kinds, odd_writes, web


def main() -> None:
    kind = {**odd_kinds.KINDS, **odd_writes.KINDS}[os.environ["KIND"]]()
    web.run(web.port(), {"/state": lambda _body: {"digest": kind.digest(), "check": kind.check()}})


if __name__ == "__main__":
    main()
