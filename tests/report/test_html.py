"""Pages: well-formed, self-contained, names escaped, figures to scale."""

import re
from html.parser import HTMLParser

import pytest

from onnxcomp.report.figures import latency_figure, losses_figure, macs_figure
from onnxcomp.report.html import render
from onnxcomp.report.inspection import LayerChange
from tests.report.reports import HOSTILE, made_up_report

VOID = {"meta"}
LAYERS = (
    LayerChange("a", 400, 100),
    LayerChange(HOSTILE, 200, 200),
    LayerChange("new", 0, 50),
)


class Tags(HTMLParser):
    """Collects tags and text, and insists that every tag is closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def parsed(page: str) -> Tags:
    tags = Tags()
    tags.feed(page)
    tags.close()
    assert tags.open == []
    return tags


def test_headers_keep_their_own_bars():
    assert "max |change|" in parsed(render(made_up_report(), ())).text


def test_the_front_tells_predicted_and_found_changes():
    _, text = parsed(render(made_up_report(), ())).text.split("What other limits would have")
    assert text.index("90.0 %") < text.index("50.0 %")
    assert "10.0 %15.0 %" in text.replace("\n", "")  # roots of the loss and of the error
    assert "other limits" not in parsed(render(made_up_report(front=()), ())).text


def test_page_is_well_formed_and_loads_nothing():
    page = render(made_up_report(), LAYERS)
    tags = parsed(page)
    assert not {"script", "link", "img", "iframe"} & set(tags.seen)
    assert tags.seen.count("svg") == 3
    for reference in ("http:", "https:", "src=", "url(", "@import"):
        assert reference not in page
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page


def test_check_of_the_page_bites():
    with pytest.raises(AssertionError):
        parsed("<p><b></p></b>")
    with pytest.raises(AssertionError):
        parsed("<p>")


def test_page_tells_everything():
    text = parsed(render(made_up_report(), LAYERS)).text
    for expected in (
        "fitted and judged on random inputs only",
        "30.0 M",
        "1.50x (95 %: 1.40 to 1.60)",
        "top1: 0.9800, then 0.9700",
        "80.0 % of the original's MACs",
        "the target calls it slower",
        "judged on 100 samples",
        "walk",
    ):
        assert expected in text
    assert "A limit was not met" not in text
    assert "A limit was not met" in render(made_up_report(met=False))


def test_names_are_text():
    page = render(made_up_report(), LAYERS)
    assert "\x1b" not in page
    assert HOSTILE.replace("\x1b", "\\x1b").replace("\n", "\\n") in parsed(page).text


def widths(svg: str, kind: str) -> list[float]:
    return [float(w) for w in re.findall(rf'class="{kind}"[^>]* width="([0-9.]+)"', svg)]


def test_bars_are_to_scale():
    svg = macs_figure(LAYERS)
    before, after = widths(svg, "before"), widths(svg, "after")
    assert before[0] == max(before + after) > 0
    scaled = [400 * w / before[0] for w in before + after]
    assert scaled == pytest.approx([400, 200, 0, 100, 200, 50], abs=0.2)


def test_losses_are_drawn_largest_first():
    drawn = widths(losses_figure(made_up_report().actions), "after")
    assert len(drawn) == 40
    assert drawn == sorted(drawn, reverse=True)


def test_intervals_are_drawn_around_their_ratios():
    svg = latency_figure(["original", "result"], made_up_report().benchmark)
    lines = re.findall(r'class="interval" x1="([0-9.]+)" x2="([0-9.]+)"', svg)
    dots = [float(x) for x in re.findall(r'cx="([0-9.]+)"', svg)]
    one = float(re.findall(r'class="one" x1="([0-9.]+)"', svg)[0])
    assert len(lines) == len(dots) == 2
    for (low, high), dot in zip(lines, dots, strict=True):
        assert float(low) < dot < float(high)
    assert dots[0] > one
    assert dots[1] == pytest.approx(one, abs=0.2)


def test_report_without_latency_has_no_figure_of_it():
    report = made_up_report(benchmark=None, actions=())
    assert parsed(render(report)).seen.count("svg") == 0
    assert macs_figure([]) == losses_figure([]) == ""


def test_saved_report_is_the_page(tmp_path):
    report = made_up_report()
    report.save(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == render(report)
