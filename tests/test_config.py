"""Presets, overrides, errors that name the nearest key, and the way to TOML and back."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from advkd.config import (
    Config,
    ConfigError,
    DistillConfig,
    UNetConfig,
    as_tree,
    build,
    config_for,
    load_preset,
    override,
    parse,
    presets,
    to_toml,
)
from advkd.models.unet import UNet


@pytest.mark.parametrize("name", presets())
def test_presets_parse_and_go_round(name: str) -> None:
    config = load_preset(name)
    assert config.name == name
    assert parse(to_toml(config)) == config


def test_presets_are_there() -> None:
    assert {"fashion-mnist", "smoke"} <= set(presets())


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'fashion-mnits'.*'fashion-mnist'"):
        load_preset("fashion-mnits")
    with pytest.raises(ConfigError, match=r"absent\.toml"):
        load_preset("absent.toml")


def test_a_preset_by_path(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('name = "mine"\n[distill]\nlr = 3e-4\n')
    config = load_preset(str(tmp_path / "mine.toml"), ["distill.batch=8"])
    assert (config.name, config.distill.lr, config.distill.batch) == ("mine", 3e-4, 8)
    assert config.teacher == Config().teacher


def test_empty_text_is_the_defaults() -> None:
    assert parse("") == Config()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[distil]\nlr = 1.0", ["'distil'", "'distill'"]),
        ("[distill]\nlearning = 1.0", ["'distill.learning'", "nearest"]),
        ("[distill]\nlr_dd = 1.0", ["'distill.lr_dd'", "'lr_d'"]),
        ("[unet]\nattention_heads_dim = 8", ["'attention_head_dim'"]),
        ("nane = 'x'", ["'nane'", "'name'"]),
    ],
)
def test_an_unknown_key_names_the_nearest(text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[distill]\nlr = 'fast'", ["'distill.lr'", "float", "'fast'"]),
        ("[distill]\nlr = true", ["'distill.lr'", "float", "True"]),
        ("[distill]\nsteps = 1.5", ["'distill.steps'", "int", "1.5"]),
        ("[distill]\nsteps = true", ["'distill.steps'", "int"]),
        ("[data]\nflip = 1", ["'data.flip'", "bool"]),
        ("[data]\npath = 3", ["'data.path'", "str"]),
        ("[student]\nstages = 7", ["'student.stages'", "list of int"]),
        ("[student]\nstages = [7, 14.5]", ["'student.stages'", "int", "14.5"]),
        ("[unet]\nattention_head_dim = 'all'", ["'unet.attention_head_dim'", "int"]),
        ("distill = 3", ["'distill'", "table"]),
        ("[distill\nlr = 1", ["TOML"]),
    ],
)
def test_an_ill_typed_value_is_an_error(text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    for word in words:
        assert word in str(caught.value)


def test_a_whole_number_passes_for_a_float() -> None:
    lr = parse("[distill]\nlr = 1").distill.lr
    assert lr == 1.0 and type(lr) is float


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("distill.lr=2e-4", 2e-4),
        ("distill.lr = 2e-4", 2e-4),
        ("distill.steps=10", 10),
        ("distill.schedule=progressive", "progressive"),
        ("distill.schedule='progressive'", "progressive"),
        ("data.flip=true", True),
        ("data.path=/some/where with spaces", "/some/where with spaces"),
        ("data.path=a=b", "a=b"),
        ("data.path=", ""),
        ("student.stages=[8, 16]", (8, 16)),
        ("distill.head_weights=[1, 0.5]", (1.0, 0.5)),
        ("distill.head_weights=[]", ()),
        ("unet.num_class_embeds=10", 10),
        ("unet.num_class_embeds=none", None),
        ("unet.sample_size=none", None),
        ("name=other", "other"),
        ("name=3", None),
    ],
)
def test_overrides(assignment: str, value: Any) -> None:
    key = assignment.partition("=")[0].strip()
    if assignment == "name=3":
        with pytest.raises(ConfigError, match="'name'"):
            override(Config(), [assignment])
        return
    found: Any = override(Config(), [assignment])
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value and type(found) is type(value)


def test_overrides_apply_in_order_and_leave_the_rest() -> None:
    base = load_preset("fashion-mnist")
    config = override(base, ["distill.lr=1", "distill.lr=0.5"])
    assert config == dataclasses.replace(base, distill=dataclasses.replace(base.distill, lr=0.5))
    assert override(base, []) == base


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("distill.lr", ["'distill.lr'", "table.key=value"]),
        ("distill.lrr=1", ["'distill.lrr'", "'lr'"]),
        ("distil.lr=1", ["'distil'", "'distill'"]),
        ("distill.lr=fast", ["'distill.lr'", "float"]),
        ("distill.lr=none", ["'distill.lr'", "float", "None"]),
        ("distill.lr.x=1", ["distill.lr"]),
        ("distill=3", ["'distill'"]),
        ("=3", ["key"]),
        ("name.x=3", ["name"]),
    ],
)
def test_a_bad_override_is_an_error(assignment: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        override(Config(), [assignment])
    for word in words:
        assert word in str(caught.value)


@functools.cache
def strategy_of(cls: Any) -> st.SearchStrategy:
    """Any value of a configuration's dataclass that is within its bounds."""
    hints = typing.get_type_hints(cls)
    return st.builds(
        cls, **{f.name: entries_of(hints[f.name], f.metadata) for f in dataclasses.fields(cls)}
    )


