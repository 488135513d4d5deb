"""The tables in the README and the card are those of the result files."""

import json

import pytest

from bench import report


@pytest.mark.parametrize("page", report.PAGES, ids=lambda path: path.parent.name)
def test_pages_are_up_to_date(page):
    text = page.read_text(encoding="utf-8")
    assert report.filled(text) == text, "run python -m bench.report"


def test_an_edited_figure_is_replaced():
    page = "before\n<!-- acceptance -->\n| 9.99 |\n<!-- end -->\nafter"
    assert report.filled(page) == f"before\n<!-- acceptance -->\n{report.acceptance()}\n<!-- end -->\nafter"


def test_an_unknown_table_is_named():
    with pytest.raises(ValueError, match="nonsense.*allowed: acceptance"):
        report.filled("<!-- nonsense -->\n<!-- end -->")


def test_what_was_not_measured_says_so(tmp_path, monkeypatch):
    row = {"depth": 4, "branch": 1, "num_nodes": 5, "temperature": 0.0, "tokens_per_round": 1.5,
           "acceptance_by_depth": [0.5, 0.25]}
    (tmp_path / "acceptance.json").write_text(json.dumps({"shapes": [row]}))
    monkeypatch.setattr(report, "BUNDLED", tmp_path)
    assert "| chain of 4 | 1.50 | not measured | 0.50 0.25 |" in report.acceptance()
