"""The reference's checkpoints of every task go in, come out and serve as another task's start; others are refused."""

from __future__ import annotations

import json
import logging
import pickle

import numpy as np
import pytest
import torch

from albef_ds.config import VisionConfig
from albef_ds.model.reference_weights import load_reference, to_reference
from albef_ds.model.vision import build_vision_encoder, fit_position_embeddings
from albef_ds.model.weight_files import WeightsError, read_state_dict
from albef_ds.tasks.pretraining import Pretraining
from albef_ds.tasks.registry import TASKS
from albef_ds.tasks.task import Task
from tests.golden_cases import GOLDEN, GOLDEN_OTHER, SHIPPED, GoldenCase
from tests.tiny import tiny_model

CASES = [GoldenCase(folder, name) for folder, names in SHIPPED.items() for name in names]
STARTS = ("retrieval", "vqa", "entailment", "text_assignment", "nlvr")  # what pretrain.pth was loaded into
# Text assignment has these in the reference, trains none of them, and does without them here.
UNUSED = {"text_assignment": {"temp", "text_proj.weight", "text_proj.bias"}}


@pytest.fixture
def recorded() -> dict[str, torch.Tensor]:
    return read_state_dict(GOLDEN / "pretrain.pth")


def loaded(state, **changes) -> Pretraining:
    task = Pretraining(GoldenCase(GOLDEN, "pretrain").model_config(**changes))
    load_reference(state, task.model, task.teacher, task.queue, "a checkpoint")
    return task


def exported(task: Task) -> dict[str, torch.Tensor]:
    return to_reference(task.model, task.teacher, getattr(task, "queue", None))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_reference_checkpoint_goes_in_and_comes_out_equal(case, tmp_path):
    torch.save({"model": exported(case.build()), "epoch": 0}, tmp_path / "out.pth")
    written = read_state_dict(tmp_path / "out.pth")
    assert case.state.keys() - written.keys() == UNUSED.get(case.task, set())
    assert not written.keys() - case.state.keys()
    for name, value in written.items():
        assert value.dtype == case.state[name].dtype and torch.equal(value, case.state[name]), name


@pytest.mark.parametrize("name", STARTS)
def test_pretrained_weights_start_every_task_as_in_the_reference(name, caplog):
    """x_from_pretrain.json: shape, sum and sum of squares of all weights, after the reference's own renaming."""
    pretrained = GoldenCase(GOLDEN_OTHER, "pretrain")
    recorded = json.loads((GOLDEN_OTHER / f"{name}_from_pretrain.json").read_text())
    task = TASKS[name](pretrained.model_config())
    random = {key: value.clone() for key, value in exported(task).items()}
    with caplog.at_level(logging.WARNING):
        load_reference(pretrained.state, task.model, task.teacher, getattr(task, "queue", None), "pretrain.pth")
    found = exported(task)
    assert recorded["sums"].keys() - found.keys() <= UNUSED.get(name, set())
    assert found.keys() - recorded["sums"].keys() == set(recorded["missing"])
    for key, (shape, total, squares) in recorded["sums"].items():
        if key in found:
            value = found[key].double()
            assert list(value.shape) == shape, key
            assert value.sum().item() == pytest.approx(total, rel=1e-6, abs=1e-6), key
            assert value.square().sum().item() == pytest.approx(squares, rel=1e-6), key
    for key in recorded["missing"]:  # start as they would without any checkpoint, the teacher's as the student's
        assert torch.equal(found[key], random[key.replace("_head_m", "_head")]), key
    heads = {key.split(".")[0] for key in recorded["missing"] if "head" in key} - {"cls_head_m"}
    assert all(f"no {head} of this task: it starts at random" in caplog.text for head in heads)


