"""Publishing on the Hub: which files go, what is refused, and one commit."""

import json
import shutil
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from typer.testing import CliRunner

from dino_hf import DinoDetrForObjectDetection, DinoDetrImageProcessor
from dino_hf.cli.app import app
from dino_hf.common import hub_access
from dino_hf.model.sharing import shipped_files
from dino_hf.run import publish as publishing
from dino_hf.run.publish import describe, publish
from dino_hf.runtime.weights_digest import weights_digest
from helpers import randomize, tiny_config

CODE = {file.name for file in shipped_files()}
MODEL = {"README.md", "config.json", "preprocessor_config.json", "model.safetensors"}
RELEASE = {"project": "detrex", "file": "dino_r50.pth", "published": "detrex/dino_r50_4scale_12ep"}


def save(folder, provenance=None, **settings):
    torch.manual_seed(0)
    model = randomize(DinoDetrForObjectDetection(tiny_config(**settings)), scale=0.1)
    model.config.provenance = provenance
    model.save_pretrained(folder)
    DinoDetrImageProcessor(size={"shortest_edge": 48, "longest_edge": 64}).save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    save(folder, {"converted_from": RELEASE})
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "birds")


def look(folder, **settings):
    """The publication of a dry run, with the texts that would be uploaded."""
    seen = []

    def show(publication):
        texts = {name: path.read_text() for name, path in publication.files.items() if path.suffix in (".md", ".json")}
        seen.append((publication, texts, describe(publication)))

    assert publish(folder, "someone/birds", show=show, **settings) is None
    return seen[0]


class Hub:
    """Records the calls of `HfApi` and copies the uploaded files."""

    def __init__(self, place, monkeypatch, failure=None):
        self.calls, self.place, self.failure = [], place, failure
        place.mkdir()
        monkeypatch.setattr(publishing, "HfApi", lambda: self)
        monkeypatch.setattr(publishing, "reach_hub", lambda *args, **settings: None)
        monkeypatch.setattr("dino_hf.runtime.model_card.read_remote_card", lambda *args: None)

    def whoami(self):
        if isinstance(self.failure, LocalTokenNotFoundError):
            raise self.failure

    def create_repo(self, repo_id, **settings):
        self.calls.append(("create_repo", repo_id, settings))
        if self.failure is not None:
            raise self.failure

    def create_commit(self, repo_id, operations, commit_message):
        self.calls.append(("create_commit", repo_id, commit_message))
        for operation in operations:
            shutil.copyfile(operation.path_or_fileobj, self.place / operation.path_in_repo)
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/1")


def test_a_dry_run_shows_files_and_sends_nothing(folder, monkeypatch):
    monkeypatch.setattr(publishing, "HfApi", None)
    publication, texts, lines = look(folder)
    assert set(publication.files) == MODEL | CODE
    assert publication.files["model.safetensors"] == folder / "model.safetensors"
    assert "someone/birds" in texts["README.md"]
    assert json.loads(texts["config.json"])["auto_map"]["AutoConfig"].endswith("DinoDetrConfig")
    assert f"{len(publication.files)} files" in lines[0]
    assert any(line.endswith("  model.safetensors") for line in lines)
    assert (folder / "README.md").read_text() != texts["README.md"]  # its code names the folder


