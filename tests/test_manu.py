"""MANU in both variants: its statistics, what it zeroes, what it keeps in memory, and its processes."""

import copy
import dataclasses
import gc
import json
import math
import os
import socket
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from stand_in import SMALL, make_model, make_rows

from medforget_dataset import UserError
from unlearn.answers import answer_logits
from unlearn.grouping import group_by_image
from unlearn.methods import make_method
from unlearn.methods._manu_released import MATRICES, row_sample
from unlearn.methods._manu_statistics import gated_mlps
from unlearn.methods.manu import EPSILON, channel_statistics
from unlearn.models import tiny_model
from unlearn.packing import RowCollator


pytestmark = pytest.mark.filterwarnings("error::FutureWarning")

LANGUAGE_LAYERS, VISION_LAYERS = 4, 5
DEEP = dataclasses.replace(SMALL, layers=LANGUAGE_LAYERS, vision_layers=VISION_LAYERS)


def make_grouped(rows):
    """Six images: one with forget and retain rows, one with forget rows only, four with retain rows only."""
    forget = [i for i in rows["id"] if "study003" in i or i.startswith("inst00/pat000/study000/findings")]
    return group_by_image(rows, forget)


def with_biases(model):
    """Biases, which a new model has at 0, so that it shows whether they are zeroed."""
    for name, value in model.named_parameters():
        if "mlp" in name and name.endswith("bias"):
            torch.nn.init.normal_(value, generator=torch.Generator().manual_seed(0))
    return model


def make_deep(rows):
    """More layers than the released code changes, and a unit beyond the size to which it clamps."""
    model, processor = tiny_model([*rows["question"], *rows["answer"]], vocab_size=400, config=DEEP)
    with torch.no_grad():
        model.model.language_model.layers[-1].mlp.up_proj.weight[7] *= 3000
    return with_biases(model), processor


@pytest.fixture(scope="module")
def rows():
    return make_rows()


@pytest.fixture(scope="module")
def grouped(rows):
    return make_grouped(rows)


@pytest.fixture(scope="module")
def shallow(rows):
    model, processor = make_model(rows)
    return with_biases(model), processor


@pytest.fixture(scope="module")
def deep(rows):
    return make_deep(rows)


def kept_activations(model, processor, grouped, modules, *, output):
    """What goes into or comes out of modules, kept, of one unpacked float64 pass a row: `{(name, forget, image): z}`.

    Of language modules those of the question and the answer; of vision modules those of each image once a kind.
    """
    model.double()
    current, kept, images_seen = {}, {}, set()
    handles = [
        module.register_forward_hook(
            lambda _, x, y, name=name: current.__setitem__(name, y.clone() if output else x[0].clone())
        )
        for name, module in modules.items()
    ]
    for example in grouped:
        for row in example["rows"]:
            for with_image in (True, False):
                collator = RowCollator(processor, with_image=with_image)
                batch = collator([{**example, "rows": [row]}])
                prefix, _ = collator._prefix(torch.tensor([1, 4, 4]))
                current.clear()
                with torch.no_grad():
                    answer_logits(model, batch)
                for name, z in current.items():
                    key = (name, row["forget"], with_image)
                    if "visual" not in name:
                        kept.setdefault(key, []).append(z[0, len(prefix) :])
                    elif (example["key"], *key) not in images_seen:
                        images_seen.add((example["key"], *key))
                        kept.setdefault(key, []).append(z)
    for handle in handles:
        handle.remove()
    model.float()
    return {key: torch.cat(parts) for key, parts in kept.items()}


def assert_only_zeroed(model, before, expected):
    """The rows `expected[name]`, a mask, of a parameter are 0, and everything else is as it was, to the bit."""
    for name, value in model.state_dict().items():
        wanted = before[name].clone()
        if name in expected:
            assert not before[name][expected[name]].eq(0).all() or not expected[name].any()
            wanted[expected[name]] = 0
        assert torch.equal(value, wanted), name


# The variant of the paper.


@pytest.fixture(scope="module")
def naive_importances(grouped, shallow):
    """The four importance functions from all activations."""
    model, processor = shallow
    mlps = gated_mlps(model)
    inputs = {name: mlp.down_proj for name, mlp in mlps.items()}
    kept = kept_activations(model, processor, grouped, inputs, output=False)
    importances = {}
    for name in mlps:
        for forget in (True, False):
            m = kept[name, forget, True]
            t = kept.get((name, forget, False), torch.zeros_like(m))
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


