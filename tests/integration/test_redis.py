"""A database with state in memory and on disk, and clients from outside that are connected while it is captured."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from support import redis
from support.netns import NetworkNamespace, join
from support.node import Node
from support.proc import command, wait_for
from support.redis import Client, Closed

ADDRESS = "10.231.78.1"
ANNOTATIONS = {"rewarm.dev/snapshot": "redis"}
KEYS = 2000


@dataclass
class Server:
    """A redis container `id` whose network namespace `inside` is linked to the clients' `outside`."""

    node: Node
    id: str
    inside: NetworkNamespace
    outside: NetworkNamespace

    def client(self, timeout: float = 10.0) -> Client:
        return Client(self.outside.connect(redis.PORT, ADDRESS, timeout=timeout))

    def dump(self) -> bytes:
        """The database file as it is in the container."""
        container = self.node.runtime.containers[self.id]
        return Path(f"/proc/{container.pid}/root{redis.DATA}/dump.rdb").read_bytes()


def server(node: Node, name: str, inside: NetworkNamespace, outside: NetworkNamespace) -> Server:
    node.runtime.create(name, redis.bundle(node.directory / name, ANNOTATIONS, inside.path))
    node.runtime.start(name)
    return Server(node, name, inside, outside)


def value(number: int) -> str:
    return hashlib.blake2b(str(number).encode(), digest_size=64).hexdigest()


@pytest.fixture
def source(node: Node) -> Iterator[Server]:
    """A filled server: most keys are saved on disk, the last ones are in memory only."""
    with NetworkNamespace() as inside, NetworkNamespace() as outside:
        join(inside, outside, f"{ADDRESS}/24", "10.231.78.2/24")
        one = server(node, "source", inside, outside)
        node.runtime.containers["source"].stdout.wait_text("Ready to accept connections")
        with one.client() as client:
            for number in range(KEYS):
                client.send("SET", f"key{number}", value(number))
            assert [client.receive() for _ in range(KEYS)] == ["OK"] * KEYS
            assert client.ask("SAVE") == "OK"
            client.ask("RPUSH", "unsaved", "a", "b")
            client.ask("INCR", "counter")
        yield one


@pytest.fixture
def other() -> Iterator[tuple[NetworkNamespace, NetworkNamespace]]:
    """Another pod's network with the same address, and a client of its own."""
    with NetworkNamespace() as inside, NetworkNamespace() as outside:
        join(inside, outside, f"{ADDRESS}/24", "10.231.78.3/24")
        yield inside, outside


def check_content(client: Client) -> None:
    assert client.ask("DBSIZE") == KEYS + 2
    for number in range(KEYS):
        client.send("GET", f"key{number}")
    assert [client.receive() for _ in range(KEYS)] == [value(number) for number in range(KEYS)]
    assert client.ask("LRANGE", "unsaved", 0, -1) == ["a", "b"]


def clients(client: Client) -> int:
    found = dict(line.split(":", 1) for line in client.ask("INFO", "clients").splitlines() if ":" in line)
    return int(found["connected_clients"])


def test_memory_and_disk_come_back(source: Server, other: tuple[NetworkNamespace, NetworkNamespace]) -> None:
    node = source.node
    with source.client() as connected:
        run_id = server_id(connected)
        saved = source.dump()
        node.rewarm("capture", "source", "--name", "redis")
        assert connected.ask("SET", "later", "source only") == "OK"
        copy = server(node, "copy", *other)
        assert node.outcome("copy")["outcome"] == "warm"
        with copy.client() as client:
            check_content(client)
            assert client.ask("GET", "later") is None
            assert client.ask("GET", "counter") == "1"
            assert server_id(client) == run_id, "the same server, not one that has read the file"
            assert copy.dump() == saved, "what it had saved on disk"
            # The copy saves for itself, by a child process, and the source's file stays.
            assert client.ask("SET", "later", "copy only") == "OK"
            assert client.ask("BGSAVE") == "Background saving started"
            wait_for("the new database file", lambda: copy.dump() != saved)
        assert source.dump() == saved
        assert connected.ask("GET", "later") == "source only"


def move_link(old: Server, new: Server) -> None:
    """Takes the clients' end of the old server's network to the new server: same address, same hardware address."""
    device = device_of(old.inside)
    command("ip", "-n", new.inside.name, "link", "delete", device_of(new.inside))
    command("ip", "-n", old.inside.name, "link", "set", device, "netns", new.inside.name)
    command("ip", "-n", new.inside.name, "address", "add", f"{ADDRESS}/24", "dev", device)
    command("ip", "-n", new.inside.name, "link", "set", device, "up")


