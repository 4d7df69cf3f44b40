import json
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from panther.report import RENDERERS
from panther.report.text import WIDTH, render
from panther.spec import Cost, Figures, Healed, LayerReport, LimitReport, Report, TrialReport, Tuning

ROW = LayerReport(
    "encoder.fc1", "linear", "384 -> 1536", "linear", (152,), 10, 0.495, 0.0312, Cost(10, 10**9), Cost(5, 5 * 10**8)
)
LEFT = LayerReport(
    "head", "linear", "384 -> 10", "dense", (), 0, 1.0, 0.0, Cost(10, 7), Cost(10, 7), "tied to embed.weight"
)
REPORT = Report(
    target="keep 5.4 M of 10.8 M sketchable weights",
    budget_met=True,
    capture_way="torch.export",
    layers=(ROW, LEFT),
    dense=Figures(22_713_216, 90_900_000, 2 * 10**9, 10.0, 100_000_000),
    compressed=Figures(17_000_000, 68_000_000, 10**9, 8.0, 80_000_000),
    agreement={"cosine": 0.91234, "relative_error": 0.4},
    agreement_batches=3,
    metric=(0.9, 0.85),
    seconds={"capture": 1.25, "verify": 3.0},
    environment={"torch": "2.13.0", "threads": "2"},
    notes=("the calibration set is small",),
)


def line_with(text: str, rendered: str) -> str:
    (line,) = [line for line in rendered.splitlines() if text in line]
    return line


def test_the_target_comes_first() -> None:
    assert render(REPORT).splitlines()[0] == "target: keep 5.4 M of 10.8 M sketchable weights"


def test_a_sketched_layer_shows_what_it_kept_and_lost() -> None:
    cells = line_with("encoder.fc1", render(REPORT)).split()
    assert " ".join(cells) == "encoder.fc1 384 -> 1536 linear 49.5 % 152 10 0.031 1,000 -> 500"


def test_the_error_is_explained_as_what_it_measures() -> None:
    lines = " ".join(render(REPORT).split())
    assert "error: predicted share of the layer's output energy that is lost, weighted by how strongly" in lines
    assert "of the weight's energy" in lines and "variance" not in lines


def test_an_error_on_the_rows_that_were_fitted_to_is_marked() -> None:
    marked = replace(REPORT, layers=(replace(ROW, in_sample=True), LEFT))
    assert " ~0.031 " in line_with("encoder.fc1", render(marked))
    assert "~: of the rows that" in render(marked) and "~: of the rows that" in marked.to_html()
    assert "~" not in render(REPORT)


def test_a_dense_layer_shows_why() -> None:
    assert line_with("tied to embed.weight", render(REPORT)).startswith("head")


def test_totals_show_both_models_and_their_ratio() -> None:
    rendered = render(REPORT)
    assert line_with("parameters", rendered).split()[-5:] == ["22.713", "17.000", "74.8", "%", "kept"]
    assert line_with("saved file", rendered).split()[-5:] == ["90.900", "68.000", "74.8", "%", "kept"]
    assert line_with("latency", rendered).split()[-4:] == ["10.00", "8.00", "1.25x", "faster"]
    assert line_with("peak memory", rendered).split()[-3:] == ["80.0", "%", "kept"]


@pytest.mark.parametrize(("latency", "words"), [(20.0, "0.50x (slower)"), (10.01, "1.00x as fast")])
def test_a_model_that_is_not_faster_is_not_called_faster(latency: float, words: str) -> None:
    rendered = render(replace(REPORT, compressed=replace(REPORT.compressed, latency_ms=latency)))
    assert line_with("latency", rendered).endswith(words)


def test_a_missed_budget_is_said_in_capitals() -> None:
    assert "budget met: NO" in render(replace(REPORT, budget_met=False))