def test_statistics_are_those_of_all_activations(naive_importances, grouped, shallow):
    model, processor = shallow
    forget, retain = channel_statistics(model.double(), processor, grouped, threshold=0.1)
    model.float()
    assert len(forget) == 4
    for flag, statistics in ((True, forget), (False, retain)):
        for name, of_mlp in statistics.items():
            torch.testing.assert_close(of_mlp.importance(), naive_importances[name, flag], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("alpha", [0.0, 3.0, 75.0])
def test_the_best_channels_are_zeroed_and_nothing_else(alpha, naive_importances, grouped, shallow):
    model, processor = copy.deepcopy(shallow)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = make_method("manu", {"alpha": alpha}).edit(model, processor, grouped)

    names = list(gated_mlps(model))
    score = {n: naive_importances[n, True] / (naive_importances[n, False] + EPSILON) for n in names}
    ranked = sorted(((float(s), n, j) for n in names for j, s in enumerate(score[n])), reverse=True)
    best = ranked[: round(alpha / 100 * len(ranked))]
    assert {(n, j) for n, channels in result["channels"].items() for j in channels} == {(n, j) for _, n, j in best}
    for name, channels in result["channels"].items():
        assert result["scores"][name] == pytest.approx(score[name][channels].tolist(), rel=1e-3)
    in_vision = sum("visual" in n for _, n, _ in best)
    assert result["by_part"] == {"language": len(best) - in_vision, "vision": in_vision}
    assert (result["zeroed"], result["total"]) == (len(best), len(ranked))
    if alpha == 75:
        assert min(result["by_part"].values()) > 0

    expected = {}
    for name in names:
        zeroed = torch.tensor([any((n, j) == (name, i) for _, n, j in best) for i in range(len(score[name]))])
        for part in ("gate_proj.weight", "up_proj.weight", "gate_proj.bias", "up_proj.bias"):
            expected[f"{name}.{part}"] = zeroed
        down = f"{name}.down_proj.weight"
        expected[down] = zeroed.expand(len(before[down]), -1)
    assert_only_zeroed(model, before, expected)


# The variant of the released code.


@pytest.fixture(scope="module")
def naive_scores(grouped, deep):
    """Score of each unit of each matrix of each part, from the outputs of that matrix in all layers, kept."""
    model, processor = deep
    chosen = row_sample(grouped)
    sample = grouped.map(lambda e: {"rows": [r for r in e["rows"] if r["id"] in chosen]})
    matrices = {f"{n}.{m}": getattr(mlp, m) for n, mlp in gated_mlps(model).items() for m in MATRICES}
    kept = kept_activations(model, processor, sample, matrices, output=True)
    beyond = kept[[n for n in matrices if "language_model" in n and n.endswith("up_proj")][-1], True, False].abs()[
        :, 7
    ]
    assert (beyond > 1000).any() and (beyond < 1000).any()
    scores = {}
    for part, with_image in (("visual", True), ("language_model", False)):
        for matrix in MATRICES:
            measures = {}
            for forget in (True, False):
                layers = [n for n in matrices if part in n and n.endswith(matrix)]
                z = torch.cat([kept[n, forget, with_image] for n in layers]).clamp(-1000, 1000)
                measures[forget] = (z.abs().mean(0), z.std(0), (z**2).mean(0).sqrt())
            pairs = zip(measures[True], measures[False], strict=True)
            scores[part, matrix] = sum(2 * (f / (r + 1e-5) - 1) for f, r in pairs)
    return scores


def named_layers(model, part):
    return [name for name in gated_mlps(model) if part in name]


@pytest.mark.parametrize("alpha", [0.0, 2.0, 40.0, 100.0])
def test_released_code_zeroes_the_best_units_of_the_last_layers(alpha, naive_scores, grouped, deep):
    model, processor = copy.deepcopy(deep)
    model.double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = make_method("manu", {"variant": "released", "alpha": alpha}).edit(model, processor, grouped)

    expected, total, by_part = {}, 0, {}
    for part in ("language_model", "visual"):
        # As there: one list of all units of the named layers, cut at the score of the last one allowed, ties included.
        listed = {(n, m): naive_scores[part, m] for n in named_layers(model, part)[-3:] for m in MATRICES}
        ranked = torch.cat(list(listed.values())).sort(descending=True).values
        allowed = int(alpha / 100 * len(ranked))
        threshold = ranked[allowed - 1] if allowed else math.inf
        masks = {f"{layer}.{matrix}": score >= threshold for (layer, matrix), score in listed.items()}
        total += len(ranked)
        by_part["vision" if part == "visual" else "language"] = sum(int(mask.sum()) for mask in masks.values())
        expected |= masks
    assert result["channels"] == {n: m.nonzero()[:, 0].tolist() for n, m in expected.items()}
    assert (result["zeroed"], result["total"], result["by_part"]) == (sum(by_part.values()), total, by_part)
    if alpha == 40:
        assert min(by_part.values()) > 0
    for name, channels in result["channels"].items():
        key = ("visual" if "visual" in name else "language_model", name.rpartition(".")[2])
        assert result["scores"][name] == pytest.approx(naive_scores[key][channels].tolist(), rel=1e-6, abs=1e-9)
    assert_only_zeroed(model, before, {f"{n}.{p}": m for n, m in expected.items() for p in ("weight", "bias")})


def test_released_code_uses_no_more_retain_rows_than_forget_rows(grouped):
    kind = {row["id"]: row["forget"] for example in grouped for row in example["rows"]}
    chosen = row_sample(grouped)
    assert {name for name in kind if kind[name]} <= chosen
    assert sum(not kind[name] for name in chosen) == sum(kind.values()) == 12
    few_retained = group_by_image(make_rows(1, 1), [name for name in kind if "study000/findings" not in name][:6])
    assert len(row_sample(few_retained)) == 9


# What is asked of both.


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_one_pass_over_the_images(variant, grouped, deep):
    model, processor = copy.deepcopy(deep)
    passes = {"language": 0, "vision": 0}

    def count(part):
        return lambda *_: passes.__setitem__(part, passes[part] + 1)

    model.model.language_model.register_forward_pre_hook(count("language"))
    model.model.visual.register_forward_pre_hook(count("vision"))
    make_method("manu", {"variant": variant}).edit(model, processor, grouped)
    chosen = row_sample(grouped)
    images = sum(any(row["id"] in chosen for row in example["rows"]) for example in grouped)
    # The released code scores the vision tower on images only, and the language model on text only.
    assert passes == ({"language": 12, "vision": 6} if variant == "paper" else {"language": images, "vision": images})


def live_bytes(widths):
    """Bytes of all tensors in memory whose last dimension is one of `widths`, but parameters; each storage once."""
    tensors = [o for o in gc.get_objects() if type(o) is torch.Tensor and o.ndim and o.shape[-1] in widths]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_memory_does_not_grow_with_rows(grouped, shallow):
    """When a forward pass comes to its end, its own activations and those of all before it are gone: sums are left."""
    model, processor = copy.deepcopy(shallow)
    mlps = gated_mlps(model)
    widths = {mlp.down_proj.in_features for mlp in mlps.values()}
    channels = sum(mlp.down_proj.in_features for mlp in mlps.values())
    gc.collect()
    before = live_bytes(widths)
    measured = []
    model.lm_head.register_forward_pre_hook(lambda *_: measured.append(live_bytes(widths) - before))
    channel_statistics(model, processor, grouped.select([0, 3, 4]), threshold=0.1)
    # Four sums for each channel, of rows of each kind, with image and without; three images, with image and without.
    assert measured == [4 * channels * 2 * 2 * torch.float64.itemsize] * 6


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize(("forgotten", "missing"), [("all", "retain"), ("none", "forget")])
def test_rows_of_both_kinds_are_needed(variant, forgotten, missing, rows, shallow):
    grouped = group_by_image(rows, rows if forgotten == "all" else ())
    with pytest.raises(UserError, match=f"no {missing} rows"):
        make_method("manu", {"variant": variant}).edit(*shallow, grouped)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variant": "theirs"}, "manu: variant is 'theirs'; it must be 'paper' or 'released'"),
        ({"alpha": -0.1}, "manu: alpha is -0.1; it must be between 0 and 100 per cent"),
        ({"alpha": 100.5, "variant": "released"}, "manu: alpha is 100.5; it must be between 0 and 100 per cent"),
        ({"alpha": math.nan}, "manu: alpha is nan; it must be between 0 and 100 per cent"),
        ({"threshold": -1.0}, "manu: threshold is -1.0; it must be 0 or more"),
    ],
)
def test_mistakes_are_named_in_one_line(arguments, message):
    with pytest.raises(UserError) as raised:
        make_method("manu", arguments)
    assert str(raised.value) == message