def test_weights_of_text_assignment_start_nlvr_and_its_teacher():
    """The reference copies the teacher before it loads the student; here the teacher starts as the student."""
    prepared = GoldenCase(GOLDEN_OTHER, "text_assignment")
    task = TASKS["nlvr"](prepared.model_config())
    load_reference(prepared.state, task.model, task.teacher, None, "text_assignment.pth")
    found = exported(task)
    taken = {key for key in found if not key.startswith("cls_head") and "_m." not in key}
    assert taken == {key for key in prepared.state if key.startswith(("visual_encoder.", "text_encoder."))}
    assert all(torch.equal(found[key], prepared.state[key]) for key in taken)
    assert all(torch.equal(p, task.model.get_parameter(n)) for n, p in task.teacher.named_parameters())


@pytest.mark.parametrize("name", ["vqa", "entailment", "nlvr"])
def test_without_momentum_copies_the_teacher_equals_the_loaded_student(name):
    case = GoldenCase(GOLDEN_OTHER, name)
    task = TASKS[name](case.model_config())
    bare = {key: value for key, value in case.state.items() if "_m." not in key}
    load_reference(bare, task.model, task.teacher, None, "bare.pth")
    assert torch.equal(task.model.visual_encoder.pos_embed, case.state["visual_encoder.pos_embed"])
    assert all(torch.equal(p, task.model.get_parameter(n)) for n, p in task.teacher.named_parameters())


@pytest.mark.parametrize("name", ["vqa", "entailment", "nlvr", "text_assignment"])
def test_without_distillation_there_is_no_teacher_to_load_into_or_to_write(name):
    case = GoldenCase(GOLDEN_OTHER, name)
    task = case.build(distill=False)
    assert task.teacher is None
    written = exported(task)
    assert written.keys() == {key for key in case.state if "_m." not in key} - UNUSED.get(name, set())
    assert all(torch.equal(value, case.state[key]) for key, value in written.items())


def test_the_ids_of_the_queue_are_taken_over():
    case = GoldenCase(GOLDEN, "retrieval")
    task = TASKS["retrieval"](case.model_config())
    numbers = torch.arange(task.queue.length)
    load_reference(case.state | {"idx_queue": numbers[None]}, task.model, task.teacher, task.queue, "retrieval.pth")
    assert torch.equal(task.queue.ids, numbers)
    from_pretraining = TASKS["retrieval"](GoldenCase(GOLDEN, "pretrain").model_config())
    state = GoldenCase(GOLDEN, "pretrain").state
    load_reference(state, from_pretraining.model, from_pretraining.teacher, from_pretraining.queue, "pretrain.pth")
    assert torch.equal(from_pretraining.queue.image.T, state["image_queue"])
    assert (from_pretraining.queue.ids == -100).all()  # nobody's positives


def test_a_stripped_checkpoint_makes_the_teacher_a_copy_and_says_so(recorded, caplog):
    queues = {"image_queue", "text_queue", "queue_ptr"}
    stripped = {k: v for k, v in recorded.items() if "_m." not in k and k not in queues}
    with caplog.at_level(logging.WARNING):
        task = loaded(stripped)
    assert "no momentum copy of visual_encoder, vision_proj, text_encoder, text_proj" in caplog.text
    assert "no queues" in caplog.text
    assert all(torch.equal(p, task.model.get_parameter(n)) for n, p in task.teacher.named_parameters())


def test_queues_of_another_length_are_left_and_named(recorded, caplog):
    with caplog.at_level(logging.WARNING):
        task = loaded(recorded, queue_size=10)
    assert "(48, 16), this run's (10, 16)" in caplog.text
    torch.testing.assert_close(task.queue.image.norm(dim=1), torch.ones(10))


def test_a_prefix_of_ddp_is_taken_off(recorded):
    task = loaded({f"module.{k}": v for k, v in recorded.items()})
    assert torch.equal(task.model.itm_head.weight, recorded["itm_head.weight"])


