"""The main job, end to end: a real model server, two containerd nodes, one store."""

from __future__ import annotations

from pathlib import Path

from support import model_server, samples


def test_restored_on_the_second_node(nothing_left_behind: None, tmp_path: Path, prefix: Path) -> None:
    with model_server.cluster(tmp_path, prefix) as made:
        result = model_server.play(made)
        assert result.original.outcome["outcome"] == "cold"
        assert [line["text"] for line in result.original.answer["lines"]] == samples.TEXTS[model_server.PAGE]
        for replica in result.restored:
            assert replica.outcome["outcome"] == "warm", replica.outcome
            assert replica.answer == result.original.answer
            assert made.ask(replica) == result.original.answer
        assert made.ask(result.original) == result.original.answer, "the source serves on"
        second = made.engines[1]
        first, last = result.restored
        second.kill(first.task, "SIGTERM")
        second.wait_stopped(first.task)
        assert second.delete(first.task) == 0, "it ended by its own SIGTERM handler"
        assert second.remove(last.task) == 128 + 9
        for replica in result.restored:
            root = second.runc_root / replica.task.namespace
            assert not made.nodes[1].container_directory(replica.name, root).exists()
