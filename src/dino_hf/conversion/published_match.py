"""Check whether a checkpoint file is a published one."""

from ..model.configuration_dino_detr import DinoDetrConfig
from .errors import ConversionError
from .project import Project
from .published import PUBLISHED
from .published_row import Published

# Advice for a file that --published, or its name, takes for another published file.
_ADVICE = "leave --published out, and rename a file that has the name of a published one"


def find_by_name(project: Project, file: str) -> Published | None:
    """The published checkpoint with this file name. Only for projects whose files do not contain their settings."""
    if project.saves_settings:
        return None
    return next((row for row in PUBLISHED if row.project == project.name and row.file == file), None)


def check_published(row: Published | None, project: Project, config: DinoDetrConfig) -> None:
    """Check that a file has the architecture of a published checkpoint.

    Raises:
        ConversionError: it has another one.
    """
    if row is None:
        return
    if not row.is_supported:
        raise ConversionError(
            f"{row.title} has the backbone {row.backbone}, which is not supported; this is another file: {_ADVICE}."
        )
    backbone = config.backbone_config
    is_swin = backbone.model_type == "swin"
    found = {
        "project": project.name,
        "backbone": backbone.model_type,
        "depths": list(backbone.depths),
        "width": backbone.embed_dim if is_swin else backbone.hidden_sizes[0],
        "window": backbone.window_size if is_swin else None,
        "levels": config.num_feature_levels,
        "queries": config.num_queries,
        "classes": config.num_labels,
    }
    expected = row.architecture()
    if others := {name: value for name, value in found.items() if value != expected[name]}:
        raise ConversionError(
            f"The file is not {row.title}, which has { ({name: expected[name] for name in others}) }: it has {others}; {_ADVICE}."
        )


def check_settings(row: Published | None, from_file: dict) -> None:
    """Check that the settings in a file match a published checkpoint.

    Raises:
        ConversionError: they differ.
    """
    settings = row.settings if row else {}
    if others := {
        name: from_file[name] for name in settings if name in from_file and from_file[name] != settings[name]
    }:
        raise ConversionError(f"The file is not {row.title}, which has {settings}: it says {others}; {_ADVICE}.")
