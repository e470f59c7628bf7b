"""
Every gradient method, on the whole model or an adapter, packed or in rows, in one batch or four: the loss and the
gradients of a step are those of the paper's formulas over separate rows, which the processor prepares, in float64.
"""

import copy
import itertools

import datasets
import pytest
import torch
from stand_in import make_model, make_rows

from unlearn.config import UnlearnConfig
from unlearn.grouping import group_by_image
from unlearn.methods import METHODS, GradientMethod
from unlearn.trainer import UnlearnTrainer


pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

GRADIENT_METHODS = [name for name, method in METHODS.items() if issubclass(method, GradientMethod)]
OPTIONS = {
    "grad_diff": {"forget_weight": 0.3, "retain_weight": 2.0},
    "kl_min": {"forget_weight": 0.4, "kl_weight": 3.0, "retain_weight": 0.5},
    "npo": {"beta": 0.7, "retain_weight": 0.6},
}
# The adapter is on the output projection too, whose gradient is the largest.
TARGETS = r".*language_model.*\.(q_proj|v_proj|o_proj|down_proj)"


@pytest.fixture(scope="module")
def rows():
    return make_rows()


@pytest.fixture(scope="module")
def grouped(rows):
    """Images with different numbers of rows: some with rows of both kinds, some with one."""
    forget = [i for i in rows["id"] if "study003" in i or "study001/findings" in i or "study004/impression" in i]
    grouped = group_by_image(rows, forget)
    return grouped.map(lambda example, i: {"rows": example["rows"][i % 3 :]}, with_indices=True)


def make_trainer(tmp_path, rows, grouped, method, *, lora, pack, accumulation, **arguments):
    model, processor = make_model(rows)
    config = UnlearnConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        disable_tqdm=True,
        method=method,
        method_args=OPTIONS.get(method),
        use_peft=lora,
        lora_dropout=0.0,
        lora_target_modules=TARGETS,
        pack_images=pack,
        forget_per_step=4 // accumulation,
        retain_per_step=0,
        gradient_accumulation_steps=accumulation,
        **arguments,
    )
    trainer = UnlearnTrainer(model, config, grouped, processor)
    # At the start model and reference are one, and a divergence from it has no gradient.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in trainer.model.named_parameters():
            if p.requires_grad and (not lora or "lora_B" in name):
                p += 0.02 * torch.randn(p.shape, generator=generator)
    return trainer


def gradients_of(trainer):
    """Loss and gradients of the trainer's first step."""
    accumulation = trainer.args.gradient_accumulation_steps
    samples, totals = trainer.get_batch_samples(
        iter(trainer.get_train_dataloader()), accumulation, torch.device("cpu")
    )
    assert len(samples) == accumulation
    loss = sum(trainer.training_step(trainer.model, batch, totals) for batch in samples)
    return loss.item(), {n: p.grad for n, p in trainer.model.named_parameters() if p.requires_grad}


