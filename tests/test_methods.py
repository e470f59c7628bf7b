import copy
import dataclasses
import math

import pytest
import torch
from stand_in import make_model, make_rows

import unlearn.methods
from medforget_dataset import UserError
from unlearn.answers import answer_logits
from unlearn.config import UnlearnConfig, resolve
from unlearn.methods import METHODS, AnswerBatch, GradientMethod, get_method, get_preset, make_method, method_arguments
from unlearn.methods.manu import EPSILON, channel_statistics, gated_mlps
from unlearn.packing import PackedCollator, RowCollator, group_by_image


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
    with pytest.raises(UserError, match="unknown method 'nppo'; choose from grad_diff, kl_min, manu, npo"):
        get_method("nppo")
    with pytest.raises(UserError, match="npo has no argument 'gamma'; it has beta"):
        make_method("npo", {"gamma": 1})
    with pytest.raises(UserError, match="kl_min has no preset 'big'; choose from paper, tiny"):
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
    return AnswerBatch(logits, log_probs(logits), row_index, flags, reference, log_probs(reference))


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


def paper_grad_diff(rows, reference_rows, forget_weight, retain_weight):
    return -forget_weight * mean_cross_entropy(rows, True) + retain_weight * mean_cross_entropy(rows, False)


def paper_kl_min(rows, reference_rows, forget_weight, kl_weight):
    divergences = []
    for (forget, current, _), (_, original, _) in zip(rows, reference_rows, strict=True):
        if not forget:
            divergences += (original.exp() * (original - current)).sum(-1).tolist()
    return -forget_weight * mean_cross_entropy(rows, True) + kl_weight * sum(divergences) / len(divergences)


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
    answers = AnswerBatch(logits, log_probs, row_index, batch["forget"], reference_logits, reference_log_probs)
    loss, components = make_method(name, arguments).loss(answers)

    of_rows, of_reference = float64_rows
    assert loss.item() == pytest.approx(formula(of_rows, of_reference, **arguments), rel=1e-4)
    assert components["forget_loss"].item() == pytest.approx(mean_cross_entropy(of_rows, True), rel=1e-4)
    assert components["retain_loss"].item() == pytest.approx(mean_cross_entropy(of_rows, False), rel=1e-4)


def test_npo_levels_off_and_does_not_overflow():
    batch = random_batch([True] * 6)
    at_reference = dataclasses.replace(batch, log_probs=batch.reference_log_probs)
    assert make_method("npo", {"beta": 0.5}).loss(at_reference)[0].item() == pytest.approx(4 * math.log(2))
    far_below = dataclasses.replace(batch, log_probs=batch.reference_log_probs - 500)
    far_above = dataclasses.replace(batch, log_probs=batch.reference_log_probs + 500)
    assert make_method("npo").loss(far_below)[0].item() == pytest.approx(0)
    assert make_method("npo").loss(far_above)[0].item() == pytest.approx(2 * 1000)


# MANU.


@pytest.fixture(scope="module")
def naive_importances(rows, grouped, model_and_processor):
    """The four importance functions from all activations, kept, of one float64 pass a row."""
    model, processor = model_and_processor
    model.double()
    mlps = gated_mlps(model)
    kept = {}
    current = {}
    handles = [
        mlp.down_proj.register_forward_pre_hook(lambda _, x, name=name: current.__setitem__(name, x[0]))
        for name, mlp in mlps.items()
    ]
    images_seen = set()
    for example in grouped:
        for row in example["rows"]:
            for with_image in (True, False):
                batch = RowCollator(processor, with_image=with_image)([{**example, "rows": [row]}])
                prompt = next(iter(RowCollator(processor, with_image=with_image)._prefix(torch.tensor([1, 4, 4]))))
                with torch.no_grad():
                    current.clear()
                    answer_logits(model, batch)
                for name, z in current.items():
                    key = (name, row["forget"], with_image)
                    if "visual" not in name:
                        kept.setdefault(key, []).append(z[0, len(prompt) :])
                    elif (example["key"], *key) not in images_seen:
                        images_seen.add((example["key"], *key))
                        kept.setdefault(key, []).append(z)
    for handle in handles:
        handle.remove()
    model.float()
    importances = {}
    for name in mlps:
        for forget in (True, False):
            m = torch.cat(kept[name, forget, True])
            t = torch.cat(kept[name, forget, False]) if (name, forget, False) in kept else torch.zeros_like(m)
            mean_m, mean_t = m.abs().mean(0), t.abs().mean(0)
            count_m, count_t = ((x.abs() > 0.1).sum(0) for x in (m, t))
            square_m, square_t = ((x**2).sum(0) for x in (m, t))
            importances[name, forget] = (
                (mean_m - mean_t).abs() / (mean_m + mean_t + EPSILON)
                + (count_m - count_t).abs() / (count_m + count_t + EPSILON)
                + (m.var(0, correction=0) + t.var(0, correction=0)).sqrt()
                + ((square_m - square_t).abs() / (square_m + square_t + EPSILON)).sqrt()
            )
    return importances


def test_manu_statistics_are_those_of_all_activations(naive_importances, grouped, model_and_processor):
    model, processor = model_and_processor
    forget, retain = channel_statistics(model.double(), processor, grouped, threshold=0.1)
    model.float()
    assert len(forget) == 4
    for flag, statistics in ((True, forget), (False, retain)):
        for name, of_mlp in statistics.items():
            torch.testing.assert_close(of_mlp.importance(), naive_importances[name, flag], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("alpha", [0.0, 3.0, 75.0])
def test_manu_zeroes_the_best_channels_and_nothing_else(alpha, naive_importances, grouped, model_and_processor):
    model, processor = copy.deepcopy(model_and_processor)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = make_method("manu", {"alpha": alpha}).edit(model, processor, grouped)

    names = list(gated_mlps(model))
    score = {n: naive_importances[n, True] / (naive_importances[n, False] + EPSILON) for n in names}
    ranked = sorted(((float(s), n, j) for n in names for j, s in enumerate(score[n])), reverse=True)
    expected = {(n, j) for _, n, j in ranked[: round(alpha / 100 * len(ranked))]}
    assert {(n, j) for n, channels in report["channels"].items() for j in channels} == expected
    assert (report["zeroed"], report["total"]) == (len(expected), len(ranked))

    for name in names:
        zeroed = torch.tensor([(name, j) in expected for j in range(len(score[name]))])
        for part in ("gate_proj.weight", "up_proj.weight", "gate_proj.bias", "up_proj.bias"):
            if f"{name}.{part}" in before:
                before[f"{name}.{part}"][zeroed] = 0
        before[f"{name}.down_proj.weight"][:, zeroed] = 0
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    if alpha == 75:
        assert any("visual" in name and channels for name, channels in report["channels"].items())
        assert any("visual" not in name and channels for name, channels in report["channels"].items())


@pytest.mark.parametrize(("forgotten", "missing"), [("all", "retain"), ("none", "forget")])
def test_manu_needs_rows_of_both_kinds(forgotten, missing, rows, model_and_processor):
    grouped = group_by_image(rows, rows if forgotten == "all" else ())
    with pytest.raises(UserError, match=f"no {missing} rows"):
        make_method("manu").edit(*model_and_processor, grouped)
