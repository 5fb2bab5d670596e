"""The published checkpoints of all projects, and their table for docs/checkpoints.md."""

from ..model.configuration_dino_detr import DinoDetrConfig
from .errors import ConversionError
from .project import BACKBONES, Project, Published
from .projects import PROJECTS

PUBLISHED = [row for project in PROJECTS.values() for row in project.published]

# Advice for a file that --published, or its name, takes for another published file.
_ADVICE = "leave --published out, and rename a file that has the name of a published one"


def find_published(title: str | None) -> Published | None:
    """The published checkpoint with this title; None for None.

    Raises:
        ConversionError: there is no checkpoint of this name.
    """
    if title is None:
        return None
    found = next((row for row in PUBLISHED if row.title == title), None)
    if found is None:
        raise ConversionError(
            f"--published {title} is none of the checkpoints in docs/checkpoints.md: {', '.join(row.title for row in PUBLISHED)}."
        )
    return found


def find_by_name(project: Project, file: str) -> Published | None:
    """The published checkpoint with this file name. Only for projects whose files do not contain their settings."""
    if project.saves_settings:
        return None
    return next((row for row in project.published if row.file == file), None)


def check_published(row: Published | None, project: Project, config: DinoDetrConfig) -> None:
    """Check that a file has the architecture of a published checkpoint.

    Raises:
        ConversionError: it has another one.
    """
    if row is None:
        return
    if row.backbone not in BACKBONES:
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


def command(row: Published) -> str:
    """Commands that download, convert and verify a checkpoint. Some files have no address and are downloaded by hand."""
    lines = [f"curl -LO {row.url} &&"] if row.has_address else []
    lines += [f"dino-hf convert {row.file} {row.output}", f"--published {row.title} --verify"]
    return " \\\n    ".join(lines)


def table() -> str:
    """The list of files in docs/checkpoints.md: for each project, a table and a command for each file."""
    lines = []
    for project in PROJECTS.values():
        lines += [
            f"### {project.name}",
            "",
            "| name | backbone | scales | published AP | file |",
            "| --- | --- | --- | --- | --- |",
        ]
        for row in project.published:
            note = "" if row.backbone in BACKBONES else ", [not supported](#not-supported)"
            lines += [f"| {row.name} | {row.backbone}{note} | {row.num_levels} | {row.ap} | [{row.file}]({row.url}) |"]
        lines += [""]
        for row in project.published:
            if row.backbone in BACKBONES:
                lines += [f"{row.name}:", "", "```bash", command(row), "```", ""]
    return "\n".join(lines) + "\n"
