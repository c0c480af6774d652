"""Retrieval against answers worked out by hand, against the reference's way of computing, and over two processes."""

from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from albef_ds.data.batch import PackedText
from albef_ds.evaluation.ahead import EvaluationError
from albef_ds.evaluation.retrieval import RetrievalSet, evaluate_retrieval
from tests.ranks import run_ranks


class TableModel(torch.nn.Module):
    """Image i and text t have similarity sims[i, t] and matching score itm[i, t], whatever they look like."""

    def __init__(self, sims, itm):
        super().__init__()
        self.sims, self.itm = torch.tensor(sims), torch.tensor(itm)
        self.scored = []

    def encode_image(self, images):  # [B, 3, 1, 1] that hold the image's number
        number = images[:, 0, 0, 0].long()
        embeds = number[:, None, None].expand(-1, 2, 3).float()  # [B, S, Wv]
        return embeds, torch.eye(self.sims.shape[0])[number]

    def encode_text(self, text):  # each token id is the text's number
        return text.input_ids[:, None].expand(-1, 4).float(), self.sims.T[text.input_ids[text.cu_seqlens[:-1].long()]]

    def match(self, text_embeds, text, text_index, image_embeds, image_index):
        first = text.cu_seqlens[:-1].long()
        assert text.cu_seqlens[-1] == len(text.input_ids) == len(text_embeds)
        assert (text.position_ids[first] == 0).all() and text.max_length == text.cu_seqlens.diff().max()
        assert torch.equal(text_embeds[:, 0].long(), text.input_ids)
        texts = text_embeds[first[text_index], 0].long()
        images = image_embeds[image_index, 0, 0].long()
        assert not self.training
        self.autocast = torch.is_autocast_enabled("cpu")
        self.scored += list(zip(images.tolist(), texts.tolist(), strict=True))
        return torch.stack([torch.zeros(len(texts)), self.itm[images, texts]], dim=1)


class NumberTokenizer:
    """Text number n is one to three tokens "n"."""

    def encode(self, captions, max_tokens):
        assert max_tokens == 30
        return [[int(caption.split()[1])] * (1 + int(caption.split()[1]) % 3) for caption in captions]


def pixels(image):
    return torch.from_numpy(np.asarray(image)[0, 0].copy()).view(3, 1, 1).float()


def make_set(folder, texts_of):
    """Images 0 to N-1 on disk; image i is described by the texts numbered texts_of[i]."""
    paths = []
    for i in range(len(texts_of)):
        paths.append(str(Path(folder) / f"{i}.png"))
        Image.new("RGB", (2, 2), (i, 0, 0)).save(paths[-1])
    return RetrievalSet(paths, [[f"Text {t}!" for t in texts] for texts in texts_of])


def evaluate(model, pairs, **changes):
    settings = {"transform": pixels, "tokenizer": NumberTokenizer(), "device": "cpu", "k_test": 100, "workers": 2}
    sizes = {"image_batch": 4, "text_batch": 3, "pair_batch": 5}
    return evaluate_retrieval(model, pairs, **(settings | sizes | changes))


def reference_recall(sims, itm, texts_of, k):
    """The reference's Retrieval.py: a matrix of -100 with the scores of the k best in it, sorted."""
    owner = {t: i for i, texts in enumerate(texts_of) for t in texts}

    def places(scores, right):
        return [
            min(np.argsort(-row, kind="stable").tolist().index(r) for r in right(q)) for q, row in enumerate(scores)
        ]

    def rescored(sims, itm):
        # -100 for all others would tie them; the reference's order among them is an accident, ITC's is meant.
        scores = sims - 1000.0
        for q, row in enumerate(sims):
            best = np.argsort(-row, kind="stable")[:k]
            scores[q, best] = itm[q, best]
        return scores

    result = {}
    for name, i2t, t2i in (("itc", sims, sims.T), ("itm", rescored(sims, itm), rescored(sims.T, itm.T))):
        tr, ir = places(i2t, lambda i: texts_of[i]), places(t2i, lambda t: [owner[t]])
        result[name] = {f"tr@{n}": 100 * np.mean([p < n for p in tr]) for n in (1, 5, 10)}
        result[name] |= {f"ir@{n}": 100 * np.mean([p < n for p in ir]) for n in (1, 5, 10)}
    return result


