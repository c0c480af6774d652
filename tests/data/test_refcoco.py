import collections
import json
import os
import pickle

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from albef_ds.data.annotations import AnnotationError
from albef_ds.data.refcoco import RefcocoCounts, Referred, convert_refcoco, read_refcoco


def python2_pickle(value) -> bytes:
    """Protocol 0 as Python 2 wrote it: texts are byte strings without an encoding, long numbers end in L."""
    if isinstance(value, list):
        return b"(l" + b"".join(python2_pickle(v) + b"a" for v in value)
    if isinstance(value, dict):
        return b"(d" + b"".join(python2_pickle(k) + python2_pickle(v) + b"s" for k, v in value.items())
    if isinstance(value, bytes):
        return b"S" + repr(value)[1:].encode() + b"\n"
    if isinstance(value, str):
        return python2_pickle(value.encode())
    return b"L%dL\n" % value if value > 2**31 else b"I%d\n" % value


def reference(ref_id, ann_id, image_id, split, *sentences):
    sents = [{"sent_id": i, "sent": s, "raw": s, "tokens": [s]} for i, s in enumerate(sentences)]
    file_name = f"COCO_train2014_{image_id:012d}_{ann_id}.jpg"  # has the annotation in its name: no image is called so
    ids = {"ref_id": ref_id, "ann_id": ann_id, "image_id": image_id, "category_id": 1, "sent_ids": [0]}
    return ids | {"file_name": file_name, "split": split, "sentences": sents}


REFS = [
    reference(10, 100, 7, "train", "left man", "man in blue"),
    reference(11, 101, 8, "val", "the café sign", " "),
    reference(12, 102, 8, "testA", "cat"),
    reference(13, 103, 7, "testA", ""),
    reference(2**40, 100, 7, "testB", "dog", "brown dog"),
]
INSTANCES = {
    "images": [
        {"id": 7, "file_name": "COCO_train2014_000000000007.jpg", "width": 640, "height": 480},
        {"id": 8, "file_name": "COCO_train2014_000000000008.jpg", "width": 50, "height": 60},
    ],
    "annotations": [{"id": 100 + i, "image_id": 7, "bbox": [i, 2.5, 30, 40.25]} for i in range(4)],
    "categories": [],
}
DETECTIONS = {"8": [[1, 2, 3, 4, 0.9], [5, 6, 7, 8.5, 0.1]]}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "refcoco+"
    folder.mkdir()
    (folder / "refs(unc).p").write_bytes(python2_pickle(REFS) + b".")
    (folder / "instances.json").write_text(json.dumps(INSTANCES))
    (folder / "dets.json").write_text(json.dumps(DETECTIONS))
    return folder


def test_reads_a_python_2_pickle(folder):
    found = read_refcoco(folder, detections=folder / "dets.json")
    assert [(r.ref_id, r.split, r.sentences) for r in found] == [
        (10, "train", ("left man", "man in blue")),
        (11, "val", ("the café sign",)),
        (12, "testA", ("cat",)),
        (2**40, "testB", ("dog", "brown dog")),
    ]
    assert found[2] == Referred(
        ref_id=12,
        image="train2014/COCO_train2014_000000000008.jpg",
        sentences=("cat",),
        box=(2, 2.5, 30, 40.25),
        width=50,
        height=60,
        split="testA",
        proposals=((1, 2, 3, 4), (5, 6, 7, 8.5)),
    )
    assert found[0].proposals == ()  # that image has none


