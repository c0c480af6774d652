"""Answers to a whole test set: ranked or written, the server's file, and the accuracy."""

from __future__ import annotations

import json

import pytest
import torch

from albef_ds.data.annotations import AnnotationError
from albef_ds.data.augment import EvalTransform
from albef_ds.data.batch import PackedText
from albef_ds.data.task_entries import questions, read_entries
from albef_ds.data.task_samples import QuestionSamples, answer_ids
from albef_ds.evaluation.ahead import EvaluationError
from albef_ds.evaluation.answers import rank_answers, write_answers
from albef_ds.evaluation.recipe import VQA_WORDS, evaluate_recipe
from albef_ds.evaluation.vqa import answer_all
from albef_ds.evaluation.vqa_accuracy import score_vqa
from tests.shapes_recipes import built, write_task_recipe, write_world

CPU = torch.device("cpu")
SETTINGS = {"k": 4, "first_token_twice": True, "beams": 2, "size": 5, "workers": 0}


@pytest.fixture(scope="module")
def vqa(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vqa")
    config, tokenizer, model = built(write_task_recipe(folder, "vqa"))
    world, tasks = write_world(folder)
    entries = read_entries(tasks.vqa_test, questions(answered=False), {"": str(world.root)})
    samples = QuestionSamples(entries, tokenizer, EvalTransform(32), VQA_WORDS, 40)
    return config, tokenizer, model.eval(), samples, json.loads(tasks.answer_list.read_text())


def alone(model, samples, i: int):
    sample = samples.load(i, None)
    return model.read(torch.stack(sample.images), PackedText.from_lists([sample.ids]))


@torch.no_grad()
def test_each_question_gets_the_best_of_the_list_or_a_text_of_its_own(vqa):
    _, tokenizer, model, samples, answers = vqa
    candidates = PackedText.from_lists(answer_ids(tokenizer, answers, 40))
    ranked = answer_all(model, samples, CPU, answers=answers, **SETTINGS)
    written = answer_all(model, samples, CPU, answers=None, **SETTINGS)
    assert len(ranked) == len(written) == len(samples)
    for i in (0, 4, 5, len(samples) - 1):
        best = rank_answers(model, alone(model, samples, i), candidates, 4)
        assert ranked[i].answer == answers[int(best.indices[0, 0])]
        assert ranked[i].probability == pytest.approx(best.probabilities[0, 0].item(), rel=1e-3)
        text = write_answers(model, alone(model, samples, i), tokenizer.cls_id, tokenizer.sep_id, 2)
        assert written[i].answer == tokenizer.decode(text.ids[0][0])
        assert written[i].probability == pytest.approx(text.scores[0, 0].exp().item(), rel=1e-3)


def test_the_servers_file_and_the_accuracy_are_of_the_same_answers(vqa, tmp_path):
    config, tokenizer, model, samples, answers = vqa
    result = evaluate_recipe(model, config, tokenizer, CPU, out=tmp_path)
    said = json.loads((tmp_path / "results.json").read_text())
    assert [s["question_id"] for s in said] == [samples.entries[i].question_id for i in range(len(samples))]
    assert all(s.keys() == {"question_id", "answer"} and s["answer"] in answers for s in said)
    score = score_vqa(said, config.data.test_annotations)
    assert result.metrics["accuracy"] == score.overall == result.score
    assert result.metrics["per_answer_type"] == score.per_answer_type
    by_id = {a["question_id"]: a["multiple_choice_answer"] for a in _annotations(config)["annotations"]}
    for example in result.examples:
        assert example.expected in by_id.values() and example.right is (
            example.found.split(" (")[0] == example.expected
        )


def _annotations(config) -> dict:
    return json.loads(open(config.data.test_annotations).read())


def test_another_file_than_the_test_set_has_answers_and_no_accuracy(vqa, tmp_path):
    config, tokenizer, model, _, _ = vqa
    file = tmp_path / "val.json"
    entries = json.loads(open(config.data.test).read())[7:4:-1]
    file.write_text(json.dumps(entries))
    result = evaluate_recipe(model, config, tokenizer, CPU, str(file), tmp_path)
    assert result.metrics == {"questions": 3} and result.score is None
    said = json.loads((tmp_path / "results.json").read_text())
    assert [s["question_id"] for s in said] == [e["question_id"] for e in entries]
    assert all(example.expected is None for example in result.examples)


def test_annotations_that_are_not_there_or_of_other_questions_are_named(vqa, tmp_path):
    config, tokenizer, model, _, _ = vqa

    def evaluate(name: str, content) -> None:
        file = tmp_path / name
        if content is not None:
            file.write_text(json.dumps(content))
        data = config.data.model_copy(update={"test_annotations": str(file)})
        evaluate_recipe(model, config.model_copy(update={"data": data}), tokenizer, CPU)

    with pytest.raises(EvaluationError, match="data.test_annotations: .*nowhere.json: no such file"):
        evaluate("nowhere.json", None)
    with pytest.raises(AnnotationError, match="list.json: expected"):
        evaluate("list.json", [])
    fewer = _annotations(config)
    fewer["annotations"] = fewer["annotations"][1:]
    with pytest.raises(EvaluationError, match="1 question ids not in the annotations"):
        evaluate("fewer.json", fewer)
    # What most annotators said is shown where it is known, and needed for nothing else.
    bare = _annotations(config)
    for annotation in bare["annotations"]:
        del annotation["multiple_choice_answer"]
    evaluate("bare.json", bare)


def test_questions_without_numbers_of_their_own_make_no_file_for_the_server(vqa, tmp_path):
    config, tokenizer, model, _, _ = vqa
    file = tmp_path / "test.json"
    entries = json.loads(open(config.data.test).read())[:3]
    file.write_text(json.dumps([{k: v for k, v in e.items() if k != "question_id"} for e in entries]))
    with pytest.raises(
        EvaluationError, match=r'test.json: "question_id" must tell .* apart; missing \(-1\) or repeated: -1$'
    ):
        evaluate_recipe(model, config, tokenizer, CPU, str(file), tmp_path)
    assert evaluate_recipe(model, config, tokenizer, CPU, str(file)).metrics == {"questions": 3}


@pytest.mark.parametrize("listed", [True, False])
def test_a_model_that_gives_no_numbers_is_refused(vqa, listed):
    _, _, model, samples, answers = vqa
    bias = model.text_decoder.cls.predictions.bias
    kept = bias.detach().clone()
    with torch.no_grad():
        bias[5] = float("nan")
    try:
        with pytest.raises(EvaluationError, match="NaN or infinity for an answer"):
            answer_all(model, samples, CPU, answers=answers if listed else None, **SETTINGS)
    finally:
        with torch.no_grad():
            bias.copy_(kept)
