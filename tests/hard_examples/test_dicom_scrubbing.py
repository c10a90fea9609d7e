"""What survives of a DICOM file: pixels, modality and view."""

import io
from typing import Any

import numpy as np
import pytest
from blindsum.client.hard_examples import DicomRefused, read_dicom, scrub

pydicom = pytest.importorskip("pydicom", reason="dicom isn't installed (nor torch)")
from pydicom.data import get_testdata_file  # noqa: E402

SECRETS = ("PatientName", "PatientID", "StudyDate", "InstitutionName", "StudyDescription", "AccessionNumber")


def file(**changes: Any) -> bytes:
    data = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
    for keyword in SECRETS:
        setattr(data, keyword, "20260101" if keyword == "StudyDate" else "Zanzibar")
    data.private_block(0x0099, "vendor", create=True).add_new(1, "LO", "Zanzibar")
    for keyword, value in changes.items():
        setattr(data, keyword, value)
    buffer = io.BytesIO()
    data.save_as(buffer)
    return buffer.getvalue()


def test_only_the_image_survives() -> None:
    source = file(ViewPosition="PA")
    assert b"Zanzibar" in source
    clean = scrub(source)
    assert b"Zanzibar" not in clean.to_json().encode()
    assert {element.keyword for element in clean} <= {
        "SamplesPerPixel", "PhotometricInterpretation", "Rows", "Columns", "BitsAllocated", "BitsStored",
        "HighBit", "PixelRepresentation", "PixelData", "RescaleSlope", "RescaleIntercept", "Modality",
        "ViewPosition",
    }  # fmt: skip
    image = read_dicom(source)
    assert image.tags == {"Modality": "CT", "ViewPosition": "PA"}
    assert (image.pixels.shape, image.pixels.min(), image.pixels.max()) == ((128, 128), 0, 1)
    original = pydicom.dcmread(io.BytesIO(source)).pixel_array.astype(float)
    assert np.corrcoef(image.pixels.ravel(), original.ravel())[0, 1] > 0.999


def test_free_text_in_a_code_word_goes() -> None:
    image = read_dicom(file(Modality="ZANZIBAR", ViewPosition="ZANZIBAR"))
    assert image.tags == {}


def test_burned_in_text() -> None:
    with pytest.raises(DicomRefused, match="burned"):
        read_dicom(file(BurnedInAnnotation="YES"))
    assert read_dicom(file()).burned_in_unknown
    assert not read_dicom(file(BurnedInAnnotation="NO")).burned_in_unknown


def test_what_is_no_image_is_refused() -> None:
    with pytest.raises(DicomRefused):
        read_dicom(b"no DICOM")
    with pytest.raises(DicomRefused, match="no image"):
        read_dicom(str(get_testdata_file("rtplan.dcm")))