def answer_distributions(model, processor, example, row):
    """Log-distributions `(tokens, V)` at the answer of one row, and its tokens, from what the processor prepares."""
    content = [{"type": "image"}, {"type": "text", "text": row["question"]}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    prompt = processor(text=[text], images=[example["image"]], return_tensors="pt")
    answer = processor.tokenizer(row["answer"] + "<|im_end|>", return_tensors="pt")["input_ids"][0]
    inputs = dict(prompt)
    inputs["input_ids"] = torch.cat([prompt["input_ids"], answer[None]], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == processor.image_token_id).int()
    logits = model(**inputs).logits[0, -len(answer) - 1 : -1]
    return logits.log_softmax(-1), answer


def grad_diff(terms, forget_weight, retain_weight):
    return -forget_weight * cross_entropy(terms[True]) + retain_weight * cross_entropy(terms[False])


def kl_min(terms, forget_weight, kl_weight, retain_weight):
    divergences = [(original.exp() * (original - current)).sum(-1) for _, _, current, original in terms[False]]
    loss = -forget_weight * cross_entropy(terms[True]) + retain_weight * cross_entropy(terms[False])
    return loss + kl_weight * (torch.cat(divergences).mean() if divergences else 0)


def npo(terms, beta, retain_weight):
    ratios = [(current.sum() - original.sum()).exp() for current, original, _, _ in terms[True]]
    mean = sum(torch.log(1 + ratio**beta) for ratio in ratios) / max(len(ratios), 1)
    return 2 / beta * mean + retain_weight * cross_entropy(terms[False])


FORMULAS = {"grad_diff": grad_diff, "kl_min": kl_min, "npo": npo}


def cross_entropy(rows):
    return -torch.cat([answer for answer, *_ in rows]).mean() if rows else torch.tensor(0.0)


def naive(method, model, reference, processor, examples):
    """The paper's loss over separate rows, each with log-probabilities and log-distributions, now and originally."""
    terms = {True: [], False: []}
    for example, row in ((image, row) for image in examples for row in image["rows"]):
        current, answer = answer_distributions(model, processor, example, row)
        with torch.no_grad():
            original, _ = answer_distributions(reference, processor, example, row)
        index = torch.arange(len(answer))
        terms[row["forget"]].append((current[index, answer], original[index, answer], current, original))
    return FORMULAS[method](terms, **OPTIONS[method])


def expected_of(trainer, rows, grouped, lora):
    """Loss and gradients of the trainer's first step, computed independently in float64."""
    processor = trainer.processing_class
    initial = make_model(rows)[0].double().eval()
    images = list(itertools.chain(*itertools.islice(trainer.batches, trainer.args.gradient_accumulation_steps)))
    decoded = grouped.select(images).cast_column("image", datasets.Image())
    model = copy.deepcopy(trainer.model).double().eval()
    # TRL's patched forward, which the copy would share, computes with the weights of the original.
    del (model.get_base_model() if lora else model).__dict__["forward"]
    loss = naive(trainer.method.name, model, initial, processor, decoded)
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def assert_close(found, expected):
    (loss, gradients), (wanted_loss, wanted) = found, expected
    assert loss == pytest.approx(wanted_loss, rel=1e-4, abs=1e-5)
    scale = max(g.norm() for g in wanted.values() if g is not None)
    assert scale > 1e-3
    for name, gradient in gradients.items():
        if wanted[name] is None:
            assert gradient is None or gradient.norm() == 0, name
            continue
        assert (gradient.double() - wanted[name]).norm() < 1e-3 * wanted[name].norm() + 1e-5 * scale, name


def test_every_method_has_its_formula_here():
    assert FORMULAS.keys() == OPTIONS.keys() == set(GRADIENT_METHODS)


CASES = list(itertools.product([False, True], [True, False], [1, 4]))


@pytest.mark.parametrize(("lora", "pack", "accumulation"), CASES, ids=lambda value: str(value))
@pytest.mark.parametrize("method", GRADIENT_METHODS)
def test_a_step_is_the_papers_formula(method, lora, pack, accumulation, tmp_path, rows, grouped):
    trainer = make_trainer(tmp_path, rows, grouped, method, lora=lora, pack=pack, accumulation=accumulation)
    expected = expected_of(trainer, rows, grouped, lora)
    assert_close(gradients_of(trainer), expected)


@pytest.mark.parametrize("kind", ["forget", "retain"])
@pytest.mark.parametrize("method", GRADIENT_METHODS)
def test_with_rows_of_one_kind_the_gradient_is_that_kinds_alone(method, kind, tmp_path, rows, grouped):
    """One kind is missing from the step: what is left is the formula without its term."""
    trainer = make_trainer(tmp_path, rows, grouped, method, lora=False, pack=True, accumulation=1)
    only = grouped.map(lambda e: {"rows": [{**row, "forget": kind == "forget"} for row in e["rows"]]})
    trainer.train_dataset = only
    if method == "npo":
        # Known for the rows that were to be forgotten; here others are.
        trainer.data_collator.reference_log_probs = None
        trainer.reference = make_model(rows)[0].eval()
    expected = expected_of(trainer, rows, only, lora=False)
    assert_close(gradients_of(trainer), expected)