def test_every_limit_says_whether_it_is_met() -> None:
    limits = (
        LimitReport("sketchable weights", 5_400_000, 5_312_000, "numbers", met=True),
        LimitReport("operations of the sketchable layers", 2 * 10**9, 10**9, "FLOPs", met=True),
        LimitReport("saved file", 70_000_000, 68_000_000, "bytes", met=True),
        LimitReport("latency", 12.0, 11.9, "ms", met=True),
        LimitReport("peak memory", 80_000_000, None, "bytes", met=False),
        LimitReport("drop of eval_fn", 0.01, 0.0123, "", met=False),
    )
    lines = render(replace(REPORT, budget_met=False, limits=limits)).splitlines()
    assert lines[1:8] == [
        "budget met: NO - this is the best that was found",
        "  sketchable weights 5.312 of 5.4 M: met",
        "  operations of the sketchable layers 1 of 2 GFLOPs: met",
        "  saved file 68 of 70 MB: met",
        "  latency 11.9 of 12 ms: met",
        "  peak memory not measured of 80 MB: NOT met",
        "  drop of eval_fn 0.0123 of 0.01: NOT met",
    ]


def test_what_was_not_measured_is_not_shown_as_a_number() -> None:
    counted = Figures(10, 10, 10)
    rendered = render(replace(REPORT, dense=counted, compressed=counted, agreement={}, metric=None))
    assert "latency" not in rendered and "peak memory" not in rendered and "eval_fn" not in rendered
    assert "agreement with the dense model: not measured" in rendered


def test_agreement_says_whether_the_batches_were_kept_aside() -> None:
    assert "3 batches (held-out): cosine 0.9123, relative error 0.4000" in render(REPORT)
    seen = render(replace(REPORT, agreement_held_out=False, agreement_batches=1))
    assert "1 batch (not held-out)" in seen


HISTORY = (
    (0.1, "before", 0.3714),
    (9.0, "refit", 0.3111),
    (50.0, "blocks", 0.2001),
    (80.0, "distill", 0.17),
    (112.0, "distill", 0.158),
)


@pytest.mark.parametrize(
    ("healed", "line"),
    [
        (
            Healed(112.3, 1840, 0.3714, 0.158, HISTORY),
            "healed 112 s: refit .371 -> .311, blocks -> .200, distill -> .158 of the held-out loss; 1,840 steps",
        ),
        (Healed(9.2, 0, 1.3714, 0.0042, ((0, "before", 1.3714), (9, "refit", 0.0042))), "refit 1.371 -> 0.0042 of"),
        (Healed(0.2, 0, 0.5, 0.5, ((0, "before", 0.5),)), "healed 0 s: nothing was done at .500 of the held-out loss"),
        (Healed(0.2, 0, 0.0, 0.0, ((0, "before", 0.0),)), "nothing was done at 0 of"),
    ],
)
def test_healing_is_one_line_with_what_each_stage_reached(healed: Healed, line: str) -> None:
    assert line in line_with("healed ", render(replace(REPORT, healing=healed)))


def test_without_healing_there_is_no_line_of_it_and_json_has_all_of_it() -> None:
    assert "healed" not in render(REPORT) and json.loads(REPORT.to_json())["healing"] is None
    healed = Healed(112.0, 840, 0.4, 0.2, HISTORY, ("one note",))
    data = json.loads(replace(REPORT, healing=healed).to_json())["healing"]
    assert data["history"] == [list(row) for row in HISTORY] and data["notes"] == ["one note"] and data["steps"] == 840


def test_metric_seconds_environment_and_notes_are_shown() -> None:
    rendered = render(REPORT)
    assert "eval_fn: dense 0.9000, compressed 0.8500 (-0.0500)" in rendered
    assert "seconds: capture 1.2, verify 3.0" in rendered
    assert "measured with: torch 2.13.0, threads 2" in rendered
    assert "note: the calibration set is small" in rendered


def test_long_names_are_folded_and_never_cut() -> None:
    name = "model.decoder.layers.11.self_attention.query_key_value_projection." + "x" * 60
    rendered = render(replace(REPORT, layers=(replace(ROW, name=name),)))
    assert max(map(len, rendered.splitlines())) <= WIDTH
    lines = rendered.splitlines()
    start, end = (next(i for i, line in enumerate(lines) if line.startswith(word)) for word in ("layer ", "kept: "))
    width = lines[start].index("shape")
    assert "".join(line[:width].strip() for line in lines[start + 2 : end]) == name


def test_there_are_no_colour_codes_and_brackets_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    rendered = render(replace(REPORT, notes=("shape [bold]4[/bold]",), layers=(replace(LEFT, reason="used by x[0]"),)))
    assert "\x1b" not in rendered
    assert "shape [bold]4[/bold]" in rendered and "used by x[0]" in rendered


