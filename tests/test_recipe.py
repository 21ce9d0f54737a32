"""Recipes: round trips, precedence, and messages that name the file and the key."""

import math
from dataclasses import fields
from typing import get_type_hints

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from onnxcomp.errors import ParameterError
from onnxcomp.recipe import (
    Recipe,
    dump_recipe,
    load_recipe,
    parse_duration,
    parse_latency,
    parse_quantity,
    provenance,
    resolve,
)
from onnxcomp.search.settings import Limits, Settings

OTHER = Settings(
    limits=Limits(macs=0.5, size=1.5e6, latency=4000.0, drop=0.01, drift=0.05),
    methods=("factorize",),
    target="x86-avx2",
    grid="off",
    exclude="head|['\"#: ]",
    patience=2.0,
    data_aware=False,
    seed=7,
    threads=2,
    search_threads=3,
    memory=4e9,
    solver_seconds=5.0,
    time_limit=600.0,
    tune=True,
    device="cuda",
    emit="codebook",
    latency=False,
    force=True,
)


def saved(path, text):
    file = path / "recipe.yaml"
    file.write_text(text)
    return file


def write(tmp_path, **content):
    return saved(tmp_path, yaml.safe_dump({"schema_version": 1, **content}))


@pytest.mark.parametrize("settings", [Settings(), OTHER])
def test_round_trip(tmp_path, settings):
    text = dump_recipe(settings, metric="psnr:255", provenance={"model": {"path": "a"}})
    recipe = load_recipe(saved(tmp_path, text))
    assert resolve(recipe, {}) == settings
    assert recipe.metric == "psnr:255"


def test_every_setting_differs_in_the_round_trip():
    default = Settings()
    same = [
        f.name for f in fields(Settings) if getattr(OTHER, f.name) == getattr(default, f.name)
    ]
    assert not same, f"the round trip proves nothing about {same}"


@given(
    macs=st.floats(1e-3, 1) | st.floats(1e3, 1e12) | st.none(),
    memory=st.floats(1, 1e15),
    exclude=st.text(st.characters(categories=("L", "N", "Z", "P")), max_size=20).map(
        lambda text: "".join(f"[{c}]" for c in text if c not in "[]\\^") or None
    ),
)
def test_round_trip_of_values(tmp_path_factory, macs, memory, exclude):
    settings = Settings(limits=Limits(macs=macs), memory=memory, exclude=exclude)
    text = dump_recipe(settings, provenance={})
    folder = tmp_path_factory.mktemp("recipe")
    assert resolve(load_recipe(saved(folder, text)), {}) == settings


def test_all_types_of_settings_can_be_read(tmp_path):
    for name, kind in get_type_hints(Settings).items():
        with pytest.raises(ParameterError, match=f"recipe.yaml: '{name}' must be"):
            load_recipe(write(tmp_path, **{name: {"a": 1} if kind is not Limits else 3}))


def test_flag_over_recipe_over_default(tmp_path):
    recipe = load_recipe(write(tmp_path, seed=3, threads=2, limits={"macs": 0.5, "size": 0.3}))
    flags = {"seed": 4, "threads": None, "limits": Limits(macs=0.7)}
    settings = resolve(recipe, flags)
    assert (settings.seed, settings.threads, settings.grid) == (4, 2, "auto")
    assert settings.limits == Limits(macs=0.7, size=0.3)
    assert resolve(recipe, {}).seed == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"sed": 1}, "unknown key 'sed'; known are .*seed"),
        ({"seed": "one"}, "'seed' must be a whole number; got 'one'"),
        ({"seed": True}, "'seed' must be a whole number"),
        ({"force": "yes"}, "'force' must be true or false"),
        ({"methods": "factorize"}, "'methods' must be a list of names"),
        ({"memory": "4 parsecs"}, "'memory' must be a number"),
        ({"limits": {"mac": 1}}, "unknown key 'mac' in 'limits'"),
        ({"limits": {"macs": -1}}, "'macs' must be a number above 0"),
        ({"limits": {"macs": "150%"}}, "'limits.macs' must be a number"),
        ({"limits": {"latency": "4 parsecs"}}, "'limits.latency' must be a share, micros"),
        ({"limits": {"latency": True}}, "'limits.latency' must be a share, micros"),
        ({"limits": {"drop": "1ms"}}, "'limits.drop' must be a number"),
        ({"time_limit": "soon"}, "'time_limit' must be seconds, or a time"),
        ({"time_limit": True}, "'time_limit' must be seconds, or a time"),
        ({"metric": 3}, "'metric' must be a name"),
        ({"schema_version": 2}, "'schema_version' must be 1; got 2"),
    ],
)
def test_wrong_content_names_file_and_key(tmp_path, content, message):
    with pytest.raises(ParameterError, match=f"recipe.yaml: .*{message}"):
        load_recipe(write(tmp_path, **content))


