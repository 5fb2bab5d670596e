"""Files from anywhere: what is read, what is refused, and that nothing in them ever runs."""

import argparse
import collections
import contextlib
import os
import pickle
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dino_hf.conversion.checkpoint_files import load_checkpoint, save_checkpoint
from dino_hf.conversion.errors import ConversionError
from dino_hf.conversion.saved_settings import read_config_text
from toy_checkpoints import original_tensors, settings

TENSORS = {"transformer.level_embed": torch.arange(6.0).reshape(2, 3), "label_enc.weight": torch.ones(4, 3)}


class ByReduce:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


class ByState:
    """Harm is done when the state is set, not when the object is made."""

    def __init__(self, marker):
        self.marker = marker

    def __setstate__(self, state):
        os.system(f"touch {state['marker']}")


class ByReducedState:
    """A harmless class, built by the pickle's own instructions, whose state setter is harmful."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return collections.OrderedDict, (), None, None, iter([("key", ByReduce(self.marker))])


class ByEval:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return eval, (f"__import__('os').system('touch {self.marker}')",)


class ByGetattr:
    """Looks like what mmengine's log leaves: a call of getattr; and then calls what it gets."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return called, (ByAttribute(), self.marker)


class Harm:
    @staticmethod
    def run(marker):
        os.system(f"touch {marker}")


class ByAttribute:
    def __reduce__(self):
        return getattr, (Harm, "run")


def called(function, marker):
    return function(marker)


def placed(evil, where):
    content = {"model": dict(TENSORS), "args": argparse.Namespace(nheads=8), "meta": {}, "optimizer": {}}
    if where == "whole":
        return evil
    if where == "nested":
        content["optimizer"] = {"state": [{"deep": ({"er": evil},)}]}
    elif where == "args":
        content["args"].extra = evil
    elif where == "meta":
        content["meta"]["hook"] = evil
    elif where == "tensors":
        content["model"]["label_enc.weight"] = evil
    return content


@pytest.mark.parametrize("where", ["whole", "nested", "args", "meta", "tensors"])
@pytest.mark.parametrize("kind", [ByReduce, ByState, ByReducedState, ByEval, ByGetattr])
@pytest.mark.parametrize("new_format", [True, False])
def test_a_malicious_pickle_is_refused_and_runs_nothing(kind, where, new_format, tmp_path):
    marker = tmp_path / "ran"
    torch.save(placed(kind(marker), where), tmp_path / "evil.pth", _use_new_zipfile_serialization=new_format)
    with pytest.raises(ConversionError, match="nothing in it was run"):
        load_checkpoint(tmp_path / "evil.pth")
    assert not marker.exists()
    torch.load(tmp_path / "evil.pth", weights_only=False)  # the test is not blind: read carelessly, it does its harm
    assert marker.exists()


def test_a_bare_pickle_is_refused_and_runs_nothing(tmp_path):
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps({"model": ByReduce(tmp_path / "ran")}))
    with pytest.raises(ConversionError, match=r"was refused|damaged"):
        load_checkpoint(tmp_path / "evil.pkl")
    assert not (tmp_path / "ran").exists()


def test_names_in_an_archive_do_not_lead_out_of_it(tmp_path):
    torch.save({"model": TENSORS}, tmp_path / "good.pth")
    with zipfile.ZipFile(tmp_path / "good.pth") as good, zipfile.ZipFile(tmp_path / "evil.pth", "w") as evil:
        for entry in good.namelist():
            evil.writestr(entry, good.read(entry))
        evil.writestr("../../escaped", "out")
        evil.writestr(str(tmp_path / "absolute"), "out")
    with contextlib.suppress(ConversionError):  # either is fine, as long as nothing is written
        load_checkpoint(tmp_path / "evil.pth")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.pth", "good.pth"]


def test_what_a_training_of_mmdetection_leaves_is_skipped(tmp_path, monkeypatch):
    """Its log is an object of mmengine with NumPy arrays and names of methods."""
    module = types.ModuleType("mmengine.logging.history_buffer")

    class HistoryBuffer:
        def __init__(self):
            self.history = np.arange(5.0)
            self.last = np.float64(3.5)
            self.methods = {"max": HistoryBuffer.smallest}

        @classmethod
        def smallest(cls):
            return 0

    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = module.__name__, "HistoryBuffer"
    module.HistoryBuffer = HistoryBuffer
    for name in ("mmengine", "mmengine.logging", module.__name__):
        monkeypatch.setitem(sys.modules, name, module if name == module.__name__ else types.ModuleType(name))
    content = {
        "state_dict": TENSORS,
        "message_hub": {"log": HistoryBuffer(), "scalars": [np.int64(3), np.zeros((2, 3), np.float32)]},
        "meta": {"seed": 5, "cfg": "model = dict(type='DINO')", "dataset_meta": {"classes": ("cat", "dog")}},
    }
    torch.save(content, tmp_path / "epoch_12.pth")
    for name in ("mmengine", "mmengine.logging", module.__name__):
        monkeypatch.delitem(sys.modules, name)
    loaded = load_checkpoint(tmp_path / "epoch_12.pth")
    assert {name: tensor.tolist() for name, tensor in loaded.tensors.items()} == {
        name: tensor.tolist() for name, tensor in TENSORS.items()
    }
    assert loaded.settings == {"model": {"type": "DINO"}}
    assert loaded.class_names == ["cat", "dog"]


