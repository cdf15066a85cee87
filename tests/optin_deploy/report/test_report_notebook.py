from rich.text import Text

from optin_deploy.report import Report
from optin_deploy.utils.display import framed, html_of


def test_what_a_terminal_shows_is_a_piece_of_html() -> None:
    shown = html_of(Text("a < b", style="bold"))
    assert shown.startswith("<pre") and "a &lt; b" in shown and "font-weight: bold" in shown


def test_a_page_is_framed_whole() -> None:
    assert framed('<p class="a">&amp;</p>').count('"') == 4
    assert "&lt;p class=&quot;a&quot;&gt;&amp;amp;&lt;/p&gt;" in framed('<p class="a">&amp;</p>')


def test_a_report_shows_its_page_and_its_verdict(report: Report) -> None:
    assert report._repr_html_().startswith("<iframe srcdoc=") and len(report._repr_html_()) > 5000
    assert repr(report) == str(report) and len(repr(report)) < 600 and report.model.name in repr(report)
