import json
import pickle

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from albef_ds.data.annotations import Annotation, AnnotationError, read_pairs


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_reads_texts_and_lists_and_resolves_paths(tmp_path):
    file = write(
        tmp_path / "a.json",
        [{"image": "x/1.jpg", "caption": "one"}, {"image": "/abs/2.jpg", "caption": ["two", "zwei"], "image_id": 7}],
    )
    pairs = read_pairs(file)
    assert list(pairs) == [
        Annotation(str(tmp_path / "x/1.jpg"), ("one",), "x/1.jpg"),
        Annotation("/abs/2.jpg", ("two", "zwei"), "/abs/2.jpg"),
    ]
    assert read_pairs(file, image_root="/images")[0].image == "/images/x/1.jpg"
    assert pairs[-1].key == "/abs/2.jpg" and pairs[0:1][0].key == "x/1.jpg"
    with pytest.raises(IndexError):
        pairs[2]


def test_files_follow_each_other_each_with_its_folder(tmp_path):
    files = []
    for name, count in (("a", 2), ("b", 1), ("c", 3)):
        (tmp_path / name).mkdir()
        entries = [{"image": f"{i}.jpg", "caption": name} for i in range(count)]
        files.append(write(tmp_path / name / "pairs.json", entries))
    images = [pair.image for pair in read_pairs(files)]
    assert images == [
        f"{tmp_path}/{n}/{i}.jpg" for n, i in (("a", 0), ("a", 1), ("b", 0), ("c", 0), ("c", 1), ("c", 2))
    ]


def test_unusable_entries_are_left_out_and_reported(tmp_path):
    file = write(
        tmp_path / "a.json",
        [
            {"image": "good.jpg", "caption": ["", "  ", 5, "text"]},
            {"caption": "no image"},
            {"image": 3, "caption": "x"},
            {"image": "none.jpg"},
            {"image": "empty.jpg", "caption": " "},
            {"image": "list.jpg", "caption": []},
            {"image": "dict.jpg", "caption": {}},
            "text",
        ],
    )
    pairs = read_pairs(file)
    assert list(pairs) == [Annotation(str(tmp_path / "good.jpg"), ("text",), "good.jpg")]
    assert [key for key, _ in pairs.rejected] == [
        *("a.json#1", "a.json#2", "none.jpg", "empty.jpg", "list.jpg", "dict.jpg", "a.json#7"),
    ]
    assert pairs.rejected[0][1] == f'{file}, entry 1: "image" is missing'
    assert "an object without any text" in dict(pairs.rejected)["dict.jpg"]


@pytest.mark.parametrize(
    "content, message",
    [
        ('[{"image": "a.jpg",\n "caption": }]', r"not valid JSON: .* at line 2, column 13"),
        ('{"image": "a"}\n{"image": "b"}', "line 2, column 1; JSON Lines are not read"),
        ("", "not valid JSON"),
        ({"image": "a.jpg", "caption": "x"}, "holds an object at its top level: expected a list"),
        ([], "no usable entry .* the list is empty"),
        ([{"image": "a.jpg", "caption": ""}], "no usable entry .* entry 0: .*without any text"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_files_that_are_no_annotations(tmp_path, content, message):
    file = write(tmp_path / "bad.json", content)
    with pytest.raises(AnnotationError, match=message) as error:
        read_pairs(file)
    assert str(file) in str(error.value)


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(AnnotationError, match="nowhere.json cannot be read: No such file"):
        read_pairs(tmp_path / "nowhere.json")
    (tmp_path / "image.json").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(AnnotationError, match="not UTF-8 text"):
        read_pairs(tmp_path / "image.json")
    with pytest.raises(AnnotationError, match="no annotation file given"):
        read_pairs([])


any_text = st.text(alphabet=st.characters(codec=None, exclude_categories=())).filter(str.strip)  # with half surrogates


@settings(deadline=None, max_examples=60)
@example([("half\ud83d.jpg", ["\udc15 dog", "nul\x00"])])
@given(st.lists(st.tuples(any_text, st.lists(any_text, min_size=1, max_size=3)), min_size=1, max_size=8))
def test_any_text_survives_storing_and_pickling(tmp_path_factory, entries):
    file = tmp_path_factory.mktemp("any") / "a.json"
    write(file, [{"image": image, "caption": captions} for image, captions in entries])
    pairs = pickle.loads(pickle.dumps(read_pairs(file, image_root="/r")))
    assert [[pair.key, list(pair.captions)] for pair in pairs] == json.loads(json.dumps(entries))  # joins two halves


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["image", "caption", "x"]), inner),
    max_leaves=8,
)


@settings(deadline=None, max_examples=150)
@given(json_values)
def test_any_json_is_read_or_refused_with_the_file_named(tmp_path_factory, value):
    file = write(tmp_path_factory.getbasetemp() / "any.json", value)
    try:
        pairs = read_pairs(file)
    except AnnotationError as error:
        assert str(file) in str(error)
    else:
        assert len(pairs) + len(pairs.rejected) == len(value)


def test_takes_little_memory(tmp_path):
    entries = [{"image": f"folder/{i:08d}.jpg", "caption": "a small red circle"} for i in range(2000)]
    pairs = read_pairs(write(tmp_path / "a.json", entries))
    size = sum(a.nbytes for a in (pairs.buffer, pairs.string_ends, pairs.entry_ends))
    assert size < 80 * len(pairs)
