"""Figures and page from a made-up study: the same bytes each time, nothing fetched, nothing ranked without interval."""

import argparse
import hashlib
import importlib.util
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from tunemap.collect import EVALUATION_DETAILS, MEASUREMENTS, collect, read_tables, write_tables
from tunemap.errors import UserError
from tunemap.report import figures, page, words
from tunemap.report.command import add_figure_arguments, run_figure
from tunemap.report.definitions import DEFINITIONS
from tunemap.report.formats import records, signed
from tunemap.report.point_figures import draw_accuracy, draw_memory, draw_throughput
from tunemap.report.published_numbers import OTHER_DEFINITIONS
from tunemap.report.scene import BASE_COLOUR, INK, MARKERS, METHOD_COLOURS, method_colours, scenes
from tunemap.report.tradeoff_figure import draw_tradeoff
from tunemap.training.steps import LOSS_WINDOW_STEPS

SPEC = importlib.util.spec_from_file_location("fake_results", Path(__file__).parent / "fake_results.py")
fake_results = importlib.util.module_from_spec(SPEC)
sys.modules["fake_results"] = fake_results  # dataclasses look their module up
SPEC.loader.exec_module(fake_results)

# Scaling needs several devices, step, timeline and roofline captures, ranks GoRA, which are not here.
KINDS = [kind for kind in figures.KINDS if kind not in ("scaling", "step", "timeline", "roofline", "ranks")]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    fake = fake_results.write(tmp_path_factory.mktemp("study"), seeds=2, examples=60)
    fake.build(fake.results_dir / "report.html")
    return fake


@pytest.fixture(scope="module")
def html(study):
    return (study.results_dir / "report.html").read_text()


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


# --- figures ----------------------------------------------------------------------------------------------


def test_same_tables_give_the_same_bytes_in_any_number_of_processes(study, tmp_path):
    figures.write_figures(study.results_dir / "tables", tmp_path, study.plan_path, processes=2)
    assert digests(tmp_path) == digests(study.results_dir / "figures")


def test_every_figure_comes_in_three_formats(study):
    folder = study.results_dir / "figures"
    index = json.loads((folder / "figures.json").read_text())
    kinds = {(one["experiment"], one["kind"]) for one in index}
    assert kinds == {(e, k) for e in ("methods", "ranks") for k in KINDS}
    for one in index:
        assert one["alt"]
        assert one["caption"]
        for ending in figures.FORMATS:
            assert (folder / f"{one['name']}.{ending}").stat().st_size > 1000


def test_one_figure_is_redrawn_to_the_same_bytes(study, tmp_path, capsys):
    (study.results_dir / "plan.json").write_text(study.plan_path.read_text())
    parser = argparse.ArgumentParser()
    add_figure_arguments(parser)
    assert (
        run_figure(parser.parse_args(["ranks-memory", "--study", str(study.results_dir), "--output", str(tmp_path)]))
        == 0
    )
    drawn = digests(tmp_path)
    assert drawn.keys() == {"ranks-memory.svg", "ranks-memory.pdf", "ranks-memory.png"}
    assert drawn.items() <= digests(study.results_dir / "figures").items()
    assert "n = 2 seeds per point" in capsys.readouterr().out


def test_a_figure_of_some_runs_has_their_points_and_no_others(study, tmp_path):
    (study.results_dir / "plan.json").write_text(study.plan_path.read_text())
    chosen = ["tiny.arithmetic.lora.seed-1", "tiny.arithmetic.qlora.seed-0"]
    drawing = figures.redraw(study.results_dir, "methods-memory", tmp_path, chosen)
    labels = [part.split(":")[0] for part in drawing.alt.removeprefix("Peak memory in MiB. ").split("; ")]
    assert labels == ["lora", "qlora"]
    assert "n = 2 seeds per point" in drawing.caption  # a point is its seeds
    with pytest.raises(UserError, match=r"--run tiny.arithmetic.lora.seed-9: not in experiment methods; did you mean"):
        figures.redraw(study.results_dir, "methods-memory", tmp_path, ["tiny.arithmetic.lora.seed-9"])


def test_a_figure_that_does_not_exist_is_refused_with_the_names_of_those_that_do(study, tmp_path):
    with pytest.raises(
        UserError, match=r"no figure 'ranks-memroy'; did you mean ranks-memory\? Known: methods-tradeoff, "
    ):
        figures.redraw(study.results_dir, "ranks-memroy", tmp_path)
    with pytest.raises(UserError, match="figure methods-step has nothing to show"):
        figures.redraw(study.results_dir, "methods-step", tmp_path)
    with pytest.raises(UserError, match=r"no plan.json; give the folder of a study's results"):
        run_figure(argparse.Namespace(name="methods-memory", study=tmp_path, output=tmp_path, run=None))