def test_texts_in_latin1_are_read_too(folder):
    (folder / "refs(unc).p").write_bytes(python2_pickle([reference(1, 100, 7, "val", "café".encode("latin1"))]) + b".")
    assert read_refcoco(folder)[0].sentences == ("café",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_reads_every_protocol(folder, protocol):
    expected = read_refcoco(folder)
    (folder / "refs(unc).p").write_bytes(pickle.dumps(REFS, protocol))
    assert read_refcoco(folder) == expected


def test_converts_to_one_entry_a_sentence(folder, tmp_path):
    out = tmp_path / "new" / "out"
    counts = convert_refcoco(folder, out, detections=folder / "dets.json", image_template="{image_id:06d}.jpg")
    files = {"refcoco+_train.json": 2, "refcoco+_val.json": 1, "refcoco+_testA.json": 1, "refcoco+_testB.json": 2}
    assert counts == RefcocoCounts(entries=files, blank=2, without_proposals=2)
    assert sorted(path.name for path in out.iterdir()) == sorted(files)
    assert json.loads((out / "refcoco+_train.json").read_text()) == [
        {"image": "000007.jpg", "text": "left man", "ref_id": 10},
        {"image": "000007.jpg", "text": "man in blue", "ref_id": 10},
    ]
    assert json.loads((out / "refcoco+_val.json").read_text()) == [
        {
            "image": "000008.jpg",
            "text": "the café sign",
            "ref_id": 11,
            "box": [1, 2.5, 30, 40.25],
            "width": 50,
            "height": 60,
            "split": "val",
            "proposals": [[1, 2, 3, 4], [5, 6, 7, 8.5]],
        }
    ]
    assert convert_refcoco(folder, out, name="plus").entries["plus_testB.json"] == 2
    assert json.loads((out / "plus_testB.json").read_text())[0]["proposals"] == []


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_malicious_pickle_runs_nothing(folder, tmp_path, protocol):
    trace = tmp_path / "trace"
    evil = pickle.dumps([*REFS, Malicious(trace)], protocol)
    pickle.loads(evil)  # it does work where pickles are trusted
    trace.rmdir()
    (folder / "refs(unc).p").write_bytes(evil)
    with pytest.raises(AnnotationError, match=r"refs\(unc\)\.p asks for .*\.mkdir: .*Nothing of it was run"):
        read_refcoco(folder)
    assert not trace.exists()


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps([collections.OrderedDict()]),  # harmless, but where would the line be?
        b"(S'x'\nios\nmkdir\n.",  # INST
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R.",
    ],
)
def test_no_class_or_function_at_all(folder, content):
    (folder / "refs(unc).p").write_bytes(content)
    with pytest.raises(AnnotationError, match="asks for "):
        read_refcoco(folder)


@pytest.mark.parametrize("content", [b"", b"Pid\n.", b"\x80\x02\x82\x01.", b"]}b.", b"not a pickle", b"N.", b"]."])
def test_what_is_no_list_of_references(folder, content):
    (folder / "refs(unc).p").write_bytes(content)
    with pytest.raises(AnnotationError, match=r"refs\(unc\)\.p (is no readable pickle|holds \w+: expected a list)"):
        read_refcoco(folder)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200)
@given(st.data())
def test_a_damaged_pickle_is_an_error_or_is_read(folder, data):
    content = bytearray(python2_pickle(REFS) + b".")
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[at] = data.draw(st.integers(0, 255))
    (folder / "refs(unc).p").write_bytes(content)
    try:
        read_refcoco(folder)
    except AnnotationError as error:
        assert "refs(unc).p" in str(error)


def changed(**fields):
    return [REFS[0] | fields]


@pytest.mark.parametrize(
    "refs, message",
    [
        (changed(ann_id=999), "reference 0: instances.json has no annotation 999 or no image 7"),
        (changed(image_id=999), "no annotation 100 or no image 999"),
        (changed(ref_id="10"), "\"ref_id\" is '10', expected int"),
        (changed(sentences=[{"raw": "x"}]), 'reference 0, a sentence: "sent" is None, expected str'),
        (changed(split="../../etc/x"), "its split is '../../etc/x'"),
        ([REFS[0], REFS[0]], "reference 1: ref_id 10 is there twice"),
        ([3], '"ref_id" is None'),
    ],
)
def test_references_that_do_not_fit(folder, tmp_path, refs, message):
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs))
    with pytest.raises(AnnotationError, match=message):
        convert_refcoco(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("instances.json", "[", "instances.json is not valid JSON"),
        ("instances.json", "[]", 'instances.json: "images" is None, expected list'),
        ("instances.json", json.dumps(INSTANCES | {"annotations": [{"id": 1, "bbox": [1, 2, 3]}]}), r"box \[1, 2, 3\]"),
        ("instances.json", json.dumps(INSTANCES | {"images": [{"id": 7, "width": 1.5}]}), '"width" is 1.5'),
        ("dets.json", "[]", "dets.json: .*expected"),
        ("dets.json", '{"x": []}', "dets.json: .*expected"),
        ("dets.json", '{"7": [3]}', "dets.json, image 7: box 3"),
        ("dets.json", '{"7": [[1, 2, NaN, 4]]}', "dets.json, image 7: box"),
    ],
)
def test_other_files_that_are_damaged(folder, file, content, message):
    (folder / file).write_text(content)
    with pytest.raises(AnnotationError, match=message):
        read_refcoco(folder, detections=folder / "dets.json")


def test_missing_files_and_bad_templates(folder):
    with pytest.raises(AnnotationError, match=r"refs\(umd\)\.p is missing; the folder has refs\(unc\)\.p: choose"):
        read_refcoco(folder, split_by="umd")
    with pytest.raises(AnnotationError, match=r"image template '\{name\}\.jpg': KeyError"):
        read_refcoco(folder, image_template="{name}.jpg")
    with pytest.raises(AnnotationError, match="none.json cannot be read"):
        read_refcoco(folder, detections=folder / "none.json")
    (folder / "instances.json").unlink()
    with pytest.raises(AnnotationError, match="instances.json cannot be read"):
        read_refcoco(folder)
