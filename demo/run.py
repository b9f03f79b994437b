"""`make demo`: a model server is captured on one node and comes back warm, twice, on another.

Both nodes are on this machine: two containerd instances with roots, states, sockets and network
namespaces of their own, which share nothing but the store.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "tests"))

from support import model_server, proc  # noqa: E402


def main(prefix: Path) -> int:
    proc.become_subreaper()
    with tempfile.TemporaryDirectory(prefix="rewarm-demo-") as directory:
        with model_server.cluster(Path(directory), prefix, lambda text: print(f"  {text}", flush=True)) as made:
            result = model_server.play(made)
            snapshot = made.nodes[1].json("inspect", model_server.SNAPSHOT)
            answers = [result.original.answer, *(replica.answer for replica in result.restored)]
        equal = all(answer == answers[0] for answer in answers)
        warm = all(replica.outcome["outcome"] == "warm" for replica in result.restored)
        print()
        print(f"  cold start, until the first answer   {result.original.seconds:6.2f} s")
        for replica in result.restored:
            print(f"  {replica.name} ({replica.outcome['outcome']}), until the first answer {replica.seconds:4.2f} s")
        print(f"  ratio (cold / slowest replica)       {result.speedup:6.2f}x")
        print(f"  answers equal                        {'yes' if equal else 'NO'}")
        print(f"  snapshot                             {snapshot['id'][:12]}")
        print()
        if not warm:
            print(f"  a replica was not restored: {[replica.outcome for replica in result.restored]}", file=sys.stderr)
        return 0 if equal and warm else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