def luminance(colour):
    """Relative luminance as WCAG 2 defines it."""
    channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_of_methods_stand_out_on_white_and_on_the_dark_page():
    assert len(METHOD_COLOURS) == len(MARKERS)
    for colour in METHOD_COLOURS:
        for ground in ("#ffffff", "#181c21"):
            high, low = sorted([luminance(colour), luminance(ground)], reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 3, (colour, ground)


def test_a_method_has_one_colour_in_all_figures(study):
    colours = method_colours(study.plan)
    assert len({colours[method] for method in ("full", "lora", "qlora")}) == 3
    assert colours["base"] == BASE_COLOUR
    for experiment, method in (("methods", "lora"), ("ranks", "lora")):
        for kind in KINDS:
            assert colours[method] in (study.results_dir / "figures" / f"{experiment}-{kind}.svg").read_text()
    assert colours["full"] not in (study.results_dir / "figures" / "ranks-throughput.svg").read_text()


def scene(fake):
    write_tables(fake.plan_path, fake.results_dir)
    return scenes(fake.plan, read_tables(fake.results_dir / "tables"), fake.results_dir / "facts")[0]


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def test_failed_runs_are_marked_where_their_number_would_stand(study):
    for draw in (draw_throughput, draw_memory, draw_accuracy):
        drawn = texts(draw(scene(study))[0])
        assert "× 2 of 2 not supported" in drawn
        assert "× 1 of 2 out of memory" in drawn


@pytest.mark.parametrize("draw", [draw_tradeoff, draw_accuracy, draw_throughput])
def test_labels_do_not_overlap(tmp_path, draw):
    drawn = draw(scene(fake_results.write(tmp_path, seeds=2, examples=60, failures=False)))[0]
    canvas = FigureCanvasAgg(drawn)
    drawn.draw_without_rendering()
    axes = drawn.axes[0]
    labels = [text for text in [*axes.texts, *axes.get_yticklabels(), axes.xaxis.label] if text.get_text()]
    boxes = [label.get_window_extent(canvas.get_renderer()) for label in labels]
    for index, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:index]), labels[index].get_text()
        assert box.x0 >= 0
        assert box.x1 <= drawn.bbox.x1


def test_a_study_in_which_nothing_ran_has_a_page_and_no_figure(tmp_path):
    fake = fake_results.write(tmp_path, seeds=1, examples=5)
    for path in fake.results_dir.glob("*/*/*"):
        path.unlink()
    fake.build(tmp_path / "report.html")
    assert json.loads((fake.results_dir / "figures" / "figures.json").read_text()) == []
    text = (tmp_path / "report.html").read_text()
    assert "No run ended ok" in text
    assert text.count("not run") >= len(fake.plan["runs"])


def test_one_run_is_reported_without_a_comparison(tmp_path):
    fake = fake_results.write(tmp_path, seeds=1, examples=30, failures=False)
    plan = fake.plan
    run = "tiny.arithmetic.lora.seed-0"
    plan["experiments"] = [plan["experiments"][1] | {"runs": [run], "vary": [], "base_runs": []}]
    plan["runs"] = {run: plan["runs"][run]}
    fake.plan_path.write_text(json.dumps(plan))
    fake.build(tmp_path / "report.html")
    assert "Only lora was measured" in (tmp_path / "report.html").read_text()


# --- page -------------------------------------------------------------------------------------------------


class Structure(HTMLParser):
    """Collects what the tests ask of the page."""

    def __init__(self, html):
        super().__init__()
        self.ids, self.links, self.sources, self.tags, self.open = [], [], [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append((tag, found))
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found["href"]] if tag == "a" else []
        self.sources += [found[key] for key in ("src", "srcset") if key in found]


def test_page_fetches_nothing_and_its_links_lead_somewhere(html):
    found = Structure(html)
    assert found.sources == []
    assert not [tag for tag, _ in found.tags if tag in ("link", "img", "iframe", "object", "embed")]
    assert not re.search(r"@import|url\((?!#)|fetch\(|XMLHttp|import\(", html)
    assert len(found.ids) == len(set(found.ids))
    assert all(link.startswith("#") and link[1:] in found.ids for link in found.links)


def test_every_figure_has_a_text_and_every_table_headers(html, study):
    found = Structure(html)
    pictures = [attributes for tag, attributes in found.tags if tag == "svg"]
    assert len(pictures) == len(list((study.results_dir / "figures").glob("*.svg"))) + html.count('class="curve"')
    assert all(one["role"] == "img" and len(one["aria-label"]) > 20 for one in pictures)
    headers = [attributes for tag, attributes in found.tags if tag == "th"]
    assert headers
    assert all(one.get("scope") in ("col", "row") for one in headers)


def test_inlined_svg_is_well_formed_and_follows_the_pages_colours(html):
    for svg in re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL):
        ElementTree.fromstring(svg)
        assert INK not in svg
        assert "patch_1" not in svg or re.search(r'patch_1">.{0,200}fill: none', svg)  # no ground over the page's own
        references = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
        assert references <= set(re.findall(r'\bid="([^"]+)"', svg))


