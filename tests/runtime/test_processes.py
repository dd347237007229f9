"""Runs of several processes and hosts that lose one, or the line between them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest
import torch

import selfensemble as rse
from selfensemble.evaluation import read_results
from selfensemble.evaluation.certified import CERTIFICATES
from selfensemble.evaluation.results import Results
from selfensemble.runtime.processes import check_restarts, this_process
from selfensemble.training.checkpoints import CHECKPOINT

from ..command import run
from ..forked import Forked, run_ranks, torchrun

PROTOCOL = """\
description: enough for something to go wrong in the middle
images: 24
shard: 4
judge: {seeds: 1, queries: 1}
attacks: [{attack: pgd, norm: l2, eps: [0.5], steps: 30, eot: 4}]
"""
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # see selfensemble.runtime.processes.check_restarts
}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    file = tmp_path_factory.mktemp("protocol") / "p.yaml"
    file.write_text(PROTOCOL)
    return ["evaluate", "digits-rse", "--protocol", str(file), "--device", "cpu", "--out"]


@pytest.fixture(scope="module")
def one(task: list[str], tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What one process finds that nobody disturbs."""
    out = tmp_path_factory.mktemp("one") / "run"
    run(*task, out)
    return read_results(out)


def shards(out: Path) -> dict[Path, int]:
    """Finished shards and when they were written."""
    return {path: path.stat().st_mtime_ns for path in out.glob("shards/*.safetensors")}


def wait_for_shards(out: Path, least: int) -> dict[Path, int]:
    deadline = time.monotonic() + 120
    while len(found := shards(out)) < least:
        assert time.monotonic() < deadline, "no shard was finished"
        time.sleep(0.005)
    return found


# Two processes that are started again when one of them fails.
ELASTIC = ["--standalone", "--nproc-per-node=2", "--max-restarts=5", "-m", "selfensemble"]


def kill_second_rank(launcher: Forked) -> None:
    _, second = sorted(child.pid for child in psutil.Process(launcher.pid).children())
    os.kill(second, signal.SIGKILL)


def test_a_killed_rank_comes_back_and_repeats_no_shard(tmp_path: Path, task: list[str], one: Results) -> None:
    """torchrun starts all ranks again; results are those of one process."""
    out = tmp_path / "two"
    with torchrun(*ELASTIC, *task, out, env=ENVIRONMENT) as process:
        before = wait_for_shards(out, 2)
        kill_second_rank(process)
        assert not (out / "results.json").exists()  # in the middle of the work
        assert process.wait(300) == 0
    after = shards(out)
    assert {path: after[path] for path in before} == before
    two = read_results(tmp_path / "two")
    assert (two.clean, two.attacks) == (one.clean, one.attacks)


def test_training_goes_on_when_a_rank_is_killed(tmp_path: Path) -> None:
    """Both go on from the last checkpoint, to the weights of a run that nobody disturbed."""
    sets = ("train.epochs=3", "train.checkpoint_steps=5", "model.width=0.5", "noise.draws=2")
    task = ["train", "digits-rse", *(part for each in sets for part in ("--set", each)), "--resume", "--out"]
    ranks = run_ranks(*task, tmp_path / "whole")
    assert [rank.returncode for rank in ranks] == [0, 0], ranks
    out = tmp_path / "killed"
    with torchrun(*ELASTIC, *task, out, env=ENVIRONMENT) as process:
        deadline = time.monotonic() + 120
        while not (out / CHECKPOINT).exists():
            assert time.monotonic() < deadline, "no checkpoint was written"
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        kill_second_rank(process)
        assert not (out / "results.json").exists()
        assert process.wait(300) == 0
    whole, killed = (rse.load(tmp_path / name).state_dict() for name in ("whole", "killed"))
    for name, values in whole.items():
        torch.testing.assert_close(killed[name], values, rtol=0, atol=0)


