"""From a DICOM file to what may be proposed: pixels and two harmless tags. Needs the extra `dicom` (pydicom).

By allow-list: a new data set gets what the pixels need and the modality, and nothing else, so that a tag
which nobody thought of doesn't travel (PS3.15 annex E lists what would have to be removed otherwise). Names
burned into the pixels can't be seen by a program: files that say they have some are refused, and files that
don't say are marked for the reviewer.
"""

import io
import os
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import numpy as np
from blindsum.crypto.errors import BlindsumError, MissingExtra
from numpy.typing import NDArray

KEPT: Final = (
    "SamplesPerPixel", "PhotometricInterpretation", "Rows", "Columns", "BitsAllocated", "BitsStored",
    "HighBit", "PixelRepresentation", "PixelData", "PlanarConfiguration", "RescaleSlope", "RescaleIntercept",
    "Modality", "ViewPosition",
)  # fmt: skip
"""Keywords that survive. Modality and view survive only as code words of the standard: anyone may type
anything.
"""
_WORDS: Final = {
    "Modality": frozenset({"CR", "CT", "DX", "MG", "MR", "NM", "OT", "PT", "RF", "US", "XA"}),
    "ViewPosition": frozenset({"AP", "PA", "LL", "RL", "LLD", "LLO", "RLD", "RLO"}),
}


class DicomRefused(BlindsumError):
    """A DICOM file that can't be proposed; the text says why and never quotes the file."""


@dataclass(frozen=True)
class ScrubbedImage:
    """`pixels` float32 (rows, columns) in [0, 1]; `tags` what was kept of the words; `burned_in_unknown` when
    the file doesn't say whether text is burned into the pixels: look at it before approving.
    """

    pixels: NDArray[np.float32]
    tags: dict[str, str]
    burned_in_unknown: bool


def scrub(source: str | os.PathLike[str] | bytes) -> Any:
    """A new pydicom data set with nothing but `KEPT`, without private tags, names, dates or UIDs.

    Raises `DicomRefused` for files without pixels or with burned-in text, `MissingExtra` without pydicom.
    """
    data = _read(source)
    if str(data.get("BurnedInAnnotation", "")).upper() == "YES":
        raise DicomRefused("the file says that text is burned into its pixels; it can't be forwarded")
    if "PixelData" not in data:
        raise DicomRefused("the file has no image")
    clean = import_module("pydicom").Dataset()
    for keyword in KEPT:
        if keyword in data:
            element = data[keyword]
            if keyword in _WORDS and str(element.value) not in _WORDS[keyword]:
                continue
            clean.add(element)
    return clean


def read_dicom(source: str | os.PathLike[str] | bytes) -> ScrubbedImage:
    """The image and the tags that may travel. Raises `DicomRefused`, `MissingExtra`."""
    data = _read(source)
    clean = scrub(source)
    clean.file_meta = _only_syntax(data)
    try:
        values = np.asarray(clean.pixel_array, dtype=np.float32)
    except Exception as error:
        raise DicomRefused(f"the image can't be decoded: {type(error).__name__}") from None
    if values.ndim != 2:
        raise DicomRefused(f"one grey image is needed, and this has the shape {values.shape}")
    values = values * float(clean.get("RescaleSlope", 1)) + float(clean.get("RescaleIntercept", 0))
    span = float(values.max() - values.min())
    pixels = (values - values.min()) / (span or 1.0)
    if clean.get("PhotometricInterpretation") == "MONOCHROME1":
        pixels = 1 - pixels
    tags = {word: str(clean.get(word)) for word in _WORDS if word in clean}
    return ScrubbedImage(pixels.astype(np.float32), tags, "BurnedInAnnotation" not in data)


def _read(source: str | os.PathLike[str] | bytes) -> Any:
    try:
        pydicom = import_module("pydicom")
    except ModuleNotFoundError:
        raise MissingExtra("dicom", "reading DICOM") from None
    try:
        return pydicom.dcmread(io.BytesIO(source) if isinstance(source, bytes) else Path(source))
    except (pydicom.errors.InvalidDicomError, OSError):
        raise DicomRefused("this can't be read as DICOM") from None


def _only_syntax(data: Any) -> Any:
    """File meta information with the transfer syntax alone, which decoding needs."""
    meta = type(data.file_meta)()
    meta.TransferSyntaxUID = data.file_meta.TransferSyntaxUID
    return meta