def test_a_model_without_dense_layers_still_has_a_report() -> None:
    assert "0 of 0 dense layers" in render(replace(REPORT, layers=()))


def test_every_renderer_gives_text_that_names_the_target() -> None:
    assert set(RENDERERS) == {"text", "html", "json"}
    for renderer in RENDERERS.values():
        assert REPORT.target in renderer(REPORT)
    assert json.loads(RENDERERS["json"](REPORT))["layers"][0]["ranks"] == [152]


def test_str_of_a_report_is_the_text() -> None:
    assert str(REPORT) == RENDERERS["text"](REPORT)


TRIALS = (
    TrialReport(0, "given", 0.8756, 0.4999, 7.5, {"floor": 0.5, "power": 1.0, "depth": 0.0}),
    TrialReport(1, "gp", None, 0.4987, 7.5, {"floor": 0.25, "attention": 1.5}, "RuntimeError: diverged"),
    TrialReport(2, "finer gp", 0.8812, 0.5, 7.5, {"floor": 0.25, "encoder.*.query": -1.25}),
)
TUNED = Tuning("eval_fn", (0.8756, 0.4999), (0.8812, 0.5), TRIALS, "trials", 25.0, 1.0)


def test_a_tuned_search_shows_its_gain_and_every_trial() -> None:
    rendered = render(replace(REPORT, tuning=TUNED))
    assert "tuned on eval_fn: best 0.8812, sensitivity plan 0.8756 (+0.0056); 3 plans in 25 s, 4% of it" in rendered
    assert " ".join(line_with("finer gp", rendered).split()) == (
        "2 finer gp 0.8812 50.0 % floor 0.25, encoder.*.query -1.2"
    )
    assert "RuntimeError: diverged" in rendered and "depth" not in line_with("given", rendered)
    assert max(map(len, rendered.splitlines())) <= WIDTH


def test_a_tuned_search_for_the_smallest_model_shows_sizes() -> None:
    smallest = replace(TUNED, start=(0.87, 0.42), best=(0.87, 0.4), is_smallest=True, stopped_by="interrupt")
    rendered = " ".join(render(replace(REPORT, tuning=smallest)).split())
    assert "smallest plan keeps 40.00%, sensitivity plan 42.00% (-2.00 points)" in rendered
    assert "ended by Ctrl-C" in rendered


def test_without_eval_fn_the_report_says_what_was_tuned_on() -> None:
    rendered = render(replace(REPORT, tuning=replace(TUNED, objective="divergence", start=(None, 0.5))))
    assert "tuned on closeness to the dense model (minus the divergence): best 0.8812, the sensitivity plan could" in (
        " ".join(rendered.split())
    )


def test_a_tuned_search_goes_to_json_with_its_knobs() -> None:
    data = json.loads(RENDERERS["json"](replace(REPORT, tuning=TUNED)))["tuning"]
    assert data["trials"][2]["knobs"] == {"floor": 0.25, "encoder.*.query": -1.25} and data["best"] == [0.8812, 0.5]


# As HTML


class Page(HTMLParser):
    """The texts of a page's paragraphs and cells; every tag that is opened must be closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.tags: set[str] = set()
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert not {"src", "href"} & {name for name, _ in attrs}  # nothing is fetched
        self.tags.add(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("p", "th", "td"):
            self.texts.append(data)


def test_the_page_says_all_that_the_text_says() -> None:
    report = replace(REPORT, tuning=TUNED, healing=Healed(1.0, 0, 0.5, 0.25, ((1.0, "refit", 0.25),)))
    words = " ".join(render(report).replace("\u2500", "").split())
    page = " ".join(" ".join(Page(report.to_html()).texts).split())
    assert sorted(page.split()) == sorted(words.split()) and RENDERERS["html"](report) == report.to_html()


def test_names_are_text_and_no_markup_of_the_page() -> None:
    row = replace(ROW, name="<script>alert(1)</script>")
    page = Page(replace(REPORT, layers=(row,), notes=("a < b & c",)).to_html())
    assert row.name in page.texts and "note: a < b & c" in page.texts and "script" not in page.tags


def test_a_page_needs_no_layer() -> None:
    counted = Figures(10, 10, 10)
    assert Page(Report("", False, "", (), counted, counted).to_html()).texts[0] == "target: none"
