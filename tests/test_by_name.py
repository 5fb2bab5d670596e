"""Published checkpoints by name, from a server on the loopback interface with toy files of all projects."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path, PureWindowsPath

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import dino_hf
from dino_hf.cli.app import app
from dino_hf.common import file_downloads
from dino_hf.common.file_downloads import DownloadError
from dino_hf.conversion import by_name, published
from dino_hf.conversion.by_name import RECORD, cached_folder, fetch, is_cached, store
from dino_hf.conversion.convert_checkpoint import convert
from dino_hf.conversion.errors import ConversionError
from dino_hf.conversion.published_row import Published
from dino_hf.data import CocoData
from dino_hf.inference import loading
from dino_hf.inference.loading import find_model, load_detector
from dino_hf.inference.score_thresholds import report_folder
from dino_hf.run.starting_model import load_start
from dino_hf.runtime.card_data import CardData
from dino_hf.runtime.card_sections import card_metadata
from file_server import serve
from inference_toys import noise
from processes import SCRIPTS, environment_of_scripts
from published_toys import PROJECTS, add_toy_rows, write_toy_files

SMALL = dino_hf.DinoDetrImageProcessor(size={"shortest_edge": 60, "longest_edge": 100})


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """Folder of the toy files, and their contents by path."""
    folder = tmp_path_factory.mktemp("toys")
    return folder, write_toy_files(folder)


@pytest.fixture
def server(toys, tmp_path, monkeypatch):
    """A server with the toy files under the addresses of the table. The cache is empty."""
    monkeypatch.setenv("DINO_HF_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(by_name.MIRROR, raising=False)
    monkeypatch.setattr(file_downloads, "_FIRST_WAIT", 0.01)
    with serve() as server:
        server.files = dict(toys[1])
        server.rows = add_toy_rows(monkeypatch.setitem, server.files, server.address)
        yield server


@pytest.fixture
def entry(server, toys, tmp_path):
    """The folder of detrex/toy in the cache, converted once for all tests."""
    kept, folder = toys[0] / "entry", cached_folder(server.rows["detrex"])
    if not kept.is_dir():
        shutil.copytree(fetch("detrex/toy"), kept)
        server.requests.clear()
    else:
        shutil.copytree(kept, folder)
    return folder


def entries(folder: Path) -> set[str]:
    """Names of files in a folder and its folders, without locks."""
    return {path.name for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


@pytest.mark.parametrize("project", PROJECTS)
def test_a_name_detects_as_the_folder_converted_by_hand(project, server, toys, tmp_path):
    name, file = f"{project}/toy", toys[0] / f"{project}.pth"
    settings = server.rows[project].settings
    by_hand = convert(file, tmp_path / "by_hand", published=name)
    assert all(getattr(by_hand.config, field) == value for field, value in settings.items())
    images = [noise(150, 90), noise(70, 130, seed=1)]
    settings = {"image_processor": SMALL, "threshold": 0.01}
    expected = dino_hf.predict(str(tmp_path / "by_hand"), images, **settings)
    found = dino_hf.predict(name, images, **settings)
    assert sum(len(one.scores) for one in expected) > 0
    for one, other in zip(expected, found, strict=True):
        assert np.array_equal(one.boxes, other.boxes)
        assert np.array_equal(one.scores, other.scores)
        assert one.names == other.names
    folder = cached_folder(server.rows[project])
    assert folder == tmp_path / "cache" / "models" / project / "toy"
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "by_hand/model.safetensors").read_bytes()
    assert entries(tmp_path / "cache/downloads") == set()  # the file is not kept twice
    dino_hf.predict(name, images[:1], **settings)
    assert len(server.requests) == 1


def test_the_record_and_the_configuration_tell_the_origin(server):
    folder = fetch("mmdet/toy")
    record = json.loads((folder / RECORD).read_text())
    origin = json.loads((folder / "config.json").read_text())["provenance"]["converted_from"]
    assert record["name"] == origin["published"] == "mmdet/toy"
    assert record["sha256"] == origin["sha256"]
    assert record["sha256"].startswith(server.rows["mmdet"].sha256)
    assert record["file"] == origin["file"] == "toy.pth"
    assert record["address"] == f"{server.address}/mmdet/toy.pth"
    assert set(record["files"]) == {"config.json", "preprocessor_config.json", "model.safetensors"}
    assert any("the two compute the same" in line for line in record["report"])


def test_a_model_and_its_image_processor_in_python(entry):
    model, image_processor = dino_hf.from_published("detrex/toy")
    assert isinstance(model, dino_hf.DinoDetrForObjectDetection)
    assert not model.training
    assert model.name_or_path == model.config._name_or_path == "detrex/toy"
    assert image_processor.size == {"shortest_edge": 800, "longest_edge": 1333}
    (found,) = dino_hf.predict(model, [noise(90, 60)], image_processor=SMALL, threshold=0.0)
    detector = dino_hf.pipeline("detrex/toy", image_processor=SMALL, device="cpu")
    in_pipeline = detector(noise(90, 60), threshold=0.0)
    assert len(in_pipeline) == len(found.scores)
    assert in_pipeline[0]["score"] == pytest.approx(found.scores[0])


def test_an_alias_is_the_same_checkpoint(server, entry):
    assert fetch("detrex/other") == fetch("detrex/toy") == entry
    assert load_detector("detrex/other").name_or_path == "detrex/toy"
    assert server.requests == []


def test_a_folder_goes_before_a_name(server, entry, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "detrex").mkdir()
    entry.rename(tmp_path / "detrex/toy")
    assert find_model("detrex/toy") == "detrex/toy"
    assert Path(load_detector("detrex/toy").name_or_path) == Path("detrex/toy")
    assert server.requests == []
    model, _ = dino_hf.from_published("detrex/toy")  # takes only names
    assert model.name_or_path == model.config._name_or_path == "detrex/toy"
    assert len(server.requests) == 1


def test_training_starts_from_a_name_as_from_its_folder(server):
    data = CocoData(None, {0: "cat", 1: "dog", 2: "emu"}, [4, 9, 11])
    first = load_start("mmdet/toy", data, seed=3)  # downloads and converts
    second = load_start("mmdet/toy", data, seed=3)
    folder = load_start(cached_folder(server.rows["mmdet"]), data, seed=3)
    assert first.source == second.source == "mmdet/toy"
    state = first.model.state_dict()
    for other in (second, folder):
        assert all(torch.equal(tensor, state[name]) for name, tensor in other.model.state_dict().items())
    assert first.model.config._name_or_path == "mmdet/toy"
    assert first.image_processor.size == folder.image_processor.size


def test_a_name_is_no_repository_in_a_model_card(entry):
    model = load_detector("detrex/toy")
    data = CardData.from_provenance(model.config.provenance | {"base_model": model.name_or_path})
    assert data.converted_from.published == data.base_model == "detrex/toy"
    assert card_metadata(data, "mine", []).base_model is None


def test_random_numbers_of_the_caller_do_not_change(server):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fetch("original/toy")
    assert torch.equal(torch.rand(3), expected)


# -- names


@pytest.mark.parametrize("name", ["detrex/dino_r50_4scale_12epp", "dino_r50_4scale_12ep", "detrex/dino_r50_4scale"])
def test_a_near_miss_tells_the_names_that_are_near(name, monkeypatch):
    with pytest.raises(ConversionError, match=r"Did you mean .*detrex/dino_r50_4scale"):
        dino_hf.from_published(name)
    monkeypatch.setattr("dino_hf.inference.loading.reach_hub", _no_hub)
    monkeypatch.setattr("dino_hf.run.starting_model.reach_hub", _no_hub)
    for load in (load_detector, lambda name: load_start(name, None, seed=0)):
        with pytest.raises(FileNotFoundError, match=r"similar names: .*detrex/dino_r50_4scale"):
            load(name)


@pytest.mark.parametrize("name", ["DETREX/DINO_R50_4SCALE_12EP", "DINO_R50_4SCALE_12EP"])
def test_a_name_in_another_case_tells_the_name(name):
    with pytest.raises(ConversionError, match=r"Did you mean detrex/dino_r50_4scale_12ep"):
        fetch(name)


def test_a_name_with_a_slash_at_its_end_tells_the_name():
    with pytest.raises(FileNotFoundError, match=r"no folder .*similar names: detrex/dino_r50_4scale_12ep"):
        find_model("detrex/dino_r50_4scale_12ep/")


@pytest.mark.parametrize("name", [None, 5, Path("nothing/here")])
def test_what_is_no_name_is_refused(name):
    with pytest.raises(ConversionError, match=f"{name}.* is not the name of a published checkpoint"):
        dino_hf.from_published(name)


def test_a_name_may_be_a_path_of_windows(entry, monkeypatch):
    assert find_model(Path("detrex/toy")) == str(entry)
    assert dino_hf.from_published(Path("detrex/toy"))[0].name_or_path == "detrex/toy"
    monkeypatch.setattr(loading, "Path", PureWindowsPath)
    monkeypatch.setattr(PureWindowsPath, "exists", lambda path: False, raising=False)
    assert loading.fetch_published(PureWindowsPath("detrex/toy")) == entry


def _no_hub(name):
    raise ConnectionError("the Hub does not answer")


def test_a_backbone_that_is_not_supported_is_refused_before_the_download(server, monkeypatch):
    row = Published("detrex", "vit", 50.0, "EVA-01", 4, "vit.pth", address=f"{server.address}/detrex/vit.pth")
    monkeypatch.setitem(published._BY_TITLE, row.title, row)
    with pytest.raises(ConversionError, match="EVA-01, which is not supported"):
        load_detector(row.title)
    assert server.requests == []


# -- downloads


def test_a_mirror_has_the_files_by_project(server, monkeypatch):
    monkeypatch.setenv(by_name.MIRROR, f"{server.address}/kept/")
    server.files = {f"/kept{path}": content for path, content in server.files.items()}
    fetch("mmdet/toy")
    assert server.requests[0][0] == "/kept/mmdet/toy.pth"
    monkeypatch.setenv(by_name.MIRROR, "http://127.0.0.1:1")
    dino_hf.from_published("detrex/toy", mirror=f"{server.address}/kept")  # the argument goes before the environment


def test_a_mirror_with_another_file_is_refused_by_the_hash(server, monkeypatch):
    monkeypatch.setenv(by_name.MIRROR, server.address)
    server.files["/mmdet/toy.pth"] = server.files["/detrex/toy.pth"]
    with pytest.raises(DownloadError, match=r"SHA-256.*dino-hf convert toy.pth --published mmdet/toy"):
        fetch("mmdet/toy")


def test_a_mirror_with_another_checkpoint_is_refused_by_its_content(server, tmp_path):
    """Files of detrex have no hash in their names."""
    server.files["/detrex/toy.pth"] = server.files["/original/toy.pth"]
    with pytest.raises(ConversionError, match="not detrex/toy"):
        fetch("detrex/toy")
    assert entries(tmp_path / "cache/downloads") == set()
    assert not is_cached(server.rows["detrex"])


@pytest.mark.parametrize("content", [b"not a checkpoint", b""])
def test_rubbish_is_refused_and_deleted(content, server, tmp_path):
    server.files["/detrex/toy.pth"] = content
    with pytest.raises(ConversionError, match="was not converted"):
        fetch("detrex/toy")
    assert entries(tmp_path / "cache/downloads") == set()


def test_the_second_address_is_used_if_the_first_fails(server, monkeypatch):
    row = server.rows["mmdet"]._replace(address=f"{server.address}/gone.pth", mirrors=(server.rows["mmdet"].address,))
    monkeypatch.setitem(published._BY_TITLE, row.title, row)
    folder = fetch("mmdet/toy")
    assert json.loads((folder / RECORD).read_text())["address"] == row.mirrors[0]


def test_a_password_of_a_mirror_is_not_shown(server, monkeypatch, capfd):
    monkeypatch.setenv(by_name.MIRROR, "http://someone:secret@127.0.0.1:1")
    with pytest.raises(DownloadError) as caught:
        fetch("detrex/toy")
    assert "secret" not in str(caught.value) + "".join(capfd.readouterr())
    assert "127.0.0.1:1" in str(caught.value)


@pytest.mark.parametrize(
    "mirror",
    [
        "someone:secret@host/x",
        "ftp://someone:secret@host",
        "http://someone:secret@",
        "http://someone:sec/secret@host",
        "http://someone:secret@host:port",
        "http://[host",
        "http://host/?token=secret",
        "mirror/x",
    ],
)
def test_a_mirror_that_is_no_address_is_refused_without_its_password(mirror, server, capfd):
    with pytest.raises(DownloadError, match="is not an address such as") as caught:
        fetch("detrex/toy", mirror)
    assert "secret" not in str(caught.value) + "".join(capfd.readouterr())
    assert ("secret" in mirror) != (mirror in str(caught.value))


def test_a_password_with_an_at_sign_is_not_shown_and_not_kept(server, capfd, monkeypatch):
    server.plans = [("cut", 1000), *[("status", 503)] * 3]
    mirror = server.address.replace("//", "//someone:one@secret@")
    with pytest.raises(DownloadError) as caught:
        fetch("detrex/toy", mirror)
    folder = by_name._downloads(server.rows["detrex"])
    assert "secret" not in str(caught.value) + "".join(capfd.readouterr())
    assert "secret" not in (folder / "toy.pth.part.json").read_text()
    assert "secret" not in (fetch("detrex/toy", mirror) / RECORD).read_text()
    assert server.ranges[-1] == "bytes=1000-"


def test_a_file_that_only_a_web_page_gives_says_so(server, monkeypatch):
    row = server.rows["original"]._replace(address="", page="https://example.org/folder")
    monkeypatch.setitem(published._BY_TITLE, row.title, row)
    with pytest.raises(
        DownloadError, match=r"browser.*https://example.org/folder.*dino-hf convert toy.pth --published original/toy"
    ):
        fetch("original/toy")
    monkeypatch.setenv(by_name.MIRROR, server.address)
    assert is_cached(row) is False
    fetch("original/toy")
    assert is_cached(row)


def test_offline_is_one_sentence_with_the_address_and_the_command(server, monkeypatch):
    monkeypatch.setattr(by_name, "is_offline_mode", lambda: True)
    result = CliRunner().invoke(app, ["predict", "detrex/toy", "--", "nothing.jpg"])
    assert result.exit_code == 1
    with pytest.raises(DownloadError, match="offline mode is on") as caught:
        fetch("detrex/toy")
    assert f"{server.address}/detrex/toy.pth" in str(caught.value)
    assert "dino-hf convert toy.pth --published detrex/toy" in str(caught.value)
    assert server.requests == []


def test_offline_a_finished_download_is_converted(server, toys, monkeypatch):
    """A process was stopped between download and conversion."""
    monkeypatch.setattr(by_name, "is_offline_mode", lambda: True)
    row = server.rows["detrex"]
    file = by_name._downloads(row) / row.file
    file.parent.mkdir(parents=True)
    shutil.copy(toys[0] / "detrex.pth", file)
    record = json.loads((fetch("detrex/toy", "http://mirror:1") / RECORD).read_text())
    assert record["address"] == row.url
    assert not file.exists()


def test_offline_a_cached_checkpoint_works(server, entry, monkeypatch):
    monkeypatch.setattr(by_name, "is_offline_mode", lambda: True)
    assert load_detector("detrex/toy").config.num_labels == 6
    assert server.requests == []


def test_a_file_fetched_by_hand_is_kept_under_its_name(server, toys, monkeypatch):
    monkeypatch.setattr(by_name, "is_offline_mode", lambda: True)
    assert store(toys[0] / "mmdet.pth", "mmdet/toy") == cached_folder(server.rows["mmdet"])
    assert (toys[0] / "mmdet.pth").is_file()
    assert load_detector("mmdet/toy").name_or_path == "mmdet/toy"
    with pytest.raises(ConversionError, match="SHA-256"):
        store(toys[0] / "detrex.pth", "mmdet/toy")
    with pytest.raises(ConversionError, match="not detrex/toy"):
        store(toys[0] / "original.pth", "detrex/toy")
    assert (toys[0] / "original.pth").is_file()
    with pytest.raises(FileNotFoundError, match="no file"):
        store(toys[0] / "nothing.pth", "detrex/toy")


# -- the cache


@pytest.mark.parametrize("damage", ["missing", "short", "changed", "no record", "wrong record"])
def test_a_damaged_entry_is_made_again(damage, server, entry):
    folder, row = entry, server.rows["detrex"]
    weights = folder / "model.safetensors"
    before = weights.read_bytes()
    if damage == "missing":
        weights.unlink()
    elif damage == "short":
        weights.write_bytes(before[:-100])
    elif damage == "changed":
        weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        os.utime(weights, ns=(1, 1))
    elif damage == "no record":
        (folder / RECORD).unlink()
    else:
        (folder / RECORD).write_text('{"format": 1, "files": {"../../x": 3}}')
    assert not is_cached(row)
    assert fetch("detrex/toy") == folder
    assert weights.read_bytes() == before
    assert len(server.requests) == 1


@pytest.mark.skipif(os.name == "nt", reason="Windows has no modes of this kind")
def test_other_users_can_read_the_weights(entry):
    """Several users may share a cache."""
    modes = {path.stat().st_mode for path in entry.iterdir() if path.is_file()}
    assert len(modes) == 1


def test_a_cache_that_is_read_only_works(server, entry, tmp_path, monkeypatch):
    def refuse(*arguments, **settings):
        raise PermissionError("read-only")

    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr(by_name, "FileLock", refuse)
    assert load_detector("detrex/toy").name_or_path == "detrex/toy"
    with pytest.raises(OSError, match="DINO_HF_CACHE"):
        load_detector("mmdet/toy")


def test_a_copied_cache_is_good_and_its_content_is_read_once(server, entry, monkeypatch):
    folder = cached_folder(server.rows["detrex"])
    for path in folder.iterdir():
        os.utime(path, ns=(1, 1))
    assert is_cached(server.rows["detrex"])
    monkeypatch.setattr(by_name, "file_sha256", lambda path: pytest.fail(f"{path} was read again"))
    assert is_cached(server.rows["detrex"])


def test_a_download_that_an_earlier_process_completed_is_used(server, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(by_name, "_keep", stop)
        with pytest.raises(KeyboardInterrupt):
            fetch("detrex/toy")
    fetch("detrex/toy")
    assert len(server.requests) == 1


def test_a_cache_that_cannot_be_written_says_so(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DINO_HF_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match="DINO_HF_CACHE"):
        fetch("detrex/toy")


def test_a_cache_in_an_unknown_home_folder_says_so(server, monkeypatch):
    monkeypatch.setenv("DINO_HF_CACHE", "~no-such-user-here/cache")
    with pytest.raises(ValueError, match="set DINO_HF_CACHE"):
        fetch("detrex/toy")


def test_a_cached_checkpoint_needs_no_library_for_downloads():
    code = "import sys, dino_hf.conversion.by_name; print('requests' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


# -- several at once


def test_threads_at_once_download_once(server):
    found = []
    threads = [threading.Thread(target=lambda: found.append(fetch("detrex/toy"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [cached_folder(server.rows["detrex"])] * 4
    assert len(server.requests) == 1


def start(server, toys, tmp_path, name="detrex/toy") -> subprocess.Popen:
    environment = environment_of_scripts() | {"DINO_HF_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, str(SCRIPTS / "fetch_toy.py"), server.address, str(toys[0]), name]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_at_once_download_once(server, toys, tmp_path):
    processes = [start(server, toys, tmp_path) for _ in range(2)]
    for process in processes:
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        assert output.splitlines()[-1] == str(cached_folder(server.rows["detrex"]))
    assert len(server.requests) == 1


def test_a_killed_process_leaves_a_part_that_the_next_one_continues(server, toys, tmp_path):
    half, release = len(server.files["/detrex/toy.pth"]) // 2, threading.Event()
    server.plans = [("held", half, release)]
    process = start(server, toys, tmp_path)
    part = tmp_path / "cache/downloads/detrex/toy.pth.part"
    try:
        for _ in range(3000):
            if part.is_file() and part.stat().st_size == half:
                break
            release.wait(0.1)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    finally:
        process.kill()
        release.set()
    assert part.stat().st_size == half
    fetch("detrex/toy")
    assert server.ranges == [None, f"bytes={half}-"]
    assert is_cached(server.rows["detrex"])
    assert entries(tmp_path / "cache/downloads") == set()


# -- commands


def draw_data(folder: Path) -> Path:
    """Three images in COCO format, as training and validation data. Two have an object of the toy model's classes."""
    images = [{"id": n, "file_name": f"{n}.png", "width": 70, "height": 40} for n in (1, 2, 3)]
    boxes = [{"id": n, "image_id": n, "category_id": n, "bbox": [9 * n, 8, 20, 15], "area": 300} for n in (1, 2)]
    content = {"images": images, "annotations": [{**box, "iscrowd": 0} for box in boxes]}
    content["categories"] = [{"id": n + 1, "name": f"LABEL_{n}"} for n in range(6)]
    for split in ("train", "val"):
        (folder / split).mkdir(parents=True)
        for image in images:
            noise(70, 40, seed=image["id"] + 3 * (split == "val")).save(folder / split / image["file_name"])
        (folder / split / "_annotations.coco.json").write_text(json.dumps(content))
    return folder