TRAINING = """\
import hashlib, json, sys
import selfensemble as rse

def digest(tensors):
    parts = [tensor.detach().float().cpu().contiguous().numpy().tobytes() for tensor in tensors]
    return hashlib.sha256(b"".join(parts)).hexdigest()

recipe = rse.load_recipe("digits-rse", ["train.epochs=1", "model.width=0.25"])
trainer = rse.Trainer(recipe, sys.argv[1])
noise = []
layer = next(iter(rse.noise_layers(trainer.network.model).values()))
layer.register_forward_hook(lambda module, args, output: noise.append((output - args[0])[:4]))
trainer.run()
found = {"noise": digest(noise[:1]), "weights": digest(trainer.network.state_dict().values())}
with open(f"{sys.argv[1]}-{trainer.accelerator.process_index}.json", "w") as file:
    json.dump(found, file)
"""


def test_ranks_draw_their_own_noise_and_end_in_the_same_weights(tmp_path: Path) -> None:
    ranks = run_ranks("-c", TRAINING, tmp_path / "run")
    assert [rank.returncode for rank in ranks] == [0, 0], ranks
    first, second = (json.loads((tmp_path / f"run-{rank}.json").read_text()) for rank in range(2))
    assert first["noise"] != second["noise"]
    assert first["weights"] == second["weights"]


def test_certificates_of_two_processes_are_those_of_one(tmp_path: Path) -> None:
    """Of the command torchrun, which starts `python -m selfensemble`."""
    task = ["selfensemble", "certify", "digits-rse", "--n-images", "30", "--n", "200", "--shard", "10"]
    run(*task[1:], "--device", "cpu", "--out", tmp_path / "one")
    # Behind --, or --n would be of torchrun.
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, "-m", "--", *task, "--device", "cpu", "--out", str(tmp_path / "two")]
    subprocess.run(command, check=True, capture_output=True, env=ENVIRONMENT)
    one, two = ((tmp_path / name / CERTIFICATES).read_text() for name in ("one", "two"))
    assert one == two


def test_restarts_that_could_hang_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(ValueError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        this_process("cpu")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    check_restarts()


# What `ip netns exec` does to the network of a process.
ENTER = """\
import ctypes, os
network = os.open("/run/netns/{name}", os.O_RDONLY)
assert ctypes.CDLL(None, use_errno=True).setns(network, 0x40000000) == 0, ctypes.get_errno()
os.close(network)
"""


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a line between them: 10.99.0.1 and 10.99.0.2."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    names = (f"rse-a-{uuid.uuid4().hex[:6]}", f"rse-b-{uuid.uuid4().hex[:6]}")
    made = []
    try:
        for name in names:
            try:
                _ip("netns", "add", name)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
            made.append(name)
        _ip(*f"link add line netns {names[0]} type veth peer name line netns {names[1]}".split())
        for number, name in enumerate(names, 1):
            _ip("-n", name, "addr", "add", f"10.99.0.{number}/24", "dev", "line")
            _ip("-n", name, "link", "set", "line", "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def test_two_hosts_whose_line_is_cut_for_a_while(
    tmp_path: Path, task: list[str], one: Results, hosts: tuple[str, str]
) -> None:
    """Each its own network, a folder in common; five seconds without the line in the middle of the work."""
    out = tmp_path / "two"
    running = list[Forked]()
    for number, name in enumerate(hosts):
        launcher: list[str | Path] = [
            "--nnodes=2", "--nproc-per-node=1", f"--node-rank={number}", "--master-addr=10.99.0.1",
            "--master-port=29555", "-m", "selfensemble", *task, out,
        ]  # fmt: skip
        environment = ENVIRONMENT | {"GLOO_SOCKET_IFNAME": "line"}
        running.append(torchrun(*launcher, before=ENTER.format(name=name), env=environment))
    try:
        before = wait_for_shards(out, 2)
        _ip("-n", hosts[0], "link", "set", "line", "down")
        time.sleep(5)
        assert [process.poll() for process in running] == [None, None]
        _ip("-n", hosts[0], "link", "set", "line", "up")
        for process in running:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors[-2000:]
    finally:
        for process in running:
            process.kill()
            process.wait()
    after = shards(out)
    assert {path: after[path] for path in before} == before
    two = read_results(tmp_path / "two")
    assert (two.clean, two.attacks) == (one.clean, one.attacks)
