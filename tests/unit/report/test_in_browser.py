"""The page in a real browser: the map, the cards, the keyboard, contrast, and silence on console and network."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest

from tunemap.collect import write_tables
from tunemap.report import page
from tunemap.report.figures import redraw

HERE = Path(__file__).parent


def helper(name):
    """A module that lies beside the tests."""
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


fake_results, browsers = helper("fake_results"), helper("browser")
pytestmark = pytest.mark.skipif(browsers.chromium() is None, reason="no chromium, chromium-browser or google-chrome")
CAPTURED, NOT_CAPTURED = "tiny.arithmetic.lora.seed-0", "tiny.arithmetic.qlora.seed-0"
HOSTILE = "<b>x</b></script>"
CONTRAST = """
(() => {
  const channels = (text) => (text.match(/[\\d.]+/g) ?? []).map(Number);
  const linear = (c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const ground = (one) => {
    for (; one; one = one.parentElement) {
      const [r, g, b, a] = channels(getComputedStyle(one).backgroundColor);
      if (a === undefined || a === 1) return [r, g, b];
    }
    return [255, 255, 255];
  };
  const low = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const one = walker.currentNode.parentElement;
    const text = walker.currentNode.textContent.trim();
    if (!text || !one.checkVisibility() || ["SCRIPT", "OPTION"].includes(one.tagName)) continue;
    const style = getComputedStyle(one);
    const [a, b] = [luminance(channels(one.closest("svg") ? style.fill : style.color)), luminance(ground(one))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) low.push(`${one.tagName} ${ratio.toFixed(2)}: ${text.slice(0, 30)}`);
  }
  return low;
})()
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A page with failures, two strategies, energy, a real capture, and a reason that tries to break out."""
    root = tmp_path_factory.mktemp("browser")
    fake = fake_results.write(root, seeds=2, examples=40)
    plan = fake.plan
    for run in plan["runs"].values():
        if run["method_name"] == "qlora":
            run["factors"]["strategy"] = "ddp"
    plan["experiments"][0]["captures"] = [CAPTURED, NOT_CAPTURED]
    shutil.copytree(HERE / "captured", fake.results_dir / "facts" / CAPTURED)
    fake.plan_path.write_text(json.dumps(plan))
    for run in plan["runs"]:
        document = json.loads(fake.outcome(run).read_text())
        if document["measurements"]:
            document["measurements"]["energy_per_10k_tokens_joules"] = 12.5
            fake.outcome(run).write_text(json.dumps(document))
    fake.edit(fake.outcome("tiny.arithmetic.full.seed-1"), reason=HOSTILE)
    logs = root / "logs" / "train"
    logs.mkdir(parents=True)
    (logs / "tiny.arithmetic.lora.seed-0.log").write_text("step 60/60\noutcome: ok\n")
    path = root / "report.html"
    write_tables(fake.plan_path, fake.results_dir)
    (fake.results_dir / "plan.json").write_text(fake.plan_path.read_text())
    figures = fake.results_dir / "figures"
    drawn = [vars(redraw(fake.results_dir, f"methods-{kind}", figures)) for kind in ("memory", "timeline")]
    (figures / "figures.json").write_text(json.dumps(drawn))
    page.write_report(fake.plan_path, fake.results_dir, path, logs_dir=root / "logs", study_file="config/config.yaml")
    return path


@pytest.fixture(scope="module")
def browser():
    with browsers.Browser() as one:
        yield one


@pytest.fixture(scope="module")
def tab(browser, report):
    return browser.open(report)


@pytest.fixture
def fresh(tab):
    """The page as it is after loading."""
    tab.look(1400, 900)
    tab.evaluate("history.replaceState(null, '', location.pathname)")
    loads = len(tab.messages("Page.loadEventFired"))
    tab.call("Page.reload")
    while len(tab.messages("Page.loadEventFired")) == loads:
        tab.evaluate("0")
    tab.frame()
    return tab


def labels(tab):
    return tab.evaluate("[...document.querySelectorAll('.canvas a')].map(one => one.dataset.label)")


def set_value(tab, selector, value, event):
    tab.evaluate(
        f"(() => {{ const one = document.querySelector({json.dumps(selector)}); one.value = {json.dumps(value)};"
        f" one.dispatchEvent(new Event('{event}', {{bubbles: true}})); }})()"
    )
    tab.frame()


ALL = ["full", "full · gradient checkpointing", "lora", "lora · gradient checkpointing", "qlora"]
EXPERIMENT, ACROSS, UP = (f"#map .controls label:nth-of-type({number}) select" for number in (1, 2, 3))


def test_map_shows_the_main_experiment_and_names_what_it_cannot_show(fresh):
    assert labels(fresh) == ALL
    lost = fresh.evaluate("document.querySelector('.missing').textContent")
    assert lost == "Not on the map: qlora · gradient checkpointing (2 of 2 not supported)."
    described = fresh.evaluate("document.querySelector('.canvas a').getAttribute('aria-label')")
    assert "1 of 2 runs ok (1 of 2 out of memory)" in described
    assert "throughput, real tokens/s" in described


def test_filters_hide_and_show_points(fresh):
    fresh.click("input[value=lora]")
    assert labels(fresh) == [one for one in ALL if not one.startswith("lora")]
    fresh.click("input[name=strategy][value=ddp]")
    assert labels(fresh) == ["full", "full · gradient checkpointing"]
    fresh.click("input[value=full]")
    assert labels(fresh) == []
    assert "No point has both values" in fresh.evaluate("document.querySelector('.canvas').textContent")


def test_experiments_and_axes_can_be_chosen(fresh):
    set_value(fresh, EXPERIMENT, "ranks", "change")
    assert labels(fresh) == ["lora · rank 2", "lora · rank 8", "lora · rank 32"]
    set_value(fresh, UP, "accuracy", "change")
    set_value(fresh, ACROSS, "energy", "change")
    text = fresh.evaluate("[...document.querySelectorAll('.canvas .axis')].map(one => one.textContent).join()")
    assert text == "energy, J per 10,000 tokens (← less is better),accuracy, % (more ↑ is better)"
    assert len(labels(fresh)) == 3
    set_value(fresh, EXPERIMENT, "", "change")
    assert len(labels(fresh)) == 7  # the same runs stand once


def test_budget_says_what_fits_and_fades_the_rest(fresh):
    set_value(fresh, "#budget", 0, "input")
    assert "0 of 6 fit" in fresh.evaluate("document.querySelector('.fits').textContent")
    shaded, grid = "document.querySelector('.beyond').getBBox()", "document.querySelector('.grid').getBBox()"
    assert fresh.evaluate(f"{shaded}.x") >= 84  # never left of the axis
    assert fresh.evaluate(f"{shaded}.height") == fresh.evaluate(f"{grid}.height")
    data = fresh.evaluate("JSON.parse(document.getElementById('map-data').textContent).points")
    needs = sorted(one["memory"][0] for one in data if one["memory"] and one["experiment"] == "methods")
    steps = [
        value for value in range(201) if needs[0] * 0.8 * (needs[-1] * 1.25 / needs[0] / 0.8) ** (value / 200) < 80
    ]
    set_value(fresh, "#budget", steps[-1], "input")
    text = fresh.evaluate("document.querySelector('.fits').textContent")
    fitting = sum(need < 80 for need in needs)
    assert 0 < fitting < 5
    assert f"{fitting} of 6 fit into 7" in text
    assert "Highest mean accuracy among them" in text
    faded = fresh.evaluate("[...document.querySelectorAll('.canvas .beyond-budget')].map(one => one.dataset.label)")
    assert len(faded) == 5 - fitting
    assert "full" in faded
    assert fresh.evaluate("document.querySelector('.limit') !== null")


def test_hovering_shows_a_points_numbers(fresh):
    x, y = fresh.evaluate(
        "(() => { const one = document.querySelector('.canvas a[data-label=lora] .target');"
        " one.scrollIntoView({block: 'center'}); const box = one.getBoundingClientRect();"
        " return [box.x + box.width / 2, box.y + box.height / 2]; })()"
    )
    fresh.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    fresh.frame()
    tip = fresh.evaluate(
        "(() => { const tip = document.querySelector('.tip'); return [tip.hidden, tip.innerText]; })()"
    )
    assert tip[0] is False
    assert tip[1].startswith("lora\n2 of 2 runs ok")
    assert "energy, J per 10,000 tokens: 12.5" in tip[1]


def test_a_click_opens_the_card_and_a_number_in_it_leads_to_its_run(fresh):
    fresh.click(".canvas a[data-label=lora] .target")
    visible = "[...document.querySelectorAll('.card')].filter(one => one.checkVisibility()).map(one => one.id)"
    (card,) = fresh.evaluate(visible)
    assert fresh.evaluate("document.activeElement.id") == card
    fresh.click(f"[id='{card}'] td a")
    assert fresh.evaluate(visible) == ["run-tiny.arithmetic.lora.seed-0"]
    text = fresh.evaluate("document.activeElement.innerText")
    for part in (
        "outcome: ok",
        "snakemake --profile profiles/local --force results/fake/runs/tiny.arithmetic.lora.seed-0/outcome.json",
        "learning_rate",
        "tiny.arithmetic.full.seed-0",
        "Memory at its peak",
        "Training loss from",
    ):
        assert part in text, part
    before = fresh.evaluate("scrollY")
    fresh.press("Escape")
    assert fresh.evaluate(visible) == []
    assert fresh.evaluate("scrollY") == before
    assert fresh.evaluate("document.activeElement.dataset.label") == "lora"


def test_keyboard_alone_reaches_a_card(fresh):
    fresh.evaluate("document.querySelector('.canvas a[data-label=full]').focus()")
    assert fresh.evaluate("document.querySelector('.tip').hidden") is False
    fresh.press("Enter", "\r")
    fresh.frame()
    assert fresh.evaluate("document.activeElement.classList.contains('card')")
    fresh.click(".card:target a.close")
    assert fresh.evaluate("document.querySelector('.card:target')") is None


def test_every_link_of_a_number_leads_to_a_card_that_exists(fresh):
    dead = fresh.evaluate(
        "[...document.querySelectorAll('a[href^=\"#\"]')]"
        ".map(one => decodeURIComponent(one.getAttribute('href').slice(1)))"
        ".filter(id => !document.getElementById(id))"
    )
    assert dead == []
    linked = fresh.evaluate("[...document.querySelectorAll('#experiment-methods td')].map(one => one.innerText)")
    bare = fresh.evaluate(
        "[...document.querySelectorAll('#experiment-methods td')]"
        ".filter(one => !one.querySelector('a')).map(one => one.innerText)"
    )
    assert len(linked) > 40
    assert set(bare) == {"—"}


def test_failures_stand_in_the_tables(fresh):
    cells = fresh.evaluate("[...document.querySelectorAll('#experiment-methods td.failed')].map(one => one.innerText)")
    assert "0 of 2\n2 of 2 not supported" in cells
    assert cells.count("not supported") >= 5  # where its numbers would stand
    assert "1 of 2\n1 of 2 out of memory" in cells
    first = fresh.evaluate("document.querySelector('#gates tbody td').innerText")
    assert first == "invalid"  # fatal gates come first
    assert "fatal check" in fresh.evaluate("document.querySelector('.warning').innerText")


def test_one_captured_step_stands_under_why(fresh):
    said = fresh.evaluate("document.querySelector('#why svg').getAttribute('aria-label')")
    assert said.startswith("One step over time. lora: 26.9 ms, 16% idle; longest mm 7.1 ms, mul 2.6 ms")
    width, drawn = fresh.evaluate(
        "(() => { const svg = document.querySelector('#why svg'); const box = svg.getBoundingClientRect();"
        " const lanes = [...svg.querySelectorAll('[id*=FillBetweenPolyCollection], [id*=PolyCollection]')];"
        " return [box.width, lanes.filter(one => one.getBoundingClientRect().width > 1).length]; })()"
    )
    assert width > 600
    assert drawn > 10  # phases, categories, operators, gaps
    rows = fresh.evaluate("[...document.querySelectorAll('#why tbody tr')].map(one => one.innerText.split('\\t'))")
    assert rows[0][0] == "lora, device cpu"
    assert rows[1][:2] == ["qlora", "not captured"]
    fresh.click("#why tbody a")
    assert fresh.evaluate("document.querySelector('.card:target').id") == f"run-{CAPTURED}"


def test_an_edge_shows_that_there_is_more_beyond_it(fresh):
    fresh.look(390, 844)
    fresh.frame()
    wide = fresh.evaluate(
        "[...document.querySelectorAll('main .scroll, main .table')].filter(one => one.scrollWidth > one.clientWidth)"
        ".map(one => getComputedStyle(one).backgroundAttachment)"
    )
    assert len(wide) > 3
    assert set(wide) == {"local, local, scroll, scroll"}


def test_hostile_text_is_text(fresh):
    assert fresh.evaluate("[...document.querySelectorAll('b')].length") == 0
    assert HOSTILE in fresh.evaluate("document.querySelector('#failed').innerText")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_has_contrast(fresh, dark):
    fresh.look(1400, 900, dark=dark)
    fresh.frame()
    ground = fresh.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(16, 19, 23)") is dark
    assert fresh.evaluate(CONTRAST) == []
    fresh.click(".canvas a[data-label=lora] .target")
    fresh.click(".card:target td a")
    assert fresh.evaluate(CONTRAST) == []


def test_a_phone_scrolls_down_and_never_sideways(fresh):
    fresh.look(390, 844)
    fresh.frame()
    fresh.frame()
    assert fresh.evaluate("document.documentElement.scrollWidth") == 390
    assert fresh.evaluate("document.querySelector('.canvas svg').clientWidth") <= 390
    assert labels(fresh) == ALL
    small = fresh.evaluate(
        "[...document.querySelectorAll('.canvas .target')].filter(one => one.getBoundingClientRect().width < 24).length"
    )
    assert small == 0


def test_paper_has_the_answer_and_no_controls(fresh, tmp_path):
    fresh.look(1400, 900, media="print")
    shown = "[...document.querySelectorAll('.controls, nav, .card')].filter(one => one.checkVisibility()).length"
    assert fresh.evaluate(shown) == 0
    fresh.pdf(tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")


def test_pictures_have_a_text_and_controls_a_name(fresh):
    nameless = fresh.evaluate(
        "[...document.querySelectorAll('svg')].filter(one => !one.getAttribute('aria-label') &&"
        " one.getAttribute('aria-hidden') !== 'true' && !one.parentElement.closest('svg')).length"
    )
    assert nameless == 0
    unlabelled = fresh.evaluate(
        "[...document.querySelectorAll('input, select')].filter(one => !one.labels.length).length"
    )
    assert unlabelled == 0


def test_nothing_is_fetched_and_the_console_is_silent(tab, report):
    """Last, so that it speaks of everything that the other tests did."""
    assert tab.messages("Runtime.exceptionThrown") == []
    assert tab.messages("Runtime.consoleAPICalled") == []
    assert [one["entry"]["text"] for one in tab.messages("Log.entryAdded")] == []
    requested = {one["request"]["url"].partition("#")[0] for one in tab.messages("Network.requestWillBeSent")}
    assert requested == {report.resolve().as_uri()}
