"""What encoder and decoder leave behind when a caller asks for hidden states or attentions."""

from typing import NamedTuple

from torch import Tensor


class Record(NamedTuple):
    """Lists to fill, or None where nobody asked."""

    hidden_states: list[Tensor] | None  # the input and the output of each layer, (B, S or Q, C)
    attentions: list[Tensor] | None  # self-attention of each layer: (B, S, H, L, P) or (B, H, Q, Q)
    cross_attentions: list[Tensor] | None  # decoder: (B, Q, H, L, P)

    @classmethod
    def of(cls, hidden_states: bool, attentions: bool) -> "Record":
        return cls([] if hidden_states else None, [] if attentions else None, [] if attentions else None)

    def as_tuples(self) -> "Record":
        return Record(*(None if entries is None else tuple(entries) for entries in self))


def note(entries: list[Tensor] | None, entry: Tensor) -> None:
    if entries is not None:
        entries.append(entry)
