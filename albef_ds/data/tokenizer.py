"""Captions to WordPiece ids and back, with the reference's habit of ending a text without [SEP]."""

from __future__ import annotations

import heapq
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import WordPiece as WordPieceDecoder
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class TokenizerError(ValueError):
    """A vocabulary that is missing or is not one of BERT's kind."""


@dataclass(frozen=True)
class CaptionTokenizer:
    """A BERT tokenizer; made by `load_tokenizer`. Pickles, so that loader workers can have it."""

    tokenizer: Tokenizer
    pad_id: int
    unk_id: int
    cls_id: int
    sep_id: int
    mask_id: int
    vocab_size: int  # rows an embedding needs: the largest id + 1
    sep_token: bool  # whether encode() ends texts with [SEP]

    def encode(self, captions: Sequence[str], max_tokens: int) -> list[list[int]]:
        """Ids of each caption: `[CLS] X`, or `[CLS] X [SEP]` with `sep_token`, at most `max_tokens` in all.

        Without [SEP] by default because the reference's tokenizer puts none (models/tokenization_bert.py). A special
        token written out in a caption (`[MASK]`) is that token, also as there; cleaned captions hold none.
        Raises ValueError where `max_tokens` leaves no room for the special tokens.
        """
        room = max_tokens - 1 - self.sep_token
        if room < 0:
            raise ValueError(f"max_tokens is {max_tokens}: expected at least {1 + self.sep_token}, the special tokens")
        end = [self.sep_id] if self.sep_token else []
        # One at a time: encode_batch starts threads, which do not survive the fork of loader workers.
        return [[self.cls_id, *self._ids(caption)[:room], *end] for caption in captions]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, word pieces joined, without special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def _ids(self, caption: str) -> list[int]:
        try:
            return self.tokenizer.encode(caption, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError):
            # Half a surrogate pair, from JSON cut inside an emoji: no valid text, BERT's tokenizer drops it too.
            caption = caption.encode("utf-8", "ignore").decode("utf-8")
            return self.tokenizer.encode(caption, add_special_tokens=False).ids


def load_tokenizer(source: str | os.PathLike, sep_token: bool = False) -> CaptionTokenizer:
    """Loads a BERT tokenizer.

    source: a folder with tokenizer.json or vocab.txt, one of these two files (a vocab.txt is lower-cased, as for
        bert-base-uncased), or a name on the Hugging Face hub such as "bert-base-uncased".
    sep_token: whether texts end with [SEP]; the reference's do not.

    Raises TokenizerError where nothing is found there, or where it is not a WordPiece vocabulary with BERT's special
    tokens.
    """
    tokenizer, origin = _open(source)
    # Files on the hub may carry a padding or truncation of their own; lengths are this module's decision alone.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    missing = [token for token in SPECIAL_TOKENS if token not in vocab]
    if missing or not isinstance(tokenizer.model, WordPiece):
        kind = type(tokenizer.model).__name__
        raise TokenizerError(
            f"{origin} is no BERT vocabulary: expected WordPiece with {' '.join(SPECIAL_TOKENS)}, found {kind}"
            + (f" without {' '.join(missing)}" if missing else "")
            + "; use bert-base-uncased or a vocab.txt made by train_wordpiece"
        )
    pad, unk, cls, sep, mask = (vocab[token] for token in SPECIAL_TOKENS)
    return CaptionTokenizer(tokenizer, pad, unk, cls, sep, mask, max(vocab.values()) + 1, sep_token)


def _open(source: str | os.PathLike) -> tuple[Tokenizer, str]:
    """The tokenizer at a path or of a hub name, and where it came from, for messages."""
    path = Path(source).expanduser()
    if path.is_dir():
        found = [path / name for name in ("tokenizer.json", "vocab.txt") if (path / name).is_file()]
        if not found:
            raise TokenizerError(f"{path} holds neither tokenizer.json nor vocab.txt; one of them is needed")
        path = found[0]
    if path.is_file():
        try:
            opened = Tokenizer.from_file(str(path)) if path.suffix == ".json" else _from_vocab(path)
        except TokenizerError:
            raise
        except Exception as error:  # the Rust library raises bare Exception
            raise TokenizerError(f"{path} cannot be read as a tokenizer: {error}") from error
        return opened, str(path)
    name = os.fspath(source)
    # A hub name is "name" or "owner/name"; anything else was meant as a path, so no download is attempted for it.
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or path.suffix in (".txt", ".json"):
        raise TokenizerError(f"{name} does not exist; expected a vocab.txt, a tokenizer.json or a folder with one")
    try:
        return Tokenizer.from_pretrained(name), f"{name} (hub)"
    except Exception as error:  # no network, no such name, no tokenizer.json: each raises something else
        raise TokenizerError(
            f"no tokenizer called {name!r}: there is no such folder here, and the Hugging Face hub gave none "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}); "
            "check the name and the network, or give a local folder or vocab.txt"
        ) from error


