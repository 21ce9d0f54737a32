"""Several processes give what one gives: the loop in threads, and `torchrun` itself."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the bridge needs PyTorch")

import torch

from onnxcomp import load
from onnxcomp.bridge import to_torch
from onnxcomp.bridge.distillation import Distillation
from onnxcomp.bridge.objective import Objective
from onnxcomp.bridge.processes import ALONE, Processes, joined, leads
from onnxcomp.bridge.training import Training
from tests.bridge.test_distillation import Fixed, examples
from tests.search.searching import inputs, wide
from tests.test_tune import noisy

CLOSE = 1e-4  # relative; the same sums in another order, through 12 steps
SETTINGS = Training(epochs=4, batch=8, learning_rate=3e-3)


@dataclass
class Meeting:
    """Where threads that stand for processes add up."""

    count: int
    barrier: threading.Barrier = field(init=False)
    brought: dict[int, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.count, timeout=60)

    def sum(self, rank: int, value: torch.Tensor) -> torch.Tensor:
        self.brought[rank] = value.clone()
        self.barrier.wait()
        found = torch.stack([self.brought[r] for r in range(self.count)]).sum(0)
        self.barrier.wait()
        return found


@dataclass(frozen=True)
class Together(Processes):
    """Threads in the place of processes."""

    meeting: Meeting | None = None

    def add(self, tensors) -> None:
        assert self.meeting is not None
        for tensor in tensors:
            tensor.copy_(self.meeting.sum(self.rank, tensor))

    def total(self, value: float) -> float:
        assert self.meeting is not None
        return float(self.meeting.sum(self.rank, torch.tensor(value, dtype=torch.float64)))


def trained(
    processes: Processes,
    settings: Training = SETTINGS,
    rows: int = 21,
    progress: Callable[[str, float], None] = lambda *_: None,
) -> Distillation:
    model = wide(classes=True)
    module = to_torch(model)
    fit, held = examples(model, rows), examples(model, 7, seed=1)
    objective = Objective(model, module, fit, settings.batch)
    mine = processes.share(held.samples.count)
    found = Distillation(
        module,
        objective,
        Fixed(fit),
        objective,
        held.take(mine),
        settings,
        processes=processes,
        held_share=len(mine) / held.samples.count,
    )
    found.run(late=lambda: False, progress=progress, save=lambda _: None)
    return found


def together(count: int, **options) -> list[Distillation]:
    meeting, found = Meeting(count), {}

    def work(rank: int) -> None:
        found[rank] = trained(Together(rank, count, meeting=meeting), **options)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(found) == count
    return [found[rank] for rank in range(count)]


@pytest.mark.parametrize("count", [2, 6])
def test_several_take_the_steps_of_one(count: int) -> None:
    """21 samples in steps of 8 leave 5 for the last step, less than six processes."""
    alone, (first, *others) = trained(ALONE), together(count)
    for found in (first, *others):
        assert found.before == pytest.approx(alone.before, rel=CLOSE)
        losses = [(e.fit_loss, e.holdout_loss) for e in found.history]
        wanted = [(e.fit_loss, e.holdout_loss) for e in alone.history]
        assert np.ravel(losses) == pytest.approx(np.ravel(wanted), rel=CLOSE)
        assert found.history == first.history
        for mine, its in zip(found.best or (), alone.best or (), strict=True):
            torch.testing.assert_close(mine, its, rtol=CLOSE, atol=1e-6)
    assert alone.best_loss < 0.9 * alone.before


def test_the_tolerance_bites() -> None:
    """Of each step only one process's share, as if nothing were added up."""
    alone, part = trained(ALONE), trained(Processes(0, 1), rows=11)
    assert part.best_loss != pytest.approx(alone.best_loss, rel=10 * CLOSE)


def test_an_interrupt_of_one_ends_all_at_the_same_step() -> None:
    """One that ended alone would leave the others waiting for what it adds."""
    meeting, steps = Meeting(2), {0: 0, 1: 0}

    def work(rank: int) -> None:
        processes = Together(rank, 2, meeting=meeting)

        def count(*_: object) -> None:
            steps[rank] += 1
            if (rank, steps[rank]) == (1, 4):
                processes.interrupts.append(signal.SIGINT)

        with pytest.raises(KeyboardInterrupt):
            trained(processes, progress=count)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert steps == {0: 4, 1: 4}


def test_what_a_cluster_sets_does_not_make_one_wait(monkeypatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert leads()
    with joined() as processes:
        assert processes.count == 1


def test_shares_are_a_partition() -> None:
    for size in (1, 5, 8):
        taken = [i for rank in range(3) for i in Processes(rank, 3).share(size)]
        assert sorted(taken) == list(range(size))
    assert list(ALONE.share(4)) == [0, 1, 2, 3]


@pytest.mark.heavy
@pytest.mark.parametrize("blocks", ["added", "first"])
def test_torchrun_writes_what_one_process_writes(tmp_path: Path, blocks: str) -> None:
    teacher = wide(classes=True)
    teacher.save(tmp_path / "teacher.onnx")
    noisy(teacher).save(tmp_path / "student.onnx")
    np.savez(tmp_path / "samples.npz", **inputs(teacher, 48))
    run = [sys.executable, "-m"]
    several = [*run, "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]

    def tuned(command: list[str], name: str, *flags: str) -> tuple[dict, str]:
        files = ["student.onnx", "--teacher", "teacher.onnx", "--data", "samples.npz"]
        given = [*files, "-o", name, "--epochs", "6", "--blocks", blocks, *flags]
        found = subprocess.run(
            [*command, "onnxcomp", "tune", *given],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert found.returncode == 0, found.stderr
        return load(tmp_path / name).weights, found.stdout

    one, _ = tuned(run, "one.onnx")
    two, told = tuned(several, "two.onnx", "--resume", "state")
    start = load(tmp_path / "student.onnx").weights
    assert told.count("hold-out loss: ") == 1
    for name, array in one.items():
        np.testing.assert_allclose(two[name], array, rtol=CLOSE, atol=1e-6)
    assert max(np.abs(one[n] - a).max() for n, a in start.items()) > 1e-4
    again, _ = tuned(several, "again.onnx", "--resume", "state")
    for name, array in two.items():
        assert np.array_equal(again[name], array)


@pytest.mark.heavy
def test_torchrun_writes_the_best_when_it_is_interrupted(tmp_path: Path) -> None:
    teacher = wide(classes=True)
    teacher.save(tmp_path / "teacher.onnx")
    noisy(teacher).save(tmp_path / "student.onnx")
    np.savez(tmp_path / "samples.npz", **inputs(teacher, 48))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "onnxcomp", "tune", "student.onnx"]
    command += ["--teacher", "teacher.onnx", "--data", "samples.npz", "-o", "out.onnx"]
    command += ["--epochs", "100000", "--resume", "state"]
    with (tmp_path / "told").open("w") as told:
        process = subprocess.Popen(
            command, cwd=tmp_path, stdout=told, stderr=told, preexec_fn=_heeds_interrupts
        )
        try:
            end = time.monotonic() + 120
            while not list(tmp_path.glob("state/*.entry")) and time.monotonic() < end:
                time.sleep(0.2)
            process.send_signal(signal.SIGINT)
            process.wait(60)
        finally:
            process.kill()
    found = (tmp_path / "told").read_text()
    assert "interrupted; the best so far is in out.onnx" in found
    start = load(tmp_path / "student.onnx").weights
    after = load(tmp_path / "out.onnx").weights
    assert any(not np.array_equal(after[name], array) for name, array in start.items())


def _heeds_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
