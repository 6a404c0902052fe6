"""Headers and events as JSON holds them. Everything in them is public."""

from __future__ import annotations

import math
from collections.abc import Container
from dataclasses import dataclass, fields
from typing import Any

from dpfunc import _checks
from dpfunc.events import MECHANISMS, RELATIONS, SAMPLINGS, AnyLog, Log, StepEvent, check_noise

FORMATS = (1, 2)
_WRITTEN = ("noise_multiplier", "sampling_prob", "count", "mechanism", "sampling", "relation")
ALWAYS = frozenset(_WRITTEN)
"""The fields that the first version wrote, and every version writes. To leave one out would be to
guess: most of their defaults are those that cost the least privacy."""
LATER = {field.name: field.default for field in fields(StepEvent) if field.name not in ALWAYS}
"""Fields that came later, written where they differ from their default, and read as it if missing."""
SHARED = {"relation": RELATIONS, "mechanism": MECHANISMS, "sampling": SAMPLINGS}
"""What a header can say for all events, which then do not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What is the same for a whole run: the first line of its log file.

    Args:
        relation, mechanism, sampling: as for StepEvent, of every event in the file; None where they
            differ, and then every event says its own.
        unit: what one example is, without an article: whose presence is protected.
        note: free text. PUBLIC, as all of the file is: no key, and nothing that comes from the data.

    Guarantees:
        A file takes no event that its header does not agree with.

    Raises:
        ValueError, TypeError: an unknown name; a unit or a note that is not text.

    >>> Header.of((StepEvent(noise_multiplier=1.0, sampling_prob=0.1),), unit="user").sampling
    'poisson'
    """

    relation: str | None = None
    mechanism: str | None = None
    sampling: str | None = None
    unit: str = "example"
    note: str = ""

    def __post_init__(self) -> None:
        for name, options in SHARED.items():
            if (value := getattr(self, name)) is None:
                continue
            if name == "mechanism":
                check_noise(value)
            else:
                _checks.choice(options, **{name: value})
        for name in ("unit", "note"):
            if not isinstance(value := getattr(self, name), str):
                raise TypeError(f"Expected {name} to be text, got {value!r}.")

    @classmethod
    def of(cls, log: AnyLog, *, unit: str = "example", note: str = "") -> Header:
        """The header of a log: what all its events have in common."""
        kinds = Log(log).kinds
        found = {name: {getattr(kind, name) for kind in kinds} for name in SHARED}
        common = {name: values.pop() for name, values in found.items() if len(values) == 1}
        return cls(**common, unit=unit, note=note)

    @property
    def shared(self) -> dict[str, str]:
        """The fields that no event in the file spells out."""
        values = {name: getattr(self, name) for name in SHARED}
        return {name: value for name, value in values.items() if value is not None}

    def check(self, log: Log) -> None:
        """Refuse events of another kind."""
        for kind in log.kinds:
            for name, value in self.shared.items():
                if getattr(kind, name) != value:
                    raise ValueError(
                        f"Expected events of {name}={value!r}, as the header of the file says, got "
                        f"{getattr(kind, name)!r}. They belong to another run, in a file of its own."
                    )


def header_to_json(header: Header) -> dict[str, Any]:
    return {"dpfunc_log": 2, **header.shared, "unit": header.unit, "note": header.note}


def header_from_json(entry: dict[str, Any]) -> Header:
    said = {name: value for name, value in entry.items() if name != "dpfunc_log"}
    if unknown := said.keys() - {field.name for field in fields(Header)}:
        raise ValueError(
            f"Expected no {', '.join(sorted(unknown))} in a header. Is dpfunc too old?"
        )
    return Header(**said)


def event_to_json(event: StepEvent, shared: Container[str] = ()) -> dict[str, Any]:
    """An event as JSON can hold it, without the fields that the header holds."""
    entry = {name: getattr(event, name) for name in _WRITTEN if name not in shared}
    if event.noise_multiplier == math.inf:
        entry["noise_multiplier"] = (
            "inf"  # JSON has no infinity; the string reads back through float()
        )
    for name, default in LATER.items():
        if (value := getattr(event, name)) != default:
            entry[name] = value
    return entry


def event_from_json(entry: Any, shared: dict[str, str]) -> StepEvent:
    if not isinstance(entry, dict) or not LATER.keys() >= entry.keys() ^ (ALWAYS - shared.keys()):
        raise ValueError(
            f"Expected an event to have the fields {', '.join(sorted(ALWAYS - shared.keys()))}, and "
            f"beside them at most {', '.join(LATER)}, got {str(entry)[:200]}."
        )
    values: dict[str, Any] = entry | shared
    if values["noise_multiplier"] == "inf":
        values["noise_multiplier"] = math.inf
    return StepEvent(**values)
