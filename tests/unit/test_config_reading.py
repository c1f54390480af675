"""How settings are read by their types, on toy dataclasses: each declaration of config/declare.py, and advice that is tried first."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest

from rcm_megatron.config.advice import explain
from rcm_megatron.config.declare import (
    AttributeOf,
    Bounds,
    ByName,
    Change,
    Fraction,
    MergedOnto,
    Positive,
    PositiveFloat,
    Problem,
    Refused,
    Variants,
)
from rcm_megatron.config.errors import ConfigError
from rcm_megatron.config.loader import as_dict
from rcm_megatron.config.reading import build, read, section_problems


@dataclass(frozen=True, kw_only=True)
class Engine:
    kind: Literal["steam"] = "steam"
    boilers: Positive
    pressure: PositiveFloat = 12.0


@dataclass(frozen=True, kw_only=True)
class Motor:
    kind: Literal["electric"] = "electric"
    volts: Positive


@dataclass(frozen=True, kw_only=True)
class Wagon:
    seats: Positive
    doors: Positive = 2
    share: Fraction = 0.5

    def check(self, path: str):
        if self.seats % self.doors:
            yield Problem(
                f"{path}.seats={self.seats} must divide by {path}.doors={self.doors}",
                (Change(f"{path}.seats", range(self.seats, 0, -1)), Change(f"{path}.doors", range(self.doors, 0, -1))),
            )


class Whistle:
    @dataclass(frozen=True, kw_only=True)
    class Settings:
        pitch: PositiveFloat


class Bell:
    @dataclass(frozen=True, kw_only=True)
    class Settings:
        strokes: Positive = 1


SIGNALS = {"whistle": Whistle, "bell": Bell}


@dataclass(frozen=True, kw_only=True)
class Role:
    wagon: Annotated[Wagon | None, MergedOnto("wagon")] = None


@dataclass(frozen=True, kw_only=True)
class Train:
    wagon: Wagon
    drive: Engine | Motor | None = None
    spare: Annotated[Engine | Motor, Variants("kind", lambda: {"steam": Engine, "electric": Motor})] | None = None
    signals: Annotated[Mapping[str, Any], ByName(lambda: AttributeOf(SIGNALS, "Settings"))] = field(
        default_factory=dict
    )
    roles: Mapping[str, Role] = field(default_factory=dict)
    stops: Annotated[tuple[Positive, ...], Bounds(count=1)] = (1,)
    gauge: Annotated[int, Bounds(ge=0, lt=10, note="0: narrow")] | None = None


WAGON = {"seats": 8}


def problems(**data) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        build(Train, {"wagon": WAGON, **data})
    return str(caught.value).splitlines()


@pytest.mark.parametrize("where", ["drive", "spare"])
def test_a_section_is_of_the_class_that_its_literal_field_says(where):
    train = build(Train, {"wagon": WAGON, where: {"kind": "electric", "volts": 750}})
    assert getattr(train, where) == Motor(volts=750)
    assert getattr(build(Train, {"wagon": WAGON, where: None}), where) is None
    assert problems(**{where: {"kind": "electrik", "volts": 750}}) == [
        f"{where}.kind: got 'electrik' (text), need one of steam, electric; did you mean electric?"
    ]
    assert problems(**{where: {"volts": 750}}) == [
        f"{where}.kind: got nothing, need one of steam, electric; add it to the configuration"
    ]
    assert problems(**{where: {"kind": "electric", "volts": 0, "boilers": 2}}) == [
        f"{where}.boilers: unknown key; did you mean drive.boilers?",
        f"{where}.volts: got 0, need an integer greater than 0",
    ]
    (message,) = problems(**{where: {"kind": ["electric"], "volts": 1}})
    assert message.startswith(f"{where}.kind: got ['electric']")


def test_each_name_of_a_registry_has_its_own_class():
    train = build(Train, {"wagon": WAGON, "signals": {"whistle": {"pitch": 440}, "bell": {}}})
    assert train.signals == {"whistle": Whistle.Settings(pitch=440.0), "bell": Bell.Settings()}
    assert problems(signals={"wistle": {}, "whistle": {"pitsh": 1}}) == [
        "signals.wistle: unknown key; did you mean signals.whistle?",
        "signals.whistle.pitsh: unknown key; did you mean signals.whistle.pitch?",
        "signals.whistle.pitch: got nothing, need a finite number greater than 0; add it to the configuration",
    ]


def test_a_registry_that_grows_is_read_as_it_is_then(monkeypatch):
    assert problems(signals={"horn": {}})[0].startswith("signals.horn: unknown key")
    monkeypatch.setitem(SIGNALS, "horn", Bell)
    assert build(Train, {"wagon": WAGON, "signals": {"horn": {}}}).signals == {"horn": Bell.Settings()}


def test_a_part_of_a_section_is_merged_onto_the_one_it_names():
    data = {"wagon": {"seats": 8, "doors": 4}, "roles": {"dining": {"wagon": {"seats": 12}}, "plain": {}}}
    train = build(Train, data)
    assert train.roles == {"dining": Role(wagon=Wagon(seats=12, doors=4)), "plain": Role()}
    assert build(Train, as_dict(train)) == train
    assert data["roles"]["dining"]["wagon"] == {"seats": 12}


def test_what_a_merged_section_took_over_is_named_where_it_was_given():
    found = problems(wagon={"seats": 8, "doors": "two"}, roles={"dining": {"wagon": {"seats": -1}}})
    assert found == [
        "wagon.doors: got 'two' (text), need an integer greater than 0",
        "roles.dining.wagon.seats: got -1, need an integer greater than 0",
    ]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"stops": []}, "stops: got [], need a list with 1 or more items, each an integer greater than 0"),
        ({"stops": [1, 0]}, "stops.1: got 0, need an integer greater than 0"),
        ({"gauge": 10}, "gauge: got 10, need an integer at least 0 and less than 10 (0: narrow), or null"),
        (
            {"gauge": True},
            "gauge: got True (true/false), need an integer at least 0 and less than 10 (0: narrow), or null",
        ),
        ({"roles": []}, "roles: got [] (a list), need a mapping of names"),
        ({"roles": {"dining": 1}}, "roles.dining: got 1 (an integer), need a mapping"),
        ({"wagon": {"seats": 2, "share": 2}}, "wagon.share: got 2, need a finite number at least 0 and at most 1"),
        ({"wagon": {}}, "wagon.seats: got nothing, need an integer greater than 0; add it to the configuration"),
    ],
)
def test_bounds_say_what_they_got_and_need(data, message):
    assert problems(**data) == [message]


def test_what_was_refused_ends_a_rule_and_no_other():
    train, refused = read(Train, {"wagon": {"seats": "many", "share": 0.25}, "gauge": 3})
    assert len(refused) == 1 and list(section_problems(train)) == []
    assert (train.gauge, train.wagon.share) == (3, 0.25)
    for use in (
        bool,
        str,
        lambda seats: seats > 1,
        lambda seats: 8 % seats,
        lambda seats: seats.real,
        lambda seats: [*seats],
    ):
        with pytest.raises(Refused):
            use(train.wagon.seats)


def even_seats(train: Train, processes: int | None) -> list[Problem]:
    """All rules of a toy program: those of the sections, and that seats are even."""
    found = list(section_problems(train))
    if train.wagon.seats % 2:
        changes = (Change("wagon.seats", (train.wagon.seats + 1, train.wagon.seats + 3), most=2),)
        found.append(Problem(f"wagon.seats={train.wagon.seats} must be even", changes, otherwise="ask the workshop"))
    if processes is not None and processes % 2:
        found.append(
            Problem(f"processes: got {processes}, need an even number", (Change("processes", (processes + 1,)),))
        )
    return found


def test_advice_that_another_rule_refuses_is_not_given():
    # 9 of 3 doors would do for the wagon alone, but it is odd; 12 mends both, 10 would leave the doors uneven
    train = build(Train, {"wagon": {"seats": 9, "doors": 3}})
    assert explain(train, 3, even_seats) == [
        "wagon.seats=9 must be even; set wagon.seats to 12",
        "processes: got 3, need an even number; start 4 processes",
    ]
    train, _ = read(Train, {"wagon": {"seats": 10, "doors": 3}})
    assert explain(train, None, even_seats) == [
        "wagon.seats=10 must divide by wagon.doors=3; set wagon.seats to 6, or set wagon.doors to 2"
    ]
    train, _ = read(Train, {"wagon": {"seats": 15, "doors": 5}})
    assert explain(train, None, even_seats) == ["wagon.seats=15 must be even; ask the workshop"]
