"""Synoptic: a DICOM batch worker that joins the patient's record to the study."""

from typing import Final

__version__: Final = "0.1.0"
