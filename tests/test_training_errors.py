"""What is wrong with data, model or flags is one line that says so, before anything is made."""

import io
import json
import shutil

import datasets
import pytest
import torch
import training_calls
from peft import LoraConfig, get_peft_model
from PIL import Image
from training_calls import FORGOTTEN, STUDIES, assert_one_line, assert_refused, caller, sides, write_dataset
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2VLConfig, ViTConfig, ViTModel

from medforget_dataset import FEATURES
from unlearn.checkpoints import load_checkpoint, save_checkpoint
from unlearn.cli import main
from unlearn.grouping import image_key
from unlearn.models import tiny_model


pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return training_calls.make_inputs(tmp_path_factory.mktemp("right"))


@pytest.fixture(scope="module")
def rows(inputs):
    return inputs[0]


@pytest.fixture(scope="module")
def data(inputs):
    return inputs[1]


@pytest.fixture(scope="module")
def base(inputs):
    return inputs[2]


@pytest.fixture
def call(data, base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    return caller(data, base, tmp_path, capsys)


# The dataset.


def changed(rows, change, of=lambda row_id: image_key(row_id) == STUDIES[2]):
    """The rows, of which those of a study have other values."""
    return datasets.Dataset.from_list(
        [{**row, **change(row)} if of(row["id"]) else row for row in rows.cast_column("image", RAW)], features=FEATURES
    )


RAW = datasets.Image(decode=False)


def image_bytes(size):
    file = io.BytesIO()
    Image.new("L", size).save(file, "PNG")
    return file.getvalue()


def without(rows, count):
    return rows.select(range(count, len(rows)))


DATASETS = {
    "nothing to forget": (lambda r: {"patient_forget": r.select([])}, ["patient_forget has no rows", "level"]),
    "nothing to retain": (lambda r: {"patient_retain": r.select([])}, ["patient_retain has no rows"]),
    "no rows": (lambda r: {"finetune": r.select([])}, ["finetune has no rows"]),
    "overlap": (
        lambda r: {"patient_retain": r},
        ["18 rows are in both patient_forget and patient_retain", f"{FORGOTTEN}/study002/"],
    ),
    "not in finetune": (
        lambda r: {"finetune": r.filter(lambda row: not row["id"].startswith(STUDIES[2]))},
        ["9 rows of patient_forget are not in finetune", STUDIES[2]],
    ),
    "retained but not in finetune": (lambda r: {"finetune": without(r, 2)}, ["2 rows of patient_retain", STUDIES[0]]),
    "on no side": (
        lambda r: {"patient_retain": without(sides(r)["patient_retain"], 3)},
        ["3 rows of finetune are in neither"],
    ),
}


@pytest.mark.parametrize("name", DATASETS)
def test_rows_that_do_not_fit_together(name, rows, call, tmp_path):
    change, names = DATASETS[name]
    folder = write_dataset(tmp_path / "d" / "medforget", **{"finetune": rows, **sides(rows), **change(rows)})
    for method in ("npo", "manu"):
        assert_refused(call("unlearn", data=folder, method=method), "unlearn", str(folder), *names)


def test_fine_tuning_without_rows_or_a_second_patient(rows, call, tmp_path):
    one = rows.filter(lambda row: row["id"].startswith(FORGOTTEN))
    empty = rows.select([])
    folder = write_dataset(
        tmp_path / "d" / "medforget", finetune=one, patient_retain=empty, study_retain=rows, general_med=empty
    )
    assert_refused(
        call("finetune", "--config", "patient_retain", data=folder), "finetune", str(folder), "patient_retain has no"
    )
    assert_refused(call("finetune", data=folder), "finetune", str(folder), FORGOTTEN, "second patient")
    argv = ("--config", "study_retain", "--preset", "tiny")
    assert_refused(call("finetune", *argv, data=folder), "finetune", "general_med has no rows")


BROKEN_ROWS = {
    "cut short": (lambda row: {"image": {"bytes": row["image"]["bytes"][:300], "path": None}}, ["does not decode"]),
    "no picture": (lambda row: {"image": {"bytes": b"text", "path": None}}, ["does not decode"]),
    "none": (lambda row: {"image": None}, ["has no image"]),
    "thin": (lambda row: {"image": {"bytes": image_bytes((1200, 4)), "path": None}}, ["1200 × 4", "aspect ratio"]),
    "no answer": (lambda row: {"answer": ""}, ["its answer is empty"]),
}


@pytest.mark.parametrize("name", BROKEN_ROWS)
def test_a_row_or_image_that_cannot_be_used(name, rows, call, tmp_path):
    change, names = BROKEN_ROWS[name]
    broken = changed(rows, change)
    folder = write_dataset(tmp_path / "d" / "medforget", finetune=broken, **sides(broken))
    for command, method in (("unlearn", "npo"), ("unlearn", "manu"), ("finetune", "npo")):
        answer = call(command, data=folder, method=method) if command == "unlearn" else call(command, data=folder)
        assert_refused(answer, command, STUDIES[2], *names, early=name == "no answer")


@pytest.mark.parametrize(("argv", "named"), [([], STUDIES[0]), (["--no-packing"], f"{STUDIES[0]}/institution")])
def test_a_sequence_longer_than_asked_is_never_cut(argv, named, call):
    for command in ("unlearn", "finetune"):
        answer = call(command, "--max-length", 30, *argv)
        line = assert_refused(answer, command, f"{named}: ", "--max-length", "--max-pixels", early=False)
        tokens = int(line.partition(" tokens")[0].rpartition(" ")[2])
        assert tokens > 30 and f"{tokens} tokens, more than max_length 30" in line


# The checkpoint.


def rewritten(file, **values):
    """Change values of a JSON file; a key may name a part, as in `vision_config.patch_size`."""
    content = json.loads(file.read_text())
    for name, value in values.items():
        *parts, last = name.split("__")
        part = content
        for key in parts:
            part = part[key]
        part[last] = value
    file.write_text(json.dumps(content))


def cut(file, size):
    file.write_bytes(file.read_bytes()[:size])


def larger_tokenizer(folder):
    texts = [f"{a}{b}{c}" for a in "abcdefghij" for b in "klmnopqrst" for c in "uvwxyz"]
    tiny_model(texts, vocab_size=900)[1].save_pretrained(folder)


def no_processor(folder):
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


def text_model(folder):
    sizes = {"vocab_size": 99, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=1, num_key_value_heads=1)).save_pretrained(folder)