def test_only_known_regular_files_are_uploaded(folder, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    for name in ("optimizer.pt", "run.json", ".env", "notes.txt", "training_args.bin"):
        (folder / name).write_text("{}")
    (folder / "checkpoint-12").mkdir()
    (folder / "link.png").symlink_to(secret)
    publication, _, lines = look(folder)
    assert set(publication.files) == MODEL | CODE
    left_out = {".env", "checkpoint-12/", "link.png", "notes.txt", "optimizer.pt", "run.json", "training_args.bin"}
    assert set(publication.left_out) == left_out
    assert any(line.startswith("not uploaded: .env, checkpoint-12/") for line in lines)


def test_code_and_card_that_lack_are_added_and_an_edited_card_is_kept(folder):
    for name in ("README.md", "dino_detr.py", "backbone.py"):
        (folder / name).unlink()
    publication, texts, _ = look(folder)
    assert set(publication.files) == MODEL | CODE
    assert "detrex" in texts["README.md"]
    (folder / "README.md").write_text("# My birds\n")
    publication, texts, _ = look(folder)
    assert texts["README.md"] == "# My birds\n"
    assert any("was edited" in sentence for sentence in publication.warnings)


def test_an_unknown_licence_is_warned_of_and_can_be_named(folder):
    publication, texts, _ = look(folder)
    assert any("licence of detrex/dino_r50_4scale_12ep is not recorded" in one for one in publication.warnings)
    assert any("has no address of its source" in one for one in publication.warnings)
    publication, texts, _ = look(folder, license="apache-2.0")
    assert not any("licence" in one for one in publication.warnings)
    assert "license: apache-2.0" in texts["README.md"]
    assert json.loads(texts["config.json"])["provenance"]["license"] == "apache-2.0"


@pytest.mark.parametrize("license", ["Apache 2.0", "", "MIT", "apache_2.0\n"])
def test_a_licence_that_is_no_identifier_is_refused_in_the_dry_run(folder, license):
    with pytest.raises(ValueError, match="is not an identifier of a licence"):
        publishing.publish(folder, "someone/birds", license=license)


def test_pictures_of_the_card_go_with_it_and_only_they(tmp_path):
    evaluation = {
        "metrics": {"AP": 0.5},
        "step": 3,
        "pictures": {"f1.png": "F1", "../x.png": "no", "mistakes.png": "m"},
    }
    folder = tmp_path / "birds"
    model = save(folder, {"training": {"steps": 3, "dataset": "birds", "evaluation": evaluation}, "license": "mit"})
    evaluation["weights"] = weights_digest(model)
    model.save_pretrained(folder)
    for name in ("f1.png", "mistakes.png", "other.png"):
        (folder / name).write_bytes(b"png")
    publication, texts, _ = look(folder)
    assert set(publication.files) == MODEL | CODE | {"f1.png", "mistakes.png"}
    assert publication.warnings == ["mistakes.png shows images of the data set"]
    assert "f1.png" in texts["README.md"]
    with torch.no_grad():
        model.model.encoder.level_embed.weight.add_(1)
    model.save_pretrained(folder)
    publication, _, _ = look(folder)
    assert any("no AP of exactly these weights" in one for one in publication.warnings)


@pytest.mark.parametrize("name", ["birds", "a/b/c", "some one/birds", "someone/--birds", ""])
def test_wrong_names_are_refused_before_anything_is_read(name, tmp_path):
    with pytest.raises(ValueError, match=r"not a name on the Hub|has no owner"):
        publish(tmp_path / "nothing", name)


def test_what_is_no_whole_detector_is_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        publish(tmp_path / "nothing", "someone/birds")
    checkpoint = shutil.copytree(folder, tmp_path / "run" / "checkpoint-10")
    with pytest.raises(ValueError, match="is a checkpoint of a run"):
        publish(checkpoint, "someone/birds")
    (folder / "preprocessor_config.json").rename(tmp_path / "processor.json")
    with pytest.raises(FileNotFoundError, match=r"has no preprocessor_config\.json"):
        publish(folder, "someone/birds")
    (tmp_path / "processor.json").rename(folder / "preprocessor_config.json")
    (folder / "model.safetensors").rename(tmp_path / "weights")
    (folder / "model.safetensors").symlink_to(tmp_path / "weights")
    with pytest.raises(FileNotFoundError, match=r"no regular file model\.safetensors"):
        publish(folder, "someone/birds")


@pytest.mark.parametrize("token", ["hf_" + "a1B2" * 9, "ghp_" + "x" * 36])
def test_an_access_token_in_a_text_stops_and_a_local_path_is_warned_of(folder, token):
    config = json.loads((folder / "config.json").read_text())
    config["provenance"]["start"] = "/home/me/private/dino"
    (folder / "config.json").write_text(json.dumps(config))
    publication, _, _ = look(folder)
    assert any("path of this machine: /home/me/private/dino" in one for one in publication.warnings)
    (folder / "README.md").write_text(f"# Birds\nmy token is {token}\n")
    with pytest.raises(ValueError, match=r"README\.md contains an access token"):
        publish(folder, "someone/birds")


@pytest.mark.parametrize("is_private", [True, False])
def test_one_commit_is_made_and_what_was_uploaded_loads(folder, tmp_path, monkeypatch, is_private):
    hub = Hub(tmp_path / "hub", monkeypatch)
    settings = ["--private"] if is_private else []
    result = CliRunner().invoke(app, ["push", str(folder), "someone/birds", "--yes", *settings])
    assert result.exit_code == 0, result.output
    assert "https://huggingface.co/someone/birds/commit/1" in result.output
    assert [call[0] for call in hub.calls] == ["create_repo", "create_commit"]
    assert hub.calls[0][2] == {"private": is_private or None, "exist_ok": True}
    assert {path.name for path in hub.place.iterdir()} == MODEL | CODE
    loaded = DinoDetrForObjectDetection.from_pretrained(hub.place).state_dict()
    expected = DinoDetrForObjectDetection.from_pretrained(folder).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in expected.items())
    assert DinoDetrImageProcessor.from_pretrained(hub.place).size == {"shortest_edge": 48, "longest_edge": 64}


def test_the_weights_keep_their_dtype(tmp_path):
    save(tmp_path / "half").half().save_pretrained(tmp_path / "half")
    _, texts, _ = look(tmp_path / "half")
    assert json.loads(texts["config.json"])["dtype"] == "float16"


def test_without_yes_the_command_says_that_nothing_was_uploaded(folder, monkeypatch, tmp_path):
    hub = Hub(tmp_path / "hub", monkeypatch)
    result = CliRunner().invoke(app, ["push", str(folder), "someone/birds"])
    assert result.exit_code == 0, result.output
    assert "Nothing was uploaded" in result.output
    assert hub.calls == []


def http_error(status: int) -> HfHubHTTPError:
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    return HfHubHTTPError("refused", response=response)


@pytest.mark.parametrize(
    ("failure", "kind", "message"),
    [
        (LocalTokenNotFoundError("no token"), PermissionError, "no login. Run `hf auth login`"),
        (http_error(401), PermissionError, "refuses to write to someone/birds .HTTP 401"),
        (http_error(403), PermissionError, "refuses to write"),
        (http_error(500), ConnectionError, "did not take someone/birds .HTTP 500"),
        (ConnectionError("reset"), ConnectionError, "cannot be reached.*reset"),
    ],
)
def test_refusals_of_the_hub_are_one_sentence(folder, tmp_path, monkeypatch, failure, kind, message):
    hub = Hub(tmp_path / "hub", monkeypatch, failure)
    with pytest.raises(kind, match=message) as raised:
        publish(folder, "someone/birds", is_dry_run=False)
    assert "\n" not in str(raised.value)
    assert not any(call[0] == "create_commit" for call in hub.calls)


def test_a_hub_that_does_not_answer_is_said(folder, monkeypatch):
    def fail(request, timeout):
        raise URLError("Name or service not known")

    monkeypatch.setattr(hub_access, "urlopen", fail)
    monkeypatch.setattr(hub_access, "is_offline_mode", lambda: False)
    with pytest.raises(ConnectionError, match="cannot be reached, so someone/birds was not changed"):
        publish(folder, "someone/birds", is_dry_run=False)
