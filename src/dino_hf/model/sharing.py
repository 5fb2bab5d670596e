"""Save the code of the model beside its weights, so `trust_remote_code=True` loads it where dino_hf is not installed."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from transformers.dynamic_module_utils import get_relative_import_files

from .own_backbones import top_file

_TOP = "dino_detr"  # the file that imports all others, except the backbones of this package (own_backbones.py)
AUTO_MAP: dict[str, str | dict[str, str]] = {
    "AutoConfig": f"{_TOP}.DinoDetrConfig",
    # A saved detector and a saved base model have the same tensors: either folder gives both.
    "AutoModel": f"{_TOP}.DinoDetrModel",
    "AutoModelForObjectDetection": f"{_TOP}.DinoDetrForObjectDetection",
    "AutoImageProcessor": {
        "torchvision": f"{_TOP}.DinoDetrImageProcessor",
        "pil": f"{_TOP}.DinoDetrImageProcessorPil",
    },
}

# Hooks of an installed package for saving a model, for example its model card. Remotely loaded code has no hooks. Before a
# save, each hook is called with the model, the folder and the state dict given by the user (or None). It returns a function,
# which is called with the folder after the save, or with folder, repository and token before an upload.
saving_hooks: list[Callable[..., Callable[..., None]]] = []


def is_shipped(cls: type) -> bool:
    """Whether a class is defined in one of the shipped files; a user's subclass is not."""
    return cls.__module__.rpartition(".")[0] == __name__.rpartition(".")[0]


def shipped_files(backbone_type: str | None = None) -> list[Path]:
    """The code files of a model, in the package or in the cache of remote code. Found by path, not by import: this file stands
    below the top file.

    Args:
        backbone_type: `model_type` of the model's backbone. The code of a backbone of this package is among the files only if it is
            named here.
    """
    top = Path(__file__).with_name(f"{top_file(backbone_type)}.py")
    return sorted({Path(file) for file in get_relative_import_files(top)} | {top})


def auto_map_for(backbone_type: str | None) -> dict[str, str | dict[str, str]]:
    """`AUTO_MAP` for a model on a backbone of this type. The configuration and the models are loaded with the backbone's code."""
    top = top_file(backbone_type)
    return {
        name: entry.replace(f"{_TOP}.", f"{top}.") if isinstance(entry, str) else entry
        for name, entry in AUTO_MAP.items()
    }


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a Trainer's checkpoint, `checkpoint-<step>`, or lies in one, as averaged weights do."""
    return any(re.fullmatch(r"checkpoint-\d+", name) for name in (folder.name, folder.parent.name))


class CarriesCode:
    """Mixin for the configuration and the image processors: their folders and uploads get the code files and an `auto_map`.

    A Trainer's checkpoints get neither. Set `saves_code = False` on this class, or on one that derives from it, to save no code at
    all. A folder without code loads where dino_hf is installed.
    """

    saves_code = True
    auto_map_entries = tuple(AUTO_MAP)  # the entries written to this object's JSON

    @property
    def _backbone_type(self) -> str | None:
        """`model_type` of the backbone of a configuration. None: an image processor, which needs no code of a backbone."""
        return getattr(getattr(self, "backbone_config", None), "model_type", None)

    @classmethod
    def register_for_auto_class(cls, *args, **kwargs) -> None:
        """As in the library for a user's subclass; for our own classes, `save_pretrained` writes code and `auto_map` itself."""
        if not is_shipped(cls):
            super().register_for_auto_class(*args, **kwargs)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in the library, with the code of the model."""
        if not os.path.isfile(save_directory):  # the library refuses a file
            self._share_code(Path(save_directory))
        return super().save_pretrained(save_directory, *args, **kwargs)

    def _share_code(self, folder: Path) -> None:
        """Write the code files and set `auto_map`.

        An entry for a user's own class, registered with `register_for_auto_class`, is kept if its file is in the folder. Entries
        that point to files not present in the folder are dropped.
        """
        auto_map, ours = {}, set()
        if is_shipped(type(self)) and self.saves_code and not is_checkpoint(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for file in shipped_files(self._backbone_type):
                shutil.copyfile(file, folder / file.name)
                ours.add(file.stem)
            auto_map = auto_map_for(self._backbone_type)
            auto_map = {name: auto_map[name] for name in self.auto_map_entries}
        for name, entry in (getattr(self, "auto_map", None) or {}).items():
            modules = _modules(entry)
            if modules.isdisjoint(ours) and all((folder / f"{module}.py").is_file() for module in modules):
                auto_map[name] = entry
        if auto_map:
            self.auto_map = auto_map
        elif hasattr(self, "auto_map"):
            del self.auto_map  # None would break the Auto classes

    def _upload_modified_files(self, working_dir, repo_id, files_timestamps, *args, **kwargs):
        """As in `PushToHubMixin`, but the code files always count as modified, and a repository without a model card gets none
        here. The library would upload an empty template, which the model's own card could not replace."""
        if files_timestamps:
            code = {file.name for file in shipped_files(self._backbone_type)}
            files_timestamps = {name: time for name, time in files_timestamps.items() if name not in code}
        elif read_remote_card(repo_id, kwargs.get("token")) is None:  # push_to_hub, in a folder of the library's own
            (Path(working_dir) / "README.md").unlink(missing_ok=True)
        return super()._upload_modified_files(working_dir, repo_id, files_timestamps, *args, **kwargs)


def read_remote_card(repo_id: str, token: str | bool | None) -> ModelCard | None:
    """README.md of a repository, or None if it has none.

    Raises:
        huggingface_hub.errors.LocalEntryNotFoundError: there is no connection.
    """
    try:
        return ModelCard.load(repo_id, token=token, ignore_metadata_errors=True)
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:
        return None


def _modules(entry: str | dict | list) -> set[str]:
    """Names of the modules that an entry points to. "repository--module" is a module of another repository, not a file here."""
    references = entry.values() if isinstance(entry, dict) else [entry] if isinstance(entry, str) else entry
    return {
        reference.rpartition(".")[0] for reference in references if reference is not None
    }  # entries of tokenizers may contain None
