"""`tune` by its choices: structure that is kept, blocks, epochs, optimizers."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="the bridge needs PyTorch")

from onnxcomp.model import Model
from tests.analysis.channel_graphs import Graph
from tests.search.cases import residual
from tests.test_tune import GAIN, QUICK, noisy, tuned


def test_codebooks_stay_codebooks() -> None:
    teacher = residual()
    rng = np.random.default_rng(0)
    values = np.linspace(-0.5, 0.5, 11).astype(np.float32)
    coded = {
        n: rng.choice(values, a.shape) if a.ndim == 4 else a
        for n, a in teacher.weights.items()
    }
    student = Model(teacher.skeleton, coded)
    free, kept = (tuned(student, teacher, keep_structure=keep) for keep in (False, True))
    kernels = [n for n, a in coded.items() if a.ndim == 4]
    for result in (free, kept):
        assert result.improved
        few = [len(np.unique(result.model.weights[n])) <= len(values) for n in kernels]
        assert all(few) == (result is kept)
    assert all(np.all(kept.model.weights[n][coded[n] == 0] == 0) for n in kernels)
    assert any(not np.array_equal(kept.model.weights[n], coded[n]) for n in kernels)


@pytest.mark.parametrize("blocks", ["first", "off"])
def test_blocks_are_used_as_asked_for(blocks: str) -> None:
    teacher = residual()
    result = tuned(noisy(teacher), teacher, blocks=blocks)
    phases = [epoch.phase for epoch in result.history]
    assert (
        phases == {"first": ["blocks"] * 6 + ["outputs"] * 6, "off": ["outputs"] * 12}[blocks]
    )
    assert result.before is not None
    assert result.after is not None
    assert result.after < result.before / GAIN


@pytest.mark.parametrize(
    ("noise", "phases"), [(0.3, {"blocks", "outputs"}), (0.03, {"outputs"})]
)
def test_blocks_come_first_where_much_was_lost(noise: float, phases: set[str]) -> None:
    teacher = residual()
    result = tuned(noisy(teacher, noise), teacher, blocks="auto", epochs=2)
    assert {epoch.phase for epoch in result.history} == phases


def test_what_has_no_blocks_learns_by_its_outputs() -> None:
    g = Graph(8, 8, 8)
    teacher = g.model(g.conv("x", 8, 4))
    result = tuned(noisy(teacher), teacher, epochs=2)
    assert result.notes == ("no block ends alike in both graphs; compares outputs only",)


def test_a_run_of_blocks_first_goes_on_in_either_phase(tmp_path) -> None:
    teacher = residual()
    student = noisy(teacher)
    whole = tuned(student, teacher, blocks="first", epochs=6)
    for phase, epoch in (("blocks", 2), ("outputs", 3)):

        def stop(label: str, share: float, wanted: str = f"{phase}, epoch {epoch} of") -> None:
            if wanted in label:
                raise KeyboardInterrupt

        options = {"blocks": "first", "epochs": 6, "resume": tmp_path / phase}
        cut = tuned(student, teacher, progress=stop, **options)
        assert cut.interrupted
        assert cut.history[-1:] != whole.history[-1:]
        again = tuned(student, teacher, **options)
        assert again.history == whole.history
        assert again.model.digest == whole.model.digest


def test_a_time_limit_is_filled_with_epochs(monkeypatch) -> None:
    # so that it ends by itself on a busy machine
    monkeypatch.setattr("onnxcomp.bridge.distillation.FILLED", 0.3)
    teacher = residual()
    student = noisy(teacher)
    result = tuned(student, teacher, epochs=None, time_limit=8.0)
    assert result.improved
    assert result.history[-1].learning_rate < QUICK["learning_rate"] / 4  # it came to its end


def test_momentum_learns_too() -> None:
    teacher = residual()
    student = noisy(teacher)
    result = tuned(student, teacher, optimizer="sgd", learning_rate=1e-2)
    assert result.before is not None
    assert result.after is not None
    assert result.after < result.before / GAIN
    assert result.model.digest != tuned(student, teacher).model.digest


def test_a_resumed_run_keeps_its_number_of_epochs(tmp_path) -> None:
    """Whether it began with a time limit or without: the learning rate falls over them."""
    teacher = residual()
    student = noisy(teacher)
    limits = [600.0, None]
    for name, (first, second) in {"with": limits, "without": limits[::-1]}.items():
        seen: list[set[str]] = []
        for limit, last in ((first, 2), (second, 4)):
            numbers: set[str] = set()

            def stop(
                label: str, _: float, last: int = last, found: set[str] = numbers
            ) -> None:
                if ", epoch " in label:
                    found.add(label.split(" of ")[1].split(",")[0])
                if f"epoch {last} of" in label:
                    raise KeyboardInterrupt

            options = {"epochs": None, "time_limit": limit, "resume": tmp_path / name}
            assert tuned(student, teacher, progress=stop, **options).interrupted
            seen.append(numbers)
        assert seen[0] == seen[1]
