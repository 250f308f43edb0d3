"""What the server and the encoder process say to each other."""

from __future__ import annotations

from msgspec import Struct


class LoadModel(Struct, frozen=True, tag="load"):
    """First message to the process: load the model in this folder, then say Ready."""

    folder: str


class EncodeTexts(Struct, frozen=True, tag="encode"):
    """To the process: encode these. The answer carries the same number."""

    number: int
    texts: list[str]


class Ready(Struct, frozen=True, tag="ready"):
    """First message of the process: the model is loaded."""

    dimensions: int


class Encoded(Struct, frozen=True, tag="encoded"):
    """One vector for each text, in order: little-endian float32, row after row."""

    number: int
    vectors: bytes


ToWorker = LoadModel | EncodeTexts
FromWorker = Ready | Encoded