def test_names_and_settings_of_mmdetection_2(tmp_path):
    meta = {"CLASSES": ("cat",), "config": "model = dict(num_queries=7)\n"}
    torch.save({"state_dict": TENSORS, "meta": meta}, tmp_path / "latest.pth")
    loaded = load_checkpoint(tmp_path / "latest.pth")
    assert (loaded.settings, loaded.class_names) == ({"model": {"num_queries": 7}}, ["cat"])


@pytest.mark.parametrize(
    "meta", [None, 5, {"dataset_meta": 3, "cfg": 7}, {"dataset_meta": {"classes": [1, 2]}, "cfg": "}"}]
)
def test_a_meta_of_another_form_is_left_aside(meta, tmp_path):
    torch.save({"state_dict": TENSORS, "meta": meta}, tmp_path / "a.pth")
    loaded = load_checkpoint(tmp_path / "a.pth")
    assert (loaded.settings, loaded.class_names) == ({}, None)


@pytest.mark.parametrize("container", ["model", "state_dict", None])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_containers_and_the_prefix_of_distributed_training(container, prefix, tmp_path):
    tensors = {prefix + name: tensor for name, tensor in TENSORS.items()}
    torch.save({container: tensors, "epoch": 3} if container else tensors, tmp_path / "a.pth")
    assert load_checkpoint(tmp_path / "a.pth").tensors.keys() == TENSORS.keys()


@pytest.mark.parametrize("part", ["ema_model", "ema_state"])
def test_averaged_weights_are_taken_on_request(part, tmp_path):
    averaged = {f"module.{name}": tensor + 1 for name, tensor in TENSORS.items()}
    torch.save({"model": TENSORS, part: averaged}, tmp_path / "a.pth")
    assert load_checkpoint(tmp_path / "a.pth", ema=True).tensors["label_enc.weight"].tolist() == [[2.0] * 3] * 4
    torch.save({"model": TENSORS}, tmp_path / "b.pth")
    with pytest.raises(ConversionError, match=r"has no 'ema_model' or 'ema_state' \(its parts: \['model'\]\)"):
        load_checkpoint(tmp_path / "b.pth", ema=True)
    torch.save({"state_dict": TENSORS, "ema_state_dict": averaged}, tmp_path / "c.pth")
    with pytest.raises(ConversionError, match="saves the averaged weights as 'state_dict'"):
        load_checkpoint(tmp_path / "c.pth", ema=True)


def test_safetensors(tmp_path):
    save_file({f"module.{name}": tensor for name, tensor in TENSORS.items()}, tmp_path / "a.safetensors")
    assert load_checkpoint(tmp_path / "a.safetensors").tensors.keys() == TENSORS.keys()
    whole = (tmp_path / "a.safetensors").read_bytes()
    for broken in (b"", b"{}", whole[:20], whole[:-5]):
        (tmp_path / "b.safetensors").write_bytes(broken)
        with pytest.raises(ConversionError, match=r"b\.safetensors is truncated or damaged"):
            load_checkpoint(tmp_path / "b.safetensors")


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ConversionError, match="is a folder; name the checkpoint file in it"):
        load_checkpoint(tmp_path)


@pytest.mark.filterwarnings("ignore:.*[sS]parse")  # torch warns of checking, or of not checking, them
def test_sparse_tensors_are_refused(tmp_path):
    torch.save({"model": TENSORS | {"label_enc.weight": torch.eye(3).to_sparse()}}, tmp_path / "a.pth")
    with pytest.raises(ConversionError, match="sparse, quantized or empty"):
        load_checkpoint(tmp_path / "a.pth")


def test_configuration_text_is_read_and_never_run(tmp_path):
    marker = tmp_path / "ran"
    text = f"""
_base_ = ['a.py']
model = dict(type='DINO', n=-0.5, deep=dict(x=[1, (2, 3)], y={{'z': None, 'w': True}}), called=open({str(marker)!r}, 'w'))
__import__('os').system('touch {marker}')
train = [dict(scale=(1333, 800)), some_name, *others]
a = b = 3
a.b = 4
x, y = 5, 6
"""
    read = read_config_text(text)
    assert not marker.exists()
    assert read["model"] == {
        "type": "DINO",
        "n": -0.5,
        "deep": {"x": [1, [2, 3]], "y": {"z": None, "w": True}},
        "called": None,
    }
    assert read["train"] == [{"scale": [1333, 800]}, None, None]
    assert read["a"] == 3


