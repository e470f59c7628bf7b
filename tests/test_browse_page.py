"""`medforget browse` as a person uses it: the real command, headless Chromium, clicks."""

import json
import re
import shutil

import pyarrow.parquet as pq
import pytest
import yaml
from browse_pages import CHECKPOINTS, CHROMIUM, Server, choose, chromium, make_run, open_page, put_dataset

from medforget_dataset.hierarchy import LEVELS
from medforget_dataset.writer import parquet_path
from unlearn.browse import app
from unlearn.cli import main
from unlearn.measures.extraction import answer_probability
from unlearn.measures.probe import probe_checkpoint, read_probe


pytestmark = pytest.mark.browser
COMMAND = ("-m", "unlearn.cli", "browse")


@pytest.fixture(scope="module", autouse=True)
def _installed():
    pytest.importorskip("gradio", reason="the extra app is not installed")
    pytest.importorskip("playwright", reason="Playwright is not installed")
    if not CHROMIUM.is_file():
        pytest.skip(f"Chromium is not installed ({CHROMIUM}; Debian's package chromium)")


@pytest.fixture(scope="module")
def asked_run(report_run, tiny_checkpoint, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("browse") / "run", report_run, tiny_checkpoint)


@pytest.fixture(scope="module")
def server(data_dir, asked_run, tmp_path_factory):
    with Server([*COMMAND, data_dir, asked_run], tmp_path_factory.mktemp("served")) as running:
        running.url = running.address()
        yield running
        assert running.calls() == ""


@pytest.fixture(scope="module")
def browser():
    with chromium() as running:
        yield running


@pytest.fixture
def page(browser, server):
    page, away, errors = open_page(browser, server.url)
    yield page
    page.close()
    assert (away, errors) == ([], [])


@pytest.fixture(scope="module")
def rows(data_dir):
    """Rows of configurations by id, as the Parquet files have them."""
    return lambda config, split="train": {
        row["id"]: row for row in pq.read_table(data_dir / parquet_path(config, split)).to_pylist()
    }


def _ids(page):
    return page.locator(".mf-card").evaluate_all("cards => cards.map(card => card.dataset.id)")


def _check_cards(page, known, forgotten):
    """Every card shown has its row's question and answer, and the state at each level that the Parquet files say."""
    for card in page.locator(".mf-card").all():
        row = known[card.get_attribute("data-id")]
        text = card.inner_text()
        assert row["question"] in text and row["answer"] in text
        shown = {chip.get_attribute("data-level"): chip.inner_text() for chip in card.locator(".mf-chip").all()}
        states = {level: "forgotten" if row["id"] in forgotten[level] else "retained" for level in LEVELS}
        assert shown == {level: f"{level} {state}" for level, state in states.items()}


def test_the_hierarchy_is_walked_by_clicking(page, rows):
    known, forgotten = rows("finetune"), {level: rows(f"{level}_forget") for level in LEVELS}
    assert "These are not patients" in page.locator(".mf-head").inner_text()
    assert "not a guarantee of privacy" in page.locator(".mf-head").inner_text()
    study = "inst02/pat009/study036"
    row = next(row for row in known.values() if row["id"].startswith(study))
    for level, count in zip(LEVELS[:3], (240, 60, 15), strict=True):
        choose(page, level.title(), row[level])
        page.locator(".mf-counts", has_text=f"{count} of 960 rows").wait_for()
    assert _ids(page) == [row_id for row_id in known if row_id.startswith(study)]
    _check_cards(page, known, forgotten)
    again = {row_id: other for level in LEVELS for row_id, other in rows(f"{level}_forget_rephrase", "test").items()}
    for row_id in _ids(page):
        if other := again.get(f"{row_id}/rephrase"):
            assert other["question"] in page.locator(f'.mf-card[data-id="{row_id}"]').inner_text()
    choose(page, "Section", "findings")
    page.locator(".mf-counts", has_text="3 of 960 rows").wait_for()
    assert _ids(page) == [f"{study}/findings/{task}" for task in ("generation", "cloze", "classification")]
    sizes = page.locator(".mf-pair img").evaluate_all("images => images.map(image => image.naturalWidth)")
    assert sizes == [56, 56] and "Turned by" in page.locator(".mf-images").inner_text()


