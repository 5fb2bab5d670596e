"""A published file gets its settings without being told: by its contents, or by its name in any disguise."""

import shutil

import pytest
import torch
from typer.testing import CliRunner

from dino_hf import DinoDetrConfig, DinoDetrForObjectDetection
from dino_hf.cli.app import app
from dino_hf.conversion import published_match
from dino_hf.conversion.convert_back import convert_back
from dino_hf.conversion.convert_checkpoint import convert, main
from dino_hf.conversion.errors import ConversionError
from dino_hf.conversion.projects.registry import PROJECTS
from dino_hf.conversion.published import PUBLISHED, find_published
from dino_hf.conversion.published_match import Candidate, match_published, read_checkpoint
from dino_hf.conversion.published_row import BACKBONES
from dino_hf.conversion.verify_conversion import Model
from test_published import small, with_toy_width

SUPPORTED = [row for row in PUBLISHED if row.is_supported]
# detrex trained it with the release's positions, which no tensor shows
ROW = find_published("detrex/dino_r50_4scale_24ep")
every_row = pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row.title)
every_supported_row = pytest.mark.parametrize("row", SUPPORTED, ids=lambda row: row.title)


def positions(row):
    return {"position_temperature": 20.0, "position_offset": 0.0} | (
        {"position_temperature": 10000.0, "position_offset": -0.5} if row.project in ("detrex", "aligndetr") else {}
    )


def toy_config(row, **changes):
    """The row's configuration as the converter sees it: real sizes, but no weights."""
    config = small(row)
    kind, _, width, window = BACKBONES[row.backbone]
    if kind == "dino_detr_internimage":
        config.backbone_config.embed_dim = width
    elif kind == "swin":
        config.backbone_config.embed_dim, config.backbone_config.window_size = width, window
    elif kind == "dino_detr_vit_pyramid":
        config.backbone_config.backbone_config.hidden_size = width
    else:
        config.backbone_config.hidden_sizes = [width, *config.backbone_config.hidden_sizes[1:]]
    for name, value in changes.items():
        setattr(config, name, value)
    return config


# -- which row a file may be


@pytest.mark.parametrize(
    "row",
    [row for row in PUBLISHED if "/" not in row.file],  # a file with a folder has a name that many files have
    ids=lambda row: row.title,
)
@pytest.mark.parametrize(
    "disguise",
    [
        "{0}",
        "{1}-001.pth",
        "{1} (1).pth",
        "{1}(12).PTH",
        "Kopie/{1} - Copy.pth",
        "{1}_copy (2).pth",
        "{0}.1",
        "{1}.safetensors",
        "{1}.pt",
    ],
)
def test_a_name_is_known_in_any_disguise(row, disguise, tmp_path):
    name = disguise.format(row.file, row.file.removesuffix(".pth")).rpartition("/")[2]
    for one in (name, name.upper()):
        assert published_match._find(one, "f" * 64) == Candidate(row, "name", "f" * 64)


@every_row
def test_contents_are_known_under_any_name(row):
    digest = (row.sha256 or "f" * 64).ljust(64, "0")
    other = next(one for one in PUBLISHED if one is not row)
    expected = Candidate(row, "SHA-256", digest) if row.sha256 else None
    assert published_match._find("model_final.pth", digest) == expected
    if row.sha256:  # contents say more than a name
        assert published_match._find(other.file, digest) == expected


def test_other_names_are_not_known():
    for name in (
        "model_final.pth",
        "my_dino_r50_4scale_24ep.pth",
        "dino_r50_4scale_24ep_birds.pth",
        "checkpoint0011.pth",
    ):
        assert published_match._find(name, "f" * 64) is None


# -- what follows from it


@every_supported_row
def test_every_row_gives_its_settings(row, capsys):
    candidate = Candidate(row, "SHA-256" if row.sha256 else "name", row.sha256)
    match = match_published(candidate, PROJECTS[row.project], toy_config(row), {})
    assert (match.row, match.is_same, match.settings) == (row, True, positions(row) | row.settings)
    assert (
        f"this is {row.title}, found by its {candidate.found_by}; decline by --published none"
        in capsys.readouterr().out
    )


