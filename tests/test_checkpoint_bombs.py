"""Checkpoints of a few kilobytes that would take hours or all memory are refused in a sentence."""

import argparse
import io
import pickle
import pickletools
import struct
import time
import tracemalloc
import zipfile
from collections import OrderedDict

import pytest
import safetensors.torch
import torch
from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION

from dino_hf.conversion import file_checks, pickle_checks
from dino_hf.conversion.checkpoint_files import UnreadObject, load_checkpoint, save_checkpoint
from dino_hf.conversion.errors import ConversionError
from dino_hf.conversion.pickle_checks import TooLarge, check_pickle
from dino_hf.conversion.plain_values import Unreadable, plain_value
from dino_hf.conversion.projects.registry import PROJECTS
from toy_checkpoints import original_tensors, settings


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
            PROJECTS["original"].fields_from_settings(checkpoint.settings)
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


@pytest.mark.parametrize("form", ["archive", "pickle", "safetensors"])
def test_very_many_tensors_are_refused_before_they_are_read(form, tmp_path, monkeypatch):
    tensors = {f"decoder.layers.{number}.bias": torch.zeros(1) for number in range(30)}
    path = tmp_path / "a.pth"
    if form == "safetensors":
        safetensors.torch.save_file(tensors, path)
    else:
        torch.save({"model": tensors}, path, _use_new_zipfile_serialization=form == "archive")
    parts = 30
    if form == "archive":
        with zipfile.ZipFile(path) as archive:
            parts = len(archive.infolist())
    for module in (file_checks, pickle_checks):
        monkeypatch.setattr(module, "MAX_TENSORS", parts)
    assert len(load_checkpoint(path).tensors) == 30
    for module in (file_checks, pickle_checks):
        monkeypatch.setattr(module, "MAX_TENSORS", parts - 1)
    with pytest.raises(ConversionError, match=r"tensors.* DINO has fewer than 10,000"):
        load_checkpoint(path)


def _write_archive(path, content: bytes, parts: int = 1):
    with zipfile.ZipFile(path, "w") as archive:
        for part in range(parts):
            archive.writestr(f"archive{part}/data.pkl", content)
        archive.writestr("archive0/version", "3")
        archive.writestr("archive0/data/0", bytes(16))


def _write_legacy(path, content: bytes, keys: list[str]):
    with path.open("wb") as file:
        for part in (MAGIC_NUMBER, PROTOCOL_VERSION, {"protocol_version": PROTOCOL_VERSION, "little_endian": True}):
            pickle.dump(part, file, protocol=2)
        file.write(content)
        pickle.dump(keys, file, protocol=2)
        for _ in keys:
            file.write(struct.pack("<q", 4) + bytes(16))


def _claiming(numbers: int, is_archive: bool = False) -> bytes:
    """Pickle of a model with one tensor, whose storage "0" claims so many numbers."""

    class Tensor:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (storage, 0, (numbers,), (1,), False, OrderedDict())

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            entry = ("storage", torch.FloatStorage, "0", "cpu", numbers)
            return (entry if is_archive else (*entry, None)) if value is storage else None

    storage = UnreadObject()
    Pickler(buffer := io.BytesIO(), protocol=2).dump({"model": {"a": Tensor()}})
    return buffer.getvalue()


def test_a_pickle_of_operations_without_end_is_refused(tmp_path, monkeypatch):
    assert pickle_checks._MAX_OPERATIONS < 3_000_000  # a second or two for each million
    monkeypatch.setattr(pickle_checks, "_MAX_OPERATIONS", 2**17)
    pushes_and_pops = b"\x80\x02" + b"N0" * 2**17 + b"}."
    _write_archive(tmp_path / "a.pth", pushes_and_pops)
    _write_legacy(tmp_path / "b.pth", pushes_and_pops, [])
    for name in "ab":
        with pytest.raises(ConversionError, match="more than 131,072 values besides its tensors"):
            load_checkpoint(tmp_path / f"{name}.pth")


def test_operations_are_counted_to_the_last(monkeypatch):
    content = pickle.dumps([1, 2, 3])
    monkeypatch.setattr(pickle_checks, "_MAX_OPERATIONS", len(list(pickletools.genops(content))))
    check_pickle(io.BytesIO(content))
    monkeypatch.setattr(pickle_checks, "_MAX_OPERATIONS", pickle_checks._MAX_OPERATIONS - 1)
    with pytest.raises(TooLarge):
        check_pickle(io.BytesIO(content))


