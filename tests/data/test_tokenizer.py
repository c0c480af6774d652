import pickle
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordPiece

from albef_ds.data.tokenizer import SPECIAL_TOKENS, TokenizerError, load_tokenizer, train_wordpiece

WORDS = [*SPECIAL_TOKENS, "a", "dog", "##s", "run", "##ning", "狗", "!", "cafe"]


@pytest.fixture
def vocab(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return path


def ids(*words):
    return [WORDS.index(word) for word in words]


def test_texts_end_without_sep_unless_asked(vocab):
    assert load_tokenizer(vocab).encode(["a dog"], 25) == [ids("[CLS]", "a", "dog")]
    assert load_tokenizer(vocab, sep_token=True).encode(["a dog"], 25) == [ids("[CLS]", "a", "dog", "[SEP]")]


def test_pieces_accents_unknown_words_and_cjk(vocab):
    tokenizer = load_tokenizer(vocab)
    [got] = tokenizer.encode(["Dogs RUNNING! xyz café狗a"], 25)
    assert got == ids("[CLS]", "dog", "##s", "run", "##ning", "!", "[UNK]", "cafe", "狗", "a")
    assert tokenizer.decode(got) == "dogs running! cafe 狗 a"
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id) == (
        0,
        1,
        2,
        3,
        4,
    )
    assert tokenizer.vocab_size == len(WORDS)


def test_truncation_counts_special_tokens(vocab):
    assert load_tokenizer(vocab).encode(["a " * 10_000], 4) == [ids("[CLS]", "a", "a", "a")]
    assert load_tokenizer(vocab, sep_token=True).encode(["a " * 99], 4) == [ids("[CLS]", "a", "a", "[SEP]")]
    assert load_tokenizer(vocab).encode(["a"], 1) == [ids("[CLS]")]
    with pytest.raises(ValueError, match="max_tokens is 1: expected at least 2"):
        load_tokenizer(vocab, sep_token=True).encode(["a"], 1)


@pytest.mark.parametrize("text", ["", "\x00", "   ", "🐕\x00dog", "dog \ud83d", "\udcff" * 3, "a" * 10_000])
def test_odd_texts(vocab, text):
    [got] = load_tokenizer(vocab).encode([text], 25)
    assert got[0] == 2 and len(got) <= 25
    assert (ids("dog")[0] in got) == ("dog" in text and "🐕" not in text)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(), max_size=4), st.integers(1, 30))
def test_any_text_has_ids_of_the_vocabulary(tokenizer, texts, max_tokens):
    encoded = tokenizer.encode(texts, max_tokens)
    assert len(encoded) == len(texts)
    for tokens in encoded:
        assert 1 <= len(tokens) <= max_tokens and all(0 <= t < tokenizer.vocab_size for t in tokens)


def test_folders_and_both_kinds_of_file(tmp_path, vocab):
    assert load_tokenizer(str(tmp_path)).encode(["a"], 5) == [ids("[CLS]", "a")]
    saved = load_tokenizer(vocab).tokenizer
    saved.enable_padding(length=9)
    saved.enable_truncation(2)
    (tmp_path / "sub").mkdir()
    saved.save(str(tmp_path / "sub" / "tokenizer.json"))
    for source in (tmp_path / "sub", tmp_path / "sub" / "tokenizer.json"):
        assert load_tokenizer(source).encode(["a dog runs"], 25) == [ids("[CLS]", "a", "dog", "run", "##s")]


def test_pickles(vocab):
    tokenizer = pickle.loads(pickle.dumps(load_tokenizer(vocab, sep_token=True)))
    assert tokenizer.encode(["a"], 5) == [ids("[CLS]", "a", "[SEP]")]


def test_what_is_no_bert_vocabulary(tmp_path):
    def refused(source, message):
        with pytest.raises(TokenizerError, match=message):
            load_tokenizer(source)

    refused(tmp_path / "none.txt", "none.txt does not exist")
    refused("./nowhere", "nowhere does not exist")
    refused(tmp_path, "neither tokenizer.json nor vocab.txt")
    words = tmp_path / "words.txt"
    words.write_text("a\nb\n")
    refused(words, r"no BERT vocabulary: it has no \[UNK\]")
    words.write_text("[UNK]\n[CLS]\n[PAD]\na\n")
    refused(words, r"without \[SEP\] \[MASK\]")
    words.write_bytes(b"\xff\xfe\x00")
    refused(words, "not UTF-8")
    (tmp_path / "tokenizer.json").write_text("{}")
    refused(tmp_path, "cannot be read as a tokenizer")
    Tokenizer(BPE()).save(str(tmp_path / "tokenizer.json"))
    refused(tmp_path, "found BPE")
    Tokenizer(WordPiece({"[UNK]": 0}, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    refused(tmp_path, r"found WordPiece without \[PAD\]")


def test_an_unknown_name_says_that_hub_and_folder_were_tried(monkeypatch):
    def offline(name):
        raise OSError("no network\nlong trace")

    monkeypatch.setattr("albef_ds.data.tokenizer.Tokenizer", type("T", (), {"from_pretrained": offline}))
    with pytest.raises(TokenizerError, match=r"called 'bert-nowhere': there is no such folder here.*no network\);"):
        load_tokenizer("bert-nowhere")


CAPTIONS = ["a red dog runs", "a red dog running", "the runner's red dog", "aaa aaaa aaaaa", "dog \ud83d"]


def test_training_makes_common_words_whole(tmp_path):
    path = train_wordpiece(CAPTIONS * 3, 60, tmp_path / "v.txt")
    words = path.read_text().splitlines()
    assert words[:5] == list(SPECIAL_TOKENS) and len(words) == len(set(words)) <= 60
    assert {"dog", "red", "run"} <= set(words)
    tokenizer = load_tokenizer(path)
    assert all(tokenizer.unk_id not in tokens for tokens in tokenizer.encode(CAPTIONS, 25))
    assert tokenizer.decode(tokenizer.encode(["a red dog runs"], 25)[0]) == "a red dog runs"


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text(alphabet="abc ", max_size=12), max_size=8), st.integers(6, 40))
def test_training_any_captions_keeps_to_the_size(tmp_path_factory, captions, size):
    words = train_wordpiece(captions, size, tmp_path_factory.getbasetemp() / "any.txt").read_text().splitlines()
    assert words[:5] == list(SPECIAL_TOKENS) and len(words) == len(set(words)) <= size


@pytest.mark.parametrize("size", [9, 40])  # 9: not all characters fit
def test_training_is_the_same_in_any_order_and_process(tmp_path, size):
    expected = train_wordpiece(CAPTIONS, size, tmp_path / "a.txt").read_bytes()
    assert train_wordpiece(reversed(CAPTIONS), size, tmp_path / "b.txt").read_bytes() == expected
    code = (
        "import sys; from albef_ds.data.tokenizer import train_wordpiece\n"
        f"train_wordpiece({CAPTIONS!r}, {size}, sys.argv[1])"
    )
    for seed in ("1", "2"):
        file = tmp_path / f"{seed}.txt"
        subprocess.run([sys.executable, "-c", code, str(file)], check=True, env={"PYTHONHASHSEED": seed})
        assert file.read_bytes() == expected


def test_training_needs_room(tmp_path):
    with pytest.raises(ValueError, match="vocab_size is 5"):
        train_wordpiece(["a"], 5, tmp_path / "v.txt")
