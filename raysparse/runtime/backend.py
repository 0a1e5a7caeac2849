"""Ray Train's process group; on several machines over the interfaces that Ray uses (`runtime.interface`).

NCCL is left alone: it looks for interfaces by itself, never takes the loopback, and may know faster ones.
"""

from dataclasses import dataclass
from typing import Any

from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend
from ray.util import get_node_ip_address

from raysparse.runtime.interface import use_interface


@dataclass
class Backend(TorchConfig):
    """`TorchConfig` whose process group is started by `_Start`."""

    @property
    def backend_cls(self) -> Any:
        return _Start


class _Start(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        if len(set(worker_group.execute(get_node_ip_address))) > 1:  # else the host name will do
            worker_group.execute(_use_interface)
        super().on_start(worker_group, backend_config)


def _use_interface() -> None:
    use_interface(get_node_ip_address())
