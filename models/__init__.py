"""Networks and bundles: knows tensors, not DICOM, not SQL, not the worker."""