def random_case(seed, counts):
    rng = np.random.default_rng(seed)
    texts_of, t = [], 0
    for count in counts:
        texts_of.append(list(range(t, t + count)))
        t += count
    sims = rng.standard_normal((len(counts), t)).astype(np.float32)
    itm = rng.standard_normal((len(counts), t)).astype(np.float32)
    for i, texts in enumerate(texts_of):  # better than chance, so that recall has something to tell
        sims[i, texts] += 1.0
        itm[i, texts] += 1.5
    return sims, itm, texts_of


SIMS = [  # text   0    1    2    3
    [0.9, 0.1, 0.8, 0.7],  # image 0, described by texts 0 and 1: found at once
    [0.6, 0.5, 0.4, 0.3],  # image 1, by text 2: third
    [0.2, 0.3, 0.9, 0.1],  # image 2, by text 3: last
]
ITM = [
    [-1.0, 5.0, 3.0, 4.0],
    [1.0, 0.0, 2.0, 0.0],
    [0.0, 0.0, 0.0, 9.0],
]
TEXTS_OF = [[0, 1], [2], [3]]


def test_recall_worked_out_by_hand(tmp_path):
    metrics = evaluate(TableModel(SIMS, ITM), make_set(tmp_path, TEXTS_OF)).metrics
    assert metrics["itc"]["tr@1"] == pytest.approx(100 / 3)
    # Texts to images: 0 -> image 0 first; 1 -> last (0.1 < 0.3 < 0.5); 2 -> image 1 last; 3 -> image 2 last.
    assert metrics["itc"]["ir@1"] == pytest.approx(25)
    assert metrics["itc"]["tr@5"] == metrics["itc"]["ir@5"] == 100
    assert metrics["itc"]["tr_mean"] == pytest.approx((100 / 3 + 200) / 3)
    assert metrics["itc"]["mean"] == pytest.approx(((100 / 3 + 200) / 3 + 225 / 3) / 2)
    # By ITM: image 0 finds text 1, image 1 text 2, image 2 text 3; texts 1 and 3 find theirs, 0 and 2 another.
    assert metrics["itm"]["tr@1"] == 100
    assert metrics["itm"]["ir@1"] == pytest.approx(50)
    assert (metrics["images"], metrics["texts"], metrics["k_test"]) == (3, 4, 100)


def test_texts_beyond_k_stay_behind_and_are_not_scored(tmp_path):
    model = TableModel(SIMS, ITM)
    metrics = evaluate(model, make_set(tmp_path, TEXTS_OF), k_test=2).metrics
    # Image 0 has candidates 0 and 2, of which ITM likes 2; image 1 never sees its text, image 2 neither.
    assert metrics["itm"]["tr@1"] == 0
    wanted_by_images = {(0, 0), (0, 2), (1, 0), (1, 1), (2, 2), (2, 1)}
    wanted_by_texts = {(0, 0), (1, 0), (1, 1), (2, 1), (2, 2), (0, 2), (0, 3), (1, 3)}
    assert sorted(model.scored) == sorted(wanted_by_images | wanted_by_texts)


@pytest.mark.parametrize("k_test", [1, 3, 12, 100])
@pytest.mark.parametrize("counts", [[1] * 13, [3, 1, 2, 1, 5, 2, 1, 1, 4], [7, 1]])
def test_equals_the_reference_way_of_computing(tmp_path, counts, k_test):
    for seed in range(3):
        sims, itm, texts_of = random_case(seed, counts)
        metrics = evaluate(TableModel(sims, itm), make_set(tmp_path, texts_of), k_test=k_test).metrics
        for name, expected in reference_recall(sims, itm, texts_of, k_test).items():
            assert {key: metrics[name][key] for key in expected} == pytest.approx(expected)


