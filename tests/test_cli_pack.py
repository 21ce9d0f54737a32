import pytest
from typer.testing import CliRunner

from onnxcomp.cli import app
from onnxcomp.loading import load
from tests.codec.models import every_kind
from tests.codec.test_files import network


def run(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def plain(tmp_path):
    network().save(tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


@pytest.mark.parametrize("profile", ["fast", "balanced"])
def test_pack_and_unpack(profile, plain, tmp_path):
    packed, back = tmp_path / "model.onnxc", tmp_path / "back.onnx"
    done = run("pack", plain, "-o", packed, "--profile", profile)
    assert done.exit_code == 0, done.output
    size = packed.stat().st_size
    assert f"({size:,} bytes, {size / plain.stat().st_size:.1%})" in done.stdout
    assert run("unpack", packed, "-o", back).exit_code == 0
    assert load(back).digest == load(packed).digest == network().digest


def test_other_commands_read_packed_files(plain, tmp_path):
    packed = tmp_path / "model.onnxc"
    assert run("pack", plain, "-o", packed).exit_code == 0
    shown = run("inspect", packed)
    assert shown.exit_code == 0, shown.output
    assert "large" in run("inspect", packed, "--json", "-").stdout


def test_an_input_is_never_overwritten(plain, tmp_path):
    before = plain.read_bytes()
    refused = run("pack", plain, "-o", plain)
    assert refused.exit_code == 2
    assert "never overwritten" in refused.stderr
    assert plain.read_bytes() == before


def test_only_packed_files_are_unpacked(plain, tmp_path):
    refused = run("unpack", plain, "-o", tmp_path / "back.onnx")
    assert refused.exit_code == 2
    assert "not a packed model" in refused.stderr
    assert not (tmp_path / "back.onnx").exists()


def test_damaged_files_and_unknown_profiles_are_refused(plain, tmp_path):
    packed = tmp_path / "model.onnxc"
    assert run("pack", plain, "-o", packed).exit_code == 0
    packed.write_bytes(packed.read_bytes()[:-1])
    assert run("unpack", packed, "-o", tmp_path / "back.onnx").exit_code == 2
    assert run("pack", plain, "-o", packed, "--profile", "smallest").exit_code == 2


def test_a_failed_write_leaves_the_old_file(plain, tmp_path, monkeypatch):
    packed = tmp_path / "model.onnxc"
    assert run("pack", plain, "-o", packed).exit_code == 0
    before = packed.read_bytes()
    every_kind().save(plain)
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space")))
    assert run("pack", plain, "-o", packed).exit_code == 2
    assert packed.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "model.onnxc"]
