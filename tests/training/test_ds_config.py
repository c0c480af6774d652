"""The configurations that ship are sound, and what DeepSpeed would pass over in silence is refused by name."""

import json
import re
from pathlib import Path

import pytest
from deepspeed.runtime import constants
from deepspeed.runtime.config import DeepSpeedConfig

from albef_ds.training.ds_config import (
    BATCH_SIZES,
    RECIPE_DECIDES,
    DeepSpeedConfigError,
    known_top_level_keys,
    load_deepspeed_config,
)

SHIPPED = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))
GOOD = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}, "zero_optimization": {"stage": 2}}


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "ds.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configurations_are_zero2_with_fp32_parameters(path):
    config = load_deepspeed_config(path)
    parsed = DeepSpeedConfig(config | {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3})
    assert parsed.zero_optimization_stage == 2
    assert parsed.zero_config.contiguous_gradients
    assert not parsed.bfloat16_config.enabled and not parsed.float16_config.enabled
    assert parsed.torch_autocast_enabled == (path.stem != "zero2_cpu")
    assert parsed.zero_config.overlap_comm == (not path.stem.startswith("zero2_cpu"))
    assert "_comment" not in config and not set(config) & {*RECIPE_DECIDES, *BATCH_SIZES}
    assert (parsed.zero_config.offload_optimizer is not None) == (path.stem == "zero2_offload")


def test_every_machine_of_the_readme_has_its_file_and_the_other_way_round():
    readme = (SHIPPED[0].parent / "README.md").read_text()
    assert set(re.findall(r"`(zero2_\w+\.json)`", readme)) == {path.name for path in SHIPPED}
    assert len(SHIPPED) >= 5
    assert "\n## Precision\n" in readme


def test_the_known_keys_cover_what_deepspeed_documents():
    documented = set()
    for name, text in vars(constants).items():
        if name.endswith("_FORMAT"):
            documented |= set(re.findall(r'"(\w+)":', text)[:1])
    assert len(documented) >= 14
    assert documented <= known_top_level_keys()
    assert {"zero_optimization", "activation_checkpointing", "flops_profiler", "checkpoint"} <= known_top_level_keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gradient_cliping": 1.0}, "unknown key 'gradient_cliping'.*did you mean 'gradient_clipping'"),
        ({"zero_optimisation": {"stage": 2}}, "did you mean 'zero_optimization'"),
        ({"zzz": 1}, "unknown key 'zzz', which DeepSpeed would ignore$"),
        ({"torch_autocast": {"enabld": True}}, "unknown key 'torch_autocast.enabld'.*did you mean 'enabled'"),
        ({"activation_checkpointing": {"partition_activation": True}}, "did you mean 'partition_activations'"),
        ({"zero_optimization": {"stage": 2, "overlap_com": True}}, "'zero_optimization.overlap_com'.*'overlap_comm'"),
        ({"zero_optimization": {"stage": "two"}}, "'zero_optimization.stage': "),
        ({"zero_optimization": {"offload_optimizer": {"devic": "cpu"}}}, "'zero_optimization.offload_optimizer.devic'"),
        ({"tensorboard": {"enable": True}}, "'tensorboard.enable'"),
        ({"torch_autocast": {"enabled": True, "dtype": "bf8"}}, "DeepSpeed refuses it: .*bf8"),
        ({"elasticity": {}}, "DeepSpeed refuses it: .*Elastic training has been removed"),
        ({"zero_optimization": {"stage": 3}}, "stage is 3.*stages 0 to 2.*offload_optimizer"),
        ({"bf16": {"enabled": True}}, "bf16.enabled would keep parameters in 16 bits.*torch_autocast"),
        ({"bfloat16": {"enabled": True}}, "bfloat16.enabled would keep"),
        ({"fp16": {"enabled": True}}, "fp16.enabled would keep"),
        ({"data_types": {"buffer_dtype": "bf16"}}, "buffer_dtype 'bf16' would round the queues"),
        ({"gradient_clipping": 1.0}, "remove 'gradient_clipping' and set train.clip in the recipe"),
        ({"optimizer": {"type": "Adam"}}, "remove 'optimizer' and set optimizer"),
    ],
)
def test_bad_keys_and_values_are_named_with_their_file(write, change, message):
    with pytest.raises(DeepSpeedConfigError, match=message) as error:
        load_deepspeed_config(write(GOOD | change))
    assert "ds.json" in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n  "zero_optimization": {"stage": 2},\n}', "ds.json, line 2, column 36|ds.json, line 3, column 1"),
        ('{"a": 1 "b": 2}', "line 1, column 9"),
        ("[1]", "expected a JSON object, got list"),
        ('{"wandb": {}, "wandb": {}}', "key 'wandb' occurs twice"),
    ],
)
def test_bad_json_is_located(write, text, message):
    with pytest.raises(DeepSpeedConfigError, match=message):
        load_deepspeed_config(write(text))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DeepSpeedConfigError, match="nowhere.json: cannot be read"):
        load_deepspeed_config(tmp_path / "nowhere.json")


def test_valid_sections_of_every_kind_pass_unchanged(write):
    config = GOOD | {
        "communication_data_type": "fp32",
        "bf16": {"enabled": False},
        "activation_checkpointing": {"partition_activations": False, "profile": False},
        "flops_profiler": {"enabled": False, "profile_step": 5},
        "checkpoint": {"tag_validation": "Fail", "parallel_write": {"pipeline_stage": False}},
        "comms_logger": {"enabled": False, "prof_ops": []},
        "tensorboard": {"enabled": False, "job_name": "x"},
        "csv_monitor": {"enabled": False},
        "data_types": {"grad_accum_dtype": "fp32", "buffer_dtype": "fp32"},
        "aio": {"block_size": 1048576},
        "compile": {"deepcompile": False},
        "timers": {"throughput": {"enabled": False}},
        "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu", "ratio": 1.0}},
        "pipeline": {"stages": "auto"},
        "wall_clock_breakdown": False,
        "steps_per_print": 100,
    }
    assert load_deepspeed_config(write(config | {"_comment": "for a test"})) == config


def test_auto_means_left_out_and_batch_sizes_go_to_the_engine_as_they_are(write):
    auto = {"gradient_clipping": "auto", "optimizer": "auto", "train_micro_batch_size_per_gpu": "auto"}
    config = GOOD | {"train_batch_size": 512, "gradient_accumulation_steps": 3}  # whether they fit is not asked here
    assert load_deepspeed_config(write(config | auto)) == config


def test_low_precision_parameters_are_for_those_who_ask(write):
    path = write({"bf16": {"enabled": True}})
    assert load_deepspeed_config(path, allow_low_precision_params=True) == {"bf16": {"enabled": True}}
