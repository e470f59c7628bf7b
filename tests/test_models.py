import json
from pathlib import Path

import pytest
import torch
import trl
from PIL import Image
from safetensors.torch import load_file
from stand_in import SMALL, make_model, make_rows
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2Config, Qwen2ForCausalLM

from medforget_dataset import UserError
from unlearn.checkpoints import CHECKPOINT_INFO, load_checkpoint, save_checkpoint
from unlearn.models import CHAT_TEMPLATE, SPECIAL_TOKENS, tiny_model


pytestmark = pytest.mark.filterwarnings("error::FutureWarning")


@pytest.fixture(scope="module")
def model_and_processor():
    return make_model(make_rows())


@pytest.fixture
def checkpoint(tmp_path, model_and_processor):
    return save_checkpoint(tmp_path / "checkpoint", *model_and_processor, {"level": "patient"})


def test_default_size_is_under_a_million_parameters():
    model, processor = tiny_model([f"There is an opacity of {n} mm in the left lower lobe." for n in range(100)])
    assert 600_000 < sum(p.numel() for p in model.parameters()) < 1_000_000
    assert len(processor.tokenizer) <= 1024


def test_chat_template_is_that_of_qwen():
    ours_is_upstreams = Path(trl.__file__).parent / "chat_templates" / "qwen2_5_vl.jinja"
    assert ours_is_upstreams.read_text() == CHAT_TEMPLATE


def test_tokenizer_splits_digits_and_keeps_special_tokens_whole(model_and_processor):
    tokenizer = model_and_processor[1].tokenizer
    assert tokenizer.tokenize("S00123") == ["S", "0", "0", "1", "2", "3"]
    for token in SPECIAL_TOKENS:
        assert tokenizer(token)["input_ids"] == [tokenizer.convert_tokens_to_ids(token)]
    text = "Ωmega\n naïve [blank]; 12 mm"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("image_size", [28, 56, 84, 448])
def test_every_square_image_gets_the_same_size(image_size):
    _, processor = tiny_model(["a"], image_size=image_size, config=SMALL)
    for side in (14, 28, 56, 100, 112, 224, 300, 448, 1000):
        features = processor.image_processor(images=[Image.new("RGB", (side, side))], return_tensors="pt")
        assert features["image_grid_thw"].tolist() == [[1, image_size // 14, image_size // 14]]


@pytest.mark.parametrize("image_size", [0, 50, -28])
def test_image_size_must_be_a_multiple_of_28(image_size):
    with pytest.raises(UserError, match=f"image_size is {image_size}.*multiple of 28"):
        tiny_model(["a"], image_size=image_size)


def test_same_seed_same_model_and_the_global_generator_is_left_alone():
    rows = make_rows()
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    (first, tokens), (second, same_tokens), (third, _) = (make_model(rows, seed=seed) for seed in (0, 0, 1))
    assert torch.rand(1) == expected
    assert tokens.tokenizer.get_vocab() == same_tokens.tokenizer.get_vocab()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.lm_head.weight, third.lm_head.weight)


def test_checkpoint_round_trip(checkpoint, model_and_processor):
    model, processor = model_and_processor
    for loaded, loaded_processor in (
        load_checkpoint(checkpoint),
        (AutoModelForImageTextToText.from_pretrained(checkpoint), AutoProcessor.from_pretrained(checkpoint)),
    ):
        assert type(loaded) is type(model)
        assert type(loaded_processor) is type(processor)
        assert loaded_processor.chat_template == processor.chat_template
        assert loaded.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())
        assert not loaded.generation_config.do_sample
        assert loaded.generation_config.eos_token_id == processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    info = json.loads((checkpoint / CHECKPOINT_INFO).read_text())
    assert info["level"] == "patient"
    assert info["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert not list(checkpoint.glob("*.bin"))


def test_checkpoint_is_replaced_whole(checkpoint, model_and_processor):
    (checkpoint / "stale").touch()
    save_checkpoint(checkpoint, *model_and_processor, {"level": "study"})
    assert not (checkpoint / "stale").exists()
    assert json.loads((checkpoint / CHECKPOINT_INFO).read_text())["level"] == "study"
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]


def test_checkpoint_survives_a_failed_write(checkpoint, model_and_processor, monkeypatch):
    def fail(self, path):
        raise OSError("No space left on device")

    model, processor = model_and_processor
    monkeypatch.setattr(type(processor), "save_pretrained", fail)
    before = load_file(checkpoint / "model.safetensors")
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(checkpoint, model, processor, {})
    assert load_file(checkpoint / "model.safetensors").keys() == before.keys()
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]


def test_other_folders_are_not_overwritten(tmp_path, model_and_processor):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="something else"):
        save_checkpoint(tmp_path, *model_and_processor, {})
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("path", ["no/such/folder", "runs", "/no/such"])
def test_missing_folder(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"{path}: no such checkpoint"):
        load_checkpoint(path)


def test_missing_processor(checkpoint):
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (checkpoint / name).unlink()
    with pytest.raises(UserError, match=f"{checkpoint}: .*processor"):
        load_checkpoint(checkpoint)


def test_text_model_is_refused(tmp_path):
    config = Qwen2Config(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path}: not an image-text-to-text model"):
        load_checkpoint(tmp_path)


def test_weights_cut_short(checkpoint):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=f"{checkpoint}: .*cut short"):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize("in_index", [True, False])
def test_missing_shard(tmp_path, model_and_processor, in_index):
    model, processor = model_and_processor
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    processor.save_pretrained(tmp_path)
    last = sorted(tmp_path.glob("*.safetensors"))[-1]
    if not in_index:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v != last.name}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    last.unlink()
    with pytest.raises(UserError, match=str(tmp_path)):
        load_checkpoint(tmp_path)
