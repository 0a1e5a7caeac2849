"""Checkpoints are read as data: what a file from elsewhere names is not looked up, and nothing that it holds is run.

torch's own reader unpickles ``.metadata``, and what is no tensor, with anything that is named there. Here a metadata may name torch's
classes for it, kinds of numbers and paths, and everything else is read by ``torch.load(weights_only=True)``.
"""

import io
import pickle
import warnings
from pathlib import Path, PurePath
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem

from raysparse.config import ConfigError

METADATA = ".metadata"

_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "ChunkStorageMetadata", "BytesStorageMetadata"),
        *("TensorProperties", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "pathlib": {"PosixPath", "PurePosixPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath"},
}
"""What the metadata of a checkpoint may name, besides torch's kinds of numbers."""


def read(state: dict[str, Any], path: Path, group: dist.ProcessGroup | None) -> None:
    """Fill tensors and texts from a checkpoint, together with the group's other ranks; None: in this process, whatever others do.

    Raises:
        ConfigError: it holds what is neither.
    """
    reader, planner = Reader(path), Planner()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # meant
            dcp.load(state, storage_reader=reader, planner=planner, process_group=group, no_dist=group is None)
    except CheckpointException as error:
        for cause, _ in error.failures.values():
            if isinstance(cause, ConfigError):
                raise cause from None
        raise


class Reader(dcp.FileSystemReader):
    """torch's reader, but for how it reads the metadata."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        file = Path(self.path) / METADATA
        with file.open("rb") as stream:
            metadata = _Unpickler(stream, file).load()
        files = {info.relative_path for info in metadata.storage_data.values()}
        if outside := sorted(name for name in files if PurePath(name).name != name):
            raise _refused(file, f"the file {outside[0]}, which is not beside it")
        return metadata


class Planner(dcp.DefaultLoadPlanner):
    """torch's planner, but for how it reads what is no tensor."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        try:
            self.original_state_dict[name] = torch.load(value, weights_only=True)
        except pickle.UnpicklingError as error:
            raise _refused(name, str(error).splitlines()[0]) from None


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: Any, file: Path):
        super().__init__(stream)
        self._file = file

    def find_class(self, module: str, name: str) -> Any:
        if name in _CLASSES.get(module, ()) or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise _refused(self._file, f"{module}.{name}")


def _refused(where: object, what: str) -> ConfigError:
    return ConfigError(
        f"Expected tensors, numbers and texts alone in {where}. Got {what}: a checkpoint has no use for it, and reading it could run code. "
        "Nothing was run. Do not use this checkpoint; ask who made it."
    )
