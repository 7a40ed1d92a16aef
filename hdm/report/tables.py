"""One table, three forms: HTML, Markdown, LaTeX (booktabs)."""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

# What LaTeX reads as something else, and what it has no letter for.
_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "_": r"\_", "%": r"\%",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "−": "$-$", "–": "--", "×": r"$\times$", "∞": r"$\infty$",
    "<": "$<$", ">": "$>$", "|": r"\textbar{}", "²": r"\textsuperscript{2}", "≤": r"$\leq$", "·": r"$\cdot$",
    '"': r"\textquotedbl{}",
}  # fmt: skip


@dataclass(kw_only=True, slots=True)
class Table:
    """Cells as plain text. `text` names the columns that hold words and stand at the left; `marks` gives rows a CSS class."""

    name: str
    title: str
    columns: list[str]
    rows: list[list[str]]
    caption: str = ""
    text: Sequence[int] = (0,)
    marks: dict[int, str] = field(default_factory=dict)

    def html(self) -> str:
        """A <table> in a frame of its own, which scrolls sideways on a narrow screen."""

        def row(cells: Sequence[str], tag: str, mark: str = "") -> str:
            texts = (f"<{tag}{'' if i in self.text else ' class=n'}>{html.escape(cell)}</{tag}>" for i, cell in enumerate(cells))
            return f"<tr{f' class={mark}' if mark else ''}>{''.join(texts)}</tr>"

        lines = [row(cells, "td", self.marks.get(number, "")) for number, cells in enumerate(self.rows)]
        head, body = row(self.columns, "th"), "\n".join(lines)
        return f'<div class=scroll><table id="table-{self.name}">\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'

    def markdown(self) -> str:
        """A pipe table, with its caption below."""
        rule = [":---" if i in self.text else "---:" for i in range(len(self.columns))]
        rows = [self.columns, rule, *self.rows]
        lines = [f"| {' | '.join(_markdown(cell) for cell in cells)} |" for cells in rows]
        return "\n".join([*lines, *(["", self.caption] if self.caption else []), ""])

    def latex(self) -> str:
        r"""A table environment; needs \usepackage{booktabs}."""
        align = "".join("l" if i in self.text else "r" for i in range(len(self.columns)))
        lines = [f"  {' & '.join(latex(cell) for cell in cells)} \\\\" for cells in self.rows]
        return "\n".join(
            [
                r"\begin{table}",
                r"  \centering",
                f"  \\caption{{{latex(self.caption)}}}",
                f"  \\label{{tab:{self.name}}}",
                f"  \\begin{{tabular}}{{{align}}}",
                r"  \toprule",
                f"  {' & '.join(latex(cell) for cell in self.columns)} \\\\",
                r"  \midrule",
                *lines,
                r"  \bottomrule",
                r"  \end{tabular}",
                r"\end{table}",
                "",
            ]
        )


def latex(text: str) -> str:
    """`text` so that LaTeX prints it as it is."""
    return re.sub(r"e\$-\$(\d+)", r"$\\times 10^{-\1}$", "".join(_LATEX.get(letter, letter) for letter in text))


def _markdown(text: str) -> str:
    """`text` without what would end a cell or begin a tag."""
    return re.sub(r"([|<*_`\\])", r"\\\1", text)