def test_filters_and_pages_show_what_the_configurations_hold(page, rows):
    forgotten = {level: rows(f"{level}_forget") for level in LEVELS}
    choose(page, "Configuration", "patient_forget (")
    page.locator(".mf-counts", has_text="224 of 224 rows of patient_forget").wait_for()
    choose(page, "Task", "cloze")
    page.locator(".mf-counts", has_text="64 of 224 rows").wait_for()
    cloze = [row_id for row_id in forgotten["patient"] if row_id.endswith("/cloze")]
    assert _ids(page) == cloze[:4]
    _check_cards(page, forgotten["patient"], forgotten)
    page.get_by_role("button", name="Next image").click()
    page.get_by_text("Image 2 of 16").wait_for()
    assert _ids(page) == cloze[4:8]
    choose(page, "Configuration", "general_med")
    page.locator(".mf-counts", has_text="They belong to no hierarchy").wait_for()
    general = rows("general_med", "train") | rows("general_med", "test")
    assert _ids(page) and all(
        general[row_id]["answer"] in page.locator(".mf-study").inner_text() for row_id in _ids(page)
    )
    assert page.locator(".mf-chip").count() == 0
    choose(page, "Configuration", "section_forget_rephrase")
    page.locator(".mf-counts", has_text="64 of 192 rows").wait_for()
    assert all(row_id.endswith("/cloze/rephrase") for row_id in _ids(page))
    assert "Taught as:" in page.locator(".mf-card").first.inner_text()


def test_every_section_of_the_report_is_shown(page, asked_run):
    page.get_by_role("tab", name="Results").click()
    titles = re.findall(r"<h2>(.*?)</h2>", (asked_run / "report.html").read_text())
    page.get_by_label("Section of the report", exact=True).click()
    assert page.get_by_role("option").count() == len(titles)
    page.get_by_role("option").filter(has_text="Scores of every method").click()
    page.locator("#mf-report table tbody tr").nth(2).wait_for()
    names = page.locator("#mf-report tbody th:first-child").all_inner_texts()
    assert names == ["Vanilla", "Retrained", "NPO"]
    assert page.locator("#mf-report figcaption").first.inner_text().startswith("Scores in per cent")


def test_checkpoints_are_asked_the_same_question(page, rows, data_dir, tiny_checkpoint, tmp_path):
    page.get_by_role("button", name="Next image").click()
    page.get_by_text("Image 2 of 64").wait_for()
    study = _ids(page)[0].rpartition("/")[0]
    page.get_by_role("button", name="Ask the models").click()
    page.get_by_label("Question of the dataset", exact=True).click()
    page.get_by_role("option").filter(has_text="findings · cloze").click()
    row = rows("finetune")[f"{study}/findings/cloze"]
    question = page.get_by_label("Question, as it is asked")
    page.wait_for_function("text => document.querySelector('textarea').value == text", arg=row["question"])
    assert page.get_by_label("Right answer, whose").input_value() == row["answer"]
    probe = read_probe(probe_checkpoint(tiny_checkpoint, data_dir, tmp_path / "probe.parquet", quiet=True))
    probe = probe[(probe["set"] == "finetune") & (probe["id"] == row["id"])].iloc[0]
    page.locator("#mf-ask").click()
    _replies(page, row["answer"], answer_probability([probe["log_prob"]], [probe["tokens"]])[0])
    # The same model thrice, so the same answer.
    assert len(set(page.locator(".mf-replies tbody td:nth-child(2)").all_inner_texts())) == 1
    question.fill("Is this a chest?")
    page.get_by_label("Right answer, whose").fill("Yes")
    page.locator("#mf-ask").click()
    _replies(page, "Yes", None)
    page.get_by_label("Right answer, whose").fill("")
    page.locator("#mf-ask").click()
    page.get_by_text("Give a right answer first").wait_for()


def _replies(page, right, probability):
    page.locator("#mf-replies .mf-answer", has_text=f"Right answer {right}").wait_for(timeout=120_000)
    page.wait_for_function("document.querySelectorAll('tr[data-checkpoint]').length == 3", timeout=120_000)
    page.wait_for_function("!document.querySelector('.mf-status')")
    shown = page.locator("tr[data-checkpoint]").evaluate_all("rows => rows.map(row => row.dataset.checkpoint)")
    assert shown == list(CHECKPOINTS)
    for row in page.locator("tr[data-checkpoint]").all():
        assert re.search("[✓✗] (right|wrong)", row.inner_text())
        value = float(row.locator(".mf-number").first.get_attribute("data-value"))
        assert 0 < value < 1 and (probability is None or value == pytest.approx(probability, rel=1e-4))


