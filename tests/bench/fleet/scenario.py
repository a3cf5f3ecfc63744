"""A scenario: the machines of a fleet, and the groups of people who use it."""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

HERE = Path(__file__).resolve().parent
SCENARIOS, PROBES = HERE / "scenarios", HERE / "probes"
GRACE_S = 120.0
Durations = Literal["own", "wall"]
Part = TypeVar("Part")


@dataclass(frozen=True)
class BoxConfig:
    """A machine with Ollama: memory in GB, rates in tokens or GB per second."""

    name: str
    models: dict[str, float]
    vram: float = 24
    slots: int = 4
    queue: int = 512
    prefill: float = 2500
    decode: float = 60
    disk: float = 2
    parallel_loads: int = 1


@dataclass(frozen=True)
class Group:
    """People who do the same; sizes in tokens, times in seconds, a picture in kilobytes."""

    name: str
    model: str
    turn: int
    answer: int
    key: str = ""
    people: int = 1
    system: int = 0
    think: float = 5
    turns: int = 8
    at_once: int = 1
    picture: int = 0
    dialect: Literal["openai", "ollama"] = "openai"

    @property
    def is_batch(self) -> bool:
        return self.at_once > 1


@dataclass(frozen=True)
class Scenario:
    name: str
    seconds: float
    boxes: tuple[BoxConfig, ...]
    who: tuple[Group, ...]
    # What is still unanswered so long after the end is given up.
    grace: float
    # So often the people come, to the same machines; the processor time is that of the cheapest time.
    slices: int
    file: Path = field(compare=False)

    def key_names(self) -> set[str]:
        return {group.key for group in self.who if group.key}

    def batch_groups(self) -> list[str]:
        return [group.name for group in self.who if group.is_batch]


def find(name: str) -> Path:
    """The file of a scenario of our own, or any other by its path."""
    return next((path for path in (SCENARIOS / f"{name}.json", PROBES / f"{name}.json") if path.exists()), Path(name))


def read(file: Path) -> Scenario:
    content = json.loads(file.read_text(encoding="utf-8"))
    boxes = tuple(_part(BoxConfig, {**box, "models": sizes(box["models"])}) for box in content["boxes"])
    groups = tuple(_part(Group, group) for group in content["who"])
    for group in groups:
        if not any(group.model in box.models for box in boxes):
            raise ValueError(f"{file.name}: no box has the model {group.model!r} of {group.name!r}")
    for box in boxes:
        if max(box.models.values()) > box.vram:
            raise ValueError(f"{file.name}: a model does not fit into the memory of {box.name!r}")
    grace, slices = float(content.get("grace", GRACE_S)), int(content.get("slices", 1))
    return Scenario(file.stem, float(content["seconds"]), boxes, groups, grace, slices, file)


def sizes(models: str) -> dict[str, float]:
    """`llama3.2=3,qwen3:32b=20`: gigabytes by model."""
    named = (entry.rsplit("=", 1) for entry in models.split(","))
    return {name: float(gigabytes) for name, gigabytes in named}


def _part(kind: type[Part], values: dict[str, Any]) -> Part:
    """Fields that this benchmark does not know are for others."""
    known = {one.name for one in fields(kind)}  # type: ignore[arg-type] # a dataclass
    return kind(**{name: value for name, value in values.items() if name in known})