@pytest.mark.parametrize(
    "text", [None, 3, "", "model = (", "model = dict(**x)", "(" * 5000, "model = " + "[" * 150 + "]" * 150]
)
def test_configuration_text_of_any_kind_does_no_harm(text):
    assert read_config_text(text) in ({}, {"model": {}}) or isinstance(read_config_text(text)["model"], list)


def test_a_file_is_written_wholly_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "back.pth"
    save_checkpoint({"model": TENSORS}, path)
    assert load_checkpoint(path).tensors.keys() == TENSORS.keys()
    before = path.read_bytes()
    with pytest.raises(ConversionError, match="exists; choose another output, or --force"):
        save_checkpoint({"model": {}}, path)

    def fails(content, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(ConversionError, match=r"cannot be written \(disk full\)"):
        save_checkpoint({"model": {}}, path, force=True)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == ["back.pth"]


def test_a_link_is_not_written_through(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "link.pth").symlink_to(tmp_path / "mine")
    with pytest.raises(ConversionError, match="exists"):
        save_checkpoint({"model": TENSORS}, tmp_path / "link.pth", force=True)
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.int64])
def test_weights_of_other_types_are_refused(dtype, tmp_path):
    torch.save({"model": TENSORS | {"label_enc.weight": torch.ones(4, 3).to(dtype)}}, tmp_path / "a.pth")
    with pytest.raises(ConversionError, match="where weights are floating-point numbers"):
        load_checkpoint(tmp_path / "a.pth")


def test_a_tensor_that_claims_more_than_the_file_has_is_refused(tmp_path):
    torch.save({"model": TENSORS | {"label_enc.weight": torch.zeros(1).expand(10**13)}}, tmp_path / "a.pth")
    with pytest.raises(ConversionError, match="claims 10000000000000 numbers, but the file has fewer"):
        load_checkpoint(tmp_path / "a.pth")
    torch.save({"model": TENSORS | {"label_enc.weight": torch.empty(4, 3, device="meta")}}, tmp_path / "b.pth")
    with pytest.raises(ConversionError, match=r"empty \(meta\) tensor|was refused"):
        load_checkpoint(tmp_path / "b.pth")


def test_damage_inside_of_tensors_is_found(tmp_path):
    torch.save({"model": {"transformer.level_embed": torch.zeros(300, 400)}}, tmp_path / "a.pth")
    content = bytearray((tmp_path / "a.pth").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4] = torch.ones(1).numpy().tobytes()  # a number, as good as any other
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(ConversionError, match=r"damaged \(the checksum of .*data/0 is wrong\)"):
        load_checkpoint(tmp_path / "a.pth")


def test_compressed_archives_are_refused(tmp_path):
    torch.save({"model": TENSORS}, tmp_path / "good.pth")
    with zipfile.ZipFile(tmp_path / "good.pth") as good, zipfile.ZipFile(tmp_path / "bomb.pth", "w") as bomb:
        for entry in good.namelist():
            bomb.writestr(entry, good.read(entry), compress_type=zipfile.ZIP_DEFLATED)
    with pytest.raises(ConversionError, match="compressed parts, which torch never writes"):
        load_checkpoint(tmp_path / "bomb.pth")


def test_a_dictionary_with_methods_of_its_own_is_read_as_a_dictionary(tmp_path):
    evil = collections.OrderedDict(TENSORS)
    evil.get = 5
    outer = collections.OrderedDict(state_dict=evil, meta=collections.OrderedDict(dataset_meta=evil))
    outer.get = 5
    torch.save(outer, tmp_path / "a.pth")
    assert load_checkpoint(tmp_path / "a.pth").tensors.keys() == TENSORS.keys()


def test_a_file_is_what_it_holds_whatever_its_name_says(tmp_path):
    save_file(TENSORS, tmp_path / "a.pth")
    torch.save({"model": TENSORS}, tmp_path / "b.safetensors")
    for name in ("a.pth", "b.safetensors"):
        assert load_checkpoint(tmp_path / name).tensors.keys() == TENSORS.keys()
    with pytest.raises(ConversionError, match=r"name it \.pth"):
        save_checkpoint({"model": TENSORS}, tmp_path / "c.safetensors")


def test_the_toy_file_of_the_other_tests_is_read(tmp_path):
    torch.save({"model": original_tensors(), "args": settings()}, tmp_path / "a.pth")
    loaded = load_checkpoint(tmp_path / "a.pth")
    assert loaded.settings["nheads"] == 4
    assert loaded.class_names is None