def test_sizes_of_batches_change_nothing_and_pairs_are_scored_once(tmp_path):
    sims, itm, texts_of = random_case(5, [2] * 9)
    pairs = make_set(tmp_path, texts_of)
    results = []
    for sizes in ((1, 1, 1), (4, 3, 5), (100, 100, 1000)):
        model = TableModel(sims, itm)
        results.append(
            evaluate(model, pairs, **dict(zip(("image_batch", "text_batch", "pair_batch"), sizes, strict=True)))
        )
        assert sorted(model.scored) == [(i, t) for i in range(9) for t in range(18)]
    assert results[0] == results[1] == results[2]


def test_of_equal_scores_the_first_wins(tmp_path):
    flat = np.zeros((12, 12), np.float32)
    metrics = evaluate(TableModel(flat, flat), make_set(tmp_path, [[t] for t in range(12)])).metrics
    for name in ("itc", "itm"):  # query q has its answer at place q: nothing is won by giving equal scores
        assert metrics[name]["tr@1"] == metrics[name]["ir@1"] == pytest.approx(100 / 12)
        assert metrics[name]["tr@10"] == metrics[name]["ir@10"] == pytest.approx(1000 / 12)


def test_a_single_image(tmp_path):
    result = evaluate(TableModel([[0.3]], [[-2.0]]), make_set(tmp_path, [[0]]))
    assert result.metrics["itc"] == result.metrics["itm"]
    assert set(result.metrics["itm"].values()) == {100.0}
    (example,) = result.examples
    assert [(f.caption, f.itm, f.right) for f in example.found] == [("Text 0!", -2.0, True)]


def test_examples_show_captions_in_their_new_order(tmp_path):
    pairs = make_set(tmp_path, TEXTS_OF)
    result = evaluate(TableModel(SIMS, ITM), pairs, k_test=3, examples=2, found=2)
    first, last = result.examples
    assert (first.image, last.image) == (pairs.images[0], pairs.images[2])
    assert first.captions == ("Text 0!", "Text 1!")
    assert [(f.caption, f.right) for f in first.found] == [("Text 3!", False), ("Text 2!", False)]
    assert [f.itm for f in first.found] == [4.0, 3.0]
    assert [f.itc for f in first.found] == pytest.approx([0.7, 0.8])


def test_similarities_stay_in_fp32_under_autocast(tmp_path):
    sims = np.full((2, 2), 0.5, np.float32)
    sims[0, 0] = sims[1, 1] = 0.5001  # the same number in bf16
    model = TableModel(sims, sims)
    metrics = evaluate(model, make_set(tmp_path, [[0], [1]]), autocast=torch.bfloat16).metrics
    assert metrics["itc"]["tr@1"] == 100
    assert model.autocast  # but the network had it
    evaluate(model, make_set(tmp_path, [[0], [1]]))
    assert not model.autocast


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_in_the_mode_it_was_in(tmp_path, training):
    model = TableModel(SIMS, ITM).train(training)
    evaluate(model, make_set(tmp_path, TEXTS_OF))
    assert model.training is training


def test_bad_images_are_all_named(tmp_path):
    sims, itm, texts_of = random_case(0, [1] * 9)
    pairs = make_set(tmp_path, texts_of)
    Path(pairs.images[2]).write_bytes(b"not an image")
    Path(pairs.images[7]).unlink()
    with pytest.raises(EvaluationError, match=r"2\.png: not an image.*7\.png: the file does not exist.*repair"):
        evaluate(TableModel(sims, itm), pairs)


@pytest.mark.parametrize("where", ["sims", "itm"])
def test_a_model_that_gives_nan_is_not_evaluated(tmp_path, where):
    tables = {"sims": np.array(SIMS, np.float32), "itm": np.array(ITM, np.float32)}
    tables[where][1, 1] = np.nan
    with pytest.raises(EvaluationError, match="NaN or infinity"):
        evaluate(TableModel(**tables), make_set(tmp_path, TEXTS_OF))


@pytest.mark.parametrize(
    ("images", "captions", "message"),
    [
        (["a"], [], "1 images, but captions for 0"),
        ([], [], "at least one image"),
        (["a.jpg"], [[]], "a.jpg: expected a list of one or more captions"),
        (["a.jpg"], ["text"], "a.jpg: expected a list of one or more captions, got 'text'"),
    ],
)
def test_incomplete_sets_are_refused(images, captions, message):
    with pytest.raises(EvaluationError, match=message):
        RetrievalSet(images, captions)