@pytest.mark.parametrize("value", ["x" * 1000, b"x" * 1000, 10**3000], ids=["text", "bytes", "integer"])
def test_bytes_besides_tensors_are_counted_to_the_last(value, monkeypatch):
    content = pickle.dumps([value])
    monkeypatch.setattr(pickle_checks, "_MAX_BYTES", len(content))
    check_pickle(io.BytesIO(content))
    for most in (len(content) - 1, 500):
        monkeypatch.setattr(pickle_checks, "_MAX_BYTES", most)
        with pytest.raises(TooLarge, match=f"more than {most:,} bytes"):
            check_pickle(io.BytesIO(content))


def test_a_text_that_claims_to_be_long_takes_no_memory():
    tracemalloc.start()
    with pytest.raises(TooLarge):
        check_pickle(io.BytesIO(b"\x80\x04\x8d" + struct.pack("<q", 2**40)))
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


@pytest.mark.parametrize("numbers", [5, 10**6, 10**9, 10**12, 2**62, 2**80])
def test_numbers_that_the_file_does_not_have_are_never_read(numbers, tmp_path):
    _write_archive(tmp_path / "archive.pth", _claiming(numbers, is_archive=True))
    _write_legacy(tmp_path / "none.pth", _claiming(numbers), [])  # would be whatever the memory held
    _write_legacy(tmp_path / "few.pth", _claiming(numbers), ["0"])
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(ConversionError, match="damaged"):
            load_checkpoint(path)
    _write_legacy(tmp_path / "right.pth", _claiming(4), ["0"])
    _write_archive(tmp_path / "right_archive.pth", _claiming(4, is_archive=True))
    for name in ("right", "right_archive"):
        assert load_checkpoint(tmp_path / f"{name}.pth").tensors["a"].tolist() == [0, 0, 0, 0]


def test_memory_for_claimed_numbers_is_bounded_by_the_file(tmp_path):
    path = tmp_path / "a.pth"
    _write_legacy(path, _claiming(4), ["0"])
    size = path.stat().st_size
    file_checks._check_storages({"0": size - 8, "1": 8}, {"0", "1"}, path)
    with pytest.raises(ConversionError, match=f"claims {size + 1} numbers"):
        file_checks._check_storages({"0": size - 8, "1": 9}, {"0", "1"}, path)


@pytest.mark.parametrize(
    "entry",
    [None, 7, (), ("storage", None, "0", "cpu"), ("storage", None, 0, "cpu", 4), ("storage", None, "0", "cpu", -1)],
)
def test_an_entry_of_a_storage_that_torch_does_not_write_is_refused(entry):
    with pytest.raises(ValueError, match=r"that torch does not write|have two sizes"):
        check_pickle(io.BytesIO(pickle.dumps(entry, protocol=2)[:-1] + b"Q."))


def test_parts_that_lie_over_each_other_are_not_read_again_and_again(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"model": {"a": torch.zeros(10_000)}}, path)
    with zipfile.ZipFile(path, "a") as archive:  # the table of contents names the largest part 1,000 times more
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        archive.filelist += [largest] * 1000
        archive._didModify = True
    with pytest.raises(ConversionError, match="claims to hold more bytes than it has"):
        load_checkpoint(path)


def test_a_second_pickle_is_refused(tmp_path):
    _write_archive(tmp_path / "a.pth", _claiming(4), parts=2)
    with pytest.raises(ConversionError, match=r"2 parts data\.pkl"):
        load_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize("writer", ["torch", "python"])
def test_a_long_table_of_contents_is_refused_before_it_is_read(writer, tmp_path, monkeypatch):
    path = tmp_path / "a.pth"
    if writer == "torch":
        torch.save({"model": {f"a.{number}": torch.zeros(1) for number in range(5)}}, path)
    else:
        _write_archive(path, _claiming(4, is_archive=True))
    size = file_checks._directory_size(path)
    with zipfile.ZipFile(path) as archive:
        assert size == sum(46 + len(part.orig_filename) + len(part.extra) for part in archive.infolist())
    monkeypatch.setattr(file_checks, "_MAX_DIRECTORY", size)
    assert load_checkpoint(path).tensors
    monkeypatch.setattr(file_checks, "_MAX_DIRECTORY", size - 1)
    monkeypatch.setattr(zipfile, "ZipFile", lambda _: pytest.fail("the table was read"))
    with pytest.raises(ConversionError, match=f"table of contents of {size} bytes"):
        load_checkpoint(path)


def test_a_long_header_of_safetensors_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({f"a.{number}": torch.zeros(2) for number in range(5)}, path)
    size = int.from_bytes(path.read_bytes()[:8], "little")
    monkeypatch.setattr(file_checks, "_MAX_DIRECTORY", size)
    assert len(load_checkpoint(path).tensors) == 5
    monkeypatch.setattr(file_checks, "_MAX_DIRECTORY", size - 1)
    with pytest.raises(ConversionError, match=f"header of {size} bytes"):
        load_checkpoint(path)