def encoder(folder):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
    ViTModel(ViTConfig(**sizes, num_attention_heads=1)).save_pretrained(folder)


def in_shards(folder):
    model, _ = load_checkpoint(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    return sorted(folder.glob("model-*.safetensors"))


CHECKPOINTS = {
    "text model": (text_model, ["not an image-text-to-text model", "qwen2", "Qwen2.5-VL"]),
    "encoder": (encoder, ["not an image-text-to-text model", "vit"]),
    "other VLM": (lambda f: Qwen2VLConfig().save_pretrained(f), ["is a qwen2_vl model", "Qwen2.5-VL"]),
    "no configuration": (lambda f: (f / "config.json").unlink(), ["no config.json"]),
    "broken configuration": (lambda f: cut(f / "config.json", 50), ["config.json", "not a valid JSON"]),
    "no processor": (no_processor, ["processor", "save the processor"]),
    "no image processor": (lambda f: (f / "processor_config.json").unlink(), ["processor", "save the processor"]),
    "no chat template": (lambda f: (f / "chat_template.jinja").unlink(), ["no chat template"]),
    "broken tokenizer": (lambda f: cut(f / "tokenizer.json", 500), ["processor", "save the processor"]),
    "image token": (lambda f: rewritten(f / "config.json", image_token_id=3), ["image token is 6", "model's 3"]),
    "patch size": (
        lambda f: rewritten(f / "processor_config.json", image_processor__patch_size=16),
        ["patch size is 16", "model's 14"],
    ),
    "merge size": (
        lambda f: rewritten(f / "processor_config.json", image_processor__merge_size=1),
        ["merge size is 1", "model's 2"],
    ),
    "larger tokenizer": (larger_tokenizer, ["tokenizer has", "tokens, the model", "save the processor"]),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["no weights (model.safetensors)"]),
    "cut short": (lambda f: cut(f / "model.safetensors", 1000), ["model.safetensors is cut short", "again"]),
    "end missing": (lambda f: cut(f / "model.safetensors", -100), ["model.safetensors is cut short"]),
    "missing shard": (lambda f: in_shards(f)[1].unlink(), ["model-00002-of-0000", "is missing"]),
    "shard cut short": (lambda f: cut(in_shards(f)[1], 100), ["model-00002-of-0000", "cut short"]),
    "broken record": (lambda f: (f / "medforget.json").write_text("{"), ["medforget.json", "cut short"]),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_that_cannot_be_trained(name, base, call, tmp_path):
    spoil, names = CHECKPOINTS[name]
    model = shutil.copytree(base, tmp_path / "model")
    spoil(model)
    for command, method in (("unlearn", "npo"), ("unlearn", "manu"), ("finetune", "npo")):
        answer = call(command, model=model, method=method) if command == "unlearn" else call(command, model=model)
        assert_refused(answer, command, str(model), *names)


def test_weights_of_another_shape(base, call, tmp_path):
    model = shutil.copytree(base, tmp_path / "model")
    rewritten(model / "config.json", text_config__intermediate_size=24)
    assert_refused(call("unlearn", model=model), "unlearn", str(model), "shapes", "config.json", early=False)


@pytest.mark.parametrize(
    ("model", "says"), [("nowhere", "no such checkpoint folder"), ("lab/model", "Hub"), ("a/b/c", "no such")]
)
def test_no_checkpoint(model, says, call):
    says = "huggingface.co" if says == "Hub" else says
    assert_refused(call("unlearn", model=model), "unlearn", f"{model}: ", says)
    assert_refused(call("unlearn", "--reference", model), "unlearn", f"--reference {model}: ", says)


def make_adapter(base, folder, seed=0):
    """An adapter that changes what its base says."""
    model, processor = load_checkpoint(base)
    torch.manual_seed(seed)
    adapted = get_peft_model(model, LoraConfig(target_modules=r".*language_model.*q_proj", r=2))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return save_checkpoint(folder, adapted, processor, {}, adapter=True)


ADAPTERS = {
    "base gone": (lambda a: shutil.rmtree(a.parent / "base"), ["the model that this adapter belongs to", "no such"]),
    "no base": (
        lambda a: rewritten(a / "adapter_config.json", base_model_name_or_path=None),
        ["adapter_config.json", "which model"],
    ),
    "broken": (lambda a: cut(a / "adapter_config.json", 20), ["adapter_config.json", "cannot be read"]),
    "cut short": (lambda a: cut(a / "adapter_model.safetensors", 99), ["adapter_model.safetensors is cut short"]),
    "no weights": (lambda a: (a / "adapter_model.safetensors").unlink(), ["no weights (adapter_model.safetensors)"]),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_that_cannot_be_loaded(name, base, call, tmp_path):
    spoil, names = ADAPTERS[name]
    adapter = make_adapter(shutil.copytree(base, tmp_path / "base"), tmp_path / "adapter")
    spoil(adapter)
    assert_refused(call("unlearn", model=adapter), "unlearn", str(adapter), *names)


def test_an_adapter_can_be_trained_further(base, call, tmp_path, monkeypatch):
    """As a whole, and as another adapter, which then belongs to the first one and not to its base."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base, "base")
    first = make_adapter("base", tmp_path / "first")
    code, said, out = call("unlearn", "--max-steps", 3, "--learning-rate", 1e-2, model=first)
    assert code == 0, said
    before, after = (load_checkpoint(path)[0].state_dict() for path in (first, out))
    assert any(not torch.equal(value, after[name]) for name, value in before.items())
    shutil.rmtree(out)
    code, said, out = call("finetune", "--lora", "--save-adapter", "--learning-rate", 1e-9, model="first")
    assert code == 0, said
    monkeypatch.chdir("/")
    again = load_checkpoint(out)[0].state_dict()
    assert any(not torch.allclose(value, again[name]) for name, value in load_checkpoint(base)[0].state_dict().items())
    for name, value in before.items():
        torch.testing.assert_close(again[name], value, rtol=1e-4, atol=1e-5, msg=name)


# Flags.

UNLEARN_FLAGS = [
    ("--max-pixels 100", ["--max-pixels 100", "784"]),
    ("--max-pixels 0", ["--max-pixels 0"]),
    ("--lora --lora-targets q_proj", ["'q_proj'", "no linear layer", "model.language_model"]),
    ("--lora --lora-targets (q", ["'(q'", "regular expression"]),
    ("--lora --lora-targets .*", ["lm_head"]),
    ("--lora --lora-r 0", ["--lora-r is 0"]),
    ("--lora --lora-alpha 0", ["--lora-alpha is 0"]),
    ("--lora --lora-dropout 1", ["--lora-dropout is 1"]),
    ("--lora-r 4", ["--lora-r", "add --lora"]),
    ("--save-adapter", ["--save-adapter", "--lora"]),
    ("--cache-vision", ["--cache-vision", "--freeze-vision"]),
    ("--retain-floor 2", ["--retain-floor is 2"]),
    ("--learning-rate 0", ["--learning-rate is 0"]),
    ("--learning-rate -0.5", ["--learning-rate is -0.5"]),
    ("--learning-rate nan", ["--learning-rate is nan"]),
    ("--epochs inf", ["--epochs is inf"]),
    ("--save-steps 0", ["--save-steps is 0"]),
    ("--save-steps nan", ["--save-steps is nan"]),
    ("--accumulation 0", ["--accumulation is 0"]),
    ("--forget-per-step 0", ["--forget-per-step is 0"]),
    ("--schedule magic", ["'magic'", "interleaved, sequential"]),
    ("--dtype int8", ["'int8'", "bfloat16"]),
    ("--preset magic", ["'magic'", "open-unlearning"]),
    ("--model-preset magic", ["--model-preset magic", "lingshu-7b"]),
    ("--accelerate-config magic", ["--accelerate-config magic", "fsdp2"]),
    ("--report-to magic", ["magic", "tensorboard"]),
    ("--views /proc/nowhere/v.parquet --preset tiny-robust", None),
    ("--set optim=magic", ["magic", "adamw"]),
    ("--set optim=adamw_bnb_8bit", ["bitsandbytes"]),
    ("--set attn_implementation=flash_attention_2", ["'flash_attention_2'", "sdpa"]),
    ('--set lr_scheduler_kwargs={"slope":1}', ["slope"]),
    ("--set seed=1.5", ["seed is 1.5", "whole"]),
    ("--set pack_images=False", ["--set pack_images is 'False'", "true or false"]),
    ("--set max_grad_norm=abc", ["--set max_grad_norm is 'abc'", "a number"]),
    ("--set retain_floor=abc", ["--set retain_floor is 'abc'", "a number"]),
    ("--set data_seed=1", ["data_seed", "--seed"]),
    ("--set eval_steps=5", ["eval_steps", "--keep-best"]),
    ("--set trust_remote_code=true", ["trust_remote_code"]),
    ("--set save_total_limit=3", ["save_total_limit"]),
    ("--set selectivity_steps=NaN", ["--set selectivity_steps is NaN", "a number"]),
    ("--set lora_target_modules=5 --lora", ["--lora-targets '5'", "no linear layer"]),
    ("--set output_dir=y", ["output_dir"]),
    ("--set method_args={}", ["method_args"]),
    ("--set per_device_train_batch_size=3", ["per_device_train_batch_size", "--forget-per-step"]),
    ("--set packing=true", ["packing", "--no-packing"]),
    ("--set auto_find_batch_size=true", ["auto_find_batch_size"]),
    ("--set eval_strategy=steps", ["eval_strategy", "--keep-best"]),
    ("--set gradient_checkpointing=true", ["gradient_checkpointing", "activation_checkpointing"]),
    ("--set fsdp=full_shard", ["fsdp", "--accelerate-config"]),
    ("--set hub_token=hf_secret", ["hub_token", "hf auth login"]),
    ("--set speed=9", ["speed=9"]),
]


@pytest.mark.parametrize(("flags", "names"), UNLEARN_FLAGS)
def test_wrong_flags_of_unlearning(flags, names, call):
    answer = call("unlearn", *flags.split(" "))
    if names is None:
        code, said, _ = answer
        assert code == 1 and "--views /proc/nowhere/v.parquet: cannot write in /proc" in assert_one_line(
            said, "unlearn"
        )
    else:
        assert_refused(answer, "unlearn", *names)


@pytest.mark.parametrize("flags", ["--lora", "--keep-best", "--cache-vision", "--epochs 2", "--save-adapter"])
def test_flags_of_training_for_a_method_that_does_not_train(flags, call):
    assert_refused(call("unlearn", *flags.split(), method="manu"), "unlearn")


def test_a_model_preset_suits_a_method_that_does_not_train(call, base):
    code, said, out = call("unlearn", "--model-preset", "lingshu-7b", "--resume", method="manu", model=f"{base}/")
    assert code == 0, said
    assert json.loads((out / "medforget.json").read_text())["max_pixels"] == 448 * 448


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ("--keep-best", ["--keep-best", "finetune --help"]),
        ("--set keep_best=true", ["keep_best"]),
        ("--level patient", ["--level", "finetune --help"]),
        ("--preset magic", ["--preset magic", "mllmu-bench"]),
        ("--images-per-step 0", ["--images-per-step is 0"]),
        ("--save-adapter", ["--save-adapter", "--lora"]),
        ("--max-pixels 0", ["--max-pixels 0"]),
        ("--lora --lora-targets mlp", ["'mlp'"]),
    ],
)
def test_wrong_flags_of_fine_tuning(flags, names, call):
    assert_refused(call("finetune", *flags.split()), "finetune", *names)


def test_an_adapter_of_a_model_that_is_not_kept(data, tmp_path, capsys):
    argv = ["finetune", "--data", str(data), "--out", str(tmp_path / "out"), "--preset", "tiny", "--lora"]
    assert main([*argv, "--save-adapter"]) == 2
    assert "--save-adapter" in assert_one_line(capsys.readouterr().err, "finetune")
    assert list(tmp_path.iterdir()) == []


def test_a_reference_of_another_vocabulary(call, tmp_path):
    model, processor = tiny_model(["abc"], vocab_size=300)
    other = save_checkpoint(tmp_path / "other", model, processor, {})
    assert_refused(call("unlearn", "--reference", other), "unlearn", f"--reference {other}", "vocabulary")
