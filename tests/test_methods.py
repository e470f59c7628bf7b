import dataclasses
import math

import pytest
import torch
from stand_in import make_model, make_rows

import unlearn.methods
from medforget_dataset import UserError
from unlearn.answers import answer_logits
from unlearn.config import UnlearnConfig, resolve
from unlearn.grouping import group_by_image
from unlearn.methods import METHODS, AnswerBatch, GradientMethod, get_method, get_preset, make_method, method_arguments
from unlearn.packing import PackedCollator, RowCollator


pytestmark = pytest.mark.filterwarnings("error::FutureWarning")

GRADIENT_METHODS = [name for name, method in METHODS.items() if issubclass(method, GradientMethod)]


@pytest.fixture(scope="module")
def rows():
    return make_rows()


@pytest.fixture(scope="module")
def grouped(rows):
    """Six images: one with forget and retain rows, one with forget rows only, four with retain rows only."""
    forget = [i for i in rows["id"] if "study003" in i or i.startswith("inst00/pat000/study000/findings")]
    return group_by_image(rows, forget)


@pytest.fixture(scope="module")
def model_and_processor(rows):
    """With biases, which a new model has at 0, so that it shows whether they are zeroed."""
    model, processor = make_model(rows)
    for name, value in model.named_parameters():
        if "mlp" in name and name.endswith("bias"):
            torch.nn.init.normal_(value, generator=torch.Generator().manual_seed(0))
    return model, processor


@pytest.fixture(scope="module")
def reference(rows):
    return make_model(rows, seed=1)[0]


# What holds for every method.


@pytest.mark.parametrize("name", METHODS)
def test_every_method_documents_itself(name):
    method = METHODS[name]
    assert method.name == name
    assert method.title
    assert dataclasses.is_dataclass(method) and method.__dataclass_params__.frozen
    for argument, field in method_arguments(name).items():
        assert field.metadata["help"] and field.metadata["source"], argument
        assert f"{argument} (" in method.__doc__
    training_arguments = {field.name for field in dataclasses.fields(UnlearnConfig)}
    assert not training_arguments & method_arguments(name).keys()
    assert {"tiny", "tiny-robust"} <= method.presets.keys()


@pytest.mark.parametrize(("name", "preset"), [(name, preset) for name in METHODS for preset in METHODS[name].presets])
def test_every_preset_is_valid(name, preset):
    needs_path = get_preset(name, preset).get("reference", "") is None
    if needs_path:
        with pytest.raises(UserError, match="--reference PATH"):
            resolve(name, preset)
    method, training = resolve(name, preset, **({"reference": "some/folder"} if needs_path else {}))
    assert isinstance(method, METHODS[name])
    if method.uses_gradients:
        config = UnlearnConfig(method=name, method_args=dataclasses.asdict(method), use_cpu=True, **training)
        assert config.make_method() == method


def test_mistakes_are_named():
    with pytest.raises(UserError, match=f"unknown method 'nppo'; choose from {', '.join(METHODS)}"):
        get_method("nppo")
    with pytest.raises(UserError, match="npo has no argument 'gamma'; it has beta"):
        make_method("npo", {"gamma": 1})
    with pytest.raises(UserError, match="kl_min has no preset 'big'; choose from paper, open-unlearning"):
        get_preset("kl_min", "big")
    with pytest.raises(UserError, match="npo has no argument 'learning_rat'"):
        resolve("npo", learning_rat=1)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("npo", {"beta": 0}),
        ("npo", {"log_ratio": "median"}),
        ("npo", {"retain_weight": -1}),
        ("grad_diff", {"forget_weight": -0.1}),
        ("kl_min", {"kl_weight": math.nan}),
        ("manu", {"alpha": 101}),
    ],
)
def test_values_out_of_range_are_named(name, arguments):
    (argument, value), *_ = arguments.items()
    with pytest.raises(UserError, match=f"{name}: {argument} is {value!r}; it must be"):
        make_method(name, arguments)