def test_eval_compares_names(server, entry, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, options = str(draw_data(tmp_path / "data")), ["--device", "cpu", "--num-bootstrap", "40"]
    result = CliRunner().invoke(app, ["eval", "detrex/toy", data, "--compare", "detrex/other", *options])
    assert result.exit_code == 0, result.output
    folder = tmp_path / "outputs/eval/detrex--toy"
    assert json.loads((folder / "results.json").read_text())["model"] == "detrex/toy"
    assert not any(str(tmp_path / "cache") in path.read_text() for path in folder.glob("*.json"))
    assert server.requests == []


def test_augment_takes_a_name(server, entry, tmp_path):
    data, picture = str(draw_data(tmp_path / "data")), tmp_path / "augmented.png"
    options = ["--model", "detrex/toy", "--num-images", "1", "--num-samples", "1", "--output", str(picture)]
    result = CliRunner().invoke(app, ["augment", data, *options])
    assert result.exit_code == 0, result.output
    assert picture.is_file()


def test_export_takes_a_name(server, entry, tmp_path, monkeypatch):
    """Without the export itself, which takes long."""
    pytest.importorskip("onnx")
    from dino_hf import export
    from dino_hf.export import onnx_export

    given = []
    monkeypatch.setattr(export, "export_onnx", lambda *arguments, **settings: given.append(arguments) or 1 / 0)
    CliRunner().invoke(app, ["export", "detrex/toy"])
    assert given == [("detrex/toy", Path("toy.onnx"))]
    predictor, name = onnx_export._load("detrex/toy", None)
    assert name == "detrex/toy"
    assert predictor.image_processor.size == {"shortest_edge": 800, "longest_edge": 1333}


def test_a_mirror_by_option_and_a_file_fetched_by_hand(server, toys, tmp_path, monkeypatch):
    monkeypatch.setenv(by_name.MIRROR, "http://127.0.0.1:1")
    noise(90, 60).save(tmp_path / "a.png")
    arguments = ["predict", "mmdet/toy", str(tmp_path / "a.png"), "--save", str(tmp_path / "found")]
    result = CliRunner().invoke(app, [*arguments, "--mirror", server.address])
    assert result.exit_code == 0, result.output
    assert str(tmp_path / "cache") not in (tmp_path / "found/predictions.csv").read_text()
    assert os.environ[by_name.MIRROR] == server.address

    result = CliRunner().invoke(app, ["convert", str(toys[0] / "detrex.pth"), "--published", "detrex/toy"])
    assert result.exit_code == 0, result.output
    assert is_cached(server.rows["detrex"])
    assert len(server.requests) == 1
    for arguments, reason in (([], "--published"), (["--published", "detrex/toy", "--ema"], "--output FOLDER")):
        result = CliRunner().invoke(app, ["convert", str(toys[0] / "detrex.pth"), *arguments])
        assert result.exit_code == 1
        assert reason in result.output


def test_an_alias_and_its_title_share_a_report():
    alias, title = "detrex/dino_r50_4scale_12ep", "detrex/dino_r50_4scale_12ep_49_2AP"
    assert report_folder(alias) == report_folder(title) == Path("outputs/eval/detrex--dino_r50_4scale_12ep_49_2AP")
