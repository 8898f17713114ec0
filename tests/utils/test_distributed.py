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


@pytest.mark.parametrize(
    ("processes", "backend", "expected"), [(2, None, 0), (2, "nccl", 0), (1, None, 1), (2, "gloo", 1)]
)
def test_several_processes_do_not_share_a_gpu_by_nccl(processes, backend, expected, monkeypatch, capsys):
    """nccl refuses two of them on one; the official program, too, sets --gpu aside then."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    here = dict(RANK=0, WORLD_SIZE=2, LOCAL_RANK=0, LOCAL_WORLD_SIZE=processes, MASTER_ADDR="127.0.0.1")
    for name, value in (here | dict(MASTER_PORT="no port")).items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match="the processes cannot meet"):
        distributed.join(torch.device("cuda:1"), backend)
    assert chosen == [torch.device("cuda", expected)]
    assert ("cuda:1 serves one process" in capsys.readouterr().err) == (expected == 0)


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
