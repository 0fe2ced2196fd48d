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

from models.bundle import Bundle, settle
from models.calibration import Atypical, fit_atypical
from models.network import FusionNetwork
from models.table import Labeled
from models.training import Fit, embeddings

_PREFIX = "atypical."
#: Share of typical patients that may be called atypical; with fewer than 1 / share patients, those beyond the farthest one.
ATYPICAL_SHARE = 0.002
#: Below this the cloud of embeddings has no shape to speak of.
LEAST_PATIENTS = 20


def save_fit(bundle: Bundle, result: Fit, studies: Sequence[Labeled] = ()) -> Bundle:
    """Write weights.safetensors, then its sha256 and the temperatures into bundle.toml; return the bundle as it now is.

    `studies` are those of the training, held-out ones too: from 20 patients on, what lies far from them all is atypical.
    """
    tensors = {name: tensor.contiguous() for name, tensor in result.network.state_dict().items()}
    groups = np.array([study.group for study in studies])
    if len(set(groups.tolist())) >= LEAST_PATIENTS:
        found = fit_atypical(embeddings(result.network, studies).numpy(), groups=groups, share=ATYPICAL_SHARE)
        limit = np.array(found.limit, np.float32)
        tensors |= {_PREFIX + name: torch.from_numpy(array) for name, array in (("mean", found.mean), ("precision", found.precision))}
        tensors[_PREFIX + "limit"] = torch.from_numpy(limit)
    raw = save(tensors)
    bundle.weights_path.write_bytes(raw)
    temperatures = {f.name: {"temperature": float(t)} for f, t in zip(bundle.findings, result.temperatures, strict=True)}
    return settle(bundle.folder, temperatures, sha256=hashlib.sha256(raw).hexdigest())


def load_network(bundle: Bundle) -> tuple[FusionNetwork, Atypical | None]:
    """The bundle's network with its weights, on the CPU, for inference, and what is atypical for it.

    Raises
    ------
    InvalidBundleError
        Its weights are missing, changed or no safetensors.
    RuntimeError, ValueError
        They are another network's, or the configuration makes none.
    """
    tensors: dict[str, Tensor] = bundle.tensors()
    about = {name.removeprefix(_PREFIX): tensors.pop(name).numpy() for name in list(tensors) if name.startswith(_PREFIX)}
    network = FusionNetwork(bundle)
    network.load_state_dict(tensors)
    return network.eval(), Atypical(about["mean"], about["precision"], float(about["limit"])) if about else None