# Two processes.


def edit_both_ways(folder):
    """Apply both variants to five images and write what came of it, and which images this process saw."""
    torch.set_num_threads(1)
    state = PartialState(cpu=True)
    rows = make_rows()
    grouped = make_grouped(rows).select(range(5))
    result = {"world": state.num_processes}
    for variant in ("paper", "released"):
        model, processor = make_deep(rows)
        seen = set()
        model.model.visual.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.add(float(inputs[0].sum())))
        edited = make_method("manu", {"variant": variant, "alpha": 10.0}).edit(model, processor, grouped)
        parameters = {name: float(value.detach().double().abs().sum()) for name, value in model.named_parameters()}
        result[variant] = {**edited, "seen": sorted(seen), "parameters": parameters}
    Path(folder, f"{state.process_index}.json").write_text(json.dumps(result))
    state.destroy_process_group()


def process_of_two(rank, port, folder):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    edit_both_ways(folder)


@pytest.mark.slow
def test_two_processes_are_as_one(tmp_path):
    (tmp_path / "two").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(process_of_two, (port, str(tmp_path / "two")), nprocs=2)
    threads = torch.get_num_threads()
    edit_both_ways(tmp_path)
    torch.set_num_threads(threads)
    alone = json.loads((tmp_path / "0.json").read_text())
    processes = [json.loads((tmp_path / "two" / f"{rank}.json").read_text()) for rank in range(2)]
    assert alone["world"] == 1
    for process in processes:
        assert process["world"] == 2
    for variant in ("paper", "released"):
        one, (first, second) = alone[variant], (process[variant] for process in processes)
        assert first["seen"] and second["seen"]
        assert not set(first["seen"]) & set(second["seen"])
        assert sorted(first["seen"] + second["seen"]) == one["seen"]
        assert one["zeroed"] > 0
        for process in (first, second):
            for name in ("zeroed", "total", "by_part", "channels", "parameters"):
                assert process[name] == one[name]
            for name, scores in one["scores"].items():
                assert process["scores"][name] == pytest.approx(scores, rel=1e-9)
