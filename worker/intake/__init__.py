"""Doors in: DICOM associations, HL7 messages, FHIR bundles; and when a study is complete."""
