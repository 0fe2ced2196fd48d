"""A trained network out of its bundle's folder, as saving.py wrote it.

Apart from saving.py, so that a worker, which learns nothing, starts without what trains.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.bundle import Bundle, InvalidBundleError
from models.calibration import Atypical
from models.network import FusionNetwork

#: Of the tensors that say what is atypical.
PREFIX = "atypical."


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
    about = {name.removeprefix(PREFIX): tensors.pop(name) for name in list(tensors) if name.startswith(PREFIX)}
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
        raise InvalidBundleError(f"{file} holds {', '.join(sorted(about))} of {PREFIX}*; limit, mean and precision are expected.")
    shapes = {"limit": (), "mean": (size := about["mean"].numel(),), "precision": (size, size)}
    for name, tensor in about.items():
        if tensor.dtype != torch.float32 or tuple(tensor.shape) != shapes[name] or not bool(tensor.isfinite().all()):
            raise InvalidBundleError(f"{PREFIX}{name} in {file} is not float32 of shape {shapes[name]} and finite.")
    return Atypical(about["mean"].numpy(), about["precision"].numpy(), float(about["limit"]))
