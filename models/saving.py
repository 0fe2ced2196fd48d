"""A trained network into its bundle's folder and back: tensors, temperatures, and where the embeddings of known studies lie.

weights.safetensors holds the network's state and, as ``atypical.mean``, ``atypical.precision`` and ``atypical.limit``, how far from
the studies it learned from a new one may lie (calibration.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from models.bundle import Bundle, InvalidBundleError, check_writable, settle
from models.calibration import Atypical, fit_atypical
from models.files import replacing
from models.network import FusionNetwork
from models.table import Labeled
from models.training import Fit, embeddings

_PREFIX = "atypical."
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
        tensors |= {_PREFIX + name: torch.from_numpy(array) for name, array in (("mean", found.mean), ("precision", found.precision))}
        tensors[_PREFIX + "limit"] = torch.from_numpy(limit)
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


def load_network(bundle: Bundle) -> tuple[FusionNetwork, Atypical | None]:
    """The bundle's network with its weights, on the CPU, for inference, and what is atypical for it.

    Raises
    ------
    InvalidBundleError
        Its weights are missing, changed, no safetensors or of another kind of number than the network's, or what they say of atypical
        studies makes no sense.
    RuntimeError, ValueError
        They are another network's, or the configuration makes none.
    """
    tensors: dict[str, Tensor] = bundle.tensors()
    about = {name.removeprefix(_PREFIX): tensors.pop(name) for name in list(tensors) if name.startswith(_PREFIX)}
    network = FusionNetwork(bundle)
    for name, wanted in network.state_dict().items():
        # torch would convert them without a word, and answer something else.
        if name in tensors and tensors[name].dtype != wanted.dtype:
            raise InvalidBundleError(f"{name} in {bundle.weights.file} is {tensors[name].dtype}; the network's is {wanted.dtype}.")
    network.load_state_dict(tensors)
    return network.eval(), _atypical(about, bundle.weights.file) if about else None


def _atypical(about: dict[str, Tensor], file: str) -> Atypical:
    """What is atypical, of ``mean`` (E,), ``precision`` (E, E) and ``limit`` (), all float32."""
    if sorted(about) != ["limit", "mean", "precision"]:
        raise InvalidBundleError(f"{file} holds {', '.join(sorted(about))} of {_PREFIX}*; limit, mean and precision are expected.")
    shapes = {"limit": (), "mean": (size := about["mean"].numel(),), "precision": (size, size)}
    for name, tensor in about.items():
        if tensor.dtype != torch.float32 or tuple(tensor.shape) != shapes[name] or not bool(tensor.isfinite().all()):
            raise InvalidBundleError(f"{_PREFIX}{name} in {file} is not float32 of shape {shapes[name]} and finite.")
    return Atypical(about["mean"].numpy(), about["precision"].numpy(), float(about["limit"]))
