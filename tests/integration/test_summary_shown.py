"""Orthanc takes both forms of the summary page, finds them again, and shows them."""

from __future__ import annotations

import urllib.request
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread

from tests import peers, reports
from worker.deliver import cstore
from worker.report import capture


def raw(server: peers.Orthanc, path: str, accept: str) -> bytes:
    """What a browser gets."""
    request = urllib.request.Request(f"http://127.0.0.1:{server.http_port}{path}", headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=30) as response:
        return bytes(response.read())


@pytest.mark.peer
def test_orthanc_shows_the_page_pixel_by_pixel_and_gives_the_pdf_back(tmp_path: Path) -> None:
    """The preview is what its own viewer draws; RLE arrives as it was sent."""
    made = reports.result([reports.radiograph(tmp_path)])
    image, document = *capture.summary(made), *capture.pdf(made)
    with peers.orthanc(tmp_path) as server:
        outcomes = cstore.send([image, document], peer=server.peer())
        assert [(one.delivered, one.warning) for one in outcomes] == [(True, ""), (True, "")]
        by_uid = {str(dcmread(BytesIO(server.file(one))).SOPInstanceUID): one for one in server.instances()}
        with Image.open(BytesIO(raw(server, f"/instances/{by_uid[image.sop_instance_uid]}/preview", "image/png"))) as shown:
            np.testing.assert_array_equal(np.asarray(shown.convert("RGB")), dcmread(BytesIO(image.data)).pixel_array)
        stored = dcmread(BytesIO(document.data))
        pdf = raw(server, f"/instances/{by_uid[document.sop_instance_uid]}/pdf", "application/pdf")
        assert pdf[: stored.EncapsulatedDocumentLength] == stored.EncapsulatedDocument[: stored.EncapsulatedDocumentLength]
