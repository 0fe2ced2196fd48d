"""One stage of learning, whole: batches, steps, averaged weights, early stop, checkpoint, several processes.

::

    order of the epoch ─ global batch ─ this process's rows ─ loss ─ gradients, averaged over processes ─ clip ─ AdamW ─▶ averaged weights
    end of the epoch   ─ held-out loss ─ best kept ─ checkpoint ─ progress ─ stop?

Every random number comes of seed, stage and epoch: a run that was killed draws what it would have drawn. What decides
which data are seen is drawn for the global batch, of which each process takes its rows: 1 process with batch 8 and 2 with
batch 4 see the same.

Not here: what is learned, and from what (training.py).
"""

from __future__ import annotations

import atexit
import hashlib
import math
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils import deterministic as deterministics

from models.files import replacing
from models.spec import TrainingConfig
from models.table import Draw

#: Called after each epoch with (epoch, epochs, validation loss).
Progress = Callable[[int, int, float], None]
#: ``epoch``, ``train_loss``, ``validation_loss`` and ``stage`` of one epoch.
Epoch = dict[str, int | float | str]


@dataclass(frozen=True, slots=True)
class Learned:
    """What one stage came to: the best averaged weights and how it got there; `best_loss` is NaN where nothing could judge them."""

    weights: dict[str, Tensor]
    epochs: int
    best_epoch: int
    best_loss: float
    history: list[Epoch]


class Checkpoint:
    """All that a killed run needs to go on, in ``folder/checkpoint.pt``; without a folder nothing is kept and `file` is None.

    Parameters
    ----------
    identity
        What the run is of, by name; a file of another identity is refused.

    Raises
    ------
    ValueError
        The file there is of another run, or unreadable.
    """

    def __init__(self, folder: Path | None, identity: Mapping[str, str]) -> None:
        self.file = folder / "checkpoint.pt" if folder else None
        self._state: dict[str, Any] = {"identity": dict(identity), "stages": {}}
        if self.file and self.file.exists():
            self._state = _read(self.file)
            if other := [name for name, value in identity.items() if self._state["identity"].get(name) != value]:
                raise ValueError(
                    f"{self.file} is of a run that was stopped, with other {' and '.join(other)}: bundle.toml, the cohort or the seed "
                    "changed since. Undo the change to go on with it, or remove the file to begin anew."
                )

    def stage(self, name: str) -> dict[str, Any] | None:
        """Return what was kept of a stage."""
        return self._state["stages"].get(name)  # type: ignore[no-any-return]

    def keep(self, name: str, state: dict[str, Any]) -> None:
        """Write the state of a stage beside those before it; the file is whole at every moment, or an OSError names the folder."""
        self._state["stages"][name] = state
        if self.file and processes()[0] == 0:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.file) as stream:
                torch.save(self._state, stream)

    def remove(self) -> None:
        """Forget the run: it is done."""
        if self.file and processes()[0] == 0:
            self.file.unlink(missing_ok=True)


def learn(
    name: str,
    module: nn.Module,
    *,
    loss: Callable[[Tensor, Draw], Tensor],
    validate: Callable[[nn.Module], float] | None,
    studies: int,
    config: TrainingConfig,
    epochs: int,
    seed: int,
    checkpoint: Checkpoint,
    progress: Progress | None,
) -> Learned:
    """Train those parameters of `module` that want a gradient until the held-out loss falls no more.

    Parameters
    ----------
    loss
        Of this process's rows (B,) of the `studies`; its gradients are averaged over the processes.
    validate
        The held-out loss of a module with averaged weights; asked of the first process only. None where nothing held out can
        judge it: that loss is NaN, no epoch is chosen by it, all are learned and the last weights are taken.

    Raises
    ------
    ValueError
        Fewer studies than processes, or no epoch had a finite loss.
    """
    rank, world = processes()
    if studies < world:
        raise ValueError(f"{studies} studies to learn from cannot be shared by {world} processes.")
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(_decay_groups(parameters, config.weight_decay), lr=config.learning_rate, fused=True)
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(config.average), use_buffers=True).eval()  # type: ignore[no-untyped-call]
    parts: dict[str, Any] = {"module": module, "average": average, "optimizer": optimizer}
    state: dict[str, Any] = {"epoch": 0, "best_epoch": 0, "best_loss": math.inf, "best": {}, "history": []}
    if (kept := checkpoint.stage(name)) is not None:
        state = _restore(kept, parts)

    while state["epoch"] < epochs and state["epoch"] - state["best_epoch"] < config.patience:
        state["epoch"] = epoch = state["epoch"] + 1
        train_loss = 0.0
        torch.manual_seed(_seed(seed, name, epoch, rank))  # dropout: each process its own
        batches = list(_batches(studies, config.batch * world, seed=_seed(seed, name, epoch)))
        module.train()
        for step, (rows, draw) in enumerate(batches):
            rate = config.learning_rate * _cosine((epoch - 1 + (step + 0.5) / len(batches)) / epochs)
            train_loss += _step(parameters, optimizer, partial(loss, rows, draw), rate=rate) / len(batches)
            average.update_parameters(module)
        held_out = math.nan if validate is None else validate(average.module) if rank == 0 else 0.0
        # All processes know both numbers, and so stop together.
        both = torch.tensor([train_loss / world, held_out], dtype=torch.double, device=parameters[0].device)
        train, validation = over_all(both).tolist()
        state["history"].append({"epoch": epoch, "train_loss": train, "validation_loss": validation, "stage": name})
        if math.isfinite(train) if validate is None else validation < state["best_loss"]:
            state |= {"best_epoch": epoch, "best_loss": validation, "best": _copy(average.module)}
        checkpoint.keep(name, state | {"parts": {part: holder.state_dict() for part, holder in parts.items()}})
        if progress and rank == 0:
            progress(epoch, epochs, validation)
    if not state["best_epoch"]:
        raise ValueError(f"Stage {name} diverged: in {state['epoch']} epochs the loss was never finite.")
    return Learned(state["best"], state["epoch"], state["best_epoch"], state["best_loss"], state["history"])


