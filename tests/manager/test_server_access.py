"""Who may connect, and where a manager may listen."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from manager_helpers import RawClient, ServerThread, config, key, serving

from vcache.config import ManagerConfig, VCacheConfig
from vcache.errors import AddressInUseError, ConfigError, ManagerRefusedError, ProtocolError
from vcache.manager import wire
from vcache.manager.address import load_token, parse_address
from vcache.manager.api import PROTOCOL_VERSION
from vcache.manager.client import Manager
from vcache.manager.connect import connect
from vcache.manager.server.server import ManagerServer
from vcache.manager.socket_transport import SocketTransport

SECRET = "horse battery staple"


@pytest.mark.parametrize(
    "text", ["embedded", "unix:///run/m.sock", "tcp://127.0.0.1:80", "tcp://[::1]:80", "tcp://host.name:0"]
)
def test_addresses_parse_and_print(text: str) -> None:
    assert str(parse_address(text)) == text


@pytest.mark.parametrize(
    "text",
    ["", "unix://relative", "unix:/x", "tcp://host", "tcp://:80", "tcp://h:x", "tcp://h:65536", "tcp://h/x:1", "http://h:1"],
)
def test_bad_addresses_name_the_key(text: str) -> None:
    with pytest.raises(ConfigError, match=r"manager\.address"):
        parse_address(text)


def test_socket_path_too_long_for_the_kernel() -> None:
    with pytest.raises(ConfigError, match="107 bytes"):
        parse_address("unix:///" + "x" * 120)


def test_token_comes_from_file_then_environment(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "token"
    path.write_text(f"{SECRET}\n")
    path.chmod(0o600)
    where = ManagerConfig(token_file=str(path))
    assert load_token(where, {"VCACHE_TOKEN": "other"}) == SECRET.encode()
    assert load_token(ManagerConfig(), {"VCACHE_TOKEN": "other"}) == b"other"
    assert load_token(ManagerConfig(), {}) == b""
    assert not caplog.records
    path.chmod(0o644)
    assert load_token(where) == SECRET.encode()
    assert "chmod 600" in caplog.text
    assert SECRET not in caplog.text
    path.write_text("\n")
    with pytest.raises(ConfigError, match="empty"):
        load_token(where)
    with pytest.raises(ConfigError, match="No such file"):
        load_token(ManagerConfig(token_file=str(tmp_path / "none")))


def test_unix_socket_is_private(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "m.sock"
    with serving(f"unix://{path}") as server:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert server.address == f"unix://{path}"
    assert list(path.parent.iterdir()) == [], "nothing is left behind"


def test_folder_that_others_can_change_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(ConfigError, match="chmod 700"):
        ServerThread(config(f"unix://{tmp_path}/m.sock"))
    tmp_path.chmod(0o1777)
    with serving(f"unix://{tmp_path}/m.sock"):
        pass
    tmp_path.chmod(0o700)


def test_second_manager_on_one_unix_socket(tmp_path: Path) -> None:
    address = f"unix://{tmp_path}/m.sock"
    with serving(address) as server:
        with pytest.raises(AddressInUseError, match="another manager"):
            ServerThread(config(address))
        client = server.client()
        assert client.lookup([key(1)]) == 0, "the first one is unharmed"
        client.close()
    with serving(address):
        pass


def test_socket_that_another_program_serves_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "m.sock"
    with socket.socket(socket.AF_UNIX) as foreign:
        foreign.bind(str(path))
        foreign.listen(1)
        with pytest.raises(AddressInUseError):
            ServerThread(config(f"unix://{path}"))
        assert path.exists()
    with serving(f"unix://{path}"):
        pass  # Now it is stale, and replaced.


def test_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "m.sock"
    path.write_text("precious")
    with pytest.raises(AddressInUseError, match="no socket"):
        ServerThread(config(f"unix://{path}"))
    assert path.read_text() == "precious"


def test_second_manager_on_one_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VCACHE_TOKEN", SECRET)
    with serving("tcp://127.0.0.1:0") as server:
        with pytest.raises(AddressInUseError, match="already listens"):
            ServerThread(config(server.address))


def test_tcp_without_a_secret_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VCACHE_TOKEN", raising=False)
    with pytest.raises(ConfigError, match=r"token_file.*VCACHE_TOKEN"):
        ManagerServer(VCacheConfig(manager=config("tcp://127.0.0.1:0")))


def test_embedded_and_unreachable_addresses_cannot_be_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VCACHE_TOKEN", SECRET)
    for address in ("embedded", "tcp://192.0.2.1:0"):
        with pytest.raises(ConfigError, match=r"manager\.address"):
            asyncio.run(ManagerServer(VCacheConfig(manager=config(address))).start())


def test_wrong_token_is_refused_and_never_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("VCACHE_TOKEN", SECRET)
    with serving("tcp://127.0.0.1:0") as server:
        right = server.client()
        monkeypatch.setenv("VCACHE_TOKEN", "wrong guess")
        with pytest.raises(ManagerRefusedError, match=r"wrong token; set manager\.token_file or VCACHE_TOKEN"):
            connect(VCacheConfig(manager=config(server.address)))
        monkeypatch.delenv("VCACHE_TOKEN")
        with pytest.raises(ManagerRefusedError, match="wrong token"):
            connect(VCacheConfig(manager=config(server.address)))
        assert right.lookup([key(1)]) == 0
        assert server.counter("connections_rejected") == 2
        right.close()
    assert SECRET not in caplog.text
    assert "wrong guess" not in caplog.text


def test_version_mismatch_gives_one_clear_error(tmp_path: Path) -> None:
    with serving(f"unix://{tmp_path}/m.sock") as server:
        raw = RawClient(server.address)
        answer = raw.hello(version=PROTOCOL_VERSION + 1)
        assert answer.code == wire.ERROR
        error = wire.decode_error(answer.payload)
        assert isinstance(error, ProtocolError)
        assert f"version {PROTOCOL_VERSION + 1}" in str(error)
        assert f"version {PROTOCOL_VERSION};" in str(error)
        assert raw.receive() is None, "then it hangs up"
        raw.close()


def test_client_of_another_version_fails_at_construction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = wire.encode_hello
    with serving(f"unix://{tmp_path}/m.sock") as server:
        monkeypatch.setattr(wire, "encode_hello", lambda hello: encode(hello, PROTOCOL_VERSION + 1))
        with pytest.raises(ProtocolError, match="install the same release"):
            connect(VCacheConfig(manager=config(server.address)))


def test_a_server_that_is_no_manager_is_recognised(tmp_path: Path) -> None:
    path = tmp_path / "m.sock"
    with socket.socket(socket.AF_UNIX) as foreign:
        foreign.bind(str(path))
        foreign.listen(4)
        client = Manager(SocketTransport(config(f"unix://{path}")))
        connection, _ = foreign.accept()
        connection.recv(100)
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        assert not client.wait_connected(5)
        assert isinstance(client.last_failure, ProtocolError)
        assert "not a vcache manager" in str(client.last_failure)
        connection.close()
        client.close()


_OTHER_USER = """
import os, socket, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
s = socket.socket(socket.AF_UNIX)
s.settimeout(5)
s.connect(sys.argv[1])
sys.stdout.buffer.write(s.recv(1000))
assert s.recv(1000) == b""
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_other_users_are_refused_by_the_kernels_word() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder, serving(f"unix://{folder}/m.sock") as server:
        path = Path(folder) / "m.sock"
        path.parent.chmod(0o755)
        path.chmod(0o666)  # Even if somebody opened it up.
        done = subprocess.run([sys.executable, "-c", _OTHER_USER, str(path)], capture_output=True, timeout=20, check=False)
        assert b"user 65534 may not use the manager of user 0" in done.stdout, done.stderr
        assert server.counter("connections_rejected") == 1


def test_client_does_not_trust_a_manager_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vcache.manager.socket_transport.peer_uid", lambda sock: 4242)
    with serving(f"unix://{tmp_path}/m.sock"):
        with pytest.raises(ManagerRefusedError, match="user 4242"):
            connect(VCacheConfig(manager=config(f"unix://{tmp_path}/m.sock")))