def test_a_new_file_is_a_new_method(tmp_path, monkeypatch):
    (tmp_path / "ascent.py").write_text(
        "from dataclasses import dataclass\n"
        "from unlearn.methods import GradientMethod\n"
        "@dataclass(frozen=True)\n"
        "class Ascent(GradientMethod):\n"
        "    name = 'ascent'\n"
        "    title = 'Gradient ascent'\n"
        "    def loss(self, batch):\n"
        "        return -batch.cross_entropy(forget=True), {}\n"
    )
    monkeypatch.setattr(unlearn.methods, "__path__", [*unlearn.methods.__path__, str(tmp_path)])
    found = unlearn.methods._find_methods()
    assert found.keys() == METHODS.keys() | {"ascent"}
    assert found["ascent"]().uses_gradients


def random_batch(forget, seed=0):
    """Two tokens for each of six rows, over a vocabulary of 7; the leaf of its graph is `logits`."""
    generator = torch.Generator().manual_seed(seed)
    logits, reference = torch.randn(2, 12, 7, generator=generator, dtype=torch.float64)
    targets = torch.randint(7, (12,), generator=generator)
    row_index = torch.arange(6).repeat_interleave(2)
    logits.requires_grad_()

    def log_probs(values):
        return values.log_softmax(-1).gather(1, targets[:, None])[:, 0]

    flags = torch.tensor(forget)
    return AnswerBatch(log_probs(logits), row_index, flags, logits, reference, log_probs(reference))


@pytest.mark.parametrize("name", GRADIENT_METHODS)
def test_each_kind_of_row_has_its_own_gradient(name):
    """Rows of one kind do not change the gradient of the other, and a batch of one kind gives that kind's alone."""
    mixed, forget_only, retain_only = ([True] * 3 + [False] * 3), [True] * 3, [False] * 3
    gradients = {}
    for kind, flags in {"mixed": mixed, "forget": forget_only, "retain": retain_only}.items():
        batch = random_batch(mixed)
        tokens = slice(6, 12) if kind == "retain" else slice(0, 6) if kind == "forget" else slice(0, 12)
        part = AnswerBatch(
            logits=batch.logits[tokens],
            log_probs=batch.log_probs[tokens],
            row_index=batch.row_index[tokens] - batch.row_index[tokens][0],
            forget=torch.tensor(flags),
            reference_logits=batch.reference_logits[tokens],
            reference_log_probs=batch.reference_log_probs[tokens],
        )
        loss, components = make_method(name).loss(part)
        assert loss.isfinite() and all(value.isfinite() for value in components.values())
        loss.backward()
        gradients[kind] = batch.logits.grad
    torch.testing.assert_close(gradients["mixed"][:6], gradients["forget"][:6])
    torch.testing.assert_close(gradients["mixed"][6:], gradients["retain"][6:])
    assert gradients["forget"][:6].abs().max() > 0
    assert gradients["retain"][6:].abs().max() > 0


# The paper's formulas, computed in float64 from separate, unpacked rows.


def separate_rows(model, processor, examples):
    """For every row by itself, its forget flag and the log-distributions `(tokens, V)` and tokens of its answer."""
    collator = RowCollator(processor)
    model.double()
    rows = []
    for example in examples:
        for row in example["rows"]:
            logits, targets, _ = answer_logits(model, collator([{**example, "rows": [row]}]))
            rows.append((row["forget"], logits.detach().log_softmax(-1), targets))
    model.float()
    return rows


@pytest.fixture(scope="module")
def examples(grouped):
    return [grouped[0], grouped[3], grouped[4]]


@pytest.fixture(scope="module")
def float64_rows(examples, model_and_processor, reference):
    model, processor = model_and_processor
    return separate_rows(model, processor, examples), separate_rows(reference, processor, examples)


def mean_cross_entropy(rows, forget):
    losses = [-float(dist[i, token]) for flag, dist, y in rows if flag == forget for i, token in enumerate(y)]
    return sum(losses) / len(losses)


def sums_in_rows(rows, forget):
    """Mean over rows of the cross-entropy summed over a row's tokens."""
    sums = [-sum(float(dist[i, token]) for i, token in enumerate(y)) for flag, dist, y in rows if flag == forget]
    return sum(sums) / len(sums)


def paper_grad_diff(rows, reference_rows, forget_weight, retain_weight, reduction="token_mean"):
    cross_entropy = sums_in_rows if reduction == "row_sum" else mean_cross_entropy
    return -forget_weight * cross_entropy(rows, True) + retain_weight * cross_entropy(rows, False)