def test_times_in_a_recipe_read_as_they_do_in_flags(tmp_path):
    text = "schema_version: 1\ntime_limit: 10m\nlimits: {latency: 4ms, drop: 1%}\n"
    settings = resolve(load_recipe(saved(tmp_path, text)), {})
    assert settings.time_limit == 600.0
    assert settings.limits == Limits(latency=4000.0, drop=0.01)
    text = "schema_version: 1\ntime_limit: 90\nlimits: {latency: 60%}\n"
    settings = resolve(load_recipe(saved(tmp_path, text)), {})
    assert (settings.time_limit, settings.limits.latency) == (90.0, 0.6)
    with pytest.raises(ParameterError, match=r"recipe\.yaml: 'time_limit' must be above 0 s"):
        resolve(load_recipe(write(tmp_path, time_limit=-1)), {})


@pytest.mark.parametrize("text", ["- a\n", "a: [", "\x00", "a: !!python/object:os.x {}", ""])
def test_what_is_no_mapping_is_refused(tmp_path, text):
    with pytest.raises(ParameterError, match=r"recipe\.yaml: "):
        load_recipe(saved(tmp_path, text))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ParameterError, match=r"absent\.yaml: cannot be read: No such file"):
        load_recipe(tmp_path / "absent.yaml")
    with pytest.raises(ParameterError, match="at most 65536 bytes"):
        load_recipe(saved(tmp_path, "#" * 70_000))


def test_wrong_values_name_the_flag_or_the_file(tmp_path):
    with pytest.raises(
        ParameterError, match=r"^--methods: 'methods' must be one of .*factorize"
    ):
        resolve(Recipe(), {"methods": ("magic",)})
    recipe = load_recipe(write(tmp_path, target="abacus"))
    with pytest.raises(ParameterError, match=r"recipe\.yaml: 'target' must be one of"):
        resolve(recipe, {})
    recipe = load_recipe(write(tmp_path, limits={"size": 1.5}))
    with pytest.raises(ParameterError, match=r"recipe\.yaml: 'size' of 1\.5 is neither"):
        resolve(recipe, {})
    with pytest.raises(ParameterError, match=r"^limits: 'macs' of 2 is neither"):
        resolve(Recipe(), {"limits": Limits(macs=2)})


def test_bare_off_is_not_false(tmp_path):
    recipe = load_recipe(saved(tmp_path, "schema_version: 1\ngrid: off\n"))
    assert resolve(recipe, {}).grid == "off"
    assert resolve(load_recipe(write(tmp_path, grid=8)), {}).grid == "8"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.5", 0.5),
        ("50%", 0.5),
        ("100 %", 1.0),
        ("1.5MB", 1.5e6),
        ("300kB", 3e5),
        ("1MiB", 2**20),
        ("4gb", 4e9),
        ("20M", 2e7),
        ("1048576", 2**20),
        ("2e6", 2e6),
        ("12 B", 12),
    ],
)
def test_quantities(text, value):
    assert math.isclose(parse_quantity(text), value, rel_tol=1e-12)


@pytest.mark.parametrize(
    "text",
    ["", "0", "-1", "nan", "inf", "1e999", "150%", "1.5XB", "MB", "1..5", "1,5MB", "0x10"],
)
def test_no_quantities(text):
    with pytest.raises(ParameterError, match="is no positive number"):
        parse_quantity(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90s", 90.0),
        ("10m", 600.0),
        ("10 min", 600.0),
        ("1h", 3600.0),
        ("4ms", 0.004),
        ("800us", 8e-4),
        ("1.5H", 5400.0),
        ("2e3ms", 2.0),
    ],
)
def test_durations(text, seconds):
    assert math.isclose(parse_duration(text), seconds, rel_tol=1e-12)


@pytest.mark.parametrize(
    "text", ["", "10", "0s", "-1s", "nan", "s", "1e999h", "5d", "10%", "1..5s", "10M B"]
)
def test_no_durations(text):
    with pytest.raises(ParameterError, match="is no positive number with one of the units us"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [("0.6", 0.6), ("60%", 0.6), ("1", 1.0), ("4ms", 4000.0), ("800us", 800.0), ("1s", 1e6)],
)
def test_latencies_are_shares_or_microseconds(text, value):
    assert math.isclose(parse_latency(text), value, rel_tol=1e-12)


@pytest.mark.parametrize("text", ["", "0", "-4ms", "2", "4000", "150%", "4 parsecs", "0.5us"])
def test_no_latencies(text):
    """A bare number above 1 has no unit, and a share is never read out of a time."""
    with pytest.raises(ParameterError, match="neither a share of the original's time"):
        parse_latency(text)


def test_provenance_tells_files_and_versions(tmp_path):
    file = saved(tmp_path, "abc")
    made = provenance({"model": file, "data": tmp_path, "preprocess": None})
    assert made["model"]["sha256"].startswith("ba7816bf8f01cfea")  # FIPS 180-2, B.1
    assert "sha256" not in made["data"]
    assert "preprocess" not in made
    assert {"python", "onnxruntime"} <= made["versions"].keys()
    assert yaml.safe_load(yaml.safe_dump(made)) == made