@every_supported_row
def test_a_fine_tuned_copy_keeps_the_settings_but_not_the_ap(row, capsys):
    config = toy_config(row, num_queries=333)
    config.set_classes({0: "crow", 1: "rook", 2: "jay"}, None)
    match = match_published(Candidate(row, "name", "f" * 64), PROJECTS[row.project], config, {})
    assert (match.is_same, match.settings) == (False, positions(row) | row.settings)
    said = capsys.readouterr().out
    assert f"it has queries 333 instead of 900, classes 3 instead of {row.num_labels}" in said
    assert "the published AP is not its AP" in said
    assert f"taken as {row.title} that was trained further (found by its name; decline by --published none)" in said


@every_supported_row
@pytest.mark.parametrize("by", ["name", "--published"])
def test_a_name_on_other_contents_is_not_believed(row, by, capsys):
    match = match_published(Candidate(row, by, "f" * 64), PROJECTS[row.project], toy_config(row), {})
    assert match.is_same == (not row.sha256)
    assert (f"its SHA-256 does not start with {row.sha256[:8]}" in capsys.readouterr().out) == bool(row.sha256)


@every_supported_row
def test_settings_in_the_file_come_first(row):
    from_file = {"position_temperature": 123.0}
    match = match_published(Candidate(row, "name", row.sha256), PROJECTS[row.project], toy_config(row), from_file)
    assert not match.is_same
    assert match.settings == {
        name: value for name, value in (positions(row) | row.settings).items() if name != "position_temperature"
    }
    for by in ("SHA-256", "--published"):
        with pytest.raises(ConversionError, match=r"it says {'position_temperature': 123.0}.*--published none"):
            match_published(Candidate(row, by, row.sha256), PROJECTS[row.project], toy_config(row), from_file)


@every_row
def test_another_architecture_under_the_name_is_an_unknown_file(row, capsys):
    config = DinoDetrConfig(backbone_config={"model_type": "resnet", "depths": [1, 2, 1, 1]}, num_labels=80)
    assert match_published(Candidate(row, "name", "f" * 64), PROJECTS[row.project], config, {}) is None
    assert f"has the name of {row.title}, but it has " in capsys.readouterr().out


# -- from a file to a folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Toy files of the layout of ROW: as published, and trained further for 3 classes."""
    folder = tmp_path_factory.mktemp("files")
    for name, num_labels in (("same", 80), ("fine_tuned", 3)):
        torch.manual_seed(0)
        config = small(ROW)
        config.set_classes({index: f"class {index}" for index in range(num_labels)}, None)
        DinoDetrForObjectDetection(config).save_pretrained(folder / name)
        convert_back(folder / name, "detrex", folder / f"{name}.pth")
    return folder


def config_of(folder):
    return DinoDetrConfig.from_pretrained(folder)


def by_script(file, output, *options):
    main(["--checkpoint", str(file), "--output", str(output), *options])


def by_command(file, output, *options):
    result = CliRunner().invoke(app, ["convert", str(file), str(output), *options])
    if result.exit_code:
        raise SystemExit(result.output)
    print(result.output)


def by_python(file, output, *options):
    try:
        convert(
            file,
            output,
            **dict(zip([option.removeprefix("--") for option in options[::2]], options[1::2], strict=True)),
        )
    except ConversionError as error:
        raise SystemExit(str(error)) from error


every_way = pytest.mark.parametrize("way", [by_script, by_command, by_python])


@every_way
def test_all_ways_find_the_settings(way, files, tmp_path, monkeypatch, capsys):
    with_toy_width(ROW, monkeypatch)
    file = shutil.copy(files / "same.pth", tmp_path / "DINO_r50_4scale_24ep (1).PTH")
    way(file, tmp_path / "out")
    assert (
        "this is detrex/dino_r50_4scale_24ep, found by its name; decline by --published none" in capsys.readouterr().out
    )
    config = config_of(tmp_path / "out")
    assert (config.position_temperature, config.position_offset) == (20, 0)
    assert config.provenance["converted_from"]["published_ap"] == 50.6


