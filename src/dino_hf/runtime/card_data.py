"""The schema of `config.provenance`, the record of the weights that the model card reports."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, get_args

from ..common.text import code_span, one_line
from ..common.values import is_number

# Takes a value, its name in the record and the list of unreadable entries. Returns None for a value of a wrong type.
_Reader = Callable[[Any, str, list[str]], Any]


def _is_interval(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(is_number, value))


def _reader(is_right: Callable[[Any], bool], convert: Callable[[Any], Any] = lambda value: value) -> _Reader:
    def read(value: Any, name: str, unread: list[str]) -> Any:
        if is_right(value):
            return convert(value)
        unread.append(code_span(name))
        return None

    return read


def _each(read: _Reader) -> _Reader:
    """Read every value of a dictionary. Unreadable values are left out."""

    def read_all(value: Any, name: str, unread: list[str]) -> dict:
        entries = _read_dict(value, name, unread) or {}
        known = {
            one_line(key): read(entry, f"{name}.{key}", unread) for key, entry in entries.items() if entry is not None
        }
        return {key: entry for key, entry in known.items() if entry is not None}

    return read_all


_read_text = _reader(lambda value: isinstance(value, str), lambda value: one_line(value) or None)
_read_number = _reader(is_number)
_read_dict = _reader(lambda value: isinstance(value, dict))
_READERS: dict[Any, _Reader] = {  # by the type of a field
    str | None: _read_text,
    float | None: _read_number,
    bool: lambda value, name, unread: value is True,
    dict: _read_dict,
    dict[str, str]: _each(_read_text),
    dict[str, float]: _each(_read_number),
    dict[str, list[float]]: _each(_reader(_is_interval)),
}


class _Part:
    """A dataclass whose fields all have defaults."""

    @classmethod
    def from_dict(cls, record: dict, where: str, unread: list[str]):
        """Read the known entries of a record.

        Args:
            where: name of the record, with a dot at its end.
            unread: gets the name of each entry of a wrong type. The field then keeps its default.
        """
        values = {}
        for entry in fields(cls):
            value, name = record.get(entry.name), f"{where}{entry.name}"
            if value is None or not entry.init:
                continue
            if entry.type in _READERS:
                value = _READERS[entry.type](value, name, unread)
            elif (part := _read_dict(value, name, unread)) is not None:
                schema = next(member for member in (entry.type, *get_args(entry.type)) if is_dataclass(member))
                value = schema.from_dict(part, f"{name}.", unread)
            else:
                continue
            if value is not None:
                values[entry.name] = value
        return cls(**values)


@dataclass
class Conversion(_Part):
    """The checkpoint of another project that the weights were converted from."""

    project: str | None = None
    file: str | None = None
    sha256: str | None = None
    url: str | None = None
    weights: str | None = None  # digest of the converted weights
    published: str | None = None  # name of the published checkpoint
    published_ap: float | None = None
    published_ap_data: str | None = None  # data set of this AP, if it is not COCO val2017
    assumed: dict = field(default_factory=dict)  # settings that the file does not hold


@dataclass
class Scores(_Part):
    """Metrics of one data set. -1, COCO's value for "nothing to measure", is left out."""

    dataset: str | None = None
    num_images: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self):
        self.metrics = {name: value for name, value in self.metrics.items() if value >= 0}


@dataclass
class OldClassScores(Scores):
    """Scores of classes that the detector knew before training and that the training data do not annotate."""

    before: dict[str, float] = field(default_factory=dict)  # metrics before training
    is_agreement: bool = False  # the ground truth is detections of the old detector


@dataclass
class Evaluated(Scores):
    """The evaluation that the card reports."""

    step: float | None = None
    weights: str | None = None  # digest of the evaluated weights
    objects: dict[str, float] = field(default_factory=dict)  # class name -> number of objects
    best: dict[str, float] = field(default_factory=dict)  # threshold with the highest F1, and its values
    pictures: dict[str, str] = field(default_factory=dict)  # file name -> caption
    test: Scores | None = None
    old_classes: OldClassScores | None = None
    after_training: bool = False


@dataclass
class Training(_Part):
    """What the weights were trained on."""

    dataset: str | None = None
    num_images: float | None = None
    steps: float | None = None
    recipe: dict = field(default_factory=dict)
    selected: str | None = None  # how the weights were selected
    evaluation: Evaluated = field(default_factory=Evaluated)


@dataclass
class CardData(_Part):
    """All that a card reports of the weights.

    Attributes:
        unread: names of entries of a wrong type, as code.
        digest: `weights_digest` of the weights that the card describes; None if unknown.
    """

    converted_from: Conversion | None = None
    base_model: str | None = None
    license: str | None = None
    start: str | None = None  # start of training, if it was not a model: "random weights"
    training: Training | None = None
    unread: list[str] = field(default_factory=list, init=False)
    digest: str | None = field(default=None, init=False)

    @classmethod
    def from_provenance(cls, provenance: Any, digest: str | None = None) -> "CardData":
        """Read `config.provenance`, which may have any form."""
        unread: list[str] = []
        record = ({} if provenance is None else _read_dict(provenance, "provenance", unread)) or {}
        data = cls.from_dict(record, "", unread)
        if data.training is None and record.get("training") is not None:
            data.training = Training()  # an unreadable record of training is no reason to call the weights untrained
        data.unread, data.digest = unread, digest
        return data

    @property
    def evaluation(self) -> Evaluated:
        return Evaluated() if self.training is None else self.training.evaluation

    @property
    def recorded_digest(self) -> str | None:
        """Digest of the weights that the recorded AP belongs to: the evaluated ones, or without training the converted ones."""
        if self.training is not None:
            return self.evaluation.weights
        return None if self.converted_from is None else self.converted_from.weights

    @property
    def are_changed(self) -> bool | None:
        """Whether the weights differ from the recorded ones; None if unknown."""
        return None if None in (self.digest, self.recorded_digest) else self.digest != self.recorded_digest

    @property
    def is_measured(self) -> bool:
        """Whether the recorded metrics belong to exactly these weights. Training may have continued since."""
        if self.are_changed is None:
            return bool(self.evaluation.metrics) and self.evaluation.step == self.training.steps
        return bool(self.evaluation.metrics) and not self.are_changed
