"""Where the weights lie: FSDP2 (default), whole on every rank, or fairscale's OSS. The rest of the code sees `Part`s.

Gradients are *summed* over ranks, never averaged: the loss is divided by the global number of predicted tokens, so the sum is
the gradient of the mean, and a sum with exact zeros is exact at any world size (a mean over 3 ranks is not).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.optim import Optimizer

from raysparse.config import Config, ConfigError
from raysparse.kernels.bits import unpack
from raysparse.sparsity.ranks import ALONE, Ranks
from raysparse.sparsity.topology import Rows, Topology
from raysparse.train.exchange import WORTH, Choice, Exchange, Layout, Mode, Wire
from raysparse.train.process import gathered, ranks_of


class ShardingConfig(Config):
    """How weights, gradients and optimizer state are spread over workers."""

    type: Literal["fsdp2", "none", "fairscale"] = "fsdp2"
    """fsdp2: sharded by rows. none: whole on every worker, gradients all-reduced. fairscale: OSS + ShardedDataParallel, whole
    weights, optimizer state spread by tensor (pip install raysparse[fairscale])."""
    replicas: int = Field(1, ge=1)
    """FSDP2 only: groups of workers that each hold a whole sharded model (HSDP); divides run.workers."""
    reshard_after_forward: bool = True
    """FSDP2 only: free gathered weights after the forward pass and gather them again in the backward (less memory)."""
    packed: Mode = "auto"
    """FSDP2 only: send live weights and live gradients alone, a quarter of the bytes at 75 %; training is the same, bit by bit with gloo.
    auto: on or off as the first steps measure it, and say."""

    def check_workers(self, sizes: Sequence[int]) -> None:
        """Raise a `ConfigError` for a combination that cannot run.

        Args:
            sizes: the numbers of workers that there may be.
        """
        if odd := [workers for workers in sizes if workers % self.replicas]:
            choice = f"a divisor of {odd[0]}" if len(sizes) == 1 else "sharding.replicas=1, or one number of workers"
            raise ConfigError(
                f"Expected sharding.replicas to divide run.workers. Got {self.replicas} replicas, {odd[0]} workers. Choose {choice}."
            )
        if self.type != "fsdp2" and self.replicas > 1:
            raise ConfigError(f"Expected sharding.replicas=1 with sharding.type={self.type}. Got {self.replicas}.")
        if self.type == "fairscale":
            try:
                import fairscale.optim.oss  # noqa: F401
            except ImportError:
                raise ConfigError(
                    "Expected the package fairscale for sharding.type=fairscale. Got an ImportError. "
                    "pip install 'raysparse[fairscale]', or use sharding.type=fsdp2."
                ) from None


@dataclass
class Part:
    """A rank's part of one parameter.

    Attributes:
        shape: of the whole parameter.
        first: row of the whole parameter that this part starts with.
        local: [rows here, ...] the values; shares memory with the model's parameter. Optimizers step this tensor.
            It requires a gradient if the parameter does: a frozen one has none, and no moments.
        mine: whether this rank updates it (fairscale updates each tensor on one rank; nobody a frozen one).
    """

    shape: tuple[int, ...]
    first: int
    local: nn.Parameter
    mine: bool = True

    @property
    def trained(self) -> bool:
        """Whether any rank updates it."""
        return self.local.requires_grad

    @property
    def rows(self) -> Rows:
        return Rows(self.first, self.local.shape[0], self.shape[1])


class Sharded(ABC):
    """A model spread over ranks.

    Attributes:
        module: call it.
        parts: name -> this rank's `Part`, in model order; names are those of the unsharded model.
        ranks: reductions over the ranks that hold different rows of a weight.
        owners: reductions over the ranks that hold disjoint parts (`Part.mine`) which together are the model.
        replica: which whole copy of the model this rank's rows belong to.
        wire: what this rank sent.
        choice: whether it sends live elements alone.
    """

    module: nn.Module
    parts: dict[str, Part]
    ranks: Ranks
    owners: Ranks
    replica: int
    wire: Wire
    choice: Choice

    @property
    def local(self) -> dict[str, Tensor]:
        return {name: part.local for name, part in self.parts.items()}

    def follow(self, topology: Topology, nnz: Mapping[str, int]) -> None:  # noqa: B027
        """The masks are new, or others: what is sent follows them. Every rank calls this.

        Args:
            nnz: live weights of each layer over all ranks.
        """

    def begin(self, dense_gradient: bool) -> None:  # noqa: B027
        """Before the forward passes of a step.

        Args:
            dense_gradient: this step's gradients will be looked at where weights are dead.
        """

    def took(self, seconds: float) -> str | None:
        """A step without an update took so long. Returns what follows from it for the next ones, if anything new does."""
        return None

    @abstractmethod
    def accumulate(self, last: bool) -> AbstractContextManager[Any]:
        """Run a micro-batch inside; gradients are reduced over ranks in the `last` one."""

    def rest(self) -> None:  # noqa: B027
        """After forward passes without a backward one: the next step finds nothing gathered."""

    @abstractmethod
    def collect(self) -> dict[str, Tensor]:
        """After the last backward: name -> this rank's rows of the summed gradient, also put into ``Part.local.grad``."""

    def spread(self, gradients: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        """The named ones of what `collect` gave, on every rank that holds rows of them and not on their owner alone."""
        return {name: gradients[name] for name in names}

    @abstractmethod
    def stored(self, name: str, local: Tensor) -> Tensor:
        """`local` ([rows here, any width]) as a tensor that a distributed checkpoint stores and loads at any world size."""

    @abstractmethod
    def whole(self, name: str, local: Tensor) -> Tensor:
        """All rows of `local`'s tensor, on the CPU of every rank. Every rank calls this."""

    def make_optimizer(self, groups: list[dict[str, Any]], kind: type[Optimizer]) -> Optimizer:
        """`kind` over groups of ``Part.local``."""
        return kind(groups)  # pyrefly: ignore[missing-argument]

    def zero_grad(self) -> None:
        for parameter in self.module.parameters():
            parameter.grad = None
        for part in self.parts.values():
            part.local.grad = None


class FSDP2(Sharded):
    def __init__(
        self,
        module: nn.Module,
        blocks: Mapping[str, nn.Module],
        config: ShardingConfig,
        device: str,
        dtype: torch.dtype,
        wire: Wire | None = None,
        offload: bool = False,
    ):
        world = dist.get_world_size()
        mesh = init_device_mesh(device, (config.replicas, world // config.replicas), mesh_dim_names=("replicate", "shard"))
        shards, replicas = mesh["shard"], mesh["replicate"].get_group() if config.replicas > 1 else None
        policy = MixedPrecisionPolicy() if dtype == torch.float32 else MixedPrecisionPolicy(dtype, torch.float32)
        place = CPUOffloadPolicy() if offload and device != "cpu" else OffloadPolicy()
        for block in blocks.values():
            fully_shard(block, mesh=shards, mp_policy=policy, reshard_after_forward=config.reshard_after_forward, offload_policy=place)
        fully_shard(module, mesh=shards, mp_policy=policy, reshard_after_forward=False, offload_policy=place)
        self.module, self.wire = module, wire or Wire()
        self._parameters = {name: cast(DTensor, parameter) for name, parameter in module.named_parameters()}
        self.parts = {name: _part(parameter) for name, parameter in self._parameters.items()}
        self.ranks = ranks_of(shards.get_group(), torch.device(device)) if shards.size() > 1 else ALONE
        self.owners = self.ranks
        self.replica = mesh["replicate"].get_local_rank()
        self.choice = Choice(config.packed if world > 1 else "off", _slowest)
        self._num_shards = shards.size()
        self._units: list[tuple[Exchange, list[str]]] = []
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        for unit in [unit for unit in module.modules() if isinstance(unit, FSDPModule)]:
            own = [names.pop(id(parameter)) for parameter in _in_buffer(unit)]
            exchange = Exchange(self.wire, [self.parts[name].local for name in own], shards.get_local_rank(), replicas)
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
            unit.set_custom_all_gather(exchange.gather)
            unit.set_custom_reduce_scatter(exchange.scatter)
            if replicas is not None:
                unit.set_all_reduce_hook(exchange.over_replicas)
            self._units.append((exchange, own))
        assert not names, f"no unit holds {list(names.values())}"

    def follow(self, topology: Topology, nnz: Mapping[str, int]) -> None:
        sizes = {name: math.prod(part.shape) for name, part in self.parts.items()}
        whole = [sum(sizes[name] for name in names) for _, names in self._units]
        live = [sum(nnz.get(name, sizes[name]) for name in names) for _, names in self._units]
        worth = [a < b and a <= WORTH * b for a, b in zip(live, whole, strict=True)]
        sent = sum(a if packs else b for a, b, packs in zip(live, whole, worth, strict=True))
        self.choice.at(sent / sum(whole) if any(worth) else None)
        for (exchange, names), packs in zip(self._units, worth, strict=True):
            exchange.layout = self._layout(names, topology) if packs and not self.choice.is_whole else None

    def _layout(self, names: Sequence[str], topology: Topology) -> Layout | None:
        """None where the fullest rank, to which the others are padded, has too many live elements."""
        shapes, masks = {name: self.parts[name].shape for name in names}, {}
        for name in [name for name in names if name in topology.masks]:
            bits = self.whole(name, topology.live(name).bits)
            self.wire.add(bits.nbytes, self._num_shards, dense=0)
            masks[name] = unpack(bits, shapes[name][1]).to(self.parts[name].local.device)
        layout = Layout(shapes, masks, self._num_shards)
        return layout if layout.width <= WORTH * layout.length else None

    def begin(self, dense_gradient: bool) -> None:
        for exchange, _ in self._units:
            exchange.packed, exchange.whole_gradients = self.choice.packed, dense_gradient

    def took(self, seconds: float) -> str | None:
        said = self.choice.took(seconds)
        if said and self.choice.is_whole:
            for exchange, _ in self._units:
                exchange.layout = None
        return said

    def accumulate(self, last: bool) -> AbstractContextManager[Any]:
        assert isinstance(self.module, FSDPModule)
        self.module.set_requires_gradient_sync(last)
        return nullcontext()

    def rest(self) -> None:
        for unit in self.module.modules():
            if isinstance(unit, FSDPModule):
                unit.reshard()

    def collect(self) -> dict[str, Tensor]:
        gradients = {}
        for name, parameter in self._parameters.items():
            if not self.parts[name].trained:
                continue
            gradient = cast(DTensor | None, parameter.grad)
            local = self.parts[name].local
            local.grad = torch.zeros_like(local) if gradient is None else gradient.to_local()
            gradients[name] = local.grad
        return gradients

    def stored(self, name: str, local: Tensor) -> Tensor:
        like, shape = self._parameters[name], (self.parts[name].shape[0], *local.shape[1:])
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(local, like.device_mesh, like.placements, run_check=False, shape=torch.Size(shape), stride=stride)

    def whole(self, name: str, local: Tensor) -> Tensor:
        stored = self.stored(name, local)
        assert isinstance(stored, DTensor)
        return stored.full_tensor().cpu()


class Replicated(Sharded):
    """Everything everywhere; each gradient is all-reduced after the last backward."""

    def __init__(self, module: nn.Module, device: str, dtype: torch.dtype):
        self.module, self.wire, self.choice = module.to(device), Wire(), Choice("off")
        self.ranks = self.owners = ALONE
        self.replica = dist.get_rank()
        self._parameters = dict(module.named_parameters())
        self.parts = {name: Part(tuple(p.shape), 0, p, mine=p.requires_grad) for name, p in self._parameters.items()}
        self._autocast = (lambda: torch.autocast(device, dtype)) if dtype != torch.float32 else nullcontext

    def accumulate(self, last: bool) -> AbstractContextManager[Any]:
        return self._autocast()

    def collect(self) -> dict[str, Tensor]:
        for parameter in self._parameters.values():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = {name: parameter.grad for name, parameter in self._parameters.items() if parameter.grad is not None}
        if (size := dist.get_world_size()) > 1:
            for gradient in gradients.values():
                with self.wire.timed(gradient.device):
                    dist.all_reduce(gradient)
                self.wire.add(gradient.nbytes, size, passes=2)
        return gradients

    def stored(self, name: str, local: Tensor) -> Tensor:
        return local

    def whole(self, name: str, local: Tensor) -> Tensor:
        return local.detach().cpu()


class Fairscale(Sharded):
    """Whole weights; each tensor's gradient is reduced to one owner, which holds its optimizer state and updates it."""

    def __init__(self, module: nn.Module, device: str, dtype: torch.dtype):
        self.module, self.wire, self.choice = module.to(device), Wire(), Choice("off")
        self._parameters = dict(module.named_parameters())
        self.parts = {name: Part(tuple(p.shape), 0, p) for name, p in self._parameters.items()}
        self.ranks, self.replica = ALONE, dist.get_rank()
        self.owners = ranks_of(_world(), torch.device(device)) if dist.get_world_size() > 1 else ALONE
        self._autocast = (lambda: torch.autocast(device, dtype)) if dtype != torch.float32 else nullcontext

    def make_optimizer(self, groups: list[dict[str, Any]], kind: type[Optimizer]) -> Optimizer:
        from fairscale.nn.data_parallel import ShardedDataParallel
        from fairscale.optim.oss import OSS

        optimizer = OSS(groups, optim=kind, lr=groups[0]["lr"])
        self.module = ShardedDataParallel(self.module, optimizer, reduce_buffer_size=0)
        self.module._world_size_scaling = 1.0  # a sum, like the others; fairscale's own is the mean
        owner = {id(p): r for r, groups in enumerate(optimizer.partition_parameters()) for group in groups for p in group["params"]}
        self._owner = {name: owner[id(part.local)] for name, part in self.parts.items()}
        for name, part in self.parts.items():
            part.mine = self._owner[name] == dist.get_rank()
        return optimizer

    def accumulate(self, last: bool) -> AbstractContextManager[Any]:
        stack = ExitStack()
        stack.enter_context(cast(Any, self._autocast()))
        if not last:
            stack.enter_context(cast(Any, self.module).no_sync())
        return stack

    def collect(self) -> dict[str, Tensor]:
        gradients, size = {}, dist.get_world_size()
        for name, part in self.parts.items():
            self.wire.add(part.local.nbytes, size, passes=2)  # its gradient to the owner, its new value from there
            if part.mine:
                if part.local.grad is None:
                    part.local.grad = torch.zeros_like(part.local)
                gradients[name] = part.local.grad
            else:
                part.local.grad = None
        return gradients

    def spread(self, gradients: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        found = {}
        for name in names:
            found[name] = gradients[name] if name in gradients else torch.empty_like(self.parts[name].local, requires_grad=False)
            dist.broadcast(found[name], src=self._owner[name])
            self.wire.add(found[name].nbytes, dist.get_world_size())
        return found

    def stored(self, name: str, local: Tensor) -> Tensor:
        return local

    def whole(self, name: str, local: Tensor) -> Tensor:
        return local.detach().cpu()


def shard(
    module: nn.Module,
    blocks: Mapping[str, nn.Module],
    config: ShardingConfig,
    device: str,
    dtype: torch.dtype,
    wire: Wire | None = None,
    offload: bool = False,
) -> Sharded:
    """Spread the first rank's model (float32, on the CPU) over the default process group.

    The other ranks' models have its shapes and ties; their values are not looked at, so they may be `raysparse.models.build.hollow`.
    Weights are sent one after the other: no rank but the first holds more than its rows and the largest of them.

    Args:
        blocks: the units that are gathered together under FSDP2.
        dtype: of the computation; weights, gradients over ranks and optimizer state stay float32.
        wire: counts what is sent; None: one of its own.
        offload: under FSDP2 on GPUs, keep this rank's rows in the memory of the host.

    One rank has nothing to shard: in float32 it holds the model whole, bit-equal to FSDP2 on one rank, which would copy every
    weight and gradient in each step for nothing (16 % of it on a CPU, docs/benchmarks.md). In bfloat16 FSDP2 does the casting.
    """
    alone = dist.get_world_size() == 1 and dtype == torch.float32
    values = {name: weight.detach() for name, weight in module.named_parameters()} if dist.get_rank() == 0 else {}
    if config.type == "fsdp2" and not alone:
        sharded: Sharded = FSDP2(module, blocks, config, device, dtype, wire, offload)
    else:
        sharded = (Fairscale if config.type == "fairscale" else Replicated)(module, device, dtype)
    if dist.get_world_size() > 1:
        _hand_out(values, sharded, device)
    return sharded


@torch.no_grad()
def _hand_out(values: dict[str, Tensor], sharded: Sharded, device: str) -> None:
    """Each rank gets its rows of the first rank's weights, and its buffers.

    Args:
        values: by name, of the first rank, which lets go of them one after the other.
    """
    for name, part in sharded.parts.items():
        whole = values.pop(name).to(device).contiguous() if values else torch.empty(part.shape, dtype=part.local.dtype, device=device)
        dist.broadcast(whole, 0)
        part.local.copy_(whole[part.first : part.first + part.local.shape[0]] if part.shape else whole)
    for buffer in sharded.module.buffers():
        dist.broadcast(buffer, 0)


def _part(parameter: DTensor) -> Part:
    _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    trains = parameter.requires_grad
    return Part(tuple(parameter.shape), offset[0], nn.Parameter(parameter.to_local().detach(), requires_grad=trains), mine=trains)


def _in_buffer(unit: FSDPModule) -> list[nn.Parameter]:
    """The parameters of a unit in the order of its flat buffers, which is neither that of ``parameters()`` nor told in public."""
    state = unit._get_fsdp_state()
    groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
    return [parameter.sharded_param for group in groups if group is not None for parameter in group.fsdp_params]


def _slowest(seconds: float) -> float:
    """The largest over all ranks."""
    return max(gathered(seconds))


def _world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group
