"""Checkpoints of a few kilobytes that would take hours or all memory are refused in a sentence."""

import argparse
import time
import zipfile

import pytest
import torch

from checkpoint_files import ConversionError, load_checkpoint, save_checkpoint
from plain_values import Unreadable, plain_value
from toy_checkpoints import original_tensors, settings
from training_settings import told_by_file


def bomb(depth: int = 11, kind=list):
    value = "x"
    for _ in range(depth):
        value = kind([value] * 10)
    return value


@pytest.fixture(autouse=True)
def soon():
    start = time.monotonic()
    yield
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    "names", [("two_stage_type",), ("pe_temperatureH", "pe_temperatureW"), ("decoder_sa_type", "dn_number")]
)
@pytest.mark.parametrize("kind", [list, tuple])
def test_nested_lists_in_settings_are_not_shown_or_compared(names, kind, tmp_path):
    args = settings(**{name: bomb(kind=kind) if kind is list else [bomb(4, tuple)] * 5 for name in names})
    torch.save({"model": original_tensors(), "args": args}, tmp_path / "bomb.pth")
    checkpoint = load_checkpoint(tmp_path / "bomb.pth")
    assert all(isinstance(checkpoint.settings[name], Unreadable) for name in names)
    if names[0] != "decoder_sa_type":
        with pytest.raises(ConversionError, match="a list that is too large or too deep") as caught:
            told_by_file("original", checkpoint.settings)
        assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("is_archive", [True, False])
def test_keys_whose_hash_takes_forever_are_refused_before_they_are_read(is_archive, tmp_path):
    content = {"model": original_tensors(), "args": {"x": 0}}
    torch.save(content, tmp_path / "small.pth", _use_new_zipfile_serialization=is_archive)
    assert load_checkpoint(tmp_path / "small.pth").settings == {"x": 0}
    key = "x"
    for _ in range(45):
        key = (key, key)

    content["args"] = {"x": [key]}
    torch.save(content, tmp_path / "bomb.pth", _use_new_zipfile_serialization=is_archive)
    with pytest.raises(ConversionError, match="nested tuples that stand for more values than any training saves"):
        load_checkpoint(tmp_path / "bomb.pth")


def test_plain_values_stay_and_others_are_named():
    value = {"a": [1, 2.5, "x", None, True, ("b", -3)], 7: {"c": []}}
    assert plain_value(value) == value
    assert plain_value(list(range(9_999))) == list(range(9_999))
    assert repr(plain_value(list(range(10_000)))) == "a list that is too large or too deep to be a setting"
    assert repr(plain_value(torch.zeros(2))) == "a tensor"
    assert repr(plain_value(10**4000)).startswith("a int that is too large")
    assert repr(plain_value([argparse.Namespace()])) == "[a Namespace]"
    nested = []
    for _ in range(10**5):
        nested = [nested]
    assert isinstance(plain_value(nested), Unreadable)
    itself = []
    itself.append(itself)
    assert isinstance(plain_value(itself), Unreadable)


def test_a_hundred_thousand_names_are_refused(tmp_path):
    tensors = original_tensors()
    one = torch.zeros(1)
    tensors |= {f"transformer.encoder.layers.{number}.norm1.weight": one for number in range(100_000)}
    torch.save({"model": tensors}, tmp_path / "names.pth")
    with pytest.raises(ConversionError, match=r"has 100,\d+ tensors; at most 20,000 are read"):
        load_checkpoint(tmp_path / "names.pth")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_are_no_part_of_names(prefix, tmp_path):
    tensors = original_tensors()
    torch.save({"model": {prefix + name: tensor for name, tensor in tensors.items()}}, tmp_path / "a.pth")
    assert set(load_checkpoint(tmp_path / "a.pth").tensors) == set(tensors)


def test_force_replaces_checkpoints_only(tmp_path):
    mine, old = tmp_path / "thesis.pth", tmp_path / "old.pth"
    mine.write_text("not a checkpoint")
    with pytest.raises(ConversionError, match=r"is not a file of torch\.save, so it is not replaced"):
        save_checkpoint({"model": {}}, mine, force=True)
    assert mine.read_text() == "not a checkpoint"
    torch.save({}, old)
    save_checkpoint({"model": {"a": torch.ones(2)}}, old, force=True)
    assert torch.load(old, weights_only=True)["model"]["a"].tolist() == [1, 1]


def test_an_archive_of_very_many_tensors_is_refused_before_it_is_read(tmp_path, monkeypatch):
    import checkpoint_files

    path = tmp_path / "a.pth"
    torch.save({"model": {f"decoder.layers.{number}.bias": torch.zeros(1) for number in range(30)}}, path)
    with zipfile.ZipFile(path) as archive:
        monkeypatch.setattr(checkpoint_files, "_MOST_PARTS", len(archive.infolist()) - 1)
    with pytest.raises(checkpoint_files.ConversionError, match="tensors; a training checkpoint of DINO has fewer"):
        checkpoint_files.load_checkpoint(path)
    monkeypatch.setattr(checkpoint_files, "_MOST_PARTS", checkpoint_files._MOST_PARTS + 1)
    assert len(checkpoint_files.load_checkpoint(path).tensors) == 30