def test_page_shows_failures_gates_and_caveats(html):
    for text in (
        "out of memory",
        "asked for 96 MiB, 12 MiB free",
        "train, step 7<",
        "labels: 3 % of answers cut",
        "brings along",
    ):
        assert text in html
    assert "A made-up study" in html


def test_text_of_a_study_cannot_break_the_page(tmp_path):
    fake = fake_results.write(tmp_path, seeds=1, examples=5)
    plan = fake.plan
    plan["report"] |= {"title": "<script>alert(1)</script>", "introduction": "a & b"}
    fake.plan_path.write_text(json.dumps(plan))
    hostile = "</script><script>alert(2)</script>"
    fake.edit(fake.outcome("tiny.arithmetic.full.seed-0"), reason=hostile)
    log = tmp_path / "logs" / "train" / "tiny.arithmetic.full.seed-0.log"
    log.parent.mkdir(parents=True)
    log.write_text("\x1b[31m<img src=x>\x1b[0m\n10 %\r20 %\rdone\n")
    write_tables(fake.plan_path, fake.results_dir)
    (fake.results_dir / "figures").mkdir()
    (fake.results_dir / "figures" / "figures.json").write_text("[]")
    report = tmp_path / "report.html"
    page.write_report(fake.plan_path, fake.results_dir, report, logs_dir=tmp_path / "logs", study_file="a b.yaml")
    text = report.read_text()
    assert text.count("<script") == 2  # the data of the map, and the page's own
    assert "alert(1)" in text
    assert "alert(2)" in text
    assert "<img" not in text
    assert "&lt;img src=x&gt;\ndone</pre>" in text
    assert "a &amp; b" in text
    assert "--configfile &#39;a b.yaml&#39; --force results/fake/runs/tiny.arithmetic.full.seed-0/outcome.json" in text


def test_every_measurement_is_defined():
    assert set(MEASUREMENTS) | set(EVALUATION_DETAILS) <= set(DEFINITIONS)


def test_the_training_loss_is_said_to_be_over_the_steps_that_it_is_over():
    assert f"mean over the last {LOSS_WINDOW_STEPS} steps" in DEFINITIONS["train_loss"].text
    assert f"the last {LOSS_WINDOW_STEPS} steps" in OTHER_DEFINITIONS["NYU", "train_loss"]


# --- sentences --------------------------------------------------------------------------------------------


def comparison(point, **values):
    row = {"point": point, "baseline": "full", "refused": None, "accuracy_verdict": "not distinguishable"}
    row |= {"accuracy_difference": -0.004, "accuracy_difference_low": -0.02, "accuracy_difference_high": 0.012}
    row |= {"throughput_ratio": 1.3, "throughput_ratio_low": 1.2, "throughput_ratio_high": 1.4}
    return row | {"throughput_verdict": "higher", "memory_ratio": 0.62} | values


def test_the_answer_names_the_cheapest_point_that_keeps_the_accuracy():
    rows = [
        comparison("lora"),
        comparison("qlora", memory_ratio=0.4, accuracy_verdict="lower"),
        comparison("big", memory_ratio=1.2),
    ]
    assert words._cheapest(rows) == (
        "lora reaches the accuracy of full within the interval (−0.4 points, 95 % interval −2.0 to +1.2) "
        "at 0.62× its peak memory; throughput 1.30×, 1.20 to 1.40: faster."
    )


def test_a_wide_interval_is_no_recommendation():
    text = words._cheapest([comparison("lora", accuracy_difference_low=-0.25)])
    assert "does not exclude a loss of 25 points" in text
    assert "reaches" not in text


def test_no_smaller_point_is_an_answer():
    assert words._cheapest([comparison("lora", accuracy_verdict="lower")]).startswith("No point keeps the accuracy")


def test_a_speed_of_one_run_is_not_ranked():
    row = comparison("lora", throughput_verdict="no interval", throughput_ratio_low=None, throughput_ratio_high=None)
    assert "ranks nothing" in words._cheapest([row])
    assert words._fastest([row])[0].startswith("Speeds are not ranked")


def test_fine_tuning_that_does_nothing_is_said(tmp_path):
    fake = fake_results.write(tmp_path, seeds=2, examples=60, failures=False)
    tables = collect(fake.plan_path, fake.results_dir)
    points, rows = (records(table[table["experiment"] == "methods"]) for table in (tables.points, tables.comparisons))
    assert any("raises the share" in text for _, texts in words.answers(points, rows) for text in texts)
    rows = [row | {"accuracy_verdict": "not distinguishable"} for row in rows]
    assert any("cannot tell" in text for _, texts in words.answers(points, rows) for text in texts)


@pytest.mark.parametrize(("value", "text"), [(1.25, "+1.2"), (-3.0, "−3.0"), (0.0, "±0.0"), (-0.04, "±0.0")])
def test_signed_numbers(value, text):
    assert signed(value) == text


def test_a_study_on_one_device_has_no_scaling_section(html):
    assert 'id="scaling"' not in html