def test_k_test_must_be_positive(tmp_path):
    with pytest.raises(EvaluationError, match="k_test is 0"):
        evaluate(TableModel(SIMS, ITM), make_set(tmp_path, TEXTS_OF), k_test=0)


def evaluate_jobs(jobs):
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    results = []
    for sims, itm, pairs, changes in jobs:
        model = TableModel(sims, itm)
        try:
            results.append((evaluate(model, pairs, **changes), model.scored))
        except EvaluationError as error:
            results.append((str(error), []))
    return results


def test_two_ranks_divide_the_work_and_agree_with_one(tmp_path):
    jobs = []
    for name, counts, changes in (
        ("even", [1] * 16, {"k_test": 4}),
        ("odd", [3, 1, 2, 1, 5, 2, 1, 1, 4], {"k_test": 3, "image_batch": 2}),
        ("all_on_one", [2, 1, 1], {"image_batch": 8, "text_batch": 8}),
    ):
        (tmp_path / name).mkdir()
        sims, itm, texts_of = random_case(1, counts)
        jobs.append((sims, itm, make_set(tmp_path / name, texts_of), changes))
    (tmp_path / "bad").mkdir()
    sims, itm, texts_of = random_case(2, [1] * 12)
    bad = make_set(tmp_path / "bad", texts_of)
    Path(bad.images[11]).write_bytes(b"")
    jobs.append((sims, itm, bad, {}))
    broken = np.array(itm)
    broken[11] = np.nan
    jobs.append((sims, broken, make_set(tmp_path, texts_of), {}))

    ranks = run_ranks(2, evaluate_jobs, jobs)
    for job, first, second in zip(jobs[:-2], *(rank[:-2] for rank in ranks), strict=True):
        model = TableModel(*job[:2])
        alone = evaluate(model, job[2], **job[3])
        assert first[0] == second[0] == alone
        assert sorted(first[1] + second[1]) == sorted(model.scored)  # each pair by one rank, once
    assert ranks[0][0][1] and ranks[1][0][1] and not ranks[1][2][1]
    # What only one rank can see stops both, with the same words.
    assert "11.png" in ranks[0][-2][0] and ranks[0][-2] == ranks[1][-2]
    assert "NaN" in ranks[0][-1][0] and ranks[0][-1][0] == ranks[1][-1][0]


def test_the_real_network_gives_each_pair_the_score_it_has_alone(tmp_path):
    from albef_ds.config import ModelConfig
    from albef_ds.model.albef import ALBEF

    torch.manual_seed(0)
    config = ModelConfig(
        vision={"image_size": 8, "patch_size": 4, "width": 16, "layers": 1, "heads": 2},
        text={"vocab_size": 50, "width": 16, "layers": 2, "fusion_layer": 1, "heads": 2, "mlp_width": 32},
        embed_dim=8,
        queue_size=8,
    )
    model = ALBEF(config)
    pairs = make_set(tmp_path, [[0, 1], [2], [3, 4, 5]])
    images = [torch.full((3, 8, 8), float(i)) for i in range(3)]
    result = evaluate(
        model,
        pairs,
        transform=lambda image: torch.full((3, 8, 8), float(image.getpixel((0, 0))[0])),
        image_batch=2,
        examples=3,
        found=6,
        embed_dtype=torch.float32,
    )
    model.eval()
    tokens = NumberTokenizer().encode([f"text {t}" for t in range(6)], 30)
    zero = torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        for i, example in enumerate(result.examples):
            image_embeds, image_feat = model.encode_image(images[i][None])
            assert [f.itm for f in example.found] == sorted((f.itm for f in example.found), reverse=True)
            for found in example.found:
                text = PackedText.from_lists([tokens[int(found.caption[5])]])
                text_embeds, text_feat = model.encode_text(text)
                alone = model.match(text_embeds, text, zero, image_embeds, zero)[0, 1].item()
                assert found.itm == pytest.approx(alone, abs=1e-5)
                assert found.itc == pytest.approx((image_feat @ text_feat.T).item(), abs=1e-5)