def test_another_models_checkpoint_is_refused_with_names(recorded):
    small = Pretraining(tiny_model())
    with pytest.raises(
        WeightsError, match="not a checkpoint of this model .*cls_token is \\(1, 1, 32\\), the model has \\(1, 1, 24\\)"
    ):
        load_reference(recorded, small.model, small.teacher, small.queue, "wrong.pth")
    with pytest.raises(WeightsError, match="missing: itm_head.weight"):
        loaded({k: v for k, v in recorded.items() if k != "itm_head.weight"})
    with pytest.raises(WeightsError, match="unknown: what.is_this"):
        loaded(recorded | {"what.is_this": torch.zeros(1)})


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("vqa", "text_decoder.bert.encoder.layer.1.crossattention.self.key.weight"),
        ("nlvr", "text_encoder.encoder.layer.3.attention.self.query.weight"),
        ("entailment", "visual_encoder.cls_token"),
        ("entailment", "visual_encoder_m.cls_token"),
        ("vqa", "text_decoder_m.bert.embeddings.LayerNorm.bias"),
    ],
)
def test_a_checkpoint_with_a_hole_is_refused_for_every_task(name, lost):
    case = GoldenCase(GOLDEN_OTHER, name)
    task = TASKS[name](case.model_config())
    state = {key: value for key, value in case.state.items() if key != lost}
    named = lost.replace("_m.", ".").replace("text_encoder.encoder", "text_encoder.bert.encoder")
    with pytest.raises(WeightsError, match=f"holed.pth: not a checkpoint of this model .missing: {named}"):
        load_reference(state, task.model, task.teacher, None, "holed.pth")


def test_a_model_of_other_layers_is_not_taken_for_a_pair_model():
    """Twice each fusion layer is made of as many layers as pre-training has, and of no other number."""
    case = GoldenCase(GOLDEN_OTHER, "pretrain")
    last = f"text_encoder.bert.encoder.layer.{case.model_config().text.layers - 1}."
    task = TASKS["nlvr"](case.model_config())
    state = {key: value for key, value in case.state.items() if not key.startswith(last)}
    with pytest.raises(WeightsError, match="missing: text_encoder.bert.encoder.layer"):
        load_reference(state, task.model, task.teacher, None, "shorter.pth")


@pytest.mark.parametrize("grid", [1, 2, 3, 4, 5, 7])
def test_position_embeddings_are_resampled_as_in_the_reference(grid):
    with np.load(GOLDEN_OTHER / "pos_embed.npz") as recorded:
        source, expected = (torch.from_numpy(recorded[key]) for key in ("source", f"grid{grid}"))
    encoder = build_vision_encoder(VisionConfig(image_size=16 * grid, width=source.shape[2], layers=1, heads=4))
    found = fit_position_embeddings({"visual_encoder.pos_embed": source}, encoder, "visual_encoder.")
    torch.testing.assert_close(found["visual_encoder.pos_embed"], expected, atol=1e-6, rtol=1e-6)


def test_position_embeddings_fit_another_image_size(recorded):
    config = GoldenCase(GOLDEN, "pretrain").model_config()
    task = loaded(recorded, vision=config.vision.model_copy(update={"image_size": 80}))
    assert task.model.visual_encoder.pos_embed.shape == (1, 26, 32)
    assert task.teacher.visual_encoder.pos_embed.shape == (1, 26, 32)


class Bomb:
    def __reduce__(self):
        return (print, ("executed",))


def test_a_pickle_that_would_run_code_is_refused(tmp_path, capsys):
    path = tmp_path / "bad.pth"
    torch.save({"model": Bomb()}, path)
    with pytest.raises(WeightsError, match="Nothing was executed"):
        read_state_dict(path)
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(WeightsError):
        read_state_dict(path)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("contents", [b"", b"not a checkpoint", b"PK\x03\x04broken"])
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, contents):
    path = tmp_path / "x.pth"
    path.write_bytes(contents)
    with pytest.raises(WeightsError, match="x.pth"):
        read_state_dict(path)
    with pytest.raises(WeightsError, match="no such weights file"):
        read_state_dict(tmp_path / "absent.pth")
