"""What keeps processes from meeting ends in one line."""

import socket

import pytest
import torch

from utils import distributed
from utils.cli import UserError


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match=r"process 1 .* no GPU of its own \(1 found\)"):
        distributed.join(torch.device("cuda"))


def test_an_address_in_use(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        settings = dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match="the processes cannot meet") as error:
            distributed.join(torch.device("cpu"))
    assert port in str(error.value) and len(str(error.value).splitlines()) == 1
    assert not torch.distributed.is_initialized()