def entries_of(hint: Any, metadata: Any) -> st.SearchStrategy:
    """Any value of a field's type, within its bounds."""
    if dataclasses.is_dataclass(hint):
        return strategy_of(hint)
    if isinstance(hint, types.UnionType):
        return st.one_of(*(entries_of(arg, metadata) for arg in typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return st.lists(entries_of(typing.get_args(hint)[0], metadata), max_size=3).map(tuple)
    low, high, above = metadata.get("range", (0, 1, False))
    if hint is float:
        return st.floats(low, high if high < math.inf else None, exclude_min=above)
    return {
        int: st.integers(int(low), int(min(high, 2**63 - 1))),
        str: st.sampled_from(metadata["choices"]) if "choices" in metadata else st.text(max_size=8),
        bool: st.booleans(),
        type(None): st.none(),
    }[hint]


def bounded_fields() -> list[tuple[str, Any, Any]]:
    """(key, metadata, type) of every bounded field."""
    found = []
    for table, cls in typing.get_type_hints(Config).items():
        if dataclasses.is_dataclass(cls):
            hints = typing.get_type_hints(cls)
            for f in dataclasses.fields(cls):
                if f.metadata:
                    found.append((f"{table}.{f.name}", f.metadata, hints[f.name]))
    return found


@pytest.mark.parametrize(("key", "metadata", "hint"), bounded_fields())
def test_what_is_out_of_bounds_is_refused_by_key_and_value(
    key: str, metadata: Any, hint: Any
) -> None:
    in_a_list = typing.get_origin(hint) is tuple
    values: list[Any] = ["no-such-choice"]
    if "range" in metadata:
        low, high, above = metadata["range"]
        values = [low if above else low - 1, high + 1 if high < 2**62 else 2**70]
    for value in values:
        if "float" in str(hint) and value == 2**70:
            value = "inf"
        with pytest.raises(ConfigError, match=rf"{key}=.*(is not|one of)"):
            override(Config(), [f"{key}=[{value!r}]" if in_a_list else f"{key}={value}"])


def test_most_fields_are_bounded() -> None:
    numbers = {
        f"{table}.{name}"
        for table, cls in typing.get_type_hints(Config).items()
        if dataclasses.is_dataclass(cls)
        for name, hint in typing.get_type_hints(cls).items()
        if "int" in str(hint) or "float" in str(hint)
    }
    assert numbers <= {key for key, _, _ in bounded_fields()}


@settings(max_examples=50, deadline=None)
@given(strategy_of(Config))
def test_any_configuration_survives_toml(config: Config) -> None:
    assert parse(to_toml(config)) == config


def test_none_survives_toml_and_other_overrides() -> None:
    config = override(Config(), ["unet.sample_size=none"])
    assert Config().unet.sample_size is not None
    assert parse(to_toml(config)).unet.sample_size is None
    assert override(config, ["distill.lr=1"]).unet.sample_size is None


@given(st.text(max_size=30))
@settings(max_examples=100, deadline=None)
def test_any_text_as_an_override_is_used_or_refused(text: str) -> None:
    for assignment in (text, f"data.path={text}", f"distill.lr={text}"):
        try:
            config = override(Config(), [assignment])
        except ConfigError:
            continue
        assert isinstance(config.data.path, str) and isinstance(config.distill.lr, float)


def test_build_of_one_part_names_its_path() -> None:
    assert build(DistillConfig, {"lr": 1}, "") == DistillConfig(lr=1.0)
    with pytest.raises(ConfigError, match=r"'a\.b\.lrr'"):
        build(DistillConfig, {"lrr": 1}, "a.b.")


def test_tree_has_only_plain_values() -> None:
    tree = as_tree(Config())
    assert tree["distill"]["lr"] == Config().distill.lr
    assert tree["unet"]["num_class_embeds"] is None
    assert build(Config, tree, "") == Config()


@pytest.mark.parametrize(
    ("size", "channels"), [(8, 1), (14, 3), (16, 3), (28, 1), (32, 3), (64, 1)]
)
def test_a_configuration_for_images_without_a_preset(size: int, channels: int) -> None:
    config = config_for(size, channels)
    assert (config.data.size, config.data.channels) == (size, channels)
    assert isinstance(config.unet, UNetConfig)
    assert config.unet.in_channels == config.unet.out_channels == channels
    UNet(config.unet)
    assert config.student.stages[-1] == size
    assert len(config.student.widths) == len(config.student.stages)
    assert parse(to_toml(config)) == config


@pytest.mark.parametrize("size", [1, 9, 27, 36, 100])
def test_a_size_that_cannot_be_halved_is_an_error(size: int) -> None:
    with pytest.raises(ConfigError, match=f"{size}x{size} pixels"):
        config_for(size, 1)