def test_a_telephone_needs_no_sideways_scrolling(browser, server):
    page, away, errors = open_page(browser, server.url, width=390, height=844)
    for name in ("Data", "Results", "Side by side"):
        page.get_by_role("tab", name=name).click()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.close()
    assert (away, errors) == ([], [])


def test_without_a_run_the_tabs_say_how_and_ctrl_c_ends(browser, data_dir, tmp_path):
    with Server([*COMMAND, data_dir], tmp_path, GRADIO_SHARE="True", GRADIO_ANALYTICS_ENABLED="True") as running:
        page, away, errors = open_page(browser, running.address())
        for tab, words in (("Results", "No run was given"), ("Side by side", "no checkpoints to ask")):
            page.get_by_role("tab", name=tab).click()
            page.get_by_text(words).wait_for()
        page.close()
        assert (away, errors) == ([], [])
        assert running.stop() == (0, "closed\n")
        assert running.calls() == ""


@pytest.fixture
def restricted_dir(data_dir, tmp_path):
    """The dataset with the mark of restricted data in its record."""
    folder = tmp_path / "marked"
    shutil.copytree(data_dir, folder)
    record = json.loads((folder / "build.json").read_text())
    (folder / "build.json").write_text(json.dumps(record | {"restricted": True}))
    return folder


def test_restricted_data_is_shown_on_this_machine_only(browser, restricted_dir, tmp_path, capsys):
    for more in (["--share"], ["--host", "0.0.0.0"]):
        assert main(["browse", str(restricted_dir), *more]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert more[0] in line and "data use agreement" in line
    with Server([*COMMAND, restricted_dir], tmp_path / "served", GRADIO_SERVER_NAME="0.0.0.0") as running:
        address = running.address()
        assert address.startswith("http://127.0.0.1:")
        page, away, errors = open_page(browser, address)
        assert "Restricted" in page.locator(".mf-head").inner_text()
        page.close()
        assert (away, errors, running.calls()) == ([], [], "")


def test_a_space_shows_a_dataset_of_the_hub_and_a_report(browser, data_dir, asked_run, tmp_path, local_hub, capsys):
    space = tmp_path / "space"
    for name in CHECKPOINTS:
        info = asked_run / name / "medforget.json"
        info.write_text(json.dumps(json.loads(info.read_text()) | {"restricted": False}))
    put_dataset(data_dir)
    assert main(["browse", "alice/medforget", str(asked_run), "--space", str(space)]) == 0
    names = sorted(path.relative_to(space).as_posix() for path in space.rglob("*") if path.is_file())
    report = [f"run/{name}" for name in ("report.html", "report.json", "run.json")]
    assert names == ["README.md", "app.py", "requirements.txt", *report, "space.json"]
    head = yaml.safe_load((space / "README.md").read_text().split("---")[1])
    assert (head["sdk"], head["app_file"], head["datasets"]) == ("gradio", "app.py", ["alice/medforget"])
    with Server([space / "app.py"], tmp_path, **local_hub.environment) as running:
        page, away, errors = open_page(browser, running.address())
        assert "alice/medforget" in page.locator(".mf-head").inner_text()
        page.get_by_role("tab", name="Results").click()
        page.locator("#mf-report table").wait_for()
        page.get_by_role("tab", name="Side by side").click()
        page.get_by_text("holds no checkpoints").wait_for()
        page.close()
        assert (away, errors, running.calls()) == ([], [], "")
    assert main(["browse", str(data_dir), "--space", str(tmp_path / "other")]) == 2
    assert "medforget push dataset" in capsys.readouterr().err


def test_a_space_refuses_restricted_data(restricted_dir, tmp_path, local_hub, monkeypatch, capsys):
    space = tmp_path / "space"
    put_dataset(restricted_dir)
    assert main(["browse", "alice/medforget", "--space", str(space)]) == 2
    assert "a Space cannot show it" in capsys.readouterr().err and not space.exists()
    # One that was made before the dataset was marked.
    monkeypatch.setenv("SPACE_ID", "alice/space")
    monkeypatch.setenv("MEDFORGET_DATA", "alice/medforget")
    with pytest.raises(SystemExit, match=r"app.py: alice/medforget: .*a Space cannot show it"):
        app.main()