def join(device: str) -> torch.device:
    """Join the processes that torchrun started, if it did, and return this one's device."""
    if distributed.is_torchelastic_launched() and not distributed.is_initialized():
        distributed.init_process_group("nccl" if device == "cuda" else "gloo")
        atexit.register(distributed.destroy_process_group)
    if device != "cuda":
        return torch.device(device)
    own = torch.device("cuda", distributed.get_node_local_rank(0))
    torch.cuda.set_device(own)
    return own


def processes() -> tuple[int, int]:
    """Rank of this process and number of all."""
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def over_all(value: Tensor) -> Tensor:
    """Sum over the processes."""
    if distributed.is_initialized():
        value = value.clone()
        distributed.all_reduce(value)
    return value


@contextmanager
def deterministic(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch and forbid algorithms whose sums depend on scheduling; leave both as they were found."""
    strict, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = deterministics.fill_uninitialized_memory  # type: ignore[attr-defined]  # a property of the module
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(True, warn_only=True)
        # A net for faulty operations, at a twentieth of the time.
        deterministics.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(strict, warn_only=warn_only)
            deterministics.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


def _read(file: Path) -> dict[str, Any]:
    try:
        if zipfile.is_zipfile(file):  # as torch.save writes; of other files torch.load would try older formats
            return torch.load(file, map_location="cpu", weights_only=True)  # type: ignore[no-any-return]
        broken = None
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as exc:
        broken = exc
    raise ValueError(f"{file.name} is no checkpoint that can be read; remove it to begin anew.") from broken


def _seed(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7])


def _restore(kept: dict[str, Any], parts: dict[str, Any]) -> dict[str, Any]:
    """Put the kept parts back where they were and return the numbers beside them."""
    for part, holder in parts.items():
        holder.load_state_dict(kept["parts"][part])
    return {key: value for key, value in kept.items() if key != "parts"}


def _copy(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def _batches(studies: int, batch: int, *, seed: int) -> Iterator[tuple[Tensor, Draw]]:
    """Rows of this process and its share of the random numbers, for each global batch of an epoch, all about equally large."""
    rank, world = processes()
    generator = torch.Generator().manual_seed(seed)
    for chosen in torch.randperm(studies, generator=generator).tensor_split(math.ceil(studies / batch)):
        own = torch.arange(len(chosen)).tensor_split(world)[rank]
        yield chosen[own], partial(_draw, generator, len(chosen), own)


def _draw(generator: torch.Generator, studies: int, own: Tensor, *shape: int) -> Tensor:
    return torch.rand((studies, *shape), generator=generator)[own]


def _step(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], *, rate: float) -> float:
    device = parameters[0].device.type
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        now = loss()
    optimizer.zero_grad()
    now.backward()  # type: ignore[no-untyped-call]  # torch
    _average_gradients(parameters)
    nn.utils.clip_grad_norm_(parameters, 1.0)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    return now.item()


def _average_gradients(parameters: list[nn.Parameter]) -> None:
    """In one message; DistributedDataParallel would want one forward(), and a step here has several."""
    _, world = processes()
    if world > 1:
        gradients = [p.grad for p in parameters if p.grad is not None]
        mean = over_all(torch.cat([g.flatten() for g in gradients])) / world
        for gradient, part in zip(gradients, torch.split(mean, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


def _decay_groups(parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """No weight decay on biases and norms: only matrices that mix features shrink."""
    mixing = [p for p in parameters if p.dim() >= 2]
    plain = [p for p in parameters if p.dim() < 2]
    return [{"params": mixing, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def _cosine(done: float, *, warm_up: float = 0.05) -> float:
    """Factor of the learning rate when a share of all steps is done."""
    return done / warm_up if done < warm_up else 0.5 * (1 + math.cos(math.pi * (done - warm_up) / (1 - warm_up)))
