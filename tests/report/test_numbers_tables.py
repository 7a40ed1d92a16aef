"""Numbers and tables as text."""

import math
import shutil
import subprocess

import pytest

from hdm.report.numbers import Digits, duration, p_value, short
from hdm.report.tables import Table, latex

AWKWARD = r"lr=1e-4 & 50% of $x_1^2$ {a} #3 ~ \end <b>|` ± −1 – ∞"


@pytest.mark.parametrize(
    ("spreads", "text"), [([0.0123, 0.02, 0.001], "0.412"), ([3.4], "0.4"), ([math.nan], "0.41235"), ([1e-12], "0.41234568")]
)
def test_decimals_follow_the_spread(spreads, text):
    assert Digits.of([0.412345678], spreads).text(0.412345678) == text


def test_signs_and_what_is_not_a_number():
    write = Digits(decimals=2)
    assert [write.text(v, sign=True) for v in (0.5, -0.5, math.nan, math.inf, -math.inf)] == ["+0.50", "−0.50", "–", "∞", "−∞"]
    assert (write.spread(1.0, 0.25), write.spread(1.0, math.nan)) == ("1.00 ± 0.25", "1.00")
    assert [p_value(p) for p in (0.03125, 1.0, 0.00006)] == ["0.031", "1.000", "6e−5"]
    assert [short(v) for v in (27744.0, 1.32e12, 0.52, math.nan)] == ["27.7k", "1.32T", "0.52", "–"]
    assert [duration(v) for v in (42.0, 1062.0, 9000.0)] == ["42 s", "17.7 min", "2.5 h"]


def table():
    rows = [["merge=a_b", "0.1 ± 0.2", "6e−5"], [AWKWARD, "–", ""]]
    return Table(name="results", title="Results", columns=["setting", "loss_x", "p < 0.05"], rows=rows, caption="50 % & more")


def test_latex_escapes_what_latex_would_read():
    assert latex("a_b & 5% ± −2") == r"a\_b \& 5\% $\pm$ $-$2"
    assert latex("6e−5") == r"6$\times 10^{-5}$"
    text = table().latex()
    assert text.count(r"\toprule") == text.count(r"\bottomrule") == 1
    assert text.count(" & ") == 2 * 3
    assert r"\begin{tabular}{lrr}" in text


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex (apt-get install texlive-latex-recommended)")
def test_latex_compiles(tmp_path):
    source = "\\documentclass{article}\\usepackage[T1]{fontenc}\\usepackage{booktabs}\\begin{document}\n%s\\end{document}"
    (tmp_path / "t.tex").write_text(source % table().latex(), encoding="utf-8")
    done = subprocess.run(["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stdout[-2000:]


def test_markdown_cells_stay_cells():
    lines = table().markdown().splitlines()
    assert lines[1] == "| :--- | ---: | ---: |"
    assert lines[3].replace(r"\|", "").count("|") == 4
    assert r"\<b>" in lines[3]


def test_html_is_escaped():
    text = table().html()
    assert "&lt;b&gt;" in text and "<b>" not in text
    assert text.count("<tr") == 3