def paper_kl_min(rows, reference_rows, forget_weight, kl_weight, retain_weight=0.0, kl_reduction="token_mean"):
    of_rows = [
        (original.exp() * (original - current)).sum(-1).tolist()
        for (forget, current, _), (_, original, _) in zip(rows, reference_rows, strict=True)
        if not forget
    ]
    count = len(of_rows) if kl_reduction == "row_sum" else sum(len(row) for row in of_rows)
    divergence = sum(sum(row) for row in of_rows) / count
    losses = -forget_weight * mean_cross_entropy(rows, True) + retain_weight * mean_cross_entropy(rows, False)
    return losses + kl_weight * divergence


def paper_npo(rows, reference_rows, beta, retain_weight, log_ratio, reference="initial"):
    terms = []
    for (forget, current, y), (_, original, _) in zip(rows, reference_rows, strict=True):
        if forget:
            log_ratios = [float(current[i, token] - original[i, token]) for i, token in enumerate(y)]
            ratio = math.exp(sum(log_ratios) / (len(y) if log_ratio == "mean" else 1))
            terms.append(math.log(1 + ratio**beta))
    return 2 / beta * sum(terms) / len(terms) + retain_weight * mean_cross_entropy(rows, False)


@pytest.mark.parametrize(
    ("name", "arguments", "formula"),
    [
        ("grad_diff", {"forget_weight": 1.0, "retain_weight": 1.0}, paper_grad_diff),
        ("grad_diff", {"forget_weight": 0.2, "retain_weight": 3.0}, paper_grad_diff),
        ("kl_min", {"forget_weight": 1.0, "kl_weight": 1.0}, paper_kl_min),
        ("kl_min", {"forget_weight": 0.2, "kl_weight": 2.0}, paper_kl_min),
        ("grad_diff", {"forget_weight": 0.2, "retain_weight": 3.0, "reduction": "row_sum"}, paper_grad_diff),
        (
            "kl_min",
            {"forget_weight": 0.2, "kl_weight": 2.0, "retain_weight": 1.0, "kl_reduction": "row_sum"},
            paper_kl_min,
        ),
        ("npo", {"beta": 0.9, "retain_weight": 0.0, "log_ratio": "sum", "reference": "path"}, paper_npo),
        ("npo", {"beta": 0.1, "retain_weight": 1.0, "log_ratio": "sum"}, paper_npo),
        ("npo", {"beta": 0.5, "retain_weight": 2.0, "log_ratio": "mean"}, paper_npo),
    ],
)
def test_losses_are_the_papers(name, arguments, formula, examples, float64_rows, model_and_processor, reference):
    model, processor = model_and_processor
    batch = PackedCollator(processor)(examples)
    logits, targets, row_index = answer_logits(model, batch)
    reference_logits = answer_logits(reference, batch)[0].detach()
    log_probs, reference_log_probs = (
        x.log_softmax(-1).gather(1, targets[:, None])[:, 0] for x in (logits, reference_logits)
    )
    answers = AnswerBatch(log_probs, row_index, batch["forget"], logits, reference_logits, reference_log_probs)
    loss, _ = make_method(name, arguments).loss(answers)

    of_rows, of_reference = float64_rows
    assert loss.item() == pytest.approx(formula(of_rows, of_reference, **arguments), rel=1e-4)
    for forget in (True, False):
        assert answers.cross_entropy(forget).item() == pytest.approx(mean_cross_entropy(of_rows, forget), rel=1e-4)


def test_npo_levels_off_and_does_not_overflow():
    batch = random_batch([True] * 6)
    at_reference = dataclasses.replace(batch, log_probs=batch.reference_log_probs)
    assert make_method("npo", {"beta": 0.5}).loss(at_reference)[0].item() == pytest.approx(4 * math.log(2))
    far_below = dataclasses.replace(batch, log_probs=batch.reference_log_probs - 500)
    far_above = dataclasses.replace(batch, log_probs=batch.reference_log_probs + 500)
    assert make_method("npo").loss(far_below)[0].item() == pytest.approx(0)
    assert make_method("npo").loss(far_above)[0].item() == pytest.approx(2 * 1000)
