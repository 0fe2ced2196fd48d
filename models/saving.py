"""A trained network into its bundle's folder: tensors, temperatures, and where the embeddings of known studies lie.

weights.safetensors holds the network's state and, as ``atypical.mean``, ``atypical.precision`` and ``atypical.limit``, how far from
the studies it learned from a new one may lie (calibration.py). Back again: loading.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from safetensors.torch import save

from models.bundle import Bundle, check_writable, settle
from models.calibration import fit_atypical
from models.files import replacing
from models.loading import PREFIX
from models.table import Labeled
from models.training import Fit, embeddings

#: Share of typical patients that may be called atypical. With fewer than 499 patients the limit is the farthest one of them, and
#: the share is larger: 1 in (patients + 1).
ATYPICAL_SHARE = 0.002
#: Below this the cloud of embeddings has no shape to speak of.
LEAST_PATIENTS = 20


def save_fit(bundle: Bundle, result: Fit, studies: Sequence[Labeled] = ()) -> Bundle:
    """Write weights.safetensors, then its sha256 and the temperatures into bundle.toml; return the bundle as it now is.

    `studies` are those of the training, held-out ones too: from 20 patients on, what lies far from them all is atypical.
    A guarantee (`alpha`) is withdrawn: it was of the old weights. Killed anywhere, it leaves the old bundle, the new one, or new
    weights that the old sha256 refuses; the checkpoint goes last, so that training again finds the same weights.

    Raises
    ------
    InvalidBundleError
        bundle.toml cannot be changed for certain (`bundle.check_writable` says so before a training); it and the weights stay.
    OSError
        The folder cannot be written into.
    """
    check_writable(bundle.folder)
    tensors = {name: tensor.contiguous() for name, tensor in result.network.state_dict().items()}
    groups = np.array([study.group for study in studies])
    if len(set(groups.tolist())) >= LEAST_PATIENTS:
        found = fit_atypical(embeddings(result.network, studies).numpy(), groups=groups, share=ATYPICAL_SHARE)
        limit = np.array(found.limit, np.float32)
        tensors |= {PREFIX + name: torch.from_numpy(array) for name, array in (("mean", found.mean), ("precision", found.precision))}
        tensors[PREFIX + "limit"] = torch.from_numpy(limit)
    raw = save(tensors)
    with replacing(bundle.weights_path) as stream:
        stream.write(raw)
    numbers = {f.name: {"temperature": float(t)} for f, t in zip(bundle.findings, result.temperatures, strict=True)}
    for finding in Bundle.read(bundle.folder, verify=False).findings:  # as they are now: a training takes long
        if finding.alpha:
            numbers[finding.name]["alpha"] = 0.0
    settled = settle(bundle.folder, numbers, sha256=hashlib.sha256(raw).hexdigest())
    if result.checkpoint:
        result.checkpoint.unlink(missing_ok=True)
    return settled