def device_of(network: NetworkNamespace) -> str:
    found = json.loads(network.run("ip", "-json", "link", "show", "type", "veth"))
    assert len(found) == 1
    return str(found[0]["ifname"])


def server_id(client: Client) -> str:
    found = dict(line.split(":", 1) for line in client.ask("INFO", "server").splitlines() if ":" in line)
    return str(found["run_id"])


def test_the_file_on_disk_is_a_database(source: Server, other: tuple[NetworkNamespace, NetworkNamespace]) -> None:
    """After the copy's server is started anew, without any memory, it reads what the source had saved."""
    source.node.rewarm("capture", "source", "--name", "redis")
    copy = server(source.node, "copy", *other)
    assert source.node.outcome("copy")["outcome"] == "warm"
    runtime = source.node.runtime
    with copy.client() as client:
        check_content(client)
    script = "redis-server --protected-mode no --dir /var/lib/redis --save '' --port 6380 --daemonize yes"
    runtime.exec("copy", "sh", "-c", script)
    with Client(copy.outside.connect(6380, ADDRESS)) as second:
        wait_for("the file to be loaded", lambda: second.ask("DBSIZE") == KEYS)
        assert second.ask("GET", "key7") == value(7)
        assert second.ask("EXISTS", "unsaved") == 0


def test_source_serves_on(source: Server) -> None:
    """Connections of every kind are open while it is captured, and none of them notices."""
    node = source.node
    with source.client() as idle, source.client() as blocked, source.client() as listening:
        blocked.send("BLPOP", "queue", 0)
        assert listening.ask("SUBSCRIBE", "news") == ["subscribe", "news", 1]
        before = clients(idle)
        assert before == 3
        for _ in range(2):
            node.rewarm("capture", "source", "--name", "redis")
        assert clients(idle) == before
        check_content(idle)
        assert idle.ask("RPUSH", "queue", "work") == 1
        assert blocked.receive() == ["queue", "work"]
        assert idle.ask("PUBLISH", "news", "here") == 1
        assert listening.receive() == ["message", "news", "here"]
        with source.client() as late:
            assert late.ask("PING") == "PONG", "and it takes new ones"
    assert node.runtime.state("source")["status"] == "running"


def test_requests_keep_coming_during_the_capture(source: Server) -> None:
    """Answers to requests that arrive while it is held still come late, in order and whole."""
    sent = 0
    with ThreadPoolExecutor(1) as background, source.client(timeout=60) as client:
        capture = background.submit(source.node.rewarm, "capture", "source", "--name", "redis")
        while not capture.done() or sent < 100:
            sent += 1
            assert client.ask("INCR", "requests") == sent
        assert "captured default/redis" in capture.result().stdout
        assert client.ask("GET", "requests") == str(sent)


def test_client_sees_its_connection_closed(source: Server, other: tuple[NetworkNamespace, NetworkNamespace]) -> None:
    """The server's address moves to the restored container, as a service's does: an old connection is reset there."""
    node = source.node
    with source.client() as connected, source.client() as idle:
        node.rewarm("capture", "source", "--name", "redis")
        assert connected.ask("PING") == "PONG"
        copy = server(node, "copy", *other)
        assert node.outcome("copy")["outcome"] == "warm"
        move_link(source, copy)
        with pytest.raises(Closed):
            connected.ask("PING")
        with pytest.raises(Closed):
            idle.ask("GET", "counter")
        # The restored server has noticed as well: it holds no client that nobody is behind.
        moved = Server(node, "copy", copy.inside, source.outside)
        with moved.client() as client:
            check_content(client)
            wait_for("the end of the old clients", lambda: clients(client) == 1)
            assert client.ask("SET", "new", "1") == "OK"


def test_stopped_and_restored_in_the_same_network(source: Server) -> None:
    """A pod's network namespace outlives its containers: the next one listens on the same address."""
    node = source.node
    connected = source.client()
    with connected:
        node.rewarm("capture", "source", "--name", "redis", "--stop")
        with pytest.raises(Closed):
            connected.ask("PING")
    assert node.runtime.wait_stopped("source") == 128 + 9
    node.runtime.delete("source")
    copy = server(node, "copy", source.inside, source.outside)
    assert node.outcome("copy")["outcome"] == "warm"
    with copy.client() as client:
        check_content(client)
        wait_for("the end of the old client", lambda: clients(client) == 1)