def _from_vocab(path: Path) -> Tokenizer:
    """bert-base-uncased's rules over the words of a vocab.txt, one a line, whose line number is the id."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    words = [line.rstrip("\r") for line in lines]
    if words and not words[-1]:
        words.pop()
    vocab = {word: i for i, word in enumerate(words)}
    if "[UNK]" not in vocab:
        raise TokenizerError(f"{path} is no BERT vocabulary: it has no [UNK] among its {len(words)} lines")
    tokenizer = Tokenizer(WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.decoder = WordPieceDecoder()
    tokenizer.add_special_tokens([token for token in SPECIAL_TOKENS if token in vocab])
    return tokenizer


def train_wordpiece(captions: Iterable[str], vocab_size: int, path: str | os.PathLike) -> Path:
    """Makes a WordPiece vocabulary of at most `vocab_size` entries and writes it as a vocab.txt.

    [PAD] [UNK] [CLS] [SEP] [MASK] are ids 0 to 4, then the characters, then pieces, commonest merge first. The same
    captions (in any order) give the same file: ties are broken by the text of the pieces. That is why the trainer of
    the tokenizers library is not used here: its order of ties changes from one process to the next.
    Raises ValueError where `vocab_size` has no room for a single character.
    """
    if vocab_size <= len(SPECIAL_TOKENS):
        raise ValueError(f"vocab_size is {vocab_size}: expected more than the {len(SPECIAL_TOKENS)} special tokens")
    normalizer, splitter = BertNormalizer(lowercase=True), BertPreTokenizer()
    counts: Counter[str] = Counter()
    for caption, times in Counter(captions).items():
        text = normalizer.normalize_str(caption.encode("utf-8", "ignore").decode("utf-8"))
        for word, _ in splitter.pre_tokenize_str(text):
            counts[word] += times
    words = [[word[0], *(f"##{c}" for c in word[1:])] for word in sorted(counts)]
    weights = [counts[word] for word in sorted(counts)]

    characters: Counter[str] = Counter()
    for pieces, weight in zip(words, weights, strict=True):
        for piece in pieces:
            characters[piece] += weight
    room = vocab_size - len(SPECIAL_TOKENS)
    alphabet = sorted(sorted(characters, key=lambda c: (-characters[c], c))[:room])
    vocab = [*SPECIAL_TOKENS, *alphabet, *_merges(words, weights, room - len(alphabet))]
    path = Path(path)
    path.write_text("".join(f"{token}\n" for token in dict.fromkeys(vocab)), encoding="utf-8")
    return path


def _merges(words: list[list[str]], weights: list[int], wanted: int) -> list[str]:
    """The first `wanted` new pieces that byte-pair encoding joins, most frequent pair first. Changes `words`."""
    pairs: Counter[tuple[str, str]] = Counter()
    places: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
    for i, pieces in enumerate(words):
        for pair in zip(pieces, pieces[1:], strict=False):
            pairs[pair] += weights[i]
            places[pair].add(i)
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)

    merged: dict[str, None] = {}
    while heap and len(merged) < wanted:
        count, pair = heapq.heappop(heap)
        if -count != pairs[pair] or not count:
            continue  # an old entry: the pair's count has changed since, and the newer entry is in the heap as well
        piece = pair[0] + pair[1].removeprefix("##")
        merged[piece] = None
        changed = set()
        for i in sorted(places.pop(pair)):
            before = words[i]
            after, j = [], 0
            while j < len(before):
                joined = j + 1 < len(before) and (before[j], before[j + 1]) == pair
                after.append(piece if joined else before[j])
                j += 2 if joined else 1
            for old in zip(before, before[1:], strict=False):
                pairs[old] -= weights[i]
                changed.add(old)
            for new in zip(after, after[1:], strict=False):
                pairs[new] += weights[i]
                places[new].add(i)
                changed.add(new)
            words[i] = after
        for other in sorted(changed):
            if pairs[other] > 0:
                heapq.heappush(heap, (-pairs[other], other))
    return list(merged)
