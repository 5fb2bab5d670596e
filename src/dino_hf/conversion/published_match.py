"""Recognise published checkpoint files, and find their settings.

A file is recognised by its SHA-256, or else by its name. The name alone does not show whether the file was trained further, so
its architecture is compared too.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedConfig

from ..common.regular_files import file_sha256
from ..model.configuration_dino_detr import DinoDetrConfig
from .checkpoint_files import Checkpoint, load_checkpoint
from .errors import ConversionError
from .messages import say
from .projects.project import Project, backbone_depths
from .projects.registry import find_project, recognise
from .published import PUBLISHED, find_published
from .published_row import Published, plain_stem

NONE = "none"  # value of --published for a file that is not published
_POSITIONS = ("position_temperature", "position_offset")
_SIZES_OF_HEADS = {"classes", "queries"}  # differ between models that were trained on different data


class Candidate(NamedTuple):
    """A published checkpoint that a file may be.

    Attributes:
        found_by: "--published", "SHA-256" or "name".
        digest: SHA-256 of the file.
        sha256_applies: see `Published.sha256_applies`.
    """

    row: Published
    found_by: str
    digest: str
    sha256_applies: bool = True

    @property
    def has_other_sha256(self) -> bool:
        """Whether the SHA-256 of the published file is known and this file has another one."""
        return bool(self.row.sha256) and self.sha256_applies and not self.digest.startswith(self.row.sha256)


class Match(NamedTuple):
    """A published checkpoint from which a file gets its settings.

    Attributes:
        is_same: whether the file is the published one. Otherwise it was trained further, and its AP is unknown.
        settings: fields of the configuration.
    """

    row: Published
    is_same: bool
    settings: dict[str, Any]


def read_checkpoint(path: Path, ema: bool, published: str | None) -> tuple[Checkpoint, Candidate | None]:
    """Read a checkpoint file, and find the published checkpoint that it may be.

    Args:
        ema: read the averaged weights. If the published AP was measured with averaged weights and the file has them, they are
            read without `ema` too.
        published: title of the published checkpoint, NONE, or None to find it.
    Raises:
        ConversionError: the file cannot be read, or there is no published checkpoint of this title.
    """
    named = None if published in (None, NONE) else find_published(published)
    digest = file_sha256(path) if path.is_file() else ""
    candidate = _find(path.name, digest)
    if named:
        if candidate and candidate.found_by == "SHA-256" and candidate.row != named:
            raise ConversionError(f"{path} is not {named.title}: its SHA-256 shows that it is {candidate.row.title}.")
        candidate = Candidate(named, "--published", digest, named.sha256_applies(path.name))
    elif published == NONE:
        candidate = None
    return load_checkpoint(path, ema, prefer_ema=candidate is not None and candidate.row.is_averaged), candidate


def _find(name: str, digest: str) -> Candidate | None:
    """The published checkpoint with this SHA-256, or else with this file name."""
    for row in PUBLISHED:
        if row.sha256 and digest.startswith(row.sha256):
            return Candidate(row, "SHA-256", digest)
    stem = plain_stem(name)
    for row in PUBLISHED:
        if stem in map(plain_stem, (row.file, *row.other_files)):
            return Candidate(row, "name", digest, row.sha256_applies(name))
    return None


def match_published(
    candidate: Candidate | None, project: Project, config: DinoDetrConfig, from_file: dict[str, Any]
) -> Match | None:
    """Compare a file with the published checkpoint that it may be. Print the result.

    Args:
        config: configuration of the file. Its settings that no tensor shows are not compared.
        from_file: settings that the file contains.
    Returns:
        the published checkpoint, or None if the file is an unknown one.
    Raises:
        ConversionError: the user named a published checkpoint, or its SHA-256 was found, but the file has another architecture
            or other settings.
    """
    if candidate is None:
        return None
    row = candidate.row
    settings = {name: project.defaults[name] for name in _POSITIONS} | row.settings
    others = _differences(row, project, config)
    conflicts = {name: from_file[name] for name in settings if name in from_file and from_file[name] != settings[name]}
    is_fine_tuned = set(others) <= _SIZES_OF_HEADS
    if candidate.found_by != "name" and (not is_fine_tuned or conflicts):
        raise ConversionError(
            f"The file is not {row.title}: {_describe(others, conflicts)}. `dino-hf convert` with --published {NONE} converts it "
            "as an unknown file."
        )
    if not is_fine_tuned:
        say(
            f"  the file has the name of {row.title}, but {_describe(others, {})}: it is converted as an unknown file; rename it"
        )
        return None
    settings = {name: value for name, value in settings.items() if name not in from_file}
    is_same = not (others or conflicts or candidate.has_other_sha256)
    values = ", ".join(f"{name}={value}" for name, value in settings.items()) or "none, the file has its own"
    reason = (
        f"named by {candidate.found_by}"
        if candidate.found_by == "--published"
        else f"found by its {candidate.found_by}"
    )
    decline = "" if candidate.found_by == "--published" else f"; decline by --published {NONE}"
    if is_same:
        say(f"  this is {row.title}, {reason}{decline}; settings: {values}")
        if row.note:
            say(f"  {row.note}")
    else:
        other_bytes = f"its SHA-256 does not start with {row.sha256[:8]}"
        difference = _describe(others, conflicts) if others or conflicts else other_bytes
        say(
            f"  taken as {row.title} that was trained further ({reason}{decline}), because {difference}: the published AP is not "
            f"its AP, and its settings are used: {values}"
        )
    return Match(row, is_same, settings)


def _differences(row: Published, project: Project, config: DinoDetrConfig) -> dict[str, tuple[Any, Any]]:
    """Properties in which a file differs from a published one: name -> values of the file and of the published one."""
    if not row.is_supported:
        return {"backbone": (config.backbone_config.model_type, row.backbone)}
    backbone = config.backbone_config
    inner = getattr(backbone, "backbone_config", None)  # of the transformer below a pyramid
    width = (
        backbone.embed_dim
        if backbone.model_type == "swin"
        else inner.hidden_size
        if inner
        else backbone.hidden_sizes[0]
    )
    found = {
        "project": project.name,
        "backbone": backbone.model_type,
        "depths": backbone_depths(backbone),
        "width": width,
        "window": _window(backbone if inner is None else inner),
        "levels": config.num_feature_levels,
        "encoder layers": config.encoder_layers,
        "queries": config.num_queries,
        "classes": config.num_labels,
    }
    return {name: (found[name], value) for name, value in row.architecture().items() if found[name] != value}


def _window(backbone: PreTrainedConfig) -> int | None:
    """Attention window, or the first window of a FocalNet."""
    windows = getattr(backbone, "focal_windows", None)
    return windows[0] if windows else getattr(backbone, "window_size", None)


def _describe(others: dict[str, tuple[Any, Any]], conflicts: dict[str, Any]) -> str:
    """What differs, as a clause."""
    has = ", ".join(f"{name} {value!r} instead of {expected!r}" for name, (value, expected) in others.items())
    return " and ".join([*([f"it has {has}"] if has else []), *([f"it says {conflicts}"] if conflicts else [])])


def check_offset_scale(
    path: Path, config: DinoDetrConfig, from_user: dict[str, Any], assumed: Mapping[str, Any]
) -> None:
    """Check that the scale of an InternImage's offsets is known.

    Args:
        from_user: settings that the user chose.
        assumed: settings that are only assumed.
    Raises:
        ConversionError: it is not known, because no published InternImage has the width of this file. Or the user set it for
            another backbone.
    """
    backbone = config.backbone_config
    if "offset_scale" in from_user and not hasattr(backbone, "offset_scale"):
        raise ConversionError(
            f"offset_scale is a setting of InternImage, but the backbone is a {backbone.model_type!r}."
        )
    if "offset_scale" in assumed:
        raise ConversionError(
            f"The InternImage of {path} has a width of {backbone.embed_dim}, which no published model has, and no tensor shows its "
            "offset_scale. A wrong one gives wrong boxes. Copy it from the configuration of the model: --set offset_scale=1 (as "
            "InternImage-T, S and B have) or --set offset_scale=2 (L)."
        )


def project_of_file(candidate: Candidate | None, names: Iterable[str]) -> Project | None:
    """The project of a file: the project of the published checkpoint that it may be, if it has its tensors, or else the first
    project that recognises it.

    Args:
        names: of the tensors.
    Returns:
        None if no project recognises the file.
    """
    names = set(names)
    if candidate is not None and (project := find_project(candidate.row.project)).recognises(names):
        return project
    return recognise(names)


def check_positions(path: Path, project: Project, known: dict[str, Any]) -> None:
    """Check that the settings of position embeddings are known.

    Args:
        known: fields of the configuration from the file, from the user and from a published checkpoint.
    Raises:
        ConversionError: they are not, and the project's files do not contain them.
    """
    if project.saves_settings or project.has_fixed_positions or all(name in known for name in _POSITIONS):
        return
    defaults = " ".join(f"--set {name}={project.defaults[name]:g}" for name in _POSITIONS)
    raise ConversionError(
        f"{path} is a file of {project.name}, which does not contain its position settings. Wrong positions give wrong boxes. Name "
        "the published checkpoint by --published (`dino-hf models` lists them), or copy the settings from its configuration: "
        f"{defaults} is the default of {project.name}, --set position_temperature=20 --set position_offset=0 the original "
        "release's."
    )
