"""What encoder and decoder leave behind when a caller asks for hidden states or attentions."""

from typing import NamedTuple

from torch import Tensor

from .ms_deform_attn import SamplingPoints


class Record(NamedTuple):
    """Lists to fill. None: not requested."""

    hidden_states: list[Tensor] | None  # the input and the output of each layer, (B, S or Q, C)
    attentions: list[Tensor] | None  # self-attention of each layer: (B, S, H, L, P) or (B, H, Q, Q)
    cross_attentions: list[Tensor] | None  # decoder: (B, Q, H, L, P)
    locations: list[Tensor] | None  # of the sampling points of deformable attention: (B, S or Q, H, L, P, 2)

    @classmethod
    def of(cls, hidden_states: bool, attentions: bool) -> "Record":
        return cls([] if hidden_states else None, *([] if attentions else None for _ in range(3)))

    def as_tuples(self) -> "Record":
        return Record(*(None if entries is None else tuple(entries) for entries in self))


def note(entries: list[Tensor] | None, entry: Tensor) -> None:
    if entries is not None:
        entries.append(entry)


def note_points(weights: list[Tensor] | None, locations: list[Tensor] | None, points: SamplingPoints | None) -> None:
    if points is not None:
        note(weights, points.weights)
        note(locations, points.locations)