@every_way
def test_all_ways_can_decline(way, files, tmp_path, monkeypatch):
    with_toy_width(ROW, monkeypatch)
    file = shutil.copy(files / "same.pth", tmp_path / ROW.file)
    with pytest.raises(SystemExit, match="does not contain its position settings"):
        way(file, tmp_path / "out", "--published", "none")
    assert not (tmp_path / "out").exists()


@every_way
def test_no_way_uses_wrong_positions_for_a_file_of_another_architecture(way, files, tmp_path, capsys):
    file = shutil.copy(files / "same.pth", tmp_path / ROW.file)  # its width is a toy's
    with pytest.raises(SystemExit, match="does not contain its position settings"):
        way(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_fine_tuned_file_that_kept_its_name_is_converted(files, tmp_path, monkeypatch, capsys):
    with_toy_width(ROW, monkeypatch)
    file = shutil.copy(files / "fine_tuned.pth", tmp_path / ROW.file)
    convert(file, tmp_path / "out")
    assert "it has classes 3 instead of 80: the published AP is not its AP" in capsys.readouterr().out
    config = config_of(tmp_path / "out")
    assert (config.position_temperature, config.position_offset, config.num_labels) == (20, 0, 3)
    assert "published" not in config.provenance["converted_from"]
    assert "50.6" not in (tmp_path / "out" / "README.md").read_text()
    # the same from a file of another name, if the user says what it came from
    file = shutil.copy(files / "fine_tuned.pth", tmp_path / "model_final.pth")
    convert(file, tmp_path / "told", published=ROW.title)
    assert config_of(tmp_path / "told").position_temperature == 20


def test_verification_of_a_file_alone_uses_its_settings(files, tmp_path, monkeypatch):
    with_toy_width(ROW, monkeypatch)
    file = shutil.copy(files / "same.pth", tmp_path / ROW.file)
    assert Model(file).config.position_temperature == 20
    assert Model(file, published="none").config.position_temperature == 10000


# -- raw and averaged weights


@pytest.fixture
def averaged(files, tmp_path):
    """A file with raw and averaged weights, as detrex writes it with its EMA."""
    content = torch.load(files / "same.pth")
    content["ema_state"] = {name: tensor * 1.01 for name, tensor in content["model"].items()}
    file = tmp_path / "dino_r50_4scale_12ep_with_ema.pth"
    torch.save(content, file)
    return file


def weight(file, ema, published=None):
    loaded, _ = read_checkpoint(file, ema, published)
    return loaded.tensors["transformer.level_embeds"], loaded.note


def test_a_file_whose_ap_is_of_averaged_weights_gives_them(averaged, files):
    raw = torch.load(files / "same.pth")["model"]["transformer.level_embeds"]
    for ema in (False, True):
        found, note = weight(averaged, ema)
        assert torch.equal(found, raw * 1.01)
        assert ("('ema_state') are converted, because the published AP was measured with them" in note) == (not ema)
    found, note = weight(averaged, False, "none")
    assert torch.equal(found, raw)
    assert "the file also has averaged weights ('ema_state'), which --ema converts" in note
    shutil.copy(files / "same.pth", averaged)
    found, note = weight(averaged, False)
    assert torch.equal(found, raw)
    assert "the file has one set of weights" in note
    assert weight(files / "same.pth", False)[1] == ""


def test_the_folder_of_averaged_weights_is_verified(averaged, tmp_path, monkeypatch, capsys):
    with_toy_width(ROW, monkeypatch)
    by_script(averaged, tmp_path / "out", "--image-size", "96", "160", "--verify")
    said = capsys.readouterr().out
    assert "this is detrex/dino_r50_4scale_12ep_with_ema, found by its name" in said
    assert "the averaged weights ('ema_state') are converted" in said
    assert "the two compute the same" in said
